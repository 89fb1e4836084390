//! An image as a client knows it: the root, and the segments that have arrived.

use crate::remote::{Remote, RemoteError, ServerAddress};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, EntryKind, FileEntry, ManifestError, Root, Segment};
use postcopy_proto::page::{ChunkIndex, ChunkSize};
use postcopy_proto::provenance::Provenance;
use postcopy_proto::reference::Reference;
use postcopy_proto::set_frame::Expected;
use std::sync::{Arc, OnceLock};

/// An image's manifest, which is filled in as segments arrive. Each segment is checked against the
/// root before it is kept.
#[derive(Debug)]
pub struct Image {
    root: Root,
    /// The regular files, in the manifest's order. A working set names files by their index here.
    files: Box<[FileEntry]>,
    segments: Box<[OnceLock<Segment>]>,
    provenance: Option<Provenance>,
}

impl Image {
    /// Makes an image of its root, without segments.
    #[must_use]
    pub fn new(root: Root) -> Self {
        let segments = root.segment_digests().iter().map(|_| OnceLock::new()).collect();
        let files = root.files().map(|(_, file)| *file).collect();
        Self { root, files, segments, provenance: None }
    }

    /// Notes where the reference comes from that the image was opened by.
    pub(crate) fn with_provenance(self, provenance: Option<Provenance>) -> Self {
        Self { provenance, ..self }
    }

    /// Returns where the reference comes from that the image was opened by; `None` if it was opened
    /// by its digest, or the server has an earlier version. The image's digest does not cover this,
    /// so it proves nothing.
    #[must_use]
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// Opens an image on a server, and fetches its manifest as far as the server has it at hand.
    ///
    /// # Errors
    /// [`RemoteError`]: the client cannot reach the server, the server does not have the image, or
    /// it sent wrong data.
    pub async fn open(address: &ServerAddress, reference: &Reference) -> Result<Arc<Self>, RemoteError> {
        Self::open_with(address, reference, true).await
    }

    /// Opens an image as [`Image::open`] does. Without `all_segments`, the pager requests missing
    /// segments when it needs them.
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
        // Without `all_segments`, an error is ignored, because the pager requests missing segments
        // later.
        Ok(image)
    }

    /// Returns the image's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.root.image()
    }

    /// Returns the root of the manifest.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Returns the regular file at `path`.
    #[must_use]
    pub fn file(&self, path: &[u8]) -> Option<FileEntry> {
        match self.root.entry(path)?.kind {
            EntryKind::File(file) => Some(file),
            EntryKind::SymbolicLink(_) | EntryKind::EmptyDirectory => None,
        }
    }

    /// Returns the index among the regular files of a file that has pages.
    pub(crate) fn place_of(&self, file: &FileEntry) -> usize {
        // An empty file has the same first chunk as the next file, and precedes it.
        self.files.partition_point(|other| other.first_chunk <= file.first_chunk) - 1
    }

    /// Returns the regular files, in the manifest's order.
    pub(crate) fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// Adds segment `index` after checking it.
    ///
    /// # Errors
    /// [`ManifestError`] if the bytes are not that segment's; then nothing is kept.
    pub fn add_segment(&self, index: u32, bytes: &Bytes) -> Result<(), ManifestError> {
        let segment = self.root.check_segment(index, bytes)?;
        // A segment that was added before is the same, because the root has its digest.
        let _ = self.segments[index as usize].set(segment);
        Ok(())
    }

    /// Returns segment `index` if it has arrived.
    #[must_use]
    pub fn segment(&self, index: u32) -> Option<&Segment> {
        self.segments.get(index as usize)?.get()
    }

    /// Returns the content of a chunk, as far as it is known.
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

/// The known content of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros in all bytes.
    Zero,
    /// The bytes with this digest.
    Data(Digest),
    /// Unknown, because this segment has not arrived.
    SegmentMissing(u32),
    /// None, because the image has no such chunk.
    OutOfRange,
}

/// The image that fills a session.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// The image that this reference stands for on the server.
    Named(Reference),
    /// An image of the server that was opened before ([`Image::open`]). The session starts without
    /// an answer of the server. Until the server can be reached, faults wait.
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
