//! The signals that end the server: SIGTERM and SIGINT. A thread waits for them.
//!
//! tokio's signals would give each runtime one descriptor more. Cargo builds the programs of a
//! workspace with the features of all of them, and the daemons of `postcopy` have a runtime for
//! each session.

use nix::sys::signal::{SigSet, Signal};
use std::io;
use tokio::sync::oneshot;

fn ends() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// Blocks the signals in this thread, and in the threads that it starts from here on. The signals
/// wait for [`first`] then. Must be called before the process has other threads.
///
/// # Errors
/// The error of pthread_sigmask(3).
pub(crate) fn block() -> io::Result<()> {
    Ok(ends().thread_block()?)
}

/// Returns a future that ends with the first of the signals that [`block`] has blocked. A signal
/// that came before this call counts.
///
/// # Errors
/// The error of starting a thread.
pub(crate) fn first() -> io::Result<impl Future<Output = ()>> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("postcopyd-end".into());
    thread.spawn(move || {
        // sigwait(3) fails for invalid arguments only.
        let _ = ends().wait();
        // Fails if the server has ended by itself.
        let _ = sender.send(());
    })?;
    Ok(async move {
        let _ = receiver.await;
    })
}
