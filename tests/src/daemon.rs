//! `postcopy firecracker` and `postcopy criu`: a guardian and its worker.

use crate::cli::postcopy;
use crate::stopped_pager::StoppedPager;
use crate::wait_until;
use postcopy::ServerAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// A running daemon; both of its processes are killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
    runtime: Option<TempDir>,
    root: PathBuf,
    /// Every worker that was seen.
    worker: Option<Pid>,
    /// Its stderr, where nobody reads that.
    unread: Option<(PipeReader, PipeWriter)>,
}

/// A state file that no worker can read.
#[derive(Debug)]
pub struct BrokenState {
    file: File,
    magic: [u8; 8],
}

impl BrokenState {
    /// Makes it readable again.
    ///
    /// # Panics
    /// If it cannot be written to.
    pub fn mend(&self) {
        self.file.write_all_at(&self.magic, 0).expect("it can be written to");
    }
}

/// A directory for daemons, in memory.
///
/// # Panics
/// If there is none to be had.
#[must_use]
pub fn runtime_root() -> TempDir {
    tempfile::Builder::new().prefix("postcopy-").tempdir_in("/dev/shm").expect("memory")
}

impl Daemon {
    /// Starts one with these arguments, and waits until it serves.
    ///
    /// # Panics
    /// If it does not come up; with what it said.
    #[must_use]
    pub fn start<A: AsRef<OsStr>>(server: &ServerAddress, args: impl IntoIterator<Item = A>) -> Self {
        let runtime = runtime_root();
        let mut daemon = Self::start_in(runtime.path(), server, args);
        daemon.runtime = Some(runtime);
        daemon
    }

