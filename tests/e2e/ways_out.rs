//! Each call of a pager into the kernel fails once, while a fault is outstanding: the touch is right in the end, or SIGBUS
//! where nobody can serve it any more; never zero, and never without an end.
//!
//! An epoll_wait that fails is a panic within the pager's runtime, which drops the pager wherever it waits.

use crate::session::Source;
use nix::libc;
use postcopy::{ForeignMemory, LossPolicy, Options, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, page_digest, read_from_outside};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::stopped_pager::{Functions, StoppedPager};
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use std::collections::BTreeMap;
use std::time::Duration;

const CHUNK: usize = 16 << 10;
const PAGES: usize = 400;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);
const SIGBUS: i32 = 7;
const EPOLL_WAIT: u64 = 232;

/// The calls of a pager that serves a fault, and what they can fail with: those of the userfaultfd, and of eventfds; of its
/// runtime; of connections; of installing.
const FAILURES: [(i64, i32); 13] = [
    (libc::SYS_read, libc::EIO),
    (libc::SYS_read, libc::EINTR),
    (libc::SYS_read, libc::EMFILE),
    (libc::SYS_epoll_wait, libc::EBADF),
    (libc::SYS_epoll_wait, libc::EINTR),
    (libc::SYS_recvfrom, libc::ECONNRESET),
    (libc::SYS_recvfrom, libc::EAGAIN),
    (libc::SYS_writev, libc::ECONNRESET),
    (libc::SYS_writev, libc::EAGAIN),
    (libc::SYS_ioctl, libc::ENOMEM),
    (libc::SYS_ioctl, libc::EAGAIN),
    (libc::SYS_write, libc::EPERM),
    (libc::SYS_futex, libc::EINTR),
];

/// How a failure ended, of several tries.
#[derive(Debug, Default)]
struct Ends {
    right: u32,
    sigbus: u32,
}

/// Has each call of the pager fail, the first one of its kind during a fault, the second one, and so on.
fn fail_each_call(how: Serving) -> BTreeMap<(i64, i32), Ends> {
    let source = Source::start(memory_like(PAGES * PAGE, 96), CHUNK);
    let mut seen: BTreeMap<_, Ends> = BTreeMap::new();
    for failure in FAILURES {
        for occurrence in 0.. {
            let Some(is_right) = fail_a_call(&source, how, failure, occurrence) else { break };
            let ends = seen.entry(failure).or_default();
            if is_right {
                ends.right += 1;
            } else {
                ends.sigbus += 1;
            }
        }
    }
    println!("{seen:?}");
    seen
}

/// Has one call fail: whether the touch was right then. None: there were fewer of these.
fn fail_a_call(source: &Source, how: Serving, failure: (i64, i32), occurrence: u32) -> Option<bool> {
    let (call, errno) = failure;
    let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
    let regions = [faulter.region(0, "mem", 0)];
    let mut keeper = Keeper::start(&source.server.address().to_string(), "app", how, &faulter, &regions);
    faulter.let_go();
    faulter.assert_reads(0, 0, &source.bytes[..PAGE]);
    let mut pager = keeper.stop_pager();
    faulter.main.tell(&format!("read {} 1", faulter.at(0, 100)));
    let mut left = occurrence;
    loop {
        let stop = pager.next_call();
        if faulter.main.has_answered() && stop.call == EPOLL_WAIT {
            return None;
        }
        if stop.call != call.cast_unsigned() || stop.answer.is_some() {
            continue;
        }
        if left == 0 {
            break pager.fail_call(errno);
        }
        left -= 1;
    }
    drop(pager);
    let Some(answer) = faulter.main.answer() else {
        assert!(how.alone, "somebody else can serve it: {failure:?}, {occurrence}");
        assert_eq!(faulter.dies_of(), SIGBUS, "{failure:?}, {occurrence}");
        return Some(false);
    };
    let digest = page_digest(&source.bytes[100 * PAGE..101 * PAGE]);
    assert_eq!(answer, digest, "{failure:?}, {occurrence}");
    assert_right_or_poisoned(&faulter, how.alone, source, &format!("{failure:?}, {occurrence}"));
    Some(true)
}

