//! The daemons that other programs' memory is restored by: `postcopy firecracker` and `postcopy criu`.
//!
//! A daemon is two processes ([`guardian`]). The one that works is here: [`Worker::run`] waits for connections and for
//! what ends it; a thread for each connection takes the handshake ([`inbox`]), makes a session of it ([`served`]), and watches
//! over that until the program is gone. What differs between the programs is in [`firecracker`] and [`criu`].
//!
//! What a worker knows is lost with it, and need not be kept: its successor finds the connections in the table of
//! descriptors ([`leftovers`]), handshakes that were not taken in their sockets, and sessions by the names of their state
//! files ([`runtime_dir`]).

mod control;
pub(crate) mod criu;
pub(crate) mod firecracker;
pub(crate) mod guardian;
mod inbox;
pub(crate) mod kernel;
mod leases;
mod leftovers;
pub(crate) mod log;
mod resuming;
pub(crate) mod runtime_dir;
mod served;
pub(crate) mod surroundings;

pub(crate) use control::{ask_to_drain, ask_to_record};

use anyhow::{Context, Result};
use guardian::Turn;
use leases::Leases;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getppid;
use postcopy::proto::digest::Digest;
use postcopy::{Image, Options, ServerAddress};
use runtime_dir::{RuntimeDir, SessionName};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::PidfdFlags;
use served::Served;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a peer may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Between looks at a handshake of which a part has come.
const PAUSE: Duration = Duration::from_millis(2);
/// The exit status of a daemon that has killed, stopped or left a process without all of its memory.
const LOSS_STATUS: i32 = 3;
/// How long the first worker waits for the leases of its images before it says that it serves.
const LEASES: Duration = Duration::from_secs(5);
/// How long a process that exits may take from closing its descriptors to its end.
const EXIT: Duration = Duration::from_millis(100);
/// How often sessions are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What a daemon is made of before its first worker starts, which has it from there.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) address: ServerAddress,
    /// The images that sessions are filled from.
    pub(crate) images: Vec<Arc<Image>>,
    /// What these are called by the user, in the same order.
    references: Vec<String>,
    pub(crate) options: Options,
    /// How long it may take to end.
    pub(crate) grace: Duration,
    pub(crate) runtime: RuntimeDir,
    /// Where sessions' traces are written, if they are.
    pub(crate) traces: Option<PathBuf>,
    /// Where programs connect, and the paths to remove in the end.
    pub(crate) listeners: Vec<(UnixListener, PathBuf)>,
    control: UnixListener,
    /// The userfaultfd of a process that is taken over from a daemon that has died altogether.
    pub(crate) adopted: Option<Adopted>,
    /// The descriptors that were open at the start.
    base: Vec<RawFd>,
}

/// See [`Setup::adopted`].
#[derive(Debug)]
pub(crate) struct Adopted {
    uffd: OwnedFd,
}

