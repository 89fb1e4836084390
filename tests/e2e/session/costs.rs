//! Progress that a session counts, and its threads and descriptors.

use super::{CHILD, CHUNK, FILLING, MINUTE, Source, WATCHDOG, as_child, count_of};
use postcopy::{Options, Session};
use postcopy_tests::chaos::within;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::wait_until;
use std::time::Duration;

#[test]
fn progress_counts_pages_faults_and_chunks() {
    within(WATCHDOG, || {
        let source = Source::start(noise(32 * CHUNK + 1, 1), CHUNK);
        let session = source.open(Options::DEFAULT);
        assert_eq!(session.progress(), postcopy::Progress::default());
        let region = session.map("mem").unwrap();
        let total = 32 * 16 + 1;
        assert_eq!(session.progress().total_pages, total);
        assert_eq!(session.progress().resident_pages, 0);

        for chunk in [3, 7, 32] {
            assert_eq!(region[chunk * CHUNK], source.bytes[chunk * CHUNK]);
        }
        wait_until("three chunks are there", || session.progress().resident_pages == 16 + 16 + 1);
        let progress = session.progress();
        assert_eq!((progress.faults, progress.demand_chunks, progress.bulk_chunks), (3, 3, 0));
        assert!(progress.frame_bytes > 2 * CHUNK as u64, "{progress:?}");
        assert!(region.is_resident(3 * CHUNK) && !region.is_resident(4 * CHUNK));

        let second = session.map("mem").unwrap();
        assert_eq!(session.progress().total_pages, 2 * total);
        drop(second);
        wait_until("a dropped region is not counted", || session.progress().total_pages == total);

        let late = session.wait_resident(Duration::from_millis(20)).unwrap_err();
        assert!(late.to_string().contains("20ms"), "{late}");
        session.fill().unwrap();
        session.fill().unwrap();
        session.wait_resident(MINUTE).unwrap();
        let progress = session.progress();
        assert_eq!((progress.resident_pages, progress.poisoned_pages, progress.removed_pages), (total, 0, 0));
        assert_eq!(
            (progress.demand_chunks, progress.bulk_chunks),
            (3, 30),
            "what is there is not brought again"
        );
        assert!(*region == source.bytes[..]);
    });
}

/// A host has a session for each of its machines.
#[test]
fn a_session_that_has_nothing_to_do_costs_one_thread_and_six_descriptors() {
    const SESSIONS: usize = 50;
    /// The thread and the runtime that they share, what all runtimes share, and the page tables.
    const COMMON: (usize, usize) = (3, 7);
    let test = "session::costs::a_session_that_has_nothing_to_do_costs_one_thread_and_six_descriptors";
    if let Ok(server) = std::env::var(CHILD) {
        let cores = std::thread::available_parallelism().unwrap().get();
        let (server, reference) = (server.parse().unwrap(), "app".parse().unwrap());
        let (threads, descriptors) = (count_of("task"), count_of("fd"));
        let mut most_threads = 0;
        let mut look = || most_threads = most_threads.max(count_of("task"));
        let sessions = [FILLING; SESSIONS].map(|options| {
            let session = Session::open(&server, &reference, options).unwrap();
            let region = session.map("mem").unwrap();
            look();
            (session, region)
        });
        let is_resident = || sessions.iter().all(|(session, _)| session.is_resident());
        wait_until("all are filled", || {
            look();
            is_resident()
        });
        let at_most = |directory, most: usize| {
            wait_until(&format!("at most {most} in {directory}"), || count_of(directory) <= most);
            count_of(directory)
        };
        let idle = (
            at_most("task", threads + SESSIONS + COMMON.0),
            at_most("fd", descriptors + 6 * SESSIONS + COMMON.1),
        );
        eprintln!(
            "of {SESSIONS} sessions: {} threads, {} descriptors",
            idle.0 - threads,
            idle.1 - descriptors
        );
        eprintln!("at most {} threads while they are filled", most_threads - threads);
        assert!(
            most_threads <= threads + SESSIONS + cores + COMMON.0,
            "{most_threads} threads, {threads} before"
        );
        drop(sessions);
        at_most("task", threads);
        return;
    }
    within(WATCHDOG, move || {
        let source = Source::start(memory_like(64 * CHUNK, 17), CHUNK);
        let status = as_child(test, &source.server.address().to_string());
        assert!(status.success(), "{status}");
    });
}
