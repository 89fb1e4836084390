//! Regions: a region is a range of addresses that maps a range of pages of one image file.

use super::arena::ArenaFull;
use super::gathering::{Gathering, HUGE_PAGES};
use super::object::Object;
use super::page_states::{PageState, PageStates};
use super::space::Space;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A region as a snapshot of the spaces ([`super::Spaces`]) shows it. The owner may have moved or
/// unmapped the memory since; [`super::Spaces::holds`] answers that, in the gate. A region's pages
/// are numbered from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) space: Arc<Space>,
    pub(crate) object: Arc<Object>,
    start: usize,
    /// The file's page at the region's beginning.
    first_page: usize,
    pages: usize,
}

impl Region {
    /// Returns the region at address `start` of these pages of the object's file. The object must
    /// cover the pages.
    pub(crate) fn new(
        space: Arc<Space>,
        object: Arc<Object>,
        start: usize,
        file_pages: Range<usize>,
    ) -> Self {
        Self { space, object, start, first_page: file_pages.start, pages: file_pages.len() }
    }

    /// Completes the states of huge pages, after a predecessor was killed while it set them. If one
    /// page of a huge page is resident, all become resident; else, if one is poisoned, all become
    /// poisoned. Removals stay as they are: an event may remove a part of a huge page, and the
    /// successor processes the event again.
    pub(crate) fn complete_huge_pages(&self) {
        let unit = self.pages_per_kernel_page();
        for first in (0..self.pages).step_by(unit).filter(|_| unit > 1) {
            let pages = first..first + unit;
            if self.next_run(pages.clone(), &[PageState::Resident]).is_some() {
                self.set_resident(pages);
            } else if self.next_run(pages.clone(), &[PageState::Poisoned]).is_some() {
                // If no memory is left for the states, the pages stay absent. A fault on them finds
                // the poison then.
                let _ = self.set_poisoned(pages);
            }
        }
    }

    fn states(&self) -> &PageStates {
        self.object.states()
    }

    pub(crate) fn file(&self) -> &FileEntry {
        &self.object.file
    }

    /// Returns the words that record removed pages, one bit for each state of the object, if the
    /// object tracks removals.
    pub(crate) fn removals(&self) -> Option<&[AtomicU64]> {
        self.object.removals()
    }

