//! `postcopy mount`, on a directory of its own.

use crate::cli::postcopy;
use crate::wait_until;
use postcopy::ServerAddress;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use tempfile::TempDir;

/// A mounted file system. Its daemon is killed, and it is unmounted, when it is dropped.
#[derive(Debug)]
pub struct Mounted {
    child: Child,
    directory: TempDir,
}

impl Mounted {
    /// Mounts the images of `server`, with more arguments.
    ///
    /// # Panics
    /// If nothing is mounted within a minute.
    #[must_use]
    pub fn start(server: &ServerAddress, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a scratch folder");
        Self::start_at(directory, server, arguments)
    }

    fn start_at(directory: TempDir, server: &ServerAddress, arguments: &[&str]) -> Self {
        let mut command = postcopy(server, ["mount".as_ref(), directory.path().as_os_str()]);
        command.args(arguments);
        let child = command.spawn().expect("postcopy starts");
        let mounted = Self { child, directory };
        // Of a dead mount, the kernel still knows the names.
        let is_alive = |path: &Path| rustix::fs::statfs(path).is_ok() && path.join("by-digest").is_dir();
        wait_until("the file system answers", || is_alive(mounted.path()));
        mounted
    }

    /// Returns where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the directory of a reference, by its tag.
    #[must_use]
    pub fn image(&self, name: &str, tag: &str) -> PathBuf {
        self.path().join(name).join(tag)
    }

    fn guardian(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Kills the worker, and waits until another one runs.
    ///
    /// # Panics
    /// If there is no worker, or no successor within a minute.
    pub fn kill_worker(&self) {
        let before = self.worker().expect("a worker");
        kill_process(before, Signal::KILL).expect("it runs");
        wait_until("a successor runs", || self.worker().is_some_and(|worker| worker != before));
    }

    fn worker(&self) -> Option<Pid> {
        let guardian = self.guardian().as_raw_pid();
        let children = std::fs::read_to_string(format!("/proc/{guardian}/task/{guardian}/children")).ok()?;
        Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
    }

    /// Kills guardian and worker, and mounts at the same place anew.
    ///
    /// # Panics
    /// As [`Mounted::start`].
    #[must_use]
    pub fn kill_and_mount_again(mut self, server: &ServerAddress) -> Self {
        let worker = self.worker();
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is a child");
        if let Some(worker) = worker {
            let _ = kill_process(worker, Signal::KILL);
        }
        let path = self.path().to_owned();
        wait_until("the mount is dead", || {
            rustix::fs::statfs(&path).is_err_and(|error| error == rustix::io::Errno::NOTCONN)
        });
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().expect("a folder"));
        Self::start_at(directory, server, &[])
    }

    /// Asks the daemon to end, and waits for it.
    ///
    /// # Panics
    /// If it does not end within a minute.
    pub fn end(&mut self) -> ExitStatus {
        kill_process(self.guardian(), Signal::TERM).expect("it runs");
        self.wait()
    }

    /// Unmounts from outside, and waits for the daemon's end.
    ///
    /// # Panics
    /// As [`Mounted::end`], or if it is in use for a minute.
    pub fn unmount(&mut self) -> ExitStatus {
        // Another thread's program may have a file open until it is started.
        wait_until("it is unmounted", || unmount(self.path(), UnmountFlags::empty()).is_ok());
        self.wait()
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the daemon ends", || {
            status = self.child.try_wait().expect("it is a child");
            status.is_some()
        });
        status.expect("it has ended")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
        if let Some(worker) = self.worker() {
            let _ = kill_process(worker, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
