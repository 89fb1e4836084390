//! Packs: immutable objects of many frames, with an index in the trailer.
//!
//! ```text
//! "postcopy"  8 bytes
//! version     u32 = 1       kind  u32: 0 chunks, 1 a working set
//! frames, one after another
//! index, see below
//! trailer, 64 bytes:
//!     BLAKE3 of the index    32 bytes
//!     index offset           u64
//!     number of entries      u32
//!     version                u32 = 1
//!     "postcopy pack 1\n"    16 bytes
//! ```
//!
//! The index has an entry for each chunk, in strictly ascending order of digest:
//!
//! ```text
//! chunk's digest   32 bytes
//! frames           u8: 1 to 3
//! base             u8: 0 none, 1 a digest follows (reserved, refused here)
//! zero             2 bytes
//! base's digest    32 bytes, if there is one
//! for each frame:  offset from the pack's beginning u32, length u32
//! ```
//!
//! The index of a working set's pack has an entry for each frame ([`crate::set_frame`]), in the
//! order in which the server sends them: offset u32, length u32.
//!
//! All integers are little-endian. A pack's name is the BLAKE3 digest of all of its bytes. The
//! index has its own digest, so that opening a pack reads only its end.

use crate::digest::{DIGEST_BYTES, Digest};
use crate::frame::{ChunkFrame, FrameDecoder, FrameError};
use std::ops::Range;

/// Most bytes of a pack: 64 MiB.
pub const MAX_PACK_BYTES: usize = 64 << 20;
/// Most bytes of the chunks that a pack's frames stand for, zeros included: 1 GiB.
pub const MAX_PACK_CHUNK_BYTES: u64 = 1 << 30;

const HEADER: [u8; HEADER_BYTES] = *b"postcopy\x01\0\0\0\0\0\0\0";
const HEADER_BYTES: usize = 16;
const TRAILER_BYTES: usize = 64;
const TRAILER_MAGIC: &[u8; 16] = b"postcopy pack 1\n";
const VERSION: u32 = 1;
const ENTRY_BYTES: usize = DIGEST_BYTES + 4 + 8;
const SET_ENTRY_BYTES: usize = 8;

/// A defect of a pack.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    /// The chunks of its frames have more bytes than those of one pack may have.
    #[error("its chunks have {actual} bytes together, more than {max}")]
    ChunkBytes {
        /// The actual number of bytes.
        actual: u64,
        /// The permitted number of bytes.
        max: u64,
    },
    /// The bytes are shorter than a header and a trailer, or longer than 64 MiB.
    #[error("a pack has 80 bytes to 64 MiB, this one has {0} bytes")]
    Length(usize),
    /// The first bytes are not a pack's.
    #[error("it does not begin as a pack does")]
    Header,
    /// The last bytes are not a pack's: often a truncated file.
    #[error("it does not end as a pack does: truncated?")]
    Trailer,
    /// A format that this version does not know.
    #[error("pack format {0} is not known")]
    Version(u32),
    /// A kind of pack that this version does not know.
    #[error("pack kind {0} is not known")]
    Kind(u32),
    /// The index lies outside of the pack or has another length than its entries.
    #[error("the index (offset {offset}, {entries} entries) does not fit into the pack")]
    IndexBounds {
        /// The offset in the trailer.
        offset: u64,
        /// The number of entries in the trailer.
        entries: u32,
    },
    /// The index is damaged.
    #[error("the index is damaged: it does not fit its digest")]
    IndexDigest,
    /// An invalid entry.
    #[error("entry {index}: {reason}")]
    Entry {
        /// The index of the entry.
        index: usize,
        /// The defect of the entry.
        reason: &'static str,
    },
    /// A frame is damaged, or belongs to another chunk than the index states.
    #[error("the frame of chunk {chunk}: {error}")]
    Frame {
        /// The chunk that the index states.
        chunk: Digest,
        /// The defect of the frame.
        error: FrameError,
    },
}

/// The place of a chunk's frame in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// The digest of the chunk.
    pub chunk: Digest,
    /// First byte of the frame, from the pack's beginning.
    pub offset: u32,
    /// Length of the frame in bytes.
    pub length: u32,
}

impl PackEntry {
    /// Returns the frame's bytes in the pack.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset as usize..self.offset as usize + self.length as usize
    }
}

/// The kind of a pack's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Chunks = 0,
    WorkingSet = 1,
}

