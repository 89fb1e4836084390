//! The latency of each fault, and its parts.

use postcopy::trace::{Came, Cause, Touch, Trace};
use serde::Serialize;

/// The parts of a fault's latency, in nanoseconds or in a unit made of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Waiting<T> {
    /// The request waited to be sent, or the answer waited for a free installer.
    pub(super) queue: T,
    pub(super) wire: T,
    pub(super) decompress: T,
    pub(super) install: T,
    /// The rest: the manifest's segment of the chunk was outstanding, other pages or the working
    /// set's stream were ahead of the page, or the kernel deferred the install.
    pub(super) other: T,
}

impl<T: Copy> Waiting<T> {
    pub(super) fn map<U>(self, f: impl Fn(T) -> U) -> Waiting<U> {
        Waiting {
            queue: f(self.queue),
            wire: f(self.wire),
            decompress: f(self.decompress),
            install: f(self.install),
            other: f(self.other),
        }
    }

    /// Returns the parts with their names.
    pub(super) fn named(&self) -> [(&'static str, T); 5] {
        [
            ("queue", self.queue),
            ("wire", self.wire),
            ("decompress", self.decompress),
            ("install", self.install),
            ("other", self.other),
        ]
    }
}

impl Waiting<u64> {
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            queue: self.queue.saturating_add(other.queue),
            wire: self.wire.saturating_add(other.wire),
            decompress: self.decompress.saturating_add(other.decompress),
            install: self.install.saturating_add(other.install),
            other: self.other.saturating_add(other.other),
        }
    }

    pub(super) fn sum(&self) -> u64 {
        self.named().iter().fold(0, |sum: u64, (_, time)| sum.saturating_add(*time))
    }
}

/// A fault whose page was installed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) touch: Touch,
    /// The cause of the page's install.
    pub(super) cause: Cause,
    /// Latency in nanoseconds.
    pub(super) took: u64,
    pub(super) waiting: Waiting<u64>,
}

/// Returns the answered faults of a trace in order. `waited_for` has the event that each fault
/// waited for.
pub(super) fn waits(trace: &Trace, waited_for: &[Option<usize>]) -> Vec<Wait> {
    let answered = trace.touches.iter().zip(waited_for);
    answered.filter_map(|(touch, came)| Some(wait(*touch, &trace.came[(*came)?]))).collect()
}

fn wait(touch: Touch, came: &Came) -> Wait {
    let took = came.at.saturating_sub(touch.at);
    let mut end = came.at;
    let mut stage = |time: u64| {
        let start = end.saturating_sub(time);
        let of_it = end.saturating_sub(start.max(touch.at));
        end = start;
        of_it
    };
    let (install, decompress) = (stage(came.install), stage(came.decompress));
    let (wire, queue) = (stage(came.wire), stage(came.queue));
    let known = Waiting { queue, wire, decompress, install, other: 0 };
    Wait { touch, cause: came.cause, took, waiting: Waiting { other: took - known.sum(), ..known } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn came(at: u64, [queue, wire, decompress, install]: [u64; 4]) -> Came {
        let (space, file, page, pages, cause) = (0, 0, 0, 1, Cause::Demand);
        Came { at, space, file, page, pages, cause, queue, wire, decompress, install }
    }

    const TOUCH: Touch = Touch { at: 100, space: 0, file: 0, page: 0 };

    #[test]
    fn a_wait_is_made_of_what_came_before_its_end() {
        let whole = wait(TOUCH, &came(200, [10, 70, 15, 5]));
        assert_eq!(whole.waiting, Waiting { queue: 10, wire: 70, decompress: 15, install: 5, other: 0 });
        // The page was on its way before the fault.
        let late = wait(TOUCH, &came(130, [10, 70, 15, 5]));
        assert_eq!(late.waiting, Waiting { queue: 0, wire: 10, decompress: 15, install: 5, other: 0 });
        let other = wait(TOUCH, &came(300, [10, 70, 15, 5]));
        assert_eq!((other.took, other.waiting.other), (200, 100));
        // The page was resident before the pager read the fault.
        assert_eq!(wait(TOUCH, &came(90, [1, 1, 1, 1])).took, 0);
    }

    proptest! {
        #[test]
        fn all_of_a_wait_is_in_its_parts(at: u64, times: [u64; 4]) {
            let wait = wait(TOUCH, &came(at, times));
            prop_assert_eq!(wait.waiting.sum(), wait.took);
        }
    }
}
