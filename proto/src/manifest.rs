//! Manifests: the lists of the chunks that an image's files consist of.
//!
//! A manifest is a root and segments, see `manifest.proto`. Both are stored, hashed and sent as
//! bytes in one canonical encoding, so the same files have the same identity wherever they are
//! pushed. Reading verifies the root against the image's digest ([`Root::parse`]), then each
//! segment against the root ([`Root::check_segment`]). Writing goes through [`ManifestBuilder`],
//! whose output these accept.

use crate::digest::{DIGEST_BYTES, Digest, DigestError};
use crate::page::{ChunkIndex, ChunkSize, ChunkSizeError, to_usize};
use crate::path::{ImagePath, PathError, excerpt};
use crate::v1;
use bytes::Bytes;
use prost::Message;

/// Number of chunks in a segment; the last one of an image may hold fewer.
pub const SEGMENT_CHUNKS: u32 = 16_384;
/// Most bytes of an encoded root: 64 MiB.
pub const MAX_ROOT_BYTES: usize = 64 << 20;
/// Most bytes of an encoded segment: 40 for each chunk.
pub const MAX_SEGMENT_BYTES: usize = SEGMENT_CHUNKS as usize * 40;
/// Most entries of an image.
pub const MAX_ENTRIES: usize = 1 << 20;
/// Most bytes of a file, as on Linux.
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64;

const FORMAT: u32 = 1;

/// A defect of a root or segment, or another one than the expected one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    /// The bytes are longer than any such object.
    #[error("it has {actual} bytes, more than {max}")]
    TooLong {
        /// The actual number of bytes.
        actual: usize,
        /// The permitted number of bytes.
        max: usize,
    },
    /// The bytes are not the requested ones.
    #[error("its digest is {actual} and not {expected}")]
    Digest {
        /// Digest of the bytes.
        actual: Digest,
        /// The expected digest.
        expected: Digest,
    },
    /// The bytes are not protobuf.
    #[error("it is not a protobuf message: {0}")]
    Decode(String),
    /// A format that this version does not know.
    #[error("manifest format {0} is not known")]
    Format(u32),
    /// The bytes decode, but their encoding is not canonical.
    #[error("its encoding is not canonical")]
    NotCanonical,
    /// An invalid chunk size.
    #[error(transparent)]
    ChunkSize(#[from] ChunkSizeError),
    /// An invalid path.
    #[error("entry {index}: {error}")]
    Path {
        /// The index of the entry.
        index: usize,
        /// The defect of the path.
        error: PathError,
    },
    /// An invalid entry.
    #[error("entry {index} ({path}): {reason}")]
    Entry {
        /// The index of the entry.
        index: usize,
        /// The path of the entry.
        path: String,
        /// The defect of the entry.
        reason: &'static str,
    },
    /// More entries than an image may have.
    #[error("{0} entries are more than 1,048,576")]
    Entries(usize),
    /// A list of digests that ends within a digest.
    #[error(transparent)]
    Digests(#[from] DigestError),
    /// Another number of segments than the files' chunks need.
    #[error("{actual} segments where the files' chunks need {expected}")]
    SegmentCount {
        /// The actual number of segments.
        actual: usize,
        /// The required number of segments.
        expected: u64,
    },
    /// The image has no such segment.
    #[error("there is no segment {0}")]
    NoSuchSegment(u32),
    /// An invalid run.
    #[error("run {index}: {reason}")]
    Run {
        /// The index of the run.
        index: usize,
        /// The defect of the run.
        reason: &'static str,
    },
    /// Another number of chunks than the segment must have.
    #[error("segment {segment} has {actual} chunks and not {expected}")]
    SegmentChunks {
        /// The index of the segment.
        segment: u32,
        /// The actual number of chunks.
        actual: u32,
        /// The required number of chunks.
        expected: u32,
    },
}

/// The content of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkContent {
    /// A chunk of zeros.
    Zero,
    /// The bytes with this digest.
    Data(Digest),
}

/// One file, symbolic link or empty directory of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The path of the entry.
    pub path: ImagePath,
    /// The kind of the entry.
    pub kind: EntryKind,
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File(FileEntry),
    /// A symbolic link, with its target: 1 to 4096 bytes, no NUL.
    SymbolicLink(Box<[u8]>),
    /// A directory without entries.
    EmptyDirectory,
}