/// Returns the index of a pack of this kind, whose entries have `entry_bytes` each, and the end of
/// its frames.
fn index_of(pack: &[u8], kind: Kind, entry_bytes: usize) -> Result<(&[u8], usize), PackError> {
    check_length(pack.len())?;
    let header = &pack[..HEADER_BYTES];
    if header[..8] != HEADER[..8] {
        return Err(PackError::Header);
    }
    if u32_at(header, 8) != VERSION {
        return Err(PackError::Version(u32_at(header, 8)));
    }
    if u32_at(header, 12) != kind as u32 {
        return Err(PackError::Kind(u32_at(header, 12)));
    }
    index_in(pack, pack.len(), entry_bytes)
}

fn check_length(pack_bytes: usize) -> Result<(), PackError> {
    match (HEADER_BYTES + TRAILER_BYTES..=MAX_PACK_BYTES).contains(&pack_bytes) {
        true => Ok(()),
        false => Err(PackError::Length(pack_bytes)),
    }
}

/// Returns the offset of the index of a pack of `pack_bytes` bytes, and the number of its entries.
/// Reads the trailer, at the end of `end`.
fn index_bounds(end: &[u8], pack_bytes: usize) -> Result<(usize, u32), PackError> {
    check_length(pack_bytes)?;
    let trailer = end.last_chunk::<TRAILER_BYTES>().ok_or(PackError::Trailer)?;
    if trailer[48..] != TRAILER_MAGIC[..] {
        return Err(PackError::Trailer);
    }
    if u32_at(trailer, 44) != VERSION {
        return Err(PackError::Version(u32_at(trailer, 44)));
    }
    let offset = u64::from_le_bytes(*trailer[32..].first_chunk().expect("eight bytes"));
    let entries = u32_at(trailer, 40);
    let bounds = HEADER_BYTES..=pack_bytes - TRAILER_BYTES;
    let start = usize::try_from(offset).ok().filter(|start| bounds.contains(start));
    Ok((start.ok_or(PackError::IndexBounds { offset, entries })?, entries))
}

/// Returns the index of a pack of `pack_bytes` bytes from its end, and the end of its frames.
fn index_in(end: &[u8], pack_bytes: usize, entry_bytes: usize) -> Result<(&[u8], usize), PackError> {
    let (start, entries) = index_bounds(end, pack_bytes)?;
    let bounds = || PackError::IndexBounds { offset: start as u64, entries };
    let from = end.len().checked_sub(pack_bytes - start).ok_or_else(bounds)?;
    let (index, trailer) = end[from..].split_at(end.len() - from - TRAILER_BYTES);
    if Digest::of(index).as_bytes()[..] != trailer[..32] {
        return Err(PackError::IndexDigest);
    }
    match index.len() == entries as usize * entry_bytes {
        true => Ok((index, start)),
        false => Err(bounds()),
    }
}

/// Appends an index of `entries` entries, and the trailer.
fn finish(mut pack: Vec<u8>, index: &[u8], entries: usize) -> Vec<u8> {
    let index_at = pack.len();
    pack.extend_from_slice(index);
    pack.extend_from_slice(Digest::of(index).as_bytes());
    pack.extend_from_slice(&(index_at as u64).to_le_bytes());
    let count = u32::try_from(entries).expect("fewer entries than bytes");
    pack.extend_from_slice(&count.to_le_bytes());
    pack.extend_from_slice(&VERSION.to_le_bytes());
    pack.extend_from_slice(TRAILER_MAGIC);
    pack
}

/// Returns the places of the frames of a working set's pack, in the order in which the server sends
/// them.
///
/// # Errors
/// Returns the defect of the pack. The frames are not checked.
pub fn set_frames(pack: &[u8]) -> Result<Vec<Range<usize>>, PackError> {
    let (index, frames_end) = index_of(pack, Kind::WorkingSet, SET_ENTRY_BYTES)?;
    let entries = index.as_chunks::<SET_ENTRY_BYTES>().0.iter().enumerate();
    let range = |(index, bytes): (usize, &[u8; SET_ENTRY_BYTES])| {
        let start = u32_at(bytes, 0) as usize;
        let range = start..start + u32_at(bytes, 4) as usize;
        if range.is_empty() || range.start < HEADER_BYTES || range.end > frames_end {
            let reason = "its frame lies outside of the pack's frames";
            return Err(PackError::Entry { index, reason });
        }
        Ok(range)
    };
    entries.map(range).collect()
}

