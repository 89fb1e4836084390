//! Leases in a directory: a stream that serves an image holds a shared flock(2) on
//! `<domain>/leases/<image>`. A process that dies holds none, so these leases need no renewal and do
//! not expire.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::{Layout, digest_of_name};
use crate::store::lock::still_lies_at;
use crate::store::objects::{Objects, found};
use postcopy_proto::digest::Digest;
use std::fs::{self, File, TryLockError};
use std::io;

/// Takes the lease of an image.
pub(super) fn lock(layout: &Layout, image: &Digest) -> Result<File, StoreError> {
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

/// Returns the images with held leases. Removes the files of the other leases, if it can.
///
/// # Errors
/// [`StoreError::Io`].
pub(super) fn held(objects: &Objects) -> Result<Vec<Digest>, StoreError> {
    let dir = objects.layout.leases();
    let mut held = Vec::new();
    for name in objects.names(&dir)? {
        let (path, Some(image)) = (dir.join(&name), digest_of_name(&name)) else { continue };
        let Some(file) = found(File::open(&path)).map_err(io_error(&path))? else { continue };
        match file.try_lock() {
            Ok(()) => match fs::remove_file(&path) {
                Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
                removed => removed.map_err(io_error(&path))?,
            },
            Err(TryLockError::WouldBlock) => held.push(image),
            Err(TryLockError::Error(e)) => return Err(io_error(&path)(e)),
        }
    }
    Ok(held)
}
