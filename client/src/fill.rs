//! The background fill: everything that is still absent, over the bulk lane.
//!
//! One thread with a runtime of its own asks for runs of chunks, within a window of plain bytes; as many installer
//! threads as there are cores take the answers from a queue, decompress, verify and install them. Only this side
//! knows what is resident, so that it asks for nothing that is there. What goes wrong is tried again in another
//! pass. It is reported after three passes that brought nothing, or when the server was lost for the fault deadline.

use crate::chunk::ChunkPages;
use crate::image::Content;
use crate::install::{self, Installed};
use crate::lane::{BulkLane, frame_of, runs_of};
use crate::region::RegionState;
use crate::remote::{Remote, RemoteError};
use crate::requests::MAX_ATTEMPTS;
use crate::session::{Shared, add};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
use postcopy_proto::v1;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The most plain bytes asked for and not yet installed: bounds memory, and hides some 60 ms at 1 Gbit/s.
const WINDOW_BYTES: usize = 16 << 20;
/// The most plain bytes of one request.
const REQUEST_BYTES: usize = 1 << 20;
/// Jobs that may wait for an installer; the window bounds their bytes.
const JOBS: usize = 256;
/// How soon an install is tried again that the kernel put off.
const RETRY: Duration = Duration::from_micros(200);
/// How long to wait after a pass that brought nothing.
const RETRY_PASS: Duration = Duration::from_millis(200);
/// The same, once it has been reported that nothing comes.
const GIVEN_UP_RETRY: Duration = Duration::from_secs(5);

/// What an installer does next. The permit is given back when that is done.
struct Job {
    region: Arc<RegionState>,
    work: Work,
    permit: OwnedSemaphorePermit,
}

enum Work {
    Frames(Vec<v1::ChunkAnswer>),
    Zeros(Range<u64>),
}

/// The bulk lane, and the requests on it that have not been answered, in order.
struct Stream {
    lane: BulkLane,
    asked: VecDeque<AskedFor>,
    last_id: u64,
}

/// A request: the chunks of a region that are still to come, and the room that they take.
struct AskedFor {
    id: u64,
    region: Arc<RegionState>,
    chunks: u64,
    permit: OwnedSemaphorePermit,
}

/// Why a chunk was refused most lately: said when the fill gives up.
type Refused = Arc<Mutex<Option<String>>>;

/// Starts the fill's threads; they end with the session.
///
/// # Errors
/// If a thread or a runtime cannot be had.
pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (jobs, queue) = mpsc::channel(JOBS);
    let queue = Arc::new(Mutex::new(queue));
    let refused = Refused::default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..cores {
        let (shared, queue, refused) = (Arc::clone(shared), Arc::clone(&queue), Arc::clone(&refused));
        let installer = std::thread::Builder::new().name("postcopy-install".into());
        installer.spawn(move || Installer::new(shared, refused).run(&queue))?;
    }
    let fill = Fill {
        shared: Arc::clone(shared),
        jobs,
        window: Arc::new(Semaphore::new(WINDOW_BYTES / PAGE_BYTES)),
        refused,
    };
    std::thread::Builder::new().name("postcopy-fill".into()).spawn(move || runtime.block_on(fill.run()))?;
    Ok(())
}

struct Fill {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    /// One permit a page.
    window: Arc<Semaphore>,
    refused: Refused,
}

