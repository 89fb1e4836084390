//! A working set's frames: pages from anywhere in an image, compressed together, with their proofs.
//!
//! The whole chunk verifies a chunk's frame. Here a frame may hold a part of a chunk, so each chunk
//! has a proof ([`crate::proof`]) against its digest in the manifest. The layout, integers
//! little-endian:
//!
//! ```text
//! offset  size
//!      0     1  codec: 0 raw, 1 zstd
//!      1     1  kind: 1
//!      2     2  number of page runs: 1 to 512
//!      4     4  length of the proofs
//!      8     4  plain length: bytes of held pages, a file's last page not padded: at most 2 MiB
//!     12     4  coded length: equal to plain length if raw, else less
//!     16   12n  page runs: file (4 bytes), first page (4), pages (2), 0 held or 1 zero (2)
//! 16+12n        the proofs of the chunks, one after another
//!               the coded pages, one after another
//! ```
//!
//! A file is numbered by its place among the image's regular files, from 0. Runs are ascending, and
//! each lies in one chunk. A chunk that is zero in the manifest has no proof, and its pages are not
//! held.

use crate::manifest::{ChunkContent, FileEntry, chunk_len};
use crate::page::{ChunkIndex, ChunkSize, PAGE_BYTES, PageRun, is_zero};
use crate::proof::{self, ProofError};

const HEADER_BYTES: usize = 16;
const RUN_BYTES: usize = 12;
/// Most runs, and most pages, of a frame.
pub const MAX_SET_FRAME_PAGES: usize = 512;
/// Most bytes of a proof: for one page of a chunk of 2 MiB, nine halvings.
const MAX_PROOF_BYTES: usize = 9 * 32;
/// Most bytes of a frame.
pub const MAX_SET_FRAME_BYTES: usize =
    HEADER_BYTES + MAX_SET_FRAME_PAGES * (RUN_BYTES + MAX_PROOF_BYTES + PAGE_BYTES);

/// A defect of a working set's frame, or a frame of another image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SetFrameError {
    /// The frame has another length than its header states.
    #[error("the frame has {actual} bytes, its header says {expected}")]
    Length {
        /// The actual number of bytes.
        actual: usize,
        /// The required number of bytes.
        expected: usize,
    },
    /// An unknown kind or codec.
    #[error("codec {codec}, kind {kind}: not a working set's frame of this version")]
    Kind {
        /// The first byte.
        codec: u8,
        /// The second byte.
        kind: u8,
    },
    /// A header field out of its range.
    #[error("{field} is {value}, which is not in its range")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// The value of the field.
        value: u32,
    },
    /// A run that is not ascending, not in the image, or in two chunks.
    #[error("page run {index} (file {file}, page {first}, {count} pages): {reason}")]
    Run {
        /// The index of the run.
        index: usize,
        /// The file of the run.
        file: u32,
        /// The first page of the run.
        first: u32,
        /// The number of pages of the run.
        count: u16,
        /// The defect of the run.
        reason: &'static str,
    },
    /// The coded bytes do not decode to what the header promises.
    #[error("the coded pages do not decode: {0}")]
    Decode(String),
    /// The pages of a chunk differ from the image's.
    #[error("chunk {chunk}: {error}")]
    Proof {
        /// The index of the chunk.
        chunk: ChunkIndex,
        /// The reason why the proof fails.
        error: ProofError,
    },
    /// The chunk is zero in the manifest, but the frame holds pages of it.
    #[error("chunk {0} is zero, the frame holds pages of it")]
    NotZero(ChunkIndex),
    /// The frame has bytes of proofs after the last chunk's proof.
    #[error("{0} bytes of proofs belong to nothing")]
    ProofsLeft(usize),
}

/// Neighbouring pages of one chunk of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetRun {
    /// The file's place among the image's regular files.
    pub file: u32,
    /// The first page of the file.
    pub first: u32,
    /// Number of pages.
    pub count: u16,
    /// True if the pages are zero; the frame then holds no bytes of them.
    pub is_zero: bool,
}

impl SetRun {
    /// Returns true if `other` begins at the end of this run and is of the same kind.
    fn is_before(&self, other: &Self) -> bool {
        let end = u64::from(self.first) + u64::from(self.count);
        self.file == other.file && self.is_zero == other.is_zero && end == u64::from(other.first)
    }

