//! An address space: the memory of one process, as its userfaultfd sees it.

use super::AnswerCounts;
use crate::uffd::pagemap::{Pagemap, guards_are_seen};
use crate::uffd::{Outcome, Uffd};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// See the module.
#[derive(Debug)]
pub(crate) struct Space {
    /// Unique among all spaces that the session has had; later ones have greater ids.
    pub(crate) id: u32,
    pub(crate) uffd: Arc<Uffd>,
    answers: AnswerCounts,
    gone: AtomicBool,
    /// The last error of an install that is not known, or 0.
    unexpected: AtomicI32,
    /// All memory is registered. Until then ENOENT means that a registration is still to come.
    registered: AtomicBool,
    /// It is a child's, and what the fork has emptied of it is not known yet: nothing may be installed.
    undecided: AtomicBool,
    /// The process's page tables, where the process is known.
    pagemap: Option<Pagemap>,
    /// The same of this process, for a look at guard pages alone.
    own: Option<Pagemap>,
}

impl Space {
    /// A space that counts what the kernel answers.
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
            own: None,
        }
    }

    /// A space with this id whose process has exited, where only what lay where is of interest.
    pub(crate) fn stand_in(&self, id: u32) -> Self {
        let (answers, gone, registered) =
            (self.answers.clone(), AtomicBool::new(true), AtomicBool::new(true));
        let unexpected = AtomicI32::new(0);
        let (uffd, pagemap) = (Arc::clone(&self.uffd), None);
        let undecided = AtomicBool::new(false);
        Self { id, uffd, answers, gone, unexpected, registered, undecided, pagemap, own: None }
    }

    /// The same, where memory is still to be registered.
    pub(crate) fn unregistered(self) -> Self {
        self.registered.store(false, Ordering::Release);
        self
    }

    /// Notes that all memory is registered.
    pub(crate) fn set_registered(&self) {
        self.registered.store(true, Ordering::Release);
    }

    /// Whether all memory is registered.
    pub(crate) fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Acquire)
    }

    /// The same, of a process that is known by its pid.
    pub(crate) fn of_process(self, pid: Option<u32>) -> Self {
        Self { pagemap: pid.and_then(|pid| Pagemap::of(pid).ok()), ..self }
    }

    /// Notes that it is not known what a fork has emptied of it.
    pub(crate) fn set_undecided(&self) {
        self.undecided.store(true, Ordering::Release);
    }

    /// Notes that this is known, or will not be.
    pub(crate) fn set_decided(&self) {
        self.undecided.store(false, Ordering::Release);
    }

    /// Whether it is not known yet what a fork has emptied of it.
    pub(crate) fn is_undecided(&self) -> bool {
        self.undecided.load(Ordering::Acquire)
    }

    /// The same, of this process.
    pub(crate) fn of_this_process(self) -> Self {
        Self { own: Pagemap::open().ok(), ..self }
    }

    /// Gives the ranges of addresses that were written to since they were installed or protected anew, and whether they
    /// are in memory: those that are not may be swapped out, or poison. Absent pages are left alone. With `reset` they
    /// are protected anew, without losing a write, where one scan can do both.
    ///
    /// # Errors
    /// Unsupported where tracking was not asked for, or the page tables cannot be read.
    pub(crate) fn written(
        &self,
        addresses: Range<usize>,
        reset: bool,
        give: impl FnMut(Range<usize>, bool),
    ) -> io::Result<()> {
        let pagemap = self.uffd.pagemap().or(self.pagemap.as_ref()).ok_or(io::ErrorKind::Unsupported)?;
        pagemap.written(addresses, reset && self.uffd.protects_by_scan(), give)
    }

    /// Whether the process's page tables can be read.
    pub(crate) fn has_pagemap(&self) -> bool {
        self.pagemap.is_some()
    }

    /// The first run of guard pages in a range of addresses; None, too, where the page tables cannot be read.
    pub(crate) fn first_guard(&self, addresses: &Range<usize>) -> Option<Range<usize>> {
        let pagemap = self.pagemap.as_ref().or(self.own.as_ref()).filter(|_| guards_are_seen())?;
        pagemap.first_guard(addresses)
    }

    /// Whether the page tables map a page; false, too, where they cannot be read.
    pub(crate) fn is_present(&self, address: usize) -> bool {
        self.pagemap.as_ref().is_some_and(|pagemap| pagemap.is_present(address))
    }

    /// Counts an answer of the kernel, and gives it back. An error that is not known is kept for
    /// [`Space::unexpected`].
    pub(crate) fn counted(&self, outcome: Outcome) -> Outcome {
        if let Outcome::Unexpected { errno } = outcome {
            self.unexpected.store(errno, Ordering::Relaxed);
        }
        self.answers.count(outcome)
    }

    /// The last error of an install that is not known, if there was one.
    pub(crate) fn unexpected(&self) -> Option<std::io::Error> {
        let errno = self.unexpected.load(Ordering::Relaxed);
        (errno != 0).then(|| std::io::Error::from_raw_os_error(errno))
    }

    /// Whether the process is known to have exited.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Notes that the process has exited.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Wakes the threads that sleep on pages of the range: they fault again, unless the page is present.
    pub(crate) fn wake(&self, addresses: &Range<usize>) {
        self.uffd.wake(addresses.start, addresses.len());
    }
}