impl Adopted {
    fn borrow(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Setup {
    /// For a daemon that keeps its state in `runtime`.
    ///
    /// # Errors
    /// If there is no socket to be had.
    pub(crate) fn new(
        address: ServerAddress,
        images: Vec<(String, Arc<Image>)>,
        options: Options,
        grace: Duration,
        runtime: RuntimeDir,
        traces: Option<PathBuf>,
    ) -> Result<Self> {
        let control = UnixListener::bind(runtime.path().join("control")).context("the control socket")?;
        let (listeners, adopted, base) = (Vec::new(), None, Vec::new());
        let (references, images) = images.into_iter().unzip();
        Ok(Self {
            address,
            images,
            references,
            options,
            grace,
            runtime,
            traces,
            listeners,
            control,
            adopted,
            base,
        })
    }

    /// What the user calls an image; without a digest, the only image that there is.
    fn reference_of(&self, image: Option<Digest>) -> Option<&str> {
        let is_it = |other: &Arc<Image>| image.is_none_or(|image| other.digest() == image);
        let is_clear =
            image.is_some() || self.images.windows(2).all(|two| two[0].digest() == two[1].digest());
        let found = self.images.iter().position(is_it).filter(|_| is_clear)?;
        Some(&self.references[found])
    }

    /// Listens for programs at `path`, in place of whoever has left a socket there.
    ///
    /// # Errors
    /// If somebody listens there, or it cannot be made.
    pub(crate) fn listen(&mut self, path: &Path) -> Result<()> {
        let shown = || path.display().to_string();
        // Of another type, so that whoever listens there is not told of a connection.
        let probed = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
        if probed.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::PROTOTYPE)) {
            anyhow::bail!("{}: somebody listens there already", shown());
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(shown);
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(shown)?;
        // Connections have this from it, also those that come before they are accepted.
        rustix::net::sockopt::set_socket_passcred(&listener, true).with_context(shown)?;
        self.listeners.push((listener, path.to_owned()));
        Ok(())
    }

    /// Serves until there is nothing left to be served, by a worker that may die; the daemon's exit status. `on_ready` is
    /// called once it serves.
    ///
    /// # Errors
    /// As [`guardian::guard`].
    pub(crate) fn run(mut self, program: Arc<dyn Program>, on_ready: impl FnMut()) -> Result<i32> {
        surroundings::prepare();
        log::log_panics();
        self.base = leftovers::open_descriptors()?;
        let setup = Arc::new(self);
        let patience = setup.options.fault_deadline;
        let status = guardian::guard(patience, on_ready, |turn| {
            let worker = Worker::new(Arc::clone(&setup), Arc::clone(&program), turn);
            let status = worker.and_then(|worker| Arc::new(worker).run());
            match status {
                Ok(status) => {
                    let status = setup.close(status);
                    if getppid() != turn.guardian {
                        // It has died, and cannot do so.
                        setup.clean_up();
                    }
                    status
                }
                Err(error) => {
                    tracing::error!("{error:#}");
                    // What is served must not end with this: another worker tries again.
                    let serves =
                        turn.is_successor || setup.runtime.sessions().is_ok_and(|all| !all.is_empty());
                    if serves { std::process::abort() } else { 1 }
                }
            }
        });
        setup.clean_up();
        status
    }

    /// Says what the daemon has done to processes whose memory was lost: the status that it ends with.
    fn close(&self, status: i32) -> i32 {
        let losses = self.runtime.losses();
        if losses.is_empty() {
            if status == 0 {
                tracing::info!("ended: nothing was lost");
            }
            return status;
        }
        let status = if status == 0 { LOSS_STATUS } else { status };
        tracing::error!("ended with status {status}: {} processes lost memory", losses.len());
        for loss in &losses {
            let (name, what) = loss.split_once(' ').unwrap_or((loss, ""));
            let pid =
                name.parse().map_or_else(|()| name.to_owned(), |name: SessionName| name.pid.to_string());
            tracing::error!("process {pid}: it {what}");
        }
        status
    }

    /// Removes what is of no use to anybody.
    fn clean_up(&self) {
        for (_, path) in &self.listeners {
            let _ = std::fs::remove_file(path);
        }
        self.runtime.leave();
    }
}

/// What differs between the programs that are restored.
pub(crate) trait Program: std::fmt::Debug + Send + Sync {
    /// Serves what comes over a connection until that is done; Some: the daemon is done, too, with this status.
    fn serve(&self, worker: &Arc<Worker>, connection: Connection) -> Option<i32>;

    /// Serves a session of which no connection is left.
    fn serve_again(&self, worker: &Arc<Worker>, session: SessionName) -> Option<i32>;

    /// What is there to be served besides connections, in the first worker.
    fn begin(&self, worker: &Arc<Worker>) -> Result<()>;

    /// Ends a daemon that has nothing to serve: Some is its status. Called by each worker once in a while.
    fn end_idle(&self, _worker: &Worker) -> Option<i32> {
        None
    }
}

/// A program that has connected.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    /// At which of the daemon's sockets.
    pub(crate) listener: usize,
    /// Its number, the same for every worker.
    pub(crate) cookie: u64,
    /// The process that has connected.
    pub(crate) peer: u32,
    /// When that was started, if it can be known.
    start: Option<u64>,
}

