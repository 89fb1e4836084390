//! The connections that a worker accepts.
//!
//! When the daemon is asked to end, programs may wait in the backlog of a socket: they have
//! connected, and rely on the daemon. [`close`] refuses later ones, and the worker accepts and
//! serves those before it ends.

use super::Setup;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// The pause after a connection could not be accepted. Until then, sessions may free descriptors.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// Refuses further connections to a socket, and removes its path. The connections in its backlog
/// can still be accepted.
pub(super) fn close(listener: &UnixListener, path: &Path) {
    let _ = std::fs::remove_file(path);
    if let Err(error) = shutdown(listener, Shutdown::Read) {
        tracing::error!("{}: {error}", path.display());
    }
}

/// The sockets on which a worker accepts connections.
#[derive(Debug)]
pub(super) struct Accepting {
    /// The indexes of the sockets that are open, or have connections in their backlogs.
    open: Vec<usize>,
    /// The error of the last attempt.
    error: Option<Errno>,
    /// The end of the pause after that error.
    paused_until: Option<Instant>,
}

impl Accepting {
    pub(super) fn new(setup: &Setup) -> Self {
        Self { open: (0..setup.listeners.len()).collect(), error: None, paused_until: None }
    }

    /// Returns true once all sockets are closed and their connections accepted.
    pub(super) fn is_over(&self) -> bool {
        self.open.is_empty()
    }

    /// Returns the sockets that are to be polled, and their indexes.
    pub(super) fn sockets<'a>(&self, setup: &'a Setup) -> Vec<(usize, &'a UnixListener)> {
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            return Vec::new();
        }
        self.open.iter().map(|index| (*index, &setup.listeners[*index].0)).collect()
    }

    /// Returns the longest time until the next call of [`Accepting::sockets`].
    pub(super) fn timeout(&self, most: Duration) -> Duration {
        if self.error.is_some() { most.min(PAUSE) } else { most }
    }

    /// Accepts a connection to a socket that is readable. Logs an error when it begins.
    pub(super) fn accept(&mut self, index: usize, listener: &UnixListener) -> Option<UnixStream> {
        let errno = match listener.accept() {
            Ok((stream, _)) => {
                (self.error, self.paused_until) = (None, None);
                return Some(stream);
            }
            Err(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
        };
        if errno == Errno::INVAL {
            // The socket is closed, and its backlog empty.
            self.open.retain(|open| *open != index);
            return None;
        }
        if self.error.replace(errno) != Some(errno) {
            tracing::error!("connections cannot be accepted: {errno}. They wait");
        }
        self.paused_until = Some(Instant::now() + PAUSE);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags};
    use std::io::{Read, Write};

    #[test]
    fn a_closed_socket_gives_its_backlog_and_refuses_later_connections() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut accepting = Accepting { open: vec![0], error: None, paused_until: None };
        let mut waiting: Vec<_> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let link = directory.path().join("link");
        std::fs::hard_link(&path, &link).unwrap();
        close(&listener, &path);
        assert!(!path.exists());
        assert_eq!(UnixStream::connect(&link).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        for stream in &mut waiting {
            assert!(!accepting.is_over());
            accepting.accept(0, &listener).unwrap().write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        let mut fds = [PollFd::new(&listener, PollFlags::IN)];
        super::super::poll_for(&mut fds, Duration::ZERO);
        assert!(!fds[0].revents().is_empty(), "a closed socket is readable");
        assert!(accepting.accept(0, &listener).is_none() && accepting.is_over());
    }
}
