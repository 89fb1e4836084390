//! The end of a daemon whose runtime directory has disappeared.
//!
//! With the directory the state of all sessions is gone, so no worker can serve them. The successor
//! of a worker that has died applies the loss policy to the processes that it knows: those that
//! are connected, and the tasks of a restore ([`RuntimeDir::note_task`]). With the policy `wait`
//! their faults stay pending while the descriptors are open. So the worker keeps them open until
//! the request to end.
//!
//! [`RuntimeDir::note_task`]: super::runtime_dir::RuntimeDir::note_task

use super::connection::Connection;
use super::guardian::{self, WorkerStart};
use super::runtime_dir::SessionName;
use super::{LOSS_STATUS, Setup, accepting, firecracker, leftovers, served};
use postcopy::LossPolicy;

/// Reports the loss and applies the loss policy. Returns the daemon's exit status.
pub(super) fn outlast(setup: &Setup, start: WorkerStart) -> i32 {
    tracing::error!(
        "{}: this directory has disappeared, and the state of all sessions with it. They are lost. Keep it until the daemon ends",
        setup.runtime.path().display()
    );
    for (listener, path) in &setup.listeners {
        accepting::close(listener, path);
    }
    // They stay open to the end, like all other descriptors.
    let connections = leftovers::connections(setup).unwrap_or_default();
    let connections =
        connections.into_iter().filter_map(|(stream, index)| Connection::new(stream, index).ok());
    let connections: Vec<_> = connections.collect();
    let machine = |connection: &Connection| connection.session(firecracker::KIND).ok();
    let mut lost = setup.runtime.tasks();
    // The peer of a restore is criu itself.
    if lost.is_empty() {
        lost.extend(connections.iter().filter_map(machine));
    }
    lost.retain(SessionName::is_alive);
    lost.iter().for_each(|name| served::lose_unserved(setup, name));
    guardian::tell_ready(start);
    if setup.options.on_loss == LossPolicy::Wait && !lost.is_empty() && start.stopping_since.is_none() {
        wait_for_end(&lost);
    }
    // A machine keeps its own userfaultfd, so its faults stay pending. A task would read zeros.
    for name in lost.iter().filter(|name| name.kind != firecracker::KIND && name.is_alive()) {
        served::kill_unsafe(setup, name, "its state has disappeared");
    }
    if lost.is_empty() { 1 } else { LOSS_STATUS }
}

/// Waits for the request to end, or for the end of all these processes.
fn wait_for_end(lost: &[SessionName]) {
    let signals = nix::sys::signalfd::SignalFd::new(&guardian::signals());
    let Ok(signals) = signals else { return };
    while lost.iter().any(SessionName::is_alive) {
        let mut fds = [rustix::event::PollFd::new(&signals, rustix::event::PollFlags::IN)];
        super::poll_for(&mut fds, super::LOOK);
        if fds[0].revents().is_empty() {
            continue;
        }
        let signal = signals.read_signal().ok().flatten();
        let is_end = |signo: u32| guardian::ENDS.iter().any(|end| i64::from(signo) == *end as i64);
        if signal.is_none_or(|signal| is_end(signal.ssi_signo)) {
            return;
        }
    }
}
