//! The connections that have sent no handshake yet.
//!
//! Each of them takes a descriptor and a thread until the time for its handshake is over. Programs
//! send theirs as soon as they have connected. So beyond a bound the daemon closes the oldest of
//! these connections, and other programs are still served.

use super::connection::Connection;
use super::poll_for;
use rustix::event::{PollFd, PollFlags};
use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError, Weak};
use std::time::Duration;

/// The most connections without a handshake. A host restores fewer programs within the same moment.
pub(super) const MOST: usize = 512;

/// The connections without a handshake, oldest first. Locked to add, remove or close one of them.
#[derive(Debug, Default)]
pub(super) struct Silent(Mutex<VecDeque<Weak<UnixStream>>>);

impl Silent {
    /// Adds a connection. If there are too many, closes the oldest one that has sent nothing, or
    /// else the oldest one. Returns whether it has closed a connection.
    pub(super) fn add(&self, connection: &Connection) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push_back(std::sync::Arc::downgrade(&connection.stream));
        if all.len() <= MOST {
            return false;
        }
        all.retain(|stream| stream.strong_count() > 0);
        let is_silent =
            |stream: &Weak<UnixStream>| stream.upgrade().is_some_and(|stream| !is_readable(&stream));
        if all.len() <= MOST {
            return false;
        }
        let oldest = all.iter().position(is_silent).unwrap_or(0);
        // The thread that waits for the handshake wakes, and ends.
        let closed = all.remove(oldest).and_then(|stream| stream.upgrade()?.shutdown(Shutdown::Both).ok());
        closed.is_some()
    }

    /// Removes a connection that has sent its handshake.
    pub(super) fn remove(&self, connection: &Connection) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|stream| stream.as_ptr() != std::sync::Arc::as_ptr(&connection.stream));
    }
}

fn is_readable(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    poll_for(&mut fds, Duration::ZERO);
    !fds[0].revents().is_empty()
}
