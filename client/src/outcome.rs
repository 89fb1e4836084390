//! The outcome of a session: its failures, and the end of its pager. Threads wait here for either,
//! and for page states to change.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Held for reading and writing it alone.
    so_far: Mutex<SoFar>,
    /// Signalled when page states or `so_far` have changed.
    changed: Condvar,
    /// Threads that wait for `changed` because of page states.
    waiters: AtomicU64,
    /// Signalled when `so_far` has changed.
    reported: Condvar,
    /// Notified when the pager has ended; for the task that sends the recording.
    pub(crate) ended: Notify,
}

/// Failures that are kept besides the first one; of more the oldest are dropped.
const KEPT: usize = 256;

/// Something that a session could not do.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// 0 for the session's first failure, 1 for the next one.
    pub number: u64,
    /// The operation that failed.
    pub kind: FailureKind,
    /// The reason, as a sentence that names the server, the image or the address.
    pub reason: Arc<str>,
    /// The time at which the session found it.
    pub since: SystemTime,
    /// Its end and the time of that; None while page faults or the fill still wait for it.
    pub end: Option<(FailureEnd, SystemTime)>,
}

/// An operation of a session that can fail.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// A chunk that page faults wait for did not come in time, or was wrong.
    Chunk {
        /// Its number in the image.
        chunk: u64,
    },
    /// The same for a segment of the image's manifest.
    Segment {
        /// Its number in the image.
        segment: u32,
    },
    /// A page could not be installed.
    Page {
        /// The page's first address.
        address: usize,
    },
    /// The background fill does not get further.
    Fill,
    /// Nothing is recorded.
    Recording,
    /// The session cannot go on.
    Session,
}

/// The end of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureEnd {
    /// The missing pages arrived after all, or no page fault waits for them any more.
    Recovered,
    /// The pages are poisoned.
    Poisoned,
    /// The processes that waited were killed.
    Killed,
    /// The processes that waited were stopped.
    Paused,
    /// A failure without waiters: it ended when it was reported.
    Reported,
}

/// The failures of a session: [`crate::Session::failures`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Failures {
    /// Their number so far.
    pub count: u64,
    /// The number of those that go on: page faults or the fill wait.
    pub open: usize,
    /// The first one.
    pub first: Option<Failure>,
    /// The latest one.
    pub last: Option<Failure>,
}

#[derive(Debug, Default)]
struct SoFar {
    first: Option<Failure>,
    /// The newest ones, in order, the first one among them.
    newest: VecDeque<Failure>,
    /// Failures, and ends of failures.
    reports: u64,
    count: u64,
    /// The same; a failure that goes on counts each time that it is reported.
    losses: u64,
    open: usize,
    ended: bool,
    /// The number of changes of page states while a thread waited for one.
    changes: u64,
}

/// A copy of the parts that [`Outcome::wait`] gives to its condition.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The newest failure that page faults wait because of.
    pub(crate) open: Option<Arc<str>>,
    pub(crate) losses: u64,
    pub(crate) ended: bool,
    reports: u64,
    changes: u64,
}

impl SoFar {
    fn seen(&self) -> Seen {
        let open = self.newest.iter().rev().find(|failure| failure.end.is_none());
        Seen {
            open: open.map(|failure| Arc::clone(&failure.reason)),
            losses: self.losses,
            ended: self.ended,
            reports: self.reports,
            changes: self.changes,
        }
    }
}