    fn parse(bytes: &[u8; RUN_BYTES]) -> (Self, u16) {
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let half = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let run = Self { file: word(0), first: word(4), count: half(8), is_zero: half(10) == 1 };
        (run, half(10))
    }

    fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }

    fn wrong(&self, index: usize, reason: &'static str) -> SetFrameError {
        SetFrameError::Run { index, file: self.file, first: self.first, count: self.count, reason }
    }
}

/// A frame with a valid header that was compared with no image.
#[derive(Clone, Copy, Debug)]
pub struct SetFrame<'a> {
    is_zstd: bool,
    plain_bytes: usize,
    runs: &'a [[u8; RUN_BYTES]],
    proofs: &'a [u8],
    coded: &'a [u8],
}

impl<'a> SetFrame<'a> {
    /// Parses `bytes` as one frame, and checks its header.
    ///
    /// # Errors
    /// Returns the defect of the header.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, SetFrameError> {
        let too_short = |expected| SetFrameError::Length { actual: bytes.len(), expected };
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(too_short(HEADER_BYTES))?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        if header[0] > 1 || header[1] != 1 {
            return Err(SetFrameError::Kind { codec: header[0], kind: header[1] });
        }
        let is_zstd = header[0] == 1;
        let run_count = usize::from(u16::from_le_bytes([header[2], header[3]]));
        let at_most = |field, value: u32, max: usize| match value as usize {
            n if n <= max => Ok(n),
            _ => Err(SetFrameError::Field { field, value }),
        };
        let proof_bytes = at_most("proof length", word(4), MAX_SET_FRAME_PAGES * MAX_PROOF_BYTES)?;
        let plain_bytes = at_most("plain length", word(8), MAX_SET_FRAME_PAGES * PAGE_BYTES)?;
        let coded_bytes = at_most("coded length", word(12), plain_bytes)?;
        if is_zstd != (coded_bytes < plain_bytes) {
            return Err(SetFrameError::Field { field: "coded length", value: word(12) });
        }
        if !(1..=MAX_SET_FRAME_PAGES).contains(&run_count) {
            let value = u32::try_from(run_count).expect("two bytes");
            return Err(SetFrameError::Field { field: "number of page runs", value });
        }
        let expected = HEADER_BYTES + run_count * RUN_BYTES + proof_bytes + coded_bytes;
        if bytes.len() != expected {
            return Err(too_short(expected));
        }
        let (runs, rest) = rest.split_at(run_count * RUN_BYTES);
        let (proofs, coded) = rest.split_at(proof_bytes);
        let frame = Self { is_zstd, plain_bytes, runs: runs.as_chunks().0, proofs, coded };
        frame.check_runs()?;
        Ok(frame)
    }

    fn check_runs(&self) -> Result<(), SetFrameError> {
        let mut next = (0, 0);
        let mut pages = 0;
        for (index, bytes) in self.runs.iter().enumerate() {
            let (run, kind) = SetRun::parse(bytes);
            pages += usize::from(run.count);
            if run.count == 0 || (run.file, u64::from(run.first)) < next || pages > MAX_SET_FRAME_PAGES {
                return Err(run.wrong(index, "empty, not ascending, or too many pages"));
            }
            if kind > 1 || run.end() > 1 << 32 {
                return Err(run.wrong(index, "neither held nor zero, or beyond any file"));
            }
            next = (run.file, run.end());
        }
        Ok(())
    }

    /// Returns the number of pages, zero ones included.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.runs().map(|run| usize::from(run.count)).sum()
    }

    /// Returns the runs of pages, ascending.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = SetRun> + use<'a> {
        self.runs.iter().map(|bytes| SetRun::parse(bytes).0)
    }
}

/// The manifest with which a frame's pages are compared.
pub trait Expected {
    /// Returns the image's chunk size.
    fn chunk_size(&self) -> ChunkSize;
    /// Returns the regular file at this place.
    fn file(&self, place: u32) -> Option<FileEntry>;
    /// Returns the content of a chunk; `None` if its segment has not arrived.
    fn chunk(&self, chunk: ChunkIndex) -> Option<ChunkContent>;
}

