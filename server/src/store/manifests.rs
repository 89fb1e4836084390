//! Roots and segments: read from disk, verified against their digests, and cached in parsed form.

use crate::store::cache::Cache;
use crate::store::error::{StoreError, damaged};
use crate::store::layout::Layout;
use crate::store::objects::{Objects, read_bounded};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{MAX_ROOT_BYTES, MAX_SEGMENT_BYTES, Root, Segment};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the cache of parsed segments: the digests of about two million chunks.
const SEGMENT_CACHE_BYTES: usize = 64 << 20;
/// Bytes of the cache of roots, by encoded length; parsed roots take about three times as much.
const ROOT_CACHE_BYTES: usize = 8 << 20;

/// The manifests of a store.
#[derive(Debug)]
pub(crate) struct Manifests {
    layout: Layout,
    roots: Cache<Root>,
    segments: Cache<Segment>,
    /// Locked while an object is read and parsed, so that a burst of misses for one object reads it
    /// once.
    loading: Mutex<()>,
}

impl Manifests {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            roots: Cache::new(ROOT_CACHE_BYTES),
            segments: Cache::new(SEGMENT_CACHE_BYTES),
            loading: Mutex::new(()),
        }
    }

    /// Returns true if a root or segment exists, by path. Its content is not checked.
    pub(crate) fn is_stored(&self, digest: &Digest) -> bool {
        self.layout.manifest(digest).exists()
    }

    /// Returns the root of an image, if it is in memory.
    pub(crate) fn cached_root(&self, image: &Digest) -> Option<Arc<Root>> {
        self.roots.get(image)
    }

    /// Returns the root of an image.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn root(&self, image: &Digest) -> Result<Arc<Root>, StoreError> {
        if let Some(root) = self.cached_root(image) {
            return Ok(root);
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        match self.cached_root(image) {
            Some(root) => Ok(root),
            None => self.read_root(image).map(|(root, _)| root),
        }
    }

    /// Reads the root of an image and its encoding from the disk.
    ///
    /// # Errors
    /// Returns the errors of [`Manifests::root`].
    ///
    /// # Blocking
    /// Reads a file and parses it.
    pub(crate) fn read_root(&self, image: &Digest) -> Result<(Arc<Root>, Bytes), StoreError> {
        let object = || format!("image {image}");
        let bytes = read_bounded(&self.layout.manifest(image), MAX_ROOT_BYTES)?;
        let bytes = bytes.ok_or_else(|| StoreError::NotFound(object()))?;
        let root = Root::parse(&bytes, image).map_err(|e| damaged(object(), e))?;
        let root = Arc::new(root);
        self.roots.insert(*image, root.clone(), bytes.len());
        Ok((root, bytes.into()))
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
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        match self.cached_segment(root, index) {
            Some(segment) => Ok(segment),
            None => self.read_segment(root, index).map(|(segment, _)| segment),
        }
    }

    /// Reads a segment of an image and its encoding from the disk.
    ///
    /// # Errors
    /// Returns the errors of [`Manifests::segment`].
    ///
    /// # Blocking
    /// As there.
    pub(crate) fn read_segment(&self, root: &Root, index: u32) -> Result<(Arc<Segment>, Bytes), StoreError> {
        let image = root.image();
        let digest = root.segment_digests().get(index as usize);
        let digest =
            digest.ok_or_else(|| StoreError::NotFound(format!("segment {index} of image {image}")))?;
        let object = || format!("segment {index} ({digest}) of image {image}");
        let bytes = self.segment_bytes(digest)?;
        let segment = root.check_segment(index, &bytes).map_err(|e| damaged(object(), e))?;
        let segment = Arc::new(segment);
        self.segments.insert(*digest, segment.clone(), bytes.len());
        Ok((segment, bytes))
    }

    /// Reads a segment's encoding, without verification.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub(crate) fn segment_bytes(&self, digest: &Digest) -> Result<Bytes, StoreError> {
        let bytes = read_bounded(&self.layout.manifest(digest), MAX_SEGMENT_BYTES)?;
        bytes.map(Bytes::from).ok_or_else(|| StoreError::NotFound(format!("segment {digest}")))
    }

    /// Stores a segment.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] for bytes that are no segment.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(crate) fn put_segment(&self, objects: &Objects, bytes: Bytes) -> Result<Digest, StoreError> {
        let digest = Digest::of(&bytes);
        Segment::parse(&bytes).map_err(|e| StoreError::Invalid {
            object: format!("segment {digest}"),
            reason: e.to_string(),
        })?;
        // An existing segment is written again, because this repairs a damaged one.
        objects.put(&self.layout.manifest(&digest), bytes)?;
        Ok(digest)
    }
}
