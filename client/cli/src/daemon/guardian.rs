//! The guardian: the small process that outlives a worker's death.
//!
//! The daemon is two processes with one table of descriptors. This one has a single thread, allocates nothing after its
//! start, and does nothing but wait: when the worker is killed it clones another one, from its own memory as it was at
//! the start, so that options, images and sockets are there at once. The worker has the sessions. What it has left (state
//! files, descriptors, handshakes that nobody has taken) its successor finds in the table and in the runtime directory,
//! and takes over: [`super::leftovers`].
//!
//! It never waits for whoever reads its log: a successor is cloned first, and a log that is full loses lines ([`super::log`]).
//!
//! Whoever survives acts. When the guardian dies, its worker is told by a pidfd and goes on alone. When workers die one after
//! another for as long as a fault may take, the guardian has one do what the loss policy says, and goes on trying.

use super::kernel;
use super::log::Log;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// Before a worker is cloned that follows one which has failed by itself.
const PAUSES: std::ops::Range<Duration> = Duration::from_millis(5)..Duration::from_secs(1);

/// A worker that has served for so long has nothing to do with the failures before it.
const APART: Duration = Duration::from_secs(5);

/// How a worker is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// It follows another one.
    pub(crate) is_successor: bool,
    /// Workers have died for as long as a fault may take: what is unresolved is lost.
    pub(crate) is_last_resort: bool,
    /// Since when the daemon is to end.
    pub(crate) stopping_since: Option<Instant>,
    /// Who has started it.
    pub(crate) guardian: Pid,
}

/// The signals that ask the daemon to end.
pub(crate) const ENDS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The signals that the daemon waits for. They are blocked in all of its threads.
pub(crate) fn signals() -> SigSet {
    ENDS.into_iter().chain([Signal::SIGCHLD, Signal::SIGUSR1]).collect()
}

/// Has `work` done by a worker, and by another one when that is killed, until one ends by itself; gives the status that it
/// ends with. `on_ready` is called once, when a worker has told that it serves ([`tell_ready`]).
///
/// # Errors
/// If this process has other threads, or no first worker can be had.
pub(crate) fn guard(
    patience: Duration,
    mut on_ready: impl FnMut(),
    mut work: impl FnMut(Turn) -> i32,
) -> Result<i32> {
    let threads = std::fs::read_dir("/proc/self/task").context("/proc/self/task")?.count();
    ensure!(threads == 1, "the guardian has {threads} threads, and can have one only");
    let signals = signals();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    let mut turn =
        Turn { is_successor: false, is_last_resort: false, stopping_since: None, guardian: getpid() };
    let mut pause = PAUSES.start;
    let mut failing_since = None;
    let mut is_ready = false;
    let mut killed: Option<Pid> = None;
    loop {
        let worker = match start(turn, &mut work) {
            Ok(worker) => {
                if let Some(killed) = killed.take() {
                    log_successor(killed, worker);
                }
                worker
            }
            Err(error) if !turn.is_successor => return Err(error),
            // There may be processes and memory again.
            Err(_) => {
                std::thread::park_timeout(PAUSES.end);
                continue;
            }
        };
        let (started, mut has_served) = (Instant::now(), false);
        let end = loop {
            // Fails for wrong arguments alone.
            match signals.wait().context("waiting for signals")? {
                Signal::SIGUSR1 => {
                    has_served = true;
                    if !std::mem::replace(&mut is_ready, true) {
                        on_ready();
                    }
                }
                end if ENDS.contains(&end) => {
                    turn.stopping_since.get_or_insert_with(Instant::now);
                    // It may be dead already: then its successor is told.
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
        killed = Some(worker);
        // Killed, and not ended by what it does itself.
        let was_killed = matches!(end, WaitStatus::Signaled(_, Signal::SIGKILL, _));
        if has_served && (was_killed || started.elapsed() > APART) {
            (pause, failing_since) = (PAUSES.start, None);
        }
        if !has_served || !was_killed {
            failing_since.get_or_insert_with(Instant::now);
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(PAUSES.end);
        }
        // One that has served has done what the loss policy says; one that was killed before may not have.
        if turn.is_last_resort && has_served {
            failing_since = None;
        }
        let is_last_resort = failing_since.is_some_and(|since: Instant| since.elapsed() > patience);
        turn = Turn { is_successor: true, is_last_resort, ..turn };
    }
}

/// In one write: the worker writes to the same log.
fn log_successor(killed: Pid, worker: Pid) {
    let mut line = [0; 96];
    let mut rest = &mut line[..];
    let fits = writeln!(rest, "postcopy: the worker {killed} was killed; worker {worker} takes over");
    let unused = rest.len();
    if fits.is_ok() {
        let _ = Log.write(&line[..line.len() - unused]);
    }
}

fn start(turn: Turn, work: &mut impl FnMut(Turn) -> i32) -> Result<Pid> {
    #[expect(unsafe_code, reason = "a fork")]
    // SAFETY: this process has one thread, which `guard` has seen to.
    let child = unsafe { kernel::fork_sharing_descriptors() };
    if let Some(worker) = child.context("starting a worker")? {
        return Ok(worker);
    }
    let work = AssertUnwindSafe(|| work(turn));
    match std::panic::catch_unwind(work) {
        Ok(status) => kernel::exit_at_once(status),
        // As if it had been killed: what it has left is taken over.
        Err(_) => std::process::abort(),
    }
}

/// Tells the guardian that this worker serves.
pub(crate) fn tell_ready(turn: Turn) {
    // It may have died.
    let _ = kill(turn.guardian, Signal::SIGUSR1);
}
