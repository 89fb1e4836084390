//! Decides when a pager that waits for an answer polls instead of sleeping.
//!
//! Waking an idle core takes about as long as a near server takes to answer. While a thread waits
//! for a page its core is idle, so the pager polls for a moment after each request. If answers take
//! longer than that, the pager sleeps at once, and polls only after one request in 32. It also
//! sleeps while the fill has work for all cores.

use std::time::Duration;
use tokio::time::Instant;

/// Time to poll after a request: slightly more than a near server takes for a chunk of 64 KiB.
const AWAKE: Duration = Duration::from_micros(100);
/// With a far server, one in this many requests is followed by polling.
const TRY_AGAIN: u32 = 32;

#[derive(Debug)]
pub(crate) struct Spin {
    until: Option<Instant>,
    /// Requests since the usual time of an answer exceeded [`AWAKE`].
    far_requests: u32,
}

impl Spin {
    pub(crate) fn new() -> Self {
        Self { until: None, far_requests: 0 }
    }

    /// Notes a request, and starts polling if that may pay. An answer usually takes `usual`.
    pub(crate) fn asked(&mut self, now: Instant, usual: Duration) {
        self.far_requests = if usual <= AWAKE { 0 } else { self.far_requests + 1 };
        if self.far_requests.is_multiple_of(TRY_AGAIN) {
            self.until = Some(now + AWAKE);
        }
    }

    /// Returns true while the pager should poll. It applies only while a request is outstanding.
    pub(crate) fn is_on(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_polls_for_a_moment_if_answers_are_near() {
        let mut now = Instant::now();
        let mut spin = Spin::new();
        assert!(!spin.is_on(now), "there was no request");
        spin.asked(now, AWAKE / 2);
        assert!(spin.is_on(now));
        assert!(!spin.is_on(now + AWAKE));

        // With later answers the pager sleeps, except for a try now and then.
        let mut tries = 0;
        for _ in 0..10 * TRY_AGAIN {
            now += 10 * AWAKE;
            spin.asked(now, 10 * AWAKE);
            tries += u32::from(spin.is_on(now));
        }
        assert_eq!(tries, 10);

        spin.asked(now, AWAKE / 2);
        assert!(spin.is_on(now));
    }
}
