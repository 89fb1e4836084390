//! Shared memory that several processes and mappings have.

use super::{DONTNEED, SIGBUS, WATCHDOG, start};
use crate::session::Source;
use postcopy::{ForeignMemory, Options, Session};
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::{PAGE, is_root, skip};
use std::time::Duration;

/// Runs a test with a process that has shared memory. Regions 0 and 1 are the same memory; 1 and 2
/// are apart from each other in the file.
fn with_shared(test: &str, work: impl FnOnce(Source, Faulter, Session) + Send + 'static) {
    if !is_root() {
        return skip(test, "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || {
        let source = start();
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd:200", "again:200", "shared:100"]);
        let regions = [
            faulter.shared_region(0, "mem", 3 * PAGE as u64, 7),
            faulter.shared_region(1, "mem", 3 * PAGE as u64, 7),
            faulter.shared_region(2, "mem", 150 * PAGE as u64, 8),
        ];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        let reference = "app".parse().unwrap();
        let session =
            Session::attach(source.server.address(), &reference, Options::DEFAULT, &memory).unwrap();
        faulter.let_go();
        work(source, faulter, session);
    });
}

const REMOVE: i32 = 9;

#[test]
fn shared_memory_is_one_wherever_it_is_mapped() {
    with_shared("shared_memory_is_one_wherever_it_is_mapped", |source, mut faulter, session| {
        let mut child = faulter.fork();
        let image = |page: usize, count| source.pages(3 + page, count);
        faulter.assert_reads(0, 0, image(0, 20));
        faulter.assert_reads(1, 10, image(10, 20));
        child.assert_reads(faulter.at(0, 20), image(20, 20));
        child.does(&format!("write {} 1 42", faulter.at(1, 25)));
        faulter.assert_reads(0, 25, &[42; PAGE]);
        // One install of an absent page wakes all waiters, in each process and mapping.
        let waiting = [(0, 60), (1, 60), (0, 61)];
        for (region, page) in waiting {
            child.tell(&format!("read {} 1", faulter.at(region, page)));
        }
        faulter.main.assert_reads(faulter.at(1, 61), image(61, 1));
        for (region, page) in waiting {
            child.assert_answers(faulter.at(region, page), image(page, 1));
        }
        // MADV_DONTNEED keeps the content, written or absent; MADV_REMOVE drops it for everybody.
        faulter.main.does(&format!("advise {DONTNEED} {} 60", faulter.at(0, 20)));
        child.assert_reads(faulter.at(0, 25), &[42; PAGE]);
        faulter.assert_reads(0, 70, image(70, 10));
        child.does(&format!("advise {REMOVE} {} 20", faulter.at(1, 75)));
        for page in [75, 90] {
            faulter.assert_reads(0, page, &[0; 5 * PAGE]);
            child.assert_reads(faulter.at(1, page), &[0; 5 * PAGE]);
        }
        session.fill().unwrap();
        session.wait_resident(Duration::from_secs(30)).unwrap();
        faulter.assert_reads(1, 75, &[0; 20 * PAGE]);
        child.assert_reads(faulter.at(0, 95), image(95, 105));
        faulter.assert_reads(2, 0, source.pages(150, 100));
        assert_eq!(session.error(), None);
    });
}

#[test]
fn shared_memory_is_moved_and_unmapped_by_each_for_himself() {
    with_shared("shared_memory_is_moved_and_unmapped_by_each_for_himself", |source, mut faulter, session| {
        const MAYMOVE: i32 = 1;
        const DONTUNMAP: i32 = 4;
        let mut child = faulter.fork();
        let image = |page: usize, count| source.pages(3 + page, count);
        let at = faulter.at(0, 0);
        let to: usize = faulter.main.ask("reserve 300").parse().unwrap();
        faulter.main.ask(&format!("remap {at} 40 40 {MAYMOVE} {to}"));
        faulter.main.assert_reads(to, image(0, 20));
        child.assert_reads(at + 15 * PAGE, image(15, 10));
        child.does(&format!("unmap {at} 30"));
        faulter.main.assert_reads(to + 20 * PAGE, image(20, 20));
        child.assert_reads(at + 30 * PAGE, image(30, 10));
        // The mapping left behind is still the same memory.
        let kept = at + 100 * PAGE;
        let both = faulter.main.ask(&format!("remap {kept} 20 20 {} 0", MAYMOVE | DONTUNMAP));
        let both: usize = both.parse().unwrap();
        faulter.main.does(&format!("write {both} 1 9"));
        faulter.main.assert_reads(kept, &[&[9; PAGE], image(101, 19)].concat());
        faulter.main.assert_reads(both + PAGE, image(101, 19));
        // A mapping that was left behind can be moved, too.
        let third = faulter.main.ask(&format!("remap {} 5 5 {} 0", kept + 10 * PAGE, MAYMOVE | DONTUNMAP));
        faulter.main.assert_reads(third.parse().unwrap(), image(110, 5));
        // So can one whose pages were never accessed at the old address.
        let kept = at + 130 * PAGE;
        faulter.main.ask(&format!("remap {kept} 12 12 {} 0", MAYMOVE | DONTUNMAP));
        let third = faulter.main.ask(&format!("remap {} 5 5 {} 0", kept + 4 * PAGE, MAYMOVE | DONTUNMAP));
        faulter.main.assert_reads(third.parse().unwrap(), image(134, 5));
        // Pages that are dropped at the old address, where none was accessed since, are dropped at
        // the new one.
        let kept = at + 150 * PAGE;
        let both = faulter.main.ask(&format!("remap {kept} 20 20 {} 0", MAYMOVE | DONTUNMAP));
        let both: usize = both.parse().unwrap();
        faulter.main.does(&format!("advise {REMOVE} {} 5", kept + 3 * PAGE));
        faulter.main.assert_reads(both, &[image(150, 3), &[0; 5 * PAGE], image(158, 12)].concat());
        assert_eq!(session.error(), None);
    });
}

