//! Lists the objects of a domain.

use crate::store::error::StoreError;
use crate::store::layout::digest_of_name;
use crate::store::objects::{Kind, Objects};
use postcopy_proto::digest::Digest;
use std::path::PathBuf;

/// Returns all packs.
pub(crate) fn packs(objects: &Objects) -> Result<Vec<Digest>, StoreError> {
    let top = objects.layout.packs();
    let names = match objects.kind() {
        Kind::Bucket(bucket) => {
            let entries = bucket.wait(bucket.entries_of(&top, &objects.layout.pack_dirs()))?;
            entries.into_iter().map(|entry| entry.name).collect()
        }
        Kind::Directory(_) => {
            let mut names = Vec::new();
            for dir in objects.names(&top)? {
                let dir = top.join(dir);
                // Symbolic links are not followed, because they could form cycles.
                if std::fs::symlink_metadata(&dir).is_ok_and(|metadata| metadata.is_dir()) {
                    names.extend(objects.names(&dir)?);
                }
            }
            names
        }
    };
    Ok(names.iter().filter_map(|name| digest_of_name(name)).collect())
}

/// Returns all roots and segments, and the locators whose segments do not exist.
pub(crate) fn manifests(objects: &Objects) -> Result<(Vec<Digest>, Vec<PathBuf>), StoreError> {
    let dir = objects.layout.manifests();
    let names = objects.names(&dir)?;
    let manifests: Vec<_> = names.iter().filter_map(|name| digest_of_name(name)).collect();
    let known: std::collections::HashSet<_> = manifests.iter().collect();
    let is_orphan = |name: &&String| {
        let segment = name.strip_suffix(".loc").and_then(digest_of_name);
        segment.is_some_and(|segment| !known.contains(&segment))
    };
    let orphans = names.iter().filter(is_orphan).map(|name| dir.join(name)).collect();
    Ok((manifests, orphans))
}