impl Connection {
    fn new(stream: UnixStream, listener: usize) -> Result<Self> {
        let cookie = rustix::net::sockopt::socket_cookie(&stream).context("its number")?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).context("whose it is")?.pid;
        let peer = peer.as_raw_nonzero().get().cast_unsigned();
        let start = runtime_dir::start_of(peer).ok();
        Ok(Self { stream, listener, cookie, peer, start })
    }

    /// The name of the session of a program of this kind that has connected.
    ///
    /// # Errors
    /// If the process has exited, or cannot be looked at.
    fn session(&self, kind: &str) -> Result<SessionName> {
        let start = self.start.map_or_else(|| runtime_dir::start_of(self.peer), Ok);
        let start = start.context("its start cannot be read")?;
        Ok(SessionName { kind: kind.into(), pid: self.peer, start, cookie: self.cookie })
    }

    /// Whether the peer has sent a userfaultfd. Not so once it has hung up, or its handshake was taken.
    fn has_sent_userfaultfd(&self) -> bool {
        let peeked = inbox::peek(&self.stream, inbox::MAX_LOOK).unwrap_or_default();
        let is_userfaultfd = |fd: &OwnedFd| leftovers::is_userfaultfd(fd.as_raw_fd());
        !self.has_hung_up() && peeked.fds.iter().any(is_userfaultfd)
    }

    /// Whether the peer, which has hung up, has done so because it exited: a process closes its descriptors first.
    fn has_exited(&self) -> bool {
        let Ok(name) = self.session("peer") else { return true };
        let started = Instant::now();
        while name.is_alive() && started.elapsed() < EXIT {
            std::thread::park_timeout(PAUSE);
        }
        !name.is_alive()
    }

    /// Whether the peer has closed the connection, or exited.
    fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        poll_for(&mut fds, Duration::ZERO);
        !fds[0].revents().is_empty()
    }

    /// Waits until `parse` finds in what has come what it looks for: that, and who has sent it.
    ///
    /// # Errors
    /// What `parse` says is wrong; that the peer has gone, or says nothing.
    fn wait_for<T>(
        &self,
        worker: &Worker,
        most: usize,
        mut parse: impl FnMut(&mut inbox::Peeked) -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            let mut peeked = inbox::peek(&self.stream, most)?;
            if let Some(found) = parse(&mut peeked)? {
                return Ok(found);
            }
            let bytes = peeked.bytes.len();
            if peeked.ended && self.has_exited() {
                anyhow::bail!("it has exited, and has named no memory that is not served");
            }
            anyhow::ensure!(!peeked.ended, "it has hung up after {bytes} bytes");
            anyhow::ensure!(bytes < most, "what it says does not end within {most} bytes");
            anyhow::ensure!(
                started.elapsed() < HANDSHAKE,
                "it has said {bytes} bytes in {HANDSHAKE:?}, and no more"
            );
            if bytes == 0 {
                worker.wait(Some(&self.stream), HANDSHAKE.saturating_sub(started.elapsed()));
                anyhow::ensure!(!worker.is_stopping(), "the daemon ends");
            } else {
                // What lies there is readable all the time.
                std::thread::park_timeout(PAUSE);
            }
        }
    }
}

/// The process that works.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) setup: Arc<Setup>,
    program: Arc<dyn Program>,
    pub(crate) turn: Turn,
    /// Held for looking and changing alone.
    sessions: Mutex<BTreeMap<SessionName, Arc<Served>>>,
    /// Readable from when it is to end.
    stop: OwnedFd,
    /// When it is to have ended.
    deadline: OnceLock<Instant>,
    /// Readable when a thread has ended.
    changed: OwnedFd,
    threads: AtomicUsize,
    status: OnceLock<i32>,
    is_alone: AtomicBool,
}

