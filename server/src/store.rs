//! The store: a directory of images.
//!
//! A push passes these calls: [`Store::stage_pack`] receives a pack, [`Store::put_staged`] verifies
//! and names it, [`Store::put_segment`] does both for a segment. [`Store::commit`] checks that every
//! object exists, writes the root, and moves the reference. A read goes the other way:
//! [`Store::resolve`] maps a reference to an image, the image's manifest a chunk to its digest, the
//! index of the packs ([`packs`]) the digest to a frame. The frame is a slice of the pack's memory
//! map.
//!
//! All calls block, except for those named `resident` or `cached`; services run them in
//! `spawn_blocking`. Several processes may use one store: see [`lock`].

mod cache;
mod caller;
mod commit;
mod condemned;
mod error;
mod gc;
mod layout;
mod lease;
mod lock;
mod manifests;
pub(crate) mod map;
mod objects;
mod packs;
mod references;
mod staged;
mod verify;
mod walk;
mod working_sets;

pub use caller::{Caller, Waits};
pub use commit::{CommitOutcome, Missing};
pub use error::{OpenError, StoreError};
pub use gc::{Collected, Collector};
pub use layout::Domain;
pub use lease::Lease;
pub use manifests::StoredRoot;
pub use staged::StagedPack;
pub use verify::{Damage, Verified, verify};
pub use working_sets::WorkingSet;

use bytes::Bytes;
use layout::Layout;
use lease::Leases;
use lock::StoreLock;
use manifests::Manifests;
use objects::Objects;
use packs::Packs;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root, Segment};
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::reference::{Reference, TagReference};
use std::path::Path;
use std::sync::Arc;

/// A store in a local directory.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
    objects: Objects,
    packs: Packs,
    manifests: Manifests,
    leases: Leases,
}

impl Store {
    /// Opens the store in `dir`. Creates it if the directory is empty or does not exist.
    ///
    /// # Errors
    /// Returns [`OpenError::Format`] for a store of another version, [`OpenError::NotAStore`] for a
    /// directory with other content.
    ///
    /// # Blocking
    /// Reads the index of every pack.
    pub fn open_or_create(dir: &Path, domain: Domain) -> Result<Self, OpenError> {
        let layout = Layout::new(dir, domain);
        if layout.check_format()? {
            return Self::open(dir, domain);
        }
        std::fs::create_dir_all(dir).map_err(error::io_error(dir))?;
        Objects::new(&layout)?.put_unlocked(&layout.format(), layout::FORMAT.into())?;
        Self::open(dir, domain)
    }

    /// Opens the store in `dir`.
    ///
    /// # Errors
    /// Returns the errors of [`Store::open_or_create`], or [`OpenError::Missing`] if there is no
    /// store.
    ///
    /// # Blocking
    /// Reads the index of every pack.
    pub fn open(dir: &Path, domain: Domain) -> Result<Self, OpenError> {
        let layout = open_layout(dir, domain)?;
        let objects = Objects::new(&layout)?;
        let packs = Packs::open(&layout)?;
        let manifests = Manifests::new(&layout);
        Ok(Self { layout, objects, packs, manifests, leases: Leases::default() })
    }

    /// Returns the digest of a reference's image.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the reference or the image does not exist.
    ///
    /// # Blocking
    /// Reads a small file.
    pub fn resolve(&self, reference: &Reference) -> Result<Digest, StoreError> {
        let image = match reference {
            Reference::Tag(reference) => references::read(&self.layout, reference)?,
            Reference::Digest { image, .. } => Some(*image).filter(|i| self.manifests.is_stored(i)),
        };
        image.ok_or_else(|| StoreError::NotFound(reference.to_string()))
    }

