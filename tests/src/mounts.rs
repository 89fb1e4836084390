//! Swap and file systems for tests, which root may have: gone when dropped.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use tempfile::{NamedTempFile, TempDir};

/// How fast devices may be written to.
const WRITE_LIMITS: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().expect("it is part of every system");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {args:?}: {said}");
}

/// A swap file, for one test at a time.
#[derive(Debug)]
pub struct Swap {
    slow: Option<LoopDevice>,
    file: NamedTempFile,
    _lock: File,
}

impl Swap {
    /// Makes one of so many MiB, and has the kernel use it.
    ///
    /// # Panics
    /// If that cannot be.
    #[must_use]
    pub fn of_mib(mib: usize) -> Self {
        Self::new(mib, None)
    }

    /// The same on a device that takes no more than so much; None where the kernel cannot slow it down (cgroups of version 1
    /// can).
    ///
    /// # Panics
    /// If there cannot be any.
    #[must_use]
    pub fn slow(mib: usize, bytes_per_second: usize) -> Option<Self> {
        Path::new(WRITE_LIMITS).exists().then(|| Self::new(mib, Some(bytes_per_second)))
    }

    fn new(mib: usize, bytes_per_second: Option<usize>) -> Self {
        let lock = File::create(std::env::temp_dir().join("postcopy-tests-swap.lock")).expect("a file");
        lock.lock().expect("files can be locked");
        let file = NamedTempFile::new().expect("a file");
        // Without holes.
        run("dd", &["if=/dev/zero", &format!("of={}", path_of(&file)), "bs=1M", &format!("count={mib}")]);
        let slow = bytes_per_second.map(|speed| LoopDevice::start(path_of(&file), speed));
        let swap = Self { slow, file, _lock: lock };
        run("/sbin/mkswap", &[swap.path()]);
        run("/sbin/swapon", &[swap.path()]);
        swap
    }

    fn path(&self) -> &str {
        self.slow.as_ref().map_or_else(|| path_of(&self.file), |device| &device.path)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // First, or all that is to be written yet would take its time.
        self.slow.iter().for_each(|device| device.limit(0));
        let _ = Command::new("/sbin/swapoff").arg(self.path()).status();
    }
}

fn path_of(file: &NamedTempFile) -> &str {
    file.path().to_str().expect("a plain path")
}

/// A device over a file that is written to no faster than it is told.
#[derive(Debug)]
struct LoopDevice {
    path: String,
}

impl LoopDevice {
    fn start(file: &str, bytes_per_second: usize) -> Self {
        let made = Command::new("/sbin/losetup").args(["--find", "--show", file]).output().expect("losetup");
        let path = String::from_utf8(made.stdout).expect("a path").trim().to_owned();
        assert!(path.starts_with("/dev/loop"), "losetup: {}", String::from_utf8_lossy(&made.stderr));
        let device = Self { path };
        device.limit(bytes_per_second);
        device
    }

    /// 0: no limit.
    fn limit(&self, bytes_per_second: usize) {
        const LOOP: u32 = 7;
        let number = self.path.trim_start_matches("/dev/loop");
        let limit = format!("{LOOP}:{number} {bytes_per_second}");
        std::fs::write(WRITE_LIMITS, limit).expect("root may");
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/losetup").args(["--detach", &self.path]).status();
    }
}

/// A tmpfs of its own.
#[derive(Debug)]
pub struct Tmpfs {
    folder: TempDir,
}

impl Tmpfs {
    /// Mounts one with room for so many bytes.
    ///
    /// # Panics
    /// If that cannot be.
    #[must_use]
    pub fn of_bytes(bytes: usize) -> Self {
        let tmpfs = Self { folder: tempfile::tempdir().expect("a folder") };
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={bytes},mode=700"), "postcopy-tests", tmpfs.text()],
        );
        tmpfs
    }

    fn text(&self) -> &str {
        self.path().to_str().expect("a plain path")
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Gives it room for so many bytes.
    pub fn resize(&self, bytes: usize) {
        run("mount", &["-o", &format!("remount,size={bytes}"), self.text()]);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", self.text()]).status();
    }
}
