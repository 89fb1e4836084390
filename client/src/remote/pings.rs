//! The interval of HTTP/2 pings, which find servers that are lost without a word.
//!
//! gRPC's servers in other languages end connections with "too_many_pings" if a client pings more
//! often than they like. Then the interval of later connections doubles, as gRPC's own clients do
//! (gRPC proposal A8). The interval is one for the whole process: a longer one harms no server, and
//! faults do not depend on pings.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The first interval, and the longest.
const FIRST_SECONDS: u64 = 30;
const LONGEST_SECONDS: u64 = 3600;

/// Time for the answer to a ping.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);

static SECONDS: AtomicU64 = AtomicU64::new(FIRST_SECONDS);

/// Returns the interval for a new connection.
pub(super) fn interval() -> Duration {
    Duration::from_secs(SECONDS.load(Ordering::Relaxed))
}

/// Doubles the interval if a server has ended the connection because of too many pings.
pub(super) fn note(status: &tonic::Status) {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.downcast_ref::<h2::Error>().is_some_and(is_too_many_pings) {
            return lengthen();
        }
        cause = error.source();
    }
}

/// Doubles the interval, at most once a second: several requests of a connection report its end.
fn lengthen() {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
        return;
    }
    *last = Some(Instant::now());
    let longer = SECONDS.load(Ordering::Relaxed).saturating_mul(2).min(LONGEST_SECONDS);
    SECONDS.store(longer, Ordering::Relaxed);
}

fn is_too_many_pings(error: &h2::Error) -> bool {
    error.is_go_away()
        && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM)
        && error.to_string().contains("too_many_pings")
}
