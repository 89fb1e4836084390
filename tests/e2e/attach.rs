//! Memory of another process, filled through a userfaultfd that it has opened.

use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::uffd::pagemap::guards_are_seen;
use postcopy::{FailureEnd, ForeignMemory, LossPolicy, Options, Session, SessionError};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::is_root;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::{skip, wait_until};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const PAGES: usize = 300;
const WATCHDOG: Duration = Duration::from_secs(100);
const SIGBUS: i32 = 7;
const DONTNEED: i32 = 4;
const WIPEONFORK: i32 = 18;
const KEEPONFORK: i32 = 19;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
const FILLING: Options = Options::DEFAULT.fill(true);

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 70);
    bytes[100 * PAGE..140 * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

impl Source {
    fn attach(&self, faulter: &Faulter, options: Options) -> Result<Session, SessionError> {
        // Two regions, as a guest above 3 GiB has them, not in the order of the file, within chunks.
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let reference = "app".parse().unwrap();
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        Session::attach(self.server.address(), &reference, options, &memory)
    }

    fn pages(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes[first * PAGE..(first + count) * PAGE]
    }

    /// The same, where it is known whose memory it is.
    fn attach_known(&self, faulter: &Faulter, options: Options) -> Session {
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        Session::attach(self.server.address(), &"app".parse().unwrap(), options, &memory).unwrap()
    }
}

fn faulter() -> Faulter {
    Faulter::start(ALL_EVENTS, &["private:197", "private:100"])
}

/// Runs a test with a server and a process. Serving another process takes the right to serve the kernel's faults.
fn with_faulter(test: &str, work: impl FnOnce(Source, Faulter) + Send + 'static) {
    if !is_root() {
        return skip(&format!("attach::{test}"), "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || work(start(), faulter()));
}

#[test]
fn another_process_s_memory_is_filled_as_it_touches_it() {
    with_faulter("another_process_s_memory_is_filled_as_it_touches_it", |source, first| {
        for (options, mut faulter) in [(Options::default(), first), (FILLING, faulter())] {
            // A touch that waits already when somebody comes.
            let waits = faulter.at(0, 50);
            faulter.main.tell(&format!("read {waits} 1"));
            let session = source.attach(&faulter, options).unwrap();
            faulter.let_go();
            faulter.main.assert_answers(waits, source.pages(153, 1));
            if options.fill {
                session.wait_resident(Duration::from_secs(30)).unwrap();
            }
            faulter.main.does(&format!("write {} 1 42", faulter.at(1, 7)));
            faulter.assert_reads(1, 7, &[42; PAGE]);
            faulter.assert_reads(1, 8, source.pages(11, 92));
            faulter.assert_reads(0, 0, source.pages(103, 197));
            faulter.assert_reads(1, 0, source.pages(3, 7));
            let progress = session.progress();
            assert_eq!((progress.total_pages, progress.poisoned_pages), (297, 0));
            assert!(!options.fill || progress.faults <= 1, "{progress:?}");
        }
    });
}

#[test]
fn what_the_owner_gives_back_stays_zero() {
    with_faulter("what_the_owner_gives_back_stays_zero", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 40, source.pages(143, 4));
        // Pages that are there, and some that never were.
        faulter.main.does(&format!("advise {DONTNEED} {} 10", faulter.at(0, 42)));
        faulter.assert_reads(0, 40, source.pages(143, 2));
        faulter.assert_reads(0, 42, &[0; 10 * PAGE]);
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        faulter.assert_reads(0, 42, &[0; 10 * PAGE]);
        faulter.assert_reads(0, 52, source.pages(155, 145));
        assert_eq!(session.progress().removed_pages, 10);
    });
}

#[test]
fn guard_pages_stay_guards_and_are_zero_once_they_are_lifted() {
    const TEST: &str = "guard_pages_stay_guards_and_are_zero_once_they_are_lifted";
    with_faulter(TEST, |source, mut faulter| {
        if !guards_are_seen() {
            return skip(&format!("attach::{TEST}"), "guard pages are not seen before Linux 6.15");
        }
        let session = source.attach_known(&faulter, Options::default());
        faulter.let_go();
        let (near, far) = (faulter.at(0, 42), faulter.at(1, 50));
        for at in [near, far] {
            faulter.main.does(&format!("advise {GUARD_INSTALL} {at} 5"));
        }
        // A demand fault brings the others of its chunk, the fill all others.
        faulter.assert_reads(0, 41, source.pages(144, 1));
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        for at in [near, near + 4 * PAGE, far, far + 4 * PAGE] {
            let read = read_from_outside(faulter.main.pid, at, PAGE);
            assert_eq!(read, Err(nix::Error::EFAULT), "the guard at {at:#x} is there");
        }
        assert_eq!(session.progress().removed_pages, 10);
        for at in [near, far] {
            faulter.main.does(&format!("advise {GUARD_REMOVE} {at} 5"));
            faulter.main.assert_reads(at, &[0; 5 * PAGE]);
        }
        faulter.assert_reads(0, 47, source.pages(150, 150));
        faulter.assert_reads(1, 0, source.pages(3, 50));
        assert_eq!(session.error(), None);
    });
}

#[test]
fn the_owner_s_exit_ends_the_session_in_order() {
    with_faulter("the_owner_s_exit_ends_the_session_in_order", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(3, 1));
        faulter.kill();
        assert!(session.wait_end(Duration::from_secs(30)), "somebody looks");
        assert_eq!(session.error(), None, "that is no loss");
    });
}

