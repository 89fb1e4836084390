//! Limits the bytes that the background fill has outstanding, so that they do not delay page
//! faults.
//!
//! Where the network is the bottleneck, all outstanding bytes of the fill delay a demand fetch. So
//! [`Pace`] learns the latency of demand fetches while nothing else is outstanding. It gives the
//! fill less room when answers take longer, and more when they do not. Where even a single chunk is
//! too much, the fill pauses most of the time. While no page faults occur, it has all the room.
//!
//! Where the cores are the bottleneck, decompressing and installing prefetched pages delays faults,
//! too: see [`Cores`].

use crate::usual::Usual;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The smallest window that is not a pause, in plain bytes; a chunk, where that is more.
const LEAST_BYTES: usize = 64 << 10;
/// The largest window, in plain bytes.
pub(crate) const MOST_BYTES: usize = 16 << 20;
/// Answers after which there is a decision.
const ANSWERS: u32 = 8;
/// The same for the smallest window. Where that is still too much, more than half of the answers
/// are from a pause, and so is their median.
const ANSWERS_LEAST: u32 = 4;
/// Answers of a pause.
const ANSWERS_ALONE: usize = 8;
/// The factor by which answers may usually take longer than without a fill.
const TOLERANCE: f64 = 1.2;
/// Without a page fault for so long, all cores are for the fill.
const QUIET: Duration = Duration::from_millis(20);
/// Page faults that are further apart are unrelated.
const APART: Duration = Duration::from_millis(100);
/// Without a waiter for this many times the last answer's latency, from [`QUIET`] to [`APART`], the
/// window grows, and again after each [`QUIET`].
const QUIET_ANSWERS: u32 = 100;
/// Decisions after which the fill pauses in any case: the latency without a fill may have changed.
const DECISIONS: u32 = 16;
/// The fill does not delay a fault that has been pending longer than this.
const LONGEST: Duration = Duration::from_secs(10);
/// The share by which an answer moves the usual latency.
const STEP: f64 = 0.05;

/// See the module.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The least room where there is any.
    least: usize,
    /// The window while page faults occur, in plain bytes. 0: a pause, to learn the latency alone.
    window: usize,
    /// The window while none occur: it grows, and is forgotten at the next answer.
    quiet: usize,
    /// The time since which no more than `window` is outstanding.
    fits_since: Option<Instant>,
    /// The window after this pause.
    after_pause: usize,
    /// Decisions since the last pause.
    decisions: u32,
    /// Seconds that the answers of this pause have taken.
    pause: Vec<f64>,
    /// Seconds that an answer usually takes in pauses.
    alone: Option<f64>,
    /// The usual time of an answer of late, outside of pauses.
    usual: Usual,
    /// Answers since the last decision.
    answers: u32,
    /// The last answer.
    answered_at: Option<Instant>,
    /// The time at which the window grows, if no fault waits then.
    more_at: Option<Instant>,
}

impl Pace {
    /// Makes one for chunks of that size.
    pub(crate) fn new(chunk_bytes: usize) -> Self {
        Self {
            least: chunk_bytes.max(LEAST_BYTES),
            window: MOST_BYTES,
            quiet: 0,
            fits_since: None,
            after_pause: 0,
            decisions: 0,
            pause: Vec::new(),
            alone: None,
            usual: Usual::known(Duration::ZERO, STEP),
            answers: 0,
            answered_at: None,
            more_at: None,
        }
    }

    /// Notes the answer to a demand fetch of that time. Returns whether a pause has ended.
    pub(crate) fn answered(&mut self, asked_at: Instant, now: Instant) -> bool {
        let follows = self.answered_at.is_some_and(|last| asked_at.saturating_duration_since(last) < APART);
        let took = now.saturating_duration_since(asked_at);
        self.more_at = Some(now + (took * QUIET_ANSWERS).clamp(QUIET, APART));
        self.answered_at = Some(now);
        self.quiet = 0;
        if !follows {
            return false;
        }
        if self.alone.is_none() && self.window > 0 {
            self.begin_pause(self.least);
        }
        if self.fits_since.is_none_or(|since| since > asked_at) {
            // This answer measures the window before.
            return false;
        }
        match self.window {
            0 => self.answered_alone(took.as_secs_f64()),
            _ => {
                self.answered_beside(took);
                false
            }
        }
    }

