//! Address spaces: the memory of one process, as its userfaultfd describes it.

use super::AnswerCounts;
use crate::processes::{self, Process};
use crate::uffd::pagemap::{Pagemap, guards_are_seen};
use crate::uffd::{Outcome, Uffd};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// The time after its fork for which a child is young. Many children end or call execve(2) within
/// that time, and page faults fetch the pages that they access.
const YOUNG: Duration = Duration::from_secs(1);

/// The address space of one process, see the module.
#[derive(Debug)]
pub(crate) struct Space {
    /// The id, unique among all spaces that the session has had. Later spaces have greater ids.
    pub(crate) id: u32,
    pub(crate) uffd: Arc<Uffd>,
    answers: AnswerCounts,
    gone: AtomicBool,
    /// The errno of the last install that failed with an unexpected error, or 0.
    unexpected: AtomicI32,
    /// All memory is registered. Until then, ENOENT means that a registration is outstanding.
    registered: AtomicBool,
    /// Set for a child while it is unknown which of its memory the fork has wiped: nothing may be
    /// installed.
    undecided: AtomicBool,
    /// The process's page tables, if the process is known.
    pagemap: Option<Pagemap>,
    /// The process, once it is known for certain.
    process: OnceLock<Process>,
    /// For a child: its parent's space, and the time at which the pager read the fork, in clock
    /// ticks since boot.
    forked: Option<(u32, u64)>,
    /// The page tables of this process, for guard pages of its own memory.
    own: Option<Arc<Pagemap>>,
}

/// The page tables of this process, shared by its sessions, with the pid that they are of. Held for
/// a look or for opening them.
static OWN: Mutex<(u32, Weak<Pagemap>)> = Mutex::new((0, Weak::new()));

/// Returns the page tables of this process, if it can read them.
fn own_pagemap() -> Option<Arc<Pagemap>> {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    // A child has inherited those of its parent.
    let pid = std::process::id();
    if let Some(pagemap) = own.1.upgrade().filter(|_| own.0 == pid) {
        return Some(pagemap);
    }
    let pagemap = Arc::new(Pagemap::open().ok()?);
    *own = (pid, Arc::downgrade(&pagemap));
    Some(pagemap)
}

impl Space {
    /// Returns a space whose answers from the kernel are counted in `answers`.
    pub(crate) fn new(id: u32, uffd: Uffd, answers: AnswerCounts) -> Self {
        let (gone, registered) = (AtomicBool::new(false), AtomicBool::new(true));
        Self {
            id,
            uffd: Arc::new(uffd),
            answers,
            gone,
            unexpected: AtomicI32::new(0),
            registered,
            undecided: AtomicBool::new(false),
            pagemap: None,
            process: OnceLock::new(),
            forked: None,
            own: None,
        }
    }

    /// Returns a stand-in for the space `id` of a process that has exited. A replay of the log
    /// needs only its addresses.
    pub(crate) fn stand_in(&self, id: u32) -> Self {
        let (answers, gone, registered) =
            (self.answers.clone(), AtomicBool::new(true), AtomicBool::new(true));
        let unexpected = AtomicI32::new(0);
        let (uffd, process) = (Arc::clone(&self.uffd), OnceLock::new());
        let undecided = AtomicBool::new(false);
        let (pagemap, own, forked) = (None, None, None);
        Self { id, uffd, answers, gone, unexpected, registered, undecided, pagemap, own, process, forked }
    }

    /// Returns the space, marked as having memory that is still unregistered.
    pub(crate) fn unregistered(self) -> Self {
        self.registered.store(false, Ordering::Release);
        self
    }

    /// Records that all memory is registered.
    pub(crate) fn set_registered(&self) {
        self.registered.store(true, Ordering::Release);
    }

