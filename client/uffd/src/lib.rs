//! userfaultfd as the kernel has it: faults on memory that a program fills itself, at the moment of
//! the first access.
//!
//! A pager serves memory whose pages are absent. The actors, in the order in which a page meets
//! them:
//!
//! 1. Someone reserves address space: this process ([`memory::Memory`]), or another one, which
//!    hands its userfaultfd over.
//! 2. The pager opens a userfaultfd ([`Uffd::open`]) or adopts the other process's
//!    ([`Uffd::adopt`]), and the range is registered ([`Uffd::register`]).
//! 3. A thread accesses an absent page, and sleeps. The userfaultfd has a message of it:
//!    [`Uffd::read_messages`] reads, [`Event::of`] decodes it. In a tokio runtime, [`AsyncUffd`]
//!    says when to read.
//! 4. The pager installs the page ([`Uffd::copy`], [`Uffd::zero`]), which wakes the thread; or,
//!    where it has no bytes for it, poisons it ([`Uffd::poison`]): the access is SIGBUS then, and
//!    never a silent zero.
//! 5. The owner of the memory gives pages back, unmaps, moves or forks it. Each of these is an
//!    event, if it was asked for ([`FEATURES`]), and its causer sleeps until it is read. Until
//!    then, installing answers [`Outcome::Deferred`].
//! 6. With [`WP_ASYNC`], [`pagemap::Pagemap::written`] lists the pages written since they were
//!    installed.
//!
//! Every answer that the kernel is expected to give is a value, not an error: [`Outcome`] has them
//! all, with how far a call got. This matters most in races: a copy of two pages whose second one
//! is present answers EAGAIN, with 4096 bytes done; an unread event answers EAGAIN, with nothing
//! done; EEXIST has woken no waiter.
//!
//! # Example
//!
//! ```
#![doc = include_str!("../examples/serve_a_fault.rs")]
//! ```
//!
//! # What the caller vouches for
//!
//! Addresses are numbers here, because most of them are another process's, and calls that take them
//! are not `unsafe`. A caller that serves its own process's memory vouches that no Rust value uses
//! the range ([`Uffd::register`], [`memory::forbid`]), and decodes each message once
//! ([`Event::of`]).
//!
//! # Why not the `userfaultfd` crate alone
//!
//! That crate registers, unregisters and wakes here. It does not open, read and copy: its builder
//! fails for ordinary users and hides the kernel's features, its events cannot be read into a
//! buffer of the caller's, and its copy loses how far an interrupted one got. It has no poison, no
//! write-protected copy and no asynchronous write tracking.
//!
//! # Limits
//!
//! 64-bit Linux with pages of 4 KiB, and huge pages of 2 MiB. Constants are those of Linux 6.8; an
//! older kernel answers [`OpenError::Features`] for what it lacks.

#![expect(unsafe_code, reason = "ioctls on userfaultfds, and mappings")]

mod abi;
mod feature;
mod ioctl;
pub mod memory;
mod message;
mod open;
pub mod pagemap;
mod uffd;
mod watch;

pub use feature::*;
pub use ioctl::Outcome;
pub use message::{Event, MESSAGE_WORDS, may_pass};
pub use open::{Access, OpenError, probe};
pub use pagemap::pagemap_scan_works;
pub use uffd::{SharedAt, Uffd};
pub use watch::{AsyncUffd, Readable};

/// The size of a page in bytes.
pub const PAGE_BYTES: usize = 4096;

/// The size of a huge page (hugetlb) in bytes; other sizes are not served.
pub const HUGE_BYTES: usize = 2 << 20;

const _: () = assert!(usize::BITS == 64, "addresses are words of the kernel's messages");

/// An address or a length as the kernel gives it.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, as asserted above")]
const fn to_usize(n: u64) -> usize {
    n as usize
}
