//! Why a session cannot be had, and why memory of it cannot.

use crate::remote::RemoteError;
use crate::state_file::StateError;
use crate::uffd::OpenError;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Why a session could not be opened, or memory not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The server, or what it sent.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The kernel.
    #[error(transparent)]
    Uffd(#[from] OpenError),
    /// The image has no regular file of that path.
    #[error("image {image} has no file {path:?}")]
    NoSuchFile {
        /// The image.
        image: postcopy_proto::digest::Digest,
        /// The path.
        path: String,
    },
    /// The file has no such bytes, or they do not begin with a page.
    #[error(
        "bytes {} to {} of {path:?}: the file has {file_bytes}, and a part begins at a multiple of 4096",
        bytes.start, bytes.end
    )]
    Span {
        /// The file's path.
        path: String,
        /// What was asked for.
        bytes: Range<u64>,
        /// Its length.
        file_bytes: u64,
    },
    /// A region of another process cannot be.
    #[error("region {index}, {len} bytes at {address:#x}: {reason}")]
    Region {
        /// Which one of those that were given, from 0.
        index: usize,
        /// Its first address.
        address: usize,
        /// Its length.
        len: usize,
        /// What is wrong.
        reason: String,
    },
    /// Address space, threads or descriptors could not be had.
    #[error("{what} cannot be had")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state file, see [`crate::Session::resume`].
    #[error(transparent)]
    State(#[from] StateError),
    /// [`crate::Options::track_writes`] was asked for with [`crate::Session::attach`], and cannot be.
    #[error("what is written to another process's memory cannot be told: {0}")]
    NoTracking(String),
    /// The session has ended before.
    #[error("the session has ended")]
    Ended,
}

/// Why pages were lost.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LossError {
    /// A page could not be had; later touches of it are SIGBUS, or wait, by the loss policy.
    #[error("{0}")]
    Lost(Arc<str>),
    /// Beyond the region's end.
    #[error("bytes {offset} to {offset} + {len} are beyond the region's {region_bytes} bytes")]
    OutOfRange {
        /// The first byte asked for.
        offset: usize,
        /// How many.
        len: usize,
        /// The region's length.
        region_bytes: usize,
    },
    /// It took longer than the caller wanted to wait.
    #[error("not all was resident within {0:?}")]
    TimedOut(Duration),
}