/// A regular file of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Size in bytes.
    pub size_bytes: u64,
    /// True if its owner may execute it.
    pub executable: bool,
    /// The first of its chunks; the others follow.
    pub first_chunk: ChunkIndex,
}

/// A valid root of a manifest.
#[derive(Clone, Debug)]
pub struct Root {
    image: Digest,
    chunk_size: ChunkSize,
    entries: Vec<Entry>,
    segment_digests: Vec<Digest>,
    chunks: u64,
}

impl Root {
    /// Parses the root of the image with this digest.
    ///
    /// # Errors
    /// Returns [`ManifestError::Digest`] for other bytes, or their defect.
    pub fn parse(bytes: &[u8], image: &Digest) -> Result<Self, ManifestError> {
        let root = Self::parse_any(bytes)?;
        if root.image == *image {
            return Ok(root);
        }
        Err(ManifestError::Digest { actual: root.image, expected: *image })
    }

    /// Parses the root of any image.
    ///
    /// # Errors
    /// Returns the defect of the bytes.
    pub fn parse_any(bytes: &[u8]) -> Result<Self, ManifestError> {
        let message: v1::Root = decode_canonical(bytes, MAX_ROOT_BYTES)?;
        if message.format != FORMAT {
            return Err(ManifestError::Format(message.format));
        }
        let chunk_size = ChunkSize::new(u64::from(message.chunk_size_bytes))?;
        let (entries, chunks) = parse_entries(message.entries, chunk_size)?;
        let segment_digests: Vec<_> = Digest::list(&message.segment_digests)?.collect();
        let expected = chunks.div_ceil(u64::from(SEGMENT_CHUNKS));
        if segment_digests.len() as u64 != expected {
            return Err(ManifestError::SegmentCount { actual: segment_digests.len(), expected });
        }
        Ok(Self { image: Digest::of(bytes), chunk_size, entries, segment_digests, chunks })
    }

    /// Returns the digest of the image that this root belongs to.
    #[must_use]
    pub fn image(&self) -> Digest {
        self.image
    }

    /// Returns the size of the image's chunks.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// Returns the image's entries, in bytewise order of path.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns the entry at `path`.
    #[must_use]
    pub fn entry(&self, path: &[u8]) -> Option<&Entry> {
        let found = self.entries.binary_search_by(|entry| entry.path.as_bytes().cmp(path));
        found.ok().map(|i| &self.entries[i])
    }

    /// Returns the regular files with their paths.
    pub fn files(&self) -> impl Iterator<Item = (&ImagePath, &FileEntry)> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            EntryKind::File(file) => Some((&entry.path, file)),
            EntryKind::SymbolicLink(_) | EntryKind::EmptyDirectory => None,
        })
    }

    /// Returns the bytes of all files together.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        // The sum fits, because `parse_entries` has bounded the number of chunks.
        self.files().map(|(_, file)| file.size_bytes).sum()
    }

    /// Returns the number of chunks of all files together.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Returns the digests of the segments, in order.
    #[must_use]
    pub fn segment_digests(&self) -> &[Digest] {
        &self.segment_digests
    }

    /// Returns the segment that holds a chunk's content, and the chunk's place in it.
    #[must_use]
    pub fn segment_of(chunk: ChunkIndex) -> (u64, u32) {
        let place = u32::try_from(chunk.0 % u64::from(SEGMENT_CHUNKS)).expect("less than 16,384");
        (chunk.0 / u64::from(SEGMENT_CHUNKS), place)
    }

    /// Returns the numbers of the segments that hold a file's chunks.
    #[must_use]
    pub fn segments_of(&self, file: &FileEntry) -> std::ops::Range<u32> {
        let chunks = self.chunk_size.chunks_of(file.size_bytes);
        if chunks == 0 {
            return 0..0;
        }
        let number =
            |chunk| u32::try_from(Self::segment_of(ChunkIndex(chunk)).0).expect("bounded by the root");
        number(file.first_chunk.0)..number(file.first_chunk.0 + chunks - 1) + 1
    }

    /// Returns the number of chunks in segment `index`.
    fn chunks_in_segment(&self, index: u32) -> u32 {
        let rest = self.chunks - u64::from(index) * u64::from(SEGMENT_CHUNKS);
        u32::try_from(rest).unwrap_or(u32::MAX).min(SEGMENT_CHUNKS)
    }

    /// Parses segment `index` of this image. Its digest must match the root, and its number of
    /// chunks the files.
    ///
    /// # Errors
    /// Returns [`ManifestError::Digest`] for other bytes, or their defect.
    pub fn check_segment(&self, index: u32, bytes: &[u8]) -> Result<Segment, ManifestError> {
        let expected = self.segment_digests.get(index as usize).ok_or(ManifestError::NoSuchSegment(index))?;
        let actual = Digest::of(bytes);
        if actual != *expected {
            return Err(ManifestError::Digest { actual, expected: *expected });
        }
        let segment = Segment::parse(bytes)?;
        let (actual, expected) = (segment.chunks(), self.chunks_in_segment(index));
        if actual != expected {
            return Err(ManifestError::SegmentChunks { segment: index, actual, expected });
        }
        Ok(segment)
    }
}

