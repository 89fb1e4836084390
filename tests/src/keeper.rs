//! A session in a process of its own that may be killed: `postcopy-keeper`, and the pager's steps one by one.

use crate::faulter::Faulter;
use crate::stopped_pager::{Functions, StoppedPager};
use crate::{binary, descriptors, is_readable};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postcopy::{Changes, ForeignRegion, Sharing};
use rustix::process::{Resource, Rlimit};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};

/// How a process serves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serving {
    /// With a background fill.
    pub fill: bool,
    /// With the image's working set.
    pub working_set: bool,
    /// With a recording of what is touched.
    pub record: bool,
    /// With tracking of writes.
    pub track: bool,
    /// Without a state file: no other one comes when it ends, in whatever way.
    pub alone: bool,
    /// Where what waits for a page for longer than a second is killed.
    pub kill: bool,
}

/// See the module. It, and who serves, are killed when it is dropped.
#[derive(Debug)]
pub struct Keeper {
    child: Child,
    lines: BufReader<UnixStream>,
    worker: Pid,
    state: File,
}

impl Keeper {
    /// Has memory of another process served by a process that may die.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(
        server: &str,
        reference: &str,
        how: Serving,
        faulter: &Faulter,
        regions: &[ForeignRegion],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket can be made");
        let program = program();
        // Panics on purpose are many.
        let mut command = Command::new(program);
        let child = command.arg(&path).env("RUST_BACKTRACE", "0").spawn().expect("it starts");
        let (socket, _) = listener.accept().expect("it connects");
        let region = |r: &ForeignRegion| {
            let path = String::from_utf8(r.path.clone()).expect("a path of the tests");
            let object = if let Sharing::Shared(object) = r.sharing { Some(object) } else { None };
            (r.address, r.len, r.page_bytes, path, r.offset_bytes, object)
        };
        let regions: Vec<_> = regions.iter().map(region).collect();
        let text = serde_json::to_string(&(
            server,
            reference,
            (how.fill, how.working_set, how.record, how.track, how.alone, how.kill),
            regions,
            faulter.main.pid,
        ));
        let text = text.expect("plain data");
        descriptors::send(&socket, faulter.uffd(), "uffd");
        writeln!(&socket, "{text}").expect("it listens");
        let state = descriptors::receive(&socket).0.into();
        let mut keeper = Self { child, lines: BufReader::new(socket), worker: Pid::from_raw(0), state };
        keeper.next_worker();
        keeper
    }

    /// The state file of the session.
    #[must_use]
    pub fn state(&self) -> &File {
        &self.state
    }

    /// How many descriptors who serves may have.
    ///
    /// # Panics
    /// If that cannot be changed.
    pub fn limit_descriptors(&self, count: u64) {
        let pid = rustix::process::Pid::from_raw(self.worker.as_raw());
        // It has this process's.
        let limit = Rlimit { current: Some(count), ..rustix::process::getrlimit(Resource::Nofile) };
        rustix::process::prlimit(pid, Resource::Nofile, limit).expect("root may");
    }

    /// What has been written to and removed since this was last asked for: as [`postcopy::Session::take_changes`].
    ///
    /// # Panics
    /// If who serves does not tell.
    pub fn take_changes(&mut self) -> Changes {
        writeln!(self.lines.get_mut(), "changes").expect("it listens");
        let line = self.line();
        let changes = line.strip_prefix("changes ").unwrap_or_else(|| panic!("the keeper says {line:?}"));
        let (written, removed) = serde_json::from_str(changes).expect("runs");
        Changes { written, removed }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("it says what it does");
        line.trim().to_owned()
    }

    /// Waits for the next process to serve.
    fn next_worker(&mut self) {
        let line = self.line();
        let pid = line.strip_prefix("worker ").unwrap_or_else(|| panic!("the keeper says {line:?}"));
        self.worker = Pid::from_raw(pid.parse().expect("a pid"));
    }

    /// Kills who serves. Another one comes.
    ///
    /// # Panics
    /// If none comes.
    pub fn kill_worker(&mut self) {
        kill(self.worker, Signal::SIGKILL).expect("it lives");
        self.next_worker();
    }

    /// Kills who serves where its pager stands. Another one comes.
    ///
    /// # Panics
    /// If none comes.
    pub fn kill_worker_at(&mut self, pager: StoppedPager) {
        kill(self.worker, Signal::SIGKILL).expect("it lives");
        // Its end is ours to see first.
        pager.assert_killed();
        self.next_worker();
    }

    /// Functions of the process that serves.
    #[must_use]
    pub fn functions(&self, wanted: impl Fn(&str) -> bool) -> Functions {
        Functions::of(&program(), self.worker, wanted)
    }

    /// Whether it has said something that was not read yet.
    #[must_use]
    pub fn has_said(&self) -> bool {
        is_readable(&self.lines)
    }

    /// Sees whether the session has ended, which may be by an error, or its process was killed.
    ///
    /// # Panics
    /// If it is neither.
    pub fn has_ended(&mut self) -> bool {
        let line = self.line();
        assert!(["ended", "killed"].contains(&line.as_str()), "the keeper says {line:?}");
        line == "ended"
    }

    /// Waits until the session has ended in order.
    ///
    /// # Panics
    /// If it ends otherwise.
    pub fn assert_ends(&mut self) {
        assert_eq!(self.line(), "ended");
    }

    /// The pager of who serves, stopped.
    ///
    /// # Panics
    /// If there is none within a minute.
    #[must_use]
    pub fn stop_pager(&mut self) -> StoppedPager {
        let mut found = None;
        crate::wait_until("a pager", || {
            found = find_pager(self.worker);
            found.is_some()
        });
        let thread = found.expect("it was found");
        StoppedPager::stop(thread)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Only now nobody starts another one. It is our child's child: its pid is its own until init has seen its end.
        let _ = kill(self.worker, Signal::SIGKILL);
    }
}

fn program() -> PathBuf {
    // Another one, of which something is known to be wrong, for `tests/planted`.
    std::env::var_os("POSTCOPY_KEEPER").map_or_else(|| binary("postcopy-keeper"), Into::into)
}

/// A pager that sleeps until something happens: it has opened its session then.
fn find_pager(process: Pid) -> Option<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).ok()?;
    let tasks = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    tasks.map(Pid::from_raw).find(|thread| {
        let read = |what| std::fs::read_to_string(format!("/proc/{process}/task/{thread}/{what}"));
        read("comm").is_ok_and(|name| name.trim() == "postcopy-pager")
    })
}
