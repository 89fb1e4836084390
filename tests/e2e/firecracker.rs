//! `postcopy firecracker`, against a stand-in for Firecracker: every byte of guests that run, with workers that are killed.

use postcopy_tests::cli::run;
use postcopy_tests::daemon::Daemon;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::pool::HugePool;
use postcopy_tests::server::Server;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::{is_root, skip, wait_until};
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

    fn vmm(&self, regions: &[&str]) -> Vmm {
        let mut vmm = Vmm::start(&self.socket(), &self.memory(), "new", regions);
        vmm.loaded();
        vmm
    }
}

fn with_root(test: &str, work: impl FnOnce()) {
    if !is_root() {
        return skip(&format!("firecracker::{test}"), "a userfaultfd for all faults needs root");
    }
    work();
}

#[test]
fn several_machines_run_while_their_memory_arrives() {
    with_root("several_machines_run_while_their_memory_arrives", || {
        let snapshot = Snapshot::push(64);
        let daemon = snapshot.daemon(&[]);
        let mut vmms = [
            Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:64"]),
            Vmm::start(&snapshot.socket(), &snapshot.memory(), "old", &["small:48", "small:16"]),
        ];
        vmms.iter_mut().for_each(Vmm::loaded);
        vmms.iter_mut().for_each(|vmm| vmm.tell("run 2 1.0 7"));
        for vmm in &mut vmms {
            let touches = vmm.touches();
            assert!(touches.wrong == 0 && touches.count > 1000, "{touches:?}");
        }
        let [mut first, mut second] = vmms;
        assert_eq!(first.ask("balloon 100 3000"), "done");
        assert_eq!(first.ask("balloon 9000 20"), "done");
        first.assert_right();
        // One that goes is no other one's business.
        let pid = first.pid();
        first.kill();
        daemon.assert_says(&format!("vm {pid}: is gone"));
        second.assert_right();
    });
}

#[test]
fn workers_are_killed_again_and_again_under_machines_that_run() {
    with_root("workers_are_killed_again_and_again_under_machines_that_run", || {
        let snapshot = Snapshot::push(64);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmms = [snapshot.vmm(&["small:64"]), snapshot.vmm(&["small:32", "small:32"])];
        for round in 0..6 {
            vmms.iter_mut().for_each(|vmm| vmm.tell(&format!("run 2 0.5 {round}")));
            daemon.kill_worker();
            assert_eq!(vmms[0].has_ended(), false);
            for vmm in &mut vmms {
                let touches = vmm.touches();
                assert_eq!(touches.wrong, 0, "{touches:?}");
            }
            assert_eq!(vmms[0].ask(&format!("balloon {} 200", round * 300)), "done");
        }
        vmms.iter_mut().for_each(Vmm::assert_right);
    });
}

#[test]
fn a_machine_on_huge_pages_survives_the_death_of_a_worker() {
    with_root("a_machine_on_huge_pages_survives_the_death_of_a_worker", || {
        let snapshot = Snapshot::push(16);
        let _pool = HugePool::with_free(8);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["huge:16"]);
        vmm.tell("touch 2 3");
        daemon.kill_worker();
        assert_eq!(vmm.touches().wrong, 0);
        assert_eq!(vmm.ask("balloon 512 512"), "done");
        daemon.kill_worker();
        vmm.assert_right();
    });
}

#[test]
fn a_machine_whose_daemon_has_died_altogether_is_adopted() {
    with_root("a_machine_whose_daemon_has_died_altogether_is_adopted", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        assert_eq!(vmm.ask("balloon 0 2048"), "done");
        daemon.kill();
        // It sleeps, and is not fed zeros.
        vmm.tell("touch 16 5");
        let pid = vmm.pid().to_string();
        let args = ["firecracker", "--adopt", &pid, "--image", "vm"];
        let mut adopter = Daemon::start_in(daemon.root(), snapshot.server.address(), args);
        assert_eq!(vmm.touches().wrong, 0);
        adopter.kill_worker();
        vmm.assert_right();
        vmm.kill();
        assert_eq!(adopter.wait().code(), Some(0));
    });
}

