//! The daemon's view of a session, which it resumes after a failure.

use super::Setup;
use super::guardian::WorkerStart;
use super::runtime_dir::SessionName;
use super::{kernel, own_files};
use anyhow::{Context, Result, anyhow};
use postcopy::state_file::{self, StateError};
use postcopy::trace::TraceWriter;
use postcopy::{
    FailureEnd, ForeignMemory, ForeignRegion, Image, LossError, LossPolicy, RecordingError, Session,
    SessionError,
};
use rustix::process::Signal;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// The pause before a failed session is resumed.
const PAUSE: Duration = Duration::from_millis(20);
/// The interval between two checks of a session that has reported a loss.
const LOST_LOOK: Duration = Duration::from_millis(100);
/// The time without a waiting fault after which a shortage is over. The pager retries at least
/// every 100 ms.
const SHORTAGE_END: Duration = Duration::from_millis(500);
/// Failures that are further apart are independent of each other.
const APART: Duration = Duration::from_secs(5);
/// The longest wait for a session's end. Poisoning 64 GiB takes 3 s.
const END: Duration = Duration::from_secs(60);
/// The longest wait for recordings. The server writes a working set again, which has some GiB at
/// most. Sessions that end together share this time.
const RECORDED: Duration = Duration::from_secs(30);

/// The longest wait for the end of a session that is resident. It has nothing to poison, so nothing
/// is lost after that.
const RESIDENT_END: Duration = Duration::from_secs(5);

/// The number of failures whose ends are still to be logged.
const MOST_OPEN: usize = 256;

/// The result of a check of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The session serves, and has absent pages.
    Serving,
    /// The session serves, and all of its pages are resident.
    Resident,
    /// The processes of the session have exited, or the session has been ended.
    Ended,
}

/// The kernel's lack of memory for a session's pages, as the last check has found it.
#[derive(Debug, Default)]
struct Shortage {
    /// The number of times that faults have waited ([`postcopy::host::Hosted::memory_waits`]).
    waits: u64,
    /// The time when a fault was last seen to wait, while the shortage lasts.
    last: Option<Instant>,
}

/// The failures of a session that were logged.
#[derive(Debug, Default)]
struct Logged {
    /// The number of the next failure.
    next: u64,
    /// The numbers of the failures that have not ended, in order.
    open: Vec<u64>,
}

/// A session of a process, and the state that the daemon keeps for it.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: SessionName,
    setup: Arc<Setup>,
    /// Locked only to read or replace the session.
    session: Mutex<Arc<Session>>,
    /// The times of the first and the last failure in a series of failures.
    failing: Mutex<Option<(Instant, Instant)>>,
    /// Locked for the time of a check.
    shortage: Mutex<Shortage>,
    /// The session that was asked to fill. Locked while it is asked.
    asked_to_fill: Mutex<Weak<Session>>,
    /// The failures that were logged. Locked while failures are logged.
    logged: Mutex<Logged>,
    /// The runtime directory records a loss of this session.
    has_noted: AtomicBool,
    /// The writer of the session's trace. Locked only to take or replace it.
    trace: Mutex<Option<TraceWriter>>,
    is_alone: AtomicBool,
}

impl Served {
    /// Attaches memory of a process.
    ///
    /// # Errors
    /// As [`Session::attach`].
    pub(crate) fn attach(
        setup: &Arc<Setup>,
        name: SessionName,
        image: &Arc<Image>,
        uffd: BorrowedFd<'_>,
        regions: &[ForeignRegion],
        is_registered: bool,
    ) -> Result<Self> {
        let state = setup.runtime.state(&name).with_context(|| format!("the state file {name}"))?;
        let memory = ForeignMemory { uffd, regions, state: Some(&state), pid: Some(name.pid), is_registered };
        match Session::attach(&setup.address, Arc::clone(image), setup.options, &memory) {
            Ok(session) => Ok(Self::new(setup, name, session)),
            Err(error) => {
                setup.runtime.remove(&name);
                Err(error.into())
            }
        }
    }

