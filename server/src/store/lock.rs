//! The locks between the processes that use one directory: flock(2), so that a process that dies
//! holds none. A bucket has no locks: there every function returns at once, and what they exclude is
//! excluded otherwise, see [`super::gc`]. A process takes the locks in this order:
//!
//! - `<domain>/condemned`: the turnstile before `lock`, held until `lock` is taken, at most for one
//!   turn. flock admits new shared holders before a waiting exclusive one, so without the turnstile
//!   pushes could keep a collector waiting for ever;
//! - `<domain>/lock`: shared while a process relies on an object to stay (FindMissing, Commit,
//!   tagging), exclusive for gc from its second mark to its deletes;
//! - `<domain>/refs`: exclusive while a process changes a reference;
//! - `<domain>/working-sets/<image>`: exclusive while a process builds or removes the working set
//!   of the image;
//! - `<domain>`: shared while a process writes a staged file. gc tries it exclusively, to tell a
//!   left-over from a file that a process is about to rename. A process that receives a pack takes
//!   it before all others. No process waits for it, so this cannot deadlock.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::Layout;
use crate::store::objects::{Kind, Objects, found};
use postcopy_proto::digest::Digest;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time for which a waiting collector keeps others from `lock`: longer than a push holds it.
const TURN: Duration = Duration::from_millis(500);

/// A lock that is held until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct StoreLock {
    /// `None` in a bucket.
    _file: Option<File>,
}

impl StoreLock {
    /// Keeps all objects in the store until the drop. Waits for a collector's deletes.
    pub(crate) fn keep_objects(objects: &Objects) -> Result<Self, StoreError> {
        let Some(layout) = files(objects) else { return Ok(NONE) };
        let _turnstile = Self::with(&layout.condemned_dir(), File::lock)?;
        Self::with(&layout.lock(), File::lock_shared)
    }

    /// Excludes all processes that rely on objects until the drop, so that unreferenced ones can be
    /// deleted. Waits for those processes. New ones get turns meanwhile, because one of the holders
    /// may take long: a check of the whole store.
    pub(crate) fn delete_objects(objects: &Objects) -> Result<Self, StoreError> {
        let Some(layout) = files(objects) else { return Ok(NONE) };
        loop {
            let turnstile = Self::with(&layout.condemned_dir(), File::lock)?;
            let since = Instant::now();
            while since.elapsed() < TURN {
                if let Some(lock) = Self::try_exclusively(&layout.lock())? {
                    return Ok(lock);
                }
                std::thread::park_timeout(TURN / 100);
            }
            drop(turnstile);
            std::thread::park_timeout(TURN);
        }
    }

    /// Keeps other processes from changing references until the drop.
    pub(crate) fn change_references(objects: &Objects) -> Result<Self, StoreError> {
        match files(objects) {
            Some(layout) => Self::with(&layout.references(), File::lock),
            None => Ok(NONE),
        }
    }

    /// Keeps other processes from changing the working set of an image until the drop. Returns
    /// `None` if the image has no recordings.
    pub(crate) fn change_working_set(objects: &Objects, image: &Digest) -> Result<Option<Self>, StoreError> {
        let Some(layout) = files(objects) else { return Ok(Some(NONE)) };
        let path = layout.working_set(image);
        loop {
            let Some(file) = found(File::open(&path)).map_err(io_error(&path))? else { return Ok(None) };
            file.lock().map_err(io_error(&path))?;
            if still_lies_at(&path, &file)? {
                return Ok(Some(Self { _file: Some(file) }));
            }
        }
    }

    /// Does the same without waiting. Returns `None` also if another process holds the lock.
    pub(crate) fn try_change_working_set(
        objects: &Objects,
        image: &Digest,
    ) -> Result<Option<Self>, StoreError> {
        let Some(layout) = files(objects) else { return Ok(Some(NONE)) };
        let path = layout.working_set(image);
        match Self::try_exclusively(&path) {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Ok(Some(Self { _file: Some(file) })) if !still_lies_at(&path, &file)? => Ok(None),
            other => other,
        }
    }

    /// Protects staged files from removal as left-overs until the drop.
    pub(crate) fn write_staged(objects: &Objects) -> Result<Self, StoreError> {
        match files(objects) {
            Some(layout) => Self::with(layout.domain(), File::lock_shared),
            None => Ok(NONE),
        }
    }

    /// Makes every staged file a left-over until the drop. Returns `None` if a process is writing
    /// one.
    pub(crate) fn try_delete_staged(objects: &Objects) -> Result<Option<Self>, StoreError> {
        match files(objects) {
            Some(layout) => Self::try_exclusively(layout.domain()),
            None => Ok(Some(NONE)),
        }
    }

    fn try_exclusively(path: &Path) -> Result<Option<Self>, StoreError> {
        let file = File::open(path).map_err(io_error(path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: Some(file) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(io_error(path)(e)),
        }
    }

    fn with(path: &Path, lock: fn(&File) -> std::io::Result<()>) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(io_error(path))?;
        lock(&file).map_err(io_error(path))?;
        Ok(Self { _file: Some(file) })
    }
}

const NONE: StoreLock = StoreLock { _file: None };

/// Returns the paths of the locks; `None` for a bucket.
fn files(objects: &Objects) -> Option<&Layout> {
    match objects.kind() {
        Kind::Directory(_) => Some(&objects.layout),
        Kind::Bucket(_) => None,
    }
}

/// Returns true if a locked file is still the one at this path. It may have been removed between
/// the opening and the lock.
pub(crate) fn still_lies_at(path: &Path, file: &File) -> Result<bool, StoreError> {
    let inode = file.metadata().map_err(io_error(path))?.ino();
    Ok(fs::metadata(path).is_ok_and(|metadata| metadata.ino() == inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A check of a large store holds the lock for minutes.
    #[test]
    fn a_collector_that_waits_long_does_not_keep_others_waiting() {
        let (_dir, store) = crate::fixtures::store();
        let objects = &store.objects;
        let long = StoreLock::keep_objects(objects).unwrap();
        std::thread::scope(|scope| {
            let collector = scope.spawn(|| StoreLock::delete_objects(objects).unwrap());
            let started = Instant::now();
            for _ in 0..3 {
                drop(StoreLock::keep_objects(objects).unwrap());
                std::thread::park_timeout(TURN);
            }
            assert!(started.elapsed() < 10 * TURN, "{:?}", started.elapsed());
            assert!(!collector.is_finished(), "somebody relies on what is there");
            drop(long);
            drop(collector.join().unwrap());
        });
    }
}
