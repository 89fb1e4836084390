//! What the library promises of sessions and regions.

use crate::map::{push, random_pages};
use nix::libc;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{ForeignMemory, ForeignRegion, LossPolicy, Options, Region, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::Faulter;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::proxy::{Break, How, Proxy};
use postcopy_tests::server::Server;
use postcopy_tests::skip;
use postcopy_tests::wait_until;
use rustix::mm::Advice;
use std::ops::Range;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use userfaultfd::UffdBuilder;

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const WATCHDOG: Duration = Duration::from_secs(110);
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
const MINUTE: Duration = Duration::from_secs(60);
/// Tells this program, started again by a test of it, where the server is whose page it is to touch.
pub(crate) const CHILD: &str = "POSTCOPY_TESTS_CHILD";
const FILLING: Options = Options::DEFAULT.fill(true);

/// A server that has the image `app` of one file, `mem`.
pub(crate) struct Source {
    pub(crate) server: Server,
    pub(crate) bytes: Vec<u8>,
    folder: TempDir,
}

impl Source {
    pub(crate) fn start(bytes: Vec<u8>, chunk: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start();
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes).unwrap();
        push(&server, &path, "app", chunk);
        Self { server, bytes, folder }
    }

    /// Pushes the same file as another image.
    pub(crate) fn push_again(&self, reference: &str, chunk: usize) {
        push(&self.server, &self.folder.path().join("mem"), reference, chunk);
    }

    pub(crate) fn open(&self, options: Options) -> Session {
        Session::open(self.server.address(), &"app".parse().unwrap(), options).unwrap()
    }

    /// The same for memory of another process, which has nobody else then.
    pub(crate) fn attach_regions(
        &self,
        faulter: &mut Faulter,
        regions: &[ForeignRegion],
        options: Options,
    ) -> Session {
        let (uffd, pid) = (faulter.uffd(), Some(faulter.main.pid));
        let memory = ForeignMemory { uffd, regions, state: None, pid, is_registered: true };
        let reference = "app".parse().unwrap();
        let session = Session::attach(self.server.address(), &reference, options, &memory).unwrap();
        faulter.let_go();
        session
    }
}

/// Gives the content of these bytes of a region back to the kernel, as programs do (MADV_DONTNEED).
#[expect(unsafe_code, reason = "madvise on memory of our own")]
pub(crate) fn give_back(region: &mut Region, range: Range<usize>) {
    assert!(range.start.is_multiple_of(PAGE) && range.end <= region.len(), "whole pages of the region");
    let start = region[range.clone()].as_mut_ptr();
    // SAFETY: the region is borrowed exclusively, so nobody holds a slice whose bytes change.
    unsafe { rustix::mm::madvise(start.cast(), range.len(), Advice::LinuxDontNeed) }.unwrap();
}

fn assert_zero(bytes: &[u8], what: &str) {
    assert_eq!(bytes.iter().position(|byte| *byte != 0), None, "{what}: not zero");
}

fn assert_pages(region: &[u8], expected: &[u8], what: &str) {
    assert_eq!(region.len(), expected.len(), "{what}");
    let pages = region.chunks(PAGE).zip(expected.chunks(PAGE));
    let wrong: Vec<usize> = pages.enumerate().filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert_eq!(wrong, Vec::<usize>::new(), "{what}: pages with wrong bytes");
}

