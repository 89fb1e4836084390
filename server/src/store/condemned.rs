//! Condemned entries: the objects that gc deletes once their grace time is over.

use crate::store::error::StoreError;
use crate::store::layout::digest_of_name;
use crate::store::objects::Objects;
use postcopy_proto::digest::Digest;
use std::time::SystemTime;

/// Condemns objects. A condemned one keeps its time.
pub(crate) fn condemn(objects: &Objects, condemned: &[Digest]) -> Result<(), StoreError> {
    let paths: Vec<_> = condemned.iter().map(|object| objects.layout.condemned(object)).collect();
    objects.create_all(&paths)
}

/// Removes the entries of objects, as [`pardon`] does.
pub(crate) fn pardon_all(objects: &Objects, pardoned: &[Digest]) -> Result<(), StoreError> {
    let paths: Vec<_> = pardoned.iter().map(|object| objects.layout.condemned(object)).collect();
    objects.delete_all(&paths)
}

/// Removes the entry of an object. In a directory the caller must hold
/// [`super::lock::StoreLock::keep_objects`], and must have checked under it that the object exists.
pub(crate) fn pardon(objects: &Objects, object: &Digest) -> Result<(), StoreError> {
    objects.delete_all(&[objects.layout.condemned(object)])
}

/// Returns all condemned objects, with their times.
pub(crate) fn list(objects: &Objects) -> Result<Vec<(Digest, SystemTime)>, StoreError> {
    let entries = objects.entries(&objects.layout.condemned_dir())?;
    Ok(entries.into_iter().filter_map(|entry| Some((digest_of_name(&entry.name)?, entry.written))).collect())
}
