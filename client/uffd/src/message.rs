//! Messages: faults, and what the owner of the memory does to its address space.

use super::{PAGE_BYTES, abi, to_usize};
use rustix::fd::{OwnedFd, RawFd};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;

/// Words of 64 bits in a message, `struct uffd_msg`.
pub const MESSAGE_WORDS: usize = size_of::<abi::Msg>() / size_of::<u64>();

/// A message's meaning. Ranges are of addresses in the owner's address space.
///
/// The causer of an event sleeps until the message is read, and changes its memory before or after
/// that, by the kind of event. See userfaultfd(2), "Reading from the userfaultfd structure".
#[derive(Debug)]
pub enum Event {
    /// A thread accessed an absent page, or wrote to a protected one, and sleeps until it is woken.
    Fault {
        /// An address within the page, a multiple of 4096.
        address: usize,
        /// Whether this was a write to a protected page.
        is_protected: bool,
    },
    /// madvise(2) is about to take this range's content away.
    Remove {
        /// The range.
        addresses: Range<usize>,
    },
    /// munmap(2) has taken this range away.
    Unmap {
        /// The range.
        addresses: Range<usize>,
    },
    /// mremap(2) has moved a range.
    Remap {
        /// The range's old place, in its new length.
        from: Range<usize>,
        /// The first address of its new place.
        to: usize,
    },
    /// The owner has forked.
    Fork {
        /// The child's userfaultfd: see [`Uffd::of_child`](crate::Uffd::of_child).
        child: OwnedFd,
    },
    /// A message of another kind, or a fork whose descriptor was not given.
    Unknown {
        /// `uffd_msg.event`.
        event: u8,
    },
}

impl Event {
    /// Decodes a message that [`Uffd::read_messages`](crate::Uffd::read_messages) gave, once.
    ///
    /// Reading a fork's message makes a descriptor in this process, and the event owns it. So a
    /// message must not be decoded twice, and not by another process than the one that read it: use
    /// [`Event::with_child`] there.
    #[must_use]
    pub fn of(message: [u64; MESSAGE_WORDS]) -> Self {
        Self::with_child(message, |fd| {
            // SAFETY: reading the message made this descriptor, and nobody else knows of it.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        })
    }

    /// Decodes a message, as [`Event::of`], where `child` finds a child's descriptor by the number
    /// that the message has.
    #[must_use]
    pub fn with_child(message: [u64; MESSAGE_WORDS], child: impl FnOnce(RawFd) -> Option<OwnedFd>) -> Self {
        let [_, a, b, c] = message.map(to_usize);
        let event = message[0].to_ne_bytes()[0];
        match event {
            // With UFFD_FEATURE_EXACT_ADDRESS it is not the page's.
            abi::EVENT_PAGEFAULT => {
                let is_protected = message[1] & abi::PAGEFAULT_IS_WP != 0;
                Self::Fault { address: b - b % PAGE_BYTES, is_protected }
            }
            abi::EVENT_REMOVE => Self::Remove { addresses: a..b },
            abi::EVENT_UNMAP => Self::Unmap { addresses: a..b },
            abi::EVENT_REMAP => Self::Remap { from: a..a + c, to: b },
            _ => match Self::child_of(message).and_then(child) {
                Some(child) => Self::Fork { child },
                None => Self::Unknown { event },
            },
        }
    }

    /// Returns the number of the descriptor that a fork's message brings; None for other messages.
    #[must_use]
    pub fn child_of(message: [u64; MESSAGE_WORDS]) -> Option<RawFd> {
        let [a, b, c, d, ..] = message[1].to_ne_bytes();
        (message[0].to_ne_bytes()[0] == abi::EVENT_FORK).then(|| RawFd::from_ne_bytes([a, b, c, d]))
    }
}

/// Returns whether reading messages failed for a reason that may pass: a fork's message needs a
/// descriptor and memory, and stays unread without them (EMFILE, ENFILE, ENOMEM).
#[must_use]
pub fn may_pass(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}
