//! Pages are installed whatever events the program causes: threads in madvise without a pause, a
//! balloon.

use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{ForeignMemory, LossPolicy, Options, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, EVENT_REMOVE, Faulter};
use postcopy_tests::fixtures::noise;
use postcopy_tests::{PAGE, is_root, skip};
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;
const PAGES: usize = 4096;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);

/// A process that a session fills. Some of its threads give the last pages back without a pause,
/// each thread its own ones.
struct Storm {
    source: Source,
    faulter: Faulter,
    session: Session,
}

impl Storm {
    /// As Firecracker has it, but for its pid.
    fn start(threads: usize, options: Options, features: u64, server: Option<&str>) -> Self {
        let source = Source::start(noise(PAGES * PAGE, 90), CHUNK);
        let mut faulter = Faulter::start(features, &[&format!("private:{PAGES}")]);
        let regions = [faulter.region(0, "mem", 0)];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        let address =
            server.map_or_else(|| source.server.address().clone(), |server| server.parse().unwrap());
        let session = Session::attach(&address, &"app".parse().unwrap(), options, &memory).unwrap();
        faulter.let_go();
        for thread in 0..threads {
            let first = faulter.at(0, PAGES - 16 * (thread + 1));
            faulter.main.does(&format!("storm {first} 16"));
        }
        Self { source, faulter, session }
    }

    /// Touches pages from all over the memory, one after another: how long each took.
    fn touch(&mut self, count: usize) -> Vec<Duration> {
        self.touch_for(count, WATCHDOG)
    }

    /// The same, and begins no touch after this time.
    fn touch_for(&mut self, count: usize, time: Duration) -> Vec<Duration> {
        let (started, mut took) = (Instant::now(), Vec::new());
        while took.len() < count && started.elapsed() < time {
            let page = took.len() * 997 % (PAGES - 256);
            let touched = Instant::now();
            self.faulter.assert_reads(0, page, &self.source.bytes[page * PAGE..][..PAGE]);
            took.push(touched.elapsed());
        }
        took.sort_unstable();
        took
    }
}

fn holding() -> Options {
    Options::DEFAULT.hold_causers(true)
}

#[test]
fn a_thread_in_madvise_without_a_pause_keeps_no_page_out() {
    let test = "progress::a_thread_in_madvise_without_a_pause_keeps_no_page_out";
    if !is_root() {
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        // Two threads can keep a page out for long where they and the pager share two cores:
        // `make bench` measures that.
        for features in [EVENT_REMOVE, ALL_EVENTS] {
            let mut storm = Storm::start(1, Options::DEFAULT, features, None);
            let took = storm.touch_for(100, Duration::from_secs(15));
            let (middle, longest) = (took[took.len() / 2], took[took.len() - 1]);
            println!("not held: {} accesses, median {middle:?}, longest {longest:?}", took.len());
            assert_eq!((storm.session.error(), storm.session.progress().holds), (None, 0));
        }
    });
}

#[test]
fn four_and_eight_threads_in_madvise_are_held_and_keep_no_page_out() {
    let test = "progress::four_and_eight_threads_in_madvise_are_held_and_keep_no_page_out";
    if !is_root() {
        return skip(test, "attaching and ptrace need root");
    }
    within(WATCHDOG, || {
        for (threads, features) in [(4, EVENT_REMOVE), (8, EVENT_REMOVE), (4, ALL_EVENTS)] {
            let mut storm = Storm::start(threads, holding(), features, None);
            let took = storm.touch(100);
            let holds = storm.session.progress().holds;
            println!("{threads} threads, {holds} holds: median {:?}, longest {:?}", took[50], took[99]);
            assert_eq!(storm.session.error(), None);
            assert!(holds > 0, "they were in nobody's way");
            // They go on afterwards, and so does the process.
            let status = std::fs::read_to_string(format!("/proc/{}/status", storm.faulter.main.pid)).unwrap();
            assert!(status.contains("TracerPid:\t0"), "{status}");
        }
    });
}

