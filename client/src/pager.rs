//! The pager: the one thread that answers a session's faults.
//!
//! It runs a current-thread runtime that owns the userfaultfd, the demand stream and its connection, so that from
//! reading a fault to UFFDIO_COPY nothing crosses a thread. The way of a page:
//!
//! 1. [`Pager::read`] reads all messages: events change page states at once ([`events`]), faults are collected;
//! 2. [`Pager::fault`] looks at each faulting page's state; an absent one's chunk is asked for ([`Pager::ask`]), once;
//! 3. [`Pager::answer`] takes the server's answer, verifies the chunk to the image's digest, and
//! 4. [`Pager::install`] puts its pages into every region that has them, which wakes the threads.
//!
//! A thread that faults may hold any lock of the program: the pager takes none that the program can hold, writes no
//! log, and touches no region's memory. Whatever way it ends, [`OnExit`] first makes what is unresolved SIGBUS, or
//! leaves it to a successor.

mod answers;
pub(crate) mod attach;
mod events;
mod faults;
mod forks;
mod frame_cache;
mod hold;
mod identify;
mod losses;
mod on_exit;
mod read_ahead;
mod ready;
mod requests;
mod spin;
mod waiters;

use crate::error::SessionError;
use crate::install::hand_over::HandedOver;
use crate::memory::ChunkPages;
use crate::memory::{Change, PageState, Region, Space};
use crate::options::add;
use crate::options::{LossPolicy, Options};
use crate::pace::Pace;
use crate::pager::attach::Owner;
use crate::pager::frame_cache::FrameCache;
use crate::pager::on_exit::OnExit;
use crate::pager::read_ahead::ReadAhead;
use crate::pager::requests::Requests;
use crate::pager::spin::Spin;
use crate::processes::{Callers, ticks};
use crate::reaper;
use crate::remote::Image;
use crate::remote::ImageSource;
use crate::remote::backoff::Backoff;
use crate::remote::lane::DemandLane;
use crate::remote::{Lane, RemoteError, ServerAddress};
use crate::shared::{Command, Shared};
use crate::state_file::MESSAGES;
use crate::uffd::{AsyncUffd, Readable};
use events::Stopped;
use forks::Forks;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::page::{ChunkIndex, to_usize};
use postcopy_proto::v1::{self, fetch_chunks_response::Answer};
use ready::Ready;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use waiters::{Wait, Waiters};

/// How long opening a session may take.
const OPEN: Duration = Duration::from_secs(30);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often it is looked whether the memory's owners are still there: their userfaultfds do not tell.
const LOOK_FOR_OWNERS: Duration = Duration::from_millis(250);
/// How soon messages are read again for which there was no descriptor or memory.
const READ_AGAIN: Duration = Duration::from_millis(20);
/// Where answers are nearer than this, a page is asked for although the fill has asked for it.
const NEAR: Duration = Duration::from_millis(1);
/// What answers take at most, where the server is well.
const FAR: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub(crate) struct Pager {
    on_exit: OnExit,
    watched: Vec<Watched>,
    /// The last space that was added.
    last_space: Option<u32>,
    /// Children that are undecided.
    forks: Forks,
    /// The memory is other processes'.
    is_foreign: bool,
    lane: Result<DemandLane, oneshot::Receiver<Result<DemandLane, RemoteError>>>,
    /// The reason for which the server was not reached the last time.
    lane_error: Option<String>,
    /// The pauses between attempts to reach a server that was lost.
    backoff: Backoff,
    requests: Requests,
    ready: Ready,
    /// Who waits for pages.
    waiters: Waiters,
    handed_over: mpsc::Receiver<HandedOver>,
    /// Threads that did not stop in time when they were to be held, and are to be let go.
    lingering: Vec<nix::unistd::Pid>,
    spin: Spin,
    ahead: ReadAhead,
    /// How much read-ahead may be under way beside faults that go on with no stream.
    ahead_pace: Pace,
    /// The chunks that such faults wait for.
    scattered: HashSet<ChunkIndex>,
    /// How long an answer takes of late.
    usual: Duration,
    /// Chunks that the fill has asked for, and that somebody has been waiting for since then.
    behind: HashMap<ChunkIndex, Instant>,
    /// An event came that this session cannot go on after.
    broken: Option<String>,
    /// Since when and why an event cannot be read.
    unreadable: Option<(Instant, String)>,
    /// Addresses of faults that were read and not yet seen to, and their spaces; whether the page is write-protected.
    faults: Vec<(Arc<Space>, usize, bool)>,
    pages: ChunkPages,
    decoder: FrameDecoder,
    /// In record mode: chunks of which touched pages are installed one by one.
    frame_cache: FrameCache,
    /// In record mode: chunks that are wanted as a whole.
    whole: HashSet<ChunkIndex>,
    // Dropped last: memory that waits in it to be unmapped must have been unregistered.
    commands: mpsc::Receiver<Command>,
}