fn decode_canonical<M: Message + Default>(bytes: &[u8], max: usize) -> Result<M, ManifestError> {
    if bytes.len() > max {
        return Err(ManifestError::TooLong { actual: bytes.len(), max });
    }
    let message = M::decode(bytes).map_err(|e| ManifestError::Decode(e.to_string()))?;
    // Encoding the message again removes all variants that protobuf permits: order, repetition,
    // unknown fields, long varints.
    if message.encoded_len() != bytes.len() || message.encode_to_vec() != bytes {
        return Err(ManifestError::NotCanonical);
    }
    Ok(message)
}

fn parse_entries(messages: Vec<v1::Entry>, size: ChunkSize) -> Result<(Vec<Entry>, u64), ManifestError> {
    if messages.len() > MAX_ENTRIES {
        return Err(ManifestError::Entries(messages.len()));
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(messages.len());
    let mut chunks = 0u64;
    for (index, message) in messages.into_iter().enumerate() {
        let wrong = |reason| Err(ManifestError::Entry { index, path: excerpt(&message.path), reason });
        let path = ImagePath::try_from(&message.path[..]);
        let path = path.map_err(|error| ManifestError::Path { index, error })?;
        if entries.last().is_some_and(|last| last.path >= path) {
            return wrong("not in ascending order of path");
        }
        let kind = match &message.kind {
            None => return wrong("it is no file, symbolic link or empty directory"),
            Some(v1::entry::Kind::EmptyDirectory(v1::EmptyDirectory {})) => EntryKind::EmptyDirectory,
            Some(v1::entry::Kind::SymbolicLink(link)) => match &link.target[..] {
                target if target.is_empty() || target.len() > 4096 || target.contains(&0) => {
                    return wrong("a symbolic link's target has 1 to 4096 bytes and no NUL");
                }
                target => EntryKind::SymbolicLink(target.into()),
            },
            Some(v1::entry::Kind::File(file)) if file.size_bytes > MAX_FILE_BYTES => {
                return wrong("a file has at most 2^63 - 1 bytes");
            }
            Some(v1::entry::Kind::File(file)) => {
                let first_chunk = ChunkIndex(chunks);
                // This bounds the segments, too: a root of 64 MiB has room for 2^35 chunks'
                // digests.
                chunks = match chunks.checked_add(size.chunks_of(file.size_bytes)) {
                    Some(sum) if sum <= 1 << 42 => sum,
                    _ => return wrong("the files have more than 2^42 chunks"),
                };
                EntryKind::File(FileEntry {
                    size_bytes: file.size_bytes,
                    executable: file.executable,
                    first_chunk,
                })
            }
        };
        entries.push(Entry { path, kind });
    }
    check_no_entry_is_a_directory(&entries)?;
    Ok((entries, chunks))
}

/// Rejects `a` beside `a/b`: the entry `a` is no directory, or an empty one. Takes time in
/// proportion to the bytes of the paths, because the entries are sorted: the earlier paths that are
/// prefixes of a path form a stack.
fn check_no_entry_is_a_directory(entries: &[Entry]) -> Result<(), ManifestError> {
    let mut prefixes: Vec<&[u8]> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let path = entry.path.as_bytes();
        while prefixes.last().is_some_and(|prefix| !path.starts_with(prefix)) {
            prefixes.pop();
        }
        if prefixes.iter().any(|prefix| path.get(prefix.len()) == Some(&b'/')) {
            let reason = "a directory that it lies in is an entry itself";
            return Err(ManifestError::Entry { index, path: excerpt(path), reason });
        }
        prefixes.push(path);
    }
    Ok(())
}

