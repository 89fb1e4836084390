//! A session that is brought back when it fails: the daemon's view of one.

use super::Setup;
use super::guardian::Turn;
use super::kernel;
use super::runtime_dir::SessionName;
use anyhow::{Context, Result, anyhow};
use postcopy::state_file::{self, StateError};
use postcopy::trace::TraceWriter;
use postcopy::{
    FailureEnd, ForeignMemory, ForeignRegion, Image, LossError, LossPolicy, Session, SessionError,
};
use rustix::process::Signal;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// Between attempts to bring a session back that fails at once.
const PAUSE: Duration = Duration::from_millis(20);
/// How often a session is looked at that has reported a loss.
const LOST_LOOK: Duration = Duration::from_millis(100);
/// A shortage is over when no fault has waited for so long: the pager tries again every 100 ms at least.
const SHORTAGE_END: Duration = Duration::from_millis(500);
/// Failures that are further apart have nothing to do with one another.
const APART: Duration = Duration::from_secs(5);
/// Making 64 GiB SIGBUS takes 3 s.
const END: Duration = Duration::from_secs(60);
/// The server makes a working set anew, of some GiB at most. Sessions that end together have this together.
const RECORDED: Duration = Duration::from_secs(30);

/// How long the end of a session takes that has nothing to poison, at most: whatever it waits for, nothing is lost.
const RESIDENT_END: Duration = Duration::from_secs(5);

/// The number of failures whose ends are still to be logged.
const MOST_OPEN: usize = 256;

/// What a look at a session has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It serves.
    Serving,
    /// It serves, and all is there.
    Resident,
    /// Its processes have exited, or it has been ended.
    Ended,
}

/// The kernel's lack of memory for a session's pages, as the last look has shown it.
#[derive(Debug, Default)]
struct Shortage {
    /// How often faults have waited ([`postcopy::host::Hosted::memory_waits`]).
    waits: u64,
    /// When a fault was last seen to wait, of a shortage that goes on.
    last: Option<Instant>,
}

/// The failures of a session that were logged.
#[derive(Debug, Default)]
struct Logged {
    /// The number of the next failure.
    next: u64,
    /// The numbers of those that go on, in order.
    open: Vec<u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: SessionName,
    setup: Arc<Setup>,
    state: File,
    /// Held for taking and replacing it alone.
    session: Mutex<Arc<Session>>,
    /// When it has failed first and last, of failures that follow one another.
    failing: Mutex<Option<(Instant, Instant)>>,
    /// Held for a look.
    shortage: Mutex<Shortage>,
    /// The session that was asked to fill. Held for asking it.
    asked_to_fill: Mutex<Weak<Session>>,
    /// The failures that were logged. Held for logging.
    logged: Mutex<Logged>,
    /// A loss stands in the runtime directory.
    has_noted: AtomicBool,
    /// What writes the session's trace. Held for taking and replacing it.
    trace: Mutex<Option<TraceWriter>>,
    is_alone: AtomicBool,
}

