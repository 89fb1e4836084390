//! The store: images in a directory or a bucket.
//!
//! A push passes these calls: [`Store::stage_pack`] receives a pack, [`Store::put_staged`] verifies
//! and names it, [`Store::put_segment`] does both for a segment. [`Store::commit`] checks that every
//! object exists, writes the locators and the root, and moves the reference. A read goes the other
//! way: [`Store::resolve`] maps a reference to an image. Then ([`reads`]) the image's root maps a
//! chunk to its segment, and the segment's locator ([`locators`]) the chunk to a place in a pack
//! ([`packs`]). The frame is a slice of the pack's memory map. The chunk index ([`index`]) tells a
//! push which chunks the store lacks, and finds chunks whose locators are wrong.
//!
//! All calls block, except for those named `resident` or `cached`; services run them in
//! `spawn_blocking`. Several processes may use one store: see [`lock`].

mod cache;
mod caller;
mod commit;
mod condemned;
#[cfg(test)]
#[cfg(feature = "aws")]
mod conformance;
mod error;
mod format;
mod gc;
mod index;
mod layout;
mod lease;
mod locators;
mod lock;
mod manifests;
pub(crate) mod map;
mod objects;
mod packs;
mod patch;
mod reads;
mod references;
mod repair;
#[cfg(test)]
mod simulation;
mod staged;
mod upgrade;
mod verify;
mod walk;
mod working_sets;

pub use caller::{Caller, Waits};
pub use commit::{CommitOutcome, Missing};
pub use error::{OpenError, StoreError};
pub use format::Location;
pub use gc::{Collected, Collector, Plan, Progress, Repacked};
pub use layout::Domain;
pub use lease::Lease;
pub use manifests::StoredRoot;
pub use objects::bucket::Bucket;
pub use patch::{ChunkPatch, PatchedChunk};
pub use reads::{Located, StoredChunk};
pub use references::Referred;
pub(crate) use references::{Listed, NoReference, PageToken};
pub use repair::{Repaired, repair};
pub use staged::StagedPack;
pub use upgrade::upgrade;
pub use verify::{Damage, Verified, verify};
pub use working_sets::{RecordingOf, WorkingSet};

use bytes::Bytes;
use cache::Cache;
use lease::Leases;
use locators::Locators;
use lock::StoreLock;
use manifests::Manifests;
use objects::Objects;
use packs::Packs;
pub use packs::{DiskCache, PackBlock, PeerReading, Peers};
use postcopy_proto::digest::Digest;
use postcopy_proto::provenance::Provenance;
use postcopy_proto::reference::{Reference, TagReference};
use references::Listings;
use std::sync::Arc;

/// A store.
#[derive(Debug)]
pub struct Store {
    objects: Objects,
    packs: Packs,
    manifests: Manifests,
    locators: Locators,
    leases: Leases,
    listings: Listings,
    /// Packs of working sets, of a bucket.
    sets: Cache<Digest, Bytes>,
}

impl Store {
    /// Opens the store at `location`. Creates it if the directory, or the part of the bucket, is empty
    /// or does not exist.
    ///
    /// # Errors
    /// Returns [`OpenError::Format`] for a store of another version, [`OpenError::NotAStore`] for a
    /// directory with other content.
    ///
    /// # Blocking
    /// Reads and writes a few small objects, however many packs the store has.
    pub fn open_or_create(location: impl Into<Location>, domain: Domain) -> Result<Self, OpenError> {
        format::open_or_create(&location.into(), domain).map(|objects| Self::new(&objects))
    }

    /// Opens the store at `location`.
    ///
    /// # Errors
    /// Returns the errors of [`Store::open_or_create`], or [`OpenError::Missing`] if there is no
    /// store.
    ///
    /// # Blocking
    /// Reads a few small objects, however many packs the store has.
    pub fn open(location: impl Into<Location>, domain: Domain) -> Result<Self, OpenError> {
        format::open(&location.into(), domain).map(|objects| Self::new(&objects))
    }

    fn new(objects: &Objects) -> Self {
        Self {
            objects: objects.clone(),
            packs: Packs::new(objects),
            manifests: Manifests::new(objects),
            locators: Locators::new(objects),
            leases: Leases::new(objects),
            listings: Listings::default(),
            sets: Cache::new(working_sets::KEPT_BYTES),
        }
    }

    /// Returns the directory or the URL of the store, for messages.
    #[must_use]
    pub fn name(&self) -> std::path::PathBuf {
        self.objects.name()
    }

    /// Returns the digest of a reference's image.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the reference or the image does not exist.
    ///
    /// # Blocking
    /// Reads a small file.
    pub fn resolve(&self, reference: &Reference) -> Result<Digest, StoreError> {
        self.refer(reference).map(|referred| referred.image)
    }

