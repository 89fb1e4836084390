//! Reads and writes whole objects. A visible object is complete and synced: object_store's
//! LocalFileSystem writes a staged file, syncs it, renames it, and syncs its directory.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::Layout;
use crate::store::lock::StoreLock;
use bytes::Bytes;
use futures_util::FutureExt;
use object_store::ObjectStoreExt;
use object_store::local::LocalFileSystem;
use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The writer of a store's objects.
#[derive(Debug)]
pub(crate) struct Objects {
    files: LocalFileSystem,
    layout: Layout,
}

impl Objects {
    /// Makes a writer for a store whose directory exists.
    pub(crate) fn new(layout: &Layout) -> Result<Self, StoreError> {
        let files = LocalFileSystem::new_with_prefix(layout.root());
        let files = files.map_err(|e| store_error(layout.root(), e))?;
        Ok(Self { files: files.with_fsync(true), layout: layout.clone() })
    }

    /// Writes an object of the domain, and replaces an existing one. The object is durable on
    /// return.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(crate) fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let _writing = StoreLock::write_staged(&self.layout)?;
        self.put_unlocked(path, bytes)
    }

    /// Writes an object as [`Objects::put`] does, before there is a domain to lock.
    pub(crate) fn put_unlocked(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let relative = path.strip_prefix(self.layout.root()).expect("paths come from this store's layout");
        let relative = relative.to_str().expect("the layout's names are ASCII");
        let location = object_store::path::Path::from(relative);
        // Within a runtime object_store hands its file work to another blocking thread. Threads
        // that wait for each other could exhaust the pool. On a thread outside of any runtime it
        // does the work itself, at once.
        let put = || self.files.put(&location, bytes.into()).now_or_never();
        let done = std::thread::scope(|scope| scope.spawn(put).join());
        let done = done.expect("object_store does not panic").expect("without a runtime it is done at once");
        done.map(|_| ()).map_err(|e| store_error(path, e))
    }
}

/// Extracts the I/O error that object_store's errors wrap.
fn store_error(path: &Path, error: object_store::Error) -> StoreError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return io_error(path)(io::Error::new(io.kind(), error.to_string()));
        }
        cause = inner.source();
    }
    io_error(path)(io::Error::other(error))
}

/// Bytes that are reserved for a file before it is read: more than most references and roots have.
const FIRST_BYTES: usize = 4096;

/// Returns the bytes of a file, at most `max` and one more; `None` if there is no such file.
pub(crate) fn read_bounded(path: &Path, max: usize) -> Result<Option<Vec<u8>>, StoreError> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io_error(path))?,
    };
    // With room from the start, a small file takes two calls of read(2).
    let mut bytes = Vec::with_capacity(FIRST_BYTES.min(max + 1));
    file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
    Ok(Some(bytes))
}

/// Removes a file. Returns false if it did not exist.
pub(crate) fn remove(path: &Path) -> Result<bool, StoreError> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error(path)(e)),
    }
}
