//! Sets damaged objects aside, so that a push replaces them.
//!
//! A damaged pack stays in the index, so a push takes its chunks for stored. A repair copies what is
//! sound of it into a new pack, and moves the damaged one to another directory. Then a push of an
//! image that needs the other chunks sends them. Damaged roots and segments are moved, too. Nothing
//! is deleted, and no reference is changed.

use crate::store::error::{OpenError, StoreError};
use crate::store::format::{self, Location};
use crate::store::gc::Deleting;
use crate::store::index::run::Place;
use crate::store::layout::{Domain, Layout};
use crate::store::lease::stored::MAX_DELETIONS;
use crate::store::objects::Objects;
use crate::store::packs::{Packs, check_frame};
use crate::store::verify::{Damage, verify_manifest, verify_pack};
use crate::store::walk;
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::{MAX_PACK_BYTES, PackBuilder, PackIndex};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;

/// The result of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Repaired {
    /// The packs, roots and segments that were set aside, with their defects.
    pub set_aside: Vec<Damage>,
    /// Number of sound chunks that were copied from damaged packs.
    pub chunks: u64,
    /// Packs, roots and segments that cannot be read, with the errors. They stay where they are.
    pub unreadable: Vec<Damage>,
}

/// A kind of object.
struct Kind {
    verify: fn(&Objects, &Digest) -> Result<(), StoreError>,
    path: fn(&Layout, &Digest) -> PathBuf,
}

const PACK: Kind =
    Kind { verify: |objects, digest| verify_pack(objects, *digest).map(drop), path: Layout::pack };
const MANIFEST: Kind = Kind { verify: verify_manifest, path: Layout::manifest };

/// The places where the frames of damaged packs may be, by pack.
type Places = HashMap<Digest, Vec<(Digest, Place)>>;

/// Checks all packs, roots and segments, and sets the damaged ones aside. Logs each of these.
///
/// # Errors
/// Returns [`OpenError`] if the store cannot be read or written.
///
/// # Blocking
/// Reads all packs, roots and segments, on all cores. Delays commits while it moves damaged ones.
pub fn repair(location: impl Into<Location>, domain: Domain) -> Result<Repaired, OpenError> {
    let objects = format::open(&location.into(), domain)?;
    let mut repaired = Repaired::default();
    let packs = damaged(&objects, &PACK, walk::packs(&objects)?, &mut repaired)?;
    let manifests = damaged(&objects, &MANIFEST, walk::manifests(&objects)?.0, &mut repaired)?;
    if !packs.is_empty() {
        let known = Packs::new(&objects);
        let places = places(&known, &packs)?;
        for pack in &packs {
            repaired.chunks += save_chunks(&objects, &known, pack, places.get(pack))?;
        }
        set_aside(&objects, &PACK, &packs, &mut repaired)?;
    }
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

/// Returns the damaged ones of `all`, and notes those that cannot be read. A bucket that does not
/// answer is an error.
fn damaged(
    objects: &Objects,
    kind: &Kind,
    all: Vec<Digest>,
    repaired: &mut Repaired,
) -> Result<Vec<Digest>, StoreError> {
    let checked: Vec<_> =
        all.into_par_iter().map(|digest| (digest, defect(objects, kind, &digest))).collect();
    let mut damaged = Vec::new();
    for (digest, outcome) in checked {
        match outcome {
            Ok(None) => {}
            Ok(Some(_)) => damaged.push(digest),
            Err(error @ StoreError::Bucket { .. }) => return Err(error),
            Err(error) => repaired.unreadable.push(error.into()),
        }
    }
    Ok(damaged)
}

/// Returns the places that the chunk index knows in these packs.
fn places(known: &Packs, packs: &[Digest]) -> Result<Places, StoreError> {
    let mut places: Places = packs.iter().map(|pack| (*pack, Vec::new())).collect();
    known.scanned_index()?.visit(&mut |chunk, place| {
        if let Some(places) = places.get_mut(&place.pack) {
            places.push((*chunk, place));
        }
    })?;
    Ok(places)
}

/// Copies the sound chunks of a damaged pack into a new one. Returns their number. The frames are
/// where the pack's own index says, or else the chunk index.
fn save_chunks(
    objects: &Objects,
    known: &Packs,
    pack: &Digest,
    places: Option<&Vec<(Digest, Place)>>,
) -> Result<u64, StoreError> {
    // What the disk cannot read is lost.
    let Ok(Some(bytes)) = objects.map(&objects.layout.pack(pack)) else { return Ok(0) };
    let mut frames: BTreeMap<Digest, Vec<Range<usize>>> = BTreeMap::new();
    if let Ok(index) = PackIndex::parse_end(&bytes, bytes.len()) {
        index.entries().iter().for_each(|entry| frames.entry(entry.chunk).or_default().push(entry.range()));
    }
    for (chunk, place) in places.into_iter().flatten() {
        let start = place.offset as usize;
        frames.entry(*chunk).or_default().push(start..start + place.length as usize);
    }
    let mut saved = PackBuilder::default();
    let mut chunks = 0;
    for (chunk, ranges) in frames {
        let frame = ranges.into_iter().filter_map(|range| bytes.get(range));
        let is_sound = |frame: &&[u8]| check_frame(frame, &chunk, pack).is_ok();
        if let Some(frame) =
            frame.into_iter().find(is_sound).filter(|frame| saved.fits(frame.len(), MAX_PACK_BYTES))
        {
            saved.push(chunk, frame);
            chunks += 1;
        }
    }
    if chunks > 0 {
        let saved = saved.finish();
        known.store(Digest::of(&saved), &saved)?;
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
                let Damage { object, reason } = &damage;
                objects.move_to(&(kind.path)(&objects.layout, digest), &free_place(objects, digest)?)?;
                tracing::warn!("set aside: {object}: {reason}");
                repaired.set_aside.push(damage);
            }
        }
        deleting.finish();
    }
    Ok(())
}

