//! Whether a pager that waits for an answer sleeps, or looks for it again and again.
//!
//! To wake a core that has gone idle takes about as long as a near server takes to answer. While a thread waits for a page
//! its own core has nothing to do; so the pager stays awake for a moment, where that pays: when answers take longer it
//! sleeps at once, and tries it again with one request of some. Nor does it while the fill has work for all cores.

use std::time::Duration;
use tokio::time::Instant;

/// How long it stays awake after a request: some more than a near server takes for a chunk of 64 KiB.
const AWAKE: Duration = Duration::from_micros(100);
/// Where answers take longer: with one request of so many.
const TRY_AGAIN: u32 = 32;

#[derive(Debug)]
pub(crate) struct Spin {
    until: Option<Instant>,
    /// What answers have taken of late.
    usual: Duration,
    /// Requests since they have taken longer than it stays awake.
    far_requests: u32,
}

impl Spin {
    pub(crate) fn new() -> Self {
        Self { until: None, usual: Duration::ZERO, far_requests: 0 }
    }

    /// Something is asked for.
    pub(crate) fn asked(&mut self, now: Instant) {
        self.far_requests = if self.usual <= AWAKE { 0 } else { self.far_requests + 1 };
        if self.far_requests.is_multiple_of(TRY_AGAIN) {
            self.until = Some(now + AWAKE);
        }
    }

    /// An answer has come, so long after it was asked for.
    pub(crate) fn answered(&mut self, after: Duration) {
        // One that takes very long says no more than one that takes long.
        self.usual = (self.usual * 7 + after.min(4 * AWAKE)) / 8;
    }

    /// Whether to stay awake, while something is waited for.
    pub(crate) fn is_on(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_awake_for_a_moment_where_answers_are_near() {
        let mut now = Instant::now();
        let mut spin = Spin::new();
        assert!(!spin.is_on(now), "nothing was asked for");
        spin.asked(now);
        assert!(spin.is_on(now));
        assert!(!spin.is_on(now + AWAKE));

        // They come later: it sleeps, but for a try now and then.
        (0..8).for_each(|_| spin.answered(10 * AWAKE));
        let mut tries = 0;
        for _ in 0..10 * TRY_AGAIN {
            now += 10 * AWAKE;
            spin.asked(now);
            tries += u32::from(spin.is_on(now));
            spin.answered(10 * AWAKE);
        }
        assert_eq!(tries, 10);

        (0..16).for_each(|_| spin.answered(AWAKE / 2));
        spin.asked(now);
        assert!(spin.is_on(now));
    }
}