/// A builder of a working set's pack.
#[derive(Debug)]
pub struct SetPackBuilder {
    bytes: Vec<u8>,
    index: Vec<u8>,
}

impl Default for SetPackBuilder {
    fn default() -> Self {
        let mut bytes = HEADER.to_vec();
        bytes[12] = Kind::WorkingSet as u8;
        Self { bytes, index: Vec::new() }
    }
}

impl SetPackBuilder {
    /// Returns true if a frame of `frame_bytes` still fits into the longest pack.
    #[must_use]
    pub fn fits(&self, frame_bytes: usize) -> bool {
        self.bytes.len() + frame_bytes + self.index.len() + SET_ENTRY_BYTES + TRAILER_BYTES <= MAX_PACK_BYTES
    }

    /// Adds the next frame.
    ///
    /// # Panics
    /// Panics if the frame does not fit.
    pub fn push(&mut self, frame: &[u8]) {
        assert!(self.fits(frame.len()), "the caller asked whether it fits");
        let le = |n: usize| u32::try_from(n).expect("a pack has at most 64 MiB").to_le_bytes();
        self.index.extend_from_slice(&le(self.bytes.len()));
        self.index.extend_from_slice(&le(frame.len()));
        self.bytes.extend_from_slice(frame);
    }

    /// Completes the pack and returns its bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let entries = self.index.len() / SET_ENTRY_BYTES;
        finish(self.bytes, &self.index, entries)
    }
}

/// A valid index of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackIndex {
    entries: Vec<PackEntry>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl PackIndex {
    /// Parses the index of a pack. Reads only the pack's header, index and trailer.
    ///
    /// # Errors
    /// Returns the defect of these parts. The frames are not checked.
    pub fn parse(pack: &[u8]) -> Result<Self, PackError> {
        let (index, frames_end) = index_of(pack, Kind::Chunks, ENTRY_BYTES)?;
        Self::parse_entries(index, frames_end)
    }

    /// Returns how many bytes at the end of a pack of `pack_bytes` bytes hold its index and trailer.
    /// Reads the last 64 bytes of `end`.
    ///
    /// # Errors
    /// Returns the defect of the trailer.
    pub fn end_bytes(end: &[u8], pack_bytes: usize) -> Result<usize, PackError> {
        index_bounds(end, pack_bytes).map(|(start, _)| pack_bytes - start)
    }

    /// Parses the index of a pack of `pack_bytes` bytes from its end, which has at least
    /// [`PackIndex::end_bytes`] bytes.
    ///
    /// # Errors
    /// Returns the defect of the index or the trailer. The header and the frames are not checked.
    pub fn parse_end(end: &[u8], pack_bytes: usize) -> Result<Self, PackError> {
        let (index, frames_end) = index_in(end, pack_bytes, ENTRY_BYTES)?;
        Self::parse_entries(index, frames_end)
    }

    fn parse_entries(index: &[u8], frames_end: usize) -> Result<Self, PackError> {
        let mut entries: Vec<PackEntry> = Vec::with_capacity(index.len() / ENTRY_BYTES);
        for (i, bytes) in index.as_chunks::<ENTRY_BYTES>().0.iter().enumerate() {
            let wrong = |reason| Err(PackError::Entry { index: i, reason });
            let chunk = Digest::try_from(&bytes[..DIGEST_BYTES]).expect("32 bytes");
            if bytes[32..36] != [1, 0, 0, 0] {
                return wrong("a chunk has one frame and no base in this version");
            }
            let entry = PackEntry { chunk, offset: u32_at(bytes, 36), length: u32_at(bytes, 40) };
            if entries.last().is_some_and(|last| last.chunk >= chunk) {
                return wrong("not in ascending order of digest");
            }
            if (entry.offset as usize) < HEADER_BYTES || entry.range().end > frames_end || entry.length == 0 {
                return wrong("its frame lies outside of the pack's frames");
            }
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// Returns the chunks of the pack, in ascending order of digest.
    #[must_use]
    pub fn entries(&self) -> &[PackEntry] {
        &self.entries
    }

    /// Decodes every frame of `pack`, to which this index must belong, and compares it with its
    /// digest.
    ///
    /// # Errors
    /// Returns the first [`PackError::Frame`].
    ///
    /// # Blocking
    /// Computes for about a second for each GiB of plain bytes.
    pub fn check_frames(&self, pack: &[u8]) -> Result<(), PackError> {
        let (mut decoder, mut scratch) = (FrameDecoder::default(), Vec::new());
        for entry in &self.entries {
            check_frame(entry, pack, &mut decoder, &mut scratch)?;
        }
        Ok(())
    }
}

/// Decodes the frame of `entry` and compares it with its digest.
///
/// # Errors
/// Returns [`PackError::Frame`] if the frame is damaged.
pub fn check_frame(
    entry: &PackEntry,
    pack: &[u8],
    decoder: &mut FrameDecoder,
    scratch: &mut Vec<u8>,
) -> Result<(), PackError> {
    ChunkFrame::parse(&pack[entry.range()])
        .and_then(|frame| decoder.check(&frame, &entry.chunk, scratch))
        .map_err(|error| PackError::Frame { chunk: entry.chunk, error })
}

/// A builder of a pack of chunks.
#[derive(Debug)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<PackEntry>,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self::in_buffer(Vec::new())
    }
}

