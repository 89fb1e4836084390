//! Prefetch over the bulk lane: first the image's working set, then, if the options ask for it, a
//! background fill of all pages that are still absent.
//!
//! A background task ([`crate::background`]) requests runs of chunks. A window of plain bytes
//! bounds its outstanding requests, and [`crate::pace`] keeps them from delaying faults. The
//! threads of a pool ([`pool`]), which all sessions share, decompress, verify and install the
//! answers. Only the client knows which pages are resident, so the task requests absent chunks
//! only. A later pass retries the chunks that failed. The fill reports an error after three passes
//! without progress, or when it has lost the server for the fault deadline. An idle fill keeps no
//! connection and no thread.

mod installer;
mod pool;
mod working_set;

use crate::background;
use crate::install;
use crate::memory::{Region, Space, Spaces};
use crate::outcome::FailureKind;
use crate::pace;
use crate::remote::Content;
use crate::remote::MAX_ATTEMPTS;
use crate::remote::Purpose::Bulk;
use crate::remote::backoff::Backoff;
use crate::remote::lane::{BulkLane, runs_of};
use crate::remote::{Remote, RemoteError, ServerAddress};
use crate::shared::Shared;
use installer::{Arrived, Job};
use pool::Filling;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
use postcopy_proto::v1;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tonic::transport::Channel;
use working_set::{SetOutcome, WorkingSet};

/// The most plain bytes that are requested and not yet installed. The window bounds memory, and
/// at 1 Gbit/s hides a latency of 134 ms, or of 60 ms where chunks compress by 2.2 : 1.
const WINDOW_BYTES: usize = pace::MOST_BYTES;
/// The most plain bytes of one request.
const REQUEST_BYTES: usize = 1 << 20;
/// Pause without requests, after which the fill checks again if it would delay faults.
const PAUSE: Duration = Duration::from_millis(10);
/// Number of chunks that the fill examines before it yields to other sessions' fills.
const LOOK_CHUNKS: u64 = 4096;
/// Pause after a pass without progress, after a pass that only skipped chunks of the demand lane,
/// and while no space is ready for a pass.
const RETRY_PASS: Duration = Duration::from_millis(200);
/// Pause between passes after the fill has reported that it makes no progress.
const GIVEN_UP_RETRY: Duration = Duration::from_secs(5);
/// Time for which the fill retries at short intervals when only chunks of the demand lane are left.
const LEFT_TO_DEMAND: Duration = Duration::from_secs(2);

/// The time after a demand-lane request for which the fill leaves the chunk to the demand lane. It
/// is well above the time that 2 MiB of read-ahead take at 100 Mbit/s.
const LEAVE_TO_DEMAND: Duration = Duration::from_secs(1);

/// The bulk lane, and its outstanding requests, in order.
struct Stream {
    lane: BulkLane,
    outstanding: VecDeque<Outstanding>,
    last_id: u64,
    /// True if the pass has left out a chunk because the demand lane fetches it.
    skipped_for_demand: bool,
}

/// An outstanding request: the region, the number of its chunks that have not arrived, and the
/// window permits that these hold.
struct Outstanding {
    id: u64,
    region: Region,
    chunks: u64,
    permit: OwnedSemaphorePermit,
    at: Instant,
}

/// A fill that connects while its session is being opened.
#[derive(Debug)]
pub(crate) struct ConnectingFill(oneshot::Sender<Fill>);

impl ConnectingFill {
    /// Starts the fill's task, which connects at once.
    ///
    /// # Errors
    /// If the process cannot start the thread of the background tasks.
    pub(crate) fn new(address: &ServerAddress) -> io::Result<Self> {
        let (sender, receiver) = oneshot::channel::<Fill>();
        let address = address.clone();
        background::spawn(async move {
            let (channel, fill) = tokio::join!(address.connect(Bulk), receiver);
            // If the session fails to open, there is nothing to fill. If the connection fails, the
            // fill makes another one.
            if let Ok(fill) = fill {
                fill.run(channel.ok()).await;
            }
        })?;
        Ok(Self(sender))
    }

