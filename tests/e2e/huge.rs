//! Memory of another process in pages of 2 MiB (hugetlb), which the kernel installs whole.

use crate::session::Source;
use postcopy::{ForeignMemory, ForeignRegion, LossPolicy, Options, Session, SessionError, Sharing};
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::pool::HugePool;
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use std::time::Duration;

const HUGE_PAGES: usize = 512;
/// Huge pages of the region.
const COUNT: usize = 5;
/// The page of the file that it begins with: within a chunk, so that each huge page is, too.
const FIRST: usize = 3;
const CHUNK: usize = 64 << 10;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);
const SIGBUS: i32 = 7;
const DONTNEED: i32 = 4;
const REMOVE: i32 = 9;

fn start() -> Source {
    let mut bytes = memory_like((FIRST + COUNT * HUGE_PAGES + 7) * PAGE, 71);
    bytes[1000 * PAGE..1100 * PAGE].fill(0);
    // The fourth one is zero, which nobody has to be asked for.
    bytes[(FIRST + 3 * HUGE_PAGES - 1) * PAGE..(FIRST + 4 * HUGE_PAGES + 1) * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

impl Source {
    fn huge(&self, page: usize, count: usize) -> &[u8] {
        &self.bytes[(FIRST + page) * PAGE..(FIRST + page + count) * PAGE]
    }

    fn attach_huge(
        &self,
        faulter: &Faulter,
        regions: &[ForeignRegion],
        options: Options,
    ) -> Result<Session, SessionError> {
        let pid = Some(faulter.main.pid);
        let memory = ForeignMemory { uffd: faulter.uffd(), regions, state: None, pid, is_registered: true };
        Session::attach(self.server.address(), &"app".parse().unwrap(), options, &memory)
    }
}

/// A process with so much huge memory of a kind, and its region.
fn faulter(kind: &str, sharing: Sharing) -> (Faulter, [ForeignRegion; 1]) {
    let faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{}", COUNT * HUGE_PAGES)]);
    let region = faulter.huge_region(0, "mem", (FIRST * PAGE) as u64, sharing);
    (faulter, [region])
}

/// Runs a test with a server and so many free huge pages.
fn with_pool(test: &str, pages: usize, work: impl FnOnce(Source, &HugePool) + Send + 'static) {
    if !is_root() {
        return skip(&format!("huge::{test}"), "the pool of huge pages is root's");
    }
    let pool = HugePool::with_free(pages);
    within(WATCHDOG, move || work(start(), &pool));
}

#[test]
fn a_huge_page_comes_whole_from_wherever_in_the_file() {
    with_pool("a_huge_page_comes_whole_from_wherever_in_the_file", 2 * COUNT, |source, _| {
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            for fill in [false, true] {
                let (mut faulter, regions) = faulter(kind, sharing);
                let options = Options::DEFAULT.fill(fill);
                let session = source.attach_huge(&faulter, &regions, options).unwrap();
                faulter.let_go();
                let mut other = faulter.thread();
                // Two wait for the same one, at different places of it.
                other.tell(&format!("read {} 2", faulter.at(0, HUGE_PAGES + 510)));
                faulter.assert_reads(0, HUGE_PAGES + 200, source.huge(HUGE_PAGES + 200, 1));
                other.assert_answers(faulter.at(0, HUGE_PAGES + 510), source.huge(HUGE_PAGES + 510, 2));
                if fill {
                    session.wait_resident(MINUTE).unwrap();
                }
                faulter.main.does(&format!("write {} 3 42", faulter.at(0, 3 * HUGE_PAGES + 5)));
                faulter.assert_reads(0, 3 * HUGE_PAGES, &[0; 5 * PAGE]);
                faulter.assert_reads(0, 3 * HUGE_PAGES + 5, &[42; 3 * PAGE]);
                faulter.main.does(&format!("kernel-write {} 2 43", faulter.at(0, 4 * HUGE_PAGES)));
                faulter.assert_reads(0, 4 * HUGE_PAGES + 2, source.huge(4 * HUGE_PAGES + 2, 510));
                faulter.assert_reads(0, 0, source.huge(0, 3 * HUGE_PAGES));
                let progress = session.progress();
                assert_eq!(progress.resident_pages, (COUNT * HUGE_PAGES) as u64, "{progress:?}");
                assert_eq!(session.error(), None);
            }
        }
    });
}

#[test]
fn huge_memory_that_is_given_back_moved_and_forked_stays_right() {
    // A child that writes needs pages of its own.
    with_pool("huge_memory_that_is_given_back_moved_and_forked_stays_right", 3 * COUNT, |source, _| {
        let page = |n: usize| source.huge(n * HUGE_PAGES, HUGE_PAGES);
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            let (mut faulter, regions) = faulter(kind, sharing);
            let session = source.attach_huge(&faulter, &regions, Options::DEFAULT).unwrap();
            faulter.let_go();
            let at = |n: usize| faulter.at(0, n * HUGE_PAGES);
            let (first, second, fourth, fifth) = (at(0), at(1), at(3), at(4));
            let is_private = sharing == Sharing::Private;
            let advice = if is_private { DONTNEED } else { REMOVE };
            faulter.main.assert_reads(first, page(0));
            let mut child = faulter.fork();
            // The first was there, the second is absent.
            faulter.main.does(&format!("advise {advice} {first} {}", 2 * HUGE_PAGES));
            faulter.main.assert_reads(first, &vec![0; 2 * HUGE_PAGES * PAGE]);
            let zeros = vec![0; HUGE_PAGES * PAGE];
            child.assert_reads(first, if is_private { page(0) } else { &zeros });
            child.assert_reads(second, if is_private { page(1) } else { &zeros });
            child.does(&format!("write {fifth} 1 9"));
            let written = [&[9; PAGE], &page(4)[PAGE..]].concat();
            faulter.main.assert_reads(fifth, if is_private { page(4) } else { &written });
            child.assert_reads(fifth, &written);
            // An absent one is moved, with one that is there.
            let reserved: usize = faulter.main.ask(&format!("reserve {}", 4 * HUGE_PAGES)).parse().unwrap();
            let to = reserved.next_multiple_of(2 << 20);
            let pages = 2 * HUGE_PAGES;
            assert_eq!(faulter.main.ask(&format!("remap {fourth} {pages} {pages} 1 {to}")), to.to_string());
            faulter.main.assert_reads(to, page(3));
            child.assert_reads(fourth, page(3));
            faulter.main.does(&format!("unmap {to} {HUGE_PAGES}"));
            let third = source.huge(2 * HUGE_PAGES + 10, 1);
            child.assert_reads(faulter.at(0, 2 * HUGE_PAGES + 10), third);
            session.fill().unwrap();
            session.wait_resident(MINUTE).unwrap();
            faulter.assert_reads(0, 2 * HUGE_PAGES, page(2));
            assert_eq!(session.error(), None);
        }
    });
}