#[test]
fn a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros() {
    with_faulter("a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 13, source.pages(16, 16));
        assert!(session.end(Duration::from_secs(30)));
        faulter.assert_reads(1, 13, source.pages(16, 16));
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 29)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
    });
}

/// If memory stayed registered after the end, the next mremap of it would wait for ever: no pager reads its event.
#[test]
fn a_session_s_end_leaves_no_memory_registered_that_moves_all_the_time() {
    let test = "a_session_s_end_leaves_no_memory_registered_that_moves_all_the_time";
    for round in 0..20 {
        with_faulter(test, move |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::default().hold_causers(true));
            faulter.main.does(&format!("shuttle {} 8", faulter.at(0, 16)));
            faulter.assert_reads(1, 13, source.pages(16, 16));
            assert!(session.end(Duration::from_secs(30)), "round {round}");
            // This process has the descriptor still, so the kernel waits for a reader.
            let before: usize = faulter.main.ask("moves").parse().unwrap();
            wait_until("it moves on", || faulter.main.ask("moves").parse::<usize>().unwrap() > before + 200);
            faulter.assert_reads(1, 13, source.pages(16, 16));
        });
    }
}

#[test]
fn a_lost_page_is_sigbus_in_the_other_process() {
    with_faulter("a_lost_page_is_sigbus_in_the_other_process", |source, mut faulter| {
        let lies = Lies::default().chunk(|_, answer| {
            vec![if answer.chunk == 2 { ChunkAnswer { result: None, ..answer } } else { answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let regions = [faulter.region(1, "mem", 0)];
        let reference = "app".parse().unwrap();
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        let session = Session::attach(chaos.address(), &reference, Options::default(), &memory).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(0, 32));
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 40)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
        assert!(session.error().unwrap().contains("chunk 2 of image"));
    });
}

#[test]
fn an_attach_that_fails_names_why_and_loses_nothing() {
    with_faulter("an_attach_that_fails_names_why_and_loses_nothing", |source, mut faulter| {
        let (first, second) = (faulter.region(0, "mem", 0), faulter.region(1, "mem", 0));
        let with = |change: fn(&mut postcopy::ForeignRegion)| {
            let mut region = first.clone();
            change(&mut region);
            region
        };
        let cases = [
            (vec![with(|r| r.len -= 1)], "region 0", "multiples of 4096"),
            (vec![second.clone(), with(|r| r.address += 1)], "region 1", "multiples of 4096"),
            (vec![with(|r| r.len = 0)], "region 0", "not zero"),
            (vec![with(|r| r.len = usize::MAX - 4095)], "region 0", "beyond all addresses"),
            (vec![with(|r| r.path = b"none".to_vec())], "region 0", "\"none\""),
            (vec![with(|r| r.offset_bytes = 104 * 4096)], "region 0", "1228800 bytes"),
            (vec![with(|r| r.offset_bytes = 5)], "region 0", "from byte 5"),
            (vec![with(|r| r.offset_bytes = u64::MAX - 4095)], "region 0", "1228800 bytes"),
            (vec![first.clone(), second.clone(), with(|r| r.len = 4096)], "region 2", "overlaps region 0"),
        ];
        let reference = "app".parse().unwrap();
        let address = source.server.address();
        let attach = |uffd, regions: &[_]| {
            let memory = ForeignMemory { uffd, regions, state: None, pid: None, is_registered: true };
            Session::attach(address, &reference, Options::default(), &memory)
        };
        for (regions, which, why) in cases {
            let error = attach(faulter.uffd(), &regions).unwrap_err().to_string();
            assert!(error.contains(which) && error.contains(why), "{error}");
        }
        let tracking = source.attach(&faulter, Options::DEFAULT.track_writes(true));
        assert!(matches!(tracking, Err(SessionError::NoTracking(_))));
        let file = tempfile::tempfile().unwrap();
        let error = attach(file.as_fd(), std::slice::from_ref(&first)).unwrap_err().to_string();
        assert!(error.contains("is no userfaultfd"), "{error}");
        let nowhere = "http://127.0.0.1:1".parse().unwrap();
        let regions = std::slice::from_ref(&first);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions, state: None, pid: None, is_registered: true };
        Session::attach(&nowhere, &reference, Options::default(), &memory).unwrap_err();

        // A touch during all of that waits, and is right in the end.
        let waits = faulter.at(0, 9);
        faulter.main.tell(&format!("read {waits} 1"));
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.main.assert_answers(waits, source.pages(112, 1));
        drop(session);
    });
}

/// The regions lie at other places than in the file: which of its pages is at an address.
const FIRST_PAGES: [usize; 2] = [103, 3];

#[test]
fn children_are_served_their_own_view_to_any_depth() {
    with_faulter("children_are_served_their_own_view_to_any_depth", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        let at = |page| faulter.at(0, page);
        let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
        let (a, b, c, d, e) = (at(0), at(20), at(40), at(60), at(80));
        faulter.main.assert_reads(a, image(0, 20));
        faulter.main.does(&format!("advise {DONTNEED} {b} 10"));
        faulter.main.does(&format!("write {c} 5 7"));
        let mut child = faulter.fork();
        // What the parent does from here on is its own affair, and the other way round.
        faulter.main.does(&format!("advise {DONTNEED} {d} 10"));
        child.does(&format!("advise {DONTNEED} {e} 10"));
        let mut grandchild = faulter.start_another(&mut child, "fork");
        grandchild.does(&format!("advise {DONTNEED} {c} 2"));
        for (who, toucher) in [&mut faulter.main, &mut child, &mut grandchild].into_iter().enumerate() {
            let zeros = vec![0; 10 * PAGE];
            toucher.assert_reads(a, image(0, 20));
            toucher.assert_reads(b, &zeros);
            toucher.assert_reads(b + 10 * PAGE, image(30, 10));
            let written = if who == 2 { 2 * PAGE } else { 0 };
            toucher.assert_reads(c, &[vec![0; written], vec![7; 5 * PAGE - written]].concat());
            toucher.assert_reads(d, if who == 0 { &zeros } else { image(60, 10) });
            toucher.assert_reads(e, if who == 0 { image(80, 10) } else { &zeros });
            toucher.assert_reads(e + 10 * PAGE, image(90, 107));
        }
        // Those that are left go on when one exits, and the last one's exit ends the session.
        faulter.kill();
        for toucher in [&mut child, &mut grandchild] {
            toucher.tell("exit");
        }
        assert!(session.wait_end(Duration::from_secs(30)), "all have exited");
        assert_eq!(session.error(), None);
    });
}