    /// Resumes a session that another worker has left. None: that worker had not begun it, or had
    /// ended it.
    ///
    /// # Errors
    /// As [`Session::resume`].
    pub(crate) fn resume(setup: &Arc<Setup>, name: SessionName, start: WorkerStart) -> Result<Option<Self>> {
        let state = setup.runtime.state(&name).with_context(|| format!("the state file {name}"))?;
        // The earlier worker may have died between a loss and its record. A file that cannot be
        // read is an error of the attempt to resume.
        note_losses(setup, &name, state_file::losses(&state).unwrap_or(0));
        let session = match resume(setup, &state) {
            Ok(session) => session,
            Err(SessionError::State(StateError::Empty)) => return Ok(None),
            Err(SessionError::State(StateError::Ended)) => {
                setup.runtime.remove(&name);
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("session {name}")),
        };
        let served = Self::new(setup, name, session);
        if start.is_last_resort && setup.options.on_loss == LossPolicy::Poison {
            served.lose();
        }
        Ok(Some(served))
    }

    fn new(setup: &Arc<Setup>, name: SessionName, session: Session) -> Self {
        let trace = write_trace(setup, &name, &session);
        Self {
            name,
            setup: Arc::clone(setup),
            session: Mutex::new(Arc::new(session)),
            failing: Mutex::default(),
            shortage: Mutex::default(),
            asked_to_fill: Mutex::default(),
            logged: Mutex::default(),
            has_noted: AtomicBool::new(false),
            trace: Mutex::new(trace),
            is_alone: AtomicBool::new(false),
        }
    }

