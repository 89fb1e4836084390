//! The outstanding chunks of a lane, for the threads of all lanes: [`Underway`].

use postcopy_proto::page::{ChunkIndex, to_usize};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The number of parts of an [`Underway`], each with a lock.
const SHARDS: usize = 16;

/// The outstanding chunks of a lane, with the times of their requests. Its size is bounded by
/// theirs.
#[derive(Debug, Default)]
pub(crate) struct Underway {
    /// The parts by the chunk's number. Each lock is held for one look or change.
    shards: [Mutex<HashMap<ChunkIndex, Instant>>; SHARDS],
}

impl Underway {
    fn shard(&self, chunk: ChunkIndex) -> MutexGuard<'_, HashMap<ChunkIndex, Instant>> {
        let shard = &self.shards[to_usize(chunk.0) % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a chunk that was requested now, unless it is in the set.
    pub(crate) fn add(&self, chunk: ChunkIndex) {
        self.shard(chunk).entry(chunk).or_insert_with(Instant::now);
    }

    pub(crate) fn remove(&self, chunk: ChunkIndex) {
        self.shard(chunk).remove(&chunk);
    }

    pub(crate) fn clear(&self) {
        self.shards.iter().for_each(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).clear());
    }

    pub(crate) fn has(&self, chunk: ChunkIndex) -> bool {
        self.shard(chunk).contains_key(&chunk)
    }

    /// Returns true if a chunk in the set was requested within the last `time`.
    pub(crate) fn has_within(&self, chunk: ChunkIndex, time: Duration) -> bool {
        self.shard(chunk).get(&chunk).is_some_and(|since| since.elapsed() < time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_chunk_is_under_way_alone() {
        let underway = Underway::default();
        let chunks = [4_999_999_999, 0, 1 << 20, 2 << 20, 16].map(ChunkIndex);
        underway.add(chunks[0]);
        assert!(underway.has(chunks[0]) && underway.has_within(chunks[0], Duration::from_secs(60)));
        assert!(!underway.has_within(chunks[0], Duration::ZERO));
        underway.add(chunks[1]);
        assert!(!underway.has(chunks[2]) && !underway.has(chunks[3]) && !underway.has(chunks[4]));
        underway.remove(chunks[0]);
        assert!(!underway.has(chunks[0]) && underway.has(chunks[1]));
        underway.clear();
        assert!(!underway.has(chunks[1]));
    }
}
