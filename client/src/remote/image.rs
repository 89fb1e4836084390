//! An image as a client knows it: the root, and the segments that have come so far.

use crate::remote::{Remote, RemoteError, ServerAddress};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, FileEntry, ManifestError, Root, Segment};
use postcopy_proto::page::{ChunkIndex, ChunkSize};
use postcopy_proto::reference::Reference;
use postcopy_proto::set_frame::Expected;
use std::sync::{Arc, OnceLock};

/// An image's manifest, filled in as segments arrive; each is checked against the root before it is kept.
#[derive(Debug)]
pub struct Image {
    root: Root,
    /// The regular files, in the manifest's order: a working set names them by their place here.
    files: Box<[FileEntry]>,
    segments: Box<[OnceLock<Segment>]>,
}

impl Image {
    /// The image of which `root` is the root; no segments yet.
    #[must_use]
    pub fn new(root: Root) -> Self {
        let segments = root.segment_digests().iter().map(|_| OnceLock::new()).collect();
        let files = root.files().map(|(_, file)| *file).collect();
        Self { root, files, segments }
    }

    /// Opens an image of a server's, with all of its manifest that the server has at hand.
    ///
    /// # Errors
    /// [`RemoteError`]: the server cannot be reached, does not have it, or sent something else.
    pub async fn open(address: &ServerAddress, reference: &Reference) -> Result<Arc<Self>, RemoteError> {
        Self::open_with(address, reference, true).await
    }

    /// The same; segments can also be left to be asked for when they are needed.
    pub(crate) async fn open_with(
        address: &ServerAddress,
        reference: &Reference,
        all_segments: bool,
    ) -> Result<Arc<Self>, RemoteError> {
        let remote = Remote::connect(address.clone()).await?;
        let (image, segments) = remote.open(reference, &[], all_segments).await?;
        let segments = segments.all_into(&image).await;
        if all_segments {
            segments?;
        }
        // What has come unasked and was wrong is asked for when it is needed.
        Ok(image)
    }

    /// The image's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.root.image()
    }

    /// The root of the manifest.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The regular file at `path`.
    #[must_use]
    pub fn file(&self, path: &[u8]) -> Option<FileEntry> {
        self.root.files().find(|(p, _)| p.as_bytes() == path).map(|(_, file)| *file)
    }

    /// The place of a file that has pages among the regular files.
    pub(crate) fn place_of(&self, file: &FileEntry) -> usize {
        // Empty ones begin with the same chunk as the next one, and come before it.
        self.files.partition_point(|other| other.first_chunk <= file.first_chunk) - 1
    }

    /// The regular files, in the manifest's order.
    pub(crate) fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// Takes segment `index` in, after checking it.
    ///
    /// # Errors
    /// [`ManifestError`] if the bytes are not that segment's; nothing is kept then.
    pub fn add_segment(&self, index: u32, bytes: &Bytes) -> Result<(), ManifestError> {
        let segment = self.root.check_segment(index, bytes)?;
        // If it was there already, it was the same: its digest is the root's.
        let _ = self.segments[index as usize].set(segment);
        Ok(())
    }

    /// Segment `index`, once it has come.
    #[must_use]
    pub fn segment(&self, index: u32) -> Option<&Segment> {
        self.segments.get(index as usize)?.get()
    }

    /// What a chunk holds.
    #[must_use]
    pub fn content(&self, chunk: ChunkIndex) -> Content {
        let (index, place) = Root::segment_of(chunk);
        let Ok(index) = u32::try_from(index) else { return Content::OutOfRange };
        match self.segments.get(index as usize).map(OnceLock::get) {
            None => Content::OutOfRange,
            Some(None) => Content::SegmentMissing(index),
            Some(Some(segment)) => match segment.chunk(place) {
                None => Content::OutOfRange,
                Some(ChunkContent::Zero) => Content::Zero,
                Some(ChunkContent::Data(digest)) => Content::Data(digest),
            },
        }
    }
}

impl Expected for Image {
    fn chunk_size(&self) -> ChunkSize {
        self.root.chunk_size()
    }

    fn file(&self, place: u32) -> Option<FileEntry> {
        self.files.get(place as usize).copied()
    }

    fn chunk(&self, chunk: ChunkIndex) -> Option<ChunkContent> {
        match self.content(chunk) {
            Content::Zero => Some(ChunkContent::Zero),
            Content::Data(digest) => Some(ChunkContent::Data(digest)),
            Content::SegmentMissing(_) | Content::OutOfRange => None,
        }
    }
}

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros.
    Zero,
    /// The bytes with this digest.
    Data(Digest),
    /// Its segment has not come yet.
    SegmentMissing(u32),
    /// The image has no such chunk.
    OutOfRange,
}

/// What a session is filled from.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// What the server has under this reference.
    Named(Reference),
    /// An image of the server's that was opened before ([`Image::open`]). The session begins without a word from the
    /// server; faults wait until it is there.
    Opened(Arc<Image>),
}

impl From<&Reference> for ImageSource {
    fn from(reference: &Reference) -> Self {
        Self::Named(reference.clone())
    }
}

impl From<Arc<Image>> for ImageSource {
    fn from(image: Arc<Image>) -> Self {
        Self::Opened(image)
    }
}
