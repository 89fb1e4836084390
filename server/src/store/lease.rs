//! Leases: a served image stays in the store, even if its references move or are removed.
//!
//! A stream that serves an image holds a shared flock(2) on `<domain>/leases/<image>`. So a
//! restored program does not lose its memory when a tag moves and a collector runs. A process that
//! dies holds none, so leases need no renewal and do not expire. A client that reconnects takes the
//! lease again; in between, the collector's grace time protects the image.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::{Layout, digest_of_name};
use crate::store::lock::still_lies_at;
use crate::store::objects::{Kind, Objects, found};
use postcopy_proto::digest::Digest;
use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The protection of an image, until this is dropped.
#[derive(Debug)]
pub struct Lease {
    _file: Option<File>,
}

/// The leases of this process: one for each image, shared by all streams that serve it.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Locked for a look-up or an insertion.
    taken: Mutex<HashMap<Digest, Weak<Lease>>>,
}

impl Leases {
    /// Returns the lease of an image that another stream holds. Does not block.
    pub(crate) fn shared(&self, image: &Digest) -> Option<Arc<Lease>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).get(image)?.upgrade()
    }

    /// Takes the lease of an image.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Creates a file.
    pub(crate) fn take(&self, objects: &Objects, image: &Digest) -> Result<Arc<Lease>, StoreError> {
        let file = match objects.kind() {
            Kind::Directory(_) => Some(lock(&objects.layout, image)?),
            Kind::Bucket(_) => None,
        };
        let lease = Arc::new(Lease { _file: file });
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, lease| lease.strong_count() > 0);
        taken.insert(*image, Arc::downgrade(&lease));
        Ok(lease)
    }
}

fn lock(layout: &Layout, image: &Digest) -> Result<File, StoreError> {
    let path = layout.lease(image);
    loop {
        let file = File::options().create(true).append(true).open(&path).map_err(io_error(&path))?;
        // A collector locks the file for a moment.
        file.lock_shared().map_err(io_error(&path))?;
        if still_lies_at(&path, &file)? {
            return Ok(file);
        }
    }
}

/// Returns the images with held leases. Removes the files of the other leases.
///
/// # Errors
/// [`StoreError::Io`].
pub(crate) fn held(objects: &Objects) -> Result<Vec<Digest>, StoreError> {
    let dir = objects.layout.leases();
    let mut held = Vec::new();
    for name in objects.names(&dir)? {
        let (path, Some(image)) = (dir.join(&name), digest_of_name(&name)) else { continue };
        let Some(file) = found(File::open(&path)).map_err(io_error(&path))? else { continue };
        match file.try_lock() {
            Ok(()) => fs::remove_file(&path).map_err(io_error(&path))?,
            Err(TryLockError::WouldBlock) => held.push(image),
            Err(TryLockError::Error(e)) => return Err(io_error(&path)(e)),
        }
    }
    Ok(held)
}
