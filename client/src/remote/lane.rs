//! The lanes that deliver pages: each is one bidirectional stream, on a connection of its own.

use crate::remote::{Purpose, RemoteError, ServerAddress, page_client};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, chunk_answer};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

/// The most requests that wait in a lane's queue to be sent.
const QUEUE: usize = 64;

/// The demand lane: requests for chunks and segments that faults wait for, and for read-ahead.
pub(crate) type DemandLane = Lane<v1::FetchChunksRequest, v1::FetchChunksResponse>;

/// The bulk lane: runs of chunks that no fault waits for.
pub(crate) type BulkLane = Lane<v1::StreamChunksRequest, v1::StreamChunksResponse>;

/// A stream of requests and one of answers. The client sends requests without waiting for the
/// server to accept the stream: some servers send the headers of their answer with the first
/// message only.
#[derive(Debug)]
pub(crate) struct Lane<Q, A> {
    pub(crate) requests: mpsc::Sender<Q>,
    answers: Answers<A>,
    address: ServerAddress,
    /// The lane, in words.
    what: String,
}

#[derive(Debug)]
enum Answers<A> {
    /// The server has sent nothing yet. Dropping this ends the task.
    Opening(JoinSet<Result<Response<Streaming<A>>, Status>>),
    Open(Box<Streaming<A>>),
}

impl<Q, A: Send + 'static> Lane<Q, A> {
    /// Returns the next answer, or `None` at the end of the stream. Cancel safe.
    ///
    /// # Errors
    /// [`RemoteError::Status`] if the server refused or ended the stream, or the connection is
    /// lost.
    pub(crate) async fn answer(&mut self) -> Result<Option<A>, RemoteError> {
        if let Answers::Opening(task) = &mut self.answers {
            // `None` after the server has refused the stream.
            let Some(opened) = task.join_next().await else { return Ok(None) };
            let opened = opened.expect("opening a stream does not panic");
            let stream = opened.map_err(self.address.status(&self.what))?.into_inner();
            self.answers = Answers::Open(Box::new(stream));
        }
        let Answers::Open(stream) = &mut self.answers else { unreachable!("it was opened") };
        stream.message().await.map_err(self.address.status(&self.what))
    }
}

impl DemandLane {
    /// Connects and binds the stream to `image`, in the current runtime.
    ///
    /// # Errors
    /// [`RemoteError`] if the client cannot reach the server.
    pub(crate) async fn open(address: &ServerAddress, image: &Digest) -> Result<Self, RemoteError> {
        Ok(Self::over(address.connect(Purpose::Demand).await?, address, image))
    }

    /// Opens the lane over an existing connection.
    pub(crate) fn over(channel: Channel, address: &ServerAddress, image: &Digest) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let bind = v1::FetchChunksRequest { image: (*image).into(), ..Default::default() };
        requests.try_send(bind).expect("the queue is new");
        let mut pages = page_client(channel);
        let mut task = JoinSet::new();
        task.spawn(async move { pages.fetch_chunks(ReceiverStream::new(queue)).await });
        let what = format!("the demand lane of {image}");
        Self { requests, answers: Answers::Opening(task), address: address.clone(), what }
    }
}

impl BulkLane {
    /// Connects and binds the stream to `image`, in the current runtime.
    ///
    /// # Errors
    /// The same as those of [`DemandLane::open`].
    pub(crate) async fn open(address: &ServerAddress, image: &Digest) -> Result<Self, RemoteError> {
        Ok(Self::over(address.connect(Purpose::Bulk).await?, address, image, None))
    }

    /// Opens the lane over an existing connection. Sends the first request, if there is one.
    pub(crate) fn over(
        channel: Channel,
        address: &ServerAddress,
        image: &Digest,
        first: Option<v1::StreamChunksRequest>,
    ) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let bind = v1::StreamChunksRequest { image: (*image).into(), ..Default::default() };
        for request in std::iter::once(bind).chain(first) {
            requests.try_send(request).expect("the queue is new");
        }
        let mut pages = page_client(channel);
        let mut task = JoinSet::new();
        task.spawn(async move { pages.stream_chunks(ReceiverStream::new(queue)).await });
        let what = format!("the bulk lane of {image}");
        Self { requests, answers: Answers::Opening(task), address: address.clone(), what }
    }
}

/// The reason for an answer to hold no frame.
#[derive(Debug)]
pub(crate) struct NoFrame {
    pub(crate) reason: String,
    /// True for a server's error that another request may not meet.
    pub(crate) may_pass: bool,
}

/// Returns the frame in the answer for a chunk whose digest the manifest says is `digest`.
///
/// # Errors
/// [`NoFrame`]: the server's error, or an invalid answer.
pub(crate) fn frame_of<'a>(answer: &'a v1::ChunkAnswer, digest: &Digest) -> Result<&'a Bytes, NoFrame> {
    let wrong = |reason| Err(NoFrame { reason, may_pass: false });
    match &answer.result {
        Some(chunk_answer::Result::Frame(frame)) => Ok(frame),
        Some(chunk_answer::Result::Zero(_)) => {
            wrong(format!("the server says it is zero, the manifest that it is {digest}"))
        }
        Some(chunk_answer::Result::Error(error)) => {
            Err(NoFrame { reason: error.message.clone(), may_pass: may_pass(error) })
        }
        None => wrong("the answer is empty".to_owned()),
    }
}

/// Returns true if another request may succeed, although the server has searched for the data.
pub(crate) fn may_pass(error: &v1::Error) -> bool {
    !matches!(error.code(), v1::ErrorCode::OutOfRange | v1::ErrorCode::NotFound | v1::ErrorCode::DataLoss)
}

/// Joins ascending chunk numbers into runs.
pub(crate) fn runs_of(chunks: impl IntoIterator<Item = u64>) -> Vec<v1::ChunkRun> {
    let mut runs: Vec<v1::ChunkRun> = Vec::new();
    for chunk in chunks {
        match runs.last_mut() {
            Some(run) if run.first + u64::from(run.count) == chunk => run.count += 1,
            _ => runs.push(v1::ChunkRun { first: chunk, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_runs() {
        let run = |first, count| v1::ChunkRun { first, count };
        assert_eq!(runs_of([3, 4, 5, 9, 8]), [run(3, 3), run(9, 1), run(8, 1)]);
    }
}
