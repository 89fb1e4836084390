//! Condemned entries: the objects that gc deletes once their grace time is over.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::{Layout, digest_of_name};
use crate::store::objects;
use postcopy_proto::digest::Digest;
use std::fs::{self, File};
use std::io;
use std::time::SystemTime;

/// Condemns an object. A condemned one keeps its time.
pub(crate) fn condemn(layout: &Layout, object: &Digest) -> Result<(), StoreError> {
    let path = layout.condemned(object);
    match File::create_new(&path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io_error(&path)(e)),
        _ => Ok(()),
    }
}

/// Removes the entry of an object. The caller must hold [`super::lock::StoreLock::keep_objects`],
/// and must have checked under it that the object exists.
pub(crate) fn pardon(layout: &Layout, object: &Digest) -> Result<(), StoreError> {
    objects::remove(&layout.condemned(object)).map(|_| ())
}

/// Returns all condemned objects, with their times.
pub(crate) fn list(layout: &Layout) -> Result<Vec<(Digest, SystemTime)>, StoreError> {
    let dir = layout.condemned_dir();
    let mut condemned = Vec::new();
    for entry in fs::read_dir(&dir).map_err(io_error(&dir))? {
        let entry = entry.map_err(io_error(&dir))?;
        let Some(digest) = digest_of_name(&entry.file_name()) else { continue };
        match entry.metadata().and_then(|metadata| metadata.modified()) {
            Ok(since) => condemned.push((digest, since)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error(&entry.path())(e)),
        }
    }
    Ok(condemned)
}
