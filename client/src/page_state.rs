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

use crate::state::Words;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Pages in a word.
pub(crate) const WORD_PAGES: usize = 32;
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

/// The states of some pages.
#[derive(Debug)]
pub(crate) struct PageStates {
    words: Words,
    pages: usize,
}

impl PageStates {
    /// So many pages, all absent where the words are 0.
    pub(crate) fn new(words: Words, pages: usize) -> Self {
        assert!(words.len() >= pages.div_ceil(WORD_PAGES), "{} words for {pages} pages", words.len());
        Self { words, pages }
    }

    /// What they are kept in.
    pub(crate) fn words(&self) -> &Words {
        &self.words
    }

    /// How many pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Gives others, which are of as many pages, the states that these pages have now.
    pub(crate) fn copy_to(&self, copy: &Self, pages: Range<usize>) {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        assert_eq!(copy.pages, pages.len(), "as many");
        let word = |index: usize| self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire));
        let (first, shift) = (pages.start / WORD_PAGES, pages.start % WORD_PAGES * 2);
        for (index, lows) in words_of(0..pages.len()) {
            let here = word(first + index) >> shift;
            // Shifted in two steps: 64 at once is not allowed.
            let next = word(first + index + 1) << 1 << (63 - shift);
            copy.words[index].store((here | next) & (lows * 0b11), Ordering::Release);
        }
    }

    pub(crate) fn get(&self, page: usize) -> PageState {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let word = self.words[page / WORD_PAGES].load(Ordering::Acquire);
        match word >> (page % WORD_PAGES * 2) & 0b11 {
            0b00 => PageState::Absent,
            0b01 => PageState::Resident,
            0b10 => PageState::Poisoned,
            _ => PageState::Removed,
        }
    }

    /// How many of these pages are in `state`.
    pub(crate) fn count(&self, pages: Range<usize>, state: PageState) -> usize {
        let matching = |(index, lows): (usize, u64)| {
            (in_state(self.words[index].load(Ordering::Acquire), state) & lows).count_ones() as usize
        };
        words_of(pages).map(matching).sum()
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
        for (index, lows) in words_of(pages) {
            // A store would undo a REMOVE that comes in between.
            let _ = self.words[index].fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                let changed =
                    from.iter().map(|state| in_state(old, *state)).fold(0, |all, some| all | some) & lows;
                (changed != 0).then_some((old & !(changed * 0b11)) | (changed * to as u64))
            });
        }
    }

    /// The first run of neighbouring pages in `within` whose state is one of `states`. Never an empty one, also where states
    /// change meanwhile.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let start = self.find(within.clone(), states, true)?;
        // After the page that was found, which may have changed since.
        let end = self.find(start + 1..within.end, states, false).unwrap_or(within.end);
        Some(start..end)
    }

    /// The first page of `within` that is (`wanted`) or is not in one of `states`.
    fn find(&self, within: Range<usize>, states: &[PageState], wanted: bool) -> Option<usize> {
        let mut page = within.start;
        while page < within.end {
            let first = page % WORD_PAGES;
            let count = (WORD_PAGES - first).min(within.end - page);
            let word = self.words[page / WORD_PAGES].load(Ordering::Acquire);
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

/// The words that hold these pages, each with the lower bits of those of them that it holds.
fn words_of(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        let (page, first) = (next, next % WORD_PAGES);
        let count = (WORD_PAGES - first).min(pages.end.checked_sub(page).filter(|left| *left > 0)?);
        next += count;
        Some((page / WORD_PAGES, low_bits(first, count)))
    })
}

/// The lower bits of `count` pages of a word, from `first` on.
fn low_bits(first: usize, count: usize) -> u64 {
    let all = if count == WORD_PAGES { u64::MAX } else { (1 << (count * 2)) - 1 };
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Resident(Range<usize>),
        Poisoned(Range<usize>),
        Removed(Range<usize>),
    }

    fn states_of(pages: usize) -> PageStates {
        PageStates::new(Words::own(pages.div_ceil(WORD_PAGES)), pages)
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
        fn states_go_only_their_way(
            steps in proptest::collection::vec(any_step(), 0..20), first in 0usize..130, len in 0usize..130,
        ) {
            let part = first..(first + len).min(130);
            let states = states_of(130);
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
            for (page, state) in model.iter().enumerate() {
                prop_assert_eq!(states.get(page), *state);
            }
            let part = &model[part.clone()];
            let copy = states_of(part.len());
            states.copy_to(&copy, first..first + part.len());
            for (page, state) in part.iter().enumerate() {
                prop_assert_eq!(copy.get(page), *state);
                let count = part.iter().filter(|s| *s == state).count();
                prop_assert_eq!(states.count(first..first + part.len(), *state), count);
            }
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
            let states = states_of(32);
            std::thread::scope(|scope| {
                scope.spawn(|| states.set_resident(0..32));
                scope.spawn(|| states.set_removed(7..9));
            });
            assert_eq!(states.get(7), PageState::Removed);
            assert_eq!(states.count(0..32, PageState::Resident), 30);
        }
    }
}
