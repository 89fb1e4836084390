//! The errors of sessions and of their memory.

use crate::remote::RemoteError;
use crate::state_file::StateError;
use crate::uffd::OpenError;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The reason why a session could not be opened, or memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The server, the connection, or the server's answers.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The kernel's userfaultfd, or a descriptor that was handed in.
    #[error(transparent)]
    Uffd(#[from] OpenError),
    /// The image has no regular file of that path.
    #[error("image {image} has no file {path:?}")]
    NoSuchFile {
        /// The digest of the image.
        image: postcopy_proto::digest::Digest,
        /// The path that the image lacks.
        path: String,
    },
    /// The file does not have these bytes, or their start is not a multiple of 4096.
    #[error(
        "bytes {} to {} of {path:?}: the file has {file_bytes} bytes, and a part must begin at a multiple of 4096",
        bytes.start, bytes.end
    )]
    Span {
        /// The file's path.
        path: String,
        /// The requested bytes.
        bytes: Range<u64>,
        /// The length of the file in bytes.
        file_bytes: u64,
    },
    /// A region of another process is invalid.
    #[error("region {index}, {len} bytes at {address:#x}: {reason}")]
    Region {
        /// The index of the region in the list of regions, from 0 on.
        index: usize,
        /// The region's first address.
        address: usize,
        /// The region's length in bytes.
        len: usize,
        /// The rule that the region breaks.
        reason: String,
    },
    /// The operating system refused address space, a thread, a descriptor or a registration.
    #[error("the system refuses {what}")]
    System {
        /// The refused resource.
        what: &'static str,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The state file, see [`crate::Session::resume`].
    #[error(transparent)]
    State(#[from] StateError),
    /// The caller asked for [`crate::Options::track_writes`] with [`crate::Session::attach`], and
    /// this memory cannot be tracked.
    #[error("writes to another process's memory cannot be tracked: {0}")]
    NoTracking(String),
    /// The session has already ended.
    #[error("the session has ended")]
    Ended,
}

/// The reason why a call did not get a region's pages.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LossError {
    /// A page was lost. By the loss policy, later accesses to it raise SIGBUS or wait.
    #[error("{0}")]
    Lost(Arc<str>),
    /// The bytes lie beyond the region's end.
    #[error("bytes {offset} to {offset} + {len} are beyond the region's {region_bytes} bytes")]
    OutOfRange {
        /// The first requested byte.
        offset: usize,
        /// The number of requested bytes.
        len: usize,
        /// The region's length in bytes.
        region_bytes: usize,
    },
    /// The pages did not become resident within the caller's time-out.
    #[error("some pages were still absent after {0:?}")]
    TimedOut(Duration),
}

/// The reason why the server does not have a session's recording.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordingError {
    /// The session does not record: see [`crate::Options::record`].
    #[error("page faults of this session are not recorded")]
    NotRecorded,
    /// The last attempt to send it failed. The session tries again.
    #[error("{0}")]
    NotSent(String),
    /// The server did not have it within the caller's time-out. The session goes on sending.
    #[error("the server did not have the recording within {0:?}")]
    TimedOut(Duration),
}
