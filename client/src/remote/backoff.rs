//! The back-off between attempts at a server that fails: one rule for all lanes and tasks.

use std::time::Duration;

/// The first pause and the longest. The client finds a restarted server soon, and attempts at a
/// lost one cost little.
const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1);

/// A back-off from 10 ms to 1 s that doubles with each attempt. Each pause varies at random by
/// half, so that the clients of a lost server do not all return at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// Returns the pause before the next attempt.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(0.5 + fastrand::f64());
        self.next = (self.next * 2).min(LONGEST);
        pause
    }

    /// Makes the next pause short again, after the server has answered.
    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_cap_vary_by_half_and_are_short_again_after_an_answer() {
        let mut backoff = Backoff::new();
        for _ in 0..2 {
            let mut usual = FIRST;
            for _ in 0..20 {
                let pause = backoff.pause();
                assert!((usual / 2..usual * 3 / 2).contains(&pause), "{pause:?}, about {usual:?}");
                usual = (usual * 2).min(LONGEST);
            }
            backoff.reset();
        }
        let firsts: std::collections::HashSet<_> = (0..20).map(|_| Backoff::new().pause()).collect();
        assert!(firsts.len() > 1, "all pauses are the same");
    }
}
