//! Connections that are cut in the middle of a push, a check and a pull, as by a proxy that reloads.

use postcopy_tests::chaos::within;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::noise;
use postcopy_tests::proxy::{Break, Direction, How, Proxy};
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use postcopy_tests::wait_until;
use std::fs;
use std::time::Duration;

const WATCHDOG: Duration = Duration::from_secs(120);
const BYTES: usize = 8 << 20;
/// Bytes after which connections are cut, in both directions. A pull that is cut before it has the
/// image's root ends with an error.
const CUTS: [(Direction, u64); 5] = [
    (Direction::ToServer, 500),
    (Direction::ToServer, 3 << 20),
    (Direction::ToServer, BYTES as u64 - 1),
    (Direction::ToClient, 100 << 10),
    (Direction::ToClient, BYTES as u64 - 1),
];

#[test]
fn transfers_survive_connections_that_are_cut_once() {
    within(WATCHDOG, || {
        let server = Server::start();
        let folder = tempfile::tempdir().unwrap();
        let mem = folder.path().join("mem");
        let (mem_name, mut cut) = (mem.to_str().unwrap(), 0);
        for (seed, (direction, bytes)) in (1..).zip(CUTS) {
            for how in [How::Close, How::Reset] {
                let content = noise(BYTES, seed);
                fs::write(&mem, &content).unwrap();
                let cutting = || Proxy::start(server.address(), Break::Once { direction, bytes, how });
                let target = folder.path().join(format!("{bytes}-{direction:?}-{how:?}"));
                let proxies = [cutting(), cutting(), cutting()];
                let _ = run(proxies[0].address(), ["push", mem_name, "app"]);
                let _ = run(proxies[1].address(), ["verify", "app"]);
                let _ = run(proxies[2].address(), ["pull", "app", target.to_str().unwrap()]);
                assert!(fs::read(target.join("mem")).unwrap() == content, "a wrong byte");
                cut += proxies.iter().filter(|proxy| proxy.bytes(direction) > bytes).count();
            }
        }
        assert!(cut >= 14, "only {cut} connections were cut");
    });
}

/// A server that is killed in the middle refuses connections until it runs again.
#[test]
fn a_push_survives_a_server_that_is_killed_and_starts_again() {
    within(WATCHDOG, || {
        let folder = tempfile::tempdir().unwrap();
        let (store, mem) = (folder.path().join("store"), folder.path().join("mem"));
        let content = noise(96 << 20, 9);
        fs::write(&mem, &content).unwrap();
        let mut server = Server::on(&store, "127.0.0.1:0");
        let address = server.address().clone();
        let pushing = {
            let (address, mem) = (address.clone(), mem.clone());
            std::thread::spawn(move || drop(run(&address, ["push", mem.to_str().unwrap(), "app"])))
        };
        let packs = StoreDir::new(&store);
        wait_until("a pack is stored", || packs.packs().len() > 1);
        server.kill();
        std::thread::park_timeout(Duration::from_secs(1));
        let listen = address.to_string();
        let server = Server::on(&store, listen.trim_start_matches("http://").trim_end_matches('/'));
        pushing.join().unwrap();
        let target = folder.path().join("pulled");
        let _ = run(server.address(), ["pull", "app", target.to_str().unwrap()]);
        assert!(fs::read(target.join("mem")).unwrap() == content, "a wrong byte");
    });
}