impl Fill {
    async fn run(self) {
        let mut progressed = Instant::now();
        let mut fruitless_passes = 0;
        while !self.shared.has_ended() {
            let spaces = self.shared.spaces();
            let regions = spaces.regions();
            let before = unresolved_pages(regions);
            if before == 0 {
                self.shared.fill_work.notified().await;
                progressed = Instant::now();
                continue;
            }
            self.shared.set_filling(true);
            let outcome = self.pass(regions, fruitless_passes).await;
            // All permits are back: nothing is in flight.
            let all = u32::try_from(WINDOW_BYTES / PAGE_BYTES).expect("a small constant");
            drop(self.window.acquire_many(all).await);
            self.shared.set_filling(false);
            if unresolved_pages(regions) < before {
                (progressed, fruitless_passes) = (Instant::now(), 0);
                continue;
            }
            fruitless_passes += 1;
            let given_up = match &outcome {
                // It answers, and wrongly.
                Ok(()) | Err(RemoteError::Wrong { .. }) => fruitless_passes >= MAX_ATTEMPTS,
                Err(_) => progressed.elapsed() >= self.shared.options.fault_deadline,
            };
            let pause = if given_up { GIVEN_UP_RETRY } else { RETRY_PASS };
            if given_up {
                self.report(outcome.err());
            }
            // New regions are new work; else it is tried again: what was lost may come back.
            let _ = tokio::time::timeout(pause, self.shared.fill_work.notified()).await;
        }
    }

    fn report(&self, error: Option<RemoteError>) {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = error.map(|error| error.to_string()).or(refused);
        let reason = reason.unwrap_or_else(|| "pages are still absent".to_owned());
        let server = &self.shared.address;
        self.shared.report(&format!("the background fill from {server} does not get further: {reason}"));
    }

    /// Goes once over everything that is unresolved.
    async fn pass(&self, regions: &[Arc<RegionState>], attempt: u32) -> Result<(), RemoteError> {
        let image = self.shared.image.digest();
        self.bring_segments(regions).await?;
        let lane = BulkLane::open(&self.shared.address, &image).await?;
        let mut stream = Stream { lane, asked: VecDeque::new(), last_id: 0 };
        for region in regions {
            self.fill_region(&mut stream, region, attempt).await?;
        }
        while !stream.asked.is_empty() && !self.shared.has_ended() {
            self.receive(&mut stream).await?;
        }
        Ok(())
    }

    /// Has the segments of the regions' files come, those that are not here yet.
    async fn bring_segments(&self, regions: &[Arc<RegionState>]) -> Result<(), RemoteError> {
        let image = &self.shared.image;
        let missing = |region: &&Arc<RegionState>| {
            image.root().segments_of(&region.file).any(|index| image.segment(index).is_none())
        };
        let files = regions.iter().filter(missing).map(|region| region.file.first_chunk);
        let files: Vec<_> = files.collect();
        let paths: Vec<_> = image
            .root()
            .files()
            .filter(|(_, file)| files.contains(&file.first_chunk) && file.size_bytes > 0)
            .collect();
        if paths.is_empty() {
            return Ok(());
        }
        let remote = Remote::connect(self.shared.address.clone()).await?;
        let paths: Vec<_> = paths.iter().map(|(path, _)| path.as_bytes()).collect();
        let name = "image".parse().expect("a name");
        let reference = postcopy_proto::reference::Reference::Digest { name, image: image.digest() };
        let (_, mut segments) = remote.open(&reference, &paths, false).await?;
        while segments.next_into(image).await?.is_some() {}
        Ok(())
    }

    /// Asks for all that a region lacks, as the window has room for it.
    async fn fill_region(
        &self,
        stream: &mut Stream,
        region: &Arc<RegionState>,
        attempt: u32,
    ) -> Result<(), RemoteError> {
        let Range { start: mut next, end } = region.chunks();
        while next < end && !self.shared.has_ended() && region.is_alive() {
            match self.plan(region, &mut next) {
                Plan::Nothing => {}
                Plan::Zeros { chunks, pages } => {
                    let permit = self.permit(stream, pages.min(WINDOW_BYTES / PAGE_BYTES)).await?;
                    self.job(Job { region: Arc::clone(region), work: Work::Zeros(chunks), permit }).await;
                }
                Plan::Ask { chunks, pages } => {
                    let permit = self.permit(stream, pages).await?;
                    stream.last_id += 1;
                    let (id, region, count) = (stream.last_id, Arc::clone(region), chunks.len() as u64);
                    stream.asked.push_back(AskedFor { id, region, chunks: count, permit });
                    let runs = runs_of(chunks);
                    let request = v1::StreamChunksRequest { id, attempt, image: bytes::Bytes::new(), runs };
                    // A closed queue is a lost lane: receiving says why.
                    let _ = stream.lane.requests.send(request).await;
                }
            }
        }
        Ok(())
    }

