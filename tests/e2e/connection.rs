//! Connections that are refused, cut, reset or stalled: an error or the right bytes, never zeros and never a hang.

use crate::map::{push, random_pages};
use postcopy::{FailureEnd, LossPolicy, Options, ServerAddress, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::proxy::{Break, Direction, How, Proxy};
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, wait_until};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::Semaphore;

const WATCHDOG: Duration = Duration::from_secs(120);

fn deadline(fault_deadline: Duration) -> Options {
    Options::DEFAULT.fault_deadline(fault_deadline)
}

/// A server that has the image `app` of one file, `mem`, in chunks of one page.
struct Source {
    server: Server,
    bytes: Vec<u8>,
    folder: TempDir,
}

impl Source {
    fn start(bytes: Vec<u8>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::on(&folder.path().join("store"), "127.0.0.1:0");
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes).unwrap();
        push(&server, &path, "app", PAGE);
        Self { server, bytes, folder }
    }

    /// Another server on the same store and port, once the first one has ended.
    fn start_again(&self) -> Server {
        let listen = self.server.address().to_string();
        let listen = listen.trim_start_matches("http://").trim_end_matches('/');
        Server::on(&self.folder.path().join("store"), listen)
    }

    fn proxy(&self, when: Break) -> Proxy {
        Proxy::start(self.server.address(), when)
    }
}

fn open(address: &ServerAddress, options: Options) -> Result<Session, postcopy::SessionError> {
    Session::open(address, &"app".parse().unwrap(), options)
}

/// Opens, maps, and reads everything: errors name the server, and what is read is right. Whether all was read.
fn all_or_an_error(proxy: &Proxy, bytes: &[u8], options: Options, what: &str) -> bool {
    let server = proxy.address().to_string();
    let session = match open(proxy.address(), options) {
        Ok(session) => session,
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains(&server), "{what}: the error does not name the server: {error}");
            return false;
        }
    };
    let region = session.map("mem").unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut buffer = vec![0xA5; PAGE];
    for (page, expected) in bytes.chunks(PAGE).enumerate() {
        match region.read_at(page * PAGE, &mut buffer[..expected.len()]) {
            Ok(()) => assert!(buffer[..expected.len()] == *expected, "{what}: page {page} has wrong bytes"),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains(&server), "{what}: the error does not name the server: {error}");
                assert!(!region.is_resident(page * PAGE), "{what}: page {page} is lost and resident");
                return false;
            }
        }
    }
    true
}

/// The bytes that an undisturbed session takes until all is read, that way.
fn undisturbed(source: &Source, direction: Direction) -> u64 {
    let proxy = source.proxy(Break::Never);
    assert!(all_or_an_error(&proxy, &source.bytes, deadline(Duration::from_secs(10)), "undisturbed"));
    proxy.bytes(direction)
}

/// Byte counts to cut at: many at the beginning, where the handshakes are, and then every so many.
fn cuts(most: u64) -> Vec<u64> {
    let first = [0, 1, 9, 23, 24, 25, 33, 40, 60, 80, 100, 130, 160, 200, 250, 300, 400, 500, 600, 800];
    let mut cuts: Vec<_> = first.into_iter().filter(|at| *at < most).collect();
    cuts.extend((1..24).map(|i| most * i / 24));
    cuts.extend([most - 1, most]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// Every way to break a connection after each number of bytes, on four threads; how often all was read nevertheless,
/// and how often not.
fn at_each_step(make: fn(Direction, u64, How) -> Break, options: Options) -> (usize, usize) {
    let source = Source::start(noise(3 * PAGE + 5, 1));
    let ways = [Direction::ToServer, Direction::ToClient];
    let mut cases = Vec::new();
    for direction in ways {
        for at in cuts(undisturbed(&source, direction)) {
            cases.extend([How::Close, How::Reset].map(|how| make(direction, at, how)));
        }
    }
    let (next, read, not_read) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(when) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let proxy = source.proxy(*when);
                    let all = all_or_an_error(&proxy, &source.bytes, options, &format!("{when:?}"));
                    (if all { &read } else { &not_read }).fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    (read.into_inner(), not_read.into_inner())
}

#[test]
fn a_server_that_is_lost_at_any_step_is_an_error() {
    within(WATCHDOG, || {
        let make = |direction, bytes, how| Break::All { direction, bytes, how };
        let (read, not_read) = at_each_step(make, deadline(Duration::from_millis(300)));
        eprintln!("{read} read all, {not_read} did not");
        assert!(not_read > read, "cuts come too late to be of use");
    });
}

#[test]
fn a_connection_that_is_lost_once_at_any_step_is_an_error_or_is_made_again() {
    within(WATCHDOG, || {
        let make = |direction, bytes, how| Break::Once { direction, bytes, how };
        let (read, not_read) = at_each_step(make, deadline(Duration::from_secs(20)));
        eprintln!("{read} read all, {not_read} did not");
        assert!(
            read > 0 && not_read > 0,
            "{read} read all, {not_read} did not: opening is not cut, or nothing else"
        );
    });
}

#[test]
fn a_refused_connection_is_an_error_that_names_the_server() {
    within(WATCHDOG, || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address: ServerAddress = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        let error = open(&address, Options::DEFAULT).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("refused"), "{error}");
    });
}

