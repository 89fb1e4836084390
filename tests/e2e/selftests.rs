//! What the kernel's own tests of userfaultfd check (tools/testing/selftests/mm), as users of postcopy see it: written anew
//! from what they are about, over each kind of memory.

use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{Changes, ForeignMemory, ForeignRegion, Options, ServerAddress, Session, Sharing};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::mounts::{Swap, Tmpfs};
use postcopy_tests::pool::HugePool;
use postcopy_tests::{PAGE, is_root, skip};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const HUGE_PAGES: usize = 512;
const PAGES: usize = 3 * HUGE_PAGES;
const CHUNK: usize = 64 << 10;
const ZEROS: Range<usize> = 600..900;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);
const KINDS: [&str; 6] = ["private", "memfd-private", "shared", "memfd", "huge", "huge-shared"];
const DONTNEED: i32 = 4;
const REMOVE: i32 = 9;
const PAGEOUT: i32 = 21;
const COLLAPSE: i32 = 25;

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 99);
    bytes[ZEROS.start * PAGE..ZEROS.end * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

fn is_shared(kind: &str) -> bool {
    ["shared", "memfd", "huge-shared"].contains(&kind) || kind.starts_with("file=")
}

/// Runs a test with a server and free huge pages.
fn with_source(test: &str, work: impl FnOnce(Source) + Send + 'static) {
    if !is_root() {
        return skip(&format!("selftests::{test}"), "attaching, and the pool of huge pages, need root");
    }
    let pool = HugePool::with_free(4 * PAGES / HUGE_PAGES);
    within(WATCHDOG, move || work(start()));
    drop(pool);
}

/// A process with memory of a kind, and its region, which is all of the image.
fn faulter(kind: &str) -> (Faulter, ForeignRegion) {
    let faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{PAGES}")]);
    let sharing = if is_shared(kind) { Sharing::Shared(1) } else { Sharing::Private };
    let region = match kind.starts_with("huge") {
        true => faulter.huge_region(0, "mem", 0, sharing),
        false => ForeignRegion { sharing, ..faulter.region(0, "mem", 0) },
    };
    (faulter, region)
}

fn attach(server: &ServerAddress, faulter: &mut Faulter, region: ForeignRegion, options: Options) -> Session {
    let pid = Some(faulter.main.pid);
    let regions = [region];
    let memory =
        ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid, is_registered: true };
    let session = Session::attach(server, &"app".parse().unwrap(), options, &memory).unwrap();
    faulter.let_go();
    session
}

impl Source {
    fn attached(&self, kind: &str, options: Options) -> (Faulter, Session) {
        let (mut faulter, region) = faulter(kind);
        let session = attach(self.server.address(), &mut faulter, region, options);
        (faulter, session)
    }

    fn of(&self, pages: Range<usize>) -> &[u8] {
        &self.bytes[pages.start * PAGE..pages.end * PAGE]
    }
}

/// uffd-unit-tests, `events`: a process touches its memory in order; so does its child, which then moves it, touches it
/// where it went, and gives it back.
#[test]
fn events_of_a_process_and_its_child() {
    with_source("events_of_a_process_and_its_child", |source| {
        for kind in KINDS {
            let (mut faulter, session) = source.attached(kind, Options::DEFAULT);
            let half = PAGES / 2 / HUGE_PAGES * HUGE_PAGES;
            faulter.assert_reads(0, 0, source.of(0..half));
            let mut child = faulter.fork();
            let at = faulter.at(0, 0);
            child.assert_reads(at, &source.bytes);
            child.does(&format!("write {at} {PAGES} 7"));
            // Private memory is its own now, and shared memory both have.
            let expected = if is_shared(kind) { vec![7; PAGES * PAGE] } else { source.bytes.clone() };
            faulter.assert_reads(0, 0, &expected);
            let to = child.ask(&format!("reserve {}", 2 * PAGES)).parse::<usize>().unwrap();
            let to = to.next_multiple_of(HUGE_PAGES * PAGE);
            assert_eq!(child.ask(&format!("remap {at} {PAGES} {PAGES} 1 {to}")), to.to_string(), "{kind}");
            child.assert_reads(to, &vec![7; PAGES * PAGE]);
            // What is moved and what is given back are independent of the parent's.
            child.does(&format!("advise {DONTNEED} {to} {PAGES}"));
            let left = if is_shared(kind) { 7 } else { 0 };
            child.assert_reads(to, &vec![left; PAGES * PAGE]);
            faulter.assert_reads(0, 0, &expected);
            child.tell("exit");
            assert_eq!(child.answer(), None);
            let advice = if is_shared(kind) { REMOVE } else { DONTNEED };
            faulter.main.does(&format!("advise {advice} {at} {PAGES}"));
            faulter.assert_reads(0, 0, &vec![0; PAGES * PAGE]);
            assert_eq!(session.error(), None, "{kind}");
        }
    });
}

