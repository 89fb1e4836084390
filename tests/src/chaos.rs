//! A page service between a client and a real server: it counts what is asked for, and can lie about all of it.
//!
//! A [`Chaos`] forwards every call to the real server. Requests are counted on the wire, in [`Asked`]; answers go
//! through [`Lies`] on their way back. [`within`] is the watchdog of tests whose failure may be a hang.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use postcopy::ServerAddress;
use postcopy_proto::MAX_MESSAGE_BYTES;
use postcopy_proto::v1::fetch_chunks_response::Answer;
use postcopy_proto::v1::open_image_response::Part;
use postcopy_proto::v1::page_service_client::PageServiceClient;
use postcopy_proto::v1::page_service_server::{PageService, PageServiceServer};
use postcopy_proto::v1::{self, ChunkAnswer, ChunkRun, SegmentAnswer};
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Answers that are forwarded at a time when they are late.
const LATE_AT_A_TIME: usize = 64;

const WINDOW_BYTES: u32 = 8 << 20;

/// Which stream chunks travel in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// FetchChunks.
    Demand,
    /// StreamChunks.
    Bulk,
}

type PartLie = dyn Fn(Part) -> Vec<Part> + Send + Sync;
type ChunkLie = dyn Fn(Lane, ChunkAnswer) -> Vec<ChunkAnswer> + Send + Sync;
type SetLie = dyn Fn(Bytes) -> Bytes + Send + Sync;
type SetFlood = dyn Fn() -> Box<dyn Iterator<Item = Bytes> + Send> + Send + Sync;
type SegmentLie = dyn Fn(SegmentAnswer) -> Vec<SegmentAnswer> + Send + Sync;

/// What is done to answers; by default they are forwarded as they are.
#[derive(Default)]
pub struct Lies {
    part: Option<Box<PartLie>>,
    chunk: Option<Box<ChunkLie>>,
    segment: Option<Box<SegmentLie>>,
    set_frame: Option<Box<SetLie>>,
    set_flood: Option<Box<SetFlood>>,
    /// On the demand lane, and on the bulk lane.
    late: [Option<Duration>; 2],
    flood: Option<ChunkAnswer>,
    bulk_flood: Option<(v1::StreamChunksResponse, bool)>,
    /// Demand lanes are taken when it says so.
    taken: Option<Arc<Semaphore>>,
}

impl fmt::Debug for Lies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lies").finish_non_exhaustive()
    }
}

impl Lies {
    /// Parts of OpenImage's answers other than segments become what `lie` makes of them.
    #[must_use]
    pub fn part(mut self, lie: impl Fn(Part) -> Vec<Part> + Send + Sync + 'static) -> Self {
        self.part = Some(Box::new(lie));
        self
    }

    /// Answers for chunks become what `lie` makes of them.
    #[must_use]
    pub fn chunk(
        mut self,
        lie: impl Fn(Lane, ChunkAnswer) -> Vec<ChunkAnswer> + Send + Sync + 'static,
    ) -> Self {
        self.chunk = Some(Box::new(lie));
        self
    }

    /// Frames of working sets become what `lie` makes of them; it may block.
    #[must_use]
    pub fn set_frame(mut self, lie: impl Fn(Bytes) -> Bytes + Send + Sync + 'static) -> Self {
        self.set_frame = Some(Box::new(lie));
        self
    }

