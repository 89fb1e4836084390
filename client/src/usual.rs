//! An estimate of how long an answer usually takes: [`Usual`].

use std::time::Duration;

/// The number of first answers whose times move the estimate half of the way.
const FIRST: u32 = 8;

/// About the median of the recent times. Each time moves it by a fixed share, so that a very slow
/// answer counts no more than a slow one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usual {
    seconds: f64,
    step: f64,
    /// The number of first answers that are still to come.
    first: u32,
}

impl Usual {
    /// Starts with an assumed time, which the first answers correct. Each later answer moves it by
    /// the share `step`.
    pub(crate) fn assumed(time: Duration, step: f64) -> Self {
        Self { first: FIRST, ..Self::known(time, step) }
    }

    /// Starts with a known time, which each answer moves by the share `step`.
    pub(crate) fn known(time: Duration, step: f64) -> Self {
        Self { seconds: time.as_secs_f64(), step, first: 0 }
    }

    /// Notes the time that an answer took.
    pub(crate) fn note(&mut self, took: Duration) {
        if self.first > 0 {
            self.first -= 1;
            self.seconds = f64::midpoint(self.seconds, took.as_secs_f64());
        } else {
            self.seconds *= if took > self.time() { 1.0 + self.step } else { 1.0 - self.step };
        }
    }

    /// Returns the usual time.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICRO: Duration = Duration::from_micros(1);

    #[test]
    fn it_follows_the_median_of_the_recent_times() {
        let mut usual = Usual::known(50 * MICRO, 0.125);
        // One of ten answers is slow.
        for answer in 0..200 {
            usual.note(if answer % 10 == 0 { 100_000 * MICRO } else { 80 * MICRO });
        }
        assert!((60 * MICRO..110 * MICRO).contains(&usual.time()), "{usual:?}");
        (0..100).for_each(|_| usual.note(20_000 * MICRO));
        assert!((15_000 * MICRO..25_000 * MICRO).contains(&usual.time()), "{usual:?}");
        (0..100).for_each(|_| usual.note(80 * MICRO));
        assert!((60 * MICRO..110 * MICRO).contains(&usual.time()), "{usual:?}");
    }

    #[test]
    fn a_few_answers_correct_what_was_assumed() {
        let mut usual = Usual::assumed(50 * MICRO, 0.125);
        (0..4).for_each(|_| usual.note(60_000 * MICRO));
        assert!(usual.time() > 50_000 * MICRO, "{usual:?}");
        // The first answer of a near server is slow.
        let mut usual = Usual::assumed(50 * MICRO, 0.125);
        usual.note(10_000 * MICRO);
        (0..7).for_each(|_| usual.note(60 * MICRO));
        assert!(usual.time() < 110 * MICRO, "{usual:?}");
    }
}
