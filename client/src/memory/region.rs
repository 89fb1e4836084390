//! Regions: spans of address space that are backed by a span of an image's file.

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

/// A region as it was in a snapshot of the spaces ([`super::Spaces`]). The owner may have moved or unmapped the memory
/// since: [`super::Spaces::holds`] tells, in the gate. Pages of a region are counted from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) space: Arc<Space>,
    pub(crate) object: Arc<Object>,
    start: usize,
    /// The file's page that the region begins with.
    first_page: usize,
    pages: usize,
}

impl Region {
    /// The region at address `start` of these pages of the object's file, which the object must have.
    pub(crate) fn new(
        space: Arc<Space>,
        object: Arc<Object>,
        start: usize,
        file_pages: Range<usize>,
    ) -> Self {
        Self { space, object, start, first_page: file_pages.start, pages: file_pages.len() }
    }

    /// A pager that was killed while it set the states of a huge page has set some of them: all become resident, or
    /// poisoned, if one is. Removals are of parts, too, and are done again.
    pub(crate) fn complete_huge_pages(&self) {
        for first in (0..self.pages).step_by(self.unit()).filter(|_| self.unit() > 1) {
            let pages = first..first + self.unit();
            if self.next_run(pages.clone(), &[PageState::Resident]).is_some() {
                self.set_resident(pages);
            } else if self.next_run(pages.clone(), &[PageState::Poisoned]).is_some() {
                // Without memory for that an access finds the page absent, as its fault does.
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

    /// The words that hold removed pages, a bit for each state of the object, if they are tracked.
    pub(crate) fn removals(&self) -> Option<&[AtomicU64]> {
        self.object.removals()
    }

    /// The address of a page.
    pub(crate) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE_BYTES
    }

    /// The addresses of all of it.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.start..self.address(self.pages)
    }

    /// The addresses of these pages.
    pub(crate) fn addresses_of(&self, pages: &Range<usize>) -> Range<usize> {
        self.address(pages.start)..self.address(pages.end)
    }

    /// Length in bytes, a multiple of the page size.
    pub(crate) fn len(&self) -> usize {
        self.pages * PAGE_BYTES
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The page at an address.
    pub(crate) fn page_at(&self, address: usize) -> Option<usize> {
        let offset = address.checked_sub(self.start)?;
        (offset < self.len()).then_some(offset / PAGE_BYTES)
    }

    /// The pages that lie in a range of addresses.
    pub(crate) fn pages_in(&self, addresses: &Range<usize>) -> Range<usize> {
        let page = |address: usize| (address.saturating_sub(self.start) / PAGE_BYTES).min(self.pages);
        let start = page(addresses.start);
        start..page(addresses.end.next_multiple_of(PAGE_BYTES)).max(start)
    }

    /// The arrived parts of its huge pages, if its pages are huge.
    pub(crate) fn gathering(&self) -> Option<&Gathering> {
        self.object.gathering()
    }

    /// How many pages of 4 KiB the kernel installs at least, all or none.
    pub(crate) fn unit(&self) -> usize {
        if self.object.kind().is_huge { HUGE_PAGES } else { 1 }
    }

    /// All of the kernel's pages that these pages are in.
    pub(crate) fn whole(&self, pages: &Range<usize>) -> Range<usize> {
        let unit = self.unit();
        pages.start - pages.start % unit..pages.end.next_multiple_of(unit)
    }

    /// The addresses of the kernel's page that a page is in.
    pub(crate) fn whole_addresses(&self, page: usize) -> Range<usize> {
        self.addresses_of(&self.whole(&(page..page + 1)))
    }

    /// Wakes the threads that wait for pages of a chunk: they fault again.
    pub(crate) fn wake_chunk(&self, chunk: ChunkIndex) {
        let pages = self.pages_of(chunk).map_or(0..0, |pages| self.whole(&pages));
        self.space.wake(&self.addresses_of(&pages));
    }

    /// Whether the kernel's page that a page is in is mapped there, as far as that can be seen.
    pub(crate) fn is_mapped(&self, page: usize) -> bool {
        let addresses = self.whole_addresses(page);
        if self.is_shared() && self.space.uffd.is_cached(addresses.start, addresses.len()) {
            return true;
        }
        // An owner that was not asked to tell may have dropped it.
        match self.space.has_pagemap() {
            true => self.space.is_present(addresses.start),
            false => !self.is_shared() && self.state(page) == PageState::Resident,
        }
    }

    /// The chunk that a page belongs to.
    pub(crate) fn chunk_of(&self, page: usize) -> ChunkIndex {
        let in_file = (self.first_page + page) / self.object.chunk_pages();
        ChunkIndex(self.file().first_chunk.0 + in_file as u64)
    }

    /// Which pages of the file these are.
    pub(crate) fn file_pages(&self, pages: Range<usize>) -> Range<usize> {
        self.first_page + pages.start..self.first_page + pages.end.min(self.pages)
    }

    /// The region's pages among these of its file.
    pub(crate) fn pages_of_file(&self, pages: Range<usize>) -> Range<usize> {
        let page = |page: usize| page.saturating_sub(self.first_page).min(self.pages);
        page(pages.start)..page(pages.end)
    }

    /// Where in its chunk a page is: 0, the chunk's first page, or after it.
    pub(crate) fn place_in_chunk(&self, page: usize) -> usize {
        (self.first_page + page) % self.object.chunk_pages()
    }

    /// The chunks that the region has pages of; of the first and the last one perhaps not all.
    pub(crate) fn chunks(&self) -> Range<u64> {
        match self.pages {
            0 => 0..0,
            pages => self.chunk_of(0).0..self.chunk_of(pages - 1).0 + 1,
        }
    }

    /// The region's pages of a chunk; None if it has none.
    pub(crate) fn pages_of(&self, chunk: ChunkIndex) -> Option<Range<usize>> {
        let in_file = || to_usize(chunk.0 - self.file().first_chunk.0);
        let index = self.chunks().contains(&chunk.0).then(in_file)?;
        let chunk_pages = self.object.chunk_pages();
        let (start, end) = (index * chunk_pages, (index + 1) * chunk_pages);
        Some(start.saturating_sub(self.first_page)..(end - self.first_page).min(self.pages))
    }

    /// Whether the memory is mapped elsewhere, too, or may be.
    pub(crate) fn is_shared(&self) -> bool {
        self.object.kind().is_shared
    }

    /// The addresses at which this region has pages of `other`, which may be itself.
    pub(crate) fn same_memory(&self, other: &Self, pages: &Range<usize>) -> Range<usize> {
        if !Arc::ptr_eq(&self.object, &other.object) {
            return 0..0;
        }
        let place = |page: usize| (other.first_page + page).saturating_sub(self.first_page).min(self.pages);
        self.address(place(pages.start))..self.address(place(pages.end))
    }

    /// The state of a page.
    pub(crate) fn state(&self, page: usize) -> PageState {
        self.states().get(self.first_state() + page)
    }

    /// The first run of neighbouring pages in `within` whose state is one of `states`.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let first_state = self.first_state();
        let run = self.states().next_run(self.placed(within), states)?;
        Some(run.start - first_state..run.end - first_state)
    }

    /// How many of its pages are in `state`.
    pub(crate) fn count(&self, state: PageState) -> usize {
        self.states().count(self.placed(0..self.pages), state)
    }

    /// Absent and poisoned pages of the range become resident.
    pub(crate) fn set_resident(&self, pages: Range<usize>) {
        // Without memory for that the pages look absent: the next install finds them present.
        let _ = self.states().set_resident(self.placed(pages));
    }

    /// Absent pages of the range become poisoned.
    ///
    /// # Errors
    /// [`ArenaFull`]: they must not be poisoned then.
    pub(crate) fn set_poisoned(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        let placed = self.placed(pages);
        self.states().set_poisoned(placed.clone())?;
        if let Some(gathering) = self.gathering() {
            gathering.forget(&placed);
        }
        Ok(())
    }

    /// All pages of the range become removed.
    ///
    /// # Errors
    /// [`ArenaFull`]: the session must not go on.
    pub(crate) fn set_removed(&self, pages: Range<usize>) -> Result<(), ArenaFull> {
        let placed = self.placed(pages);
        self.states().set_removed(placed.clone())?;
        if let Some(gathering) = self.gathering() {
            gathering.forget(&placed);
        }
        self.object.count_removed(placed);
        Ok(())
    }

    /// Has removals of pages be told of again, if removals are tracked.
    pub(crate) fn count_removed(&self, pages: Range<usize>) {
        self.object.count_removed(self.placed(pages));
    }

    fn first_state(&self) -> usize {
        self.object.state_of(self.first_page)
    }

    /// Where these pages are among the object's states.
    pub(crate) fn placed(&self, pages: Range<usize>) -> Range<usize> {
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
        /// The chunks that a region has pages of divide these among themselves, in order, wherever it begins.
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
                let here = region.pages_of(ChunkIndex(chunk)).unwrap();
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
                prop_assert_eq!(region.pages_of(ChunkIndex(outside)), None);
            }
        }
    }
}