#[test]
fn a_server_that_goes_silent_is_an_error_before_long() {
    within(WATCHDOG, || {
        let source = Source::start(noise(PAGE, 1));
        let opening = undisturbed(&source, Direction::ToClient);
        std::thread::scope(|scope| {
            for bytes in [0, 1, 30, opening / 4, opening / 2, opening * 3 / 4] {
                let source = &source;
                scope.spawn(move || {
                    let when = Break::All { direction: Direction::ToClient, bytes, how: How::Stall };
                    let started = Instant::now();
                    let options = deadline(Duration::from_secs(2));
                    let read =
                        all_or_an_error(&source.proxy(when), &source.bytes, options, &format!("{when:?}"));
                    assert!(!read, "{when:?} did not stall");
                    assert!(started.elapsed() < Duration::from_secs(31), "{when:?}: {:?}", started.elapsed());
                });
            }
        });
    });
}

/// Each connection carries a few pages and is cut; faults are outstanding all the time.
#[test]
fn cuts_while_faults_are_outstanding_are_not_noticed() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(2 << 20, 3));
        for how in [How::Close, How::Reset] {
            let proxy = source.proxy(Break::Never);
            let session = open(proxy.address(), deadline(Duration::from_secs(30))).unwrap();
            let region = session.map("mem").unwrap();
            proxy.set(Break::Each { direction: Direction::ToClient, bytes: 20_000, how });
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    let pages = random_pages(source.bytes.len());
                    let (region, bytes) = (&region, &source.bytes);
                    scope.spawn(move || {
                        for page in pages {
                            let at = page * PAGE..(page + 1) * PAGE;
                            assert!(region[at.clone()] == bytes[at], "page {page}");
                        }
                    });
                }
            });
            assert_eq!(session.error(), None);
            assert!(proxy.connections() > 10, "{how:?}: only {} connections", proxy.connections());
        }
    });
}

#[test]
fn cuts_of_the_fill_are_not_noticed() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 << 20, 3));
        for how in [How::Close, How::Reset] {
            let when = Break::Each { direction: Direction::ToClient, bytes: 600_000, how };
            let proxy = source.proxy(when);
            let session = open(proxy.address(), Options::DEFAULT.fill(true)).unwrap();
            let region = session.map("mem").unwrap();
            session.wait_resident(Duration::from_secs(60)).unwrap();
            assert!(*region == source.bytes[..], "{how:?}: a wrong byte");
            assert!(proxy.connections() > 4, "{how:?}: only {} connections", proxy.connections());
        }
    });
}

#[test]
fn a_server_that_never_comes_back_is_an_error_after_the_deadline() {
    within(WATCHDOG, || {
        let mut source = Source::start(memory_like(1 << 20, 3));
        let session = open(source.server.address(), deadline(Duration::from_secs(1))).unwrap();
        let region = session.map("mem").unwrap();
        assert_eq!(region[0], source.bytes[0]);
        source.server.kill();
        let started = Instant::now();
        let lost = region.read_at(10 * PAGE, &mut [0; 100]).unwrap_err().to_string();
        assert!(lost.contains("chunk 10 of image"), "{lost}");
        assert!(lost.contains(&source.server.address().to_string()), "{lost}");
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(10), "{took:?}");
        assert_eq!(session.progress().poisoned_pages, 1);
        // What was there before stays; what was not is lost in its turn.
        assert_eq!(region[1], source.bytes[1]);
        region.read_at(20 * PAGE, &mut [0; 100]).unwrap_err();
        assert_eq!(session.progress().poisoned_pages, 2);

        // Somebody serves again, after all: the fill brings what was lost, too.
        let again = source.start_again();
        session.fill().unwrap();
        wait_until("all is resident", || {
            let progress = session.progress();
            progress.resident_pages == progress.total_pages
        });
        assert!(*region == source.bytes[..], "a wrong byte");
        drop(again);
    });
}

#[test]
fn each_outage_is_a_failure_and_ends_when_the_server_is_back() {
    within(WATCHDOG, || {
        let mut source = Source::start(noise(1 << 20, 5));
        let options = deadline(Duration::from_millis(500)).on_loss(LossPolicy::Wait).fill(false);
        let session = open(source.server.address(), options).unwrap();
        let region = session.map("mem").unwrap();
        let mut again = None;
        for outage in 0..2_u64 {
            let at = (3 + usize::try_from(outage).unwrap()) * PAGE;
            match again.take() {
                None => source.server.kill(),
                Some(server) => drop::<Server>(server),
            }
            std::thread::scope(|scope| {
                let touch = scope.spawn(|| assert_eq!(region[at], source.bytes[at]));
                wait_until("it is a failure", || session.failures().count == outage + 1);
                let failure = session.failures().last.unwrap();
                assert!(failure.end.is_none() && session.failures().open == 1, "{failure:?}");
                assert!(failure.reason.contains("not reachable ("), "it says why: {failure:?}");
                again = Some(source.start_again());
                touch.join().unwrap();
            });
            wait_until("it has ended", || session.failures().open == 0);
            assert_eq!(session.failures().last.unwrap().end.unwrap().0, FailureEnd::Recovered);
        }
        // A failure that has ended does not end the wait.
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        assert!(*region == source.bytes[..], "a wrong byte");
    });
}

