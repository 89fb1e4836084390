//! How much of the background fill may be on its way at a time, so that it does not hold up who waits for a page.
//!
//! What matters is what touches take: where the network is the narrow place, all that the fill has asked for is in a
//! touch's way. So what an answer on the demand lane usually takes is learned while nothing else is on its way, and the
//! fill gets less room when answers take longer than that, and more when they do not. Where even a single chunk is too much,
//! it pauses most of the time. Where nobody touches anything it has all the room that there is.
//!
//! Where the cores are the narrow place, what has come already is in the way, too, while it is decompressed and installed:
//! see [`Cores`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The least that is on its way where anything is, in plain bytes.
const LEAST_BYTES: usize = 64 << 10;
/// The most.
pub(crate) const MOST_BYTES: usize = 16 << 20;
/// Answers after which there is a decision.
const ANSWERS: u32 = 8;
/// As many in a pause, and with the least that is on its way: where that is too much, more than half of the answers are
/// from a pause, and so is their median.
const ANSWERS_ALONE: u32 = 8;
const ANSWERS_LEAST: u32 = 4;
/// How much longer answers may usually take than they take alone.
const TOLERANCE: f64 = 1.1;
/// Without an answer for so long nobody is in the way.
const QUIET: Duration = Duration::from_millis(20);
/// How much an answer moves what is usual.
const STEP: f64 = 0.05;

/// See the module.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Plain bytes that may be on their way. 0: a pause, to see what answers take alone.
    window: usize,
    /// Since when nothing is.
    clear_since: Option<Instant>,
    /// Seconds that an answer usually takes then.
    alone: Option<f64>,
    /// Seconds that it takes of late: about the median.
    usual: f64,
    /// Since the last decision.
    answers: u32,
    /// The last answer.
    answered_at: Option<Instant>,
    /// That, or more room since.
    last: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: MOST_BYTES,
            clear_since: None,
            alone: None,
            usual: 0.0,
            answers: 0,
            answered_at: None,
            last: None,
        }
    }
}

impl Pace {
    /// A touch has been answered that was asked for at that time: whether a pause has ended.
    pub(crate) fn answered(&mut self, asked_at: Instant, now: Instant) -> bool {
        // A touch now and then is nobody who would gain by a pause.
        let follows = self.answered_at.is_some_and(|last| asked_at.saturating_duration_since(last) < QUIET);
        (self.last, self.answered_at) = (Some(now), Some(now));
        if self.alone.is_none() {
            if !follows {
                return false;
            }
            self.window = 0;
        }
        let is_clear = self.window == 0 && self.clear_since.is_some_and(|since| since <= asked_at);
        if self.window == 0 && !is_clear {
            // It says what was in its way before.
            return false;
        }
        let took = now.saturating_duration_since(asked_at).as_secs_f64();
        self.usual = match self.usual {
            0.0 => took,
            usual if took > usual => usual * (1.0 + STEP),
            usual => usual * (1.0 - STEP),
        };
        self.answers += 1;
        let enough = match self.window {
            0 => ANSWERS_ALONE,
            LEAST_BYTES => ANSWERS_LEAST,
            _ => ANSWERS,
        };
        if self.answers >= enough {
            self.decide(is_clear);
        }
        is_clear && self.window > 0
    }

    fn decide(&mut self, is_clear: bool) {
        self.answers = 0;
        let alone = match self.alone {
            // It is less than was thought, by some of what it is less now.
            Some(alone) if !is_clear => alone + (self.usual - alone).min(0.0) / 8.0,
            _ => self.usual,
        };
        self.alone = Some(alone);
        self.window = if self.usual <= alone * TOLERANCE {
            (self.window + self.window / 2).clamp(LEAST_BYTES, MOST_BYTES)
        } else if self.window > LEAST_BYTES {
            (self.window / 2).max(LEAST_BYTES)
        } else {
            0
        };
        self.clear_since = None;
    }

    /// How many plain bytes may be on their way, where so many are; none in a pause.
    pub(crate) fn window(&mut self, on_their_way: usize, now: Instant) -> usize {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) > QUIET) {
            self.window = (self.window * 2).clamp(LEAST_BYTES, MOST_BYTES);
            (self.last, self.answers) = (Some(now), 0);
        }
        match self.window == 0 && on_their_way == 0 {
            true => self.clear_since = self.clear_since.or(Some(now)),
            false => self.clear_since = None,
        }
        self.window
    }
}

