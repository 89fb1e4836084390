//! A `postcopyd` of one's own.

use crate::binary;
use postcopy::ServerAddress;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use tempfile::TempDir;

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: ServerAddress,
    store: PathBuf,
    _own_store: Option<TempDir>,
}

impl Server {
    /// Starts a server on a new store and a free port of loopback.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start() -> Self {
        let store = tempfile::tempdir().expect("a scratch folder");
        let mut server = Self::on(&store.path().join("store"), "127.0.0.1:0");
        server._own_store = Some(store);
        server
    }

    /// Starts a server on a store, listening where it is told.
    ///
    /// # Panics
    /// If it does not come up; with what it wrote to stderr.
    #[must_use]
    pub fn on(store: &Path, listen: &str) -> Self {
        Self::try_on(store, listen).unwrap_or_else(|stderr| panic!("postcopyd did not start: {stderr}"))
    }

    /// As [`Server::on`].
    ///
    /// # Errors
    /// What it wrote to stderr before it ended.
    ///
    /// # Panics
    /// If it cannot be started at all.
    pub fn try_on(store: &Path, listen: &str) -> Result<Self, String> {
        let mut command = Command::new(binary("postcopyd"));
        command.arg("serve").arg("--store").arg(store).args(["--listen", listen]);
        Self::spawn(command, store)
    }

    /// Starts `command`, which runs `postcopyd serve` on `store`, perhaps under another program.
    ///
    /// # Errors
    /// What it wrote to stderr before it ended.
    ///
    /// # Panics
    /// If it cannot be started at all.
    pub fn spawn(mut command: Command, store: &Path) -> Result<Self, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the server's program can be started");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("its stdout can be read");
        let stderr = child.stderr.take().expect("piped");
        let Some(address) = line.trim().strip_prefix("postcopyd listening on ") else {
            let mut text = String::new();
            let mut stderr = stderr;
            let _ = stderr.read_to_string(&mut text);
            let _ = child.wait();
            return Err(text);
        };
        // Read on, so that it never blocks on a full pipe; shown by the test runner when the test fails.
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|l| eprintln!("{l}"))
        });
        let address = address.parse().expect("it prints its address");
        Ok(Self { child, address, store: store.to_owned(), _own_store: None })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// Its process id (of the program it was started with).
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn stop(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.child);
        let _ = kill_process(pid, Signal::TERM);
        self.child.wait().expect("a child can be waited for")
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
