//! Page states without a gate.

use crate::arena::Arena;
use crate::page_states::{PageState, PageStates, WORD_PAGES};
use crate::words::Words;
use crate::{check, join, spawn};
use loom::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// States in a block of their own.
pub(crate) fn states_of(pages: usize) -> PageStates {
    let states = PageStates::new(&arena(), pages, pages).unwrap();
    states.own_word(0).unwrap();
    states
}

/// Room for the tables and blocks of a parent and two children.
fn arena() -> Arc<Arena> {
    Arc::new(Arena::new(Words::own(64), 0))
}

/// How far a state is on its way.
fn step(state: PageState) -> usize {
    let way = [PageState::Absent, PageState::Poisoned, PageState::Resident, PageState::Removed];
    way.iter().position(|other| *other == state).expect("all are there")
}

#[test]
fn changes_of_neighbouring_pages_are_all_kept() {
    check(|| {
        // The last page of a word, and the first of the next.
        let states = Arc::new(states_of(WORD_PAGES + 2));
        let page = |index: usize| WORD_PAGES - 2 + index;
        states.set_poisoned(page(0)..page(1)).unwrap();
        let threads = [
            spawn(&states, move |states| states.set_resident(page(0)..page(3)).unwrap()),
            spawn(&states, move |states| states.set_removed(page(1)..page(2)).unwrap()),
            spawn(&states, move |states| states.set_poisoned(page(0)..page(4)).unwrap()),
        ];
        join(threads);
        let found = [0, 1, 2, 3].map(|index| states.get(page(index)));
        let expected = [PageState::Resident, PageState::Removed, PageState::Resident, PageState::Poisoned];
        assert_eq!(found, expected);
    });
}

#[test]
fn a_run_of_pages_is_never_empty() {
    check(|| {
        let states = Arc::new(states_of(WORD_PAGES + 1));
        let threads = [
            spawn(&states, |states| states.set_resident(0..WORD_PAGES + 1).unwrap()),
            spawn(&states, |states| {
                let run = states.next_run(WORD_PAGES - 1..WORD_PAGES + 1, &[PageState::Absent]);
                assert!(run.is_none_or(|run| !run.is_empty()), "it would be taken for memory that is gone");
            }),
        ];
        join(threads);
    });
}

#[test]
fn a_page_is_never_seen_to_go_back() {
    check(|| {
        let states = Arc::new(states_of(1));
        let threads = [
            spawn(&states, |states| {
                states.set_poisoned(0..1).unwrap();
                states.set_resident(0..1).unwrap();
            }),
            spawn(&states, |states| states.set_removed(0..1).unwrap()),
            spawn(&states, |states| {
                let seen = [(); 3].map(|()| step(states.get(0)));
                assert!(seen.is_sorted(), "{seen:?}");
            }),
        ];
        join(threads);
        assert_eq!(states.get(0), PageState::Removed);
    });
}

/// One installs a page and says so by `set_resident`, another looks.
///
/// The one who looks is the last thread: loom misses orders in which a load is before another thread's load and
/// compare-exchange, unless it has begun with the other thread.
pub(crate) fn install_and_look(set_resident: impl FnOnce(&PageStates) + 'static) {
    let page = Arc::new((AtomicBool::new(false), states_of(2)));
    let threads = [
        spawn(&page, |(installed, states)| {
            installed.store(true, Ordering::Relaxed);
            set_resident(states);
        }),
        // The same word is changed for another page in between.
        spawn(&page, |(_, states)| states.set_removed(1..2).unwrap()),
        spawn(&page, |(installed, states)| {
            if states.get(0) == PageState::Resident {
                assert!(installed.load(Ordering::Relaxed), "a resident page is not there");
            }
        }),
    ];
    join(threads);
}

#[test]
fn who_sees_a_page_resident_sees_what_was_installed() {
    check(|| install_and_look(|states| states.set_resident(0..1).unwrap()));
}

#[test]
fn a_parent_and_its_child_change_and_read_a_shared_block() {
    check(|| {
        let parent = states_of(2);
        parent.set_resident(0..1).unwrap();
        let child = parent.fork().unwrap();
        let family = Arc::new((parent, child));
        let threads = [
            spawn(&family, |(parent, _)| parent.set_removed(1..2).unwrap()),
            spawn(&family, |(_, child)| child.set_removed(0..1).unwrap()),
            spawn(&family, |(parent, _)| {
                assert_eq!(parent.get(0), PageState::Resident, "a state of the child's");
            }),
        ];
        join(threads);
        let (parent, child) = &*family;
        assert_eq!([0, 1].map(|page| parent.get(page)), [PageState::Resident, PageState::Removed]);
        assert_eq!([0, 1].map(|page| child.get(page)), [PageState::Removed, PageState::Absent]);
    });
}

#[test]
fn two_threads_that_change_a_shared_block_make_one_copy() {
    check(|| {
        let parent = states_of(3);
        let child = parent.fork().unwrap();
        let family = Arc::new((parent, child));
        let threads = [
            spawn(&family, |(parent, _)| parent.set_removed(1..2).unwrap()),
            spawn(&family, |(parent, _)| parent.set_resident(0..2).unwrap()),
        ];
        join(threads);
        let (parent, child) = &*family;
        let found = [0, 1, 2].map(|page| parent.get(page));
        assert_eq!(found, [PageState::Resident, PageState::Removed, PageState::Absent]);
        assert_eq!(child.count(0..3, PageState::Absent), 3);
    });
}
