//! Counts the bytes of answers, from the moment when a service gives them to HTTP/2 until the
//! connection has written or dropped them.
//!
//! HTTP/2 takes up to 400 KiB of each stream's answers before the client reads any. A client that
//! reads nothing on thousands of streams could so fill the server's memory. [`Metered`] wraps the
//! body of each answer: the bytes that it gives away count until they are dropped, and without room
//! it gives none. The same count lets a stream with answers of several urgencies hold back the less
//! urgent ones, which no later answer could overtake ([`Unsent`]).

use crate::transport::budget::{Held, Wait};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use tokio::sync::Notify;
use tonic::Status;
use tonic::body::Body;

/// Bytes that gRPC adds before each message.
const GRPC_PREFIX_BYTES: usize = 5;

/// The bytes of one stream's answers that the connection has written or dropped.
#[derive(Debug)]
struct Stream {
    connection: Arc<Held>,
    sent: AtomicU64,
    changed: Notify,
}

/// Bytes of an answer, counted until the drop.
struct Piece {
    bytes: Bytes,
    stream: Arc<Stream>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.stream.connection.give_back(self.bytes.len());
        self.stream.sent.fetch_add(self.bytes.len() as u64, Ordering::Release);
        self.stream.changed.notify_waiters();
    }
}

/// The count of one stream, which its request carries in its extensions.
#[derive(Clone, Debug)]
pub(crate) struct StreamUnsent(Arc<Stream>);

impl StreamUnsent {
    pub(crate) fn new(connection: Arc<Held>) -> Self {
        Self(Arc::new(Stream { connection, sent: AtomicU64::new(0), changed: Notify::new() }))
    }

    /// Wraps the body of the stream's answer. `guard` lives as long as the body.
    pub(crate) fn meter<G: Unpin>(self, body: Body, guard: G) -> Metered<G> {
        Metered { body, stream: self.0, waiting: None, _guard: guard }
    }
}

/// The body of an answer, whose bytes count until the connection has written them.
#[derive(Debug)]
pub(crate) struct Metered<G> {
    body: Body,
    stream: Arc<Stream>,
    /// Waits for room.
    waiting: Option<Wait>,
    _guard: G,
}

impl<G> Metered<G> {
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.stream.connection.has_room() {
                self.waiting = None;
                return Poll::Ready(());
            }
            let is_new = self.waiting.is_none();
            let waiting = self.waiting.get_or_insert_with(|| self.stream.connection.wait());
            // It covers the time from its creation. Bytes that were written before that are seen by
            // another look at the counts.
            if !is_new {
                ready!(Pin::new(waiting).poll(cx));
                self.waiting = None;
            }
        }
    }
}

impl<G: Unpin> HttpBody for Metered<G> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        ready!(self.poll_room(cx));
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let stream = &self.stream;
        let metered = |bytes: Bytes| {
            stream.connection.take(bytes.len());
            Bytes::from_owner(Piece { bytes, stream: Arc::clone(stream) })
        };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(metered))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The bytes that one stream has given to HTTP/2 and its connection has not written, counted by the
/// stream's service.
#[derive(Debug)]
pub(crate) struct Unsent {
    /// `None` for a request without a connection, in a test; there is then always room.
    stream: Option<StreamUnsent>,
    given: u64,
}

impl Unsent {
    /// Makes an empty count.
    pub(crate) fn new(stream: Option<StreamUnsent>) -> Self {
        Self { stream, given: 0 }
    }

    /// Counts a message of this many bytes as given.
    pub(crate) fn give(&mut self, message_bytes: usize) {
        self.given += (GRPC_PREFIX_BYTES + message_bytes) as u64;
    }

    /// Waits until at most `limit_bytes` are unwritten. The future may be dropped at any time.
    pub(crate) async fn room(&self, limit_bytes: u64) {
        let Some(StreamUnsent(stream)) = &self.stream else { return };
        loop {
            let mut changed = pin!(stream.changed.notified());
            changed.as_mut().enable();
            if self.given.saturating_sub(stream.sent.load(Ordering::Acquire)) <= limit_bytes {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::budget::Budget;
    use futures_util::{poll, stream};
    use http_body_util::{BodyExt, StreamBody};

    /// Returns a body of endless pieces of `bytes` bytes.
    fn endless(connection: &Arc<Held>, bytes: usize) -> (StreamUnsent, Metered<()>) {
        let frames = stream::repeat_with(move || Ok::<_, Status>(Frame::data(Bytes::from(vec![7; bytes]))));
        let stream = StreamUnsent::new(Arc::clone(connection));
        (stream.clone(), stream.meter(Body::new(StreamBody::new(frames)), ()))
    }

    async fn next(body: &mut Metered<()>) -> Option<Bytes> {
        match poll!(pin!(body.frame())) {
            Poll::Ready(frame) => Some(frame.unwrap().unwrap().into_data().unwrap()),
            Poll::Pending => None,
        }
    }

    /// A task that waits for the next piece of a body.
    struct Waiting(tokio::task::JoinHandle<()>);

    fn wait_for_next(mut body: Metered<()>) -> Waiting {
        Waiting(tokio::spawn(async move { drop(body.frame().await.unwrap().unwrap()) }))
    }

    impl Waiting {
        /// Lets the task run, and returns true if it has ended.
        async fn is_finished(&mut self) -> bool {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            self.0.is_finished()
        }
    }

    #[tokio::test]
    async fn without_room_a_connection_has_its_share_and_no_more() {
        let budget = Budget::new(100, 20);
        let connections = [(); 3].map(|()| Held::of(&budget));
        let mut held = Vec::new();
        let mut bodies = connections.each_ref().map(|connection| endless(connection, 10).1);
        for body in &mut bodies[..2] {
            while let Some(bytes) = next(body).await {
                held.push(bytes);
            }
        }
        assert_eq!(held.len(), 10, "two connections have half of the pool each");
        let [mut first, _, mut third] = bodies;
        let others = [next(&mut third).await, next(&mut third).await].map(Option::unwrap);
        assert!(next(&mut third).await.is_none(), "its share is used up");
        let mut waiting = wait_for_next(third);
        assert!(!waiting.is_finished().await);
        drop(others);
        assert!(waiting.is_finished().await, "it has its share again");
        assert!(next(&mut first).await.is_none());
        let mut waiting = wait_for_next(first);
        assert!(!waiting.is_finished().await);
        drop(held.drain(..2));
        assert!(waiting.is_finished().await, "it holds less than half of the pool, which has room");
    }

    #[tokio::test]
    async fn a_stream_has_room_when_its_own_bytes_are_written() {
        let connection = Held::of(&Budget::new(1 << 20, 0));
        let (stream, mut body) = endless(&connection, 105);
        let mut unsent = Unsent::new(Some(stream));
        unsent.give(100);
        unsent.give(100);
        let (first, second) = (next(&mut body).await, next(&mut body).await);
        let (_, mut other) = endless(&connection, 1000);
        drop(next(&mut other).await);
        {
            let mut room = pin!(unsent.room(110));
            assert!(poll!(room.as_mut()).is_pending(), "another stream's bytes were written");
            drop(first);
            room.await;
        }
        assert!(poll!(pin!(unsent.room(104))).is_pending());
        drop(second);
        unsent.room(0).await;
    }

    #[tokio::test]
    async fn without_a_connection_there_is_always_room() {
        let mut unsent = Unsent::new(None);
        unsent.give(1 << 30);
        unsent.room(0).await;
    }
}
