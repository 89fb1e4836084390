//! Files of an image as memory of this process.

use crate::error::LossError;
use crate::memory::{self, PageState};
use crate::reaper;
use crate::session::changes::{self, Changes};
use crate::shared::{Command, Shared};
use crate::uffd::memory::Memory;
use postcopy_proto::page::PAGE_BYTES;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use tokio::sync::mpsc;

/// The length of the pieces in which [`Region::read_at`] requests pages.
const READ_BYTES: usize = 4 << 20;

/// A file of an image as memory: private to this process, filled on access, and writable.
///
/// Dereferences to the bytes of the file, or of the part that was mapped. The first access to a
/// page waits until the page is installed. If a page is lost, an access raises SIGBUS, unless
/// [`crate::LossPolicy`] says otherwise; [`Region::read_at`] returns an error instead. Forked
/// children do not have the region. A program must not move the region with mremap(2).
///
/// # Blocking
/// An access to an absent page waits for the network. Do not access the region while you hold a
/// lock that the serving thread needs, nor on an async worker. Do not access it in a signal handler
/// that may have interrupted a call of this library, because such a call holds locks briefly.
#[derive(Debug)]
pub struct Region {
    // None for an empty span, which has no memory, and after the drop.
    memory: Option<Memory>,
    len: usize,
    state: memory::Region,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

impl Region {
    pub(crate) fn new(
        memory: Option<Memory>,
        len: usize,
        state: memory::Region,
        shared: Arc<Shared>,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        Self { memory, len, state, shared, commands }
    }

    /// Returns the length in bytes of the file, or of the part that was mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the region has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of resident pages.
    #[must_use]
    pub fn resident_pages(&self) -> usize {
        self.state.count(PageState::Resident)
    }

    /// Returns whether the page at byte `offset` is resident. Does not access the page.
    #[must_use]
    pub fn is_resident(&self, offset: usize) -> bool {
        offset < self.len() && self.state.state(offset / PAGE_BYTES) == PageState::Resident
    }

    /// Copies `buffer.len()` bytes from `offset` on. Returns an error where an access would raise
    /// SIGBUS.
    ///
    /// # Errors
    /// [`LossError::Lost`] if a page is lost, [`LossError::OutOfRange`] beyond the region's end.
    ///
    /// # Blocking
    /// Blocks until the pages are installed, or lost (after the fault deadline).
    pub fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<(), LossError> {
        let end = offset.checked_add(buffer.len()).filter(|end| *end <= self.len());
        let end = end.ok_or(LossError::OutOfRange { offset, len: buffer.len(), region_bytes: self.len() })?;
        // Requests one piece at a time, because one fault deadline covers all pages of a request.
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
    /// Returns the changes since the restore, or since [`Region::take_changes`]. The session must
    /// track writes ([`crate::Options::track_writes`]).
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the session does not track writes; else the error of
    /// PAGEMAP_SCAN, see proc_pid_pagemap(5).
    ///
    /// # Blocking
    /// Reads each page's entry in the page tables, which takes some milliseconds a GiB.
    pub fn changes(&self) -> io::Result<Changes> {
        changes::of_region(&self.state, &self.shared, false)
    }

    /// Returns the changes as [`Region::changes`] does, and starts a new period: the next call
    /// returns the changes from here on. No write is lost, even if other threads write during the
    /// call.
    ///
    /// # Errors
    /// As for [`Region::changes`].
    ///
    /// # Blocking
    /// As for [`Region::changes`].
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
        let command = Command::Unmap { region: self.state.clone(), memory };
        match self.commands.try_send(command) {
            Ok(()) => {}
            // The queue is full of other threads' commands.
            Err(mpsc::error::TrySendError::Full(command)) => {
                reaper::send(&self.shared, &self.commands, command)
            }
            // The pager has ended, and has unregistered the memory if it could.
            Err(mpsc::error::TrySendError::Closed(command)) => reaper::drop_unsent(&self.shared, command),
        }
    }
}
