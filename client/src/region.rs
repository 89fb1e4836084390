//! Regions: spans of address space that an image's file appears in as it is touched.

use crate::page_state::{PageState, PageStates};
use crate::session::{Command, LossError, Shared};
use crate::uffd::memory::Memory;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;

/// What [`Region::read_at`] asks for at once.
const READ_BYTES: usize = 4 << 20;

/// What the pager and the installers know of a region.
#[derive(Debug)]
pub(crate) struct RegionState {
    start: usize,
    pub(crate) file: FileEntry,
    /// The page of the file that the region begins with.
    first_page: usize,
    pub(crate) states: PageStates,
    chunk_pages: usize,
    alive: AtomicBool,
}

impl RegionState {
    /// A region at address `start` of these pages of a file, which must have them.
    pub(crate) fn new(start: usize, file: FileEntry, pages: Range<usize>, chunk_bytes: usize) -> Self {
        let chunk_pages = chunk_bytes / PAGE_BYTES;
        let (first_page, states) = (pages.start, PageStates::new(pages.len()));
        Self { start, file, first_page, states, chunk_pages, alive: AtomicBool::new(true) }
    }

    /// The address of a page.
    pub(crate) fn address(&self, page: usize) -> usize {
        self.start + page * PAGE_BYTES
    }

    /// Length in bytes, a multiple of the page size.
    pub(crate) fn len(&self) -> usize {
        self.states.pages() * PAGE_BYTES
    }

    /// The page at an address.
    pub(crate) fn page_at(&self, address: usize) -> Option<usize> {
        let offset = address.checked_sub(self.start)?;
        (offset < self.len()).then_some(offset / PAGE_BYTES)
    }

    /// The pages that lie in the address range from `start` to `end`.
    pub(crate) fn pages_in(&self, start: usize, end: usize) -> Range<usize> {
        let page =
            |address: usize| (address.saturating_sub(self.start) / PAGE_BYTES).min(self.states.pages());
        page(start)..page(end.next_multiple_of(PAGE_BYTES)).max(page(start))
    }

    /// The chunk that a page belongs to.
    pub(crate) fn chunk_of(&self, page: usize) -> ChunkIndex {
        ChunkIndex(self.file.first_chunk.0 + ((self.first_page + page) / self.chunk_pages) as u64)
    }

    /// Where in its chunk a page is: 0, the chunk's first page, or after it.
    pub(crate) fn place_in_chunk(&self, page: usize) -> usize {
        (self.first_page + page) % self.chunk_pages
    }

    /// The chunks that the region has pages of; of the first and the last one perhaps not all.
    pub(crate) fn chunks(&self) -> Range<u64> {
        match self.states.pages() {
            0 => 0..0,
            pages => self.chunk_of(0).0..self.chunk_of(pages - 1).0 + 1,
        }
    }

    /// The region's pages of a chunk; None if it has none.
    pub(crate) fn pages_of(&self, chunk: ChunkIndex) -> Option<Range<usize>> {
        let index = self.chunks().contains(&chunk.0).then(|| to_usize(chunk.0 - self.file.first_chunk.0))?;
        let (start, end) = (index * self.chunk_pages, (index + 1) * self.chunk_pages);
        Some(start.saturating_sub(self.first_page)..(end - self.first_page).min(self.states.pages()))
    }

    /// Whether the memory is still there. Does not change while an installer or the pager is in the gate.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// The memory is about to be unmapped.
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
/// not on an async worker.
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
        self.state.states.counts().resident
    }

    /// Whether the page at `offset` bytes is resident. Does not touch it.
    #[must_use]
    pub fn is_resident(&self, offset: usize) -> bool {
        offset < self.len() && self.state.states.get(offset / PAGE_BYTES) == PageState::Resident
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
        // Closed: the pager has ended and unregistered the memory, which `command` gives back when dropped.
        self.shared.unmap_later(&self.commands, command);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let region = RegionState::new(0, file, first_page..first_page + pages, chunk_pages * PAGE_BYTES);
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
