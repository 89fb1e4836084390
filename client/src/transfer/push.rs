//! Sends files to a server as an image.
//!
//! The files' chunks pass four steps, batch by batch: read and hash them on all cores, ask the
//! server which are missing, compress these on all cores, upload packs. While one batch is
//! compressed, the server checks the next one, and the one after that is read. So all cores and the
//! connection are busy at once. Only missing chunks are compressed and sent. The last step commits
//! the manifest.
//!
//! Over a base ([`PushOptions::base`]), [`places`] takes the holes of a file as in the base, and
//! [`patching`] sends the changed pages of chunks. [`push_changes`] pushes changes without files.

mod changes;
mod encoding;
mod error;
mod extents;
mod patching;
mod places;
mod reading;
mod sending;
mod snapshot;
mod sources;

pub use changes::{ImageChanges, ReadChanged};
pub use error::PushError;

use crate::remote::{Image, Remote, RemoteError};
use changes::ChangedEntries;
use encoding::{Encoded, Encoders, encode};
use places::{Entries, Places};
use postcopy_proto::buffers::Buffers;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Manifest, ManifestBuilder};
use postcopy_proto::pack::{MAX_PACK_CHUNK_BYTES, PackBuilder};
use postcopy_proto::page::ChunkSize;
use postcopy_proto::provenance::Labels;
use postcopy_proto::reference::{Reference, TagReference};
use reading::{Chunk, Found, NewChunk, spawn_read};
use sending::{commit, find_missing, upload};
use sources::{Source, SourceKind, collect};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

/// Length at which a pack is closed. It is large enough for few files and small enough for a
/// server's memory. It also keeps the rest short that the server verifies after the last upload.
const PACK_BYTES: usize = 16 << 20;
/// Most uploads of packs at a time.
const UPLOADS: usize = 3;
/// Most attempts of a commit whose chunks were collected as garbage meanwhile.
const COMMITS: usize = 4;

/// The options of a push.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// Chunk size of the image. `None`: that of the base, or else 64 KiB.
    pub chunk_size: Option<ChunkSize>,
    /// Compression level of zstd, 1 to 19.
    pub level: i32,
    /// Labels of the reference. The push adds those that the files of a Firecracker snapshot or
    /// CRIU's log give, unless their keys are here.
    pub labels: Labels,
    /// An image of the server. In each file whose path it has, holes then stand for the bytes of
    /// its file, and not for zeros, as in a diff snapshot of Firecracker. The push reads neither
    /// holes nor this image's pages.
    pub base: Option<Reference>,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self { chunk_size: None, level: 3, labels: Labels::default(), base: None }
    }
}

/// The result of a push. Bytes are plain ones unless a field says otherwise; `size = zero + base +
/// deduplicated + sent`.
#[derive(Clone, Copy, Debug)]
pub struct PushReport {
    /// Digest of the image.
    pub image: Digest,
    /// Digest of the base.
    pub base: Option<Digest>,
    /// Bytes of all files together.
    pub size_bytes: u64,
    /// Bytes of chunks that hold only zeros.
    pub zero_bytes: u64,
    /// Bytes that are as in the base, and were not read.
    pub base_bytes: u64,
    /// Bytes of chunks that the server had, or that occur more than once.
    pub deduplicated_bytes: u64,
    /// Bytes of chunks that were sent, and of the changed pages of chunks of the base.
    pub sent_bytes: u64,
    /// Bytes of the packs and patches that were sent, compressed.
    pub pack_bytes: u64,
    /// Time from the call to the commit.
    pub elapsed: Duration,
}

impl PushReport {
    /// Returns the plain bytes for each compressed byte of the sent chunks.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn ratio(&self) -> f64 {
        if self.pack_bytes == 0 { 1.0 } else { self.sent_bytes as f64 / self.pack_bytes as f64 }
    }
}

