//! Objects that are files: object_store's LocalFileSystem writes a staged file, syncs it, renames
//! it, and syncs its directory.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::Layout;
use crate::store::objects::{Entry, found};
use bytes::Bytes;
use futures_util::FutureExt;
use object_store::ObjectStoreExt;
use object_store::local::LocalFileSystem;
use rustix::fs::{AtFlags, CWD, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;
use std::error::Error;
use std::fs::{self, DirEntry, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Bytes that are reserved for a file before it is read: more than most references and roots have.
const FIRST_BYTES: usize = 4096;

/// Attempts to remove a directory into which others write. What they write after the last one stays.
const REMOVALS: usize = 8;

/// A writer of files below a directory.
#[derive(Debug)]
pub(crate) struct Directory {
    root: PathBuf,
    files: LocalFileSystem,
}

impl Directory {
    /// Makes a writer for a directory that exists.
    pub(crate) fn new(root: &Path) -> Result<Self, StoreError> {
        let files = LocalFileSystem::new_with_prefix(root).map_err(|e| store_error(root, e))?;
        Ok(Self { root: root.to_owned(), files: files.with_fsync(true) })
    }

    /// Writes a file, and replaces an existing one. The file is durable on return.
    pub(super) fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let relative = path.strip_prefix(&self.root).expect("paths come from this store's layout");
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

/// Creates the missing directories of a domain, and makes them durable. Changes nothing in a
/// complete store, which may lie on a read-only file system.
pub(crate) fn create_domain(layout: &Layout) -> Result<(), StoreError> {
    let dirs =
        [layout.packs(), layout.manifests(), layout.references(), layout.condemned_dir(), layout.leases()];
    let lock = layout.lock();
    if dirs.iter().all(|dir| dir.is_dir()) && lock.exists() {
        return Ok(());
    }
    for dir in dirs {
        fs::create_dir_all(&dir).map_err(io_error(&dir))?;
    }
    File::options().create(true).append(true).open(&lock).map_err(io_error(&lock))?;
    sync(layout.domain())?;
    sync(layout.root())
}

/// Returns true if other users may read the store.
pub(crate) fn is_open_to_others(layout: &Layout) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let is_open =
        |dir: &Path| fs::metadata(dir).is_ok_and(|metadata| metadata.permissions().mode() & 0o007 != 0);
    is_open(layout.domain()) && is_open(layout.root())
}

/// Makes the entries of a directory durable.
pub(crate) fn sync(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error(dir))
}

/// Opens an object. Does not wait for a writer if a FIFO has the object's name.
///
/// # Errors
/// Also [`io::ErrorKind::InvalidData`], for what is no file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file")),
    }
}

/// Returns the bytes of a file, at most `max` and one more; `None` if there is no such file.
pub(super) fn read(path: &Path, max: usize) -> Result<Option<Bytes>, StoreError> {
    let Some(file) = found(open(path)).map_err(io_error(path))? else { return Ok(None) };
    // With room from the start, a small file takes two calls of read(2).
    let mut bytes = Vec::with_capacity(FIRST_BYTES.min(max + 1));
    file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
    Ok(Some(bytes.into()))
}

fn read_dir(dir: &Path) -> Result<Vec<DirEntry>, StoreError> {
    fs::read_dir(dir).and_then(Iterator::collect::<io::Result<_>>).map_err(io_error(dir))
}

/// Returns the time of the clock that tells files' times of writing, by means of the file `path`.
/// On a network file system, that is the clock of another machine. Where the file cannot be changed,
/// nothing is deleted either, and this machine's clock suffices.
pub(super) fn now(path: &Path) -> io::Result<SystemTime> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    match rustix::fs::utimensat(CWD, path, &times, AtFlags::empty()) {
        Ok(()) => fs::metadata(path)?.modified(),
        Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::NOENT) => Ok(SystemTime::now()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn names(dir: &Path) -> Result<Vec<String>, StoreError> {
    Ok(read_dir(dir)?.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

pub(super) fn entries(dir: &Path) -> Result<Vec<Entry>, StoreError> {
    let mut entries = Vec::new();
    for entry in read_dir(dir)? {
        let Ok(name) = entry.file_name().into_string() else { continue };
        // A file may be removed meanwhile.
        let Some(metadata) = found(entry.metadata()).map_err(io_error(&entry.path()))? else { continue };
        if !metadata.is_dir() {
            let written = metadata.modified().map_err(io_error(&entry.path()))?;
            entries.push(Entry { name, bytes: metadata.len(), written });
        }
    }
    Ok(entries)
}

pub(super) fn remove_below(dir: &Path) -> Result<Option<u64>, StoreError> {
    let bytes = if_dir(bytes_below(dir))?;
    let mut removed = fs::remove_dir_all(dir);
    for _ in 1..REMOVALS {
        // Others write into it.
        match &removed {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => removed = fs::remove_dir_all(dir),
            _ => break,
        }
    }
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => Err(io_error(dir)(e)),
        Ok(()) | Err(_) => {
            sync(dir.parent().expect("it lies in the store"))?;
            Ok(Some(bytes.unwrap_or(0)))
        }
    }
}

fn if_dir(outcome: Result<u64, StoreError>) -> Result<Option<u64>, StoreError> {
    match outcome {
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Returns true for a directory. Symbolic links are not followed, because they could form cycles.
pub(crate) fn is_dir(entry: &DirEntry) -> Result<bool, StoreError> {
    entry.file_type().map(|kind| kind.is_dir()).map_err(io_error(&entry.path()))
}

/// Returns the bytes of all files below a directory. A file that is removed meanwhile counts as
/// empty.
pub(crate) fn bytes_below(dir: &Path) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for entry in read_dir(dir)? {
        if is_dir(&entry)? {
            bytes += if_dir(bytes_below(&entry.path()))?.unwrap_or(0);
        } else if let Ok(metadata) = entry.metadata() {
            bytes += metadata.len();
        }
    }
    Ok(bytes)
}

/// Adds all staged files below a directory. object_store's `list` hides them.
pub(crate) fn staged(dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), StoreError> {
    for entry in read_dir(dir)? {
        if is_dir(&entry)? {
            staged(&entry.path(), found)?;
        } else if crate::store::layout::is_staged(&entry.file_name()) {
            found.push(entry.path());
        }
    }
    Ok(())
}
