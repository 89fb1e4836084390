//! References: files that hold a digest.
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
use crate::store::layout::Layout;
use crate::store::lock::StoreLock;
use crate::store::objects::{self, Objects, read_bounded};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::Root;
use postcopy_proto::reference::TagReference;
use std::fs;
use walk::page;

/// Length in bytes of `blake3:`, 64 hex digits and a newline.
const REFERENCE_BYTES: usize = 7 + 64 + 1;
/// References of each page, where all are listed.
const LIST_PAGE: usize = 10_000;
/// Most bytes of a root that is read without regard to other ones in memory: a few of them at a
/// time take little.
const PASSING_ROOT_BYTES: u64 = 64 << 10;

/// Returns the digest of a reference's image; `None` if the reference does not exist.
///
/// # Errors
/// Returns [`StoreError::Damaged`] if the file holds no digest.
pub(crate) fn read(layout: &Layout, reference: &TagReference) -> Result<Option<Digest>, StoreError> {
    let Some(bytes) = read_bounded(&layout.reference(reference), REFERENCE_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    let digest = text.strip_suffix('\n').and_then(|digest| digest.parse().ok());
    let no_digest = || damaged(format!("reference {reference}"), format!("it holds {text:?} and no digest"));
    digest.map(Some).ok_or_else(no_digest)
}

/// Points a reference to an image. The caller must hold [`StoreLock::keep_objects`], and must have
/// checked under it that the image exists.
pub(crate) fn write(
    layout: &Layout,
    objects: &Objects,
    reference: &TagReference,
    image: &Digest,
) -> Result<(), StoreError> {
    let _changing = StoreLock::change_references(layout)?;
    objects.put(&layout.reference(reference), format!("{image}\n").into())
}

/// Removes a reference. Returns false if it did not exist.
pub(crate) fn remove(layout: &Layout, reference: &TagReference) -> Result<bool, StoreError> {
    let _changing = StoreLock::change_references(layout)?;
    let path = layout.reference(reference);
    let removed = objects::remove(&path)?;
    if let (true, Some(dir)) = (removed, path.parent()) {
        super::layout::sync_dir(dir)?;
    }
    Ok(removed)
}

/// Returns all references, in bytewise order of `name:tag`.
///
/// # Errors
/// Returns [`StoreError::Io`], or [`StoreError::Damaged`] for a file that is no reference.
pub(crate) fn list(layout: &Layout) -> Result<Vec<TagReference>, StoreError> {
    let listings = Listings::default();
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = page(layout, &listings, after.as_ref(), LIST_PAGE)?;
        for entry in page.entries {
            found.push(entry.map_err(|no_reference| no_reference.error)?);
        }
        after = page.next;
        if after.is_none() {
            return Ok(found);
        }
    }
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
        page(&self.layout, &self.listings, after, max)
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
        let size = fs::metadata(self.layout.manifest(image)).map_or(0, |metadata| metadata.len());
        match size > PASSING_ROOT_BYTES {
            true => Ok(None),
            false => self.manifests.read_root(image).map(|root| Some(read(&root))),
        }
    }
}