/// Checks memory that a fork wipes, resident and absent, in children.
fn assert_wiped_in_children(source: &Source, faulter: &mut Faulter) {
    let (wiped, kept, zeros) = (faulter.at(0, 105), faulter.at(0, 60), vec![0; 20 * PAGE]);
    let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
    // Of one chunk; the other one is absent.
    faulter.main.does(&format!("write {} 2 7", wiped + 18 * PAGE));
    faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
    faulter.main.does(&format!("advise {WIPEONFORK} {kept} 20"));
    faulter.main.does(&format!("advise {KEEPONFORK} {kept} 20"));
    let mut child = faulter.fork();
    // After the fork, which is the parent's affair.
    faulter.main.does(&format!("advise {WIPEONFORK} {kept} 20"));
    child.assert_reads(wiped, &zeros);
    child.assert_reads(kept, image(60, 20));
    child.does(&format!("write {} 1 9", wiped + PAGE));
    let mut grandchild = faulter.start_another(&mut child, "fork");
    grandchild.assert_reads(wiped, &zeros);
    grandchild.assert_reads(kept, image(60, 20));
    let mut second = faulter.fork();
    second.assert_reads(wiped, &zeros);
    second.assert_reads(kept, &zeros);
    faulter.main.assert_reads(wiped, &[image(105, 18), &[7; 2 * PAGE]].concat());
    faulter.main.assert_reads(kept, image(60, 20));
    child.assert_reads(wiped + PAGE, &[9; PAGE]);
    for who in [&mut faulter.main, &mut child, &mut grandchild, &mut second] {
        who.assert_reads(wiped + 20 * PAGE, image(125, 72));
        who.assert_reads(kept + 20 * PAGE, image(80, 25));
    }
}

#[test]
fn what_a_fork_wipes_is_zero_in_the_child_and_never_the_image_s_bytes() {
    with_faulter(
        "what_a_fork_wipes_is_zero_in_the_child_and_never_the_image_s_bytes",
        |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::default());
            faulter.let_go();
            assert_wiped_in_children(&source, &mut faulter);
            session.fill().unwrap();
            session.wait_resident(Duration::from_secs(30)).unwrap();
            assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
        },
    );
}

#[test]
fn what_a_fork_wipes_is_zero_while_the_fill_goes_on() {
    with_faulter("what_a_fork_wipes_is_zero_while_the_fill_goes_on", |source, mut faulter| {
        let session = source.attach_known(&faulter, Options::default());
        faulter.let_go();
        let wiped = faulter.at(0, 20);
        faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 170"));
        // A fork takes a while with these, and so does the look at them.
        faulter.main.does("mappings 1000");
        faulter.main.tell("fork");
        session.fill().unwrap();
        let mut child = faulter.forked();
        child.assert_reads(wiped, &[0; 170 * PAGE]);
        session.wait_resident(Duration::from_secs(30)).unwrap();
        child.assert_reads(wiped, &[0; 170 * PAGE]);
        faulter.assert_reads(0, 0, source.pages(FIRST_PAGES[0], 197));
        assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
    });
}

#[test]
fn a_child_waits_for_the_look_at_20_000_mappings_and_its_parent_does_not() {
    with_faulter(
        "a_child_waits_for_the_look_at_20_000_mappings_and_its_parent_does_not",
        |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::default());
            faulter.let_go();
            let (wiped, mut had) = (faulter.at(0, 20), 0);
            faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
            for count in [1, 1_000, 20_000] {
                faulter.main.does(&format!("mappings {}", count - had));
                had = count;
                let started = Instant::now();
                let mut child = faulter.fork();
                let forked = started.elapsed();
                let started = Instant::now();
                child.assert_reads(wiped, &[0; PAGE]);
                let first = started.elapsed();
                println!("{count} mappings: fork {forked:?}, the child's first access after {first:?}");
                child.assert_reads(wiped + PAGE, &[0; 19 * PAGE]);
                child.tell("exit");
            }
            assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
        },
    );
}

