//! The lanes that deliver pages: each is one bidirectional stream, on a connection of its own.

use crate::remote::{Lane, RemoteError, ServerAddress, page_client, within};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, chunk_answer};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// The most requests that wait in a lane's queue to be sent.
const QUEUE: usize = 64;

/// The demand lane: requests for chunks and segments that faults wait for, and for read-ahead.
#[derive(Debug)]
pub(crate) struct DemandLane {
    pub(crate) requests: mpsc::Sender<v1::FetchChunksRequest>,
    answers: DemandAnswers,
}

type DemandStream = tonic::Streaming<v1::FetchChunksResponse>;

#[derive(Debug)]
enum DemandAnswers {
    /// The server has not accepted the stream yet. Dropping this ends the task.
    Opening(JoinSet<Result<DemandStream, RemoteError>>),
    Open(Box<DemandStream>),
}

impl DemandLane {
    /// Connects and binds the stream to `image`, in the current runtime. Returns once the server
    /// has accepted the stream.
    ///
    /// # Errors
    /// [`RemoteError`] if the client cannot reach the server or the server does not have the image.
    pub(crate) async fn open(address: &ServerAddress, image: &Digest) -> Result<Self, RemoteError> {
        let mut lane = Self::over(address.connect(Lane::Demand).await?, address, image);
        lane.opened().await?;
        Ok(lane)
    }

    /// Opens the lane over an existing connection, without waiting for the server: the caller can
    /// send requests at once.
    pub(crate) fn over(channel: Channel, address: &ServerAddress, image: &Digest) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let bind = v1::FetchChunksRequest { image: (*image).into(), ..Default::default() };
        requests.try_send(bind).expect("the queue is new");
        let (mut pages, address, image) = (page_client(channel), address.clone(), *image);
        let opening = async move {
            let answers =
                within(&address, "demand lane", pages.fetch_chunks(ReceiverStream::new(queue))).await?;
            let answers = answers.map_err(address.status(format!("the demand lane of {image}")))?;
            Ok(answers.into_inner())
        };
        let mut task = JoinSet::new();
        task.spawn(opening);
        Self { requests, answers: DemandAnswers::Opening(task) }
    }

    /// Waits until the server has accepted the stream.
    async fn opened(&mut self) -> Result<(), RemoteError> {
        if let DemandAnswers::Opening(task) = &mut self.answers
            && let Some(Ok(opened)) = task.join_next().await
        {
            self.answers = DemandAnswers::Open(Box::new(opened?));
        }
        Ok(())
    }

    /// Returns the next answer, or `None` if the lane is lost. Cancel safe.
    pub(crate) async fn answer(&mut self) -> Option<v1::FetchChunksResponse> {
        self.opened().await.ok()?;
        match &mut self.answers {
            DemandAnswers::Open(stream) => stream.message().await.ok()?,
            // The server refused the stream before.
            DemandAnswers::Opening(_) => None,
        }
    }
}

/// The bulk lane: runs of chunks that no fault waits for.
#[derive(Debug)]
pub(crate) struct BulkLane {
    pub(crate) requests: mpsc::Sender<v1::StreamChunksRequest>,
    pub(crate) answers: tonic::Streaming<v1::StreamChunksResponse>,
}

impl BulkLane {
    /// Connects and binds the stream to `image`, in the current runtime.
    ///
    /// # Errors
    /// The same as those of [`DemandLane::open`].
    pub(crate) async fn open(address: &ServerAddress, image: &Digest) -> Result<Self, RemoteError> {
        Self::over(address.connect(Lane::Bulk).await?, address, image, None).await
    }

    /// Opens the lane over an existing connection. Sends the first request, if there is one,
    /// without waiting for the server to accept the stream.
    ///
    /// # Errors
    /// The same as those of [`DemandLane::open`].
    pub(crate) async fn over(
        channel: Channel,
        address: &ServerAddress,
        image: &Digest,
        first: Option<v1::StreamChunksRequest>,
    ) -> Result<Self, RemoteError> {
        let (requests, queue) = mpsc::channel(QUEUE);
        let bind = v1::StreamChunksRequest { image: (*image).into(), ..Default::default() };
        for request in std::iter::once(bind).chain(first) {
            requests.try_send(request).expect("the queue is new");
        }
        let mut pages = page_client(channel);
        let answers = within(address, "bulk lane", pages.stream_chunks(ReceiverStream::new(queue))).await?;
        let answers = answers.map_err(address.status(format!("the bulk lane of {image}")))?.into_inner();
        Ok(Self { requests, answers })
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
