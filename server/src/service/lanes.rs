//! The two lanes of a session: demand, where every microsecond counts, and bulk, where bytes do.
//!
//! Both read requests and give answers in one task. On the demand lane a frame that is in memory is answered at
//! once, with no thread or channel between; one that is not is loaded beside, so that a fault on a cold
//! page does not hold up those on warm ones.

use crate::service::blocking;
use crate::service::chunks::{Chunks, check_runs, numbers};
use crate::shutdown::{InFlight, shutting_down};
use crate::store::{Store, chain, map};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, chunk_answer, fetch_chunks_response};
use postcopy_proto::{MAX_BULK_CHUNKS, MAX_DEMAND_CHUNKS};
use std::future::Future;
use std::iter::Peekable;
use std::pin::{Pin, pin};
use std::sync::Arc;
use tonic::{Status, Streaming};

/// Loads of one demand stream that wait for the disk at a time.
const MAX_LOADING: usize = 32;

/// A bulk message is sent when the next answer would make it longer than this.
const BULK_MESSAGE_BYTES: usize = 256 << 10;

/// What an answer takes in a bulk message besides its frame, at most: tags, lengths, the chunk's number.
const ANSWER_OVERHEAD_BYTES: usize = 32;

/// The next request; None when the client has said its last, or everything that was received before the server
/// began to end has been given out.
async fn next_request<T>(
    requests: &mut Streaming<T>,
    ending: Pin<&mut impl Future<Output = ()>>,
) -> Result<Option<T>, Status> {
    tokio::select! {
        biased;
        request = requests.message() => request,
        () = ending => Err(shutting_down()),
    }
}

type Loading = Pin<Box<dyn Future<Output = Result<fetch_chunks_response::Answer, Status>> + Send>>;

/// A load beside the stream, with the request that it is for.
async fn load((id, attempt): (u64, u32), loading: Loading) -> Result<v1::FetchChunksResponse, Status> {
    Ok(v1::FetchChunksResponse { id, attempt, answer: Some(loading.await?) })
}

fn load_chunk(chunks: &Chunks, chunk: u64, check: bool) -> Loading {
    let chunks = chunks.clone();
    Box::pin(blocking(move || {
        let result = Some(chunks.load(chunk, check));
        Ok::<_, Status>(fetch_chunks_response::Answer::Chunk(v1::ChunkAnswer { chunk, result }))
    }))
}

fn load_segment(chunks: &Chunks, segment: u32) -> Loading {
    let chunks = chunks.clone();
    Box::pin(blocking(move || {
        Ok::<_, Status>(fetch_chunks_response::Answer::Segment(chunks.load_segment(segment)))
    }))
}

/// What a demand stream does next.
enum Next {
    Request(v1::FetchChunksRequest),
    Answer(Result<v1::FetchChunksResponse, Status>),
    /// No more requests; the status with which to end once all loads are answered.
    NoMoreRequests(Option<Status>),
}

/// The demand lane.
pub(super) fn fetch_chunks(
    store: Arc<Store>,
    mut requests: Streaming<v1::FetchChunksRequest>,
    mut in_flight: InFlight,
) -> impl Stream<Item = Result<v1::FetchChunksResponse, Status>> {
    try_stream! {
        let mut ending = pin!(in_flight.ending());
        let mut loading = FuturesUnordered::new();
        let mut bound: Option<Chunks> = None;
        let mut end: Option<Option<Status>> = None;
        loop {
            if end.is_some() && loading.is_empty() {
                break;
            }
            let next = tokio::select! {
                biased;
                Some(answer) = loading.next(), if !loading.is_empty() => Next::Answer(answer),
                request = next_request(&mut requests, ending.as_mut()), if end.is_none() => match request {
                    Ok(Some(request)) => Next::Request(request),
                    Ok(None) => Next::NoMoreRequests(None),
                    Err(status) => Next::NoMoreRequests(Some(status)),
                },
            };
            let request = match next {
                Next::Request(request) => request,
                Next::Answer(answer) => {
                    yield answer?;
                    continue;
                }
                Next::NoMoreRequests(status) => {
                    end = Some(status);
                    continue;
                }
            };

            check_runs(&request.runs, MAX_DEMAND_CHUNKS)?;
            let chunks = match &mut bound {
                Some(chunks) => chunks,
                unbound => unbound.insert(Chunks::bind(&store, &request.image).await?),
            };
            chunks.check_image(&request.image)?;
            let (id, attempt) = (request.id, request.attempt);
            if let Some(segment) = request.segment {
                loading.push(load((id, attempt), load_segment(chunks, segment)));
                while loading.len() >= MAX_LOADING {
                    let Some(answer) = loading.next().await else { break };
                    yield answer?;
                }
            }
            for chunk in numbers(request.runs) {
                // From the second attempt on the frame is decoded first, which takes too long for this task.
                let answer = if attempt == 0 { chunks.answer_soon(chunk).await } else { None };
                if let Some(result) = answer {
                    let answer = v1::ChunkAnswer { chunk, result: Some(result) };
                    let answer = Some(fetch_chunks_response::Answer::Chunk(answer));
                    yield v1::FetchChunksResponse { id, attempt, answer };
                    continue;
                }
                loading.push(load((id, attempt), load_chunk(chunks, chunk, attempt > 0)));
                while loading.len() >= MAX_LOADING {
                    let Some(answer) = loading.next().await else { break };
                    yield answer?;
                }
            }
        }
        if let Some(Some(status)) = end {
            Err(status)?;
        }
    }
}

