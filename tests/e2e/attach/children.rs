//! Children of forks, and the marks on memory that they inherit or that no event reports:
//! MADV_WIPEONFORK, guard pages.

use super::{DONTNEED, FIRST_PAGES, with_faulter};
use crate::session::FILLING;
use crate::session::Source;
use postcopy::Options;
use postcopy::uffd::pagemap::guards_are_seen;
use postcopy_tests::faulter::{Faulter, read_from_outside};
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::{PAGE, skip};
use std::time::{Duration, Instant};

const WIPEONFORK: i32 = 18;
const KEEPONFORK: i32 = 19;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

#[test]
fn guard_pages_stay_guards_and_are_zero_once_they_are_lifted() {
    const TEST: &str = "guard_pages_stay_guards_and_are_zero_once_they_are_lifted";
    with_faulter(TEST, |source, mut faulter| {
        if !guards_are_seen() {
            return skip(TEST, "guard pages are not seen before Linux 6.15");
        }
        let session = source.attach_known(&faulter, Options::DEFAULT);
        faulter.let_go();
        let (near, far) = (faulter.at(0, 42), faulter.at(1, 50));
        for at in [near, far] {
            faulter.main.does(&format!("advise {GUARD_INSTALL} {at} 5"));
        }
        // A demand fault brings the others of its chunk, the fill all others.
        faulter.assert_reads(0, 41, source.pages(144, 1));
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        for at in [near, near + 4 * PAGE, far, far + 4 * PAGE] {
            let read = read_from_outside(faulter.main.pid, at, PAGE);
            assert_eq!(read, Err(nix::Error::EFAULT), "the guard at {at:#x} is there");
        }
        assert_eq!(session.progress().removed_pages, 10);
        for at in [near, far] {
            faulter.main.does(&format!("advise {GUARD_REMOVE} {at} 5"));
            faulter.main.assert_reads(at, &[0; 5 * PAGE]);
        }
        faulter.assert_reads(0, 47, source.pages(150, 150));
        faulter.assert_reads(1, 0, source.pages(3, 50));
        assert_eq!(session.error(), None);
    });
}

/// A hundred children would otherwise have a hundred copies of each page that one of them accesses.
#[test]
fn a_page_fault_brings_its_chunk_to_no_other_process() {
    with_faulter("a_page_fault_brings_its_chunk_to_no_other_process", |source, mut faulter| {
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        let mut child = faulter.fork();
        // The region begins with page 3 of the file, so its page 13 is the first one of chunk 1.
        let (at, image) = (faulter.at(1, 13), source.pages(16, 16));
        faulter.main.assert_reads(at, image);
        assert_eq!(session.progress().resident_pages, 16);
        child.assert_reads(at, image);
        assert_eq!(session.progress().resident_pages, 32);
        assert_eq!(session.error(), None);
    });
}

#[test]
fn children_are_served_their_own_view_to_any_depth() {
    with_faulter("children_are_served_their_own_view_to_any_depth", |source, mut faulter| {
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        let at = |page| faulter.at(0, page);
        let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
        let (a, b, c, d, e) = (at(0), at(20), at(40), at(60), at(80));
        faulter.main.assert_reads(a, image(0, 20));
        faulter.main.does(&format!("advise {DONTNEED} {b} 10"));
        faulter.main.does(&format!("write {c} 5 7"));
        let mut child = faulter.fork();
        // From here on, the parent does not see changes by the child, nor the child those by the
        // parent.
        faulter.main.does(&format!("advise {DONTNEED} {d} 10"));
        child.does(&format!("advise {DONTNEED} {e} 10"));
        let mut grandchild = faulter.start_another(&mut child, "fork");
        grandchild.does(&format!("advise {DONTNEED} {c} 2"));
        for (who, toucher) in [&mut faulter.main, &mut child, &mut grandchild].into_iter().enumerate() {
            let zeros = vec![0; 10 * PAGE];
            toucher.assert_reads(a, image(0, 20));
            toucher.assert_reads(b, &zeros);
            toucher.assert_reads(b + 10 * PAGE, image(30, 10));
            let written = if who == 2 { 2 * PAGE } else { 0 };
            toucher.assert_reads(c, &[vec![0; written], vec![7; 5 * PAGE - written]].concat());
            toucher.assert_reads(d, if who == 0 { &zeros } else { image(60, 10) });
            toucher.assert_reads(e, if who == 0 { image(80, 10) } else { &zeros });
            toucher.assert_reads(e + 10 * PAGE, image(90, 107));
        }
        // Those that are left go on when one exits, and the last one's exit ends the session.
        faulter.kill();
        for toucher in [&mut child, &mut grandchild] {
            toucher.tell("exit");
        }
        assert!(session.wait_end(Duration::from_secs(30)), "all have exited");
        assert_eq!(session.error(), None);
    });
}

