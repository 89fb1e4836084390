//! Connections that are cut in the middle of a push, a check and a pull, as by a proxy that reloads.

use postcopy_tests::chaos::within;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::noise;
use postcopy_tests::proxy::{Break, Direction, How, Proxy};
use postcopy_tests::server::Server;
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
