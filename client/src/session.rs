//! Sessions: memory of this process, or of another one, that is filled from an image.
//!
//! [`Session::open`] and [`Session::attach`] start the pager, a thread with a runtime, a connection
//! and a userfaultfd ([`crate::pager`]). [`Session::map`] maps memory for the pager to serve.
//! [`Session::fill`] starts the bulk lane beside it ([`crate::fill`]). [`Shared`] holds the state
//! that these threads have in common.

mod changes;
pub mod host;
mod region;
mod shared_pager;

pub use crate::pager::attach::{ForeignMemory, ForeignRegion, Sharing};
pub use changes::Changes;
pub use region::Region;
pub use shared_pager::SharedPager;

use crate::error::{LossError, RecordingError, SessionError};
use crate::fill;
use crate::memory::{self, Object, ObjectKind, states_for};
use crate::options::{Options, Progress};
use crate::outcome::{Failure, FailureEnd, FailureKind, Failures};
use crate::pager::Start;
use crate::pager::attach::{self, Owner};
use crate::record::recorder::{self};
use crate::record::trace::{self, TraceWriter};
use crate::remote::ServerAddress;
use crate::remote::{Image, ImageSource};
use crate::shared::{Command, Shared};
use crate::state_file::{State, StateError};
use crate::uffd::memory::Memory;
use host::Hosted;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use postcopy_proto::reference::Reference;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The capacity of the queue of commands to the pager.
const COMMANDS: usize = 256;

/// A set of memory that is filled from one image. It lives until the value and all of its regions
/// are dropped.
#[derive(Debug)]
pub struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: mpsc::Sender<Command>,
}

impl Session {
    /// Opens an image on a server: connects, fetches and verifies the image's root, and starts the
    /// pager.
    ///
    /// # Errors
    /// [`SessionError`]; then nothing is mapped.
    ///
    /// # Blocking
    /// Blocks for some round trips, at most 30 s. Must not be called on an async worker.
    pub fn open(
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
    ) -> Result<Self, SessionError> {
        Self::open_by(address, reference, options, Start::in_a_thread)
    }

    /// Opens an image as [`Session::open`] does; `run` starts the pager.
    pub(crate) fn open_by(
        address: &ServerAddress,
        reference: &Reference,
        options: Options,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        Self::start(address, reference.into(), options, Owner::ThisProcess, run)
    }

    /// Attaches to memory of another process, and fills it from files of an image.
    ///
    /// The process has opened the userfaultfd of `memory`. Its memory is registered for absent
    /// pages, or will be: see [`ForeignMemory::is_registered`].
    ///
    /// The session follows those events that the userfaultfd reports: EVENT_REMOVE, EVENT_UNMAP,
    /// EVENT_REMAP and EVENT_FORK, which adds the children to the session. If the userfaultfd does
    /// not report an event that the process causes, a later access may read the image's bytes in
    /// place of zeros, or zeros in place of the image's bytes.
    ///
    /// The session keeps a duplicate of the userfaultfd, and makes both non-blocking. If this call
    /// fails, nothing is lost as long as the caller keeps its own descriptor: page faults stay
    /// pending. If the background fill cannot start, the call succeeds, and [`Session::error`]
    /// returns the reason.
    ///
    /// The session ends when it is dropped. It also ends in order when the process and its children
    /// have exited, which it notices within a quarter of a second. At its end it poisons the pages
    /// that are still absent, so that an access raises SIGBUS: see [`Session::end`]. A session that
    /// cannot go on ([`Session::error`]) ends in the same way; but with a state file it leaves all
    /// pages as they are, for a successor.
    ///
    /// # Errors
    /// As for [`Session::open`]; [`SessionError::Region`] names an invalid region;
    /// [`SessionError::Uffd`]: the descriptor is not a userfaultfd; [`SessionError::State`];
    /// [`SessionError::NoTracking`].
    ///
    /// # Blocking
    /// As for [`Session::open`].
    pub fn attach(
        address: &ServerAddress,
        image: impl Into<ImageSource>,
        options: Options,
        memory: &ForeignMemory<'_>,
    ) -> Result<Self, SessionError> {
        Self::attach_by(address, image.into(), options, memory, Start::in_a_thread)
    }