    /// Waits for room in the window, receiving meanwhile.
    async fn permit(&self, stream: &mut Stream, pages: usize) -> Result<OwnedSemaphorePermit, RemoteError> {
        let pages = u32::try_from(pages).expect("at most the window");
        loop {
            if let Ok(permit) = Arc::clone(&self.window).try_acquire_many_owned(pages) {
                return Ok(permit);
            }
            if stream.asked.is_empty() {
                let permit = Arc::clone(&self.window).acquire_many_owned(pages).await;
                return Ok(permit.expect("the window is never closed"));
            }
            self.receive(stream).await?;
        }
    }

    /// Takes the next message and hands its frames to the installers.
    async fn receive(&self, stream: &mut Stream) -> Result<(), RemoteError> {
        let server = &self.shared.address;
        let deadline = self.shared.options.fault_deadline;
        let message = tokio::time::timeout(deadline, stream.lane.answers.message()).await;
        let message =
            message.map_err(|_| server.wrong("bulk answer", format!("none came within {deadline:?}")))?;
        let message = message.map_err(server.status("the bulk lane"))?;
        let message = message.ok_or_else(|| server.wrong("bulk answer", "the stream has ended"))?;
        if message.chunks.is_empty() {
            // A server could go on with these for ever, and nothing would come.
            return Err(server.wrong("bulk answer", "it holds nothing"));
        }
        // Requests are answered in order: of an earlier one nothing will come any more.
        while stream.asked.front().is_some_and(|front| front.id < message.id) {
            stream.asked.pop_front();
        }
        let Some(front) = stream.asked.front_mut().filter(|front| front.id == message.id) else {
            // Sent twice, or for nobody.
            return Ok(());
        };
        let (region, count) = (Arc::clone(&front.region), message.chunks.len() as u64);
        let permit = if count < front.chunks {
            // Room goes back with the frames, in proportion.
            let pages = front.permit.num_permits() as u64 * count / front.chunks;
            front.chunks -= count;
            front.permit.split(to_usize(pages))
        } else {
            stream.asked.pop_front().map(|front| front.permit)
        };
        let permit = permit.expect("a part of what is held");
        self.job(Job { region, work: Work::Frames(message.chunks), permit }).await;
        Ok(())
    }

    async fn job(&self, job: Job) {
        // Installers end with the session; then nothing is to be installed.
        let _ = self.jobs.send(job).await;
    }

    /// What to do from chunk `next` of the region on; `next` goes past it.
    fn plan(&self, region: &RegionState, next: &mut u64) -> Plan {
        let image = &self.shared.image;
        let most = REQUEST_BYTES.max(image.root().chunk_size().bytes()) / PAGE_BYTES;
        let (mut chunks, mut pages) = (Vec::new(), 0);
        let mut zeros: Option<Range<u64>> = None;
        while *next < region.chunks().end {
            let chunk = ChunkIndex(*next);
            let here = region.pages_of(chunk).expect("a chunk of the region");
            let wanted = region.next_run(here.clone(), install::unresolved(region)).is_some();
            match image.content(chunk) {
                Content::Zero if wanted => {
                    if !chunks.is_empty() || pages >= most {
                        break;
                    }
                    pages += here.len();
                    zeros = Some(zeros.map_or(chunk.0..chunk.0 + 1, |z| z.start..chunk.0 + 1));
                }
                Content::Data(_) if wanted => {
                    if zeros.is_some() || (!chunks.is_empty() && pages + here.len() > most) {
                        break;
                    }
                    pages += here.len();
                    chunks.push(chunk.0);
                }
                // Resident: runs of zeros go over it, runs of data just skip it.
                _ => {}
            }
            *next += 1;
        }
        match zeros {
            Some(chunks) => Plan::Zeros { chunks, pages },
            None if chunks.is_empty() => Plan::Nothing,
            None => Plan::Ask { chunks, pages },
        }
    }
}

