//! Waiters: page faults without an answer so far, and calls of the program that wait for pages.
//!
//! A waiter is a page of an address space, since when it is waited for, and until when. One whose
//! page has been installed, removed or moved is found by looking at the page, at its deadline at
//! the latest. A page fault does not say when it gives up: a signal may have taken the thread
//! elsewhere. So at its deadline the pager wakes the page's threads, and the loss policy is carried
//! out only when one of them faults again.

use crate::memory::Space;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The kind of a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// A page fault.
    Fault,
    /// A page fault whose deadline is over, and whose thread was woken: it counts if it faults
    /// again.
    Woken,
    /// A call of the program, as `Region::read_at`.
    Call,
}

/// The place of a waiter: the id of its space, and an address.
pub(super) type Key = (u32, usize);

/// A page that is waited for: see the module.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub(super) space: Arc<Space>,
    pub(super) wait: Wait,
    deadline: Instant,
}

/// All waiters of a session.
#[derive(Debug)]
pub(super) struct Waiters {
    patience: Duration,
    pages: BTreeMap<Key, Waiter>,
    /// The number of those that are [`Wait::Woken`].
    woken: usize,
    /// A lower bound of all deadlines; None: there are no waiters.
    next: Option<Instant>,
}

impl Waiters {
    /// Makes an empty collection whose waiters may wait for `patience` each.
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, pages: BTreeMap::new(), woken: 0, next: None }
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Adds a waiter, unless the page has one.
    pub(super) fn add(&mut self, space: &Arc<Space>, address: usize, wait: Wait, now: Instant) {
        let deadline = now + self.patience;
        let waiter = self.pages.entry((space.id, address));
        let waiter = waiter.or_insert_with(|| Waiter { space: Arc::clone(space), wait, deadline });
        // A call is certain to wait; a fault may have been one of another thread.
        if wait == Wait::Call && waiter.wait != Wait::Call {
            self.woken -= usize::from(waiter.wait == Wait::Woken);
            waiter.wait = Wait::Call;
        }
        self.next = self.next.map(|next| next.min(deadline)).or(Some(deadline));
    }

    /// Returns whether threads of a waiter were woken at their deadline.
    pub(super) fn has_woken(&self) -> bool {
        self.woken > 0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    pub(super) fn get(&self, key: Key) -> Option<&Waiter> {
        self.pages.get(&key)
    }

    /// Returns whether pages that begin at these addresses have waiters.
    pub(super) fn has(&self, space: &Space, addresses: &Range<usize>) -> bool {
        self.pages.range((space.id, addresses.start)..(space.id, addresses.end)).next().is_some()
    }

    /// Returns the waiters of pages that begin at these addresses.
    pub(super) fn at(&self, space: &Space, addresses: &Range<usize>) -> Vec<(usize, Waiter)> {
        let pages = self.pages.range((space.id, addresses.start)..(space.id, addresses.end));
        pages.map(|((_, address), waiter)| (*address, waiter.clone())).collect()
    }

    /// Returns the waiters whose deadline is over.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Key, Waiter)> {
        if self.next.is_none_or(|next| next > now) {
            return Vec::new();
        }
        self.next =
            self.pages.values().map(|waiter| waiter.deadline).filter(|deadline| *deadline > now).min();
        let due = self.pages.iter().filter(|(_, waiter)| waiter.deadline <= now);
        due.map(|(key, waiter)| (*key, waiter.clone())).collect()
    }

    /// Notes that the threads of this page were woken at its deadline.
    pub(super) fn woken(&mut self, key: Key, now: Instant) {
        let Some(waiter) = self.pages.get_mut(&key) else { return };
        self.woken += usize::from(waiter.wait != Wait::Woken);
        (waiter.wait, waiter.deadline) = (Wait::Woken, now + self.patience);
        self.next = self.next.map(|next| next.min(waiter.deadline)).or(Some(waiter.deadline));
    }

    /// Gives a lost waiter that goes on waiting another deadline.
    pub(super) fn again(&mut self, key: Key, from: Instant) {
        let Some(waiter) = self.pages.get_mut(&key) else { return };
        if waiter.wait == Wait::Woken {
            (self.woken, waiter.wait) = (self.woken - 1, Wait::Fault);
        }
        waiter.deadline = from + self.patience;
        self.next = self.next.map(|next| next.min(waiter.deadline)).or(Some(waiter.deadline));
    }

    /// Forgets a waiter.
    pub(super) fn remove(&mut self, key: Key) {
        let removed = self.pages.remove(&key);
        self.woken -= usize::from(removed.is_some_and(|waiter| waiter.wait == Wait::Woken));
    }

    /// Forgets the waiters of pages that begin at these addresses.
    pub(super) fn resolved(&mut self, space: &Space, addresses: &Range<usize>) {
        while let Some((key, _)) =
            self.pages.range((space.id, addresses.start)..(space.id, addresses.end)).next()
        {
            let key = *key;
            self.remove(key);
        }
    }

    /// Keeps the waiters for which `waits` returns true.
    pub(super) fn retain(&mut self, mut waits: impl FnMut(Key, &Waiter) -> bool) {
        self.pages.retain(|key, waiter| waits(*key, waiter));
        self.woken = self.pages.values().filter(|waiter| waiter.wait == Wait::Woken).count();
    }

    /// Extends all deadlines.
    pub(super) fn extend_deadlines(&mut self, by: Duration) {
        self.pages.values_mut().for_each(|waiter| waiter.deadline += by);
        self.next = self.next.map(|next| next + by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::any_space;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn keys(due: Vec<(Key, Waiter)>) -> Vec<Key> {
        due.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn a_fault_keeps_the_deadline_of_the_first_one_on_its_page() {
        let (space, start) = (any_space(3), Instant::now());
        let mut waiters = Waiters::new(PATIENCE);
        waiters.add(&space, 0x1000, Wait::Fault, start);
        waiters.add(&space, 0x1000, Wait::Fault, start + PATIENCE / 2);
        waiters.add(&space, 0x2000, Wait::Fault, start + PATIENCE / 2);
        assert!(waiters.due(start + PATIENCE / 2).is_empty());
        assert_eq!(keys(waiters.due(start + PATIENCE)), [(3, 0x1000)]);
        waiters.remove((3, 0x1000));
        assert!(waiters.due(start + PATIENCE).is_empty());
        assert_eq!(keys(waiters.due(start + PATIENCE * 2)), [(3, 0x2000)]);
    }

    #[test]
    fn a_fault_counts_as_one_that_waits_when_it_comes_back_after_its_deadline() {
        let (space, start) = (any_space(0), Instant::now());
        let mut waiters = Waiters::new(PATIENCE);
        for address in [0x1000, 0x2000] {
            waiters.add(&space, address, Wait::Fault, start);
        }
        assert!(!waiters.has_woken());
        waiters.woken((0, 0x1000), start + PATIENCE);
        assert!(waiters.has_woken() && waiters.get((0, 0x1000)).unwrap().wait == Wait::Woken);
        assert_eq!(waiters.get((0, 0x2000)).unwrap().wait, Wait::Fault);
        waiters.again((0, 0x1000), start + PATIENCE);
        assert!(!waiters.has_woken());
        assert_eq!(keys(waiters.due(start + PATIENCE)), [(0, 0x2000)]);
        // A call waits for sure, whatever was woken before.
        waiters.woken((0, 0x2000), start + PATIENCE);
        waiters.add(&space, 0x2000, Wait::Call, start + PATIENCE);
        assert!(!waiters.has_woken());
    }

    #[test]
    fn waiters_of_resolved_pages_and_late_ticks() {
        let (space, other, start) = (any_space(1), any_space(2), Instant::now());
        let mut waiters = Waiters::new(PATIENCE);
        for page in 0..64 {
            waiters.add(&space, page << 12, Wait::Fault, start);
            waiters.add(&other, page << 12, Wait::Fault, start);
        }
        waiters.woken((1, 0x2000), start);
        waiters.resolved(&space, &(0x1000..0x3f000));
        assert_eq!(waiters.len(), 66);
        assert!(waiters.has(&space, &(0..0x1000)) && !waiters.has(&space, &(0x1000..0x3f000)));
        waiters.extend_deadlines(PATIENCE);
        assert!(waiters.due(start + PATIENCE).is_empty());
        waiters.retain(|key, _| key.0 == 2);
        assert_eq!(waiters.due(start + PATIENCE * 2).len(), 64);
    }
}
