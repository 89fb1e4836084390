//! The pager: the one thread that answers a session's faults.
//!
//! The thread runs a current-thread runtime that owns the userfaultfd, the demand stream and its
//! connection, so that the way from reading a fault to UFFDIO_COPY crosses no thread. The way of a
//! page:
//!
//! 1. [`Pager::read`] reads the messages: it applies events to the page states at once
//!    ([`events`]), and collects faults.
//! 2. [`Pager::fault`] looks up the page's state. It requests the chunk of an absent page
//!    ([`Pager::ask`]), once.
//! 3. [`Pager::answer`] takes the server's answer and verifies the chunk against the image's
//!    digest.
//! 4. [`Pager::install`] installs the pages in every region that has them, of the processes that
//!    wait for them. That wakes the waiters.
//!
//! A faulting thread may hold any lock of the program. So the pager takes no lock that the program
//! can hold, writes no log, and accesses no region's memory. However the pager ends, [`OnExit`]
//! first makes unresolved pages raise SIGBUS, or leaves them to a successor.

mod answers;
pub(crate) mod attach;
mod bring;
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
mod silence;
mod spin;
mod waiters;

use crate::error::SessionError;
use crate::install::hand_over::HandedOver;
use crate::memory::ChunkPages;
use crate::memory::{Change, PageState, Region, Space};
use crate::options::Options;
use crate::options::add;
use crate::pace::Pace;
use crate::pager::attach::Owner;
use crate::pager::frame_cache::FrameCache;
use crate::pager::on_exit::OnExit;
use crate::pager::read_ahead::ReadAhead;
use crate::pager::requests::Requests;
use crate::pager::silence::Silence;
use crate::pager::spin::Spin;
use crate::processes::{Callers, ticks};
use crate::reaper;
use crate::remote::Image;
use crate::remote::ImageSource;
use crate::remote::backoff::Backoff;
use crate::remote::lane::DemandLane;
use crate::remote::{Purpose, RemoteError, ServerAddress};
use crate::shared::{Command, Shared};
use crate::state_file::MESSAGES;
use crate::uffd::{AsyncUffd, Readable};
use crate::usual::Usual;
use bring::Brings;
use events::{READINGS, Stopped};
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

/// The longest time that opening a session may take.
const OPEN: Duration = Duration::from_secs(30);
/// Interval of the checks for deadlines.
const TICK: Duration = Duration::from_millis(100);
/// Interval of the checks for exited owners of the memory, which their userfaultfds do not report.
const LOOK_FOR_OWNERS: Duration = Duration::from_millis(250);
/// Pause before the pager reads messages again for which it lacked a descriptor or memory.
const READ_AGAIN: Duration = Duration::from_millis(20);
/// The latency of answers below which the pager requests a chunk although the fill has requested
/// it.
const NEAR: Duration = Duration::from_millis(1);
/// The latency of answers that a new pager assumes, and the share by which each answer moves it.
const ASSUMED: Duration = Duration::from_micros(50);
const USUAL_STEP: f64 = 0.125;

/// The pager of a session, as the module describes it.
#[derive(Debug)]
pub(crate) struct Pager {
    on_exit: OnExit,
    watched: Vec<Watched>,
    /// The id of the last space that was added.
    last_space: Option<u32>,
    /// The undecided children.
    forks: Forks,
    /// True if the memory belongs to other processes.
    is_foreign: bool,
    lane: Result<DemandLane, oneshot::Receiver<Result<DemandLane, RemoteError>>>,
    /// The reason for which the last lane was lost or not opened, until the server answers.
    lane_error: Option<String>,
    /// The back-off of attempts to reach a lost server.
    backoff: Backoff,
    /// The time for which the lane has said nothing.
    silence: Silence,
    requests: Requests,
    ready: Ready,
    /// The faults and calls that wait for pages.
    waiters: Waiters,
    brings: Brings,
    handed_over: mpsc::Receiver<HandedOver>,
    /// Threads that did not stop in time while the pager tried to hold them. They are still to be
    /// released.
    lingering: Vec<nix::unistd::Pid>,
    spin: Spin,
    ahead: ReadAhead,
    /// The pace of read-ahead, which keeps it from delaying faults that continue no stream.
    ahead_pace: Pace,
    /// The outstanding chunks of such faults.
    scattered: HashSet<ChunkIndex>,
    /// The number of them that were answered in a row, and the time of the last answer.
    scattered_run: (usize, Option<Instant>),
    /// The usual latency of an answer of late.
    usual: Usual,
    /// Chunks that the fill has requested and that have waiters, with the time since which they
    /// wait.
    behind: HashMap<ChunkIndex, Instant>,
    /// The reason for which the session cannot continue, for example an event that it cannot apply.
    broken: Option<String>,
    /// True if a reading has left messages, which the runtime does not report again.
    has_more: bool,
    /// The time since which an event cannot be read, and the reason.
    unreadable: Option<(Instant, String)>,
    /// Faults that were read and not yet handled: space, address, and true if the page is
    /// write-protected.
    faults: Vec<(Arc<Space>, usize, bool)>,
    pages: ChunkPages,
    decoder: FrameDecoder,
    /// In record mode: chunks whose pages are installed one by one, at their faults.
    frame_cache: FrameCache,
    /// In record mode: chunks that are to be installed whole.
    whole: HashSet<ChunkIndex>,
    // This field is dropped last: the memory of an unmap command in it must have been unregistered
    // before it is unmapped.
    commands: mpsc::Receiver<Command>,
}

