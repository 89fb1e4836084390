//! Installs pages of 2 MiB (hugetlb). The kernel installs them whole, so chunks are gathered until
//! a page is complete.

use crate::install::{Entrance, Installed, gone, unresolved};
use crate::memory::ChunkPages;
use crate::memory::{Gathered, HUGE_PAGES, MemoryMap, PageState, Region};
use crate::uffd::{HUGE_BYTES, Outcome};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::sync::LazyLock;

/// A huge page of zeros. No code writes to it, so it takes no memory.
pub(crate) static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; HUGE_BYTES]);

/// Installs a chunk into a region of huge pages, as [`crate::install::install`] does into others.
pub(crate) fn install(
    map: Option<&MemoryMap>,
    region: &Region,
    chunk: ChunkIndex,
    content: &ChunkPages,
) -> Installed {
    let Some(of_chunk) = region.pages_of_chunk(chunk) else { return Installed::All };
    let (mut next, mut entrance) = (of_chunk.start, Entrance::new(map));
    while next < of_chunk.end {
        let pass = match entrance.enter(region) {
            Ok(pass) => pass,
            Err(why) => return why,
        };
        let page = region.extend_to_kernel_pages(&(next..next + 1));
        let pages = next..page.end.min(of_chunk.end);
        next = pages.end;
        let Some(gathering) = region.gathering() else { unreachable!("the region is of huge pages") };
        {
            let mut gathered = gathering.pages();
            // The state is read under the lock: the installer of a page sets its state before it
            // discards chunks that arrived meanwhile.
            if region.next_run(page.clone(), unresolved(region)).is_none() {
                drop(gathered);
                wake_shared(region, page.start);
                continue;
            }
            let place = pages.start - page.start..pages.end - page.start;
            let first = region.state_indices(page.clone()).start;
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

/// Wakes the waiters of this mapping: an install through another mapping does not wake them.
fn wake_shared(region: &Region, page: usize) {
    if region.is_shared() {
        region.space.uffd.wake(region.address(page), HUGE_BYTES);
    }
}

/// Installs the huge page at `first` if all its chunks are gathered, and wakes its waiters. The
/// caller must be in the gate.
pub(crate) fn install_gathered(region: &Region, first: usize) -> Installed {
    let pages = first..first + HUGE_PAGES;
    let states = region.state_indices(pages.clone());
    let Some(gathering) = region.gathering() else { return Installed::All };
    let Some(mut whole) = gathering.take_whole(states.start) else { return Installed::All };
    // Removed parts of the page are zeros.
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
        // An empty hugetlb pool gives the same answer. The wake tells the two apart: the waiter
        // continues, or faults again.
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