    fn answered_alone(&mut self, took: f64) -> bool {
        self.pause.push(took);
        if self.pause.len() < ANSWERS_ALONE {
            return false;
        }
        self.pause.sort_unstable_by(f64::total_cmp);
        let median = self.pause[ANSWERS_ALONE / 2];
        self.pause.clear();
        if self.alone.is_none() {
            self.usual = Usual::known(Duration::from_secs_f64(median), STEP);
        }
        self.alone = Some(match self.alone {
            // No window makes answers faster than none: the latency alone was learned at a bad
            // time.
            Some(alone) if median > alone / 2.0 => alone + (median - alone) / 4.0,
            _ => median,
        });
        self.decide(self.after_pause);
        true
    }

    fn answered_beside(&mut self, took: Duration) {
        self.usual.note(took);
        self.answers += 1;
        let enough = if self.window == self.least { ANSWERS_LEAST } else { ANSWERS };
        let Some(alone) = self.alone.filter(|_| self.answers >= enough) else { return };
        self.decisions += 1;
        let is_too_much = self.usual.time().as_secs_f64() > alone * TOLERANCE;
        if is_too_much && self.window == self.least {
            self.begin_pause(self.least);
        } else if is_too_much {
            self.decide((self.window / 2).max(self.least));
        } else if self.decisions >= DECISIONS {
            self.begin_pause(self.window);
        } else {
            self.decide((self.window + self.window / 2).min(MOST_BYTES));
        }
    }

    /// Begins a pause, and sets the window after it.
    fn begin_pause(&mut self, then: usize) {
        (self.after_pause, self.decisions) = (then, 0);
        self.decide(0);
    }

    /// Sets the window.
    fn decide(&mut self, window: usize) {
        (self.window, self.answers, self.fits_since) = (window, 0, None);
    }

    /// Returns the plain bytes that may be outstanding, while `on_their_way` are; 0 in a pause.
    pub(crate) fn window(&mut self, on_their_way: usize, has_pending_fault: bool, now: Instant) -> usize {
        if !has_pending_fault && self.more_at.is_some_and(|at| at <= now) {
            self.quiet = (self.window.max(self.quiet) * 2).clamp(self.least, MOST_BYTES);
            (self.more_at, self.answers) = (Some(now + QUIET), 0);
        }
        match on_their_way <= self.window {
            true => self.fits_since = self.fits_since.or(Some(now)),
            false => self.fits_since = None,
        }
        self.window.max(self.quiet)
    }
}

/// The share of the cores: while page faults occur, the fill has half of the cores. The working set
/// may have all of them, since its pages are accessed soon.
#[derive(Debug)]
pub(crate) struct Cores {
    start: Instant,
    /// Microseconds after `start`; 0: never.
    last_touch: AtomicU64,
    /// The start of the latest pending fault, in the same way; 0: none is pending.
    waits_since: AtomicU64,
    /// The working set is complete: later jobs are the fill's.
    is_behind: AtomicBool,
}

impl Default for Cores {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last_touch: AtomicU64::new(0),
            waits_since: AtomicU64::new(0),
            is_behind: AtomicBool::new(false),
        }
    }
}

impl Cores {
    /// Notes a page fault.
    pub(crate) fn touched(&self, now: Instant) {
        self.last_touch.store(self.micros(now), Ordering::Relaxed);
    }

    /// Notes the start of the latest pending fault; None: none is pending.
    pub(crate) fn waits(&self, since: Option<Instant>) {
        self.waits_since.store(since.map_or(0, |since| self.micros(since)), Ordering::Relaxed);
    }

