//! Memory of another process, filled through a userfaultfd that it has opened.

use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{LossPolicy, Options, Session, SessionError};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{EVENT_REMOVE, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::is_root;
use postcopy_tests::skip;
use std::os::fd::AsFd;
use std::time::Duration;

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const PAGES: usize = 300;
const WATCHDOG: Duration = Duration::from_secs(100);
const SIGBUS: i32 = 7;
const FILLING: Options =
    Options { fill: true, fault_deadline: Duration::from_secs(30), on_loss: LossPolicy::Poison };

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 70);
    bytes[100 * PAGE..140 * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

impl Source {
    fn attach(&self, faulter: &Faulter, options: Options) -> Result<Session, SessionError> {
        // Two regions, as a guest above 3 GiB has them, not in the order of the file, within chunks.
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let reference = "app".parse().unwrap();
        Session::attach(self.server.address(), &reference, options, faulter.uffd(), &regions)
    }

    fn pages(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes[first * PAGE..(first + count) * PAGE]
    }
}

fn faulter() -> Faulter {
    Faulter::start(EVENT_REMOVE, &[197, 100])
}

/// Runs a test with a server and a process. Serving another process takes the right to serve the kernel's faults.
fn with_faulter(test: &str, work: impl FnOnce(Source, Faulter) + Send + 'static) {
    if !is_root() {
        return skip(&format!("attach::{test}"), "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || work(start(), faulter()));
}

#[test]
fn another_process_s_memory_is_filled_as_it_touches_it() {
    with_faulter("another_process_s_memory_is_filled_as_it_touches_it", |source, first| {
        for (options, mut faulter) in [(Options::default(), first), (FILLING, faulter())] {
            // A touch that waits already when somebody comes.
            faulter.tell("read 0 50 1");
            let session = source.attach(&faulter, options).unwrap();
            faulter.let_go();
            let expected = postcopy::proto::digest::Digest::of(source.pages(153, 1)).hex();
            assert_eq!(faulter.answer(), Some(expected));
            if options.fill {
                session.wait_resident(Duration::from_secs(30)).unwrap();
            }
            faulter.does("write 1 7 42");
            faulter.assert_reads(1, 7, &[42; PAGE]);
            faulter.assert_reads(1, 8, source.pages(11, 92));
            faulter.assert_reads(0, 0, source.pages(103, 197));
            faulter.assert_reads(1, 0, source.pages(3, 7));
            let progress = session.progress();
            assert_eq!((progress.total_pages, progress.poisoned_pages), (297, 0));
            assert!(!options.fill || progress.faults <= 1, "{progress:?}");
        }
    });
}

#[test]
fn what_the_owner_gives_back_stays_zero() {
    with_faulter("what_the_owner_gives_back_stays_zero", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 40, source.pages(143, 4));
        // Pages that are there, and some that never were.
        faulter.does("remove 0 42 10");
        faulter.assert_reads(0, 40, source.pages(143, 2));
        faulter.assert_reads(0, 42, &[0; 10 * PAGE]);
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        faulter.assert_reads(0, 42, &[0; 10 * PAGE]);
        faulter.assert_reads(0, 52, source.pages(155, 145));
        assert_eq!(session.progress().removed_pages, 10);
    });
}

#[test]
fn the_owner_s_exit_ends_the_session_in_order() {
    with_faulter("the_owner_s_exit_ends_the_session_in_order", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(3, 1));
        faulter.kill();
        assert!(!session.wait_end(Duration::ZERO), "nobody has tried yet");
        session.fill().unwrap();
        assert!(session.wait_end(Duration::from_secs(30)), "the fill finds nobody there");
        assert_eq!(session.error(), None, "that is no loss");
    });
}