/// A valid segment of a manifest: the contents of up to 16,384 chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The runs, each with the place of its first chunk.
    runs: Vec<(u32, Run)>,
    chunks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Run {
    Zero(u32),
    Data(Vec<Digest>),
}

impl Segment {
    /// Parses a segment by itself. [`Root::check_segment`] parses it as part of an image.
    ///
    /// # Errors
    /// Returns the defect of the bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let message: v1::Segment = decode_canonical(bytes, MAX_SEGMENT_BYTES)?;
        let mut runs: Vec<(u32, Run)> = Vec::with_capacity(message.runs.len());
        let mut chunks = 0u32;
        for (index, run) in message.runs.into_iter().enumerate() {
            let wrong = |reason| Err(ManifestError::Run { index, reason });
            let (run, count) = match run.kind {
                None => return wrong("it is neither of zeros nor of digests"),
                Some(v1::segment_run::Kind::ZeroChunks(count)) => (Run::Zero(count), count),
                Some(v1::segment_run::Kind::ChunkDigests(bytes)) => {
                    let digests: Vec<_> = Digest::list(&bytes)?.collect();
                    // `MAX_SEGMENT_BYTES` bounds the count.
                    let count = u32::try_from(digests.len()).unwrap_or(u32::MAX);
                    (Run::Data(digests), count)
                }
            };
            let same_kind =
                |(_, last): &(u32, Run)| std::mem::discriminant(last) == std::mem::discriminant(&run);
            if runs.last().is_some_and(same_kind) {
                return wrong("it is of the same kind as the one before");
            }
            if count == 0 || count > SEGMENT_CHUNKS - chunks {
                return wrong("its chunks are none, or more than a segment holds");
            }
            runs.push((chunks, run));
            chunks += count;
        }
        if chunks == 0 {
            return Err(ManifestError::Run { index: 0, reason: "a segment has at least one chunk" });
        }
        Ok(Self { runs, chunks })
    }

    /// Returns the canonical encoding: the bytes that [`Segment::parse`] was given.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let kind = |run: &Run| match run {
            Run::Zero(count) => v1::segment_run::Kind::ZeroChunks(*count),
            Run::Data(digests) => {
                let bytes: Vec<u8> = digests.iter().flat_map(Digest::as_bytes).copied().collect();
                v1::segment_run::Kind::ChunkDigests(bytes.into())
            }
        };
        let runs = self.runs.iter().map(|(_, run)| v1::SegmentRun { kind: Some(kind(run)) });
        v1::Segment { runs: runs.collect() }.encode_to_vec().into()
    }

    /// Returns the number of chunks: 1 to 16,384.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Returns the content of the chunk at `place`, which counts from 0 in this segment.
    #[must_use]
    pub fn chunk(&self, place: u32) -> Option<ChunkContent> {
        if place >= self.chunks {
            return None;
        }
        let run = self.runs.partition_point(|(start, _)| *start <= place) - 1;
        match &self.runs[run] {
            (_, Run::Zero(_)) => Some(ChunkContent::Zero),
            (start, Run::Data(digests)) => Some(ChunkContent::Data(digests[(place - start) as usize])),
        }
    }

    /// Returns the contents of all chunks, in order.
    pub fn contents(&self) -> impl Iterator<Item = ChunkContent> {
        self.runs.iter().flat_map(|(_, run)| {
            let (zeros, digests) = match run {
                Run::Zero(count) => (*count as usize, &[][..]),
                Run::Data(digests) => (0, &digests[..]),
            };
            std::iter::repeat_n(ChunkContent::Zero, zeros)
                .chain(digests.iter().map(|digest| ChunkContent::Data(*digest)))
        })
    }

    /// Returns the digests of the chunks that are not zero, in order.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        let digests = self.runs.iter().map(|(_, run)| match run {
            Run::Zero(_) => &[][..],
            Run::Data(digests) => digests,
        });
        digests.flatten().copied()
    }
}

/// The bytes of a manifest, ready to be stored.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The root, parsed from `root_bytes`.
    pub root: Root,
    /// The encoded root.
    pub root_bytes: Bytes,
    /// The encoded segments, in the root's order.
    pub segments: Vec<Bytes>,
}

