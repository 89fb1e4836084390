//! A userfaultfd in a tokio runtime.

use super::Uffd;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

/// A userfaultfd that the current tokio runtime watches for messages.
#[derive(Debug)]
pub struct AsyncUffd(AsyncFd<Arc<Uffd>>);

impl AsyncUffd {
    /// Registers the descriptor with the current runtime, until the value is dropped.
    ///
    /// # Errors
    /// The error of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside of a runtime, or in a runtime without I/O.
    pub fn new(uffd: Arc<Uffd>) -> io::Result<Self> {
        // SAFETY: the Arc keeps the one fd open for as long as the AsyncFd lives.
        let watched = unsafe { AsyncFd::register_with_interest(uffd, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// Returns ready if messages may be unread. Otherwise the runtime wakes the task when a message
    /// arrives.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<Readable<'_>>> {
        self.0.poll_read_ready(context).map(|ready| Ok(Readable(ready?)))
    }
}

/// A sign that messages may be unread. If it is dropped without [`Readable::drained`],
/// [`AsyncUffd::poll_readable`] stays ready.
#[derive(Debug)]
pub struct Readable<'a>(AsyncFdReadyGuard<'a, Arc<Uffd>>);

impl Readable<'_> {
    /// Declares all messages read. Call it before the last read, so that no message between the two
    /// is overlooked.
    pub fn drained(mut self) {
        self.0.clear_ready();
    }
}
