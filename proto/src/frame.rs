//! Frames: the non-zero pages of one chunk, compressed.
//!
//! Packs store frames, and messages carry them unchanged: the pushing client encodes a frame, and
//! the restoring client decodes it. The layout, integers little-endian:
//!
//! ```text
//! offset  size
//!      0     1  codec: 0 raw, 1 zstd, 2 zstd with a dictionary (kept for later, refused here)
//!      1     1  kind: 0 a chunk's frame (1: a working set's, see [`crate::set_frame`]; 2: a patch,
//!               see [`patch`])
//!      2     2  number of page runs: 1 to 256
//!      4     4  chunk length: plain bytes of the chunk, zeros included: 1 to 2 MiB
//!      8     4  plain length: bytes of the pages held, a chunk's last page not padded
//!     12     4  coded length: equal to plain length if raw, else less
//!     16    4n  page runs: first page (2 bytes), number of pages (2 bytes); ascending, apart
//!  16+4n        the coded pages, one after another
//! ```
//!
//! Pages outside of all runs are zero. A frame never holds a zero page. So a chunk and a codec
//! determine the frame, and a chunk of zeros has none.

pub mod patch;

use crate::digest::Digest;
use crate::page::{ChunkSize, MAX_PAGES_PER_CHUNK, PAGE_BYTES, PageRun, is_zero};

const HEADER_BYTES: usize = 16;
const RUN_BYTES: usize = 4;
/// Runs are at least one page apart, so a chunk of 512 pages has at most 256.
const MAX_RUNS: usize = MAX_PAGES_PER_CHUNK / 2;

/// Bytes of the longest frame: header, runs and an uncompressed chunk.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + RUN_BYTES * MAX_RUNS + ChunkSize::MAX.bytes();

/// Returns the most bytes of a frame of a chunk with so many bytes.
#[must_use]
pub const fn max_frame_bytes(chunk_bytes: usize) -> usize {
    HEADER_BYTES + RUN_BYTES * chunk_bytes.div_ceil(PAGE_BYTES).div_ceil(2) + chunk_bytes
}

/// A defect of a frame, or a frame of another chunk than the expected one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The frame ends before its header does, or has another length than its header states.
    #[error("the frame has {actual} bytes, its header says {expected}")]
    Length {
        /// The actual number of bytes.
        actual: usize,
        /// The required number of bytes.
        expected: usize,
    },
    /// A codec that this version does not know.
    #[error("codec {0} is not known")]
    Codec(u8),
    /// A kind that this version does not know, or that has no place here.
    #[error("kind {0} has no place here")]
    Kind(u8),
    /// A header field out of its range.
    #[error("{field} is {value}, which is not in its range")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// The value of the field.
        value: u32,
    },
    /// Page runs that overlap, are adjacent, or lie outside of the chunk.
    #[error("page run {index} (page {first}, {count} pages) is not ascending, apart and in the chunk")]
    Run {
        /// The index of the run.
        index: usize,
        /// The first page of the run.
        first: u16,
        /// The number of pages of the run.
        count: u16,
    },
    /// The coded bytes do not decode to what the header promises.
    #[error("the coded pages do not decode: {0}")]
    Decode(String),
    /// The frame holds a page that is zero.
    #[error("page {0} is held and zero")]
    ZeroPage(usize),
    /// The frame is for a chunk of another length.
    #[error("the frame is of a chunk of {actual} bytes, the manifest says {expected}")]
    ChunkLength {
        /// The length in the frame.
        actual: usize,
        /// The expected length.
        expected: usize,
    },
    /// The frame decodes to another chunk than the expected one.
    #[error("the frame decodes to a chunk with digest {actual}, the manifest says {expected}")]
    Digest {
        /// Digest of the decoded bytes.
        actual: Digest,
        /// The expected digest.
        expected: Digest,
    },
}

/// The coding of a frame's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Chunk = 0,
    Patch = 2,
}

