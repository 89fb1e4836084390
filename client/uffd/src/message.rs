//! Messages of a userfaultfd: page faults, and the owner's changes of its address space.

use super::{PAGE_BYTES, abi, to_usize};
use rustix::fd::{OwnedFd, RawFd};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;

/// The number of 64-bit words in a message, `struct uffd_msg`.
pub const MESSAGE_WORDS: usize = size_of::<abi::Msg>() / size_of::<u64>();

/// A decoded message. Ranges are addresses in the owner's address space.
///
/// The kernel suspends the thread that causes an event until the message is read. The thread
/// changes the memory before or after that, by the kind of event. See userfaultfd(2), "Reading from
/// the userfaultfd structure".
#[derive(Debug)]
pub enum Event {
    /// A page fault: a thread accessed an absent page, or wrote to a protected one. The kernel
    /// suspends the thread until it is woken.
    Fault {
        /// The fault address, rounded down to a multiple of 4096.
        address: usize,
        /// True for a write to a protected page.
        is_protected: bool,
    },
    /// madvise(2) is about to remove the content of this range.
    Remove {
        /// The removed range.
        addresses: Range<usize>,
    },
    /// munmap(2) has unmapped this range.
    Unmap {
        /// The unmapped range.
        addresses: Range<usize>,
    },
    /// mremap(2) has moved a range.
    Remap {
        /// The range at its old place, with its new length.
        from: Range<usize>,
        /// The first address of the new place.
        to: usize,
    },
    /// The owner has forked a child.
    Fork {
        /// The child's userfaultfd: see [`Uffd::of_child`](crate::Uffd::of_child).
        child: OwnedFd,
    },
    /// A message of an unknown kind, or a fork whose descriptor the caller did not provide.
    Unknown {
        /// The kind, `uffd_msg.event`.
        event: u8,
    },
}

impl Event {
    /// Decodes a message that [`Uffd::read_messages`](crate::Uffd::read_messages) has read. Each
    /// message must be decoded once.
    ///
    /// Reading a fork's message creates a descriptor in this process, and the event owns it. So a
    /// second decoding would own the descriptor twice. A process that did not read the message
    /// itself must use [`Event::with_child`].
    #[must_use]
    pub fn of(message: [u64; MESSAGE_WORDS]) -> Self {
        Self::with_child(message, |fd| {
            // SAFETY: reading the message made this descriptor, and no other value owns it.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        })
    }

    /// Decodes a message as [`Event::of`]; `child` returns the descriptor for the number that a
    /// fork's message holds.
    #[must_use]
    pub fn with_child(message: [u64; MESSAGE_WORDS], child: impl FnOnce(RawFd) -> Option<OwnedFd>) -> Self {
        let [_, a, b, c] = message.map(to_usize);
        let event = message[0].to_ne_bytes()[0];
        match event {
            // With UFFD_FEATURE_EXACT_ADDRESS the address is not rounded down to its page.
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

    /// Returns the number of the descriptor in a fork's message, or None for other messages.
    #[must_use]
    pub fn child_of(message: [u64; MESSAGE_WORDS]) -> Option<RawFd> {
        let [a, b, c, d, ..] = message[1].to_ne_bytes();
        (message[0].to_ne_bytes()[0] == abi::EVENT_FORK).then(|| RawFd::from_ne_bytes([a, b, c, d]))
    }
}

/// Returns whether an error of reading messages may pass. A fork's message needs a descriptor and
/// memory, and stays unread without them (EMFILE, ENFILE, ENOMEM).
#[must_use]
pub fn may_pass(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}
