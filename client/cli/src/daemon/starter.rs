//! The programs that have started a daemon and wait until it is ready: the reader of --status-fd,
//! and the caller of a daemon that goes on in the background.
//!
//! A daemon that goes on in the background is a child of the process that its caller has started.
//! That process waits until the child is ready, or has ended, and exits with 0 or with the child's
//! status. Until then the child keeps the caller's stderr for its errors.

use super::{kernel, own_files};
use anyhow::{Context, Result, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, setsid};
use rustix::io::{DupFlags, dup3, fcntl_dupfd_cloexec};
use rustix::stdio;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// The first number for a copy of the caller's stderr: the standard streams have those below.
const FIRST_FD: RawFd = 3;

/// The descriptors of the programs that wait for the daemon.
///
/// When the daemon is ready, /dev/null takes the place of each of them, so that their numbers stay
/// taken. A successor keeps all descriptors with the numbers of the start ([`super::leftovers`]),
/// and would not find a connection that had got such a number.
#[derive(Debug)]
pub(crate) struct Starter {
    null: File,
    /// Pipes whose readers wait for a byte.
    waiting: Vec<OwnedFd>,
    /// The caller's stderr, if a log file has taken its place.
    stderr: Option<OwnedFd>,
    log: Option<PathBuf>,
    is_background: bool,
    is_ready: bool,
}

impl Starter {
    /// Takes ownership of the descriptor of --status-fd.
    ///
    /// # Errors
    /// The descriptor is not open, or is one of the standard streams.
    pub(crate) fn new(status: Option<RawFd>) -> Result<Self> {
        // Before this process opens a descriptor that could get the number.
        let status = status.map(own_status).transpose()?;
        let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
        let waiting = status.into_iter().collect();
        Ok(Self { null, waiting, stderr: None, log: None, is_background: false, is_ready: false })
    }

    /// Continues in a child process, in a session of its own and without the caller's stdin and
    /// stdout. This process has one thread.
    ///
    /// # Errors
    /// A system call fails.
    pub(crate) fn detach(&mut self) -> Result<()> {
        let (reader, writer) = io::pipe().context("a pipe")?;
        #[expect(unsafe_code, reason = "a fork")]
        // SAFETY: this process has one thread, so the child may call any function.
        let forked = unsafe { nix::unistd::fork() }.context("going on in the background")?;
        if let ForkResult::Parent { child } = forked {
            drop(writer);
            std::process::exit(wait(reader, child));
        }
        setsid().context("a session")?;
        stdio::dup2_stdin(&self.null).context("stdin")?;
        stdio::dup2_stdout(&self.null).context("stdout")?;
        self.waiting.push(writer.into());
        self.is_background = true;
        Ok(())
    }

    /// Creates the log file at `path`, which takes the place of stderr.
    ///
    /// # Errors
    /// The file cannot be created.
    pub(crate) fn log_to(&mut self, path: &Path) -> io::Result<()> {
        let log = own_files::create(path, 0o600)?;
        self.stderr = Some(fcntl_dupfd_cloexec(stdio::stderr(), FIRST_FD)?);
        self.log = Some(std::path::absolute(path)?);
        Ok(stdio::dup2_stderr(&log)?)
    }

    /// Reports that the daemon is ready, and gives the descriptors up. Allocates nothing.
    pub(crate) fn tell_ready(&mut self) {
        self.is_ready = true;
        for fd in &self.waiting {
            // The reader may have gone.
            let _ = rustix::io::write(fd, &[0]);
        }
        for fd in self.waiting.iter_mut().chain(&mut self.stderr) {
            // The call fails for invalid descriptors only.
            let _ = dup3(&self.null, fd, DupFlags::CLOEXEC);
        }
        if self.is_background && self.log.is_none() {
            let _ = stdio::dup2_stderr(&self.null);
        }
    }

    /// Returns the result of a daemon that has ended. If it was never ready, its caller gets the
    /// error, or learns where the error is.
    ///
    /// # Errors
    /// The daemon's error; or the daemon was never ready, and its log has the reason.
    pub(crate) fn ended(self, status: Result<i32>) -> Result<i32> {
        if self.is_ready {
            return status;
        }
        let (Some(stderr), Some(log)) = (self.stderr, self.log) else { return status };
        stdio::dup2_stderr(stderr).context("stderr")?;
        let status = status?;
        ensure!(
            status == 0,
            "the daemon has ended with status {status} before it was ready. Its log has the reason: {}",
            log.display()
        );
        Ok(status)
    }
}

/// Waits until the child is ready or has ended, and returns the exit status.
fn wait(mut reader: io::PipeReader, child: nix::unistd::Pid) -> i32 {
    if matches!(reader.read(&mut [0]), Ok(1)) {
        return 0;
    }
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, status)) => status,
        _ => 1,
    }
}

fn own_status(fd: RawFd) -> Result<OwnedFd> {
    let is_open = std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
    ensure!(
        fd >= FIRST_FD && is_open,
        "--status-fd: descriptor {fd} is not open, or is stdin, stdout or stderr"
    );
    #[expect(unsafe_code, reason = "a descriptor by number")]
    // SAFETY: the descriptor is open, and was given to this process for this purpose alone.
    Ok(unsafe { kernel::own_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn a_descriptor_that_is_given_up_is_closed_and_its_number_stays_taken() {
        let (mut reader, writer) = io::pipe().unwrap();
        let number = writer.into_raw_fd();
        let mut starter = Starter::new(Some(number)).unwrap();
        starter.tell_ready();
        let mut read = Vec::new();
        assert_eq!(reader.read_to_end(&mut read).unwrap(), 1, "a byte, and the end");
        let target = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
        assert_eq!(target, Path::new("/dev/null"));
        assert_eq!(starter.ended(Ok(3)).unwrap(), 3);
    }

    #[test]
    fn a_descriptor_that_is_not_open_or_a_standard_stream_is_refused() {
        let closed = io::pipe().unwrap().0.as_raw_fd() + 100_000;
        for number in [-1, 0, 2, closed] {
            assert!(Starter::new(Some(number)).is_err(), "{number}");
        }
    }
}
