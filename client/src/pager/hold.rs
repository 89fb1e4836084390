//! Holds threads of other processes where they return to user mode, by ptrace(2): PTRACE_SEIZE and
//! PTRACE_INTERRUPT.
//!
//! A thread in madvise(2) stops only when the call returns, so the pager must read the call's event
//! first. The one side effect on a held thread is that some sleeping system calls return EINTR, as
//! after a stop by SIGSTOP. Therefore only threads are held that run, or are in a call that causes
//! events. A thread with another tracer is left alone. When the pager's process dies, the kernel
//! releases the threads.

use crate::options::add;
use crate::shared::Shared;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// Time for which installs (or poison) and events alternate before the pager holds the events'
/// causers. Two threads in madvise without a pause mostly let an install through within
/// that time.
const HOLD_AFTER: Duration = Duration::from_millis(1);
/// The time from one search for causers to the next, while events still block installs. A thread
/// that slept in a page fault continues once the fault is resolved, and may cause the next event.
const SEARCH_AGAIN: Duration = Duration::from_millis(2);

/// Threads that are stopped, or about to stop.
#[derive(Debug)]
pub(crate) struct Held {
    threads: Vec<Pid>,
    next_search: Instant,
}

impl Held {
    /// Begins without threads. The first search for causers is due after [`HOLD_AFTER`].
    pub(crate) fn new() -> Self {
        Self::of(Vec::new())
    }

    /// Stops the threads that cause events, if a search is due, the session may do so and knows
    /// their processes.
    pub(crate) fn hold_causers(&mut self, shared: &Shared) {
        if Instant::now() < self.next_search {
            return;
        }
        let Some(callers) = shared.callers.as_ref().filter(|_| shared.options.hold_causers) else { return };
        let was_empty = self.threads.is_empty();
        // Threads that cannot be traced continue, and so do threads that are held already.
        let seize = |thread: &Pid| {
            ptrace::seize(*thread, ptrace::Options::empty()).is_ok() && ptrace::interrupt(*thread).is_ok()
        };
        self.threads.extend(callers.causers().into_iter().map(Pid::from_raw).filter(seize));
        if was_empty && !self.threads.is_empty() {
            add(&shared.counters.holds, 1);
        }
        self.next_search = Instant::now() + SEARCH_AGAIN;
    }

    /// Returns true if no thread is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Wraps threads that an earlier call has seized.
    pub(crate) fn of(threads: Vec<Pid>) -> Self {
        Self { threads, next_search: Instant::now() + HOLD_AFTER }
    }

    pub(crate) fn into_threads(self) -> Vec<Pid> {
        self.threads
    }

    /// Releases the threads that have stopped. Returns true once all are released; the caller
    /// repeats the call until then.
    pub(crate) fn release(&mut self) -> bool {
        self.threads.retain(|thread| {
            let stopped_by = |signal: Signal| (signal != Signal::SIGTRAP).then_some(signal);
            let signal = match waitpid(*thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => return true,
                // PTRACE_INTERRUPT stopped the thread. A SIGSTOP in addition stays recorded in the
                // kernel.
                Ok(WaitStatus::PtraceEvent(..)) => None,
                // The thread stopped to receive a signal; the detach delivers it.
                Ok(WaitStatus::Stopped(_, signal)) => stopped_by(signal),
                // The thread has ended.
                _ => return false,
            };
            let _ = ptrace::detach(*thread, signal);
            false
        });
        self.is_empty()
    }
}
