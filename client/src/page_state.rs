//! What is known of each page of a region.
//!
//! Two bits a page, 32 pages in an atomic word, so that installers and the pager change them without a lock of
//! their own. A page's state goes only this way:
//!
//! ```text
//! absent → resident      absent → poisoned      poisoned → resident      any → removed
//! ```
//!
//! Nothing leaves `removed`: such a page reads as zeros, and no late frame may undo that. This file does
//! no I/O and has no clock, so that models can run the real type.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const PAGES_PER_WORD: usize = 32;
/// The lower bit of each page.
const LOW: u64 = 0x5555_5555_5555_5555;

/// The state of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Not there: a touch is a fault.
    Absent = 0b00,
    /// There, with the image's bytes or what was written since.
    Resident = 0b01,
    /// Could not be had: a touch is SIGBUS.
    Poisoned = 0b10,
    /// Given back by its owner: a touch gives zeros.
    Removed = 0b11,
}

/// How many pages are in which state; those in none of these are absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) resident: usize,
    pub(crate) poisoned: usize,
    pub(crate) removed: usize,
}

/// The states of a region's pages, all absent at first.
#[derive(Debug)]
pub(crate) struct PageStates {
    words: Box<[AtomicU64]>,
    pages: usize,
    // Indexed by PageState; absent is not counted.
    counts: [AtomicUsize; 4],
}

impl PageStates {
    pub(crate) fn new(pages: usize) -> Self {
        let words = (0..pages.div_ceil(PAGES_PER_WORD)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages, counts: Default::default() }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn get(&self, page: usize) -> PageState {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let word = self.words[page / PAGES_PER_WORD].load(Ordering::Acquire);
        match word >> (page % PAGES_PER_WORD * 2) & 0b11 {
            0b00 => PageState::Absent,
            0b01 => PageState::Resident,
            0b10 => PageState::Poisoned,
            _ => PageState::Removed,
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let count = |state: PageState| self.counts[state as usize].load(Ordering::Acquire);
        Counts {
            resident: count(PageState::Resident),
            poisoned: count(PageState::Poisoned),
            removed: count(PageState::Removed),
        }
    }

    /// Absent and poisoned pages of the range become resident.
    pub(crate) fn set_resident(&self, pages: Range<usize>) {
        self.transition(pages, &[PageState::Absent, PageState::Poisoned], PageState::Resident);
    }

    /// Absent pages of the range become poisoned.
    pub(crate) fn set_poisoned(&self, pages: Range<usize>) {
        self.transition(pages, &[PageState::Absent], PageState::Poisoned);
    }

    /// All pages of the range become removed.
    pub(crate) fn set_removed(&self, pages: Range<usize>) {
        let from = [PageState::Absent, PageState::Resident, PageState::Poisoned];
        self.transition(pages, &from, PageState::Removed);
    }

    fn transition(&self, pages: Range<usize>, from: &[PageState], to: PageState) {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        let mut page = pages.start;
        while page < pages.end {
            let first = page % PAGES_PER_WORD;
            let count = (PAGES_PER_WORD - first).min(pages.end - page);
            self.transition_word(page / PAGES_PER_WORD, low_bits(first, count), from, to);
            page += count;
        }
    }

    fn transition_word(&self, index: usize, lows: u64, from: &[PageState], to: PageState) {
        let word = &self.words[index];
        let mut old = word.load(Ordering::Acquire);
        loop {
            let matching = |state: &PageState| in_state(old, *state) & lows;
            let changed = from.iter().map(matching).fold(0, |all, some| all | some);
            if changed == 0 {
                return;
            }
            let new = (old & !(changed * 0b11)) | (changed * to as u64);
            // A store would undo a REMOVE that comes in between.
            match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return self.count(old, changed, from, to),
                Err(actual) => old = actual,
            }
        }
    }

    fn count(&self, old: u64, changed: u64, from: &[PageState], to: PageState) {
        let ones = |bits: u64| bits.count_ones() as usize;
        self.counts[to as usize].fetch_add(ones(changed), Ordering::AcqRel);
        for state in from {
            let left = ones(in_state(old, *state) & changed);
            if *state != PageState::Absent && left > 0 {
                self.counts[*state as usize].fetch_sub(left, Ordering::AcqRel);
            }
        }
    }

    /// The first run of neighbouring pages in `within` whose state is one of `states`.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let start = self.find(within.clone(), states, true)?;
        let end = self.find(start..within.end, states, false).unwrap_or(within.end);
        Some(start..end)
    }

