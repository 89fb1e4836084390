//! When there is no memory, or the kernel takes it away again.

use crate::session::Source;
use postcopy::{ForeignMemory, LossPolicy, Options, Session, Sharing};
use postcopy_tests::cgroup::MemoryCgroup;
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::mounts::{Swap, Tmpfs};
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use std::time::Duration;

const CHUNK: usize = 64 << 10;
const PAGES: usize = 8 << 8;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);
const SIGBUS: i32 = 7;
const SIGKILL: i32 = 9;
const PAGEOUT: i32 = 21;
const PATIENT: Options = Options::DEFAULT.fault_deadline(Duration::from_secs(3)).on_loss(LossPolicy::Wait);

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 90);
    bytes[700 * PAGE..800 * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

fn sharing_of(kind: &str) -> Sharing {
    if kind == "private" { Sharing::Private } else { Sharing::Shared(1) }
}

/// A process with memory of a kind that is all of the image, and its session.
fn attach(source: &Source, kind: &str, options: Options) -> (Faulter, Session) {
    let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{PAGES}")]);
    let mut region = faulter.region(0, "mem", 0);
    region.sharing = sharing_of(kind);
    let pid = Some(faulter.main.pid);
    let memory =
        ForeignMemory { uffd: faulter.uffd(), regions: &[region], state: None, pid, is_registered: true };
    let reference = "app".parse().unwrap();
    let session = Session::attach(source.server.address(), &reference, options, &memory).unwrap();
    faulter.let_go();
    (faulter, session)
}

fn as_root(test: &str, work: impl FnOnce() + Send + 'static) {
    if !is_root() {
        return skip(&format!("pressure::{test}"), "cgroups, swap and mounts need root");
    }
    within(WATCHDOG, work);
}

#[test]
fn a_full_tmpfs_is_waited_for_until_the_deadline() {
    as_root("a_full_tmpfs_is_waited_for_until_the_deadline", || {
        let source = start();
        for (fill, on_loss) in
            [(false, LossPolicy::Wait), (true, LossPolicy::Wait), (false, LossPolicy::Poison)]
        {
            let tmpfs = Tmpfs::of_bytes(100 * PAGE);
            let kind = format!("file={}", tmpfs.path().join("mem").display());
            let (mut faulter, session) = attach(&source, &kind, PATIENT.fill(fill).on_loss(on_loss));
            // More than there is room for, in any order.
            faulter.main.tell(&format!("read {} 300", faulter.at(0, 0)));
            let error = session.wait_error(MINUTE).expect("there is no room");
            let why = ["could not be installed", "no memory", "does not get further"];
            assert!(why.iter().any(|why| error.contains(why)), "{error}");
            if on_loss == LossPolicy::Poison {
                assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
                continue;
            }
            assert!(!faulter.main.has_answered(), "it waits");
            tmpfs.resize(2 * PAGES * PAGE);
            faulter.main.assert_answers(faulter.at(0, 0), &source.bytes[..300 * PAGE]);
            faulter.assert_reads(0, 300, &source.bytes[300 * PAGE..]);
        }
    });
}

#[test]
fn a_full_memory_cgroup_is_waited_for() {
    as_root("a_full_memory_cgroup_is_waited_for", || {
        let source = start();
        for (kind, fill) in [("private", false), ("private", true), ("shared", false)] {
            let Some(cgroup) = MemoryCgroup::new() else {
                return skip(
                    "pressure::a_full_memory_cgroup_is_waited_for",
                    "no memory cgroups of version 1",
                );
            };
            cgroup.kill_nobody();
            let options = PATIENT.fault_deadline(MINUTE);
            let (mut faulter, session) = attach(&source, kind, options);
            cgroup.add(faulter.main.pid);
            cgroup.limit(2 << 20);
            if fill {
                session.fill().unwrap();
            }
            faulter.main.tell(&format!("read {} {PAGES}", faulter.at(0, 0)));
            wait_until("the limit is reached", || cgroup.failures() > 10);
            std::thread::park_timeout(Duration::from_millis(200));
            assert!(!faulter.main.has_answered(), "{kind}: 8 MiB do not go into 2");
            assert_eq!(session.error(), None, "it is within the deadline");
            cgroup.limit(64 << 20);
            faulter.main.assert_answers(faulter.at(0, 0), &source.bytes);
            assert_eq!(session.error(), None);
            drop(session);
            faulter.kill();
        }
    });
}

#[test]
fn an_owner_that_is_killed_for_lack_of_memory_ends_its_session_in_order() {
    as_root("an_owner_that_is_killed_for_lack_of_memory_ends_its_session_in_order", || {
        let source = start();
        for fill in [false, true] {
            let Some(cgroup) = MemoryCgroup::new() else {
                let test = "pressure::an_owner_that_is_killed_for_lack_of_memory_ends_its_session_in_order";
                return skip(test, "no memory cgroups of version 1");
            };
            let (mut faulter, session) = attach(&source, "private", PATIENT);
            cgroup.add(faulter.main.pid);
            cgroup.limit(2 << 20);
            if fill {
                session.fill().unwrap();
            }
            faulter.main.tell(&format!("read {} {PAGES}", faulter.at(0, 0)));
            assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGKILL));
            assert!(session.wait_end(MINUTE), "its memory is gone");
            assert_eq!(session.error(), None, "that is no loss");
        }
    });
}