    /// Returns true if the store has the pack, and then protects it for at least gc's grace time.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Waits for a collector's deletes.
    pub fn keep_pack(&self, pack: &Digest) -> Result<bool, StoreError> {
        let _keep = StoreLock::keep_objects(&self.layout)?;
        let is_stored = self.packs.is_stored(pack);
        if is_stored {
            condemned::pardon(&self.layout, pack)?;
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
        let digest = self.manifests.put_segment(&self.objects, bytes)?;
        let _keep = StoreLock::keep_objects(&self.layout)?;
        condemned::pardon(&self.layout, &digest)?;
        Ok(digest)
    }

    /// Returns all references, in bytewise order of `name:tag`.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`], or [`StoreError::Damaged`] for a file that is no reference.
    ///
    /// # Blocking
    /// Walks the directory of references.
    pub fn references(&self) -> Result<Vec<TagReference>, StoreError> {
        references::list(&self.layout)
    }

    /// Removes a reference.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the reference does not exist.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn remove_reference(&self, reference: &TagReference) -> Result<(), StoreError> {
        match references::remove(&self.layout, reference)? {
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
            None => self.leases.take(&self.layout, image),
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

    /// Returns segment `index` of an image, if it is in memory. Does not block.
    #[must_use]
    pub fn cached_segment(&self, root: &Root, index: u32) -> Option<Arc<Segment>> {
        self.manifests.cached_segment(root, index)
    }

    /// Returns segment `index` of an image.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file, if it is not in memory.
    pub fn segment(&self, root: &Root, index: u32) -> Result<Arc<Segment>, StoreError> {
        self.manifests.segment(root, index)
    }

    /// Returns segment `index` of an image, for a reader of all segments: does not keep it in
    /// memory.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file, if it is not in memory.
    pub fn passing_segment(&self, root: &Root, index: u32) -> Result<Arc<Segment>, StoreError> {
        self.manifests.passing_segment(root, index)
    }

    /// Returns the encoding of segment `index`.
    ///
    /// # Errors
    /// Returns the errors of [`Store::segment`].
    ///
    /// # Blocking
    /// Reads a file.
    pub fn read_segment(&self, root: &Root, index: u32) -> Result<Bytes, StoreError> {
        self.manifests.read_segment(root, index).map(|(_, bytes)| bytes)
    }

    /// Returns the content of an image's chunk; `None` beyond its last one.
    ///
    /// # Errors
    /// Returns the errors of [`Store::segment`].
    ///
    /// # Blocking
    /// Reads a file, if the segment is not in memory.
    pub fn chunk(&self, root: &Root, chunk: ChunkIndex) -> Result<Option<ChunkContent>, StoreError> {
        if chunk.0 >= root.chunks() {
            return Ok(None);
        }
        let (segment, place) = Root::segment_of(chunk);
        let segment = u32::try_from(segment).expect("bounded by the root");
        Ok(self.segment(root, segment)?.chunk(place))
    }

    /// Returns a chunk's frame, if it is in memory. Does not block: see [`Store::load_frame`].
    #[must_use]
    pub fn resident_frame(&self, chunk: &Digest) -> Option<Bytes> {
        self.packs.resident_frame(chunk)
    }

    /// Returns a chunk's frame from any pack with a good copy. With `check`, decodes the frame and
    /// compares it with the digest.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if no pack holds the chunk, [`StoreError::Damaged`] if no
    /// pack has a good copy.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn load_frame(&self, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        self.packs.load_frame(chunk, check)
    }

    /// Releases deleted packs, so that the file system frees their space. The owner calls it
    /// periodically.
    ///
    /// # Blocking
    /// Takes about 1 us for each pack.
    pub fn forget_deleted(&self) {
        self.packs.forget_deleted();
    }

    /// Returns the length in bytes of a chunk's frame, if a pack is known to hold it. Does not
    /// block.
    #[must_use]
    pub fn frame_bytes(&self, chunk: &Digest) -> Option<u32> {
        self.packs.frame_bytes(chunk)
    }
}

/// Checks that `dir` is a store, and creates its missing directories. Warns if others may read it.
fn open_layout(dir: &Path, domain: Domain) -> Result<Layout, OpenError> {
    let missing = |_| OpenError::Missing(dir.to_owned());
    // An absolute path, so that later changes of the working directory do not matter.
    let layout = Layout::new(&dir.canonicalize().map_err(missing)?, domain);
    if !layout.check_format()? {
        return Err(OpenError::Missing(dir.to_owned()));
    }
    layout.create_directories()?;
    if layout.is_open_to_others() {
        tracing::warn!("other users may read {}: chmod it to 700, unless they are meant to", dir.display());
    }
    Ok(layout)
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
    use std::fs;

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
        assert_eq!(create(&path).unwrap().references().unwrap().len(), 1);
        assert_eq!(fs::read_to_string(path.join("format")).unwrap(), layout::FORMAT);
    }