impl Served {
    /// Takes memory of a process on.
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
            Ok(session) => Ok(Self::new(setup, name, state, session)),
            Err(error) => {
                setup.runtime.remove(&name);
                Err(error.into())
            }
        }
    }

    /// Takes on what another worker has left; None: it had not begun with this one.
    ///
    /// # Errors
    /// As [`Session::resume`].
    pub(crate) fn resume(setup: &Arc<Setup>, name: SessionName, turn: Turn) -> Result<Option<Self>> {
        let state = setup.runtime.state(&name).with_context(|| format!("the state file {name}"))?;
        let session = match resume(setup, &state) {
            Ok(session) => session,
            Err(SessionError::State(StateError::Empty)) => return Ok(None),
            Err(SessionError::State(StateError::Ended)) => {
                setup.runtime.remove(&name);
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("session {name}")),
        };
        let served = Self::new(setup, name, state, session);
        if turn.is_last_resort && setup.options.on_loss == LossPolicy::Poison {
            served.lose();
        }
        Ok(Some(served))
    }

    fn new(setup: &Arc<Setup>, name: SessionName, state: File, session: Session) -> Self {
        let trace = write_trace(setup, &name, &session);
        Self {
            name,
            setup: Arc::clone(setup),
            state,
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

    /// The session as it is at the moment.
    pub(crate) fn session(&self) -> Arc<Session> {
        Arc::clone(&self.session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nobody comes after this worker. (A virtual machine can be taken over all the same.)
    pub(crate) fn set_alone(&self) {
        if self.name.kind == super::firecracker::KIND {
            return;
        }
        self.is_alone.store(true, Ordering::Release);
        self.session().hosted().has_no_successor();
    }

    /// Looks how it is; brings it back if it has failed.
    pub(crate) fn look(&self) -> Status {
        let session = self.session();
        self.note_losses(&session);
        self.tell_of_shortage(&session);
        self.log_failures(&session);
        if session.hosted().is_left() {
            self.bring_back();
            return Status::Serving;
        }
        match session.wait_end(Duration::ZERO) {
            true => Status::Ended,
            false if session.is_resident() => Status::Resident,
            false => Status::Serving,
        }
    }

    /// Has everything brought that is absent. Asks each session once: each time would end a pause of its fill, and have it
    /// connect to a server that is away.
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

    /// Waits until the session is resident or has ended, at most for `timeout`. Once it has reported a loss, it sees only an
    /// end at once.
    pub(crate) fn wait(&self, timeout: Duration) {
        let session = self.session();
        if let Err(LossError::Lost(_)) = session.wait_resident(timeout) {
            let _ = session.wait_end(timeout.min(LOST_LOOK));
        }
    }

    /// Logs when faults begin to wait for memory, and when none has for a while.
    fn tell_of_shortage(&self, session: &Session) {
        let (pid, waits) = (self.name.pid, session.hosted().memory_waits());
        let what = if session.hosted().has_huge_pages() { "huge page of 2 MiB" } else { "page" };
        let mut shortage = self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        // A resumed session counts anew.
        if waits != std::mem::replace(&mut shortage.waits, waits) && waits > 0 {
            if shortage.last.replace(Instant::now()).is_none() {
                tracing::warn!("process {pid}: no free {what}: its fault waits");
            }
        } else if shortage.last.is_some_and(|last| last.elapsed() >= SHORTAGE_END) {
            shortage.last = None;
            tracing::info!("process {pid}: no fault waits for a free {what} any more");
        }
    }

    /// Logs each failure of the session once, and once its end.
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
        // The session keeps the newest ones: of older ones no end can be logged.
        while logged.open.len() > MOST_OPEN {
            logged.open.remove(0);
        }
    }

    /// Notes that the pager has applied the loss policy.
    fn note_losses(&self, session: &Session) {
        let what = match self.setup.options.on_loss {
            LossPolicy::Kill => "was killed",
            LossPolicy::Pause => "was stopped",
            LossPolicy::Poison => "lost pages, which are SIGBUS",
            LossPolicy::Wait => return,
        };
        if session.hosted().losses() > 0 && !self.has_noted.swap(true, Ordering::Relaxed) {
            self.setup.runtime.note_loss(&self.name, what);
        }
    }

    fn bring_back(&self) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let follows = failing.filter(|(_, last)| now - *last < APART);
        let since = follows.map_or(now, |(first, _)| first);
        *failing = Some((since, now));
        std::thread::park_timeout(PAUSE);
        match resume(&self.setup, &self.state) {
            Ok(session) => {
                tracing::warn!("process {}: its session has failed, and goes on", self.name.pid);
                let session = Arc::new(session);
                *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&session);
                // The trace so far is written to its end by itself: nobody waits for a disk here.
                *self.trace() = write_trace(&self.setup, &self.name, &session);
                *self.logged.lock().unwrap_or_else(PoisonError::into_inner) = Logged::default();
                if self.is_alone.load(Ordering::Acquire) {
                    self.set_alone();
                }
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::error!(
                    "process {}: its session has failed, and does so again: {error:#}",
                    self.name.pid
                );
            }
        }
        if since.elapsed() > self.setup.options.fault_deadline {
            self.lose();
            *failing = None;
        }
    }

    /// Nobody can serve it: does what the loss policy says.
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

    /// Ends it in order: what is absent is SIGBUS from then on. False: that could not be done, and its processes were killed,
    /// which would have read zeros. Where nothing is absent they go on in any case.
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
                "process {}: all of its memory is there, but its session does not end",
                self.name.pid
            );
        }
        self.setup.runtime.remove(&self.name);
        is_safe
    }

    /// The daemon exits, and nobody waits any more for the session's end: kills a process that would read zeros then.
    pub(crate) fn give_up(&self) {
        let session = self.session();
        // A machine keeps its own userfaultfd.
        if self.name.kind != super::firecracker::KIND
            && !session.wait_end(Duration::ZERO)
            && !session.is_resident()
        {
            kill_unsafe(&self.setup, &self.name, "its session does not end");
        }
    }

    /// Has what it has touched so far told to the server now.
    ///
    /// # Errors
    /// As [`Session::send_recording`].
    pub(crate) fn send_recording(&self) -> Result<()> {
        let sent = self.session().send_recording(RECORDED);
        sent.map_err(|reason| anyhow!("process {}: {reason}", self.name.pid))
    }

    /// Whether what it has touched has been told to the server, and its trace is written, where that was asked for; the
    /// session has ended.
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

    /// Its trace is written to the end; the session has ended.
    fn traced(&self) {
        if !self.session().wait_end(Duration::ZERO) {
            return;
        }
        let writer = self.trace().take();
        if let Err(error) = writer.map_or(Ok(()), TraceWriter::finish) {
            tracing::error!("process {}: its trace could not be written: {error}", self.name.pid);
        }
    }

    /// Ends serving it, and leaves it to whoever takes it over.
    pub(crate) fn leave(&self) {
        if !self.session().hosted().leave(END) {
            tracing::error!("process {}: its session does not end", self.name.pid);
            return;
        }
        self.traced();
    }
}

