//! The two lanes of a session: the demand lane for latency, and the bulk lane for throughput.
//!
//! Each lane reads requests and sends answers in one task. On the demand lane a frame in memory is
//! answered at once, without another thread or a channel. Other frames are loaded beside the task,
//! so that a fault on a cold page does not delay faults on warm ones. Requests of class DEMAND
//! overtake the others there ([`queue`]).

mod queue;

use crate::service::chunks::{Chunks, check_runs, numbers};
use crate::service::lanes::queue::{Choice, Queue, Turn, Urgency, Wanted};
use crate::service::work;
use crate::shutdown::{InFlight, shutting_down};
use crate::store::{Store, chain, map};
use crate::transport::unsent::{StreamUnsent, Unsent};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, chunk_answer, fetch_chunks_response};
use postcopy_proto::{MAX_BULK_CHUNKS, MAX_DEMAND_CHUNKS};
use prost::Message;
use std::future::Future;
use std::iter::Peekable;
use std::pin::{Pin, pin};
use std::sync::Arc;
use tonic::{Status, Streaming};

/// Most loads of one demand stream at a time, including finished ones that wait for their turn.
const MAX_LOADING: usize = 32;

/// Number of loads from which no less urgent load begins, so that DEMAND always finds free ones.
const MAX_LOADING_AHEAD: usize = 16;

/// Limit on a demand stream's unwritten bytes, beyond which it sends only answers of class DEMAND.
/// It is one incompressible frame of 64 KiB, which takes 5 ms at 100 Mbit/s. The socket behind it
/// holds twice as much ([`crate::listen`]), so the connection stays busy.
const MAX_UNSENT_BYTES: u64 = 64 << 10;

/// Most bytes of a bulk message with more than one answer.
const BULK_MESSAGE_BYTES: usize = 256 << 10;

/// Most bytes of an answer in a bulk message besides its frame: tags, lengths, the chunk's number.
const ANSWER_OVERHEAD_BYTES: usize = 32;

/// Returns the next request; `None` after the client's last one. When the server ends, returns the
/// requests received before that, then UNAVAILABLE.
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

/// Awaits a load beside the stream, for its turn.
async fn load(turn: Turn, loading: Loading) -> (Urgency, Result<v1::FetchChunksResponse, Status>) {
    (turn.urgency, loading.await.map(|answer| response(turn, answer)))
}

fn response(turn: Turn, answer: fetch_chunks_response::Answer) -> v1::FetchChunksResponse {
    v1::FetchChunksResponse { id: turn.id, attempt: turn.attempt, answer: Some(answer) }
}

fn load_chunk(chunks: &Chunks, chunk: u64, check: bool) -> Loading {
    let chunks = chunks.clone();
    Box::pin(work::demand(move || {
        let result = Some(chunks.load(chunk, check));
        Ok::<_, Status>(fetch_chunks_response::Answer::Chunk(v1::ChunkAnswer { chunk, result }))
    }))
}

fn load_segment(chunks: &Chunks, segment: u32) -> Loading {
    let chunks = chunks.clone();
    Box::pin(work::demand(move || {
        Ok::<_, Status>(fetch_chunks_response::Answer::Segment(chunks.load_segment(segment)))
    }))
}

/// Checks a request. The first request of a stream binds it to its image.
async fn check(
    store: &Arc<Store>,
    bound: &mut Option<Chunks>,
    request: &v1::FetchChunksRequest,
) -> Result<(), Status> {
    check_runs(&request.runs, MAX_DEMAND_CHUNKS)?;
    let chunks = match bound {
        Some(chunks) => chunks,
        unbound => unbound.insert(Chunks::bind(store, &request.image).await?),
    };
    chunks.check_image(&request.image)
}

/// The next step of a demand stream.
enum Next {
    Request(v1::FetchChunksRequest),
    Loaded(Urgency, Result<v1::FetchChunksResponse, Status>),
    Answer(Choice),
    /// No request follows; the status is the stream's end once all requests are answered.
    NoMoreRequests(Option<Status>),
}

