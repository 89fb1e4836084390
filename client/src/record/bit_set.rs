//! A set of numbers that several threads change: [`AtomicBitSet`].

use std::sync::atomic::{AtomicU64, Ordering};

/// A set of numbers below a limit, with one bit for each.
#[derive(Debug)]
pub(crate) struct AtomicBitSet(Box<[AtomicU64]>);

impl AtomicBitSet {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_set_alone() {
        let bits = AtomicBitSet::new(100);
        assert!(bits.set(99) && bits.set(64) && !bits.set(99) && bits.is_set(99) && !bits.is_set(98));
        assert!(bits.ones().eq([64, 99]));
    }
}
