//! Regions: spans of address space that an image's file appears in as it is touched.

use crate::changes::{self, Changes};
use crate::huge::{Gathering, HUGE_PAGES};
use crate::page_state::{PageState, PageStates};
use crate::session::LossError;
use crate::shared::{Command, Shared};
use crate::space::Space;
use crate::state::RegionRow;
use crate::uffd::memory::Memory;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use tokio::sync::mpsc;

/// What [`Region::read_at`] asks for at once.
const READ_BYTES: usize = 4 << 20;

/// What the pager and the installers know of a region.
///
/// What lies where does not change: a region that is moved or cut by its owner is ended, and others take its place,
/// which have the same [`PageStates`].
#[derive(Debug)]
pub(crate) struct RegionState {
    pub(crate) space: Arc<Space>,
    start: usize,
    pub(crate) file: FileEntry,
    /// The page of the file that the region begins with.
    first_page: usize,
    pages: usize,
    common: Common,
    /// The place of the region's first page among these states.
    first_state: usize,
    /// Other mappings of the same memory have the same states.
    is_shared: bool,
    chunk_pages: usize,
    /// No page below is absent or poisoned, and none will be again.
    resolved_below: AtomicUsize,
    alive: AtomicBool,
}

/// What all parts of a region that was cut, and all mappings of the same memory, have in common.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    states: Arc<PageStates>,
    /// What has come of pages of 2 MiB, if it is of these.
    gathering: Option<Arc<Gathering>>,
    /// A bit for each state: the page was removed since that was last asked for. If that is to be known.
    removals: Option<Arc<[AtomicU64]>>,
}

impl Common {
    pub(crate) fn new(states: PageStates, is_huge: bool, tracks_removals: bool) -> Self {
        let removals = || (0..states.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let removals = tracks_removals.then(removals);
        Self { states: Arc::new(states), gathering: is_huge.then(Arc::default), removals }
    }
}

impl RegionState {
    /// A region at address `start` of these pages of a file, which must have them; what is common is of as many.
    pub(crate) fn new(
        space: Arc<Space>,
        start: usize,
        file: FileEntry,
        pages: Range<usize>,
        chunk_bytes: usize,
        common: Common,
    ) -> Self {
        assert_eq!(common.states.pages(), pages.len(), "as many");
        Self {
            space,
            start,
            file,
            first_page: pages.start,
            pages: pages.len(),
            common,
            first_state: 0,
            is_shared: false,
            chunk_pages: chunk_bytes / PAGE_BYTES,
            resolved_below: AtomicUsize::new(0),
            alive: AtomicBool::new(true),
        }
    }

    /// Some of its pages as a region of their own, at address `start`, with the same states.
    pub(crate) fn part(&self, pages: Range<usize>, start: usize) -> Self {
        Self {
            space: Arc::clone(&self.space),
            start,
            file: self.file,
            first_page: self.first_page + pages.start,
            pages: pages.len(),
            common: self.common.clone(),
            first_state: self.first_state + pages.start,
            is_shared: self.is_shared,
            chunk_pages: self.chunk_pages,
            resolved_below: AtomicUsize::new(0),
            alive: AtomicBool::new(true),
        }
    }

    /// What a process that was forked has in its place: its states are those of now, and go their own way, in
    /// `states`, which is of as many pages.
    pub(crate) fn forked(&self, space: &Arc<Space>, states: PageStates) -> Self {
        self.states().copy_to(&states, self.placed(0..self.pages));
        let (space, common) = (Arc::clone(space), Common::new(states, self.unit() > 1, false));
        Self { space, common, first_state: 0, ..self.part(0..self.pages, self.start) }
    }

    /// The same shared memory as a child has it that was forked.
    pub(crate) fn shared_with(&self, space: &Arc<Space>) -> Self {
        Self { space: Arc::clone(space), ..self.part(0..self.pages, self.start) }
    }

    /// The same as shared memory.
    #[cfg(test)]
    pub(crate) fn shared(self) -> Self {
        Self { is_shared: true, ..self }
    }

