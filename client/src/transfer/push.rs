//! Sends files to a server as an image.
//!
//! The files' chunks pass four steps, batch by batch: read and hash them on all cores, ask the
//! server which are missing, compress these on all cores, upload packs. While one batch is
//! compressed, the server checks the next one, and the one after that is read. So all cores and the
//! connection are busy at once. Only missing chunks are compressed and sent. The last step commits
//! the manifest.

mod encoding;
mod reading;
mod snapshot;
mod sources;

use crate::remote::{Patience, Remote, RemoteError};
use encoding::{Encoded, Encoders, encode};
use postcopy_proto::buffers::Buffers;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Manifest, ManifestBuilder, ManifestError};
use postcopy_proto::pack::{MAX_PACK_CHUNK_BYTES, PackBuilder};
use postcopy_proto::page::ChunkSize;
use postcopy_proto::path::PathError;
use postcopy_proto::provenance::Labels;
use postcopy_proto::reference::TagReference;
use postcopy_proto::v1::commit_response::Outcome;
use postcopy_proto::v1::{self, commit_request, upload_pack_request};
use postcopy_proto::{MAX_FIND_MISSING, MAX_PART_BYTES};
use reading::{Chunk, NewChunk, Places, spawn_read};
use sources::{Source, SourceKind, collect};
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
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
    /// Chunk size of the image.
    pub chunk_size: ChunkSize,
    /// Compression level of zstd, 1 to 19.
    pub level: i32,
    /// Labels of the reference. The push adds those that the files of a Firecracker snapshot or
    /// CRIU's log give, unless their keys are here.
    pub labels: Labels,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self { chunk_size: ChunkSize::DEFAULT, level: 3, labels: Labels::default() }
    }
}

/// The result of a push. Bytes are plain ones unless a field says otherwise; `size = zero +
/// deduplicated + sent`.
#[derive(Clone, Copy, Debug)]
pub struct PushReport {
    /// Digest of the image.
    pub image: Digest,
    /// Bytes of all files together.
    pub size_bytes: u64,
    /// Bytes of chunks that hold only zeros.
    pub zero_bytes: u64,
    /// Bytes of chunks that the server had, or that occur more than once.
    pub deduplicated_bytes: u64,
    /// Bytes of chunks that were sent.
    pub sent_bytes: u64,
    /// Bytes of the packs with the sent chunks, compressed.
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

/// The reason why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The server failed, or sent a wrong answer.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A file could not be read.
    #[error("{path}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file changed while the push read it. What was read may be no state that the file ever had.
    #[error("{0} changed while it was read. Push it again when nothing writes to it")]
    Changed(PathBuf),
    /// A file that has content, although its size is 0.
    #[error(
        "{0} has content, although its size is 0: the kernel makes it up. Copy the file, and push the copy"
    )]
    NoSize(PathBuf),
    /// A path that is no file, directory or symbolic link.
    #[error("{0} is no file, directory or symbolic link")]
    Kind(PathBuf),
    /// A directory without any entries.
    #[error(
        "{0} is empty, so there is nothing to push. If a program should have filled it (criu dump), check its log and run it again"
    )]
    Empty(PathBuf),
    /// A path that an image cannot hold.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A chain of CRIU's incremental images that leads back to itself.
    #[error("{0}: the `parent` links of incremental images form a cycle")]
    Parents(PathBuf),
    /// A link `parent` beside CRIU's images that leads to something else.
    #[error(
        "{0} leads to a directory without CRIU's images, which is not stored. If the dump is not incremental, remove the link"
    )]
    NoParent(PathBuf),
    /// The entries do not form a valid manifest.
    #[error("the files do not form a valid image")]
    Manifest(#[from] ManifestError),
    /// The server lost chunks during each attempt.
    #[error(
        "the server lost chunks during each attempt of the push; run `postcopyd gc` with a longer --grace"
    )]
    Lost,
    /// The server has accepted the segments of the manifest, and lost them during each attempt.
    #[error(
        "server {server} asks for segments again that it has accepted. Run `postcopyd gc` with a longer --grace, or check the store with `postcopyd verify`"
    )]
    Segments {
        /// The server's address.
        server: String,
    },
    /// A worker panicked.
    #[error("a worker stopped: {0}")]
    Worker(String),
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
    for _ in 0..COMMITS {
        let entries = collect(path)?;
        let mut labels = options.labels.clone();
        snapshot::add_labels(&entries, &mut labels)?;
        let mut push = Push::new(remote.clone(), &options, &entries, Arc::clone(&on_progress));
        let manifest = push.entries(entries).await?;
        match commit(remote, reference, &labels, &manifest).await? {
            Ok(image) => return Ok(PushReport { image, elapsed: started.elapsed(), ..push.report }),
            Err(error) => lost = error,
        }
    }
    Err(lost)
}