/// The progress callback. Its arguments are the bytes done so far and all bytes.
pub type OnProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// Pushes the file or the directory tree at `path` as `reference`.
///
/// Keeps symbolic links, empty directories and the executable bit, but no owners and times. Stores
/// a single file under its own name. In a directory of CRIU's images, follows the link `parent` and
/// stores the images in its target (*.img) as the directory `parent`, unless another user made the
/// link to a directory that is not theirs. Follows no other link, also if another user changes the
/// tree meanwhile.
///
/// # Errors
/// Returns [`PushError`]; the reference is then unchanged.
pub async fn push(
    remote: &Remote,
    path: &Path,
    reference: &TagReference,
    options: PushOptions,
    on_progress: OnProgress,
) -> Result<PushReport, PushError> {
    let (started, mut lost) = (Instant::now(), PushError::Lost);
    // A tag may move between two attempts.
    let mut base_reference = options.base.clone();
    for _ in 0..COMMITS {
        let sources = collect(path)?;
        let mut labels = options.labels.clone();
        snapshot::add_labels(&sources, &mut labels)?;
        let base = match &mut base_reference {
            None => None,
            Some(reference) => {
                let base = open_base(remote, reference).await?;
                if let Reference::Tag(TagReference { name, .. }) = reference {
                    *reference = Reference::Digest { name: name.clone(), image: base.digest() };
                }
                Some(base)
            }
        };
        let size_bytes = size(&sources);
        let push = Push::new(remote.clone(), &options, base, size_bytes, Arc::clone(&on_progress))?;
        match push.once(Entries::Files(sources.into_iter()), reference, &labels).await? {
            Ok(report) => return Ok(PushReport { elapsed: started.elapsed(), ..report }),
            Err(error) => lost = error,
        }
    }
    Err(lost)
}

/// Pushes the image with this digest, with these changes, as `reference`. Reads only what has
/// changed. The base of the options is ignored, because the image is the base.
///
/// # Errors
/// Returns [`PushError`]; the reference is then unchanged. [`PushError::Changes`]: the changes name
/// a file that the image does not have, or bytes beyond its end.
///
/// # Examples
/// The changes of a file that a session has mapped, while nothing writes to it. The session tracks
/// writes ([`crate::Options::track_writes`]):
///
/// ```no_run
/// use postcopy::push::{self, ImageChanges, PushOptions};
/// use postcopy::{Region, Remote, Session};
/// use std::{io, sync::Arc};
///
/// async fn push_memory(
///     remote: &Remote,
///     session: &Session,
///     memory: &Arc<Region>,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let changed = memory.changes()?;
///     let region = Arc::clone(memory);
///     let read = move |_path: &_, offset: u64, buffer: &mut [u8]| {
///         region.read_at(offset.try_into().unwrap(), buffer).map_err(io::Error::other)
///     };
///     let mut changes = ImageChanges::new(Arc::new(read));
///     for bytes in changed.written.into_iter().chain(changed.removed) {
///         let end = bytes.end.min(memory.len()); // the last page may end beyond the file
///         changes.add(b"mem"[..].try_into()?, bytes.start as u64..end as u64);
///     }
///     let (image, reference) = (session.image().digest(), "app:v2".parse()?);
///     let options = PushOptions::default();
///     let progress = Arc::new(|_, _| ());
///     push::push_changes(remote, &image, &changes, &reference, options, progress).await?;
///     Ok(())
/// }
/// ```
pub async fn push_changes(
    remote: &Remote,
    image: &Digest,
    changes: &ImageChanges,
    reference: &TagReference,
    options: PushOptions,
    on_progress: OnProgress,
) -> Result<PushReport, PushError> {
    let base = Reference::Digest { name: reference.name.clone(), image: *image };
    let (started, mut lost) = (Instant::now(), PushError::Lost);
    for _ in 0..COMMITS {
        let base = open_base(remote, &base).await?;
        let entries = Entries::Changed(ChangedEntries::new(&base, changes)?);
        let size_bytes = base.root().size_bytes();
        let push = Push::new(remote.clone(), &options, Some(base), size_bytes, Arc::clone(&on_progress))?;
        match push.once(entries, reference, &options.labels).await? {
            Ok(report) => return Ok(PushReport { elapsed: started.elapsed(), ..report }),
            Err(error) => lost = error,
        }
    }
    Err(lost)
}

/// Fetches the whole manifest of a base.
async fn open_base(remote: &Remote, base: &Reference) -> Result<Arc<Image>, RemoteError> {
    let (image, segments) = remote.open(base, &[], true).await?;
    segments.all_into(&image).await?;
    Ok(image)
}

