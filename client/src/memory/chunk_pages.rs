//! A chunk's pages, decompressed and verified.

use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::page::{MAX_PAGES_PER_CHUNK, PAGE_BYTES};
use std::ops::Range;

/// The largest number of pages that one ioctl installs: 64 KiB, about 28 us.
pub(crate) const PIECE_PAGES: usize = 16;

/// A chunk's plain bytes, padded with zeros to whole pages, and the set of its pages that are not
/// zero. The buffer is reused from chunk to chunk.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChunkPages {
    bytes: Vec<u8>,
    chunk_bytes: usize,
    held: [u64; MAX_PAGES_PER_CHUNK / 64],
}

impl ChunkPages {
    /// Decodes `frame` into a chunk of `chunk_bytes` bytes, and verifies the chunk against
    /// `digest`.
    ///
    /// # Errors
    /// The reason why the frame does not hold this chunk. The content is unspecified then, and must
    /// not be used.
    pub(crate) fn decode(
        &mut self,
        decoder: &mut FrameDecoder,
        chunk_bytes: usize,
        digest: &Digest,
        frame: &[u8],
    ) -> Result<(), String> {
        let frame = ChunkFrame::parse(frame).map_err(|e| e.to_string())?;
        self.set_zeros(chunk_bytes);
        for run in frame.runs() {
            for page in usize::from(run.first)..run.end_page() {
                self.held[page / 64] |= 1 << (page % 64);
            }
        }
        self.bytes[chunk_bytes..].fill(0);
        let bytes = &mut self.bytes[..chunk_bytes];
        decoder.decode_verified(&frame, digest, bytes).map_err(|e| e.to_string())
    }

    /// Makes this a chunk of `chunk_bytes` zeros. The buffer keeps its old bytes, but no page
    /// counts as held.
    pub(crate) fn set_zeros(&mut self, chunk_bytes: usize) {
        self.held.fill(0);
        self.chunk_bytes = chunk_bytes;
        self.bytes.resize(chunk_bytes.next_multiple_of(PAGE_BYTES), 0);
    }

    /// Makes this a chunk of `chunk_bytes` bytes from pages that have been verified and together
    /// are the whole chunk. `runs` yields runs of pages with their padded bytes, or None for zeros.
    pub(crate) fn set<'a>(
        &mut self,
        chunk_bytes: usize,
        runs: impl Iterator<Item = (Range<usize>, Option<&'a [u8]>)>,
    ) {
        self.set_zeros(chunk_bytes);
        for (pages, bytes) in runs {
            let Some(bytes) = bytes else { continue };
            self.bytes[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES].copy_from_slice(bytes);
            pages.for_each(|page| self.held[page / 64] |= 1 << (page % 64));
        }
    }

    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.bytes.len() / PAGE_BYTES
    }

    /// Returns the padded bytes of pages that are held, that is, not zero.
    pub(crate) fn bytes_of(&self, pages: Range<usize>) -> &[u8] {
        &self.bytes[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES]
    }

    fn is_held(&self, page: usize) -> bool {
        self.held[page / 64] >> (page % 64) & 1 == 1
    }

    /// Returns the longest run at the start of `pages`, at most 64 KiB, whose pages are all held or
    /// all zero. The flag is true for held pages.
    pub(crate) fn piece(&self, pages: Range<usize>) -> (Range<usize>, bool) {
        let held = self.is_held(pages.start);
        let limit = pages.end.min(pages.start + PIECE_PAGES);
        let end = (pages.start..limit).find(|&page| self.is_held(page) != held).unwrap_or(limit);
        (pages.start..end, held)
    }

    /// Yields the pieces that are not zero: each one's offset in the chunk, and its bytes without
    /// padding.
    pub(crate) fn held_bytes(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let mut next = 0;
        std::iter::from_fn(move || {
            while next < self.pages() {
                let (piece, held) = self.piece(next..self.pages());
                next = piece.end;
                if held {
                    let start = piece.start * PAGE_BYTES;
                    let end = (piece.end * PAGE_BYTES).min(self.chunk_bytes);
                    return Some((start, &self.bytes[start..end]));
                }
            }
            None
        })
    }
}