/// The pages of one chunk in a frame.
struct Group {
    chunk: ChunkIndex,
    /// Length of the chunk in bytes.
    chunk_bytes: usize,
    /// The runs, both as pages of the chunk and as pages of the file.
    runs: Vec<(PageRun, SetRun)>,
}

/// A decoder of frames, which keeps the decompressor's state and memory between them.
#[derive(Default)]
pub struct SetDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
    plain: Vec<u8>,
    /// Plain pages of a chunk that has zero pages in the frame.
    laid: Vec<u8>,
    /// The held pages, each padded.
    padded: Vec<u8>,
    runs: Vec<SetRun>,
}

impl std::fmt::Debug for SetDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SetDecoder").finish_non_exhaustive()
    }
}

impl SetDecoder {
    /// Decodes a frame and proves each of its pages against the image. [`SetDecoder::pages`] then
    /// returns them.
    ///
    /// Pages of chunks whose content is unknown yet cannot be proved, and are left out. If the
    /// frame has only zero pages of such a chunk, all pages after it are left out, too.
    ///
    /// # Errors
    /// Returns the reason why the frame does not belong to this image; the decoder then has no
    /// pages.
    pub fn decode(&mut self, frame: &SetFrame<'_>, image: &impl Expected) -> Result<(), SetFrameError> {
        self.runs.clear();
        self.plain.resize(frame.plain_bytes, 0);
        if frame.is_zstd {
            let decoded = self.zstd.decompress_to_buffer(frame.coded, &mut self.plain[..]);
            let decoded = decoded.map_err(|e| SetFrameError::Decode(e.to_string()))?;
            if decoded != frame.plain_bytes {
                let reason = format!("{decoded} bytes and not {}", frame.plain_bytes);
                return Err(SetFrameError::Decode(reason));
            }
        } else {
            self.plain.copy_from_slice(frame.coded);
        }
        let proved = self.prove(frame, image);
        if proved.is_err() {
            self.runs.clear();
        }
        proved
    }

    fn prove(&mut self, frame: &SetFrame<'_>, image: &impl Expected) -> Result<(), SetFrameError> {
        let (mut proofs, mut taken) = (frame.proofs, 0);
        self.padded.clear();
        let mut runs = frame.runs().enumerate().peekable();
        while let Some(group) = next_group(&mut runs, image)? {
            let page_runs: Vec<PageRun> = group.runs.iter().map(|(run, _)| *run).collect();
            let held = held_bytes(&group);
            let bytes = self.plain.get(taken..taken + held).ok_or(SetFrameError::Field {
                field: "plain length",
                value: u32::try_from(frame.plain_bytes).expect("checked"),
            })?;
            taken += held;
            let content = image.chunk(group.chunk);
            if content.is_none() && held == 0 {
                // The frame has a proof for this chunk only if the chunk's other pages are not all
                // zero, which is unknown. So the place of the next proof is unknown, too.
                return Ok(());
            }
            let is_zero = matches!(content, Some(ChunkContent::Zero));
            if is_zero && held > 0 {
                return Err(SetFrameError::NotZero(group.chunk));
            }
            let wanted = if is_zero { 0 } else { proof::proof_bytes(group.chunk_bytes, &page_runs) };
            let (proof, rest) = proofs.split_at_checked(wanted).ok_or(SetFrameError::Proof {
                chunk: group.chunk,
                error: ProofError::ProofBytes(proofs.len()),
            })?;
            proofs = rest;
            match content {
                None => continue,
                Some(ChunkContent::Zero) => {}
                Some(ChunkContent::Data(digest)) => {
                    let pages = if group.runs.iter().any(|(_, run)| run.is_zero) {
                        lay(&group, bytes, &mut self.laid);
                        &self.laid
                    } else {
                        bytes
                    };
                    let proved = proof::verify(&digest, group.chunk_bytes, &page_runs, pages, proof);
                    proved.map_err(|error| SetFrameError::Proof { chunk: group.chunk, error })?;
                }
            }
            self.runs.extend(group.runs.iter().map(|(_, run)| *run));
            self.padded.extend_from_slice(bytes);
            self.padded.resize(self.padded.len().next_multiple_of(PAGE_BYTES), 0);
        }
        match (proofs.len(), frame.plain_bytes - taken) {
            (0, 0) => Ok(()),
            (0, _) => Err(SetFrameError::Field {
                field: "plain length",
                value: u32::try_from(frame.plain_bytes).expect("checked"),
            }),
            (left, _) => Err(SetFrameError::ProofsLeft(left)),
        }
    }