#[test]
fn progress_counts_pages_faults_and_chunks() {
    within(WATCHDOG, || {
        let source = Source::start(noise(32 * CHUNK + 1, 1), CHUNK);
        let session = source.open(Options::default());
        assert_eq!(session.progress(), postcopy::Progress::default());
        let region = session.map("mem").unwrap();
        let total = 32 * 16 + 1;
        assert_eq!(session.progress().total_pages, total);
        assert_eq!(session.progress().resident_pages, 0);

        for chunk in [3, 7, 32] {
            assert_eq!(region[chunk * CHUNK], source.bytes[chunk * CHUNK]);
        }
        wait_until("three chunks are there", || session.progress().resident_pages == 16 + 16 + 1);
        let progress = session.progress();
        assert_eq!((progress.faults, progress.demand_chunks, progress.bulk_chunks), (3, 3, 0));
        assert!(progress.frame_bytes > 2 * CHUNK as u64, "{progress:?}");
        assert!(region.is_resident(3 * CHUNK) && !region.is_resident(4 * CHUNK));

        let second = session.map("mem").unwrap();
        assert_eq!(session.progress().total_pages, 2 * total);
        drop(second);
        wait_until("a dropped region is not counted", || session.progress().total_pages == total);

        let late = session.wait_resident(Duration::from_millis(20)).unwrap_err();
        assert!(late.to_string().contains("20ms"), "{late}");
        session.fill().unwrap();
        session.fill().unwrap();
        session.wait_resident(MINUTE).unwrap();
        let progress = session.progress();
        assert_eq!((progress.resident_pages, progress.poisoned_pages, progress.removed_pages), (total, 0, 0));
        assert_eq!(
            (progress.demand_chunks, progress.bulk_chunks),
            (3, 30),
            "what is there is not brought again"
        );
        assert!(*region == source.bytes[..]);
    });
}

#[test]
fn memory_that_is_being_restored_takes_no_other_userfaultfd() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(1 << 20, 3), CHUNK);
        let session = source.open(Options::default());
        let region = session.map("mem").unwrap();
        let other = UffdBuilder::new().user_mode_only(true).create().unwrap();
        let refused = other.register(region.as_ptr().cast_mut().cast(), 1 << 20);
        let refused = format!("{:?}", refused.unwrap_err());
        assert!(refused.contains("EBUSY"), "{refused}");
        assert_pages(&region, &source.bytes, "it is served on");
    });
}

#[test]
#[expect(unsafe_code, reason = "madvise")]
fn guard_pages_of_this_process_are_zero_once_they_are_lifted() {
    const TEST: &str = "session::guard_pages_of_this_process_are_zero_once_they_are_lifted";
    if !postcopy::uffd::pagemap::guards_are_seen() {
        return skip(TEST, "guard pages are not seen before Linux 6.15");
    }
    within(WATCHDOG, || {
        let source = Source::start(memory_like(1 << 20, 3), CHUNK);
        for options in [Options::default(), Options::DEFAULT.track_writes(true)] {
            let session = source.open(options);
            let region = session.map("mem").unwrap();
            let (start, len) = (region.as_ptr().wrapping_add(20 * PAGE), 30 * PAGE);
            let advise = |advice| {
                // SAFETY: nobody reads these pages meanwhile.
                let done = unsafe { libc::madvise(start.cast_mut().cast(), len, advice) };
                assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            };
            advise(GUARD_INSTALL);
            session.fill().unwrap();
            session.wait_resident(MINUTE).unwrap();
            assert_eq!(session.progress().removed_pages, 30);
            advise(GUARD_REMOVE);
            assert!(region[20 * PAGE..50 * PAGE].iter().all(|byte| *byte == 0));
            assert_pages(&region[50 * PAGE..], &source.bytes[50 * PAGE..], "behind them");
        }
    });
}

#[test]
fn a_region_outlives_its_session() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 << 20, 2), CHUNK);
        for options in [Options::default(), FILLING] {
            let session = source.open(options);
            let first = session.map("mem").unwrap();
            let second = session.map("mem").unwrap();
            drop(session);
            assert_pages(&first, &source.bytes, "the first region");
            drop(first);
            let mut bytes = vec![0; source.bytes.len()];
            second.read_at(0, &mut bytes).unwrap();
            assert_pages(&bytes, &source.bytes, "the second region");
        }
    });
}

