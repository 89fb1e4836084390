//! Pages of 2 MiB (hugetlb). The kernel installs them whole, and what comes are chunks: these are gathered until all of a
//! page are there.

use crate::install::{Entrance, Installed, gone, unresolved};
use crate::memory::ChunkPages;
use crate::memory::{Gathered, HUGE_PAGES, MemoryMap, PageState, Region};
use crate::uffd::{HUGE_BYTES, Outcome};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::sync::LazyLock;

/// A huge page of zeros. No code writes to it, so that it takes no memory.
pub(crate) static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; HUGE_BYTES]);

/// As [`crate::install::install`], for a region of huge pages.
pub(crate) fn install(
    map: Option<&MemoryMap>,
    region: &Region,
    chunk: ChunkIndex,
    content: &ChunkPages,
) -> Installed {
    let Some(of_chunk) = region.pages_of(chunk) else { return Installed::All };
    let (mut next, mut entrance) = (of_chunk.start, Entrance::new(map));
    while next < of_chunk.end {
        let pass = match entrance.enter(region) {
            Ok(pass) => pass,
            Err(why) => return why,
        };
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
fn wake_shared(region: &Region, page: usize) {
    if region.is_shared() {
        region.space.uffd.wake(region.address(page), HUGE_BYTES);
    }
}

/// Installs the huge page that begins with this one, if all of it has come, and wakes who waits for it. In the gate.
pub(crate) fn install_gathered(region: &Region, first: usize) -> Installed {
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
        Outcome::AlreadyPresent if region.is_mapped(first) => {
            uffd.wake(address, HUGE_BYTES);
            None
        }
        // An empty pool gives the same answer. Where that is not known either, whoever waits for it tells: he goes on, or
        // touches it again.
        Outcome::AlreadyPresent => {
            uffd.wake(address, HUGE_BYTES);
            Some(Installed::NoMemory)
        }
        Outcome::NoMemory | Outcome::Unexpected { .. } => Some(Installed::NoMemory),
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
