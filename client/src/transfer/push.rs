//! Sends files to a server as an image.
//!
//! The files' chunks pass four steps, batch by batch: read and hash them on all cores, ask the
//! server which are missing, compress these on all cores, upload packs. While one batch is
//! compressed, the server checks the next one, and the one after that is read. So all cores and the
//! connection are busy at once. Only missing chunks are compressed and sent. The last step commits
//! the manifest.

use crate::remote::{Remote, RemoteError};
use crate::transfer::beneath::{Directory, FileId};
use crate::transfer::criu;
use postcopy_proto::buffers::Buffers;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameEncoder;
use postcopy_proto::manifest::{ChunkContent, Manifest, ManifestBuilder, ManifestError};
use postcopy_proto::pack::PackBuilder;
use postcopy_proto::page::{ChunkSize, is_zero};
use postcopy_proto::path::{ImagePath, PathError};
use postcopy_proto::reference::TagReference;
use postcopy_proto::v1::commit_response::Outcome;
use postcopy_proto::v1::{self, commit_request, upload_pack_request};
use postcopy_proto::{MAX_FIND_MISSING, MAX_PART_BYTES};
use rayon::prelude::*;
use rustix::fs::FileType;
use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

/// Plain bytes of a batch, which is read, hashed and compressed together. Three batches are in
/// memory at a time.
const BATCH_BYTES: usize = 16 << 20;
/// Most files of a batch. Three batches hold their files open at most, below the usual limit of
/// 1,024.
const BATCH_FILES: usize = 128;
/// Length at which a pack is closed. It is large enough for few files and small enough for a
/// server's memory. It also keeps the rest short that the server verifies after the last upload.
const PACK_BYTES: usize = 16 << 20;
/// Most uploads of packs at a time.
const UPLOADS: usize = 3;
/// Most attempts of a commit whose chunks were collected as garbage meanwhile.
const COMMITS: usize = 4;
/// Length at which a path of `parent` links counts as a loop.
const MAX_PATH_BYTES: usize = 1024;

/// The options of a push.
#[derive(Clone, Copy, Debug)]
pub struct PushOptions {
    /// Chunk size of the image.
    pub chunk_size: ChunkSize,
    /// Compression level of zstd, 1 to 19.
    pub level: i32,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self { chunk_size: ChunkSize::DEFAULT, level: 3 }
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
    /// A file became shorter while the push read it.
    #[error("{0} changed while it was read")]
    Changed(PathBuf),
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
    let started = Instant::now();
    for _ in 0..COMMITS {
        let entries = collect(path)?;
        let mut push = Push::new(remote.clone(), options, &entries, Arc::clone(&on_progress));
        let manifest = push.entries(entries).await?;
        if let Some(image) = commit(remote, reference, &manifest).await? {
            return Ok(PushReport { image, elapsed: started.elapsed(), ..push.report });
        }
    }
    Err(PushError::Lost)
}

/// An entry to push: its path in the image, and its path on this host.
struct Source {
    path: ImagePath,
    root: Arc<Root>,
    /// The path below the root.
    below: PathBuf,
    kind: SourceKind,
}

/// A directory that a push has entered, and its path.
struct Root {
    directory: Directory,
    path: PathBuf,
}

enum SourceKind {
    File { id: FileId, size_bytes: u64, executable: bool },
    SymbolicLink,
    EmptyDirectory,
}

impl Source {
    /// Returns the path on this host, for messages.
    fn from(&self) -> PathBuf {
        self.root.path.join(&self.below)
    }
}

impl SourceKind {
    fn file(metadata: &Metadata) -> Self {
        Self::File {
            id: FileId::of(metadata),
            size_bytes: metadata.len(),
            executable: metadata.mode() & 0o100 != 0,
        }
    }
}