#[test]
fn regions_that_come_and_go_at_reused_addresses_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(6 << 20, 3), CHUNK);
        let small = tempfile::tempdir().unwrap();
        let other = noise(source.bytes.len(), 4);
        std::fs::write(small.path().join("other"), &other).unwrap();
        std::fs::write(small.path().join("mem"), &source.bytes).unwrap();
        push(&source.server, small.path(), "app", CHUNK);
        let session = source.open(FILLING);
        let stays = session.map("mem").unwrap();
        let seed = fastrand::u64(..);
        eprintln!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut addresses = std::collections::HashSet::new();
        for round in 0..200 {
            let (name, bytes) = if rng.bool() { ("mem", &source.bytes) } else { ("other", &other) };
            let region = session.map(name).unwrap();
            addresses.insert(region.as_ptr().addr());
            for _ in 0..rng.usize(..6) {
                let page = rng.usize(..bytes.len() / PAGE);
                let at = page * PAGE..(page + 1) * PAGE;
                assert!(region[at.clone()] == bytes[at.clone()], "round {round}, {name}, page {page}");
                assert!(stays[at.clone()] == source.bytes[at], "round {round}, the region that stays");
            }
            drop(region);
        }
        assert!(addresses.len() < 190, "addresses are not reused: {}", addresses.len());
        session.wait_resident(MINUTE).unwrap();
        assert_pages(&stays, &source.bytes, "the region that stays");
    });
}

#[test]
fn twenty_thousand_regions_are_dropped_by_one_thread() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(16 * PAGE, 4), CHUNK);
        let session = source.open(Options::DEFAULT);
        let regions: Vec<_> = (0..20_000).map(|_| session.map_part("mem", 0..PAGE as u64).unwrap()).collect();
        let reapers = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
            tasks.filter_map(|task| name(task).ok()).filter(|name| name.starts_with("postcopy-")).count()
        };
        let (before, mut most) = (reapers(), 0);
        for (number, region) in regions.into_iter().enumerate() {
            drop(region);
            if number % 1000 == 0 {
                most = most.max(reapers());
            }
        }
        most = most.max(reapers());
        // Other tests of this process have sessions, too.
        assert!(most < before + 40, "{most} threads, {before} before");
        let region = session.map("mem").unwrap();
        assert_eq!(*region, *source.bytes);
    });
}

/// Two regions wait for the same chunk; the one that asked first is dropped.
#[test]
fn dropping_a_region_does_not_lose_the_faults_of_another() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 * CHUNK, 5), CHUNK);
        let held = Arc::new(AtomicBool::new(true));
        let hold = Arc::clone(&held);
        let lies = Lies::default().chunk(move |_, answer| {
            if hold.load(Ordering::SeqCst) {
                vec![ChunkAnswer { result: None, ..answer }]
            } else {
                vec![answer]
            }
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = Options::DEFAULT.on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let first = session.map("mem").unwrap();
        let second = Arc::new(session.map("mem").unwrap());
        first.read_at(0, &mut [0; 10]).unwrap_err();

        let toucher = Arc::clone(&second);
        let toucher = std::thread::spawn(move || toucher[..CHUNK].to_vec());
        wait_until("the second region's fault is known", || session.progress().faults == 1);
        drop(first);
        wait_until("the first region is gone", || session.progress().total_pages == 8 * 16);
        held.store(false, Ordering::SeqCst);
        wait_until("the second region's fault is served", || toucher.is_finished());
        assert!(toucher.join().unwrap() == source.bytes[..CHUNK]);
    });
}

#[test]
fn what_was_given_back_reads_as_zeros() {
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 6), CHUNK);
        let session = source.open(Options::default());
        let mut region = session.map("mem").unwrap();
        // Resident, absent, and across the border of both.
        assert_eq!(region[0], source.bytes[0]);
        let ranges = [PAGE..3 * PAGE, 4 * CHUNK..5 * CHUNK, CHUNK - PAGE..CHUNK + PAGE];
        for range in &ranges {
            give_back(&mut region, range.clone());
        }
        let mut expected = source.bytes.clone();
        ranges.iter().for_each(|range| expected[range.clone()].fill(0));
        assert_pages(&region, &expected, "after MADV_DONTNEED");
        wait_until("removed pages are counted", || session.progress().removed_pages == 2 + 16 + 2);
        session.fill().unwrap();
        session.wait_resident(MINUTE).unwrap();
        assert_pages(&region, &expected, "after the fill");
        // Removed pages are ordinary memory.
        region[4 * CHUNK..5 * CHUNK].copy_from_slice(&source.bytes[..CHUNK]);
        expected[4 * CHUNK..5 * CHUNK].copy_from_slice(&source.bytes[..CHUNK]);
        assert_pages(&region, &expected, "after it was written to");
    });
}

