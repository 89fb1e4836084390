//! Memory that a daemon cannot install in time: after a fault's deadline, or at the daemon's end.

use super::{Snapshot, is_stopped, with_root};
use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::wait_until;
use rustix::process::{Signal, kill_process};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn a_daemon_that_is_asked_to_end_fills_its_machines_first_and_leaves_nothing_behind() {
    with_root("a_daemon_that_is_asked_to_end_fills_its_machines_first_and_leaves_nothing_behind", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        assert_eq!(vmm.ask("balloon 500 100"), "done");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        daemon.assert_says("all of its memory is resident");
        assert!(!snapshot.socket().exists());
        let left: Vec<_> = std::fs::read_dir(daemon.root()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        // No daemon serves the machine, and it needs none.
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
        assert_eq!(daemon.wait().code(), Some(3));
        let said =
            format!("sleeps until it is taken over: postcopy firecracker --adopt {} --image vm@", vmm.pid());
        daemon.assert_says(&said);
        // As it is said, also where the tag names another image and the variables another server.
        let line = daemon.said().into_iter().find(|line| line.contains(&said)).unwrap();
        let (_, command) = line.split_once("taken over: postcopy ").unwrap();
        let place = format!(" --runtime-dir {}", daemon.root().display());
        let command = command.strip_suffix(&place).unwrap();
        snapshot.move_tag();
        server = Server::on(&store, &listen);
        let nowhere = "http://127.0.0.1:1".parse().unwrap();
        let _adopter = Daemon::start_in(daemon.root(), &nowhere, command.split(' '));
        assert_eq!(server.address().to_string(), listen);
        assert_eq!(vmm.touches().wrong, 0);
        vmm.assert_right();
        snapshot.server.kill();
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
            let pid = vmm.pid();
            match policy {
                "pause" => wait_until("it is stopped", || is_stopped(pid)),
                _ => wait_until("it has died", || vmm.has_ended()),
            }
            drop(vmm);
            // The worker may die before it records the loss.
            daemon.kill_worker();
            daemon.terminate();
            assert_eq!(daemon.wait().code(), Some(3));
            daemon.assert_says("ended with status 3: 1 process was left or lost memory");
            let what = match policy {
                "kill" => "was killed",
                "pause" => "was stopped",
                _ => "lost pages, which are SIGBUS",
            };
            daemon.assert_says(&format!("process {pid}: it {what}"));
        }
    });
}

/// The session's end waits for a thread that does not run.
#[test]
fn a_machine_whose_memory_is_complete_outlives_an_end_that_does_not_come() {
    with_root("a_machine_whose_memory_is_complete_outlives_an_end_that_does_not_come", || {
        let snapshot = Snapshot::push(16);
        let mut daemon = snapshot.daemon(&["--fill", "all"]);
        let mut vmm = snapshot.vmm(&["small:16"]);
        vmm.assert_right();
        let pager = daemon.stop_pager();
        daemon.terminate();
        pager.assert_killed();
        assert_eq!(daemon.wait().code(), Some(0));
        daemon.assert_says("all of its memory is resident, but its session does not end");
        daemon.assert_says("ended: nothing was lost");
        vmm.assert_right();
    });
}

/// The answer to a fault lies in the worker's socket while the worker is stopped past the deadline.
#[test]
fn a_worker_that_was_stopped_past_the_deadline_loses_nothing() {
    with_root("a_worker_that_was_stopped_past_the_deadline_loses_nothing", || {
        let snapshot = Snapshot::push(16);
        let (is_held, is_asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (hold, asked) = (Arc::clone(&is_held), Arc::clone(&is_asked));
        let lies = Lies::default().chunk(move |_, answer| {
            while hold.load(Ordering::SeqCst) {
                asked.store(true, Ordering::SeqCst);
                std::thread::park_timeout(Duration::from_millis(1));
            }
            vec![answer]
        });
        let chaos = Chaos::start(snapshot.server.address(), lies);
        let args = ["--on-loss", "poison", "--fault-deadline", "1s", "--fill", "nothing"];
        let mut daemon = Daemon::start(chaos.address(), snapshot.args(&snapshot.socket(), &args));
        for _ in 0..3 {
            let mut vmm = snapshot.vmm(&["small:16"]);
            is_held.store(true, Ordering::SeqCst);
            vmm.tell("touch 16 5");
            wait_until("the fault's chunk is asked for", || is_asked.swap(false, Ordering::SeqCst));
            let worker = daemon.worker();
            kill_process(worker, Signal::STOP).unwrap();
            is_held.store(false, Ordering::SeqCst);
            // It is about time that passes here.
            std::thread::park_timeout(Duration::from_millis(2500));
            kill_process(worker, Signal::CONT).unwrap();
            let _ = vmm.answer();
            vmm.assert_right();
        }
        assert!(!daemon.has_said("no answer within"), "{:#?}", daemon.said());
    });
}
