//! `postcopy firecracker`, against a stand-in for Firecracker: every byte of running guests, with
//! killed workers.

mod ends;
mod handshakes;
mod idle;
mod images;
mod losses;
mod machines;
mod recording;
mod resuming;
mod strangers;
mod workers;

use postcopy_tests::cli::run;
use postcopy_tests::daemon::Daemon;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::{is_root, skip};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A snapshot on a server.
struct Snapshot {
    server: Server,
    folder: TempDir,
}

impl Snapshot {
    fn push(mib: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let snapshot = folder.path().join("snapshot");
        std::fs::create_dir(&snapshot).unwrap();
        std::fs::write(snapshot.join("guest.mem"), memory_like(mib << 20, 900)).unwrap();
        std::fs::write(snapshot.join("guest.state"), memory_like(40_000, 901)).unwrap();
        let server = Server::start();
        let _ = run(server.address(), [OsStr::new("push"), snapshot.as_os_str(), OsStr::new("vm")]);
        Self { server, folder }
    }

    fn memory(&self) -> PathBuf {
        self.folder.path().join("snapshot/guest.mem")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("backend.sock")
    }

    fn args<'a>(&self, socket: &'a Path, more: &[&'a str]) -> Vec<String> {
        let socket = socket.to_str().unwrap();
        ["firecracker", "--socket", socket, "--image", "vm"]
            .iter()
            .chain(more)
            .map(|s| (*s).to_owned())
            .collect()
    }

    fn daemon(&self, more: &[&str]) -> Daemon {
        Daemon::start(self.server.address(), self.args(&self.socket(), more))
    }

    /// Has the image's tag name another image.
    fn move_tag(&self) {
        let moved = self.folder.path().join("moved");
        std::fs::create_dir(&moved).unwrap();
        std::fs::write(moved.join("guest.mem"), memory_like(16 << 20, 902)).unwrap();
        let _ = run(self.server.address(), [OsStr::new("push"), moved.as_os_str(), OsStr::new("vm")]);
    }

    fn vmm(&self, regions: &[&str]) -> Vmm {
        let mut vmm = Vmm::start(&self.socket(), &self.memory(), "new", regions);
        vmm.loaded();
        vmm
    }
}

fn with_root(test: &str, work: impl FnOnce()) {
    if !is_root() {
        return skip(test, "a userfaultfd for all faults needs root");
    }
    work();
}

/// The files of this name in the runtime directory of a daemon.
fn files_of(daemon: &Daemon, name: &str) -> Vec<PathBuf> {
    let directories = std::fs::read_dir(daemon.root()).unwrap().map(|entry| entry.unwrap().path());
    directories.map(|directory| directory.join(name)).filter(|path| path.exists()).collect()
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}