/// Kills or stops the processes of all sessions, where the loss policy is that. Needs nothing of the sessions but their
/// names: resuming one may be what workers fail at. Poison needs a session, so it is left to whoever resumes it; where a
/// worker has died of that, the process is killed.
///
/// # Errors
/// If the runtime directory cannot be read.
pub(crate) fn lose_all(setup: &Setup) -> Result<()> {
    for name in setup.runtime.sessions().context("the runtime directory")? {
        let is_first = || File::create_new(setup.runtime.poisoning(&name)).is_ok();
        if setup.options.on_loss != LossPolicy::Poison || !is_first() {
            lose_unserved(setup, &name);
        }
    }
    Ok(())
}

/// Applies the loss policy to a process whose session cannot be resumed. Without a session nothing can be poisoned: the
/// process is killed instead.
pub(crate) fn lose_unserved(setup: &Setup, name: &SessionName) {
    let policy = setup.options.on_loss;
    let (signal, what) = match policy {
        LossPolicy::Kill => (Signal::KILL, "was killed"),
        LossPolicy::Poison => (Signal::KILL, "was killed, because nothing can be poisoned without a session"),
        LossPolicy::Pause => (Signal::STOP, "was stopped"),
        LossPolicy::Wait => return,
    };
    // Before it is done: the worker may die of anything.
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

/// Has a session's trace written, where that was asked for: in a file of its own, also after another worker. The session
/// goes on without, if that cannot be done.
fn write_trace(setup: &Setup, name: &SessionName, session: &Session) -> Option<TraceWriter> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let path = setup.traces.as_ref()?.join(format!("{name}-{}.jsonl", since_1970.as_millis()));
    let write = |file| session.write_trace(file).inspect_err(|_| drop(std::fs::remove_file(&path)));
    let written = File::create_new(&path).and_then(write);
    written.inspect_err(|error| tracing::error!("no trace: {}: {error}", path.display())).ok()
}

/// Waits until what these have touched has been told to the server, and their traces are written, where that was asked for;
/// their sessions have ended.
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

/// Goes on with a session, and closes the descriptors that it was served by before.
fn resume(setup: &Setup, file: &File) -> Result<Session, SessionError> {
    let listed = state_file::descriptors(file)?;
    #[expect(unsafe_code, reason = "descriptors by number")]
    let by_number = |fd| {
        // SAFETY: whoever had it has left it open, and nobody closes it before the session has been resumed.
        Some(
            setup.adopted.as_ref().map_or_else(|| unsafe { kernel::borrow_number(fd) }, |uffd| uffd.borrow()),
        )
    };
    let session = Session::resume(&setup.address, &setup.images, file, by_number);
    // An attempt that has failed may have got so far that the file names its duplicates.
    let needed = match &session {
        Ok(_) => Some(Vec::new()),
        Err(_) => state_file::descriptors(file).ok(),
    };
    let is_needed = |fd: &i32| needed.as_ref().is_none_or(|needed| needed.contains(fd));
    // Of a daemon that has died altogether they are numbers of another table.
    let own = listed.into_iter().filter(|fd| setup.adopted.is_none() && !setup.base.contains(fd));
    for fd in own.filter(|fd| !is_needed(fd)) {
        #[expect(unsafe_code, reason = "a descriptor that nobody owns")]
        // SAFETY: it was left open, and the session, or the state file, has a duplicate of it.
        unsafe {
            kernel::close_number(fd);
        }
    }
    session
}
