//! Roots and segments: read from disk, verified against their digests, and cached in parsed form.

use crate::store::cache::Cache;
use crate::store::error::{StoreError, damaged};
use crate::store::objects::Objects;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{MAX_ROOT_BYTES, MAX_SEGMENT_BYTES, Root, Segment};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes of the cache of parsed segments: the digests of about two million chunks.
const SEGMENT_CACHE_BYTES: usize = 64 << 20;
/// Bytes of the cache of roots, by encoded length.
const ROOT_CACHE_BYTES: usize = 8 << 20;
/// Bytes of a root in memory for each encoded byte: the encoding, and three times as much for the
/// parsed form.
const BYTES_PER_ROOT_BYTE: usize = 4;
/// Most bytes of all large roots in memory, those that streams use included, and of all others. A
/// root of the largest size takes a quarter. Large roots therefore do not shut out the others.
const MAX_ROOTS_BYTES: usize = 1 << 30;
/// Encoded bytes from which on a root is large.
const LARGE_ROOT_BYTES: usize = 1 << 20;

/// Number of locks under which objects are loaded.
const LOADS: usize = 64;

/// A root in memory, with its encoding. All users of an image share one.
#[derive(Debug)]
pub struct StoredRoot {
    root: Root,
    bytes: Bytes,
    _memory: RootMemory,
}

impl StoredRoot {
    /// Returns the root's encoding.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl Deref for StoredRoot {
    type Target = Root;

    fn deref(&self) -> &Root {
        &self.root
    }
}

/// Memory of a root, given back at the drop.
#[derive(Debug)]
struct RootMemory {
    used_bytes: Arc<AtomicUsize>,
    bytes: usize,
}

impl RootMemory {
    /// Takes memory for a root, of that for small or for large ones.
    fn take(used: &[Arc<AtomicUsize>; 2], encoded_bytes: usize) -> Result<Self, StoreError> {
        let used_bytes = &used[usize::from(encoded_bytes >= LARGE_ROOT_BYTES)];
        let memory = Self { used_bytes: Arc::clone(used_bytes), bytes: encoded_bytes * BYTES_PER_ROOT_BYTE };
        let before = used_bytes.fetch_add(memory.bytes, Ordering::AcqRel);
        match before + memory.bytes <= MAX_ROOTS_BYTES {
            true => Ok(memory),
            false => Err(StoreError::Busy("the manifests in use take all memory that is for them")),
        }
    }
}

impl Drop for RootMemory {
    fn drop(&mut self) {
        self.used_bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// The manifests of a store.
#[derive(Debug)]
pub(crate) struct Manifests {
    objects: Objects,
    roots: Cache<Digest, StoredRoot>,
    /// The roots in use, cached or not. Locked for a look-up or a change.
    used_roots: Mutex<HashMap<Digest, Weak<StoredRoot>>>,
    /// Bytes of small roots, and of large ones.
    roots_bytes: [Arc<AtomicUsize>; 2],
    segments: Cache<Digest, Segment>,
    /// Locked while an object is read and parsed, by its digest, so that a burst of misses for one
    /// object reads it once. Others are loaded beside it.
    loading: [Mutex<()>; LOADS],
}

impl Manifests {
    pub(crate) fn new(objects: &Objects) -> Self {
        Self {
            objects: objects.clone(),
            roots: Cache::new(ROOT_CACHE_BYTES),
            used_roots: Mutex::default(),
            roots_bytes: Default::default(),
            segments: Cache::new(SEGMENT_CACHE_BYTES),
            loading: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// Returns true if a root or segment exists, by path. Its content is not checked.
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn is_stored(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.objects.exists(&self.objects.layout.manifest(digest))
    }

    /// Returns those of the roots and segments that do not exist.
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn lacking(&self, digests: impl Iterator<Item = Digest>) -> Result<Vec<Digest>, StoreError> {
        let mut lacking: Vec<_> = digests.collect();
        let paths: Vec<_> = lacking.iter().map(|digest| self.objects.layout.manifest(digest)).collect();
        let mut lengths = self.objects.lengths(&paths)?.into_iter();
        lacking.retain(|_| lengths.next().is_some_and(|length| length.is_none()));
        Ok(lacking)
    }

    /// Returns the root of an image, if it is in memory.
    pub(crate) fn cached_root(&self, image: &Digest) -> Option<Arc<StoredRoot>> {
        self.roots.get(image).or_else(|| lock(&self.used_roots).get(image)?.upgrade())
    }

    /// Returns the root of an image.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Busy`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn root(&self, image: &Digest) -> Result<Arc<StoredRoot>, StoreError> {
        if let Some(root) = self.cached_root(image) {
            return Ok(root);
        }
        let _one_at_a_time = self.loading(image);
        if let Some(root) = self.cached_root(image) {
            return Ok(root);
        }
        let bytes = self.root_bytes(image)?;
        let memory = RootMemory::take(&self.roots_bytes, bytes.len())?;
        let root = Arc::new(StoredRoot { root: parse_root(image, &bytes)?, bytes, _memory: memory });
        let mut used = lock(&self.used_roots);
        used.retain(|_, root| root.strong_count() > 0);
        used.insert(*image, Arc::downgrade(&root));
        drop(used);
        self.roots.insert(*image, root.clone(), root.bytes.len());
        Ok(root)
    }

    /// Reads the root of an image from the disk, whatever is in memory.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn read_root(&self, image: &Digest) -> Result<Root, StoreError> {
        parse_root(image, &self.root_bytes(image)?)
    }

    /// Reads the root of an image as [`Manifests::read_root`] does; `None` for a root of more than
    /// `max_bytes`.
    ///
    /// # Errors
    /// Returns the errors of [`Manifests::read_root`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn read_small_root(
        &self,
        image: &Digest,
        max_bytes: usize,
    ) -> Result<Option<Root>, StoreError> {
        let bytes = self.objects.read(&self.objects.layout.manifest(image), max_bytes)?;
        let bytes = bytes.ok_or_else(|| StoreError::NotFound(format!("image {image}")))?;
        match bytes.len() > max_bytes {
            true => Ok(None),
            false => parse_root(image, &bytes).map(Some),
        }
    }

    fn loading(&self, object: &Digest) -> MutexGuard<'_, ()> {
        lock(&self.loading[usize::from(object.as_bytes()[0]) % LOADS])
    }