struct Push {
    remote: Remote,
    chunk_size: ChunkSize,
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
    fn new(remote: Remote, options: &PushOptions, sources: &[Source], on_progress: OnProgress) -> Self {
        let size = |source: &Source| match source.kind {
            SourceKind::File { state, .. } => state.size_bytes,
            SourceKind::SymbolicLink | SourceKind::EmptyDirectory => 0,
        };
        Self {
            remote,
            chunk_size: options.chunk_size,
            report: PushReport {
                image: Digest::of(&[]),
                size_bytes: 0,
                zero_bytes: 0,
                deduplicated_bytes: 0,
                sent_bytes: 0,
                pack_bytes: 0,
                elapsed: Duration::ZERO,
            },
            total_bytes: sources.iter().map(size).sum(),
            on_progress,
            builder: ManifestBuilder::new(options.chunk_size),
            seen: HashSet::new(),
            encoders: Arc::new(Encoders { level: options.level, idle: Mutex::default() }),
            encoding: None,
            buffers: Vec::new(),
            pack_buffers: Buffers::new(UPLOADS + 1, PACK_BYTES),
            pack: PackBuilder::default(),
            pack_plain_bytes: 0,
            pack_chunk_bytes: 0,
            uploads: JoinSet::new(),
        }
    }

    /// Sends the missing chunks of the entries, and makes the manifest.
    async fn entries(&mut self, sources: Vec<Source>) -> Result<Manifest, PushError> {
        let mut places = Places { chunk_size: self.chunk_size, sources: sources.into_iter(), current: None };
        let mut reading = spawn_read(places.batch(&mut self.builder)?, Vec::new());
        loop {
            let batch = reading.await.map_err(worker)??;
            if batch.chunks.is_empty() {
                break;
            }
            for chunk in &batch.chunks {
                self.builder.chunk(chunk.content);
            }
            let buffer = self.buffers.pop().unwrap_or_default();
            reading = spawn_read(places.batch(&mut self.builder)?, buffer);
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
            match chunk.content {
                ChunkContent::Zero => self.report.zero_bytes += chunk.len as u64,
                ChunkContent::Data(digest) if self.seen.insert(digest) => {
                    new.push((digest, chunk.bytes.clone()));
                }
                ChunkContent::Data(_) => self.report.deduplicated_bytes += chunk.len as u64,
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

fn worker(error: tokio::task::JoinError) -> PushError {
    PushError::Worker(error.to_string())
}

async fn find_missing(remote: &Remote, digests: &[Digest]) -> Result<HashSet<Digest>, PushError> {
    let mut missing = HashSet::new();
    for part in digests.chunks(MAX_FIND_MISSING) {
        let request = v1::FindMissingRequest { chunk_digests: Digest::concat(part) };
        let ask = || {
            let (mut images, request) = (remote.images(), request.clone());
            async move { images.find_missing(request).await }
        };
        let response = remote.ask("find missing chunks", Patience::Short, ask).await?;
        let digests = Digest::list(&response.missing_chunk_digests);
        missing.extend(digests.map_err(|e| remote.address().wrong("list of missing chunks", e))?);
    }
    Ok(missing)
}

async fn upload(remote: Remote, pack: PackBuilder, buffers: Buffers) -> Result<u64, RemoteError> {
    let finished = tokio::task::spawn_blocking(move || {
        let bytes = buffers.lend(pack.finish());
        (Digest::of(&bytes), bytes)
    });
    let (digest, mut bytes) = finished.await.expect("finishing a pack does not panic");
    let size_bytes = bytes.len() as u64;
    let begin = v1::UploadPackBegin { digest: digest.into(), size_bytes };
    let mut parts = vec![upload_pack_request::Part::Begin(begin)];
    while !bytes.is_empty() {
        let part = bytes.split_to(bytes.len().min(MAX_PART_BYTES));
        parts.push(upload_pack_request::Part::Data(part));
    }
    let part = |part| v1::UploadPackRequest { part: Some(part) };
    let parts: Vec<_> = parts.into_iter().map(part).collect();
    let send = || {
        let (mut images, parts) = (remote.images(), parts.clone());
        async move { images.upload_pack(tokio_stream::iter(parts)).await }
    };
    remote.ask(&format!("upload of pack {digest}"), Patience::Long, send).await?;
    Ok(size_bytes)
}

/// Commits the manifest, and sends the segments that the server lacks. Returns the inner error if
/// the server lacks chunks, or loses segments each time, as beside a collector without a grace
/// time.
async fn commit(
    remote: &Remote,
    reference: &TagReference,
    labels: &Labels,
    manifest: &Manifest,
) -> Result<Result<Digest, PushError>, PushError> {
    let address = remote.address();
    for _ in 0..COMMITS {
        let begin = v1::CommitBegin {
            reference: reference.to_string(),
            root_bytes: manifest.root_bytes.len() as u64,
            labels: labels.into(),
        };
        let mut parts = vec![commit_request::Part::Begin(begin)];
        let mut root = manifest.root_bytes.clone();
        while !root.is_empty() {
            let part = root.split_to(root.len().min(MAX_PART_BYTES));
            parts.push(commit_request::Part::RootPart(part));
        }
        let part = |part| v1::CommitRequest { part: Some(part) };
        let parts: Vec<_> = parts.into_iter().map(part).collect();
        let send = || {
            let (mut images, parts) = (remote.images(), parts.clone());
            async move { images.commit(tokio_stream::iter(parts)).await }
        };
        let response = remote.ask(&format!("commit of {reference}"), Patience::Long, send).await?;
        let missing = match response.outcome {
            Some(Outcome::Committed(v1::Committed { image })) => {
                let image = Digest::try_from(&image[..]).map_err(|e| address.wrong("image digest", e))?;
                if image != manifest.root.image() {
                    let reason = format!("it is {image}, pushed was {}", manifest.root.image());
                    return Err(address.wrong("committed image", reason).into());
                }
                return Ok(Ok(image));
            }
            Some(Outcome::Missing(missing)) => missing,
            None => return Err(address.wrong("answer to the commit", "it is empty").into()),
        };
        let missing =
            Digest::list(&missing.segment_digests).map_err(|e| address.wrong("list of segments", e))?;
        let missing: HashSet<_> = missing.collect();
        if missing.is_empty() {
            return Ok(Err(PushError::Lost));
        }
        for bytes in manifest.segments.iter().filter(|bytes| missing.contains(&Digest::of(bytes))) {
            let request = v1::UploadSegmentRequest { segment: bytes.clone() };
            let send = || {
                let (mut images, request) = (remote.images(), request.clone());
                async move { images.upload_segment(request).await }
            };
            remote.ask("upload of a segment", Patience::Long, send).await?;
        }
    }
    Ok(Err(PushError::Segments { server: address.to_string() }))
}