/// Reading their mappings takes longer than the search for one child may.
#[test]
fn what_forks_wipe_is_zero_in_each_child_of_a_burst() {
    with_faulter("what_forks_wipe_is_zero_in_each_child_of_a_burst", |source, mut faulter| {
        const CHILDREN: usize = 16;
        let session = source.attach_known(&faulter, Options::default());
        faulter.let_go();
        let wiped = faulter.at(0, 20);
        faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
        faulter.main.does("mappings 20000");
        let mut children: Vec<_> = (0..CHILDREN).map(|_| faulter.fork()).collect();
        for child in &mut children {
            child.tell(&format!("read {wiped} 20"));
        }
        for child in &mut children {
            child.assert_answers(wiped, &[0; 20 * PAGE]);
        }
        assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
    });
}

/// The pager is in a process of its own here, whose program `tests/planted` changes.
#[test]
fn guards_and_forks_are_seen_by_a_pager_in_a_process_of_its_own() {
    const TEST: &str = "guards_and_forks_are_seen_by_a_pager_in_a_process_of_its_own";
    with_faulter(TEST, |source, mut faulter| {
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let how = Serving { alone: true, ..Serving::default() };
        let address = source.server.address().to_string();
        let _keeper = Keeper::start(&address, "app", how, &faulter, &regions);
        faulter.let_go();
        assert_wiped_in_children(&source, &mut faulter);
        if guards_are_seen() {
            let near = faulter.at(1, 42);
            faulter.main.does(&format!("advise {GUARD_INSTALL} {near} 2"));
            faulter.assert_reads(1, 44, source.pages(47, 1));
            // The pager installs the neighbours after the accessed page. It cannot see a guard that is
            // lifted before, and this process cannot see when the pager is done.
            faulter.assert_reads(1, 29, source.pages(32, 13));
            std::thread::park_timeout(Duration::from_millis(300));
            faulter.main.does(&format!("advise {GUARD_REMOVE} {near} 2"));
            faulter.main.assert_reads(near, &[0; 2 * PAGE]);
        }
    });
}

#[test]
fn a_child_is_served_after_its_parent_has_exited() {
    with_faulter("a_child_is_served_after_its_parent_has_exited", |source, mut faulter| {
        let session = source.attach(&faulter, FILLING).unwrap();
        faulter.let_go();
        let mut child = faulter.fork();
        let mut grandchild = faulter.start_another(&mut child, "fork");
        child.tell("exit");
        assert_eq!(child.answer(), None);
        faulter.kill();
        grandchild.assert_reads(faulter.at(1, 0), source.pages(3, 100));
        session.wait_resident(Duration::from_secs(30)).unwrap();
        grandchild.assert_reads(faulter.at(0, 0), source.pages(103, 197));
    });
}

#[test]
fn memory_that_is_moved_cut_and_grown_stays_right() {
    with_faulter("memory_that_is_moved_cut_and_grown_stays_right", |source, mut faulter| {
        const MAYMOVE: i32 = 1;
        const DONTUNMAP: i32 = 4;
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
        let start = faulter.at(0, 0);
        let main = &mut faulter.main;
        main.assert_reads(start, image(0, 4));
        main.does(&format!("advise {DONTNEED} {} 4", start + 30 * PAGE));
        main.does(&format!("unmap {} 8", start + 100 * PAGE));
        // A part of the middle goes elsewhere: pages that are there, absent, removed.
        let to: usize = main.ask("reserve 300").parse().unwrap();
        let moved = main.ask(&format!("remap {} 40 40 {MAYMOVE} {to}", start + 2 * PAGE));
        assert_eq!(moved, to.to_string());
        main.assert_reads(to, image(2, 28));
        main.assert_reads(to + 28 * PAGE, &[0; 4 * PAGE]);
        main.assert_reads(to + 32 * PAGE, image(34, 8));
        main.assert_reads(start, image(0, 2));
        main.assert_reads(start + 42 * PAGE, image(42, 58));
        main.assert_reads(start + 108 * PAGE, image(108, 20));
        // What is left behind is zero, what it grows by, too.
        let rest = start + 108 * PAGE;
        let away = main.ask(&format!("remap {rest} 30 30 {} 0", MAYMOVE | DONTUNMAP)).parse().unwrap();
        main.assert_reads(rest, &[0; 30 * PAGE]);
        main.assert_reads(away, image(108, 30));
        let last = start + 190 * PAGE;
        let grown: usize =
            main.ask(&format!("remap {last} 7 50 {MAYMOVE} {}", to + 100 * PAGE)).parse().unwrap();
        main.assert_reads(grown + 6 * PAGE, &[image(196, 1), &[0; 43 * PAGE]].concat());
        main.assert_reads(grown, image(190, 6));
        assert_eq!(session.error(), None);
        // And what is filled in the background goes to where it belongs now.
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        main.assert_reads(rest + 30 * PAGE, image(138, 52));
        main.assert_reads(rest, &[0; 30 * PAGE]);
    });
}

