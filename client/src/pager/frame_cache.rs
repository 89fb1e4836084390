//! Cache of fetched chunks, for record mode alone. There an install covers only the faulting page,
//! and the chunk's other pages await faults of their own.
//!
//! The cache keeps frames as received, and also the decoded pages of the last few chunks: the next
//! fault is often near, and reused memory costs less than fresh memory.

use crate::memory::ChunkPages;
use bytes::Bytes;
use postcopy_proto::page::ChunkIndex;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Number of chunks whose decoded pages are kept.
const DECODED: usize = 16;

#[derive(Debug)]
pub(crate) struct FrameCache {
    /// Most bytes of frames. Chunks beyond this are fetched again.
    most: usize,
    /// The frames, each with its insertion number.
    frames: HashMap<ChunkIndex, (u64, Bytes)>,
    /// The chunks by insertion number, the oldest first.
    order: BTreeMap<u64, ChunkIndex>,
    last: u64,
    bytes: usize,
    /// The decoded chunks, the oldest first.
    decoded: VecDeque<(ChunkIndex, ChunkPages)>,
}

impl FrameCache {
    /// Makes an empty cache for at most `most` bytes of frames.
    pub(crate) fn new(most: usize) -> Self {
        let (frames, order, decoded) = (HashMap::new(), BTreeMap::new(), VecDeque::new());
        Self { most, frames, order, last: 0, bytes: 0, decoded }
    }

    /// Returns the frame of a chunk, if it is kept.
    pub(crate) fn frame(&self, chunk: ChunkIndex) -> Option<Bytes> {
        self.frames.get(&chunk).map(|(_, frame)| frame.clone())
    }

    /// Returns a chunk's decoded pages, if they are kept.
    pub(crate) fn pages(&self, chunk: ChunkIndex) -> Option<&ChunkPages> {
        let at_hand = self.decoded.iter().find(|(decoded, _)| *decoded == chunk);
        at_hand.map(|(_, pages)| pages)
    }

    /// Keeps a chunk's frame, and evicts the oldest frames if there is no room.
    pub(crate) fn keep(&mut self, chunk: ChunkIndex, frame: &[u8]) {
        self.forget(chunk);
        self.bytes += frame.len();
        // A slice of a message would keep the whole message in memory.
        self.last += 1;
        self.frames.insert(chunk, (self.last, Bytes::copy_from_slice(frame)));
        self.order.insert(self.last, chunk);
        while self.bytes > self.most {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            self.forget(oldest);
        }
    }

    /// Keeps a chunk's decoded pages, and puts unused memory into `pages` for the next chunk.
    pub(crate) fn swap(&mut self, chunk: ChunkIndex, pages: &mut ChunkPages) {
        let unused = if self.decoded.len() < DECODED { None } else { self.decoded.pop_front() };
        let unused = unused.map_or_else(ChunkPages::default, |(_, unused)| unused);
        self.decoded.push_back((chunk, std::mem::replace(pages, unused)));
    }

    /// Removes a chunk's frame. The pager calls this once no page of the chunk is absent.
    pub(crate) fn forget(&mut self, chunk: ChunkIndex) {
        if let Some((number, frame)) = self.frames.remove(&chunk) {
            self.bytes -= frame.len();
            self.order.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_goes_first() {
        let most = 48;
        let mut kept = FrameCache::new(48 << 16);
        let mut pages = ChunkPages::default();
        for chunk in (0..2 * most).map(ChunkIndex) {
            kept.keep(chunk, &[7; 1 << 16]);
            pages.set_zeros(1 << 16);
            kept.swap(chunk, &mut pages);
        }
        assert_eq!(kept.bytes, 48 << 16);
        assert!(kept.frame(ChunkIndex(most - 1)).is_none() && kept.frame(ChunkIndex(most)).is_some());
        assert_eq!(kept.decoded.len(), DECODED);
        let newest = 2 * most - DECODED as u64;
        assert!(kept.pages(ChunkIndex(newest - 1)).is_none() && kept.pages(ChunkIndex(newest)).is_some());
        (0..2 * most).for_each(|chunk| kept.forget(ChunkIndex(chunk)));
        assert!(kept.bytes == 0 && kept.order.is_empty());
    }
}
