//! The daemons `postcopy firecracker` and `postcopy criu`, which restore the memory of other
//! programs.
//!
//! A daemon is two processes: a guardian ([`guardian`]) and the worker that it starts ([`worker`]).
//! The guardian starts a successor after a worker's death. A worker's own state is lost with it,
//! and the successor does not need that state. It finds connections in the table of descriptors
//! ([`leftovers`]), and unread handshakes in their sockets. It finds sessions by the names of their
//! state files ([`runtime_dir`]).
//!
//! Here are the settings and sockets that all workers have in common. [`firecracker`] and [`criu`]
//! hold the differences between the programs.

mod accepting;
mod connection;
mod control;
pub(crate) mod criu;
pub(crate) mod firecracker;
pub(crate) mod guardian;
mod inbox;
pub(crate) mod kernel;
mod leases;
mod leftovers;
pub(crate) mod log;
pub(crate) mod mounted;
pub(crate) mod own_files;
mod resuming;
pub(crate) mod runtime_dir;
mod served;
mod silent;
pub(crate) mod starter;
mod stateless;
pub(crate) mod surroundings;
mod watching;
mod worker;

pub(crate) use control::{ask_to_drain, ask_to_record, ensure_exists};

use anyhow::{Context, Result};
use connection::Connection;
use nix::unistd::getppid;
use postcopy::proto::digest::Digest;
use postcopy::{Image, Options, ServerAddress};
use runtime_dir::{RuntimeDir, SessionName};
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use worker::Worker;

/// The exit status of a daemon that has killed, stopped or left a process without all of its
/// memory.
const LOSS_STATUS: i32 = 3;
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
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            anyhow::bail!(
                "another daemon listens at {}. End that one, or name another socket or work directory",
                path.display()
            );
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
        let listener = bind(path).with_context(|| match path.parent() {
            Some(directory) if !directory.as_os_str().is_empty() && !directory.exists() => {
                format!("{}: its directory does not exist", shown())
            }
            _ => shown(),
        })?;
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
        let most = setup.grace + worker::served_end();
        let status = guardian::guard(patience, most, on_ready, |start| {
            if start.is_successor && setup.runtime.is_gone() {
                return setup.close(stateless::outlast(&setup, start));
            }
            let worker = Worker::new(Arc::clone(&setup), Arc::clone(&program), start);
            let status = worker.and_then(|worker| Arc::new(worker).run());
            match status {
                Ok(status) => {
                    let status = setup.close(status);
                    if getppid() != start.guardian {
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
                        start.is_successor || setup.runtime.sessions().is_ok_and(|all| !all.is_empty());
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

fn signal(event: &OwnedFd) {
    // The write fails if the counter is full, and then the event is readable already.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) {
    let timeout = Timespec::try_from(timeout).ok();
    // A signal can interrupt the poll. Callers accept an early return.
    let _ = poll(fds, timeout.as_ref());
}
