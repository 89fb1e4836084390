//! Chunks that differ from stored ones in some pages.
//!
//! A client that has only the changed pages of a chunk sends these. The server reads the stored
//! chunk, replaces the pages, and stores the whole chunk. So an image that was pushed over another
//! one is read as any other image is: its chunks depend on no other chunks.

use crate::store::error::{StoreError, damaged};
use crate::store::index::run::Place;
use crate::store::staged::{FRAMES_PER_TASK, VERIFIERS};
use crate::store::{Caller, Store};
use bytes::Bytes;
use postcopy_proto::MAX_PATCHED_BYTES;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::patch::Patch;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder, FrameEncoder, max_frame_bytes};
use postcopy_proto::pack::PackBuilder;
use postcopy_proto::page::{PAGE_BYTES, is_zero};
use postcopy_proto::proof::Leaves;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};

/// The level at which changed chunks are compressed, as clients do by default.
const LEVEL: i32 = 3;
/// Most threads that read the chunks of a request from a bucket. They mostly wait.
const READERS: usize = 16;

/// The changed pages of a stored chunk.
#[derive(Clone, Debug)]
pub struct ChunkPatch {
    /// The digest of the stored chunk.
    pub base: Digest,
    /// The encoding of a [`Patch`].
    pub patch: Bytes,
}

/// A chunk that was made of a stored one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchedChunk {
    /// The digest of the new chunk.
    pub chunk: Digest,
    /// The chaining values of the stored chunk.
    pub base: Leaves,
}

/// A new chunk, and its frame; `None` if all bytes are zero.
struct Made {
    patched: PatchedChunk,
    frame: Option<Vec<u8>>,
}

impl Store {
    /// Replaces pages of stored chunks, and stores the new chunks. They are durable on return, and
    /// protected as by [`Store::find_missing`]. Returns `None` for a chunk that is not stored.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] names a defective patch. [`StoreError::Damaged`]: no pack has a good
    /// copy of a stored chunk. [`StoreError::Full`], [`StoreError::Abandoned`].
    ///
    /// # Blocking
    /// Waits for the disk or the bucket, and computes for some ten milliseconds for each MiB of the
    /// chunks.
    pub fn patch_chunks(
        &self,
        patches: &[ChunkPatch],
        caller: &Caller,
    ) -> Result<Vec<Option<PatchedChunk>>, StoreError> {
        let parsed = parse(patches)?;
        let frames = self.frames_of(patches, &parsed, caller)?;
        let make = |(decoder, encoder): &mut (FrameDecoder, FrameEncoder),
                    (number, patch): (usize, &Patch<'_>)| {
            caller.check()?;
            let base = &patches[number].base;
            let Some(frame) = frames.get(base) else { return Ok(None) };
            let mut chunk = self.plain(base, frame, number, patch, decoder)?;
            make(number, patch, &mut chunk, decoder, encoder).map(Some)
        };
        let coders = || (FrameDecoder::default(), FrameEncoder::new(LEVEL));
        let made: Vec<Option<Made>> = VERIFIERS.install(|| {
            let numbered = parsed.par_iter().enumerate().with_min_len(FRAMES_PER_TASK);
            numbered.map_init(coders, make).collect::<Result<_, StoreError>>()
        })?;
        let chunks: HashSet<_> = made
            .iter()
            .flatten()
            .filter(|made| made.frame.is_some())
            .map(|made| made.patched.chunk)
            .collect();
        let mut missing: HashSet<_> = self.find_missing(chunks.into_iter())?.into_iter().collect();
        let mut pack = PackBuilder::default();
        for made in made.iter().flatten() {
            if let Some(frame) = &made.frame
                && missing.remove(&made.patched.chunk)
            {
                pack.push(made.patched.chunk, frame);
            }
        }
        if !pack.is_empty() {
            let pack = pack.finish();
            let mut staged = self.stage_pack(Digest::of(&pack))?;
            staged.write(&pack)?;
            caller.check()?;
            self.put_verified(&staged)?;
        }
        Ok(made.into_iter().map(|made| made.map(|made| made.patched)).collect())
    }

