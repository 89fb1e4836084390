//! The signals that interrupt a command which has to clean up.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use tokio::sync::oneshot;

/// The exit status after a second signal, as that of a shell's interrupted command.
const INTERRUPTED: i32 = 130;

/// Waits for SIGINT, SIGTERM and SIGHUP in a thread, which sends the first one. A second signal
/// ends the process at once. A thread receives them, because tokio's own handler would cost each
/// runtime of this program a descriptor. Signals that this process ignores since its start (nohup,
/// the background of a script) stay ignored: the kernel would keep a blocked one for the thread.
///
/// # Errors
/// The signals cannot be blocked, or the thread cannot be started.
pub(super) fn watch() -> Result<oneshot::Receiver<Signal>> {
    let ignored = ignored_signals();
    let is_heeded = |signal: &Signal| ignored >> (*signal as u32 - 1) & 1 == 0;
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let signals: SigSet = signals.into_iter().filter(is_heeded).collect();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    let (send, receive) = oneshot::channel();
    let wait = move || {
        if let Ok(signal) = signals.wait() {
            // The command may have ended.
            let _ = send.send(signal);
            if signals.wait().is_ok() {
                std::process::exit(INTERRUPTED);
            }
        }
    };
    std::thread::Builder::new().name("postcopy-signals".into()).spawn(wait).context("a thread")?;
    Ok(receive)
}

/// Returns a bit for each signal that this process ignores, as proc_pid_status(5) shows it.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
