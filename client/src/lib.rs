//! Post-copy restore: memory that fills on touch, from page images that a server holds.
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
//! The way of a page: a touch is a message of the userfaultfd ([`uffd`]), read by the pager ([`pager`]),
//! asked for over the demand lane ([`lane`]), verified against the image's manifest ([`image`]) and installed
//! ([`install`]) into its region ([`region`]). The background fill ([`fill`]) brings the rest. [`push`] and
//! [`pull`] move whole images.
#![allow(rustdoc::private_intra_doc_links, reason = "the map is for those who read the source, too")]

mod advice;
mod ahead;
mod attach;
mod bits;
mod changes;
mod chunk;
mod events;
mod fetch;
mod fill;
pub mod host;
mod huge;
mod image;
mod install;
mod kept;
mod lane;
mod memory;
mod pace;
mod pager;
pub mod pull;
pub mod push;
mod reaper;
mod recorder;
mod region;
mod remote;
mod requests;
mod session;
mod shared;
mod shared_pager;
mod spin;
pub mod state_file;
mod sync;
pub mod trace;
mod way_out;
mod work;

pub use advice::{signal_process_tree, with_descendants};
pub use attach::{ForeignMemory, ForeignRegion, Sharing};
pub use changes::Changes;
pub use image::{Content, Image};
pub use region::Region;
pub use remote::{DEFAULT_SERVER, Remote, RemoteError, Segments, ServerAddress};
pub use session::{ImageSource, LossError, LossPolicy, Options, Progress, Session, SessionError};
pub use shared_pager::SharedPager;

pub use postcopy_proto as proto;
pub use postcopy_uffd as uffd;
