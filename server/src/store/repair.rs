//! Sets damaged objects aside, so that a push replaces them.
//!
//! A damaged pack stays in the index, so a push takes its chunks for stored. A repair copies what is
//! sound of it into a new pack, and moves the damaged one to another directory. Then a push of an
//! image that needs the other chunks sends them. Damaged roots and segments are moved, too. Nothing
//! is deleted but the locators of moved segments, and no reference is changed.

use crate::store::error::{OpenError, StoreError, damaged as damaged_object, io_error, pack_name};
use crate::store::format::{self, Location};
use crate::store::gc::Deleting;
use crate::store::index::run::Place;
use crate::store::layout::{Domain, Layout};
use crate::store::objects::Objects;
use crate::store::packs::{Packs, check_frame};
use crate::store::verify::{Damage, unreadable, verify_manifest, verify_pack};
use crate::store::walk;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::{MAX_PACK_BYTES, PackBuilder, PackIndex};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes of the pieces in which a pack is read that the disk cannot read at once.
const PIECE_BYTES: usize = 4096;

/// Packs that are repaired together, of at most 64 MiB each, which are in memory.
const PACKS: usize = 4;

/// The result of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Repaired {
    /// The packs, roots and segments that were set aside, with their defects.
    pub set_aside: Vec<Damage>,
    /// Number of sound chunks that were copied from damaged packs.
    pub chunks: u64,
    /// Objects that cannot be read, which stay where they are; and the error that has ended the
    /// repair, if there was one.
    pub errors: Vec<Damage>,
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

/// Checks all packs, roots and segments, and sets the damaged ones aside.
///
/// # Errors
/// Returns [`OpenError`] if the store cannot be opened. Later errors are in the result.
///
/// # Blocking
/// Reads all packs, roots and segments, on all cores. Delays commits while it reads a few damaged
/// ones again and moves them.
pub fn repair(location: impl Into<Location>, domain: Domain) -> Result<Repaired, OpenError> {
    let objects = format::open(&location.into(), domain)?;
    let mut repaired = Repaired::default();
    if let Err(error) = repair_all(&objects, &mut repaired) {
        repaired.errors.push(error.into());
    }
    Ok(repaired)
}

fn repair_all(objects: &Objects, repaired: &mut Repaired) -> Result<(), StoreError> {
    let packs = damaged(objects, &PACK, walk::packs(objects)?, repaired)?;
    let manifests = damaged(objects, &MANIFEST, walk::manifests(objects)?.0, repaired)?;
    if !packs.is_empty() {
        repair_packs(objects, &packs, repaired)?;
    }
    set_aside(objects, &MANIFEST, &manifests, repaired)?;
    // A locator is made again by a reader of its segment.
    for segment in &manifests {
        objects.remove(&objects.layout.locator(segment))?;
    }
    Ok(())
}

/// Copies the sound chunks of damaged packs into new ones, and sets the damaged ones aside.
fn repair_packs(objects: &Objects, packs: &[Digest], repaired: &mut Repaired) -> Result<(), StoreError> {
    let known = Packs::new(objects);
    let places = places(&known, packs)?;
    let is_damaged: HashSet<_> = packs.iter().copied().collect();
    let mut last = Vec::new();
    for batch in packs.chunks(PACKS) {
        // New packs that have the names of damaged ones must wait until these are away: most are
        // packs with a damaged header or trailer alone.
        let mut mended = Vec::new();
        for pack in batch {
            let Some((saved, chunks)) = sound_chunks(objects, pack, places.get(pack))? else { continue };
            repaired.chunks += chunks;
            let digest = Digest::of(&saved);
            match is_damaged.contains(&digest) {
                true if digest == *pack => mended.push((digest, saved)),
                true => last.push((digest, saved)),
                false => drop(known.store(digest, &saved)?),
            }
        }
        set_aside(objects, &PACK, batch, repaired)?;
        mended.iter().try_for_each(|(digest, saved)| known.store(*digest, saved).map(drop))?;
    }
    last.iter().try_for_each(|(digest, saved)| known.store(*digest, saved).map(drop))
}

/// Returns the number of objects that are set aside together. In a directory, commits wait
/// meanwhile.
fn batch(objects: &Objects) -> usize {
    if objects.has_locks() { PACKS } else { 1000 }
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
            Err(error) => repaired.errors.push(error.into()),
        }
    }
    Ok(damaged)
}

/// Returns the places that the chunk index knows in these packs.
fn places(known: &Packs, packs: &[Digest]) -> Result<Places, StoreError> {
    loop {
        let mut places: Places = packs.iter().map(|pack| (*pack, Vec::new())).collect();
        let visited = known.scanned_index()?.visit(&mut |chunk, place| {
            if let Some(places) = places.get_mut(&place.pack) {
                places.push((*chunk, place));
            }
        });
        match visited {
            // A damaged run, which is gone now.
            Err(StoreError::Damaged { .. }) => {}
            other => return other.map(|()| places),
        }
    }
}