/// Checks memory that a fork wipes, resident and absent, in children.
fn assert_wiped_in_children(source: &Source, faulter: &mut Faulter) {
    let (wiped, kept, zeros) = (faulter.at(0, 105), faulter.at(0, 60), vec![0; 20 * PAGE]);
    let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
    // Of one chunk; the other one is absent.
    faulter.main.does(&format!("write {} 2 7", wiped + 18 * PAGE));
    faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
    faulter.main.does(&format!("advise {WIPEONFORK} {kept} 20"));
    faulter.main.does(&format!("advise {KEEPONFORK} {kept} 20"));
    let mut child = faulter.fork();
    // After the fork, which is the parent's affair.
    faulter.main.does(&format!("advise {WIPEONFORK} {kept} 20"));
    child.assert_reads(wiped, &zeros);
    child.assert_reads(kept, image(60, 20));
    child.does(&format!("write {} 1 9", wiped + PAGE));
    let mut grandchild = faulter.start_another(&mut child, "fork");
    grandchild.assert_reads(wiped, &zeros);
    grandchild.assert_reads(kept, image(60, 20));
    let mut second = faulter.fork();
    second.assert_reads(wiped, &zeros);
    second.assert_reads(kept, &zeros);
    faulter.main.assert_reads(wiped, &[image(105, 18), &[7; 2 * PAGE]].concat());
    faulter.main.assert_reads(kept, image(60, 20));
    child.assert_reads(wiped + PAGE, &[9; PAGE]);
    for who in [&mut faulter.main, &mut child, &mut grandchild, &mut second] {
        who.assert_reads(wiped + 20 * PAGE, image(125, 72));
        who.assert_reads(kept + 20 * PAGE, image(80, 25));
    }
}

#[test]
fn what_a_fork_wipes_is_zero_in_the_child_and_never_the_image_s_bytes() {
    with_faulter(
        "what_a_fork_wipes_is_zero_in_the_child_and_never_the_image_s_bytes",
        |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::DEFAULT);
            faulter.let_go();
            assert_wiped_in_children(&source, &mut faulter);
            session.fill().unwrap();
            session.wait_resident(Duration::from_secs(30)).unwrap();
            assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
        },
    );
}

#[test]
fn what_a_fork_wipes_is_zero_while_the_fill_goes_on() {
    with_faulter("what_a_fork_wipes_is_zero_while_the_fill_goes_on", |source, mut faulter| {
        let session = source.attach_known(&faulter, Options::DEFAULT);
        faulter.let_go();
        let wiped = faulter.at(0, 20);
        faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 170"));
        // A fork takes a while with these, and so does the look at them.
        faulter.main.does("mappings 1000");
        faulter.main.tell("fork");
        session.fill().unwrap();
        let mut child = faulter.forked();
        child.assert_reads(wiped, &[0; 170 * PAGE]);
        session.wait_resident(Duration::from_secs(30)).unwrap();
        child.assert_reads(wiped, &[0; 170 * PAGE]);
        faulter.assert_reads(0, 0, source.pages(FIRST_PAGES[0], 197));
        assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
    });
}

