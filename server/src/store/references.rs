//! References: files that each hold an encoded `StoredReference`, the digest of an image and where
//! the reference comes from.
//!
//! A store may have a million of them, so they are listed in pages: see [`walk`].

mod directory;
mod listings;
mod names;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use listings::Listings;
pub(crate) use walk::{Listed, NoReference, Page, PageToken};

use crate::store::Store;
use crate::store::error::{StoreError, damaged};
use crate::store::lock::StoreLock;
use crate::store::objects::bucket::Bucket;
use crate::store::objects::{Kind, Objects};
use bytes::Bytes;
use directory::TAGS;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::Root;
use postcopy_proto::provenance::{Labels, Provenance, ProvenanceError};
use postcopy_proto::reference::TagReference;
use postcopy_proto::v1;
use prost::Message;
use std::fs;
use std::path::Path;
use std::time::SystemTime;
use walk::page;

/// Most bytes of a reference's file: 64 of the longest labels, and a margin.
const MAX_REFERENCE_BYTES: usize = 128 << 10;
/// References of each page, where all are listed.
const LIST_PAGE: usize = 10_000;
/// Most bytes of a root that is read without regard to other ones in memory: a few of them at a
/// time take little.
const PASSING_ROOT_BYTES: usize = 64 << 10;

/// The image of a reference, and its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referred {
    /// The digest of the image.
    pub image: Digest,
    /// Where the reference comes from; `None` for an image that was named by its digest.
    pub provenance: Option<Provenance>,
}

/// Reads a reference; `None` if it does not exist.
///
/// # Errors
/// Returns [`StoreError::Damaged`] if the file holds no reference.
pub(crate) fn read(objects: &Objects, reference: &TagReference) -> Result<Option<Referred>, StoreError> {
    let bytes = objects.read(&objects.layout.reference(reference), MAX_REFERENCE_BYTES)?;
    bytes.map(|bytes| decode(&bytes).map_err(|e| damaged(format!("reference {reference}"), e))).transpose()
}

fn decode(bytes: &[u8]) -> Result<Referred, String> {
    let message = v1::StoredReference::decode(bytes).map_err(|e| format!("it holds no reference: {e}"))?;
    let image = Digest::try_from(&message.image[..]).map_err(|e| format!("image: {e}"))?;
    let provenance = message.provenance.unwrap_or_default().try_into();
    let provenance = provenance.map_err(|e: ProvenanceError| e.to_string())?;
    Ok(Referred { image, provenance: Some(provenance) })
}

fn encode(image: &Digest, provenance: &Provenance) -> Bytes {
    let message = v1::StoredReference { image: (*image).into(), provenance: Some(provenance.into()) };
    message.encode_to_vec().into()
}

/// Points a reference to an image, which the caller must protect, and must have checked to exist.
/// Immediately before the write, `check` says whether it is still protected.
pub(crate) fn write(
    objects: &Objects,
    reference: &TagReference,
    image: &Digest,
    labels: Labels,
    check: impl Fn() -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    objects.update(&objects.layout.reference(reference), MAX_REFERENCE_BYTES, |before| {
        // A damaged reference is replaced.
        let before = before.and_then(|bytes| decode(&bytes).ok());
        let previous = before.and_then(|before| match before.image == *image {
            true => before.provenance.and_then(|provenance| provenance.previous),
            false => Some(before.image),
        });
        let provenance = Provenance { written: Some(SystemTime::now()), previous, labels: labels.clone() };
        check().map(|()| encode(image, &provenance))
    })
}

/// Converts a reference of format 1, `blake3:` with the digest and a line feed. Leaves one of
/// format 2 as it is, and then returns false. The caller must hold
/// [`StoreLock::change_references`].
pub(crate) fn upgrade(objects: &Objects, reference: &TagReference) -> Result<bool, StoreError> {
    let path = objects.layout.reference(reference);
    let Some(bytes) = objects.read(&path, MAX_REFERENCE_BYTES)? else { return Ok(false) };
    let text = String::from_utf8_lossy(&bytes);
    match text.strip_suffix('\n').and_then(|text| text.parse().ok()) {
        Some(image) => {
            let written = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
            let provenance = Provenance { written, ..Provenance::default() };
            objects.put(&path, encode(&image, &provenance))?;
            Ok(true)
        }
        None => decode(&bytes).map(|_| false).map_err(|e| damaged(format!("reference {reference}"), e)),
    }
}

/// Removes a reference. Returns false if it did not exist.
pub(crate) fn remove(objects: &Objects, reference: &TagReference) -> Result<bool, StoreError> {
    let _changing = StoreLock::change_references(objects)?;
    let path = objects.layout.reference(reference);
    let removed = objects.remove(&path)?;
    if let (true, Some(dir)) = (removed, path.parent()) {
        objects.sync(&[dir.to_owned()].into())?;
    }
    Ok(removed)
}

/// Returns all references, in bytewise order of `name:tag`.
///
/// # Errors
/// Returns [`StoreError::Io`], or [`StoreError::Damaged`] for a file that is no reference.
pub(crate) fn list(objects: &Objects) -> Result<Vec<TagReference>, StoreError> {
    if let Kind::Bucket(bucket) = objects.kind() {
        return list_bucket(objects, bucket);
    }
    let listings = Listings::default();
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = page(objects, &listings, after.as_ref(), LIST_PAGE)?;
        for entry in page.entries {
            found.push(entry.map_err(|no_reference| no_reference.error)?);
        }
        after = page.next;
        if after.is_none() {
            return Ok(found);
        }
    }
}

/// Lists all references of a bucket by its flat list, in a thousandth of the requests of a walk.
fn list_bucket(objects: &Objects, bucket: &Bucket) -> Result<Vec<TagReference>, StoreError> {
    let top = objects.layout.references();
    let mut found = Vec::new();
    for path in bucket.wait(bucket.paths_below(&top))? {
        let reference = reference_at(path.strip_prefix(&top).unwrap_or(&path));
        found.push(reference.ok_or_else(|| damaged(bucket.name(&path), "its path is no reference"))?);
    }
    found.sort_unstable_by_key(ToString::to_string);
    Ok(found)
}

/// Returns the reference whose object has this path below `refs/`.
fn reference_at(path: &Path) -> Option<TagReference> {
    let (name, tag) = path.to_str()?.split_once(&format!("/{TAGS}/"))?;
    format!("{name}:{tag}").parse().ok()
}

impl Store {
    /// Returns the next `max` references, at least one, after those of a page before, or the first
    /// ones. Files that are no references are among them as errors.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Reads the directories that hold these references. Does not read one with more than 256
    /// entries again for each page.
    pub(crate) fn references(&self, after: Option<&PageToken>, max: usize) -> Result<Page, StoreError> {
        page(&self.objects, &self.listings, after, max)
    }

    /// Returns an image's root, for a reader of many roots: does not keep it in memory. Returns
    /// `None` for one that is neither small nor in memory: [`Store::root`] bounds the memory of
    /// such roots.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file, if it is not in memory.
    pub(crate) fn passing_root<T>(
        &self,
        image: &Digest,
        read: impl FnOnce(&Root) -> T,
    ) -> Result<Option<T>, StoreError> {
        if let Some(root) = self.manifests.cached_root(image) {
            return Ok(Some(read(&root)));
        }
        let root = self.manifests.read_small_root(image, PASSING_ROOT_BYTES)?;
        Ok(root.map(|root| read(&root)))
    }
}