/// A process with shared memory: region 0 and 1 are the same, 1 and 2 apart from each other in the file.
fn with_shared(test: &str, work: impl FnOnce(Source, Faulter, Session) + Send + 'static) {
    if !is_root() {
        return skip(&format!("attach::{test}"), "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || {
        let source = start();
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd:200", "again:200", "shared:100"]);
        let regions = [
            faulter.shared_region(0, "mem", 3 * PAGE as u64, 7),
            faulter.shared_region(1, "mem", 3 * PAGE as u64, 7),
            faulter.shared_region(2, "mem", 150 * PAGE as u64, 8),
        ];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        let reference = "app".parse().unwrap();
        let session =
            Session::attach(source.server.address(), &reference, Options::default(), &memory).unwrap();
        faulter.let_go();
        work(source, faulter, session);
    });
}

const REMOVE: i32 = 9;

#[test]
fn shared_memory_is_one_wherever_it_is_mapped() {
    with_shared("shared_memory_is_one_wherever_it_is_mapped", |source, mut faulter, session| {
        let mut child = faulter.fork();
        let image = |page: usize, count| source.pages(3 + page, count);
        faulter.assert_reads(0, 0, image(0, 20));
        faulter.assert_reads(1, 10, image(10, 20));
        child.assert_reads(faulter.at(0, 20), image(20, 20));
        child.does(&format!("write {} 1 42", faulter.at(1, 25)));
        faulter.assert_reads(0, 25, &[42; PAGE]);
        // What is absent is brought for all who wait for it, wherever.
        let waiting = [(0, 60), (1, 60), (0, 61)];
        for (region, page) in waiting {
            child.tell(&format!("read {} 1", faulter.at(region, page)));
        }
        faulter.main.assert_reads(faulter.at(1, 61), image(61, 1));
        for (region, page) in waiting {
            child.assert_answers(faulter.at(region, page), image(page, 1));
        }
        // MADV_DONTNEED keeps the content, written or absent; MADV_REMOVE drops it for everybody.
        faulter.main.does(&format!("advise {DONTNEED} {} 60", faulter.at(0, 20)));
        child.assert_reads(faulter.at(0, 25), &[42; PAGE]);
        faulter.assert_reads(0, 70, image(70, 10));
        child.does(&format!("advise {REMOVE} {} 20", faulter.at(1, 75)));
        for page in [75, 90] {
            faulter.assert_reads(0, page, &[0; 5 * PAGE]);
            child.assert_reads(faulter.at(1, page), &[0; 5 * PAGE]);
        }
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        faulter.assert_reads(1, 75, &[0; 20 * PAGE]);
        child.assert_reads(faulter.at(0, 95), image(95, 105));
        faulter.assert_reads(2, 0, source.pages(150, 100));
        assert_eq!(session.error(), None);
    });
}

#[test]
fn shared_memory_is_moved_and_unmapped_by_each_for_himself() {
    with_shared("shared_memory_is_moved_and_unmapped_by_each_for_himself", |source, mut faulter, session| {
        const MAYMOVE: i32 = 1;
        const DONTUNMAP: i32 = 4;
        let mut child = faulter.fork();
        let image = |page: usize, count| source.pages(3 + page, count);
        let at = faulter.at(0, 0);
        let to: usize = faulter.main.ask("reserve 300").parse().unwrap();
        faulter.main.ask(&format!("remap {at} 40 40 {MAYMOVE} {to}"));
        faulter.main.assert_reads(to, image(0, 20));
        child.assert_reads(at + 15 * PAGE, image(15, 10));
        child.does(&format!("unmap {at} 30"));
        faulter.main.assert_reads(to + 20 * PAGE, image(20, 20));
        child.assert_reads(at + 30 * PAGE, image(30, 10));
        // What is left behind is the same memory still.
        let kept = at + 100 * PAGE;
        let both = faulter.main.ask(&format!("remap {kept} 20 20 {} 0", MAYMOVE | DONTUNMAP));
        let both: usize = both.parse().unwrap();
        faulter.main.does(&format!("write {both} 1 9"));
        faulter.main.assert_reads(kept, &[&[9; PAGE], image(101, 19)].concat());
        faulter.main.assert_reads(both + PAGE, image(101, 19));
        // And is moved from there another time.
        let third = faulter.main.ask(&format!("remap {} 5 5 {} 0", kept + 10 * PAGE, MAYMOVE | DONTUNMAP));
        faulter.main.assert_reads(third.parse().unwrap(), image(110, 5));
        // Also if nobody has touched it at the old place.
        let kept = at + 130 * PAGE;
        faulter.main.ask(&format!("remap {kept} 12 12 {} 0", MAYMOVE | DONTUNMAP));
        let third = faulter.main.ask(&format!("remap {} 5 5 {} 0", kept + 4 * PAGE, MAYMOVE | DONTUNMAP));
        faulter.main.assert_reads(third.parse().unwrap(), image(134, 5));
        // What is dropped at the old place, which nobody has touched since, is dropped at the new one.
        let kept = at + 150 * PAGE;
        let both = faulter.main.ask(&format!("remap {kept} 20 20 {} 0", MAYMOVE | DONTUNMAP));
        let both: usize = both.parse().unwrap();
        faulter.main.does(&format!("advise {REMOVE} {} 5", kept + 3 * PAGE));
        faulter.main.assert_reads(both, &[image(150, 3), &[0; 5 * PAGE], image(158, 12)].concat());
        assert_eq!(session.error(), None);
    });
}

