//! Memory of one process that is filled while the process reads it and gives it back.

use super::{CHUNK, DONTNEED, faulter, with_faulter};
use crate::session::FILLING;
use crate::session::Source;
use postcopy::{ForeignMemory, Options, Session, SessionError};
use postcopy_tests::PAGE;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use std::os::fd::AsFd;
use std::time::Duration;

#[test]
fn another_process_s_memory_is_filled_as_it_touches_it() {
    with_faulter("another_process_s_memory_is_filled_as_it_touches_it", |source, first| {
        for (options, mut faulter) in [(Options::DEFAULT, first), (FILLING, faulter())] {
            // A fault that waits already when the session attaches.
            let waits = faulter.at(0, 50);
            faulter.main.tell(&format!("read {waits} 1"));
            let session = source.attach(&faulter, options).unwrap();
            faulter.let_go();
            faulter.main.assert_answers(waits, source.pages(153, 1));
            if options.fill {
                session.wait_resident(Duration::from_secs(30)).unwrap();
            }
            faulter.main.does(&format!("write {} 1 42", faulter.at(1, 7)));
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
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 40, source.pages(143, 4));
        // Pages that are there, and some that never were.
        faulter.main.does(&format!("advise {DONTNEED} {} 10", faulter.at(0, 42)));
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
        let attach = |uffd, regions: &[_]| {
            let memory = ForeignMemory { uffd, regions, state: None, pid: None, is_registered: true };
            Session::attach(address, &reference, Options::DEFAULT, &memory)
        };
        for (regions, which, why) in cases {
            let error = attach(faulter.uffd(), &regions).unwrap_err().to_string();
            assert!(error.contains(which) && error.contains(why), "{error}");
        }
        let tracking = source.attach(&faulter, Options::DEFAULT.track_writes(true));
        assert!(matches!(tracking, Err(SessionError::NoTracking(_))));
        let file = tempfile::tempfile().unwrap();
        let error = attach(file.as_fd(), std::slice::from_ref(&first)).unwrap_err().to_string();
        assert!(error.contains("is no userfaultfd"), "{error}");
        let nowhere = "http://127.0.0.1:1".parse().unwrap();
        let regions = std::slice::from_ref(&first);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions, state: None, pid: None, is_registered: true };
        Session::attach(&nowhere, &reference, Options::DEFAULT, &memory).unwrap_err();

        // A touch during all of that waits, and is right in the end.
        let waits = faulter.at(0, 9);
        faulter.main.tell(&format!("read {waits} 1"));
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.main.assert_answers(waits, source.pages(112, 1));
        drop(session);
    });
}

#[test]
fn transparent_huge_pages_do_not_swallow_what_is_absent() {
    with_faulter("transparent_huge_pages_do_not_swallow_what_is_absent", |_, _| {
        const HUGEPAGE: i32 = 14;
        const COLLAPSE: i32 = 25;
        const HUGE_PAGES: usize = 512;
        let source = Source::start(memory_like(4 * HUGE_PAGES * PAGE, 72), CHUNK);
        for kind in ["private", "memfd", "memfd-private"] {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{}", 3 * HUGE_PAGES)]);
            let region = match kind {
                "memfd" => faulter.shared_region(0, "mem", 7 * PAGE as u64, 1),
                _ => faulter.region(0, "mem", 7 * PAGE as u64),
            };
            faulter.main.does(&format!("advise {HUGEPAGE} {} {}", faulter.at(0, 0), 3 * HUGE_PAGES));
            let uffd = faulter.uffd();
            let pid = Some(faulter.main.pid);
            let memory = ForeignMemory { uffd, regions: &[region], state: None, pid, is_registered: true };
            let reference = "app".parse().unwrap();
            let options = Options::DEFAULT;
            let session = Session::attach(source.server.address(), &reference, options, &memory).unwrap();
            faulter.let_go();
            // All of 2 MiB aligned, but for one page; all; and a few.
            let start = (faulter.at(0, 0).next_multiple_of(2 << 20) - faulter.at(0, 0)) / PAGE;
            let image = |page: usize, count: usize| source.pages(7 + page, count);
            let last = start + HUGE_PAGES - 1;
            faulter.assert_reads(0, start, image(start, HUGE_PAGES - 1 - 16));
            let mut collapse = |page: usize| {
                let address = faulter.at(0, page);
                faulter.main.ask(&format!("advise {COLLAPSE} {address} {HUGE_PAGES}"))
            };
            assert!(collapse(start).starts_with("error"), "{kind}: it lacks pages");
            let _ = collapse(start + HUGE_PAGES);
            faulter.assert_reads(0, last, image(last, 1));
            faulter.assert_reads(0, last - 16, image(last - 16, 16));
            let faults = session.progress().faults;
            let collapsed =
                faulter.main.ask(&format!("advise {COLLAPSE} {} {HUGE_PAGES}", faulter.at(0, start)));
            faulter.assert_reads(0, start, image(start, HUGE_PAGES));
            assert!(session.progress().faults == faults || collapsed.starts_with("error"), "{kind}");
            session.fill().unwrap();
            session.wait_resident(Duration::from_secs(30)).unwrap();
            faulter.assert_reads(0, 0, image(0, 3 * HUGE_PAGES));
            assert_eq!(session.error(), None);
        }
    });
}

#[test]
fn private_mappings_of_files_are_filled() {
    with_faulter("private_mappings_of_files_are_filled", |source, _| {
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd-private:197", "memfd-private:100"]);
        let session = source.attach(&faulter, FILLING).unwrap();
        faulter.let_go();
        let mut child = faulter.fork();
        faulter.main.does(&format!("advise {DONTNEED} {} 10", faulter.at(0, 150)));
        faulter.main.does(&format!("write {} 1 3", faulter.at(0, 10)));
        faulter.assert_reads(0, 11, source.pages(103 + 11, 139));
        faulter.assert_reads(0, 150, &[0; 10 * PAGE]);
        child.assert_reads(faulter.at(0, 0), source.pages(103, 197));
        session.wait_resident(Duration::from_secs(30)).unwrap();
        assert_eq!(session.error(), None);
    });
}
