//! Swap and file systems for tests, which root may have: gone when dropped.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().expect("it is part of every system");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {args:?}: {said}");
}

/// A swap file, for one test at a time.
#[derive(Debug)]
pub struct Swap {
    file: tempfile::NamedTempFile,
    _lock: File,
}

impl Swap {
    /// Makes one of so many MiB, and has the kernel use it.
    ///
    /// # Panics
    /// If that cannot be.
    #[must_use]
    pub fn of_mib(mib: usize) -> Self {
        let lock = File::create(std::env::temp_dir().join("postcopy-tests-swap.lock")).expect("a file");
        lock.lock().expect("files can be locked");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let swap = Self { file, _lock: lock };
        // Without holes.
        run("dd", &["if=/dev/zero", &format!("of={}", swap.path()), "bs=1M", &format!("count={mib}")]);
        run("/sbin/mkswap", &[swap.path()]);
        run("/sbin/swapon", &[swap.path()]);
        swap
    }

    fn path(&self) -> &str {
        self.file.path().to_str().expect("a plain path")
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/swapoff").arg(self.file.path()).status();
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
        run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "postcopy-tests", tmpfs.text()]);
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