    /// Returns the current session.
    pub(crate) fn session(&self) -> Arc<Session> {
        Arc::clone(&self.session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that this worker has no successor. A virtual machine is left out, because another
    /// daemon can take it over.
    pub(crate) fn set_alone(&self) {
        if self.name.kind == super::firecracker::KIND {
            return;
        }
        self.is_alone.store(true, Ordering::Release);
        self.session().hosted().has_no_successor();
    }

    /// Checks the session, and resumes it if it has failed.
    pub(crate) fn look(&self) -> Status {
        let session = self.session();
        let has_ended = self.report(&session);
        if session.hosted().is_left() {
            self.bring_back();
            return Status::Serving;
        }
        match has_ended {
            true => Status::Ended,
            false if session.is_resident() => Status::Resident,
            false => Status::Serving,
        }
    }

    /// Returns whether the session serves, and reports its failures as [`Served::look`] does. Does
    /// not block.
    pub(crate) fn is_serving(&self) -> bool {
        !self.report(&self.session())
    }

    /// Reports failures and losses of the session. Returns whether it has ended.
    fn report(&self, session: &Session) -> bool {
        let has_ended = session.wait_end(Duration::ZERO);
        // A session that has ended has counted all of its losses.
        self.note_losses(session);
        self.tell_of_shortage(session);
        self.log_failures(session);
        has_ended
    }

    /// Makes the session fetch all absent pages in the background. Asks each session once: each
    /// request would end a pause of its fill, and would make it connect to a server that is
    /// unreachable.
    ///
    /// # Errors
    /// As [`Session::fill`].
    pub(crate) fn fill(&self) -> Result<(), SessionError> {
        let session = self.session();
        let mut asked = self.asked_to_fill.lock().unwrap_or_else(PoisonError::into_inner);
        let this = Arc::downgrade(&session);
        if !asked.ptr_eq(&this) {
            session.fill()?;
            *asked = this;
        }
        Ok(())
    }

    /// Waits for at most `timeout` until the session is resident or has ended. After a loss it
    /// returns early, except that it waits a short time for the session's end.
    pub(crate) fn wait(&self, timeout: Duration) {
        let session = self.session();
        if let Err(LossError::Lost(_)) = session.wait_resident(timeout) {
            let _ = session.wait_end(timeout.min(LOST_LOOK));
        }
    }

    /// Logs when faults begin to wait for memory, and when no fault has waited for a while.
    fn tell_of_shortage(&self, session: &Session) {
        let (pid, waits) = (self.name.pid, session.hosted().memory_waits());
        let what = if session.hosted().has_huge_pages() { "huge page of 2 MiB" } else { "page" };
        let mut shortage = self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        // A resumed session counts from zero.
        if waits != std::mem::replace(&mut shortage.waits, waits) && waits > 0 {
            if shortage.last.replace(Instant::now()).is_none() {
                tracing::warn!("process {pid}: no free {what}: its fault waits");
            }
        } else if shortage.last.is_some_and(|last| last.elapsed() >= SHORTAGE_END) {
            shortage.last = None;
            tracing::info!("process {pid}: no fault waits for a free {what} any more");
        }
    }

    /// Logs each failure of the session once, and its end once.
    fn log_failures(&self, session: &Session) {
        let pid = self.name.pid;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let first = logged.open.first().copied().unwrap_or(logged.next);
        for failure in session.failures_from(first) {
            if failure.number >= logged.next {
                logged.next = failure.number + 1;
                logged.open.push(failure.number);
                tracing::error!("process {pid}: {}", failure.reason);
            }
            let Some((end, at)) = failure.end else { continue };
            let Some(place) = logged.open.iter().position(|number| *number == failure.number) else {
                continue;
            };
            logged.open.remove(place);
            let seconds = at.duration_since(failure.since).unwrap_or_default().as_secs_f64();
            match end {
                FailureEnd::Recovered => {
                    tracing::info!("process {pid}: served again after {seconds:.1} s: {}", failure.reason);
                }
                FailureEnd::Killed => {
                    tracing::error!("process {pid}: killed, because its page fault was lost")
                }
                FailureEnd::Paused => {
                    tracing::error!("process {pid}: stopped, because its page fault was lost")
                }
                FailureEnd::Poisoned => tracing::error!("process {pid}: the lost pages raise SIGBUS"),
                _ => {}
            }
        }
        // The session keeps the newest failures only, so the ends of older ones cannot be logged.
        while logged.open.len() > MOST_OPEN {
            logged.open.remove(0);
        }
    }

    /// Records a loss that the session has counted.
    fn note_losses(&self, session: &Session) {
        let losses = session.hosted().losses();
        if losses > 0 && !self.has_noted.swap(true, Ordering::Relaxed) {
            note_losses(&self.setup, &self.name, losses);
        }
    }

    fn bring_back(&self) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let follows = failing.filter(|(_, last)| now - *last < APART);
        let since = follows.map_or(now, |(first, _)| first);
        *failing = Some((since, now));
        std::thread::park_timeout(PAUSE);
        let state = self.setup.runtime.existing_state(&self.name).map_err(anyhow::Error::from);
        match state.and_then(|state| Ok(resume(&self.setup, &state)?)) {
            Ok(session) => {
                tracing::warn!("process {}: its session has failed, and was resumed", self.name.pid);
                let session = Arc::new(session);
                *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&session);
                // The old trace writes its rest by itself: this thread does not wait for a disk.
                *self.trace() = write_trace(&self.setup, &self.name, &session);
                *self.logged.lock().unwrap_or_else(PoisonError::into_inner) = Logged::default();
                if self.is_alone.load(Ordering::Acquire) {
                    self.set_alone();
                }
            }
            Err(error) => {
                tracing::error!(
                    "process {}: its session has failed, and cannot be resumed: {error:#}",
                    self.name.pid
                );
            }
        }
        if since.elapsed() > self.setup.options.fault_deadline {
            self.lose();
            *failing = None;
        }
    }

    /// Applies the loss policy to the session, which no worker can serve.
    fn lose(&self) {
        let session = self.session();
        let what = match self.setup.options.on_loss {
            LossPolicy::Wait => return,
            LossPolicy::Kill => {
                session.hosted().signal_owners(Signal::KILL);
                "was killed"
            }
            LossPolicy::Pause => {
                session.hosted().signal_owners(Signal::STOP);
                "was stopped"
            }
            LossPolicy::Poison => {
                let _ = session.close(END);
                "lost what had not arrived, which is SIGBUS"
            }
        };
        self.setup.runtime.note_loss(&self.name, what);
        tracing::error!("process {}: its memory is lost: {:?}", self.name.pid, self.setup.options.on_loss);
    }