/// A bulk request that is being answered.
struct BulkAnswer<I: Iterator<Item = u64>> {
    numbers: Peekable<I>,
    check: bool,
    /// An answer that was too long for the last message.
    carried: Option<v1::ChunkAnswer>,
    message: Vec<v1::ChunkAnswer>,
    message_bytes: usize,
}

impl<I: Iterator<Item = u64>> BulkAnswer<I> {
    fn new(numbers: I, check: bool) -> Self {
        Self { numbers: numbers.peekable(), check, carried: None, message: Vec::new(), message_bytes: 0 }
    }

    /// Adds answers until the message is full or all are given. False: the next one needs the disk, and
    /// `may_block` is not set.
    fn fill(&mut self, chunks: &mut Chunks, may_block: bool) -> bool {
        loop {
            let answer = match (self.carried.take(), self.numbers.peek()) {
                (Some(carried), _) => carried,
                (None, None) => return true,
                (None, Some(&chunk)) => {
                    let now = if self.check { None } else { chunks.answer_now(chunk) };
                    let result = match now {
                        Some(result) => result,
                        None if may_block => chunks.load(chunk, self.check),
                        None => return false,
                    };
                    self.numbers.next();
                    v1::ChunkAnswer { chunk, result: Some(result) }
                }
            };
            let bytes = answer_bytes(&answer);
            if !self.message.is_empty() && self.message_bytes + bytes > BULK_MESSAGE_BYTES {
                self.carried = Some(answer);
                return true;
            }
            self.message_bytes += bytes;
            self.message.push(answer);
        }
    }

    /// The message, to be sent; empty when all are given.
    fn take(&mut self) -> Vec<v1::ChunkAnswer> {
        self.message_bytes = 0;
        std::mem::take(&mut self.message)
    }
}

fn answer_bytes(answer: &v1::ChunkAnswer) -> usize {
    ANSWER_OVERHEAD_BYTES
        + match &answer.result {
            Some(chunk_answer::Result::Frame(frame)) => frame.len(),
            Some(chunk_answer::Result::Error(error)) => error.message.len(),
            Some(chunk_answer::Result::Zero(_)) | None => 0,
        }
}

/// The frames of an image's working set, by messages. None where there is no set, or it is damaged: what it would bring comes
/// as it is touched.
async fn working_set(store: &Arc<Store>, image: Digest) -> Result<Vec<Vec<Bytes>>, Status> {
    let store = Arc::clone(store);
    let set = blocking(move || {
        let set = store.working_set(&image);
        Ok::<_, Status>(set.unwrap_or_else(|error| {
            tracing::error!("not sent ahead: {}", chain(&error));
            None
        }))
    });
    let mut messages: Vec<Vec<Bytes>> = Vec::new();
    let mut bytes = usize::MAX;
    for frame in set.await?.into_iter().flat_map(|set| set.frames) {
        if bytes.saturating_add(frame.len()) > BULK_MESSAGE_BYTES {
            bytes = 0;
            messages.push(Vec::new());
        }
        bytes += frame.len();
        messages.last_mut().expect("one was begun").push(frame);
    }
    Ok(messages)
}

/// These frames. What has left the page cache since the set was read is read again.
async fn in_memory(frames: Vec<Bytes>) -> Result<Vec<Bytes>, Status> {
    if frames.iter().all(|frame| map::is_resident(frame)) {
        return Ok(frames);
    }
    blocking(move || {
        let populated = frames.iter().try_for_each(|frame| map::populate(frame));
        populated.map_err(|error| Status::data_loss(format!("a working set's pack: {error}")))?;
        Ok::<_, Status>(frames)
    })
    .await
}

/// The bulk lane.
pub(super) fn stream_chunks(
    store: Arc<Store>,
    mut requests: Streaming<v1::StreamChunksRequest>,
    mut in_flight: InFlight,
) -> impl Stream<Item = Result<v1::StreamChunksResponse, Status>> {
    try_stream! {
        let mut ending = pin!(in_flight.ending());
        let mut bound: Option<Chunks> = None;
        while let Some(request) = next_request(&mut requests, ending.as_mut()).await? {
            check_runs(&request.runs, MAX_BULK_CHUNKS)?;
            let mut chunks = match bound.take() {
                Some(chunks) => chunks,
                None => Chunks::bind(&store, &request.image).await?,
            };
            chunks.check_image(&request.image)?;
            let (id, attempt) = (request.id, request.attempt);
            if request.working_set {
                for frames in working_set(&store, chunks.image()).await? {
                    let working_set_frames = in_memory(frames).await?;
                    yield v1::StreamChunksResponse { id, attempt, working_set_frames, ..Default::default() };
                }
                yield v1::StreamChunksResponse { id, attempt, working_set_ended: true, ..Default::default() };
            }
            let mut answer = BulkAnswer::new(numbers(request.runs), attempt > 0);
            loop {
                if !answer.fill(&mut chunks, false) {
                    (answer, chunks) = blocking(move || {
                        answer.fill(&mut chunks, true);
                        Ok::<_, Status>((answer, chunks))
                    }).await?;
                }
                let message = answer.take();
                if message.is_empty() {
                    break;
                }
                yield v1::StreamChunksResponse { id, attempt, chunks: message, ..Default::default() };
            }
            bound = Some(chunks);
        }
    }
}