#[test]
fn a_session_s_end_poisons_each_mapping_of_shared_memory() {
    with_shared("a_session_s_end_poisons_each_mapping_of_shared_memory", |source, mut faulter, session| {
        let mut child = faulter.fork();
        faulter.assert_reads(0, 0, source.pages(3, 3));
        // Mapped at its old place still, which nobody has touched since (MREMAP_MAYMOVE | MREMAP_DONTUNMAP).
        let old = faulter.at(2, 50);
        let mut other = faulter.fork();
        other.ask(&format!("remap {old} 20 20 5 0"));
        assert!(session.end(Duration::from_secs(30)));
        other.tell(&format!("read {old} 1"));
        assert_eq!(other.answer(), None, "it is not fed zeros");
        child.assert_reads(faulter.at(1, 0), source.pages(3, 3));
        child.tell(&format!("read {} 1", faulter.at(0, 100)));
        assert_eq!(child.answer(), None, "it is not fed zeros");
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 100)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
    });
}

#[test]
fn a_removal_of_shared_memory_that_nobody_can_see_ends_the_session() {
    with_shared(
        "a_removal_of_shared_memory_that_nobody_can_see_ends_the_session",
        |source, mut faulter, session| {
            faulter.assert_reads(2, 0, source.pages(150, 2));
            drop(session);
            let mut blind = Faulter::start(ALL_EVENTS, &["shared:100"]);
            let regions = [blind.shared_region(0, "mem", 0, 1)];
            let memory = ForeignMemory {
                uffd: blind.uffd(),
                regions: &regions,
                state: None,
                pid: None,
                is_registered: true,
            };
            let reference = "app".parse().unwrap();
            let session =
                Session::attach(source.server.address(), &reference, Options::default(), &memory).unwrap();
            blind.let_go();
            blind.assert_reads(0, 0, source.pages(0, 16));
            // Of pages that are there their next fault tells.
            blind.main.does(&format!("advise {DONTNEED} {} 4", blind.at(0, 0)));
            blind.main.does(&format!("advise {REMOVE} {} 4", blind.at(0, 8)));
            blind.assert_reads(0, 0, source.pages(0, 8));
            blind.assert_reads(0, 8, &[0; 4 * PAGE]);
            assert_eq!(session.error(), None);
            blind.main.does(&format!("advise {REMOVE} {} 4", blind.at(0, 50)));
            assert!(session.wait_end(Duration::from_secs(30)));
            assert!(session.error().unwrap().contains("nothing shows whether its content stays"));
            blind.main.tell(&format!("read {} 1", blind.at(0, 51)));
            assert_eq!((blind.main.answer(), blind.dies_of()), (None, SIGBUS));
        },
    );
}

#[test]
fn transparent_huge_pages_do_not_swallow_what_is_absent() {
    with_faulter("transparent_huge_pages_do_not_swallow_what_is_absent", |_, _| {
        const HUGEPAGE: i32 = 14;
        const COLLAPSE: i32 = 25;
        const HUGE_PAGES: usize = 512;
        let source = Source::start(memory_like(4 * HUGE_PAGES * PAGE, 72), CHUNK);
        for kind in ["private", "memfd", "memfd-private"] {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{}", 3 * HUGE_PAGES)]);
            let region = match kind {
                "memfd" => faulter.shared_region(0, "mem", 7 * PAGE as u64, 1),
                _ => faulter.region(0, "mem", 7 * PAGE as u64),
            };
            faulter.main.does(&format!("advise {HUGEPAGE} {} {}", faulter.at(0, 0), 3 * HUGE_PAGES));
            let uffd = faulter.uffd();
            let pid = Some(faulter.main.pid);
            let memory = ForeignMemory { uffd, regions: &[region], state: None, pid, is_registered: true };
            let reference = "app".parse().unwrap();
            let options = Options::default();
            let session = Session::attach(source.server.address(), &reference, options, &memory).unwrap();
            faulter.let_go();
            // All of 2 MiB aligned, but for one page; all; and a few.
            let start = (faulter.at(0, 0).next_multiple_of(2 << 20) - faulter.at(0, 0)) / PAGE;
            let image = |page: usize, count: usize| source.pages(7 + page, count);
            let last = start + HUGE_PAGES - 1;
            faulter.assert_reads(0, start, image(start, HUGE_PAGES - 1 - 16));
            let mut collapse = |page: usize| {
                let address = faulter.at(0, page);
                faulter.main.ask(&format!("advise {COLLAPSE} {address} {HUGE_PAGES}"))
            };
            assert!(collapse(start).starts_with("error"), "{kind}: it lacks pages");
            let _ = collapse(start + HUGE_PAGES);
            faulter.assert_reads(0, last, image(last, 1));
            faulter.assert_reads(0, last - 16, image(last - 16, 16));
            let faults = session.progress().faults;
            let collapsed =
                faulter.main.ask(&format!("advise {COLLAPSE} {} {HUGE_PAGES}", faulter.at(0, start)));
            faulter.assert_reads(0, start, image(start, HUGE_PAGES));
            assert!(session.progress().faults == faults || collapsed.starts_with("error"), "{kind}");
            session.fill().unwrap();
            session.wait_resident(Duration::from_secs(30)).unwrap();
            faulter.assert_reads(0, 0, image(0, 3 * HUGE_PAGES));
            assert_eq!(session.error(), None);
        }
    });
}

