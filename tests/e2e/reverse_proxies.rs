//! A server behind nginx and HAProxy, configured as docs/OPERATIONS.md shows.

use crate::map::random_pages;
use postcopy::{Options, Region, ServerAddress, Session};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::noise;
use postcopy_tests::reverse_proxy::{Kind, ReverseProxy};
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, skip, wait_until};
use std::ffi::OsStr;
use std::fs;
use std::time::{Duration, Instant};

const WATCHDOG: Duration = Duration::from_secs(150);
const MINUTE: Duration = Duration::from_secs(60);
const PAGES: usize = 4096;

/// Sends all kinds of requests: a push, restores, and those of the commands.
fn every_request_works(proxy: &ServerAddress, bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("mem"), folder.path().join("out"));
    fs::write(&path, bytes).unwrap();
    let push = ["push".as_ref(), path.as_os_str(), "app".as_ref(), "--chunk-size".as_ref(), "4096".as_ref()];
    let _ = run::<&OsStr>(proxy, push);
    let _ = run(proxy, ["verify", "app"]);
    let _ = run(proxy, ["pull".as_ref(), "app".as_ref(), out.as_os_str()]);
    assert!(fs::read(out.join("mem")).unwrap() == bytes);
    let images = run(proxy, ["ls"]);
    assert_eq!(images[0]["reference"], "app:latest", "{images}");

    let recording = open(proxy, Options::DEFAULT.record(true));
    let region = recording.map("mem").unwrap();
    let pages = random_pages(bytes.len());
    pages[..500].iter().for_each(|page| touch(&region, bytes, *page));
    drop(region);
    assert!(recording.close(MINUTE));
    recording.wait_recorded(MINUTE).unwrap();
    let sets = run(proxy, ["working-set", "ls"]);
    assert_eq!(sets[0]["pages"], 500, "{sets}");

    let restore = open(proxy, Options::DEFAULT.working_set(true));
    let region = restore.map("mem").unwrap();
    wait_until("the working set is there", || restore.progress().resident_pages == 500);
    restore.fill().unwrap();
    restore.wait_resident(MINUTE).unwrap();
    assert!(*region == *bytes, "a wrong byte");
    assert_eq!((restore.error(), restore.failures().count), (None, 0));
}

fn open(proxy: &ServerAddress, options: Options) -> Session {
    Session::open(proxy, &"app".parse().unwrap(), options).unwrap()
}

fn touch(region: &Region, bytes: &[u8], page: usize) {
    let at = page * PAGE..(page + 1) * PAGE;
    assert!(region[at.clone()] == bytes[at], "page {page}");
}

fn as_documented(name: &str, kind: Kind) {
    if let Some(why) = kind.missing() {
        return skip(name, &why);
    }
    within(WATCHDOG, move || {
        let server = Server::start();
        let proxy = ReverseProxy::start(kind, server.address(), &[]);
        every_request_works(proxy.address(), &noise(PAGES * PAGE, 91));
    });
}

/// Time-outs of a second, as few requests a connection as the proxy can have, and reloads that end all connections.
fn nervous(name: &str, kind: Kind, changes: &'static [(&'static str, &'static str)]) {
    if let Some(why) = kind.missing() {
        return skip(name, &why);
    }
    within(WATCHDOG, move || {
        let (server, bytes) = (Server::start(), noise(PAGES * PAGE, 92));
        let proxy = ReverseProxy::start(kind, server.address(), changes);
        every_request_works(proxy.address(), &bytes);

        let session = open(proxy.address(), Options::DEFAULT);
        let region = session.map("mem").unwrap();
        let pages = random_pages(bytes.len());
        let mut pages = pages.iter().map(|page| touch(&region, &bytes, *page));
        for _ in 0..2 {
            pages.next();
            let paused = Instant::now();
            wait_until("the time-outs of the proxy end", || paused.elapsed() > Duration::from_millis(2500));
        }
        for _ in 0..4 {
            let old = proxy.workers();
            assert!(!old.is_empty(), "the proxy's workers are its children");
            proxy.reload();
            wait_until("the reload is complete", || {
                pages.next();
                let workers = proxy.workers();
                !workers.is_empty() && workers.is_disjoint(&old)
            });
        }
        pages.for_each(drop);
        assert_eq!((session.error(), session.failures().count), (None, 0));
    });
}

#[test]
fn everything_works_behind_nginx() {
    as_documented("reverse_proxies::everything_works_behind_nginx", Kind::Nginx);
}

#[test]
fn everything_works_behind_haproxy() {
    as_documented("reverse_proxies::everything_works_behind_haproxy", Kind::HaProxy);
}

#[test]
fn no_fault_is_lost_behind_an_nginx_that_ends_connections() {
    let name = "reverse_proxies::no_fault_is_lost_behind_an_nginx_that_ends_connections";
    nervous(name, Kind::Nginx, &[("1h", "1s"), ("keepalive_requests 10000", "keepalive_requests 2")]);
}

#[test]
fn no_fault_is_lost_behind_a_haproxy_that_ends_connections() {
    let name = "reverse_proxies::no_fault_is_lost_behind_a_haproxy_that_ends_connections";
    nervous(name, Kind::HaProxy, &[("1h", "1s")]);
}
