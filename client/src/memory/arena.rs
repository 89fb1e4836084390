//! Allocates the words that page states lie in: runs of a power of two, in constant time, some of them shared.
//!
//! A run that several tables name ([`super::PageStates`] of a parent and its children) has a count of these; it is free
//! when the last one has given it up. The counts and the free runs are in this process alone: a successor finds out
//! what is in use from the tables.

use super::words::Words;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, PoisonError};
use postcopy_proto::page::to_usize;
use std::collections::HashMap;
use std::ops::Range;

/// The shortest run in words: one cache line.
const LEAST_WORDS: usize = 8;
/// Lengths of runs: 8 words times each power of two.
const CLASSES: usize = 29;
/// How much of a file is reserved at once, in words: 256 KiB.
const RESERVE_WORDS: usize = 32_768;

/// There is no memory for more page states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaFull;

/// See the module.
#[derive(Debug)]
pub(crate) struct Arena {
    words: Words,
    /// Held for an allocation, or for the copy of one block; never over a call into the kernel but for memory.
    runs: Mutex<Runs>,
}

/// Which runs are in use.
#[derive(Debug)]
pub(crate) struct Runs {
    /// The first word behind all runs.
    end: usize,
    /// The first word that has no memory reserved, in a file.
    reserved: usize,
    /// By class: the first words of free runs.
    free: [Vec<usize>; CLASSES],
    /// Runs with more than one owner, by their first word.
    owners: HashMap<usize, u32>,
}

/// The class of the shortest run that has `count` words.
fn class_of(count: usize) -> usize {
    count.div_ceil(LEAST_WORDS).next_power_of_two().trailing_zeros() as usize
}

/// How many words a run has that `count` words were asked for.
pub(crate) fn run_words(count: usize) -> usize {
    LEAST_WORDS << class_of(count)
}

impl Arena {
    /// Hands out the words from `first` on; those before belong to somebody else.
    pub(crate) fn new(words: Words, first: usize) -> Self {
        let end = first.max(LEAST_WORDS).next_multiple_of(LEAST_WORDS);
        let runs = Runs { end, reserved: end, free: [const { Vec::new() }; CLASSES], owners: HashMap::new() };
        Self { words, runs: Mutex::new(runs) }
    }