fn size(sources: &[Source]) -> u64 {
    let size = |source: &Source| match source.kind {
        SourceKind::File { state, .. } => state.size_bytes,
        SourceKind::SymbolicLink | SourceKind::EmptyDirectory => 0,
    };
    sources.iter().map(size).sum()
}

struct Push {
    remote: Remote,
    chunk_size: ChunkSize,
    base: Option<Arc<Image>>,
    report: PushReport,
    total_bytes: u64,
    on_progress: OnProgress,
    builder: ManifestBuilder,
    seen: HashSet<Digest>,
    encoders: Arc<Encoders>,
    /// The batch whose chunks are being compressed.
    encoding: Option<JoinHandle<Encoded>>,
    /// Free buffers of finished batches.
    buffers: Vec<Vec<u8>>,
    pack_buffers: Buffers,
    pack: PackBuilder,
    pack_plain_bytes: u64,
    /// Bytes of the chunks in the pack, zeros included.
    pack_chunk_bytes: u64,
    uploads: JoinSet<Result<u64, RemoteError>>,
}

impl Push {
    fn new(
        remote: Remote,
        options: &PushOptions,
        base: Option<Arc<Image>>,
        total_bytes: u64,
        on_progress: OnProgress,
    ) -> Result<Self, PushError> {
        let chunk_size = chunk_size(options, base.as_deref())?;
        Ok(Self {
            remote,
            chunk_size,
            report: PushReport {
                image: Digest::of(&[]),
                base: base.as_deref().map(Image::digest),
                size_bytes: 0,
                zero_bytes: 0,
                base_bytes: 0,
                deduplicated_bytes: 0,
                sent_bytes: 0,
                pack_bytes: 0,
                elapsed: Duration::ZERO,
            },
            base,
            total_bytes,
            on_progress,
            builder: ManifestBuilder::new(chunk_size),
            seen: HashSet::new(),
            encoders: Arc::new(Encoders::new(options.level)),
            encoding: None,
            buffers: Vec::new(),
            pack_buffers: Buffers::new(UPLOADS + 1, PACK_BYTES),
            pack: PackBuilder::default(),
            pack_plain_bytes: 0,
            pack_chunk_bytes: 0,
            uploads: JoinSet::new(),
        })
    }

    /// Sends what is missing, and commits. Returns the inner error if the server has lost something
    /// meanwhile.
    async fn once(
        mut self,
        entries: Entries,
        reference: &TagReference,
        labels: &Labels,
    ) -> Result<Result<PushReport, PushError>, PushError> {
        let manifest = self.entries(entries).await?;
        let committed = commit(&self.remote, reference, labels, &manifest).await?;
        Ok(committed.map(|image| PushReport { image, ..self.report }))
    }

    /// Sends the missing chunks of the entries, and makes the manifest.
    async fn entries(&mut self, entries: Entries) -> Result<Manifest, PushError> {
        let mut places =
            Places { chunk_size: self.chunk_size, base: self.base.clone(), entries, current: None };
        let mut reading = spawn_read(places.batch(&mut self.builder)?, Vec::new(), &self.encoders);
        loop {
            let batch = reading.await.map_err(worker)??;
            if batch.chunks.is_empty() {
                break;
            }
            let buffer = self.buffers.pop().unwrap_or_default();
            reading = spawn_read(places.batch(&mut self.builder)?, buffer, &self.encoders);
            let (batch, changed) = patching::patch(&self.remote, batch).await?;
            let mut changed = changed.into_iter();
            for chunk in &batch.chunks {
                self.builder.chunk(match chunk.found {
                    Found::Read(content) | Found::Known(content) => content,
                    Found::Changed(_) => changed.next().expect("one for each changed chunk"),
                });
            }
            let new = self.missing_of(&batch.chunks).await?;
            let encoders = Arc::clone(&self.encoders);
            let encode = tokio::task::spawn_blocking(move || encode(batch, new, &encoders));
            if let Some(last) = self.encoding.replace(encode) {
                self.take_encoded(last.await.map_err(worker)?).await?;
            }
        }
        if let Some(last) = self.encoding.take() {
            self.take_encoded(last.await.map_err(worker)?).await?;
        }
        self.close_pack().await?;
        while let Some(upload) = self.uploads.join_next().await {
            self.uploaded(upload)?;
        }
        let builder = std::mem::replace(&mut self.builder, ManifestBuilder::new(self.chunk_size));
        Ok(builder.finish()?)
    }

