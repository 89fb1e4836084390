//! Holds threads of other processes where they return to user mode, by ptrace(2): PTRACE_SEIZE and
//! PTRACE_INTERRUPT.
//!
//! A thread in madvise(2) stops only when the call returns, so the pager must read the call's event
//! first. The one side effect on a held thread is that some sleeping system calls return EINTR, as
//! after a stop by SIGSTOP. Therefore only threads are held that run, or are in a call that causes
//! events. A thread with another tracer is left alone. When the pager's process dies, the kernel
//! releases the threads.

use crate::shared::Shared;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Threads that are stopped, or about to stop.
#[derive(Debug)]
pub(crate) struct Held(Vec<Pid>);

impl Held {
    /// Stops the threads that cause events, if the session may do so and knows their processes.
    /// Returns `None` if there are none.
    pub(crate) fn hold_causers(shared: &Shared) -> Option<Self> {
        let callers = shared.callers.as_ref().filter(|_| shared.options.hold_causers)?;
        Some(Self::hold(callers.causers())).filter(|held| !held.0.is_empty())
    }

    /// Stops these threads. Threads that cannot be traced continue.
    fn hold(threads: Vec<i32>) -> Self {
        let seize = |thread: &Pid| {
            ptrace::seize(*thread, ptrace::Options::empty()).is_ok() && ptrace::interrupt(*thread).is_ok()
        };
        Self(threads.into_iter().map(Pid::from_raw).filter(seize).collect())
    }

    /// Wraps threads that an earlier call has seized.
    pub(crate) fn of(threads: Vec<Pid>) -> Self {
        Self(threads)
    }

    pub(crate) fn into_threads(self) -> Vec<Pid> {
        self.0
    }

    /// Releases the threads that have stopped. Returns true once all are released; the caller
    /// repeats the call until then.
    pub(crate) fn release(&mut self) -> bool {
        self.0.retain(|thread| {
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
        self.0.is_empty()
    }
}