impl Worker {
    fn new(setup: Arc<Setup>, program: Arc<dyn Program>, turn: Turn) -> Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("an eventfd");
        Ok(Self {
            setup,
            program,
            turn,
            sessions: Mutex::default(),
            stop: event()?,
            deadline: OnceLock::new(),
            changed: event()?,
            threads: AtomicUsize::new(0),
            status: OnceLock::new(),
            is_alone: AtomicBool::new(false),
        })
    }

    /// Serves until all is done: the daemon's exit status.
    fn run(self: Arc<Self>) -> Result<i32> {
        if self.turn.is_last_resort {
            // Before anything that may be what the workers before this one failed at.
            served::lose_all(&self.setup)?;
        }
        let signals =
            SignalFd::with_flags(&guardian::signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
                .context("signals")?;
        let guardian = rustix::process::Pid::from_raw(self.turn.guardian.as_raw()).context("a pid")?;
        let guardian = rustix::process::pidfd_open(guardian, PidfdFlags::empty()).ok();
        if self.turn.is_successor {
            self.take_over(
                &[&signals.as_fd(), &self.stop.as_fd(), &self.changed.as_fd()],
                guardian.as_ref(),
            )?;
        }
        // After that: a lease's connection is none that the worker before has left.
        let leases = Leases::hold(&self.setup).context("the leases of the images");
        if !self.turn.is_successor {
            // What is said to be served stays.
            leases?.wait(LEASES);
            self.program.begin(&self)?;
        } else if let Err(error) = leases {
            tracing::error!("{error:#}");
        }
        let findings = surroundings::prepare();
        if !self.turn.is_successor {
            findings.iter().for_each(surroundings::Finding::log);
        }
        guardian::tell_ready(self.turn);
        if let Some(since) = self.turn.stopping_since {
            self.stop(since);
        }
        let mut guardian = guardian;
        if guardian.is_none() {
            self.guardian_has_died();
        }
        loop {
            self.next(&signals, &mut guardian)?;
            if let Some(status) = self.status.get() {
                return Ok(*status);
            }
            if self.threads.load(Ordering::Acquire) == 0
                && let Some(status) = self.program.end_idle(&self)
            {
                return Ok(status);
            }
            let past = self.deadline.get().is_some_and(|deadline| Instant::now() > *deadline + served_end());
            if self.is_stopping() && (self.threads.load(Ordering::Acquire) == 0 || past) {
                self.sessions().iter().for_each(|served| served.give_up());
                return Ok(0);
            }
        }
    }

    /// Does the next thing that is to be done.
    fn next(self: &Arc<Self>, signals: &SignalFd, guardian: &mut Option<OwnedFd>) -> Result<()> {
        let listeners: &[_] = if self.is_stopping() { &[] } else { &self.setup.listeners };
        let mut fds = vec![
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&self.changed, PollFlags::IN),
            PollFd::new(&self.setup.control, PollFlags::IN),
        ];
        fds.extend(listeners.iter().map(|(listener, _)| PollFd::new(listener, PollFlags::IN)));
        if let Some(guardian) = guardian.as_ref() {
            fds.push(PollFd::new(guardian, PollFlags::IN));
        }
        poll_for(&mut fds, LOOK);
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
        if ready[2]
            && let Ok((stream, _)) = self.setup.control.accept()
        {
            let worker = Arc::clone(self);
            let answer = move || {
                control::answer(&worker, stream);
                None
            };
            self.spawn("control", answer).unwrap_or_else(|error| tracing::error!("a request: {error:#}"));
        }
        for (index, (listener, _)) in listeners.iter().enumerate().filter(|(index, _)| ready[3 + index]) {
            match listener.accept() {
                Ok((stream, _)) => {
                    // Others are served on.
                    self.serve(stream, index)
                        .unwrap_or_else(|error| tracing::error!("a connection: {error:#}"));
                }
                // Of descriptors, say: others may be given back.
                Err(error) => {
                    tracing::error!("a connection cannot be accepted: {error}");
                    std::thread::park_timeout(PAUSE);
                }
            }
        }
        if guardian.is_some() && ready.last() == Some(&true) {
            *guardian = None;
            self.guardian_has_died();
        }
        Ok(())
    }

    /// Has a thread serve a connection.
    fn serve(self: &Arc<Self>, stream: UnixStream, listener: usize) -> Result<()> {
        let connection = match Connection::new(stream, listener) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::error!("a connection: {error:#}");
                return Ok(());
            }
        };
        let worker = Arc::clone(self);
        self.spawn("connection", move || worker.program.serve(&worker, connection))
    }

    /// Has a thread do something. What it gives ends the daemon.
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce() -> Option<i32> + Send + 'static,
    ) -> Result<()> {
        let worker = Arc::clone(self);
        self.threads.fetch_add(1, Ordering::AcqRel);
        let thread = std::thread::Builder::new().name(format!("postcopy-{name}"));
        let started = thread.spawn(move || {
            // Its sessions would be without anybody to watch over them: a successor takes all of them over.
            let Ok(status) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) else {
                std::process::abort();
            };
            if let Some(status) = status {
                let _ = worker.status.set(status);
            }
            worker.threads.fetch_sub(1, Ordering::AcqRel);
            signal(&worker.changed);
        });
        started.map(drop).context("a thread")
    }

    /// What the worker before has left.
    fn take_over(self: &Arc<Self>, own: &[&dyn AsFd], guardian: Option<&OwnedFd>) -> Result<()> {
        let own: Vec<_> = own.iter().map(|fd| fd.as_fd()).chain(guardian.map(AsFd::as_fd)).collect();
        let connections = leftovers::sort(&self.setup, &own)?;
        let mut names = self.setup.runtime.sessions().context("the runtime directory")?;
        for (stream, listener) in connections {
            let cookie = rustix::net::sockopt::socket_cookie(&stream).unwrap_or(0);
            names.retain(|name| name.cookie != cookie);
            self.serve(stream, listener)?;
        }
        if names.is_empty() && self.setup.adopted.is_some() {
            // The one before has not come so far.
            return self.program.begin(self);
        }
        for name in names {
            let worker = Arc::clone(self);
            self.spawn("session", move || worker.program.serve_again(&worker, name))?;
        }
        Ok(())
    }

    fn guardian_has_died(&self) {
        self.is_alone.store(true, Ordering::Release);
        self.sessions().iter().for_each(|served| served.set_alone());
        tracing::error!("the guardian has died: if this process is killed, too, nobody takes over");
    }

    fn stop(&self, since: Instant) {
        let grace = self.setup.grace;
        if self.deadline.set(since + grace).is_err() {
            return;
        }
        for (_, path) in &self.setup.listeners {
            let _ = std::fs::remove_file(path);
        }
        signal(&self.stop);
        tracing::info!("ending: nothing new is served; what is there has {grace:?} to become complete");
    }

    /// Whether it is to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.deadline.get().is_some()
    }

    /// Whether it was to have ended by now.
    pub(crate) fn is_past_deadline(&self) -> bool {
        self.deadline.get().is_some_and(|deadline| Instant::now() >= *deadline)
    }

    /// All sessions.
    pub(crate) fn sessions(&self) -> Vec<Arc<Served>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// A session is served here from now on.
    pub(crate) fn add(&self, served: Served) -> Arc<Served> {
        let served = Arc::new(served);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(served.name.clone(), Arc::clone(&served));
        if self.is_alone.load(Ordering::Acquire) {
            served.set_alone();
        }
        served
    }

    /// A session has ended.
    pub(crate) fn remove(&self, name: &SessionName) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.setup.runtime.remove(name);
    }

    /// The sessions that came over a connection, as a worker before has left them.
    pub(crate) fn left_by(&self, cookie: u64) -> Vec<SessionName> {
        if !self.turn.is_successor {
            return Vec::new();
        }
        let names = self.setup.runtime.sessions().unwrap_or_default();
        names.into_iter().filter(|name| name.cookie == cookie).collect()
    }

    /// Waits at most for `timeout` until something comes over `stream`, or the worker is to end. Once it is, it waits for
    /// a little while only: somebody has to look how far it is.
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

/// What a session may take to end.
fn served_end() -> Duration {
    Duration::from_secs(60)
}

fn signal(event: &OwnedFd) {
    // Fails where it is signalled already, very often.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) {
    let timeout = Timespec::try_from(timeout).ok();
    // Interrupted it is too early, which callers do not mind.
    let _ = poll(fds, timeout.as_ref());
}
