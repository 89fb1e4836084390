//! Post-copy restore: memory that fills on page faults, from page images that a server holds.
//!
//! ```no_run
//! use postcopy::{Options, Session};
//!
//! let server = "http://127.0.0.1:7070".parse()?;
//! let session = Session::open(&server, &"app:v1".parse()?, Options::default())?;
//! let memory = session.map("mem")?;
//! println!("{}", memory[12_345]); // this page comes over the network now
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Session::attach`] does the same for memory of another process, whose userfaultfd it is given.
//!
//! The way of a page: a page fault is a message of the userfaultfd ([`uffd`]), which the pager ([`pager`]) reads. It
//! asks for the page's chunk over the demand lane ([`remote`]), and installs the pages once they are verified
//! ([`install`]). The background fill ([`fill`]) brings the rest. [`transfer`] moves whole images. ARCHITECTURE.md has
//! the rooms of this crate, and what imports what.
#![allow(rustdoc::private_intra_doc_links, reason = "the map is for those who read the source, too")]

mod background;
mod bits;
mod error;
mod fill;
mod install;
mod memory;
mod options;
mod outcome;
mod pace;
mod pager;
mod processes;
mod reaper;
mod record;
mod remote;
mod session;
mod shared;
pub mod state_file;
mod sync;
mod transfer;

pub use error::{LossError, SessionError};
pub use options::{LossPolicy, Options, Progress};
pub use outcome::{Failure, FailureEnd, FailureKind, Failures};
pub use processes::{signal_process_tree, with_descendants};
pub use record::trace;
pub use remote::{Content, DEFAULT_SERVER, Image, ImageSource, Remote, RemoteError, Segments, ServerAddress};
pub use session::{Changes, ForeignMemory, ForeignRegion, Region, Session, SharedPager, Sharing, host};
pub use transfer::{pull, push};

pub use postcopy_proto as proto;
pub use postcopy_uffd as uffd;
