//! Workers and daemons that die, and the successors that serve their machines.

use super::{Snapshot, with_root};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::wait_until;
use std::time::Duration;

#[test]
fn workers_are_killed_again_and_again_under_machines_that_run() {
    with_root("workers_are_killed_again_and_again_under_machines_that_run", || {
        let snapshot = Snapshot::push(64);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmms = [snapshot.vmm(&["small:64"]), snapshot.vmm(&["small:32", "small:32"])];
        for round in 0..6 {
            vmms.iter_mut().for_each(|vmm| vmm.tell(&format!("run 2 0.5 {round}")));
            daemon.kill_worker();
            assert!(!vmms[0].has_ended());
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
            // A worker that dies has read a fault.
            vmm.tell("touch 32 5");
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
        assert_eq!(vmm.touches().wrong, 0);
        vmm.assert_right();
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
fn a_log_that_is_full_holds_up_neither_faults_nor_a_successor() {
    with_root("a_log_that_is_full_holds_up_neither_faults_nor_a_successor", || {
        let snapshot = Snapshot::push(32);
        let args = snapshot.args(&snapshot.socket(), &[]);
        let mut daemon = Daemon::start_unread(snapshot.server.address(), args);
        let mut vmm = snapshot.vmm(&["small:32"]);
        daemon.fill_log();
        for round in 0..3 {
            daemon.kill_worker();
            vmm.tell(&format!("touch 4 {round}"));
            let longest = Duration::from_micros(vmm.touches().longest_us);
            assert!(longest < Duration::from_secs(5), "a fault took {longest:?}");
        }
        let mut other = snapshot.vmm(&["small:32"]);
        other.assert_right();
        vmm.assert_right();
        daemon.read_log();
        drop(vmm);
        daemon.assert_says("the log was full: ");
        drop(other);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

/// A logout removes $XDG_RUNTIME_DIR with all that is in it.
#[test]
fn a_daemon_whose_runtime_directory_has_disappeared_follows_the_loss_policy_and_ends_when_asked() {
    let name = "a_daemon_whose_runtime_directory_has_disappeared_follows_the_loss_policy_and_ends_when_asked";
    with_root(name, || {
        let snapshot = Snapshot::push(4);
        for (policy, is_killed) in [("wait", false), ("kill", true)] {
            let mut daemon = snapshot.daemon(&["--on-loss", policy, "--grace", "1s"]);
            let mut vmm = snapshot.vmm(&["small:4"]);
            std::fs::remove_dir_all(daemon.root()).unwrap();
            daemon.kill_worker();
            daemon.assert_says("this directory has disappeared");
            if is_killed {
                wait_until("the machine is killed", || vmm.has_ended());
            } else {
                std::thread::park_timeout(Duration::from_secs(2));
                let workers = daemon.said().iter().filter(|line| line.contains("takes over")).count();
                assert_eq!(workers, 1, "{:?}", daemon.said());
                daemon.terminate();
            }
            assert_eq!(daemon.wait().code(), Some(3), "{policy}: {:?}", daemon.said());
            vmm.kill();
        }
    });
}
