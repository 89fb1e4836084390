//! Other users of the machine, and peers that are no machines.

use super::{Snapshot, with_root};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::daemon::{Daemon, runtime_root};
use postcopy_tests::vmm::Vmm;
use postcopy_tests::wait_until;
use rustix::process::{Signal, kill_process};
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A daemon that is started with umask 0.
fn daemon_with_umask_0(snapshot: &Snapshot, root: &Path, more: &[&str]) -> Daemon {
    let command = postcopy(snapshot.server.address(), snapshot.args(&snapshot.socket(), more));
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 0; exec \"$@\"", "-"]).arg(command.get_program()).args(command.get_args());
    shell.env("POSTCOPY_SERVER", snapshot.server.address().to_string());
    let daemon = Daemon::spawn_as(root, shell);
    daemon.assert_says("ready: ");
    daemon
}

#[test]
fn another_user_reaches_neither_a_socket_nor_a_trace() {
    with_root("another_user_reaches_neither_a_socket_nor_a_trace", || {
        let (snapshot, root) = (Snapshot::push(4), runtime_root());
        std::fs::set_permissions(snapshot.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let traces = snapshot.folder.path().join("traces");
        let daemon = daemon_with_umask_0(&snapshot, root.path(), &["--trace", traces.to_str().unwrap()]);
        let script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        let mut stranger = Command::new("setpriv");
        stranger.args(["--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", script]);
        let output = stranger.arg(snapshot.socket()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("Permission denied"), "{said}");
        assert_eq!(mode(&snapshot.socket()), 0o600);
        let mut vmm = snapshot.vmm(&["small:4"]);
        vmm.assert_right();
        assert_eq!(mode(&traces), 0o700);
        let written = std::fs::read_dir(&traces).unwrap().map(|entry| mode(&entry.unwrap().path()));
        assert_eq!(written.collect::<Vec<_>>(), [0o600]);
        let state = super::files_of(&daemon, "").into_iter().filter(|path| path.is_file());
        assert!(state.map(|path| mode(&path)).all(|mode| mode == 0o600));
    });
}

/// Returns the context switches that the threads of a process have made of their own accord.
fn switches(pid: i32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    // A thread may end during the reading.
    let statuses = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("status")));
    let of = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    statuses.map(of).sum()
}

/// Many such peers would otherwise occupy the cores.
#[test]
fn a_peer_that_stops_within_its_handshake_is_looked_at_ever_more_rarely() {
    with_root("strangers::a_peer_that_stops_within_its_handshake_is_looked_at_ever_more_rarely", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&[]);
        let worker = daemon.worker().as_raw_pid();
        let mut peer = std::os::unix::net::UnixStream::connect(snapshot.socket()).unwrap();
        std::io::Write::write_all(&mut peer, b"[").unwrap();
        let before = switches(worker);
        // Shorter than the 10 s of a handshake. A look every 2 ms makes 1,500 switches.
        std::thread::park_timeout(Duration::from_secs(3));
        let made = switches(worker).saturating_sub(before);
        assert!(made < 300, "{made} context switches in 3 s");
    });
}

#[test]
fn ten_thousand_connections_that_say_nothing_are_in_no_machine_s_way() {
    with_root("ten_thousand_connections_that_say_nothing_are_in_no_machine_s_way", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&[]);
        let worker = daemon.worker().as_raw_nonzero();
        // Its own processes, because one has not enough descriptors for all.
        let script = "import socket, sys, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
held = []
for n in range(10000):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
    if n % 2: held[-1].send(b'[')
print('connected', flush=True)
sys.stdin.read()";
        let mut flood = Command::new("python3");
        flood.args(["-c", script]).arg(snapshot.socket()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut flood = flood.spawn().unwrap();
        let mut connected = [0; 9];
        std::io::Read::read_exact(flood.stdout.as_mut().unwrap(), &mut connected).unwrap();
        let count = |what: &str| std::fs::read_dir(format!("/proc/{worker}/{what}")).unwrap().count();
        wait_until("few threads", || count("task") < 600);
        assert!(count("fd") < 700, "{} descriptors", count("fd"));
        let mut vmm = snapshot.vmm(&["small:4"]);
        vmm.assert_right();
        daemon.assert_says("more than 512 connections have sent no handshake");
        let lines = daemon.said().len();
        assert!(lines < 500, "{lines} lines");
        flood.kill().unwrap();
        flood.wait().unwrap();
        daemon.assert_says("more connections were refused");
    });
}