    /// Returns the chunks of a batch that the server lacks.
    async fn missing_of(&mut self, chunks: &[Chunk]) -> Result<Vec<NewChunk>, PushError> {
        let mut new = Vec::new();
        for chunk in chunks {
            let len = chunk.len as u64;
            match &chunk.found {
                Found::Read(ChunkContent::Zero) | Found::Known(ChunkContent::Zero) => {
                    self.report.zero_bytes += len;
                }
                Found::Read(ChunkContent::Data(digest)) if self.seen.insert(*digest) => {
                    new.push((*digest, chunk.bytes.clone()));
                }
                Found::Read(ChunkContent::Data(_)) => self.report.deduplicated_bytes += len,
                Found::Known(ChunkContent::Data(_)) => self.report.base_bytes += len,
                Found::Changed(changed) => {
                    let sent = chunk.bytes.len() as u64;
                    self.report.sent_bytes += sent;
                    self.report.base_bytes += len - sent;
                    self.report.pack_bytes += changed.patch.len() as u64;
                }
            }
        }
        let digests: Vec<_> = new.iter().map(|(digest, _)| *digest).collect();
        let missing = find_missing(&self.remote, &digests).await?;
        new.retain(|(digest, range)| {
            let is_missing = missing.contains(digest);
            self.report.deduplicated_bytes += if is_missing { 0 } else { range.len() as u64 };
            is_missing
        });
        Ok(new)
    }

    /// Adds a batch's frames to packs.
    async fn take_encoded(&mut self, encoded: Encoded) -> Result<(), PushError> {
        let Encoded { frames, batch } = encoded;
        for (digest, plain_bytes, frame) in frames {
            let chunk_bytes = u64::from(self.chunk_size.bytes_u32());
            let is_too_long = self.pack_chunk_bytes + chunk_bytes > MAX_PACK_CHUNK_BYTES;
            if is_too_long || !self.pack.fits(frame.len(), PACK_BYTES) {
                self.close_pack().await?;
            }
            self.pack_chunk_bytes += chunk_bytes;
            self.pack.push(digest, &frame);
            self.pack_plain_bytes += plain_bytes;
        }
        self.report.size_bytes += batch.chunks.iter().map(|chunk| chunk.len as u64).sum::<u64>();
        (self.on_progress)(self.report.size_bytes, self.total_bytes);
        self.buffers.push(batch.bytes);
        Ok(())
    }

    async fn close_pack(&mut self) -> Result<(), PushError> {
        if self.pack.is_empty() {
            return Ok(());
        }
        while self.uploads.len() >= UPLOADS {
            if let Some(upload) = self.uploads.join_next().await {
                self.uploaded(upload)?;
            }
        }
        let next = PackBuilder::in_buffer(self.pack_buffers.take(PACK_BYTES));
        let pack = std::mem::replace(&mut self.pack, next);
        self.report.sent_bytes += std::mem::take(&mut self.pack_plain_bytes);
        self.pack_chunk_bytes = 0;
        self.uploads.spawn(upload(self.remote.clone(), pack, self.pack_buffers.clone()));
        Ok(())
    }

    fn uploaded(
        &mut self,
        upload: Result<Result<u64, RemoteError>, tokio::task::JoinError>,
    ) -> Result<(), PushError> {
        self.report.pack_bytes += upload.map_err(worker)??;
        Ok(())
    }
}

/// Returns the chunk size of a push.
fn chunk_size(options: &PushOptions, base: Option<&Image>) -> Result<ChunkSize, PushError> {
    match (options.chunk_size, base.map(|base| base.root().chunk_size())) {
        (Some(wanted), Some(base)) if wanted != base => Err(PushError::BaseChunkSize { base, wanted }),
        (_, Some(base)) => Ok(base),
        (wanted, None) => Ok(wanted.unwrap_or_default()),
    }
}

fn worker(error: tokio::task::JoinError) -> PushError {
    PushError::Worker(error.to_string())
}