    /// Attaches to memory as [`Session::attach`] does; `run` starts the pager.
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
        let owner = Owner::Another { uffd, regions, state, pid, is_registered: memory.is_registered };
        Self::start(address, image, options, owner, run)
    }

    /// Resumes a session whose process has died, or that could not go on, from its state file.
    ///
    /// The file names the session's userfaultfds by number ([`crate::state_file::descriptors`]);
    /// `uffds` returns the descriptor for such a number. The session misses no event of its owners,
    /// as long as all these descriptors have stayed open in some process, and no process has read
    /// from them.
    ///
    /// The session keeps duplicates of the descriptors, and the file names these from then on. If
    /// this call fails, nothing is lost as long as the caller keeps its own descriptors. `known`
    /// are images that the caller has opened. If the session's image is among them, the session
    /// starts without waiting for the server.
    ///
    /// # Errors
    /// As for [`Session::attach`]; [`StateError::Empty`]: no session has used the file yet, so
    /// attach one; [`StateError::Ended`].
    ///
    /// # Blocking
    /// As for [`Session::open`].
    pub fn resume<'a>(
        address: &ServerAddress,
        known: &[Arc<Image>],
        state: &File,
        uffds: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
    ) -> Result<Self, SessionError> {
        Self::resume_by(address, known, state, uffds, Start::in_a_thread)
    }

    /// Resumes a session as [`Session::resume`] does; `run` starts the pager.
    pub(crate) fn resume_by<'a>(
        address: &ServerAddress,
        known: &[Arc<Image>],
        state: &File,
        uffds: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
        run: impl FnOnce(Start) -> io::Result<()>,
    ) -> Result<Self, SessionError> {
        let (state, contents) = State::open(state)?;
        let uffds = attach::descriptors_left(&contents, uffds)?;
        let name = "image".parse().expect("`image` is a valid name");
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
        let options = Options {
            fault_deadline: options.fault_deadline.min(YEAR),
            record_pages: options.record_pages.clamp(1, Options::MOST_RECORD_PAGES),
            record_cache_mib: options.record_cache_mib.max(1),
            ..options
        };
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (reply, opened) = std::sync::mpsc::sync_channel(1);
        let address = address.clone();
        // The fill connects while the pager opens the session.
        let fill = (options.fill || options.working_set).then(|| fill::ConnectingFill::new(&address));
        run(Start { address, image, options, owner, commands: queue, reply })
            .map_err(|source| SessionError::System { what: "a thread for the pager", source })?;
        let shared = opened.recv().map_err(|_| SessionError::Ended)??;
        let session = Self { shared, commands };
        // Not an error of the call: the session already serves page faults, and an error would end
        // it.
        if let Some(fill) = fill
            && let Err(error) = session.start_fill(fill)
        {
            let reason = format!("the background fill could not start: {error}");
            session.shared.outcome.add(FailureKind::Fill, &reason, None);
        }
        if options.record
            && let Some(sender) = session.shared.sender()
            && let Err(source) = recorder::start(sender)
        {
            let reason = format!("the recording could not start: {source}");
            session.shared.outcome.add(FailureKind::Recording, &reason, Some(FailureEnd::Reported));
        }
        Ok(session)
    }

    /// Returns the changes of memory in the attached process since the restore, or since
    /// [`Session::take_changes`], as addresses of its current memory.
    ///
    /// The session must track writes ([`Options::track_writes`]). Changes by the process's children
    /// are not included. After [`Session::resume`], pages that were removed before the takeover
    /// count once more as removed and written.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the session does not track writes; else the error of
    /// PAGEMAP_SCAN, see proc_pid_pagemap(5).
    ///
    /// # Blocking
    /// Reads each page's entry in the page tables, which takes some milliseconds a GiB.
    pub fn changes(&self) -> io::Result<Changes> {
        changes::of_process(&self.shared, false)
    }

    /// Returns the changes as [`Session::changes`] does, and starts a new period: the next call
    /// returns the changes from here on. No write is lost, even if the process writes during the
    /// call.
    ///
    /// # Errors
    /// As for [`Session::changes`].
    ///
    /// # Blocking
    /// As for [`Session::changes`], and until each run of pages is write-protected again.
    pub fn take_changes(&self) -> io::Result<Changes> {
        changes::of_process(&self.shared, true)
    }

    /// Returns the image that fills the memory.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.shared.image
    }

    /// Returns whether system calls such as read(2) may access absent memory. If the process has
    /// only the right to serve user-mode faults, such calls fail with EFAULT.
    ///
    /// For another process's memory, its owner made that choice when it opened the userfaultfd, and
    /// this process cannot see it. Then the result says whether this process has the right to serve
    /// the kernel's faults.
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
    /// Blocks until the pager has registered the memory; makes no round trip.
    pub fn map(&self, path: impl AsRef<[u8]>) -> Result<Region, SessionError> {
        let file = self.file(path.as_ref())?;
        self.map_span(file, 0..to_usize(file.size_bytes))
    }

    /// Maps a part of the file at `path` of the image: the bytes from `bytes.start`, which must be
    /// a multiple of 4096, to `bytes.end`. A program may map a file several times, and the parts
    /// may overlap.
    ///
    /// # Errors
    /// As for [`Session::map`]; [`SessionError::Span`]: the file does not have these bytes, or no
    /// page begins at `bytes.start`.
    ///
    /// # Blocking
    /// As for [`Session::map`].
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

    /// Maps bytes of the file. They must lie in the file, and begin at the beginning of a page.
    fn map_span(&self, file: FileEntry, bytes: Range<usize>) -> Result<Region, SessionError> {
        let system = |what| move |source| SessionError::System { what, source };
        let pages = bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES);
        let memory = match bytes.len() {
            0 => None,
            _ => Some(Memory::reserve(pages.len() * PAGE_BYTES).map_err(system("address space"))?),
        };
        let start = memory.as_ref().map_or(0, Memory::start);
        let chunk_bytes = self.shared.image.root().chunk_size().bytes();
        let space = self.shared.spaces().spaces().next().cloned().ok_or(SessionError::Ended)?;
        if u32::try_from(pages.len()).is_err() {
            let source = io::Error::from(io::ErrorKind::FileTooLarge);
            return Err(SessionError::System { what: "a region of more than 16 TiB", source });
        }
        let states =
            states_for(self.shared.state.arena(), &pages, [pages.clone()]).map_err(StateError::from)?;
        let kind = ObjectKind { tracks_removals: self.shared.options.track_writes, ..ObjectKind::default() };
        let object = Arc::new(Object::new(file, pages.start, states, kind, chunk_bytes));
        let state = memory::Region::new(space, object, start, pages);
        if memory.is_some() {
            let (reply, registered) = std::sync::mpsc::sync_channel(1);
            let command = Command::Map { region: state.clone(), reply };
            self.commands.blocking_send(command).map_err(|_| SessionError::Ended)?;
            let registered = registered.recv().map_err(|_| SessionError::Ended)?;
            registered.map_err(system("a userfaultfd registration"))?;
        }
        Ok(Region::new(memory, bytes.len(), state, Arc::clone(&self.shared), self.commands.clone()))
    }

    /// Starts the background fill: fetches all pages of all regions over the bulk lane.
    ///
    /// # Errors
    /// [`SessionError::System`] if a thread cannot start. [`Session::wait_resident`] and
    /// [`Session::error`] return later failures.
    pub fn fill(&self) -> Result<(), SessionError> {
        self.shared.fills.store(true, Ordering::Release);
        if !self.shared.fill_started.load(Ordering::Acquire) {
            self.start_fill(fill::ConnectingFill::new(&self.shared.address))?;
        }
        self.shared.fill_work.notify_one();
        Ok(())
    }

    fn start_fill(&self, fill: io::Result<fill::ConnectingFill>) -> Result<(), SessionError> {
        if self.shared.fill_started.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let started = fill.map(|fill| fill.start(&self.shared));
        if started.is_err() {
            self.shared.fill_started.store(false, Ordering::Release);
        }
        started.map_err(|source| SessionError::System { what: "a thread for the background fill", source })
    }

    /// Writes the session's trace ([`Options::trace`]) from its beginning to its end, in a thread
    /// of its own, as lines of JSON: see [`crate::record::trace`]. A trace can be written once.
    ///
    /// # Errors
    /// Unsupported if the session records no trace, or if the trace is being written already; the
    /// error of starting a thread.
    pub fn write_trace(&self, to: impl io::Write + Send + 'static) -> io::Result<TraceWriter> {
        let writer = self.shared.trace_writer();
        trace::start(
            writer.ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the session records no trace (Options::trace is off)",
                )
            })?,
            to,
        )
    }

    /// Waits at most for `timeout` until the server has the session's whole recording
    /// ([`Options::record`]).
    ///
    /// The session sends the recording whenever no new page was accessed for some seconds, at
    /// growing intervals, and a last time when it ends. This call waits for that last time.
    ///
    /// # Errors
    /// [`RecordingError::NotSent`], [`RecordingError::TimedOut`].
    ///
    /// # Blocking
    /// Blocks for up to `timeout`: the server rebuilds the working set before it answers.
    pub fn wait_recorded(&self, timeout: Duration) -> Result<(), RecordingError> {
        let Some(recorder) = &self.shared.recorder else { return Ok(()) };
        let deadline = Instant::now().checked_add(timeout);
        let outcome = self.shared.outcome.wait(deadline, |_| recorder.outcome());
        outcome.unwrap_or(Err(RecordingError::TimedOut(timeout)))
    }

    /// Sends the recording so far ([`Options::record`]) to the server now, and waits at most for
    /// `timeout`.
    ///
    /// # Errors
    /// [`RecordingError`]. After a failure the session sends the recording again, as
    /// [`Session::wait_recorded`] describes.
    ///
    /// # Blocking
    /// Blocks for up to `timeout`: if it can do so quickly, the server rebuilds the working set
    /// before it answers.
    pub fn send_recording(&self, timeout: Duration) -> Result<(), RecordingError> {
        let recorder = self.shared.recorder.as_ref().ok_or(RecordingError::NotRecorded)?;
        let (number, deadline) = (recorder.ask(), Instant::now().checked_add(timeout));
        let outcome = self.shared.outcome.wait(deadline, |_| recorder.answer(number));
        outcome.unwrap_or(Err(RecordingError::TimedOut(timeout)))
    }

    /// Returns the session's counters, and its pages by state.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Returns the session's failures: the first one, the latest one, and their number.
    #[must_use]
    pub fn failures(&self) -> Failures {
        self.shared.outcome.failures()
    }

    /// Returns the failures from number `number` on ([`Failure::number`]), in order and in their
    /// present state. The session keeps the newest 256.
    #[must_use]
    pub fn failures_from(&self, number: u64) -> Vec<Failure> {
        self.shared.outcome.failures_from(number)
    }

    /// Returns the first reason for which pages were lost, or None if no page was lost.
    #[must_use]
    pub fn error(&self) -> Option<Arc<str>> {
        self.shared.outcome.error()
    }

    /// Ends the session, and waits for its end at most for `timeout`. Returns whether the session
    /// has ended.
    ///
    /// A session ends only when all of its regions have been dropped. A drop of the session ends
    /// it, too, but does not wait. If this process exits before the session has ended, absent pages
    /// in another process's memory become zeros.
    #[must_use]
    pub fn end(self, timeout: Duration) -> bool {
        let Self { shared, commands } = self;
        drop(commands);
        shared
            .outcome
            .wait(Instant::now().checked_add(timeout), |outcome| outcome.ended.then_some(()))
            .is_some()
    }

    /// Returns the calls for a program that serves the session for another one.
    #[must_use]
    pub fn hosted(&self) -> Hosted<'_> {
        Hosted::new(self)
    }

    /// Ends the session in order, as [`Session::end`] does, through a shared reference. Does not
    /// wait for regions, which memory of another process does not have. Returns whether the session
    /// has ended within `timeout`.
    #[must_use]
    pub fn close(&self, timeout: Duration) -> bool {
        let _ = self.commands.blocking_send(Command::End);
        self.wait_end(timeout)
    }

    /// Returns whether every page of every region is resident or removed.
    #[must_use]
    pub fn is_resident(&self) -> bool {
        self.shared.spaces().unresolved(true) == 0
    }

    /// Waits at most for `timeout` until the session has ended by itself, and returns whether it
    /// has. A session over another process's memory ends when that process and its children have
    /// exited.
    #[must_use]
    pub fn wait_end(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        self.shared.outcome.wait(deadline, |outcome| outcome.ended.then_some(())).is_some()
    }

    /// Waits until a page is lost, and returns the reason. Returns None after `timeout`, or when
    /// the session has ended.
    #[must_use]
    pub fn wait_error(&self, timeout: Duration) -> Option<Arc<str>> {
        self.shared.outcome.wait_error(timeout)
    }

    /// Waits until every page of every region is resident or removed. Without [`Session::fill`],
    /// the program must have accessed all pages for that.
    ///
    /// # Errors
    /// [`LossError::Lost`] as soon as a page is lost, or is lost already; [`LossError::TimedOut`].
    ///
    /// # Blocking
    /// Blocks for at most `timeout`.
    pub fn wait_resident(&self, timeout: Duration) -> Result<(), LossError> {
        // A deadline beyond the range of Instant means no deadline.
        let deadline = Instant::now().checked_add(timeout);
        let outcome = self.shared.outcome.wait(deadline, |outcome| {
            if self.shared.spaces().unresolved(true) == 0 {
                return Some(Ok(()));
            }
            let is_poisoned = || self.shared.progress().poisoned_pages > 0;
            let poisoned = || self.shared.outcome.last().filter(|_| is_poisoned());
            let ended = outcome.ended.then(|| "the session has ended".into());
            outcome.open.clone().or_else(poisoned).or(ended).map(|reason| Err(LossError::Lost(reason)))
        });
        outcome.unwrap_or(Err(LossError::TimedOut(timeout)))
    }
}