/// A frame with a valid header; its coded bytes are unchecked.
#[derive(Clone, Copy, Debug)]
pub struct ChunkFrame<'a> {
    codec: Codec,
    chunk_bytes: usize,
    plain_bytes: usize,
    runs: &'a [[u8; RUN_BYTES]],
    coded: &'a [u8],
}

fn page_run(bytes: [u8; RUN_BYTES]) -> PageRun {
    let [a, b, c, d] = bytes;
    PageRun { first: u16::from_le_bytes([a, b]), count: u16::from_le_bytes([c, d]) }
}

impl<'a> ChunkFrame<'a> {
    /// Parses `bytes` as one frame, and checks its header.
    ///
    /// # Errors
    /// Returns the defect of the header, or [`FrameError::Length`] if bytes follow the frame.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        Self::parse_whole(bytes, Kind::Chunk)
    }

    fn parse_whole(bytes: &'a [u8], kind: Kind) -> Result<Self, FrameError> {
        let (frame, rest) = Self::parse_kind(bytes, kind)?;
        if rest.is_empty() {
            return Ok(frame);
        }
        Err(FrameError::Length { actual: bytes.len(), expected: bytes.len() - rest.len() })
    }

    /// Parses the frame at the start of `bytes`, and checks its header. Returns the bytes after the
    /// frame, too.
    ///
    /// # Errors
    /// Returns the defect of the header.
    pub fn parse_first(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), FrameError> {
        Self::parse_kind(bytes, Kind::Chunk)
    }

    fn parse_kind(bytes: &'a [u8], kind: Kind) -> Result<(Self, &'a [u8]), FrameError> {
        let too_short = |expected| FrameError::Length { actual: bytes.len(), expected };
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(too_short(HEADER_BYTES))?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);

        let codec = match header[0] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => return Err(FrameError::Codec(other)),
        };
        if header[1] != kind as u8 {
            return Err(FrameError::Kind(header[1]));
        }
        let run_count = usize::from(u16::from_le_bytes([header[2], header[3]]));
        let in_range = |field, value: u32, max: usize| match value as usize {
            n if (1..=max).contains(&n) => Ok(n),
            _ => Err(FrameError::Field { field, value }),
        };
        let chunk_bytes = in_range("chunk length", word(4), ChunkSize::MAX.bytes())?;
        let plain_bytes = in_range("plain length", word(8), chunk_bytes)?;
        let coded_bytes = in_range("coded length", word(12), plain_bytes)?;
        if (codec == Codec::Raw) != (coded_bytes == plain_bytes) {
            return Err(FrameError::Field { field: "coded length", value: word(12) });
        }
        in_range("number of page runs", u32::from(u16::from_le_bytes([header[2], header[3]])), MAX_RUNS)?;

        let (runs, rest) = rest
            .split_at_checked(run_count * RUN_BYTES)
            .ok_or(too_short(HEADER_BYTES + run_count * RUN_BYTES))?;
        let runs = runs.as_chunks::<RUN_BYTES>().0;
        let (coded, rest) = rest
            .split_at_checked(coded_bytes)
            .ok_or(too_short(HEADER_BYTES + run_count * RUN_BYTES + coded_bytes))?;

        let frame = Self { codec, chunk_bytes, plain_bytes, runs, coded };
        frame.check_runs(word(8))?;
        Ok((frame, rest))
    }

    fn check_runs(&self, plain_length: u32) -> Result<(), FrameError> {
        let pages = self.chunk_bytes.div_ceil(PAGE_BYTES);
        let mut first_allowed = 0;
        let mut held = 0;
        for (index, run) in self.runs().enumerate() {
            if run.count == 0 || usize::from(run.first) < first_allowed || run.end_page() > pages {
                return Err(FrameError::Run { index, first: run.first, count: run.count });
            }
            held += run.end_byte().min(self.chunk_bytes) - run.start_byte();
            first_allowed = run.end_page() + 1;
        }
        if held != self.plain_bytes {
            return Err(FrameError::Field { field: "plain length", value: plain_length });
        }
        Ok(())
    }

    /// Returns the length of the chunk in bytes, zeros included: 1 to 2 MiB.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Returns the pages that the frame holds, ascending; all others of the chunk are zero.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = PageRun> + use<'a> {
        self.runs.iter().map(|bytes| page_run(*bytes))
    }
}

