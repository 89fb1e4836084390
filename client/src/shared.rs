//! What the pager, the installers and the program's threads have in common: a session's [`Shared`].

use crate::advice::Callers;
use crate::bits::Underway;
use crate::image::Image;
use crate::memory::{Change, MemoryMap, PageState, Place, Region, Spaces};
use crate::pace::{Cores, Pace};
use crate::recorder::Recorder;
use crate::remote::ServerAddress;
use crate::session::{LossError, LossPolicy, Options, Progress};
use crate::state_file::{Record, State, StateError};
use crate::trace::Notes;
use crate::uffd::memory::Memory;
use crate::work::ToPager;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// What is counted, in the order of [`Progress`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) demand_chunks: AtomicU64,
    pub(crate) read_ahead_chunks: AtomicU64,
    pub(crate) bulk_chunks: AtomicU64,
    pub(crate) working_set_pages: AtomicU64,
    pub(crate) frame_bytes: AtomicU64,
    pub(crate) holds: AtomicU64,
    /// How often faults were lost, so that the loss policy applied.
    pub(crate) losses: AtomicU64,
    /// How often a fault was put off because the kernel had no memory for its page.
    pub(crate) memory_waits: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

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
    /// The first loss, and whether the pager has ended. Held for reading and writing these alone.
    outcome: Mutex<OutcomeSoFar>,
    /// Something in the page states or in `outcome` has changed.
    changed: Condvar,
    /// Threads that wait for `changed` because of page states.
    waiters: AtomicU64,
    /// Something in `outcome` has changed.
    pub(crate) reported: Condvar,
    /// Notes what happens, if that was asked for.
    pub(crate) trace: Option<Notes>,
    /// Notes what is touched, if that was asked for.
    pub(crate) recorder: Option<Recorder>,
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
    /// The pager has ended; for the recorder.
    pub(crate) has_ended: Notify,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct OutcomeSoFar {
    pub(crate) error: Option<Arc<str>>,
    /// How often something was reported.
    pub(crate) reports: u64,
    pub(crate) ended: bool,
    /// How often page states have changed while somebody waited for that.
    pub(crate) changes: u64,
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
        let (chunks, chunk_bytes) = (image.root().chunks(), image.root().chunk_size().bytes());
        let serves_kernel_faults = spaces.spaces().all(|space| space.uffd.serves_kernel_faults());
        let recorder = options.record.then(|| Recorder::new(&image));
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
            outcome: Mutex::default(),
            changed: Condvar::new(),
            waiters: AtomicU64::new(0),
            reported: Condvar::new(),
            trace: options.trace.then(Notes::new),
            recorder,
            pace: Mutex::new(Pace::new(chunk_bytes)),
            cores: Cores::default(),
            on_demand: Arc::new(Underway::new(chunks)),
            in_bulk: Underway::new(chunks),
            fills: AtomicBool::new(options.fill),
            fill_started: AtomicBool::new(false),
            is_filling: AtomicBool::new(false),
            has_no_successor: AtomicBool::new(false),
            is_left_open: AtomicBool::new(false),
            to_pager: ToPager::default(),
            fill_work: Notify::new(),
            fill_may_go_on: Notify::new(),
            has_ended: Notify::new(),
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

    pub(crate) fn outcome(&self) -> MutexGuard<'_, OutcomeSoFar> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait for pages that states have changed.
    pub(crate) fn pages_changed(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.outcome().changes += 1;
            self.changed.notify_all();
        }
    }

    /// Notes why pages are lost; the first reason is kept.
    pub(crate) fn report(&self, reason: &str) {
        let mut outcome = self.outcome();
        outcome.error.get_or_insert_with(|| reason.into());
        outcome.reports += 1;
        drop(outcome);
        self.reported.notify_all();
        self.changed.notify_all();
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

    /// The pager has ended.
    pub(crate) fn end(&self) {
        self.outcome().ended = true;
        // Nobody waits for it any more.
        self.cores.waits(None);
        self.reported.notify_all();
        self.changed.notify_all();
        self.fill_work.notify_one();
        self.has_ended.notify_one();
    }

    /// What has been touched has been sent, or that is given up.
    pub(crate) fn recording_has_changed(&self) {
        self.outcome().changes += 1;
        self.changed.notify_all();
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

    pub(crate) fn has_ended(&self) -> bool {
        self.outcome().ended
    }

    pub(crate) fn error(&self) -> Option<Arc<str>> {
        self.outcome().error.clone()
    }

    /// Waits until `done` gives something.
    pub(crate) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&OutcomeSoFar) -> Option<T>,
    ) -> Option<T> {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let mut outcome = self.outcome();
        let result = loop {
            // Without the lock: it may take long, and the pager does not wait for it.
            let seen = outcome.clone();
            drop(outcome);
            if let Some(result) = done(&seen) {
                break Some(result);
            }
            outcome = self.outcome();
            if (outcome.changes, outcome.reports, outcome.ended) != (seen.changes, seen.reports, seen.ended) {
                continue;
            }
            // States change without the lock and only then look for waiters: a second look now and then costs
            // little and needs no proof.
            let pause = Duration::from_millis(100);
            let pause = deadline.map_or(pause, |at| pause.min(at.saturating_duration_since(Instant::now())));
            if pause.is_zero() {
                break None;
            }
            outcome = self.changed.wait_timeout(outcome, pause).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Brings pages of a region; an error if one of them is lost.
    pub(crate) fn bring(
        &self,
        commands: &mpsc::Sender<Command>,
        region: &Region,
        pages: Range<usize>,
    ) -> Result<(), LossError> {
        let absent = |pages: &Range<usize>| region.next_run(pages.clone(), &[PageState::Absent]);
        let reported_before = self.outcome().reports;
        if absent(&pages).is_some() {
            let command = Command::Bring { region: region.clone(), pages: pages.clone() };
            // An ended pager has poisoned what was absent, which is seen below.
            let _ = commands.blocking_send(command);
        }
        self.wait(None, |outcome| {
            // What was lost before this call may have come since; what is lost now may be what it waits for.
            let waits = matches!(self.options.on_loss, LossPolicy::Wait | LossPolicy::Pause);
            let waiting = waits && outcome.reports > reported_before;
            (absent(&pages).is_none() || waiting || outcome.ended).then_some(())
        });
        let lost = [PageState::Absent, PageState::Poisoned];
        match region.next_run(pages, &lost) {
            None => Ok(()),
            Some(_) => Err(LossError::Lost(self.error().unwrap_or_else(|| "the session has ended".into()))),
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
