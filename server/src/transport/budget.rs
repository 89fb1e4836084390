//! A budget of bytes, shared by the connections of a server.
//!
//! Each connection may always hold its share. Beyond that, connections draw on a common pool until
//! it is used up. So what all hold is bounded, and one that holds all it can leaves the others
//! their shares.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// Most bytes of one connection, so that a few cannot use up the pool.
const MAX_CONNECTION_BYTES: usize = 32 << 20;

/// The budget of a server.
#[derive(Debug)]
pub(crate) struct Budget {
    pool_bytes: usize,
    share_bytes: usize,
    held_bytes: AtomicUsize,
    /// Notified when bytes are given back while a connection had no room.
    less: Arc<Notify>,
}

/// What one connection holds of the budget.
#[derive(Debug)]
pub(crate) struct Held {
    budget: Arc<Budget>,
    bytes: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(pool_bytes: usize, share_bytes: usize) -> Arc<Self> {
        Arc::new(Self { pool_bytes, share_bytes, held_bytes: AtomicUsize::new(0), less: Arc::default() })
    }

    /// Returns the notification that follows when bytes are given back while a connection had no
    /// room.
    pub(crate) fn less(&self) -> &Arc<Notify> {
        &self.less
    }
}

impl Held {
    pub(crate) fn of(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self { budget: Arc::clone(budget), bytes: AtomicUsize::new(0) })
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Returns true if the connection may hold more.
    pub(crate) fn has_room(&self) -> bool {
        let bytes = self.bytes.load(Ordering::Acquire);
        let pool_has_room = || self.budget.held_bytes.load(Ordering::Acquire) < self.budget.pool_bytes;
        bytes < self.budget.share_bytes || (bytes < MAX_CONNECTION_BYTES && pool_has_room())
    }

    /// Counts bytes, whether there is room or not: the caller looks before.
    pub(crate) fn take(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.budget.held_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(crate) fn give_back(&self, bytes: usize) {
        let had_room = self.has_room();
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        let held = self.budget.held_bytes.fetch_sub(bytes, Ordering::AcqRel);
        if !had_room || held >= self.budget.pool_bytes {
            self.budget.less.notify_waiters();
        }
    }
}
