//! Post-copy restore: memory that fills on page faults, from page images on a server.
//!
//! ```no_run
//! use postcopy::{Options, Session};
//!
//! let server = "http://127.0.0.1:7070".parse()?;
//! let session = Session::open(&server, &"app:v1".parse()?, Options::default())?;
//! let memory = session.map("mem")?;
//! println!("{}", memory[12_345]); // the session fetches this page at this access
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Session::attach`] does the same for memory of another process, whose userfaultfd the caller
//! passes to it.
//!
//! The way of a page: the kernel reports a page fault as a message of the userfaultfd ([`uffd`]),
//! which the pager ([`pager`]) reads. The pager requests the page's chunk over the demand lane
//! ([`remote`]), verifies it, and installs its pages ([`install`]). The background fill ([`fill`])
//! prefetches the rest. [`transfer`] moves whole images. ARCHITECTURE.md lists the modules of this
//! crate and their imports.
#![allow(rustdoc::private_intra_doc_links, reason = "the module overview also serves readers of the source")]

mod background;
mod error;
mod fill;
mod install;
mod memory;
mod options;
mod outcome;
mod pace;
mod pager;
mod processes;
mod reader;
mod reaper;
mod record;
mod remote;
mod session;
mod shared;
pub mod state_file;
mod sync;
mod transfer;
mod underway;
mod usual;

pub use error::{LossError, RecordingError, SessionError};
pub use options::{LossPolicy, Options, Progress};
pub use outcome::{Failure, FailureEnd, FailureKind, Failures};
pub use processes::{signal_process_tree, with_descendants};
pub use reader::{ChunkBytes, ReadError, Reader, SetPages, WorkingSet};
pub use record::trace;
pub use remote::{
    Content, DEFAULT_SERVER, Image, ImageSource, Patience, Remote, RemoteError, Segments, ServerAddress,
};
pub use session::{Changes, ForeignMemory, ForeignRegion, Region, Session, SharedPager, Sharing, host};
pub use transfer::{beneath, criu, pull, push};

pub use postcopy_proto as proto;
pub use postcopy_uffd as uffd;
