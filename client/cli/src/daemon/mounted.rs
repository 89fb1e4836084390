//! The daemon `postcopy mount`: a guardian that keeps the descriptor of /dev/fuse and the table of
//! nodes, and a worker that answers requests.
//!
//! A worker's death is a pause for the programs that read files: the guardian starts another one,
//! which has the kernel send the unanswered requests again (Linux 6.9).

use super::guardian::{self, WorkerStart};
use super::{kernel, leftovers, log, runtime_dir, surroundings};
use anyhow::{Context, Result, bail};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getppid};
use postcopy_mount::mount::Target;
use postcopy_mount::{Descriptors, Settings, mount, serve};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time that programs have to close their files after the request to end.
const GRACE: Duration = Duration::from_secs(10);

/// A mounted file system, which is unmounted with this value.
#[derive(Debug)]
struct Mounted {
    target: Target,
    device: OwnedFd,
    table: File,
    unanswered: File,
    /// A pipe that ends with the last process that could answer the kernel.
    life: PipeReader,
    life_of: PipeWriter,
    /// The socket for other programs of the user, and its path.
    control: Option<(UnixListener, PathBuf)>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.target.detach() {
            tracing::warn!("unmounting {}: {error}", self.target.path().display());
        }
        if let Some((_, path)) = &self.control {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Mounts the images of a server at `target`, and serves them until they are unmounted. Returns the
/// exit status. Calls `on_ready` when programs can use the mount.
///
/// # Errors
/// The file system cannot be mounted, or the first worker cannot be started.
pub(crate) fn run(
    target: &Path,
    settings: &Settings,
    allow_other: bool,
    runtime_root: &Path,
    on_ready: impl FnMut(),
) -> Result<i32> {
    let shown = || format!("mounting at {}", target.display());
    let target = resolved(target).with_context(shown)?;
    surroundings::raise_descriptors();
    surroundings::lower_oom_score();
    log::log_panics();
    // A program that mounts is waited for.
    kernel::watch_children().context("SIGCHLD")?;
    let memory = |name| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
    let table = memory("postcopy-nodes").context("a memfd")?;
    let unanswered = memory("postcopy-unanswered").context("a memfd")?;
    let (target, device) =
        mount::attach(&target, &settings.server.to_string(), allow_other).with_context(shown)?;
    let (life, life_of) = io::pipe().context("a pipe")?;
    let mut mounted = Mounted { target, device, table, unanswered, life, life_of, control: None };
    mounted.control = match listen(runtime_root) {
        Ok(listening) => Some(listening),
        Err(error) => {
            tracing::warn!("no control socket, so `postcopy warm` does not find the mount: {error:#}");
            None
        }
    };
    let mounted = mounted;
    let base = leftovers::open_descriptors()?;
    guardian::guard(settings.deadline, GRACE, on_ready, |start| {
        let served = work(&mounted, settings, start, &base);
        if let Err(error) = &served {
            tracing::error!("{}: {error:#}", mounted.target.path().display());
        }
        // The reason may pass: the guardian tries again, after a pause.
        if served.is_err() && start.is_successor {
            std::process::abort();
        }
        i32::from(served.is_err())
    })
}

/// Returns a path without symbolic links, also of a dead mount, which answers nothing.
fn resolved(target: &Path) -> io::Result<PathBuf> {
    match target.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
            let absolute = std::path::absolute(target)?;
            let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
                return Err(error);
            };
            Ok(parent.canonicalize()?.join(name))
        }
        resolved => resolved,
    }
}

/// Returns the path of the socket of a user's mount.
pub(crate) fn socket(runtime_root: &Path) -> PathBuf {
    runtime_root.join(format!("mount-{}.sock", rustix::process::geteuid().as_raw()))
}

