//! The signals that interrupt a command which has to clean up.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use tokio::sync::oneshot;

/// The exit status after a second signal, as that of a shell's interrupted command.
const INTERRUPTED: i32 = 130;

/// Waits for SIGINT, SIGTERM and SIGHUP in a thread, which sends the first one. A second signal
/// ends the process at once. A thread receives them, because tokio's own handler would cost each
/// runtime of this program a descriptor.
///
/// # Errors
/// The signals cannot be blocked, or the thread cannot be started.
pub(super) fn watch() -> Result<oneshot::Receiver<Signal>> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
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