    /// Returns the pages of the last decoded frame, and their bytes, padded with zeros to whole
    /// pages; `None` for zeros.
    pub fn pages(&self) -> impl Iterator<Item = (SetRun, Option<&[u8]>)> {
        self.parts(|_, _| false)
    }

    /// Returns the same pages with adjacent runs of one file joined, also across chunks.
    pub fn stretches(&self) -> impl Iterator<Item = (SetRun, Option<&[u8]>)> {
        self.parts(SetRun::is_before)
    }

    fn parts(
        &self,
        are_one: impl Fn(&SetRun, &SetRun) -> bool,
    ) -> impl Iterator<Item = (SetRun, Option<&[u8]>)> {
        let mut next = 0;
        self.runs.chunk_by(are_one).map(move |runs| {
            let run = SetRun { count: runs.iter().map(|run| run.count).sum(), ..runs[0] };
            let bytes = (!run.is_zero).then(|| {
                let bytes = usize::from(run.count) * PAGE_BYTES;
                next += bytes;
                &self.padded[next - bytes..next]
            });
            (run, bytes)
        })
    }
}

/// Returns the next runs that lie in one chunk.
fn next_group(
    runs: &mut std::iter::Peekable<impl Iterator<Item = (usize, SetRun)>>,
    image: &impl Expected,
) -> Result<Option<Group>, SetFrameError> {
    let Some((index, first)) = runs.next() else { return Ok(None) };
    let file = image.file(first.file).ok_or_else(|| first.wrong(index, "the image has no such file"))?;
    let chunk_pages = image.chunk_size().bytes() / PAGE_BYTES;
    let in_chunk = |run: &SetRun| {
        let chunk = u64::from(run.first) / chunk_pages as u64;
        let page = u16::try_from(run.first as usize % chunk_pages).expect("at most 512 pages a chunk");
        (chunk, PageRun { first: page, count: run.count })
    };
    let (number, page_run) = in_chunk(&first);
    let chunk = ChunkIndex(file.first_chunk.0 + number);
    let beyond = || first.wrong(index, "not in its file");
    let chunk_bytes = chunk_len(image.chunk_size(), &file, chunk).ok_or_else(beyond)?;
    let mut group = Group { chunk, chunk_bytes, runs: vec![(page_run, first)] };
    while let Some((_, run)) = runs.next_if(|(_, run)| run.file == first.file && in_chunk(run).0 == number) {
        group.runs.push((in_chunk(&run).1, run));
    }
    let last = group.runs.last().expect("not empty").0;
    if last.end_page() > chunk_bytes.div_ceil(PAGE_BYTES) {
        return Err(first.wrong(index, "it or one after it does not end in its chunk"));
    }
    Ok(Some(group))
}

fn held_bytes(group: &Group) -> usize {
    let held = group.runs.iter().filter(|(_, run)| !run.is_zero);
    held.map(|(run, _)| run.end_byte().min(group.chunk_bytes) - run.start_byte()).sum()
}

/// Writes held pages and zeros one after another.
fn lay(group: &Group, held: &[u8], laid: &mut Vec<u8>) {
    laid.clear();
    let mut taken = 0;
    for (run, in_file) in &group.runs {
        let len = run.end_byte().min(group.chunk_bytes) - run.start_byte();
        if in_file.is_zero {
            laid.resize(laid.len() + len, 0);
        } else {
            laid.extend_from_slice(&held[taken..taken + len]);
            taken += len;
        }
    }
}

/// The pages of a chunk for a frame to hold.
#[derive(Clone, Debug)]
pub struct SetChunk {
    /// The file's place among the image's regular files.
    pub file: u32,
    /// The page of the file at which the chunk begins.
    pub first_page: u32,
    /// The runs of the chunk's pages to hold, ascending and apart.
    pub runs: Vec<PageRun>,
    /// The bytes of these pages, one after another, a file's last page not padded.
    pub pages: Vec<u8>,
    /// The proof of these pages, empty for a chunk of zeros. See [`proof::Leaves`].
    pub proof: Vec<u8>,
}