    #[test]
    fn a_newer_format_and_other_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        assert!(matches!(create(dir.path()), Err(OpenError::NotAStore(_))));
        fs::write(dir.path().join("format"), "postcopy store 2\n").unwrap();
        let error = create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("postcopy store 2"), "{error}");
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
            assert!(!store.layout.pack(&digest).exists());
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
        let committed = store.commit(&"b:1".parse().unwrap(), root, &caller);
        assert!(matches!(committed, Err(StoreError::Abandoned)), "{committed:?}");
        let other = Image::of_seed(2);
        let put = store.put_pack(other.pack_digest(), other.pack.clone(), &caller);
        assert!(matches!(put, Err(StoreError::Abandoned)), "{put:?}");
        assert!(!store.layout.pack(&other.pack_digest()).exists());
        assert_eq!(store.references().unwrap().len(), 1);
    }

    #[test]
    fn another_process_s_pack_is_found_when_it_is_missed() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        let chunk = image.data_chunks()[0];
        assert!(matches!(store.load_frame(&chunk, false), Err(StoreError::NotFound(_))));
        image.push(&create(dir.path()).unwrap(), "a");
        assert!(store.resident_frame(&chunk).is_none(), "not known yet");
        assert!(store.load_frame(&chunk, false).is_ok());
        assert!(store.resident_frame(&chunk).is_some());
    }

    #[test]
    fn a_frame_of_a_truncated_pack_is_an_error_and_no_signal() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        let (chunk, pack) = (*image.data_chunks().last().unwrap(), image.pack_digest());
        assert!(store.resident_frame(&chunk).is_some());
        fs::File::options().write(true).open(store.layout.pack(&pack)).unwrap().set_len(0).unwrap();
        assert!(store.resident_frame(&chunk).is_none());
        let error = store.load_frame(&chunk, false).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }) && error.to_string().contains(&pack.to_string()));
        assert_eq!(store.find_missing([chunk].into_iter()).unwrap(), [chunk], "so a push sends it again");
        image.push(&store, "a");
        assert!(store.load_frame(&chunk, true).is_ok(), "healed");
    }

    #[test]
    fn a_good_copy_is_taken_where_one_is_damaged() {
        let (_dir, store) = store();
        let (first, second) = (Image::of_seed(1), Image::with_more_chunks(1));
        first.push(&store, "a");
        let chunk = first.data_chunks()[0];
        let path = store.layout.pack(&first.pack_digest());
        let mut bytes = fs::read(&path).unwrap();
        bytes[16 + 24] ^= 0xff;
        // The damage is in place, as on a disk, so the map stays.
        fs::write(&path, bytes).unwrap();
        let error = store.load_frame(&first.data_chunks_in_pack_order()[0], true).unwrap_err().to_string();
        assert!(error.contains(&first.pack_digest().to_string()), "{error}");
        second.push(&store, "b");
        assert!(store.load_frame(&first.data_chunks_in_pack_order()[0], true).is_ok());
        assert!(store.load_frame(&chunk, true).is_ok());
    }

    #[test]
    fn a_commit_says_what_is_missing_and_changes_nothing() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        let reference: TagReference = "a".parse().unwrap();
        let commit =
            || store.commit(&reference, image.manifest.root_bytes.clone(), &Caller::default()).unwrap();
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
        let listed: Vec<_> = store.references().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(listed, names, "in bytewise order");
        store.remove_reference(&"a:latest".parse().unwrap()).unwrap();
        assert!(store.resolve(&"a".parse().unwrap()).is_err());
        assert!(store.resolve(&"a/b".parse().unwrap()).is_ok());
    }
}
