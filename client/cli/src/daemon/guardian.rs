//! The guardian: the small process that outlives a worker's death.
//!
//! A daemon is two processes that share one table of descriptors. The guardian has a single thread
//! and allocates nothing after its start. It waits until a signal arrives. When the worker is
//! killed, the guardian clones another worker from its own memory, which is as it was at the start.
//! So the successor has options, images and sockets at once. The worker has the sessions. Its
//! successor finds state files in the runtime directory, and descriptors and unread handshakes in
//! the table of descriptors. It takes them over: [`super::leftovers`].
//!
//! The guardian never waits for the reader of its log. It clones a successor before it logs, and a
//! log that is full loses lines ([`super::log`]).
//!
//! The process that survives acts. When the guardian dies, a pidfd reports it to the worker, which
//! goes on alone. When workers keep dying for as long as a fault may take, the guardian starts a
//! worker that applies the loss policy, and goes on trying.

use super::kernel;
use super::log::Log;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// The shortest and the longest pause before the guardian clones a successor of a worker that
/// failed by itself.
const PAUSES: std::ops::Range<Duration> = Duration::from_millis(5)..Duration::from_secs(1);

/// A worker that has served for so long is not part of the failures before it.
const APART: Duration = Duration::from_secs(5);

/// The parameters of a worker's start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerStart {
    /// Another worker served before this one.
    pub(crate) is_successor: bool,
    /// Workers have failed for longer than a fault may take: the loss policy applies to all
    /// sessions.
    pub(crate) is_last_resort: bool,
    /// The time of the request to end, if one has been received.
    pub(crate) stopping_since: Option<Instant>,
    /// The pid of the process that has started this worker.
    pub(crate) guardian: Pid,
}

/// The signals that ask the daemon to end.
pub(crate) const ENDS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// Returns the signals that the daemon waits for. All of its threads block them.
pub(crate) fn signals() -> SigSet {
    ENDS.into_iter().chain([Signal::SIGCHLD, Signal::SIGUSR1]).collect()
}

/// Runs `work` in a worker, and in another one when that worker is killed, until one exits by
/// itself. Returns its exit status. Calls `on_ready` once, when a worker has reported that it
/// serves ([`tell_ready`]). Gives up if workers fail for longer than `most` after the request to
/// end.
///
/// # Errors
/// This process has other threads, or the first worker cannot be started.
pub(crate) fn guard(
    patience: Duration,
    most: Duration,
    mut on_ready: impl FnMut(),
    mut work: impl FnMut(WorkerStart) -> i32,
) -> Result<i32> {
    let threads = std::fs::read_dir("/proc/self/task").context("/proc/self/task")?.count();
    ensure!(threads == 1, "the guardian has {threads} threads, and can have one only");
    kernel::watch_children().context("SIGCHLD")?;
    let signals = signals();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    let mut start =
        WorkerStart { is_successor: false, is_last_resort: false, stopping_since: None, guardian: getpid() };
    let mut pause = PAUSES.start;
    let mut failing_since = None;
    let mut is_ready = false;
    let mut killed: Option<Pid> = None;
    loop {
        let worker = match spawn(start, &mut work) {
            Ok(worker) => {
                if let Some(killed) = killed.take() {
                    log_successor(killed, worker);
                }
                worker
            }
            Err(error) if !start.is_successor => return Err(error),
            // Processes or memory may become available again.
            Err(_) => {
                std::thread::park_timeout(PAUSES.end);
                continue;
            }
        };
        let (started, mut has_served) = (Instant::now(), false);
        let end = loop {
            // This fails for invalid arguments only.
            match signals.wait().context("waiting for signals")? {
                Signal::SIGUSR1 => {
                    has_served = true;
                    if !std::mem::replace(&mut is_ready, true) {
                        on_ready();
                    }
                }
                end if ENDS.contains(&end) => {
                    start.stopping_since.get_or_insert_with(Instant::now);
                    // If the worker has died already, its successor gets `stopping_since`.
                    let _ = kill(worker, Signal::SIGTERM);
                }
                Signal::SIGCHLD => match waitpid(worker, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => {}
                    Ok(end) => break end,
                    Err(error) => return Err(error).context("waiting for the worker"),
                },
                _ => {}
            }
        };
        if let WaitStatus::Exited(_, status) = end {
            return Ok(status);
        }
        if !has_served && start.stopping_since.is_some_and(|since| since.elapsed() > most) {
            return Ok(1);
        }
        killed = Some(worker);
        // Another process killed the worker; it did not fail by itself.
        let was_killed = matches!(end, WaitStatus::Signaled(_, Signal::SIGKILL, _));
        if has_served && (was_killed || started.elapsed() > APART) {
            (pause, failing_since) = (PAUSES.start, None);
        }
        if !has_served || !was_killed {
            failing_since.get_or_insert_with(Instant::now);
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(PAUSES.end);
        }
        // A last-resort worker that has served has applied the loss policy; one that died before
        // may not.
        if start.is_last_resort && has_served {
            failing_since = None;
        }
        let is_last_resort = failing_since.is_some_and(|since: Instant| since.elapsed() > patience);
        start = WorkerStart { is_successor: true, is_last_resort, ..start };
    }
}

/// Writes the line with one call, because the worker writes to the same log.
fn log_successor(killed: Pid, worker: Pid) {
    let mut line = [0; 96];
    let mut rest = &mut line[..];
    let fits = writeln!(rest, "postcopy: the worker {killed} was killed; worker {worker} takes over");
    let unused = rest.len();
    if fits.is_ok() {
        let _ = Log.write(&line[..line.len() - unused]);
    }
}

fn spawn(start: WorkerStart, work: &mut impl FnMut(WorkerStart) -> i32) -> Result<Pid> {
    #[expect(unsafe_code, reason = "a fork")]
    // SAFETY: this process has one thread, which `guard` has seen to.
    let child = unsafe { kernel::fork_sharing_descriptors() };
    if let Some(worker) = child.context("starting a worker")? {
        return Ok(worker);
    }
    let work = AssertUnwindSafe(|| work(start));
    match std::panic::catch_unwind(work) {
        Ok(status) => kernel::exit_at_once(status),
        // The worker aborts as if it had been killed: a successor takes over its sessions.
        Err(_) => std::process::abort(),
    }
}

/// Reports to the guardian that this worker serves.
pub(crate) fn tell_ready(start: WorkerStart) {
    // The guardian may have died.
    let _ = kill(start.guardian, Signal::SIGUSR1);
}
