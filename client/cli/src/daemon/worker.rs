//! The worker: the process of a daemon that serves the sessions.
//!
//! [`Worker::run`] waits for connections and for a request to end. A thread for each connection
//! reads the handshake ([`inbox`](super::inbox)) and creates a session from it
//! ([`served`](super::served)). The main thread watches the sessions of machines until they need
//! work ([`watching`](super::watching)).

use super::accepting::{self, Accepting};
use super::connection::{Connection, PAUSE};
use super::guardian::{self, WorkerStart};
use super::leases::Leases;
use super::log::Refusals;
use super::runtime_dir::SessionName;
use super::served::{self, Served};
use super::silent::{self, Silent};
use super::watching::{ToWatch, Watching};
use super::{Program, Setup, control, leftovers, poll_for, signal, surroundings};
use anyhow::{Context, Result};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::process::PidfdFlags;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The longest time that the first worker waits for the leases of its images before it is ready.
const LEASES: Duration = Duration::from_secs(5);

/// The process that serves the sessions.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) setup: Arc<Setup>,
    pub(super) program: Arc<dyn Program>,
    pub(crate) start: WorkerStart,
    /// The sessions that this worker serves. Locked only to read or change the map.
    pub(super) sessions: Mutex<BTreeMap<SessionName, Arc<Served>>>,
    /// The sessions that other threads hand over to the main thread.
    pub(super) to_watch: ToWatch,
    /// Readable from the request to end.
    pub(super) stop: OwnedFd,
    /// The time by which the sessions are to have ended. Set with the request to end.
    pub(super) deadline: OnceLock<Instant>,
    /// Readable after a thread has ended, or has handed a session over to the main thread.
    pub(super) changed: OwnedFd,
    pub(super) threads: AtomicUsize,
    pub(super) status: OnceLock<i32>,
    pub(super) is_alone: AtomicBool,
    /// The connections that have not sent a handshake yet.
    pub(super) silent: Silent,
    /// The log of refused connections.
    pub(super) refusals: Refusals,
    /// Held during a look at a handshake. A look duplicates the descriptors that a peer has sent,
    /// so the duplicates of one connection exist at a time.
    pub(super) looking: Mutex<()>,
}

