//! A memory cgroup (version 1), in which the kernel gives only so much memory.

use std::fs::{create_dir, read_to_string, remove_dir, write};
use std::path::PathBuf;

/// Removed when dropped; its processes must have ended then.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
}

impl MemoryCgroup {
    /// Makes one; None where there are none of version 1.
    ///
    /// # Panics
    /// If root may not.
    #[must_use]
    pub fn new() -> Option<Self> {
        let parent = PathBuf::from("/sys/fs/cgroup/memory");
        if !parent.join("memory.limit_in_bytes").exists() {
            return None;
        }
        let path = parent.join(format!("postcopy-{}-{:x}", std::process::id(), fastrand::u32(..)));
        create_dir(&path).expect("root may");
        Some(Self { path })
    }

    fn set(&self, what: &str, value: impl ToString) {
        write(self.path.join(what), value.to_string()).expect("root may");
    }

    /// How much memory its processes may have, in bytes.
    pub fn limit(&self, bytes: usize) {
        self.set("memory.limit_in_bytes", bytes);
    }

    /// Has processes wait for memory at the limit, and kills none.
    pub fn kill_nobody(&self) {
        self.set("memory.oom_control", 1);
    }

    /// Moves a process into it.
    pub fn add(&self, pid: u32) {
        self.set("cgroup.procs", pid);
    }

    /// How often the limit was in the way.
    ///
    /// # Panics
    /// If the kernel does not say.
    #[must_use]
    pub fn failures(&self) -> usize {
        let text = read_to_string(self.path.join("memory.failcnt")).expect("a cgroup");
        text.trim().parse().expect("a number")
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Its processes' ends take a while.
        for _ in 0..500 {
            if remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::park_timeout(std::time::Duration::from_millis(10));
        }
        eprintln!("{} could not be removed", self.path.display());
    }
}