    /// Returns the frames of the stored chunks that patches are for, as far as they are there. Reads
    /// none that is longer than a frame of the patch's length can be.
    fn frames_of(
        &self,
        patches: &[ChunkPatch],
        parsed: &[Patch<'_>],
        caller: &Caller,
    ) -> Result<HashMap<Digest, Bytes>, StoreError> {
        let mut most: HashMap<Digest, (usize, usize)> = HashMap::new();
        for (number, (ChunkPatch { base, .. }, patch)) in patches.iter().zip(parsed).enumerate() {
            let (_, bytes) = most.entry(*base).or_insert((number, patch.chunk_bytes()));
            *bytes = patch.chunk_bytes().min(*bytes);
        }
        let bases: Vec<_> = most.keys().copied().collect();
        let places = self.packs.presence().places(&bases)?;
        let mut found: Vec<(Digest, Place)> =
            bases.into_iter().zip(places).filter_map(|(base, place)| Some((base, place?))).collect();
        for (base, place) in &found {
            let (number, chunk_bytes) = most[base];
            if place.length as usize > max_frame_bytes(chunk_bytes) {
                return Err(other_length(number, base, chunk_bytes));
            }
        }
        found.sort_unstable_by_key(|(_, place)| (place.pack, place.offset));
        let load = |(base, place): &(Digest, Place)| {
            caller.check()?;
            let loaded = self.packs.load(place, base, false);
            let found = loaded.or_else(|_| self.packs.find_frame(base, true).map(|(_, frame)| frame));
            match found {
                Err(StoreError::NotFound(_)) => Ok(None),
                other => other.map(|frame| Some((*base, frame))),
            }
        };
        let load_part = |part: &[(Digest, Place)]| part.iter().map(load).collect::<Result<Vec<_>, _>>();
        let readers = if self.objects.has_locks() { 1 } else { READERS };
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let part = found.len().div_ceil(readers).max(1);
            let parts: Vec<_> = found.chunks(part).map(|part| scope.spawn(move || load_part(part))).collect();
            parts.into_iter().map(|part| part.join().expect("a reading does not panic")).collect()
        });
        let mut frames = HashMap::new();
        for part in loaded {
            frames.extend(part?.into_iter().flatten());
        }
        Ok(frames)
    }

    /// Returns the plain bytes of a stored chunk from its frame, or from a better copy of it.
    fn plain(
        &self,
        base: &Digest,
        frame: &[u8],
        number: usize,
        patch: &Patch<'_>,
        decoder: &mut FrameDecoder,
    ) -> Result<Vec<u8>, StoreError> {
        let chunk_bytes = patch.chunk_bytes();
        let mut decode = |frame: &[u8]| {
            let parsed = ChunkFrame::parse(frame).map_err(|e| damaged(format!("chunk {base}"), e))?;
            if parsed.chunk_bytes() != chunk_bytes {
                return Err(other_length(number, base, chunk_bytes));
            }
            let mut chunk = vec![0; chunk_bytes];
            let decoded = decoder.decode_verified(&parsed, base, &mut chunk);
            decoded.map(|()| chunk).map_err(|e| damaged(format!("chunk {base}"), e))
        };
        match decode(frame) {
            Err(StoreError::Damaged { .. }) => decode(&self.packs.find_frame(base, true)?.1),
            other => other,
        }
    }
}

fn other_length(number: usize, base: &Digest, chunk_bytes: usize) -> StoreError {
    invalid(number, format!("it is for a chunk of {chunk_bytes} bytes, and chunk {base} has another length"))
}

/// Parses the patches, and checks the sum of their chunks' lengths.
fn parse(patches: &[ChunkPatch]) -> Result<Vec<Patch<'_>>, StoreError> {
    let (mut bytes, mut parsed) = (0, Vec::with_capacity(patches.len()));
    for (number, ChunkPatch { patch, .. }) in patches.iter().enumerate() {
        let patch = Patch::parse(patch).map_err(|e| invalid(number, e.to_string()))?;
        if patch.chunk_bytes() <= PAGE_BYTES {
            return Err(invalid(number, "its chunk has at most one page".to_owned()));
        }
        bytes += patch.chunk_bytes();
        if bytes > MAX_PATCHED_BYTES {
            let reason = format!("the chunks up to this one have more than {MAX_PATCHED_BYTES} bytes");
            return Err(invalid(number, reason));
        }
        parsed.push(patch);
    }
    Ok(parsed)
}

fn invalid(number: usize, reason: String) -> StoreError {
    StoreError::Invalid { object: format!("patch {number}"), reason }
}

/// Replaces pages of `chunk`, which has the plain bytes of the stored chunk.
fn make(
    number: usize,
    patch: &Patch<'_>,
    chunk: &mut [u8],
    decoder: &mut FrameDecoder,
    encoder: &mut FrameEncoder,
) -> Result<Made, StoreError> {
    let base_leaves = Leaves::of(chunk);
    let pages = decoder.apply(patch, chunk).map_err(|e| invalid(number, e.to_string()))?;
    let mut leaves = base_leaves.clone();
    leaves.replace(&patch.runs().collect::<Vec<_>>(), pages).map_err(|e| invalid(number, e.to_string()))?;
    let chunk_digest = leaves.digest().ok_or_else(|| invalid(number, "its chunk has one page".to_owned()))?;
    let mut frame = Vec::new();
    let has_data = encoder.encode(chunk, &mut frame);
    debug_assert_eq!(has_data, !is_zero(chunk));
    Ok(Made {
        patched: PatchedChunk { chunk: chunk_digest, base: base_leaves },
        frame: has_data.then_some(frame),
    })
}