/// A decoder of frames, which keeps the decompressor's state and memory between them.
#[derive(Default)]
pub struct FrameDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
    held: Vec<u8>,
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

impl FrameDecoder {
    /// Writes the chunk's plain bytes, zeros included, to `chunk`.
    ///
    /// The bytes are not verified; see [`FrameDecoder::decode_verified`]. After an error the
    /// content of `chunk` is unspecified.
    ///
    /// # Errors
    /// Returns [`FrameError::ChunkLength`] if `chunk` has another length than the frame's chunk,
    /// [`FrameError::Decode`] if the coded bytes are damaged.
    pub fn decode(&mut self, frame: &ChunkFrame<'_>, chunk: &mut [u8]) -> Result<(), FrameError> {
        if chunk.len() != frame.chunk_bytes {
            return Err(FrameError::ChunkLength { actual: frame.chunk_bytes, expected: chunk.len() });
        }
        if frame.plain_bytes == frame.chunk_bytes {
            return self.decode_held(frame, chunk);
        }
        let mut held = std::mem::take(&mut self.held);
        held.resize(frame.plain_bytes, 0);
        let outcome = self.decode_held(frame, &mut held);
        if outcome.is_ok() {
            scatter(frame, &held, chunk);
        }
        self.held = held;
        outcome
    }

    fn decode_held(&mut self, frame: &ChunkFrame<'_>, held: &mut [u8]) -> Result<(), FrameError> {
        match frame.codec {
            Codec::Raw => held.copy_from_slice(frame.coded),
            Codec::Zstd => {
                let decoded = self.zstd.decompress_to_buffer(frame.coded, held);
                let decoded = decoded.map_err(|e| FrameError::Decode(e.to_string()))?;
                if decoded != held.len() {
                    let reason = format!("{decoded} bytes and not {}", held.len());
                    return Err(FrameError::Decode(reason));
                }
            }
        }
        Ok(())
    }

    /// Decodes as [`FrameDecoder::decode`] does, and compares the bytes with `digest`.
    ///
    /// # Errors
    /// Returns the errors of [`FrameDecoder::decode`], or [`FrameError::Digest`] for another chunk.
    pub fn decode_verified(
        &mut self,
        frame: &ChunkFrame<'_>,
        digest: &Digest,
        chunk: &mut [u8],
    ) -> Result<(), FrameError> {
        self.decode(frame, chunk)?;
        let actual = Digest::of(chunk);
        if actual == *digest { Ok(()) } else { Err(FrameError::Digest { actual, expected: *digest }) }
    }

    /// Verifies a frame as [`FrameDecoder::decode_verified`] does, into scratch memory, and rejects
    /// a frame that holds a zero page. A store checks each frame in this way before it keeps it.
    ///
    /// # Errors
    /// Returns the errors of [`FrameDecoder::decode_verified`], or [`FrameError::ZeroPage`].
    pub fn check(
        &mut self,
        frame: &ChunkFrame<'_>,
        digest: &Digest,
        scratch: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        scratch.resize(frame.chunk_bytes, 0);
        self.decode_verified(frame, digest, scratch)?;
        for run in frame.runs() {
            for page in usize::from(run.first)..run.end_page() {
                let end = ((page + 1) * PAGE_BYTES).min(scratch.len());
                if is_zero(&scratch[page * PAGE_BYTES..end]) {
                    return Err(FrameError::ZeroPage(page));
                }
            }
        }
        Ok(())
    }
}

/// Copies the held pages to their places in the chunk, and writes zeros between them.
fn scatter(frame: &ChunkFrame<'_>, held: &[u8], chunk: &mut [u8]) {
    let (mut taken, mut written) = (0, 0);
    for run in frame.runs() {
        let (start, end) = (run.start_byte(), run.end_byte().min(chunk.len()));
        chunk[written..start].fill(0);
        chunk[start..end].copy_from_slice(&held[taken..taken + end - start]);
        taken += end - start;
        written = end;
    }
    chunk[written..].fill(0);
}

