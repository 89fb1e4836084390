//! References: files that hold a digest.

use crate::store::error::{StoreError, damaged, io_error};
use crate::store::layout::{Layout, is_staged};
use crate::store::lock::StoreLock;
use crate::store::objects::{self, Objects, read_bounded};
use postcopy_proto::digest::Digest;
use postcopy_proto::reference::{Name, Tag, TagReference};
use std::fs;
use std::io;
use std::path::Path;

/// Length in bytes of `blake3:`, 64 hex digits and a newline.
const REFERENCE_BYTES: usize = 7 + 64 + 1;

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
/// Returns [`StoreError::Io`], or [`StoreError::Damaged`] for a file or directory that is no
/// reference.
pub(crate) fn list(layout: &Layout) -> Result<Vec<TagReference>, StoreError> {
    let top = layout.references();
    let mut found = Vec::new();
    list_below(&top, &top, &mut found)?;
    found.sort_by_cached_key(ToString::to_string);
    Ok(found)
}

fn list_below(top: &Path, dir: &Path, found: &mut Vec<TagReference>) -> Result<(), StoreError> {
    for entry in read_dir(dir)? {
        if !entry.file_type().map_err(io_error(&entry.path()))?.is_dir() {
            continue;
        }
        if entry.file_name() == "_tags" {
            list_tags(top, dir, found)?;
        } else {
            list_below(top, &entry.path(), found)?;
        }
    }
    Ok(())
}

fn list_tags(top: &Path, name_dir: &Path, found: &mut Vec<TagReference>) -> Result<(), StoreError> {
    let name = name_dir.strip_prefix(top).expect("found below it");
    for entry in read_dir(&name_dir.join("_tags"))? {
        let file_name = entry.file_name();
        if is_staged(&file_name) {
            continue;
        }
        let no_reference = || damaged(entry.path().display().to_string(), "its path is no reference");
        let name: Name = name.to_str().and_then(|n| n.parse().ok()).ok_or_else(no_reference)?;
        let tag: Tag = file_name.to_str().and_then(|t| t.parse().ok()).ok_or_else(no_reference)?;
        found.push(TagReference { name, tag });
    }
    Ok(())
}

fn read_dir(dir: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    fs::read_dir(dir).and_then(Iterator::collect::<io::Result<_>>).map_err(io_error(dir))
}