    /// Each bulk lane carries what `flood` gives for it, as frames of a working set, and nothing else.
    #[must_use]
    pub fn set_flood<I>(mut self, flood: impl Fn() -> I + Send + Sync + 'static) -> Self
    where
        I: Iterator<Item = Bytes> + Send + 'static,
    {
        self.set_flood = Some(Box::new(move || Box::new(flood())));
        self
    }

    /// Answers for segments, in OpenImage and on the demand lane, become what `lie` makes of them.
    #[must_use]
    pub fn segment(
        mut self,
        lie: impl Fn(SegmentAnswer) -> Vec<SegmentAnswer> + Send + Sync + 'static,
    ) -> Self {
        self.segment = Some(Box::new(lie));
        self
    }

    /// Each message of both lanes is held back for a random time of up to `demand` or `bulk`, and overtaken by others
    /// meanwhile.
    #[must_use]
    pub fn late(mut self, demand: Duration, bulk: Duration) -> Self {
        self.late = [Some(demand), Some(bulk)];
        self
    }

    /// The demand lane carries this answer again and again, without an end, beside what is forwarded.
    #[must_use]
    pub fn flood(mut self, answer: ChunkAnswer) -> Self {
        self.flood = Some(answer);
        self
    }

    /// As [`Lies::flood`], on the bulk lane: beside what is forwarded, or instead of that.
    #[must_use]
    pub fn bulk_flood(mut self, answer: v1::StreamChunksResponse, instead: bool) -> Self {
        self.bulk_flood = Some((answer, instead));
        self
    }

    /// The server takes a demand lane's requests, and says that it does so only when there is a permit.
    #[must_use]
    pub fn taken(mut self, permits: Arc<Semaphore>) -> Self {
        self.taken = Some(permits);
        self
    }

    fn parts(&self, part: Part) -> Vec<Part> {
        match (part, &self.part) {
            (Part::Segment(segment), _) => self.segments(segment).into_iter().map(Part::Segment).collect(),
            (part, Some(lie)) => lie(part),
            (part, None) => vec![part],
        }
    }

    fn chunks(&self, lane: Lane, answer: ChunkAnswer) -> Vec<ChunkAnswer> {
        self.chunk.as_ref().map_or_else(|| vec![answer.clone()], |lie| lie(lane, answer.clone()))
    }

    fn segments(&self, answer: SegmentAnswer) -> Vec<SegmentAnswer> {
        self.segment.as_ref().map_or_else(|| vec![answer.clone()], |lie| lie(answer.clone()))
    }

    fn answers(&self, message: v1::FetchChunksResponse) -> Vec<v1::FetchChunksResponse> {
        let (id, attempt) = (message.id, message.attempt);
        let answers: Vec<Option<Answer>> = match message.answer {
            Some(Answer::Chunk(answer)) => {
                self.chunks(Lane::Demand, answer).into_iter().map(Answer::Chunk).map(Some).collect()
            }
            Some(Answer::Segment(answer)) => {
                self.segments(answer).into_iter().map(Answer::Segment).map(Some).collect()
            }
            None => vec![None],
        };
        answers.into_iter().map(|answer| v1::FetchChunksResponse { id, attempt, answer }).collect()
    }
}

/// How often each chunk and segment was asked for, as the requests on the wire say.
#[derive(Debug, Default)]
pub struct Asked {
    // Held for counting and copying alone.
    counts: Mutex<Counts>,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    demand: HashMap<u64, u32>,
    urgent: HashMap<u64, u32>,
    bulk: HashMap<u64, u32>,
    segments: HashMap<u32, u32>,
    opens: u32,
}

fn count(counts: &mut HashMap<u64, u32>, runs: &[ChunkRun]) {
    for chunk in runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count)) {
        *counts.entry(chunk).or_default() += 1;
    }
}

impl Asked {
    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often each chunk was asked for in FetchChunks.
    #[must_use]
    pub fn demand(&self) -> HashMap<u64, u32> {
        self.counts().demand
    }

    /// Returns the number of requests of class DEMAND for each chunk. Late read-ahead that a fault
    /// awaits is requested as DEMAND, too.
    #[must_use]
    pub fn urgent(&self) -> HashMap<u64, u32> {
        self.counts().urgent
    }

    /// How often each chunk was asked for in StreamChunks.
    #[must_use]
    pub fn bulk(&self) -> HashMap<u64, u32> {
        self.counts().bulk
    }