    /// Returns the digest of a reference's image, and where the reference comes from.
    ///
    /// # Errors
    /// Returns the errors of [`Store::resolve`].
    ///
    /// # Blocking
    /// Reads a small file.
    pub fn refer(&self, reference: &Reference) -> Result<Referred, StoreError> {
        let referred = match reference {
            Reference::Tag(reference) => references::read(&self.objects, reference)?,
            Reference::Digest { image, .. } => {
                self.manifests.is_stored(image)?.then_some(Referred { image: *image, provenance: None })
            }
        };
        referred.ok_or_else(|| StoreError::NotFound(reference.to_string()))
    }

    /// Returns the root of a reference's image, and where the reference comes from.
    ///
    /// # Errors
    /// Returns the errors of [`Store::resolve`] and of [`Store::root`], which name the reference.
    ///
    /// # Blocking
    /// Reads two files.
    pub fn open_reference(
        &self,
        reference: &Reference,
    ) -> Result<(Arc<StoredRoot>, Option<Provenance>), StoreError> {
        let Referred { image, provenance } = match reference {
            Reference::Digest { image, .. } => Referred { image: *image, provenance: None },
            Reference::Tag(_) => self.refer(reference)?,
        };
        match (self.root(&image), reference) {
            (Err(StoreError::NotFound(object)), Reference::Tag(reference)) => {
                Err(StoreError::NotFound(format!("{object} of reference {reference}")))
            }
            (root, _) => Ok((root?, provenance)),
        }
    }

    /// Returns true if the store has the pack, and then protects it for at least gc's grace time.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Waits for a collector's deletes.
    pub fn keep_pack(&self, pack: &Digest) -> Result<bool, StoreError> {
        let _keep = StoreLock::keep_objects(&self.objects)?;
        // A damaged pack is received again.
        let is_stored = matches!(self.packs.add(*pack), Ok(true));
        if is_stored {
            condemned::pardon(&self.objects, pack)?;
        }
        Ok(is_stored)
    }

    /// Verifies a segment, and stores it. The segment is durable on return.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] for bytes that are no canonical segment, or
    /// [`StoreError::Full`].
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn put_segment(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let digest = self.manifests.put_segment(bytes)?;
        let _keep = StoreLock::keep_objects(&self.objects)?;
        condemned::pardon(&self.objects, &digest)?;
        Ok(digest)
    }

    /// Returns a block of 256 KiB of a bucket's pack, for another server of the bucket.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the pack does not exist, [`StoreError::Invalid`] for a
    /// block that no pack has, or [`StoreError::Bucket`].
    pub async fn pack_block(&self, pack: Digest, block: u64) -> Result<PackBlock, StoreError> {
        self.packs.block(pack, block).await
    }

    /// Removes a reference.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the reference does not exist.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn remove_reference(&self, reference: &TagReference) -> Result<(), StoreError> {
        match references::remove(&self.objects, reference)? {
            true => Ok(()),
            false => Err(StoreError::NotFound(reference.to_string())),
        }
    }

    /// Returns the lease of an image, if this process holds it. Does not block: see
    /// [`Store::lease`].
    #[must_use]
    pub fn shared_lease(&self, image: &Digest) -> Option<Arc<Lease>> {
        self.leases.shared(image)
    }

    /// Protects an image from garbage collection, whatever references say, until the lease is
    /// dropped.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Creates a file.
    pub fn lease(&self, image: &Digest) -> Result<Arc<Lease>, StoreError> {
        match self.shared_lease(image) {
            Some(lease) => Ok(lease),
            None => self.leases.take(image),
        }
    }

    /// Returns an image's root, if it is in memory. Does not block.
    #[must_use]
    pub fn cached_root(&self, image: &Digest) -> Option<Arc<StoredRoot>> {
        self.manifests.cached_root(image)
    }

    /// Returns an image's root.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Busy`].
    ///
    /// # Blocking
    /// Reads a file, if it is not in memory.
    pub fn root(&self, image: &Digest) -> Result<Arc<StoredRoot>, StoreError> {
        self.manifests.root(image)
    }

    /// Releases deleted packs, so that the file system frees their space, and shortens the chunk
    /// index. The owner calls it periodically.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Takes about 2 ms, and sometimes writes the chunk index anew, some seconds for each GiB of it.
    pub fn maintain(&self) -> Result<(), StoreError> {
        self.packs.maintain()
    }
}

