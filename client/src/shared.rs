//! The state that a session's pager, its installers and the program's threads have in common:
//! [`Shared`].

use crate::error::LossError;
use crate::install::Installed;
use crate::install::hand_over::ToPager;
use crate::memory::{Change, MemoryMap, PageState, Place, Region, Spaces};
use crate::options::{Counters, LossPolicy, Options, Progress};
use crate::outcome::Outcome;
use crate::pace::{Cores, Pace};
use crate::processes::{Callers, Process, can_read_mappings};
use crate::record::recorder::{Recorder, Sender};
use crate::record::trace::{Cause, Notes, Stages, Writer, installing};
use crate::remote::Image;
use crate::remote::ServerAddress;
use crate::state_file::{Record, State, StateError};
use crate::uffd::memory::Memory;
use crate::underway::Underway;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, mpsc};

/// A request of the program to the pager.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serves this region from now on. The pager replies once the region is registered.
    Map { region: Region, reply: std::sync::mpsc::SyncSender<io::Result<()>> },
    /// Unregisters this region, and gives its memory back.
    Unmap { region: Region, memory: Memory },
    /// Fetches and installs these pages as if a thread had faulted on them.
    Bring { region: Region, pages: Range<usize> },
    /// Ends the session in order, even if it has regions.
    End,
    /// Ends the session, and leaves everything as it is for a successor.
    Leave,
}

/// The state that the threads of a session have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) address: ServerAddress,
    pub(crate) image: Arc<Image>,
    pub(crate) options: Options,
    pub(crate) serves_kernel_faults: bool,
    pub(crate) map: MemoryMap,
    pub(crate) counters: Counters,
    next_space_id: AtomicU32,
    /// Only the pager writes to it, except to page states.
    pub(crate) state: State,
    /// The processes whose madvise calls decide what becomes of shared memory.
    pub(crate) callers: Option<Callers>,
    /// The failures, and whether the pager has ended.
    pub(crate) outcome: Arc<Outcome>,
    /// The notes of the trace, if the session has one.
    pub(crate) trace: Option<Arc<Notes>>,
    /// The recorder of first accesses, if the session records.
    pub(crate) recorder: Option<Arc<Recorder>>,
    /// Held for one answer or one reading. The pager only tries the lock.
    pub(crate) pace: Mutex<Pace>,
    pub(crate) cores: Cores,
    /// Outstanding chunks of the demand lane.
    pub(crate) on_demand: Arc<Underway>,
    /// Outstanding chunks of the bulk lane.
    pub(crate) in_bulk: Underway,
    /// Set if the session fetches all pages in the background.
    pub(crate) fills: AtomicBool,
    pub(crate) fill_started: AtomicBool,
    is_filling: AtomicBool,
    /// Set if no successor can take the session over, although it has a state file.
    pub(crate) has_no_successor: AtomicBool,
    /// Set if the pager has ended, and memory is still registered.
    pub(crate) is_left_open: AtomicBool,
    /// Installs that installers hand over to the pager.
    pub(crate) to_pager: ToPager,
    /// Set once a pager reads the mappings of children.
    looks_at_children: AtomicBool,
    /// Notified when the fill may have new work.
    pub(crate) fill_work: Notify,
    /// Notified when a pause of the fill has ended ([`Pace`]).
    pub(crate) fill_may_go_on: Notify,
}