/// A space and its userfaultfd, as the runtime watches it.
#[derive(Debug)]
struct Watched {
    space: Arc<Space>,
    uffd: AsyncUffd,
}

/// The input of a new pager. The pager connects, opens the image, and opens the userfaultfd, in
/// this order, so that it registers no memory before it can request pages.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) address: ServerAddress,
    pub(crate) image: ImageSource,
    pub(crate) options: Options,
    pub(crate) owner: Owner,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Receives the result of opening the session.
    pub(crate) reply: std::sync::mpsc::SyncSender<Result<Arc<Shared>, SessionError>>,
}

impl Start {
    /// Serves the session in a new thread.
    ///
    /// # Errors
    /// If the process cannot start a thread or open descriptors.
    pub(crate) fn in_a_thread(self) -> io::Result<()> {
        let runtime = runtime()?;
        let thread = std::thread::Builder::new().name("postcopy-pager".into());
        thread.spawn(move || runtime.block_on(self.serve())).map(drop)
    }

    /// Serves until the session's end.
    pub(crate) async fn serve(self) {
        let Self { address, image, options, owner, commands, reply } = self;
        let opened = Pager::open(address.clone(), image, options, owner, commands);
        // Each part of the opening has its own limit. This one is the promise of `Session::open`.
        let opened = match tokio::time::timeout(OPEN, opened).await {
            Ok(opened) => opened,
            Err(_) => Err(address.wrong("session", format!("not open within {OPEN:?}")).into()),
        };
        match opened {
            Err(error) => drop(reply.send(Err(error))),
            Ok(pager) => {
                let shared = Arc::clone(&pager.on_exit.shared);
                drop(reply.send(Ok(shared)));
                // The pager runs as a task, because waking the future of `block_on` costs one more
                // epoll_wait. After a panic `OnExit` has done its work by now, and no caller waits
                // for the result.
                let _ = tokio::spawn(pager.run()).await;
            }
        }
    }
}

