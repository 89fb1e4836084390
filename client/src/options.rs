//! How a session behaves ([`Options`]), and how far it is ([`Progress`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What happens to a page fault that cannot be answered within its deadline, or at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossPolicy {
    /// The page is poisoned: this access and every later one raise SIGBUS, unless a background fill brings the page
    /// after all. Before Linux 6.6 it is SIGSEGV, for good.
    #[default]
    Poison,
    /// The fault stays pending, is reported by [`crate::Session::error`], and is tried again every second.
    Wait,
    /// The process that waits is killed (SIGKILL) with all of its descendants that share the memory. A process that is
    /// not known for certain gets [`LossPolicy::Poison`] instead.
    Kill,
    /// The same with SIGSTOP. The fault stays pending and is tried again.
    Pause,
}

/// How a session behaves. Made from [`Options::DEFAULT`], one call for each change:
///
/// ```
/// use postcopy::Options;
/// use std::time::Duration;
///
/// let options = Options::DEFAULT.fill(true).fault_deadline(Duration::from_secs(5));
/// assert!(options.fill);
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How long a page fault may take before the loss policy decides. 30 s by default, at most a year.
    pub fault_deadline: Duration,
    /// What happens to a page fault that is lost. [`LossPolicy::Poison`] by default.
    pub on_loss: LossPolicy,
    /// Fetch the image's working set at once, if the server has one: the pages that earlier restores accessed, in the
    /// order of their first accesses, before all else. Off by default. Files that are mapped after the first one may
    /// get a part of theirs.
    pub working_set: bool,
    /// Fetch all pages in the background, in the order of the image, after the working set. Off by default; see also
    /// [`crate::Session::fill`].
    pub fill: bool,
    /// Record which pages are accessed first, and send that to the server for the image's working set. Off by default.
    /// Every first access is a page fault then; otherwise one brings the page's neighbours, too. See
    /// [`crate::Session::wait_recorded`].
    ///
    /// In memory a recording takes 64 KiB for each GiB of the image's files that the session maps, 8 to 16 bytes for each
    /// page that it has ([`Options::record_pages`]), and the frames of chunks of which pages are still absent
    /// ([`Options::record_cache_mib`]). While it is sent, it takes up to 12 bytes more for each page, and up to 12 MiB for
    /// the pages that the recording says nothing about.
    pub record: bool,
    /// How many pages a recording has at most, with [`Options::record`]: the first ones that are accessed. It says nothing
    /// about later ones. From 1 to [`Options::MOST_RECORD_PAGES`], which is the default: a working set has at most 1 GiB.
    pub record_pages: u32,
    /// How many MiB of frames a session keeps in memory, with [`Options::record`]: of chunks of which it has installed some
    /// pages alone. It fetches the others' again, for each fault. At least 1; 128 by default. The pages of 16 chunks come to
    /// that.
    pub record_cache_mib: u32,
    /// Note what happens when, for [`crate::Session::write_trace`]. Off by default. One page in 50 of the working set
    /// is then left to page faults: see [`crate::trace`].
    pub trace: bool,
    /// Track which pages are written to and removed: [`crate::Region::changes`], from Linux 6.7 on. Off by default. The
    /// first write to a page takes a fault of about a microsecond more. In another process's memory, which must be
    /// private, the first write to a page waits for the pager (docs/BENCHMARKS.md), zero pages take memory, and
    /// [`crate::Session::changes`] has the results.
    pub track_writes: bool,
    /// Hold threads of another process that cause events (madvise, munmap, mremap, fork) without a pause, where they
    /// return to user mode, while a page is installed that they would keep out for ever: three and more such threads do.
    /// By ptrace(2), for a few milliseconds; a system call in which a held thread sleeps may return EINTR, as after a
    /// stop by SIGSTOP. Off by default; the daemons turn it on. Needs [`crate::ForeignMemory::pid`] and the right to
    /// trace the process. Never in this process's own memory: two threads cannot keep a page out, more can.
    pub hold_causers: bool,
}

impl Options {
    /// The most pages of a recording: 1 GiB of memory.
    pub const MOST_RECORD_PAGES: u32 = 1 << 18;

    /// Page faults wait for at most 30 s and are poisoned then; nothing else is turned on.
    pub const DEFAULT: Self = Self {
        fault_deadline: Duration::from_secs(30),
        on_loss: LossPolicy::Poison,
        working_set: false,
        fill: false,
        record: false,
        record_pages: Self::MOST_RECORD_PAGES,
        record_cache_mib: 128,
        trace: false,
        track_writes: false,
        hold_causers: false,
    };

    /// With this [`Options::fault_deadline`].
    #[must_use]
    pub const fn fault_deadline(self, fault_deadline: Duration) -> Self {
        Self { fault_deadline, ..self }
    }

    /// With this [`Options::on_loss`].
    #[must_use]
    pub const fn on_loss(self, on_loss: LossPolicy) -> Self {
        Self { on_loss, ..self }
    }

    /// With this [`Options::working_set`].
    #[must_use]
    pub const fn working_set(self, working_set: bool) -> Self {
        Self { working_set, ..self }
    }

    /// With this [`Options::fill`].
    #[must_use]
    pub const fn fill(self, fill: bool) -> Self {
        Self { fill, ..self }
    }

    /// With this [`Options::record`].
    #[must_use]
    pub const fn record(self, record: bool) -> Self {
        Self { record, ..self }
    }

    /// With this [`Options::record_pages`].
    #[must_use]
    pub const fn record_pages(self, record_pages: u32) -> Self {
        Self { record_pages, ..self }
    }

    /// With this [`Options::record_cache_mib`].
    #[must_use]
    pub const fn record_cache_mib(self, record_cache_mib: u32) -> Self {
        Self { record_cache_mib, ..self }
    }

    /// With this [`Options::trace`].
    #[must_use]
    pub const fn trace(self, trace: bool) -> Self {
        Self { trace, ..self }
    }

    /// With this [`Options::track_writes`].
    #[must_use]
    pub const fn track_writes(self, track_writes: bool) -> Self {
        Self { track_writes, ..self }
    }

    /// With this [`Options::hold_causers`].
    #[must_use]
    pub const fn hold_causers(self, hold_causers: bool) -> Self {
        Self { hold_causers, ..self }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::DEFAULT
    }
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
    /// Pages that have come with the working set; not those of frames of which touches had brought all before.
    pub working_set_pages: u64,
    /// Bytes of the frames that came over both.
    pub frame_bytes: u64,
    /// How often threads were held that cause events without a pause ([`crate::Options::hold_causers`]).
    pub holds: u64,
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
    pub(crate) holds: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