/// The causer of an event that is read causes the next one. So a pager that reads until there is no
/// event would do nothing else.
#[test]
fn a_child_s_page_comes_while_sixty_four_threads_of_its_parent_are_in_madvise() {
    let test = "progress::a_child_s_page_comes_while_sixty_four_threads_of_its_parent_are_in_madvise";
    if !is_root() {
        return skip(test, "attaching and ptrace need root");
    }
    within(WATCHDOG, || {
        let mut storm = Storm::start(0, holding(), ALL_EVENTS, None);
        let mut child = storm.faulter.fork();
        for thread in 0..64 {
            let first = storm.faulter.at(0, PAGES - 4 * (thread + 1));
            storm.faulter.main.does(&format!("storm {first} 4"));
        }
        let mut took = Vec::new();
        for index in 0..30 {
            let page = index * 97;
            let started = Instant::now();
            let at = storm.faulter.at(0, page);
            child.assert_reads(at, &storm.source.bytes[page * PAGE..][..PAGE]);
            took.push(started.elapsed());
        }
        took.sort_unstable();
        println!("{} holds: median {:?}, longest {:?}", storm.session.progress().holds, took[15], took[29]);
        assert_eq!(storm.session.error(), None);
    });
}

/// A thread that sleeps in a page fault when others are held continues when the fault is resolved,
/// and causes the next event. Prints the times; a bound on them would fail on a busy machine.
#[test]
fn many_threads_that_access_what_they_give_back_keep_no_page_out() {
    let test = "progress::many_threads_that_access_what_they_give_back_keep_no_page_out";
    if !is_root() {
        return skip(test, "attaching and ptrace need root");
    }
    within(WATCHDOG, || {
        for threads in [12, 32] {
            let mut storm = Storm::start(0, holding(), EVENT_REMOVE, None);
            for thread in 0..threads {
                let first = storm.faulter.at(0, PAGES - 4 * (thread + 1));
                storm.faulter.main.does(&format!("churn {first} 4"));
            }
            let took = storm.touch(60);
            let holds = storm.session.progress().holds;
            println!("{threads} threads, {holds} holds: median {:?}, longest {:?}", took[30], took[59]);
            assert_eq!(storm.session.error(), None);
        }
    });
}

#[test]
fn a_fill_gets_through_threads_in_madvise() {
    if !is_root() {
        return skip("progress::a_fill_gets_through_threads_in_madvise", "attaching and ptrace need root");
    }
    within(WATCHDOG, || {
        for threads in [1, 2, 4] {
            let storm = Storm::start(threads, holding(), EVENT_REMOVE, None);
            let started = Instant::now();
            storm.session.fill().unwrap();
            storm.session.wait_resident(MINUTE).unwrap();
            println!("{threads} threads: filled after {:?}", started.elapsed());
        }
    });
}

#[test]
fn poison_gets_through_threads_in_madvise() {
    if !is_root() {
        return skip("progress::poison_gets_through_threads_in_madvise", "attaching and ptrace need root");
    }
    within(WATCHDOG, || {
        let silent = || {
            let source = Source::start(noise(PAGES * PAGE, 90), CHUNK);
            let lies = Lies::default().chunk(|_, _: ChunkAnswer| Vec::new());
            (Chaos::start(source.server.address(), lies), source)
        };
        let (liar, _source) = silent();
        let deadline = Duration::from_secs(2);
        let options = holding().fault_deadline(deadline).on_loss(LossPolicy::Poison);
        let mut storm = Storm::start(4, options, EVENT_REMOVE, Some(&liar.address().to_string()));
        let mut toucher = storm.faulter.thread();
        let started = Instant::now();
        toucher.tell(&format!("read {} 1", storm.faulter.at(0, 3)));
        assert_eq!(toucher.answer(), None, "SIGBUS ends the process");
        println!("poisoned after {:?}, deadline {deadline:?}", started.elapsed());
        assert!(storm.session.error().is_some());
    });
}

#[test]
fn a_balloon_s_thousands_of_madvises_keep_no_page_out() {
    if !is_root() {
        return skip("progress::a_balloon_s_thousands_of_madvises_keep_no_page_out", "attaching needs root");
    }
    within(WATCHDOG, || {
        let mut storm = Storm::start(0, Options::DEFAULT, EVENT_REMOVE, None);
        let mut balloon = storm.faulter.thread();
        balloon.tell(&format!("storm {} 1", storm.faulter.at(0, PAGES - 1)));
        let took = storm.touch(100);
        println!("beside a balloon: median {:?}, longest {:?}", took[50], took[99]);
        assert_eq!(storm.session.error(), None);
    });
}
