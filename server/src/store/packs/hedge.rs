//! Second requests for readings that take long.
//!
//! A few requests to a large object store take ten times as long as most. If a reading takes longer
//! than 98 of the last 100 have taken, it is requested a second time, and the first answer counts.
//! At most 2 of 100 readings are hedged, so a bucket that is slow as a whole gets hardly more
//! requests.

use futures_util::FutureExt;
use futures_util::future::select_ok;
use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Newest readings whose times are known.
const KNOWN: usize = 256;
/// Known readings from which on others are hedged.
const MIN_KNOWN: usize = 64;
/// Readings that pay for one second request.
const READINGS_EACH: u32 = 50;
/// Most second requests that are saved up.
const MAX_SAVED: u32 = 4;

/// The times of the newest readings, and the right to make second requests.
#[derive(Debug, Default)]
pub(super) struct Hedge {
    /// Locked for a look-up or a change.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    times: VecDeque<Duration>,
    /// Second requests that may be made, times [`READINGS_EACH`].
    saved: u32,
}

impl Hedge {
    /// Awaits `read`, and another call of it if the first one takes long.
    pub(super) async fn read<T, E, F>(&self, read: impl Fn() -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>> + Send,
    {
        let began = Instant::now();
        let mut first = read().boxed();
        let outcome = match self.patience() {
            None => first.await,
            Some(patience) => match tokio::time::timeout(patience, &mut first).await {
                Ok(outcome) => outcome,
                Err(_) if self.takes_one() => {
                    select_ok([first, read().boxed()]).await.map(|(answer, _)| answer)
                }
                Err(_) => first.await,
            },
        };
        if outcome.is_ok() {
            self.note(began.elapsed());
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the time after which a reading is one of the slowest 2 of 100; `None` as long as too
    /// few are known.
    fn patience(&self) -> Option<Duration> {
        let mut times: Vec<_> = self.lock().times.iter().copied().collect();
        if times.len() < MIN_KNOWN {
            return None;
        }
        let place = times.len() * 98 / 100;
        Some(*times.select_nth_unstable(place).1)
    }

    fn takes_one(&self) -> bool {
        let mut state = self.lock();
        let takes = state.saved >= READINGS_EACH;
        state.saved -= if takes { READINGS_EACH } else { 0 };
        takes
    }

    fn note(&self, time: Duration) {
        let mut state = self.lock();
        state.saved = (state.saved + 1).min(MAX_SAVED * READINGS_EACH);
        if state.times.len() == KNOWN {
            state.times.pop_front();
        }
        state.times.push_back(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn of_readings(count: usize) -> Hedge {
        let hedge = Hedge::default();
        (0..count).for_each(|_| hedge.note(Duration::from_micros(100)));
        hedge
    }

    /// The first call of two never ends.
    async fn read(hedge: &Hedge, calls: &AtomicU32, fails: bool) -> Result<u32, u32> {
        let read = || async {
            match (calls.fetch_add(1, Ordering::Relaxed) % 2, fails) {
                (0, false) => std::future::pending().await,
                (0, true) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Ok(1)
                }
                (_, true) => Err(2),
                (_, false) => Ok(2),
            }
        };
        hedge.read(read).await
    }

    #[tokio::test]
    async fn a_reading_that_takes_long_is_requested_again_and_the_first_answer_counts() {
        let (hedge, calls) = (of_readings(100), AtomicU32::new(0));
        assert_eq!(read(&hedge, &calls, false).await, Ok(2));
        assert_eq!(read(&hedge, &calls, true).await, Ok(1), "the second request fails");
    }

    #[tokio::test]
    async fn two_of_a_hundred_readings_are_hedged_and_none_without_knowledge() {
        let hedge = of_readings(1000);
        let taken = (0..100).filter(|_| hedge.takes_one()).count();
        assert_eq!(taken, MAX_SAVED as usize);
        (0..100).for_each(|_| hedge.note(Duration::ZERO));
        assert_eq!((0..100).filter(|_| hedge.takes_one()).count(), 2);
        assert_eq!(of_readings(MIN_KNOWN - 1).patience(), None);
        let hedge = of_readings(200);
        (0..10).for_each(|_| hedge.note(Duration::from_secs(1)));
        assert_eq!(hedge.patience(), Some(Duration::from_secs(1)));
    }
}