/// Serves the demand lane. The stream reads all received requests before it answers the next chunk,
/// so a DEMAND request overtakes all answers that HTTP/2 has not accepted yet. It gives HTTP/2 only
/// so many less urgent answers as keep the connection busy.
pub(super) fn fetch_chunks(
    store: Arc<Store>,
    stream: Option<StreamUnsent>,
    mut requests: Streaming<v1::FetchChunksRequest>,
    mut in_flight: InFlight,
) -> impl Stream<Item = Result<v1::FetchChunksResponse, Status>> {
    try_stream! {
        let mut ending = pin!(in_flight.ending());
        let mut unsent = Unsent::new(stream);
        let mut queue = Queue::default();
        let mut loading = FuturesUnordered::new();
        let mut bound: Option<Chunks> = None;
        let mut end: Option<Option<Status>> = None;
        loop {
            if end.is_some() && loading.is_empty() && queue.is_empty() {
                break;
            }
            let loads = loading.len() + queue.held();
            let choice = queue.next(loads < MAX_LOADING_AHEAD).filter(|_| loads < MAX_LOADING);
            let limit_bytes = if queue.has_demand() { u64::MAX } else { MAX_UNSENT_BYTES };
            let next = tokio::select! {
                biased;
                Some((urgency, answer)) = loading.next(), if !loading.is_empty() => Next::Loaded(urgency, answer),
                request = next_request(&mut requests, ending.as_mut()), if end.is_none() && !queue.is_full() => {
                    match request {
                        Ok(Some(request)) => Next::Request(request),
                        Ok(None) => Next::NoMoreRequests(None),
                        Err(status) => Next::NoMoreRequests(Some(status)),
                    }
                }
                Some(choice) = async { unsent.room(limit_bytes).await; choice }, if choice.is_some() => {
                    Next::Answer(choice)
                }
            };
            let answer = match next {
                Next::Request(request) => {
                    match check(&store, &mut bound, &request).await {
                        Ok(()) => queue.push(request),
                        Err(status) => end = Some(Some(status)),
                    }
                    None
                }
                Next::Loaded(Urgency::Demand, answer) => Some(answer?),
                Next::Loaded(Urgency::Prefetch | Urgency::Background, answer) => {
                    queue.hold(answer?);
                    None
                }
                Next::Answer(Choice::Held) => queue.take_held(),
                Next::Answer(Choice::Request(urgency)) => {
                    let (Some(turn), Some(chunks)) = (queue.take(urgency), &mut bound) else { continue };
                    match turn.wanted {
                        // Before the chunks of its request, which the client cannot verify without
                        // it.
                        Wanted::Segment(segment) => Some(response(turn, load_segment(chunks, segment).await?)),
                        Wanted::Chunk(chunk) => {
                            // From the second attempt on the frame is decoded first, which takes
                            // too long in this task.
                            let now = if turn.attempt == 0 { chunks.answer_soon(chunk).await } else { None };
                            if now.is_none() {
                                loading.push(load(turn, load_chunk(chunks, chunk, turn.attempt > 0)));
                            }
                            now.map(|result| {
                                let answer = v1::ChunkAnswer { chunk, result: Some(result) };
                                response(turn, fetch_chunks_response::Answer::Chunk(answer))
                            })
                        }
                    }
                }
                Next::NoMoreRequests(status) => {
                    end = Some(status);
                    None
                }
            };
            if let Some(answer) = answer {
                unsent.give(answer.encoded_len());
                yield answer;
            }
        }
        if let Some(Some(status)) = end {
            Err(status)?;
        }
    }
}

/// The state of answering a bulk request.
struct BulkAnswer<I: Iterator<Item = u64>> {
    numbers: Peekable<I>,
    check: bool,
    /// An answer that did not fit into the last message.
    carried: Option<v1::ChunkAnswer>,
    message: Vec<v1::ChunkAnswer>,
    message_bytes: usize,
}

impl<I: Iterator<Item = u64>> BulkAnswer<I> {
    fn new(numbers: I, check: bool) -> Self {
        Self { numbers: numbers.peekable(), check, carried: None, message: Vec::new(), message_bytes: 0 }
    }

    /// Adds answers until the message is full or all are given. Returns false if the next answer
    /// needs the disk and `may_block` is false.
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

    /// Returns the message to send; empty once all answers are given.
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

/// Returns the frames of an image's working set, by messages. Returns none if there is no set, or
/// it is damaged: its pages are then fetched on demand.
async fn working_set(store: &Arc<Store>, image: Digest) -> Result<Vec<Vec<Bytes>>, Status> {
    let store = Arc::clone(store);
    let set = work::read(move || {
        let set = store.working_set(&image);
        Ok::<_, Status>(set.unwrap_or_else(|error| {
            tracing::error!("a working set is not sent, its pages are fetched on demand: {}", chain(&error));
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

/// Returns these frames, after reading those again that have left the page cache.
async fn in_memory(frames: Vec<Bytes>) -> Result<Vec<Bytes>, Status> {
    if frames.iter().all(|frame| map::is_resident(frame)) {
        return Ok(frames);
    }
    work::read(move || {
        let populated = frames.iter().try_for_each(|frame| map::populate(frame));
        populated.map_err(|error| Status::data_loss(format!("a working set's pack: {error}")))?;
        Ok::<_, Status>(frames)
    })
    .await
}

/// Serves the bulk lane.
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
                    (answer, chunks) = work::read(move || {
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
