//! Machines that run while their memory arrives: on small and huge pages, from one image and from
//! several.

use super::{Snapshot, with_root};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::pool::HugePool;
use postcopy_tests::vmm::Vmm;
use std::ffi::OsStr;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

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
        // The shortage lasts, and the log reports it once.
        std::thread::park_timeout(Duration::from_secs(3));
        pool.set_free(8);
        assert_eq!(vmm.answer(), "wrong 0");
        daemon.assert_says(&format!("process {}: no fault waits for a free huge page", vmm.pid()));
        let told = daemon.said().iter().filter(|line| line.contains("no free huge page")).count();
        assert_eq!(told, 1, "{:#?}", daemon.said());
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
        // A machine that connects before this is served.
        snapshot.vmm(&["small:4"]).assert_right();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}
