//! Memory that mremap moves.

use super::{DONTNEED, FIRST_PAGES, with_faulter};
use postcopy::Options;
use postcopy_tests::PAGE;
use postcopy_tests::faulter::read_from_outside;
use std::time::Duration;

#[test]
fn memory_that_is_moved_cut_and_grown_stays_right() {
    with_faulter("memory_that_is_moved_cut_and_grown_stays_right", |source, mut faulter| {
        const MAYMOVE: i32 = 1;
        const DONTUNMAP: i32 = 4;
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        let image = |page, count| source.pages(FIRST_PAGES[0] + page, count);
        let start = faulter.at(0, 0);
        let main = &mut faulter.main;
        main.assert_reads(start, image(0, 4));
        main.does(&format!("advise {DONTNEED} {} 4", start + 30 * PAGE));
        main.does(&format!("unmap {} 8", start + 100 * PAGE));
        // A part of the middle goes elsewhere: pages that are there, absent, removed.
        let to: usize = main.ask("reserve 300").parse().unwrap();
        let moved = main.ask(&format!("remap {} 40 40 {MAYMOVE} {to}", start + 2 * PAGE));
        assert_eq!(moved, to.to_string());
        main.assert_reads(to, image(2, 28));
        main.assert_reads(to + 28 * PAGE, &[0; 4 * PAGE]);
        main.assert_reads(to + 32 * PAGE, image(34, 8));
        main.assert_reads(start, image(0, 2));
        main.assert_reads(start + 42 * PAGE, image(42, 58));
        main.assert_reads(start + 108 * PAGE, image(108, 20));
        // The pages left behind are zero, and so are those that the mapping grows by.
        let rest = start + 108 * PAGE;
        let away = main.ask(&format!("remap {rest} 30 30 {} 0", MAYMOVE | DONTUNMAP)).parse().unwrap();
        main.assert_reads(rest, &[0; 30 * PAGE]);
        main.assert_reads(away, image(108, 30));
        let last = start + 190 * PAGE;
        let grown: usize =
            main.ask(&format!("remap {last} 7 50 {MAYMOVE} {}", to + 100 * PAGE)).parse().unwrap();
        main.assert_reads(grown + 6 * PAGE, &[image(196, 1), &[0; 43 * PAGE]].concat());
        main.assert_reads(grown, image(190, 6));
        assert_eq!(session.error(), None);
        // The background fill installs pages at their new addresses.
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        main.assert_reads(rest + 30 * PAGE, image(138, 52));
        main.assert_reads(rest, &[0; 30 * PAGE]);
    });
}

/// The kernel posts events after it has released its lock. So the pager may read a fork before an
/// earlier move, which the child has.
#[test]
fn a_child_forked_during_a_move_has_it_in_one_place() {
    with_faulter("a_child_forked_during_a_move_has_it_in_one_place", |source, mut faulter| {
        const TRIES: usize = 1500;
        let session = source.attach(&faulter, Options::DEFAULT).unwrap();
        faulter.let_go();
        let mut other = faulter.thread();
        let slots: usize = faulter.main.ask(&format!("reserve {}", 2 * TRIES)).parse().unwrap();
        let mut at = faulter.at(0, 20);
        let image = source.pages(123, 1);
        let mut counts = [0; 2];
        for slot in 0..TRIES {
            let to = slots + 2 * slot * PAGE;
            other.tell(&format!("remap {at} 1 1 1 {to}"));
            for _ in 0..fastrand::u32(..4000) {
                std::hint::spin_loop();
            }
            faulter.main.tell("fork");
            assert_eq!(other.answer(), Some(to.to_string()));
            let mut child = faulter.forked();
            let read = |at| read_from_outside(child.pid, at, PAGE);
            let (old, new) = (read(at), read(to));
            let is_new = new.is_ok();
            let (there, gone) = if is_new { (new, old) } else { (old, new) };
            assert_eq!(gone, Err(nix::Error::EFAULT), "it is in both places");
            let there = there.unwrap();
            assert!(there == image, "after {slot}: moved {is_new}, zero: {}", there == [0; PAGE]);
            counts[usize::from(is_new)] += 1;
            child.tell("exit");
            at = to;
        }
        assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
        assert_eq!(session.error(), None);
    });
}
