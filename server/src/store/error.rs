//! The errors of a store.

use postcopy_proto::digest::Digest;
use std::io;
use std::path::{Path, PathBuf};

/// The reason why a store could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store has no such object.
    #[error("{0} is not in the store")]
    NotFound(String),
    /// The store's copy of the object is damaged, and it has no other.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// The name of the object.
        object: String,
        /// The defect of the object.
        reason: String,
    },
    /// The given object cannot be stored.
    #[error("{object}: {reason}")]
    Invalid {
        /// The name of the object.
        object: String,
        /// The defect of the object.
        reason: String,
    },
    /// The store uses as much memory for this as it may.
    #[error("{0}")]
    Busy(&'static str),
    /// The caller has left, so the work was given up.
    #[error("the caller has left")]
    Abandoned,
    /// The disk or quota is full.
    #[error("{}: the disk is full, or its quota used up", .0.display())]
    Full(PathBuf),
    /// The bucket refuses, or does not answer.
    #[error("{object}: {reason}")]
    Bucket {
        /// The name of the object.
        object: String,
        /// The error of the request.
        reason: String,
    },
    /// The operating system refuses.
    #[error("{}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// The reason why a directory or a bucket cannot be used as a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store has another version of the layout.
    #[error("{}: store format {found:?} is not known to this version, which knows {known:?}", path.display())]
    Format {
        /// The file `format`.
        path: PathBuf,
        /// The first 80 characters of its content.
        found: String,
        /// The content that this version requires.
        known: &'static str,
    },
    /// The store has format 1.
    #[error("{}: the store has format 1. Stop its servers, and run `postcopyd upgrade --store DIR`", .0.display())]
    Old(PathBuf),
    /// The directory has other content.
    #[error("{}: not empty and not a store: it has no file `format`", .0.display())]
    NotAStore(PathBuf),
    /// There is no store, and none was to be created.
    #[error("{}: there is no store", .0.display())]
    Missing(PathBuf),
    /// There is no access to such a bucket.
    #[error("{url}: {reason}")]
    Bucket {
        /// The URL of the bucket.
        url: String,
        /// The wrong setting, or the kind of URL that is not supported.
        reason: String,
    },
    /// A part of the store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes a [`StoreError`] of an I/O error on `path`.
pub(crate) fn io_error(path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(path.into()),
        _ => StoreError::Io { path: path.into(), source },
    }
}

/// Makes the error for a damaged copy of an object.
pub(crate) fn damaged(object: impl Into<String>, reason: impl ToString) -> StoreError {
    StoreError::Damaged { object: object.into(), reason: reason.to_string() }
}

/// Returns the name of a pack in messages.
pub(crate) fn pack_name(pack: &Digest) -> String {
    format!("pack {pack}")
}