/// Returns a path at which no repair before has set an object aside.
fn free_place(objects: &Objects, digest: &Digest) -> Result<PathBuf, StoreError> {
    let mut place = objects.layout.damaged(digest);
    for number in 1.. {
        if !objects.exists(&place)? {
            break;
        }
        place.set_extension(number.to_string());
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use std::fs;

    #[test]
    fn what_is_sound_of_a_damaged_pack_is_kept_and_nothing_of_a_sound_store_changes() {
        let image = Image::large(1);
        let all = image.data_chunks().len() as u64;
        let end = image.pack.len();
        type Harm<'a> = &'a dyn Fn(&mut Vec<u8>);
        let harms: [(Harm, u64); 6] = [
            (&|bytes| bytes[200] ^= 1, all - 1),
            (&|bytes| bytes[3] ^= 1, all),
            (&|bytes| bytes[end - 1] ^= 1, all),
            (&|bytes| bytes.push(0), all),
            (&|bytes| bytes.truncate(end - 1), all),
            (&Vec::clear, 0),
        ];
        for (harm, saved) in harms {
            let (dir, store) = store();
            image.push(&store, "a:1");
            store.packs.write_index().unwrap();
            let repair = || repair(dir.path(), Domain::DEFAULT).unwrap();
            assert_eq!(repair(), Repaired::default());
            let pack = store.objects.layout.pack(&image.pack_digest());
            let mut bytes = fs::read(&pack).unwrap();
            harm(&mut bytes);
            fs::write(&pack, &bytes).unwrap();
            let repaired = repair();
            assert_eq!((repaired.set_aside.len(), repaired.chunks), (1, saved), "{repaired:?}");
            let aside = store.objects.layout.damaged(&image.pack_digest());
            assert!(fs::read(&aside).unwrap() == bytes && !pack.exists());
            assert_eq!(repair(), Repaired::default());
            let missing = store.find_missing(image.data_chunks().into_iter()).unwrap();
            assert_eq!(missing.len() as u64, all - saved, "a push sends the lost chunks");
            // The next one that is set aside does not replace the first.
            fs::create_dir(&pack).unwrap();
            assert_eq!(repair().set_aside.len(), 1);
            assert!(fs::read(&aside).unwrap() == bytes && aside.with_extension("1").is_dir());
        }
    }

    #[test]
    fn what_is_no_file_is_set_aside_and_what_cannot_be_read_is_named_and_stays() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        let segment = store.objects.layout.manifest(&image.manifest.root.segment_digests()[0]);
        fs::remove_file(&segment).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&segment).status();
        assert!(made.unwrap().success());
        let verified = crate::store::verify(dir.path(), Domain::DEFAULT).unwrap();
        assert!(verified.damage.iter().any(|damage| damage.reason.contains("regular file")), "{verified:?}");
        // Too many links on the way.
        let pack = store.objects.layout.pack(&image.pack_digest());
        fs::remove_file(&pack).unwrap();
        std::os::unix::fs::symlink(&pack, &pack).unwrap();
        let repaired = repair(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((repaired.set_aside.len(), repaired.unreadable.len()), (1, 1), "{repaired:?}");
        assert!(pack.is_symlink() && !segment.exists());
    }
}
