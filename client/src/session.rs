//! Sessions: memory of this process, or of another one, that is filled from one image.
//!
//! [`Session::open`] and [`Session::attach`] start the pager, a thread with a runtime, a connection and a userfaultfd
//! ([`crate::pager`]); [`Session::map`] gives it memory to fill; [`Session::fill`] starts the bulk lane beside it
//! ([`crate::fill`]). They share what stands here in [`Shared`].

use crate::advice::Callers;
use crate::attach::{self, ForeignMemory, Owner};
use crate::bits::Underway;
use crate::changes::{self, Changes};
use crate::fill;
use crate::gate::Gate;
use crate::image::Image;
use crate::pace::Pace;
use crate::page_state::PageState;
use crate::pager::Start;
use crate::recorder::{self, Recorder};
use crate::region::{Common, Region, RegionState};
use crate::remote::{RemoteError, ServerAddress};
use crate::space::Spaces;
use crate::state::{State, StateError};
use crate::uffd::OpenError;
use crate::uffd::memory::Memory;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use postcopy_proto::reference::Reference;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Commands that may wait for the pager.
const COMMANDS: usize = 256;

/// What happens to a fault that cannot be served within its deadline, or at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossPolicy {
    /// Its page is poisoned: this touch is SIGBUS, and so is every later one, unless a background fill brings the
    /// page after all. Before Linux 6.6 it is SIGSEGV, for good.
    #[default]
    Poison,
    /// It stays pending, is reported by [`Session::error`], and is tried again every second.
    Wait,
    /// The process that owns the memory, and all that it has forked, are killed: SIGKILL. Where that process is not known
    /// ([`crate::ForeignMemory::pid`]), as [`LossPolicy::Wait`].
    Kill,
    /// They are stopped (SIGSTOP), and the fault stays pending and is tried again. Where the process is not known, or is
    /// this one, as [`LossPolicy::Wait`].
    Pause,
}

/// How a session behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long a fault may take before the loss policy decides. 30 s by default, at most a year.
    pub fault_deadline: Duration,
    /// What happens to a fault that is lost.
    pub on_loss: LossPolicy,
    /// Bring the image's working set at once, if the server has one: the pages that earlier restores have touched, in the
    /// order of their first touches, before all else. Off by default. Of files that are mapped later than the first one it may
    /// not bring all.
    pub working_set: bool,
    /// Bring everything in the background, from the beginning on, after the working set. Off by default; see also
    /// [`Session::fill`].
    pub fill: bool,
    /// Note what is touched, for the image's working set, and tell the server. Off by default. Every touched page is a fault
    /// then, where otherwise one brings its neighbours, too. See [`Session::wait_recorded`].
    pub record: bool,
    /// Note what is written to and removed: [`Region::changes`], from Linux 6.7 on. Off by default. The first write to a
    /// page takes a fault of about a microsecond more. In another process's memory, which must be private, whoever
    /// writes first to a page waits for the pager (docs/BENCHMARKS.md), zero pages take memory, and it is
    /// [`Session::changes`] that tells.
    pub track_writes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fault_deadline: Duration::from_secs(30),
            on_loss: LossPolicy::default(),
            working_set: false,
            fill: false,
            record: false,
            track_writes: false,
        }
    }
}

/// What a session is filled from.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// What the server has under this reference.
    Named(Reference),
    /// An image of the server's that was opened before ([`Image::open`]). The session begins without a word from the
    /// server; faults wait until it is there.
    Opened(Arc<Image>),
}

impl From<&Reference> for ImageSource {
    fn from(reference: &Reference) -> Self {
        Self::Named(reference.clone())
    }
}

impl From<Arc<Image>> for ImageSource {
    fn from(image: Arc<Image>) -> Self {
        Self::Opened(image)
    }
}

