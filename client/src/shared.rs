//! What the pager, the installers and the program's threads have in common: a session's [`Shared`].

use crate::bits::Underway;
use crate::error::LossError;
use crate::install::Installed;
use crate::install::hand_over::ToPager;
use crate::memory::{Change, MemoryMap, PageState, Place, Region, Spaces};
use crate::options::{Counters, LossPolicy, Options, Progress};
use crate::outcome::Outcome;
use crate::pace::{Cores, Pace};
use crate::processes::Callers;
use crate::record::recorder::{Recorder, Sender};
use crate::record::trace::{Cause, Notes, Stages, Writer, installing};
use crate::remote::Image;
use crate::remote::ServerAddress;
use crate::state_file::{Record, State, StateError};
use crate::uffd::memory::Memory;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, mpsc};

/// What the program asks of the pager.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve this region from now on; answers when it is registered.
    Map { region: Region, reply: std::sync::mpsc::SyncSender<io::Result<()>> },
    /// Let go of this region and give its memory back.
    Unmap { region: Region, memory: Memory },
    /// Bring these pages as if they had been touched.
    Bring { region: Region, pages: Range<usize> },
    /// End in order, although there may be regions.
    End,
    /// End, and leave all as it is to whoever takes the session over.
    Leave,
}

/// What the pager, the installers and the program's threads have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) address: ServerAddress,
    pub(crate) image: Arc<Image>,
    pub(crate) options: Options,
    pub(crate) serves_kernel_faults: bool,
    pub(crate) map: MemoryMap,
    pub(crate) counters: Counters,
    next_space_id: AtomicU32,
    /// Written to by the pager alone, but for page states.
    pub(crate) state: State,
    /// Whose calls tell what becomes of shared memory.
    pub(crate) callers: Option<Callers>,
    /// What went wrong, and whether the pager has ended.
    pub(crate) outcome: Arc<Outcome>,
    /// Notes what happens, if that was asked for.
    pub(crate) trace: Option<Arc<Notes>>,
    /// Notes what is touched, if that was asked for.
    pub(crate) recorder: Option<Arc<Recorder>>,
    /// Held for an answer or a look, and only tried by the pager.
    pub(crate) pace: Mutex<Pace>,
    pub(crate) cores: Cores,
    /// Chunks that have been asked for over the demand lane.
    pub(crate) on_demand: Arc<Underway>,
    /// And over the bulk lane.
    pub(crate) in_bulk: Underway,
    /// A background fill was asked for.
    pub(crate) fills: AtomicBool,
    pub(crate) fill_started: AtomicBool,
    is_filling: AtomicBool,
    /// Nobody can take the session over, although there is a state file.
    pub(crate) has_no_successor: AtomicBool,
    /// The pager has ended, and memory is registered still.
    pub(crate) is_left_open: AtomicBool,
    /// Installs for the pager.
    pub(crate) to_pager: ToPager,
    /// There is new work for the fill.
    pub(crate) fill_work: Notify,
    /// A pause of the fill has ended ([`Pace`]).
    pub(crate) fill_may_go_on: Notify,
}

impl Shared {
    /// A session of these spaces.
    pub(crate) fn new(
        address: ServerAddress,
        image: Arc<Image>,
        options: Options,
        spaces: Spaces,
        next_space_id: u32,
        state: State,
        owner: Option<(u32, u64)>,
    ) -> Self {
        let chunk_bytes = image.root().chunk_size().bytes();
        let serves_kernel_faults = spaces.spaces().all(|space| space.uffd.serves_kernel_faults());
        let recorder = options.record.then(|| Arc::new(Recorder::new(&image, options.record_pages)));
        if let Some(recorder) = &recorder {
            recorder.has(&image, spaces.regions());
        }
        Self {
            address,
            image,
            options,
            serves_kernel_faults,
            map: MemoryMap::new(spaces),
            counters: Counters::default(),
            next_space_id: AtomicU32::new(next_space_id),
            state,
            callers: owner.map(|(pid, start)| Callers::of(pid, start)),
            outcome: Arc::default(),
            trace: options.trace.then(|| Arc::new(Notes::new())),
            recorder,
            pace: Mutex::new(Pace::new(chunk_bytes)),
            cores: Cores::default(),
            on_demand: Arc::default(),
            in_bulk: Underway::default(),
            fills: AtomicBool::new(options.fill),
            fill_started: AtomicBool::new(false),
            is_filling: AtomicBool::new(false),
            has_no_successor: AtomicBool::new(false),
            is_left_open: AtomicBool::new(false),
            to_pager: ToPager::default(),
            fill_work: Notify::new(),
            fill_may_go_on: Notify::new(),
        }
    }

