//! The parts of absent huge pages (2 MiB, hugetlb) that have arrived. The kernel installs only
//! whole huge pages, and chunks arrive one by one. So the parts of a huge page are gathered until
//! all of its chunks have arrived.

use super::ChunkPages;
use crate::uffd::HUGE_BYTES;
use postcopy_proto::page::PAGE_BYTES;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages of 4 KiB in a huge page.
pub(crate) const HUGE_PAGES: usize = HUGE_BYTES / PAGE_BYTES;

/// The arrived parts of an object's absent huge pages, by the index of the huge page's first state.
#[derive(Debug, Default)]
pub(crate) struct Gathering(Mutex<HashMap<usize, Gathered>>);

/// A huge page of which some parts have arrived.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) bytes: Vec<u8>,
    /// A bit for each page of 4 KiB that has arrived.
    arrived: [u64; HUGE_PAGES / 64],
}

impl Gathered {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; HUGE_BYTES], arrived: [0; HUGE_PAGES / 64] }
    }

    fn has(&self, mut pages: Range<usize>) -> bool {
        pages.all(|page| self.arrived[page / 64] >> (page % 64) & 1 == 1)
    }

    /// Copies `pages` of this huge page from the chunk `content`, whose page `from` is the first of
    /// them.
    pub(crate) fn put(&mut self, pages: Range<usize>, content: &ChunkPages, from: usize) {
        let mut next = 0;
        while next < pages.len() {
            let (piece, held) = content.piece(from + next..from + pages.len());
            if held {
                let to = (pages.start + next) * PAGE_BYTES;
                let bytes = content.bytes_of(piece.clone());
                self.bytes[to..to + bytes.len()].copy_from_slice(bytes);
            }
            next += piece.len();
        }
        for page in pages {
            self.arrived[page / 64] |= 1 << (page % 64);
        }
    }
}

impl Gathering {
    pub(crate) fn pages(&self) -> MutexGuard<'_, HashMap<usize, Gathered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the pages of all of these states, which belong to one huge page, have
    /// arrived.
    pub(crate) fn has(&self, states: &Range<usize>) -> bool {
        let first = states.start - states.start % HUGE_PAGES;
        self.pages().get(&first).is_some_and(|page| page.has(states.start - first..states.end - first))
    }

    /// Drops the parts of huge pages whose first state is among `states`. The caller has removed,
    /// poisoned or installed these pages.
    pub(crate) fn forget(&self, states: &Range<usize>) {
        self.pages().retain(|first, _| !states.contains(first));
    }

    /// Removes and returns a huge page, if all of its parts have arrived.
    pub(crate) fn take_whole(&self, first: usize) -> Option<Gathered> {
        let mut pages = self.pages();
        pages.get(&first)?.has(0..HUGE_PAGES).then(|| pages.remove(&first))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_when_all_of_its_chunks_have_come_in_any_order() {
        let gathering = Gathering::default();
        let mut content = ChunkPages::default();
        content.set_zeros(64 << 10);
        // The huge page begins in the middle of its first chunk, and ends in the middle of its last
        // one.
        let parts = [(0..3, 13), (3..19, 0), (19..500, 0), (500..512, 0)];
        for (place, from) in [3, 0, 2, 1].map(|n: usize| parts[n].clone()) {
            assert!(gathering.take_whole(512).is_none(), "before {place:?}");
            assert!(!gathering.has(&(512 + place.start..512 + place.end)));
            for start in place.clone().step_by(16) {
                let part = start..(start + 16).min(place.end);
                gathering.pages().entry(512).or_insert_with(Gathered::new).put(part, &content, from);
            }
            assert!(gathering.has(&(512 + place.start..512 + place.end)));
        }
        assert!(gathering.take_whole(512).is_some_and(|page| page.bytes == [0; HUGE_BYTES]));
        assert!(gathering.pages().is_empty());
    }
}