impl PackBuilder {
    /// Builds a pack in this buffer, and discards the buffer's content.
    #[must_use]
    pub fn in_buffer(mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        bytes.extend_from_slice(&HEADER);
        Self { bytes, entries: Vec::new() }
    }

    /// Returns true if a frame of `frame_bytes` still fits into `pack_bytes`, capped at 64 MiB.
    #[must_use]
    pub fn fits(&self, frame_bytes: usize, pack_bytes: usize) -> bool {
        let index = (self.entries.len() + 1) * ENTRY_BYTES;
        self.bytes.len() + frame_bytes + index + TRAILER_BYTES <= pack_bytes.min(MAX_PACK_BYTES)
    }

    /// Adds the frame of a chunk. The caller must not add a chunk twice.
    ///
    /// # Panics
    /// Panics if the pack would become longer than 64 MiB.
    pub fn push(&mut self, chunk: Digest, frame: &[u8]) {
        assert!(self.fits(frame.len(), MAX_PACK_BYTES), "the caller asked whether it fits");
        let at = |n: usize| u32::try_from(n).expect("a pack has at most 64 MiB");
        self.entries.push(PackEntry { chunk, offset: at(self.bytes.len()), length: at(frame.len()) });
        self.bytes.extend_from_slice(frame);
    }