    /// How often each segment was asked for in FetchChunks.
    #[must_use]
    pub fn segments(&self) -> HashMap<u32, u32> {
        self.counts().segments
    }

    /// How often an image was opened.
    #[must_use]
    pub fn opens(&self) -> u32 {
        self.counts().opens
    }
}

/// The service in between. Ends when dropped, and all its streams with it.
#[derive(Debug)]
pub struct Chaos {
    address: ServerAddress,
    asked: Arc<Asked>,
    runtime: Option<Runtime>,
}

impl Chaos {
    /// Starts a service on a free port of loopback that forwards to `upstream` and lies as told.
    ///
    /// # Panics
    /// If it cannot be started, or `upstream` cannot be reached.
    #[must_use]
    pub fn start(upstream: &ServerAddress, lies: Lies) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let asked = Arc::new(Asked::default());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let endpoint = Endpoint::from_shared(upstream.to_string()).expect("a server's address");
        let endpoint = endpoint
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let upstream = runtime.block_on(endpoint.connect()).expect("the real server answers");
        let upstream = PageServiceClient::new(upstream).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let between = Between { upstream, lies: Arc::new(lies), asked: Arc::clone(&asked) };
        let service = PageServiceServer::new(between);
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .add_service(service);
        // The server's own option does not hold for connections that it is given.
        let connections = StreamExt::inspect(TcpListenerStream::new(listener), |connection| {
            if let Ok(connection) = connection {
                let _ = connection.set_nodelay(true);
            }
        });
        // Ends with the runtime.
        runtime.spawn(server.serve_with_incoming(connections));
        let address = address.parse().expect("an address");
        Self { address, asked, runtime: Some(runtime) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// What was asked for.
    #[must_use]
    pub fn asked(&self) -> &Asked {
        &self.asked
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Between {
    upstream: PageServiceClient<Channel>,
    lies: Arc<Lies>,
    asked: Arc<Asked>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Each message becomes what `lie` makes of it, as late as the lies say.
fn told<T: Send + 'static>(
    answers: Streaming<T>,
    lies: Arc<Lies>,
    late: Option<Duration>,
    lie: impl Fn(&Lies, T) -> Vec<T> + Send + 'static,
) -> Answers<T> {
    let answers = answers.flat_map(move |message| {
        stream::iter(match message {
            Ok(message) => lie(&lies, message).into_iter().map(Ok).collect(),
            Err(status) => vec![Err(status)],
        })
    });
    let Some(late) = late else { return Box::pin(answers) };
    let most = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
    let answers = answers.map(move |answer| {
        let pause = Duration::from_micros(fastrand::u64(..=most));
        async move {
            tokio::time::sleep(pause).await;
            answer
        }
    });
    Box::pin(answers.buffer_unordered(LATE_AT_A_TIME))
}

#[tonic::async_trait]
impl PageService for Between {
    type OpenImageStream = Answers<v1::OpenImageResponse>;
    type FetchChunksStream = Answers<v1::FetchChunksResponse>;
    type StreamChunksStream = Answers<v1::StreamChunksResponse>;
    type ReadFileStream = Answers<v1::ReadFileResponse>;

    async fn open_image(
        &self,
        request: Request<v1::OpenImageRequest>,
    ) -> Result<Response<Self::OpenImageStream>, Status> {
        self.asked.change(|counts| counts.opens += 1);
        let answers = self.upstream.clone().open_image(request.into_inner()).await?.into_inner();
        let lies = Arc::clone(&self.lies);
        let answers = answers.flat_map(move |message| {
            stream::iter(match message.map(|message| message.part) {
                Ok(Some(part)) => {
                    let parts = lies.parts(part).into_iter();
                    parts.map(|part| Ok(v1::OpenImageResponse { part: Some(part) })).collect()
                }
                Ok(None) => vec![Ok(v1::OpenImageResponse { part: None })],
                Err(status) => vec![Err(status)],
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_chunks(
        &self,
        request: Request<Streaming<v1::FetchChunksRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        let asked = Arc::clone(&self.asked);
        let requests = tokio_stream::StreamExt::map_while(request.into_inner(), move |request| {
            let request = request.ok()?;
            asked.change(|counts| {
                count(&mut counts.demand, &request.runs);
                if request.class() == v1::RequestClass::Demand {
                    count(&mut counts.urgent, &request.runs);
                }
                if let Some(segment) = request.segment {
                    *counts.segments.entry(segment).or_default() += 1;
                }
            });
            Some(request)
        });
        let answers = self.upstream.clone().fetch_chunks(requests).await?.into_inner();
        if let Some(taken) = &self.lies.taken {
            taken.acquire().await.expect("it is never closed").forget();
        }
        let told = told(answers, Arc::clone(&self.lies), self.lies.late[0], Lies::answers);
        let Some(answer) = self.lies.flood.clone() else { return Ok(Response::new(told)) };
        let answer = Some(Answer::Chunk(answer));
        let flood = stream::repeat_with(move || {
            Ok(v1::FetchChunksResponse { id: 0, attempt: 0, answer: answer.clone() })
        });
        Ok(Response::new(Box::pin(stream::select(told, flood))))
    }

    async fn stream_chunks(
        &self,
        request: Request<Streaming<v1::StreamChunksRequest>>,
    ) -> Result<Response<Self::StreamChunksStream>, Status> {
        if let Some(flood) = &self.lies.set_flood {
            let frames = flood().map(|frame| v1::StreamChunksResponse {
                working_set_frames: vec![frame],
                ..Default::default()
            });
            return Ok(Response::new(Box::pin(stream::iter(frames.map(Ok)))));
        }
        let asked = Arc::clone(&self.asked);
        let requests = tokio_stream::StreamExt::map_while(request.into_inner(), move |request| {
            let request = request.ok()?;
            asked.change(|counts| count(&mut counts.bulk, &request.runs));
            Some(request)
        });
        let answers = self.upstream.clone().stream_chunks(requests).await?.into_inner();
        let lie = |lies: &Lies, mut message: v1::StreamChunksResponse| {
            let chunks = message.chunks.into_iter();
            message.chunks = chunks.flat_map(|answer| lies.chunks(Lane::Bulk, answer)).collect();
            if let Some(lie) = &lies.set_frame {
                let frames = message.working_set_frames.into_iter();
                #[expect(clippy::disallowed_methods, reason = "a lie may wait, and there are other workers")]
                let frames = tokio::task::block_in_place(|| frames.map(lie).collect());
                message.working_set_frames = frames;
            }
            vec![message]
        };
        let told = told(answers, Arc::clone(&self.lies), self.lies.late[1], lie);
        let Some((answer, instead)) = self.lies.bulk_flood.clone() else { return Ok(Response::new(told)) };
        let told = told.filter(move |_| std::future::ready(!instead));
        let flood = stream::repeat_with(move || Ok(answer.clone()));
        Ok(Response::new(Box::pin(stream::select(told, flood))))
    }

    async fn read_file(
        &self,
        request: Request<v1::ReadFileRequest>,
    ) -> Result<Response<Self::ReadFileStream>, Status> {
        let answers = self.upstream.clone().read_file(request.into_inner()).await?.into_inner();
        Ok(Response::new(Box::pin(answers)))
    }
}

/// Runs `work` on a thread of its own and waits for it for at most `limit`: a hang becomes a failure. The thread of a
/// hang stays behind, asleep.
///
/// # Panics
/// As `work`, or after `limit`.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = std::sync::mpsc::sync_channel(1);
    let worker = std::thread::spawn(move || {
        let value = work();
        let _ = done.send(());
        value
    });
    let timed_out = result.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
    assert!(!timed_out, "it hangs: not done within {limit:?}");
    match worker.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