/// A builder of manifests. The caller adds entries in bytewise order of path, and after each file
/// its chunks.
#[derive(Debug)]
pub struct ManifestBuilder {
    root: v1::Root,
    segment: v1::Segment,
    segment_chunks: u32,
    segments: Vec<Bytes>,
    digests: Vec<u8>,
}

impl ManifestBuilder {
    /// Begins the manifest of an image with this chunk size.
    #[must_use]
    pub fn new(chunk_size: ChunkSize) -> Self {
        let root =
            v1::Root { format: FORMAT, chunk_size_bytes: chunk_size.bytes_u32(), ..Default::default() };
        Self {
            root,
            segment: v1::Segment::default(),
            segment_chunks: 0,
            segments: Vec::new(),
            digests: Vec::new(),
        }
    }

    /// Adds a file. Calls of [`ManifestBuilder::chunk`] must follow for its chunks.
    pub fn file(&mut self, path: &ImagePath, size_bytes: u64, executable: bool) {
        self.entry(path, v1::entry::Kind::File(v1::File { size_bytes, executable }));
    }

    /// Adds a symbolic link.
    pub fn symbolic_link(&mut self, path: &ImagePath, target: &[u8]) {
        let target = Bytes::copy_from_slice(target);
        self.entry(path, v1::entry::Kind::SymbolicLink(v1::SymbolicLink { target }));
    }

    /// Adds an empty directory.
    pub fn empty_directory(&mut self, path: &ImagePath) {
        self.entry(path, v1::entry::Kind::EmptyDirectory(v1::EmptyDirectory {}));
    }

    fn entry(&mut self, path: &ImagePath, kind: v1::entry::Kind) {
        let path = Bytes::copy_from_slice(path.as_bytes());
        self.root.entries.push(v1::Entry { path, kind: Some(kind) });
    }

    /// Adds the next chunk of the files.
    pub fn chunk(&mut self, content: ChunkContent) {
        match content {
            ChunkContent::Data(digest) => self.digests.extend_from_slice(digest.as_bytes()),
            ChunkContent::Zero => {
                self.end_digest_run();
                match self.segment.runs.last_mut().and_then(|run| run.kind.as_mut()) {
                    Some(v1::segment_run::Kind::ZeroChunks(count)) => *count += 1,
                    _ => self.run(v1::segment_run::Kind::ZeroChunks(1)),
                }
            }
        }
        self.segment_chunks += 1;
        if self.segment_chunks == SEGMENT_CHUNKS {
            self.end_segment();
        }
    }

    fn run(&mut self, kind: v1::segment_run::Kind) {
        self.segment.runs.push(v1::SegmentRun { kind: Some(kind) });
    }

    fn end_digest_run(&mut self) {
        if !self.digests.is_empty() {
            let digests = std::mem::take(&mut self.digests).into();
            self.run(v1::segment_run::Kind::ChunkDigests(digests));
        }
    }

    fn end_segment(&mut self) {
        self.end_digest_run();
        if self.segment_chunks > 0 {
            self.segments.push(std::mem::take(&mut self.segment).encode_to_vec().into());
            self.segment_chunks = 0;
        }
    }

    /// Completes the manifest.
    ///
    /// # Errors
    /// Returns [`ManifestError`] if entries are out of order, the number of chunks does not fit the
    /// files, or a limit is exceeded.
    pub fn finish(mut self) -> Result<Manifest, ManifestError> {
        self.end_segment();
        let digests: Vec<u8> = self.segments.iter().flat_map(|s| *Digest::of(s).as_bytes()).collect();
        debug_assert_eq!(digests.len(), self.segments.len() * DIGEST_BYTES);
        self.root.segment_digests = digests.into();
        let root_bytes: Bytes = self.root.encode_to_vec().into();
        let root = Root::parse_any(&root_bytes)?;
        if let Some(last) = self.segments.len().checked_sub(1) {
            root.check_segment(u32::try_from(last).unwrap_or(u32::MAX), &self.segments[last])?;
        }
        Ok(Manifest { root, root_bytes, segments: self.segments })
    }
}

/// Returns the length in bytes of chunk `chunk` of `file`, or `None` for a chunk of another file.
#[must_use]
pub fn chunk_len(size: ChunkSize, file: &FileEntry, chunk: ChunkIndex) -> Option<usize> {
    let index = chunk.0.checked_sub(file.first_chunk.0)?;
    let len = size.chunk_len(file.size_bytes, index);
    (len > 0).then_some(len)
}

