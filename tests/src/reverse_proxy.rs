//! nginx and HAProxy of Debian's packages, with the configurations that docs/OPERATIONS.md shows.

use postcopy::ServerAddress;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// A reverse proxy that Debian has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nginx, `grpc_pass`.
    Nginx,
    /// HAProxy, `proto h2`.
    HaProxy,
}

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Nginx => "/usr/sbin/nginx",
            Self::HaProxy => "/usr/sbin/haproxy",
        }
    }

    /// Returns the reason why its tests cannot run here, if there is one.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let program = self.program();
        (!Path::new(program).exists()).then(|| format!("{program} is not there: run `tests/setup test`"))
    }

    /// Returns the configuration that docs/OPERATIONS.md shows.
    fn documented(self) -> String {
        let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OPERATIONS.md");
        let text = fs::read_to_string(document).expect("docs/OPERATIONS.md");
        let fence = match self {
            Self::Nginx => "```nginx\n",
            Self::HaProxy => "```haproxy\n",
        };
        let (_, block) = text.split_once(fence).expect("the document shows it");
        block.split("```").next().expect("the block").to_owned()
    }
}

/// A running reverse proxy, as an ordinary user; ended when dropped, with its workers.
#[derive(Debug)]
pub struct ReverseProxy {
    kind: Kind,
    child: Child,
    address: ServerAddress,
    _folder: TempDir,
}

impl ReverseProxy {
    /// Starts a proxy of `server` on a socket of its own, configured as documented after replacing each of `changes`.
    /// Connections of workers that a reload has replaced end after a second.
    ///
    /// # Panics
    /// If it does not come up, or the document has not what is to be replaced.
    #[must_use]
    pub fn start(kind: Kind, server: &ServerAddress, changes: &[(&str, &str)]) -> Self {
        // A short path: that of a socket has at most 107 bytes.
        let folder =
            tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o777)).tempdir_in("/tmp");
        let folder = folder.expect("a scratch folder");
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).expect("it is ours");
        let socket = folder.path().join("proxy.sock");
        let server = server.to_string();
        let backend = server.trim_start_matches("http://").trim_end_matches('/');
        let scheme = if kind == Kind::Nginx { "unix:" } else { "unix@" };
        let listen = format!("{scheme}{}", socket.display());
        let mut config = kind.documented();
        for (from, to) in [("127.0.0.1:7080", &*listen), ("127.0.0.1:7070", backend)].iter().chain(changes) {
            assert!(config.contains(from), "the documented configuration has no {from:?}");
            config = config.replace(from, to);
        }
        let path = folder.path().join("postcopy.conf");
        fs::write(&path, config).expect("written");

        let mut command = if crate::is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", kind.program()]);
            command
        } else {
            Command::new(kind.program())
        };
        // What Debian's main configuration does for a system's service, done for this folder.
        match kind {
            Kind::Nginx => {
                let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
                let temp = temp.map(|name| format!("{name}_temp_path {name};\n")).concat();
                let main = format!(
                    "daemon off; pid nginx.pid; worker_processes 2; worker_shutdown_timeout 1s;\n\
                     events {{}}\nhttp {{ access_log off;\n{temp}include {}; }}\n",
                    path.display()
                );
                let main_path = folder.path().join("nginx.conf");
                fs::write(&main_path, main).expect("written");
                command.args(["-e", "stderr", "-p"]).arg(folder.path()).arg("-c").arg(main_path);
            }
            Kind::HaProxy => {
                let global = folder.path().join("global.cfg");
                fs::write(&global, "global\n    hard-stop-after 1s\n").expect("written");
                command.args(["-W", "-q", "-f"]).arg(global).arg("-f").arg(path);
            }
        }
        let child = command.stdin(Stdio::null()).spawn().expect("setpriv or the proxy can be started");
        let address = format!("unix:{}", socket.display()).parse().expect("an address");
        let mut proxy = Self { kind, child, address, _folder: folder };
        crate::wait_until("the proxy is there", || {
            assert_eq!(proxy.child.try_wait().expect("a child"), None, "{kind:?} has ended");
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        proxy
    }

    /// Returns the address at which it listens.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// Returns the pids of the processes that carry its connections.
    #[must_use]
    pub fn workers(&self) -> BTreeSet<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Starts new workers, while the old ones end: `nginx -s reload`, `systemctl reload haproxy`.
    pub fn reload(&self) {
        let signal = match self.kind {
            Kind::Nginx => Signal::HUP,
            Kind::HaProxy => Signal::USR2,
        };
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }
}

impl Drop for ReverseProxy {
    fn drop(&mut self) {
        // Both end their workers at once.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}
