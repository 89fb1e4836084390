//! Regions: their ends, their addresses, and mappings that the program has cut into parts.

use super::{CHUNK, FILLING, MINUTE, Source, WATCHDOG, assert_pages};
use crate::map::{push, random_pages};
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{LossPolicy, Options, Region, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::{PAGE, wait_until};
use rustix::mm::Advice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_region_outlives_its_session() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 << 20, 2), CHUNK);
        for options in [Options::DEFAULT, FILLING] {
            let session = source.open(options);
            let first = session.map("mem").unwrap();
            let second = session.map("mem").unwrap();
            drop(session);
            assert_pages(&first, &source.bytes, "the first region");
            drop(first);
            let mut bytes = vec![0; source.bytes.len()];
            second.read_at(0, &mut bytes).unwrap();
            assert_pages(&bytes, &source.bytes, "the second region");
        }
    });
}

#[test]
fn regions_that_come_and_go_at_reused_addresses_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(6 << 20, 3), CHUNK);
        let small = tempfile::tempdir().unwrap();
        let other = noise(source.bytes.len(), 4);
        std::fs::write(small.path().join("other"), &other).unwrap();
        std::fs::write(small.path().join("mem"), &source.bytes).unwrap();
        push(&source.server, small.path(), "app", CHUNK);
        let session = source.open(FILLING);
        let stays = session.map("mem").unwrap();
        let seed = fastrand::u64(..);
        eprintln!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut addresses = std::collections::HashSet::new();
        for round in 0..200 {
            let (name, bytes) = if rng.bool() { ("mem", &source.bytes) } else { ("other", &other) };
            let region = session.map(name).unwrap();
            addresses.insert(region.as_ptr().addr());
            for _ in 0..rng.usize(..6) {
                let page = rng.usize(..bytes.len() / PAGE);
                let at = page * PAGE..(page + 1) * PAGE;
                assert!(region[at.clone()] == bytes[at.clone()], "round {round}, {name}, page {page}");
                assert!(stays[at.clone()] == source.bytes[at], "round {round}, the region that stays");
            }
            drop(region);
        }
        assert!(addresses.len() < 190, "addresses are not reused: {}", addresses.len());
        session.wait_resident(MINUTE).unwrap();
        assert_pages(&stays, &source.bytes, "the region that stays");
    });
}

#[test]
fn twenty_thousand_regions_are_dropped_by_one_thread() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(16 * PAGE, 4), CHUNK);
        let session = source.open(Options::DEFAULT);
        let regions: Vec<_> = (0..20_000).map(|_| session.map_part("mem", 0..PAGE as u64).unwrap()).collect();
        let reapers = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
            tasks.filter_map(|task| name(task).ok()).filter(|name| name.starts_with("postcopy-")).count()
        };
        let (before, mut most) = (reapers(), 0);
        for (number, region) in regions.into_iter().enumerate() {
            drop(region);
            if number % 1000 == 0 {
                most = most.max(reapers());
            }
        }
        most = most.max(reapers());
        // Other tests of this process have sessions, too.
        assert!(most < before + 40, "{most} threads, {before} before");
        let region = session.map("mem").unwrap();
        assert_eq!(*region, *source.bytes);
    });
}

/// Two regions wait for the same chunk; the one that asked first is dropped.
#[test]
fn dropping_a_region_does_not_lose_the_faults_of_another() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 * CHUNK, 5), CHUNK);
        let held = Arc::new(AtomicBool::new(true));
        let hold = Arc::clone(&held);
        let lies = Lies::default().chunk(move |_, answer| {
            if hold.load(Ordering::SeqCst) {
                vec![ChunkAnswer { result: None, ..answer }]
            } else {
                vec![answer]
            }
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = Options::DEFAULT.on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let first = session.map("mem").unwrap();
        let second = Arc::new(session.map("mem").unwrap());
        first.read_at(0, &mut [0; 10]).unwrap_err();

        let toucher = Arc::clone(&second);
        let toucher = std::thread::spawn(move || toucher[..CHUNK].to_vec());
        wait_until("the second region's fault is known", || session.progress().faults == 1);
        drop(first);
        wait_until("the first region is gone", || session.progress().total_pages == 8 * 16);
        held.store(false, Ordering::SeqCst);
        wait_until("the second region's fault is served", || toucher.is_finished());
        assert!(toucher.join().unwrap() == source.bytes[..CHUNK]);
    });
}

