//! What can go wrong in a store.

use postcopy_proto::digest::Digest;
use std::io;
use std::path::{Path, PathBuf};

/// Why a store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It has no such thing.
    #[error("{0} is not in the store")]
    NotFound(String),
    /// Its copy of a thing is damaged, and it has no other.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What was given to it cannot be kept.
    #[error("{object}: {reason}")]
    Invalid {
        /// What was given.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no room for it.
    #[error("{}: the disk is full, or its quota used up", .0.display())]
    Full(PathBuf),
    /// The operating system says no.
    #[error("{}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
}

/// Why a directory cannot be used as a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another version of the layout.
    #[error("{}: store format {found:?} is not known to this version, which knows {known:?}", path.display())]
    Format {
        /// The file that says so.
        path: PathBuf,
        /// The first 80 characters of what it says.
        found: String,
        /// What it would have to say.
        known: &'static str,
    },
    /// It holds something else.
    #[error("{}: not empty and not a store: it has no file `format`", .0.display())]
    NotAStore(PathBuf),
    /// It is not there, and was not to be created.
    #[error("{}: there is no store", .0.display())]
    Missing(PathBuf),
    /// Its parts cannot be read or written.
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

/// Says that the copy of an object is damaged.
pub(crate) fn damaged(object: impl Into<String>, reason: impl ToString) -> StoreError {
    StoreError::Damaged { object: object.into(), reason: reason.to_string() }
}

/// How a pack is called in messages.
pub(crate) fn pack_name(pack: &Digest) -> String {
    format!("pack {pack}")
}