    /// The region that a row of the state file tells of, in its space, with its file's entry.
    pub(crate) fn restored(
        row: &RegionRow,
        space: Arc<Space>,
        file: FileEntry,
        chunk_bytes: usize,
        common: Common,
    ) -> Self {
        Self {
            space,
            start: row.address,
            file,
            first_page: row.first_page,
            pages: row.pages,
            common,
            first_state: row.first_state,
            is_shared: row.is_shared,
            chunk_pages: chunk_bytes / PAGE_BYTES,
            resolved_below: AtomicUsize::new(0),
            alive: AtomicBool::new(true),
        }
    }

    /// Whoever was killed while he set the states of a page of 2 MiB has set some of them: they are all to be resident, or
    /// poisoned, if one is. Removals are of parts, too, and are done again.
    pub(crate) fn settle(&self) {
        for first in (0..self.pages).step_by(self.unit()).filter(|_| self.unit() > 1) {
            let pages = first..first + self.unit();
            if self.next_run(pages.clone(), &[PageState::Resident]).is_some() {
                self.set_resident(pages);
            } else if self.next_run(pages.clone(), &[PageState::Poisoned]).is_some() {
                self.set_poisoned(pages);
            }
        }
    }

    /// What the state file says of it. `states_at` is where its states are there.
    pub(crate) fn row(&self, states_at: usize) -> RegionRow {
        RegionRow {
            space: self.space.id,
            address: self.start,
            pages: self.pages,
            first_page: self.first_page,
            file_first_chunk: self.file.first_chunk.0,
            file_bytes: self.file.size_bytes,
            states_at,
            states_pages: self.states().pages(),
            first_state: self.first_state,
            is_shared: self.is_shared,
            is_huge: self.unit() > 1,
            is_left: false,
            is_displaced: false,
        }
    }

    /// The states that it shares with other parts of what it was cut from.
    pub(crate) fn states(&self) -> &PageStates {
        &self.common.states
    }

    /// See [`Common`].
    pub(crate) fn removals(&self) -> Option<&[AtomicU64]> {
        self.common.removals.as_deref()
    }

    /// The address of a page.
    pub(crate) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE_BYTES
    }

    /// The addresses of all of it.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.start..self.address(self.pages)
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

    /// What has come of its pages of 2 MiB, if it is of these.
    pub(crate) fn gathering(&self) -> Option<&Gathering> {
        self.common.gathering.as_deref()
    }

    /// How many pages of 4 KiB the kernel installs at least, all or none.
    pub(crate) fn unit(&self) -> usize {
        if self.common.gathering.is_some() { HUGE_PAGES } else { 1 }
    }

    /// All of the kernel's pages that these pages are in.
    pub(crate) fn whole(&self, pages: &Range<usize>) -> Range<usize> {
        let unit = self.unit();
        pages.start - pages.start % unit..pages.end.next_multiple_of(unit)
    }

    /// The addresses of the kernel's page that a page is in.
    pub(crate) fn whole_addresses(&self, page: usize) -> Range<usize> {
        let whole = self.whole(&(page..page + 1));
        self.address(whole.start)..self.address(whole.end)
    }

    /// Has those who wait for pages of a chunk touch them again.
    pub(crate) fn wake_chunk(&self, chunk: ChunkIndex) {
        let pages = self.pages_of(chunk).map_or(0..0, |pages| self.whole(&pages));
        self.space.uffd.wake(self.address(pages.start), pages.len() * PAGE_BYTES);
    }

    /// Whether the kernel's page that a page is in is mapped there, as far as that can be seen.
    pub(crate) fn is_there(&self, page: usize) -> bool {
        let addresses = self.whole_addresses(page);
        if self.is_shared && self.space.uffd.is_cached(addresses.start, addresses.len()) {
            return true;
        }
        // An owner that was not asked to tell may have dropped it.
        match self.space.has_pagemap() {
            true => self.space.is_present(addresses.start),
            false => !self.is_shared && self.state(page) == PageState::Resident,
        }
    }

