//! The state of each page of an object.
//!
//! A page takes two bits; an atomic word holds 32 pages, so that installers and the pager change
//! states without a lock. The only transitions are:
//!
//! ```text
//! absent → resident      absent → poisoned      poisoned → resident      any → removed
//! ```
//!
//! No transition leaves `removed`: such a page reads as zeros, and no late frame may undo that.
//!
//! The words lie in blocks of an [`Arena`], and a table names the blocks. An entry of 0 means that
//! all pages of the block are absent. A fork copies the table and marks the blocks as shared; the
//! first change of a shared block copies it. Only the pager forks, alone in the gate, so that no
//! block becomes shared while a thread writes to it. A reader of a shared block reads the table
//! again afterwards: meanwhile the block may have become another owner's alone.
//!
//! This file does no I/O and reads no clock, so that models can run the real type.

use super::arena::{Arena, ArenaFull, run_words};
use crate::sync::{Arc, AtomicU64, Ordering};
use postcopy_proto::page::to_usize;
use std::ops::Range;

/// The number of pages in a word.
pub(crate) const WORD_PAGES: usize = 32;
/// The lower bit of each page's two bits.
const LOW: u64 = 0x5555_5555_5555_5555;
/// The number of words in a block: 4 KiB, for the states of 64 MiB. A small object has a single,
/// shorter block.
const BLOCK_WORDS: usize = 512;
/// A flag in a table entry: the block may have other owners. The flag fits because blocks begin at
/// multiples of 8 words.
const SHARED: u64 = 1;

/// The state of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Not installed: an access causes a page fault.
    Absent = 0b00,
    /// Installed: the page holds the image's bytes, or bytes that the program wrote since.
    Resident = 0b01,
    /// Lost: an access raises SIGBUS.
    Poisoned = 0b10,
    /// Removed by its owner: an access reads zeros.
    Removed = 0b11,
}

/// The states of the pages of one object.
#[derive(Debug)]
pub(crate) struct PageStates {
    arena: Arc<Arena>,
    /// The table's first word in the arena.
    table_at: usize,
    pages: usize,
    /// The number of pages that no region has had. They stay absent.
    unused: usize,
    /// The numbers of absent and of poisoned pages among those that regions have. A poisoned page
    /// that becomes resident counts in neither.
    absent: AtomicU64,
    poisoned: AtomicU64,
}

/// Returns the number of words in a block of an object with `pages` pages.
fn block_words(pages: usize) -> usize {
    run_words(pages.div_ceil(WORD_PAGES).max(1)).min(BLOCK_WORDS)
}

fn blocks_of(pages: usize) -> usize {
    pages.div_ceil(WORD_PAGES).div_ceil(block_words(pages)).max(1)
}

impl PageStates {
    /// Returns the states of `pages` pages, all absent. Regions will have `covered` of these pages.
    ///
    /// # Errors
    /// [`ArenaFull`].
    pub(crate) fn new(arena: &Arc<Arena>, pages: usize, covered: usize) -> Result<Self, ArenaFull> {
        let table_at = arena.allocate(blocks_of(pages))?;
        let (absent, poisoned) = (AtomicU64::new(covered as u64), AtomicU64::new(0));
        Ok(Self { arena: Arc::clone(arena), table_at, pages, unused: pages - covered, absent, poisoned })
    }

    /// Returns the states that a predecessor left in the table at `table_at`. No region has had
    /// `unused` of the pages. Before this call the arena must have adopted the table's
    /// [`runs_in_use`].
    pub(crate) fn of_predecessor(arena: &Arc<Arena>, table_at: usize, pages: usize, unused: usize) -> Self {
        let (absent, poisoned) = (AtomicU64::new(0), AtomicU64::new(0));
        let states = Self { arena: Arc::clone(arena), table_at, pages, unused, absent, poisoned };
        for entry in states.table() {
            let at = entry.load(Ordering::Acquire) & !SHARED;
            let is_shared = at != 0 && arena.is_shared(to_usize(at));
            entry.store(if is_shared { at | SHARED } else { at }, Ordering::Release);
        }
        states.recount();
        states
    }