/// Returns the byte of `file` at which its chunk `chunk` begins.
#[must_use]
pub fn chunk_offset(size: ChunkSize, file: &FileEntry, chunk: ChunkIndex) -> usize {
    to_usize(chunk.0 - file.first_chunk.0) * size.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(text: &str) -> ImagePath {
        ImagePath::try_from(text.as_bytes()).unwrap()
    }

    fn data(n: u32) -> ChunkContent {
        ChunkContent::Data(Digest::of(&n.to_le_bytes()))
    }

    fn manifest_of(contents: &[ChunkContent]) -> Manifest {
        let mut builder = ManifestBuilder::new(ChunkSize::MIN);
        builder.file(&path("mem"), contents.len() as u64 * 4096, false);
        contents.iter().for_each(|content| builder.chunk(*content));
        builder.finish().unwrap()
    }

    fn root_with(change: impl FnOnce(&mut v1::Root)) -> Result<Root, ManifestError> {
        let mut builder = ManifestBuilder::new(ChunkSize::MIN);
        builder.empty_directory(&path("d"));
        builder.file(&path("f"), 5000, true);
        builder.symbolic_link(&path("l"), b"../f");
        builder.chunk(data(1));
        builder.chunk(ChunkContent::Zero);
        let mut message = v1::Root::decode(builder.finish().unwrap().root_bytes).unwrap();
        change(&mut message);
        Root::parse_any(&message.encode_to_vec())
    }

    proptest::proptest! {
        #[test]
        fn an_entry_below_another_entry_is_found(
            paths in proptest::collection::btree_set("[a!/]{1,6}", 1..12)
        ) {
            let paths: Vec<_> = paths.iter().filter_map(|p| ImagePath::try_from(p.as_bytes()).ok()).collect();
            let entry = |path: &ImagePath| Entry { path: path.clone(), kind: EntryKind::EmptyDirectory };
            let entries: Vec<_> = paths.iter().map(entry).collect();
            let lies_below = |path: &ImagePath| path.ancestors().any(|directory| {
                paths.iter().any(|other| other.as_bytes() == directory)
            });
            let found = check_no_entry_is_a_directory(&entries).is_err();
            proptest::prop_assert_eq!(found, paths.iter().any(lies_below));
        }
    }

    #[test]
    fn entries_are_found_by_path() {
        let root = root_with(|_| {}).unwrap();
        assert_eq!(root.entries().len(), 3);
        assert_eq!(root.entry(b"d").unwrap().kind, EntryKind::EmptyDirectory);
        assert_eq!(root.entry(b"l").unwrap().kind, EntryKind::SymbolicLink(b"../f"[..].into()));
        assert!(root.entry(b"x").is_none());
        let (_, file) = root.files().next().unwrap();
        assert_eq!((file.size_bytes, file.executable, file.first_chunk), (5000, true, ChunkIndex(0)));
        assert_eq!((root.size_bytes(), root.chunks()), (5000, 2));
    }

    #[test]
    fn what_is_wrong_with_a_root_is_named() {
        let text = |change: fn(&mut v1::Root)| root_with(change).unwrap_err().to_string();
        assert!(text(|r| r.format = 2).contains("format 2"));
        assert!(text(|r| r.chunk_size_bytes = 5000).contains("chunk size 5000"));
        assert!(text(|r| r.entries.swap(0, 1)).contains("ascending"));
        assert!(text(|r| r.entries[1].path = "d/../../x".into()).contains("`..`"));
        assert!(text(|r| r.entries[1].path = "d/x".into()).contains("is an entry itself"));
        assert!(text(|r| r.entries[1].path = "d\0".into()).contains("NUL"));
        assert!(text(|r| r.entries[1].path = "d".repeat(10_000).into()).contains("longer"));
        assert!(text(|r| r.entries[0].kind = None).contains("no file"));
        assert!(text(|r| r.segment_digests = Bytes::new()).contains("0 segments"));
        assert!(text(|r| r.segment_digests.truncate(31)).contains("31"));
        let huge = |size_bytes| {
            move |r: &mut v1::Root| {
                r.entries[1].kind = Some(v1::entry::Kind::File(v1::File { size_bytes, executable: false }));
            }
        };
        assert!(root_with(huge(u64::MAX)).unwrap_err().to_string().contains("2^63"));
        assert!(root_with(huge(MAX_FILE_BYTES)).unwrap_err().to_string().contains("2^42"));
        assert!(root_with(huge(1 << 40)).unwrap_err().to_string().contains("segments"));
    }

    #[test]
    fn other_encodings_of_the_same_root_are_refused() {
        let good = manifest_of(&[data(1)]).root_bytes;
        let unknown_field = [&good[..], &[0x50, 1]].concat();
        let twice = [&good[..2], &good[..]].concat();
        let mut long_varint = vec![0x08, 0x81, 0x00];
        long_varint.extend_from_slice(&good[2..]);
        for bytes in [unknown_field, twice, long_varint] {
            assert_eq!(Root::parse_any(&bytes).unwrap_err(), ManifestError::NotCanonical);
        }
    }

    #[test]
    fn the_same_files_have_the_same_identity() {
        let contents: Vec<_> =
            (0..40_000).map(|n| if n % 3 == 0 { ChunkContent::Zero } else { data(n) }).collect();
        let (a, b) = (manifest_of(&contents), manifest_of(&contents));
        assert_eq!(a.root.image(), b.root.image());
        assert_eq!(a.segments.len(), 3);
        for (index, bytes) in (0..).zip(&a.segments) {
            let segment = a.root.check_segment(index, bytes).unwrap();
            for place in 0..segment.chunks() {
                let chunk = index as usize * SEGMENT_CHUNKS as usize + place as usize;
                assert_eq!(segment.chunk(place), Some(contents[chunk]));
            }
            assert_eq!(segment.chunk(segment.chunks()), None);
        }
        assert!(matches!(a.root.check_segment(0, &a.segments[1]), Err(ManifestError::Digest { .. })));
        assert_eq!(a.root.check_segment(3, b""), Err(ManifestError::NoSuchSegment(3)));
        // At most 40 bytes a chunk, also where zeros and digests alternate.
        let alternating: Vec<_> =
            (0..16384).map(|n| if n % 2 == 0 { ChunkContent::Zero } else { data(n) }).collect();
        assert!(manifest_of(&alternating).segments[0].len() <= MAX_SEGMENT_BYTES);
    }

    #[test]
    fn what_is_wrong_with_a_segment_is_named() {
        let zero = |n| v1::SegmentRun { kind: Some(v1::segment_run::Kind::ZeroChunks(n)) };
        let digests =
            |n: usize| v1::SegmentRun { kind: Some(v1::segment_run::Kind::ChunkDigests(vec![7; n].into())) };
        let parse = |runs: Vec<v1::SegmentRun>| Segment::parse(&v1::Segment { runs }.encode_to_vec());
        assert_eq!(parse(vec![zero(16_384)]).unwrap().chunks(), 16_384);
        for bad in [
            vec![],
            vec![zero(0)],
            vec![zero(16_385)],
            vec![zero(u32::MAX)],
            vec![zero(1), zero(1)],
            vec![digests(0)],
            vec![digests(31)],
            vec![digests(32), digests(32)],
            vec![zero(16_384), digests(32)],
            vec![v1::SegmentRun { kind: None }],
        ] {
            assert!(parse(bad.clone()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn contents_come_back(zeros in proptest::collection::vec(any::<bool>(), 1..300)) {
            let contents: Vec<_> =
                (0..).zip(&zeros).map(|(n, zero)| if *zero { ChunkContent::Zero } else { data(n) }).collect();
            let manifest = manifest_of(&contents);
            let segment = manifest.root.check_segment(0, &manifest.segments[0]).unwrap();
            prop_assert_eq!(segment.encode(), manifest.segments[0].clone());
            prop_assert_eq!(segment.contents().collect::<Vec<_>>(), contents.clone());
            let digests: Vec<_> = segment.digests().map(ChunkContent::Data).collect();
            prop_assert_eq!(digests, contents.into_iter().filter(|c| *c != ChunkContent::Zero).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_a_manifest_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Root::parse_any(&bytes);
            let _ = Segment::parse(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_another_image_or_an_error(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let manifest = manifest_of(&[data(1), ChunkContent::Zero, data(2)]);
            let mut bytes = manifest.root_bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Root::parse(&bytes, &manifest.root.image()).is_err());
            let mut bytes = manifest.segments[0].to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(manifest.root.check_segment(0, &bytes).is_err());
        }
    }
}
