//! The daemons `postcopy firecracker` and `postcopy criu`, which restore the memory of other
//! programs.
//!
//! A daemon is two processes: a guardian ([`guardian`]) and the worker that it starts. The worker
//! is here: [`Worker::run`] waits for connections and for a request to end. A thread for each
//! connection reads the handshake ([`inbox`]) and creates a session from it ([`served`]). The main
//! thread watches the sessions of machines until they need work ([`watching`]). [`firecracker`] and
//! [`criu`] hold the differences between the programs.
//!
//! A worker's own state is lost with it, and its successor does not need that state. The successor
//! finds connections in the table of descriptors ([`leftovers`]), and unread handshakes in their
//! sockets. It finds sessions by the names of their state files ([`runtime_dir`]).

mod accepting;
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
mod silent;
pub(crate) mod starter;
pub(crate) mod surroundings;
mod watching;

pub(crate) use control::{ask_to_drain, ask_to_record};

use accepting::Accepting;
use anyhow::{Context, Result};
use guardian::Turn;
use leases::Leases;
use log::Refusals;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getppid;
use postcopy::proto::digest::Digest;
use postcopy::{Image, Options, ServerAddress};
use runtime_dir::{RuntimeDir, SessionName};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::PidfdFlags;
use served::Served;
use silent::Silent;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use watching::{ToWatch, Watching};

/// The time that a peer has for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The pause between two reads of a handshake that has arrived in part.
const PAUSE: Duration = Duration::from_millis(2);
/// The exit status of a daemon that has killed, stopped or left a process without all of its
/// memory.
const LOSS_STATUS: i32 = 3;
/// The longest time that the first worker waits for the leases of its images before it is ready.
const LEASES: Duration = Duration::from_secs(5);
/// The longest time from when an exiting process closes its descriptors to its end.
const EXIT: Duration = Duration::from_millis(100);
/// The most connections that wait for the daemon to accept them: the kernel's own default bound
/// (net.core.somaxconn).
const BACKLOG: i32 = 4096;
/// The interval between two checks of the sessions.
const LOOK: Duration = Duration::from_secs(1);

/// A daemon's settings and sockets, which are created before its first worker starts.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) address: ServerAddress,
    /// The images that sessions fetch pages from.
    pub(crate) images: Vec<Arc<Image>>,
    /// The names that the user gave these images, in the same order.
    references: Vec<String>,
    pub(crate) options: Options,
    /// The time that sessions have to become resident after a request to end.
    pub(crate) grace: Duration,
    pub(crate) runtime: RuntimeDir,
    /// The directory for the traces of sessions. None: no traces.
    pub(crate) traces: Option<PathBuf>,
    /// The sockets that programs connect to, and the paths to remove in the end.
    pub(crate) listeners: Vec<(UnixListener, PathBuf)>,
    control: UnixListener,
    /// The userfaultfd of a process whose earlier daemon has died, guardian and worker.
    pub(crate) adopted: Option<Adopted>,
    /// The descriptors that were open at the start.
    base: Vec<RawFd>,
}

/// The duplicated userfaultfd of a process that this daemon takes over.
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
    /// Creates the setup of a daemon that keeps its state in `runtime`.
    ///
    /// # Errors
    /// The control socket cannot be bound.
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

    /// Returns the reference NAME@DIGEST of an image, which stays valid when the tag moves. Without
    /// a digest it returns that of the only image, or None if the daemon has several.
    fn reference_of(&self, image: Option<Digest>) -> Option<String> {
        let is_it = |other: &Arc<Image>| image.is_none_or(|image| other.digest() == image);
        let is_clear =
            image.is_some() || self.images.windows(2).all(|two| two[0].digest() == two[1].digest());
        let found = self.images.iter().position(is_it).filter(|_| is_clear)?;
        let name = self.references[found].split([':', '@']).next().unwrap_or_default();
        Some(format!("{name}@{}", self.images[found].digest()))
    }

    /// Listens for programs at `path`, and replaces a socket there that has no listener.
    ///
    /// # Errors
    /// Another process listens at `path`, another file is there, or the socket cannot be created.
    pub(crate) fn listen(&mut self, path: &Path) -> Result<()> {
        let shown = || path.display().to_string();
        // The probe has another socket type, so a listener at that path does not see a connection.
        let probed = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
        if probed.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::PROTOTYPE)) {
            anyhow::bail!("another daemon listens at {}", shown());
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) => {
                let is_socket = found.file_type().is_socket();
                anyhow::ensure!(
                    is_socket,
                    "{}: exists and is not a socket. Move it away, or name another path",
                    shown()
                );
                std::fs::remove_file(path).with_context(shown)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(shown),
        }
        let listener = bind(path).with_context(shown)?;
        // Accepted connections inherit this option, and so do those that wait in the backlog.
        rustix::net::sockopt::set_socket_passcred(&listener, true).with_context(shown)?;
        self.listeners.push((listener, path.to_owned()));
        Ok(())
    }

    /// Serves until no program is left to serve, and replaces a worker that dies. Returns the
    /// daemon's exit status. Calls `on_ready` once the first worker is ready.
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
                        // The guardian has died, so this process cleans up.
                        setup.clean_up();
                    }
                    status
                }
                Err(error) => {
                    tracing::error!("{error:#}");
                    // An error must not end sessions: the guardian starts another worker, which
                    // tries again.
                    let serves =
                        turn.is_successor || setup.runtime.sessions().is_ok_and(|all| !all.is_empty());
                    if serves { std::process::abort() } else { 1 }
                }
            }
        });
        // The drop of the setup cleans up.
        status
    }

    /// Logs the daemon's losses, and returns the status that it exits with.
    fn close(&self, status: i32) -> i32 {
        let losses = self.runtime.losses();
        if losses.is_empty() {
            if status == 0 {
                tracing::info!("ended: nothing was lost");
            }
            return status;
        }
        let status = if status == 0 { LOSS_STATUS } else { status };
        let lost = match losses.len() {
            1 => "1 process was left or lost memory".to_owned(),
            several => format!("{several} processes were left or lost memory"),
        };
        tracing::error!("ended with status {status}: {lost}");
        for loss in &losses {
            let (name, what) = loss.split_once(' ').unwrap_or((loss, ""));
            let pid =
                name.parse().map_or_else(|()| name.to_owned(), |name: SessionName| name.pid.to_string());
            tracing::error!("process {pid}: it {what}");
        }
        status
    }

    /// Removes the sockets, and the runtime directory if no session is left in it.
    fn clean_up(&self) {
        for (_, path) in &self.listeners {
            let _ = std::fs::remove_file(path);
        }
        self.runtime.leave();
    }
}