impl Worker {
    pub(super) fn new(setup: Arc<Setup>, program: Arc<dyn Program>, start: WorkerStart) -> Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("an eventfd");
        Ok(Self {
            setup,
            program,
            start,
            sessions: Mutex::default(),
            to_watch: ToWatch::default(),
            stop: event()?,
            deadline: OnceLock::new(),
            changed: event()?,
            threads: AtomicUsize::new(0),
            status: OnceLock::new(),
            is_alone: AtomicBool::new(false),
            silent: Silent::default(),
            refusals: Refusals::default(),
            looking: Mutex::default(),
        })
    }

    /// Serves until all sessions have ended, and returns the daemon's exit status.
    pub(super) fn run(self: Arc<Self>) -> Result<i32> {
        if self.start.is_last_resort {
            // This runs before any step that may have killed the workers before this one.
            served::lose_all(&self.setup)?;
        }
        let signals =
            SignalFd::with_flags(&guardian::signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
                .context("signals")?;
        let guardian = rustix::process::Pid::from_raw(self.start.guardian.as_raw()).context("a pid")?;
        let guardian = rustix::process::pidfd_open(guardian, PidfdFlags::empty()).ok();
        if self.start.is_successor {
            self.take_over(
                &[&signals.as_fd(), &self.stop.as_fd(), &self.changed.as_fd()],
                guardian.as_ref(),
            )?;
        }
        // After `take_over`, which would take a lease's connection for one that the last worker
        // left.
        let leases = Leases::hold(&self.setup).context("the leases of the images");
        if !self.start.is_successor {
            // The leases protect the images before the daemon reports that it serves them.
            leases?.wait(LEASES);
            self.program.begin(&self)?;
        } else if let Err(error) = leases {
            tracing::error!("{error:#}");
        }
        let findings = surroundings::prepare();
        if !self.start.is_successor {
            findings.iter().for_each(surroundings::Finding::log);
        }
        guardian::tell_ready(self.start);
        if let Some(since) = self.start.stopping_since {
            self.stop(since);
        }
        let mut guardian = guardian;
        if guardian.is_none() {
            self.guardian_has_died();
        }
        let (mut accepting, mut watching) = (Accepting::new(&self.setup), Watching::new());
        loop {
            self.next(&signals, &mut guardian, &mut accepting, &mut watching);
            if let Some(status) = self.status.get() {
                return Ok(*status);
            }
            if self.threads.load(Ordering::Acquire) == 0
                && let Some(status) = self.program.end_idle(&self)
            {
                return Ok(status);
            }
            let past = self.deadline.get().is_some_and(|deadline| Instant::now() > *deadline + served_end());
            let is_idle = self.threads.load(Ordering::Acquire) == 0;
            if self.is_stopping() && (is_idle && accepting.is_over() || past) {
                self.sessions().iter().for_each(|served| served.give_up());
                return Ok(0);
            }
        }
    }

    /// Waits for the next event, and handles it.
    pub(super) fn next(
        self: &Arc<Self>,
        signals: &SignalFd,
        guardian: &mut Option<OwnedFd>,
        accepting: &mut Accepting,
        watching: &mut Watching,
    ) {
        watching.begin(self);
        let sockets = accepting.sockets(&self.setup);
        let mut fds = vec![
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&self.changed, PollFlags::IN),
            PollFd::new(&self.setup.control, PollFlags::IN),
        ];
        fds.extend(sockets.iter().map(|(_, listener)| PollFd::new(listener, PollFlags::IN)));
        fds.extend(watching.streams().map(|stream| PollFd::new(stream, PollFlags::IN)));
        if let Some(guardian) = guardian.as_ref() {
            fds.push(PollFd::new(guardian, PollFlags::IN));
        }
        poll_for(&mut fds, accepting.timeout(watching.timeout()));
        self.refusals.report();
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            while let Ok(Some(signal)) = signals.read_signal() {
                if guardian::ENDS.iter().any(|end| i64::from(signal.ssi_signo) == *end as i64) {
                    self.stop(Instant::now());
                }
            }
        }
        if ready[1] {
            let _ = rustix::io::read(&self.changed, &mut [0; 8]);
        }
        if ready[2] {
            match self.setup.control.accept() {
                Ok((stream, _)) => {
                    let worker = Arc::clone(self);
                    let answer = move || control::answer(&worker, stream);
                    start_thread("control", answer)
                        .unwrap_or_else(|error| tracing::error!("a request: {error:#}"));
                }
                // The peer waits, and the socket stays readable, until there is a descriptor.
                Err(_) => std::thread::park_timeout(accepting::PAUSE),
            }
        }
        let (of_sockets, of_streams) = ready[3..].split_at(sockets.len());
        for ((index, listener), _) in sockets.into_iter().zip(of_sockets).filter(|(_, is_ready)| **is_ready) {
            if let Some(stream) = accepting.accept(index, listener) {
                // An error of one connection must not end the others.
                self.serve(stream, index, true)
                    .unwrap_or_else(|error| tracing::error!("a connection: {error:#}"));
            }
        }
        if guardian.is_some() && ready.last() == Some(&true) {
            *guardian = None;
            self.guardian_has_died();
        }
        watching.look(self, of_streams.iter().copied());
    }

    /// Starts a thread that serves a connection. A new one may still lack its handshake.
    pub(super) fn serve(self: &Arc<Self>, stream: UnixStream, listener: usize, is_new: bool) -> Result<()> {
        let connection = match Connection::new(stream, listener) {
            Ok(connection) => connection,
            Err(error) => {
                self.refusals.log(&format!("a connection: {error:#}"));
                return Ok(());
            }
        };
        if is_new && self.silent.add(&connection) {
            let most = silent::MOST;
            self.refusals
                .log(&format!("more than {most} connections have sent no handshake: the oldest is closed"));
        }
        let worker = Arc::clone(self);
        self.spawn("connection", move || worker.program.serve(&worker, connection))
    }

    /// Starts a thread that runs `work`, and that the worker's end waits for. Some of `work` ends
    /// the daemon with that status.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce() -> Option<i32> + Send + 'static,
    ) -> Result<()> {
        let busy = self.busy();
        start_thread(name, move || {
            if let Some(status) = work() {
                let _ = busy.0.status.set(status);
            }
        })
    }

    /// Delays the worker's end until the result is dropped.
    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        self.threads.fetch_add(1, Ordering::AcqRel);
        Busy(Arc::clone(self))
    }

    /// Takes over the connections and sessions that the last worker has left.
    pub(super) fn take_over(self: &Arc<Self>, own: &[&dyn AsFd], guardian: Option<&OwnedFd>) -> Result<()> {
        let own: Vec<_> = own.iter().map(|fd| fd.as_fd()).chain(guardian.map(AsFd::as_fd)).collect();
        let connections = leftovers::sort(&self.setup, &own)?;
        let mut names = self.setup.runtime.sessions().context("the runtime directory")?;
        for (stream, listener) in connections {
            let cookie = rustix::net::sockopt::socket_cookie(&stream).unwrap_or(0);
            names.retain(|name| name.cookie != cookie);
            self.serve(stream, listener, false)?;
        }
        if names.is_empty() && self.setup.adopted.is_some() {
            // The last worker died before it took over the process.
            return self.program.begin(self);
        }
        for name in names {
            let worker = Arc::clone(self);
            self.spawn("session", move || worker.program.serve_again(&worker, name))?;
        }
        Ok(())
    }

    pub(super) fn guardian_has_died(&self) {
        self.is_alone.store(true, Ordering::Release);
        self.sessions().iter().for_each(|served| served.set_alone());
        tracing::error!(
            "the guardian has died: if this worker is killed, too, its sessions have no successor"
        );
    }

    pub(super) fn stop(&self, since: Instant) {
        let grace = self.setup.grace;
        if self.deadline.set(since + grace).is_err() {
            return;
        }
        for (listener, path) in &self.setup.listeners {
            accepting::close(listener, path);
        }
        signal(&self.stop);
        tracing::info!("ending: new connections are refused, and sessions have {grace:?} to become resident");
    }

    /// Returns whether the worker is to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.deadline.get().is_some()
    }

    /// Returns whether the time for sessions to end is over.
    pub(crate) fn is_past_deadline(&self) -> bool {
        self.deadline.get().is_some_and(|deadline| Instant::now() >= *deadline)
    }

    /// Returns the sessions that this worker serves.
    pub(crate) fn sessions(&self) -> Vec<Arc<Served>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Adds a session to those that this worker serves.
    pub(crate) fn add(&self, served: Served) -> Arc<Served> {
        let served = Arc::new(served);
        if served.name.kind == super::criu::KIND {
            self.setup.runtime.note_task(&served.name, true);
        }
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(served.name.clone(), Arc::clone(&served));
        if self.is_alone.load(Ordering::Acquire) {
            served.set_alone();
        }
        served
    }

    /// Removes a session that has ended, and its files.
    pub(crate) fn remove(&self, name: &SessionName) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        if name.kind == super::criu::KIND {
            self.setup.runtime.note_task(name, false);
        }
        self.setup.runtime.remove(name);
    }

    /// Returns the sessions of a connection that an earlier worker has left.
    pub(crate) fn left_by(&self, cookie: u64) -> Vec<SessionName> {
        if !self.start.is_successor {
            return Vec::new();
        }
        let names = self.setup.runtime.sessions().unwrap_or_default();
        names.into_iter().filter(|name| name.cookie == cookie).collect()
    }

    /// Waits for at most `timeout` until `stream` is readable or the worker is to end. After the
    /// request to end it returns sooner, so that callers check the progress of their sessions.
    pub(crate) fn wait(&self, stream: Option<&UnixStream>, timeout: Duration) {
        let mut fds = Vec::new();
        if self.is_stopping() {
            poll_for(&mut fds, timeout.min(10 * PAUSE));
            return;
        }
        fds.push(PollFd::new(&self.stop, PollFlags::IN));
        fds.extend(stream.map(|stream| PollFd::new(stream, PollFlags::IN)));
        poll_for(&mut fds, timeout);
    }
}

/// Work that the worker's end waits for.
#[derive(Debug)]
pub(super) struct Busy(Arc<Worker>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::AcqRel);
        signal(&self.0.changed);
    }
}

/// Starts a thread of the worker.
pub(super) fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(format!("postcopy-{name}"));
    let started = thread.spawn(move || {
        // Sessions would be left without a thread that watches them: a successor takes all of them
        // over.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            std::process::abort();
        }
    });
    started.map(drop).context("a thread")
}

/// Returns the time that ending a session takes at most.
pub(super) fn served_end() -> Duration {
    Duration::from_secs(60)
}