    /// Returns whether all memory is registered.
    pub(crate) fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Acquire)
    }

    /// Returns the space with its process, if that is known.
    pub(crate) fn of_process(self, process: Option<Process>) -> Self {
        let pagemap = process.and_then(|process| Pagemap::of(process.pid).ok());
        Self { pagemap, process: process.map_or_else(OnceLock::new, OnceLock::from), ..self }
    }

    /// Returns the space as that of a forked child. `parent` is the parent's space; the pager read
    /// the fork at `ticks`, in clock ticks since boot.
    pub(crate) fn forked(self, parent: u32, ticks: u64) -> Self {
        Self { forked: Some((parent, ticks)), ..self }
    }

    /// Returns the process, if it is known for certain.
    pub(crate) fn process(&self) -> Option<Process> {
        self.process.get().copied()
    }

    /// Records the process of the space.
    pub(crate) fn set_process(&self, process: Process) {
        let _ = self.process.set(process);
    }

    /// Returns the parent's space and the time of the fork, see [`Space::forked`].
    pub(crate) fn parent(&self) -> Option<(u32, u64)> {
        self.forked
    }

    /// Returns true for a child in the first second after its fork. The fill leaves it out.
    pub(crate) fn is_young(&self) -> bool {
        self.forked.is_some_and(|(_, ticks)| processes::since(ticks) < YOUNG)
    }

    /// Notes that it is unknown which memory the fork has wiped.
    pub(crate) fn set_undecided(&self) {
        self.undecided.store(true, Ordering::Release);
    }

    /// Notes that this is known, or that the pager has given up on it.
    pub(crate) fn set_decided(&self) {
        self.undecided.store(false, Ordering::Release);
    }

    /// Returns whether it is still unknown which memory the fork has wiped.
    pub(crate) fn is_undecided(&self) -> bool {
        self.undecided.load(Ordering::Acquire)
    }

    /// Returns the space as one of this process.
    pub(crate) fn of_this_process(self) -> Self {
        Self { own: own_pagemap(), ..self }
    }

    /// Passes to `give` each range of addresses that the program wrote to since the last protection
    /// (by the install, or by a reset), and whether the range is in memory. A range that is not in
    /// memory is swapped out or poisoned. Absent pages are skipped. With `reset`, the scan also
    /// protects the pages again without losing a write, where the kernel can do both in one scan.
    ///
    /// # Errors
    /// Unsupported if write tracking is off, or if this process cannot read the page tables.
    pub(crate) fn written(
        &self,
        addresses: Range<usize>,
        reset: bool,
        give: impl FnMut(Range<usize>, bool),
    ) -> io::Result<()> {
        let pagemap = self.uffd.pagemap().or(self.pagemap.as_ref()).ok_or(io::ErrorKind::Unsupported)?;
        pagemap.written(addresses, reset && self.uffd.protects_by_scan(), give)
    }

    /// Returns whether this process can read the page tables.
    pub(crate) fn has_pagemap(&self) -> bool {
        self.pagemap.is_some()
    }

    /// Returns the first run of guard pages in a range of addresses. Returns None, too, if this
    /// process cannot read the page tables.
    pub(crate) fn first_guard(&self, addresses: &Range<usize>) -> Option<Range<usize>> {
        let pagemap = self.pagemap.as_ref().or(self.own.as_deref()).filter(|_| guards_are_seen())?;
        pagemap.first_guard(addresses)
    }

    /// Returns whether the page tables map a page. Returns false, too, if this process cannot read
    /// them.
    pub(crate) fn is_present(&self, address: usize) -> bool {
        self.pagemap.as_ref().is_some_and(|pagemap| pagemap.is_present(address))
    }

    /// Counts an answer of the kernel, and returns it. Keeps an unexpected error for
    /// [`Space::unexpected`].
    pub(crate) fn counted(&self, outcome: Outcome) -> Outcome {
        if let Outcome::Unexpected { errno } = outcome {
            self.unexpected.store(errno, Ordering::Relaxed);
        }
        self.answers.count(outcome)
    }

    /// Returns the last unexpected error of an install, if any.
    pub(crate) fn unexpected(&self) -> Option<std::io::Error> {
        let errno = self.unexpected.load(Ordering::Relaxed);
        (errno != 0).then(|| std::io::Error::from_raw_os_error(errno))
    }

    /// Returns whether the process is known to have exited.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Records that the process has exited.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Wakes the threads that wait for pages of the range. A thread whose page is still absent
    /// faults again.
    pub(crate) fn wake(&self, addresses: &Range<usize>) {
        self.uffd.wake(addresses.start, addresses.len());
    }
}
