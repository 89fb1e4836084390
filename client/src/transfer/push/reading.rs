//! Reads the files of a push, in batches of chunks, on all cores.

use super::changes::ReadChanged;
use super::encoding::Encoders;
use super::error::PushError;
use super::places::{Part, Place};
use super::sources::{FileState, file_error};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::ChunkContent;
use postcopy_proto::page::{PageRun, is_zero};
use postcopy_proto::path::ImagePath;
use rayon::prelude::*;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::task::JoinHandle;

/// A batch of chunks that were read together.
pub(super) struct Batch {
    pub(super) chunks: Vec<Chunk>,
    /// The plain bytes that were read, one chunk after another. Batches reuse the buffer, because
    /// fresh memory costs more than reading into it.
    pub(super) bytes: Vec<u8>,
}

/// A chunk that has been read.
pub(super) struct Chunk {
    pub(super) found: Found,
    pub(super) len: usize,
    /// The place in the bytes of the batch of the part that was read.
    pub(super) bytes: Range<usize>,
}

/// The result of reading a chunk.
pub(super) enum Found {
    /// The content, whose bytes were read if it has some.
    Read(ChunkContent),
    /// The content, of which nothing was read.
    Known(ChunkContent),
    /// The pages that differ from a chunk of the base.
    Changed(ChangedChunk),
}

/// A chunk that differs from one of the base.
pub(super) struct ChangedChunk {
    pub(super) base: Digest,
    pub(super) runs: Vec<PageRun>,
    /// The encoding of the changed pages.
    pub(super) patch: Vec<u8>,
}

/// A chunk to send: its digest, and its place in the bytes of the batch.
pub(super) type NewChunk = (Digest, Range<usize>);

/// A file that is being read.
pub(super) struct Reading {
    /// The path for messages.
    pub(super) path: PathBuf,
    from: From,
}

enum From {
    /// A file, and its state before the first byte was read.
    File(File, FileState),
    /// Memory of the caller, which stands for this file of the image.
    Memory(ImagePath, ReadChanged),
}

impl Reading {
    pub(super) fn of_file(file: File, path: PathBuf, state: FileState) -> Self {
        Self { path, from: From::File(file, state) }
    }

    pub(super) fn of_memory(path: ImagePath, read: ReadChanged) -> Self {
        Self { path: path.to_string().into(), from: From::Memory(path, read) }
    }

    /// Returns the file; `None` for memory.
    pub(super) fn file(&self) -> Option<&File> {
        match &self.from {
            From::File(file, _) => Some(file),
            From::Memory(..) => None,
        }
    }

    /// Checks that a file is as it was before the first byte was read.
    pub(super) fn ensure_unchanged(&self) -> Result<(), PushError> {
        let From::File(file, state) = &self.from else { return Ok(()) };
        let metadata = file.metadata().map_err(file_error(&self.path))?;
        match FileState::of(&metadata) == *state {
            true => Ok(()),
            false => Err(PushError::Changed(self.path.clone())),
        }
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), PushError> {
        let read = match &self.from {
            From::File(file, _) => file.read_exact_at(buffer, offset),
            From::Memory(path, read) => read(path, offset, buffer),
        };
        read.map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => PushError::Changed(self.path.clone()),
            _ => PushError::File { path: self.path.clone(), source },
        })
    }
}

pub(super) fn spawn_read(
    places: Vec<Place>,
    buffer: Vec<u8>,
    encoders: &Arc<Encoders>,
) -> JoinHandle<Result<Batch, PushError>> {
    let encoders = Arc::clone(encoders);
    tokio::task::spawn_blocking(move || read_batch(places, buffer, &encoders))
}

pub(super) fn read_batch(
    places: Vec<Place>,
    mut buffer: Vec<u8>,
    encoders: &Encoders,
) -> Result<Batch, PushError> {
    buffer.resize(places.iter().map(Place::read_bytes).sum(), 0);
    let mut files: Vec<_> = places.iter().map(|place| Arc::clone(&place.file)).collect();
    files.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let (mut rest, mut end) = (&mut buffer[..], 0);
    let mut parts = Vec::with_capacity(places.len());
    for place in places {
        let (part, after) = rest.split_at_mut(place.read_bytes());
        rest = after;
        let start = end;
        end += part.len();
        parts.push((place, part, start..end));
    }
    let read = |(place, part, bytes)| read(place, part, bytes, encoders);
    let chunks = parts.into_par_iter().map(read).collect::<Result<_, _>>()?;
    // A writer may have changed a file between two of its chunks, so the batch is not the file.
    files.iter().try_for_each(|file| file.ensure_unchanged())?;
    Ok(Batch { chunks, bytes: buffer })
}

/// Reads a part of a chunk into `buffer`, which is the range `bytes` of the batch.
fn read(
    place: Place,
    buffer: &mut [u8],
    bytes: Range<usize>,
    encoders: &Encoders,
) -> Result<Chunk, PushError> {
    let Place { file, offset, len, part } = place;
    let page = |run: &PageRun| run.start_byte()..run.end_byte().min(len);
    let found = match part {
        Part::Nothing(content) => Found::Known(content),
        Part::All => {
            file.read_exact_at(buffer, offset)?;
            Found::Read(content_of(buffer))
        }
        Part::Pages(runs, ChunkContent::Zero) => {
            buffer.fill(0);
            for range in runs.iter().map(page) {
                file.read_exact_at(&mut buffer[range.clone()], offset + range.start as u64)?;
            }
            Found::Read(content_of(buffer))
        }
        Part::Pages(runs, ChunkContent::Data(base)) => {
            let mut rest = &mut *buffer;
            for range in runs.iter().map(page) {
                let (pages, after) = rest.split_at_mut(range.len());
                file.read_exact_at(pages, offset + range.start as u64)?;
                rest = after;
            }
            let patch = encoders.borrow().encode_patch(len, &runs, buffer);
            Found::Changed(ChangedChunk { base, runs, patch })
        }
    };
    Ok(Chunk { found, len, bytes })
}

fn content_of(chunk: &[u8]) -> ChunkContent {
    match is_zero(chunk) {
        true => ChunkContent::Zero,
        false => ChunkContent::Data(Digest::of(chunk)),
    }
}