impl Drop for Setup {
    /// Cleans up after a daemon that has ended or could not start. Workers exit without drops.
    fn drop(&mut self) {
        self.clean_up();
    }
}

/// Listens at `path`. The socket is for the daemon's user alone (mode 0600), whatever the umask:
/// whoever connects gets the image's memory.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The path gets the mode of the socket: see unix(7) and unix_bind() of Linux.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The part of a daemon that differs between the programs that are restored.
pub(crate) trait Program: std::fmt::Debug + Send + Sync {
    /// Serves a connection, to its end or until the main thread watches its session. Some: the
    /// daemon ends with this status.
    fn serve(&self, worker: &Arc<Worker>, connection: Connection) -> Option<i32>;

    /// Serves a session that has no connection any more, as [`Program::serve`] does.
    fn serve_again(&self, worker: &Arc<Worker>, session: SessionName) -> Option<i32>;

    /// Reports that the daemon is ready, and serves a session that needs no connection. The first
    /// worker calls this before it accepts connections.
    fn begin(&self, worker: &Arc<Worker>) -> Result<()>;

    /// Returns the exit status of a daemon that is to end because it has nothing to serve. Each
    /// worker calls this from time to time.
    fn end_idle(&self, _worker: &Worker) -> Option<i32> {
        None
    }
}

/// A program that has connected.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: Arc<UnixStream>,
    /// The index of the daemon's socket that the program has connected to.
    pub(crate) listener: usize,
    /// The socket's cookie (SO_COOKIE), which is the same for every worker.
    pub(crate) cookie: u64,
    /// The pid of the process that has connected.
    pub(crate) peer: u32,
    /// The start time of that process, if it could be read.
    start: Option<u64>,
}

/// Returns the start time of the process of this pid that has connected. A later process with its
/// pid must not be taken for it: the loss policy kills and stops peers by pid and start time.
///
/// # Errors
/// The process has exited.
fn start_of_peer(stream: &UnixStream, pid: u32) -> std::io::Result<u64> {
    let pidfd = kernel::peer_pidfd(stream)?;
    let start = runtime_dir::start_of(pid)?;
    // The peer still had its pid when its start time was read.
    if runtime_dir::has_exited(&pidfd) { Err(Errno::SRCH.into()) } else { Ok(start) }
}

