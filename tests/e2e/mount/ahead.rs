//! Pages that are in the page cache before a program asks for them.

use super::{as_root, push};
use postcopy::{Options, Session};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::daemon::runtime_root;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::mounted::{Mounted, cached_pages};
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, wait_until};
use rustix::process::{Signal, kill_process};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const CHUNK: usize = 64 << 10;
const CHUNK_PAGES: usize = CHUNK / PAGE;
const MINUTE: Duration = Duration::from_secs(60);

/// A server with the image app:v1, whose file mem has these bytes, and the mount.
struct Bench {
    server: Server,
    mounted: Mounted,
    path: PathBuf,
    bytes: Vec<u8>,
    _folder: tempfile::TempDir,
}

fn start(bytes: Vec<u8>, arguments: &[&str]) -> Bench {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mem = folder.path().join("mem");
    fs::write(&mem, &bytes).unwrap();
    push(&server, &mem, "app:v1", CHUNK);
    let mounted = Mounted::start(server.address(), arguments);
    let path = mounted.image("app", "v1").join("mem");
    Bench { server, mounted, path, bytes, _folder: folder }
}

impl Bench {
    fn read(&self, at: usize, len: usize) {
        let mut read = vec![0; len];
        File::open(&self.path).unwrap().read_exact_at(&mut read, at as u64).unwrap();
        assert!(read == self.bytes[at..at + len], "wrong bytes at {at}");
    }

    /// Reads the whole file, and compares it.
    fn read_all(&self) {
        assert!(fs::read(&self.path).unwrap() == self.bytes, "wrong bytes");
    }

    /// Waits until each of these pages has been in the page cache, and no other one. Under a
    /// hypervisor that takes memory back, pages may leave it at any time.
    fn wait_for(&self, what: &str, expected: impl IntoIterator<Item = usize>) {
        let expected: BTreeSet<usize> = expected.into_iter().collect();
        let mut seen = BTreeSet::new();
        wait_until(what, || {
            seen.extend(self.cached());
            seen.is_superset(&expected)
        });
        assert_eq!(seen.difference(&expected).collect::<Vec<_>>(), [&0; 0], "{what}: other pages");
    }

    fn cached(&self) -> impl Iterator<Item = usize> {
        let pages = cached_pages(&self.path).into_iter().enumerate();
        pages.filter_map(|(page, is_cached)| is_cached.then_some(page))
    }
}

#[test]
fn the_rest_of_a_chunk_follows_the_page_that_was_read() {
    as_root("mount::ahead::the_rest_of_a_chunk_follows_the_page_that_was_read", || {
        let bench = start(noise((8 << 20) + 5 * PAGE + 7, 8), &["--read-ahead", "4096"]);
        let last_chunk = bench.bytes.len() / CHUNK * CHUNK;
        for at in [20 * CHUNK + 5 * PAGE, last_chunk + PAGE] {
            bench.read(at, PAGE);
        }
        let last_pages = last_chunk / PAGE..bench.bytes.len().div_ceil(PAGE);
        bench.wait_for("the chunks' other pages", (20 * CHUNK_PAGES..21 * CHUNK_PAGES).chain(last_pages));
        bench.read(20 * CHUNK, CHUNK);
        bench.read(last_chunk, bench.bytes.len() - last_chunk);
        assert_eq!(fs::metadata(&bench.path).unwrap().len(), bench.bytes.len() as u64);
        bench.read_all();
    });
}

#[test]
fn sequential_reads_find_their_pages_and_scattered_ones_fetch_no_more_than_their_chunks() {
    let name =
        "mount::ahead::sequential_reads_find_their_pages_and_scattered_ones_fetch_no_more_than_their_chunks";
    as_root(name, || {
        let bench = start(noise(64 << 20, 9), &["--read-ahead", "4096"]);
        let scattered: Vec<usize> = (0..20).map(|at| at * 37 % 512 + 512).collect();
        scattered.iter().for_each(|chunk| bench.read(chunk * CHUNK, PAGE));
        let pages = |chunk: &usize| chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES;
        bench.wait_for("their chunks", scattered.iter().flat_map(pages));
        (0..4).for_each(|chunk| bench.read(chunk * CHUNK, CHUNK));
        let is_ahead = |page: &usize| (4 * CHUNK_PAGES..512 * CHUNK_PAGES).contains(page);
        wait_until("what comes next", || bench.cached().filter(is_ahead).count() >= CHUNK_PAGES);
        bench.read_all();
    });
}

