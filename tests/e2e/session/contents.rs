//! The content of regions that the program changes while they are filled.

use super::{CHUNK, FILLING, MINUTE, Source, WATCHDOG, assert_pages, give_back};
use crate::map::random_pages;
use nix::libc;
use postcopy::Options;
use postcopy_tests::chaos::within;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::{PAGE, skip, wait_until};
use userfaultfd::UffdBuilder;

const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

fn assert_zero(bytes: &[u8], what: &str) {
    assert_eq!(bytes.iter().position(|byte| *byte != 0), None, "{what}: not zero");
}

#[test]
fn memory_that_is_being_restored_takes_no_other_userfaultfd() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(1 << 20, 3), CHUNK);
        let session = source.open(Options::DEFAULT);
        let region = session.map("mem").unwrap();
        let other = UffdBuilder::new().user_mode_only(true).create().unwrap();
        let refused = other.register(region.as_ptr().cast_mut().cast(), 1 << 20);
        let refused = format!("{:?}", refused.unwrap_err());
        assert!(refused.contains("EBUSY"), "{refused}");
        assert_pages(&region, &source.bytes, "it is served on");
    });
}

#[test]
#[expect(unsafe_code, reason = "madvise")]
fn guard_pages_of_this_process_are_zero_once_they_are_lifted() {
    const TEST: &str = "session::contents::guard_pages_of_this_process_are_zero_once_they_are_lifted";
    if !postcopy::uffd::pagemap::guards_are_seen() {
        return skip(TEST, "guard pages are not seen before Linux 6.15");
    }
    within(WATCHDOG, || {
        let source = Source::start(memory_like(1 << 20, 3), CHUNK);
        for options in [Options::DEFAULT, Options::DEFAULT.track_writes(true)] {
            let session = source.open(options);
            let region = session.map("mem").unwrap();
            let (start, len) = (region.as_ptr().wrapping_add(20 * PAGE), 30 * PAGE);
            let advise = |advice| {
                // SAFETY: no thread reads these pages meanwhile.
                let done = unsafe { libc::madvise(start.cast_mut().cast(), len, advice) };
                assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            };
            advise(GUARD_INSTALL);
            session.fill().unwrap();
            session.wait_resident(MINUTE).unwrap();
            assert_eq!(session.progress().removed_pages, 30);
            advise(GUARD_REMOVE);
            assert!(region[20 * PAGE..50 * PAGE].iter().all(|byte| *byte == 0));
            assert_pages(&region[50 * PAGE..], &source.bytes[50 * PAGE..], "behind them");
        }
    });
}

#[test]
fn what_was_given_back_reads_as_zeros() {
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 6), CHUNK);
        let session = source.open(Options::DEFAULT);
        let mut region = session.map("mem").unwrap();
        // Resident, absent, and across the border of both.
        assert_eq!(region[0], source.bytes[0]);
        let ranges = [PAGE..3 * PAGE, 4 * CHUNK..5 * CHUNK, CHUNK - PAGE..CHUNK + PAGE];
        for range in &ranges {
            give_back(&mut region, range.clone());
        }
        let mut expected = source.bytes.clone();
        ranges.iter().for_each(|range| expected[range.clone()].fill(0));
        assert_pages(&region, &expected, "after MADV_DONTNEED");
        wait_until("removed pages are counted", || session.progress().removed_pages == 2 + 16 + 2);
        session.fill().unwrap();
        session.wait_resident(MINUTE).unwrap();
        assert_pages(&region, &expected, "after the fill");
        // Removed pages are ordinary memory.
        region[4 * CHUNK..5 * CHUNK].copy_from_slice(&source.bytes[..CHUNK]);
        expected[4 * CHUNK..5 * CHUNK].copy_from_slice(&source.bytes[..CHUNK]);
        assert_pages(&region, &expected, "after it was written to");
    });
}

#[test]
fn what_is_given_back_while_the_fill_runs_stays_zero() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(24 << 20, 7), CHUNK);
        let pages = source.bytes.len() / PAGE;
        for _ in 0..5 {
            let seed = fastrand::u64(..);
            eprintln!("seed {seed}");
            let mut rng = fastrand::Rng::with_seed(seed);
            let session = source.open(FILLING);
            let mut region = session.map("mem").unwrap();
            let mut expected = source.bytes.clone();
            for _ in 0..150 {
                let start = rng.usize(..pages);
                let end = (start + rng.usize(1..40)).min(pages);
                let range = start * PAGE..end * PAGE;
                give_back(&mut region, range.clone());
                expected[range.clone()].fill(0);
                if rng.bool() {
                    assert_zero(&region[range], "just given back");
                }
            }
            session.wait_resident(MINUTE).unwrap();
            assert_pages(&region, &expected, "after the fill");
        }
    });
}

#[test]
fn what_is_written_while_the_fill_runs_is_never_overwritten() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(24 << 20, 8), CHUNK);
        for _ in 0..3 {
            let session = source.open(FILLING);
            let mut region = session.map("mem").unwrap();
            let mut expected = source.bytes.clone();
            let share = source.bytes.len() / 4;
            std::thread::scope(|scope| {
                for (written, mirror) in region.chunks_mut(share).zip(expected.chunks_mut(share)) {
                    let pages = random_pages(written.len());
                    scope.spawn(move || {
                        for page in pages.into_iter().step_by(2) {
                            // One byte in the middle of a page; the others come from the image.
                            let at = page * PAGE + page % PAGE;
                            let value = !mirror[at];
                            written[at] = value;
                            mirror[at] = value;
                            assert_eq!(written[at], value);
                        }
                    });
                }
            });
            session.wait_resident(MINUTE).unwrap();
            assert_pages(&region, &expected, "after the fill");
        }
    });
}
