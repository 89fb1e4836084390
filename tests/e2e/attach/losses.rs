//! Pages that do not arrive by their deadline: the process that waits for them, and the others.

use super::{DONTNEED, SIGBUS, with_faulter};
use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{FailureEnd, ForeignMemory, LossPolicy, Options, Session};
use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::faulter::Faulter;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::{PAGE, wait_until};
use std::time::Duration;

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
        let session = Session::attach(chaos.address(), &reference, Options::DEFAULT, &memory).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(0, 32));
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 40)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
        assert!(session.error().unwrap().contains("chunk 2 of image"));
    });
}

/// Starts a server that never answers for one chunk.
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
        // A page of chunk 2 faults, and is given back before it arrives.
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
        // The pager needs this time to identify the processes.
        std::thread::park_timeout(SECOND);
        let owner = faulter.main.pid;
        faulter.kill();
        let mut stranger = with_pid(owner);
        let address = faulter.at(1, 40);
        waits.tell(&format!("read {address} 1"));
        assert_eq!(waits.answer(), None, "it is killed");
        let has_ended = || session.failures().last.is_some_and(|failure| failure.end.is_some());
        wait_until("it is reported", has_ended);
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

/// Starts a process with the pid of one that has exited, if the kernel assigns it.
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