/// uffd-stress: threads add to counters all over memory whose pages come meanwhile, and no addition is lost.
#[test]
fn no_addition_of_many_threads_is_lost() {
    with_source("no_addition_of_many_threads_is_lost", |source| {
        const ADDITIONS: usize = 400;
        for (round, kind) in KINDS.into_iter().cycle().take(2 * KINDS.len()).enumerate() {
            let (mut faulter, session) = source.attached(kind, Options::DEFAULT);
            let mut threads = vec![faulter.thread(), faulter.thread()];
            threads.push(faulter.thread());
            // Every second time the fill races with them.
            if round % 2 == 0 {
                session.fill().unwrap();
            }
            let mut added: BTreeMap<usize, u64> = BTreeMap::new();
            for _ in 0..ADDITIONS {
                // A few pages that all meet at, and others.
                let bound = if fastrand::bool() { 16 } else { PAGES };
                let pages: Vec<_> = threads.iter().map(|_| fastrand::usize(..bound)).collect();
                for (thread, page) in threads.iter_mut().zip(&pages) {
                    thread.tell(&format!("add {}", faulter.at(0, *page)));
                    *added.entry(*page).or_default() += 1;
                }
                threads.iter_mut().for_each(|thread| drop(thread.answer().expect("it lives")));
            }
            for (page, count) in added {
                let first = source.of(page..page + 1).first_chunk().unwrap();
                let expected = u64::from_ne_bytes(*first).wrapping_add(count);
                let found: u64 = faulter.main.ask(&format!("add {}", faulter.at(0, page))).parse().unwrap();
                assert_eq!(found, expected, "{kind}, page {page}");
            }
            assert_eq!(session.error(), None, "{kind}");
        }
    });
}

/// uffd-unit-tests, `minor`, `minor-collapse` and `zeropage`: pages that a file has already are what they are, absent ones
/// come, also where those of 2 MiB are asked for; zeros are pages like others.
#[test]
fn pages_that_a_file_has_already_are_left_as_they_are() {
    with_source("pages_that_a_file_has_already_are_left_as_they_are", |source| {
        let tmpfs = Tmpfs::of_bytes(4 * PAGES * PAGE);
        for fill in [false, true] {
            let path = tmpfs.path().join(format!("{fill}"));
            let (mut faulter, region) = faulter(&format!("file={}", path.display()));
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            let mut expected = source.bytes.clone();
            for page in [0, 17, 511, 512, ZEROS.start + 3, PAGES - 1] {
                file.write_all_at(&[9; PAGE], (page * PAGE) as u64).unwrap();
                expected[page * PAGE..(page + 1) * PAGE].fill(9);
            }
            let options = Options::DEFAULT.fill(fill);
            let session = attach(source.server.address(), &mut faulter, region, options);
            faulter.assert_reads(0, 500, &expected[500 * PAGE..530 * PAGE]);
            // Refused while pages are absent, or done with those that there are.
            let collapse = format!("advise {COLLAPSE} {} {PAGES}", faulter.at(0, 0));
            let _ = faulter.main.ask(&collapse);
            faulter.assert_reads(0, 0, &expected);
            faulter.main.does(&format!("write {} 1 3", faulter.at(0, ZEROS.start + 9)));
            expected[(ZEROS.start + 9) * PAGE..(ZEROS.start + 10) * PAGE].fill(3);
            let _ = faulter.main.ask(&collapse);
            faulter.assert_reads(0, 0, &expected);
            assert_eq!(session.error(), None);
        }
    });
}