#[test]
fn a_path_of_an_image_does_not_forge_lines_of_the_log() {
    with_root("a_path_of_an_image_does_not_forge_lines_of_the_log", || {
        let snapshot = Snapshot::push(4);
        let path = snapshot.folder.path().join("snapshot");
        std::fs::write(path.join("odd\nvm 7: forged \x1b[2J"), "odd").unwrap();
        let _ = run(snapshot.server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("vm")]);
        let daemon = snapshot.daemon(&[]);
        let _vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:8"]);
        daemon.assert_says("forged");
        let forged = daemon.said().into_iter().find(|line| line.contains("forged")).unwrap();
        assert!(forged.contains("the guest has") && !forged.contains('\x1b'), "{forged:?}");
    });
}

/// Starts a process that gets the pid, which is free.
fn process_with_pid(pid: u32) -> Option<Child> {
    for _ in 0..200 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        if child.id() == pid {
            return Some(child);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    None
}

#[test]
fn a_process_that_gets_the_pid_of_a_peer_that_has_exited_is_not_killed() {
    let name = "a_process_that_gets_the_pid_of_a_peer_that_has_exited_is_not_killed";
    with_root(name, || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&["--on-loss", "kill"]);
        let worker = daemon.worker();
        kill_process(worker, Signal::STOP).unwrap();
        // A child of the peer keeps the connection, and sends a userfaultfd over it.
        let script = "import ctypes, os, socket, sys
stream = socket.socket(socket.AF_UNIX)
stream.connect(sys.argv[1])
if os.fork() == 0:
    uffd = ctypes.CDLL(None).syscall(323, 1)
    socket.send_fds(stream, [b'hello'], [uffd])
    sys.stdin.read()";
        let mut peer = Command::new("python3");
        let mut peer =
            peer.args(["-c", script]).arg(snapshot.socket()).stdin(Stdio::piped()).spawn().unwrap();
        let stdin = peer.stdin.take();
        assert!(peer.wait().unwrap().success());
        let Some(mut victim) = process_with_pid(peer.id()) else {
            kill_process(worker, Signal::CONT).unwrap();
            return postcopy_tests::skip(name, "pids cannot be chosen");
        };
        kill_process(worker, Signal::CONT).unwrap();
        daemon.assert_says(&format!("process {}: its handshake is not", victim.id()));
        let mut vmm: Vmm = snapshot.vmm(&["small:4"]);
        vmm.assert_right();
        assert!(victim.try_wait().unwrap().is_none(), "{:#?}", daemon.said());
        victim.kill().unwrap();
        victim.wait().unwrap();
        drop(stdin);
    });
}

/// 40 connections with 253 descriptors each: ten times as many as the worker may have open.
#[test]
fn descriptors_of_peers_without_a_handshake_do_not_fill_the_worker_s_table() {
    with_root("descriptors_of_peers_without_a_handshake_do_not_fill_the_worker_s_table", || {
        let snapshot = Snapshot::push(4);
        let command = postcopy(snapshot.server.address(), snapshot.args(&snapshot.socket(), &[]));
        let limited = "ulimit -n 400; exec \"$@\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", limited, "-"]).arg(command.get_program()).args(command.get_args());
        shell.env("POSTCOPY_SERVER", snapshot.server.address().to_string());
        let root = runtime_root();
        let daemon = Daemon::spawn_as(root.path(), shell);
        daemon.assert_says("ready: ");
        let script = "import array, socket, sys
held = []
for n in range(40):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
    held[-1].sendmsg([b'['], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 253))])
print('connected', flush=True)
sys.stdin.read()";
        let mut flood = Command::new("python3");
        flood.args(["-c", script]).arg(snapshot.socket()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut flood = flood.spawn().unwrap();
        let mut connected = [0; 9];
        std::io::Read::read_exact(flood.stdout.as_mut().unwrap(), &mut connected).unwrap();
        let mut vmm = snapshot.vmm(&["small:4"]);
        vmm.assert_right();
        daemon.assert_says("more than 8 descriptors");
        assert!(!daemon.has_said("Too many open files"), "{:?}", daemon.said());
        flood.kill().unwrap();
        flood.wait().unwrap();
    });
}