/// An encoder of frames, which keeps the compressor's state between them.
pub struct SetEncoder {
    zstd: zstd::bulk::Compressor<'static>,
}

impl std::fmt::Debug for SetEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SetEncoder").finish_non_exhaustive()
    }
}

impl SetEncoder {
    /// Makes an encoder that compresses at zstd's `level`.
    ///
    /// # Panics
    /// Panics if zstd cannot allocate memory, or has no such level.
    #[must_use]
    pub fn new(level: i32) -> Self {
        Self { zstd: zstd::bulk::Compressor::new(level).expect("one of zstd's levels") }
    }

    /// Returns the frame of these chunks' pages, and the number of zero pages in it. The pages must
    /// be at most 512, in ascending order.
    ///
    /// # Panics
    /// Panics if there are more pages, or not as many as in the runs.
    pub fn encode(&mut self, chunks: &[SetChunk]) -> (Vec<u8>, usize) {
        let (mut runs, mut proofs, mut plain, mut zeros) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for chunk in chunks {
            proofs.extend_from_slice(&chunk.proof);
            let numbers = chunk.runs.iter().flat_map(|run| usize::from(run.first)..run.end_page());
            let pages = chunk.pages.chunks(PAGE_BYTES);
            assert_eq!(pages.len(), numbers.clone().count(), "the pages of the runs");
            for (page, bytes) in numbers.zip(pages) {
                let is_zero = is_zero(bytes);
                zeros += usize::from(is_zero);
                if !is_zero {
                    plain.extend_from_slice(bytes);
                }
                let first = chunk.first_page + u32::try_from(page).expect("at most 512 pages a chunk");
                add(&mut runs, SetRun { file: chunk.file, first, count: 1, is_zero }, page == 0);
            }
        }
        assert!((1..=MAX_SET_FRAME_PAGES).contains(&runs.len()), "1 to 512 pages");
        let coded = match self.zstd.compress(&plain) {
            Ok(coded) if coded.len() < plain.len() => Some(coded),
            _ => None,
        };
        let bytes = coded.as_deref().unwrap_or(&plain);
        let le = |n: usize| u32::try_from(n).expect("at most 4 MiB").to_le_bytes();
        let mut frame = vec![u8::from(coded.is_some()), 1];
        frame.extend_from_slice(&le(runs.len())[..2]);
        for length in [proofs.len(), plain.len(), bytes.len()] {
            frame.extend_from_slice(&le(length));
        }
        for run in &runs {
            frame.extend_from_slice(&run.file.to_le_bytes());
            frame.extend_from_slice(&run.first.to_le_bytes());
            frame.extend_from_slice(&run.count.to_le_bytes());
            frame.extend_from_slice(&u16::from(run.is_zero).to_le_bytes());
        }
        frame.extend_from_slice(&proofs);
        frame.extend_from_slice(bytes);
        (frame, zeros)
    }
}