#[test]
fn what_is_given_back_while_the_fill_runs_stays_zero() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(24 << 20, 7), CHUNK);
        let pages = source.bytes.len() / PAGE;
        for _ in 0..5 {
            let seed = fastrand::u64(..);
            eprintln!("seed {seed}");
            let mut rng = fastrand::Rng::with_seed(seed);
            let session = source.open(FILLING);
            let mut region = session.map("mem").unwrap();
            let mut expected = source.bytes.clone();
            for _ in 0..150 {
                let start = rng.usize(..pages);
                let end = (start + rng.usize(1..40)).min(pages);
                let range = start * PAGE..end * PAGE;
                give_back(&mut region, range.clone());
                expected[range.clone()].fill(0);
                if rng.bool() {
                    assert_zero(&region[range], "just given back");
                }
            }
            session.wait_resident(MINUTE).unwrap();
            assert_pages(&region, &expected, "after the fill");
        }
    });
}

/// madvise and mprotect of a part split the kernel's record of a region, and an ioctl is for one part alone.
#[test]
fn a_region_in_parts_is_filled_and_lost_page_by_page_where_need_be() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(40 * CHUNK + 5, 6), CHUNK);
        for options in [Options::default(), FILLING] {
            let session = source.open(options);
            let mut region = session.map("mem").unwrap();
            split(&mut region);
            if options.fill {
                session.wait_resident(MINUTE).unwrap();
            }
            assert_pages(&region, &source.bytes, "in parts");
        }
    });
}

/// Cuts a region into parts at odd places.
#[expect(unsafe_code, reason = "madvise on memory of our own")]
fn split(region: &mut Region) {
    for page in [1usize, 18, 19, 40, 100, 333] {
        let start = region[page * PAGE..].as_mut_ptr();
        // SAFETY: changes what a core dump holds, and no byte.
        unsafe { rustix::mm::madvise(start.cast(), 3 * PAGE, Advice::LinuxDontDump) }.unwrap();
    }
}

/// A page that is SIGBUS to a load is EFAULT to write(2).
#[test]
fn a_lost_region_in_parts_is_sigbus_everywhere() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(40 * CHUNK, 6), CHUNK);
        let lies = Lies::default().chunk(|_, answer| vec![ChunkAnswer { result: None, ..answer }]);
        let chaos = Chaos::start(source.server.address(), lies);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), Options::default()).unwrap();
        let mut region = session.map("mem").unwrap();
        split(&mut region);
        for chunk in 0..40 {
            let _ = region.read_at(chunk * CHUNK, &mut [0]).unwrap_err();
        }
        let file = tempfile::tempfile().unwrap();
        for page in region.chunks(PAGE) {
            assert_eq!(rustix::io::write(&file, page), Err(rustix::io::Errno::FAULT), "{:?}", page.as_ptr());
        }
    });
}

#[test]
fn deadlines_that_are_too_far_away_are_for_ever() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 * CHUNK, 7), CHUNK);
        let session = source.open(FILLING.fault_deadline(Duration::MAX));
        let region = session.map("mem").unwrap();
        assert_eq!(region[CHUNK], source.bytes[CHUNK]);
        session.wait_resident(Duration::MAX).unwrap();
        assert_pages(&region, &source.bytes, "all of it");
    });
}

