//! Counts the bytes that a connection has written, so that a stream can hold back less urgent
//! answers.
//!
//! HTTP/2 accepts up to 400 KiB of a stream's answers before the connection has written them. This
//! is hyper's default, which tonic does not let a server change. No later answer can overtake one
//! in that buffer. So a stream with answers of several urgencies compares the bytes that it has
//! given with those that its connection has written.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tonic::transport::server::Connected;

/// The byte count of one connection; requests carry it in their extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    bytes: AtomicU64,
    changed: Notify,
}

impl Written {
    fn add(&self, bytes: usize) {
        self.0.bytes.fetch_add(bytes as u64, Ordering::Release);
        self.0.changed.notify_waiters();
    }

    fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Acquire)
    }

    /// Waits until the count differs from `seen`.
    async fn changed_from(&self, seen: u64) {
        let changed = self.0.changed.notified();
        // `notified` covers the time from its creation, so a change between the two lines is not
        // missed.
        if self.bytes() == seen {
            changed.await;
        }
    }
}

/// A connection that counts what it writes.
#[derive(Debug)]
pub(crate) struct Counted<C> {
    connection: C,
    written: Written,
}

impl<C> Counted<C> {
    pub(crate) fn new(connection: C) -> Self {
        Self { connection, written: Written::default() }
    }

    fn count(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = outcome {
            self.written.add(bytes);
        }
        outcome
    }
}

impl<C> Connected for Counted<C> {
    type ConnectInfo = Written;

    fn connect_info(&self) -> Written {
        self.written.clone()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Counted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(cx, buf)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Counted<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.connection).poll_write(cx, bytes);
        self.count(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.connection).poll_write_vectored(cx, slices);
        self.count(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

/// The bytes that one stream has given to HTTP/2 and its connection has not written.
#[derive(Debug)]
pub(crate) struct Unwritten {
    /// `None` if the transport does not count; there is then always room.
    written: Option<Written>,
    seen: u64,
    /// An upper bound, because other streams of the connection write, too.
    bytes: u64,
}

impl Unwritten {
    /// Makes an empty count for a stream of the connection that `written` counts.
    pub(crate) fn new(written: Option<Written>) -> Self {
        let seen = written.as_ref().map_or(0, Written::bytes);
        Self { written, seen, bytes: 0 }
    }

    /// Counts an answer of this many bytes as given.
    pub(crate) fn give(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// Waits until at most `limit_bytes` are unwritten. The future may be dropped at any time.
    pub(crate) async fn room(&mut self, limit_bytes: u64) {
        let Some(written) = &self.written else { return };
        loop {
            let now = written.bytes();
            self.bytes = self.bytes.saturating_sub(now - self.seen);
            self.seen = now;
            if self.bytes <= limit_bytes {
                return;
            }
            written.changed_from(now).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::poll;
    use std::pin::pin;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn there_is_room_when_the_connection_has_written() {
        let (client, mut server) = tokio::io::duplex(100);
        let mut connection = Counted::new(client);
        let mut unwritten = Unwritten::new(Some(connection.connect_info()));
        unwritten.give(150);
        {
            let mut room = pin!(unwritten.room(20));
            assert!(poll!(room.as_mut()).is_pending());
            assert_eq!(connection.write(&[0; 150]).await.unwrap(), 100, "what the pipe holds");
            assert!(poll!(room.as_mut()).is_pending(), "50 are unwritten");
        }
        server.read_exact(&mut [0; 100]).await.unwrap();
        connection.write_all(&[0; 30]).await.unwrap();
        unwritten.room(20).await;
        connection.write_all(&[0; 60]).await.unwrap();
        unwritten.room(0).await;
        unwritten.give(1);
        assert!(poll!(pin!(unwritten.room(0))).is_pending(), "what others have written is not to its credit");
    }

    #[tokio::test]
    async fn a_transport_that_does_not_count_always_has_room() {
        let mut unwritten = Unwritten::new(None);
        unwritten.give(1 << 30);
        unwritten.room(0).await;
    }
}
