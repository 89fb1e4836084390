//! The pager's patience with a lane that says nothing while pages are awaited.
//!
//! A server may stop without closing its connections (SIGSTOP, a lost machine), and HTTP/2's pings
//! find that only after most of a fault's deadline. So the pager gives up a silent lane after 5 s
//! and the time that a chunk takes at 64 KiB/s, and opens another one. A server may also be slow:
//! the next lane gets twice the time, until the server has answered.

use super::TICK;
use std::time::Duration;

/// The first patience, besides the time of a chunk.
const FIRST: Duration = Duration::from_secs(5);
/// The slowest link that is not taken for a silent one.
const LEAST_BYTES_PER_SECOND: usize = 64 << 10;
/// The ticks that a segment takes besides.
const SEGMENT_TICKS: u32 = 100;

/// The silence of the demand lane, counted in ticks: time in which the pager itself is stopped does
/// not count.
#[derive(Debug)]
pub(super) struct Silence {
    ticks: u32,
    first_ticks: u32,
    patience_ticks: u32,
}

impl Silence {
    pub(super) fn new(chunk_bytes: usize) -> Self {
        let chunk = Duration::from_millis((chunk_bytes * 1000 / LEAST_BYTES_PER_SECOND) as u64);
        let first_ticks = u32::try_from((FIRST + chunk).as_millis() / TICK.as_millis()).expect("a minute");
        Self { ticks: 0, first_ticks, patience_ticks: first_ticks }
    }

    /// Notes an answer of the server.
    pub(super) fn ends(&mut self) {
        (self.ticks, self.patience_ticks) = (0, self.first_ticks);
    }

    /// Counts a tick. Returns the length of the silence if the lane must be given up; from then on
    /// the count is of a new lane.
    pub(super) fn tick(&mut self, is_awaited: bool, awaits_segment: bool) -> Option<Duration> {
        self.ticks = if is_awaited { self.ticks + 1 } else { 0 };
        let segment_ticks = if awaits_segment { SEGMENT_TICKS } else { 0 };
        if self.ticks < self.patience_ticks + segment_ticks {
            return None;
        }
        let silence = TICK * self.ticks;
        self.ticks = 0;
        self.patience_ticks = self.patience_ticks.saturating_mul(2);
        Some(silence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_lane_is_given_up_and_the_next_one_has_twice_the_time() {
        let mut silence = Silence::new(0);
        let mut until_given_up = || (1..).find(|_| silence.tick(true, false).is_some()).unwrap();
        assert_eq!([until_given_up(), until_given_up()], [50, 100]);
        assert!((0..299).all(|_| silence.tick(true, true).is_none()), "a segment takes longer");
        silence.ends();
        assert!((0..49).all(|_| silence.tick(true, false).is_none()));
        assert_eq!(silence.tick(false, false), None, "nothing is awaited for a moment");
        assert!((0..49).all(|_| silence.tick(true, false).is_none()));
        assert_eq!(silence.tick(true, false), Some(FIRST));
    }
}