    /// The words themselves.
    pub(crate) fn words(&self, at: usize, count: usize) -> &[AtomicU64] {
        self.words.at(at, count)
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates a run of at least `count` words, all of them 0: its first word, never 0.
    ///
    /// # Errors
    /// [`ArenaFull`].
    pub(crate) fn allocate(&self, count: usize) -> Result<usize, ArenaFull> {
        let mut runs = self.runs();
        self.allocate_in(&mut runs, count)
    }

    fn allocate_in(&self, runs: &mut Runs, count: usize) -> Result<usize, ArenaFull> {
        let class = class_of(count);
        let at = match runs.free.get_mut(class).ok_or(ArenaFull)?.pop() {
            Some(at) => at,
            None => self.extend(runs, class)?,
        };
        for word in self.words.at(at, LEAST_WORDS << class) {
            word.store(0, Ordering::Relaxed);
        }
        Ok(at)
    }

    /// Takes a run from behind all others. Each begins at a multiple of its length, so that none crosses a segment.
    fn extend(&self, runs: &mut Runs, class: usize) -> Result<usize, ArenaFull> {
        let words = LEAST_WORDS << class;
        let at = runs.end.next_multiple_of(words);
        let end = at.checked_add(words).filter(|end| *end <= self.words.limit()).ok_or(ArenaFull)?;
        match &self.words {
            Words::Mapped(_) if end > runs.reserved => {
                let reserved = (end + RESERVE_WORDS).min(self.words.limit());
                self.words.reserve(&(runs.reserved..reserved)).map_err(|_| ArenaFull)?;
                runs.reserved = reserved;
            }
            Words::Mapped(_) => {}
            Words::Own(_) => self.words.reserve(&(at..end)).map_err(|_| ArenaFull)?,
        }
        let gap = runs.end..at;
        runs.end = end;
        self.free_range(runs, gap);
        Ok(at)
    }

    /// Makes runs of a range that belongs to none. Those of this process's own words must have memory first.
    fn free_range(&self, runs: &mut Runs, range: Range<usize>) {
        let mut at = range.start;
        while at < range.end {
            let mut class = 0;
            while class + 1 < CLASSES
                && at.is_multiple_of(LEAST_WORDS << (class + 1))
                && at + (LEAST_WORDS << (class + 1)) <= range.end
            {
                class += 1;
            }
            let words = LEAST_WORDS << class;
            if matches!(self.words, Words::Mapped(_)) || self.words.reserve(&(at..at + words)).is_ok() {
                runs.free[class].push(at);
            }
            at += words;
        }
    }

    /// Gives up one ownership of a run; frees it if that was the last one.
    pub(crate) fn release(&self, at: usize, count: usize) {
        Self::release_in(&mut self.runs(), at, count);
    }

    fn release_in(runs: &mut Runs, at: usize, count: usize) {
        match runs.owners.get_mut(&at) {
            Some(owners) if *owners > 2 => *owners -= 1,
            Some(_) => drop(runs.owners.remove(&at)),
            None => runs.free[class_of(count)].push(at),
        }
    }

    /// Adds an owner to each of these runs.
    pub(crate) fn share(&self, runs_at: impl Iterator<Item = usize>) {
        let mut runs = self.runs();
        for at in runs_at {
            *runs.owners.entry(at).or_insert(1) += 1;
        }
    }

    /// Makes `owner` the only owner of a run of `count` words: it names a run, 0 for none, marked as `shared` where
    /// others may own it, too. A shared run is copied, unless the others have given it up.
    ///
    /// # Errors
    /// [`ArenaFull`]; nothing has changed.
    pub(crate) fn make_own(&self, owner: &AtomicU64, shared: u64, count: usize) -> Result<(), ArenaFull> {
        let mut runs = self.runs();
        // Under the lock: another thread may have done this.
        let entry = owner.load(Ordering::Acquire);
        if entry != 0 && entry & shared == 0 {
            return Ok(());
        }
        let at = to_usize(entry & !shared);
        if entry != 0 && !runs.owners.contains_key(&at) {
            owner.store(entry & !shared, Ordering::Release);
            return Ok(());
        }
        let copy = self.allocate_in(&mut runs, count)?;
        if entry != 0 {
            // No owner writes to a run that is shared.
            for (to, from) in self.words.at(copy, count).iter().zip(self.words.at(at, count)) {
                to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        owner.store(copy as u64, Ordering::Release);
        if entry != 0 {
            Self::release_in(&mut runs, at, count);
        }
        Ok(())
    }

    /// Takes over what a predecessor has left: these runs are in use, each as often as it is named; all else is free.
    ///
    /// # Errors
    /// [`ArenaFull`], where runs overlap or lie outside, which only a damaged file has.
    pub(crate) fn adopt(&self, mut used: Vec<Range<usize>>) -> Result<(), ArenaFull> {
        let mut runs = self.runs();
        used.sort_unstable_by_key(|run| (run.start, run.end));
        let mut last: Option<Range<usize>> = None;
        for run in used {
            if last.as_ref() == Some(&run) {
                *runs.owners.entry(run.start).or_insert(1) += 1;
                continue;
            }
            if run.start < runs.end || run.end > self.words.limit() || !run.start.is_multiple_of(LEAST_WORDS)
            {
                return Err(ArenaFull);
            }
            let gap = runs.end..run.start;
            runs.end = run.end.next_multiple_of(LEAST_WORDS);
            runs.reserved = runs.end;
            self.free_range(&mut runs, gap);
            last = Some(run);
        }
        Ok(())
    }

    /// The first word behind all runs.
    #[cfg(test)]
    pub(crate) fn end(&self) -> usize {
        self.runs().end
    }

    /// Whether several own a run.
    pub(crate) fn is_shared(&self, at: usize) -> bool {
        self.runs().owners.contains_key(&at)
    }
}
