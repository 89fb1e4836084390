//! Sets of small numbers that several threads change: one bit for each number.

use postcopy_proto::page::{ChunkIndex, to_usize};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Bits(Box<[AtomicU64]>);

impl Bits {
    /// Returns an empty set of numbers below `count`, rounded up to a multiple of 64.
    pub(crate) fn new(count: usize) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Adds a number. Returns whether the set lacked it.
    pub(crate) fn set(&self, index: usize) -> bool {
        self.0[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed) >> (index % 64) & 1 == 0
    }

    pub(crate) fn clear(&self, index: usize) {
        self.0[index / 64].fetch_and(!(1 << (index % 64)), Ordering::Relaxed);
    }

    pub(crate) fn clear_all(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    pub(crate) fn is_set(&self, index: usize) -> bool {
        self.0[index / 64].load(Ordering::Relaxed) >> (index % 64) & 1 == 1
    }

    /// Yields the numbers in the set, in order.
    pub(crate) fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len() * 64).filter(|index| self.is_set(*index))
    }
}

/// The largest number of bits in an [`Underway`].
const MOST: usize = 1 << 20;

/// The outstanding chunks of a lane. In images of more than a million chunks, several chunks share
/// a bit. Then a chunk may be requested twice, or be awaited in vain for a moment, but nothing
/// worse happens.
#[derive(Debug)]
pub(crate) struct Underway(Bits);

impl Underway {
    /// Returns an empty set for an image of `chunks` chunks.
    pub(crate) fn new(chunks: u64) -> Self {
        Self(Bits::new(to_usize(chunks).clamp(1, MOST)))
    }

    fn index(&self, chunk: ChunkIndex) -> usize {
        to_usize(chunk.0) % (self.0.0.len() * 64)
    }

    pub(crate) fn add(&self, chunk: ChunkIndex) {
        self.0.set(self.index(chunk));
    }

    pub(crate) fn remove(&self, chunk: ChunkIndex) {
        self.0.clear(self.index(chunk));
    }

    pub(crate) fn clear(&self) {
        self.0.clear_all();
    }

    pub(crate) fn has(&self, chunk: ChunkIndex) -> bool {
        self.0.is_set(self.index(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_set_and_cleared_alone() {
        let bits = Bits::new(100);
        assert!(bits.set(99) && bits.set(64) && !bits.set(99) && bits.is_set(99) && !bits.is_set(98));
        assert!(bits.ones().eq([64, 99]));
        bits.clear(64);
        assert!(bits.ones().eq([99]));
        bits.clear_all();
        assert_eq!(bits.ones().count(), 0);
    }

    #[test]
    fn any_chunk_has_a_bit() {
        for chunks in [0, 1, 5_000_000_000] {
            let underway = Underway::new(chunks);
            underway.add(ChunkIndex(4_999_999_999));
            assert!(underway.has(ChunkIndex(4_999_999_999)));
            underway.remove(ChunkIndex(4_999_999_999));
            assert!(!underway.has(ChunkIndex(4_999_999_999)));
        }
    }
}
