//! The pager: the one thread that answers a session's faults.
//!
//! It runs a current-thread runtime that owns the userfaultfd, the demand stream and its connection, so that from
//! reading a fault to UFFDIO_COPY nothing crosses a thread. The way of a page:
//!
//! 1. [`Pager::run`] reads all messages: events change page states at once ([`apply`]), faults are collected;
//! 2. [`Pager::fault`] looks at each faulting page's state; an absent one's chunk is asked for ([`Pager::ask`]), once;
//! 3. [`Pager::answer`] takes the server's answer, verifies the chunk to the image's digest, and
//! 4. [`Pager::install`] puts its pages into every region that has them, which wakes the threads.
//!
//! A thread that faults may hold any lock of the program: the pager takes none that the program can hold, writes no
//! log, and touches no region's memory. Whatever way it ends, [`WayOut`] first makes what is unresolved SIGBUS.

use crate::attach::{self, Owner};
use crate::chunk::ChunkPages;
use crate::image::{Content, Image};
use crate::install::{self, Installed};
use crate::lane::{DemandLane, frame_of, may_pass};
use crate::page_state::PageState;
use crate::region::RegionState;
use crate::remote::{Remote, RemoteError, SegmentRefused, ServerAddress, take_segment};
use crate::requests::{Late, Refused, Requests, Waiting};
use crate::session::{Command, LossPolicy, OWN_PROCESS_FEATURES, Options, SessionError, Shared, add};
use crate::uffd::{AsyncUffd, Event, Outcome, Uffd};
use bytes::Bytes;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy_proto::reference::Reference;
use postcopy_proto::v1::{self, fetch_chunks_response::Answer};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// How long opening a session may take.
const OPEN: Duration = Duration::from_secs(30);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How soon an install is tried again that the kernel put off.
const RETRY: Duration = Duration::from_millis(1);
/// Pauses between attempts to reach a server that was lost; the first one again once it has answered something.
const RECONNECT: std::ops::Range<Duration> = Duration::from_millis(10)..Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct Pager {
    way_out: WayOut,
    uffd: AsyncUffd,
    lane: Result<DemandLane, oneshot::Receiver<DemandLane>>,
    /// Before the next attempt to reach a server that was lost.
    reconnect_pause: Duration,
    requests: Requests,
    /// Faults on zero and removed pages that the kernel put off: by address, each with its deadline.
    put_off: BTreeMap<usize, (Waiting, Instant)>,
    /// An event came that this session cannot go on after.
    broken: Option<String>,
    /// The memory's owner has exited.
    owner_gone: bool,
    events: Vec<Event>,
    pages: ChunkPages,
    // Dropped last: memory that waits in it to be unmapped must have been unregistered.
    commands: mpsc::Receiver<Command>,
}

/// Makes every way out of the pager (return, error, panic) a safe one when it is dropped: what is unresolved is
/// poisoned, and only then are the regions let go of.
#[derive(Debug)]
struct WayOut(Arc<Shared>);

impl Drop for WayOut {
    fn drop(&mut self) {
        let shared = &self.0;
        shared.gate.close();
        let mut ignored = Vec::new();
        let mut read_events = || {
            ignored.clear();
            let _ = shared.uffd.read_events(&mut ignored);
        };
        for region in shared.regions().iter() {
            install::poison(&shared.uffd, region, 0..region.states.pages(), &mut read_events);
            // Poison stays. Without this an munmap would wait for somebody to read its event.
            let _ = shared.uffd.unregister(region.address(0), region.len());
        }
        read_events();
        shared.end();
    }
}

