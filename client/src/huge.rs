//! Pages of 2 MiB (hugetlb). The kernel installs them whole, and what comes are chunks: these are gathered until all of a
//! page are there.

use crate::chunk::ChunkPages;
use crate::gate::Gate;
use crate::install::{Installed, enter, gone, unresolved};
use crate::page_state::PageState;
use crate::region::RegionState;
use crate::uffd::{HUGE_BYTES, Outcome};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// Pages of 4 KiB in one.
pub(crate) const HUGE_PAGES: usize = HUGE_BYTES / PAGE_BYTES;

/// A page of zeros. Nobody writes to it, so that it takes no memory.
pub(crate) static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; HUGE_BYTES]);

/// What has come of the huge pages of some memory that are not installed yet, by the number of their first state.
#[derive(Debug, Default)]
pub(crate) struct Gathering(Mutex<HashMap<usize, Gathered>>);

/// What has come of a huge page.
#[derive(Debug)]
struct Gathered {
    bytes: Vec<u8>,
    /// A bit for each page of 4 KiB.
    there: [u64; HUGE_PAGES / 64],
}

impl Gathered {
    fn new() -> Self {
        Self { bytes: vec![0; HUGE_BYTES], there: [0; HUGE_PAGES / 64] }
    }

    fn has(&self, mut pages: Range<usize>) -> bool {
        pages.all(|page| self.there[page / 64] >> (page % 64) & 1 == 1)
    }

    /// Takes these pages from those of a chunk from `from` on.
    fn put(&mut self, pages: Range<usize>, content: &ChunkPages, from: usize) {
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
            self.there[page / 64] |= 1 << (page % 64);
        }
    }
}

impl Gathering {
    fn pages(&self) -> MutexGuard<'_, HashMap<usize, Gathered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all of these states, which are of one huge page, have come.
    pub(crate) fn has(&self, states: &Range<usize>) -> bool {
        let first = states.start - states.start % HUGE_PAGES;
        self.pages().get(&first).is_some_and(|page| page.has(states.start - first..states.end - first))
    }

    /// Forgets what has come for these states: they are removed, or lost.
    pub(crate) fn forget(&self, states: &Range<usize>) {
        self.pages().retain(|first, _| !states.contains(first));
    }

    /// Takes out a page of which all has come.
    fn take_whole(&self, first: usize) -> Option<Gathered> {
        let mut pages = self.pages();
        pages.get(&first)?.has(0..HUGE_PAGES).then(|| pages.remove(&first))?
    }
}

/// As [`crate::install::install`], for a region of huge pages.
pub(crate) fn install(
    gate: Option<&Gate>,
    region: &RegionState,
    chunk: ChunkIndex,
    content: &ChunkPages,
) -> Installed {
    let Some(of_chunk) = region.pages_of(chunk) else { return Installed::All };
    let mut next = of_chunk.start;
    while next < of_chunk.end {
        let Ok(pass) = enter(gate) else { return Installed::Ended };
        if !region.is_alive() {
            return Installed::All;
        }
        let page = region.whole(&(next..next + 1));
        let pages = next..page.end.min(of_chunk.end);
        next = pages.end;
        let Some(gathering) = region.gathering() else { unreachable!("the region is of huge pages") };
        {
            let mut gathered = gathering.pages();
            // While that is locked: whoever installs the page sets its state before he forgets what came meanwhile.
            if region.next_run(page.clone(), unresolved(region)).is_none() {
                drop(gathered);
                wake_shared(region, page.start);
                continue;
            }
            let place = pages.start - page.start..pages.end - page.start;
            let first = region.placed(page.clone()).start;
            let from = region.place_in_chunk(pages.start);
            gathered.entry(first).or_insert_with(Gathered::new).put(place, content, from);
        }
        let installed = install_gathered(region, page.start);
        if installed != Installed::All {
            return installed;
        }
        drop(pass);
    }
    Installed::All
}

/// What came through another mapping has woken nobody here.
fn wake_shared(region: &RegionState, page: usize) {
    if region.is_shared() {
        region.space.uffd.wake(region.address(page), HUGE_BYTES);
    }
}

/// Installs the huge page that begins with this one, if all of it has come, and wakes who waits for it. In the gate.
pub(crate) fn install_gathered(region: &RegionState, first: usize) -> Installed {
    let pages = first..first + HUGE_PAGES;
    let states = region.placed(pages.clone());
    let Some(gathering) = region.gathering() else { return Installed::All };
    let Some(mut whole) = gathering.take_whole(states.start) else { return Installed::All };
    // What was removed of it is zero.
    let mut next = first;
    while let Some(removed) = region.next_run(next..pages.end, &[PageState::Removed]) {
        next = removed.end;
        whole.bytes[(removed.start - first) * PAGE_BYTES..(removed.end - first) * PAGE_BYTES].fill(0);
    }
    let uffd = &region.space.uffd;
    let address = region.address(first);
    let later = match region.space.counted(uffd.copy(address, &whole.bytes)) {
        Outcome::Done => None,
        Outcome::AlreadyPresent if region.is_there(first) => {
            uffd.wake(address, HUGE_BYTES);
            None
        }
        // An empty pool gives the same answer. Where that is not known either, whoever waits for it tells: he goes on, or
        // touches it again.
        Outcome::AlreadyPresent => {
            uffd.wake(address, HUGE_BYTES);
            Some(Installed::NoMemory)
        }
        Outcome::NoMemory => Some(Installed::NoMemory),
        Outcome::Deferred | Outcome::Partial { .. } => Some(Installed::Deferred),
        Outcome::Gone => {
            gone(region, first);
            return Installed::All;
        }
        Outcome::OwnerGone => {
            region.space.set_gone();
            return Installed::All;
        }
    };
    if let Some(later) = later {
        gathering.pages().insert(states.start, whole);
        return later;
    }
    region.set_resident(pages);
    gathering.forget(&states);
    Installed::All
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_when_all_of_its_chunks_have_come_in_any_order() {
        let gathering = Gathering::default();
        let mut content = ChunkPages::default();
        content.set_zeros(64 << 10);
        // The page begins within its first chunk, and ends within its last one.
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
