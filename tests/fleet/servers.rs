//! Three servers over one bucket, each with a cache on a tmpfs of its own.

use crate::garage::Garage;
use anyhow::{Error, Result};
use postcopy::ServerAddress;
use postcopy_tests::binary;
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::server::Server;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) const SERVERS: usize = 3;

/// The settings that the servers have in common.
pub(crate) struct Setting {
    /// The URL of the store.
    pub(crate) store: String,
    /// The port of the bucket.
    pub(crate) bucket: u16,
    /// Bytes of blocks that a server keeps in memory.
    pub(crate) memory_bytes: usize,
    /// Bytes of a server's disk.
    pub(crate) disk_bytes: usize,
}

/// The running servers; killed when dropped.
pub(crate) struct Servers {
    setting: Setting,
    pub(crate) addresses: Vec<ServerAddress>,
    /// Each is locked while it is killed and started again.
    servers: Vec<Mutex<Server>>,
    pub(crate) disks: Vec<Tmpfs>,
}

/// Returns a command of postcopyd on the store.
pub(crate) fn postcopyd(setting: &Setting, command: &str) -> Command {
    let mut postcopyd = Command::new(binary("postcopyd"));
    postcopyd.args([command, "--store", &setting.store]);
    Garage::set(&mut postcopyd, setting.bucket);
    postcopyd
}

impl Servers {
    /// Starts servers with empty caches.
    pub(crate) fn start(setting: Setting) -> Result<Self> {
        let listeners: Vec<_> =
            (0..SERVERS).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        let address = |listener: &TcpListener| Ok(format!("http://{}", listener.local_addr()?).parse()?);
        let addresses = listeners.iter().map(address).collect::<Result<Vec<_>>>()?;
        drop(listeners);
        let disks: Vec<_> = (0..SERVERS).map(|_| Tmpfs::of_bytes(setting.disk_bytes)).collect();
        let mut servers = Self { setting, addresses, servers: Vec::new(), disks };
        for number in 0..SERVERS {
            servers.servers.push(Mutex::new(servers.spawn(number)?));
        }
        Ok(servers)
    }

    fn spawn(&self, number: usize) -> Result<Server> {
        let peers: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let listen = peers[number].trim_start_matches("http://");
        let mut command = postcopyd(&self.setting, "serve");
        command.args(["--listen", listen, "--peers", &peers.join(",")]);
        command.args(["--cache-memory", &self.setting.memory_bytes.to_string()]);
        // The disk may have room for less.
        command.args(["--cache-size", "1GiB", "--cache"]);
        command.arg(self.disks[number].path().join("cache"));
        Server::spawn(command, Path::new("")).map_err(Error::msg)
    }

    fn lock(&self, number: usize) -> MutexGuard<'_, Server> {
        self.servers[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills a server (SIGKILL) and starts it again at its address, with its disk.
    pub(crate) fn replace(&self, number: usize) -> Result<()> {
        let mut server = self.lock(number);
        server.kill();
        *server = self.spawn(number)?;
        Ok(())
    }

    pub(crate) fn pid(&self, number: usize) -> u32 {
        self.lock(number).pid()
    }

    /// Returns the CPU seconds that the servers have taken.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        (0..SERVERS).map(|number| cpu_seconds(self.pid(number))).sum()
    }
}

/// Returns the CPU seconds of a process, its threads that have ended included.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name, which may hold anything: the third field and on.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}
