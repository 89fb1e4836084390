//! Retries: resuming sessions of an earlier worker, and attaching the memory of a process.
//!
//! A state file that cannot be read may become readable. A lack of memory, descriptors or threads
//! may be transient. The process waits meanwhile. So another attempt follows each failed one after
//! a growing pause, until the fault deadline. Then the loss policy applies: the process is killed
//! or stopped. Without a session its memory cannot be poisoned, so `poison` kills, too. `wait`
//! continues the attempts.

use super::firecracker;
use super::runtime_dir::SessionName;
use super::served::{self, Served};
use super::worker::Worker;
use anyhow::Result;
use postcopy::LossPolicy;
use rustix::io::Errno;
use std::ops::Range;
use std::time::{Duration, Instant};

/// The pause after the first attempt, and the longest pause.
const PAUSES: Range<Duration> = Duration::from_millis(20)..Duration::from_secs(1);

/// The state of repeated attempts.
#[derive(Debug)]
struct Retry {
    started: Instant,
    pause: Duration,
    next: Instant,
    /// The reason that was logged last.
    logged: String,
}

impl Retry {
    fn new() -> Self {
        let now = Instant::now();
        Self { started: now, pause: PAUSES.start, next: now, logged: String::new() }
    }

    /// Records a failed attempt. Logs the reason if it differs from the last one.
    fn failed(&mut self, pid: u32, error: &anyhow::Error) {
        let reason = format!("{error:#}");
        if reason != self.logged {
            tracing::error!("process {pid}: {reason}; trying again");
            self.logged = reason;
        }
        self.next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSES.end);
    }

    fn until_next(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }
}

/// The result of an attempt to resume a session.
#[derive(Debug)]
pub(crate) enum Attempt {
    /// The session is served.
    Served(Box<Served>),
    /// There is no session: the earlier worker had not begun with it, or it has ended.
    NoSession,
    /// The process has exited, or the daemon has ended its part.
    Ended,
    /// The attempt has failed, and the caller repeats it.
    Failed,
}

/// A session that an earlier worker has left and that is still to be resumed.
#[derive(Debug)]
pub(crate) struct Resuming {
    name: SessionName,
    retry: Retry,
    /// True once the loss policy has been applied.
    policy_applied: bool,
}

impl Resuming {
    pub(crate) fn new(name: SessionName) -> Self {
        Self { name, retry: Retry::new(), policy_applied: false }
    }

    /// Returns the session's name.
    pub(crate) fn name(&self) -> &SessionName {
        &self.name
    }

    /// Returns the time until the next attempt.
    pub(crate) fn until_next(&self) -> Duration {
        self.retry.until_next()
    }

    /// Tries to resume the session, if the pause since the last attempt is over. After the fault
    /// deadline it applies the loss policy once, and continues the attempts while the process
    /// lives.
    pub(crate) fn attempt(&mut self, worker: &Worker) -> Attempt {
        if !self.retry.until_next().is_zero() && !worker.is_past_deadline() {
            return Attempt::Failed;
        }
        let name = &self.name;
        let error = match Served::resume(&worker.setup, name.clone(), worker.start) {
            Ok(Some(served)) => return Attempt::Served(Box::new(served)),
            Ok(None) => return Attempt::NoSession,
            Err(error) => error,
        };
        if !name.is_alive() {
            tracing::info!("process {}: it has exited before its session could be resumed", name.pid);
            worker.setup.runtime.remove(name);
            return Attempt::Ended;
        }
        self.retry.failed(name.pid, &error);
        if self.retry.started.elapsed() > worker.setup.options.fault_deadline && !self.policy_applied {
            self.policy_applied = true;
            served::lose_unserved(&worker.setup, name);
        }
        if !worker.is_past_deadline() {
            return Attempt::Failed;
        }
        if name.kind == firecracker::KIND {
            firecracker::say_left(worker, name, None);
        } else {
            served::kill_unsafe(&worker.setup, name, &format!("{error:#}"));
            worker.setup.runtime.remove(name);
        }
        Attempt::Ended
    }

    /// Repeats [`Resuming::attempt`] until the result is not [`Attempt::Failed`].
    pub(crate) fn resume(mut self, worker: &Worker) -> Attempt {
        loop {
            match self.attempt(worker) {
                Attempt::Failed => worker.wait(None, self.until_next()),
                done => return done,
            }
        }
    }
}

/// Repeats `attempt`, which attaches memory of a process, while its error is transient.
/// Stops at the fault deadline, unless the loss policy is `wait`. Stops with any policy when the
/// process has exited or the daemon's time to end is over.
///
/// # Errors
/// The error of the last attempt.
pub(crate) fn retry_attach<T>(
    worker: &Worker,
    pid: u32,
    is_alive: impl Fn() -> bool,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let (mut retry, options) = (Retry::new(), &worker.setup.options);
    loop {
        let error = match attempt() {
            Err(error) if is_transient(&error) => error,
            done => return done,
        };
        let is_late = retry.started.elapsed() > options.fault_deadline && options.on_loss != LossPolicy::Wait;
        if is_late || !is_alive() || worker.is_past_deadline() {
            return Err(error);
        }
        retry.failed(pid, &error);
        worker.wait(None, retry.until_next());
    }
}

/// Returns whether an error is a lack of memory, descriptors, threads or space.
fn is_transient(error: &anyhow::Error) -> bool {
    let errno = |cause: &(dyn std::error::Error + 'static)| {
        let of_io = cause.downcast_ref().and_then(Errno::from_io_error);
        of_io.or_else(|| cause.downcast_ref::<Errno>().copied())
    };
    let lacks = [Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::AGAIN, Errno::NOSPC];
    error.chain().filter_map(errno).any(|errno| lacks.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::SessionError;

    #[test]
    fn a_lack_is_transient_and_a_refusal_is_not() {
        let system = |errno: Errno| {
            anyhow::Error::from(SessionError::System { what: "a thread", source: errno.into() })
                .context("task 7")
        };
        assert!(is_transient(&system(Errno::MFILE)));
        assert!(is_transient(&system(Errno::AGAIN)));
        assert!(!is_transient(&system(Errno::INVAL)));
        assert!(!is_transient(&SessionError::Ended.into()));
    }
}
