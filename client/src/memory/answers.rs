//! Counts of the kernel's answers to installs, by outcome.

use super::FixedWords;
use crate::uffd::Outcome;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Counters of the kernel's answers, one word for each kind of answer. Clones share the words.
#[derive(Clone, Debug)]
pub(crate) struct AnswerCounts {
    words: Arc<FixedWords>,
    first: usize,
}

impl AnswerCounts {
    /// Returns counters that lie in `words` from `first` on.
    pub(crate) fn new(words: Arc<FixedWords>, first: usize) -> Self {
        Self { words, first }
    }

    /// Counts `outcome`, and returns it unchanged.
    pub(crate) fn count(&self, outcome: Outcome) -> Outcome {
        self.words[self.first + answer(outcome)].fetch_add(1, Ordering::Relaxed);
        outcome
    }
}

/// Returns the index of the counter for `outcome`.
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