    /// Recounts the unresolved pages. Unmapped pages are removed, so only unused ones do not count.
    fn recount(&self) {
        let block_pages = block_words(self.pages) * WORD_PAGES;
        let (mut absent, mut poisoned) = (0, 0);
        for (block, entry) in self.table().iter().enumerate() {
            let start = (block * block_pages).min(self.pages);
            let pages = start..(start + block_pages).min(self.pages);
            match entry.load(Ordering::Acquire) {
                0 => absent += pages.len(),
                _ => {
                    absent += self.count(pages.clone(), PageState::Absent);
                    poisoned += self.count(pages, PageState::Poisoned);
                }
            }
        }
        // A damaged file may have other numbers.
        self.absent.store(absent.saturating_sub(self.unused) as u64, Ordering::Release);
        self.poisoned.store(poisoned as u64, Ordering::Release);
    }

    /// Returns the states for a child that has just been forked: equal to these, and independent
    /// from then on. Only the pager calls this, alone in the gate.
    ///
    /// # Errors
    /// [`ArenaFull`]; nothing has changed.
    pub(crate) fn fork(&self) -> Result<Self, ArenaFull> {
        let table_at = self.arena.allocate(blocks_of(self.pages))?;
        let count = |from: &AtomicU64| AtomicU64::new(from.load(Ordering::Acquire));
        let child = Self {
            arena: Arc::clone(&self.arena),
            table_at,
            pages: self.pages,
            unused: self.unused,
            absent: count(&self.absent),
            poisoned: count(&self.poisoned),
        };
        let entries = || self.table().iter().filter(|entry| entry.load(Ordering::Acquire) != 0);
        let block = |entry: &AtomicU64| to_usize(entry.load(Ordering::Acquire) & !SHARED);
        self.arena.share(entries().map(block));
        for (own, new) in self.table().iter().zip(child.table()) {
            let entry = own.load(Ordering::Acquire);
            if entry != 0 {
                own.store(entry | SHARED, Ordering::Release);
                new.store(entry | SHARED, Ordering::Release);
            }
        }
        Ok(child)
    }

    /// Returns the table's first word in the arena.
    pub(crate) fn table_at(&self) -> usize {
        self.table_at
    }

    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Returns the number of pages that no region has had.
    pub(crate) fn unused(&self) -> usize {
        self.unused
    }

    /// Returns the number of absent pages that regions have.
    pub(crate) fn absent(&self) -> usize {
        to_usize(self.absent.load(Ordering::Acquire))
    }

    /// Returns the number of poisoned pages that regions have.
    pub(crate) fn poisoned(&self) -> usize {
        to_usize(self.poisoned.load(Ordering::Acquire))
    }

    fn table(&self) -> &[AtomicU64] {
        self.arena.words(self.table_at, blocks_of(self.pages))
    }

    /// Returns the word with this index, which holds the states of 32 pages.
    fn word(&self, index: usize) -> u64 {
        let words = block_words(self.pages);
        let entry = &self.table()[index / words];
        loop {
            let block = entry.load(Ordering::Acquire);
            if block == 0 {
                return 0;
            }
            let at = to_usize(block & !SHARED);
            let word = self.arena.words(at, words)[index % words].load(Ordering::Acquire);
            if block & SHARED == 0 || entry.load(Ordering::Acquire) == block {
                return word;
            }
        }
    }

    pub(crate) fn get(&self, page: usize) -> PageState {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        match self.word(page / WORD_PAGES) >> (page % WORD_PAGES * 2) & 0b11 {
            0b00 => PageState::Absent,
            0b01 => PageState::Resident,
            0b10 => PageState::Poisoned,
            _ => PageState::Removed,
        }
    }

    /// Returns the number of these pages that are in `state`.
    pub(crate) fn count(&self, pages: Range<usize>, state: PageState) -> usize {
        let matching =
            |(index, lows): (usize, u64)| (in_state(self.word(index), state) & lows).count_ones() as usize;
        words_of(pages).map(matching).sum()
    }