    /// The same with a runtime directory.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn start_in<A: AsRef<OsStr>>(
        root: &Path,
        server: &ServerAddress,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let mut daemon = Self::spawn(root, server, args);
        let started = std::time::Instant::now();
        while !daemon.has_said("ready: ") {
            let ended = daemon.child.try_wait().expect("it is our child");
            let waits = ended.is_none() && started.elapsed().as_secs() < 60;
            assert!(waits, "it does not serve: {ended:?}, {:?}", daemon.said());
            std::thread::park_timeout(std::time::Duration::from_millis(2));
        }
        daemon
    }

    /// Starts one, and does not wait.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn spawn<A: AsRef<OsStr>>(
        root: &Path,
        server: &ServerAddress,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        Self::spawn_as(root, postcopy(server, args))
    }

    /// The same from a command that is not complete yet.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn spawn_as(root: &Path, mut command: Command) -> Self {
        command.stderr(Stdio::piped());
        let mut daemon = Self::spawn_with(root, command);
        let stderr = daemon.child.stderr.take().expect("piped");
        read_into(&daemon.said, stderr);
        daemon
    }

    /// Starts one whose stderr is a pipe that is not read, and waits until it serves.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_unread<A: AsRef<OsStr>>(server: &ServerAddress, args: impl IntoIterator<Item = A>) -> Self {
        let (runtime, (reader, writer)) = (runtime_root(), std::io::pipe().expect("a pipe"));
        let mut command = postcopy(server, args);
        command.stderr(writer.try_clone().expect("a descriptor"));
        let mut daemon = Self::spawn_with(runtime.path(), command);
        daemon.runtime = Some(runtime);
        daemon.unread = Some((reader, writer));
        daemon.assert_says("ready: ");
        daemon
    }

    fn spawn_with(root: &Path, mut command: Command) -> Self {
        command.arg("--runtime-dir").arg(root).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it can be started");
        let said = Arc::new(Mutex::new(Vec::new()));
        read_into(&said, child.stdout.take().expect("piped"));
        Self { child, said, runtime: None, root: root.to_owned(), worker: None, unread: None }
    }

    /// Fills the pipe that is not read.
    ///
    /// # Panics
    /// If it is read.
    pub fn fill_log(&mut self) {
        let (_, writer) = self.unread.as_mut().expect("its stderr is not read");
        let now = Timespec::default();
        let has_room =
            |writer: &PipeWriter| poll(&mut [PollFd::new(writer, PollFlags::OUT)], Some(&now)) == Ok(1);
        while has_room(writer) {
            writer.write_all(&[b'\n'; 4096]).expect("a page of room");
        }
    }

    /// Reads its stderr from here on.
    ///
    /// # Panics
    /// If it is read already.
    pub fn read_log(&mut self) {
        let (reader, _) = self.unread.take().expect("its stderr is not read");
        read_into(&self.said, reader);
    }

    /// What it has said so far, on both of its streams.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        self.said.lock().expect("nobody panics with it").clone()
    }

    /// Whether it has said something.
    #[must_use]
    pub fn has_said(&self, what: &str) -> bool {
        self.said().iter().any(|line| line.contains(what))
    }

    /// Waits until it has said something.
    ///
    /// # Panics
    /// If it does not.
    pub fn assert_says(&self, what: &str) {
        let started = std::time::Instant::now();
        while !self.has_said(what) {
            assert!(started.elapsed().as_secs() < 60, "it does not say {what:?}: {:#?}", self.said());
            std::thread::park_timeout(std::time::Duration::from_millis(3));
        }
    }

    /// Its runtime directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the state file of a process's session one that no worker can read.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn break_state(&self, pid: u32) -> BrokenState {
        let path = files_below(&self.root).into_iter().find(|path| {
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            [format!("vm-{pid}-"), format!("task-{pid}-")].iter().any(|of_it| name.starts_with(of_it))
        });
        let path = path.expect("its session has a state file");
        let file = File::options().read(true).write(true).open(path).expect("it is there");
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, 0).expect("it has a header");
        file.write_all_at(b"a letter", 0).expect("it can be written to");
        BrokenState { file, magic }
    }

    /// Its guardian.
    #[must_use]
    pub fn guardian(&self) -> u32 {
        self.child.id()
    }

    /// Its worker, as it is now.
    ///
    /// # Panics
    /// If there is none within a minute.
    pub fn worker(&mut self) -> Pid {
        let path = format!("/proc/{0}/task/{0}/children", self.guardian());
        let mut found = None;
        wait_until("a worker", || {
            let children = std::fs::read_to_string(&path).unwrap_or_default();
            found = children.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
            found.is_some()
        });
        self.worker = found;
        found.expect("it was found")
    }

    /// Kills its worker; another one comes.
    pub fn kill_worker(&mut self) {
        let worker = self.worker();
        let _ = kill_process(worker, Signal::KILL);
    }

    /// Has its worker fail as if by itself; another one comes.
    pub fn crash_worker(&mut self) {
        let worker = self.worker();
        let _ = kill_process(worker, Signal::ABORT);
    }

    /// Stops the thread of its worker that serves a session; there is one session.
    ///
    /// # Panics
    /// If there is none, or several.
    #[must_use]
    pub fn stop_pager(&mut self) -> StoppedPager {
        let tasks = format!("/proc/{}/task", self.worker().as_raw_pid());
        let tasks = std::fs::read_dir(tasks).expect("it lives").flatten();
        let is_pager = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm"))
                .is_ok_and(|name| name.trim() == "postcopy-pager")
        };
        let pagers: Vec<_> = tasks.filter(is_pager).collect();
        let [pager] = pagers.as_slice() else { panic!("{} pagers", pagers.len()) };
        let thread = pager.file_name().to_str().and_then(|name| name.parse().ok()).expect("a number");
        StoppedPager::stop(nix::unistd::Pid::from_raw(thread))
    }

    /// Kills its guardian alone.
    pub fn kill_guardian(&mut self) {
        self.worker();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Kills both at once, the guardian first, so that no other worker comes, and waits until
    /// both are gone: until then the worker's sockets listen.
    pub fn kill(&mut self) {
        if self.worker.is_none() && matches!(self.child.try_wait(), Ok(None)) {
            self.worker();
        }
        let worker = match self.child.try_wait() {
            Ok(None) => {
                let _ = kill_process(Pid::from_child(&self.child), Signal::STOP);
                Some(self.worker_now().or(self.worker))
            }
            _ => Some(self.worker),
        };
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The worker is no child of ours: its descriptor tells when it is gone.
        let worker = worker.flatten().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        if let Some(worker) = worker {
            let _ = pidfd_send_signal(&worker, Signal::KILL);
            let _ =
                poll(&mut [PollFd::new(&worker, PollFlags::IN)], Some(&Timespec { tv_sec: 30, tv_nsec: 0 }));
        }
    }

    /// Its worker, if it has one.
    #[must_use]
    pub fn worker_now(&self) -> Option<Pid> {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.guardian()));
        children.ok()?.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?))
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
    }

    /// Has it lose its terminal.
    pub fn hang_up(&self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::HUP);
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// If it does not within a minute.
    pub fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        let started = std::time::Instant::now();
        while ended.is_none() {
            assert!(started.elapsed().as_secs() < 60, "it does not end: {:#?}", self.said());
            ended = self.child.try_wait().expect("it is our child");
            std::thread::park_timeout(std::time::Duration::from_millis(3));
        }
        self.worker = None;
        ended.expect("it has ended")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The files of all daemons in a runtime directory.
fn files_below(root: &Path) -> Vec<PathBuf> {
    let entries =
        |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(root).flat_map(|daemon| entries(&daemon).collect::<Vec<_>>()).collect()
}

fn read_into(said: &Arc<Mutex<Vec<String>>>, stream: impl std::io::Read + Send + 'static) {
    let said = Arc::clone(said);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            eprintln!("{line}");
            said.lock().expect("nobody panics with it").push(line);
        }
    });
}