    /// The spaces and regions that there are at the moment.
    pub(crate) fn spaces(&self) -> Arc<Spaces> {
        self.map.spaces()
    }

    /// Replaces the spaces, and appends the record of the change to the state file ([`State::append`]). For the pager
    /// alone.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn set_spaces(
        &self,
        spaces: Arc<Spaces>,
        record: &Record,
        done: Option<usize>,
    ) -> Result<(), StateError> {
        self.state.append(record, &spaces, self.next_space_id.load(Ordering::Relaxed), done)?;
        self.map.replace(spaces);
        self.fill_work.notify_one();
        Ok(())
    }

    /// Applies a change to the spaces. Pages of private memory that is mapped nowhere any more become removed.
    ///
    /// # Errors
    /// As [`Shared::set_spaces`].
    pub(crate) fn change(&self, change: Change, done: Option<usize>) -> Result<(), StateError> {
        let mut spaces = self.spaces();
        let unmapped = Arc::make_mut(&mut spaces).apply(&change);
        for region in unmapped.iter().filter(|region| !region.is_shared()) {
            region.set_removed(0..region.pages())?;
        }
        self.set_spaces(spaces, &Record::Change(change), done)
    }

    /// Adds a region of this process's own memory, which no successor can take over.
    pub(crate) fn add_region(&self, region: &Region) {
        let mut spaces = self.spaces();
        let (all, space) = (Arc::make_mut(&mut spaces), region.space.id);
        let object = all.add_object(space, Arc::clone(&region.object));
        all.add(space, object, Place::Here, region.address(0), region.file_pages(0..region.pages()));
        self.map.replace(spaces);
        self.fill_work.notify_one();
    }

    /// The regions that have pages of a chunk.
    pub(crate) fn of_chunk(&self, chunk: ChunkIndex) -> Vec<Region> {
        let chunk_pages = self.image.root().chunk_size().bytes() / PAGE_BYTES;
        self.spaces().of_chunk(chunk, chunk_pages).collect()
    }

    /// An id that no space has had. After four thousand million there is none.
    pub(crate) fn next_space_id(&self) -> Result<u32, StateError> {
        let next = |id: u32| id.checked_add(1);
        let id = self.next_space_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.map_err(|_| StateError::Full("more processes"))
    }

    /// The pager has ended.
    pub(crate) fn end(&self) {
        // No page is waited for any more.
        self.cores.waits(None);
        self.outcome.end();
        self.fill_work.notify_one();
    }

    /// Whether the pager has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.outcome.has_ended()
    }

    /// Whether somebody can take the session over when this process ends.
    pub(crate) fn has_successor(&self) -> bool {
        self.state.has_file() && !self.has_no_successor.load(Ordering::Acquire)
    }

    /// Sends a signal to those whose memory it is; false if nobody knows who that is.
    pub(crate) fn signal_owners(&self, signal: rustix::process::Signal) -> bool {
        self.callers.as_ref().is_some_and(|callers| callers.signal(signal))
    }

    /// Keeps the userfaultfds open: memory stays registered.
    pub(crate) fn leave_open(&self) {
        self.is_left_open.store(true, Ordering::Release);
        self.spaces().leave_open();
    }

    /// Has pages installed, and notes which of them came by that, where there is a trace.
    pub(crate) fn installing(
        &self,
        region: &Region,
        pages: &Range<usize>,
        cause: Cause,
        stages: Stages,
        install: impl FnOnce() -> Installed,
    ) -> Installed {
        installing(self.trace.as_deref(), &self.image, region, pages, cause, stages, install)
    }

    /// For the task that sends the recording, where there is one.
    pub(crate) fn sender(&self) -> Option<Sender> {
        let recorder = Arc::clone(self.recorder.as_ref()?);
        let (image, address) = (Arc::clone(&self.image), self.address.clone());
        Some(Sender { recorder, image, address, outcome: Arc::clone(&self.outcome) })
    }

    /// For the thread that writes the trace, where there is one.
    pub(crate) fn trace_writer(&self) -> Option<Writer> {
        let notes = Arc::clone(self.trace.as_ref()?);
        let (image, options) = (Arc::clone(&self.image), self.options);
        Some(Writer { notes, image, options, outcome: Arc::clone(&self.outcome) })
    }

    /// Whether all is to be brought, and not the working set alone.
    pub(crate) fn fills(&self) -> bool {
        self.fills.load(Ordering::Acquire)
    }

    /// The fill has work for all cores, or has none any more.
    pub(crate) fn set_filling(&self, is_filling: bool) {
        self.is_filling.store(is_filling, Ordering::Relaxed);
    }

    /// Whether the fill has work for all cores.
    pub(crate) fn is_filling(&self) -> bool {
        self.is_filling.load(Ordering::Relaxed)
    }

    /// Brings pages of a region; an error if one of them is lost.
    pub(crate) fn bring(
        &self,
        commands: &mpsc::Sender<Command>,
        region: &Region,
        pages: Range<usize>,
    ) -> Result<(), LossError> {
        let absent = |pages: &Range<usize>| region.next_run(pages.clone(), &[PageState::Absent]);
        let reported_before = self.outcome.reports();
        if absent(&pages).is_some() {
            let command = Command::Bring { region: region.clone(), pages: pages.clone() };
            // An ended pager has poisoned what was absent, which is seen below.
            let _ = commands.blocking_send(command);
        }
        self.outcome.wait(None, |outcome| {
            // What was lost before this call may have come since; what is lost now may be what it waits for.
            let waits = matches!(self.options.on_loss, LossPolicy::Wait | LossPolicy::Pause);
            let waiting = waits && outcome.reports > reported_before;
            (absent(&pages).is_none() || waiting || outcome.ended).then_some(())
        });
        let lost = [PageState::Absent, PageState::Poisoned];
        match region.next_run(pages, &lost) {
            None => Ok(()),
            Some(_) => {
                Err(LossError::Lost(self.outcome.error().unwrap_or_else(|| "the session has ended".into())))
            }
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        let mut progress = Progress {
            faults: self.counters.faults.load(Ordering::Relaxed),
            demand_chunks: self.counters.demand_chunks.load(Ordering::Relaxed),
            read_ahead_chunks: self.counters.read_ahead_chunks.load(Ordering::Relaxed),
            bulk_chunks: self.counters.bulk_chunks.load(Ordering::Relaxed),
            working_set_pages: self.counters.working_set_pages.load(Ordering::Relaxed),
            frame_bytes: self.counters.frame_bytes.load(Ordering::Relaxed),
            holds: self.counters.holds.load(Ordering::Relaxed),
            ..Progress::default()
        };
        for region in self.spaces().regions() {
            progress.total_pages += region.pages() as u64;
            progress.resident_pages += region.count(PageState::Resident) as u64;
            progress.poisoned_pages += region.count(PageState::Poisoned) as u64;
            progress.removed_pages += region.count(PageState::Removed) as u64;
        }
        progress
    }
}
