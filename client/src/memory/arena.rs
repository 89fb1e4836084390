//! The allocator of the words that hold page states. It allocates runs of words, each a power of
//! two long, in constant time. Several tables may share a run.
//!
//! The arena counts the owners of a run that several tables name ([`super::PageStates`] of a parent
//! and its children), and frees the run when the last owner releases it. The counts and the list of
//! free runs exist only in this process. A successor determines from the tables which runs are in
//! use.

use super::words::Words;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, PoisonError};
use postcopy_proto::page::to_usize;
use std::collections::HashMap;
use std::ops::Range;

/// The shortest run in words: one cache line.
const LEAST_WORDS: usize = 8;
/// The number of size classes. Class n has runs of 8 * 2^n words.
const CLASSES: usize = 29;
/// The words of a file that the arena reserves at a time: 256 KiB.
const RESERVE_WORDS: usize = 32_768;

/// The error of an arena that has no memory for more page states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaFull;

/// The error of runs that overlap one another or exceed the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DamagedRuns;

/// An allocator of runs of words, see the module.
#[derive(Debug)]
pub(crate) struct Arena {
    words: Words,
    /// Held for an allocation, for the copy of one block, for changes of the owners' counts, and
    /// while a successor adopts all runs. The only system calls under it reserve memory.
    runs: Mutex<Runs>,
}

/// The runs that are in use, and those that are free.
#[derive(Debug)]
pub(crate) struct Runs {
    /// The first word after all runs.
    end: usize,
    /// In a file: the first word for which no memory is reserved.
    reserved: usize,
    /// The first words of free runs, by class.
    free: [Vec<usize>; CLASSES],
    /// The owner counts of runs with more than one owner, by the run's first word.
    owners: HashMap<usize, u32>,
}

/// Returns the class of the shortest run that holds `count` words.
fn class_of(count: usize) -> usize {
    count.div_ceil(LEAST_WORDS).next_power_of_two().trailing_zeros() as usize
}

/// Returns the length in words of the run that the arena allocates for `count` words.
pub(crate) fn run_words(count: usize) -> usize {
    LEAST_WORDS << class_of(count)
}

impl Arena {
    /// Returns an arena that allocates the words from `first` on. The words before `first` have
    /// other users.
    pub(crate) fn new(words: Words, first: usize) -> Self {
        let end = first.max(LEAST_WORDS).next_multiple_of(LEAST_WORDS);
        let runs = Runs { end, reserved: end, free: [const { Vec::new() }; CLASSES], owners: HashMap::new() };
        Self { words, runs: Mutex::new(runs) }
    }

    /// Returns `count` words from `at` on.
    pub(crate) fn words(&self, at: usize, count: usize) -> &[AtomicU64] {
        self.words.at(at, count)
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates a run of at least `count` words, all 0, and returns its first word, which is never
    /// 0.
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

    /// Allocates a run after all others. It begins at a multiple of its length, so that no run
    /// crosses a segment.
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

    /// Divides a range that belongs to no run into free runs. In this process's own words, only
    /// runs that can be reserved become free.
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

    /// Removes one owner of a run, and frees the run if no owner is left.
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

    /// Adds one owner to each of these runs.
    pub(crate) fn share(&self, runs_at: impl Iterator<Item = usize>) {
        let mut runs = self.runs();
        for at in runs_at {
            *runs.owners.entry(at).or_insert(1) += 1;
        }
    }

    /// Makes `owner` the only owner of a run of `count` words.
    ///
    /// `owner` holds the index of the run's first word, or 0 if it has no run yet; then this
    /// allocates a run of zeros. The bit `shared` in `owner` means that the run may have other
    /// owners. If it has, this copies the run. If it has no other owner, this only clears the bit.
    ///
    /// # Errors
    /// [`ArenaFull`]; nothing has changed.
    pub(crate) fn make_own(&self, owner: &AtomicU64, shared: u64, count: usize) -> Result<(), ArenaFull> {
        let mut runs = self.runs();
        // Read again under the lock: another thread may have copied the run since.
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
            // A plain copy is enough: no owner writes to a shared run.
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

    /// Takes over the runs of a predecessor. A run that `used` names several times has as many
    /// owners. All other words become free.
    ///
    /// # Errors
    /// [`DamagedRuns`], which only happens with a damaged state file.
    pub(crate) fn adopt(&self, mut used: Vec<Range<usize>>) -> Result<(), DamagedRuns> {
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
                return Err(DamagedRuns);
            }
            let gap = runs.end..run.start;
            runs.end = run.end.next_multiple_of(LEAST_WORDS);
            runs.reserved = runs.end;
            self.free_range(&mut runs, gap);
            last = Some(run);
        }
        Ok(())
    }

    /// Returns the first word after all runs.
    #[cfg(test)]
    pub(crate) fn end(&self) -> usize {
        self.runs().end
    }

    /// Returns whether a run has several owners.
    pub(crate) fn is_shared(&self, at: usize) -> bool {
        self.runs().owners.contains_key(&at)
    }
}