impl Pager {
    /// Starts a session's pager: connects, opens the image, opens the userfaultfd, in this order, so that
    /// nothing is registered before there is somebody to ask.
    ///
    /// # Errors
    /// Whatever of that failed.
    ///
    /// # Blocking
    /// Until all of it is done.
    pub(crate) fn start(
        address: ServerAddress,
        reference: Reference,
        options: Options,
        commands: mpsc::Receiver<Command>,
        memory: Owner,
    ) -> Result<Arc<Shared>, SessionError> {
        let system = |what| move |source| SessionError::System { what, source };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("postcopy-pager-helper")
            .build()
            .map_err(system("a runtime"))?;
        let (reply, opened) = std::sync::mpsc::sync_channel(1);
        let thread = move || {
            runtime.block_on(async move {
                let opened = Self::open(address.clone(), &reference, options, commands, memory);
                // Each part of it has a limit of its own; this is the promise of `Session::open`.
                let opened = match tokio::time::timeout(OPEN, opened).await {
                    Ok(opened) => opened,
                    Err(_) => Err(address.wrong("session", format!("not open within {OPEN:?}")).into()),
                };
                match opened {
                    Err(error) => drop(reply.send(Err(error))),
                    Ok(pager) => {
                        let shared = Arc::clone(&pager.way_out.0);
                        drop(reply.send(Ok(shared)));
                        // As a task, and not as the future of block_on: waking that one costs an epoll_wait more.
                        // A panic has poisoned what was unresolved by then, and nobody is left to be told.
                        let _ = tokio::spawn(pager.run()).await;
                    }
                }
            });
        };
        let thread = std::thread::Builder::new().name("postcopy-pager".into()).spawn(thread);
        thread.map_err(system("a thread"))?;
        opened.recv().map_err(|_| SessionError::Ended)?
    }

    async fn open(
        address: ServerAddress,
        reference: &Reference,
        options: Options,
        commands: mpsc::Receiver<Command>,
        memory: Owner,
    ) -> Result<Self, SessionError> {
        let image = open_image(&address, reference).await?;
        let lane = DemandLane::open(&address, &image.digest()).await?;
        let (uffd, regions) = match memory {
            Owner::ThisProcess => (Uffd::open(OWN_PROCESS_FEATURES)?, Vec::new()),
            Owner::Another { uffd, regions } => {
                let regions = attach::regions(&image, &regions)?;
                (Uffd::adopt(uffd)?, regions)
            }
        };
        let uffd = Arc::new(uffd);
        let watched = AsyncUffd::new(Arc::clone(&uffd));
        let watched = watched.map_err(|source| SessionError::System { what: "epoll", source })?;
        let shared = Arc::new(Shared::new(address, image, uffd, options));
        shared.set_regions(regions.into());
        Ok(Self {
            way_out: WayOut(shared),
            uffd: watched,
            lane: Ok(lane),
            reconnect_pause: RECONNECT.start,
            requests: Requests::new(options.fault_deadline),
            put_off: BTreeMap::new(),
            broken: None,
            owner_gone: false,
            events: Vec::new(),
            pages: ChunkPages::default(),
            commands,
        })
    }

    fn shared(&self) -> &Shared {
        &self.way_out.0
    }