#[test]
fn an_empty_pool_is_waited_for_until_the_deadline() {
    with_pool("an_empty_pool_is_waited_for_until_the_deadline", 1, |source, pool| {
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(3));
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            for options in [options.on_loss(LossPolicy::Wait), options] {
                pool.set_free(1);
                let (mut faulter, regions) = faulter(kind, sharing);
                let session = source.attach_huge(&faulter, &regions, options).unwrap();
                faulter.let_go();
                faulter.assert_reads(0, 9, source.huge(9, 1));
                let touched = faulter.at(0, HUGE_PAGES + 10);
                faulter.main.tell(&format!("read {touched} 1"));
                // It is said that the page could not be had. Until then nothing else happens.
                let error = session.wait_error(MINUTE).expect("there is none left");
                let why = ["could not be installed", "the kernel had no memory"];
                assert!(why.iter().any(|why| error.contains(why)), "{error}");
                if options.on_loss == LossPolicy::Wait {
                    assert!(!faulter.main.has_answered(), "it waits");
                    pool.set_free(1);
                    faulter.main.assert_answers(touched, source.huge(HUGE_PAGES + 10, 1));
                    faulter.assert_reads(0, 10, source.huge(10, 2));
                } else {
                    assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
                }
            }
        }
    });
}

#[test]
fn zeros_of_a_huge_page_wait_for_the_pool_too() {
    with_pool("zeros_of_a_huge_page_wait_for_the_pool_too", 1, |source, pool| {
        let (mut faulter, regions) = faulter("huge", Sharing::Private);
        let session = source.attach_huge(&faulter, &regions, Options::DEFAULT).unwrap();
        faulter.let_go();
        let second = faulter.at(0, HUGE_PAGES);
        faulter.main.does(&format!("advise {DONTNEED} {second} {HUGE_PAGES}"));
        faulter.assert_reads(0, 9, source.huge(9, 1));
        let before = session.progress().faults;
        faulter.main.tell(&format!("read {second} 1"));
        wait_until("it has touched it again and again", || session.progress().faults > before + 5);
        assert!(!faulter.main.has_answered(), "there is none left");
        pool.set_free(1);
        faulter.main.assert_answers(second, &[0; PAGE]);
        assert_eq!(session.error(), None);
    });
}

#[test]
fn a_part_of_a_huge_page_can_be_removed() {
    with_pool("a_part_of_a_huge_page_can_be_removed", COUNT, |source, _| {
        let (mut faulter, regions) = faulter("huge-shared", Sharing::Shared(1));
        let session = source.attach_huge(&faulter, &regions, Options::DEFAULT).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 0, source.huge(0, 1));
        // There; absent, with and without its beginning; all of it, in two parts.
        let removed = [(100, 9), (512 + 5, 100), (1024, 7), (2048, 200), (2248, 312)];
        let mut expected = source.huge(0, COUNT * HUGE_PAGES).to_vec();
        for (page, count) in removed {
            faulter.main.does(&format!("advise {REMOVE} {} {count}", faulter.at(0, page)));
            expected[page * PAGE..(page + count) * PAGE].fill(0);
        }
        faulter.assert_reads(0, 0, &expected);
        session.fill().unwrap();
        session.wait_resident(MINUTE).unwrap();
        faulter.assert_reads(0, 0, &expected);
        assert_eq!(session.error(), None);
    });
}