/// A space and its userfaultfd, as the runtime watches it.
#[derive(Debug)]
struct Watched {
    space: Arc<Space>,
    uffd: AsyncUffd,
}

/// What a pager is started with. It connects, opens the image, and opens the userfaultfd, in this order, so that nothing is
/// registered before there is somebody to ask.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) address: ServerAddress,
    pub(crate) image: ImageSource,
    pub(crate) options: Options,
    pub(crate) owner: Owner,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Told whether it serves.
    pub(crate) reply: std::sync::mpsc::SyncSender<Result<Arc<Shared>, SessionError>>,
}

impl Start {
    /// Serves in a thread of its own.
    ///
    /// # Errors
    /// If there is none to be had.
    pub(crate) fn in_a_thread(self) -> io::Result<()> {
        let runtime = runtime()?;
        let thread = std::thread::Builder::new().name("postcopy-pager".into());
        thread.spawn(move || runtime.block_on(self.serve())).map(drop)
    }

    /// Serves until the session's end.
    pub(crate) async fn serve(self) {
        let Self { address, image, options, owner, commands, reply } = self;
        let opened = Pager::open(address.clone(), image, options, owner, commands);
        // Each part of it has a limit of its own; this is the promise of `Session::open`.
        let opened = match tokio::time::timeout(OPEN, opened).await {
            Ok(opened) => opened,
            Err(_) => Err(address.wrong("session", format!("not open within {OPEN:?}")).into()),
        };
        match opened {
            Err(error) => drop(reply.send(Err(error))),
            Ok(pager) => {
                let shared = Arc::clone(&pager.on_exit.shared);
                drop(reply.send(Ok(shared)));
                // As a task, and not as the future of block_on: waking that one costs an epoll_wait more.
                // After a panic `OnExit` has done its work by then, and nobody is left to be told.
                let _ = tokio::spawn(pager.run()).await;
            }
        }
    }
}

/// What pagers run in: the thread that enters it.
///
/// # Errors
/// If there is no descriptor for it.
pub(crate) fn runtime() -> io::Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().thread_name("postcopy-pager-helper").build()
}

