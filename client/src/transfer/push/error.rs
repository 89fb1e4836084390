//! The errors of a push.

use crate::remote::RemoteError;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::ManifestError;
use postcopy_proto::page::ChunkSize;
use postcopy_proto::path::{ImagePath, PathError};
use std::io;
use std::path::PathBuf;

/// The reason why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The server failed, or sent a wrong answer.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A file could not be read.
    #[error("{path}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file changed while the push read it. What was read may be no state that the file ever had.
    #[error("{0} changed while it was read. Push it again when nothing writes to it")]
    Changed(PathBuf),
    /// A file that has content, although its size is 0.
    #[error(
        "{0} has content, although its size is 0: the kernel makes it up. Copy the file, and push the copy"
    )]
    NoSize(PathBuf),
    /// A path that is no file, directory or symbolic link.
    #[error("{0} is no file, directory or symbolic link")]
    Kind(PathBuf),
    /// A directory without any entries.
    #[error(
        "{0} is empty, so there is nothing to push. If a program should have filled it (criu dump), check its log and run it again"
    )]
    Empty(PathBuf),
    /// A path that an image cannot hold.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A chain of CRIU's incremental images that leads back to itself.
    #[error("{0}: the `parent` links of incremental images form a cycle")]
    Parents(PathBuf),
    /// A link `parent` beside CRIU's images that leads to something else.
    #[error(
        "{0} leads to a directory without CRIU's images, which is not stored. If the dump is not incremental, remove the link"
    )]
    NoParent(PathBuf),
    /// The entries do not form a valid manifest.
    #[error("the files do not form a valid image")]
    Manifest(#[from] ManifestError),
    /// The server lost chunks during each attempt.
    #[error(
        "the server lost chunks during each attempt of the push; run `postcopyd gc` with a longer --grace"
    )]
    Lost,
    /// The server has accepted the segments of the manifest, and lost them during each attempt.
    #[error(
        "server {server} asks for segments again that it has accepted. Run `postcopyd gc` with a longer --grace, or check the store with `postcopyd verify`"
    )]
    Segments {
        /// The server's address.
        server: String,
    },
    /// A file of which is not known which pages were written. Over a base, the others are those of
    /// the base.
    #[error(
        "{path}: {reason}, so it is not known which pages are as in the base. Have the file written anew to ext4, xfs or btrfs (a copy may have other holes), or push the whole file without a base"
    )]
    Holes {
        /// The path of the file.
        path: PathBuf,
        /// The reason why that is not known.
        reason: String,
    },
    /// A file of another size than in the base, with a hole where one of both ends.
    #[error(
        "{path} has {actual} bytes, and {base} in the base: the hole at byte {offset} is in a chunk that has another length there. Push it without a base"
    )]
    BaseSize {
        /// The path of the file.
        path: PathBuf,
        /// The size of the file.
        actual: u64,
        /// The size of the file in the base.
        base: u64,
        /// The first byte of the chunk.
        offset: u64,
    },
    /// Another chunk size than that of the base.
    #[error("the base has chunks of {base}, and chunks of {wanted} are asked for")]
    BaseChunkSize {
        /// The chunk size of the base.
        base: ChunkSize,
        /// The chunk size of the options.
        wanted: ChunkSize,
    },
    /// Changes that the image does not have room for.
    #[error("{path}: {reason}")]
    Changes {
        /// The path of the file in the image.
        path: ImagePath,
        /// The defect of the changes.
        reason: String,
    },
    /// The server has lost a chunk of the base.
    #[error("server {server} has lost chunk {chunk} of the base. Check the store with `postcopyd verify`")]
    BaseLost {
        /// The server's address.
        server: String,
        /// The digest of the chunk.
        chunk: Digest,
    },
    /// A worker panicked.
    #[error("a worker stopped: {0}")]
    Worker(String),
}