#[test]
fn huge_memory_that_the_session_was_not_told_of_is_zero_or_sigbus() {
    with_pool("huge_memory_that_the_session_was_not_told_of_is_zero_or_sigbus", COUNT, |source, _| {
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            let (mut faulter, mut regions) = faulter(kind, sharing);
            regions[0].len = 2 * HUGE_PAGES * PAGE;
            let session = source.attach_huge(&faulter, &regions, Options::DEFAULT).unwrap();
            faulter.let_go();
            faulter.assert_reads(0, 9, source.huge(9, 1));
            faulter.main.tell(&format!("read {} 1", faulter.at(0, 3 * HUGE_PAGES + 5)));
            match sharing {
                Sharing::Private => faulter.main.assert_answers(0, &[0; PAGE]),
                Sharing::Shared(_) => {
                    assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
                    assert!(session.error().unwrap().contains("is beyond what the session was told of"));
                }
            }
        }
    });
}

#[test]
fn what_is_absent_of_huge_memory_is_sigbus_at_the_end() {
    with_pool("what_is_absent_of_huge_memory_is_sigbus_at_the_end", COUNT, |source, _| {
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            let (mut faulter, regions) = faulter(kind, sharing);
            let session = source.attach_huge(&faulter, &regions, Options::DEFAULT).unwrap();
            faulter.let_go();
            faulter.assert_reads(0, HUGE_PAGES, source.huge(HUGE_PAGES, 1));
            assert!(session.end(MINUTE));
            faulter.assert_reads(0, HUGE_PAGES + 1, source.huge(HUGE_PAGES + 1, 511));
            faulter.main.tell(&format!("read {} 1", faulter.at(0, 2 * HUGE_PAGES + 77)));
            assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
        }
    });
}

#[test]
fn a_killed_pager_of_huge_memory_is_succeeded() {
    with_pool("a_killed_pager_of_huge_memory_is_succeeded", COUNT, |source, _| {
        for (kind, sharing) in [("huge", Sharing::Private), ("huge-shared", Sharing::Shared(1))] {
            let (mut faulter, regions) = faulter(kind, sharing);
            let mut keeper = Keeper::start(
                &source.server.address().to_string(),
                "app",
                Serving { fill: true, ..Serving::default() },
                &faulter,
                &regions,
            );
            faulter.let_go();
            for n in 0..COUNT {
                // While one is gathered.
                faulter.main.tell(&format!("read {} 1", faulter.at(0, n * HUGE_PAGES + 100)));
                std::thread::park_timeout(Duration::from_millis(n as u64));
                keeper.kill_worker();
                let address = faulter.at(0, n * HUGE_PAGES + 100);
                faulter.main.assert_answers(address, source.huge(n * HUGE_PAGES + 100, 1));
            }
            faulter.assert_reads(0, 0, source.huge(0, COUNT * HUGE_PAGES));
            faulter.kill();
            keeper.assert_ends();
        }
    });
}

#[test]
fn memory_is_refused_that_is_not_what_was_said() {
    with_pool("memory_is_refused_that_is_not_what_was_said", COUNT, |source, _| {
        let pages = COUNT * HUGE_PAGES;
        for kind in ["private", "shared", "memfd", "huge", "huge-shared"] {
            let faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{pages}")]);
            let sharing = if kind.contains("private") { Sharing::Private } else { Sharing::Shared(1) };
            let region = |page_bytes| {
                let region = faulter.region(0, "mem", 0);
                ForeignRegion { address: region.address.next_multiple_of(page_bytes), page_bytes, ..region }
            };
            let region = |page_bytes| ForeignRegion { sharing, len: 2 << 20, ..region(page_bytes) };
            let is_huge = kind.starts_with("huge");
            let wrong = if is_huge { PAGE } else { 2 << 20 };
            let refused = |region: ForeignRegion| {
                source.attach_huge(&faulter, &[region], Options::DEFAULT).unwrap_err().to_string()
            };
            let error = refused(region(wrong));
            assert!(error.contains(&format!("pages of {wrong} bytes, and has such of")), "{kind}: {error}");
            let error = refused(region(8192));
            assert!(error.contains("pages of 8192 bytes"), "{error}");
            let elsewhere = ForeignRegion { address: 1 << 40, ..region(PAGE) };
            let error = refused(elsewhere);
            assert!(error.contains("no memory registered"), "{error}");
            let right = region(if is_huge { 2 << 20 } else { PAGE });
            drop(source.attach_huge(&faulter, &[right], Options::DEFAULT).unwrap());
        }
    });
}