/// uffd-unit-tests, `poison` and `sigbus`: lost pages are an error for whoever touches them, again and again, and the
/// others are right.
#[test]
fn lost_pages_among_others_are_errors() {
    with_source("lost_pages_among_others_are_errors", |source| {
        // Some chunks of the second 2 MiB, of which the kernel installs huge pages whole, and none of zeros.
        let is_lost = |chunk: u64| (32..37).contains(&chunk) && chunk % 2 == 1;
        let lies = Lies::default().chunk(move |_, answer| {
            vec![if is_lost(answer.chunk) { ChunkAnswer { result: None, ..answer } } else { answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        for kind in KINDS {
            let (mut faulter, region) = faulter(kind);
            let session = attach(chaos.address(), &mut faulter, region, Options::DEFAULT);
            let is_huge = kind.starts_with("huge");
            for page in (5..PAGES).step_by(16).chain((6..PAGES).step_by(16)) {
                let lost = match is_huge {
                    true => (HUGE_PAGES..2 * HUGE_PAGES).contains(&page),
                    false => is_lost((page / 16) as u64),
                };
                let read = read_from_outside(faulter.main.pid, faulter.at(0, page), PAGE);
                match lost {
                    true => assert_eq!(read, Err(nix::Error::EFAULT), "{kind}, page {page}"),
                    false => assert!(read.unwrap() == source.of(page..page + 1), "{kind}, page {page}"),
                }
            }
            // Whichever of them is answered first.
            let error = session.error().unwrap();
            assert!(["chunk 33", "chunk 35"].iter().any(|chunk| error.contains(chunk)), "{kind}: {error}");
        }
    });
}

/// uffd-wp-mremap: what was written is told of where it has been moved to, also from swap, and by whole page tables.
#[test]
fn what_was_written_is_known_where_it_is_moved_to() {
    with_source("what_was_written_is_known_where_it_is_moved_to", |source| {
        let swap = Swap::of_mib(64);
        for (pages, swapped) in [(1, false), (1, true), (16, true), (HUGE_PAGES, false), (HUGE_PAGES, true)] {
            let options = Options::DEFAULT.track_writes(true).fill(true);
            let (mut faulter, session) = source.attached("private", options);
            session.wait_resident(MINUTE).unwrap();
            let case = format!("{pages} pages, swapped: {swapped}");
            let from = faulter.at(0, 0).next_multiple_of(HUGE_PAGES * PAGE);
            let first = (from - faulter.at(0, 0)) / PAGE;
            let written: Vec<_> = (0..pages).step_by(3).collect();
            let mut expected = source.of(first..first + pages).to_vec();
            for page in &written {
                faulter.main.does(&format!("write {} 1 5", from + page * PAGE));
                expected[page * PAGE..(page + 1) * PAGE].fill(5);
            }
            if swapped {
                faulter.main.does(&format!("advise {PAGEOUT} {from} {pages}"));
            }
            let to = faulter.main.ask(&format!("reserve {}", 3 * HUGE_PAGES)).parse::<usize>().unwrap();
            let to = to.next_multiple_of(HUGE_PAGES * PAGE);
            assert_eq!(faulter.main.ask(&format!("remap {from} {pages} {pages} 1 {to}")), to.to_string());
            let told = session.take_changes().unwrap();
            let at = |page: &usize| to + page * PAGE..to + (page + 1) * PAGE;
            let expected_runs: Vec<_> = written.iter().map(at).collect();
            assert_eq!(told, Changes { written: expected_runs, removed: vec![] }, "{case}");
            faulter.main.assert_reads(to, &expected);
            assert_eq!(session.take_changes().unwrap(), Changes::default(), "{case}: reading is not writing");
            // Each of them is seen again where it is now.
            for page in (0..pages).rev().step_by(2) {
                faulter.main.does(&format!("write {} 1 6", to + page * PAGE));
                let told = session.take_changes().unwrap();
                assert_eq!(told, Changes { written: vec![at(&page)], removed: vec![] }, "{case}");
            }
            assert_eq!(session.error(), None);
        }
        drop(swap);
    });
}

/// pagemap_ioctl: patterns of written pages, more of them than are asked for at once, with removed, swapped and collapsed
/// ones among them.
#[test]
fn patterns_of_written_pages_are_told_exactly() {
    with_source("patterns_of_written_pages_are_told_exactly", |source| {
        let swap = Swap::of_mib(64);
        type Pattern = (&'static str, fn(usize) -> bool);
        let patterns: [Pattern; 6] = [
            ("none", |_| false),
            ("all", |_| true),
            ("every second one", |page| page % 2 == 0),
            ("the first and the last one", |page| page == 0 || page == PAGES - 1),
            ("one in the middle", |page| page == PAGES / 2),
            ("around each 2 MiB", |page| page % HUGE_PAGES < 2 || page % HUGE_PAGES == HUGE_PAGES - 1),
        ];
        let options = Options::DEFAULT.track_writes(true);
        let session = Session::open(source.server.address(), &"app".parse().unwrap(), options).unwrap();
        let mut region = session.map("mem").unwrap();
        for (round, (name, is_written)) in patterns.into_iter().cycle().take(4 * patterns.len()).enumerate() {
            let written: Vec<_> = (0..PAGES).filter(|page| is_written(*page)).collect();
            for page in &written {
                region[page * PAGE + 100] = u8::try_from(round).unwrap();
            }
            // From the second time on: pushed out, or as large as they get.
            let advice = [None, Some(PAGEOUT), Some(COLLAPSE), None][round / patterns.len()];
            if let Some(advice) = advice {
                let _ = advise(&region, advice);
            }
            let told = region.take_changes().unwrap();
            let each = told.written.iter().flat_map(|run| run.start / PAGE..run.end / PAGE);
            assert!(each.eq(written), "{name}, {advice:?}: {told:?}");
            assert!(told.removed.is_empty(), "{name}, {advice:?}: {:?}", told.removed);
            assert_eq!(region.take_changes().unwrap(), Changes::default(), "{name}, {advice:?}");
        }
        drop(swap);
    });
}

#[expect(unsafe_code, reason = "advice that changes nothing that can be seen")]
fn advise(memory: &[u8], advice: i32) -> i32 {
    let start = memory.as_ptr().cast_mut().cast();
    // SAFETY: the range is that of the borrow, whose content stays.
    unsafe { nix::libc::madvise(start, memory.len(), advice) }
}
