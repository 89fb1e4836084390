//! userfaultfd as the kernel provides it: page faults on memory that a program fills itself, at the
//! first access to each page.
//!
//! A pager serves memory whose pages are absent. The actors, in the order in which they handle a
//! page:
//!
//! 1. A process reserves address space: this process ([`memory::Memory`]), or another one, which
//!    hands over its userfaultfd.
//! 2. The pager opens a userfaultfd ([`Uffd::open`]), or adopts the other process's
//!    ([`Uffd::adopt`]). The range is registered ([`Uffd::register`]).
//! 3. A thread accesses an absent page, and the kernel suspends it. The userfaultfd has a message
//!    for the fault, which [`Uffd::read_messages`] reads and [`Event::of`] decodes. In a tokio
//!    runtime, [`AsyncUffd`] signals that a message is ready.
//! 4. The pager installs the page ([`Uffd::copy`], [`Uffd::zero`]), which wakes the thread. If the
//!    pager cannot get the page's bytes, it poisons the page ([`Uffd::poison`]): the access then
//!    raises SIGBUS, and never reads a silent zero.
//! 5. The owner of the memory removes pages, unmaps memory, moves it, or forks. Each of these is an
//!    event, if the handshake requested it ([`FEATURES`]), and the kernel suspends the causing
//!    thread until the pager has read the event. Until then, installs answer [`Outcome::Deferred`].
//! 6. With [`WP_ASYNC`], [`pagemap::Pagemap::written`] lists the pages written since their install.
//!
//! Every expected answer of the kernel is a value, not an error: [`Outcome`] has them all, with the
//! progress of a call. This matters most in races. A copy of two pages whose second page is present
//! answers EAGAIN, with 4096 bytes done. A copy that meets an unread event answers EAGAIN, with
//! nothing done. EEXIST has woken no waiter.
//!
//! # Example
//!
//! ```
#![doc = include_str!("../examples/serve_a_fault.rs")]
//! ```
//!
//! # Obligations of the caller
//!
//! Addresses are numbers here, because most of them belong to another process, and calls that take
//! them are not `unsafe`. A caller that serves its own process's memory vouches that no Rust value
//! uses the range ([`Uffd::register`], [`memory::forbid`]), and that it decodes each message once
//! ([`Event::of`]).
//!
//! # Why not the `userfaultfd` crate alone
//!
//! This crate uses that crate to register, to unregister and to wake. It does not use it to open,
//! read and copy. That crate's builder fails for ordinary users and hides the kernel's features.
//! Its events cannot be read into a buffer of the caller, and its copy loses the progress of an
//! interrupted call. It has no poison, no write-protected copy and no asynchronous write tracking.
//!
//! # Limits
//!
//! 64-bit Linux with pages of 4 KiB, and huge pages of 2 MiB. The constants are those of Linux 6.8;
//! on an older kernel, [`OpenError::Features`] names the features that it lacks.

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

/// The size of a huge page (hugetlb) in bytes. This crate does not serve other sizes.
pub const HUGE_BYTES: usize = 2 << 20;

const _: () = assert!(usize::BITS == 64, "addresses are words of the kernel's messages");

/// Converts an address or a length of the kernel.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, as asserted above")]
const fn to_usize(n: u64) -> usize {
    n as usize
}
