//! What has become of a session: what it could not do, and whether its pager has ended. Threads wait here for that, and
//! for page states to change.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Held for reading and writing it alone.
    so_far: Mutex<OutcomeSoFar>,
    /// Something in the page states or in `so_far` has changed.
    changed: Condvar,
    /// Threads that wait for `changed` because of page states.
    waiters: AtomicU64,
    /// Something in `so_far` has changed.
    reported: Condvar,
    /// The pager has ended; for the task that sends the recording.
    pub(crate) ended: Notify,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct OutcomeSoFar {
    pub(crate) error: Option<Arc<str>>,
    /// How often something was reported.
    pub(crate) reports: u64,
    pub(crate) ended: bool,
    /// How often page states have changed while somebody waited for that.
    pub(crate) changes: u64,
}

impl Outcome {
    fn so_far(&self) -> MutexGuard<'_, OutcomeSoFar> {
        self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait for pages that states have changed.
    pub(crate) fn pages_changed(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.so_far().changes += 1;
            self.changed.notify_all();
        }
    }

    /// Notes why pages are lost; the first reason is kept.
    pub(crate) fn report(&self, reason: &str) {
        let mut outcome = self.so_far();
        outcome.error.get_or_insert_with(|| reason.into());
        outcome.reports += 1;
        drop(outcome);
        self.reported.notify_all();
        self.changed.notify_all();
    }

    /// The pager has ended.
    pub(crate) fn end(&self) {
        self.so_far().ended = true;
        self.reported.notify_all();
        self.changed.notify_all();
        self.ended.notify_one();
    }

    /// How often something was reported.
    pub(crate) fn reports(&self) -> u64 {
        self.so_far().reports
    }

    /// Waits until the pager has ended, for at most `timeout`.
    pub(crate) fn wait_end(&self, timeout: Duration) {
        let _ = self.reported.wait_timeout_while(self.so_far(), timeout, |outcome| !outcome.ended);
    }

    /// Waits until something was reported or the pager has ended, for at most `timeout`: the first report.
    pub(crate) fn wait_error(&self, timeout: Duration) -> Option<Arc<str>> {
        let none = |outcome: &mut OutcomeSoFar| outcome.error.is_none() && !outcome.ended;
        let waited = self.reported.wait_timeout_while(self.so_far(), timeout, none);
        waited.unwrap_or_else(PoisonError::into_inner).0.error.clone()
    }

    /// What has been touched has been sent, or that is given up.
    pub(crate) fn recording_has_changed(&self) {
        self.so_far().changes += 1;
        self.changed.notify_all();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.so_far().ended
    }

    pub(crate) fn error(&self) -> Option<Arc<str>> {
        self.so_far().error.clone()
    }

    /// Waits until `done` gives something.
    pub(crate) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&OutcomeSoFar) -> Option<T>,
    ) -> Option<T> {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let mut outcome = self.so_far();
        let result = loop {
            // Without the lock: it may take long, and the pager does not wait for it.
            let seen = outcome.clone();
            drop(outcome);
            if let Some(result) = done(&seen) {
                break Some(result);
            }
            outcome = self.so_far();
            if (outcome.changes, outcome.reports, outcome.ended) != (seen.changes, seen.reports, seen.ended) {
                continue;
            }
            // States change without the lock and only then look for waiters: a second look now and then costs
            // little and needs no proof.
            let pause = Duration::from_millis(100);
            let pause = deadline.map_or(pause, |at| pause.min(at.saturating_duration_since(Instant::now())));
            if pause.is_zero() {
                break None;
            }
            outcome = self.changed.wait_timeout(outcome, pause).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        result
    }
}
