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
//! log, and touches no region's memory. Whatever way it ends, [`WayOut`] first makes what is unresolved SIGBUS, or
//! leaves it to a successor.

use crate::ahead::Ahead;
use crate::attach::Owner;
use crate::chunk::ChunkPages;
use crate::events::{self, Stopped};
use crate::huge;
use crate::image::{Content, Image};
use crate::install::{self, Installed};
use crate::kept::Kept;
use crate::lane::{DemandLane, frame_of, may_pass};
use crate::page_state::PageState;
use crate::region::RegionState;
use crate::remote::{Lane, SegmentRefused, ServerAddress, take_segment};
use crate::requests::{Late, Refused, Requests};
use crate::session::{Command, ImageSource, LossPolicy, Options, SessionError, Shared, add};
use crate::space::{Space, Spaces};
use crate::spin::Spin;
use crate::uffd::{AsyncUffd, HUGE_BYTES, Outcome, Readable, SharedAt};
use crate::way_out::WayOut;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy_proto::v1::{self, fetch_chunks_response::Answer};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// How long opening a session may take.
const OPEN: Duration = Duration::from_secs(30);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often it is looked whether the memory's owners are still there: their userfaultfds do not tell.
const LOOK_FOR_OWNERS: Duration = Duration::from_secs(1);
/// How soon messages are read again for which there was no descriptor or memory.
const READ_AGAIN: Duration = Duration::from_millis(20);
/// How soon an install is tried again that the kernel put off.
const RETRY: Duration = Duration::from_millis(1);
/// What answers take at most, where the server is well.
const FAR: Duration = Duration::from_millis(200);
/// Pauses between attempts to reach a server that was lost; the first one again once it has answered something.
const RECONNECT: std::ops::Range<Duration> = Duration::from_millis(10)..Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct Pager {
    way_out: WayOut,
    watched: Vec<Watched>,
    /// The memory is other processes'.
    is_foreign: bool,
    lane: Result<DemandLane, oneshot::Receiver<DemandLane>>,
    /// Before the next attempt to reach a server that was lost.
    reconnect_pause: Duration,
    requests: Requests,
    /// Faults on zero and removed pages that the kernel put off: by space and address, each with its deadline.
    put_off: BTreeMap<(u32, usize), (Arc<Space>, Instant)>,
    spin: Spin,
    ahead: Ahead,
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
    kept: Kept,
    /// In record mode: chunks that are wanted as a whole.
    whole: HashSet<ChunkIndex>,
    // Dropped last: memory that waits in it to be unmapped must have been unregistered.
    commands: mpsc::Receiver<Command>,
}

