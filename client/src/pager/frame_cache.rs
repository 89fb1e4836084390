//! Chunks that have come for a page of theirs, while touches of the others are waited for: in record mode alone.
//!
//! They are kept as they came, and a few of late as their pages, too: memory that is used again costs less than new one, and the
//! next touch is often near.

use crate::memory::ChunkPages;
use bytes::Bytes;
use postcopy_proto::page::ChunkIndex;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Chunks whose pages are at hand.
const DECODED: usize = 16;

#[derive(Debug)]
pub(crate) struct FrameCache {
    /// The most bytes of frames. What is beyond is fetched again.
    most: usize,
    /// Each with its number.
    frames: HashMap<ChunkIndex, (u64, Bytes)>,
    /// By their numbers, the oldest first.
    order: BTreeMap<u64, ChunkIndex>,
    last: u64,
    bytes: usize,
    /// The oldest first.
    decoded: VecDeque<(ChunkIndex, ChunkPages)>,
}

impl FrameCache {
    /// Keeps at most so many bytes of frames.
    pub(crate) fn new(most: usize) -> Self {
        let (frames, order, decoded) = (HashMap::new(), BTreeMap::new(), VecDeque::new());
        Self { most, frames, order, last: 0, bytes: 0, decoded }
    }

    /// The frame of a chunk that is kept.
    pub(crate) fn frame(&self, chunk: ChunkIndex) -> Option<Bytes> {
        self.frames.get(&chunk).map(|(_, frame)| frame.clone())
    }

    /// The same as its pages, if they are at hand.
    pub(crate) fn pages(&self, chunk: ChunkIndex) -> Option<&ChunkPages> {
        let at_hand = self.decoded.iter().find(|(decoded, _)| *decoded == chunk);
        at_hand.map(|(_, pages)| pages)
    }

    /// Keeps a chunk's frame, and forgets those that have been kept longest if there is no room.
    pub(crate) fn keep(&mut self, chunk: ChunkIndex, frame: &[u8]) {
        self.forget(chunk);
        self.bytes += frame.len();
        // Not a part of a message, which would be kept as a whole.
        self.last += 1;
        self.frames.insert(chunk, (self.last, Bytes::copy_from_slice(frame)));
        self.order.insert(self.last, chunk);
        while self.bytes > self.most {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            self.forget(oldest);
        }
    }

    /// Has a chunk's pages at hand, and gives others' memory in their place.
    pub(crate) fn swap(&mut self, chunk: ChunkIndex, pages: &mut ChunkPages) {
        let unused = if self.decoded.len() < DECODED { None } else { self.decoded.pop_front() };
        let unused = unused.map_or_else(ChunkPages::default, |(_, unused)| unused);
        self.decoded.push_back((chunk, std::mem::replace(pages, unused)));
    }

    /// Nothing of it is absent any more.
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
