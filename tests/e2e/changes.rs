//! What has been written to and removed since the restore.

use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{Changes, LossError, Options, Region, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::fixtures::memory_like;
use rustix::mm::Advice;
use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const PAGES: usize = 400;
const ZEROS: Range<usize> = 100..180;
const WATCHDOG: Duration = Duration::from_secs(100);

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 75);
    bytes[ZEROS.start * PAGE..ZEROS.end * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

fn open(source: &Source, track_writes: bool) -> Session {
    let options = Options { track_writes, ..Options::default() };
    Session::open(source.server.address(), &"app".parse().unwrap(), options).unwrap()
}

/// The first page of each run, and the one after its last.
fn pages(runs: &[Range<usize>]) -> Vec<(usize, usize)> {
    runs.iter().map(|run| (run.start / PAGE, run.end / PAGE)).collect()
}

#[track_caller]
fn assert_changes(changes: &Changes, written: &[(usize, usize)], removed: &[(usize, usize)]) {
    assert_eq!((pages(&changes.written), pages(&changes.removed)), (written.to_vec(), removed.to_vec()));
}

#[expect(unsafe_code, reason = "madvise on memory of our own")]
fn remove(region: &mut Region, pages: Range<usize>) {
    let start = region[pages.start * PAGE..].as_mut_ptr();
    // SAFETY: the region is borrowed exclusively, so nobody holds a slice whose bytes change.
    unsafe { rustix::mm::madvise(start.cast(), pages.len() * PAGE, Advice::LinuxDontNeed) }.unwrap();
}

#[test]
fn written_and_removed_pages_are_told_exactly() {
    within(WATCHDOG, || {
        let source = start();
        let session = open(&source, true);
        let mut region = session.map("mem").unwrap();
        let nothing = Changes::default();
        assert_eq!(region.changes().unwrap(), nothing, "absent pages are not written to");
        // Reading is not writing: not of pages with content, nor of zeros, nor by the kernel.
        assert_eq!(region[7 * PAGE..60 * PAGE], source.bytes[7 * PAGE..60 * PAGE]);
        assert_eq!(region[110 * PAGE..130 * PAGE], source.bytes[110 * PAGE..130 * PAGE]);
        std::io::sink().write_all(&region[60 * PAGE..61 * PAGE]).unwrap();
        let file = tempfile::tempfile().unwrap();
        if session.serves_kernel_faults() {
            rustix::io::pwrite(&file, &region[140 * PAGE..150 * PAGE], 0).unwrap();
        }
        assert_eq!(region.changes().unwrap(), nothing);
        // Writing is: at the first touch and later, pages with content and zeros, by stores and by the kernel.
        region[8 * PAGE] = 1;
        region[62 * PAGE + 4095] = 1;
        region[112 * PAGE..114 * PAGE].fill(1);
        region[170 * PAGE + 5] = 1;
        let expected = [(8, 9), (62, 63), (112, 114), (170, 171)];
        assert_changes(&region.changes().unwrap(), &expected, &[]);
        assert_changes(&region.changes().unwrap(), &expected, &[]);
        assert_changes(&region.take_changes().unwrap(), &expected, &[]);
        assert_eq!(region.changes().unwrap(), nothing);
        region[8 * PAGE] = 2;
        if session.serves_kernel_faults() {
            rustix::io::pread(file.as_fd(), &mut region[300 * PAGE..301 * PAGE], 0).unwrap();
        } else {
            region[300 * PAGE] = 2;
        }
        assert_changes(&region.changes().unwrap(), &[(8, 9), (300, 301)], &[]);
        // What the background brings is not written to either.
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        assert_changes(&region.take_changes().unwrap(), &[(8, 9), (300, 301)], &[]);
        assert_eq!(region.changes().unwrap(), nothing);
    });
}

#[test]
fn removals_are_told_with_what_was_written_before_and_after() {
    within(WATCHDOG, || {
        let source = start();
        let session = open(&source, true);
        let mut region = session.map("mem").unwrap();
        region[10 * PAGE..14 * PAGE].fill(1);
        // Written before; there; absent.
        remove(&mut region, 12..20);
        remove(&mut region, 200..205);
        assert_changes(&region.changes().unwrap(), &[(10, 12)], &[(12, 20), (200, 205)]);
        // Read after: zeros, not written. Written after: both.
        assert!(region[13 * PAGE..16 * PAGE].iter().all(|byte| *byte == 0));
        region[201 * PAGE] = 1;
        assert_changes(&region.take_changes().unwrap(), &[(10, 12), (201, 202)], &[(12, 20), (200, 205)]);
        assert_eq!(region.changes().unwrap(), Changes::default());
        region[13 * PAGE] = 1;
        remove(&mut region, 201..203);
        assert_changes(&region.take_changes().unwrap(), &[(13, 14)], &[(201, 203)]);
    });
}

#[test]
fn a_look_at_the_changes_leaves_absent_pages_alone() {
    within(WATCHDOG, || {
        let source = start();
        let lies = Lies::default().chunk(|_, answer| {
            vec![if answer.chunk == 20 { ChunkAnswer { result: None, ..answer } } else { answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = Options { track_writes: true, ..Options::default() };
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let mut region = session.map("mem").unwrap();
        region[3 * PAGE] = 1;
        remove(&mut region, 325..327);
        assert_changes(&region.take_changes().unwrap(), &[(3, 4)], &[(325, 327)]);
        // A mark on an absent page would keep it from being poisoned, and it would be zero.
        let mut page = [0; PAGE];
        assert!(matches!(region.read_at(321 * PAGE, &mut page), Err(LossError::Lost(_))));
        region.read_at(325 * PAGE, &mut page).unwrap();
        assert_eq!(page, [0; PAGE]);
        // Neither are lost pages taken for written ones.
        assert_changes(&region.take_changes().unwrap(), &[], &[]);
        assert!(matches!(region.read_at(322 * PAGE, &mut page), Err(LossError::Lost(_))));
    });
}

#[test]
fn no_write_is_lost_between_intervals() {
    within(WATCHDOG, || {
        let source = start();
        let session = open(&source, true);
        let mut region = session.map("mem").unwrap();
        session.fill().unwrap();
        let mut told: BTreeSet<usize> = BTreeSet::new();
        let mut written = BTreeSet::new();
        let stop = AtomicBool::new(false);
        // Two halves, written to by a thread each while a third one looks.
        let (state, memory) = (region.changes().is_ok(), region.as_mut_ptr().expose_provenance());
        assert!(state);
        std::thread::scope(|scope| {
            let write = |half: usize| {
                let mut written = BTreeSet::new();
                while !stop.load(Ordering::Relaxed) {
                    let page = half * PAGES / 2 + fastrand::usize(..PAGES / 2);
                    touch(memory + page * PAGE);
                    written.insert(page);
                }
                written
            };
            let writers = [0, 1].map(|half| scope.spawn(move || write(half)));
            let until = Instant::now() + Duration::from_secs(1);
            while Instant::now() < until {
                told.extend(each(&region));
            }
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                written.extend(writer.join().unwrap());
            }
        });
        told.extend(each(&region));
        assert_eq!(told, written);
        assert_eq!(region.changes().unwrap(), Changes::default());
    });
}

/// Each page that was written to since the last look.
fn each(region: &Region) -> impl Iterator<Item = usize> + use<> {
    let written = region.take_changes().unwrap().written;
    written.into_iter().flat_map(|run| run.start / PAGE..run.end / PAGE)
}

#[expect(unsafe_code, reason = "memory that several threads write to")]
fn touch(address: usize) {
    let byte = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: mapped as long as the region is; each page has one writer, and nobody reads it meanwhile.
    unsafe { byte.write_volatile(1) };
}

#[test]
fn a_session_that_does_not_track_says_so() {
    within(WATCHDOG, || {
        let source = start();
        let region = open(&source, false).map("mem").unwrap();
        let error = region.changes().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
    });
}