#[test]
fn a_child_waits_for_the_look_at_20_000_mappings_and_its_parent_does_not() {
    with_faulter(
        "a_child_waits_for_the_look_at_20_000_mappings_and_its_parent_does_not",
        |source, mut faulter| {
            let session = source.attach_known(&faulter, Options::DEFAULT);
            faulter.let_go();
            let (wiped, mut had) = (faulter.at(0, 20), 0);
            faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
            for count in [1, 1_000, 20_000] {
                faulter.main.does(&format!("mappings {}", count - had));
                had = count;
                let started = Instant::now();
                let mut child = faulter.fork();
                let forked = started.elapsed();
                let started = Instant::now();
                child.assert_reads(wiped, &[0; PAGE]);
                let first = started.elapsed();
                println!("{count} mappings: fork {forked:?}, the child's first access after {first:?}");
                child.assert_reads(wiped + PAGE, &[0; 19 * PAGE]);
                child.tell("exit");
            }
            assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
        },
    );
}

/// Reading their mappings takes longer than the search for one child may.
#[test]
fn what_forks_wipe_is_zero_in_each_child_of_a_burst() {
    with_faulter("what_forks_wipe_is_zero_in_each_child_of_a_burst", |source, mut faulter| {
        const CHILDREN: usize = 16;
        let session = source.attach_known(&faulter, Options::DEFAULT);
        faulter.let_go();
        let wiped = faulter.at(0, 20);
        faulter.main.does(&format!("advise {WIPEONFORK} {wiped} 20"));
        faulter.main.does("mappings 20000");
        let mut children: Vec<_> = (0..CHILDREN).map(|_| faulter.fork()).collect();
        for child in &mut children {
            child.tell(&format!("read {wiped} 20"));
        }
        for child in &mut children {
            child.assert_answers(wiped, &[0; 20 * PAGE]);
        }
        assert_eq!((session.error(), session.progress().unseen_forks), (None, 0));
    });
}

/// The pager is in a process of its own here, whose program `tests/planted` changes.
#[test]
fn guards_and_forks_are_seen_by_a_pager_in_a_process_of_its_own() {
    const TEST: &str = "guards_and_forks_are_seen_by_a_pager_in_a_process_of_its_own";
    with_faulter(TEST, |source, mut faulter| {
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let how = Serving { alone: true, ..Serving::default() };
        let address = source.server.address().to_string();
        let _keeper = Keeper::start(&address, "app", how, &faulter, &regions);
        faulter.let_go();
        assert_wiped_in_children(&source, &mut faulter);
        if guards_are_seen() {
            let near = faulter.at(1, 42);
            faulter.main.does(&format!("advise {GUARD_INSTALL} {near} 2"));
            faulter.assert_reads(1, 44, source.pages(47, 1));
            // The pager installs the neighbours after the accessed page. It cannot see a guard that
            // is lifted before, and this process cannot see when the pager is done.
            faulter.assert_reads(1, 29, source.pages(32, 13));
            std::thread::park_timeout(Duration::from_millis(300));
            faulter.main.does(&format!("advise {GUARD_REMOVE} {near} 2"));
            faulter.main.assert_reads(near, &[0; 2 * PAGE]);
        }
    });
}

#[test]
fn a_child_is_served_after_its_parent_has_exited() {
    with_faulter("a_child_is_served_after_its_parent_has_exited", |source, mut faulter| {
        let session = source.attach(&faulter, FILLING).unwrap();
        faulter.let_go();
        let mut child = faulter.fork();
        let mut grandchild = faulter.start_another(&mut child, "fork");
        child.tell("exit");
        assert_eq!(child.answer(), None);
        faulter.kill();
        grandchild.assert_reads(faulter.at(1, 0), source.pages(3, 100));
        session.wait_resident(Duration::from_secs(30)).unwrap();
        grandchild.assert_reads(faulter.at(0, 0), source.pages(103, 197));
    });
}