    /// Returns the address of a page.
    pub(crate) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE_BYTES
    }

    /// Returns the region's addresses.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.start..self.address(self.pages)
    }

    /// Returns the addresses of these pages.
    pub(crate) fn addresses_of(&self, pages: &Range<usize>) -> Range<usize> {
        self.address(pages.start)..self.address(pages.end)
    }

    /// Returns the length in bytes, a multiple of the page size.
    pub(crate) fn len(&self) -> usize {
        self.pages * PAGE_BYTES
    }

    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Returns the page at an address.
    pub(crate) fn page_at(&self, address: usize) -> Option<usize> {
        let offset = address.checked_sub(self.start)?;
        (offset < self.len()).then_some(offset / PAGE_BYTES)
    }

    /// Returns the region's pages, numbered over all files of the image.
    pub(crate) fn image_pages(&self) -> Range<u64> {
        let first = self.object.first_image_page() + self.first_page as u64;
        first..first + self.pages as u64
    }

    /// Returns the pages that overlap a range of addresses.
    pub(crate) fn pages_in(&self, addresses: &Range<usize>) -> Range<usize> {
        let page = |address: usize| (address.saturating_sub(self.start) / PAGE_BYTES).min(self.pages);
        let start = page(addresses.start);
        start..page(addresses.end.next_multiple_of(PAGE_BYTES)).max(start)
    }

    /// Returns the arrived parts of the region's huge pages, or None if its pages are small.
    pub(crate) fn gathering(&self) -> Option<&Gathering> {
        self.object.gathering()
    }

    /// Returns the size in 4 KiB pages of the unit that the kernel installs whole.
    pub(crate) fn pages_per_kernel_page(&self) -> usize {
        if self.object.kind().is_huge { HUGE_PAGES } else { 1 }
    }

    /// Returns `pages`, extended to whole pages of the kernel.
    pub(crate) fn extend_to_kernel_pages(&self, pages: &Range<usize>) -> Range<usize> {
        let unit = self.pages_per_kernel_page();
        pages.start - pages.start % unit..pages.end.next_multiple_of(unit)
    }

    /// Returns the addresses of the kernel's page that contains `page`.
    pub(crate) fn kernel_page_addresses(&self, page: usize) -> Range<usize> {
        self.addresses_of(&self.extend_to_kernel_pages(&(page..page + 1)))
    }

    /// Wakes the threads that wait for pages of a chunk. They fault again.
    pub(crate) fn wake_chunk(&self, chunk: ChunkIndex) {
        let pages = self.pages_of_chunk(chunk).map_or(0..0, |pages| self.extend_to_kernel_pages(&pages));
        self.space.wake(&self.addresses_of(&pages));
    }

    /// Returns whether the kernel's page that contains `page` is mapped, as far as this process can
    /// see it. Maps a page of shared memory that exists and is not mapped here.
    pub(crate) fn is_mapped(&self, page: usize) -> bool {
        let addresses = self.kernel_page_addresses(page);
        if self.is_shared() && self.space.uffd.is_cached(addresses.start, addresses.len()) {
            return true;
        }
        // The page tables are the better source: an owner whose userfaultfd reports no removals may
        // have dropped the page.
        match self.space.has_pagemap() {
            true => self.space.is_present(addresses.start),
            false => !self.is_shared() && self.state(page) == PageState::Resident,
        }
    }

    /// Returns the chunk that contains a page.
    pub(crate) fn chunk_of(&self, page: usize) -> ChunkIndex {
        let in_file = (self.first_page + page) / self.object.chunk_pages();
        ChunkIndex(self.file().first_chunk.0 + in_file as u64)
    }

    /// Returns the numbers that these pages have in the file.
    pub(crate) fn file_pages(&self, pages: Range<usize>) -> Range<usize> {
        self.first_page + pages.start..self.first_page + pages.end.min(self.pages)
    }

    /// Returns the region's pages among these pages of its file.
    pub(crate) fn pages_of_file(&self, pages: Range<usize>) -> Range<usize> {
        let page = |page: usize| page.saturating_sub(self.first_page).min(self.pages);
        page(pages.start)..page(pages.end)
    }

    /// Returns the position of a page in its chunk; 0 is the chunk's first page.
    pub(crate) fn place_in_chunk(&self, page: usize) -> usize {
        (self.first_page + page) % self.object.chunk_pages()
    }

    /// Returns the chunks of which the region has pages. It may have only a part of the first and
    /// of the last one.
    pub(crate) fn chunks(&self) -> Range<u64> {
        match self.pages {
            0 => 0..0,
            pages => self.chunk_of(0).0..self.chunk_of(pages - 1).0 + 1,
        }
    }

    /// Returns the region's pages of a chunk, or None if it has none.
    pub(crate) fn pages_of_chunk(&self, chunk: ChunkIndex) -> Option<Range<usize>> {
        let in_file = || to_usize(chunk.0 - self.file().first_chunk.0);
        let index = self.chunks().contains(&chunk.0).then(in_file)?;
        let chunk_pages = self.object.chunk_pages();
        let (start, end) = (index * chunk_pages, (index + 1) * chunk_pages);
        Some(start.saturating_sub(self.first_page)..(end - self.first_page).min(self.pages))
    }

    /// Returns whether other mappings have this memory, or may have it.
    pub(crate) fn is_shared(&self) -> bool {
        self.object.kind().is_shared
    }

    /// Returns the addresses at which this region maps `pages` of `other`, which may be the same
    /// region.
    pub(crate) fn same_memory(&self, other: &Self, pages: &Range<usize>) -> Range<usize> {
        if !Arc::ptr_eq(&self.object, &other.object) {
            return 0..0;
        }
        let place = |page: usize| (other.first_page + page).saturating_sub(self.first_page).min(self.pages);
        self.address(place(pages.start))..self.address(place(pages.end))
    }

    /// Returns the state of a page.
    pub(crate) fn state(&self, page: usize) -> PageState {
        self.states().get(self.first_state() + page)
    }

    /// Returns the first run of neighbouring pages in `within` whose state is one of `states`.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let first_state = self.first_state();
        let run = self.states().next_run(self.state_indices(within), states)?;
        Some(run.start - first_state..run.end - first_state)
    }

    /// Returns the number of the region's pages that are in `state`.
    pub(crate) fn count(&self, state: PageState) -> usize {
        self.states().count(self.state_indices(0..self.pages), state)
    }

    /// Sets the absent and poisoned pages of the range to resident.
    pub(crate) fn set_resident(&self, pages: Range<usize>) {
        // If no memory is left for the states, the pages look absent. The next install finds them
        // present.
        let _ = self.states().set_resident(self.state_indices(pages));
    }

    /// Sets the absent pages of the range to poisoned.
    ///
    /// # Errors
    /// [`ArenaFull`]: the caller must not poison the pages.
    pub(crate) fn set_poisoned(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        let indices = self.state_indices(pages);
        self.states().set_poisoned(indices.clone())?;
        if let Some(gathering) = self.gathering() {
            gathering.forget(&indices);
        }
        Ok(())
    }

    /// Sets all pages of the range to removed.
    ///
    /// # Errors
    /// [`ArenaFull`]: some pages keep their old states. If an event reported the removal, the
    /// session must end, because an absent page would be installed again. Any other caller can
    /// retry.
    pub(crate) fn set_removed(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        let indices = self.state_indices(pages);
        self.states().set_removed(indices.clone())?;
        if let Some(gathering) = self.gathering() {
            gathering.forget(&indices);
        }
        self.object.record_removed(indices);
        Ok(())
    }

    /// Records removed pages as removed in this period, if the object tracks removals. Their
    /// states do not change: a call that could not report a removal leaves it to the next call, and
    /// a successor does not know which removals the dead pager has reported.
    pub(crate) fn record_removed(&self, pages: Range<usize>) {
        self.object.record_removed(self.state_indices(pages));
    }

    fn first_state(&self) -> usize {
        self.object.state_of(self.first_page)
    }

    /// Returns the indices of these pages among the object's states.
    pub(crate) fn state_indices(&self, pages: Range<usize>) -> Range<usize> {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        self.first_state() + pages.start..self.first_state() + pages.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_region, any_space};
    use proptest::prelude::*;

    proptest! {
        /// For any start of a region, its chunks divide its pages among themselves, in order.
        #[test]
        fn chunks_divide_the_pages_of_a_region(
            first_page in 0usize..100, pages in 0usize..100, chunk_exponent in 0u32..6, first_chunk in 0u64..1000,
        ) {
            let chunk_pages = 1 << chunk_exponent;
            let file = FileEntry {
                size_bytes: ((first_page + pages) * PAGE_BYTES) as u64,
                first_chunk: ChunkIndex(first_chunk),
                executable: false,
            };
            let (space, chunk_bytes) = (any_space(0), chunk_pages * PAGE_BYTES);
            let region = any_region(&space, 0, file, first_page..first_page + pages, chunk_bytes);
            let mut next = 0;
            for chunk in region.chunks() {
                let here = region.pages_of_chunk(ChunkIndex(chunk)).unwrap();
                prop_assert!(here.start == next && !here.is_empty() && here.len() <= chunk_pages);
                next = here.end;
                for page in here.clone() {
                    prop_assert_eq!(region.chunk_of(page), ChunkIndex(chunk));
                    let in_file = to_usize(chunk - first_chunk) * chunk_pages + region.place_in_chunk(page);
                    prop_assert_eq!(in_file, first_page + page);
                }
            }
            prop_assert_eq!(next, pages);
            let before = region.chunks().start.checked_sub(1);
            for outside in [before, Some(region.chunks().end)].into_iter().flatten() {
                prop_assert_eq!(region.pages_of_chunk(ChunkIndex(outside)), None);
            }
        }
    }
}
