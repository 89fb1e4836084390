//! The pages of a file that some memory holds, and their states: of one process's private memory, or of memory that
//! several mappings share.

use super::arena::ArenaFull;
use super::gathering::Gathering;
use super::page_states::PageStates;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::PAGE_BYTES;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Which memory an object is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ObjectKind {
    /// Other mappings, also of other processes, have the same pages.
    pub(crate) is_shared: bool,
    /// Its pages are huge (2 MiB, hugetlb).
    pub(crate) is_huge: bool,
    /// Removals are to be told of.
    pub(crate) tracks_removals: bool,
}

/// See the module. No two regions of one space have the same page of a private object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) file: FileEntry,
    /// The file's page that the first state is of; a multiple of 512 before or after the regions' where it is huge.
    first_page: usize,
    states: PageStates,
    kind: ObjectKind,
    chunk_pages: usize,
    gathering: Option<Gathering>,
    /// A bit for each state: the page was removed since the program last asked.
    removals: Option<Box<[AtomicU64]>>,
}

impl Object {
    /// The object of the file's pages from `first_page` on whose states these are.
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

    /// The private object of a child that was forked now. Its removals are not told of. For the pager, alone in the
    /// gate.
    ///
    /// # Errors
    /// [`ArenaFull`].
    pub(crate) fn fork(&self) -> Result<Self, ArenaFull> {
        let kind = ObjectKind { tracks_removals: false, ..self.kind };
        let states = self.states.fork()?;
        Ok(Self::new(self.file, self.first_page, states, kind, self.chunk_pages * PAGE_BYTES))
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

    /// How many pages of 4 KiB a chunk has.
    pub(crate) fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    pub(crate) fn gathering(&self) -> Option<&Gathering> {
        self.gathering.as_ref()
    }

    pub(crate) fn removals(&self) -> Option<&[AtomicU64]> {
        self.removals.as_deref()
    }

    /// Where a page of the file is among the states.
    pub(crate) fn state_of(&self, file_page: usize) -> usize {
        file_page - self.first_page
    }

    /// Has these states' removals be told of, if that was asked for.
    pub(crate) fn count_removed(&self, states: Range<usize>) {
        if let Some(removals) = self.removals() {
            for state in states {
                removals[state / 64].fetch_or(1 << (state % 64), Ordering::AcqRel);
            }
        }
    }

    /// How many pages are unresolved: absent, or poisoned where that can be undone.
    pub(crate) fn unresolved(&self, poison_can_be_undone: bool) -> usize {
        self.states.absent() + if poison_can_be_undone { self.states.poisoned() } else { 0 }
    }
}
