//! Files of images as memory of this process.

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

/// What [`Region::read_at`] asks for at once.
const READ_BYTES: usize = 4 << 20;

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
        let command = Command::Unmap { region: self.state.clone(), memory };
        match self.commands.try_send(command) {
            Ok(()) => {}
            // The pager is busy with what other threads asked for.
            Err(mpsc::error::TrySendError::Full(command)) => {
                reaper::send(&self.shared, &self.commands, command)
            }
            // It has ended, and unregistered the memory if it could.
            Err(mpsc::error::TrySendError::Closed(command)) => reaper::drop_unsent(&self.shared, command),
        }
    }
}
