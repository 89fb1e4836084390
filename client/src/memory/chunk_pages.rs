//! The pages of a chunk, decompressed and verified.

use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::page::{MAX_PAGES_PER_CHUNK, PAGE_BYTES};
use std::ops::Range;

/// The most pages that are installed by one ioctl: 64 KiB, some 28 us.
pub(crate) const PIECE_PAGES: usize = 16;

/// A chunk's plain bytes, padded with zeros to whole pages, and which of its pages are not zero. Its memory is kept from one
/// chunk to the next.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChunkPages {
    bytes: Vec<u8>,
    chunk_bytes: usize,
    held: [u64; MAX_PAGES_PER_CHUNK / 64],
}

impl ChunkPages {
    /// Makes it the chunk of `chunk_bytes` bytes that `frame` holds, once its content has this digest.
    ///
    /// # Errors
    /// Why the frame is not the chunk's; the content is unspecified then, and must not be used.
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

    /// Makes it a chunk of `chunk_bytes` zeros. The bytes themselves are not cleared: none of them is held.
    pub(crate) fn set_zeros(&mut self, chunk_bytes: usize) {
        self.held.fill(0);
        self.chunk_bytes = chunk_bytes;
        self.bytes.resize(chunk_bytes.next_multiple_of(PAGE_BYTES), 0);
    }

    /// Makes it pages that have been proved to be a whole chunk of `chunk_bytes` bytes: runs of pages with their padded bytes,
    /// or None for zeros.
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

    /// How many pages it has.
    pub(crate) fn pages(&self) -> usize {
        self.bytes.len() / PAGE_BYTES
    }

    /// The padded bytes of pages that are held.
    pub(crate) fn bytes_of(&self, pages: Range<usize>) -> &[u8] {
        &self.bytes[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES]
    }

    fn is_held(&self, page: usize) -> bool {
        self.held[page / 64] >> (page % 64) & 1 == 1
    }

    /// The first pages of `pages`, at most 64 KiB, that are all held or all zero, and which of both.
    pub(crate) fn piece(&self, pages: Range<usize>) -> (Range<usize>, bool) {
        let held = self.is_held(pages.start);
        let limit = pages.end.min(pages.start + PIECE_PAGES);
        let end = (pages.start..limit).find(|&page| self.is_held(page) != held).unwrap_or(limit);
        (pages.start..end, held)
    }

    /// The pieces that are not zero: offset in the chunk, and the bytes without padding.
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