#[test]
fn a_session_s_end_poisons_each_mapping_of_shared_memory() {
    with_shared("a_session_s_end_poisons_each_mapping_of_shared_memory", |source, mut faulter, session| {
        let mut child = faulter.fork();
        faulter.assert_reads(0, 0, source.pages(3, 3));
        // Still mapped at the old address, without an access since (MREMAP_MAYMOVE |
        // MREMAP_DONTUNMAP).
        let old = faulter.at(2, 50);
        let mut other = faulter.fork();
        other.ask(&format!("remap {old} 20 20 5 0"));
        assert!(session.end(Duration::from_secs(30)));
        other.tell(&format!("read {old} 1"));
        assert_eq!(other.answer(), None, "it is not fed zeros");
        child.assert_reads(faulter.at(1, 0), source.pages(3, 3));
        child.tell(&format!("read {} 1", faulter.at(0, 100)));
        assert_eq!(child.answer(), None, "it is not fed zeros");
        faulter.main.tell(&format!("read {} 1", faulter.at(1, 100)));
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, SIGBUS));
    });
}

#[test]
fn a_removal_of_shared_memory_that_nobody_can_see_ends_the_session() {
    with_shared(
        "a_removal_of_shared_memory_that_nobody_can_see_ends_the_session",
        |source, mut faulter, session| {
            faulter.assert_reads(2, 0, source.pages(150, 2));
            drop(session);
            let mut blind = Faulter::start(ALL_EVENTS, &["shared:100"]);
            let regions = [blind.shared_region(0, "mem", 0, 1)];
            let memory = ForeignMemory {
                uffd: blind.uffd(),
                regions: &regions,
                state: None,
                pid: None,
                is_registered: true,
            };
            let reference = "app".parse().unwrap();
            let session =
                Session::attach(source.server.address(), &reference, Options::DEFAULT, &memory).unwrap();
            blind.let_go();
            blind.assert_reads(0, 0, source.pages(0, 16));
            // Of pages that are there their next fault tells.
            blind.main.does(&format!("advise {DONTNEED} {} 4", blind.at(0, 0)));
            blind.main.does(&format!("advise {REMOVE} {} 4", blind.at(0, 8)));
            blind.assert_reads(0, 0, source.pages(0, 8));
            blind.assert_reads(0, 8, &[0; 4 * PAGE]);
            assert_eq!(session.error(), None);
            blind.main.does(&format!("advise {REMOVE} {} 4", blind.at(0, 50)));
            assert!(session.wait_end(Duration::from_secs(30)));
            assert!(session.error().unwrap().contains("nothing shows whether its content stays"));
            blind.main.tell(&format!("read {} 1", blind.at(0, 51)));
            assert_eq!((blind.main.answer(), blind.dies_of()), (None, SIGBUS));
        },
    );
}

#[test]
fn shared_memory_that_is_mapped_another_time_is_the_same_there() {
    let test = "shared_memory_that_is_mapped_another_time_is_the_same_there";
    with_shared(test, |source, mut faulter, session| {
        // An old size of 0: nothing is moved, and the kernel tells no size.
        let to: usize = faulter.main.ask("reserve 300").parse().unwrap();
        let from = faulter.at(0, 40);
        assert_eq!(faulter.main.ask(&format!("remap {from} 0 100 3 {to}")), to.to_string());
        faulter.main.assert_reads(to, source.pages(43, 30));
        faulter.assert_reads(0, 40, source.pages(43, 60));
        faulter.main.does(&format!("write {} 1 9", to + 70 * PAGE));
        faulter.assert_reads(1, 110, &[9; PAGE]);
        faulter.main.does(&format!("advise {REMOVE} {} 10", to + 80 * PAGE));
        faulter.assert_reads(
            0,
            119,
            &[source.pages(122, 1), &vec![0; 10 * PAGE], source.pages(133, 1)].concat(),
        );
        session.fill().unwrap();
        faulter.assert_reads(0, 131, source.pages(134, 69));
        assert_eq!(session.error(), None);
    });
}

#[test]
fn shared_memory_that_the_session_was_not_told_of_is_sigbus() {
    if !is_root() {
        let test = "attach::shared::shared_memory_that_the_session_was_not_told_of_is_sigbus";
        return skip(test, "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || {
        let source = start();
        let mut faulter = Faulter::start(ALL_EVENTS, &["memfd:200"]);
        let mut region = faulter.shared_region(0, "mem", 0, 1);
        region.len = 100 * PAGE;
        let pid = Some(faulter.main.pid);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions: &[region], state: None, pid, is_registered: true };
        let (address, reference) = (source.server.address(), "app".parse().unwrap());
        let session = Session::attach(address, &reference, Options::DEFAULT, &memory).unwrap();
        faulter.let_go();
        faulter.assert_reads(0, 90, source.pages(90, 10));
        let read = |page| read_from_outside(faulter.main.pid, faulter.at(0, page), PAGE);
        // Zeros would appear in every mapping of the memory.
        assert_eq!((read(100), read(150)), (Err(nix::Error::EFAULT), Err(nix::Error::EFAULT)));
        assert!(session.error().unwrap().contains("is beyond what the session was told of"));
        assert!(read(50).unwrap() == source.pages(50, 1));
    });
}
