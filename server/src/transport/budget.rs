//! A budget of bytes, shared by the connections of a server.
//!
//! Each connection may always hold its share. Beyond that, connections draw on a common pool until
//! it is used up. So what all hold is bounded, and one that holds all it can leaves the others
//! their shares.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// The budget of a server.
#[derive(Debug)]
pub(crate) struct Budget {
    pool_bytes: usize,
    share_bytes: usize,
    held_bytes: AtomicUsize,
    /// Notified when the pool has room again.
    has_room: Arc<Notify>,
}

/// The bytes of the budget that one connection holds.
#[derive(Debug)]
pub(crate) struct Held {
    budget: Arc<Budget>,
    bytes: AtomicUsize,
    /// Number of times that bytes were given back.
    given_back: AtomicU64,
    /// Notified when the connection holds less than its share, or than half of the pool, again.
    has_room: Arc<Notify>,
}

impl Budget {
    pub(crate) fn new(pool_bytes: usize, share_bytes: usize) -> Arc<Self> {
        Arc::new(Self { pool_bytes, share_bytes, held_bytes: AtomicUsize::new(0), has_room: Arc::default() })
    }

    /// Most bytes of one connection, so that a few cannot use up the pool.
    fn connection_bytes(&self) -> usize {
        self.pool_bytes / 2
    }
}

impl Held {
    pub(crate) fn of(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            budget: Arc::clone(budget),
            bytes: AtomicUsize::new(0),
            given_back: AtomicU64::new(0),
            has_room: Arc::default(),
        })
    }

    /// Returns true if the connection may hold more.
    pub(crate) fn has_room(&self) -> bool {
        let bytes = self.bytes.load(Ordering::SeqCst);
        let pool_has_room = || self.budget.held_bytes.load(Ordering::SeqCst) < self.budget.pool_bytes;
        bytes < self.budget.share_bytes || (bytes < self.budget.connection_bytes() && pool_has_room())
    }

    /// Returns true if the connection holds nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::SeqCst) == 0
    }

    /// Returns the number of times that bytes were given back. It stands still while a peer that
    /// holds bytes reads nothing.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    /// Returns a wait for room. Its owner must look again after making it.
    pub(crate) fn wait(&self) -> Wait {
        Wait(
            [&self.has_room, &self.budget.has_room]
                .map(|notify| Box::pin(Arc::clone(notify).notified_owned())),
        )
    }

    /// Counts bytes, whether there is room or not: the caller looks before.
    pub(crate) fn take(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        self.budget.held_bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    /// Gives bytes back. Wakes waits only when a bound is crossed, so that each answer of a busy
    /// server does not wake all connections.
    pub(crate) fn give_back(&self, bytes: usize) {
        let crosses = |before: usize, bound: usize| before >= bound && before - bytes < bound;
        let of_connection = self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        let of_all = self.budget.held_bytes.fetch_sub(bytes, Ordering::SeqCst);
        self.given_back.fetch_add(1, Ordering::Relaxed);
        let bounds = [self.budget.share_bytes, self.budget.connection_bytes()];
        if bounds.into_iter().any(|bound| crosses(of_connection, bound)) {
            self.has_room.notify_waiters();
        }
        if crosses(of_all, self.budget.pool_bytes) {
            self.budget.has_room.notify_waiters();
        }
    }
}

/// A wait for room of the connection or of the pool. Covers the time from its making.
#[derive(Debug)]
pub(crate) struct Wait([Pin<Box<OwnedNotified>>; 2]);

impl Future for Wait {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Both are polled, so that both wake.
        let ready = self.0.each_mut().map(|notified| notified.as_mut().poll(cx).is_ready());
        if ready.contains(&true) { Poll::Ready(()) } else { Poll::Pending }
    }
}
