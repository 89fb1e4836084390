//! Checks every byte of a store.

use crate::store::error::{OpenError, StoreError, damaged};
use crate::store::format::{self, Location};
use crate::store::layout::Domain;
use crate::store::lock::StoreLock;
use crate::store::manifests::Manifests;
use crate::store::objects::Objects;
use crate::store::staged::check_pack;
use crate::store::{chain, references, walk};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{MAX_ROOT_BYTES, Root, Segment};
use postcopy_proto::reference::TagReference;
use rayon::prelude::*;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;

/// Most lost chunks that are named for one image; the others are counted.
const MAX_NAMED_CHUNKS: usize = 10;

/// Errors that a disk has read: by read(2), and by madvise(2) for a mapped file.
const DISK_ERRORS: [Errno; 2] = [Errno::IO, Errno::FAULT];

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Number of sound packs.
    pub packs: u64,
    /// Bytes of the sound packs.
    pub pack_bytes: u64,
    /// Number of distinct chunks in the sound packs.
    pub chunks: u64,
    /// Number of sound roots and segments.
    pub manifests: u64,
    /// Number of references whose images are complete.
    pub references: u64,
    /// The damaged objects, with the reasons.
    pub damage: Vec<Damage>,
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The name of the object.
    pub object: String,
    /// The defect of the object.
    pub reason: String,
}

impl From<StoreError> for Damage {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged { object, reason } => Self { object, reason },
            StoreError::NotFound(object) => Self { object, reason: "it is gone".to_owned() },
            StoreError::Io { path, source } => {
                Self { object: path.display().to_string(), reason: source.to_string() }
            }
            StoreError::Bucket { object, reason } => Self { object, reason },
            other => Self { object: "store".to_owned(), reason: chain(&other) },
        }
    }
}

/// Checks every digest of every pack, root and segment of the store at `location`. Checks also that
/// every reference resolves, and that a sound pack holds every chunk that a reference needs.
///
/// # Errors
/// Returns [`OpenError`] if the store cannot be read. Damage is no error of this function.
///
/// # Blocking
/// Reads everything, on all cores. In a directory, garbage collection waits for it. Pushes
/// go on.
pub fn verify(location: impl Into<Location>, domain: Domain) -> Result<Verified, OpenError> {
    let objects = format::open(&location.into(), domain)?;
    let _keep = StoreLock::keep_objects(&objects)?;
    let mut verified = Verified::default();
    // References are read before the packs: a later push may store its chunks in packs that this
    // run does not read.
    let images = images(&objects, &mut verified);
    let sound = verify_packs(&objects, &mut verified)?;
    verified.chunks = sound.len() as u64;
    verify_manifests(&objects, &mut verified)?;
    let manifests = Manifests::new(&objects);
    let mut outcomes: HashMap<Digest, Vec<Damage>> = HashMap::new();
    for (reference, image) in images {
        let damage = outcomes.entry(image).or_insert_with(|| verify_image(&manifests, &image, &sound));
        verified.references += u64::from(damage.is_empty());
        verified.damage.extend(damage.iter().map(|damage| Damage {
            object: format!("reference {reference}: {}", damage.object),
            reason: damage.reason.clone(),
        }));
    }
    Ok(verified)
}

fn images(objects: &Objects, verified: &mut Verified) -> Vec<(TagReference, Digest)> {
    let mut images = Vec::new();
    match references::list(objects) {
        Err(error) => verified.damage.push(error.into()),
        Ok(references) => {
            for reference in references {
                match references::read(objects, &reference) {
                    Ok(Some(referred)) => images.push((reference, referred.image)),
                    Ok(None) => {}
                    Err(error) => verified.damage.push(error.into()),
                }
            }
        }
    }
    images
}

/// Checks all packs, and returns the chunks of the sound ones.
fn verify_packs(objects: &Objects, verified: &mut Verified) -> Result<HashSet<Digest>, StoreError> {
    let (mut sound, mut seen) = (HashSet::new(), HashSet::new());
    loop {
        let packs: Vec<_> = walk::packs(objects)?.into_iter().filter(|pack| seen.insert(*pack)).collect();
        let mut is_complete = true;
        let outcomes: Vec<_> = packs.into_par_iter().map(|digest| verify_pack(objects, digest)).collect();
        for outcome in outcomes {
            match outcome {
                // A collector of a bucket has deleted it, perhaps because newer packs hold its chunks.
                Err(StoreError::NotFound(_)) if !objects.has_locks() => is_complete = false,
                Ok((bytes, chunks)) => {
                    verified.packs += 1;
                    verified.pack_bytes += bytes;
                    sound.extend(chunks);
                }
                Err(error) => verified.damage.push(error.into()),
            }
        }
        if is_complete {
            return Ok(sound);
        }
    }
}

/// Checks a pack. Returns its length and the digests of its chunks.
///
/// # Errors
/// [`StoreError::Damaged`]; [`StoreError::NotFound`]; others if it cannot be read.
pub(super) fn verify_pack(objects: &Objects, digest: Digest) -> Result<(u64, Vec<Digest>), StoreError> {
    let wrong = |reason: String| damaged(format!("pack {digest}"), reason);
    let bytes = objects.map(&objects.layout.pack(&digest)).map_err(|error| unreadable(error, wrong))?;
    let bytes = bytes.ok_or_else(|| StoreError::NotFound(format!("pack {digest}")))?;
    // The frames are checked first, because they name the damaged chunk.
    let index = check_pack(&bytes).map_err(|e| wrong(e.to_string()))?;
    let actual = Digest::of(&bytes);
    if actual != digest {
        return Err(wrong(format!("its bytes have digest {actual}")));
    }
    Ok((bytes.len() as u64, index.entries().iter().map(|entry| entry.chunk).collect()))
}