#[test]
fn a_machine_without_a_state_file_is_adopted_only_if_nothing_was_removed() {
    with_root("a_machine_without_a_state_file_is_adopted_only_if_nothing_was_removed", || {
        let snapshot = Snapshot::push(32);
        let mut vmm = {
            let mut daemon = snapshot.daemon(&[]);
            let mut vmm = snapshot.vmm(&["small:32"]);
            vmm.tell("touch 4 5");
            assert_eq!(vmm.touches().wrong, 0);
            daemon.kill();
            vmm
        };
        let (pid, root) = (vmm.pid().to_string(), postcopy_tests::daemon::runtime_root());
        let args = ["firecracker", "--adopt", &pid, "--image", "vm"];
        let mut refused = Daemon::spawn(root.path(), snapshot.server.address(), args);
        assert_eq!(refused.wait().code(), Some(1));
        refused.assert_says("--nothing-was-removed");
        let args = ["firecracker", "--adopt", &pid, "--image", "vm", "--nothing-was-removed"];
        let _adopter = Daemon::start_in(root.path(), snapshot.server.address(), args);
        vmm.assert_right();
    });
}

#[test]
fn a_daemon_that_is_asked_to_end_fills_its_machines_first_and_leaves_nothing_behind() {
    with_root("a_daemon_that_is_asked_to_end_fills_its_machines_first_and_leaves_nothing_behind", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        assert_eq!(vmm.ask("balloon 500 100"), "done");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        daemon.assert_says("all of its memory is there");
        assert!(!snapshot.socket().exists());
        let left: Vec<_> = std::fs::read_dir(daemon.root()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        // Nobody serves it, and it needs nobody.
        vmm.assert_right();
        assert_eq!(vmm.ask("balloon 100 1000"), "done");
        vmm.assert_right();
    });
}

#[test]
fn a_daemon_that_cannot_fill_in_time_says_which_machines_sleep_and_how_to_wake_them() {
    with_root("a_daemon_that_cannot_fill_in_time_says_which_machines_sleep_and_how_to_wake_them", || {
        let mut snapshot = Snapshot::push(32);
        let store = snapshot.server.store().to_owned();
        let socket = snapshot.folder.path().join("server.sock");
        let listen = format!("unix:{}", socket.display());
        let mut server = Server::on(&store, &listen);
        let args = snapshot.args(&snapshot.socket(), &["--grace", "1s"]);
        let mut daemon = Daemon::start(server.address(), args);
        let mut vmm = snapshot.vmm(&["small:32"]);
        server.kill();
        vmm.tell("touch 8 5");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        let pid = vmm.pid().to_string();
        daemon.assert_says(&format!("postcopy firecracker --adopt {pid} --image vm"));
        server = Server::on(&store, &listen);
        let args = ["firecracker", "--adopt", &pid, "--image", "vm"];
        let _adopter = Daemon::start_in(daemon.root(), server.address(), args);
        assert_eq!(vmm.touches().wrong, 0);
        vmm.assert_right();
        snapshot.server.kill();
    });
}

#[test]
fn a_worker_goes_on_without_its_guardian_and_says_so() {
    with_root("a_worker_goes_on_without_its_guardian_and_says_so", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        daemon.kill_guardian();
        daemon.assert_says("the guardian has died");
        vmm.assert_right();
        let mut other = snapshot.vmm(&["small:32"]);
        other.assert_right();
    });
}

#[test]
fn a_loss_is_dealt_with_as_was_asked_for() {
    with_root("a_loss_is_dealt_with_as_was_asked_for", || {
        for policy in ["kill", "pause", "poison"] {
            let mut snapshot = Snapshot::push(16);
            let mut daemon = snapshot.daemon(&["--on-loss", policy, "--fault-deadline", "300ms"]);
            let mut vmm = snapshot.vmm(&["small:16"]);
            snapshot.server.kill();
            vmm.tell("touch 16 5");
            let stat = format!("/proc/{}/stat", vmm.pid());
            let is_stopped = || {
                let stat = std::fs::read_to_string(&stat).unwrap_or_default();
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            };
            match policy {
                "pause" => wait_until("it is stopped", is_stopped),
                _ => wait_until("it has died", || vmm.has_ended()),
            }
            drop(vmm);
            daemon.terminate();
            assert_eq!(daemon.wait().code(), Some(0));
        }
    });
}
