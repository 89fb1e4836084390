//! Reads of chunks: from an image's chunk to its segment, to a place in a pack, to the frame.

use crate::store::error::StoreError;
use crate::store::locators::Locator;
use crate::store::{Store, chain};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root, Segment};
use postcopy_proto::page::ChunkIndex;
use std::sync::Arc;

/// A segment of an image, with the places of its chunks.
#[derive(Clone, Debug)]
pub struct Located {
    digest: Digest,
    segment: Arc<Segment>,
    locator: Arc<Locator>,
}

impl Located {
    /// Returns the contents of all chunks, in order, each with the length in bytes of its frame if
    /// it is known, else 0.
    pub fn contents(&self) -> impl Iterator<Item = (ChunkContent, u32)> {
        let lengths = (0..).map(|place| self.locator.place(place).map_or(0, |place| place.length));
        self.segment.contents().zip(lengths)
    }

    /// Returns the number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.segment.chunks()
    }
}

/// An image's chunk, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredChunk {
    /// All bytes are zero.
    Zero,
    /// The frame of a chunk with data.
    Data {
        /// The digest of the chunk.
        chunk: Digest,
        /// The compressed pages of the chunk.
        frame: Bytes,
    },
}

impl Store {
    /// Returns segment `index` of an image with its locator, if both are in memory. Does not block.
    #[must_use]
    pub fn cached_segment(&self, root: &Root, index: u32) -> Option<Located> {
        let digest = *root.segment_digests().get(index as usize)?;
        let locator = self.locators.cached(&digest)?;
        Some(Located { digest, segment: self.manifests.cached_segment(root, index)?, locator })
    }

    /// Returns segment `index` of an image with its locator.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Reads two files, if they are not in memory. Reads the chunk index, if the locator is missing.
    pub fn segment(&self, root: &Root, index: u32) -> Result<Located, StoreError> {
        if let Some(located) = self.cached_segment(root, index) {
            return Ok(located);
        }
        let digest = root.segment_digests().get(index as usize).copied();
        let digest = digest
            .ok_or_else(|| StoreError::NotFound(format!("segment {index} of image {}", root.image())))?;
        let _one_at_a_time = self.locators.loading(&digest);
        if let Some(located) = self.cached_segment(root, index) {
            return Ok(located);
        }
        let read_segment = || self.manifests.segment(root, index);
        let (segment, bytes) = self.beside(read_segment, || self.locators.read(&digest));
        let segment = segment?;
        let locator = match self.locators.cached(&digest) {
            Some(locator) => locator,
            None => self.decode_locator(&digest, &segment, bytes?)?,
        };
        self.locators.keep(&digest, locator.clone());
        Ok(Located { digest, segment, locator })
    }

    /// Returns segment `index` of an image with its locator, for a reader of all segments: does not
    /// keep them in memory.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// As for [`Store::segment`].
    pub fn passing_segment(&self, root: &Root, index: u32) -> Result<Located, StoreError> {
        let segment = self.manifests.passing_segment(root, index)?;
        let digest = root.segment_digests()[index as usize];
        let locator = match self.locators.cached(&digest) {
            Some(locator) => locator,
            None => self.decode_locator(&digest, &segment, self.locators.read(&digest)?)?,
        };
        Ok(Located { digest, segment, locator })
    }

    /// Does two readings, at the same time if each is a request to a bucket.
    fn beside<A, B: Send>(&self, a: impl FnOnce() -> A, b: impl FnOnce() -> B + Send) -> (A, B) {
        if self.objects.has_locks() {
            return (a(), b());
        }
        std::thread::scope(|scope| {
            let b = scope.spawn(b);
            (a(), b.join().expect("a reading does not panic"))
        })
    }

    /// Returns a segment's locator from its encoding, or makes it if there is none, or a wrong one.
    fn decode_locator(
        &self,
        digest: &Digest,
        segment: &Segment,
        bytes: Option<Bytes>,
    ) -> Result<Arc<Locator>, StoreError> {
        match bytes.and_then(|bytes| Locator::decode(&bytes, digest, segment.chunks())) {
            Some(locator) => Ok(Arc::new(locator)),
            None => self.make_locator(digest, segment),
        }
    }

    /// Makes the locator of a segment from the chunk index, and writes it.
    fn make_locator(&self, digest: &Digest, segment: &Segment) -> Result<Arc<Locator>, StoreError> {
        let chunks: Vec<_> = segment.digests().collect();
        let places = self.packs.presence().places(&chunks)?;
        Ok(self.write_locator(digest, Locator::new(segment, &places)))
    }