/// Returns the bytes of a damaged pack, zeros in place of what the disk cannot read; `None` for what
/// is no file.
fn readable_bytes(objects: &Objects, pack: &Digest) -> Result<Option<Bytes>, StoreError> {
    let path = objects.layout.pack(pack);
    let error = match objects.map(&path) {
        Ok(bytes) => return Ok(bytes),
        Err(error) => unreadable(error, |reason| damaged_object(pack_name(pack), reason)),
    };
    match (error, objects.has_locks()) {
        (StoreError::Damaged { .. }, true) => {}
        (error, _) => return Err(error),
    }
    // It is damaged, so an error here says that it is no file.
    let Ok(Some(file)) = objects.local_file(&path) else { return Ok(None) };
    let length = file.metadata().map_err(io_error(&path))?.len().min(MAX_PACK_BYTES as u64);
    let length = usize::try_from(length).expect("at most 64 MiB");
    Ok(Some(read_around_errors(length, |piece, at| file.read_exact_at(piece, at)).into()))
}

/// Reads `length` bytes in pieces, and leaves zeros in place of those that cannot be read.
fn read_around_errors(length: usize, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let pieces = (0..).step_by(PIECE_BYTES).zip(bytes.chunks_mut(PIECE_BYTES));
    for (at, piece) in pieces {
        if read(piece, at).is_err() {
            piece.fill(0);
        }
    }
    bytes
}

/// Returns a new pack of the sound chunks of a damaged one, and their number; `None` without any.
/// The frames are where the pack's own index says, or else the chunk index.
fn sound_chunks(
    objects: &Objects,
    pack: &Digest,
    places: Option<&Vec<(Digest, Place)>>,
) -> Result<Option<(Vec<u8>, u64)>, StoreError> {
    let Some(bytes) = readable_bytes(objects, pack)? else { return Ok(None) };
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
    Ok((chunks > 0).then(|| (saved.finish(), chunks)))
}

fn set_aside(
    objects: &Objects,
    kind: &Kind,
    damaged: &[Digest],
    repaired: &mut Repaired,
) -> Result<(), StoreError> {
    for batch in damaged.chunks(batch(objects)) {
        let deleting = Deleting::begin(objects, batch)?;
        for digest in batch {
            deleting.renew()?;
            // A push may have replaced it meanwhile.
            if let Some(damage) = defect(objects, kind, digest)? {
                objects.move_to(&(kind.path)(&objects.layout, digest), &free_place(objects, digest)?)?;
                repaired.set_aside.push(damage);
            }
        }
        deleting.finish();
    }
    Ok(())
}

/// Returns a free path in the directory of damaged objects.
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
    use crate::store::Caller;
    use postcopy_proto::frame::FrameEncoder;
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
    fn a_pack_whose_header_alone_is_damaged_is_set_aside_though_its_new_pack_has_its_name() {
        let (dir, store) = store();
        let chunk = vec![7; 4096];
        let (mut frame, mut pack) = (Vec::new(), PackBuilder::default());
        FrameEncoder::new(1).encode(&chunk, &mut frame);
        pack.push(Digest::of(&chunk), &frame);
        let pack = pack.finish();
        let digest = Digest::of(&pack);
        store.put_pack(digest, pack.clone().into(), &Caller::default()).unwrap();
        let path = store.objects.layout.pack(&digest);
        let mut bad = pack.clone();
        bad[0] ^= 1;
        fs::write(&path, &bad).unwrap();
        let repaired = repair(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((repaired.set_aside.len(), repaired.chunks), (1, 1));
        assert!(fs::read(&path).unwrap() == pack);
        assert!(fs::read(store.objects.layout.damaged(&digest)).unwrap() == bad);
    }

    #[test]
    fn a_damaged_run_of_the_chunk_index_does_not_end_a_repair() {
        let (dir, store) = store();
        let image = Image::large(1);
        image.push(&store, "a:1");
        store.packs.write_index().unwrap();
        let run = fs::read_dir(store.objects.layout.index()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&run).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&run, bytes).unwrap();
        let pack = store.objects.layout.pack(&image.pack_digest());
        let mut bytes = fs::read(&pack).unwrap();
        bytes[200] ^= 1;
        fs::write(&pack, bytes).unwrap();
        let repaired = repair(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!(repaired.chunks, image.data_chunks().len() as u64 - 1);
    }

    #[test]
    fn zeros_stand_for_what_cannot_be_read() {
        let read = |piece: &mut [u8], at: u64| match at {
            4096 => Err(io::ErrorKind::Other.into()),
            _ => {
                piece.fill(1);
                Ok(())
            }
        };
        let bytes = read_around_errors(10_000, read);
        let zeros: Vec<_> = (0..10_000).filter(|at| bytes[*at] == 0).collect();
        assert_eq!(zeros, (4096..8192).collect::<Vec<_>>());
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
        assert_eq!((repaired.set_aside.len(), repaired.errors.len()), (1, 1), "{repaired:?}");
        assert!(pack.is_symlink() && !segment.exists());
    }
}