    /// Hands the session to the task, which fills it until it ends.
    pub(crate) fn start(self, shared: &Arc<Shared>) {
        let filling = Arc::new(Filling::new(Arc::clone(shared)));
        let window = Arc::new(Semaphore::new(WINDOW_BYTES / PAGE_BYTES));
        // The task waits for this message.
        drop(self.0.send(Fill { shared: Arc::clone(shared), filling, window }));
    }
}

#[derive(Debug)]
struct Fill {
    shared: Arc<Shared>,
    filling: Arc<Filling>,
    /// The window: one permit for each page.
    window: Arc<Semaphore>,
}

impl Fill {
    async fn run(self, mut channel: Option<Channel>) {
        let (mut lane, mut backoff) = (None, Backoff::new());
        let mut set = self.shared.options.working_set.then(WorkingSet::default);
        let mut progressed = Instant::now();
        let mut reported: Option<Instant> = None;
        let mut fruitless_passes = 0;
        while !self.shared.has_ended() {
            if let Some(attempts) = &mut set {
                match self.bring_working_set(channel.take(), attempts).await {
                    SetOutcome::Received(received) => {
                        (lane, set) = (Some(*received), None);
                        backoff.reset();
                    }
                    SetOutcome::GivenUp => set = None,
                    // The pause also ends with the session. If the session fills, too, then after
                    // MAX_ATTEMPTS failures the next attempt follows the next pass.
                    SetOutcome::Failed if !self.shared.fills() || attempts.failures < MAX_ATTEMPTS => {
                        let _ = tokio::time::timeout(backoff.pause(), self.wait_while(|_| true)).await;
                        continue;
                    }
                    SetOutcome::Failed => {}
                }
            }
            self.shared.cores.fill_behind();
            let spaces = self.shared.spaces();
            if unresolved_pages(&spaces, |_| true) == 0 || !self.shared.fills() {
                self.shared.outcome.recovered(&FailureKind::Fill);
                // The fill keeps its connections until the session has its first memory, and no
                // longer.
                if !spaces.is_empty() || !self.shared.fills() {
                    (lane, channel) = (None, None);
                }
                drop(spaces);
                self.work_or_end().await;
                progressed = Instant::now();
                continue;
            }
            let ready: HashSet<u32> =
                spaces.spaces().filter(|space| is_ready(space)).map(|space| space.id).collect();
            let unresolved = || unresolved_pages(&spaces, |space| ready.contains(&space.id));
            let before = unresolved();
            if before == 0 {
                // Forks and other changes do not end this pause.
                let _ = tokio::time::timeout(RETRY_PASS, self.wait_while(|_| true)).await;
                progressed = Instant::now();
                continue;
            }
            let threads = match pool::join() {
                Ok(threads) => threads,
                Err(error) => {
                    let reason = format!("no thread for the background fill: {error}");
                    self.shared.outcome.add(FailureKind::Fill, &reason, None);
                    let _ = tokio::time::timeout(GIVEN_UP_RETRY, self.work_or_end()).await;
                    continue;
                }
            };
            self.shared.set_filling(true);
            let outcome = match self.lane(lane.take(), channel.take()).await {
                Ok(lane) => self.pass(&spaces, fruitless_passes, lane).await,
                Err(error) => Err(error),
            };
            // Wait until all permits are back, so that nothing is in flight.
            self.all_installed().await;
            drop(threads);
            self.shared.in_bulk.clear();
            self.shared.set_filling(false);
            if unresolved() < before {
                (progressed, fruitless_passes, reported) = (Instant::now(), 0, None);
                self.shared.outcome.recovered(&FailureKind::Fill);
                backoff.reset();
                continue;
            }
            fruitless_passes += u32::from(!matches!(outcome, Ok(true)));
            let given_up = match &outcome {
                // The demand lane fetches the rest, or the next pass does.
                Ok(true) => false,
                // The server answers, but wrongly.
                Ok(false) | Err(RemoteError::Wrong { .. }) => fruitless_passes >= MAX_ATTEMPTS,
                Err(_) => progressed.elapsed() >= self.shared.options.fault_deadline,
            };
            // If the demand lane fetches all that is left, the pager reports the pages that are
            // lost.
            let waits = matches!(outcome, Ok(true)) && progressed.elapsed() > LEFT_TO_DEMAND;
            let pause = match &outcome {
                Ok(_) | Err(RemoteError::Wrong { .. }) if given_up || waits => GIVEN_UP_RETRY,
                Ok(_) | Err(RemoteError::Wrong { .. }) => RETRY_PASS,
                Err(_) => backoff.pause(),
            };
            if given_up && reported.is_none_or(|at| at.elapsed() >= GIVEN_UP_RETRY) {
                reported = Some(Instant::now());
                self.report(outcome.err());
            }
            drop(spaces);
            // New regions end the pause. After it the fill retries, because a lost server may
            // return.
            let _ = tokio::time::timeout(pause, self.work_or_end()).await;
        }
    }

