//! The sessions that have nothing to do but to serve faults. The worker's main thread watches all
//! of them, so that an idle session costs no thread besides its pager's.
//!
//! The thread that has taken a session on hands it over ([`Worker::watch`]) and ends. The main
//! thread polls the connections and checks every session each [`LOOK`]. It never waits for one
//! session: where there is work to do, such as to resume a session or to end it, the main thread
//! starts a thread for that session ([`Tend`]). That thread hands the session back once the session
//! serves again.

use super::served::Served;
use super::worker::{Busy, Worker, start_thread};
use super::{LOOK, inbox};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Does the work that a session needs. Returns true once the session needs no more work, and false
/// if the daemon no longer serves it.
pub(crate) type Tend = fn(&Worker, &mut Watched) -> bool;

/// A session of a process, and the connection that the process has made.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) served: Arc<Served>,
    /// The connection, until the process closes it.
    pub(crate) stream: Option<Arc<UnixStream>>,
    tend: Tend,
    /// The status that the daemon ends with when it no longer serves the session.
    ends_with: Option<i32>,
    /// Delays the worker's end while the session is served.
    _busy: Busy,
}

impl Watched {
    /// Discards the bytes that the process has sent, and drops a connection that it has closed.
    pub(crate) fn receive(&mut self) {
        let Some(socket) = &self.stream else { return };
        let taken = inbox::take(socket, inbox::MAX_LOOK).unwrap_or(0);
        // The userfaultfd reports the end of the process; the socket reports it sooner.
        if taken == 0 && inbox::peek(socket, 1).is_ok_and(|peeked| peeked.ended) {
            self.stream = None;
        }
    }

    /// Returns whether the process has exited. Without its connection the process may be alive,
    /// because it may have closed only that.
    pub(crate) fn has_exited(&self) -> bool {
        self.stream.is_none() && !self.served.name.is_alive()
    }

    /// Returns whether the session needs no work. Does not block.
    pub(crate) fn is_idle(&self) -> bool {
        self.served.is_serving() && !self.has_exited()
    }

    /// Does the work that the session needs, and hands it back or ends with it.
    fn work(mut self, worker: &Worker) {
        if (self.tend)(worker, &mut self) {
            worker.to_watch.add(self);
            super::signal(&worker.changed);
        } else if let Some(status) = self.ends_with {
            // The drop of `_busy` tells the main thread.
            let _ = worker.status.set(status);
        }
    }
}

impl Worker {
    /// Hands a session over to the main thread, which watches it. The daemon ends with the status
    /// `ends_with`, if there is one, when it no longer serves the session.
    pub(crate) fn watch(
        self: &Arc<Self>,
        served: Arc<Served>,
        stream: Option<Arc<UnixStream>>,
        tend: Tend,
        ends_with: Option<i32>,
    ) {
        self.to_watch.add(Watched { served, stream, tend, ends_with, _busy: self.busy() });
        super::signal(&self.changed);
    }
}

/// The sessions that the main thread has not seen yet.
#[derive(Debug, Default)]
pub(super) struct ToWatch(Mutex<Vec<Watched>>);

impl ToWatch {
    fn add(&self, watched: Watched) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    }

    fn take(&self) -> Vec<Watched> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The sessions that the main thread watches.
#[derive(Debug)]
pub(super) struct Watching {
    all: Vec<Watched>,
    /// The time of the last check of all sessions.
    looked: Instant,
    /// The last attempt to start a thread has failed.
    lacks_threads: bool,
}

impl Watching {
    pub(super) fn new() -> Self {
        Self { all: Vec::new(), looked: Instant::now(), lacks_threads: false }
    }

    /// Adds the sessions that other threads have handed over.
    pub(super) fn begin(&mut self, worker: &Worker) {
        self.all.append(&mut worker.to_watch.take());
    }

    /// Returns the connections that are to be polled.
    pub(super) fn streams(&self) -> impl Iterator<Item = &UnixStream> {
        self.all.iter().filter_map(|watched| watched.stream.as_deref())
    }

    /// Returns the longest time until the next call of [`Watching::look`].
    pub(super) fn timeout(&self) -> Duration {
        LOOK.saturating_sub(self.looked.elapsed())
    }

    /// Checks the sessions that may need work: those whose connections are ready, and each
    /// [`LOOK`] all of them. `ready` tells of each of [`Watching::streams`], in the same order.
    pub(super) fn look(&mut self, worker: &Arc<Worker>, mut ready: impl Iterator<Item = bool>) {
        let all_are_due = worker.is_stopping() || self.timeout().is_zero();
        if all_are_due {
            self.looked = Instant::now();
        }
        let mut idle = Vec::with_capacity(self.all.len());
        for mut watched in self.all.drain(..) {
            let is_ready = watched.stream.is_some() && ready.next() == Some(true);
            if is_ready {
                watched.receive();
            }
            if !is_ready && !all_are_due || !worker.is_stopping() && watched.is_idle() {
                idle.push(watched);
                continue;
            }
            // The session waits for a thread until the next check.
            let waits = start(worker, watched);
            let lacked_threads = std::mem::replace(&mut self.lacks_threads, waits.is_err());
            if let Err((watched, error)) = waits {
                if !lacked_threads {
                    tracing::error!("process {}: {error:#}; trying again", watched.served.name.pid);
                }
                idle.push(watched);
            }
        }
        self.all = idle;
    }
}

/// Starts a thread that does the work of a session.
///
/// # Errors
/// The session, and the reason for which there is no thread.
fn start(worker: &Arc<Worker>, watched: Watched) -> Result<(), (Watched, anyhow::Error)> {
    // A closure that could not be started is dropped, and the session must not be.
    let slot = Arc::new(Mutex::new(Some(watched)));
    let take = |slot: &Mutex<Option<Watched>>| {
        slot.lock().unwrap_or_else(PoisonError::into_inner).take().expect("one of the two takes it")
    };
    let (worker, of_thread) = (Arc::clone(worker), Arc::clone(&slot));
    start_thread("session", move || take(&of_thread).work(&worker)).map_err(|error| (take(&slot), error))
}
