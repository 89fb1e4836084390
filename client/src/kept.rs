//! Chunks that have come for a page of theirs, while touches of the others are waited for: in record mode alone.

use crate::chunk::ChunkPages;
use postcopy_proto::page::ChunkIndex;
use std::collections::{HashMap, VecDeque};

/// The most memory that they may take. What is beyond is fetched again.
const MOST_BYTES: usize = 256 << 20;

#[derive(Debug, Default)]
pub(crate) struct Kept {
    chunks: HashMap<ChunkIndex, ChunkPages>,
    /// The oldest first.
    order: VecDeque<ChunkIndex>,
    bytes: usize,
}

impl Kept {
    pub(crate) fn get(&self, chunk: ChunkIndex) -> Option<&ChunkPages> {
        self.chunks.get(&chunk)
    }

    /// Keeps a chunk, and forgets those that have been kept longest if there is no room.
    pub(crate) fn keep(&mut self, chunk: ChunkIndex, pages: ChunkPages) {
        self.forget(chunk);
        self.bytes += pages.memory_bytes();
        self.chunks.insert(chunk, pages);
        self.order.push_back(chunk);
        while self.bytes > MOST_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.remove(oldest);
        }
    }

    /// Nothing of it is absent any more.
    pub(crate) fn forget(&mut self, chunk: ChunkIndex) {
        if self.remove(chunk) {
            self.order.retain(|kept| *kept != chunk);
        }
    }

    fn remove(&mut self, chunk: ChunkIndex) -> bool {
        let removed = self.chunks.remove(&chunk);
        self.bytes -= removed.as_ref().map_or(0, ChunkPages::memory_bytes);
        removed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_goes_first() {
        let mut kept = Kept::default();
        let most = MOST_BYTES as u64 >> 16;
        for chunk in 0..2 * most {
            let mut pages = ChunkPages::default();
            pages.set_zeros(1 << 16);
            kept.keep(ChunkIndex(chunk), pages);
        }
        assert_eq!(kept.bytes, MOST_BYTES);
        assert!(kept.get(ChunkIndex(most - 1)).is_none() && kept.get(ChunkIndex(most)).is_some());
        (0..2 * most).for_each(|chunk| kept.forget(ChunkIndex(chunk)));
        assert!(kept.bytes == 0 && kept.order.is_empty());
    }
}
