//! Which operations can be done at once: never two that change the same page.

use std::ops::Range;

/// The pages that the operations of a batch have to do with.
#[derive(Default)]
pub(super) struct Claims {
    pub(super) reads: Vec<(usize, Range<usize>)>,
    /// Removed or covered, which may be read meanwhile.
    pub(super) removes: Vec<(usize, Range<usize>)>,
    /// Pages that an operation changes in another way.
    pub(super) changes: Vec<(usize, Range<usize>)>,
    /// Processes that fork, and those that exit.
    pub(super) forks: Vec<usize>,
    pub(super) exits: Vec<usize>,
}

pub(super) fn overlap(claims: &[(usize, Range<usize>)], process: usize, pages: &Range<usize>) -> bool {
    let meets = |(who, other): &(usize, Range<usize>)| {
        *who == process && other.start < pages.end && pages.start < other.end
    };
    claims.iter().any(meets)
}

/// Stands for the shared memory, whose pages are claimed by their numbers.
pub(super) const SHARED: usize = usize::MAX;

impl Claims {
    /// These pages of a process, and those of the shared memory that they are.
    pub(super) fn places(
        process: usize,
        pages: &Range<usize>,
        shared: &[usize],
    ) -> Vec<(usize, Range<usize>)> {
        let shared = shared.iter().map(|page| (SHARED, *page..page + 1));
        std::iter::once((process, pages.clone())).chain(shared).collect()
    }

    pub(super) fn meet(claims: &[(usize, Range<usize>)], places: &[(usize, Range<usize>)]) -> bool {
        places.iter().any(|(process, pages)| overlap(claims, *process, pages))
    }

    pub(super) fn read(&mut self, process: usize, pages: &Range<usize>, shared: &[usize]) -> bool {
        let places = Self::places(process, pages, shared);
        let free = !Self::meet(&self.changes, &places) && !self.exits.contains(&process);
        if free {
            self.reads.extend(places);
        }
        free
    }

    pub(super) fn remove(&mut self, process: usize, pages: &Range<usize>) -> bool {
        self.punch(process, pages, &[])
    }

    pub(super) fn punch(&mut self, process: usize, pages: &Range<usize>, shared: &[usize]) -> bool {
        let places = Self::places(process, pages, shared);
        let free = !Self::meet(&self.changes, &places)
            && !Self::meet(&self.removes, &places)
            && !self.exits.contains(&process);
        if free {
            self.removes.extend(places);
        }
        free
    }

    pub(super) fn change(&mut self, process: usize, pages: &Range<usize>, shared: &[usize]) -> bool {
        let places = Self::places(process, pages, shared);
        let free = !Self::meet(&self.changes, &places)
            && !Self::meet(&self.removes, &places)
            && !Self::meet(&self.reads, &places)
            && !self.exits.contains(&process)
            && !self.forks.contains(&process);
        if free {
            self.changes.extend(places);
        }
        free
    }

    pub(super) fn fork(&mut self, process: usize) -> bool {
        let free = self.forks.is_empty()
            && !self.exits.contains(&process)
            && self.changes.iter().all(|(who, _)| *who != process);
        if free {
            self.forks.push(process);
        }
        free
    }

    pub(super) fn exit(&mut self, process: usize) -> bool {
        let others = [&self.reads, &self.removes, &self.changes];
        let free = others.iter().all(|claims| claims.iter().all(|(who, _)| *who != process))
            && !self.forks.contains(&process)
            && !self.exits.contains(&process);
        if free {
            self.exits.push(process);
        }
        free
    }
}