impl Pager {
    async fn open(
        address: ServerAddress,
        image: ImageSource,
        options: Options,
        owner: Owner,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Self, SessionError> {
        let (image, lane) = match image {
            ImageSource::Opened(image) => {
                let lane = reach(address.clone(), image.digest(), Duration::ZERO);
                (image, Err(lane))
            }
            ImageSource::Named(reference) => {
                // At the same time: each takes a round trip and more.
                let (image, channel) = tokio::join!(
                    Image::open_with(&address, &reference, false),
                    address.connect(Lane::Demand)
                );
                let image = image?;
                let lane = DemandLane::over(channel?, &address, &image.digest());
                (image, Ok(lane))
            }
        };
        let is_foreign = !matches!(owner, Owner::ThisProcess);
        let shared = Arc::new(owner.share(address, image, options)?);
        let handed_over = shared.to_pager.take_queue();
        let mut pager = Self {
            watched: Vec::new(),
            last_space: None,
            forks: Forks::new(shared.callers.as_ref().map(Callers::owner)),
            is_foreign,
            lane,
            backoff: Backoff::new(),
            requests: Requests::new(Arc::clone(&shared.on_demand)),
            lane_error: None,
            waiters: Waiters::new(shared.options.fault_deadline),
            ready: Ready::default(),
            handed_over,
            lingering: Vec::new(),
            spin: Spin::new(),
            ahead: ReadAhead::new(shared.image.root().chunk_size().bytes()),
            ahead_pace: Pace::new(shared.image.root().chunk_size().bytes()),
            scattered: HashSet::new(),
            usual: Duration::ZERO,
            behind: HashMap::new(),
            broken: None,
            unreadable: None,
            faults: Vec::new(),
            pages: ChunkPages::default(),
            decoder: FrameDecoder::default(),
            frame_cache: FrameCache::new(to_usize(u64::from(shared.options.record_cache_mib) << 20)),
            whole: HashSet::new(),
            commands,
            on_exit: OnExit { shared, is_open: false, in_order: false, leaves: false },
        };
        pager.watch(0, 0).map_err(|source| SessionError::System { what: "epoll", source })?;
        pager.on_exit.is_open = true;
        pager.shared().look_at_children();
        Ok(pager)
    }

    fn shared(&self) -> &Shared {
        &self.on_exit.shared
    }

    /// Serves until all who can ask for something are gone, or the kernel's side fails.
    async fn run(mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        let paced = |period| {
            let mut interval = tokio::time::interval(period);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            interval
        };
        let (mut tick, mut look) = (paced(TICK), paced(LOOK_FOR_OWNERS));
        let mut again = paced(READ_AGAIN);
        loop {
            if let Some(reason) = &self.broken {
                return shared.outcome.report(reason);
            }
            self.send();
            let behind = self.behind.values().copied().max();
            shared.cores.waits(self.requests.wait_since().max(behind).map(Instant::into_std));
            let waits = !self.requests.is_empty();
            let ticks =
                waits || !self.waiters.is_empty() || !self.lingering.is_empty() || shared.outcome.has_open();
            if !ticks {
                // A tick that no wait asked for is not late.
                tick.reset();
            }
            if self.has_ready() {
                self.install_ready();
                // Answers and commands have their turn, whatever events there are.
                tokio::task::yield_now().await;
            }
            let attempt =
                [self.ready.next_attempt(), self.requests.next_attempt()].into_iter().flatten().min();
            let later = attempt.unwrap_or_else(Instant::now);
            let is_ready = self.has_ready();
            // In no order: none of these may starve another.
            tokio::select! {
                readable = readable(&self.watched) => match readable {
                    Err(error) => return shared.outcome.report(&format!("a userfaultfd cannot be watched: {error}")),
                    Ok((watched, readable)) => {
                        let Some(pass) = shared.map.gate.try_enter_alone() else {
                            shared.map.gate.installers_left().await;
                            continue;
                        };
                        let space = Arc::clone(&watched.space);
                        readable.drained();
                        let read = self.read(&space);
                        drop(pass);
                        self.faults();
                        // What another space has to tell may be unreadable still.
                        if let Err(stopped) = read {
                            self.unreadable = self.stopped(stopped);
                        }
                    }
                },
                lane = next_answer(&mut self.lane) => self.lane_answers(lane),
                command = self.commands.recv() => match command {
                    None | Some(Command::End) => return self.on_exit.in_order = true,
                    Some(Command::Leave) => return self.on_exit.leaves = true,
                    Some(command) => self.command(command),
                },
                Some(work) = self.handed_over.recv() => self.ready.hand_over(work),
                looked = self.forks.next() => self.looked(looked),
                () = tokio::time::sleep_until(later), if attempt.is_some() => self.try_ready(),
                () = tokio::task::yield_now(), if is_ready => {}
                _ = again.tick(), if self.unreadable.is_some() => self.read_again(),
                _ = look.tick(), if self.is_foreign => {
                    self.give_up_looks();
                    if !self.owners_are_left() {
                        return self.on_exit.in_order = true;
                    }
                }
                due = tick.tick(), if ticks => {
                    self.release_lingering();
                    self.extend_deadlines(due);
                    self.forget_brought();
                    self.check_deadlines();
                }
                () = tokio::task::yield_now(), if waits && self.spin.is_on(Instant::now()) && !shared.is_filling() => {}
            }
        }
    }

    /// Reads all messages of a space, and keeps its faults. The gate is passed alone.
    fn read(&mut self, space: &Arc<Space>) -> Result<(), Stopped> {
        while self.read_some(space, MESSAGES)? {}
        Ok(())
    }

    /// Reads at most so many messages of a space, and keeps its faults: whether there may be more. The gate is passed
    /// alone.
    fn read_some(&mut self, space: &Arc<Space>, most: usize) -> Result<bool, Stopped> {
        let (mut faults, since) = (Vec::new(), ticks());
        let read = events::read_some(&self.on_exit.shared, space, &mut faults, most);
        add(&self.shared().counters.faults, faults.len());
        // Writes to what is there do not wait for pages.
        if faults.iter().any(|(_, is_write_protected)| !is_write_protected) {
            self.shared().cores.touched(std::time::Instant::now());
        }
        self.faults.extend(faults.into_iter().map(|(address, wp)| (Arc::clone(space), address, wp)));
        self.watch(space.id, since)
            .map_err(|error| format!("the userfaultfd of a child cannot be watched: {error}"))?;
        read
    }

    /// Not all could be read: since when and why that is so, if it may pass.
    fn stopped(&mut self, stopped: Stopped) -> Option<(Instant, String)> {
        let since = self.unreadable.take().map_or_else(Instant::now, |(since, _)| since);
        if !stopped.may_pass || since.elapsed() > self.shared().options.fault_deadline {
            self.broken.get_or_insert(stopped.reason);
            return None;
        }
        // Those of processes that have exited are given back.
        self.owners_are_left();
        Some((since, stopped.reason))
    }

    /// Reads what could not be read before.
    fn read_again(&mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        let Some(pass) = shared.map.gate.try_enter_alone() else { return };
        let spaces: Vec<_> = self.watched.iter().map(|watched| Arc::clone(&watched.space)).collect();
        let read = spaces.iter().try_for_each(|space| self.read(space));
        drop(pass);
        self.faults();
        self.unreadable = match read {
            Ok(()) => None,
            Err(stopped) => self.stopped(stopped),
        };
    }

    /// Forgets the memory of processes that have exited: whether there are others.
    fn owners_are_left(&mut self) -> bool {
        let shared = Arc::clone(&self.on_exit.shared);
        for space in shared.spaces().spaces().filter(|space| space.uffd.is_owner_gone()) {
            space.set_gone();
        }
        for space in shared.spaces().spaces().filter(|space| space.is_gone()) {
            self.change(Change::Forget { space: space.id });
        }
        self.clear_final_children();
        if matches!(shared.options.on_loss, LossPolicy::Kill | LossPolicy::Pause) {
            // A process whose parent has exited is harder to find.
            self.identify();
        }
        self.watched.retain(|watched| !watched.space.is_gone());
        self.forks.has_undecided() || !self.watched.is_empty()
    }

    /// Drops the records of children none of whose pages can become the image's any more: what still faults there is
    /// zero, as memory of no region is. Their descriptors stay: other processes may have them open, too, so that closing
    /// these would end no wait for the pager.
    fn clear_final_children(&mut self) {
        let spaces = self.shared().spaces();
        for child in spaces.spaces().filter(|space| space.id > 0 && spaces.is_final(space.id)) {
            self.change(Change::Clear { space: child.id });
        }
    }

    fn change(&mut self, change: Change) {
        if let Err(error) = self.shared().change(change, None) {
            self.broken.get_or_insert(error.to_string());
        }
    }

    /// Sends what is to be asked for, as far as the lane takes it, and read-ahead as far as it delays no other fault.
    fn send(&mut self) {
        if self.lane.is_err() {
            return;
        }
        let now = Instant::now();
        self.requests.ask_late(now);
        loop {
            let ahead = self.ahead_room(now);
            let Ok(lane) = &self.lane else { return };
            if !self.requests.has_message(ahead) {
                return;
            }
            // Full: it goes on after the next answer. Closed: next_answer says so.
            let Ok(slot) = lane.requests.try_reserve() else { return };
            slot.send(self.requests.message(now, ahead));
        }
    }

    /// How many chunks may be asked for ahead.
    fn ahead_room(&mut self, now: Instant) -> usize {
        let Some(under_way) = self.requests.ahead_under_way() else { return 0 };
        let requests = &self.requests;
        self.scattered.retain(|chunk| requests.has_chunk(*chunk));
        let chunk_bytes = self.on_exit.shared.image.root().chunk_size().bytes();
        let is_waited_for = !self.scattered.is_empty();
        let window = self.ahead_pace.window(under_way * chunk_bytes, is_waited_for, now.into_std());
        (window / chunk_bytes).saturating_sub(under_way)
    }

    fn lane_answers(&mut self, next: NextAnswer) {
        match next {
            NextAnswer::Connected(lane) => {
                (self.lane, self.lane_error) = (Ok(lane), None);
                self.requests.ask_all_again();
            }
            NextAnswer::Lost(reason) => {
                self.lane_error = reason.or(self.lane_error.take());
                self.reconnect();
            }
            NextAnswer::Answer(answer) => {
                self.backoff.reset();
                match answer.answer {
                    Some(Answer::Chunk(chunk)) => self.answer(&chunk),
                    Some(Answer::Segment(segment)) => self.segment_answer(&segment),
                    None => {}
                }
            }
        }
    }

    /// Gets another lane, in the background; the faults' deadlines go on.
    fn reconnect(&mut self) {
        let pause = self.backoff.pause();
        self.lane = Err(reach(self.shared().address.clone(), self.shared().image.digest(), pause));
    }

    /// Forgets requests whose pages the fill has brought instead: these are not lost when no answer comes.
    fn forget_brought(&mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        if shared.fills() {
            let is_absent = |region: &Region, chunk| {
                let pages = region.pages_of(chunk).expect("a region of the chunk");
                region.next_run(region.whole(&pages), &[PageState::Absent]).is_some()
            };
            self.requests.forget_brought(|chunk| {
                !shared.of_chunk(chunk).iter().any(|region| is_absent(region, chunk))
            });
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Map { region, reply } => {
                let registered = region.space.uffd.register(region.address(0), region.len());
                if registered.is_ok() {
                    if let Some(recorder) = &self.shared().recorder {
                        recorder.has(&self.shared().image, std::iter::once(region.clone()));
                    }
                    self.shared().add_region(&region);
                }
                // The program waits for it, in `Session::map`.
                let _ = reply.try_send(registered);
            }
            Command::End | Command::Leave => unreachable!("the loop ends with it"),
            Command::Unmap { region, memory } => self.unmap(&region, memory),
            Command::Bring { region, pages } => {
                let recorder = self.shared().recorder.is_some();
                let mut next = pages.start;
                while let Some(run) = region.next_run(next..pages.end, &[PageState::Absent]) {
                    let chunk = region.chunk_of(run.start);
                    if recorder {
                        self.bring_recorded(&region, chunk, &pages);
                    }
                    let at = region.whole_addresses(run.start).start;
                    self.waiters.add(&region.space, at, Wait::Call, Instant::now());
                    self.ask(&region, run.start);
                    // One page of each chunk will do.
                    next = region.pages_of(chunk).map_or(run.end, |pages| pages.end);
                }
            }
        }
    }

    /// In record mode: these pages, as far as they are of the chunk, count as touched, and the chunk comes as a whole.
    fn bring_recorded(&mut self, region: &Region, chunk: ChunkIndex, pages: &std::ops::Range<usize>) {
        let of_chunk = region.pages_of(chunk).expect("a page of the region");
        if let Some(recorder) = &self.shared().recorder {
            let image = &self.shared().image;
            recorder.touched(image, region, of_chunk.start.max(pages.start)..of_chunk.end.min(pages.end));
            recorder.brought(image, region, of_chunk);
        }
        self.frame_cache.forget(chunk);
        self.whole.insert(chunk);
    }

    /// Lets go of a region. Its memory is never unmapped while it is registered: that would wait for this thread.
    fn unmap(&mut self, region: &Region, memory: crate::uffd::memory::Memory) {
        let shared = Arc::clone(&self.on_exit.shared);
        // Whoever still touches it by a stray pointer is stopped, and never sees zeros.
        let forbidden = crate::uffd::memory::forbid(memory.start(), memory.len());
        let unregistered = region.space.uffd.unregister(memory.start(), memory.len());
        // By address: a stray mremap or munmap may have made parts of it.
        let addresses = memory.start()..memory.start() + memory.len();
        self.change(Change::Unmap { space: region.space.id, addresses });
        self.requests.forget(region, &shared.spaces());
        if forbidden.is_ok() && unregistered.is_ok() {
            // Giving back many pages takes long.
            reaper::give_back(&shared, memory);
        } else {
            std::mem::forget(memory);
            self.shared()
                .outcome
                .report("a region could not be unregistered; its address space is not given back");
        }
    }
}

/// The first of the spaces whose userfaultfd has messages.
async fn readable(watched: &[Watched]) -> io::Result<(&Watched, Readable<'_>)> {
    std::future::poll_fn(|context| {
        for watched in watched {
            if let Poll::Ready(readable) = watched.uffd.poll_readable(context) {
                return Poll::Ready(readable.map(|readable| (watched, readable)));
            }
        }
        Poll::Pending
    })
    .await
}

/// What the lane, or the attempt to get one, gives next.
enum NextAnswer {
    Answer(v1::FetchChunksResponse),
    /// With the reason, where a new one could not be had.
    Lost(Option<String>),
    Connected(DemandLane),
}

async fn next_answer(
    lane: &mut Result<DemandLane, oneshot::Receiver<Result<DemandLane, RemoteError>>>,
) -> NextAnswer {
    match lane {
        Ok(lane) => lane.answer().await.map_or(NextAnswer::Lost(None), NextAnswer::Answer),
        Err(coming) => match coming.await {
            Ok(Ok(lane)) => NextAnswer::Connected(lane),
            Ok(Err(error)) => NextAnswer::Lost(Some(error.to_string())),
            Err(_) => NextAnswer::Lost(None),
        },
    }
}

/// Opens a lane after a pause.
fn reach(
    address: ServerAddress,
    image: Digest,
    pause: Duration,
) -> oneshot::Receiver<Result<DemandLane, RemoteError>> {
    let (sender, receiver) = oneshot::channel();
    // Ends with the runtime at the latest.
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        // The session may have ended.
        let _ = sender.send(DemandLane::open(&address, &image).await);
    });
    receiver
}
