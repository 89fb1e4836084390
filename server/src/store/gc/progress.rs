//! Tells the owner of a collector how far its work is.

use std::fmt;

/// The progress of a part of a collection's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The part of the work, such as `segments read`.
    pub work: &'static str,
    /// Number of items that are done.
    pub done: u64,
    /// Number of all items.
    pub total: u64,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} of {}", self.work, self.done, self.total)
    }
}

/// The receiver of a collector's progress.
pub(super) struct Reporter(pub(super) Box<dyn Fn(Progress) + Send + Sync>);

impl Reporter {
    pub(super) fn report(&self, work: &'static str, done: u64, total: u64) {
        (self.0)(Progress { work, done, total });
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self(Box::new(|_| {}))
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reporter")
    }
}