    /// The chunk that a page belongs to.
    pub(crate) fn chunk_of(&self, page: usize) -> ChunkIndex {
        ChunkIndex(self.file.first_chunk.0 + ((self.first_page + page) / self.chunk_pages) as u64)
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
        (self.first_page + page) % self.chunk_pages
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
        let index = self.chunks().contains(&chunk.0).then(|| to_usize(chunk.0 - self.file.first_chunk.0))?;
        let (start, end) = (index * self.chunk_pages, (index + 1) * self.chunk_pages);
        Some(start.saturating_sub(self.first_page)..(end - self.first_page).min(self.pages))
    }

    /// Whether the memory is mapped elsewhere, too, or may be.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Where this region has pages of `other`, which may be itself: addresses.
    pub(crate) fn same_memory(&self, other: &Self, pages: &Range<usize>) -> Range<usize> {
        if !Arc::ptr_eq(&self.common.states, &other.common.states) {
            return 0..0;
        }
        let place = |page: usize| (other.first_state + page).saturating_sub(self.first_state).min(self.pages);
        self.address(place(pages.start))..self.address(place(pages.end))
    }

    /// The state of a page.
    pub(crate) fn state(&self, page: usize) -> PageState {
        self.states().get(self.first_state + page)
    }

    /// The first run of neighbouring pages in `within` whose state is one of `states`.
    pub(crate) fn next_run(&self, within: Range<usize>, states: &[PageState]) -> Option<Range<usize>> {
        let run = self.states().next_run(self.placed(within), states)?;
        Some(run.start - self.first_state..run.end - self.first_state)
    }

    /// How many of its pages are in `state`.
    pub(crate) fn count(&self, state: PageState) -> usize {
        self.states().count(self.placed(0..self.pages), state)
    }

    /// Whether no page of it is absent or poisoned, which is final.
    pub(crate) fn is_resolved(&self) -> bool {
        let from = self.resolved_below.load(Ordering::Acquire);
        let unresolved = self.next_run(from..self.pages, &[PageState::Absent, PageState::Poisoned]);
        let below = unresolved.as_ref().map_or(self.pages, |run| run.start);
        self.resolved_below.store(below, Ordering::Release);
        unresolved.is_none()
    }

    /// Absent and poisoned pages of the range become resident.
    pub(crate) fn set_resident(&self, pages: Range<usize>) {
        self.states().set_resident(self.placed(pages));
    }

    /// Absent pages of the range become poisoned.
    pub(crate) fn set_poisoned(&self, pages: Range<usize>) {
        let placed = self.placed(pages);
        self.states().set_poisoned(placed.clone());
        if let Some(gathering) = self.gathering() {
            gathering.forget(&placed);
        }
    }

    /// All pages of the range become removed.
    pub(crate) fn set_removed(&self, pages: Range<usize>) {
        let placed = self.placed(pages);
        self.states().set_removed(placed.clone());
        if let Some(gathering) = self.gathering() {
            gathering.forget(&placed);
        }
        self.count_removed(placed.start - self.first_state..placed.end - self.first_state);
    }

    /// Has removals be told of, if that was asked for.
    pub(crate) fn count_removed(&self, pages: Range<usize>) {
        if let Some(removals) = self.removals() {
            for state in self.placed(pages) {
                removals[state / 64].fetch_or(1 << (state % 64), Ordering::AcqRel);
            }
        }
    }

    /// Where these pages are among the states.
    pub(crate) fn placed(&self, pages: Range<usize>) -> Range<usize> {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        self.first_state + pages.start..self.first_state + pages.end
    }

    /// Whether the memory is still there. Does not change while an installer or the pager is in the gate.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire) && !self.space.is_gone()
    }

    /// The memory is not there any more, or about to be unmapped.
    pub(crate) fn end(&self) {
        self.alive.store(false, Ordering::Release);
    }
}