/// Under `Wait` a loss that has healed is no reason for later errors.
#[test]
fn reads_after_a_loss_that_has_healed_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 * CHUNK, 8), CHUNK);
        let honest = Arc::new(AtomicBool::new(false));
        let is_honest = Arc::clone(&honest);
        let lies = Lies::default().chunk(move |_, answer| {
            let result = answer.result.clone().filter(|_| is_honest.load(Ordering::SeqCst));
            vec![ChunkAnswer { result, ..answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = Options::DEFAULT.on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        let mut read = vec![0; 100];
        let lost = region.read_at(CHUNK, &mut read).unwrap_err().to_string();
        assert!(lost.contains("chunk 1 of image"), "{lost}");
        honest.store(true, Ordering::SeqCst);
        wait_until("what was lost comes", || region.read_at(CHUNK, &mut read).is_ok());
        for chunk in 2..8 {
            region.read_at(chunk * CHUNK, &mut read).unwrap();
            assert_eq!(read, source.bytes[chunk * CHUNK..][..100]);
        }
    });
}

#[test]
fn what_is_written_while_the_fill_runs_is_never_overwritten() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(24 << 20, 8), CHUNK);
        for _ in 0..3 {
            let session = source.open(FILLING);
            let mut region = session.map("mem").unwrap();
            let mut expected = source.bytes.clone();
            let share = source.bytes.len() / 4;
            std::thread::scope(|scope| {
                for (written, mirror) in region.chunks_mut(share).zip(expected.chunks_mut(share)) {
                    let pages = random_pages(written.len());
                    scope.spawn(move || {
                        for page in pages.into_iter().step_by(2) {
                            // One byte in the middle of a page; the others come from the image.
                            let at = page * PAGE + page % PAGE;
                            let value = !mirror[at];
                            written[at] = value;
                            mirror[at] = value;
                            assert_eq!(written[at], value);
                        }
                    });
                }
            });
            session.wait_resident(MINUTE).unwrap();
            assert_pages(&region, &expected, "after the fill");
        }
    });
}

#[test]
fn two_sessions_and_many_regions_side_by_side_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 << 20, 9), CHUNK);
        let sessions = [source.open(Options::default()), source.open(FILLING)];
        std::thread::scope(|scope| {
            for session in &sessions {
                for _ in 0..4 {
                    let bytes = &source.bytes;
                    scope.spawn(move || {
                        let region = session.map("mem").unwrap();
                        for page in random_pages(bytes.len()) {
                            let at = page * PAGE..(page + 1) * PAGE;
                            assert!(region[at.clone()] == bytes[at], "page {page}");
                        }
                    });
                }
            }
        });
    });
}

#[test]
fn ranges_beyond_the_file_and_unknown_files_are_errors() {
    let source = Source::start(noise(PAGE + 5, 10), CHUNK);
    let session = source.open(Options::default());
    let error = session.map("no/such").unwrap_err().to_string();
    assert!(error.contains("no/such"), "{error}");
    let region = session.map("mem").unwrap();
    region.read_at(PAGE + 5, &mut []).unwrap();
    for (offset, len) in [(PAGE + 5, 1), (PAGE, 6), (usize::MAX, 2)] {
        let error = region.read_at(offset, &mut vec![0; len]).unwrap_err().to_string();
        assert!(error.contains("beyond the region's 4101 bytes"), "{error}");
    }
    assert_eq!(region.resident_pages(), 0);
    for span in [1..PAGE + 5, 0..PAGE + 6, 2 * PAGE..2 * PAGE, 0..usize::MAX] {
        let error = session.map_part("mem", span.start as u64..span.end as u64).unwrap_err().to_string();
        assert!(error.contains("\"mem\"") && error.contains("4101") && error.contains("4096"), "{error}");
    }
    let error = session.map_part("no/such", 0..1).unwrap_err().to_string();
    assert!(error.contains("no/such"), "{error}");
}

/// Starts this program again to run the test of that name, as a child that does what [`CHILD`] tells it.
pub(crate) fn as_child(test: &str, told: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status =
        command.args([test, "--exact", "--nocapture"]).env(CHILD, told).stdout(Stdio::null()).status();
    status.unwrap()
}

#[test]
fn a_touch_of_a_lost_page_is_sigbus() {
    if let Ok(server) = std::env::var(CHILD) {
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1));
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        region.read_at(5 * CHUNK, &mut [0; 1]).unwrap_err();
        let byte = std::hint::black_box(region[5 * CHUNK]);
        panic!("it was read as {byte}");
    }
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 11), CHUNK);
        let lies = || {
            Lies::default().chunk(|_, answer| {
                vec![if answer.chunk == 5 { ChunkAnswer { result: None, ..answer } } else { answer }]
            })
        };
        let chaos = Chaos::start(source.server.address(), lies());
        let status = as_child("session::a_touch_of_a_lost_page_is_sigbus", &chaos.address().to_string());
        assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    });
}

