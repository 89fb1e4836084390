//! Warnings about failed requests, limited in number: a program may repeat a failing read for ever.

use std::fmt::Arguments;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most warnings of a period.
const MOST: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// The warnings of the present period.
#[derive(Debug)]
struct Period {
    since: Instant,
    count: u32,
}

static PERIOD_NOW: Mutex<Option<Period>> = Mutex::new(None);

/// Logs a warning, unless there were many in the last seconds.
pub(crate) fn warn(warning: Arguments<'_>) {
    let mut now = PERIOD_NOW.lock().unwrap_or_else(PoisonError::into_inner);
    let period = now.get_or_insert_with(|| Period { since: Instant::now(), count: 0 });
    let left_out = period.next(Instant::now());
    match left_out {
        Some(0) => tracing::warn!("{warning}"),
        Some(count) => tracing::warn!("{warning} (before it, {count} warnings were left out)"),
        None => {}
    }
}

impl Period {
    /// Counts a warning. Returns the number of warnings that were left out before it, or `None` if
    /// this one is left out, too.
    fn next(&mut self, now: Instant) -> Option<u32> {
        let mut left_out = 0;
        if now.saturating_duration_since(self.since) > PERIOD {
            left_out = self.count.saturating_sub(MOST);
            *self = Self { since: now, count: 0 };
        }
        self.count += 1;
        (self.count <= MOST).then_some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_beyond_the_limit_are_counted() {
        let start = Instant::now();
        let mut period = Period { since: start, count: 0 };
        let logged = (0..100).filter(|_| period.next(start).is_some()).count();
        assert_eq!(logged, 20);
        assert_eq!(period.next(start + PERIOD * 2), Some(80));
        assert_eq!(period.next(start + PERIOD * 2), Some(0));
    }
}