/// Sees to later touches, by somebody who does not die of them.
fn assert_right_or_poisoned(faulter: &Faulter, alone: bool, source: &Source, after: &str) {
    for page in (1..PAGES).step_by(17) {
        let read = read_from_outside(faulter.main.pid, faulter.at(0, page), PAGE);
        let right = &source.bytes[page * PAGE..(page + 1) * PAGE];
        let poisoned = alone && read == Err(nix::Error::EFAULT);
        assert!(poisoned || read.is_ok_and(|bytes| bytes == right), "page {page}: {after}");
    }
}

fn assert_seen(seen: &BTreeMap<(i64, i32), Ends>) {
    for failure in FAILURES.iter().filter(|(call, _)| *call != libc::SYS_write && *call != libc::SYS_futex) {
        assert!(seen.contains_key(failure), "there was no such call: {failure:?}");
    }
}

#[test]
fn a_pager_whose_calls_fail_leaves_right_bytes_or_sigbus() {
    if !is_root() {
        return skip("ways_out::a_pager_whose_calls_fail_leaves_right_bytes_or_sigbus", "tracing needs root");
    }
    within(WATCHDOG, || {
        let seen = fail_each_call(Serving { alone: true, ..Serving::default() });
        assert_seen(&seen);
        let sum = |count: fn(&Ends) -> u32| seen.values().map(count).sum::<u32>();
        assert!(sum(|ends| ends.right) > 10, "what can be done again is done again: {seen:?}");
        assert!(sum(|ends| ends.sigbus) > 3, "what cannot is SIGBUS: {seen:?}");
    });
}

#[test]
fn a_pager_whose_calls_fail_is_succeeded() {
    if !is_root() {
        return skip("ways_out::a_pager_whose_calls_fail_is_succeeded", "tracing needs root");
    }
    within(WATCHDOG, || assert_seen(&fail_each_call(Serving::default())));
}

/// Whether a panic here would be one of the pager's: in its own code, or in what it waits for.
fn may_panic(function: &str) -> bool {
    let own = ["postcopy::", "<postcopy::", "postcopy_uffd::", "<postcopy_uffd::"];
    let of_pager = own.iter().any(|own| function.starts_with(own));
    let awaited = ["Interval::poll_tick", "Streaming<T>", "mpsc::chan::Rx", "AsyncFd"];
    (of_pager || awaited.iter().any(|name| function.contains(name))) && !function.contains("drop")
}

/// How many of the panics left what.
#[derive(Debug, Default)]
struct Panics {
    right: u32,
    sigbus: u32,
    /// Those of functions that the compiler knows not to panic: nobody can catch it.
    killed: u32,
}

/// Has each function of the pager panic in place of doing anything, while a fault is outstanding: each time that it is
/// called until the fault is served.
fn panic_in_each_function(how: Serving) -> Panics {
    const MOST: u32 = 6;
    let source = Source::start(memory_like(PAGES * PAGE, 98), CHUNK);
    let mut victim = Panicking::start(&source, how);
    let called = victim.functions_called();
    println!("{called:?}");
    let mut panics = Panics::default();
    for (name, count) in called {
        for occurrence in 0..count.min(MOST) {
            Panicking::start(&source, how).panic(&name, occurrence, &source, &mut panics);
        }
    }
    println!("{panics:?}");
    panics
}

/// A process, and who serves it and is to panic.
struct Panicking {
    // Dropped first: what it serves is killed after it.
    keeper: Keeper,
    faulter: Faulter,
    functions: Functions,
    alone: bool,
}

impl Panicking {
    fn start(source: &Source, how: Serving) -> Self {
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
        let regions = [faulter.region(0, "mem", 0)];
        let keeper = Keeper::start(&source.server.address().to_string(), "app", how, &faulter, &regions);
        faulter.let_go();
        faulter.assert_reads(0, 0, &source.bytes[..PAGE]);
        let functions = keeper.functions(may_panic);
        Self { keeper, faulter, functions, alone: how.alone }
    }

    /// Touches a page of a process, whose pager is stopped then.
    fn touch(&mut self) -> StoppedPager {
        let pager = self.keeper.stop_pager();
        self.faulter.main.tell(&format!("read {} 1", self.faulter.at(0, 100)));
        pager
    }

