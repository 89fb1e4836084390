//! A session's records of address spaces: the regions, and the state of each page.
//!
//! From the outside in:
//!
//! - [`MemoryMap`] holds the current [`Spaces`] and the [`Gate`].
//! - A [`Spaces`] value is an immutable snapshot of all address spaces. Each address space has its
//!   regions ordered by address, and an index from the image's pages to regions.
//! - A [`Region`] names a span of one address space, and the [`Object`] that holds the states of
//!   its pages.
//!
//! Snapshots share structure (persistent B+ trees): a change copies one path of a tree, and a fork
//! copies only the tables of page states. A child shares the trees of its parent until one of the
//! two changes. A child also shares its parent's blocks of page states; a write by one of the two
//! copies the block ([`PageStates`]).
//!
//! Only the pager changes spaces. Installers and the program's threads take snapshots.

mod answers;
mod arena;
mod chunk_pages;
mod gate;
mod gathering;
mod object;
mod overlaps;
mod page_states;
mod region;
mod space;
mod spaces;
#[cfg(test)]
pub(crate) mod tests;
mod words;

pub(crate) use answers::AnswerCounts;
pub(crate) use arena::{Arena, ArenaFull};
pub(crate) use chunk_pages::{ChunkPages, PIECE_PAGES};
pub(crate) use gate::{Gate, InstallerPass};
pub(crate) use gathering::{Gathered, HUGE_PAGES};
pub(crate) use object::{Object, ObjectKind};
pub(crate) use page_states::{PageState, PageStates, runs_in_use, table_words};
pub(crate) use region::Region;
pub(crate) use space::Space;
pub(crate) use spaces::{Change, Place, Spaces, hull, states_for};
pub(crate) use words::{FixedWords, MappedFile, Words};

use std::sync::{Arc, Mutex, PoisonError};

/// The current spaces of a session, and the gate that orders installs and events.
#[derive(Debug, Default)]
pub(crate) struct MemoryMap {
    pub(crate) gate: Gate,
    /// The current snapshot. Only the pager replaces it. The lock is held for a copy of the Arc,
    /// never over a page fault on a region.
    spaces: Mutex<Arc<Spaces>>,
}

impl MemoryMap {
    pub(crate) fn new(spaces: Spaces) -> Self {
        Self { gate: Gate::default(), spaces: Mutex::new(Arc::new(spaces)) }
    }

    /// Returns a snapshot of the current spaces.
    pub(crate) fn spaces(&self) -> Arc<Spaces> {
        Arc::clone(&self.spaces.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the current spaces. Only the pager calls this.
    pub(crate) fn replace(&self, spaces: Arc<Spaces>) {
        *self.spaces.lock().unwrap_or_else(PoisonError::into_inner) = spaces;
    }
}