/// Listens on the socket of this user's mount.
///
/// # Errors
/// Another mount of this user has it, or other users could replace it.
fn listen(runtime_root: &Path) -> Result<(UnixListener, PathBuf)> {
    let root = runtime_dir::open_root(runtime_root)?;
    let path = socket(runtime_root);
    match UnixStream::connect(&path) {
        Ok(_) => bail!("{}: another mount of this user has it", path.display()),
        // Its daemon has died, and the root is locked.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    }
    let listening = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
    drop(root);
    Ok((listening, path))
}

/// Serves requests until the file system is unmounted.
fn work(mounted: &Mounted, settings: &Settings, start: WorkerStart, base: &[i32]) -> Result<()> {
    if start.is_successor {
        for fd in leftovers::open_descriptors()? {
            if !base.contains(&fd) {
                #[expect(unsafe_code, reason = "descriptors of a process that is gone")]
                // SAFETY: the killed worker has opened it; no value of this process owns it.
                unsafe {
                    kernel::close_fd(fd);
                }
            }
        }
    }
    let (storer, store) = start_storer(mounted)?;
    let from_the_beginning = |file: &File| {
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(0)).map(|_| file)
    };
    let table = from_the_beginning(&mounted.table).context("the table of nodes")?;
    let unanswered = from_the_beginning(&mounted.unanswered).context("the unanswered requests")?;
    let device = mounted.device.try_clone().context("/dev/fuse")?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&guardian::signals(), flags).context("signals")?;
    let target = mounted.target.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || end_on_signal(&signals, start, storer, &target))?;
    guardian::tell_ready(start);
    let control = mounted.control.as_ref().map(|(socket, _)| socket.try_clone()).transpose();
    let control = control.context("the control socket")?;
    let directory = mounted.target.path().to_owned();
    let descriptors = Descriptors { device, table, unanswered, store, control, directory };
    serve(descriptors, start.is_successor, settings.clone()).context("serving")
}

/// Starts the process that stores pages ahead, and returns the pipe to it.
fn start_storer(mounted: &Mounted) -> Result<(Pid, PipeWriter)> {
    let (messages, to_storer) = io::pipe().context("a pipe")?;
    #[expect(unsafe_code, reason = "a fork")]
    // SAFETY: this process has one thread.
    let forked = unsafe { nix::unistd::fork() };
    if let ForkResult::Parent { child } = forked.context("starting the process that stores pages")? {
        return Ok((child, to_storer));
    }
    drop(to_storer);
    let listening = mounted.control.as_ref().map(|(socket, _)| socket.as_raw_fd());
    for fd in [Some(mounted.life_of.as_raw_fd()), listening].into_iter().flatten() {
        #[expect(unsafe_code, reason = "a descriptor by number")]
        // SAFETY: the value that owns it is not used or dropped in this process.
        unsafe {
            kernel::close_fd(fd);
        }
    }
    let stored = std::panic::catch_unwind(AssertUnwindSafe(|| {
        postcopy_mount::store(&mounted.device, messages, mounted.life.as_fd(), &mounted.target)
    }));
    if let Ok(Err(error)) = &stored {
        tracing::error!("storing pages ahead: {error}");
    }
    kernel::exit_at_once(i32::from(!matches!(stored, Ok(Ok(())))));
}

/// Unmounts the file system at the first signal that asks for the end, or at once if one has asked
/// an earlier worker. Ends the process if programs keep files open for too long. If the storer
/// dies, this process aborts: its successor, which the guardian starts after a pause, starts
/// another one.
fn end_on_signal(signals: &SignalFd, start: WorkerStart, storer: Pid, target: &Target) {
    let mut is_asked = start.stopping_since.is_some();
    let is_end = |signal: u32| guardian::ENDS.iter().any(|end| u32::try_from(*end as i32) == Ok(signal));
    while !is_asked {
        let fd = signals.as_fd();
        super::poll_for(&mut [PollFd::new(&fd, PollFlags::IN)], Duration::from_secs(3600));
        let Ok(Some(signal)) = signals.read_signal() else { continue };
        is_asked = is_end(signal.ssi_signo);
        // It exits by itself at the end of its pipe.
        let end = waitpid(storer, Some(WaitPidFlag::WNOHANG));
        let has_died = end.is_ok_and(|end| !matches!(end, WaitStatus::StillAlive | WaitStatus::Exited(_, 0)));
        // Without a guardian there would be no successor.
        if has_died && getppid() == start.guardian {
            tracing::error!("the process that stores pages ahead has died; starting anew");
            std::process::abort();
        }
    }
    if let Err(error) = target.detach() {
        tracing::warn!("unmounting {}: {error}; it stays, and is dead", target.path().display());
        kernel::exit_at_once(super::LOSS_STATUS);
    }
    std::thread::park_timeout(GRACE);
    tracing::warn!("{}: programs still have files open; they get ENOTCONN", target.path().display());
    kernel::exit_at_once(super::LOSS_STATUS);
}
