//! A connection of a program, and its handshake.

use super::runtime_dir::SessionName;
use super::worker::Worker;
use super::{inbox, kernel, leftovers, poll_for, runtime_dir};
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// The time that a peer has for its handshake.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);
/// The pause between two reads of a handshake that has arrived in part.
pub(super) const PAUSE: Duration = Duration::from_millis(2);
/// The longest such pause, while no more of the handshake arrives.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// The longest time from when an exiting process closes its descriptors to its end.
const EXIT: Duration = Duration::from_millis(100);

/// A program that has connected.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: Arc<UnixStream>,
    /// The index of the daemon's socket that the program has connected to.
    pub(crate) listener: usize,
    /// The socket's cookie (SO_COOKIE), which is the same for every worker.
    pub(crate) cookie: u64,
    /// The pid of the process that has connected.
    pub(crate) peer: u32,
    /// The start time of that process, if it could be read.
    pub(super) start: Option<u64>,
}

/// Returns the start time of the process of this pid that has connected. A later process with its
/// pid must not be taken for it: the loss policy kills and stops peers by pid and start time.
///
/// # Errors
/// The process has exited.
pub(super) fn start_of_peer(stream: &UnixStream, pid: u32) -> std::io::Result<u64> {
    let pidfd = kernel::peer_pidfd(stream)?;
    let start = runtime_dir::start_of(pid)?;
    // The peer still had its pid when its start time was read.
    if runtime_dir::has_exited(&pidfd) { Err(Errno::SRCH.into()) } else { Ok(start) }
}

impl Connection {
    pub(super) fn new(stream: UnixStream, listener: usize) -> Result<Self> {
        let cookie = rustix::net::sockopt::socket_cookie(&stream).context("its number")?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).context("whose it is")?.pid;
        let peer = peer.as_raw_nonzero().get().cast_unsigned();
        let start = start_of_peer(&stream, peer).ok();
        Ok(Self { stream: Arc::new(stream), listener, cookie, peer, start })
    }

    /// Returns the name of the session of this peer, which is a program of this kind.
    ///
    /// # Errors
    /// The process has exited, or its start time cannot be read.
    pub(super) fn session(&self, kind: &str) -> Result<SessionName> {
        let start = self.start.map_or_else(|| start_of_peer(&self.stream, self.peer), Ok);
        let start = start.context("its start cannot be read")?;
        Ok(SessionName { kind: kind.into(), pid: self.peer, start, cookie: self.cookie })
    }

    /// Returns whether an unread userfaultfd of the peer is in the socket, which receives nothing
    /// after that. Returns false once the peer has hung up.
    pub(super) fn has_sent_userfaultfd(&self) -> bool {
        let has_hung_up = self.has_hung_up();
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
        let peeked = inbox::peek(&self.stream, inbox::MAX_LOOK).unwrap_or_default();
        let is_userfaultfd = |fd: &OwnedFd| leftovers::is_userfaultfd(fd.as_raw_fd());
        !has_hung_up && peeked.fds.iter().any(is_userfaultfd)
    }

    /// Returns whether the peer, which has hung up, has exited. A process closes its descriptors
    /// before it ends, so this waits a moment for the end.
    pub(super) fn has_exited(&self) -> bool {
        let Ok(name) = self.session("peer") else { return true };
        let started = Instant::now();
        while name.is_alive() && started.elapsed() < EXIT {
            std::thread::park_timeout(PAUSE);
        }
        !name.is_alive()
    }

    /// Returns whether the peer has closed the connection or has exited.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        poll_for(&mut fds, Duration::ZERO);
        !fds[0].revents().is_empty()
    }

    /// Waits until `parse` finds a complete message in the received bytes, and returns its result.
    ///
    /// # Errors
    /// The error of `parse`; the peer has hung up, has sent too much, or is silent for too long.
    pub(super) fn wait_for<T>(
        &self,
        worker: &Worker,
        most: usize,
        mut parse: impl FnMut(&mut inbox::Peeked) -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        let (mut had, mut pause) = (0, PAUSE);
        loop {
            let one = worker.looking.lock().unwrap_or_else(PoisonError::into_inner);
            let mut peeked = inbox::peek(&self.stream, most)?;
            if let Some(found) = parse(&mut peeked)? {
                return Ok(found);
            }
            peeked.fds.clear();
            drop(one);
            let bytes = peeked.bytes.len();
            if peeked.ended && self.has_exited() {
                anyhow::bail!("it has exited without a handshake that is still to be served");
            }
            anyhow::ensure!(!peeked.ended, "it has hung up after {bytes} bytes");
            anyhow::ensure!(bytes < most, "its message does not end within {most} bytes");
            anyhow::ensure!(
                started.elapsed() < HANDSHAKE,
                "it has said {bytes} bytes in {HANDSHAKE:?}, and no more"
            );
            if bytes == 0 {
                worker.wait(Some(&self.stream), HANDSHAKE.saturating_sub(started.elapsed()));
                anyhow::ensure!(!worker.is_stopping(), "the daemon ends");
            } else {
                // The socket stays readable while the bytes are in it, so a poll for more would
                // return at once. Many peers that stop within their handshakes must not occupy the
                // cores.
                pause = if bytes > had { PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
                had = bytes;
                poll_for(&mut [PollFd::new(&self.stream, PollFlags::RDHUP)], pause);
            }
        }
    }
}