/// Makes the runtime of a pager, which runs in the thread that enters it.
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
                // Both run at the same time, because each takes at least a round trip.
                let (image, channel) = tokio::join!(
                    Image::open_with(&address, &reference, false),
                    address.connect(Purpose::Demand)
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
            silence: Silence::new(shared.image.root().chunk_size().bytes()),
            requests: Requests::new(Arc::clone(&shared.on_demand)),
            lane_error: None,
            waiters: Waiters::new(shared.options.fault_deadline),
            brings: Brings::default(),
            ready: Ready::default(),
            handed_over,
            lingering: Vec::new(),
            spin: Spin::new(),
            ahead: ReadAhead::new(shared.image.root().chunk_size().bytes()),
            ahead_pace: Pace::new(shared.image.root().chunk_size().bytes()),
            scattered: HashSet::new(),
            scattered_run: (0, None),
            usual: Usual::assumed(ASSUMED, USUAL_STEP),
            behind: HashMap::new(),
            broken: None,
            has_more: false,
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

    /// Serves until all senders of commands are gone, all owners of foreign memory have exited, or
    /// the kernel's side fails.
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
            self.bring_more();
            self.send();
            let behind = self.behind.values().copied().max();
            shared.cores.waits(self.requests.wait_since().max(behind).map(Instant::into_std));
            let waits = !self.requests.is_empty();
            let ticks =
                waits || !self.waiters.is_empty() || !self.lingering.is_empty() || shared.outcome.has_open();
            if !ticks {
                // The tick is not late if nothing waited for it.
                tick.reset();
            }
            if self.has_ready() {
                self.install_ready();
                // Answers and commands have their turn, no matter how many events there are.
                tokio::task::yield_now().await;
            }
            let attempt =
                [self.ready.next_attempt(), self.requests.next_attempt()].into_iter().flatten().min();
            let later = attempt.unwrap_or_else(Instant::now);
            let is_ready = self.has_ready();
            // The branches have no fixed order: none of them may starve another.
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
                        // The messages of another space may still be unreadable.
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
                // Other spaces, answers and commands have their turn in between.
                () = tokio::task::yield_now(), if self.has_more => self.read_again(),
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
                    self.check_silence();
                    self.forget_brought();
                    self.check_deadlines();
                }
                () = tokio::task::yield_now(), if waits && self.spin.is_on(Instant::now()) && !shared.is_filling() => {}
            }
        }
    }

    /// Reads the messages of a space, and collects its faults. Notes it in `has_more` if there may
    /// be more messages after [`READINGS`]. The caller is alone in the gate.
    fn read(&mut self, space: &Arc<Space>) -> Result<(), Stopped> {
        for _ in 0..READINGS {
            if !self.read_some(space, MESSAGES)? {
                return Ok(());
            }
        }
        self.has_more = true;
        Ok(())
    }

    /// Reads at most `most` messages of a space, and collects its faults. Returns true if there may
    /// be more. The caller is alone in the gate.
    fn read_some(&mut self, space: &Arc<Space>, most: usize) -> Result<bool, Stopped> {
        let (mut faults, since) = (Vec::new(), ticks());
        let read = events::read_some(&self.on_exit.shared, space, &mut faults, most);
        add(&self.shared().counters.faults, faults.len());
        // Faults of write protection do not wait for pages.
        if faults.iter().any(|(_, is_write_protected)| !is_write_protected) {
            self.shared().cores.touched(std::time::Instant::now());
        }
        self.faults.extend(faults.into_iter().map(|(address, wp)| (Arc::clone(space), address, wp)));
        self.watch(space.id, since)
            .map_err(|error| format!("the userfaultfd of a child cannot be watched: {error}"))?;
        read
    }

    /// Handles a reading that has stopped early. Returns the time since which the reason lasts, and
    /// the reason, if it may pass.
    fn stopped(&mut self, stopped: Stopped) -> Option<(Instant, String)> {
        let since = self.unreadable.take().map_or_else(Instant::now, |(since, _)| since);
        if !stopped.may_pass || since.elapsed() > self.shared().options.fault_deadline {
            self.broken.get_or_insert(stopped.reason);
            return None;
        }
        // This releases the descriptors of processes that have exited.
        self.owners_are_left();
        Some((since, stopped.reason))
    }

    /// Reads the messages of all spaces again, after a reading has stopped early.
    fn read_again(&mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        let Some(pass) = shared.map.gate.try_enter_alone() else { return };
        self.has_more = false;
        let spaces: Vec<_> = self.watched.iter().map(|watched| Arc::clone(&watched.space)).collect();
        // A space whose messages are unreadable keeps no other from being read.
        let mut stopped = None;
        for space in &spaces {
            stopped = stopped.or(self.read(space).err());
        }
        drop(pass);
        self.faults();
        self.unreadable = stopped.and_then(|stopped| self.stopped(stopped));
    }

    /// Forgets the memory of processes that have exited. Returns true if others are left.
    fn owners_are_left(&mut self) -> bool {
        let shared = Arc::clone(&self.on_exit.shared);
        for space in shared.spaces().spaces().filter(|space| space.uffd.is_owner_gone()) {
            space.set_gone();
        }
        for space in shared.spaces().spaces().filter(|space| space.is_gone()) {
            self.change(Change::Forget { space: space.id });
        }
        self.clear_final_children();
        self.watched.retain(|watched| !watched.space.is_gone());
        self.forks.has_undecided() || !self.watched.is_empty()
    }

    /// Drops the records of children none of whose pages can become the image's any more. Later
    /// faults there get zeros, as in memory of no region. The children's descriptors stay open:
    /// other processes may have them open, too, and then closing them here would end no wait for
    /// the pager.
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

    /// Sends the pending requests as far as the lane takes them, and read-ahead as far as it delays
    /// no other fault.
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
            // If the queue is full, sending continues after the next answer. If it is closed,
            // `next_answer` reports that.
            let Ok(slot) = lane.requests.try_reserve() else { return };
            slot.send(self.requests.message(now, ahead));
        }
    }

    /// Returns the number of chunks that may be requested ahead.
    fn ahead_room(&mut self, now: Instant) -> usize {
        let Some(under_way) = self.requests.ahead_under_way() else { return 0 };
        let requests = &self.requests;
        self.scattered.retain(|chunk| requests.has_chunk(*chunk));
        let chunk_bytes = self.on_exit.shared.image.root().chunk_size().bytes();
        let has_pending_fault = !self.scattered.is_empty();
        let window = self.ahead_pace.window(under_way * chunk_bytes, has_pending_fault, now.into_std());
        (window / chunk_bytes).saturating_sub(under_way)
    }

    fn lane_answers(&mut self, next: NextAnswer) {
        match next {
            NextAnswer::Connected(lane) => {
                self.lane = Ok(lane);
                self.requests.ask_all_again();
            }
            NextAnswer::Lost(reason) => {
                self.lane_error = reason.or(self.lane_error.take());
                self.reconnect();
            }
            NextAnswer::Answer(answer) => {
                self.backoff.reset();
                self.silence.ends();
                self.lane_error = None;
                match answer.answer {
                    Some(Answer::Chunk(chunk)) => self.answer(&chunk),
                    Some(Answer::Segment(segment)) => self.segment_answer(&segment),
                    None => {}
                }
            }
        }
    }

    /// Gives up the lane if it has been silent for too long while pages are awaited.
    fn check_silence(&mut self) {
        let is_awaited = self.lane.is_ok() && self.requests.wait_since().is_some();
        if let Some(silence) = self.silence.tick(is_awaited, self.requests.awaits_segment()) {
            self.lane_answers(NextAnswer::Lost(Some(format!("it has sent nothing for {silence:?}"))));
        }
    }

    /// Opens another lane in the background. The faults' deadlines do not stop meanwhile.
    fn reconnect(&mut self) {
        let pause = self.backoff.pause();
        self.lane = Err(reach(self.shared().address.clone(), self.shared().image.digest(), pause));
    }

    /// Forgets requests whose pages the fill has installed meanwhile, so that a missing answer does
    /// not make them lost.
    fn forget_brought(&mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        if shared.fills() {
            let is_absent = |region: &Region, chunk| {
                let pages = region.pages_of_chunk(chunk).expect("a region of the chunk");
                region.next_run(region.extend_to_kernel_pages(&pages), &[PageState::Absent]).is_some()
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
                // The program waits for this in `Session::map`.
                let _ = reply.try_send(registered);
            }
            Command::End | Command::Leave => unreachable!("the loop ends with it"),
            Command::Unmap { region, memory } => self.unmap(&region, memory),
            Command::Bring { region, pages } => self.bring(region, pages),
        }
    }

    /// Unregisters a region and gives its memory to the reaper. Memory is never unmapped while it
    /// is registered, because unmapping would wait for this thread.
    fn unmap(&mut self, region: &Region, memory: crate::uffd::memory::Memory) {
        let shared = Arc::clone(&self.on_exit.shared);
        // An access by a stray pointer raises a signal, and never reads zeros.
        let forbidden = crate::uffd::memory::forbid(memory.start(), memory.len());
        let unregistered = region.space.uffd.unregister(memory.start(), memory.len());
        // The region is found by its addresses, because a stray mremap or munmap may have split it.
        let addresses = memory.start()..memory.start() + memory.len();
        self.change(Change::Unmap { space: region.space.id, addresses });
        self.requests.forget(region, &shared.spaces());
        if forbidden.is_ok() && unregistered.is_ok() {
            // The reaper frees the memory, because freeing many pages takes long.
            reaper::give_back(&shared, memory);
        } else {
            std::mem::forget(memory);
            self.shared()
                .outcome
                .report("a region could not be unregistered; its address space is not given back");
        }
    }
}

/// Waits for messages of a space. Returns the first space whose userfaultfd has any.
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

/// The next outcome of the lane, or of the attempt to open one.
enum NextAnswer {
    Answer(v1::FetchChunksResponse),
    /// The lane is lost, or a new one could not be opened, for this reason.
    Lost(Option<String>),
    Connected(DemandLane),
}

async fn next_answer(
    lane: &mut Result<DemandLane, oneshot::Receiver<Result<DemandLane, RemoteError>>>,
) -> NextAnswer {
    match lane {
        Ok(lane) => match lane.answer().await {
            Ok(Some(answer)) => NextAnswer::Answer(answer),
            Ok(None) => NextAnswer::Lost(None),
            Err(error) => NextAnswer::Lost(Some(error.to_string())),
        },
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
    // The task ends with the runtime at the latest.
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        // If the session has ended, there is no receiver.
        let _ = sender.send(DemandLane::open(&address, &image).await);
    });
    receiver
}