/// What becomes of a fault that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Poison,
    Wait,
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
                let shared = Arc::clone(&pager.way_out.shared);
                drop(reply.send(Ok(shared)));
                // As a task, and not as the future of block_on: waking that one costs an epoll_wait more.
                // After a panic `WayOut` has done its work by then, and nobody is left to be told.
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
                let lane = DemandLane::over(channel?, &address, &image.digest()).await?;
                (image, Ok(lane))
            }
        };
        let is_foreign = !matches!(owner, Owner::ThisProcess);
        let shared = Arc::new(owner.share(address, image, options)?);
        let mut pager = Self {
            watched: Vec::new(),
            is_foreign,
            lane,
            reconnect_pause: RECONNECT.start,
            requests: Requests::new(shared.options.fault_deadline, Arc::clone(&shared.on_demand)),
            put_off: BTreeMap::new(),
            spin: Spin::new(),
            ahead: Ahead::new(shared.image.root().chunk_size().bytes()),
            usual: Duration::ZERO,
            behind: HashMap::new(),
            broken: None,
            unreadable: None,
            faults: Vec::new(),
            pages: ChunkPages::default(),
            decoder: FrameDecoder::default(),
            kept: Kept::default(),
            whole: HashSet::new(),
            commands,
            way_out: WayOut { shared, is_open: false, in_order: false, leaves: false },
        };
        pager.watch().map_err(|source| SessionError::System { what: "epoll", source })?;
        pager.way_out.is_open = true;
        Ok(pager)
    }

    /// Watches the spaces that there are.
    fn watch(&mut self) -> io::Result<()> {
        let spaces = self.shared().spaces();
        self.watched.retain(|watched| !watched.space.is_gone());
        // They only come at the end.
        let last = self.watched.last().map(|watched| watched.space.id);
        for space in spaces.spaces().iter().filter(|space| last.is_none_or(|last| space.id > last)) {
            let uffd = AsyncUffd::new(Arc::clone(&space.uffd))?;
            self.watched.push(Watched { space: Arc::clone(space), uffd });
        }
        Ok(())
    }

    fn shared(&self) -> &Shared {
        &self.way_out.shared
    }

    /// Serves until all who can ask for something are gone, or the kernel's side fails.
    async fn run(mut self) {
        let shared = Arc::clone(&self.way_out.shared);
        let paced = |period| {
            let mut interval = tokio::time::interval(period);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            interval
        };
        let (mut tick, mut retry, mut look) = (paced(TICK), paced(RETRY), paced(LOOK_FOR_OWNERS));
        let mut again = paced(READ_AGAIN);
        loop {
            if let Some(reason) = &self.broken {
                return shared.report(reason);
            }
            self.send();
            let waits = !self.requests.is_empty();
            let put_off = self.requests.has_put_off() || !self.put_off.is_empty();
            tokio::select! {
                biased;
                readable = readable(&self.watched) => match readable {
                    Err(error) => return shared.report(&format!("a userfaultfd cannot be watched: {error}")),
                    Ok((watched, readable)) => {
                        let Some(pass) = shared.gate.try_enter_alone() else {
                            shared.gate.installers_left().await;
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
                    None | Some(Command::End) => return self.way_out.in_order = true,
                    Some(Command::Leave) => return self.way_out.leaves = true,
                    Some(command) => self.command(command),
                },
                _ = retry.tick(), if put_off => self.retry_put_off(),
                _ = again.tick(), if self.unreadable.is_some() => self.read_again(),
                _ = look.tick(), if self.is_foreign => if !self.owners_are_left() {
                    return self.way_out.in_order = true;
                },
                _ = tick.tick(), if waits => self.check_deadlines(),
                () = tokio::task::yield_now(), if waits && self.spin.is_on(Instant::now()) && !shared.is_filling() => {}
            }
        }
    }

    /// Reads what a space has to tell, and keeps its faults. The gate is passed alone.
    fn read(&mut self, space: &Arc<Space>) -> Result<(), Stopped> {
        let mut faults = Vec::new();
        let read = events::read(&self.way_out.shared, space, &mut faults);
        add(&self.shared().counters.faults, faults.len());
        self.faults.extend(faults.into_iter().map(|(address, wp)| (Arc::clone(space), address, wp)));
        self.watch().map_err(|error| format!("the userfaultfd of a child cannot be watched: {error}"))?;
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
        let shared = Arc::clone(&self.way_out.shared);
        let Some(pass) = shared.gate.try_enter_alone() else { return };
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
        let shared = Arc::clone(&self.way_out.shared);
        let spaces = shared.spaces();
        for space in spaces.spaces().iter().filter(|space| space.uffd.is_owner_gone()) {
            space.set_gone();
        }
        if spaces.spaces().iter().any(|space| space.is_gone()) {
            self.change_spaces(Spaces::forget_gone);
            self.watched.retain(|watched| !watched.space.is_gone());
        }
        !self.watched.is_empty()
    }

    fn change_spaces(&mut self, change: impl FnOnce(&mut Spaces)) {
        let mut spaces = self.shared().spaces();
        change(Arc::make_mut(&mut spaces));
        if let Err(error) = self.shared().set_spaces(spaces, None) {
            self.broken.get_or_insert(error.to_string());
        }
    }

    fn faults(&mut self) {
        let mut faults = std::mem::take(&mut self.faults);
        for (space, address, is_protected) in faults.drain(..) {
            match is_protected {
                true => self.first_write(&space, address),
                false => self.fault(&space, address),
            }
        }
        // Its memory is kept; poisoning may have read others.
        faults.append(&mut self.faults);
        self.faults = faults;
    }

    /// Sees to it that a touched page comes.
    fn fault(&mut self, space: &Arc<Space>, address: usize) {
        let spaces = self.shared().spaces();
        let Some((region, page)) = spaces.at(space, address) else {
            return self.fault_outside(space, address);
        };
        // Of a page of 2 MiB parts may be removed, and absent ones be left.
        let absent = region.next_run(region.whole(&(page..page + 1)), &[PageState::Absent]);
        match absent.map_or_else(|| region.state(page), |_| PageState::Absent) {
            PageState::Absent => {
                if let Some(recorder) = &self.shared().recorder {
                    recorder.touched(&self.shared().image, region, region.whole(&(page..page + 1)));
                }
                self.ask(region, page);
            }
            // A resident page is there: another thread's fault was answered since, and this one is woken. If it is not
            // there, its owner has dropped it without being asked to tell, and it is zero, too.
            PageState::Removed | PageState::Resident if region.gathering().is_some() => {
                self.zero_huge(&Arc::clone(region), page);
            }
            PageState::Removed | PageState::Resident => self.zero(space, address),
            PageState::Poisoned => {
                let addresses = region.whole_addresses(page);
                match space.uffd.poison(addresses.start, addresses.len()) {
                    Outcome::Deferred | Outcome::NoMemory => self.put_off(space, address),
                    _ => space.uffd.wake(addresses.start, addresses.len()),
                }
            }
        }
    }

    /// Somebody writes to a page that is protected: the page tables note that.
    fn first_write(&mut self, space: &Arc<Space>, address: usize) {
        let spaces = self.shared().spaces();
        let page = spaces.at(space, address).map(|(region, page)| region.whole_addresses(page));
        let page = page.unwrap_or(address..address + PAGE_BYTES);
        match space.uffd.unprotect(page.clone()) {
            Outcome::OwnerGone => space.set_gone(),
            // By a touch of what is there: that wakes, and the message comes again.
            Outcome::Deferred => self.put_off(space, address),
            _ => space.uffd.wake(page.start, page.len()),
        }
    }

    /// A fault on memory of no region: what a region has left behind, or has grown by, or what is not mapped any more.
    fn fault_outside(&mut self, space: &Arc<Space>, address: usize) {
        let mut spaces = self.shared().spaces();
        if !Arc::make_mut(&mut spaces).take_back(space, address) {
            if !spaces.has_shared() {
                return self.zero(space, address);
            }
            let page_bytes = if spaces.has_huge() { HUGE_BYTES } else { PAGE_BYTES };
            return match space.uffd.shared_at(address, page_bytes) {
                SharedAt::Private => self.zero(space, address),
                SharedAt::Absent => self.lose_outside(space, address),
                SharedAt::There => space.uffd.wake(address, PAGE_BYTES),
                SharedAt::NotNow => self.put_off(space, address),
            };
        }
        if let Err(error) = self.shared().set_spaces(Arc::clone(&spaces), None) {
            self.broken.get_or_insert(error.to_string());
            return;
        }
        // Not again: where other memory is now, nothing was taken back.
        match spaces.at(space, address) {
            Some(_) => self.fault(space, address),
            None => self.zero(space, address),
        }
    }

    /// A fault on what shared memory has grown by, which the session was not told of: zeros would be so for all who have it
    /// mapped.
    fn lose_outside(&mut self, space: &Arc<Space>, address: usize) {
        let shared = Arc::clone(&self.way_out.shared);
        shared.report(&format!("shared memory at {address:#x} is beyond what the session was told of"));
        match space.uffd.poison(address, PAGE_BYTES) {
            Outcome::Deferred | Outcome::NoMemory => return self.put_off(space, address),
            Outcome::Gone => {
                if let Some(first) = self.huge_outside(space, address) {
                    let _ = space.uffd.poison(first, HUGE_BYTES);
                }
            }
            _ => {}
        }
        space.uffd.wake(address, PAGE_BYTES);
    }

    /// Installs a page of zeros at an address that nothing of the image belongs to.
    fn zero(&mut self, space: &Arc<Space>, address: usize) {
        match space.counted(space.uffd.zero(address, PAGE_BYTES)) {
            Outcome::Done | Outcome::Partial { .. } => {}
            Outcome::OwnerGone => space.set_gone(),
            Outcome::AlreadyPresent => {
                // Or a mark is in the way that a child has inherited from memory that is tracked.
                if self.shared().options.track_writes && !space.uffd.tracks() {
                    let _ = space.uffd.unprotect(address..address + PAGE_BYTES);
                }
                space.uffd.wake(address, PAGE_BYTES);
            }
            Outcome::Gone => {
                if let Some(first) = self.huge_outside(space, address) {
                    let _ = space.counted(space.uffd.copy(first, &huge::ZEROS));
                }
                space.uffd.wake(address, PAGE_BYTES);
            }
            Outcome::Deferred | Outcome::NoMemory => self.put_off(space, address),
        }
    }

    /// The page of 2 MiB that may be at an address which is of no region: where memory of these was moved from, or has
    /// grown, the kernel takes whole ones.
    fn huge_outside(&self, space: &Space, address: usize) -> Option<usize> {
        let spaces = self.shared().spaces();
        let first = address - address % HUGE_BYTES;
        let is_free = spaces.overlapping(space, &(first..first + HUGE_BYTES)).is_empty();
        (spaces.has_huge() && is_free).then_some(first)
    }

    /// The same for a page of 2 MiB.
    fn zero_huge(&mut self, region: &Arc<RegionState>, page: usize) {
        let space = &region.space;
        let addresses = region.whole_addresses(page);
        match space.counted(space.uffd.copy(addresses.start, &huge::ZEROS)) {
            Outcome::Done => {}
            Outcome::OwnerGone => space.set_gone(),
            Outcome::Gone => space.uffd.wake(addresses.start, addresses.len()),
            // It is there, or there was none to be had: whoever waits for it tells.
            Outcome::AlreadyPresent => {
                space.uffd.wake(addresses.start, addresses.len());
                if !region.is_there(page) {
                    self.put_off(space, addresses.start);
                }
            }
            Outcome::Partial { .. } | Outcome::Deferred | Outcome::NoMemory => {
                self.put_off(space, addresses.start);
            }
        }
    }

    /// Asks for what an absent page needs, unless that has been done.
    fn ask(&mut self, region: &Arc<RegionState>, page: usize) {
        let Some(gathering) = region.gathering() else { return self.ask_chunk(region, page) };
        let whole = region.whole(&(page..page + 1));
        let mut next = whole.start;
        let mut missing = Vec::new();
        while next < whole.end {
            let of_chunk = region.pages_of(region.chunk_of(next)).expect("a page of the region");
            let pages = next..of_chunk.end.min(whole.end);
            next = pages.end;
            if !gathering.has(&region.placed(pages.clone())) {
                missing.push(pages.start);
            }
        }
        for page in &missing {
            self.ask_chunk(region, *page);
        }
        // All had come, and could not be installed.
        if missing.is_empty() {
            match huge::install_gathered(region, whole.start) {
                Installed::All => events::wake_mappings(&self.shared().spaces(), region, &whole),
                _ => self.put_off(&region.space, region.address(whole.start)),
            }
        }
    }

    /// Asks for the chunk of an absent page, unless that has been done.
    fn ask_chunk(&mut self, region: &Arc<RegionState>, page: usize) {
        let chunk = region.chunk_of(page);
        let now = Instant::now();
        if !self.requests.waits_for(chunk, &(Arc::clone(region), page), now) {
            self.ask_anew(region, chunk, page, now);
        }
        if self.shared().recorder.is_none() && region.gathering().is_none() {
            self.read_ahead(region, chunk, now);
        }
    }

    /// Asks for what lies ahead of a touched chunk, where touches go forward.
    fn read_ahead(&mut self, region: &Arc<RegionState>, touched: ChunkIndex, now: Instant) {
        let shared = Arc::clone(&self.way_out.shared);
        for chunk in self.ahead.touched(touched.0).map(ChunkIndex) {
            // The region's end.
            let Some(pages) = region.pages_of(chunk) else { break };
            let is_wanted = region.next_run(pages.clone(), &[PageState::Absent]).is_some();
            if is_wanted
                && let Content::Data(digest) = shared.image.content(chunk)
                && !self.requests.has_chunk(chunk)
                && !shared.in_bulk.has(chunk)
            {
                self.requests.add_ahead(chunk, digest, (Arc::clone(region), pages.start), now);
            }
        }
    }

    fn ask_anew(&mut self, region: &Arc<RegionState>, chunk: ChunkIndex, page: usize, now: Instant) {
        if let Some(kept) = self.kept.get(chunk) {
            let installed = install::install_touched(region, chunk, kept, page);
            return self.one_installed(region, chunk, page, installed);
        }
        let waiting = (Arc::clone(region), page);
        match self.shared().image.content(chunk) {
            Content::Data(_) if self.is_coming(chunk, now) => {
                self.put_off(&region.space, region.address(page));
            }
            Content::Data(digest) => {
                self.requests.add_chunk(chunk, digest, waiting, now);
                self.spin.asked(now);
            }
            Content::Zero => self.install_zeros(region, chunk, page),
            Content::SegmentMissing(index) => self.requests.add_segment(index, waiting, now),
            Content::OutOfRange => unreachable!("regions are made from the image's own files"),
        }
    }

    /// Whether the fill has asked for a chunk, and it may come as soon as it would if it was asked for now. Where answers are near
    /// it is asked for in any case.
    fn is_coming(&mut self, chunk: ChunkIndex, now: Instant) -> bool {
        if !self.shared().in_bulk.has(chunk) || self.usual < RETRY {
            return false;
        }
        let since = *self.behind.entry(chunk).or_insert(now);
        now.saturating_duration_since(since) < self.usual.min(self.shared().options.fault_deadline / 4)
    }

    /// Sends what is to be asked for, as far as the lane takes it.
    fn send(&mut self) {
        let Ok(lane) = &self.lane else { return };
        while self.requests.has_message() {
            // Full: it goes on after the next answer. Closed: next_answer says so.
            let Ok(slot) = lane.requests.try_reserve() else { return };
            slot.send(self.requests.message());
        }
    }

    fn lane_answers(&mut self, next: NextAnswer) {
        match next {
            NextAnswer::Connected(lane) => {
                self.lane = Ok(lane);
                self.requests.ask_all_again();
            }
            NextAnswer::Lost => self.reconnect(),
            NextAnswer::Answer(answer) => {
                self.reconnect_pause = RECONNECT.start;
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
        let pause = self.reconnect_pause;
        self.reconnect_pause = (pause * 2).min(RECONNECT.end);
        self.lane = Err(reach(self.shared().address.clone(), self.shared().image.digest(), pause));
    }

    /// Takes the answer for a chunk.
    fn answer(&mut self, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        let Some((digest, _)) = self.requests.chunk(chunk) else { return };
        let is_ahead = self.requests.is_ahead(chunk);
        if !is_ahead {
            self.noted(chunk);
        }
        let frame = match frame_of(answer, &digest) {
            Ok(frame) => frame.clone(),
            Err(no) if no.may_pass => return self.requests.chunk_busy(chunk, no.reason, Instant::now()),
            Err(no) => return self.refuse(chunk, &no.reason),
        };
        let counters = &self.shared().counters;
        add(&counters.demand_chunks, 1);
        add(&counters.read_ahead_chunks, usize::from(is_ahead));
        add(&counters.frame_bytes, frame.len());
        self.install(chunk, frame);
    }

    /// Learns from how long an answer has taken.
    fn noted(&mut self, chunk: ChunkIndex) {
        let now = Instant::now();
        let waited = self.requests.waited_for(chunk, now);
        self.spin.answered(waited);
        // A server that was away for a while says nothing of how far away it is.
        self.usual = (self.usual * 7 + waited.min(FAR)) / 8;
        // The fill looks at it, or not: then this one does not count.
        if let Ok(mut pace) = self.shared().pace.try_lock()
            && let Some(asked_at) = now.checked_sub(waited)
        {
            pace.answered(asked_at.into_std(), now.into_std());
        }
    }

    /// Verifies a chunk's frame and installs its pages.
    fn install(&mut self, chunk: ChunkIndex, frame: Bytes) {
        let Some((digest, (waiting, page))) = self.requests.chunk(chunk) else { return };
        let shared = &self.way_out.shared;
        let decoder = &mut self.decoder;
        if let Err(reason) = self.pages.decode(decoder, &shared.image, &waiting.file, chunk, &digest, &frame)
        {
            return self.refuse(chunk, &reason);
        }
        if self.installs_one(waiting, chunk) {
            let (region, page) = (Arc::clone(waiting), *page);
            let installed = install::install_touched(&region, chunk, &self.pages, page);
            for other in shared.spaces().of_chunk(chunk) {
                other.wake_chunk(chunk);
            }
            self.requests.chunk_done(chunk);
            self.kept.keep(chunk, std::mem::take(&mut self.pages));
            return self.one_installed(&region, chunk, page, installed);
        }
        self.whole.remove(&chunk);
        let is_ahead = self.requests.is_ahead(chunk);
        let mut outcome = Installed::All;
        for region in shared.spaces().of_chunk(chunk) {
            let first = (Arc::ptr_eq(region, waiting) && !is_ahead).then_some(*page);
            match install::install(None, region, chunk, &self.pages, first) {
                Installed::All => {}
                // Whoever waits for it there touches it again, and has a deadline of his own.
                Installed::NoMemory if first.is_none() => region.wake_chunk(chunk),
                installed => outcome = installed,
            }
        }
        match outcome {
            Installed::All => self.requests.chunk_done(chunk),
            Installed::Deferred | Installed::NoMemory => self.requests.put_off(chunk, frame),
            Installed::Ended => unreachable!("the pager itself closes the gate"),
        }
        self.shared().pages_changed();
    }

    /// Whether the touched page alone is installed: what is touched is recorded, at the grain of the kernel's pages.
    fn installs_one(&self, region: &RegionState, chunk: ChunkIndex) -> bool {
        self.shared().recorder.is_some() && region.gathering().is_none() && !self.whole.contains(&chunk)
    }

    /// One page of a chunk that is kept was to be installed.
    fn one_installed(
        &mut self,
        region: &Arc<RegionState>,
        chunk: ChunkIndex,
        page: usize,
        installed: Installed,
    ) {
        match installed {
            Installed::All => {}
            Installed::Deferred | Installed::NoMemory => self.put_off(&region.space, region.address(page)),
            Installed::Ended => unreachable!("the pager itself closes the gate"),
        }
        let spaces = self.shared().spaces();
        let is_absent = |region: &Arc<RegionState>| {
            let pages = region.pages_of(chunk).expect("a region of the chunk");
            region.next_run(pages, &[PageState::Absent]).is_some()
        };
        if !spaces.of_chunk(chunk).any(is_absent) {
            self.kept.forget(chunk);
        }
        self.shared().pages_changed();
    }

    fn install_zeros(&mut self, region: &Arc<RegionState>, chunk: ChunkIndex, page: usize) {
        let shared = &self.way_out.shared;
        self.pages.set_zeros(shared.image.root().chunk_size().bytes());
        if self.installs_one(region, chunk) {
            let installed = install::install_touched(region, chunk, &self.pages, page);
            return self.one_installed(region, chunk, page, installed);
        }
        self.whole.remove(&chunk);
        match install::install(None, region, chunk, &self.pages, Some(page)) {
            Installed::All => {}
            Installed::Deferred | Installed::NoMemory => self.put_off(&region.space, region.address(page)),
            Installed::Ended => unreachable!("the pager itself closes the gate"),
        }
        self.shared().pages_changed();
    }

    fn put_off(&mut self, space: &Arc<Space>, address: usize) {
        let deadline = Instant::now() + self.shared().options.fault_deadline;
        self.put_off.entry((space.id, address)).or_insert_with(|| (Arc::clone(space), deadline));
    }

    fn retry_put_off(&mut self) {
        let now = Instant::now();
        for (place, (space, deadline)) in std::mem::take(&mut self.put_off) {
            if space.is_gone() {
                continue;
            }
            if deadline <= now {
                self.lose_page(&space, place.1);
                continue;
            }
            self.fault(&space, place.1);
            if let Some((_, again)) = self.put_off.get_mut(&place) {
                *again = deadline;
            }
        }
        for (chunk, frame) in self.requests.take_put_off() {
            self.install(chunk, frame);
        }
        if self.put_off.is_empty() {
            self.behind.clear();
        }
    }

    /// An answer was wrong or an error: ask again, or give up.
    fn refuse(&mut self, chunk: ChunkIndex, reason: &str) {
        match self.requests.chunk_refused(chunk) {
            Refused::AskedAgain | Refused::Unknown => {}
            Refused::Final => self.lose(chunk, reason),
        }
    }

    fn segment_answer(&mut self, answer: &v1::SegmentAnswer) {
        let taken = take_segment(&self.shared().image, answer);
        if let Err(SegmentRefused::Server(error)) = &taken
            && may_pass(error)
        {
            return self.requests.segment_busy(answer.index, error.message.clone(), Instant::now());
        }
        if let Err(reason) = taken {
            return match self.requests.segment_refused(answer.index) {
                Refused::AskedAgain | Refused::Unknown => {}
                Refused::Final => self.lose_segment(answer.index, &reason.to_string()),
            };
        }
        for (region, page) in self.requests.segment_done(answer.index) {
            // By address: it may have been moved, or removed.
            self.fault(&region.space, region.address(page));
        }
    }

    /// What becomes of a fault that is lost. Who is killed or stopped is so now.
    fn fate(&self) -> Fate {
        use rustix::process::Signal;
        let shared = self.shared();
        match shared.options.on_loss {
            LossPolicy::Poison => return Fate::Poison,
            LossPolicy::Wait => {}
            LossPolicy::Kill => drop(shared.signal_owners(Signal::KILL)),
            LossPolicy::Pause => drop(shared.signal_owners(Signal::STOP)),
        }
        Fate::Wait
    }

    /// A chunk cannot be had: reports it, and does with its faults what the loss policy says.
    fn lose(&mut self, chunk: ChunkIndex, reason: &str) {
        let shared = Arc::clone(&self.way_out.shared);
        let image = shared.image.digest();
        shared.report(&format!("chunk {chunk} of image {image} from {}: {reason}", shared.address));
        match self.fate() {
            Fate::Poison => {
                self.requests.chunk_done(chunk);
                for region in shared.spaces().of_chunk(chunk) {
                    self.poison_chunk(region, chunk);
                }
            }
            Fate::Wait => self.requests.chunk_later(chunk, Instant::now()),
        }
        shared.pages_changed();
    }

    fn lose_segment(&mut self, index: u32, reason: &str) {
        let shared = Arc::clone(&self.way_out.shared);
        let image = shared.image.digest();
        shared.report(&format!("segment {index} of image {image} from {}: {reason}", shared.address));
        match self.fate() {
            Fate::Poison => {
                for (region, page) in self.requests.segment_done(index) {
                    // The whole chunk, as when a chunk is lost: one page stands for all that were asked for.
                    self.poison_chunk(&region, region.chunk_of(page));
                }
            }
            Fate::Wait => self.requests.segment_later(index, Instant::now()),
        }
        shared.pages_changed();
    }

    /// The kernel has had no memory for a page of zeros for as long as a fault may take.
    fn lose_page(&mut self, space: &Arc<Space>, address: usize) {
        let shared = Arc::clone(&self.way_out.shared);
        let deadline = shared.options.fault_deadline;
        shared.report(&format!("the page at {address:#x}: the kernel had no memory for {deadline:?}"));
        if self.fate() == Fate::Wait {
            return self.put_off(space, address);
        }
        match shared.spaces().at(space, address) {
            Some((region, page)) if region.state(page) == PageState::Absent => {
                self.poison(region, region.whole(&(page..page + 1)));
            }
            // It stays removed: nothing of the image may come there.
            other => {
                let page = address..address + PAGE_BYTES;
                let page = other.map_or(page, |(region, page)| region.whole_addresses(page));
                let _ = space.uffd.poison(page.start, page.len());
                space.uffd.wake(page.start, page.len());
            }
        }
    }

    fn poison_chunk(&mut self, region: &Arc<RegionState>, chunk: ChunkIndex) {
        if let Some(pages) = region.pages_of(chunk) {
            self.poison(region, region.whole(&pages));
        }
    }

    fn poison(&mut self, region: &Arc<RegionState>, pages: std::ops::Range<usize>) {
        let shared = Arc::clone(&self.way_out.shared);
        let patience = shared.options.fault_deadline;
        let poisoned = install::poison(region, pages, patience, || {
            // Where installers are inside, the next attempt comes when they have left: new ones wait.
            let Some(_pass) = shared.gate.try_enter_alone() else { return };
            if let Err(stopped) = self.read(&region.space)
                && !stopped.may_pass
            {
                self.broken.get_or_insert(stopped.reason);
            }
        });
        shared.gate.stop_waiting();
        if !poisoned {
            shared.report("a lost page could not be poisoned; its faults wait");
        }
        self.faults();
    }

    fn check_deadlines(&mut self) {
        let Late { chunks, segments } = self.requests.late(Instant::now());
        if chunks.is_empty() && segments.is_empty() {
            return;
        }
        let reason = self.late_reason();
        for (chunk, said) in chunks {
            self.lose(chunk, said.as_deref().unwrap_or(&reason));
        }
        for (index, said) in segments {
            self.lose_segment(index, said.as_deref().unwrap_or(&reason));
        }
    }

    fn late_reason(&self) -> String {
        let deadline = self.shared().options.fault_deadline;
        let state = if self.lane.is_ok() { "connected" } else { "not reachable" };
        format!("no answer within {deadline:?}; the server is {state}")
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Map { region, reply } => {
                let registered = region.space.uffd.register(region.address(0), region.len());
                if registered.is_ok() {
                    self.change_spaces(|spaces| spaces.add(region));
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
                    self.ask(&region, run.start);
                    // One page of each chunk will do.
                    next = region.pages_of(chunk).map_or(run.end, |pages| pages.end);
                }
            }
        }
    }

    /// In record mode: these pages, as far as they are of the chunk, count as touched, and the chunk comes as a whole.
    fn bring_recorded(
        &mut self,
        region: &Arc<RegionState>,
        chunk: ChunkIndex,
        pages: &std::ops::Range<usize>,
    ) {
        let of_chunk = region.pages_of(chunk).expect("a page of the region");
        if let Some(recorder) = &self.shared().recorder {
            let image = &self.shared().image;
            recorder.touched(image, region, of_chunk.start.max(pages.start)..of_chunk.end.min(pages.end));
            recorder.brought(image, region, of_chunk);
        }
        self.kept.forget(chunk);
        self.whole.insert(chunk);
    }

    /// Lets go of a region. Its memory is never unmapped while it is registered: that would wait for this thread.
    fn unmap(&mut self, region: &Arc<RegionState>, memory: crate::uffd::memory::Memory) {
        let shared = Arc::clone(&self.way_out.shared);
        // Whoever still touches it by a stray pointer is stopped, and never sees zeros.
        let forbidden = crate::uffd::memory::forbid(memory.start(), memory.len());
        region.end();
        let unregistered = region.space.uffd.unregister(memory.start(), memory.len());
        // By address: a stray mremap or munmap may have made parts of it.
        let addresses = memory.start()..memory.start() + memory.len();
        self.change_spaces(|spaces| drop(spaces.cut(&region.space, &addresses)));
        self.requests.forget(region, shared.spaces().regions());
        if forbidden.is_ok() && unregistered.is_ok() {
            // Giving back many pages takes long. Installers are done with the region: they look at it in the gate.
            let give_back = move || {
                shared.gate.pass_through();
                drop(memory);
            };
            // Without a thread it is given back at once, which nobody waits for here: it is not registered any more.
            drop(std::thread::Builder::new().name("postcopy-unmap".into()).spawn(give_back));
        } else {
            std::mem::forget(memory);
            self.shared().report("a region could not be unregistered; its address space is not given back");
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
    Lost,
    Connected(DemandLane),
}

async fn next_answer(lane: &mut Result<DemandLane, oneshot::Receiver<DemandLane>>) -> NextAnswer {
    match lane {
        Ok(lane) => match lane.answers.message().await {
            Ok(Some(answer)) => NextAnswer::Answer(answer),
            Ok(None) | Err(_) => NextAnswer::Lost,
        },
        Err(coming) => match coming.await {
            Ok(lane) => NextAnswer::Connected(lane),
            Err(_) => NextAnswer::Lost,
        },
    }
}

/// Opens a lane after a pause. Where that fails nothing is sent: then try again.
fn reach(address: ServerAddress, image: Digest, pause: Duration) -> oneshot::Receiver<DemandLane> {
    let (sender, receiver) = oneshot::channel();
    // Ends with the runtime at the latest.
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        if let Ok(lane) = DemandLane::open(&address, &image).await {
            let _ = sender.send(lane);
        }
    });
    receiver
}