    fn write_locator(&self, digest: &Digest, locator: Locator) -> Arc<Locator> {
        if let Err(error) = self.locators.write(digest, &locator) {
            // It is made again when it is needed again, as on a read-only store.
            tracing::debug!("the locator of segment {digest}: {}", chain(&error));
        }
        Arc::new(locator)
    }

    /// Returns the encoding of segment `index`. In a bucket, reads the segment's locator at the
    /// same time, because the first page fault of the client needs it.
    ///
    /// # Errors
    /// Returns the errors of [`Store::segment`].
    ///
    /// # Blocking
    /// Reads the segment if it is not in memory; in a bucket also the locator, under the same
    /// condition.
    pub fn read_segment(&self, root: &Root, index: u32) -> Result<Bytes, StoreError> {
        let read_segment = || self.manifests.segment(root, index);
        let digest = root.segment_digests().get(index as usize).filter(|_| !self.objects.has_locks());
        let Some(digest) = digest else { return read_segment().map(|segment| segment.encode()) };
        let _one_at_a_time = self.locators.loading(digest);
        if self.locators.cached(digest).is_some() {
            return read_segment().map(|segment| segment.encode());
        }
        let (segment, bytes) = self.beside(read_segment, || self.locators.read(digest));
        let segment = segment?;
        // [`Store::segment`] makes a missing locator.
        let locator =
            bytes.ok().flatten().and_then(|bytes| Locator::decode(&bytes, digest, segment.chunks()));
        if let Some(locator) = locator {
            self.locators.keep(digest, Arc::new(locator));
        }
        Ok(segment.encode())
    }

    /// Returns an image's chunk, if its frame is in memory; `None` also beyond the segment's last
    /// one. Does not block: see [`Store::load_chunk`].
    #[must_use]
    pub fn resident_chunk(&self, segment: &Located, place: u32) -> Option<StoredChunk> {
        match segment.segment.chunk(place)? {
            ChunkContent::Zero => Some(StoredChunk::Zero),
            ChunkContent::Data(chunk) => {
                let frame = self.packs.resident_frame(&segment.locator.place(place)?)?;
                Some(StoredChunk::Data { chunk, frame })
            }
        }
    }

    /// Returns an image's chunk, its frame from any pack with a good copy; `None` beyond the image's
    /// last chunk. With `check`, decodes the frame and compares it with the chunk's digest.
    ///
    /// # Errors
    /// Returns the errors of [`Store::segment`], [`StoreError::NotFound`] if no pack holds the
    /// chunk, or [`StoreError::Damaged`] if no pack has a good copy.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn load_chunk(
        &self,
        root: &Root,
        chunk: ChunkIndex,
        check: bool,
    ) -> Result<Option<StoredChunk>, StoreError> {
        if chunk.0 >= root.chunks() {
            return Ok(None);
        }
        let (index, place) = Root::segment_of(chunk);
        let segment = self.segment(root, u32::try_from(index).expect("bounded by the root"))?;
        Ok(match segment.segment.chunk(place) {
            None => None,
            Some(ChunkContent::Zero) => Some(StoredChunk::Zero),
            Some(ChunkContent::Data(chunk)) => {
                let frame = self.load_frame(&segment, place, &chunk, check)?;
                Some(StoredChunk::Data { chunk, frame })
            }
        })
    }

    fn load_frame(
        &self,
        segment: &Located,
        place: u32,
        chunk: &Digest,
        check: bool,
    ) -> Result<Bytes, StoreError> {
        let located = segment.locator.place(place).map(|place| self.packs.load(&place, chunk, check));
        if let Some(Ok(frame)) = located {
            return Ok(frame);
        }
        let (found, frame) = self.packs.find_frame(chunk, check)?;
        let Located { digest, segment, locator } = segment;
        let _one_at_a_time = self.locators.loading(digest);
        // Another thread may have corrected it meanwhile, or other places of it.
        let newest = self.locators.cached(digest).unwrap_or_else(|| locator.clone());
        if newest.place(place) == locator.place(place) {
            let locator = match located {
                // Most other chunks of the pack have new places, too.
                None | Some(Err(StoreError::NotFound(_))) => self.make_locator(digest, segment)?,
                Some(_) => self.write_locator(digest, newest.with(place, found)),
            };
            self.locators.keep(digest, locator);
        }
        Ok(frame)
    }

    /// Makes and writes the missing locators of an image from the chunk index.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Reads the image's segments, and the trailers of all packs that the index lacks.
    pub(crate) fn write_locators(&self, image: &Digest) -> Result<(), StoreError> {
        let root = self.manifests.read_root(image)?;
        for index in (0..).take(root.segment_digests().len()) {
            self.passing_segment(&root, index)?;
        }
        Ok(())
    }
}