/// Turns an I/O error of the disk, or an object that is no regular file, into damage. Returns other
/// errors as they are.
pub(super) fn unreadable(error: StoreError, damaged: impl Fn(String) -> StoreError) -> StoreError {
    match &error {
        StoreError::Io { source, .. }
            if source.kind() == ErrorKind::InvalidData
                || DISK_ERRORS.iter().any(|disk| source.raw_os_error() == Some(disk.raw_os_error())) =>
        {
            damaged(source.to_string())
        }
        _ => error,
    }
}

fn verify_manifests(objects: &Objects, verified: &mut Verified) -> Result<(), StoreError> {
    let (manifests, _) = walk::manifests(objects)?;
    let outcomes: Vec<_> =
        manifests.into_par_iter().map(|digest| verify_manifest(objects, &digest)).collect();
    for outcome in outcomes {
        match outcome {
            Ok(()) => verified.manifests += 1,
            Err(error) => verified.damage.push(error.into()),
        }
    }
    Ok(())
}

/// Checks a root or segment.
///
/// # Errors
/// As for [`verify_pack`].
pub(super) fn verify_manifest(objects: &Objects, digest: &Digest) -> Result<(), StoreError> {
    let object = || format!("manifest {digest}");
    let bytes = objects.read(&objects.layout.manifest(digest), MAX_ROOT_BYTES);
    let bytes = bytes.map_err(|error| unreadable(error, |reason| damaged(object(), reason)))?;
    let bytes = bytes.ok_or_else(|| StoreError::NotFound(object()))?;
    let actual = Digest::of(&bytes);
    if actual != *digest {
        return Err(damaged(object(), format!("its bytes have digest {actual}")));
    }
    let as_segment = Segment::parse(&bytes);
    match (Root::parse(&bytes, digest), as_segment) {
        (Err(as_root), Err(as_segment)) => {
            Err(damaged(object(), format!("no root ({as_root}), and no segment ({as_segment})")))
        }
        _ => Ok(()),
    }
}

/// Returns the damage and losses of an image.
fn verify_image(manifests: &Manifests, image: &Digest, sound: &HashSet<Digest>) -> Vec<Damage> {
    let root = match manifests.read_root(image) {
        Ok(root) => root,
        Err(error) => return vec![error.into()],
    };
    let mut damage = Vec::new();
    let mut lost = HashSet::new();
    for index in (0..).take(root.segment_digests().len()) {
        match manifests.segment(&root, index) {
            Ok(segment) => lost.extend(segment.digests().filter(|chunk| !sound.contains(chunk))),
            Err(error) => damage.push(error.into()),
        }
    }
    let mut named: Vec<_> = lost.iter().collect();
    named.sort_unstable();
    named.truncate(MAX_NAMED_CHUNKS);
    let reason = || "no sound pack holds it".to_owned();
    damage.extend(named.iter().map(|chunk| Damage { object: format!("chunk {chunk}"), reason: reason() }));
    if lost.len() > named.len() {
        let object = format!("{} more chunks", lost.len() - named.len());
        damage.push(Damage { object, reason: reason() });
    }
    damage
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use std::fs;

    #[test]
    fn every_kind_of_damage_is_named() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        let (layout, pack) = (&store.objects.layout, image.pack_digest());
        let segment = image.manifest.root.segment_digests()[0];
        let check = || verify(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!(check().damage, []);
        let flip = |at: usize| move |bytes: &mut Vec<u8>| bytes[at] ^= 1;
        type Harm<'a> = &'a dyn Fn(&mut Vec<u8>);
        let harms: [(_, Harm, String); 7] = [
            (layout.pack(&pack), &flip(200), format!("pack {pack}")),
            (layout.pack(&pack), &flip(image.pack.len() - 70), format!("pack {pack}")),
            (layout.pack(&pack), &|bytes| bytes.truncate(1000), format!("pack {pack}")),
            (layout.pack(&pack), &|bytes| bytes.clear(), format!("pack {pack}")),
            (layout.manifest(&segment), &flip(9), format!("manifest {segment}")),
            (layout.manifest(&image.digest()), &|bytes| bytes.push(0), image.digest().to_string()),
            (layout.reference(&"a:1".parse().unwrap()), &flip(3), "reference a:1".to_owned()),
        ];
        for (path, harm, name) in harms {
            let good = fs::read(&path).unwrap();
            let mut bad = good.clone();
            harm(&mut bad);
            fs::write(&path, bad).unwrap();
            let found = check();
            assert!(found.damage.iter().any(|damage| damage.object.contains(&name)), "{name}: {found:?}");
            assert_eq!(found.references, 0, "its image is not whole: {name}");
            fs::write(&path, good).unwrap();
            assert_eq!(check().damage, []);
        }
        fs::remove_file(layout.pack(&pack)).unwrap();
        let lost = check().damage;
        let chunk = image.data_chunks()[0];
        assert!(
            lost.iter().any(|damage| damage.object == format!("reference a:1: chunk {chunk}")),
            "{lost:?}"
        );
    }
}