/// An encoder of frames, which keeps the compressor's state and memory between them.
pub struct FrameEncoder {
    zstd: zstd::bulk::Compressor<'static>,
    /// The held pages of a chunk that also has zero pages, one after another.
    held: Vec<u8>,
    /// The output of zstd, so that a frame takes no more memory than it has bytes.
    coded: Vec<u8>,
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameEncoder").finish_non_exhaustive()
    }
}

/// The zstd levels for frames.
pub const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

impl FrameEncoder {
    /// Makes an encoder that compresses at zstd's `level`, clamped to [`ZSTD_LEVELS`].
    ///
    /// # Panics
    /// Panics if zstd cannot allocate memory.
    #[must_use]
    pub fn new(level: i32) -> Self {
        let level = level.clamp(*ZSTD_LEVELS.start(), *ZSTD_LEVELS.end());
        let zstd = zstd::bulk::Compressor::new(level).expect("zstd takes levels 1 to 19");
        Self { zstd, held: Vec::new(), coded: Vec::new() }
    }

    /// Appends the frame of the chunk with these plain bytes to `out`. Returns false, and appends
    /// nothing, if they are all zero.
    ///
    /// # Panics
    /// Panics if `chunk` is empty or longer than the largest chunk.
    pub fn encode(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> bool {
        assert!((1..=ChunkSize::MAX.bytes()).contains(&chunk.len()), "a chunk has 1 byte to 2 MiB");
        let runs = non_zero_runs(chunk);
        if runs.is_empty() {
            return false;
        }
        let mut held = std::mem::take(&mut self.held);
        held.clear();
        let whole = runs.len() == 1 && runs[0].first == 0 && runs[0].end_byte() >= chunk.len();
        if !whole {
            for run in &runs {
                held.extend_from_slice(&chunk[run.start_byte()..run.end_byte().min(chunk.len())]);
            }
        }
        self.encode_held(Kind::Chunk, chunk.len(), &runs, if whole { chunk } else { &held }, out);
        self.held = held;
        true
    }

    fn encode_held(
        &mut self,
        kind: Kind,
        chunk_len: usize,
        runs: &[PageRun],
        held: &[u8],
        out: &mut Vec<u8>,
    ) {
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        for run in runs {
            out.extend_from_slice(&run.first.to_le_bytes());
            out.extend_from_slice(&run.count.to_le_bytes());
        }
        // The limit is one byte less than the plain pages, so that incompressible pages are stored
        // raw.
        let most = held.len() - 1;
        if self.coded.len() < most {
            self.coded.resize(most, 0);
        }
        let (codec, coded) = match self.zstd.compress_to_buffer(held, &mut self.coded[..most]) {
            Ok(coded) => (Codec::Zstd, &self.coded[..coded]),
            Err(_) => (Codec::Raw, held),
        };
        out.extend_from_slice(coded);
        let header = &mut out[start..start + HEADER_BYTES];
        header[0] = codec as u8;
        header[1] = kind as u8;
        header[2..4].copy_from_slice(&le32(runs.len())[..2]);
        header[4..8].copy_from_slice(&le32(chunk_len));
        header[8..12].copy_from_slice(&le32(held.len()));
        header[12..16].copy_from_slice(&le32(coded.len()));
    }
}

fn le32(n: usize) -> [u8; 4] {
    u32::try_from(n).expect("a chunk has at most 2 MiB").to_le_bytes()
}

fn non_zero_runs(chunk: &[u8]) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for (page, bytes) in (0u16..).zip(chunk.chunks(PAGE_BYTES)) {
        if is_zero(bytes) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end_page() == usize::from(page) => run.count += 1,
            _ => runs.push(PageRun { first: page, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame_of(chunk: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        FrameEncoder::new(3).encode(chunk, &mut out).then_some(out)
    }

    /// Typical chunks: pages of zeros, of text and of noise, the last one cut.
    pub(crate) fn any_chunk() -> impl Strategy<Value = Vec<u8>> {
        let page = prop_oneof![
            Just(vec![0; PAGE_BYTES]),
            any::<u8>().prop_map(|b| vec![b; PAGE_BYTES]),
            proptest::collection::vec(any::<u8>(), PAGE_BYTES),
        ];
        (proptest::collection::vec(page, 1..20), 0..PAGE_BYTES).prop_map(|(pages, cut)| {
            let mut chunk = pages.concat();
            chunk.truncate(chunk.len() - cut);
            chunk
        })
    }

    #[test]
    fn zeros_have_no_frame() {
        assert_eq!(frame_of(&vec![0; 65536]), None);
        assert_eq!(frame_of(&[0]), None);
    }

    #[test]
    fn noise_is_stored_raw_and_text_shrinks() {
        let mut noise = vec![0; 65536];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        assert_eq!(frame_of(&noise).unwrap().len(), 65536 + 20);
        assert!(frame_of(&b"text ".repeat(13107)).unwrap().len() < 200);
    }

    #[test]
    fn a_huge_claim_is_refused_before_memory_is_taken() {
        let mut frame = frame_of(&[1; 4096]).unwrap();
        frame[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = ChunkFrame::parse(&frame).unwrap_err();
        assert_eq!(error, FrameError::Field { field: "chunk length", value: u32::MAX });
        // A bomb: the header promises a page, the zstd frame holds 1 MiB.
        let bomb = zstd::bulk::compress(&vec![7; 1 << 20], 3).unwrap();
        let mut frame = frame_of(&[1; 4096]).unwrap();
        frame.truncate(20);
        frame[12..16].copy_from_slice(&le32(bomb.len()));
        frame.extend_from_slice(&bomb);
        let frame = ChunkFrame::parse(&frame).unwrap();
        let error = FrameDecoder::default().decode(&frame, &mut [0; 4096]).unwrap_err();
        assert!(matches!(error, FrameError::Decode(_)), "{error}");
    }

    #[test]
    fn a_held_zero_page_is_refused() {
        let mut chunk = vec![0; 8192];
        chunk[0] = 1;
        let mut frame = frame_of(&chunk).unwrap();
        // A raw frame that holds both pages.
        frame.truncate(20);
        frame[0] = 0;
        frame[8..12].copy_from_slice(&le32(8192));
        frame[12..16].copy_from_slice(&le32(8192));
        frame[18..20].copy_from_slice(&[2, 0]);
        frame.extend_from_slice(&chunk);
        let frame = ChunkFrame::parse(&frame).unwrap();
        let error = FrameDecoder::default().check(&frame, &Digest::of(&chunk), &mut Vec::new());
        assert_eq!(error, Err(FrameError::ZeroPage(1)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn every_chunk_comes_back(chunk in any_chunk()) {
            let Some(frame) = frame_of(&chunk) else {
                prop_assert!(is_zero(&chunk));
                return Ok(());
            };
            let frame = ChunkFrame::parse(&frame).unwrap();
            let mut out = vec![0xAA; chunk.len()];
            FrameDecoder::default().decode_verified(&frame, &Digest::of(&chunk), &mut out).unwrap();
            prop_assert_eq!(&out, &chunk);
            FrameDecoder::default().check(&frame, &Digest::of(&chunk), &mut Vec::new()).unwrap();
        }

        #[test]
        fn a_flipped_bit_is_an_error_or_changes_nothing(chunk in any_chunk(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let Some(mut frame) = frame_of(&chunk) else { return Ok(()) };
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            let Ok(frame) = ChunkFrame::parse(&frame) else { return Ok(()) };
            let mut out = vec![0; chunk.len()];
            if FrameDecoder::default().decode_verified(&frame, &Digest::of(&chunk), &mut out).is_ok() {
                prop_assert_eq!(out, chunk);
            }
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = ChunkFrame::parse(&bytes) {
                let mut out = vec![0; frame.chunk_bytes()];
                let _ = FrameDecoder::default().decode(&frame, &mut out);
            }
        }
    }
}