#[test]
fn private_mappings_of_files_are_filled() {
    with_faulter("private_mappings_of_files_are_filled", |source, _| {
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd-private:197", "memfd-private:100"]);
        let session = source.attach(&faulter, FILLING).unwrap();
        faulter.let_go();
        let mut child = faulter.fork();
        faulter.main.does(&format!("advise {DONTNEED} {} 10", faulter.at(0, 150)));
        faulter.main.does(&format!("write {} 1 3", faulter.at(0, 10)));
        faulter.assert_reads(0, 11, source.pages(103 + 11, 139));
        faulter.assert_reads(0, 150, &[0; 10 * PAGE]);
        child.assert_reads(faulter.at(0, 0), source.pages(103, 197));
        session.wait_resident(Duration::from_secs(30)).unwrap();
        assert_eq!(session.error(), None);
    });
}

/// Events are posted after the kernel has let go of its lock: a fork can be told of before a move that came first, and is in
/// the child.
#[test]
fn a_child_forked_during_a_move_has_it_in_one_place() {
    with_faulter("a_child_forked_during_a_move_has_it_in_one_place", |source, mut faulter| {
        const TRIES: usize = 1500;
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        let mut other = faulter.thread();
        let slots: usize = faulter.main.ask(&format!("reserve {}", 2 * TRIES)).parse().unwrap();
        let mut at = faulter.at(0, 20);
        let image = source.pages(123, 1);
        let mut counts = [0; 2];
        for slot in 0..TRIES {
            let to = slots + 2 * slot * PAGE;
            other.tell(&format!("remap {at} 1 1 1 {to}"));
            for _ in 0..fastrand::u32(..4000) {
                std::hint::spin_loop();
            }
            faulter.main.tell("fork");
            assert_eq!(other.answer(), Some(to.to_string()));
            let mut child = faulter.forked();
            let read = |at| read_from_outside(child.pid, at, PAGE);
            let (old, new) = (read(at), read(to));
            let is_new = new.is_ok();
            let (there, gone) = if is_new { (new, old) } else { (old, new) };
            assert_eq!(gone, Err(nix::Error::EFAULT), "it is in both places");
            let there = there.unwrap();
            assert!(there == image, "after {slot}: moved {is_new}, zero: {}", there == [0; PAGE]);
            counts[usize::from(is_new)] += 1;
            child.tell("exit");
            at = to;
        }
        assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
        assert_eq!(session.error(), None);
    });
}

#[test]
fn shared_memory_that_is_mapped_another_time_is_the_same_there() {
    let test = "shared_memory_that_is_mapped_another_time_is_the_same_there";
    with_shared(test, |source, mut faulter, session| {
        // An old size of 0: nothing is moved, and the kernel tells no size.
        let to: usize = faulter.main.ask("reserve 300").parse().unwrap();
        let from = faulter.at(0, 40);
        assert_eq!(faulter.main.ask(&format!("remap {from} 0 100 3 {to}")), to.to_string());
        faulter.main.assert_reads(to, source.pages(43, 30));
        faulter.assert_reads(0, 40, source.pages(43, 60));
        faulter.main.does(&format!("write {} 1 9", to + 70 * PAGE));
        faulter.assert_reads(1, 110, &[9; PAGE]);
        faulter.main.does(&format!("advise {REMOVE} {} 10", to + 80 * PAGE));
        faulter.assert_reads(
            0,
            119,
            &[source.pages(122, 1), &vec![0; 10 * PAGE], source.pages(133, 1)].concat(),
        );
        session.fill().unwrap();
        faulter.assert_reads(0, 131, source.pages(134, 69));
        assert_eq!(session.error(), None);
    });
}

#[test]
fn shared_memory_that_the_session_was_not_told_of_is_sigbus() {
    if !is_root() {
        let test = "attach::shared_memory_that_the_session_was_not_told_of_is_sigbus";
        return skip(test, "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || {
        let source = start();
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd:200"]);
        let mut region = faulter.shared_region(0, "mem", 0, 1);
        region.len = 100 * PAGE;
        let pid = Some(faulter.main.pid);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions: &[region], state: None, pid, is_registered: true };
        let (address, reference) = (source.server.address(), "app".parse().unwrap());
        let session = Session::attach(address, &reference, Options::default(), &memory).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 90, source.pages(90, 10));
        let read = |page| read_from_outside(faulter.main.pid, faulter.at(0, page), PAGE);
        // Zeros would be in the memory for all who have it.
        assert_eq!((read(100), read(150)), (Err(nix::Error::EFAULT), Err(nix::Error::EFAULT)));
        assert!(session.error().unwrap().contains("is beyond what the session was told of"));
        assert!(read(50).unwrap() == source.pages(50, 1));
    });
}

/// A server whose answers for one chunk never come.
fn without_chunk(source: &Source, chunk: u64) -> Chaos {
    let lies =
        Lies::default().chunk(move |_, answer| if answer.chunk == chunk { Vec::new() } else { vec![answer] });
    Chaos::start(source.server.address(), lies)
}

