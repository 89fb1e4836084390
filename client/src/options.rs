//! How a session behaves ([`Options`]), and how far it is ([`Progress`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What happens to a fault that cannot be served within its deadline, or at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossPolicy {
    /// Its page is poisoned: this touch is SIGBUS, and so is every later one, unless a background fill brings the
    /// page after all. Before Linux 6.6 it is SIGSEGV, for good.
    #[default]
    Poison,
    /// It stays pending, is reported by [`crate::Session::error`], and is tried again every second.
    Wait,
    /// The process that owns the memory, and all that it has forked, are killed: SIGKILL. Where that process is not known
    /// ([`crate::ForeignMemory::pid`]), as [`LossPolicy::Wait`].
    Kill,
    /// They are stopped (SIGSTOP), and the fault stays pending and is tried again. Where the process is not known, as
    /// [`LossPolicy::Wait`].
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
    /// [`crate::Session::fill`].
    pub fill: bool,
    /// Note what is touched, for the image's working set, and tell the server. Off by default. Every touched page is a fault
    /// then, where otherwise one brings its neighbours, too. See [`crate::Session::wait_recorded`].
    pub record: bool,
    /// Note what happens, and when, for [`crate::Session::write_trace`]. Off by default. One page in 50 of the working set is left
    /// to whoever touches it then: see [`crate::record::trace`].
    pub trace: bool,
    /// Note what is written to and removed: [`crate::Region::changes`], from Linux 6.7 on. Off by default. The first write to a
    /// page takes a fault of about a microsecond more. In another process's memory, which must be private, whoever
    /// writes first to a page waits for the pager (docs/BENCHMARKS.md), zero pages take memory, and it is
    /// [`crate::Session::changes`] that tells.
    pub track_writes: bool,
    /// Hold threads of another process that cause events (madvise, munmap, mremap, fork) without a pause, where they
    /// return to user mode, while a page is installed that they would keep out for ever: three and more such threads do.
    /// By ptrace(2), for a few milliseconds; a system call in which a held thread sleeps may return EINTR, as after a
    /// stop by SIGSTOP. Off by default; the daemons turn it on. Needs [`crate::ForeignMemory::pid`] and the right to
    /// trace the process. Never in this process's own memory: two threads cannot keep a page out, more can.
    pub hold_causers: bool,
}

impl Options {
    /// Page faults wait for at most 30 s and are poisoned then; nothing else is turned on.
    pub const DEFAULT: Self = Self {
        fault_deadline: Duration::from_secs(30),
        on_loss: LossPolicy::Poison,
        working_set: false,
        fill: false,
        record: false,
        trace: false,
        track_writes: false,
        hold_causers: false,
    };
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