/// Returns an error with all of its causes, as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
    use postcopy_proto::provenance::Labels;
    use std::fs;
    use std::path::Path;

    fn create(dir: &Path) -> Result<Store, OpenError> {
        Store::open_or_create(dir, Domain::DEFAULT)
    }

    #[test]
    fn a_store_is_created_once_and_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/store");
        assert!(matches!(Store::open(&path, Domain::DEFAULT), Err(OpenError::Missing(_))));
        assert!(!path.exists(), "only asked for");
        Image::of_seed(1).push(&create(&path).unwrap(), "a");
        assert_eq!(references::list(&create(&path).unwrap().objects).unwrap().len(), 1);
        assert_eq!(fs::read_to_string(path.join("format")).unwrap(), layout::FORMAT);
    }

    #[test]
    fn a_newer_format_and_other_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        assert!(matches!(create(dir.path()), Err(OpenError::NotAStore(_))));
        fs::write(dir.path().join("format"), "postcopy store 3\n").unwrap();
        let error = create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("postcopy store 3"), "{error}");
        fs::write(dir.path().join("format"), [layout::FORMAT.as_bytes(), b"more"].concat()).unwrap();
        assert!(matches!(create(dir.path()), Err(OpenError::Format { .. })));
    }

    #[test]
    fn a_kill_between_creating_and_naming_leaves_a_directory_that_opens() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("format#1"), "postco").unwrap();
        create(dir.path()).unwrap();
    }

    #[test]
    fn what_does_not_verify_is_not_stored() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        let mut damaged = image.pack.to_vec();
        damaged[200] ^= 1;
        let digest = Digest::of(&damaged);
        for (digest, bytes) in
            [(digest, damaged), (digest, image.pack.to_vec()), (Digest::of(b""), Vec::new())]
        {
            let outcome = store.put_pack(digest, bytes.into(), &Caller::default());
            assert!(matches!(outcome, Err(StoreError::Invalid { .. })), "{outcome:?}");
            assert!(!store.objects.layout.pack(&digest).exists());
        }
        assert!(matches!(store.put_segment(Bytes::from_static(b"x")), Err(StoreError::Invalid { .. })));
    }

    #[test]
    fn a_segment_is_no_image() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        let segment = image.manifest.root.segment_digests()[0];
        assert!(matches!(store.root(&segment), Err(StoreError::NotFound(_))));
    }

    #[test]
    fn work_whose_caller_has_left_changes_nothing() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        let caller = Caller::default();
        drop(caller.waits());
        let root = image.manifest.root_bytes.clone();
        let committed = store.commit(&"b:1".parse().unwrap(), Labels::default(), root, &caller);
        assert!(matches!(committed, Err(StoreError::Abandoned)), "{committed:?}");
        let other = Image::of_seed(2);
        let put = store.put_pack(other.pack_digest(), other.pack.clone(), &caller);
        assert!(matches!(put, Err(StoreError::Abandoned)), "{put:?}");
        assert!(!store.objects.layout.pack(&other.pack_digest()).exists());
        assert_eq!(references::list(&store.objects).unwrap().len(), 1);
    }

    #[test]
    fn another_process_s_pack_is_found_when_it_is_missed() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        assert!(matches!(image.load(&store, 0, false), Err(StoreError::NotFound(_))));
        image.push(&create(dir.path()).unwrap(), "a");
        assert!(image.resident(&store, 0).is_none(), "not known yet");
        assert!(image.load(&store, 0, false).is_ok());
        assert!(image.resident(&store, 0).is_some());
    }

    #[test]
    fn a_store_is_opened_and_serves_an_image_without_a_look_at_other_packs() {
        let (dir, writer) = store();
        let images: Vec<_> = (0..20).map(Image::of_seed).collect();
        images.iter().for_each(|image| image.push(&writer, "a"));
        let reader = create(dir.path()).unwrap();
        (0..12).for_each(|chunk| drop(images[0].load(&reader, chunk, true).unwrap()));
        assert_eq!(reader.packs.known(), (vec![images[0].pack_digest()], 0));
    }

    #[test]
    fn a_missing_damaged_or_wrong_locator_is_made_again() {
        let (dir, store) = store();
        let (image, larger) = (Image::of_seed(1), Image::with_more_chunks(1));
        image.push(&store, "a");
        let locator = store.objects.layout.locator(&image.manifest.root.segment_digests()[0]);
        let good = fs::read(&locator).unwrap();
        fs::remove_file(&locator).unwrap();
        assert!(image.load(&create(dir.path()).unwrap(), 3, true).is_ok());
        assert_eq!(fs::read(&locator).unwrap(), good);
        fs::write(&locator, &good[..100]).unwrap();
        assert!(image.load(&create(dir.path()).unwrap(), 3, true).is_ok());
        assert_eq!(fs::read(&locator).unwrap(), good);
        // Every chunk of the image is also in the other pack.
        store.put_pack(larger.pack_digest(), larger.pack.clone(), &Caller::default()).unwrap();
        fs::remove_file(store.objects.layout.pack(&image.pack_digest())).unwrap();
        let reader = create(dir.path()).unwrap();
        (0..12).for_each(|chunk| drop(image.load(&reader, chunk, true).unwrap()));
        assert_ne!(fs::read(&locator).unwrap(), good, "it names the other pack");
        assert!(image.resident(&reader, 3).is_some(), "without another look at the index");
    }

    #[test]
    fn a_frame_of_a_truncated_pack_is_an_error_and_no_signal() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        let (chunk, pack) = (*image.data_chunks().last().unwrap(), image.pack_digest());
        assert!(image.load(&store, 16, false).is_ok() && image.resident(&store, 16).is_some());
        fs::File::options().write(true).open(store.objects.layout.pack(&pack)).unwrap().set_len(0).unwrap();
        assert!(image.resident(&store, 16).is_none());
        let error = image.load(&store, 16, false).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(&pack.to_string()), "{error}");
        assert_eq!(store.find_missing([chunk].into_iter()).unwrap(), [chunk], "so a push sends it again");
        image.push(&store, "a");
        assert!(image.load(&store, 16, true).is_ok(), "healed");
    }

    #[test]
    fn a_good_copy_is_taken_where_one_is_damaged() {
        let (_dir, store) = store();
        let (first, second) = (Image::of_seed(1), Image::with_more_chunks(1));
        first.push(&store, "a");
        let path = store.objects.layout.pack(&first.pack_digest());
        let mut bytes = fs::read(&path).unwrap();
        bytes[16 + 24] ^= 0xff;
        // The damage is in place, as on a disk, so the map stays.
        fs::write(&path, bytes).unwrap();
        let damaged = first.first_chunk_of_pack();
        let error = first.load(&store, damaged, true).unwrap_err().to_string();
        assert!(error.contains(&first.pack_digest().to_string()), "{error}");
        second.push(&store, "b");
        assert!(first.load(&store, damaged, true).is_ok());
        assert!(first.load(&store, 0, true).is_ok());
        // The locator names the good copy from then on, so a read without a check gets it.
        let frame = first.load(&store, damaged, false).unwrap();
        let plain = first.plain.chunks(4096).nth(usize::try_from(damaged).unwrap()).unwrap();
        let mut decoded = vec![0; 4096];
        let parsed = ChunkFrame::parse(&frame).unwrap();
        FrameDecoder::default().decode_verified(&parsed, &Digest::of(plain), &mut decoded).unwrap();
    }

    #[test]
    fn a_commit_says_what_is_missing_and_changes_nothing() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        let reference: TagReference = "a".parse().unwrap();
        let commit = || {
            let root = image.manifest.root_bytes.clone();
            store.commit(&reference, Labels::default(), root, &Caller::default()).unwrap()
        };
        let segments = image.manifest.root.segment_digests().to_vec();
        assert_eq!(commit(), CommitOutcome::Missing(Missing { segments, chunks: Vec::new() }));
        store.put_segment(image.manifest.segments[0].clone()).unwrap();
        let chunks = image.data_chunks();
        assert_eq!(commit(), CommitOutcome::Missing(Missing { segments: Vec::new(), chunks }));
        let by_tag = Reference::Tag(reference.clone());
        assert!(matches!(store.resolve(&by_tag), Err(StoreError::NotFound(_))));
        store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()).unwrap();
        assert_eq!(commit(), CommitOutcome::Committed(image.digest()));
        assert_eq!(store.resolve(&by_tag).unwrap(), image.digest());
    }

    #[test]
    fn two_uploads_of_the_same_at_once_are_both_right() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let (store, image) = (&store, &image);
                scope.spawn(move || image.push(store, &format!("a:{n}")));
            }
        });
        let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((verified.packs, verified.references, verified.damage), (1, 8, vec![]));
    }

    #[test]
    fn names_and_parts_of_names_stand_side_by_side() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        let names = ["a-b:x", "a/b/c:x", "a/b:latest", "a:latest", "a:v1"];
        names.iter().rev().for_each(|name| image.push(&store, name));
        let listed: Vec<_> =
            references::list(&store.objects).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(listed, names, "in bytewise order");
        store.remove_reference(&"a:latest".parse().unwrap()).unwrap();
        assert!(store.resolve(&"a".parse().unwrap()).is_err());
        assert!(store.resolve(&"a/b".parse().unwrap()).is_ok());
    }
}