    /// The first page of `within` that is (`wanted`) or is not in one of `states`.
    fn find(&self, within: Range<usize>, states: &[PageState], wanted: bool) -> Option<usize> {
        let mut page = within.start;
        while page < within.end {
            let first = page % PAGES_PER_WORD;
            let count = (PAGES_PER_WORD - first).min(within.end - page);
            let word = self.words[page / PAGES_PER_WORD].load(Ordering::Acquire);
            let matching = states.iter().map(|state| in_state(word, *state)).fold(0, |all, some| all | some);
            let hits = if wanted { matching } else { !matching } & low_bits(first, count);
            if hits != 0 {
                return Some(page - first + hits.trailing_zeros() as usize / 2);
            }
            page += count;
        }
        None
    }
}

/// The lower bits of `count` pages of a word, from `first` on.
fn low_bits(first: usize, count: usize) -> u64 {
    let all = if count == PAGES_PER_WORD { u64::MAX } else { (1 << (count * 2)) - 1 };
    (all << (first * 2)) & LOW
}

/// The lower bits of the pages of `word` that are in `state`.
fn in_state(word: u64, state: PageState) -> u64 {
    let (low, high) = (word & LOW, word >> 1 & LOW);
    match state {
        PageState::Absent => !low & !high & LOW,
        PageState::Resident => low & !high,
        PageState::Poisoned => !low & high,
        PageState::Removed => low & high,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Resident(Range<usize>),
        Poisoned(Range<usize>),
        Removed(Range<usize>),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let range = (0usize..130, 0usize..70).prop_map(|(start, len)| start..(start + len).min(130));
        (0..3, range).prop_map(|(kind, range)| match kind {
            0 => Step::Resident(range),
            1 => Step::Poisoned(range),
            _ => Step::Removed(range),
        })
    }

    proptest! {
        #[test]
        fn states_go_only_their_way(steps in proptest::collection::vec(any_step(), 0..20)) {
            let states = PageStates::new(130);
            let mut model = [PageState::Absent; 130];
            for step in steps {
                match step.clone() {
                    Step::Resident(pages) => states.set_resident(pages),
                    Step::Poisoned(pages) => states.set_poisoned(pages),
                    Step::Removed(pages) => states.set_removed(pages),
                }
                let (Step::Resident(pages) | Step::Poisoned(pages) | Step::Removed(pages)) = step.clone();
                for page in &mut model[pages] {
                    *page = match (&step, *page) {
                        (_, PageState::Removed) | (Step::Removed(_), _) => PageState::Removed,
                        (Step::Resident(_), _) => PageState::Resident,
                        (Step::Poisoned(_), PageState::Absent) => PageState::Poisoned,
                        (Step::Poisoned(_), other) => other,
                    };
                }
            }
            let count = |state| model.iter().filter(|s| **s == state).count();
            for (page, state) in model.iter().enumerate() {
                prop_assert_eq!(states.get(page), *state);
            }
            prop_assert_eq!(states.counts(), Counts {
                resident: count(PageState::Resident),
                poisoned: count(PageState::Poisoned),
                removed: count(PageState::Removed),
            });
            let unresolved = [PageState::Absent, PageState::Poisoned];
            let mut found = Vec::new();
            let mut from = 0;
            while let Some(run) = states.next_run(from..130, &unresolved) {
                prop_assert!(!run.is_empty());
                from = run.end;
                found.extend(run);
            }
            let expected: Vec<_> = (0..130).filter(|&p| unresolved.contains(&model[p])).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn nothing_undoes_a_removal_that_races_an_install() {
        for _ in 0..2000 {
            let states = PageStates::new(32);
            std::thread::scope(|scope| {
                scope.spawn(|| states.set_resident(0..32));
                scope.spawn(|| states.set_removed(7..9));
            });
            assert_eq!(states.get(7), PageState::Removed);
            assert_eq!(states.counts(), Counts { resident: 30, poisoned: 0, removed: 2 });
        }
    }
}