enum Plan {
    Nothing,
    Zeros { chunks: Range<u64>, pages: usize },
    Ask { chunks: Vec<u64>, pages: usize },
}

fn unresolved_pages(regions: &[Arc<RegionState>]) -> usize {
    let unresolved = |region: &Arc<RegionState>| {
        install::unresolved(region).iter().map(|state| region.count(*state)).sum::<usize>()
    };
    regions.iter().filter(|region| region.is_alive()).map(unresolved).sum()
}

/// A thread that decompresses, verifies and installs.
struct Installer {
    shared: Arc<Shared>,
    refused: Refused,
    pages: ChunkPages,
}

impl Installer {
    fn new(shared: Arc<Shared>, refused: Refused) -> Self {
        Self { shared, refused, pages: ChunkPages::default() }
    }

    fn run(mut self, queue: &Mutex<mpsc::Receiver<Job>>) {
        loop {
            // Held while waiting, by one of the installers: whoever has the lock takes the next job.
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(job) = job else { return };
            match job.work {
                Work::Frames(answers) => {
                    for answer in &answers {
                        self.frame(&job.region, answer);
                    }
                }
                Work::Zeros(chunks) => {
                    for chunk in chunks {
                        self.zeros(ChunkIndex(chunk));
                    }
                }
            }
            self.shared.pages_changed();
            drop(job.permit);
        }
    }

    /// Installs a chunk. What is wrong with it leaves it absent; the next pass asks again.
    fn frame(&mut self, region: &RegionState, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        if let Err(reason) = self.verified_frame(region, chunk, answer) {
            let image = self.shared.image.digest();
            let reason = format!("chunk {chunk} of image {image}: {reason}");
            *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        }
    }

    fn verified_frame(
        &mut self,
        region: &RegionState,
        chunk: ChunkIndex,
        answer: &v1::ChunkAnswer,
    ) -> Result<(), String> {
        let shared = Arc::clone(&self.shared);
        let image = &shared.image;
        let (Some(_), Content::Data(digest)) = (region.pages_of(chunk), image.content(chunk)) else {
            return Err("it was not asked for".to_owned());
        };
        let frame = frame_of(answer, &digest).map_err(|no| no.reason)?;
        add(&shared.counters.bulk_chunks, 1);
        add(&shared.counters.frame_bytes, frame.len());
        // A fault may have overtaken it.
        let is_wanted = |region: &Arc<RegionState>| {
            let pages = region.pages_of(chunk).expect("a region of the chunk");
            region.next_run(pages, install::unresolved(region)).is_some()
        };
        if shared.spaces().of_chunk(chunk).any(is_wanted) {
            self.pages.decode(image, &region.file, chunk, &digest, frame)?;
            self.install(chunk);
        }
        Ok(())
    }

    fn zeros(&mut self, chunk: ChunkIndex) {
        if self.shared.image.content(chunk) == Content::Zero {
            self.pages.set_zeros(self.shared.image.root().chunk_size().bytes());
            self.install(chunk);
        }
    }

    fn install(&self, chunk: ChunkIndex) {
        // Those of other regions over the same file are not asked for then.
        let started = Instant::now();
        for region in self.shared.spaces().of_chunk(chunk) {
            // The pager reads the event, or somebody frees memory; else another pass has it.
            while started.elapsed() < self.shared.options.fault_deadline {
                match install::install(Some(&self.shared.gate), region, chunk, &self.pages, None) {
                    Installed::All => break,
                    Installed::Ended => return,
                    Installed::Deferred | Installed::NoMemory => std::thread::park_timeout(RETRY),
                }
            }
        }
    }
}