/// With madvise or mprotect of a part, the kernel splits its record of the region. An ioctl is for
/// one part alone.
#[test]
fn a_region_in_parts_is_filled_and_lost_page_by_page_where_need_be() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(40 * CHUNK + 5, 6), CHUNK);
        for options in [Options::DEFAULT, FILLING] {
            let session = source.open(options);
            let mut region = session.map("mem").unwrap();
            split(&mut region);
            if options.fill {
                session.wait_resident(MINUTE).unwrap();
            }
            assert_pages(&region, &source.bytes, "in parts");
        }
    });
}

/// Cuts a region into parts at odd places.
#[expect(unsafe_code, reason = "madvise on memory of our own")]
fn split(region: &mut Region) {
    for page in [1usize, 18, 19, 40, 100, 333] {
        let start = region[page * PAGE..].as_mut_ptr();
        // SAFETY: changes what a core dump holds, and no byte.
        unsafe { rustix::mm::madvise(start.cast(), 3 * PAGE, Advice::LinuxDontDump) }.unwrap();
    }
}

/// A page that is SIGBUS to a load is EFAULT to write(2).
#[test]
fn a_lost_region_in_parts_is_sigbus_everywhere() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(40 * CHUNK, 6), CHUNK);
        let lies = Lies::default().chunk(|_, answer| vec![ChunkAnswer { result: None, ..answer }]);
        let chaos = Chaos::start(source.server.address(), lies);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
        let mut region = session.map("mem").unwrap();
        split(&mut region);
        for chunk in 0..40 {
            let _ = region.read_at(chunk * CHUNK, &mut [0]).unwrap_err();
        }
        let file = tempfile::tempfile().unwrap();
        for page in region.chunks(PAGE) {
            assert_eq!(rustix::io::write(&file, page), Err(rustix::io::Errno::FAULT), "{:?}", page.as_ptr());
        }
    });
}

#[test]
fn two_sessions_and_many_regions_side_by_side_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 << 20, 9), CHUNK);
        let sessions = [source.open(Options::DEFAULT), source.open(FILLING)];
        std::thread::scope(|scope| {
            for session in &sessions {
                for _ in 0..4 {
                    let bytes = &source.bytes;
                    scope.spawn(move || {
                        let region = session.map("mem").unwrap();
                        for page in random_pages(bytes.len()) {
                            let at = page * PAGE..(page + 1) * PAGE;
                            assert!(region[at.clone()] == bytes[at], "page {page}");
                        }
                    });
                }
            }
        });
    });
}

#[test]
fn ranges_beyond_the_file_and_unknown_files_are_errors() {
    let source = Source::start(noise(PAGE + 5, 10), CHUNK);
    let session = source.open(Options::DEFAULT);
    let error = session.map("no/such").unwrap_err().to_string();
    assert!(error.contains("no/such"), "{error}");
    let region = session.map("mem").unwrap();
    region.read_at(PAGE + 5, &mut []).unwrap();
    for (offset, len) in [(PAGE + 5, 1), (PAGE, 6), (usize::MAX, 2)] {
        let error = region.read_at(offset, &mut vec![0; len]).unwrap_err().to_string();
        assert!(error.contains("beyond the region's 4101 bytes"), "{error}");
    }
    assert_eq!(region.resident_pages(), 0);
    for span in [1..PAGE + 5, 0..PAGE + 6, 2 * PAGE..2 * PAGE, 0..usize::MAX] {
        let error = session.map_part("mem", span.start as u64..span.end as u64).unwrap_err().to_string();
        assert!(error.contains("\"mem\"") && error.contains("4101") && error.contains("4096"), "{error}");
    }
    let error = session.map_part("no/such", 0..1).unwrap_err().to_string();
    assert!(error.contains("no/such"), "{error}");
}
