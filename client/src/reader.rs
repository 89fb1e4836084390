//! Reads chunks of an image for a caller that is no session, such as a file system.
//!
//! A [`Reader`] has a task with a demand lane. The task requests each chunk once for all callers
//! that wait for it, verifies the answer, and requests outstanding chunks again over another lane
//! if it loses one. A wrong answer is requested again with a higher attempt number, so that the
//! server checks the frame itself.

mod working_set;

pub use working_set::{SetPages, WorkingSet};

use crate::memory::ChunkPages;
use crate::remote::backoff::Backoff;
use crate::remote::lane::{DemandLane, frame_of, may_pass, runs_of};
use crate::remote::{Content, Image, MAX_ATTEMPTS, RemoteError, SegmentRefused, ServerAddress, take_segment};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::manifest::{FileEntry, chunk_len};
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::v1::{self, chunk_answer, fetch_chunks_response::Answer, segment_answer};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Most requests that wait for the task.
const QUEUE: usize = 1024;
/// Most chunks of a request after a reconnection; the server takes 1,024.
const REQUEST_CHUNKS: usize = 512;
/// Pause before the next request of a chunk that the server cannot send for the moment.
const BUSY: Duration = Duration::from_millis(100);
/// Time without a request after which the task closes its lane.
const IDLE: Duration = Duration::from_secs(10);
/// Least time without an answer after which the task opens another lane. With a longer deadline, it
/// is half of that: a slow server or link may need it.
const MIN_SILENCE: Duration = Duration::from_secs(5);

/// The verified bytes of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkBytes {
    /// Zeros; the number of bytes.
    Zeros(usize),
    /// The bytes, without padding.
    Data(Bytes),
}

/// The reason why a chunk was not read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The chunk did not arrive in time.
    #[error("chunk {chunk} did not arrive within {deadline:?}: {reason}")]
    Late {
        /// The chunk's number in the image.
        chunk: u64,
        /// The time that it had.
        deadline: Duration,
        /// The last error of the connection.
        reason: String,
    },
    /// The server has sent a wrong chunk several times, or does not have it.
    #[error("chunk {chunk}: {reason}")]
    Wrong {
        /// The chunk's number in the image.
        chunk: u64,
        /// The fault of the last answer.
        reason: String,
    },
    /// The image has no such chunk.
    #[error("the image has no chunk {0}")]
    OutOfRange(u64),
}

type Outcome = Result<ChunkBytes, ReadError>;

/// A request of a caller: the chunk, its length in bytes, and where the outcome goes.
#[derive(Debug)]
struct Wanted {
    chunk: ChunkIndex,
    bytes: usize,
    class: v1::RequestClass,
    outcome: oneshot::Sender<Outcome>,
}

/// A reader of the chunks of one image. Dropping it ends its connection.
#[derive(Debug)]
pub struct Reader {
    image: Arc<Image>,
    deadline: Duration,
    wanted: mpsc::Sender<Wanted>,
    kept: watch::Sender<bool>,
    /// The last error of the connection. Locked to read or replace it.
    last_error: Arc<Mutex<String>>,
    task: JoinHandle<()>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reader {
    /// Starts a reader in the current runtime. It connects with the first request. A chunk that
    /// does not arrive within `deadline` is an error.
    #[must_use]
    pub fn start(address: ServerAddress, image: Arc<Image>, deadline: Duration) -> Self {
        let (wanted, queue) = mpsc::channel(QUEUE);
        let (kept, is_kept) = watch::channel(false);
        let last_error = Arc::new(Mutex::new("the server has not answered".to_owned()));
        let fetching = Fetching {
            address,
            image: Arc::clone(&image),
            lane: None,
            connect_at: Instant::now(),
            heard: Instant::now(),
            backoff: Backoff::new(),
            chunks: HashMap::new(),
            segments: HashMap::new(),
            again: JoinSet::new(),
            id: 0,
            last_error: Arc::clone(&last_error),
            silence: MIN_SILENCE.max(deadline / 2),
            is_kept,
            pages: ChunkPages::default(),
            decoder: FrameDecoder::default(),
        };
        let task = tokio::spawn(fetching.run(queue));
        Self { image, deadline, wanted, kept, last_error, task }
    }

    /// Keeps the connection although nothing is read, or no longer. A server keeps an image for as
    /// long as a connection is bound to it, also if no reference names it any more.
    pub fn keep(&self, is_kept: bool) {
        self.kept.send_replace(is_kept);
    }

    /// Returns the image.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Reads a chunk of `file`, which is one of the image's files, before all chunks that are read
    /// ahead.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn chunk(&self, file: &FileEntry, chunk: ChunkIndex) -> Result<ChunkBytes, ReadError> {
        self.chunk_ahead(file, chunk, v1::RequestClass::Demand).await
    }