    /// Ends the session in order: its absent pages raise SIGBUS from then on. If that is not
    /// possible, kills the processes, which would read zeros, and returns false. Processes of a
    /// resident session go on in any case.
    pub(crate) fn end(&self) -> bool {
        let session = self.session();
        let patience = if session.is_resident() { RESIDENT_END } else { END };
        let is_closed = session.close(patience) && !session.hosted().is_left();
        self.note_losses(&session);
        let is_safe = is_closed || session.is_resident();
        if !is_safe {
            let reason = session.error().unwrap_or_else(|| "its session does not end".into());
            kill_unsafe(&self.setup, &self.name, &reason);
        } else if !is_closed {
            tracing::warn!(
                "process {}: all of its memory is resident, but its session does not end",
                self.name.pid
            );
        }
        self.setup.runtime.remove(&self.name);
        is_safe
    }

    /// Kills a process that would read zeros after the daemon's exit, because its session has not
    /// ended.
    pub(crate) fn give_up(&self) {
        let session = self.session();
        // A virtual machine keeps its own userfaultfd.
        if self.name.kind != super::firecracker::KIND
            && !session.wait_end(Duration::ZERO)
            && !session.is_resident()
        {
            kill_unsafe(&self.setup, &self.name, "its session does not end");
        }
    }

    /// Sends the pages that the process has accessed so far to the server now.
    ///
    /// # Errors
    /// As [`Session::send_recording`].
    pub(crate) fn send_recording(&self) -> Result<()> {
        let sent = self.session().send_recording(RECORDED);
        let next = match sent {
            Err(RecordingError::NotRecorded) => ". Start the daemon with --record",
            _ => "",
        };
        sent.map_err(|reason| anyhow!("process {}: {reason}{next}", self.name.pid))
    }

    /// Returns whether a session that has ended needs no more work: its recording is sent and its
    /// trace is written, where the user asked for these.
    pub(crate) fn is_finished(&self) -> bool {
        let is_written = self.trace().as_ref().is_none_or(TraceWriter::is_finished);
        let is_finished = is_written && self.session().wait_recorded(Duration::ZERO).is_ok();
        if is_finished {
            self.traced();
        }
        is_finished
    }

    fn trace(&self) -> MutexGuard<'_, Option<TraceWriter>> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finishes the trace of a session that has ended.
    fn traced(&self) {
        if !self.session().wait_end(Duration::ZERO) {
            return;
        }
        let writer = self.trace().take();
        if let Err(error) = writer.map_or(Ok(()), TraceWriter::finish) {
            tracing::error!("process {}: its trace could not be written: {error}", self.name.pid);
        }
    }

    /// Ends the session without poisoning, and leaves its memory to a daemon that takes it over.
    pub(crate) fn leave(&self) {
        if !self.session().hosted().leave(END) {
            tracing::error!("process {}: its session does not end", self.name.pid);
            return;
        }
        self.traced();
    }
}

/// Records a loss, if a session has counted losses and the loss policy acts on them.
fn note_losses(setup: &Setup, name: &SessionName, losses: u64) {
    let what = match setup.options.on_loss {
        LossPolicy::Kill => "was killed",
        LossPolicy::Pause => "was stopped",
        LossPolicy::Poison => "lost pages, which are SIGBUS",
        LossPolicy::Wait => return,
    };
    if losses > 0 {
        setup.runtime.note_loss(name, what);
    }
}

/// Kills or stops the processes of all sessions, if the loss policy says so. Needs only the names
/// of the sessions, because resuming one of them may be the step that kills workers. To poison
/// memory needs a session, so the code that resumes it does that. If a worker has died of that
/// before, this kills the process.
///
/// # Errors
/// The runtime directory cannot be read.
pub(crate) fn lose_all(setup: &Setup) -> Result<()> {
    for name in setup.runtime.sessions().context("the runtime directory")? {
        let is_first = || File::create_new(setup.runtime.poisoning(&name)).is_ok();
        if setup.options.on_loss != LossPolicy::Poison || !is_first() {
            lose_unserved(setup, &name);
        }
    }
    Ok(())
}