/// Why a session could not be opened, or memory not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The server, or what it sent.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The kernel.
    #[error(transparent)]
    Uffd(#[from] OpenError),
    /// The image has no regular file of that path.
    #[error("image {image} has no file {path:?}")]
    NoSuchFile {
        /// The image.
        image: postcopy_proto::digest::Digest,
        /// The path.
        path: String,
    },
    /// The file has no such bytes, or they do not begin with a page.
    #[error(
        "bytes {} to {} of {path:?}: the file has {file_bytes}, and a part begins at a multiple of 4096",
        bytes.start, bytes.end
    )]
    Span {
        /// The file's path.
        path: String,
        /// What was asked for.
        bytes: Range<u64>,
        /// Its length.
        file_bytes: u64,
    },
    /// A region of another process cannot be.
    #[error("region {index}, {len} bytes at {address:#x}: {reason}")]
    Region {
        /// Which one of those that were given, from 0.
        index: usize,
        /// Its first address.
        address: usize,
        /// Its length.
        len: usize,
        /// What is wrong.
        reason: String,
    },
    /// Address space, threads or descriptors could not be had.
    #[error("{what} cannot be had")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state file, see [`Session::resume`].
    #[error(transparent)]
    State(#[from] StateError),
    /// [`Options::track_writes`] was asked for with [`Session::attach`], and cannot be.
    #[error("what is written to another process's memory cannot be told: {0}")]
    NoTracking(String),
    /// The session has ended before.
    #[error("the session has ended")]
    Ended,
}

/// Why pages were lost.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LossError {
    /// A page could not be had; later touches of it are SIGBUS, or wait, by the loss policy.
    #[error("{0}")]
    Lost(Arc<str>),
    /// Beyond the region's end.
    #[error("bytes {offset} to {offset} + {len} are beyond the region's {region_bytes} bytes")]
    OutOfRange {
        /// The first byte asked for.
        offset: usize,
        /// How many.
        len: usize,
        /// The region's length.
        region_bytes: usize,
    },
    /// It took longer than the caller wanted to wait.
    #[error("not all was resident within {0:?}")]
    TimedOut(Duration),
}

/// How far a session is. All counts are since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages of all regions.
    pub total_pages: u64,
    /// Pages that are there.
    pub resident_pages: u64,
    /// Pages that were lost: a touch is SIGBUS.
    pub poisoned_pages: u64,
    /// Pages whose content the program gave back: a touch gives zeros.
    pub removed_pages: u64,
    /// Messages about touches of absent pages; several threads at one page are several.
    pub faults: u64,
    /// Chunks that came over the demand lane.
    pub demand_chunks: u64,
    /// Of these, those that had not been touched when they came: touches went forward.
    pub read_ahead_chunks: u64,
    /// Chunks that came over the bulk lane.
    pub bulk_chunks: u64,
    /// Pages that the working set has brought.
    pub working_set_pages: u64,
    /// Bytes of the frames that came over both.
    pub frame_bytes: u64,
}

/// What is counted, in the order of [`Progress`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) demand_chunks: AtomicU64,
    pub(crate) read_ahead_chunks: AtomicU64,
    pub(crate) bulk_chunks: AtomicU64,
    pub(crate) working_set_pages: AtomicU64,
    pub(crate) frame_bytes: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// What the program asks of the pager.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve this region from now on; answers when it is registered.
    Map { region: Arc<RegionState>, reply: std::sync::mpsc::SyncSender<io::Result<()>> },
    /// Let go of this region and give its memory back.
    Unmap { region: Arc<RegionState>, memory: Memory },
    /// Bring these pages as if they had been touched.
    Bring { region: Arc<RegionState>, pages: Range<usize> },
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
    serves_kernel_faults: bool,
    pub(crate) gate: Gate,
    pub(crate) counters: Counters,
    /// Changed by the pager alone. Held for a copy of the Arc, never over a touch of a region.
    spaces: Mutex<Arc<Spaces>>,
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
    reported: Condvar,
    /// Notes what is touched, if that was asked for.
    pub(crate) recorder: Option<Recorder>,
    /// Held for an answer or a look, and only tried by the pager.
    pub(crate) pace: Mutex<Pace>,
    /// Chunks that have been asked for over the demand lane.
    pub(crate) on_demand: Arc<Underway>,
    /// And over the bulk lane.
    pub(crate) in_bulk: Underway,
    /// A background fill was asked for.
    fills: AtomicBool,
    fill_started: AtomicBool,
    is_filling: AtomicBool,
    /// Nobody can take the session over, although there is a state file.
    has_no_successor: AtomicBool,
    /// The pager has ended, and memory is registered still.
    is_left_open: AtomicBool,
    /// There is new work for the fill.
    pub(crate) fill_work: Notify,
    /// The pager has ended; for the recorder.
    pub(crate) has_ended: Notify,
}