    /// Reads a chunk of `file`. The server may send more urgent ones first, as the class says.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn chunk_ahead(
        &self,
        file: &FileEntry,
        chunk: ChunkIndex,
        class: v1::RequestClass,
    ) -> Result<ChunkBytes, ReadError> {
        let bytes = chunk_len(self.image.root().chunk_size(), file, chunk);
        let bytes = bytes.ok_or(ReadError::OutOfRange(chunk.0))?;
        if self.image.content(chunk) == Content::Zero {
            return Ok(ChunkBytes::Zeros(bytes));
        }
        let (outcome, answer) = oneshot::channel();
        let read = async {
            // The task ends with this reader alone.
            let _ = self.wanted.send(Wanted { chunk, bytes, class, outcome }).await;
            answer.await
        };
        match tokio::time::timeout(self.deadline, read).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => {
                let reason = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Err(ReadError::Late { chunk: chunk.0, deadline: self.deadline, reason })
            }
        }
    }
}

/// An outstanding chunk.
#[derive(Debug)]
struct Chunk {
    digest: Digest,
    bytes: usize,
    attempt: u32,
    /// The most urgent one of the requests.
    class: v1::RequestClass,
    waiting: Vec<oneshot::Sender<Outcome>>,
}

/// An outstanding segment, and the requests that need it.
#[derive(Debug, Default)]
struct Segment {
    attempt: u32,
    waiting: Vec<Wanted>,
}

/// A request that is sent again after a pause.
#[derive(Clone, Copy, Debug)]
enum Again {
    Chunk(ChunkIndex),
    Segment(u32),
}

/// The state of a reader's task.
#[derive(Debug)]
struct Fetching {
    address: ServerAddress,
    image: Arc<Image>,
    lane: Option<DemandLane>,
    /// Time of the next attempt to open a lane.
    connect_at: Instant,
    /// Time of the last answer, or of the first request after it.
    heard: Instant,
    backoff: Backoff,
    chunks: HashMap<ChunkIndex, Chunk>,
    segments: HashMap<u32, Segment>,
    again: JoinSet<Again>,
    id: u64,
    last_error: Arc<Mutex<String>>,
    silence: Duration,
    /// True if the lane stays open while nothing is outstanding.
    is_kept: watch::Receiver<bool>,
    pages: ChunkPages,
    decoder: FrameDecoder,
}