    /// Sets the absent and poisoned pages of the range to resident.
    ///
    /// # Errors
    /// [`ArenaFull`]: some pages keep their old states. The next install of these pages finds them
    /// present.
    pub(crate) fn set_resident(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        self.transition(pages, &[PageState::Absent, PageState::Poisoned], PageState::Resident)
    }

    /// Sets the absent pages of the range to poisoned.
    ///
    /// # Errors
    /// [`ArenaFull`]: some pages keep their old states. The caller must not poison the range.
    pub(crate) fn set_poisoned(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        self.transition(pages, &[PageState::Absent], PageState::Poisoned)
    }

    /// Sets all pages of the range to removed.
    ///
    /// # Errors
    /// [`ArenaFull`]: some pages keep their old states. If an event reported the removal, the
    /// session must end.
    pub(crate) fn set_removed(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        let from = [PageState::Absent, PageState::Resident, PageState::Poisoned];
        self.transition(pages, &from, PageState::Removed)
    }

    fn transition(&self, pages: Range<usize>, from: &[PageState], to: PageState) -> Result<(), ArenaFull> {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        for (index, lows) in words_of(pages) {
            let changed =
                |old| from.iter().map(|state| in_state(old, *state)).fold(0, |all, some| all | some) & lows;
            let word = match self.exclusive_word(index) {
                Some(word) => word,
                None if changed(self.word(index)) == 0 => continue,
                None => self.own_word(index)?,
            };
            // A plain store would undo a removal that another thread records at the same time.
            let step = |old| {
                let changed = changed(old);
                (changed != 0).then_some((old & !(changed * 0b11)) | (changed * to as u64))
            };
            if let Ok(old) = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, step) {
                self.count_transition(old, changed(old), to);
            }
        }
        Ok(())
    }

    /// Returns the word with this index, if no other table names its block.
    fn exclusive_word(&self, index: usize) -> Option<&AtomicU64> {
        let words = block_words(self.pages);
        let block = self.table()[index / words].load(Ordering::Acquire);
        let is_exclusive = block != 0 && block & SHARED == 0;
        is_exclusive.then(|| &self.arena.words(to_usize(block), words)[index % words])
    }

    /// Returns the word with this index, and first copies its block if another table names it.
    ///
    /// # Errors
    /// [`ArenaFull`].
    pub(crate) fn own_word(&self, index: usize) -> Result<&AtomicU64, ArenaFull> {
        let words = block_words(self.pages);
        self.arena.make_own(&self.table()[index / words], SHARED, words)?;
        Ok(self.exclusive_word(index).expect("only the pager shares blocks, and no thread writes meanwhile"))
    }

    fn count_transition(&self, old: u64, changed: u64, to: PageState) {
        let of = |state| u64::from((in_state(old, state) & changed).count_ones());
        let (absent, poisoned) = (of(PageState::Absent), of(PageState::Poisoned));
        if absent > 0 {
            self.absent.fetch_sub(absent, Ordering::AcqRel);
        }
        match to {
            PageState::Poisoned if absent > 0 => drop(self.poisoned.fetch_add(absent, Ordering::AcqRel)),
            PageState::Poisoned => {}
            _ if poisoned > 0 => drop(self.poisoned.fetch_sub(poisoned, Ordering::AcqRel)),
            _ => {}
        }
    }

    /// Returns the first run of neighbouring pages in `within` whose state is one of `states`. The
    /// run is never empty, even if states change during the search.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let start = self.find(within.clone(), states, true)?;
        // The search goes on after the page that was found, because its state may have changed
        // since.
        let end = self.find(start + 1..within.end, states, false).unwrap_or(within.end);
        Some(start..end)
    }

    /// Returns the first page of `within` whose state is one of `states` or, if not `wanted`, none
    /// of them.
    fn find(&self, within: Range<usize>, states: &[PageState], wanted: bool) -> Option<usize> {
        let mut page = within.start;
        while page < within.end {
            let first = page % WORD_PAGES;
            let count = (WORD_PAGES - first).min(within.end - page);
            let word = self.word(page / WORD_PAGES);
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

impl Drop for PageStates {
    fn drop(&mut self) {
        let words = block_words(self.pages);
        for entry in self.table() {
            let block = entry.load(Ordering::Acquire);
            if block != 0 {
                self.arena.release(to_usize(block & !SHARED), words);
            }
        }
        self.arena.release(self.table_at, blocks_of(self.pages));
    }
}

/// Returns the arena's runs that a predecessor's states of `pages` pages use, with their table at
/// `table_at`. `entry` returns a word of the arena.
pub(crate) fn runs_in_use(table_at: usize, pages: usize, entry: impl Fn(usize) -> u64) -> Vec<Range<usize>> {
    let run = |at: usize, count: usize| at..at.saturating_add(run_words(count));
    let blocks = (0..blocks_of(pages)).map(|block| to_usize(entry(table_at + block) & !SHARED));
    let blocks = blocks.filter(|at| *at != 0).map(|at| run(at, block_words(pages)));
    std::iter::once(run(table_at, blocks_of(pages))).chain(blocks).collect()
}

/// Returns the number of words in the table of an object with `pages` pages.
pub(crate) fn table_words(pages: usize) -> usize {
    run_words(blocks_of(pages))
}

/// Yields the index of each word that holds some of these pages, with the lower bits of those
/// pages.
fn words_of(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        let (page, first) = (next, next % WORD_PAGES);
        let count = (WORD_PAGES - first).min(pages.end.checked_sub(page).filter(|left| *left > 0)?);
        next += count;
        Some((page / WORD_PAGES, low_bits(first, count)))
    })
}

