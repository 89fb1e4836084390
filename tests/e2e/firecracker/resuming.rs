//! Sessions that a successor cannot resume.

use super::{Snapshot, is_stopped, with_root};
use postcopy_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

#[test]
fn a_machine_whose_workers_fail_for_as_long_as_the_deadline_is_lost() {
    with_root("a_machine_whose_workers_fail_for_as_long_as_the_deadline_is_lost", || {
        let snapshot = Snapshot::push(16);
        let daemon_args = ["--on-loss", "kill", "--fault-deadline", "300ms"];
        let mut daemon = snapshot.daemon(&daemon_args);
        let mut vmm = snapshot.vmm(&["small:16"]);
        let (failing, mut crashes) = (Instant::now(), 0);
        while !vmm.has_ended() {
            let worker = daemon.worker();
            daemon.crash_worker();
            wait_until("another worker", || daemon.worker() != worker);
            // Time for it to do what it fails at.
            std::thread::park_timeout(Duration::from_millis(20));
            crashes += 1;
            assert!(failing.elapsed() < Duration::from_secs(60), "{:#?}", daemon.said());
        }
        assert!(failing.elapsed() > Duration::from_millis(300) && crashes > 1, "{crashes} crashes");
        daemon.assert_says("its memory is lost: Kill");
        drop(vmm);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
    });
}

#[test]
fn a_session_that_cannot_be_resumed_is_tried_again_and_others_are_served() {
    with_root("a_session_that_cannot_be_resumed_is_tried_again_and_others_are_served", || {
        let snapshot = Snapshot::push(16);
        let mut daemon = snapshot.daemon(&["--on-loss", "kill", "--fault-deadline", "30s"]);
        let mut vmm = snapshot.vmm(&["small:16"]);
        let mut other = snapshot.vmm(&["small:16"]);
        let broken = daemon.break_state(vmm.pid());
        daemon.kill_worker();
        vmm.tell("touch 16 5");
        daemon.assert_says(&format!("process {}: session vm-{}", vmm.pid(), vmm.pid()));
        other.assert_right();
        snapshot.vmm(&["small:16"]).assert_right();
        // A worker that follows takes it up where this one is.
        daemon.kill_worker();
        std::thread::park_timeout(Duration::from_secs(2));
        assert!(!vmm.has_ended());
        broken.mend();
        assert_eq!(vmm.touches().wrong, 0);
        vmm.assert_right();
        let tries =
            daemon.said().iter().filter(|line| line.contains("does not begin as a state file does")).count();
        assert!(tries <= 2, "each worker says it once: {:#?}", daemon.said());
    });
}

#[test]
fn a_session_that_cannot_be_resumed_by_the_deadline_is_lost_and_others_are_not() {
    with_root("a_session_that_cannot_be_resumed_by_the_deadline_is_lost_and_others_are_not", || {
        let snapshot = Snapshot::push(16);
        for policy in ["kill", "poison", "pause"] {
            let mut daemon = snapshot.daemon(&["--on-loss", policy, "--fault-deadline", "500ms"]);
            let mut vmm = snapshot.vmm(&["small:16"]);
            let mut other = snapshot.vmm(&["small:16"]);
            let broken = daemon.break_state(vmm.pid());
            daemon.kill_worker();
            vmm.tell("touch 16 5");
            if policy == "pause" {
                wait_until("it is stopped", || is_stopped(vmm.pid()));
                // A machine that is continued is served, if its session can be resumed by then.
                broken.mend();
                kill_process(Pid::from_raw(vmm.pid().cast_signed()).unwrap(), Signal::CONT).unwrap();
                assert_eq!(vmm.touches().wrong, 0);
            } else {
                wait_until("it has died", || vmm.has_ended());
                daemon.assert_says("it has exited before its session could be resumed");
            }
            daemon.assert_says(&format!("process {}: its memory is lost", vmm.pid()));
            other.assert_right();
            snapshot.vmm(&["small:16"]).assert_right();
            assert!(!is_stopped(other.pid()) && !other.has_ended());
        }
    });
}

#[test]
fn workers_that_die_while_they_resume_lose_the_machine_at_the_deadline() {
    with_root("workers_that_die_while_they_resume_lose_the_machine_at_the_deadline", || {
        let snapshot = Snapshot::push(16);
        for policy in ["kill", "poison"] {
            let mut daemon = snapshot.daemon(&["--on-loss", policy, "--fault-deadline", "1s"]);
            let mut vmm = snapshot.vmm(&["small:16"]);
            let _broken = daemon.break_state(vmm.pid());
            let failing = Instant::now();
            while !vmm.has_ended() {
                let worker = daemon.worker();
                daemon.crash_worker();
                wait_until("another worker", || daemon.worker() != worker);
                // It is at its attempts to resume then, and they would go on for longer.
                std::thread::park_timeout(Duration::from_millis(100));
                assert!(failing.elapsed() < Duration::from_secs(60), "{policy}: {:#?}", daemon.said());
            }
            assert!(failing.elapsed() > Duration::from_secs(1), "{policy}");
            daemon.assert_says(&format!("process {}: its memory is lost", vmm.pid()));
            snapshot.vmm(&["small:16"]).assert_right();
        }
    });
}