    fn root_bytes(&self, image: &Digest) -> Result<Bytes, StoreError> {
        let bytes = self.objects.read(&self.objects.layout.manifest(image), MAX_ROOT_BYTES)?;
        bytes.ok_or_else(|| StoreError::NotFound(format!("image {image}")))
    }

    /// Returns a segment of an image, if it is in memory.
    pub(crate) fn cached_segment(&self, root: &Root, index: u32) -> Option<Arc<Segment>> {
        self.segments.get(root.segment_digests().get(index as usize)?)
    }

    /// Returns a segment of an image.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the image has no such segment or the store has lost it,
    /// or [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn segment(&self, root: &Root, index: u32) -> Result<Arc<Segment>, StoreError> {
        if let Some(segment) = self.cached_segment(root, index) {
            return Ok(segment);
        }
        let digest = root.segment_digests().get(index as usize);
        let _one_at_a_time = digest.map(|digest| self.loading(digest));
        match self.cached_segment(root, index) {
            Some(segment) => Ok(segment),
            None => {
                let (digest, segment, bytes) = self.parse_segment(root, index)?;
                let segment = Arc::new(segment);
                self.segments.insert(digest, segment.clone(), bytes);
                Ok(segment)
            }
        }
    }

    /// Returns a segment of an image, without keeping it in memory: a reader of all segments would
    /// evict those that faults need.
    ///
    /// # Errors
    /// Returns the errors of [`Manifests::segment`].
    ///
    /// # Blocking
    /// Reads a file and parses it, if it is not in memory.
    pub(crate) fn passing_segment(&self, root: &Root, index: u32) -> Result<Arc<Segment>, StoreError> {
        match self.cached_segment(root, index) {
            Some(segment) => Ok(segment),
            None => self.parse_segment(root, index).map(|(_, segment, _)| Arc::new(segment)),
        }
    }

    /// Reads a segment of an image. Returns its digest, the segment, and the length of its encoding.
    fn parse_segment(&self, root: &Root, index: u32) -> Result<(Digest, Segment, usize), StoreError> {
        let image = root.image();
        let digest = root.segment_digests().get(index as usize);
        let digest =
            digest.ok_or_else(|| StoreError::NotFound(format!("segment {index} of image {image}")))?;
        let object = || format!("segment {index} ({digest}) of image {image}");
        let bytes = self.segment_bytes(digest)?;
        let segment = root.check_segment(index, &bytes).map_err(|e| damaged(object(), e))?;
        Ok((*digest, segment, bytes.len()))
    }

    /// Reads a segment's encoding, without verification.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub(crate) fn segment_bytes(&self, digest: &Digest) -> Result<Bytes, StoreError> {
        let bytes = self.objects.read(&self.objects.layout.manifest(digest), MAX_SEGMENT_BYTES)?;
        bytes.ok_or_else(|| StoreError::NotFound(format!("segment {digest}")))
    }

    /// Stores a segment.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] for bytes that are no segment.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(crate) fn put_segment(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let digest = Digest::of(&bytes);
        Segment::parse(&bytes).map_err(|e| StoreError::Invalid {
            object: format!("segment {digest}"),
            reason: e.to_string(),
        })?;
        // An existing segment is written again, because this repairs a damaged one.
        self.objects.put(&self.objects.layout.manifest(&digest), bytes)?;
        Ok(digest)
    }
}

fn parse_root(image: &Digest, bytes: &[u8]) -> Result<Root, StoreError> {
    Root::parse(bytes, image).map_err(|error| match Digest::of(bytes) == *image {
        // A sound object that is no root: a client may name a segment.
        true => StoreError::NotFound(format!("image {image}")),
        false => damaged(format!("image {image}"), error),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