    /// Returns true if the pack has no frame yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Completes the pack and returns its bytes.
    ///
    /// # Panics
    /// Panics if a chunk was added twice.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entries.sort_unstable_by_key(|entry| entry.chunk);
        assert!(self.entries.windows(2).all(|w| w[0].chunk != w[1].chunk), "no chunk is added twice");
        let mut index = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for entry in &self.entries {
            index.extend_from_slice(entry.chunk.as_bytes());
            index.extend_from_slice(&[1, 0, 0, 0]);
            index.extend_from_slice(&entry.offset.to_le_bytes());
            index.extend_from_slice(&entry.length.to_le_bytes());
        }
        finish(self.bytes, &index, self.entries.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FrameEncoder;
    use proptest::prelude::*;

    fn pack_of(chunks: &[Vec<u8>]) -> Vec<u8> {
        let (mut builder, mut encoder) = (PackBuilder::default(), FrameEncoder::new(1));
        for chunk in chunks {
            let mut frame = Vec::new();
            assert!(encoder.encode(chunk, &mut frame));
            builder.push(Digest::of(chunk), &frame);
        }
        builder.finish()
    }

    fn chunks(n: u8) -> Vec<Vec<u8>> {
        (1..=n).map(|i| vec![i; 4096 * usize::from(i)]).collect()
    }

    #[test]
    fn every_chunk_is_found_in_ascending_order() {
        let chunks = chunks(9);
        let pack = pack_of(&chunks);
        let index = PackIndex::parse(&pack).unwrap();
        index.check_frames(&pack).unwrap();
        let mut digests: Vec<_> = chunks.iter().map(|c| Digest::of(c)).collect();
        digests.sort();
        assert_eq!(index.entries().iter().map(|e| e.chunk).collect::<Vec<_>>(), digests);
        assert!(PackIndex::parse(&pack_of(&[])).unwrap().entries().is_empty());
    }

    #[test]
    fn a_frame_under_a_wrong_digest_is_named() {
        let mut builder = PackBuilder::default();
        let mut frame = Vec::new();
        FrameEncoder::new(1).encode(&[1; 4096], &mut frame);
        builder.push(Digest::of(b"another"), &frame);
        let pack = builder.finish();
        let error = PackIndex::parse(&pack).unwrap().check_frames(&pack).unwrap_err();
        assert!(error.to_string().contains(&Digest::of(b"another").to_string()), "{error}");
    }

    #[test]
    fn newer_versions_and_kinds_are_refused_by_name() {
        let pack = pack_of(&chunks(1));
        let with = |at: usize, byte: u8| {
            let mut pack = pack.clone();
            pack[at] = byte;
            PackIndex::parse(&pack)
        };
        assert_eq!(with(8, 2), Err(PackError::Version(2)));
        assert_eq!(with(12, 1), Err(PackError::Kind(1)));
        assert_eq!(set_frames(&pack), Err(PackError::Kind(0)));
        assert_eq!(with(0, b'P'), Err(PackError::Header));
        assert_eq!(with(pack.len() - 1, 0), Err(PackError::Trailer));
    }

    fn set_of(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut builder = SetPackBuilder::default();
        frames.iter().for_each(|frame| builder.push(frame));
        builder.finish()
    }

    proptest! {
        #[test]
        fn a_working_set_s_frames_come_back_in_order(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..20),
            at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let mut pack = set_of(&frames);
            let found: Vec<_> = set_frames(&pack).unwrap().into_iter().map(|range| pack[range].to_vec()).collect();
            prop_assert_eq!(&found, &frames);
            prop_assert!(set_frames(&pack[..pack.len() - 1]).is_err());
            let at = at.index(pack.len());
            pack[at] ^= 1 << bit;
            let in_frames = at < pack.len() - TRAILER_BYTES - frames.len() * SET_ENTRY_BYTES;
            prop_assert!(set_frames(&pack).is_err() || in_frames, "byte {} of index or trailer", at);
        }

        #[test]
        fn the_end_of_a_pack_has_its_index(read in 0usize..5000, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let pack = pack_of(&chunks(4));
            let end = &pack[pack.len().saturating_sub(read)..];
            let needed = PackIndex::end_bytes(&pack, pack.len()).unwrap();
            match PackIndex::parse_end(end, pack.len()) {
                Ok(index) => prop_assert_eq!(index, PackIndex::parse(&pack).unwrap()),
                Err(_) => prop_assert!(end.len() < needed),
            }
            let mut end = pack[pack.len() - needed..].to_vec();
            let at = at.index(end.len());
            end[at] ^= 1 << bit;
            prop_assert!(PackIndex::parse_end(&end, pack.len()).is_err());
        }

        #[test]
        fn a_truncated_pack_is_an_error(cut in 1usize..5000) {
            let pack = pack_of(&chunks(3));
            let cut = cut.min(pack.len());
            prop_assert!(PackIndex::parse(&pack[..pack.len() - cut]).is_err());
        }

        #[test]
        fn a_flipped_bit_is_found(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut pack = pack_of(&chunks(4));
            let at = at.index(pack.len());
            pack[at] ^= 1 << bit;
            // A padding byte of a zstd frame may not change its content. Then only the pack's own
            // digest reveals it.
            if let Ok(index) = PackIndex::parse(&pack) {
                let in_frames = at < pack.len() - TRAILER_BYTES - 4 * ENTRY_BYTES;
                prop_assert!(in_frames, "byte {} of index or trailer", at);
                let _ = index.check_frames(&pack);
            }
        }

        #[test]
        fn any_bytes_are_a_pack_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), dress in any::<bool>()) {
            if dress && bytes.len() >= 80 {
                let end = bytes.len();
                bytes[..16].copy_from_slice(&HEADER);
                let digest = Digest::of(&bytes[16..end - 64]);
                bytes[end - 64..end - 32].copy_from_slice(digest.as_bytes());
                bytes[end - 32..end - 24].copy_from_slice(&16u64.to_le_bytes());
                let entries = u32::try_from((end - 80) / ENTRY_BYTES).unwrap();
                bytes[end - 24..end - 20].copy_from_slice(&entries.to_le_bytes());
                bytes[end - 20..end - 16].copy_from_slice(&VERSION.to_le_bytes());
                bytes[end - 16..].copy_from_slice(TRAILER_MAGIC);
            }
            if let Ok(index) = PackIndex::parse(&bytes) {
                let _ = index.check_frames(&bytes);
            }
        }
    }
}