    /// Waits until all permits are back, so that nothing is in flight.
    async fn all_installed(&self) {
        let all = u32::try_from(WINDOW_BYTES / PAGE_BYTES).expect("a small constant");
        drop(self.window.acquire_many(all).await);
    }

    /// Returns `lane` if it is given. Else opens a lane, over `channel` if that is given.
    async fn lane(&self, lane: Option<BulkLane>, channel: Option<Channel>) -> Result<BulkLane, RemoteError> {
        let (address, image) = (&self.shared.address, self.shared.image.digest());
        match (lane, channel) {
            (Some(lane), _) => Ok(lane),
            (None, Some(channel)) => Ok(BulkLane::over(channel, address, &image, None)),
            (None, None) => BulkLane::open(address, &image).await,
        }
    }

    /// Waits while `condition` holds for the session's memory. Returns when the session ends, too.
    async fn wait_while(&self, condition: impl Fn(&Spaces) -> bool) {
        while !self.shared.has_ended() && condition(&self.shared.spaces()) {
            self.work_or_end().await;
        }
    }

    /// Waits for new work, or for the session's end. The end notifies once, and an earlier wait may
    /// have taken that notification.
    async fn work_or_end(&self) {
        if !self.shared.has_ended() {
            self.shared.fill_work.notified().await;
        }
    }