#[test]
fn the_working_set_of_an_image_is_there_when_a_file_of_it_is_opened() {
    as_root("mount::ahead::the_working_set_of_an_image_is_there_when_a_file_of_it_is_opened", || {
        let mut bytes = memory_like((16 << 20) + 100, 10);
        bytes[300 * PAGE..340 * PAGE].fill(0);
        let bench = start(bytes, &[]);
        let last = bench.bytes.len() / PAGE;
        let pages: Vec<usize> = (0..400).map(|at| at * 7919 % last).chain(310..330).chain([last]).collect();
        let options = Options::DEFAULT.record(true).fault_deadline(MINUTE);
        let session = Session::open(bench.server.address(), &"app:v1".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        for page in &pages {
            assert_eq!(region[page * PAGE], bench.bytes[page * PAGE]);
        }
        drop(region);
        assert!(session.close(MINUTE));
        session.wait_recorded(MINUTE).unwrap();
        drop(File::open(&bench.path).unwrap());
        bench.wait_for("the working set", pages);
        bench.read_all();
    });
}

#[test]
fn a_whole_image_is_stored_on_request_and_the_mounts_of_a_host_are_listed() {
    let name = "mount::ahead::a_whole_image_is_stored_on_request_and_the_mounts_of_a_host_are_listed";
    as_root(name, || {
        let mut bytes = noise((8 << 20) + 100, 12);
        bytes[3 << 20..4 << 20].fill(0);
        let bench = start(bytes, &[]);
        let server = bench.server.address();
        let pages = bench.bytes.len().div_ceil(PAGE);
        let warmed = bench.mounted.warm(server, &["app:v1", "--fill"]);
        assert_eq!(warmed["pages"], pages, "{warmed}");
        bench.wait_for("all pages", 0..pages);
        assert_eq!(bench.mounted.warm(server, &["app:v1"])["pages"], 0, "there is no working set");
        bench.read_all();

        let listed = run(server, ["mount", "--list"]);
        let path = bench.mounted.path().to_str().unwrap();
        let mut mounts = listed.as_array().unwrap().iter();
        let ours = mounts.find(|mount| mount["directory"] == path).expect("it is listed");
        assert_eq!(ours["state"], "serving", "{ours}");
        assert_eq!(ours["server"], server.to_string(), "{ours}");

        let warm = |reference: &str, runtime: &Path| {
            let mut command = postcopy(server, ["warm", reference]);
            let output = command.env("POSTCOPY_RUNTIME_DIR", runtime).output().unwrap();
            assert!(!output.status.success());
            String::from_utf8(output.stderr).unwrap()
        };
        let none = warm("app:none", bench.mounted.runtime());
        assert!(none.contains("app:none"), "{none}");
        let elsewhere = runtime_root();
        let none = warm("app:v1", elsewhere.path());
        assert!(none.contains("no mount answers there") && none.contains("postcopy mount DIR"), "{none}");
    });
}

/// Ends the readers when it is dropped.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Stores wait for reads, and reads for stores, while the pages are dropped, and processes killed.
#[test]
fn what_is_stored_while_processes_are_killed_is_right() {
    as_root("mount::ahead::what_is_stored_while_processes_are_killed_is_right", || {
        let bench = start(noise(32 << 20, 11), &[]);
        let stop = AtomicBool::new(false);
        let storer = || {
            let mut found = None;
            wait_until("a storer", || {
                found = bench.mounted.storer();
                found.is_some()
            });
            found.expect("it is there")
        };
        std::thread::scope(|scope| {
            // If this thread panics, too.
            let _end = Stopping(&stop);
            for reader in 0..4 {
                let (bench, stop) = (&bench, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let file = File::open(&bench.path).unwrap();
                        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                        if reader % 2 == 0 {
                            let at = fastrand::usize(0..bench.bytes.len() - 3 * CHUNK);
                            bench.read(at, 1 + fastrand::usize(0..3 * CHUNK));
                        } else {
                            bench.read_all();
                        }
                    }
                });
            }
            for round in 0..12 {
                if round % 3 == 2 {
                    // Without the storer the worker ends, too, and both come again.
                    let before = storer();
                    kill_process(before, Signal::KILL).unwrap();
                    wait_until("another storer", || storer() != before);
                } else {
                    bench.mounted.kill_worker();
                }
                std::thread::park_timeout(Duration::from_millis(50 * round % 200));
            }
        });
        bench.read_all();
        let Bench { server, mounted, bytes, .. } = bench;
        let again = mounted.kill_and_mount_again(server.address());
        assert!(fs::read(again.image("app", "v1").join("mem")).unwrap() == bytes);
    });
}