    fn functions_called(&mut self) -> BTreeMap<String, u32> {
        let mut pager = self.touch();
        pager.functions_called(&self.functions, || self.faulter.main.has_answered())
    }

    fn panic(mut self, name: &str, occurrence: u32, source: &Source, panics: &mut Panics) {
        let instead = self.keeper.functions(|name| name == "postcopy_keeper::in_place_of_another");
        let mut pager = self.touch();
        if !pager.run_to(self.functions.address(name), occurrence, || self.faulter.main.has_answered()) {
            return;
        }
        pager.call_instead(instead.address("postcopy_keeper::in_place_of_another"));
        wait_until("an end", || self.faulter.main.has_answered() || self.alone && self.keeper.has_said());
        if !self.faulter.main.has_answered() && !self.keeper.has_ended() {
            panics.killed += 1;
            return;
        }
        let Some(answer) = self.faulter.main.answer() else {
            assert!(self.alone, "somebody else can serve it: {name}, {occurrence}");
            assert_eq!(self.faulter.dies_of(), SIGBUS, "{name}, {occurrence}");
            panics.sigbus += 1;
            return;
        };
        assert_eq!(answer, page_digest(&source.bytes[100 * PAGE..101 * PAGE]), "{name}, {occurrence}");
        assert_right_or_poisoned(&self.faulter, self.alone, source, &format!("{name}, {occurrence}"));
        panics.right += 1;
    }
}

#[test]
fn a_pager_that_panics_anywhere_leaves_right_bytes_or_sigbus() {
    if !is_root() {
        return skip(
            "ways_out::a_pager_that_panics_anywhere_leaves_right_bytes_or_sigbus",
            "tracing needs root",
        );
    }
    within(WATCHDOG, || {
        let panics = panic_in_each_function(Serving { alone: true, ..Serving::default() });
        assert!(panics.sigbus > 30, "{panics:?}");
    });
}

#[test]
fn a_pager_that_panics_anywhere_is_succeeded() {
    if !is_root() {
        return skip("ways_out::a_pager_that_panics_anywhere_is_succeeded", "tracing needs root");
    }
    within(WATCHDOG, || {
        let panics = panic_in_each_function(Serving::default());
        assert!(panics.right > 30, "{panics:?}");
    });
}

/// What a pager waits for when its session is dropped.
#[test]
fn a_session_that_is_dropped_while_faults_wait_leaves_sigbus() {
    let test = "ways_out::a_session_that_is_dropped_while_faults_wait_leaves_sigbus";
    if !is_root() {
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        let source = Source::start(memory_like(PAGES * PAGE, 97), CHUNK);
        // Nothing comes; what comes is wrong, and asked for again; the server is gone.
        for silence in ["no answer", "wrong answers", "no server"] {
            let lies = Lies::default().chunk(move |_, answer| match silence {
                "wrong answers" => vec![postcopy::proto::v1::ChunkAnswer { result: None, ..answer }],
                _ => vec![],
            });
            let chaos = Chaos::start(source.server.address(), lies);
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
            let regions = [faulter.region(0, "mem", 0)];
            let memory = ForeignMemory {
                uffd: faulter.uffd(),
                regions: &regions,
                state: None,
                pid: None,
                is_registered: true,
            };
            let options = Options::DEFAULT.on_loss(LossPolicy::Wait);
            let session =
                Session::attach(chaos.address(), &"app".parse().unwrap(), options, &memory).unwrap();
            faulter.let_go();
            if silence == "no server" {
                drop(chaos);
            }
            let (pid, at) = (faulter.main.pid, faulter.at(0, 50));
            let other = std::thread::spawn(move || read_from_outside(pid, at, PAGE));
            faulter.main.tell(&format!("read {} 1", faulter.at(0, 100)));
            wait_until("two faults wait", || session.progress().faults >= 2);
            std::thread::park_timeout(Duration::from_millis(50));
            assert!(session.end(MINUTE), "{silence}");
            assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS), "{silence}");
            assert_eq!(other.join().unwrap(), Err(nix::Error::EFAULT), "{silence}");
        }
    });
}