/// A touch that waits when its page is lost is SIGBUS, too, and not a hang or a zero.
#[test]
fn a_touch_that_waits_for_a_lost_page_is_sigbus() {
    if let Ok(server) = std::env::var(CHILD) {
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1));
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        let byte = std::hint::black_box(region[5 * CHUNK + 77]);
        panic!("it was read as {byte}");
    }
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 12), CHUNK);
        let chaos = Chaos::start(source.server.address(), Lies::default().chunk(|_, _| Vec::new()));
        let test = "session::a_touch_that_waits_for_a_lost_page_is_sigbus";
        let status = as_child(test, &chaos.address().to_string());
        assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    });
}

/// The loss policies that act on a process act on the program's own.
#[test]
fn a_program_whose_own_page_is_lost_is_killed_or_stopped_if_it_asked_for_that() {
    let test = "session::a_program_whose_own_page_is_lost_is_killed_or_stopped_if_it_asked_for_that";
    if let Ok(told) = std::env::var(CHILD) {
        let (policy, server) = told.split_once(' ').unwrap();
        let on_loss = if policy == "kill" { LossPolicy::Kill } else { LossPolicy::Pause };
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1)).on_loss(on_loss);
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        // Stopped, and going on, it learns of the loss.
        region.read_at(5 * CHUNK, &mut [0; 1]).unwrap_err();
        std::process::exit(7);
    }
    within(WATCHDOG, move || {
        let source = Source::start(noise(16 * CHUNK, 12), CHUNK);
        let chaos = Chaos::start(source.server.address(), Lies::default().chunk(|_, _| Vec::new()));
        let status = as_child(test, &format!("kill {}", chaos.address()));
        assert_eq!(status.signal(), Some(rustix::process::Signal::KILL.as_raw()), "{status}");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture"]).env(CHILD, format!("pause {}", chaos.address()));
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let is_stopped = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "));
        wait_until("it is stopped", is_stopped);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
    });
}

/// How many entries a directory of /proc/self has.
pub(crate) fn count_of(directory: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{directory}")).unwrap().count()
}

/// A host has a session for each of its machines.
#[test]
fn a_session_that_has_nothing_to_do_costs_one_thread_and_six_descriptors() {
    const SESSIONS: usize = 50;
    /// The thread and the runtime that they share, what all runtimes share, and the page tables.
    const COMMON: (usize, usize) = (3, 7);
    let test = "session::a_session_that_has_nothing_to_do_costs_one_thread_and_six_descriptors";
    if let Ok(server) = std::env::var(CHILD) {
        let cores = std::thread::available_parallelism().unwrap().get();
        let (server, reference) = (server.parse().unwrap(), "app".parse().unwrap());
        let (threads, descriptors) = (count_of("task"), count_of("fd"));
        let mut most_threads = 0;
        let mut look = || most_threads = most_threads.max(count_of("task"));
        let sessions = [FILLING; SESSIONS].map(|options| {
            let session = Session::open(&server, &reference, options).unwrap();
            let region = session.map("mem").unwrap();
            look();
            (session, region)
        });
        let is_resident = || sessions.iter().all(|(session, _)| session.is_resident());
        wait_until("all are filled", || {
            look();
            is_resident()
        });
        let at_most = |directory, most: usize| {
            wait_until(&format!("at most {most} in {directory}"), || count_of(directory) <= most);
            count_of(directory)
        };
        let idle = (
            at_most("task", threads + SESSIONS + COMMON.0),
            at_most("fd", descriptors + 6 * SESSIONS + COMMON.1),
        );
        eprintln!(
            "of {SESSIONS} sessions: {} threads, {} descriptors",
            idle.0 - threads,
            idle.1 - descriptors
        );
        eprintln!("at most {} threads while they are filled", most_threads - threads);
        assert!(
            most_threads <= threads + SESSIONS + cores + COMMON.0,
            "{most_threads} threads, {threads} before"
        );
        drop(sessions);
        at_most("task", threads);
        return;
    }
    within(WATCHDOG, move || {
        let source = Source::start(memory_like(64 * CHUNK, 17), CHUNK);
        let status = as_child(test, &source.server.address().to_string());
        assert!(status.success(), "{status}");
    });
}