/// Returns the lower bits of `count` pages of a word, from `first` on.
fn low_bits(first: usize, count: usize) -> u64 {
    let all = if count == WORD_PAGES { u64::MAX } else { (1 << (count * 2)) - 1 };
    (all << (first * 2)) & LOW
}

/// Returns the lower bits of the pages of `word` that are in `state`.
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
    use crate::memory::Words;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Resident(Range<usize>),
        Poisoned(Range<usize>),
        Removed(Range<usize>),
        /// Adds a child of these states to the family; later steps can choose it.
        Fork,
        /// Drops these states, if the family has others.
        Drop,
    }

    /// Two full blocks and part of a third one.
    const PAGES: usize = 2 * BLOCK_WORDS * WORD_PAGES + 130;
    const ALL: [PageState; 4] =
        [PageState::Absent, PageState::Resident, PageState::Poisoned, PageState::Removed];

    fn arena() -> Arc<Arena> {
        Arc::new(Arena::new(Words::own(), 0))
    }

    fn any_step() -> impl Strategy<Value = (prop::sample::Index, Step)> {
        // Pages near the borders of words and blocks.
        let near = |at: usize| (at.saturating_sub(70)..(at + 70).min(PAGES)).boxed();
        let border = prop_oneof![
            near(0),
            near(BLOCK_WORDS * WORD_PAGES),
            near(2 * BLOCK_WORDS * WORD_PAGES),
            near(PAGES)
        ];
        let range = (border, 0usize..70).prop_map(|(start, len)| start..(start + len).min(PAGES));
        let step = prop_oneof![
            3 => range.clone().prop_map(Step::Resident),
            2 => range.clone().prop_map(Step::Poisoned),
            2 => range.prop_map(Step::Removed),
            2 => Just(Step::Fork),
            1 => Just(Step::Drop),
        ];
        (any::<prop::sample::Index>(), step)
    }

    fn changed(step: &Step, state: PageState) -> PageState {
        match (step, state) {
            (_, PageState::Removed) | (Step::Removed(_), _) => PageState::Removed,
            (Step::Resident(_), _) => PageState::Resident,
            (Step::Poisoned(_), PageState::Absent) => PageState::Poisoned,
            (_, other) => other,
        }
    }

    proptest! {
        #[test]
        fn states_go_only_their_way_in_each_of_a_family(steps in prop::collection::vec(any_step(), 0..24)) {
            let arena = arena();
            let mut family = vec![(PageStates::new(&arena, PAGES, PAGES).unwrap(), vec![PageState::Absent; PAGES])];
            for (which, step) in steps {
                let which = which.index(family.len());
                let (states, model) = &mut family[which];
                match step.clone() {
                    Step::Resident(pages) => states.set_resident(pages).unwrap(),
                    Step::Poisoned(pages) => states.set_poisoned(pages).unwrap(),
                    Step::Removed(pages) => states.set_removed(pages).unwrap(),
                    Step::Fork => {
                        let child = (states.fork().unwrap(), model.clone());
                        family.push(child);
                        continue;
                    }
                    Step::Drop => {
                        if family.len() > 1 {
                            family.remove(which);
                        }
                        continue;
                    }
                }
                let (Step::Resident(pages) | Step::Poisoned(pages) | Step::Removed(pages)) = step.clone() else {
                    unreachable!("the others went on");
                };
                model[pages].iter_mut().for_each(|state| *state = changed(&step, *state));
            }
            for (states, model) in &family {
                for (page, state) in model.iter().enumerate() {
                    prop_assert_eq!(states.get(page), *state, "page {}", page);
                }
                for state in ALL {
                    let count = model.iter().filter(|other| **other == state).count();
                    prop_assert_eq!(states.count(0..PAGES, state), count);
                }
                let unresolved = [PageState::Absent, PageState::Poisoned];
                prop_assert_eq!(states.absent(), states.count(0..PAGES, PageState::Absent));
                prop_assert_eq!(states.poisoned(), states.count(0..PAGES, PageState::Poisoned));
                let (mut found, mut from) = (Vec::new(), 0);
                while let Some(run) = states.next_run(from..PAGES, &unresolved) {
                    prop_assert!(!run.is_empty());
                    from = run.end;
                    found.extend(run);
                }
                let expected: Vec<_> = (0..PAGES).filter(|&page| unresolved.contains(&model[page])).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn nothing_undoes_a_removal_that_races_an_install() {
        for _ in 0..2000 {
            let states = PageStates::new(&arena(), 32, 32).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| states.set_resident(0..32).unwrap());
                scope.spawn(|| states.set_removed(7..9).unwrap());
            });
            assert_eq!(states.get(7), PageState::Removed);
            assert_eq!((states.count(0..32, PageState::Resident), states.absent()), (30, 0));
        }
    }

    #[test]
    fn a_parent_and_its_children_change_states_at_the_same_time() {
        for _ in 0..500 {
            let parent = PageStates::new(&arena(), 64, 64).unwrap();
            parent.set_resident(0..1).unwrap();
            let children = [parent.fork().unwrap(), parent.fork().unwrap()];
            std::thread::scope(|scope| {
                scope.spawn(|| parent.set_resident(1..20).unwrap());
                scope.spawn(|| parent.set_removed(30..40).unwrap());
                scope.spawn(|| children[0].set_removed(0..8).unwrap());
                scope.spawn(|| children[1].set_poisoned(0..64).unwrap());
                // In any interleaving the reader sees the parent's own state.
                scope.spawn(|| assert_eq!(parent.get(0), PageState::Resident));
            });
            let counts = |states: &PageStates| ALL.map(|state| states.count(0..64, state));
            assert_eq!(counts(&parent), [34, 20, 0, 10]);
            assert_eq!(counts(&children[0]), [56, 0, 0, 8]);
            assert_eq!(counts(&children[1]), [0, 1, 63, 0]);
        }
    }

    #[test]
    fn what_a_family_has_given_up_is_used_again() {
        let arena = arena();
        let big = |fork: &PageStates| fork.set_removed(0..PAGES).unwrap();
        let mut ends = Vec::new();
        for _ in 0..3 {
            let parent = PageStates::new(&arena, PAGES, PAGES).unwrap();
            big(&parent);
            let child = parent.fork().unwrap();
            drop(parent);
            child.set_resident(0..PAGES).unwrap();
            drop(child);
            ends.push(arena.end());
        }
        assert_eq!(ends, [ends[0]; 3], "nothing is lost");
    }
}
