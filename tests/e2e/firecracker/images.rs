//! The image of a daemon that runs: its tag moves, the collector runs, the server has lost it.

use super::{Snapshot, with_root};
use postcopy_tests::cli::run;
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use postcopy_tests::wait_until;
use std::ffi::OsStr;
use std::time::Duration;

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
        assert!(!store.has_lease());
        server = Server::on(snapshot.server.store(), &listen);
        wait_until("the lease", || store.has_lease());
        collect();
        // and by the next worker.
        daemon.kill_worker();
        wait_until("the lease", || store.has_lease());
        collect();
        snapshot.vmm(&["small:16"]).assert_right();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        wait_until("the lease's end", || !store.has_lease());
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