fn attach_to(chaos: &Chaos, faulter: &Faulter, options: Options) -> Session {
    let regions = [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
    let reference = "app".parse().unwrap();
    let pid = Some(faulter.main.pid);
    let memory =
        ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid, is_registered: true };
    Session::attach(chaos.address(), &reference, options, &memory).unwrap()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn who_does_not_wait_any_more_loses_nothing() {
    with_faulter("who_does_not_wait_any_more_loses_nothing", |source, mut faulter| {
        let chaos = without_chunk(&source, 2);
        let options = Options::DEFAULT.fault_deadline(SECOND).on_loss(LossPolicy::Kill);
        let session = attach_to(&chaos, &faulter, options);
        let mut thread = faulter.thread();
        faulter.let_go();
        // A page of chunk 2 is wanted, and given back before it comes.
        let address = faulter.at(1, 40);
        thread.tell(&format!("read {address} 1"));
        wait_until("it is asked for", || session.progress().faults > 0);
        faulter.main.does(&format!("advise {DONTNEED} {address} 1"));
        thread.assert_answers(address, &[0; PAGE]);
        std::thread::park_timeout(3 * SECOND);
        assert_eq!(session.failures().count, 0, "{:?}", session.failures());
        faulter.assert_reads(1, 0, source.pages(3, 29));
    });
}

/// A parent has exited, and another process has its pid. Of its two children, the pager kills the
/// one that waits.
#[test]
fn a_loss_kills_the_process_that_waits_and_no_other() {
    with_faulter("a_loss_kills_the_process_that_waits_and_no_other", |source, mut faulter| {
        let chaos = without_chunk(&source, 2);
        let options = Options::DEFAULT.fault_deadline(SECOND).on_loss(LossPolicy::Kill);
        let session = attach_to(&chaos, &faulter, options);
        faulter.let_go();
        let (mut waits, mut goes_on) = (faulter.fork(), faulter.fork());
        // As long as it takes to find out which process is which.
        std::thread::park_timeout(SECOND);
        let owner = faulter.main.pid;
        faulter.kill();
        let mut stranger = with_pid(owner);
        let address = faulter.at(1, 40);
        waits.tell(&format!("read {address} 1"));
        assert_eq!(waits.answer(), None, "it is killed");
        wait_until("it is reported", || session.failures().count > 0);
        let failure = session.failures().last.unwrap();
        assert!(failure.reason.contains("chunk 2 of image"), "{failure:?}");
        assert_eq!(failure.end.unwrap().0, FailureEnd::Killed);
        goes_on.assert_reads(faulter.at(1, 0), source.pages(3, 29));
        if let Some(stranger) = &mut stranger {
            assert!(stranger.try_wait().unwrap().is_none(), "a process that has got its pid");
            let _ = stranger.kill();
            let _ = stranger.wait();
        }
    });
}

/// The same by a pager in a process of its own.
#[test]
fn a_pager_of_its_own_kills_the_process_that_waits_and_no_other() {
    const TEST: &str = "a_pager_of_its_own_kills_the_process_that_waits_and_no_other";
    with_faulter(TEST, |source, mut faulter| {
        let chaos = without_chunk(&source, 2);
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let how = Serving { alone: true, kill: true, ..Serving::default() };
        let address = chaos.address().to_string();
        let _keeper = Keeper::start(&address, "app", how, &faulter, &regions);
        faulter.let_go();
        let (mut waits, mut goes_on) = (faulter.fork(), faulter.fork());
        std::thread::park_timeout(SECOND);
        waits.tell(&format!("read {} 1", faulter.at(1, 40)));
        assert_eq!(waits.answer(), None, "it is killed");
        goes_on.assert_reads(faulter.at(1, 0), source.pages(3, 29));
        faulter.assert_reads(1, 0, source.pages(3, 29));
    });
}

/// A process that has a pid which was another one's, if the kernel gives it.
fn with_pid(pid: u32) -> Option<std::process::Child> {
    for _ in 0..100 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        if child.id() == pid {
            return Some(child);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    None
}

/// Two threads fork at the same time. If the forks are too close for the pager to tell the children
/// apart, it kills neither.
#[test]
fn of_children_that_are_forked_at_once_none_is_killed_by_mistake() {
    with_faulter("of_children_that_are_forked_at_once_none_is_killed_by_mistake", |source, mut faulter| {
        let chaos = without_chunk(&source, 2);
        let options = Options::DEFAULT.fault_deadline(SECOND).on_loss(LossPolicy::Kill);
        let session = attach_to(&chaos, &faulter, options);
        let mut thread = faulter.thread();
        faulter.let_go();
        thread.tell("fork");
        let mut waits = faulter.fork();
        let mut other = faulter.started(&mut thread);
        waits.tell(&format!("read {} 1", faulter.at(1, 40)));
        assert_eq!(waits.answer(), None, "it is killed, or SIGBUS");
        wait_until("it is reported", || session.failures().last.is_some_and(|failure| failure.end.is_some()));
        let failure = session.failures().last.unwrap();
        let ends = [FailureEnd::Poisoned, FailureEnd::Killed];
        assert!(failure.end.is_some_and(|(end, _)| ends.contains(&end)), "{failure:?}");
        other.assert_reads(faulter.at(1, 0), source.pages(3, 29));
        faulter.assert_reads(1, 0, source.pages(3, 29));
    });
}
