//! Calls for programs that serve sessions for other processes, as the daemons do. An ordinary user
//! of [`Session`] does not need them.
//!
//! Such a host registers memory after the session has begun, hands a session over to a successor,
//! and signals the processes whose memory it serves. [`Session::hosted`] returns these calls.

use crate::session::Session;
use crate::shared::Command;
use rustix::process::Signal;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The calls for a session's host: see [`Session::hosted`].
#[derive(Clone, Copy, Debug)]
pub struct Hosted<'a> {
    session: &'a Session,
}

impl<'a> Hosted<'a> {
    pub(crate) fn new(session: &'a Session) -> Self {
        Self { session }
    }

    /// Declares that all memory of the process is registered: see
    /// [`ForeignMemory::is_registered`](crate::ForeignMemory::is_registered).
    pub fn set_registered(self) {
        let shared = &self.session.shared;
        shared.spaces().spaces().for_each(|space| space.set_registered());
        shared.state.set_registered();
        shared.fill_work.notify_one();
    }

    /// Fetches and installs the pages at these addresses as if a thread had faulted on them. This
    /// serves memory that the kernel reads without waiting for a page, such as the arguments that
    /// /proc shows. Does nothing if the session has ended.
    ///
    /// # Blocking
    /// Blocks until the pager has the request, not until the pages are installed.
    pub fn bring(self, addresses: &Range<usize>) {
        let spaces = self.session.shared.spaces();
        let regions = spaces.spaces().flat_map(|space| spaces.overlapping(space, addresses));
        for region in regions {
            let pages = region.pages_in(addresses);
            // Fails for a session that has ended.
            let _ = self.session.commands.blocking_send(Command::Bring { region, pages });
        }
    }

    /// Declares that no successor can take the session over, although it has a state file. When the
    /// session cannot go on, it then poisons its absent pages, and does not leave them for a
    /// successor.
    pub fn has_no_successor(self) {
        self.session.shared.has_no_successor.store(true, Ordering::Release);
    }

    /// Ends the session, and leaves its memory as it is for a successor, which takes it over from
    /// the state file. Returns whether the session has ended within `timeout`. The descriptors that
    /// the file names stay open.
    ///
    /// # Blocking
    /// Blocks for at most `timeout`, once the pager has the request.
    #[must_use]
    pub fn leave(self, timeout: Duration) -> bool {
        // Fails for a session that has ended.
        let _ = self.session.commands.blocking_send(Command::Leave);
        self.session.wait_end(timeout)
    }

    /// Returns whether the session could not go on, has ended, and has left its memory to a
    /// successor.
    #[must_use]
    pub fn is_left(self) -> bool {
        let shared = &self.session.shared;
        shared.has_ended() && shared.is_left_open.load(Ordering::Acquire)
    }

    /// Returns how often faults were lost, so that the loss policy applied, since the session
    /// began. With a state file this includes the losses before [`Session::resume`].
    #[must_use]
    pub fn losses(self) -> u64 {
        self.session.shared.state.losses()
    }

    /// Returns how often a fault was put off because the kernel had no memory for its page, since
    /// the session began or was resumed. Such a fault is tried again every 100 ms at least.
    #[must_use]
    pub fn memory_waits(self) -> u64 {
        self.session.shared.counters.memory_waits.load(Ordering::Relaxed)
    }

    /// Returns whether the session fills memory of huge pages (2 MiB).
    #[must_use]
    pub fn has_huge_pages(self) -> bool {
        self.session.shared.spaces().has_huge()
    }

    /// Sends a signal to the process that owns the memory, and to those of its descendants that
    /// have memory registered with a userfaultfd. Returns false if the process is unknown
    /// ([`ForeignMemory::pid`](crate::ForeignMemory::pid)).
    pub fn signal_owners(self, signal: Signal) -> bool {
        self.session.shared.signal_owners(signal)
    }
}