/// Whose the cores are: while somebody touches what is absent, half of them are not for the fill. The working set may
/// have all, since it is what will be touched.
#[derive(Debug)]
pub(crate) struct Cores {
    start: Instant,
    /// Microseconds after `start`; 0: never.
    last_touch: AtomicU64,
    /// What comes from now on is not the working set.
    is_behind: AtomicBool,
}

impl Default for Cores {
    fn default() -> Self {
        Self { start: Instant::now(), last_touch: AtomicU64::new(0), is_behind: AtomicBool::new(false) }
    }
}

impl Cores {
    /// Somebody touches what is absent.
    pub(crate) fn touched(&self, now: Instant) {
        self.last_touch.store(self.micros(now).max(1), Ordering::Relaxed);
    }

    /// The working set is here, or there is none.
    pub(crate) fn fill_behind(&self) {
        self.is_behind.store(true, Ordering::Relaxed);
    }

    /// Whether half of them are not for the fill.
    pub(crate) fn are_shared(&self, now: Instant) -> bool {
        let last = self.last_touch.load(Ordering::Relaxed);
        let quiet = u64::try_from(QUIET.as_micros()).expect("a small constant");
        last > 0 && self.is_behind.load(Ordering::Relaxed) && self.micros(now).saturating_sub(last) < quiet
    }

    fn micros(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }

    /// A link: an answer takes 1 ms, and 1 ms more for each MiB that is on its way.
    fn touch(pace: &mut Pace, now: &mut Instant, on_their_way: &mut usize) -> usize {
        let asked_at = *now;
        let window = pace.window(*on_their_way, *now);
        // It is asked for as much as there is room for; what is too much is there soon.
        *on_their_way = window;
        *now += Duration::from_micros(1000 + ((*on_their_way as u64 * 1000) >> 20));
        pace.answered(asked_at, *now);
        window
    }

    #[test]
    fn touches_are_held_up_a_little_and_not_more() {
        let (mut pace, mut now, mut on_their_way) = (Pace::default(), Instant::now(), 0);
        assert_eq!(pace.window(0, now), MOST_BYTES, "nobody touches anything");
        (0..100).for_each(|_| _ = touch(&mut pace, &mut now, &mut on_their_way));
        let windows: Vec<_> = (0..200).map(|_| touch(&mut pace, &mut now, &mut on_their_way)).collect();
        let mean = windows.iter().sum::<usize>() / windows.len();
        assert!((LEAST_BYTES..1 << 20).contains(&mean), "{mean}");
        // And once it is quiet there is room.
        for _ in 0..10 {
            now += 2 * QUIET;
            pace.window(on_their_way, now);
        }
        assert_eq!(pace.window(on_their_way, now), MOST_BYTES);
    }

    #[test]
    fn where_one_chunk_is_too_much_more_than_half_of_the_answers_are_from_a_pause() {
        let (mut pace, mut now, mut on_their_way, mut paused) = (Pace::default(), Instant::now(), 0, 0);
        for _ in 0..2000 {
            let asked_at = now;
            on_their_way = pace.window(on_their_way, now);
            paused += u32::from(on_their_way == 0);
            now += Duration::from_micros(100 + if on_their_way > 0 { 100 } else { 0 });
            pace.answered(asked_at, now);
        }
        assert!((1100..1500).contains(&paused), "{paused}");
    }

    #[test]
    fn a_touch_now_and_then_is_not_waited_for() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        for _ in 0..100 {
            pace.answered(now - Duration::from_micros(500), now);
            assert_eq!(pace.window(MOST_BYTES, now), MOST_BYTES);
            // Also where it looks in between.
            assert_eq!(pace.window(MOST_BYTES, now + QUIET + Duration::from_millis(1)), MOST_BYTES);
            now += QUIET * 3 / 2;
        }
    }

    #[test]
    fn where_the_fill_is_in_nobody_s_way_it_has_all_the_room() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        for touch in 0..200u64 {
            let asked_at = now;
            let window = pace.window(0, now);
            now += Duration::from_micros(100 + touch % 7);
            pace.answered(asked_at, now);
            assert!(touch < 150 || window == MOST_BYTES);
        }
    }
}
