//! Forks of a program that has regions.

use super::{CHUNK, Source, WATCHDOG};
use crate::map::random_pages;
use postcopy::{Options, Session};
use postcopy_tests::chaos::within;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::proxy::{Break, How, Proxy};
use postcopy_tests::{PAGE, wait_until};
use rustix::mm::Advice;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};

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
        let session = Session::open(proxy.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
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
        let session = source.open(Options::DEFAULT);
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

/// No pager would fill a region for a child of a fork. So the child has no memory there, and an
/// access is SIGSEGV.
#[test]
fn a_child_of_a_fork_does_not_have_the_region() {
    let source = Source::start(memory_like(16 * CHUNK, 15), CHUNK);
    let session = source.open(Options::DEFAULT);
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