#[test]
fn pages_that_were_pushed_out_to_swap_come_back() {
    as_root("pages_that_were_pushed_out_to_swap_come_back", || {
        let swap = Swap::of_mib(64);
        let source = start();
        for kind in ["private", "shared", "memfd"] {
            for track_writes in [false, kind == "private"] {
                let (mut faulter, session) = attach(&source, kind, PATIENT.track_writes(track_writes));
                let mut expected = source.bytes.clone();
                faulter.assert_reads(0, 0, &source.bytes[..1000 * PAGE]);
                for (page, count) in [(10, 3), (710, 2), (999, 1), (1500, 1)] {
                    faulter.main.does(&format!("write {} {count} 5", faulter.at(0, page)));
                    expected[page * PAGE..(page + count) * PAGE].fill(5);
                }
                // Absent, resident, written to.
                faulter.main.does(&format!("advise {PAGEOUT} {} {PAGES}", faulter.at(0, 0)));
                let swapped = || {
                    let rows = std::fs::read_to_string("/proc/swaps").unwrap();
                    let used = rows.lines().nth(1).and_then(|row| row.split_whitespace().nth(3));
                    used.unwrap().parse::<usize>().unwrap()
                };
                assert!(swapped() > 1000, "{kind}: {} KiB are in swap", swapped());
                if track_writes {
                    let written = session.changes().unwrap().written;
                    let pages =
                        written.iter().map(|run| (run.start - faulter.at(0, 0)) / PAGE).collect::<Vec<_>>();
                    assert_eq!(pages, [10, 710, 999, 1500], "in swap or not");
                }
                session.fill().unwrap();
                let mut other = faulter.thread();
                other.tell(&format!("read {} {PAGES}", faulter.at(0, 0)));
                faulter.assert_reads(0, 0, &expected);
                other.assert_answers(faulter.at(0, 0), &expected);
                session.wait_resident(MINUTE).unwrap();
                faulter.main.does(&format!("advise {PAGEOUT} {} {PAGES}", faulter.at(0, 0)));
                faulter.assert_reads(0, 0, &expected);
                assert_eq!(session.error(), None);
            }
        }
        drop(swap);
    });
}

#[test]
fn what_a_memory_cgroup_pushes_out_during_a_fill_comes_back() {
    as_root("what_a_memory_cgroup_pushes_out_during_a_fill_comes_back", || {
        let swap = Swap::of_mib(64);
        let source = start();
        for kind in ["private", "shared"] {
            let Some(cgroup) = MemoryCgroup::new() else {
                let test = "pressure::what_a_memory_cgroup_pushes_out_during_a_fill_comes_back";
                return skip(test, "no memory cgroups of version 1");
            };
            let options = PATIENT.fault_deadline(MINUTE);
            let (mut faulter, session) = attach(&source, kind, options);
            cgroup.add(faulter.main.pid);
            cgroup.limit(3 << 20);
            session.fill().unwrap();
            let mut expected = source.bytes.clone();
            for page in (0..PAGES).step_by(60) {
                faulter.main.does(&format!("write {} 1 6", faulter.at(0, page)));
                expected[page * PAGE..(page + 1) * PAGE].fill(6);
            }
            session.wait_resident(MINUTE).unwrap();
            for _ in 0..2 {
                faulter.assert_reads(0, 0, &expected);
            }
            assert!(cgroup.failures() > 0, "it was not in the way");
            assert_eq!(session.error(), None);
            drop(session);
            faulter.kill();
        }
        drop(swap);
    });
}
