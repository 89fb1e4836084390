//! Sessions: memory of this process, or of another one, that is filled from one image.
//!
//! [`Session::open`] and [`Session::attach`] start the pager, a thread with a runtime, a connection and a userfaultfd
//! ([`crate::pager`]); [`Session::map`] gives it memory to fill; [`Session::fill`] starts the bulk lane beside it
//! ([`crate::fill`]). They share what stands in [`Shared`].

mod changes;
pub mod host;
mod region;
mod shared_pager;

pub use crate::pager::attach::{ForeignMemory, ForeignRegion, Sharing};
pub use changes::Changes;
pub use region::Region;
pub use shared_pager::SharedPager;

use crate::error::{LossError, SessionError};
use crate::fill;
use crate::memory::{self, Object, ObjectKind, states_for};
use crate::options::{Options, Progress};
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

/// Commands that may wait for the pager.
const COMMANDS: usize = 256;

/// Memory that is being filled from one image. Lives until it and its regions are dropped.
#[derive(Debug)]
pub struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: mpsc::Sender<Command>,
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
    /// noticed within a quarter of a second. A background fill that cannot be started is no failure: [`Session::error`] tells of it.
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
        let owner = Owner::Another { uffd, regions, state, pid, is_registered: memory.is_registered };
        Self::start(address, image, options, owner, run)
    }

    /// Goes on with a session whose process has died, or that could not go on: from its state file, and the
    /// userfaultfds that the file names by number ([`crate::state_file::descriptors`]), which `uffds` gives by these numbers.
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
        let options = Options {
            fault_deadline: options.fault_deadline.min(YEAR),
            record_pages: options.record_pages.clamp(1, Options::MOST_RECORD_PAGES),
            record_cache_mib: options.record_cache_mib.max(1),
            ..options
        };
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
            session.shared.outcome.report(&format!("no background fill: {error}"));
        }
        if options.record
            && let Some(sender) = session.shared.sender()
            && let Err(source) = recorder::start(sender)
        {
            session.shared.outcome.report(&format!("nothing is recorded: {source}"));
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
        let started = fill.map(|fill| fill.start(&self.shared));
        if started.is_err() {
            self.shared.fill_started.store(false, Ordering::Release);
        }
        started.map_err(|source| SessionError::System { what: "a thread for the background fill", source })
    }

    /// Writes the session's trace ([`Options::trace`]) from its beginning to its end, in a thread of its own: lines of JSON, see
    /// [`crate::record::trace`]. Can be done once.
    ///
    /// # Errors
    /// Unsupported where there is none, or it is written already; or there is no thread to be had.
    pub fn write_trace(&self, to: impl io::Write + Send + 'static) -> io::Result<TraceWriter> {
        let writer = self.shared.trace_writer();
        trace::start(
            writer.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no trace was asked for"))?,
            to,
        )
    }

    /// Waits until what was touched has been told to the server ([`Options::record`]), at most for `timeout`. That is done
    /// when nothing new was touched for some seconds, ever more rarely, and once more at the session's end, which is what
    /// this waits for.
    ///
    /// # Errors
    /// Why it could not be told, or that it has not been yet.
    ///
    /// # Blocking
    /// As long as it says; the server makes the working set anew before it answers.
    pub fn wait_recorded(&self, timeout: Duration) -> Result<(), String> {
        let Some(recorder) = &self.shared.recorder else { return Ok(()) };
        let deadline = Instant::now().checked_add(timeout);
        let outcome = self.shared.outcome.wait(deadline, |_| recorder.outcome());
        outcome.unwrap_or_else(|| Err(format!("not within {timeout:?}")))
    }

    /// Has what was touched so far told to the server now ([`Options::record`]), and waits for that at most for `timeout`.
    ///
    /// # Errors
    /// That nothing is noted of what is touched. Why it could not be told, or that it has not been yet: it is told again, as [`Session::wait_recorded`] says.
    ///
    /// # Blocking
    /// As long as it says; the server makes the working set anew before it answers, if that does not take long.
    pub fn send_recording(&self, timeout: Duration) -> Result<(), String> {
        let recorder = self.shared.recorder.as_ref().ok_or("what it touches is not recorded")?;
        let (number, deadline) = (recorder.ask(), Instant::now().checked_add(timeout));
        let outcome = self.shared.outcome.wait(deadline, |_| recorder.answer(number));
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
        self.shared.outcome.error()
    }

    /// Ends the session, and waits for it at most for `timeout`: whether it has ended. A drop ends it, too, but does not
    /// wait; a process that exits before the end leaves zeros in another one's memory. It ends only when all of its
    /// regions have been dropped.
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

    /// Ends the session in order, as [`Session::end`], for those who share it. Memory of another process has no regions
    /// that it would wait for.
    #[must_use]
    pub fn close(&self, timeout: Duration) -> bool {
        let _ = self.commands.blocking_send(Command::End);
        self.wait_end(timeout)
    }

    /// Whether every page of every region is resident or was given back.
    #[must_use]
    pub fn is_resident(&self) -> bool {
        self.shared.spaces().unresolved(true) == 0
    }

    /// Waits until the session has ended by itself, at most for `timeout`: whether it has. A session over another
    /// process's memory does when that process and its children have exited.
    #[must_use]
    pub fn wait_end(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        self.shared.outcome.wait(deadline, |outcome| outcome.ended.then_some(())).is_some()
    }

    /// Waits until a page is lost; the reason, or None after `timeout` or when the session has ended.
    #[must_use]
    pub fn wait_error(&self, timeout: Duration) -> Option<Arc<str>> {
        self.shared.outcome.wait_error(timeout)
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
        let outcome = self.shared.outcome.wait(deadline, |outcome| {
            if self.shared.spaces().unresolved(true) == 0 {
                return Some(Ok(()));
            }
            let ended = outcome.ended.then(|| "the session has ended".into());
            outcome.error.clone().or(ended).map(|reason| Err(LossError::Lost(reason)))
        });
        outcome.unwrap_or(Err(LossError::TimedOut(timeout)))
    }
}
