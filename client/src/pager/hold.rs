//! Holds threads of other processes where they return to user mode, by ptrace(2): PTRACE_SEIZE and PTRACE_INTERRUPT.
//!
//! A thread in madvise finishes the call first, which takes that its event is read. A held thread has no side effect
//! but that some system calls that sleep return EINTR, as after a stop by SIGSTOP; so only threads are held that run,
//! or are in a call that causes events. A thread that another tracer has is left alone. When the pager's process dies,
//! the kernel lets its threads go.

use crate::shared::Shared;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Threads that are held, or about to be.
#[derive(Debug)]
pub(crate) struct Held(Vec<Pid>);

impl Held {
    /// Has the threads stop that cause events, where the session may do so and knows their processes; None: there are
    /// none.
    pub(crate) fn hold_causers(shared: &Shared) -> Option<Self> {
        let callers = shared.callers.as_ref().filter(|_| shared.options.hold_causers)?;
        Some(Self::hold(callers.causers())).filter(|held| !held.0.is_empty())
    }

    /// Has these threads stop. Those that cannot be traced go on.
    fn hold(threads: Vec<i32>) -> Self {
        let seize = |thread: &Pid| {
            ptrace::seize(*thread, ptrace::Options::empty()).is_ok() && ptrace::interrupt(*thread).is_ok()
        };
        Self(threads.into_iter().map(Pid::from_raw).filter(seize).collect())
    }

    /// Threads that were to be held before.
    pub(crate) fn of(threads: Vec<Pid>) -> Self {
        Self(threads)
    }

    pub(crate) fn into_threads(self) -> Vec<Pid> {
        self.0
    }

    /// Lets those go that have stopped: whether that is all of them. Another call lets others go once they stop.
    pub(crate) fn release(&mut self) -> bool {
        self.0.retain(|thread| {
            let stopped_by = |signal: Signal| (signal != Signal::SIGTRAP).then_some(signal);
            let signal = match waitpid(*thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => return true,
                // A stop that was asked for. Of a process that SIGSTOP stops the signal is noted already.
                Ok(WaitStatus::PtraceEvent(..)) => None,
                // A signal that is delivered now.
                Ok(WaitStatus::Stopped(_, signal)) => stopped_by(signal),
                // It has ended.
                _ => return false,
            };
            let _ = ptrace::detach(*thread, signal);
            false
        });
        self.0.is_empty()
    }
}
