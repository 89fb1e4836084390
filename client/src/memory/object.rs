//! Objects: the pages of a file that some memory holds, and the states of these pages. An object is
//! the private memory of one process, or memory that several mappings share.

use super::arena::ArenaFull;
use super::gathering::Gathering;
use super::page_states::PageStates;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::PAGE_BYTES;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The properties of an object's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ObjectKind {
    /// Other mappings, also in other processes, may have the same pages.
    pub(crate) is_shared: bool,
    /// Its pages are huge (2 MiB, hugetlb).
    pub(crate) is_huge: bool,
    /// The object records removed pages, for a program that asks for changes.
    pub(crate) tracks_removals: bool,
}

/// The pages of a file in some memory, and their states, see the module. In one space, no two
/// regions have the same page of a private object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) file: FileEntry,
    /// The file's page that the first state describes. With huge pages it differs from a region's
    /// first page by a multiple of 512.
    first_page: usize,
    states: PageStates,
    kind: ObjectKind,
    chunk_pages: usize,
    gathering: Option<Gathering>,
    /// One bit for each state, set if the page was removed since the program last asked.
    removals: Option<Box<[AtomicU64]>>,
}

impl Object {
    /// Returns the object of the file's pages from `first_page` on, with these states.
    pub(crate) fn new(
        file: FileEntry,
        first_page: usize,
        states: PageStates,
        kind: ObjectKind,
        chunk_bytes: usize,
    ) -> Self {
        let removals = || (0..states.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let removals = kind.tracks_removals.then(removals);
        let (gathering, chunk_pages) = (kind.is_huge.then(Gathering::default), chunk_bytes / PAGE_BYTES);
        Self { file, first_page, states, kind, chunk_pages, gathering, removals }
    }

    /// Returns the private object of a child that has just been forked. The child's object does not
    /// record removals. Only the pager calls this, alone in the gate.
    ///
    /// # Errors
    /// [`ArenaFull`].
    pub(crate) fn fork(&self) -> Result<Self, ArenaFull> {
        let kind = ObjectKind { tracks_removals: false, ..self.kind };
        let states = self.states.fork()?;
        Ok(Self::new(self.file, self.first_page, states, kind, self.chunk_pages * PAGE_BYTES))
    }

    /// Returns whether a fork makes one of these objects of the other one: they differ at most in
    /// their states.
    pub(crate) fn is_related(&self, other: &Self) -> bool {
        let shape = |object: &Self| {
            let kind = ObjectKind { tracks_removals: false, ..object.kind };
            (object.file, object.first_page, object.states.pages(), kind)
        };
        let is_same = self.states.table_at() == other.states.table_at();
        shape(self) == shape(other) && (is_same || !self.kind.is_shared)
    }

    pub(crate) fn states(&self) -> &PageStates {
        &self.states
    }

    pub(crate) fn kind(&self) -> ObjectKind {
        self.kind
    }

    pub(crate) fn first_page(&self) -> usize {
        self.first_page
    }

    /// Returns the number of the file's first page, counted over all files of the image.
    pub(crate) fn first_image_page(&self) -> u64 {
        self.file.first_chunk.0 * self.chunk_pages as u64
    }

    /// Returns the number of 4 KiB pages in a chunk.
    pub(crate) fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    pub(crate) fn gathering(&self) -> Option<&Gathering> {
        self.gathering.as_ref()
    }

    pub(crate) fn removals(&self) -> Option<&[AtomicU64]> {
        self.removals.as_deref()
    }

    /// Returns the index of a page of the file among the states.
    pub(crate) fn state_of(&self, file_page: usize) -> usize {
        file_page - self.first_page
    }

    /// Records the pages of these states as removed, if the object tracks removals.
    pub(crate) fn record_removed(&self, states: Range<usize>) {
        if let Some(removals) = self.removals() {
            for state in states {
                removals[state / 64].fetch_or(1 << (state % 64), Ordering::AcqRel);
            }
        }
    }

    /// Returns the number of unresolved pages: absent pages, and poisoned ones if poison can be
    /// undone.
    pub(crate) fn unresolved(&self, poison_can_be_undone: bool) -> usize {
        self.states.absent() + if poison_can_be_undone { self.states.poisoned() } else { 0 }
    }
}