impl Connection {
    fn new(stream: UnixStream, listener: usize) -> Result<Self> {
        let cookie = rustix::net::sockopt::socket_cookie(&stream).context("its number")?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).context("whose it is")?.pid;
        let peer = peer.as_raw_nonzero().get().cast_unsigned();
        let start = start_of_peer(&stream, peer).ok();
        Ok(Self { stream: Arc::new(stream), listener, cookie, peer, start })
    }

    /// Returns the name of the session of this peer, which is a program of this kind.
    ///
    /// # Errors
    /// The process has exited, or its start time cannot be read.
    fn session(&self, kind: &str) -> Result<SessionName> {
        let start = self.start.map_or_else(|| start_of_peer(&self.stream, self.peer), Ok);
        let start = start.context("its start cannot be read")?;
        Ok(SessionName { kind: kind.into(), pid: self.peer, start, cookie: self.cookie })
    }

    /// Returns whether an unread userfaultfd of the peer is in the socket, which receives nothing
    /// after that. Returns false once the peer has hung up.
    fn has_sent_userfaultfd(&self) -> bool {
        let has_hung_up = self.has_hung_up();
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
        let peeked = inbox::peek(&self.stream, inbox::MAX_LOOK).unwrap_or_default();
        let is_userfaultfd = |fd: &OwnedFd| leftovers::is_userfaultfd(fd.as_raw_fd());
        !has_hung_up && peeked.fds.iter().any(is_userfaultfd)
    }

    /// Returns whether the peer, which has hung up, has exited. A process closes its descriptors
    /// before it ends, so this waits a moment for the end.
    fn has_exited(&self) -> bool {
        let Ok(name) = self.session("peer") else { return true };
        let started = Instant::now();
        while name.is_alive() && started.elapsed() < EXIT {
            std::thread::park_timeout(PAUSE);
        }
        !name.is_alive()
    }

    /// Returns whether the peer has closed the connection or has exited.
    fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        poll_for(&mut fds, Duration::ZERO);
        !fds[0].revents().is_empty()
    }

    /// Waits until `parse` finds a complete message in the received bytes, and returns its result.
    ///
    /// # Errors
    /// The error of `parse`; the peer has hung up, has sent too much, or is silent for too long.
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
                anyhow::bail!("it has exited without a handshake that is still to be served");
            }
            anyhow::ensure!(!peeked.ended, "it has hung up after {bytes} bytes");
            anyhow::ensure!(bytes < most, "its message does not end within {most} bytes");
            anyhow::ensure!(
                started.elapsed() < HANDSHAKE,
                "it has said {bytes} bytes in {HANDSHAKE:?}, and no more"
            );
            if bytes == 0 {
                worker.wait(Some(&self.stream), HANDSHAKE.saturating_sub(started.elapsed()));
                anyhow::ensure!(!worker.is_stopping(), "the daemon ends");
            } else {
                // The socket stays readable while the bytes are in it, so a poll would return at
                // once.
                std::thread::park_timeout(PAUSE);
            }
        }
    }
}

/// The process that serves the sessions.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) setup: Arc<Setup>,
    program: Arc<dyn Program>,
    pub(crate) turn: Turn,
    /// The sessions that this worker serves. Locked only to read or change the map.
    sessions: Mutex<BTreeMap<SessionName, Arc<Served>>>,
    /// The sessions that other threads hand over to the main thread.
    to_watch: ToWatch,
    /// Readable from the request to end.
    stop: OwnedFd,
    /// The time by which the sessions are to have ended. Set with the request to end.
    deadline: OnceLock<Instant>,
    /// Readable after a thread has ended, or has handed a session over to the main thread.
    changed: OwnedFd,
    threads: AtomicUsize,
    status: OnceLock<i32>,
    is_alone: AtomicBool,
    /// The connections that have not sent a handshake yet.
    silent: Silent,
    /// The log of refused connections.
    refusals: Refusals,
}

impl Worker {
    fn new(setup: Arc<Setup>, program: Arc<dyn Program>, turn: Turn) -> Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("an eventfd");
        Ok(Self {
            setup,
            program,
            turn,
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
        })
    }

    /// Serves until all sessions have ended, and returns the daemon's exit status.
    fn run(self: Arc<Self>) -> Result<i32> {
        if self.turn.is_last_resort {
            // This runs before any step that may have killed the workers before this one.
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
        // After `take_over`, which would take a lease's connection for one that the last worker
        // left.
        let leases = Leases::hold(&self.setup).context("the leases of the images");
        if !self.turn.is_successor {
            // The leases protect the images before the daemon reports that it serves them.
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
    fn next(
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
    fn serve(self: &Arc<Self>, stream: UnixStream, listener: usize, is_new: bool) -> Result<()> {
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
    fn spawn(
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
    fn busy(self: &Arc<Self>) -> Busy {
        self.threads.fetch_add(1, Ordering::AcqRel);
        Busy(Arc::clone(self))
    }

    /// Takes over the connections and sessions that the last worker has left.
    fn take_over(self: &Arc<Self>, own: &[&dyn AsFd], guardian: Option<&OwnedFd>) -> Result<()> {
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

    fn guardian_has_died(&self) {
        self.is_alone.store(true, Ordering::Release);
        self.sessions().iter().for_each(|served| served.set_alone());
        tracing::error!(
            "the guardian has died: if this worker is killed, too, its sessions have no successor"
        );
    }

    fn stop(&self, since: Instant) {
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
        self.setup.runtime.remove(name);
    }

    /// Returns the sessions of a connection that an earlier worker has left.
    pub(crate) fn left_by(&self, cookie: u64) -> Vec<SessionName> {
        if !self.turn.is_successor {
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
struct Busy(Arc<Worker>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::AcqRel);
        signal(&self.0.changed);
    }
}

/// Starts a thread of the worker.
fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
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
fn served_end() -> Duration {
    Duration::from_secs(60)
}

fn signal(event: &OwnedFd) {
    // The write fails if the counter is full, and then the event is readable already.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) {
    let timeout = Timespec::try_from(timeout).ok();
    // A signal can interrupt the poll. Callers accept an early return.
    let _ = poll(fds, timeout.as_ref());
}