impl Root {
    fn open(path: &Path) -> Result<Arc<Self>, PushError> {
        let directory = Directory::open(path).map_err(file_error(path))?;
        Ok(Arc::new(Self { directory, path: path.to_owned() }))
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> PushError {
    let path = path.to_owned();
    move |source| PushError::File { path, source }
}

/// Returns the entries to push, in bytewise order of path.
fn collect(root: &Path) -> Result<Vec<Source>, PushError> {
    let metadata = root.metadata().map_err(file_error(root))?;
    if metadata.is_file() {
        let path = root.canonicalize().map_err(file_error(root))?;
        let name = path.file_name().unwrap_or_default();
        let source = Source {
            path: ImagePath::try_from(name.as_bytes())?,
            root: Root::open(path.parent().unwrap_or(&path))?,
            below: name.into(),
            kind: SourceKind::file(&metadata),
        };
        return Ok(vec![source]);
    }
    if !metadata.is_dir() {
        return Err(PushError::Kind(root.to_owned()));
    }
    let mut sources = Vec::new();
    collect_below(&Root::open(root)?, &mut sources)?;
    if sources.is_empty() {
        return Err(PushError::Empty(root.to_owned()));
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

/// Adds the entries below the directory to push.
fn collect_below(root: &Arc<Root>, sources: &mut Vec<Source>) -> Result<(), PushError> {
    for entry in walkdir::WalkDir::new(&root.path).min_depth(1).follow_root_links(true) {
        let entry = entry.map_err(|e| walk_error(&root.path, e))?;
        let from = entry.path();
        let metadata = entry.metadata().map_err(|e| walk_error(&root.path, e))?;
        let below = from.strip_prefix(&root.path).expect("walkdir stays below its root");
        if metadata.is_symlink() && is_criu_parent(root, below) {
            let holder = below.parent().unwrap_or(Path::new(""));
            let holder = root.directory.directory(holder).map_err(file_error(from))?;
            collect_parent(&holder, from, below.as_os_str().as_bytes(), sources)?;
            continue;
        }
        let kind = if metadata.is_file() {
            SourceKind::file(&metadata)
        } else if metadata.is_symlink() {
            SourceKind::SymbolicLink
        } else if !metadata.is_dir() {
            return Err(PushError::Kind(from.to_owned()));
        } else if from.read_dir().map_err(file_error(from))?.next().is_none() {
            SourceKind::EmptyDirectory
        } else {
            continue;
        };
        let path = ImagePath::try_from(below.as_os_str().as_bytes())?;
        sources.push(Source { path, root: Arc::clone(root), below: below.to_owned(), kind });
    }
    Ok(())
}

/// Returns the error of a walk below `root`, with the path that it concerns.
fn walk_error(root: &Path, error: walkdir::Error) -> PushError {
    let path = error.path().unwrap_or(root).to_owned();
    // walkdir's other error is a loop of links, and its own text would repeat the path.
    let source = error.into_io_error().unwrap_or_else(|| rustix::io::Errno::LOOP.into());
    PushError::File { path, source }
}

/// Returns true for the link from CRIU's incremental images to their parents, which the push
/// includes.
fn is_criu_parent(root: &Root, link: &Path) -> bool {
    let inventory = || root.directory.file(&link.with_file_name("inventory.img"));
    link.file_name().is_some_and(|name| name == "parent")
        && inventory().is_ok_and(|file| criu::is_image(&file))
}

/// Adds the images in the directory that the link `parent` in `holder` leads to, and in its
/// parents, as the directory `path`; `link` is the path of the link. Other files of these
/// directories are not CRIU's: whoever made the link must not choose what the user stores.
fn collect_parent(
    holder: &Directory,
    link: &Path,
    path: &[u8],
    sources: &mut Vec<Source>,
) -> Result<(), PushError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(PushError::Parents(link.to_owned()));
    }
    let directory = holder.follow("parent").map_err(file_error(link))?;
    let root = Arc::new(Root { directory, path: link.to_owned() });
    let (mut has_images, mut has_parent) = (false, false);
    for name in root.directory.names() {
        let name = name.map_err(file_error(link))?;
        let from = link.join(&name);
        has_parent |= name == "parent";
        let kind = root.directory.kind_of(&name).map_err(file_error(&from))?;
        if !name.as_bytes().ends_with(b".img") || kind != FileType::RegularFile {
            continue;
        }
        let file = root.directory.file(Path::new(&name)).map_err(file_error(&from))?;
        has_images |= criu::is_image(&file);
        let path = ImagePath::try_from(&[path, b"/", name.as_bytes()].concat()[..])?;
        let kind = SourceKind::file(&file.metadata().map_err(file_error(&from))?);
        sources.push(Source { path, root: Arc::clone(&root), below: name.into(), kind });
    }
    if !has_images {
        return Err(PushError::NoParent(link.to_owned()));
    }
    if has_parent {
        collect_parent(&root.directory, &link.join("parent"), &[path, b"/parent"].concat(), sources)?;
    }
    Ok(())
}

/// A batch of chunks that were read together.
struct Batch {
    chunks: Vec<Chunk>,
    /// The plain bytes of all chunks except holes, one after another. Batches reuse the buffer,
    /// because fresh memory costs more than reading into it.
    bytes: Vec<u8>,
}

/// A chunk that has been read.
struct Chunk {
    content: ChunkContent,
    len: usize,
    /// The chunk's place in the bytes of the batch; empty for a hole.
    bytes: Range<usize>,
}

/// A chunk to send: its digest, and its place in the bytes of the batch.
type NewChunk = (Digest, Range<usize>);

/// The place of a chunk in a file.
struct Place {
    file: Arc<(File, PathBuf)>,
    offset: u64,
    len: usize,
    /// True for a hole of the file: the chunk is zeros, and is not read.
    hole: bool,
}

struct Push {
    remote: Remote,
    options: PushOptions,
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
    uploads: JoinSet<Result<u64, RemoteError>>,
}

impl Push {
    fn new(remote: Remote, options: PushOptions, sources: &[Source], on_progress: OnProgress) -> Self {
        let size = |source: &Source| match source.kind {
            SourceKind::File { size_bytes, .. } => size_bytes,
            SourceKind::SymbolicLink | SourceKind::EmptyDirectory => 0,
        };
        Self {
            remote,
            options,
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
            uploads: JoinSet::new(),
        }
    }

    /// Sends the missing chunks of the entries, and makes the manifest.
    async fn entries(&mut self, sources: Vec<Source>) -> Result<Manifest, PushError> {
        let mut places =
            Places { chunk_size: self.options.chunk_size, sources: sources.into_iter(), current: None };
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
        let builder = std::mem::replace(&mut self.builder, ManifestBuilder::new(self.options.chunk_size));
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
            if !self.pack.fits(frame.len(), PACK_BYTES) {
                self.close_pack().await?;
            }
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

/// The places of the chunks of all files, in order.
struct Places {
    chunk_size: ChunkSize,
    sources: std::vec::IntoIter<Source>,
    current: Option<OpenFile>,
}

struct OpenFile {
    file: Arc<(File, PathBuf)>,
    size_bytes: u64,
    next: u64,
    /// The extent of data that was found last.
    data: Range<u64>,
}

impl Places {
    /// Returns the next chunks, at most a batch, and adds the entries that they belong to.
    fn batch(&mut self, builder: &mut ManifestBuilder) -> Result<Vec<Place>, PushError> {
        let (mut places, mut data_bytes, mut files) = (Vec::new(), 0, 0);
        // Holes cost no reading, but the second bound covers them, too.
        while data_bytes < BATCH_BYTES && places.len() < MAX_FIND_MISSING {
            let Some(file) = &mut self.current else {
                if files >= BATCH_FILES && !places.is_empty() {
                    break;
                }
                let Some(source) = self.sources.next() else { break };
                self.current = open(&source, builder)?;
                files += usize::from(self.current.is_some());
                continue;
            };
            let Some(place) = file.next_place(self.chunk_size) else {
                self.current = None;
                continue;
            };
            data_bytes += if place.hole { 0 } else { place.len };
            places.push(place);
        }
        Ok(places)
    }
}

fn open(source: &Source, builder: &mut ManifestBuilder) -> Result<Option<OpenFile>, PushError> {
    let directory = &source.root.directory;
    let error = |e| file_error(&source.from())(e);
    match source.kind {
        SourceKind::EmptyDirectory => builder.empty_directory(&source.path),
        SourceKind::SymbolicLink => {
            builder.symbolic_link(&source.path, &directory.link(&source.below).map_err(error)?);
        }
        SourceKind::File { id, size_bytes, executable } => {
            builder.file(&source.path, size_bytes, executable);
            let file = directory.file(&source.below).map_err(error)?;
            if FileId::of(&file.metadata().map_err(error)?) != id {
                return Err(PushError::Changed(source.from()));
            }
            let file = Arc::new((file, source.from()));
            return Ok(Some(OpenFile { file, size_bytes, next: 0, data: 0..0 }));
        }
    }
    Ok(None)
}

impl OpenFile {
    fn next_place(&mut self, chunk_size: ChunkSize) -> Option<Place> {
        let offset = self.next;
        if offset >= self.size_bytes {
            return None;
        }
        let len = chunk_size.chunk_len(self.size_bytes, offset / chunk_size.bytes() as u64);
        self.next += len as u64;
        if self.data.end <= offset {
            self.data = self.data_after(offset);
        }
        let hole = self.data.start >= self.next;
        Some(Place { file: Arc::clone(&self.file), offset, len, hole })
    }

    /// Returns the next extent of data; the rest of the file if the file system cannot tell.
    fn data_after(&self, offset: u64) -> Range<u64> {
        use rustix::fs::{SeekFrom, seek};
        match seek(&self.file.0, SeekFrom::Data(offset)) {
            Ok(start) => start..seek(&self.file.0, SeekFrom::Hole(start)).unwrap_or(u64::MAX).max(start + 1),
            // ENXIO: no data up to the end. The file may have been cut; reading its last byte shows
            // that.
            Err(rustix::io::Errno::NXIO) => self.size_bytes - 1..u64::MAX,
            Err(_) => offset..u64::MAX,
        }
    }
}

fn worker(error: tokio::task::JoinError) -> PushError {
    PushError::Worker(error.to_string())
}

fn spawn_read(places: Vec<Place>, buffer: Vec<u8>) -> JoinHandle<Result<Batch, PushError>> {
    tokio::task::spawn_blocking(move || read_batch(&places, buffer))
}

fn read_batch(places: &[Place], mut buffer: Vec<u8>) -> Result<Batch, PushError> {
    let bytes_of = |place: &Place| if place.hole { 0 } else { place.len };
    buffer.resize(places.iter().map(bytes_of).sum(), 0);
    let (mut rest, mut end) = (&mut buffer[..], 0);
    let mut parts = Vec::with_capacity(places.len());
    for place in places {
        let (part, after) = rest.split_at_mut(bytes_of(place));
        rest = after;
        let start = end;
        end += part.len();
        parts.push((place, part, start..end));
    }
    let read = |(place, part, bytes)| read(place, part, bytes);
    let chunks = parts.into_par_iter().map(read).collect::<Result<_, _>>()?;
    Ok(Batch { chunks, bytes: buffer })
}

/// Reads a chunk into `buffer`, which is the range `bytes` of the batch.
fn read(place: &Place, buffer: &mut [u8], bytes: Range<usize>) -> Result<Chunk, PushError> {
    let (file, path) = &*place.file;
    if !place.hole {
        file.read_exact_at(buffer, place.offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => PushError::Changed(path.clone()),
            _ => PushError::File { path: path.clone(), source },
        })?;
    }
    let zero = place.hole || is_zero(buffer);
    let content = if zero { ChunkContent::Zero } else { ChunkContent::Data(Digest::of(buffer)) };
    Ok(Chunk { content, len: place.len, bytes })
}

/// Idle compressors. Making one costs as much as compressing several chunks.
struct Encoders {
    level: i32,
    /// Locked only to take or to return an encoder.
    idle: Mutex<Vec<FrameEncoder>>,
}

/// An encoder that returns to the idle ones when it is dropped.
struct Borrowed<'a>(&'a Encoders, Option<FrameEncoder>);

impl Encoders {
    fn borrow(&self) -> Borrowed<'_> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Borrowed(self, Some(idle.unwrap_or_else(|| FrameEncoder::new(self.level))))
    }
}

impl Borrowed<'_> {
    fn encode(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        if let Some(encoder) = &mut self.1 {
            encoder.encode(plain, &mut frame);
        }
        frame
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).extend(self.1.take());
    }
}