/// Adds a page to the runs. Extends the last run if the page follows it in the same chunk.
fn add(runs: &mut Vec<SetRun>, page: SetRun, begins_chunk: bool) {
    match runs.last_mut() {
        Some(last)
            if !begins_chunk
                && (last.file, last.end(), last.is_zero)
                    == (page.file, u64::from(page.first), page.is_zero) =>
        {
            last.count += 1;
        }
        _ => runs.push(page),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use proptest::prelude::*;

    /// An image of two files, in chunks of four pages.
    #[derive(Debug)]
    struct Image {
        files: [Vec<u8>; 2],
        /// The chunks whose content is unknown.
        unknown: Vec<u64>,
    }

    const CHUNK: usize = 4 * PAGE_BYTES;

    impl Image {
        fn new(lens: [usize; 2], zeros: &[bool]) -> Self {
            let mut noise = blake3::Hasher::new().finalize_xof();
            let mut files = lens.map(|len| vec![0; len]);
            files.iter_mut().for_each(|file| noise.fill(file));
            let pages = files.iter_mut().flat_map(|file| file.chunks_mut(PAGE_BYTES));
            pages.zip(zeros).filter(|(_, is_zero)| **is_zero).for_each(|(page, _)| page.fill(0));
            Self { files, unknown: Vec::new() }
        }

        fn chunk_bytes(&self, chunk: ChunkIndex) -> &[u8] {
            let of_first = self.files[0].len().div_ceil(CHUNK) as u64;
            let (file, at) = if chunk.0 < of_first { (0, chunk.0) } else { (1, chunk.0 - of_first) };
            self.files[file].chunks(CHUNK).nth(crate::page::to_usize(at)).unwrap()
        }

        /// Returns the frame of the pages of both files that `held` selects.
        fn frame(&self, held: &[bool]) -> Option<Vec<u8>> {
            let mut chunks = Vec::new();
            let mut held = held.iter();
            for (file, bytes) in (0..).zip(&self.files) {
                for (number, bytes) in (0..).zip(bytes.chunks(CHUNK)) {
                    let pages = u16::try_from(bytes.len().div_ceil(PAGE_BYTES)).unwrap();
                    let mut runs: Vec<PageRun> = Vec::new();
                    for first in (0..pages).filter(|_| *held.next().unwrap()) {
                        match runs.last_mut() {
                            Some(last) if last.end_page() == usize::from(first) => last.count += 1,
                            _ => runs.push(PageRun { first, count: 1 }),
                        }
                    }
                    if !runs.is_empty() {
                        let pages = runs
                            .iter()
                            .flat_map(|run| &bytes[run.start_byte()..run.end_byte().min(bytes.len())]);
                        let pages = pages.copied().collect();
                        let proof = if is_zero(bytes) {
                            Vec::new()
                        } else {
                            proof::Leaves::of(bytes).prove(&runs).unwrap()
                        };
                        chunks.push(SetChunk { file, first_page: number * 4, runs, pages, proof });
                    }
                }
            }
            (!chunks.is_empty()).then(|| SetEncoder::new(3).encode(&chunks).0)
        }
    }

    impl Expected for Image {
        fn chunk_size(&self) -> ChunkSize {
            ChunkSize::new(CHUNK as u64).unwrap()
        }

        fn file(&self, place: u32) -> Option<FileEntry> {
            let first_chunk = if place == 0 { 0 } else { self.files[0].len().div_ceil(CHUNK) as u64 };
            let file = self.files.get(place as usize)?;
            let size_bytes = file.len() as u64;
            Some(FileEntry { size_bytes, first_chunk: ChunkIndex(first_chunk), executable: false })
        }

        fn chunk(&self, chunk: ChunkIndex) -> Option<ChunkContent> {
            if self.unknown.contains(&chunk.0) {
                return None;
            }
            let bytes = self.chunk_bytes(chunk);
            Some(if is_zero(bytes) { ChunkContent::Zero } else { ChunkContent::Data(Digest::of(bytes)) })
        }
    }

    fn any_case() -> impl Strategy<Value = (Image, Vec<bool>)> {
        let bools = || proptest::collection::vec(any::<bool>(), 40);
        (1usize..20 * PAGE_BYTES, 1usize..20 * PAGE_BYTES, bools(), bools())
            .prop_map(|(a, b, zeros, held)| (Image::new([a, b], &zeros), held))
    }

    proptest! {
        #[test]
        fn pages_come_back_and_a_flipped_bit_is_found((image, held) in any_case(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let Some(mut frame) = image.frame(&held) else { return Ok(()) };
            let mut decoder = SetDecoder::default();
            decoder.decode(&SetFrame::parse(&frame).unwrap(), &image).unwrap();
            let mut held = held.iter();
            let mut expected = Vec::new();
            for (file, bytes) in (0..).zip(&image.files) {
                for (page, bytes) in (0..).zip(bytes.chunks(PAGE_BYTES)) {
                    if *held.next().unwrap() {
                        let mut padded = bytes.to_vec();
                        padded.resize(PAGE_BYTES, 0);
                        expected.push((file, page, padded));
                    }
                }
            }
            let mut found = Vec::new();
            for (run, bytes) in decoder.pages() {
                for page in 0..usize::from(run.count) {
                    let bytes = bytes.map_or(vec![0; PAGE_BYTES], |b| b[page * PAGE_BYTES..][..PAGE_BYTES].to_vec());
                    found.push((run.file, run.first + u32::try_from(page).unwrap(), bytes));
                }
            }
            prop_assert!(found == expected);
            let stretches: Vec<_> = decoder.stretches().collect();
            prop_assert!(!stretches.windows(2).any(|two| two[0].0.is_before(&two[1].0)));
            prop_assert!(stretches.iter().flat_map(|(_, bytes)| bytes.unwrap_or_default()).eq(decoder.pages().flat_map(|(_, bytes)| bytes.unwrap_or_default())));
            let count = |run: &SetRun| usize::from(run.count);
            prop_assert_eq!(stretches.iter().map(|(run, _)| count(run)).sum::<usize>(), expected.len());

            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            let Ok(parsed) = SetFrame::parse(&frame) else { return Ok(()) };
            if decoder.decode(&parsed, &image).is_ok() {
                // The flipped bit does not matter to zstd, so the pages are the same.
                let same = decoder.pages().flat_map(|(_, bytes)| bytes.unwrap_or_default().to_vec());
                let before = found.iter().filter(|(_, _, bytes)| !is_zero(bytes)).flat_map(|(_, _, bytes)| bytes.clone());
                prop_assert!(same.eq(before), "byte {}", at);
            }
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), dress in any::<bool>()) {
            if dress && bytes.len() > 40 {
                let proofs = bytes.len() - 28;
                bytes[..4].copy_from_slice(&[0, 1, 1, 0]);
                bytes[4..16].fill(0);
                bytes[4..8].copy_from_slice(&u32::try_from(proofs).unwrap().to_le_bytes());
                bytes[16..28].fill(0);
                bytes[24] = 1;
                bytes[26] = 1;
            }
            let image = Image::new([5 * PAGE_BYTES, 1], &[true, true]);
            if let Ok(frame) = SetFrame::parse(&bytes) {
                let _ = SetDecoder::default().decode(&frame, &image);
            }
        }
    }

    #[test]
    fn pages_of_unknown_chunks_are_left_out_and_others_are_proved() {
        // Chunks 0 and 1 of the first file, one of them with a zero page, and one chunk of the
        // second.
        let mut image = Image::new([2 * CHUNK, 3 * PAGE_BYTES], &[false, true]);
        let frame = image.frame(&[true; 11]).unwrap();
        let frame = SetFrame::parse(&frame).unwrap();
        let mut decoder = SetDecoder::default();
        for unknown in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 1, 2]] {
            image.unknown = unknown;
            decoder.decode(&frame, &image).unwrap();
            let known = frame.runs().filter(|run| {
                let chunk = if run.file == 0 { u64::from(run.first) / 4 } else { 2 };
                !image.unknown.contains(&chunk)
            });
            assert!(decoder.pages().map(|(run, _)| run).eq(known), "without {:?}", image.unknown);
            for (run, bytes) in decoder.pages() {
                let at = run.first as usize * PAGE_BYTES
                    ..usize::from(run.count) * PAGE_BYTES + run.first as usize * PAGE_BYTES;
                let zeros = vec![0; at.len()];
                assert!(bytes.unwrap_or(&zeros) == &image.files[run.file as usize][at], "{run:?}");
            }
        }
        // The frame has only zero pages of this chunk. The chunk's other pages determine if there
        // is a proof.
        image.unknown = vec![0];
        let held: Vec<_> = (0..11).map(|page| page == 1 || page > 3).collect();
        let frame = image.frame(&held).unwrap();
        decoder.decode(&SetFrame::parse(&frame).unwrap(), &image).unwrap();
        assert_eq!(decoder.pages().count(), 0);
    }

    #[test]
    fn another_image_s_pages_are_refused() {
        let (image, other) = (Image::new([CHUNK, 1], &[]), Image::new([CHUNK, 1], &[true]));
        let frame = image.frame(&[true; 5]).unwrap();
        let error = SetDecoder::default().decode(&SetFrame::parse(&frame).unwrap(), &other).unwrap_err();
        assert!(matches!(error, SetFrameError::Proof { chunk: ChunkIndex(0), .. }), "{error}");
    }
}