/// A file of an image as memory: private to this process, filled as it is touched, written to at will.
///
/// Dereferences to the bytes of the file, or of its part that was mapped. The first touch of a page waits until the
/// page has come; a touch of a page that cannot be had is SIGBUS (see [`crate::LossPolicy`]); [`Region::read_at`]
/// gives an error instead. Children of a fork do not have the region. It must not be moved by mremap(2).
///
/// # Blocking
/// Touching it waits for the network. Do not do that while holding a lock that the thread serving you needs, and
/// not on an async worker. Nor in the handler of a signal that may have interrupted a call of this library, which holds
/// locks for moments.
#[derive(Debug)]
pub struct Region {
    // None for an empty span, which has no memory, and once it is dropped.
    memory: Option<Memory>,
    len: usize,
    state: Arc<RegionState>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

impl Region {
    pub(crate) fn new(
        memory: Option<Memory>,
        len: usize,
        state: Arc<RegionState>,
        shared: Arc<Shared>,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        Self { memory, len, state, shared, commands }
    }

    /// Length in bytes: of the file, or of its part that was mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of its pages are resident.
    #[must_use]
    pub fn resident_pages(&self) -> usize {
        self.state.count(PageState::Resident)
    }

    /// Whether the page at `offset` bytes is resident. Does not touch it.
    #[must_use]
    pub fn is_resident(&self, offset: usize) -> bool {
        offset < self.len() && self.state.state(offset / PAGE_BYTES) == PageState::Resident
    }

    /// Copies `buffer.len()` bytes from `offset` on, and gives an error where touching them would be SIGBUS.
    ///
    /// # Errors
    /// [`LossError::Lost`] if a page cannot be had, [`LossError::OutOfRange`] beyond the region's end.
    ///
    /// # Blocking
    /// Until the pages have come, or are given up (after the fault deadline).
    pub fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<(), LossError> {
        let end = offset.checked_add(buffer.len()).filter(|end| *end <= self.len());
        let end = end.ok_or(LossError::OutOfRange { offset, len: buffer.len(), region_bytes: self.len() })?;
        // Piece by piece: the deadline is for what is asked for at once.
        for (at, buffer) in (offset..end).step_by(READ_BYTES).zip(buffer.chunks_mut(READ_BYTES)) {
            let end = at + buffer.len();
            let pages = at / PAGE_BYTES..end.div_ceil(PAGE_BYTES);
            self.shared.bring(&self.commands, &self.state, pages)?;
            buffer.copy_from_slice(&self[at..end]);
        }
        Ok(())
    }
}

impl Region {
    /// What has been changed since the restore, or since [`Region::take_changes`]. The session must track writes
    /// ([`crate::Options::track_writes`]).
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if it does not; else what PAGEMAP_SCAN answers, see proc_pid_pagemap(5).
    ///
    /// # Blocking
    /// For a look at each page's entry in the page tables; some milliseconds a GiB.
    pub fn changes(&self) -> io::Result<Changes> {
        changes::of_region(&self.state, &self.shared, false)
    }

    /// The same, and begins anew: what is written from here on is told of the next time. No write is lost, also where
    /// other threads write meanwhile.
    ///
    /// # Errors
    /// As [`Region::changes`].
    ///
    /// # Blocking
    /// As there.
    pub fn take_changes(&self) -> io::Result<Changes> {
        changes::of_region(&self.state, &self.shared, true)
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| memory.slice(self.len()))
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len();
        self.memory.as_mut().map_or(&mut [], |memory| memory.slice_mut(len))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let command = Command::Unmap { region: Arc::clone(&self.state), memory };
        // A full queue is a pager that is busy with what other threads asked for; it takes some time then.
        let command = match self.commands.try_send(command) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(command) | mpsc::error::TrySendError::Closed(command)) => {
                command
            }
        };
        // Closed: the pager has ended, and unregistered the memory if it could.
        self.shared.unmap_later(&self.commands, command);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;
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
            let (space, chunk_bytes) = (crate::space::tests::any_space(0), chunk_pages * PAGE_BYTES);
            let states = State::own().page_states(pages).unwrap();
            let common = Common::new(states, false, false);
            let region =
                RegionState::new(space, 0, file, first_page..first_page + pages, chunk_bytes, common);
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