    /// Returns whether a fault is pending that the fill may delay.
    pub(crate) fn has_pending_fault(&self, now: Instant) -> bool {
        self.is_within(&self.waits_since, LONGEST, now)
    }

    /// Notes that the working set is complete, or that the image has none.
    pub(crate) fn fill_behind(&self) {
        self.is_behind.store(true, Ordering::Relaxed);
    }

    /// Returns whether the fill has to leave half of the cores.
    pub(crate) fn are_shared(&self, now: Instant) -> bool {
        let is_touched = self.is_within(&self.last_touch, QUIET, now) || self.has_pending_fault(now);
        self.is_behind.load(Ordering::Relaxed) && is_touched
    }

    fn is_within(&self, since: &AtomicU64, most: Duration, now: Instant) -> bool {
        let since = since.load(Ordering::Relaxed);
        since > 0 && Duration::from_micros(self.micros(now).saturating_sub(since)) < most
    }

    fn micros(&self, now: Instant) -> u64 {
        let micros = now.saturating_duration_since(self.start).as_micros();
        u64::try_from(micros).unwrap_or(u64::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn half_of_the_cores_are_for_who_touches_what_is_not_in_the_working_set() {
        let (cores, now) = (Cores::default(), Instant::now());
        cores.fill_behind();
        assert!(!cores.are_shared(now), "nobody has touched anything");
        let cores = Cores::default();
        cores.touched(now);
        assert!(!cores.are_shared(now), "it is the working set that comes");
        cores.fill_behind();
        assert!(cores.are_shared(now));
        assert!(!cores.are_shared(now + 2 * QUIET), "it is quiet");
        cores.waits(Some(now));
        assert!(cores.are_shared(now + 2 * QUIET), "somebody waits still");
        assert!(!cores.are_shared(now + 2 * LONGEST), "for what is lost");
        cores.waits(None);
        assert!(!cores.are_shared(now + 2 * QUIET));
    }

    /// A link of so many plain bytes a millisecond, over which a touch takes a round trip and what
    /// is in its way.
    struct Link {
        pace: Pace,
        now: Instant,
        /// Bytes of the fill in all.
        on_their_way: usize,
        /// Of the fill, so far.
        came: usize,
        round_trip: Duration,
        bytes_a_milli: usize,
    }

    impl Link {
        fn new(round_trip: Duration, bytes_a_milli: usize) -> Self {
            let (pace, now) = (Pace::new(LEAST_BYTES), Instant::now());
            Self { pace, now, on_their_way: 0, came: 0, round_trip, bytes_a_milli }
        }

        /// Time goes by, in steps in which the fill looks for room.
        fn pass(&mut self, time: Duration, has_pending_fault: bool) -> usize {
            let until = self.now + time;
            let mut window = 0;
            while self.now < until {
                let step = MILLI.min(until - self.now);
                self.now += step;
                let came = (self.bytes_a_milli as u128 * step.as_nanos() / MILLI.as_nanos()) as usize;
                let came = came.min(self.on_their_way);
                (self.came, self.on_their_way) = (self.came + came, self.on_their_way - came);
                window = self.pace.window(self.on_their_way, has_pending_fault, self.now);
                self.on_their_way = self.on_their_way.max(window);
            }
            window
        }

        /// The latency of a demand fetch.
        fn touch(&mut self) -> Duration {
            let asked_at = self.now;
            let in_its_way = MILLI.mul_f64(self.on_their_way as f64 / self.bytes_a_milli as f64);
            self.pass(self.round_trip + in_its_way, true);
            self.pace.answered(asked_at, self.now);
            self.now - asked_at
        }

        /// Of so many touches, with some time between them.
        fn median(&mut self, touches: usize, between: Duration) -> Duration {
            let mut took: Vec<_> = (0..touches)
                .map(|_| {
                    self.pass(between, false);
                    self.touch()
                })
                .collect();
            took.sort_unstable();
            took[touches / 2]
        }
    }

    #[test]
    fn touches_are_held_up_a_little_and_not_more() {
        // 1 Gbit/s at 2 : 1, 100 Mbit/s, and far away.
        for (round_trip, bytes_a_milli) in
            [(1, 250_000), (1, 25_000), (15, 250_000), (30, 250_000), (30, 25_000)]
        {
            let round_trip = round_trip * MILLI;
            let mut link = Link::new(round_trip, bytes_a_milli);
            assert_eq!(link.pass(MILLI, false), MOST_BYTES, "nobody touches anything");
            let first = link.touch();
            assert!(first > 2 * round_trip, "it waits for all that: {first:?}");
            link.median(50, MILLI / 5);
            for _ in 0..4 {
                let median = link.median(200, MILLI / 5);
                assert!(median < round_trip * 13 / 10, "{round_trip:?} and {bytes_a_milli}: {median:?}");
                // It is remembered when it has been quiet.
                assert_eq!(link.pass(MILLI * 300, false), MOST_BYTES, "there is room once it is quiet");
            }
        }
    }

    #[test]
    fn where_one_chunk_is_too_much_more_than_half_of_the_answers_are_from_a_pause() {
        let (mut pace, mut now, mut on_their_way, mut paused) =
            (Pace::new(LEAST_BYTES), Instant::now(), 0, 0);
        for _ in 0..2000 {
            let asked_at = now;
            on_their_way = pace.window(on_their_way, true, now);
            paused += u32::from(on_their_way == 0);
            now += Duration::from_micros(100 + if on_their_way > 0 { 100 } else { 0 });
            pace.answered(asked_at, now);
        }
        assert!((1100..1500).contains(&paused), "{paused}");
    }

    #[test]
    fn a_touch_now_and_then_is_not_waited_for() {
        let mut link = Link::new(MILLI, 250_000);
        for _ in 0..20 {
            link.touch();
            assert_eq!(link.pass(APART * 2, false), MOST_BYTES);
        }
    }

    #[test]
    fn touches_that_are_not_far_apart_are_held_up_a_little_and_the_fill_goes_on() {
        for round_trip in [1, 10, 30] {
            for between in [5, 30, 60, 90] {
                let mut link = Link::new(round_trip * MILLI, 250_000);
                let start = link.now;
                link.median(20, between * MILLI);
                let median = link.median(200, between * MILLI);
                assert!(median < round_trip * MILLI * 13 / 10, "{round_trip}, {between}: {median:?}");
                let millis = usize::try_from((link.now - start).as_millis()).unwrap();
                let share = link.came / millis * 100 / link.bytes_a_milli;
                assert!(share >= 5, "{round_trip}, {between}: {share} % of the link");
            }
        }
    }

    #[test]
    fn what_was_learned_at_a_bad_time_is_learned_anew() {
        let mut link = Link::new(100 * MILLI, 250_000);
        link.median(30, MILLI);
        link.round_trip = MILLI;
        link.median(1000, MILLI);
        let median = link.median(200, MILLI);
        assert!(median < MILLI * 13 / 10, "{median:?}");
    }

    #[test]
    fn where_the_fill_is_in_nobody_s_way_it_has_all_the_room() {
        let (mut pace, mut now, mut wide) = (Pace::new(LEAST_BYTES), Instant::now(), 0);
        for touch in 0..1000u64 {
            let asked_at = now;
            let window = pace.window(0, true, now);
            wide += u32::from(touch >= 500 && window == MOST_BYTES);
            now += Duration::from_micros(100 + touch % 7);
            pace.answered(asked_at, now);
        }
        assert!(wide > 450, "but for pauses now and then: {wide} of 500");
    }

    #[test]
    fn a_chunk_may_be_on_its_way_however_large() {
        let (mut pace, mut now) = (Pace::new(2 << 20), Instant::now());
        for _ in 0..200 {
            let asked_at = now;
            let window = pace.window(0, true, now);
            assert!(window == 0 || window >= 2 << 20, "{window}");
            now += Duration::from_micros(100) + Duration::from_nanos(window as u64 / 100);
            pace.answered(asked_at, now);
        }
    }
}