/// Under [`LossPolicy::Wait`], the deadline reports and does not decide.
#[test]
fn a_touch_waits_for_a_server_that_comes_back_after_the_deadline() {
    within(WATCHDOG, || {
        let mut source = Source::start(memory_like(1 << 20, 3));
        let options = deadline(Duration::from_millis(500)).on_loss(LossPolicy::Wait);
        let session = open(source.server.address(), options).unwrap();
        let region = session.map("mem").unwrap();
        assert_eq!(region[0], source.bytes[0]);
        source.server.kill();
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| region[10 * PAGE..12 * PAGE].to_vec());
            let lost = session.wait_error(Duration::from_secs(20)).unwrap();
            assert!(lost.contains("chunk 10 of image"), "{lost}");
            assert!(!toucher.is_finished(), "it saw something");
            let again = source.start_again();
            assert!(toucher.join().unwrap() == source.bytes[10 * PAGE..12 * PAGE], "a wrong byte");
            drop(again);
        });
        assert_eq!(session.progress().poisoned_pages, 0);
    });
}

/// A connection that carries nothing any more is noticed, and made again, before the faults' deadline.
#[test]
fn a_connection_that_goes_silent_is_made_again() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 << 20, 3));
        std::thread::scope(|scope| {
            for fill in [false, true] {
                let source = &source;
                scope.spawn(move || {
                    let proxy = source.proxy(Break::Never);
                    let options = Options::DEFAULT.fill(fill);
                    let session = open(proxy.address(), options).unwrap();
                    let region = session.map("mem").unwrap();
                    assert_eq!(region[0], source.bytes[0]);
                    proxy.end_all(How::Stall);
                    if fill {
                        session.wait_resident(Duration::from_secs(60)).unwrap();
                    }
                    assert!(*region == source.bytes[..], "a wrong byte");
                });
            }
        });
    });
}

#[test]
fn a_server_that_comes_back_within_the_deadline_is_not_missed() {
    within(WATCHDOG, || {
        let mut source = Source::start(memory_like(1 << 20, 3));
        let session = open(source.server.address(), deadline(Duration::from_secs(30))).unwrap();
        let region = session.map("mem").unwrap();
        assert_eq!(region[0], source.bytes[0]);
        source.server.kill();
        std::thread::scope(|scope| {
            let touchers: Vec<_> = (0..4)
                .map(|thread| {
                    let (region, bytes) = (&region, &source.bytes);
                    scope.spawn(move || {
                        let at = (10 + thread) * PAGE..bytes.len();
                        assert!(region[at.clone()] == bytes[at], "a wrong byte");
                    })
                })
                .collect();
            wait_until("faults are outstanding", || session.progress().faults >= 5);
            assert!(touchers.iter().all(|toucher| !toucher.is_finished()));
            let again = source.start_again();
            touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
            drop(again);
        });
        assert_eq!(session.error(), None);
    });
}

/// The fill lives through a restart of its server, too.
#[test]
fn connections_that_all_end_at_once_are_made_again() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 << 20, 3));
        let proxy = source.proxy(Break::Never);
        let session = open(proxy.address(), Options::DEFAULT.fill(true)).unwrap();
        let region = session.map("mem").unwrap();
        for round in 0..10 {
            proxy.end_all(if round % 2 == 0 { How::Close } else { How::Reset });
            for page in random_pages(source.bytes.len()).into_iter().take(50) {
                let at = page * PAGE..(page + 1) * PAGE;
                assert!(region[at.clone()] == source.bytes[at], "page {page}");
            }
        }
        session.wait_resident(Duration::from_secs(60)).unwrap();
        assert!(*region == source.bytes[..], "a wrong byte");
    });
}

/// A session that is opened, and a touch, do not wait until the server says that it takes the demand lane's requests.
#[test]
fn nobody_waits_for_the_demand_lane_s_first_word() {
    within(WATCHDOG, || {
        let source = Source::start(noise(8 * PAGE, 51));
        let permits = Arc::new(Semaphore::new(0));
        let chaos = Chaos::start(source.server.address(), Lies::default().taken(Arc::clone(&permits)));
        let session = open(chaos.address(), Options::DEFAULT).unwrap();
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| region[5 * PAGE..6 * PAGE] == source.bytes[5 * PAGE..6 * PAGE]);
            wait_until("it is asked for", || chaos.asked().demand().contains_key(&5));
            assert!(!toucher.is_finished());
            permits.add_permits(1);
            assert!(toucher.join().unwrap(), "wrong bytes");
        });
    });
}
