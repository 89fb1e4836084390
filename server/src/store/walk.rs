//! Lists every file of a domain by walking its directories, because object_store's `list` hides
//! staged files.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::{Layout, digest_of_name, is_staged};
use postcopy_proto::digest::Digest;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

fn entries(dir: &Path) -> Result<Vec<DirEntry>, StoreError> {
    fs::read_dir(dir).and_then(Iterator::collect::<io::Result<_>>).map_err(io_error(dir))
}

fn is_dir(entry: &DirEntry) -> Result<bool, StoreError> {
    // Symbolic links are not followed, because they could form cycles.
    entry.file_type().map(|kind| kind.is_dir()).map_err(io_error(&entry.path()))
}

fn objects_in(dir: &Path) -> Result<Vec<(Digest, PathBuf)>, StoreError> {
    let named = |entry: DirEntry| Some((digest_of_name(&entry.file_name())?, entry.path()));
    Ok(entries(dir)?.into_iter().filter_map(named).collect())
}

/// Returns all packs with their paths.
pub(crate) fn packs(layout: &Layout) -> Result<Vec<(Digest, PathBuf)>, StoreError> {
    let mut packs = Vec::new();
    for dir in entries(&layout.packs())? {
        if is_dir(&dir)? {
            packs.extend(objects_in(&dir.path())?);
        }
    }
    Ok(packs)
}

/// Returns all roots and segments with their paths.
pub(crate) fn manifests(layout: &Layout) -> Result<Vec<(Digest, PathBuf)>, StoreError> {
    objects_in(&layout.manifests())
}

/// Returns the locators whose segments do not exist.
pub(crate) fn orphan_locators(layout: &Layout) -> Result<Vec<PathBuf>, StoreError> {
    let orphan = |entry: DirEntry| {
        let path = entry.path();
        let is_orphan = path.extension().is_some_and(|extension| extension == "loc")
            && path.file_stem().and_then(digest_of_name).is_some()
            && !path.with_extension("").exists();
        is_orphan.then_some(path)
    };
    Ok(entries(&layout.manifests())?.into_iter().filter_map(orphan).collect())
}

/// Adds all staged files below a directory.
pub(crate) fn staged(dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), StoreError> {
    for entry in entries(dir)? {
        if is_dir(&entry)? {
            staged(&entry.path(), found)?;
        } else if is_staged(&entry.file_name()) {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Returns the bytes of all files below a directory. A file that is removed meanwhile counts as
/// empty.
pub(crate) fn bytes(dir: &Path) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for entry in entries(dir)? {
        if is_dir(&entry)? {
            bytes += self::bytes(&entry.path())?;
        } else if let Ok(metadata) = entry.metadata() {
            bytes += metadata.len();
        }
    }
    Ok(bytes)
}