impl Outcome {
    fn so_far(&self) -> MutexGuard<'_, SoFar> {
        self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the threads that wait for page states.
    pub(crate) fn pages_changed(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.so_far().changes += 1;
            self.changed.notify_all();
        }
    }

    /// Reports that the session cannot go on.
    pub(crate) fn report(&self, reason: &str) {
        self.add(FailureKind::Session, reason, Some(FailureEnd::Reported));
    }

    /// Reports a failure, and how it has ended; None: it goes on. One of this kind that goes on is
    /// not reported again, and ends now if it has an end.
    pub(crate) fn add(&self, kind: FailureKind, reason: &str, end: Option<FailureEnd>) {
        let mut so_far = self.so_far();
        let so_far = &mut *so_far;
        let now = SystemTime::now();
        so_far.losses += 1;
        so_far.reports += 1;
        self.reported.notify_all();
        self.changed.notify_all();
        let goes_on = so_far.newest.iter_mut().rev().find(|other| other.kind == kind && other.end.is_none());
        if let Some(failure) = goes_on {
            let Some(end) = end else { return };
            failure.end = Some((end, now));
            let (number, end) = (failure.number, failure.end);
            if let Some(first) = so_far.first.as_mut().filter(|first| first.number == number) {
                first.end = end;
            }
            so_far.open -= 1;
        } else {
            let end = end.map(|end| (end, now));
            so_far.open += usize::from(end.is_none());
            let failure = Failure { number: so_far.count, kind, reason: reason.into(), since: now, end };
            so_far.first.get_or_insert_with(|| failure.clone());
            so_far.newest.push_back(failure);
            so_far.count += 1;
            if so_far.newest.len() > KEPT
                && let Some(dropped) = so_far.newest.pop_front()
            {
                so_far.open -= usize::from(dropped.end.is_none());
            }
        }
    }

    /// Returns whether a reason is reported for which the session cannot go on.
    pub(crate) fn has_session_failed(&self) -> bool {
        self.so_far().newest.iter().any(|failure| failure.kind == FailureKind::Session)
    }

    /// Returns whether failures go on.
    pub(crate) fn has_open(&self) -> bool {
        self.so_far().open > 0
    }

    /// Returns the kinds of the failures that go on.
    pub(crate) fn open(&self) -> Vec<FailureKind> {
        let so_far = self.so_far();
        if so_far.open == 0 {
            return Vec::new();
        }
        so_far
            .newest
            .iter()
            .filter(|failure| failure.end.is_none())
            .map(|failure| failure.kind.clone())
            .collect()
    }

    /// Ends a failure of this kind that goes on.
    pub(crate) fn recovered(&self, kind: &FailureKind) {
        let mut so_far = self.so_far();
        let so_far = &mut *so_far;
        let goes_on = so_far.newest.iter_mut().find(|other| other.kind == *kind && other.end.is_none());
        let Some(failure) = goes_on else { return };
        failure.end = Some((FailureEnd::Recovered, SystemTime::now()));
        let (number, end) = (failure.number, failure.end);
        if let Some(first) = so_far.first.as_mut().filter(|first| first.number == number) {
            first.end = end;
        }
        so_far.open -= 1;
        so_far.reports += 1;
        self.reported.notify_all();
        self.changed.notify_all();
    }

    /// Returns a summary of the failures.
    pub(crate) fn failures(&self) -> Failures {
        let so_far = self.so_far();
        let last = so_far.newest.back().cloned();
        Failures { count: so_far.count, open: so_far.open, first: so_far.first.clone(), last }
    }

    /// Returns the kept failures from a number on.
    pub(crate) fn failures_from(&self, number: u64) -> Vec<Failure> {
        self.so_far().newest.iter().filter(|failure| failure.number >= number).cloned().collect()
    }

    /// Notes that the pager has ended.
    pub(crate) fn end(&self) {
        self.so_far().ended = true;
        self.reported.notify_all();
        self.changed.notify_all();
        self.ended.notify_one();
    }

    /// Returns how often pages were lost; failures that go on count again.
    pub(crate) fn losses(&self) -> u64 {
        self.so_far().losses
    }

    /// Returns the reason of the latest failure.
    pub(crate) fn last(&self) -> Option<Arc<str>> {
        self.so_far().newest.back().map(|failure| Arc::clone(&failure.reason))
    }

    /// Waits until the pager has ended, for at most `timeout`.
    pub(crate) fn wait_end(&self, timeout: Duration) {
        let _ = self.reported.wait_timeout_while(self.so_far(), timeout, |so_far| !so_far.ended);
    }

    /// Waits for a failure or the pager's end, at most for `timeout`. Returns the first failure's
    /// reason.
    pub(crate) fn wait_error(&self, timeout: Duration) -> Option<Arc<str>> {
        let none = |so_far: &mut SoFar| so_far.first.is_none() && !so_far.ended;
        let waited = self.reported.wait_timeout_while(self.so_far(), timeout, none);
        let so_far = waited.unwrap_or_else(PoisonError::into_inner).0;
        so_far.first.as_ref().map(|failure| Arc::clone(&failure.reason))
    }

    /// Wakes the waiting threads: the recording was sent, or its thread has given up.
    pub(crate) fn recording_has_changed(&self) {
        self.so_far().changes += 1;
        self.changed.notify_all();
    }

    /// Returns whether the pager has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.so_far().ended
    }

    /// Returns the reason of the first failure.
    pub(crate) fn error(&self) -> Option<Arc<str>> {
        self.so_far().first.as_ref().map(|failure| Arc::clone(&failure.reason))
    }

    /// Waits until `done` returns a value, at most until `deadline`.
    pub(crate) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&Seen) -> Option<T>,
    ) -> Option<T> {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let mut outcome = self.so_far();
        let result = loop {
            // Without the lock: the condition may take long, and the pager must not wait for it.
            let seen = outcome.seen();
            drop(outcome);
            if let Some(result) = done(&seen) {
                break Some(result);
            }
            outcome = self.so_far();
            if (outcome.changes, outcome.reports, outcome.ended) != (seen.changes, seen.reports, seen.ended) {
                continue;
            }
            // Page states change without the lock, and only then the pager looks for waiters. A
            // second look now and then costs little and needs no proof.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_that_goes_on_is_one_and_each_outage_is_another() {
        let outcome = Outcome::default();
        let chunk = FailureKind::Chunk { chunk: 7 };
        for reason in ["first", "the same"] {
            outcome.add(chunk.clone(), reason, None);
        }
        assert_eq!((outcome.failures().count, outcome.failures().open), (1, 1));
        outcome.recovered(&chunk);
        outcome.recovered(&chunk);
        outcome.add(chunk.clone(), "second", None);
        outcome.add(chunk.clone(), "second", Some(FailureEnd::Poisoned));
        let Failures { count, open, first, last } = outcome.failures();
        let (first, last) = (first.unwrap(), last.unwrap());
        assert_eq!((count, open), (2, 0));
        assert_eq!((&*first.reason, first.end.unwrap().0), ("first", FailureEnd::Recovered));
        assert_eq!((&*last.reason, last.end.unwrap().0), ("second", FailureEnd::Poisoned));
        assert_eq!(outcome.failures_from(1).len(), 1);
    }

    #[test]
    fn what_is_kept_of_failures_is_bounded() {
        let outcome = Outcome::default();
        for chunk in 0..3 * KEPT as u64 {
            outcome.add(FailureKind::Chunk { chunk }, &format!("chunk {chunk}"), None);
        }
        let failures = outcome.failures();
        assert_eq!((failures.count, failures.open), (3 * KEPT as u64, KEPT));
        assert_eq!(&*failures.first.unwrap().reason, "chunk 0");
        assert_eq!(outcome.failures_from(0).first().unwrap().number, 2 * KEPT as u64);
    }
}