    /// Serves until all who can ask for something are gone, or the kernel's side fails.
    async fn run(mut self) {
        let shared = Arc::clone(&self.way_out.0);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Some(reason) = &self.broken {
                return shared.report(reason);
            }
            if self.owner_gone {
                return;
            }
            self.send();
            let waits = !self.requests.is_empty();
            let put_off = self.requests.has_put_off() || !self.put_off.is_empty();
            tokio::select! {
                biased;
                readable = self.uffd.readable() => match readable {
                    Err(error) => return shared.report(&format!("the userfaultfd cannot be watched: {error}")),
                    Ok(readable) => {
                        let Some(pass) = shared.gate.try_enter_alone() else {
                            shared.gate.installers_left().await;
                            continue;
                        };
                        if let Err(error) = shared.uffd.read_events(&mut self.events) {
                            return shared.report(&format!("the userfaultfd cannot be read: {error}"));
                        }
                        readable.drained();
                        self.broken = apply(&shared, &mut self.events).err();
                        drop(pass);
                        self.faults();
                    }
                },
                lane = next_answer(&mut self.lane) => self.lane_answers(lane),
                command = self.commands.recv() => match command {
                    None => return,
                    Some(command) => self.command(command),
                },
                _ = retry.tick(), if put_off => self.retry_put_off(),
                () = shared.owner_gone.notified() => return,
                _ = tick.tick(), if waits => self.check_deadlines(),
            }
        }
    }

    fn faults(&mut self) {
        let regions = self.shared().regions();
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            let Event::Fault { address } = event else { continue };
            add(&self.shared().counters.faults, 1);
            let found = regions.iter().find_map(|region| Some((region, region.page_at(address)?)));
            // None: a fault on memory that was unmapped since.
            if let Some((region, page)) = found {
                self.fault(region, page);
            }
        }
        self.events = events;
    }

    /// Sees to it that a touched page comes.
    fn fault(&mut self, region: &Arc<RegionState>, page: usize) {
        match region.states.get(page) {
            PageState::Absent => self.ask(region, page),
            PageState::Removed => self.zero_removed(region, page),
            // Another thread's fault on the same page was answered since, or it is SIGBUS now: try again.
            PageState::Resident | PageState::Poisoned => {
                self.shared().uffd.wake(region.address(page), PAGE_BYTES);
            }
        }
    }

    fn zero_removed(&mut self, region: &Arc<RegionState>, page: usize) {
        let uffd = &self.shared().uffd;
        let address = region.address(page);
        match uffd.zero(address, PAGE_BYTES) {
            Outcome::Done | Outcome::Partial { .. } | Outcome::Gone => {}
            Outcome::OwnerGone => self.owner_gone = true,
            Outcome::AlreadyPresent => uffd.wake(address, PAGE_BYTES),
            Outcome::Deferred | Outcome::NoMemory => self.put_off(region, page),
        }
    }

    /// Asks for the chunk of an absent page, unless that has been done.
    fn ask(&mut self, region: &Arc<RegionState>, page: usize) {
        let chunk = region.chunk_of(page);
        if self.requests.has_chunk(chunk) {
            return;
        }
        let waiting = (Arc::clone(region), page);
        match self.shared().image.content(chunk) {
            Content::Data(digest) => self.requests.add_chunk(chunk, digest, waiting, Instant::now()),
            Content::Zero => self.install_zeros(region, chunk, page),
            Content::SegmentMissing(index) => self.requests.add_segment(index, waiting, Instant::now()),
            Content::OutOfRange => unreachable!("regions are made from the image's own files"),
        }
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
        let (sender, receiver) = oneshot::channel();
        let (address, image) = (self.shared().address.clone(), self.shared().image.digest());
        let pause = self.reconnect_pause;
        self.reconnect_pause = (pause * 2).min(RECONNECT.end);
        self.lane = Err(receiver);
        // Ends with the runtime at the latest. Dropping the sender makes the pager try again.
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            if let Ok(lane) = DemandLane::open(&address, &image).await {
                let _ = sender.send(lane);
            }
        });
    }

    /// Takes the answer for a chunk.
    fn answer(&mut self, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        let Some((digest, _)) = self.requests.chunk(chunk) else { return };
        let frame = match frame_of(answer, &digest) {
            Ok(frame) => frame.clone(),
            Err(no) if no.may_pass => return self.requests.chunk_busy(chunk, no.reason, Instant::now()),
            Err(no) => return self.refuse(chunk, &no.reason),
        };
        let counters = &self.shared().counters;
        add(&counters.demand_chunks, 1);
        add(&counters.frame_bytes, frame.len());
        self.install(chunk, frame);
    }

    /// Verifies a chunk's frame and installs its pages.
    fn install(&mut self, chunk: ChunkIndex, frame: Bytes) {
        let Some((digest, (waiting, page))) = self.requests.chunk(chunk) else { return };
        let shared = &self.way_out.0;
        if let Err(reason) = self.pages.decode(&shared.image, &waiting.file, chunk, &digest, &frame) {
            return self.refuse(chunk, &reason);
        }
        let mut outcome = Installed::All;
        for region in shared.regions().iter() {
            let first = Arc::ptr_eq(region, waiting).then_some(*page);
            let installed = install::install(&shared.uffd, None, region, chunk, &self.pages, first);
            if installed != Installed::All {
                outcome = installed;
            }
        }
        match outcome {
            Installed::All => self.requests.chunk_done(chunk),
            Installed::Ended => self.owner_gone = true,
            Installed::Deferred | Installed::NoMemory => self.requests.put_off(chunk, frame),
        }
        self.shared().pages_changed();
    }

    fn install_zeros(&mut self, region: &Arc<RegionState>, chunk: ChunkIndex, page: usize) {
        let shared = &self.way_out.0;
        self.pages.set_zeros(shared.image.root().chunk_size().bytes());
        match install::install(&shared.uffd, None, region, chunk, &self.pages, Some(page)) {
            Installed::All => {}
            Installed::Ended => self.owner_gone = true,
            Installed::Deferred | Installed::NoMemory => self.put_off(region, page),
        }
        self.shared().pages_changed();
    }

    fn put_off(&mut self, region: &Arc<RegionState>, page: usize) {
        let deadline = Instant::now() + self.shared().options.fault_deadline;
        let put_off = || ((Arc::clone(region), page), deadline);
        self.put_off.entry(region.address(page)).or_insert_with(put_off);
    }

    fn retry_put_off(&mut self) {
        let now = Instant::now();
        for (address, ((region, page), deadline)) in std::mem::take(&mut self.put_off) {
            if !region.is_alive() {
                continue;
            }
            if deadline <= now {
                self.lose_page(&region, page);
                continue;
            }
            self.fault(&region, page);
            if let Some((_, again)) = self.put_off.get_mut(&address) {
                *again = deadline;
            }
        }
        for (chunk, frame) in self.requests.take_put_off() {
            self.install(chunk, frame);
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
            self.fault(&region, page);
        }
    }

    /// A chunk cannot be had: reports it, and does with its faults what the loss policy says.
    fn lose(&mut self, chunk: ChunkIndex, reason: &str) {
        let shared = Arc::clone(&self.way_out.0);
        let image = shared.image.digest();
        shared.report(&format!("chunk {chunk} of image {image} from {}: {reason}", shared.address));
        match shared.options.on_loss {
            LossPolicy::Poison => {
                self.requests.chunk_done(chunk);
                for region in shared.regions().iter() {
                    if let Some(pages) = region.pages_of(chunk) {
                        self.poison(region, pages);
                    }
                }
            }
            LossPolicy::Wait => self.requests.chunk_later(chunk, Instant::now()),
        }
        shared.pages_changed();
    }

    fn lose_segment(&mut self, index: u32, reason: &str) {
        let shared = Arc::clone(&self.way_out.0);
        let image = shared.image.digest();
        shared.report(&format!("segment {index} of image {image} from {}: {reason}", shared.address));
        match shared.options.on_loss {
            LossPolicy::Poison => {
                for (region, page) in self.requests.segment_done(index) {
                    // The whole chunk, as when a chunk is lost: one page stands for all that were asked for.
                    if let Some(pages) = region.pages_of(region.chunk_of(page)) {
                        self.poison(&region, pages);
                    }
                }
            }
            LossPolicy::Wait => self.requests.segment_later(index, Instant::now()),
        }
        shared.pages_changed();
    }

    /// The kernel has had no memory for a page of zeros for as long as a fault may take.
    fn lose_page(&mut self, region: &Arc<RegionState>, page: usize) {
        let (shared, address) = (Arc::clone(&self.way_out.0), region.address(page));
        let deadline = shared.options.fault_deadline;
        shared.report(&format!("a page of zeros at {address:#x}: the kernel had no memory for {deadline:?}"));
        match shared.options.on_loss {
            LossPolicy::Wait => self.put_off(region, page),
            LossPolicy::Poison if region.states.get(page) == PageState::Removed => {
                // It stays removed: nothing of the image may come there.
                let _ = shared.uffd.poison(address, PAGE_BYTES);
                shared.uffd.wake(address, PAGE_BYTES);
            }
            LossPolicy::Poison => self.poison(region, page..page + 1),
        }
    }

    fn poison(&mut self, region: &Arc<RegionState>, pages: std::ops::Range<usize>) {
        let shared = Arc::clone(&self.way_out.0);
        install::poison(&shared.uffd, region, pages, || {
            // Where installers are inside, the next attempt comes when they have left: new ones wait.
            let Some(_pass) = shared.gate.try_enter_alone() else { return };
            // An error shows at the next read in `run`.
            let _ = shared.uffd.read_events(&mut self.events);
            if let Err(reason) = apply(&shared, &mut self.events) {
                self.broken.get_or_insert(reason);
            }
        });
        shared.gate.stop_waiting();
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
                let registered = self.shared().uffd.register(region.address(0), region.len());
                if registered.is_ok() {
                    let regions = self.shared().regions().iter().cloned().chain([region]).collect();
                    self.shared().set_regions(regions);
                }
                // The program waits for it, in `Session::map`.
                let _ = reply.try_send(registered);
            }
            Command::Unmap { region, memory } => self.unmap(&region, memory),
            Command::Bring { region, pages } => {
                let mut next = pages.start;
                while let Some(run) = region.states.next_run(next..pages.end, &[PageState::Absent]) {
                    self.ask(&region, run.start);
                    // One page of each chunk will do.
                    let chunk = region.pages_of(region.chunk_of(run.start));
                    next = chunk.map_or(run.end, |pages| pages.end);
                }
            }
        }
    }

    /// Lets go of a region. Its memory is never unmapped while it is registered: that would wait for this thread.
    fn unmap(&mut self, region: &Arc<RegionState>, memory: crate::uffd::memory::Memory) {
        let shared = Arc::clone(&self.way_out.0);
        // Whoever still touches it by a stray pointer is stopped, and never sees zeros.
        let forbidden = crate::uffd::memory::forbid(memory.start(), memory.len());
        region.end();
        let unregistered = shared.uffd.unregister(memory.start(), memory.len());
        let rest = shared.regions().iter().filter(|r| !Arc::ptr_eq(r, region)).cloned().collect();
        shared.set_regions(rest);
        self.requests.forget(region, &shared.regions());
        if forbidden.is_ok() && unregistered.is_ok() {
            // Giving back many pages takes long. Installers are done with the region: they look at it in the gate.
            tokio::task::spawn_blocking(move || {
                shared.gate.pass_through();
                drop(memory);
            });
        } else {
            std::mem::forget(memory);
            self.shared().report("a region could not be unregistered; its address space is not given back");
        }
    }
}

/// Changes states by the events that were read, and leaves the faults in `events`. The gate is passed alone.
fn apply(shared: &Shared, events: &mut Vec<Event>) -> Result<(), String> {
    if events.iter().all(|event| matches!(event, Event::Fault { .. })) {
        return Ok(());
    }
    let regions = shared.regions();
    let mut outcome = Ok(());
    events.retain(|event| {
        match *event {
            Event::Fault { .. } => return true,
            // The range is gone, or about to go: nothing may be installed there any more.
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                for region in regions.iter() {
                    region.states.set_removed(region.pages_in(start, end));
                }
            }
            Event::Remap { from, .. } => outcome = Err(format!("memory at {from:#x} was moved by mremap")),
            Event::Unknown { event } => {
                outcome = Err(format!("the kernel sent event {event:#x}, not asked for"));
            }
        }
        false
    });
    shared.pages_changed();
    outcome
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

async fn open_image(address: &ServerAddress, reference: &Reference) -> Result<Arc<Image>, RemoteError> {
    let remote = Remote::connect(address.clone()).await?;
    let (image, segments) = remote.open(reference, &[], false).await?;
    segments.all_into(&image).await?;
    Ok(image)
}