#[derive(Clone, Debug, Default)]
struct OutcomeSoFar {
    error: Option<Arc<str>>,
    /// How often something was reported.
    reports: u64,
    ended: bool,
    /// How often page states have changed while somebody waited for that.
    changes: u64,
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
        owner: Option<u32>,
    ) -> Self {
        let chunks = image.root().chunks();
        let recorder = options.record.then(|| Recorder::new(&image));
        if let Some(recorder) = &recorder {
            recorder.brought_before(&image, spaces.regions());
        }
        Self {
            address,
            image,
            options,
            serves_kernel_faults: spaces.spaces().iter().all(|space| space.uffd.serves_kernel_faults()),
            gate: Gate::default(),
            counters: Counters::default(),
            spaces: Mutex::new(Arc::new(spaces)),
            next_space_id: AtomicU32::new(next_space_id),
            state,
            callers: owner.map(Callers::of),
            outcome: Mutex::default(),
            changed: Condvar::new(),
            waiters: AtomicU64::new(0),
            reported: Condvar::new(),
            recorder,
            pace: Mutex::default(),
            on_demand: Arc::new(Underway::new(chunks)),
            in_bulk: Underway::new(chunks),
            fills: AtomicBool::new(options.fill),
            fill_started: AtomicBool::new(false),
            is_filling: AtomicBool::new(false),
            has_no_successor: AtomicBool::new(false),
            is_left_open: AtomicBool::new(false),
            fill_work: Notify::new(),
            has_ended: Notify::new(),
        }
    }

    /// The spaces and regions that there are at the moment.
    pub(crate) fn spaces(&self) -> Arc<Spaces> {
        Arc::clone(&self.spaces.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces them, and writes that down: see [`State::write`]. For the pager alone.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn set_spaces(&self, spaces: Arc<Spaces>, done: Option<usize>) -> Result<(), StateError> {
        self.state.write(&spaces, self.next_space_id.load(Ordering::Relaxed), done)?;
        *self.spaces.lock().unwrap_or_else(PoisonError::into_inner) = spaces;
        self.fill_work.notify_one();
        Ok(())
    }

    /// An id that no space has had. After four thousand million there is none.
    pub(crate) fn next_space_id(&self) -> Result<u32, StateError> {
        let next = |id: u32| id.checked_add(1);
        let id = self.next_space_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.map_err(|_| StateError::Full("more processes"))
    }

    fn outcome(&self) -> MutexGuard<'_, OutcomeSoFar> {
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
        self.reported.notify_all();
        self.changed.notify_all();
        self.fill_work.notify_one();
        self.has_ended.notify_one();
    }

    /// What has been touched has been sent, or that is given up.
    pub(crate) fn recording_has_ended(&self) {
        self.outcome().reports += 1;
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
    fn wait<T>(
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
        region: &Arc<RegionState>,
        pages: Range<usize>,
    ) -> Result<(), LossError> {
        let absent = |pages: &Range<usize>| region.next_run(pages.clone(), &[PageState::Absent]);
        let reported_before = self.outcome().reports;
        if absent(&pages).is_some() {
            let command = Command::Bring { region: Arc::clone(region), pages: pages.clone() };
            // An ended pager has poisoned what was absent, which is seen below.
            let _ = commands.blocking_send(command);
        }
        self.wait(None, |outcome| {
            // What was lost before this call may have come since; what is lost now may be what it waits for.
            let waiting = self.options.on_loss == LossPolicy::Wait && outcome.reports > reported_before;
            (absent(&pages).is_none() || waiting || outcome.ended).then_some(())
        });
        let lost = [PageState::Absent, PageState::Poisoned];
        match region.next_run(pages, &lost) {
            None => Ok(()),
            Some(_) => Err(LossError::Lost(self.error().unwrap_or_else(|| "the session has ended".into()))),
        }
    }

    /// Sends `command` when there is room for it; drops it if the pager has ended.
    pub(crate) fn unmap_later(&self, commands: &mpsc::Sender<Command>, command: Command) {
        if commands.is_closed() {
            // An munmap of memory that is registered would wait for somebody to read its event.
            return if self.is_left_open.load(Ordering::Acquire) {
                std::mem::forget(command)
            } else {
                drop(command)
            };
        }
        let commands = commands.clone();
        let sender = std::thread::Builder::new().name("postcopy-unmap".into());
        // The one that cannot be had a thread for leaks: better than a range that is unmapped while registered.
        let kept = Arc::new(Mutex::new(ManuallyDrop::new(Some(command))));
        let send = move || {
            let command = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(command) = command {
                drop(commands.blocking_send(command));
            }
        };
        let _ = sender.spawn(send);
    }

    fn progress(&self) -> Progress {
        let mut progress = Progress {
            faults: self.counters.faults.load(Ordering::Relaxed),
            demand_chunks: self.counters.demand_chunks.load(Ordering::Relaxed),
            read_ahead_chunks: self.counters.read_ahead_chunks.load(Ordering::Relaxed),
            bulk_chunks: self.counters.bulk_chunks.load(Ordering::Relaxed),
            working_set_pages: self.counters.working_set_pages.load(Ordering::Relaxed),
            frame_bytes: self.counters.frame_bytes.load(Ordering::Relaxed),
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

/// Memory that is being filled from one image. Lives until it and its regions are dropped.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

impl Session {
    /// Opens an image on a server: connects, fetches and checks its root, starts the pager.
    ///
    /// # Errors
    /// [`SessionError`]; nothing is mapped then.
    ///
    /// # Blocking
    /// For some round trips, at most 30 s. Must not be called on an async worker.
    pub fn open(
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
    ) -> Result<Self, SessionError> {
        Self::open_by(address, reference, options, Start::in_a_thread)
    }

    /// The same, where `run` starts the pager.
    pub(crate) fn open_by(
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        Self::start(address, reference.into(), options, Owner::ThisProcess, run)
    }

    /// Fills memory of another process from an image's files: memory of pages of 4 KiB, for whose missing pages it has
    /// registered a userfaultfd.
    ///
    /// Those of its events that the userfaultfd was asked for are followed: EVENT_REMOVE, EVENT_UNMAP, EVENT_REMAP and
    /// EVENT_FORK, which brings the children into the session. Where the process does one of these unasked, a touch
    /// may give the image's bytes where it should give zeros, or zeros where it should give the image's bytes.
    ///
    /// A duplicate of the userfaultfd is kept, and made non-blocking, which the original then is, too. If this fails
    /// nothing is lost, as long as the caller keeps its own: faults wait.
    /// The session ends when it is dropped, or in order when the process and its children have exited, which is
    /// noticed within a second. A background fill that cannot be started is no failure: [`Session::error`] tells of it.
    /// At its end what is still absent is SIGBUS there: see [`Session::end`]. When it cannot
    /// go on ([`Session::error`]) it ends, too; but if it has a state file, all is left to a successor as it is.
    ///
    /// # Errors
    /// As [`Session::open`]; [`SessionError::Region`] names a region that cannot be;
    /// [`SessionError::Uffd`]: not a userfaultfd; [`SessionError::State`]; [`SessionError::NoTracking`].
    ///
    /// # Blocking
    /// As [`Session::open`].
    pub fn attach(
        address: &ServerAddress,
        image: impl Into<ImageSource>,
        options: Options,
        memory: &ForeignMemory<'_>,
    ) -> Result<Self, SessionError> {
        Self::attach_by(address, image.into(), options, memory, Start::in_a_thread)
    }

    /// The same, where `run` starts the pager.
    pub(crate) fn attach_by(
        address: &ServerAddress,
        image: ImageSource,
        options: Options,
        memory: &ForeignMemory<'_>,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        let descriptor = |source| SessionError::System { what: "a descriptor", source };
        let uffd = memory.uffd.try_clone_to_owned().map_err(descriptor)?;
        let state = memory.state.map(File::try_clone).transpose().map_err(descriptor)?;
        let (regions, pid) = (memory.regions.to_vec(), memory.pid);
        let owner = Owner::Another { uffd, regions, state, pid, is_settled: memory.is_registered };
        Self::start(address, image, options, owner, run)
    }

    /// Goes on with a session whose process has died, or that could not go on: from its state file, and the
    /// userfaultfds that the file names by number ([`crate::state::descriptors`]), which `uffds` gives by these numbers.
    /// Nothing that its owners did in between is missed, as long as all these descriptors have stayed open somewhere
    /// and nobody has read from them.
    ///
    /// Duplicates of them are kept, and stand in the file from then on. If this fails nothing is lost, as long as the
    /// caller keeps his own. `known` are images that have been opened: where the session's is among them, it begins
    /// without a word from the server.
    ///
    /// # Errors
    /// As [`Session::attach`]; [`StateError::Empty`]: the session was never there, and is to be attached;
    /// [`StateError::Ended`].
    ///
    /// # Blocking
    /// As [`Session::open`].
    pub fn resume<'a>(
        address: &ServerAddress,
        known: &[Arc<Image>],
        state: &File,
        uffds: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
    ) -> Result<Self, SessionError> {
        Self::resume_by(address, known, state, uffds, Start::in_a_thread)
    }

    /// The same, where `run` starts the pager.
    pub(crate) fn resume_by<'a>(
        address: &ServerAddress,
        known: &[Arc<Image>],
        state: &File,
        uffds: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        let (state, contents) = State::open(state)?;
        let uffds = attach::descriptors_left(&contents, uffds)?;
        let name = "image".parse().expect("a name");
        let image = match known.iter().find(|known| known.digest() == contents.image) {
            Some(known) => ImageSource::Opened(Arc::clone(known)),
            None => ImageSource::Named(Reference::Digest { name, image: contents.image }),
        };
        let options = contents.options;
        Self::start(address, image, options, Owner::Left { state, contents: Box::new(contents), uffds }, run)
    }

    fn start(
        address: &ServerAddress,
        image: ImageSource,
        options: Options,
        owner: Owner,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        let options = Options { fault_deadline: options.fault_deadline.min(YEAR), ..options };
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (reply, opened) = std::sync::mpsc::sync_channel(1);
        let address = address.clone();
        // It connects meanwhile.
        let fill = (options.fill || options.working_set).then(|| fill::Beginning::new(&address));
        run(Start { address, image, options, owner, commands: queue, reply })
            .map_err(|source| SessionError::System { what: "a thread for the pager", source })?;
        let shared = opened.recv().map_err(|_| SessionError::Ended)??;
        let session = Self { shared, commands };
        // It serves already: ending it here would take its memory away.
        if let Some(fill) = fill
            && let Err(error) = session.start_fill(fill)
        {
            session.shared.report(&format!("no background fill: {error}"));
        }
        if options.record
            && let Err(source) = recorder::start(&session.shared)
        {
            session.shared.report(&format!("nothing is recorded: {source}"));
        }
        Ok(session)
    }

    /// What the process that this session was attached to has changed since the restore, or since
    /// [`Session::take_changes`]: addresses of memory that it has now. The session must track writes
    /// ([`Options::track_writes`]). Children that it has forked are not told of. After [`Session::resume`] what was
    /// removed before counts as removed and written again.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if it does not; else what PAGEMAP_SCAN answers, see proc_pid_pagemap(5).
    ///
    /// # Blocking
    /// For a look at each page's entry in the page tables; some milliseconds a GiB.
    pub fn changes(&self) -> io::Result<Changes> {
        changes::of_process(&self.shared, false)
    }

    /// The same, and begins anew: what is written from here on is told of the next time. No write is lost, also where
    /// it writes meanwhile.
    ///
    /// # Errors
    /// As [`Session::changes`].
    ///
    /// # Blocking
    /// As there, and until each run of pages is protected anew.
    pub fn take_changes(&self) -> io::Result<Changes> {
        changes::of_process(&self.shared, true)
    }

    /// The image that memory is filled from.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.shared.image
    }

    /// Whether read(2) and the like may be used on absent memory. Where privileges allow user-mode faults only,
    /// they fail with EFAULT. Of another process's memory its owner decides that when he opens the userfaultfd, which
    /// cannot be seen: then this is whether he could have.
    #[must_use]
    pub fn serves_kernel_faults(&self) -> bool {
        self.shared.serves_kernel_faults
    }

    /// Maps the whole file at `path` of the image.
    ///
    /// # Errors
    /// [`SessionError::NoSuchFile`], [`SessionError::System`], [`SessionError::Ended`].
    ///
    /// # Blocking
    /// Until the pager has registered the memory; no round trip.
    pub fn map(&self, path: impl AsRef<[u8]>) -> Result<Region, SessionError> {
        let file = self.file(path.as_ref())?;
        self.map_span(file, 0..to_usize(file.size_bytes))
    }

    /// Maps a part of the file at `path` of the image: the bytes from `bytes.start`, a multiple of the page size of
    /// 4 KiB, to `bytes.end`. A file may be mapped several times, and its parts may overlap.
    ///
    /// # Errors
    /// As [`Session::map`]; [`SessionError::Span`]: the file has no such bytes, or none begins there.
    ///
    /// # Blocking
    /// As there.
    pub fn map_part(&self, path: impl AsRef<[u8]>, bytes: Range<u64>) -> Result<Region, SessionError> {
        let file = self.file(path.as_ref())?;
        let aligned = bytes.start.is_multiple_of(PAGE_BYTES as u64);
        if !aligned || bytes.start > bytes.end || bytes.end > file.size_bytes {
            let path = String::from_utf8_lossy(path.as_ref()).into_owned();
            return Err(SessionError::Span { path, bytes, file_bytes: file.size_bytes });
        }
        self.map_span(file, to_usize(bytes.start)..to_usize(bytes.end))
    }

    fn file(&self, path: &[u8]) -> Result<FileEntry, SessionError> {
        let image = &self.shared.image;
        let path_text = || String::from_utf8_lossy(path).into_owned();
        let missing = || SessionError::NoSuchFile { image: image.digest(), path: path_text() };
        image.file(path).ok_or_else(missing)
    }

    /// Maps bytes that the file has, from the beginning of a page on.
    fn map_span(&self, file: FileEntry, bytes: Range<usize>) -> Result<Region, SessionError> {
        let system = |what| move |source| SessionError::System { what, source };
        let pages = bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES);
        let memory = match bytes.len() {
            0 => None,
            _ => Some(Memory::reserve(pages.len() * PAGE_BYTES).map_err(system("address space"))?),
        };
        let start = memory.as_ref().map_or(0, Memory::start);
        let chunk_bytes = self.shared.image.root().chunk_size().bytes();
        let space = self.shared.spaces().spaces().first().cloned().ok_or(SessionError::Ended)?;
        let states = self.shared.state.page_states(pages.len())?;
        let common = Common::new(states, false, self.shared.options.track_writes);
        let state = Arc::new(RegionState::new(space, start, file, pages, chunk_bytes, common));
        if memory.is_some() {
            let (reply, registered) = std::sync::mpsc::sync_channel(1);
            let command = Command::Map { region: Arc::clone(&state), reply };
            self.commands.blocking_send(command).map_err(|_| SessionError::Ended)?;
            let registered = registered.recv().map_err(|_| SessionError::Ended)?;
            registered.map_err(system("a userfaultfd registration"))?;
        }
        Ok(Region::new(memory, bytes.len(), state, Arc::clone(&self.shared), self.commands.clone()))
    }

    /// Brings everything in the background, over the bulk lane, from now on.
    ///
    /// # Errors
    /// [`SessionError::System`] if there is no thread to be had. What goes wrong later is told by
    /// [`Session::wait_resident`] and [`Session::error`].
    pub fn fill(&self) -> Result<(), SessionError> {
        self.shared.fills.store(true, Ordering::Release);
        if !self.shared.fill_started.load(Ordering::Acquire) {
            self.start_fill(fill::Beginning::new(&self.shared.address))?;
        }
        self.shared.fill_work.notify_one();
        Ok(())
    }

    fn start_fill(&self, fill: io::Result<fill::Beginning>) -> Result<(), SessionError> {
        if self.shared.fill_started.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let started = fill.and_then(|fill| fill.start(&self.shared));
        if started.is_err() {
            self.shared.fill_started.store(false, Ordering::Release);
        }
        started.map_err(|source| SessionError::System { what: "threads for the background fill", source })
    }

    /// Waits until what was touched has been told to the server ([`Options::record`]), at most for `timeout`. That is done
    /// when nothing new was touched for some seconds, and once more at the session's end, which is what this waits for.
    ///
    /// # Errors
    /// Why it could not be told, or that it has not been yet.
    ///
    /// # Blocking
    /// As long as it says; the server makes the working set anew before it answers.
    pub fn wait_recorded(&self, timeout: Duration) -> Result<(), String> {
        let Some(recorder) = &self.shared.recorder else { return Ok(()) };
        let deadline = Instant::now().checked_add(timeout);
        let outcome = self.shared.wait(deadline, |_| recorder.outcome());
        outcome.unwrap_or_else(|| Err(format!("not within {timeout:?}")))
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Why pages were lost, if any were: the first reason.
    #[must_use]
    pub fn error(&self) -> Option<Arc<str>> {
        self.shared.error()
    }

    /// Ends the session, and waits for it at most for `timeout`: whether it has ended. A drop ends it, too, but does not
    /// wait; a process that exits before the end leaves zeros in another one's memory. It ends only when all of its
    /// regions have been dropped.
    #[must_use]
    pub fn end(self, timeout: Duration) -> bool {
        let Self { shared, commands } = self;
        drop(commands);
        shared.wait(Instant::now().checked_add(timeout), |outcome| outcome.ended.then_some(())).is_some()
    }

    /// All memory of the process is registered: see [`ForeignMemory::is_registered`].
    pub fn settle(&self) {
        self.shared.spaces().spaces().iter().for_each(|space| space.settle());
        self.shared.state.settle();
        self.shared.fill_work.notify_one();
    }

    /// Has the pages at these addresses come as if they had been touched: for those that the kernel reads on somebody
    /// else's behalf without waiting for them, such as the arguments that /proc shows.
    ///
    /// # Blocking
    /// Until the pager has been told; not until they are there.
    pub fn bring(&self, addresses: &Range<usize>) {
        let spaces = self.shared.spaces();
        for region in spaces.regions() {
            let pages = region.pages_in(addresses);
            if !pages.is_empty() {
                let command = Command::Bring { region: Arc::clone(region), pages };
                // An ended session brings nothing any more.
                let _ = self.commands.blocking_send(command);
            }
        }
    }

    /// Nobody can take the session over any more, although it has a state file: when it cannot go on, what is absent is
    /// made SIGBUS instead of being left.
    pub fn has_no_successor(&self) {
        self.shared.has_no_successor.store(true, Ordering::Release);
    }

    /// Ends the session and leaves its memory as it is, to whoever takes it over from its state file; waits for that at
    /// most for `timeout`: whether it has ended. Descriptors that the file names stay open.
    #[must_use]
    pub fn leave(&self, timeout: Duration) -> bool {
        // It may have ended already.
        let _ = self.commands.blocking_send(Command::Leave);
        self.wait_end(timeout)
    }

    /// Ends the session in order, as [`Session::end`], for those who share it. Memory of another process has no regions
    /// that it would wait for.
    #[must_use]
    pub fn close(&self, timeout: Duration) -> bool {
        let _ = self.commands.blocking_send(Command::End);
        self.wait_end(timeout)
    }

    /// Whether it has ended and left its memory to be taken over: it could not go on.
    #[must_use]
    pub fn is_left(&self) -> bool {
        self.shared.has_ended() && self.shared.is_left_open.load(Ordering::Acquire)
    }

    /// Whether every page of every region is resident or was given back.
    #[must_use]
    pub fn is_resident(&self) -> bool {
        self.shared.spaces().regions().iter().all(|region| region.is_resolved())
    }

    /// Sends a signal to the process whose memory it is, and to all that it has forked. False: nobody has told who that
    /// is.
    pub fn signal_owners(&self, signal: rustix::process::Signal) -> bool {
        self.shared.signal_owners(signal)
    }

    /// Waits until the session has ended by itself, at most for `timeout`: whether it has. A session over another
    /// process's memory does when that process and its children have exited.
    #[must_use]
    pub fn wait_end(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        self.shared.wait(deadline, |outcome| outcome.ended.then_some(())).is_some()
    }

    /// Waits until a page is lost; the reason, or None after `timeout` or when the session has ended.
    #[must_use]
    pub fn wait_error(&self, timeout: Duration) -> Option<Arc<str>> {
        let none = |outcome: &mut OutcomeSoFar| outcome.error.is_none() && !outcome.ended;
        let waited = self.shared.reported.wait_timeout_while(self.shared.outcome(), timeout, none);
        waited.unwrap_or_else(PoisonError::into_inner).0.error.clone()
    }

    /// Waits until every page of every region is resident or was given back. Without [`Session::fill`] that
    /// comes true only when all has been touched.
    ///
    /// # Errors
    /// [`LossError::Lost`] as soon as a page is lost, [`LossError::TimedOut`].
    ///
    /// # Blocking
    /// At most for `timeout`.
    pub fn wait_resident(&self, timeout: Duration) -> Result<(), LossError> {
        // Too far away to be counted is for ever.
        let deadline = Instant::now().checked_add(timeout);
        let outcome = self.shared.wait(deadline, |outcome| {
            if self.shared.spaces().regions().iter().all(|region| region.is_resolved()) {
                return Some(Ok(()));
            }
            let ended = outcome.ended.then(|| "the session has ended".into());
            outcome.error.clone().or(ended).map(|reason| Err(LossError::Lost(reason)))
        });
        outcome.unwrap_or(Err(LossError::TimedOut(timeout)))
    }
}
