//! `postcopy criu`, with the real CRIU: programs that are dumped, stored, and restored while their
//! memory arrives.

mod daemons;
mod drain;
mod images;
mod made;
mod programs;
mod recording;
mod redis;
mod refusals;
mod runc;
mod trees;

use nix::sys::signal::Signal;
use postcopy_tests::cli::run;
use postcopy_tests::criu::{Criu, Program, Restored, compile, status, wait_for_status};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::{is_root, skip, wait_until};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Runs a test where CRIU runs.
fn with_criu(test: &str, work: impl FnOnce(&Bench)) {
    if !is_root() {
        return skip(test, "restoring processes needs root");
    }
    match Criu::find() {
        Ok(criu) => work(&Bench { criu, server: Server::start(), folder: tempfile::tempdir().unwrap() }),
        Err(why) => skip(test, &why),
    }
}

/// The CRIU, the server and the scratch folder of a test.
struct Bench {
    criu: Criu,
    server: Server,
    folder: TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Dumps a program and stores the images as `app`.
    fn dump(&self, program: Program) {
        self.dump_as(program, "images");
        self.push(&self.path("images"), "app");
    }

    fn dump_as(&self, mut program: Program, name: &str) {
        self.criu.dump(program.pid(), &self.path(name));
        program.wait();
    }

    fn push(&self, images: &Path, reference: &str) {
        let _ = run(self.server.address(), [OsStr::new("push"), images.as_os_str(), OsStr::new(reference)]);
    }

    fn pull(&self, reference: &str, name: &str) -> (PathBuf, serde_json::Value) {
        let path = self.path(name);
        let args = [OsStr::new("pull"), OsStr::new(reference), path.as_os_str(), OsStr::new("--criu")];
        let pulled = run(self.server.address(), args);
        (path, pulled)
    }

    /// A daemon for a restore from `images`.
    fn daemon(&self, images: &Path, reference: &str, more: &[&str]) -> Daemon {
        let images = images.to_str().unwrap();
        let args = ["criu", "-D", images, "--image", reference];
        Daemon::start(self.server.address(), args.iter().chain(more).copied())
    }

    /// Restores `app` in the ordinary way.
    fn restore_plainly(&self) -> Restored {
        let mut restored = self.criu.restore(&self.path("images"), [""; 0]);
        restored.assert_runs();
        restored
    }

    /// Restores `app` lazily, from images in a directory of this name that hold no lazy memory.
    fn restore_lazily(&self, name: &str, more: &[&str]) -> (Daemon, Restored) {
        let (images, _) = self.pull("app", name);
        let daemon = self.daemon(&images, "app", more);
        let mut restored = self.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        (daemon, restored)
    }

    /// Restores `app` lazily where it can be dumped again. The daemon fetches accessed pages only.
    fn restore_lazily_here(&self, name: &str) -> (Daemon, Restored) {
        let (images, _) = self.pull("app", name);
        let daemon = self.daemon(&images, "app", &["--fill", "nothing"]);
        (daemon, self.criu.restore_here(&images, ["--lazy-pages"]))
    }

    /// Dumps with the script of docs/CRIU.md. `root` holds the runtime directory of the daemon.
    fn dump_with_script(&self, pid: u32, name: &str, root: &Path) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/cli/scripts/postcopy-criu-drain");
        let programs = postcopy_tests::binary("postcopy").parent().unwrap().to_owned();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let variables = [("PATH", path.as_str()), ("POSTCOPY_RUNTIME_DIR", root.to_str().unwrap())];
        let more = ["--action-script", script.to_str().unwrap()];
        self.criu.try_dump(pid, &self.path(name), &more, &variables)
    }

    fn heap(&self, mib: u32) -> Heap {
        self.heap_that_touches(mib, 200)
    }

    /// Starts a heap program that touches this number of pages in each turn.
    fn heap_that_touches(&self, mib: u32, pages: u32) -> Heap {
        let program = compile("heap", self.folder.path());
        let status = self.path("status");
        let mut command = Command::new(program);
        command.arg(mib.to_string()).arg(&status).arg(pages.to_string());
        let program = Program::start(&command);
        wait_for_status(&status);
        Heap { program, status }
    }
}

/// A program that knows what each word of its memory must be.
struct Heap {
    program: Program,
    status: PathBuf,
}

/// Makes the program check all of its memory, and asserts that no page is wrong.
fn assert_all_right(path: &Path, restored: &Restored) {
    // The status may be that of a process that was restored earlier.
    wait_for_status(path);
    let [_, _, checks_before] = status(path);
    restored.signal(Signal::SIGUSR1);
    wait_until("a check of all memory", || status::<3>(path)[2] > checks_before);
    let [checked, wrong, _] = status(path);
    assert_eq!(wrong, 0, "{wrong} pages were wrong; it had checked {checked}, and all of them");
}