impl Shared {
    /// Returns the shared state of a session with these spaces.
    pub(crate) fn new(
        address: ServerAddress,
        image: Arc<Image>,
        options: Options,
        spaces: Spaces,
        next_space_id: u32,
        state: State,
        owner: Option<Process>,
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
            callers: owner.map(Callers::of),
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
            looks_at_children: AtomicBool::new(false),
            fill_work: Notify::new(),
            fill_may_go_on: Notify::new(),
        }
    }

    /// Returns a snapshot of the spaces and regions.
    pub(crate) fn spaces(&self) -> Arc<Spaces> {
        self.map.spaces()
    }

    /// Replaces the spaces, and appends the record of the change to the state file
    /// ([`State::append`]). Only the pager calls this.
    ///
    /// # Errors
    /// As for [`State::append`].
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

    /// Applies a change to the spaces. Private pages that the change unmaps become removed.
    ///
    /// # Errors
    /// As for [`Shared::set_spaces`].
    pub(crate) fn change(&self, change: Change, done: Option<usize>) -> Result<(), StateError> {
        let mut spaces = self.spaces();
        let unmapped = Arc::make_mut(&mut spaces).apply(&change);
        for region in unmapped.iter().filter(|region| !region.is_shared()) {
            region.set_removed(0..region.pages())?;
        }
        self.set_spaces(spaces, &Record::Change(change), done)
    }

    /// Adds a region of this process's own memory. No successor can take it over, so no record is
    /// written.
    pub(crate) fn add_region(&self, region: &Region) {
        let mut spaces = self.spaces();
        let (all, space) = (Arc::make_mut(&mut spaces), region.space.id);
        let object = all.add_object(space, Arc::clone(&region.object));
        all.add(space, object, Place::Here, region.address(0), region.file_pages(0..region.pages()));
        self.map.replace(spaces);
        self.fill_work.notify_one();
    }

    /// Returns the regions that have pages of a chunk.
    pub(crate) fn of_chunk(&self, chunk: ChunkIndex) -> Vec<Region> {
        let chunk_pages = self.image.root().chunk_size().bytes() / PAGE_BYTES;
        self.spaces().of_chunk(chunk, chunk_pages).collect()
    }

    /// Returns an id that no space has had. Fails after 2^32 ids.
    pub(crate) fn next_space_id(&self) -> Result<u32, StateError> {
        let next = |id: u32| id.checked_add(1);
        let id = self.next_space_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.map_err(|_| StateError::Full("more processes"))
    }

    /// Records that the pager has ended, and notifies all waiting threads.
    pub(crate) fn end(&self) {
        // After the end, no install has a waiter.
        self.cores.waits(None);
        self.outcome.end();
        self.fill_work.notify_one();
    }

    /// Returns whether the pager has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.outcome.has_ended()
    }

    /// Returns whether a successor can take the session over when this process ends.
    pub(crate) fn has_successor(&self) -> bool {
        self.state.has_file() && !self.has_no_successor.load(Ordering::Acquire)
    }

    /// Records the process of a space for a successor.
    pub(crate) fn note_process(&self, space: u32, process: Process) {
        let next_space = self.next_space_id.load(Ordering::Relaxed);
        // Without the record, a successor identifies the process again.
        let _ = self.state.append(&Record::Process { space, process }, &self.spaces(), next_space, None);
    }

    /// Sends a signal to the processes that own the memory. Returns false if they are unknown.
    pub(crate) fn signal_owners(&self, signal: rustix::process::Signal) -> bool {
        self.callers.as_ref().is_some_and(|callers| callers.signal(signal))
    }

    /// Leaks the userfaultfds, so that memory stays registered.
    pub(crate) fn leave_open(&self) {
        self.is_left_open.store(true, Ordering::Release);
        self.spaces().leave_open();
    }

    /// Runs an install, and notes its installed pages in the trace, if the session has one.
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

    /// Returns the parts for the task that sends the recording, if the session records.
    pub(crate) fn sender(&self) -> Option<Sender> {
        let recorder = Arc::clone(self.recorder.as_ref()?);
        let (image, address) = (Arc::clone(&self.image), self.address.clone());
        Some(Sender { recorder, image, address, outcome: Arc::clone(&self.outcome) })
    }

    /// Returns the parts for the thread that writes the trace, if the session has one.
    pub(crate) fn trace_writer(&self) -> Option<Writer> {
        let notes = Arc::clone(self.trace.as_ref()?);
        let (image, options) = (Arc::clone(&self.image), self.options);
        Some(Writer { notes, image, options, outcome: Arc::clone(&self.outcome) })
    }

    /// Notes that a pager reads the mappings of children from now on, if the owner is known.
    pub(crate) fn look_at_children(&self) {
        let can_read = self.callers.as_ref().is_some_and(|callers| can_read_mappings(callers.owner()));
        self.looks_at_children.store(can_read, Ordering::Relaxed);
    }

    /// Returns whether a pager reads the mappings of children, so that they begin undecided.
    pub(crate) fn looks_at_children(&self) -> bool {
        self.looks_at_children.load(Ordering::Relaxed)
    }

    /// Returns whether the session fetches all pages in the background, and not only the working
    /// set.
    pub(crate) fn fills(&self) -> bool {
        self.fills.load(Ordering::Acquire)
    }

    /// Records whether the fill has work for all cores.
    pub(crate) fn set_filling(&self, is_filling: bool) {
        self.is_filling.store(is_filling, Ordering::Relaxed);
    }

    /// Returns whether the fill has work for all cores.
    pub(crate) fn is_filling(&self) -> bool {
        self.is_filling.load(Ordering::Relaxed)
    }

    /// Fetches and installs pages of a region. Returns an error if one of them is lost.
    pub(crate) fn bring(
        &self,
        commands: &mpsc::Sender<Command>,
        region: &Region,
        pages: Range<usize>,
    ) -> Result<(), LossError> {
        let absent = |pages: &Range<usize>| region.next_run(pages.clone(), &[PageState::Absent]);
        let losses_before = self.outcome.losses();
        if absent(&pages).is_some() {
            let command = Command::Bring { region: region.clone(), pages: pages.clone() };
            // Fails only if the pager has ended, which has then poisoned absent pages. The check
            // below sees that.
            let _ = commands.blocking_send(command);
        }
        self.outcome.wait(None, |outcome| {
            // Earlier losses do not count, because such pages may have arrived since. A new loss
            // may be of these pages.
            let waits = matches!(self.options.on_loss, LossPolicy::Wait | LossPolicy::Pause);
            let waiting = waits && outcome.losses > losses_before;
            (absent(&pages).is_none() || waiting || outcome.ended).then_some(())
        });
        let lost = [PageState::Absent, PageState::Poisoned];
        match region.next_run(pages, &lost) {
            None => Ok(()),
            Some(_) => {
                Err(LossError::Lost(self.outcome.last().unwrap_or_else(|| "the session has ended".into())))
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
            unseen_forks: self.counters.unseen_forks.load(Ordering::Relaxed),
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