impl Fetching {
    async fn run(mut self, mut queue: mpsc::Receiver<Wanted>) {
        loop {
            let is_kept = *self.is_kept.borrow_and_update();
            if self.lane.is_none() && (is_kept || !self.is_idle()) && self.connect_at <= Instant::now() {
                self.connect().await;
            }
            let (is_idle, has_lane) = (self.is_idle(), self.lane.is_some());
            // The time of the next step, if nothing happens before.
            let until = match (is_idle, has_lane) {
                (true, true) => (!is_kept).then_some(self.heard + IDLE),
                (false, true) => Some(self.heard + self.silence),
                (_, false) => (is_kept || !is_idle).then_some(self.connect_at),
            };
            let lane = self.lane.as_mut();
            let answer = async {
                match lane {
                    Some(lane) => lane.answer().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                wanted = queue.recv() => match wanted {
                    Some(wanted) => self.want(wanted).await,
                    None => return,
                },
                answer = answer => self.take(answer).await,
                Some(again) = self.again.join_next() => {
                    if let Ok(again) = again {
                        self.request_again(again).await;
                    }
                }
                Ok(()) = self.is_kept.changed() => {}
                () = tokio::time::sleep_until(until.unwrap_or(self.heard)), if until.is_some() => match (is_idle, has_lane) {
                    (true, true) => self.lane = None,
                    (false, true) => {
                        self.lose("the server says nothing");
                        self.forget_abandoned();
                    }
                    (_, false) => self.forget_abandoned(),
                },
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.chunks.is_empty() && self.segments.is_empty()
    }

    fn note(&self, error: &str) {
        error.clone_into(&mut self.last_error.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn lose(&mut self, error: &str) {
        self.note(error);
        self.lane = None;
        self.connect_at = Instant::now() + self.backoff.pause();
    }

    /// Opens a lane, and requests everything that is outstanding over it.
    async fn connect(&mut self) {
        match DemandLane::open(&self.address, &self.image.digest()).await {
            Ok(lane) => self.lane = Some(lane),
            Err(error) => return self.lose(&error.to_string()),
        }
        self.heard = Instant::now();
        let segments: Vec<u32> = self.segments.keys().copied().collect();
        for segment in segments {
            self.request_segment(segment).await;
        }
        let kind = |(chunk, of): (&ChunkIndex, &Chunk)| (of.class, of.attempt, chunk.0);
        let mut chunks: Vec<_> = self.chunks.iter().map(kind).collect();
        chunks.sort_unstable();
        for alike in chunks.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (class, attempt, _) = alike[0];
            for part in alike.chunks(REQUEST_CHUNKS) {
                self.send((class, attempt), runs_of(part.iter().map(|(.., chunk)| *chunk)), None).await;
            }
        }
    }

    /// Sends a request of a class and an attempt number.
    async fn send(
        &mut self,
        (class, attempt): (v1::RequestClass, u32),
        runs: Vec<v1::ChunkRun>,
        segment: Option<u32>,
    ) {
        let Some(lane) = &self.lane else { return };
        self.id += 1;
        let class = class.into();
        let request =
            v1::FetchChunksRequest { id: self.id, attempt, class, runs, segment, ..Default::default() };
        // A closed queue means a lost lane, and the next answer has the reason.
        if tokio::time::timeout(self.silence, lane.requests.send(request)).await.is_err() {
            self.lose("the server takes no requests");
        }
    }

    async fn request_segment(&mut self, segment: u32) {
        let attempt = self.segments.get(&segment).map_or(0, |of| of.attempt);
        self.send((v1::RequestClass::Demand, attempt), Vec::new(), Some(segment)).await;
    }

    async fn request_again(&mut self, again: Again) {
        match again {
            Again::Segment(segment) => self.request_segment(segment).await,
            Again::Chunk(chunk) => {
                let Some(kind) = self.chunks.get(&chunk).map(|of| (of.class, of.attempt)) else { return };
                self.send(kind, runs_of([chunk.0]), None).await;
            }
        }
    }

    fn later(&mut self, again: Again) {
        self.again.spawn(async move {
            tokio::time::sleep(BUSY).await;
            again
        });
    }

    async fn want(&mut self, wanted: Wanted) {
        if self.is_idle() {
            self.heard = Instant::now();
        }
        let Wanted { chunk, bytes, class, outcome } = wanted;
        match self.image.content(chunk) {
            Content::Zero => drop(outcome.send(Ok(ChunkBytes::Zeros(bytes)))),
            Content::OutOfRange => drop(outcome.send(Err(ReadError::OutOfRange(chunk.0)))),
            Content::SegmentMissing(segment) => {
                let is_new = !self.segments.contains_key(&segment);
                self.segments.entry(segment).or_default().waiting.push(Wanted {
                    chunk,
                    bytes,
                    class,
                    outcome,
                });
                if is_new {
                    self.request_segment(segment).await;
                }
            }
            Content::Data(digest) => {
                let new = || Chunk { digest, bytes, attempt: 0, class, waiting: Vec::new() };
                let outstanding = self.chunks.entry(chunk).or_insert_with(new);
                // An answer on which all callers have given up may have been lost.
                let is_requested = outstanding.waiting.iter().any(|waiting| !waiting.is_closed());
                outstanding.waiting.push(outcome);
                let is_more_urgent = class < outstanding.class;
                outstanding.class = outstanding.class.min(class);
                if !is_requested || is_more_urgent {
                    self.request_again(Again::Chunk(chunk)).await;
                }
            }
        }
    }

    async fn take(&mut self, answer: Result<Option<v1::FetchChunksResponse>, RemoteError>) {
        let answer = match answer {
            Ok(Some(v1::FetchChunksResponse { answer: Some(answer), .. })) => answer,
            Ok(Some(_)) => return,
            Ok(None) => return self.lose("the server has ended the stream"),
            Err(error) => return self.lose(&error.to_string()),
        };
        self.heard = Instant::now();
        self.backoff.reset();
        match answer {
            Answer::Chunk(answer) => self.take_chunk(&answer).await,
            Answer::Segment(answer) => self.take_segment(&answer).await,
        }
    }

    async fn take_chunk(&mut self, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        let Some(outstanding) = self.chunks.get_mut(&chunk) else { return };
        let reason = match frame_of(answer, &outstanding.digest) {
            Ok(frame) => {
                let decoded =
                    self.pages.decode(&mut self.decoder, outstanding.bytes, &outstanding.digest, frame);
                match decoded {
                    Ok(()) => return self.finish(chunk, None),
                    Err(reason) => reason,
                }
            }
            Err(no) if no.may_pass => {
                self.note(&no.reason);
                self.forget_abandoned();
                return self.later(Again::Chunk(chunk));
            }
            Err(no) => no.reason,
        };
        outstanding.attempt += 1;
        if outstanding.attempt >= MAX_ATTEMPTS || is_missing(answer) {
            return self.finish(chunk, Some(reason));
        }
        self.request_again(Again::Chunk(chunk)).await;
    }

    /// Tells the callers the outcome of a chunk: the decoded pages, or an error.
    fn finish(&mut self, chunk: ChunkIndex, error: Option<String>) {
        let Some(Chunk { bytes, waiting, .. }) = self.chunks.remove(&chunk) else { return };
        let outcome = match error {
            Some(reason) => Err(ReadError::Wrong { chunk: chunk.0, reason }),
            None => Ok(ChunkBytes::Data(Bytes::copy_from_slice(
                &self.pages.bytes_of(0..self.pages.pages())[..bytes],
            ))),
        };
        for waiting in waiting {
            let _ = waiting.send(outcome.clone());
        }
    }

    async fn take_segment(&mut self, answer: &v1::SegmentAnswer) {
        let Some(outstanding) = self.segments.get_mut(&answer.index) else { return };
        let may_pass = match &answer.result {
            Some(segment_answer::Result::Error(error)) => may_pass(error),
            _ => false,
        };
        let reason = match take_segment(&self.image, answer) {
            Ok(()) => {
                let waiting = self.segments.remove(&answer.index).map(|of| of.waiting).unwrap_or_default();
                for wanted in waiting {
                    self.want(wanted).await;
                }
                return;
            }
            Err(SegmentRefused::Server(error)) if may_pass => {
                self.note(&error.message);
                self.forget_abandoned();
                return self.later(Again::Segment(answer.index));
            }
            Err(refused) => refused.to_string(),
        };
        outstanding.attempt += 1;
        if outstanding.attempt < MAX_ATTEMPTS {
            return self.request_again(Again::Segment(answer.index)).await;
        }
        for wanted in self.segments.remove(&answer.index).map(|of| of.waiting).unwrap_or_default() {
            let (chunk, reason) = (wanted.chunk.0, reason.clone());
            let _ = wanted.outcome.send(Err(ReadError::Wrong { chunk, reason }));
        }
    }

    /// Forgets what no caller waits for any more.
    fn forget_abandoned(&mut self) {
        self.chunks.retain(|_, chunk| chunk.waiting.iter().any(|waiting| !waiting.is_closed()));
        self.segments.retain(|_, segment| segment.waiting.iter().any(|wanted| !wanted.outcome.is_closed()));
    }
}

/// Returns true if the server has looked for the chunk and does not have it.
fn is_missing(answer: &v1::ChunkAnswer) -> bool {
    matches!(&answer.result, Some(chunk_answer::Result::Error(error)) if error.code() == v1::ErrorCode::NotFound)
}
