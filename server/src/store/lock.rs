//! The locks between the processes that use one store: flock(2), so that a process that dies
//! holds none. Four files are locked, always in this order:
//!
//! - `<domain>/condemned`: the turnstile before `lock`, held only until that one is had. Without it a collector that
//!   waits for `lock` would wait for ever while pushes go on: flock lets new shared holders pass it;
//! - `<domain>/lock`: shared by whoever relies on an object staying there (FindMissing, Commit,
//!   tagging), exclusive for gc from its second mark to its deletes;
//! - `<domain>/refs`: exclusive for whoever changes a reference;
//! - `<domain>`: shared while a staged file is being written, so that gc, which tries it exclusively,
//!   can tell a left-over from one that somebody is about to rename.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::Layout;
use std::fs::{File, TryLockError};
use std::path::Path;

/// Holds a lock until it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// What is in the store now stays there until the drop. Waits for a collector's deletes.
    pub(crate) fn keep_objects(layout: &Layout) -> Result<Self, StoreError> {
        let _turnstile = Self::with(&layout.condemned_dir(), File::lock)?;
        Self::with(&layout.lock(), File::lock_shared)
    }

    /// Nobody relies on an unreferenced object until the drop. Waits for those who do.
    pub(crate) fn delete_objects(layout: &Layout) -> Result<Self, StoreError> {
        let _turnstile = Self::with(&layout.condemned_dir(), File::lock)?;
        Self::with(&layout.lock(), File::lock)
    }

    /// No other process changes a reference until the drop.
    pub(crate) fn change_references(layout: &Layout) -> Result<Self, StoreError> {
        Self::with(&layout.references(), File::lock)
    }

    /// Staged files are not taken for left-overs until the drop.
    pub(crate) fn write_staged(layout: &Layout) -> Result<Self, StoreError> {
        Self::with(layout.domain(), File::lock_shared)
    }

    /// Every staged file is a left-over until the drop; None if somebody is writing one.
    pub(crate) fn try_delete_staged(layout: &Layout) -> Result<Option<Self>, StoreError> {
        let path = layout.domain();
        let file = File::open(path).map_err(io_error(path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(io_error(path)(e)),
        }
    }

    fn with(path: &Path, lock: fn(&File) -> std::io::Result<()>) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(io_error(path))?;
        lock(&file).map_err(io_error(path))?;
        Ok(Self { _file: file })
    }
}
