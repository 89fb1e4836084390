//! Sets that several threads change: [`Bits`], one bit for each number, and the outstanding chunks
//! of a lane ([`Underway`]).

use postcopy_proto::page::{ChunkIndex, to_usize};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Bits(Box<[AtomicU64]>);

impl Bits {
    /// Returns an empty set of numbers below `count`, rounded up to a multiple of 64.
    pub(crate) fn new(count: usize) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Adds a number. Returns true if the set lacked it.
    pub(crate) fn set(&self, index: usize) -> bool {
        self.0[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed) >> (index % 64) & 1 == 0
    }

    pub(crate) fn is_set(&self, index: usize) -> bool {
        self.0[index / 64].load(Ordering::Relaxed) >> (index % 64) & 1 == 1
    }

    /// Yields the numbers in the set, in order.
    pub(crate) fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len() * 64).filter(|index| self.is_set(*index))
    }
}

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
    fn each_is_set_alone() {
        let bits = Bits::new(100);
        assert!(bits.set(99) && bits.set(64) && !bits.set(99) && bits.is_set(99) && !bits.is_set(98));
        assert!(bits.ones().eq([64, 99]));
    }

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
