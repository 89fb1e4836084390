//! What has been written to and removed since the restore.

use crate::session::Source;
use postcopy::proto::path::ImagePath;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::push::{self, ImageChanges, PushOptions};
use postcopy::{Changes, ForeignMemory, ForeignRegion, LossError, Options, Region, Remote, Session, Sharing};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::pool::HugePool;
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use rustix::mm::Advice;
use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
    let options = Options::DEFAULT.track_writes(track_writes);
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
fn what_has_changed_is_pushed_as_an_image_without_the_rest() {
    within(WATCHDOG, || {
        let source = start();
        let session = open(&source, true);
        let mut region = session.map("mem").unwrap();
        let mut expected = source.bytes.clone();
        for (pages, fill) in [(3..5, 7), (100..101, 8), (200..216, 0), (PAGES - 1..PAGES, 9)] {
            region[pages.start * PAGE..pages.end * PAGE].fill(fill);
            expected[pages.start * PAGE..pages.end * PAGE].fill(fill);
        }
        remove(&mut region, 300..340);
        expected[300 * PAGE..340 * PAGE].fill(0);
        let changes = region.take_changes().unwrap();
        let memory = Arc::new(region);
        let read = Arc::clone(&memory);
        let mut pushed =
            ImageChanges::new(Arc::new(move |path: &ImagePath, offset: u64, buffer: &mut [u8]| {
                assert_eq!(path.as_bytes(), b"mem");
                read.read_at(usize::try_from(offset).unwrap(), buffer).map_err(std::io::Error::other)
            }));
        for run in changes.written.into_iter().chain(changes.removed) {
            pushed.add(b"mem"[..].try_into().unwrap(), run.start as u64..run.end as u64);
        }
        let push = |changes: &ImageChanges, reference: &str| {
            let reference = reference.parse().unwrap();
            let server = source.server.address().clone();
            let work = async {
                let remote = Remote::connect(server).await.unwrap();
                let (image, none) = (session.image().digest(), Arc::new(|_, _| ()));
                push::push_changes(&remote, &image, changes, &reference, PushOptions::default(), none).await
            };
            tokio::runtime::Runtime::new().unwrap().block_on(work)
        };
        let report = push(&pushed, "app:changed").unwrap();
        for page in [50, 150, 250, 350] {
            assert!(!memory.is_resident(page * PAGE), "page {page} was fetched for it");
        }
        let changed = (2 + 1 + 16 + 1 + 40) * PAGE;
        // Chunks that were zero are sent whole.
        assert!(report.sent_bytes <= (changed + CHUNK) as u64, "{report:?}");
        let again = Session::open(source.server.address(), &"app:changed".parse().unwrap(), Options::DEFAULT)
            .unwrap();
        assert!(again.map("mem").unwrap()[..] == expected[..]);
        // Nothing has changed, and what the image does not have.
        let mut nothing =
            ImageChanges::new(Arc::new(|_: &ImagePath, _, _: &mut [u8]| unreachable!("nothing to read")));
        assert_eq!(push(&nothing, "app:same").unwrap().image, session.image().digest());
        nothing.add(b"mem"[..].try_into().unwrap(), 0..(PAGES * PAGE + 1) as u64);
        let error = push(&nothing, "app:beyond").unwrap_err().to_string();
        assert!(error.contains("mem: the changes end at byte 1638401, and the file at 1638400"), "{error}");
        let mut other =
            ImageChanges::new(Arc::new(|_: &ImagePath, _, _: &mut [u8]| unreachable!("nothing to read")));
        other.add(b"other"[..].try_into().unwrap(), 0..1);
        let error = push(&other, "app:other").unwrap_err().to_string();
        assert!(error.contains("other: the image has no such file"), "{error}");
    });
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
        let options = Options::DEFAULT.track_writes(true);
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
fn zeros_that_are_just_installed_are_never_taken_for_written() {
    within(WATCHDOG, || {
        let source = Source::start(vec![0; 64 << 20], 1 << 20);
        for _ in 0..4 {
            let session = open(&source, true);
            let region = session.map("mem").unwrap();
            session.fill().unwrap();
            let mut looks = 0;
            while region.resident_pages() < region.len() / PAGE {
                assert_changes(&region.take_changes().unwrap(), &[], &[]);
                looks += 1;
            }
            assert!(looks > 5, "{looks} looks while it was filled");
        }
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

/// A process with memory of a kind, and its region: a file of pages of which the fourth hundred is zero.
fn foreign(kind: &str) -> (Faulter, [ForeignRegion; 1]) {
    let faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{FOREIGN_PAGES}")]);
    let region = match kind {
        "huge" => faulter.huge_region(0, "mem", 0, Sharing::Private),
        _ => faulter.region(0, "mem", 0),
    };
    (faulter, [region])
}

const FOREIGN_PAGES: usize = 4 * 512;
const FOREIGN_ZEROS: Range<usize> = 1024..1536;
const DONTNEED: i32 = 4;

fn foreign_source() -> Source {
    let mut bytes = memory_like(FOREIGN_PAGES * PAGE, 76);
    bytes[FOREIGN_ZEROS.start * PAGE..FOREIGN_ZEROS.end * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

/// Runs of a process's region as pages.
fn pages_of(changes: &Changes, faulter: &Faulter) -> Changes {
    let page = |address: usize| (address - faulter.at(0, 0)) / PAGE;
    let runs = |runs: &[Range<usize>]| runs.iter().map(|run| page(run.start)..page(run.end)).collect();
    Changes { written: runs(&changes.written), removed: runs(&changes.removed) }
}

#[test]
fn what_another_process_changes_is_told_exactly() {
    if !is_root() {
        return skip("changes::what_another_process_changes_is_told_exactly", "it needs root");
    }
    let pool = HugePool::with_free(8);
    within(WATCHDOG, || {
        let source = foreign_source();
        for kind in ["private", "memfd-private", "huge"] {
            // The kernel protects, and gives back, whole pages.
            let unit = if kind == "huge" { 512 } else { 1 };
            let (mut faulter, regions) = foreign(kind);
            let options = Options::DEFAULT.track_writes(true);
            let memory = ForeignMemory {
                uffd: faulter.uffd(),
                regions: &regions,
                state: None,
                pid: Some(faulter.main.pid),
                is_registered: true,
            };
            let reference = "app".parse().unwrap();
            let session = Session::attach(source.server.address(), &reference, options, &memory).unwrap();
            faulter.let_go();
            let told = |faulter: &Faulter| pages_of(&session.take_changes().unwrap(), faulter);
            let whole = |page: usize| page - page % unit..page - page % unit + unit;
            let nothing = Changes::default();
            assert_eq!(told(&faulter), nothing, "{kind}: absent pages are not written to");
            faulter.assert_reads(0, 3, &source.bytes[3 * PAGE..100 * PAGE]);
            let zeros = FOREIGN_ZEROS.start;
            faulter.assert_reads(0, zeros + 5, &[0; 20 * PAGE]);
            faulter.main.ask(&format!("kernel-read {} 3", faulter.at(0, 110)));
            assert_eq!(told(&faulter), nothing, "{kind}: reading is not writing");
            // There, zero, absent; by stores, by the kernel, by an atomic.
            for (page, how) in [(5, "write"), (zeros + 7, "kernel-write"), (1600, "write")] {
                let byte = 42;
                faulter.main.does(&format!("{how} {} 1 {byte}", faulter.at(0, page)));
                assert_eq!(told(&faulter).written, [whole(page)], "{kind}: {how} to page {page}");
                assert_eq!(told(&faulter), nothing, "{kind}: a new interval");
                faulter.assert_reads(0, page, &[byte; PAGE]);
            }
            faulter.main.ask(&format!("add {}", faulter.at(0, 5)));
            assert_eq!(told(&faulter).written, [whole(5)], "{kind}: written to again");
            // A child has its own memory. What its parent writes after the fork is told of.
            let mut child = faulter.fork();
            child.does(&format!("write {} 1 1", faulter.at(0, 1601)));
            child.does(&format!("write {} 1 1", faulter.at(0, 200)));
            child.assert_reads(faulter.at(0, 201), &source.bytes[201 * PAGE..202 * PAGE]);
            // Marks that it has inherited are not in the way of what it gives back.
            let page = if kind == "huge" { 0 } else { 30 };
            child.does(&format!("advise {DONTNEED} {} {unit}", faulter.at(0, page)));
            child.assert_reads(faulter.at(0, page), &vec![0; unit * PAGE]);
            assert_eq!(told(&faulter), nothing, "{kind}: the child's");
            faulter.main.does(&format!("write {} 1 2", faulter.at(0, 6)));
            assert_eq!(told(&faulter).written, [whole(6)], "{kind}: after a fork");
            child.tell("exit");
            // Removed: there and written, there, absent. Then read, then written again.
            let (first, gone) = (zeros, zeros..zeros + 512);
            faulter.main.does(&format!("advise {DONTNEED} {} 512", faulter.at(0, first)));
            let removed = Changes { written: vec![], removed: vec![gone.clone()] };
            assert_eq!(told(&faulter), removed, "{kind}");
            faulter.assert_reads(0, first, &[0; 2 * PAGE]);
            assert_eq!(told(&faulter), nothing, "{kind}: reading zeros");
            faulter.main.does(&format!("write {} 1 3", faulter.at(0, first + 1)));
            assert_eq!(told(&faulter).written, [whole(first + 1)], "{kind}: written after the removal");
            session.fill().unwrap();
            session.wait_resident(Duration::from_secs(30)).unwrap();
            assert_eq!(told(&faulter), nothing, "{kind}: what is filled in is not written to");
            faulter.main.does(&format!("write {} 1 3", faulter.at(0, 1700)));
            assert_eq!(told(&faulter).written, [whole(1700)], "{kind}: of what was filled in");
            assert_eq!(session.error(), None);
        }
    });
    drop(pool);
}

#[test]
fn no_write_of_another_process_is_lost_between_intervals() {
    if !is_root() {
        return skip("changes::no_write_of_another_process_is_lost_between_intervals", "it needs root");
    }
    within(WATCHDOG, || {
        let source = foreign_source();
        let (mut faulter, regions) = foreign("private");
        let how = Serving { fill: true, track: true, ..Serving::default() };
        let mut keeper = Keeper::start(&source.server.address().to_string(), "app", how, &faulter, &regions);
        faulter.let_go();
        let (mut removed_before, mut must) = (BTreeSet::new(), BTreeSet::new());
        for round in 0..30 {
            must.clear();
            let (mut written, mut removed, mut told_written, mut told_removed) =
                (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            for _ in 0..12 {
                let page = fastrand::usize(..FOREIGN_PAGES);
                let at = faulter.at(0, page);
                if fastrand::u8(..5) == 0 {
                    faulter.main.tell(&format!("advise {DONTNEED} {at} 1"));
                    removed.insert(page);
                    removed_before.insert(page);
                    must.remove(&page);
                } else {
                    faulter.main.tell(&format!("write {at} 1 {}", round + 1));
                    written.insert(page);
                    // Unless it is removed again.
                    must.insert(page);
                }
                // Each time at another moment of it.
                if fastrand::bool() {
                    let told = pages_of(&keeper.take_changes(), &faulter);
                    told_written.extend(told.written.into_iter().flatten());
                    told_removed.extend(told.removed.into_iter().flatten());
                }
                assert_eq!(faulter.main.answer().as_deref(), Some("done"));
            }
            let is_killed = round % 5 == 4;
            if is_killed {
                keeper.kill_worker();
            }
            let told = pages_of(&keeper.take_changes(), &faulter);
            told_written.extend(told.written.into_iter().flatten());
            told_removed.extend(told.removed.into_iter().flatten());
            // What was removed before is told of again by a successor, and whatever may have been written there.
            let again = |page: &usize| is_killed && removed_before.contains(page);
            told_written.retain(|page| written.contains(page) || !again(page));
            told_removed.retain(|page| removed.contains(page) || !again(page));
            assert!(must.is_subset(&told_written), "round {round}: {must:?}, and told {told_written:?}");
            assert!(
                told_written.is_subset(&written),
                "round {round}: {written:?}, and told {told_written:?}"
            );
            assert_eq!(told_removed, removed, "round {round}");
        }
        faulter.kill();
        keeper.assert_ends();
    });
}

/// Its registration comes after the move, whose message is still to be read.
#[test]
fn memory_that_was_moved_before_the_session_is_tracked_too() {
    if !is_root() {
        return skip("changes::memory_that_was_moved_before_the_session_is_tracked_too", "it needs root");
    }
    within(WATCHDOG, || {
        const MAYMOVE: i32 = 1;
        let source = foreign_source();
        let (mut faulter, regions) = foreign("private");
        let to: usize = faulter.main.ask("reserve 100").parse().unwrap();
        let from = faulter.at(0, 50);
        faulter.main.tell(&format!("remap {from} 100 100 {MAYMOVE} {to}"));
        let main = &faulter.main;
        wait_until("it waits in mremap", || main.sleeps_in("userfaultfd_event_wait_completion"));
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        let options = Options::DEFAULT.track_writes(true);
        let reference = "app".parse().unwrap();
        let session = Session::attach(source.server.address(), &reference, options, &memory).unwrap();
        faulter.let_go();
        assert_eq!(faulter.main.answer(), Some(to.to_string()));
        faulter.main.assert_reads(to, &source.bytes[50 * PAGE..150 * PAGE]);
        assert_eq!(session.take_changes().unwrap(), Changes::default());
        faulter.main.does(&format!("write {} 1 9", to + 7 * PAGE));
        let changes = session.take_changes().unwrap();
        assert_eq!((changes.written.len(), changes.removed.len()), (1, 0));
        assert_eq!(changes.written[0], to + 7 * PAGE..to + 8 * PAGE);
        assert_eq!(session.error(), None);
    });
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    if !is_root() {
        return skip("changes::what_cannot_be_tracked_is_refused_by_name", "it needs root");
    }
    within(WATCHDOG, || {
        let source = foreign_source();
        for (kind, sharing, with_pid, why) in [
            ("private", Sharing::Private, false, "the process's pid"),
            ("memfd", Sharing::Shared(1), true, "region 0 is shared memory"),
        ] {
            let faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{FOREIGN_PAGES}")]);
            let region = ForeignRegion { sharing, ..faulter.region(0, "mem", 0) };
            let pid = with_pid.then_some(faulter.main.pid);
            let memory = ForeignMemory {
                uffd: faulter.uffd(),
                regions: &[region],
                state: None,
                pid,
                is_registered: true,
            };
            let options = Options::DEFAULT.track_writes(true);
            let reference = "app".parse().unwrap();
            let error = Session::attach(source.server.address(), &reference, options, &memory).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    });
}
