//! Leases: what streams are filled from stays, whatever references say meanwhile.
//!
//! A stream that serves an image holds a shared flock(2) on `<domain>/leases/<image>`, so that a restored program does
//! not lose its memory to a tag that moved and a collector that came by. A process that dies holds none: nothing
//! has to be renewed, and nothing expires. A client that connects anew takes the lease again; in between the
//! collector's grace time protects the image.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::{Layout, digest_of_name};
use crate::store::lock::still_lies_at;
use postcopy_proto::digest::Digest;
use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Keeps an image until it is dropped.
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

/// The leases of this process: one for each image, however many streams serve it.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Held for a look-up or an insertion.
    taken: Mutex<HashMap<Digest, Weak<Lease>>>,
}

impl Leases {
    /// The lease of an image that another stream holds, too. Does not block.
    pub(crate) fn shared(&self, image: &Digest) -> Option<Arc<Lease>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).get(image)?.upgrade()
    }

    /// Takes the lease of an image.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Makes a file.
    pub(crate) fn take(&self, layout: &Layout, image: &Digest) -> Result<Arc<Lease>, StoreError> {
        let lease = Arc::new(lock(layout, image)?);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, lease| lease.strong_count() > 0);
        taken.insert(*image, Arc::downgrade(&lease));
        Ok(lease)
    }
}

fn lock(layout: &Layout, image: &Digest) -> Result<Lease, StoreError> {
    let path = layout.lease(image);
    loop {
        let file = File::options().create(true).append(true).open(&path).map_err(io_error(&path))?;
        // A collector holds it for a moment.
        file.lock_shared().map_err(io_error(&path))?;
        if still_lies_at(&path, &file)? {
            return Ok(Lease { _file: file });
        }
    }
}

/// The images that somebody holds a lease of. Removes the files of those that nobody does.
///
/// # Errors
/// [`StoreError::Io`].
pub(crate) fn held(layout: &Layout) -> Result<Vec<Digest>, StoreError> {
    let dir = layout.leases();
    let mut held = Vec::new();
    for entry in fs::read_dir(&dir).map_err(io_error(&dir))? {
        let entry = entry.map_err(io_error(&dir))?;
        let (path, Some(image)) = (entry.path(), digest_of_name(&entry.file_name())) else { continue };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(io_error(&path)(e)),
        };
        match file.try_lock() {
            Ok(()) => fs::remove_file(&path).map_err(io_error(&path))?,
            Err(TryLockError::WouldBlock) => held.push(image),
            Err(TryLockError::Error(e)) => return Err(io_error(&path)(e)),
        }
    }
    Ok(held)
}