/// Applies the loss policy to a process whose session cannot be resumed. Without a session nothing
/// can be poisoned, so `poison` kills the process.
pub(crate) fn lose_unserved(setup: &Setup, name: &SessionName) {
    let policy = setup.options.on_loss;
    let (signal, what) = match policy {
        LossPolicy::Kill => (Signal::KILL, "was killed"),
        LossPolicy::Poison => (Signal::KILL, "was killed, because nothing can be poisoned without a session"),
        LossPolicy::Pause => (Signal::STOP, "was stopped"),
        LossPolicy::Wait => return,
    };
    // The loss is recorded first, because the worker may die at any step.
    if name.is_alive() {
        setup.runtime.note_loss(name, what);
    }
    if postcopy::signal_process_tree(name.pid, name.start, signal) {
        tracing::error!("process {}: its memory is lost: {policy:?}: it {what}", name.pid);
    }
}

/// Kills a process that would read zeros when the daemon ends.
pub(crate) fn kill_unsafe(setup: &Setup, name: &SessionName, reason: &str) {
    tracing::error!("process {}: its memory cannot be made safe, it is killed: {reason}", name.pid);
    setup.runtime.note_loss(name, "was killed, because its memory could not be made safe");
    postcopy::signal_process_tree(name.pid, name.start, Signal::KILL);
}

/// Starts the trace of a session, if the user asked for one. Each worker writes a file of its own.
/// The session goes on without a trace if the file cannot be written.
fn write_trace(setup: &Setup, name: &SessionName, session: &Session) -> Option<TraceWriter> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let path = setup.traces.as_ref()?.join(format!("{name}-{}.jsonl", since_1970.as_millis()));
    let write = |file| session.write_trace(file).inspect_err(|_| drop(std::fs::remove_file(&path)));
    let created = own_files::create_new(&path, 0o600);
    let written = created.and_then(write);
    written.inspect_err(|error| tracing::error!("no trace: {}: {error}", path.display())).ok()
}

/// Waits until the recordings of these sessions, which have ended, are sent and their traces are
/// written, where the user asked for these.
pub(crate) fn finish<'a>(ended: impl IntoIterator<Item = &'a Served>) {
    let deadline = Instant::now() + RECORDED;
    for served in ended {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(reason) = served.session().wait_recorded(left) {
            tracing::error!("process {}: what it touched could not be recorded: {reason}", served.name.pid);
        }
        served.traced();
    }
}

/// Resumes a session, and closes the descriptors that served it before.
fn resume(setup: &Setup, file: &File) -> Result<Session, SessionError> {
    let listed = state_file::descriptors(file)?;
    #[expect(unsafe_code, reason = "descriptors by number")]
    let by_number = |fd| {
        // SAFETY: the last owner has left it open, and no code closes it before the session is
        // resumed.
        Some(setup.adopted.as_ref().map_or_else(|| unsafe { kernel::borrow_fd(fd) }, |uffd| uffd.borrow()))
    };
    let session = Session::resume(&setup.address, &setup.images, file, by_number);
    // A failed attempt may already have written its own duplicates to the file.
    let needed = match &session {
        Ok(_) => Some(Vec::new()),
        Err(_) => state_file::descriptors(file).ok(),
    };
    let is_needed = |fd: &i32| needed.as_ref().is_none_or(|needed| needed.contains(fd));
    // The numbers of a daemon that has died altogether refer to another table of descriptors.
    let own = listed.into_iter().filter(|fd| setup.adopted.is_none() && !setup.base.contains(fd));
    for fd in own.filter(|fd| !is_needed(fd)) {
        #[expect(unsafe_code, reason = "a descriptor that nobody owns")]
        // SAFETY: it was left open, and the session, or the state file, has a duplicate of it.
        unsafe {
            kernel::close_fd(fd);
        }
    }
    session
}
