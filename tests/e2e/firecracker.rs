//! `postcopy firecracker`, against a stand-in for Firecracker: every byte of guests that run, with workers that are killed.

mod ends;
mod idle;
mod strangers;

use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::descriptors;
use postcopy_tests::faulter::{EVENT_REMOVE, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::pool::HugePool;
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::{is_root, resident_kib, skip, wait_until};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
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

    /// Has the image's tag name another image.
    fn move_tag(&self) {
        let moved = self.folder.path().join("moved");
        std::fs::create_dir(&moved).unwrap();
        std::fs::write(moved.join("guest.mem"), memory_like(16 << 20, 902)).unwrap();
        let _ = run(self.server.address(), [OsStr::new("push"), moved.as_os_str(), OsStr::new("vm")]);
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
fn a_pool_of_huge_pages_that_is_short_is_told_of_when_it_begins_and_ends() {
    with_root("a_pool_of_huge_pages_that_is_short_is_told_of_when_it_begins_and_ends", || {
        let snapshot = Snapshot::push(16);
        let pool = HugePool::with_free(4);
        let daemon = snapshot.daemon(&["--fill", "nothing"]);
        let mut vmm = snapshot.vmm(&["huge:16"]);
        assert!(!daemon.has_said("huge page"), "{:#?}", daemon.said());
        vmm.tell("check");
        daemon.assert_says(&format!("process {}: no free huge page of 2 MiB: its fault waits", vmm.pid()));
        // It lasts, and is told of once.
        std::thread::park_timeout(Duration::from_secs(3));
        pool.set_free(8);
        assert_eq!(vmm.answer(), "wrong 0");
        daemon.assert_says(&format!("process {}: no fault waits for a free huge page", vmm.pid()));
        let told = daemon.said().iter().filter(|line| line.contains("no free huge page")).count();
        assert_eq!(told, 1, "{:#?}", daemon.said());
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
            // With a fault that somebody has read who dies then.
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
fn a_machine_that_is_left_asleep_has_told_what_it_touched() {
    with_root("a_machine_that_is_left_asleep_has_told_what_it_touched", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&["--record", "--grace", "0s"]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        vmm.tell("touch 8 5");
        assert_eq!(vmm.touches().wrong, 0);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.assert_says(&format!("postcopy firecracker --adopt {} --image vm", vmm.pid()));
        let sets = run(snapshot.server.address(), ["working-set", "ls"]);
        assert!(sets[0]["pages"].as_u64().is_some_and(|pages| pages >= 512), "{sets}");
    });
}

#[test]
fn what_a_machine_has_touched_is_told_when_it_is_asked_for() {
    with_root("what_a_machine_has_touched_is_told_when_it_is_asked_for", || {
        let snapshot = Snapshot::push(32);
        let server = snapshot.server.address();
        let send = |pid: u32, daemon: &Daemon| {
            let (pid, root) = (pid.to_string(), daemon.root().display().to_string());
            ["working-set".into(), "send".into(), pid, "--runtime-dir".into(), root]
        };
        let is_sent = |args: [String; 5]| postcopy(server, args).status().unwrap().success();
        let mut daemon = snapshot.daemon(&["--record"]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        vmm.tell("touch 8 5");
        assert_eq!(vmm.touches().wrong, 0);
        assert!(is_sent(send(vmm.pid(), &daemon)));
        let sets = run(server, ["working-set", "ls"]);
        assert_eq!(sets[0]["recordings"], 1, "of one machine: {sets}");
        assert!(sets[0]["pages"].as_u64().is_some_and(|pages| pages >= 512), "{sets}");
        // What another worker serves, too; the first one may have told of it before.
        let mut other = snapshot.vmm(&["small:32"]);
        daemon.kill_worker();
        other.tell("touch 8 5");
        assert_eq!(other.touches().wrong, 0);
        assert!(is_sent(send(other.pid(), &daemon)));
        assert!(run(server, ["working-set", "ls"])[0]["recordings"].as_u64() >= Some(2));
        // And what nobody can tell is refused.
        let stranger = daemon.guardian();
        assert!(fail(server, send(stranger, &daemon)).contains(&format!("serves process {stranger}")));
        drop((vmm, other, daemon));
        let quiet = snapshot.daemon(&[]);
        let vmm = snapshot.vmm(&["small:32"]);
        let refused = format!(
            "process {}: page faults of this session are not recorded. Start the daemon with --record",
            vmm.pid()
        );
        assert!(fail(server, send(vmm.pid(), &quiet)).contains(&refused));
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

#[test]
fn a_tag_that_moves_changes_nothing_for_a_daemon_that_runs() {
    with_root("a_tag_that_moves_changes_nothing_for_a_daemon_that_runs", || {
        let snapshot = Snapshot::push(16);
        let mut daemon = snapshot.daemon(&[]);
        let mut first = snapshot.vmm(&["small:16"]);
        snapshot.move_tag();
        snapshot.vmm(&["small:16"]).assert_right();
        daemon.kill_worker();
        snapshot.vmm(&["small:16"]).assert_right();
        first.assert_right();
    });
}

/// Whether a server holds the lease of an image.
fn has_lease(store: &StoreDir) -> bool {
    let leases = store.domain().join("leases");
    let files = std::fs::read_dir(leases).into_iter().flatten().flatten();
    let is_held = |path: PathBuf| File::open(path).is_ok_and(|file| file.try_lock().is_err());
    files.map(|entry| entry.path()).any(is_held)
}

#[test]
fn an_idle_daemon_keeps_its_image_from_the_collector() {
    with_root("an_idle_daemon_keeps_its_image_from_the_collector", || {
        let snapshot = Snapshot::push(16);
        let listen = format!("unix:{}", snapshot.folder.path().join("server.sock").display());
        let mut server = Server::on(snapshot.server.store(), &listen);
        let mut daemon = Daemon::start(server.address(), snapshot.args(&snapshot.socket(), &[]));
        snapshot.move_tag();
        let store = StoreDir::of(&snapshot.server);
        let collect = || assert_eq!(store.gc(&["--grace", "0s"])["manifests"], 0, "the image is collected");
        // From when it says that it serves,
        collect();
        // after a restart of the server,
        server.kill();
        assert!(!has_lease(&store));
        server = Server::on(snapshot.server.store(), &listen);
        wait_until("the lease", || has_lease(&store));
        collect();
        // and by the next worker.
        daemon.kill_worker();
        wait_until("the lease", || has_lease(&store));
        collect();
        snapshot.vmm(&["small:16"]).assert_right();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        wait_until("the lease's end", || !has_lease(&store));
        drop(server);
    });
}

#[test]
fn an_image_that_is_gone_from_the_server_is_named_once_and_when_it_is_back() {
    with_root("an_image_that_is_gone_from_the_server_is_named_once_and_when_it_is_back", || {
        let snapshot = Snapshot::push(16);
        let listen = format!("unix:{}", snapshot.folder.path().join("server.sock").display());
        let mut server = Server::on(snapshot.server.store(), &listen);
        let daemon = Daemon::start(server.address(), snapshot.args(&snapshot.socket(), &[]));
        snapshot.move_tag();
        server.kill();
        let collected = StoreDir::of(&snapshot.server).gc(&["--grace", "0s"]);
        assert_ne!(collected["manifests"], 0, "{collected}");
        let server = Server::on(snapshot.server.store(), &listen);
        daemon.assert_says("image vm:latest (blake3:");
        daemon.assert_says("is gone from server unix:");
        // It asks again, more than once in that time.
        std::thread::park_timeout(Duration::from_secs(3));
        let folder = snapshot.folder.path().join("snapshot");
        let _ = run(server.address(), [OsStr::new("push"), folder.as_os_str(), OsStr::new("back")]);
        daemon.assert_says("is on server unix:");
        let told = daemon.said().iter().filter(|line| line.contains("is gone from server")).count();
        assert_eq!(told, 1, "{:#?}", daemon.said());
        snapshot.vmm(&["small:16"]).assert_right();
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

/// Whatever an end waits for: here for a thread that does not run.
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

/// The files of this name in the runtime directory of a daemon.
fn files_of(daemon: &Daemon, name: &str) -> Vec<PathBuf> {
    let directories = std::fs::read_dir(daemon.root()).unwrap().map(|entry| entry.unwrap().path());
    directories.map(|directory| directory.join(name)).filter(|path| path.exists()).collect()
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
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
                // Who continues it has it served, if that can be done by then.
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

#[test]
fn memory_is_taken_on_when_there_are_descriptors_again() {
    with_root("memory_is_taken_on_when_there_are_descriptors_again", || {
        let snapshot = Snapshot::push(16);
        let mut daemon = snapshot.daemon(&[]);
        let worker = daemon.worker();
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let limit = |limit: Option<u64>| {
            let limit = Rlimit { current: limit, maximum };
            prlimit(Some(worker), Resource::Nofile, limit).unwrap();
        };
        let open = std::fs::read_dir(format!("/proc/{}/fd", worker.as_raw_pid())).unwrap().count() as u64;
        // For one connection, and then for all that attaching needs but the last.
        for more in 1..8 {
            limit(Some(open + more));
            let said = daemon.said().len();
            let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:16"]);
            wait_until("an attempt", || daemon.said().len() > said);
            limit(maximum);
            vmm.loaded();
            vmm.assert_right();
            let pid = vmm.pid();
            vmm.kill();
            daemon.assert_says(&format!("vm {pid}: is gone"));
        }
    });
}

#[test]
fn memory_is_taken_on_when_there_is_room_for_its_state_again() {
    with_root("memory_is_taken_on_when_there_is_room_for_its_state_again", || {
        let snapshot = Snapshot::push(4);
        let tmpfs = Tmpfs::of_bytes(4 << 20);
        let args = snapshot.args(&snapshot.socket(), &[]);
        let mut daemon = Daemon::start_in(tmpfs.path(), snapshot.server.address(), args);
        let worker = daemon.worker();
        let path = tmpfs.path().join("rest");
        let mut rest = File::create(&path).unwrap();
        while rest.write(&[1; 4096]).is_ok() {}
        let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:4"]);
        daemon.assert_says("No space left on device");
        std::fs::remove_file(path).unwrap();
        drop(rest);
        vmm.loaded();
        vmm.assert_right();
        assert_eq!(daemon.worker(), worker, "no worker was killed by a store");
    });
}

#[test]
fn handshakes_that_cannot_be_are_refused_by_the_name_of_their_process() {
    with_root("handshakes_that_cannot_be_are_refused_by_the_name_of_their_process", || {
        let snapshot = Snapshot::push(4);
        let daemon = snapshot.daemon(&[]);
        let socket = snapshot.socket();
        let mut good = snapshot.vmm(&["small:4"]);
        // One that says nothing is in nobody's way.
        let silent = UnixStream::connect(&socket).unwrap();
        let faulter = Faulter::start(EVENT_REMOVE, &["private:1024"]);
        let address = faulter.at(0, 0);
        let mapping = |address: usize, size: usize, offset: usize| {
            format!(
                r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size_kib":4096}}"#
            )
        };
        let (half, whole) = (2 << 20, 4 << 20);
        let all = mapping(address, whole, 0);
        let overlapping = format!("[{all},{}]", mapping(address + half, half, half));
        let beyond = format!("[{},{}]", mapping(address, half, 0), mapping(address + half, half, whole));
        let odd = format!("[{}]", mapping(address + 1, whole, 0));
        let elsewhere = format!("[{}]", mapping(0x1000_0000, whole, 0));
        let no_uffd = File::open("/dev/null").unwrap();
        let cases: [(&str, BorrowedFd<'_>, &str); 7] = [
            ("hello, here is a machine", faulter.uffd(), "not what Firecracker sends"),
            ("[]", faulter.uffd(), "no memory"),
            (&overlapping, faulter.uffd(), "overlaps"),
            (&beyond, faulter.uffd(), "no file of vm:latest has as many"),
            (&odd, faulter.uffd(), "multiples of 4096"),
            (&elsewhere, faulter.uffd(), "no memory registered"),
            (&format!("[{all}]"), no_uffd.as_fd(), "userfaultfd"),
        ];
        for (text, fd, reason) in cases {
            let stream = UnixStream::connect(&socket).unwrap();
            descriptors::send(&stream, fd, text);
            daemon.assert_says(reason);
        }
        let mut without = UnixStream::connect(&socket).unwrap();
        without.write_all(format!("[{all}]").as_bytes()).unwrap();
        daemon.assert_says("0 descriptors came");
        assert!(daemon.has_said(&format!("process {}: ", std::process::id())), "{:#?}", daemon.said());
        drop(silent);
        daemon.assert_says("hung up after 0 bytes");
        good.assert_right();
    });
}

#[test]
fn a_machine_whose_handshake_is_refused_is_lost_and_a_stranger_is_not() {
    with_root("a_machine_whose_handshake_is_refused_is_lost_and_a_stranger_is_not", || {
        let snapshot = Snapshot::push(4);
        for policy in ["wait", "pause", "kill", "poison"] {
            let daemon = snapshot.daemon(&["--on-loss", policy]);
            let mut good = snapshot.vmm(&["small:4"]);
            // This process sends what is no handshake of a machine, and goes on.
            let mut stranger = UnixStream::connect(snapshot.socket()).unwrap();
            stranger.write_all(b"hello, here is a machine").unwrap();
            daemon.assert_says(&format!("process {}: its handshake is not", std::process::id()));
            let with_file = UnixStream::connect(snapshot.socket()).unwrap();
            descriptors::send(&with_file, File::open("/dev/null").unwrap().as_fd(), "[]");
            daemon.assert_says("no memory");

            let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:8"]);
            daemon.assert_says(&format!("process {}: the guest has 8388608 bytes", vmm.pid()));
            match policy {
                "wait" => {
                    std::thread::park_timeout(Duration::from_millis(300));
                    assert!(!vmm.has_ended() && !is_stopped(vmm.pid()));
                }
                "pause" => wait_until("it is stopped", || is_stopped(vmm.pid())),
                _ => wait_until("it has died", || vmm.has_ended()),
            }
            let lost = format!("process {}: its memory is lost", vmm.pid());
            if policy == "wait" {
                assert!(!daemon.has_said(&lost), "{:#?}", daemon.said());
            } else {
                daemon.assert_says(&lost);
            }
            good.assert_right();
        }
    });
}

#[test]
fn a_process_that_exits_before_its_handshake_is_said_to_have_exited() {
    with_root("a_process_that_exits_before_its_handshake_is_said_to_have_exited", || {
        let snapshot = Snapshot::push(4);
        let daemon = snapshot.daemon(&["--on-loss", "kill"]);
        let script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        let mut child = Command::new("python3").arg("-c").arg(script).arg(snapshot.socket()).spawn().unwrap();
        daemon.assert_says(&format!("process {}: it has exited", child.id()));
        child.wait().unwrap();
        assert!(!daemon.has_said("hung up"), "{:#?}", daemon.said());
    });
}

#[test]
fn a_handshake_that_comes_in_pieces_is_put_together() {
    with_root("a_handshake_that_comes_in_pieces_is_put_together", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&[]);
        let mut faulter = Faulter::start(EVENT_REMOVE, &["private:1024"]);
        let text = format!(
            r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":4096}}]"#,
            faulter.at(0, 0),
            4 << 20
        );
        let mut stream = UnixStream::connect(snapshot.socket()).unwrap();
        descriptors::send(&stream, faulter.uffd(), &text[..1]);
        // A worker that dies after the first piece has lost nothing of it.
        daemon.kill_worker();
        stream.write_all(&text.as_bytes()[1..40]).unwrap();
        daemon.kill_worker();
        stream.write_all(&text.as_bytes()[40..]).unwrap();
        faulter.let_go();
        let bytes = std::fs::read(snapshot.memory()).unwrap();
        faulter.assert_reads(0, 0, &bytes);
    });
}

#[test]
fn one_daemon_serves_several_sockets_each_from_its_own_image() {
    with_root("one_daemon_serves_several_sockets_each_from_its_own_image", || {
        let snapshot = Snapshot::push(8);
        let other = snapshot.folder.path().join("other");
        std::fs::create_dir(&other).unwrap();
        for (name, seed) in [("a.mem", 910), ("b.mem", 911)] {
            std::fs::write(other.join(name), memory_like(8 << 20, seed)).unwrap();
        }
        let _ = run(snapshot.server.address(), [OsStr::new("push"), other.as_os_str(), OsStr::new("other")]);
        let sockets = ["1", "2"].map(|name| snapshot.folder.path().join(name));
        let [first, second] = sockets.each_ref().map(|path| path.to_str().unwrap());
        let args =
            ["firecracker", "--socket", first, "--image", "vm", "--socket", second, "--image", "other"];
        let ambiguous = Daemon::start(snapshot.server.address(), args);
        let _waits = Vmm::start(&sockets[1], &other.join("b.mem"), "new", &["small:8"]);
        ambiguous.assert_says("a.mem, b.mem; name one with --file");
        let mut fine = Vmm::start(&sockets[0], &snapshot.memory(), "new", &["small:8"]);
        fine.loaded();
        fine.assert_right();
        drop(ambiguous);
        let args = args.into_iter().chain(["--file", "guest.mem", "--file", "b.mem"]);
        let _daemon = Daemon::start(snapshot.server.address(), args);
        let mut vmm = Vmm::start(&sockets[1], &other.join("b.mem"), "new", &["small:8"]);
        vmm.loaded();
        vmm.assert_right();
    });
}

#[test]
fn what_must_be_local_before_a_machine_starts_is_pulled_alone() {
    let snapshot = Snapshot::push(8);
    let target = snapshot.folder.path().join("local");
    let args = [
        OsStr::new("pull"),
        OsStr::new("vm"),
        target.as_os_str(),
        OsStr::new("--only"),
        OsStr::new("*.state"),
    ];
    let pulled = run(snapshot.server.address(), args);
    assert_eq!((&pulled["entries"], &pulled["size_bytes"]), (&1.into(), &40_000.into()));
    let bytes = std::fs::read(target.join("guest.state")).unwrap();
    assert_eq!(bytes, std::fs::read(snapshot.folder.path().join("snapshot/guest.state")).unwrap());
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
    let none = snapshot.folder.path().join("none");
    let args = [
        OsStr::new("pull"),
        OsStr::new("vm"),
        none.as_os_str(),
        OsStr::new("--only"),
        OsStr::new("*.nothing"),
    ];
    assert!(fail(snapshot.server.address(), args).contains("no file of vm:latest matches"));
    assert!(!none.exists());
}

#[test]
fn systemd_is_told_when_it_serves() {
    with_root("systemd_is_told_when_it_serves", || {
        let snapshot = Snapshot::push(4);
        let path = snapshot.folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let root = postcopy_tests::daemon::runtime_root();
        let mut command = postcopy(snapshot.server.address(), snapshot.args(&snapshot.socket(), &[]));
        command.env("NOTIFY_SOCKET", &path);
        let mut daemon = Daemon::spawn_as(root.path(), command);
        let mut said = [0; 100];
        let len = systemd.recv(&mut said).unwrap();
        assert_eq!(std::str::from_utf8(&said[..len]).unwrap().trim(), "READY=1");
        // Who has connected by then is served.
        snapshot.vmm(&["small:4"]).assert_right();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

#[test]
fn what_a_machine_has_touched_comes_ahead_the_next_time() {
    with_root("what_a_machine_has_touched_comes_ahead_the_next_time", || {
        let snapshot = Snapshot::push(64);
        let traces = tempfile::tempdir().unwrap();
        let mut daemon = snapshot.daemon(&["--record", "--trace", traces.path().to_str().unwrap()]);
        let mut vmm = snapshot.vmm(&["small:64"]);
        let touch = |vmm: &mut Vmm| {
            vmm.tell("touch 16 3");
            assert_eq!(vmm.touches().wrong, 0);
        };
        touch(&mut vmm);
        // Who takes over goes on recording: what was there before it counts as brought.
        daemon.kill_worker();
        vmm.tell("touch 8 4");
        assert_eq!(vmm.touches().wrong, 0);
        let pid = vmm.pid();
        vmm.kill();
        wait_until("the machine's end", || daemon.has_said(&format!("vm {pid}: is gone")));
        let sets = run(snapshot.server.address(), ["working-set", "ls"]);
        let pages = sets[0]["pages"].as_u64().unwrap();
        assert!((512..6144 + 16).contains(&pages), "{sets}");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        // Each worker writes one: the first of them was killed.
        let traces = std::fs::read_dir(traces.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut traces: Vec<_> = traces.collect();
        traces.sort_unstable();
        let reports =
            traces.iter().map(|trace| run(snapshot.server.address(), ["report", trace.to_str().unwrap()]));
        let told = reports.map(|report| {
            assert!(report["pages"]["touched"].as_u64().unwrap() >= 100, "{report}");
            report["is_complete"].as_bool().unwrap()
        });
        assert_eq!(told.collect::<Vec<_>>(), [false, true]);

        let daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:64"]);
        wait_until("the set is there", || resident_kib(vmm.pid()) >= pages * 4);
        touch(&mut vmm);
        vmm.assert_right();
        drop(daemon);

        let traces = tempfile::tempdir().unwrap();
        let options = ["--no-working-set", "--trace", traces.path().to_str().unwrap()];
        let mut daemon = snapshot.daemon(&options);
        let mut vmm = snapshot.vmm(&["small:64"]);
        touch(&mut vmm);
        vmm.kill();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        let trace = std::fs::read_dir(traces.path()).unwrap().next().unwrap().unwrap().path();
        let report = run(snapshot.server.address(), ["report", trace.to_str().unwrap()]);
        assert_eq!(report["pages"]["working_set"], 0, "{report}");
    });
}