    /// Returns the output of `work`, or `None` if the session ends first.
    async fn unless_ended<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // The session's end is polled first, because `work` may be ready every time.
            biased;
            () = self.wait_while(|_| true) => None,
            done = work => Some(done),
        }
    }

    fn report(&self, error: Option<RemoteError>) {
        let refused = self.filling.refused.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = error.map(|error| error.to_string()).or(refused);
        let reason = reason.unwrap_or_else(|| "pages are still absent".to_owned());
        let server = &self.shared.address;
        let reason = format!("the background fill from {server} does not get further: {reason}");
        self.shared.outcome.add(FailureKind::Fill, &reason, None);
    }

    /// Requests everything that is unresolved, once. Returns true if it has left out chunks that
    /// the demand lane fetches.
    async fn pass(&self, spaces: &Spaces, attempt: u32, lane: BulkLane) -> Result<bool, RemoteError> {
        self.bring_segments(spaces).await?;
        let mut stream = Stream { lane, outstanding: VecDeque::new(), last_id: 0, skipped_for_demand: false };
        for region in spaces.regions() {
            self.fill_region(&mut stream, &region, attempt).await?;
        }
        while !stream.outstanding.is_empty() && !self.shared.has_ended() {
            self.receive(&mut stream).await?;
        }
        Ok(stream.skipped_for_demand)
    }

    /// Fetches the missing segments of the regions' files.
    async fn bring_segments(&self, spaces: &Spaces) -> Result<(), RemoteError> {
        let image = &self.shared.image;
        let missing =
            |file: &FileEntry| image.root().segments_of(file).any(|index| image.segment(index).is_none());
        let spaces_of = || spaces.spaces().flat_map(|space| spaces.objects_of(space.id));
        let files = spaces_of().map(|(_, object)| object.file).filter(missing);
        let files: HashSet<_> = files.map(|file| file.first_chunk).collect();
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

    /// Requests all chunks that a region lacks, as the window permits.
    async fn fill_region(
        &self,
        stream: &mut Stream,
        region: &Region,
        attempt: u32,
    ) -> Result<(), RemoteError> {
        if !is_ready(&region.space) {
            return Ok(());
        }
        let Range { start: mut next, end } = region.chunks();
        while next < end && !self.shared.has_ended() && self.shared.spaces().holds(region) {
            let most = self.wait_for_turn(stream).await?;
            match self.plan(region, &mut next, most, &mut stream.skipped_for_demand) {
                // Other sessions' fills run on the same thread.
                Plan::Nothing => tokio::task::yield_now().await,
                Plan::Zeros { chunks, pages } => {
                    let permit = self.permit(stream, pages.min(WINDOW_BYTES / PAGE_BYTES)).await?;
                    self.job(Job::new(Arrived::Zeros(chunks), permit, Duration::ZERO));
                }
                Plan::Request { chunks, pages } => {
                    let permit = self.permit(stream, pages).await?;
                    stream.last_id += 1;
                    let (id, region, count) = (stream.last_id, region.clone(), chunks.len() as u64);
                    let at = Instant::now();
                    stream.outstanding.push_back(Outstanding { id, region, chunks: count, permit, at });
                    chunks.iter().for_each(|chunk| self.shared.in_bulk.add(ChunkIndex(*chunk)));
                    let runs = runs_of(chunks);
                    let request = v1::StreamChunksRequest { id, attempt, runs, ..Default::default() };
                    // The queue is closed if the lane is lost; then `receive` returns the reason.
                    let _ = stream.lane.requests.send(request).await;
                }
            }
        }
        Ok(())
    }

    /// Waits until another request may be outstanding, and receives answers meanwhile. Returns the
    /// largest number of pages that it may request at once.
    async fn wait_for_turn(&self, stream: &mut Stream) -> Result<usize, RemoteError> {
        loop {
            let on_their_way =
                stream.outstanding.iter().map(|request| request.permit.num_permits()).sum::<usize>();
            let on_their_way = on_their_way * PAGE_BYTES;
            let now = Instant::now();
            let has_pending_fault = self.shared.cores.has_pending_fault(now);
            let window = {
                let mut pace = self.shared.pace.lock().unwrap_or_else(PoisonError::into_inner);
                pace.window(on_their_way, has_pending_fault, now)
            };
            let request = REQUEST_BYTES.min(window / 4).max(self.shared.image.root().chunk_size().bytes());
            match on_their_way {
                0 if window == 0 && !self.shared.has_ended() => {
                    let _ = tokio::time::timeout(PAUSE, self.shared.fill_may_go_on.notified()).await;
                }
                0 => return Ok(request / PAGE_BYTES),
                _ if on_their_way + request <= window => return Ok(request / PAGE_BYTES),
                _ => self.receive(stream).await?,
            }
        }
    }

    /// Waits for permits of the window, and receives answers meanwhile.
    async fn permit(&self, stream: &mut Stream, pages: usize) -> Result<OwnedSemaphorePermit, RemoteError> {
        let pages = u32::try_from(pages).expect("at most the window");
        loop {
            if let Ok(permit) = Arc::clone(&self.window).try_acquire_many_owned(pages) {
                return Ok(permit);
            }
            if stream.outstanding.is_empty() {
                let permit = Arc::clone(&self.window).acquire_many_owned(pages).await;
                return Ok(permit.expect("the window is never closed"));
            }
            self.receive(stream).await?;
        }
    }

    /// Receives the next answer to an outstanding request, and hands its frames to the installers.
    async fn receive(&self, stream: &mut Stream) -> Result<(), RemoteError> {
        let server = &self.shared.address;
        let deadline = self.shared.options.fault_deadline;
        // Answers to no outstanding request do not extend the deadline, because a server could send
        // them for ever.
        let message = tokio::time::timeout(deadline, async {
            loop {
                let message = self.bulk_answer(stream).await?;
                // The server answers requests in order, so no more answers to earlier requests
                // follow.
                while stream.outstanding.front().is_some_and(|front| front.id < message.id) {
                    stream.outstanding.pop_front();
                }
                if stream.outstanding.front().is_none_or(|front| front.id == message.id) {
                    return Ok(message);
                }
            }
        });
        let message = message
            .await
            .map_err(|_| server.wrong("bulk answer", format!("none came within {deadline:?}")))??;
        let Some(front) = stream.outstanding.front_mut() else { return Ok(()) };
        let (region, count, wire) = (front.region.clone(), message.chunks.len() as u64, front.at.elapsed());
        let permit = if count < front.chunks {
            // The frames take their share of the request's permits.
            let pages = front.permit.num_permits() as u64 * count / front.chunks;
            front.chunks -= count;
            front.permit.split(to_usize(pages))
        } else {
            stream.outstanding.pop_front().map(|front| front.permit)
        };
        let permit = permit.expect("a part of what is held");
        self.job(Job::new(Arrived::Frames(region, message.chunks.into()), permit, wire));
        Ok(())
    }

    async fn bulk_answer(&self, stream: &mut Stream) -> Result<v1::StreamChunksResponse, RemoteError> {
        let server = &self.shared.address;
        let message = self.unless_ended(stream.lane.answer()).await;
        let message = message.ok_or_else(|| server.wrong("bulk answer", "the session has ended"))?;
        let message = message?.ok_or_else(|| server.wrong("bulk answer", "the stream has ended"))?;
        if message.chunks.is_empty() {
            return Err(server.wrong("bulk answer", "it holds nothing"));
        }
        Ok(message)
    }

    fn job(&self, job: Job) {
        pool::add(&self.filling, job);
    }

    /// Plans the next step from chunk `next` of the region on, and moves `next` past its chunks.
    /// The step has at most `most` pages, or one chunk. Sets `skipped_for_demand` if it leaves a
    /// chunk to the demand lane.
    fn plan(&self, region: &Region, next: &mut u64, most: usize, skipped_for_demand: &mut bool) -> Plan {
        let image = &self.shared.image;
        let chunk_pages = image.root().chunk_size().bytes() / PAGE_BYTES;
        let most = most.max(chunk_pages);
        let (mut chunks, mut pages) = (Vec::new(), 0);
        let mut zeros: Option<Range<u64>> = None;
        let end = region.chunks().end.min(next.saturating_add(LOOK_CHUNKS));
        while *next < end {
            let chunk = ChunkIndex(*next);
            let here = region.pages_of_chunk(chunk).expect("a chunk of the region");
            let wanted = region.next_run(here.clone(), install::unresolved(region)).is_some();
            match image.content(chunk) {
                Content::Zero if wanted => {
                    if !chunks.is_empty() || pages >= most {
                        break;
                    }
                    pages += here.len();
                    zeros = Some(zeros.map_or(chunk.0..chunk.0 + 1, |z| z.start..chunk.0 + 1));
                }
                Content::Data(_) if wanted && self.shared.on_demand.has_within(chunk, LEAVE_TO_DEMAND) => {
                    *skipped_for_demand = true
                }
                // The outstanding answer is installed in all regions except those of young
                // children; a later pass fills these.
                Content::Data(_) if wanted && self.shared.in_bulk.has(chunk) => {}
                Content::Data(_) if wanted => {
                    if zeros.is_some() || (!chunks.is_empty() && pages + chunk_pages > most) {
                        break;
                    }
                    // The answer is the whole chunk, however small the region's part of it is.
                    pages += chunk_pages;
                    chunks.push(chunk.0);
                }
                // The chunk is resident. A run of zeros may include it; a run of data skips it.
                _ => {}
            }
            *next += 1;
        }
        match zeros {
            Some(chunks) => Plan::Zeros { chunks, pages },
            None if chunks.is_empty() => Plan::Nothing,
            None => Plan::Request { chunks, pages },
        }
    }
}

enum Plan {
    Nothing,
    Zeros { chunks: Range<u64>, pages: usize },
    Request { chunks: Vec<u64>, pages: usize },
}

/// Returns whether the fill may install pages in a space.
fn is_ready(space: &Space) -> bool {
    !space.is_undecided() && !space.is_young()
}

/// Returns the number of unresolved pages in the spaces that `selects` accepts.
fn unresolved_pages(spaces: &Spaces, selects: impl Fn(&Space) -> bool) -> usize {
    spaces.unresolved_in(spaces.spaces().all(|space| space.uffd.can_poison()), selects)
}
