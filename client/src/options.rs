//! The options of a session ([`Options`]) and the counts that it keeps ([`Progress`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The fate of a page fault that cannot be answered within its deadline, or at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossPolicy {
    /// The page is poisoned: this access and every later one raise SIGBUS, unless a background fill
    /// installs the page after all. Before Linux 6.6 the signal is SIGSEGV, and the page stays so.
    #[default]
    Poison,
    /// The fault stays pending, is reported by [`crate::Session::error`], and is tried again every
    /// second.
    Wait,
    /// The process that waits is killed (SIGKILL), with all of its descendants that share the
    /// memory. A process that is not known for certain gets [`LossPolicy::Poison`] instead.
    Kill,
    /// The processes that [`LossPolicy::Kill`] kills are stopped (SIGSTOP). The fault stays pending
    /// and is tried again.
    Pause,
}

/// The options of a session. Made from [`Options::DEFAULT`], one call for each change:
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
    /// The time that a page fault may take before the loss policy decides. 30 s by default, at most
    /// a year.
    pub fault_deadline: Duration,
    /// The fate of a page fault that is lost. [`LossPolicy::Poison`] by default.
    pub on_loss: LossPolicy,
    /// Fetch the image's working set at once, if the server has one: the pages that earlier
    /// restores accessed, in the order of their first accesses, before all else. Off by default.
    /// Files that are mapped after the first one may get a part of theirs.
    pub working_set: bool,
    /// Fetch all pages in the background, in the order of the image, after the working set. Off by
    /// default; see also [`crate::Session::fill`].
    pub fill: bool,
    /// Record the order of first accesses, and send it to the server for the image's working set.
    /// Off by default. Each first access is then a page fault; without recording, one fault
    /// installs the page's neighbours, too. See [`crate::Session::wait_recorded`].
    ///
    /// A recording takes memory: 64 KiB for each GiB of the image's files that the session maps, 8
    /// to 16 bytes for each recorded page ([`Options::record_pages`]), and the frames of chunks
    /// with absent pages ([`Options::record_cache_mib`]). While the session sends it, it takes up
    /// to 12 bytes more for each page, and up to 12 MiB for the pages that the recording leaves
    /// out.
    pub record: bool,
    /// The largest number of pages in a recording, with [`Options::record`]: the first accesses.
    /// The recording leaves out later ones. From 1 to [`Options::MOST_RECORD_PAGES`], which is the
    /// default, because a working set has at most 1 GiB.
    pub record_pages: u32,
    /// The MiB of frames that a session keeps in memory, with [`Options::record`], for chunks of
    /// which it has installed some pages only. The session fetches frames beyond that again. At
    /// least 1; 128 by default. The decoded pages of 16 chunks are kept in addition.
    pub record_cache_mib: u32,
    /// Note events with their times, for [`crate::Session::write_trace`]. Off by default. One page
    /// in 50 of the working set is then left to page faults: see [`crate::trace`].
    pub trace: bool,
    /// Track which pages are written to and removed: [`crate::Region::changes`], from Linux 6.7 on.
    /// Off by default. The first write to a page takes a fault of about a microsecond more. In
    /// another process's memory, which must be private, the first write to a page waits for the
    /// pager (docs/BENCHMARKS.md), zero pages take memory, and [`crate::Session::changes`] has the
    /// results.
    pub track_writes: bool,
    /// Hold threads of another process that cause events (madvise, munmap, mremap, fork) without a
    /// pause, while the session installs a page. Three and more such threads would block the
    /// install for ever. The session holds them by ptrace(2), where they return to user mode, for a
    /// few milliseconds. A system call in which a held thread sleeps may return EINTR, as after a
    /// stop by SIGSTOP. Off by default; the daemons turn it on. It needs
    /// [`crate::ForeignMemory::pid`] and the right to trace the process. The session holds no
    /// thread in this process's own memory: two threads cannot block an install, more can.
    pub hold_causers: bool,
}

impl Options {
    /// The most pages of a recording: 1 GiB of memory.
    pub const MOST_RECORD_PAGES: u32 = 1 << 18;

    /// The default options: a page fault waits for at most 30 s, then its page is poisoned. All
    /// else is off.
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

    /// Returns these options with this [`Options::fault_deadline`].
    #[must_use]
    pub const fn fault_deadline(self, fault_deadline: Duration) -> Self {
        Self { fault_deadline, ..self }
    }

    /// Returns these options with this [`Options::on_loss`].
    #[must_use]
    pub const fn on_loss(self, on_loss: LossPolicy) -> Self {
        Self { on_loss, ..self }
    }

    /// Returns these options with this [`Options::working_set`].
    #[must_use]
    pub const fn working_set(self, working_set: bool) -> Self {
        Self { working_set, ..self }
    }

    /// Returns these options with this [`Options::fill`].
    #[must_use]
    pub const fn fill(self, fill: bool) -> Self {
        Self { fill, ..self }
    }

    /// Returns these options with this [`Options::record`].
    #[must_use]
    pub const fn record(self, record: bool) -> Self {
        Self { record, ..self }
    }

    /// Returns these options with this [`Options::record_pages`].
    #[must_use]
    pub const fn record_pages(self, record_pages: u32) -> Self {
        Self { record_pages, ..self }
    }

    /// Returns these options with this [`Options::record_cache_mib`].
    #[must_use]
    pub const fn record_cache_mib(self, record_cache_mib: u32) -> Self {
        Self { record_cache_mib, ..self }
    }

    /// Returns these options with this [`Options::trace`].
    #[must_use]
    pub const fn trace(self, trace: bool) -> Self {
        Self { trace, ..self }
    }

    /// Returns these options with this [`Options::track_writes`].
    #[must_use]
    pub const fn track_writes(self, track_writes: bool) -> Self {
        Self { track_writes, ..self }
    }

    /// Returns these options with this [`Options::hold_causers`].
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

/// The state of a session in pages, and its counts since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages of all regions.
    pub total_pages: u64,
    /// Pages that are resident.
    pub resident_pages: u64,
    /// Pages that were lost: an access raises SIGBUS.
    pub poisoned_pages: u64,
    /// Pages whose content the program gave back: an access reads zeros.
    pub removed_pages: u64,
    /// Page faults that the kernel reported; several threads on one page count several times.
    pub faults: u64,
    /// Chunks that the demand lane delivered.
    pub demand_chunks: u64,
    /// Demand-lane chunks that sequential read-ahead fetched.
    pub read_ahead_chunks: u64,
    /// Chunks that the bulk lane delivered.
    pub bulk_chunks: u64,
    /// Pages that the working set delivered. Frames whose pages were all resident before do not
    /// count.
    pub working_set_pages: u64,
    /// Bytes of the frames that both lanes delivered.
    pub frame_bytes: u64,
    /// The number of times that the session held threads that cause events without a pause
    /// ([`crate::Options::hold_causers`]).
    pub holds: u64,
    /// Children whose mappings could not be read in time. Where MADV_WIPEONFORK has emptied absent
    /// pages of theirs, an access reads the image's bytes.
    pub unseen_forks: u64,
}

/// The counters behind [`Progress`], in its order.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) demand_chunks: AtomicU64,
    pub(crate) read_ahead_chunks: AtomicU64,
    pub(crate) bulk_chunks: AtomicU64,
    pub(crate) working_set_pages: AtomicU64,
    pub(crate) frame_bytes: AtomicU64,
    pub(crate) holds: AtomicU64,
    /// The number of faults that were deferred because the kernel had no memory for their pages.
    pub(crate) memory_waits: AtomicU64,
    /// The number of children whose mappings were not read in time.
    pub(crate) unseen_forks: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
