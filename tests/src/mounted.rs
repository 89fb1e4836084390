//! `postcopy mount`, on a directory of its own.

use crate::cli::postcopy;
use crate::daemon::runtime_root;
use crate::{PAGE, wait_until};
use memmap2::Mmap;
use nix::libc;
use postcopy::ServerAddress;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use tempfile::TempDir;

/// The type of a file system of FUSE, in linux/magic.h.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;

/// A mounted file system. Its daemon is killed, and it is unmounted, when it is dropped.
#[derive(Debug)]
pub struct Mounted {
    child: Child,
    directory: TempDir,
    runtime: TempDir,
}

impl Mounted {
    /// Mounts the images of `server`, with more arguments.
    ///
    /// # Panics
    /// If nothing is mounted within a minute.
    #[must_use]
    pub fn start(server: &ServerAddress, arguments: &[&str]) -> Self {
        Self::start_at(tempfile::tempdir().expect("a scratch folder"), server, arguments)
    }

    /// Mounts at a directory, which is removed with the result.
    ///
    /// # Panics
    /// As [`Mounted::start`].
    #[must_use]
    pub fn start_at(directory: TempDir, server: &ServerAddress, arguments: &[&str]) -> Self {
        let runtime = runtime_root();
        let mut command = postcopy(server, ["mount".as_ref(), directory.path().as_os_str()]);
        command.args(arguments).env("POSTCOPY_RUNTIME_DIR", runtime.path());
        let child = command.spawn().expect("postcopy starts");
        let mounted = Self { child, directory, runtime };
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

    /// Returns the directory of its control socket.
    #[must_use]
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// Runs `postcopy warm` with these arguments, and returns its JSON.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn warm(&self, server: &ServerAddress, arguments: &[&str]) -> serde_json::Value {
        let mut command = postcopy(server, ["--json", "warm"]);
        let output = command.args(arguments).env("POSTCOPY_RUNTIME_DIR", self.runtime.path()).output();
        let output = output.expect("postcopy starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
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
        child_of(self.guardian())
    }

    /// Returns the process that stores pages ahead.
    #[must_use]
    pub fn storer(&self) -> Option<Pid> {
        child_of(self.worker()?)
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
        // Where a store was waiting for an answer, it is unmounted.
        wait_until("the mount is dead", || {
            rustix::fs::statfs(&path).map_or(true, |found| found.f_type != FUSE_SUPER_MAGIC)
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

fn child_of(pid: Pid) -> Option<Pid> {
    let pid = pid.as_raw_pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

/// Returns for each page of a file whether it is in the page cache (mincore(2)).
///
/// # Panics
/// If the file is empty, or cannot be opened or mapped.
#[must_use]
pub fn cached_pages(path: &Path) -> Vec<bool> {
    let file = File::open(path).expect("it can be opened");
    #[expect(unsafe_code, reason = "a map of a file that never changes")]
    // SAFETY: an image never changes. Nothing reads through the map.
    let map = unsafe { Mmap::map(&file).expect("a map") };
    let mut pages = vec![0_u8; map.len().div_ceil(PAGE)];
    #[expect(unsafe_code, reason = "mincore")]
    // SAFETY: the range is a map, and the vector has a byte for each of its pages.
    let done = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    assert_eq!(done, 0, "mincore");
    pages.into_iter().map(|page| page & 1 == 1).collect()
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
