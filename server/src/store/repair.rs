//! Sets damaged objects aside, so that a push replaces them.
//!
//! A damaged pack stays in the index, so a push takes its chunks for stored. A repair copies what is
//! sound of it into a new pack, and moves the damaged one to another directory. Then a push of an
//! image that needs the other chunks sends them. Damaged roots and segments are moved, too. Nothing
//! is deleted, and no reference is changed.

use crate::store::error::{OpenError, StoreError};
use crate::store::format::{self, Location};
use crate::store::gc::Deleting;
use crate::store::layout::{Domain, Layout};
use crate::store::lease::stored::MAX_DELETIONS;
use crate::store::objects::Objects;
use crate::store::packs::{Packs, check_frame};
use crate::store::verify::{Damage, verify_manifest, verify_pack};
use crate::store::walk;
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::{PackBuilder, PackIndex};
use rayon::prelude::*;
use std::path::PathBuf;

/// The result of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Repaired {
    /// The packs, roots and segments that were set aside, with their defects.
    pub set_aside: Vec<Damage>,
    /// Number of sound chunks that were copied from damaged packs.
    pub chunks: u64,
}

/// A kind of object.
struct Kind {
    verify: fn(&Objects, &Digest) -> Result<(), StoreError>,
    path: fn(&Layout, &Digest) -> PathBuf,
}

const PACK: Kind =
    Kind { verify: |objects, digest| verify_pack(objects, *digest).map(drop), path: Layout::pack };
const MANIFEST: Kind = Kind { verify: verify_manifest, path: Layout::manifest };

/// Checks all packs, roots and segments, and sets the damaged ones aside.
///
/// # Errors
/// Returns [`OpenError`] if an object cannot be read or moved. Those before it have been moved.
///
/// # Blocking
/// Reads all packs, roots and segments, on all cores. Delays commits while it moves damaged ones.
pub fn repair(location: impl Into<Location>, domain: Domain) -> Result<Repaired, OpenError> {
    let objects = format::open(&location.into(), domain)?;
    let mut repaired = Repaired::default();
    let packs = damaged(&objects, &PACK, walk::packs(&objects)?)?;
    let index = Packs::new(&objects);
    for pack in &packs {
        repaired.chunks += save_chunks(&objects, &index, pack)?;
    }
    set_aside(&objects, &PACK, &packs, &mut repaired)?;
    let manifests = damaged(&objects, &MANIFEST, walk::manifests(&objects)?.0)?;
    set_aside(&objects, &MANIFEST, &manifests, &mut repaired)?;
    // A locator is made again by a reader of its segment.
    for segment in &manifests {
        objects.remove(&objects.layout.locator(segment))?;
    }
    Ok(repaired)
}

/// Returns the defect of an object; `None` if it is sound or gone.
fn defect(objects: &Objects, kind: &Kind, digest: &Digest) -> Result<Option<Damage>, StoreError> {
    match (kind.verify)(objects, digest) {
        Ok(()) | Err(StoreError::NotFound(_)) => Ok(None),
        Err(error @ StoreError::Damaged { .. }) => Ok(Some(error.into())),
        Err(other) => Err(other),
    }
}

fn damaged(objects: &Objects, kind: &Kind, all: Vec<Digest>) -> Result<Vec<Digest>, StoreError> {
    let is_damaged = |digest: Digest| match defect(objects, kind, &digest) {
        Ok(None) => None,
        Ok(Some(_)) => Some(Ok(digest)),
        Err(error) => Some(Err(error)),
    };
    all.into_par_iter().filter_map(is_damaged).collect()
}

/// Copies the sound chunks of a damaged pack into a new one. Returns their number.
fn save_chunks(objects: &Objects, packs: &Packs, pack: &Digest) -> Result<u64, StoreError> {
    // What the disk cannot read is lost.
    let Ok(Some(bytes)) = objects.map(&objects.layout.pack(pack)) else { return Ok(0) };
    let Ok(index) = PackIndex::parse(&bytes) else { return Ok(0) };
    let mut saved = PackBuilder::default();
    let mut chunks = 0;
    for entry in index.entries() {
        let frame = &bytes[entry.range()];
        if check_frame(frame, &entry.chunk, pack).is_ok() {
            saved.push(entry.chunk, frame);
            chunks += 1;
        }
    }
    if chunks > 0 {
        let saved = saved.finish();
        packs.store(Digest::of(&saved), &saved)?;
    }
    Ok(chunks)
}

fn set_aside(
    objects: &Objects,
    kind: &Kind,
    damaged: &[Digest],
    repaired: &mut Repaired,
) -> Result<(), StoreError> {
    for batch in damaged.chunks(MAX_DELETIONS) {
        let deleting = Deleting::begin(objects, batch)?;
        for digest in batch {
            deleting.renew()?;
            // A push may have replaced it meanwhile.
            if let Some(damage) = defect(objects, kind, digest)? {
                objects.move_to(&(kind.path)(&objects.layout, digest), &objects.layout.damaged(digest))?;
                repaired.set_aside.push(damage);
            }
        }
        deleting.finish();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use std::fs;

    #[test]
    fn what_is_sound_of_a_damaged_pack_is_kept_and_nothing_of_a_sound_store_changes() {
        let (dir, store) = store();
        let image = Image::large(1);
        image.push(&store, "a:1");
        let repair = || repair(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!(repair(), Repaired::default());
        let pack = store.objects.layout.pack(&image.pack_digest());
        let mut bytes = fs::read(&pack).unwrap();
        bytes[200] ^= 1;
        fs::write(&pack, &bytes).unwrap();
        let repaired = repair();
        assert_eq!(repaired.set_aside.len(), 1, "{repaired:?}");
        assert_eq!(repaired.chunks, image.data_chunks().len() as u64 - 1);
        let aside = store.objects.layout.damaged(&image.pack_digest());
        assert!(fs::read(aside).unwrap() == bytes && !pack.exists());
        assert_eq!(repair(), Repaired::default());
        let missing = store.find_missing(image.data_chunks().into_iter()).unwrap();
        assert_eq!(missing.len(), 1, "a push sends the damaged chunk");
    }
}
