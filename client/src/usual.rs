//! An estimate of how long an answer usually takes: [`Usual`].

use std::time::Duration;

/// About the median of the recent times. Each time moves it by a fixed share, so that a very slow
/// answer counts no more than a slow one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usual {
    seconds: f64,
    step: f64,
}

impl Usual {
    /// Starts with an assumed time, which each answer moves by the share `step`.
    pub(crate) fn new(assumed: Duration, step: f64) -> Self {
        Self { seconds: assumed.as_secs_f64(), step }
    }

    /// Notes the time that an answer took.
    pub(crate) fn note(&mut self, took: Duration) {
        self.seconds *= if took > self.time() { 1.0 + self.step } else { 1.0 - self.step };
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
        let mut usual = Usual::new(50 * MICRO, 0.125);
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
}
