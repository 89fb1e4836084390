//! Counts of what the kernel has answered to installs.

use super::FixedWords;
use crate::uffd::Outcome;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct AnswerCounts {
    words: Arc<FixedWords>,
    first: usize,
}

impl AnswerCounts {
    /// Counts in the words from `first` on.
    pub(crate) fn new(words: Arc<FixedWords>, first: usize) -> Self {
        Self { words, first }
    }

    /// Counts an answer, and gives it back.
    pub(crate) fn count(&self, outcome: Outcome) -> Outcome {
        self.words[self.first + answer(outcome)].fetch_add(1, Ordering::Relaxed);
        outcome
    }
}

/// Which of the counters an outcome has.
pub(crate) fn answer(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Done => 0,
        Outcome::Partial { .. } => 1,
        Outcome::AlreadyPresent => 2,
        Outcome::Deferred => 3,
        Outcome::Gone => 4,
        Outcome::OwnerGone => 5,
        Outcome::NoMemory | Outcome::Unexpected { .. } => 6,
    }
}