/// A batch, and the frames of its missing chunks: digest, plain length, frame.
struct Encoded {
    frames: Vec<(Digest, u64, Vec<u8>)>,
    batch: Batch,
}

fn encode(batch: Batch, chunks: Vec<NewChunk>, encoders: &Encoders) -> Encoded {
    let frame = |encoder: &mut Borrowed<'_>, (digest, range): NewChunk| {
        let plain_bytes = range.len() as u64;
        (digest, plain_bytes, encoder.encode(&batch.bytes[range]))
    };
    let frames = chunks.into_par_iter().map_init(|| encoders.borrow(), frame).collect();
    Encoded { frames, batch }
}

async fn find_missing(remote: &Remote, digests: &[Digest]) -> Result<HashSet<Digest>, PushError> {
    let mut missing = HashSet::new();
    for part in digests.chunks(MAX_FIND_MISSING) {
        let request = v1::FindMissingRequest { chunk_digests: Digest::concat(part) };
        let response = remote.images().find_missing(request).await;
        let response = response.map_err(remote.address().status("find missing chunks"))?.into_inner();
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
    let parts = parts.into_iter().map(|part| v1::UploadPackRequest { part: Some(part) });
    let sent = remote.images().upload_pack(tokio_stream::iter(parts)).await;
    sent.map_err(remote.address().status(format!("upload of pack {digest}")))?;
    Ok(size_bytes)
}

/// Commits the manifest, and sends the segments that the server lacks. Returns `None` if the server
/// lacks chunks.
async fn commit(
    remote: &Remote,
    reference: &TagReference,
    manifest: &Manifest,
) -> Result<Option<Digest>, PushError> {
    let address = remote.address();
    for _ in 0..COMMITS {
        let begin = v1::CommitBegin {
            reference: reference.to_string(),
            root_bytes: manifest.root_bytes.len() as u64,
        };
        let mut parts = vec![commit_request::Part::Begin(begin)];
        let mut root = manifest.root_bytes.clone();
        while !root.is_empty() {
            let part = root.split_to(root.len().min(MAX_PART_BYTES));
            parts.push(commit_request::Part::RootPart(part));
        }
        let parts = parts.into_iter().map(|part| v1::CommitRequest { part: Some(part) });
        let response = remote.images().commit(tokio_stream::iter(parts)).await;
        let response = response.map_err(address.status(format!("commit of {reference}")))?.into_inner();
        let missing = match response.outcome {
            Some(Outcome::Committed(v1::Committed { image })) => {
                let image = Digest::try_from(&image[..]).map_err(|e| address.wrong("image digest", e))?;
                if image != manifest.root.image() {
                    let reason = format!("it is {image}, pushed was {}", manifest.root.image());
                    return Err(address.wrong("committed image", reason).into());
                }
                return Ok(Some(image));
            }
            Some(Outcome::Missing(missing)) => missing,
            None => return Err(address.wrong("answer to the commit", "it is empty").into()),
        };
        let missing =
            Digest::list(&missing.segment_digests).map_err(|e| address.wrong("list of segments", e))?;
        let missing: HashSet<_> = missing.collect();
        if missing.is_empty() {
            return Ok(None);
        }
        for bytes in manifest.segments.iter().filter(|bytes| missing.contains(&Digest::of(bytes))) {
            let request = v1::UploadSegmentRequest { segment: bytes.clone() };
            let sent = remote.images().upload_segment(request).await;
            sent.map_err(address.status("upload of a segment"))?;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn a_file_that_is_replaced_before_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (root, secret) = (folder.path().join("root"), folder.path().join("secret"));
        let file = root.join("in/file");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(&secret, "secret").unwrap();
        let replace: [(&str, &dyn Fn()); 4] = [
            ("link", &|| std::os::unix::fs::symlink(&secret, &file).unwrap()),
            ("file", &|| std::fs::hard_link(&secret, &file).unwrap()),
            ("fifo", &|| {
                let mode = rustix::fs::Mode::RUSR;
                rustix::fs::mknodat(rustix::fs::CWD, &file, FileType::Fifo, mode, 0).unwrap();
            }),
            ("directory", &|| {
                std::fs::rename(root.join("in"), root.join("was")).unwrap();
                std::fs::rename(&secret, folder.path().join("file")).unwrap();
                std::os::unix::fs::symlink(folder.path(), root.join("in")).unwrap();
            }),
        ];
        for (what, replace) in replace {
            let _ = std::fs::remove_file(&file);
            std::fs::write(&file, "public").unwrap();
            let sources = collect(&root).unwrap();
            std::fs::rename(&file, root.join("old")).unwrap();
            replace();
            let opened = open(&sources[0], &mut ManifestBuilder::new(ChunkSize::DEFAULT));
            assert!(opened.is_err(), "a {what}");
            std::fs::remove_file(root.join("old")).unwrap();
        }
    }

    #[test]
    fn an_error_of_a_walk_names_the_path_once() {
        let root = Path::new("/does/not/exist");
        let error = walkdir::WalkDir::new(root).into_iter().next().unwrap().unwrap_err();
        let error = walk_error(root, error);
        let source = error.source().expect("the operating system's error").to_string();
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
        assert!(!source.contains("/does/not/exist"), "{source}");
    }
}
