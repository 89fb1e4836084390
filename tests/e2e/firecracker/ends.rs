//! The end of a daemon: what it still serves, what it records as lost, and what does not delay it.

use super::{Snapshot, with_root};
use postcopy_tests::cli::postcopy;
use postcopy_tests::daemon::Daemon;
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::wait_until;
use rustix::process::{Signal, kill_process};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

#[test]
fn machines_in_the_backlog_at_the_end_are_served_and_later_ones_refused() {
    with_root("machines_in_the_backlog_at_the_end_are_served_and_later_ones_refused", || {
        const MACHINES: usize = 5;
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&["--grace", "30s"]);
        let worker = daemon.worker();
        kill_process(worker, Signal::STOP).unwrap();
        let start = || Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:4"]);
        let mut vmms: Vec<Vmm> = (0..MACHINES).map(|_| start()).collect();
        let sent = || {
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
            let path = snapshot.socket();
            sockets.lines().filter(|line| line.ends_with(path.to_str().unwrap())).count()
        };
        // The listening socket, and one for each connection.
        wait_until("all have connected", || sent() > MACHINES);
        daemon.terminate();
        kill_process(worker, Signal::CONT).unwrap();
        for vmm in &mut vmms {
            vmm.loaded();
        }
        assert_eq!(daemon.wait().code(), Some(0), "{:#?}", daemon.said());
        vmms.iter_mut().for_each(Vmm::assert_right);
        assert!(UnixStream::connect(snapshot.socket()).is_err());
    });
}

#[test]
fn a_machine_that_was_refused_and_waits_counts_as_lost() {
    with_root("a_machine_that_was_refused_and_waits_counts_as_lost", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&["--on-loss", "wait"]);
        let vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:8"]);
        daemon.assert_says(&format!("process {}: the guest has 8388608 bytes", vmm.pid()));
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.assert_says(&format!("process {}: it was left without its memory", vmm.pid()));
    });
}

#[test]
fn a_peer_of_the_control_socket_that_sends_nothing_delays_no_end() {
    with_root("a_peer_of_the_control_socket_that_sends_nothing_delays_no_end", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&[]);
        let control = super::files_of(&daemon, "control").pop().unwrap();
        let silent = UnixStream::connect(&control).unwrap();
        let mut half = UnixStream::connect(&control).unwrap();
        half.write_all(b"dra").unwrap();
        // The worker accepts in order: it has accepted both once it answers a third.
        let mut third = UnixStream::connect(&control).unwrap();
        third.write_all(b"no request\n").unwrap();
        let mut answer = String::new();
        third.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("error"), "{answer}");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        drop((silent, half));
    });
}

/// A shell that ignores SIGCHLD, and then `exec`, leave it ignored.
#[test]
fn a_daemon_that_is_started_with_sigchld_ignored_replaces_its_worker() {
    with_root("a_daemon_that_is_started_with_sigchld_ignored_replaces_its_worker", || {
        let snapshot = Snapshot::push(16);
        let root = postcopy_tests::daemon::runtime_root();
        let with_default = postcopy(snapshot.server.address(), snapshot.args(&snapshot.socket(), &[]));
        let mut command = Command::new("env");
        command.arg("--ignore-signal=CHLD").arg(with_default.get_program()).args(with_default.get_args());
        for (name, value) in with_default.get_envs() {
            command.env(name, value.unwrap());
        }
        let mut daemon = Daemon::spawn_as(root.path(), command);
        daemon.assert_says("ready: ");
        let mut vmm = snapshot.vmm(&["small:16"]);
        daemon.kill_worker();
        vmm.assert_right();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

#[test]
fn a_loss_counts_if_the_runtime_directory_is_full() {
    with_root("a_loss_counts_if_the_runtime_directory_is_full", || {
        let mut snapshot = Snapshot::push(16);
        let tmpfs = Tmpfs::of_bytes(8 << 20);
        let args = snapshot.args(&snapshot.socket(), &["--on-loss", "kill", "--fault-deadline", "300ms"]);
        let mut daemon = Daemon::start_in(tmpfs.path(), snapshot.server.address(), args);
        let mut vmm = snapshot.vmm(&["small:16"]);
        let mut rest = std::fs::File::create(tmpfs.path().join("rest")).unwrap();
        while rest.write(&[1; 4096]).is_ok() {}
        snapshot.server.kill();
        vmm.tell("touch 16 5");
        wait_until("it has died", || vmm.has_ended());
        let pid = vmm.pid();
        drop(vmm);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3), "{:#?}", daemon.said());
        daemon.assert_says(&format!("process {pid}: it was killed"));
    });
}