#[test]
fn a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros() {
    with_faulter("a_session_s_end_leaves_right_bytes_or_sigbus_and_never_zeros", |source, mut faulter| {
        let session = source.attach(&faulter, Options::default()).unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 13, source.pages(16, 16));
        assert!(session.end(Duration::from_secs(30)));
        faulter.assert_reads(1, 13, source.pages(16, 16));
        faulter.tell("read 1 29 1");
        assert_eq!((faulter.answer(), faulter.dies_of()), (None, SIGBUS));
    });
}

#[test]
fn a_lost_page_is_sigbus_in_the_other_process() {
    with_faulter("a_lost_page_is_sigbus_in_the_other_process", |source, mut faulter| {
        let lies = Lies::default().chunk(|_, answer| {
            vec![if answer.chunk == 2 { ChunkAnswer { result: None, ..answer } } else { answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let regions = [faulter.region(1, "mem", 0)];
        let reference = "app".parse().unwrap();
        let session =
            Session::attach(chaos.address(), &reference, Options::default(), faulter.uffd(), &regions)
                .unwrap();
        faulter.let_go();
        faulter.assert_reads(1, 0, source.pages(0, 32));
        faulter.tell("read 1 40 1");
        assert_eq!((faulter.answer(), faulter.dies_of()), (None, SIGBUS));
        assert!(session.error().unwrap().contains("chunk 2 of image"));
    });
}

#[test]
fn an_attach_that_fails_names_why_and_loses_nothing() {
    with_faulter("an_attach_that_fails_names_why_and_loses_nothing", |source, mut faulter| {
        let (first, second) = (faulter.region(0, "mem", 0), faulter.region(1, "mem", 0));
        let with = |change: fn(&mut postcopy::ForeignRegion)| {
            let mut region = first.clone();
            change(&mut region);
            region
        };
        let cases = [
            (vec![with(|r| r.len -= 1)], "region 0", "multiples of 4096"),
            (vec![second.clone(), with(|r| r.address += 1)], "region 1", "multiples of 4096"),
            (vec![with(|r| r.len = 0)], "region 0", "not zero"),
            (vec![with(|r| r.len = usize::MAX - 4095)], "region 0", "beyond all addresses"),
            (vec![with(|r| r.path = b"none".to_vec())], "region 0", "\"none\""),
            (vec![with(|r| r.offset_bytes = 104 * 4096)], "region 0", "1228800 bytes"),
            (vec![with(|r| r.offset_bytes = 5)], "region 0", "from byte 5"),
            (vec![with(|r| r.offset_bytes = u64::MAX - 4095)], "region 0", "1228800 bytes"),
            (vec![first.clone(), second.clone(), with(|r| r.len = 4096)], "region 2", "overlaps region 0"),
        ];
        let reference = "app".parse().unwrap();
        let address = source.server.address();
        let attach =
            |fd, regions: &[_]| Session::attach(address, &reference, Options::default(), fd, regions);
        for (regions, which, why) in cases {
            let error = attach(faulter.uffd(), &regions).unwrap_err().to_string();
            assert!(error.contains(which) && error.contains(why), "{error}");
        }
        let file = tempfile::tempfile().unwrap();
        let error = attach(file.as_fd(), std::slice::from_ref(&first)).unwrap_err().to_string();
        assert!(error.contains("is no userfaultfd"), "{error}");
        let nowhere = "http://127.0.0.1:1".parse().unwrap();
        let regions = std::slice::from_ref(&first);
        Session::attach(&nowhere, &reference, Options::default(), faulter.uffd(), regions).unwrap_err();
        let moving = Faulter::start(EVENT_REMOVE | 1 << 2, &[10]);
        let error = attach(moving.uffd(), &[moving.region(0, "mem", 0)]).unwrap_err().to_string();
        assert!(error.contains("EVENT_REMAP"), "{error}");

        // A touch during all of that waits, and is right in the end.
        faulter.tell("read 0 9 1");
        let session = source.attach(&faulter, Options::default()).unwrap();
        let expected = postcopy::proto::digest::Digest::of(source.pages(112, 1)).hex();
        assert_eq!(faulter.answer(), Some(expected));
        drop(session);
    });
}