/// Runs true(1): by a real fork, and by the quicker way that shares memory until the exec.
#[expect(unsafe_code, reason = "pre_exec, which makes the library fork")]
fn fork_and_exec(really: bool) {
    let mut command = Command::new("true");
    if really {
        // SAFETY: does nothing at all between fork and exec.
        unsafe { command.pre_exec(|| Ok(())) };
    }
    assert!(command.status().unwrap().success());
}

#[test]
fn a_fork_while_faults_are_outstanding_does_not_hang() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(16 * CHUNK, 13), CHUNK);
        let proxy = Proxy::start(source.server.address(), Break::Never);
        let session = Session::open(proxy.address(), &"app".parse().unwrap(), Options::default()).unwrap();
        let region = session.map("mem").unwrap();
        assert_eq!(region[0], source.bytes[0]);
        // No connection lives, and none can be made, until the forks are done.
        proxy.set(Break::Each {
            direction: postcopy_tests::proxy::Direction::ToServer,
            bytes: 0,
            how: How::Reset,
        });
        proxy.end_all(How::Reset);
        std::thread::scope(|scope| {
            let touchers: Vec<_> = (1..5)
                .map(|chunk| {
                    scope.spawn({
                        let region = &region;
                        move || region[chunk * CHUNK]
                    })
                })
                .collect();
            wait_until("faults are outstanding", || session.progress().faults == 5);
            for really in [true, false, true] {
                fork_and_exec(really);
            }
            assert!(touchers.iter().all(|toucher| !toucher.is_finished()));
            proxy.set(Break::Never);
            for (chunk, toucher) in (1..5).zip(touchers) {
                assert_eq!(toucher.join().unwrap(), source.bytes[chunk * CHUNK]);
            }
        });
    });
}

#[test]
fn threads_that_fork_beside_threads_that_fault_do_not_hang() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(16 << 20, 14), PAGE);
        let session = source.open(Options::default());
        let region = session.map("mem").unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let forkers: Vec<_> = (0..64)
                .map(|thread| scope.spawn(move || (0..4).for_each(|i| fork_and_exec((thread + i) % 2 == 0))))
                .collect();
            for _ in 0..4 {
                let pages = random_pages(source.bytes.len());
                let (region, bytes, done) = (&region, &source.bytes, &done);
                scope.spawn(move || {
                    for page in pages {
                        let at = page * PAGE..(page + 1) * PAGE;
                        assert!(region[at.clone()] == bytes[at], "page {page}");
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                });
            }
            forkers.into_iter().for_each(|forker| forker.join().unwrap());
            done.store(true, Ordering::Relaxed);
        });
        assert!(session.progress().faults > 0);
    });
}

/// Forks, asks in the child whether there is memory at that address, and runs true(1).
#[expect(unsafe_code, reason = "pre_exec, and madvise on an address")]
fn fork_and_look(address: usize) -> std::io::Result<ExitStatus> {
    let mut command = Command::new("true");
    let look = move || {
        let page = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: this advice changes nothing; where there is no memory, it is ENOMEM.
        unsafe { rustix::mm::madvise(page, PAGE, Advice::Normal) }?;
        Ok(())
    };
    // SAFETY: one system call between fork and exec; no lock, no memory.
    unsafe { command.pre_exec(look) };
    command.status()
}

/// Nobody would fill a region for a child of a fork: the child has no memory there, and a touch is SIGSEGV.
#[test]
fn a_child_of_a_fork_does_not_have_the_region() {
    let source = Source::start(memory_like(16 * CHUNK, 15), CHUNK);
    let session = source.open(Options::default());
    let region = session.map("mem").unwrap();
    assert_eq!(region[CHUNK], source.bytes[CHUNK]);
    // Resident, absent.
    for offset in [CHUNK, 5 * CHUNK] {
        let error = fork_and_look(region[offset..].as_ptr().expose_provenance()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOMEM.raw_os_error()), "{error}");
    }
    let other = vec![1_u8; 4 * PAGE];
    let start = other.as_ptr().expose_provenance().next_multiple_of(PAGE);
    assert!(fork_and_look(start).unwrap().success(), "other memory is inherited");
    assert_eq!(region[5 * CHUNK], source.bytes[5 * CHUNK]);
}
