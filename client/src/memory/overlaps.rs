//! An index of intervals that may overlap. It finds the intervals that overlap a range in
//! logarithmic time, beside the time for the result.
//!
//! The key of an interval is its class, the power of two at or below its length, and then its
//! start. Intervals of a class that overlap a range begin less than two class lengths before it.

use imbl::OrdMap;
use std::ops::Range;

/// The number of bits of a start. Page numbers of an image and addresses need fewer.
const START_BITS: u32 = 58;
const START_MASK: u64 = (1 << START_BITS) - 1;

/// An index of intervals, see the module. A clone shares all nodes that stay equal.
#[derive(Clone, Debug)]
pub(crate) struct Overlaps<V: Clone> {
    /// The values, by class and start, and by a tag that distinguishes equal intervals.
    entries: OrdMap<(u64, u64), V>,
    /// One bit for each class that has or had entries.
    classes: u64,
}

impl<V: Clone> Default for Overlaps<V> {
    fn default() -> Self {
        Self { entries: OrdMap::new(), classes: 0 }
    }
}

fn key(class: u32, start: u64) -> u64 {
    u64::from(class) << START_BITS | start
}

impl<V: Clone> Overlaps<V> {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds an interval, which must not be empty. The tag must differ from those of other intervals
    /// with the same start and class.
    pub(crate) fn insert(&mut self, interval: Range<u64>, tag: u64, value: V) {
        let class = (interval.end - interval.start).ilog2();
        self.classes |= 1 << class;
        self.entries.insert((key(class, interval.start), tag), value);
    }

    pub(crate) fn remove(&mut self, interval: Range<u64>, tag: u64) -> Option<V> {
        let class = (interval.end - interval.start).ilog2();
        self.entries.remove(&(key(class, interval.start), tag))
    }

    /// Yields start, tag and value of intervals near a range: all that overlap it, and some that
    /// end before it.
    pub(crate) fn near(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64, &V)> {
        (0..START_BITS).filter(|class| self.classes >> class & 1 == 1).flat_map(move |class| {
            let first = range.start.saturating_sub((2 << class) - 1);
            let entries = self.entries.range((key(class, first), 0)..(key(class, range.end), 0));
            entries.map(|((key, tag), value)| (key & START_MASK, *tag, value))
        })
    }

    /// Yields start, tag and value of all intervals.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> {
        self.entries.iter().map(|((key, tag), value)| (key & START_MASK, *tag, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn all_that_overlap_are_near(
            intervals in prop::collection::vec((0u64..500, 1u64..200), 0..60),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
            start in 0u64..600, len in 1u64..50,
        ) {
            let mut overlaps = Overlaps::default();
            let mut model = BTreeSet::new();
            for (tag, (first, count)) in intervals.iter().enumerate() {
                overlaps.insert(*first..first + count, tag as u64, (*first, *count));
                model.insert((tag as u64, *first, *count));
            }
            for index in removed.iter().filter(|_| !intervals.is_empty()) {
                let tag = index.index(intervals.len()) as u64;
                let (first, count) = intervals[index.index(intervals.len())];
                let was_there = model.remove(&(tag, first, count));
                prop_assert_eq!(overlaps.remove(first..first + count, tag).is_some(), was_there);
            }
            let found: BTreeSet<_> =
                overlaps.near(start..start + len).map(|(at, tag, (_, count))| (tag, at, *count)).collect();
            for interval in &model {
                let (_, first, count) = interval;
                let overlaps = *first < start + len && start < first + count;
                prop_assert!(found.contains(interval) || !overlaps, "{:?}", interval);
            }
            prop_assert!(found.is_subset(&model));
        }
    }

    /// A lookup visits far fewer intervals than exist, for any mix of lengths.
    #[test]
    fn few_are_near_where_none_overlap_one_another() {
        let mut overlaps = Overlaps::default();
        let mut next = 0;
        for tag in 0..10_000u64 {
            let len = 1 << (tag * 7 % 11);
            overlaps.insert(next..next + len, tag, ());
            next += len;
        }
        for start in (0..next).step_by(997) {
            assert!(overlaps.near(start..start + 1).count() <= 3 * 11);
        }
    }
}
