//! The objects of a store: files of a directory, or objects of a bucket, under the same paths.
//!
//! A visible object is complete and durable. Code outside of this module that depends on the kind
//! of store: the locks ([`super::lock`]) and leases ([`super::lease`]), since a bucket has no
//! locks; and the packs ([`super::packs`]), which are mapped where they are files.

pub(crate) mod bucket;
pub(crate) mod directory;
mod staged;

pub(crate) use staged::StagedFile;

use crate::store::error::{StoreError, io_error};
use crate::store::layout::Layout;
use crate::store::lock::StoreLock;
use crate::store::map::{self, Map};
use bucket::Bucket;
use bytes::Bytes;
use directory::Directory;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The objects of one domain of a store.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    pub(crate) layout: Layout,
    kind: Kind,
}

/// Where the objects lie.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Directory(Arc<Directory>),
    Bucket(Arc<Bucket>),
}

/// An object, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The last component of the path.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// The time of writing, by the clock of the file system or the bucket.
    pub(crate) written: SystemTime,
}

impl Objects {
    pub(crate) fn new(layout: Layout, kind: Kind) -> Self {
        Self { layout, kind }
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Returns true if locks exclude other processes, see [`super::lock`].
    pub(crate) fn has_locks(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    /// Returns the directory or the URL, for messages.
    pub(crate) fn name(&self) -> PathBuf {
        match &self.kind {
            Kind::Directory(_) => self.layout.root().to_owned(),
            Kind::Bucket(bucket) => bucket.name(self.layout.root()).into(),
        }
    }

    /// Returns the bytes of an object, at most `max` and one more; `None` if it does not exist.
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn read(&self, path: &Path, max: usize) -> Result<Option<Bytes>, StoreError> {
        match &self.kind {
            Kind::Directory(_) => directory::read(path, max),
            Kind::Bucket(bucket) => bucket.wait(bucket.read(path, max)),
        }
    }

    /// Returns a whole object, mapped if it is a file, and read from the disk; `None` if it does not
    /// exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn map(&self, path: &Path) -> Result<Option<Bytes>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.read(path, usize::MAX - 1)),
            Kind::Directory(_) => {
                let Some(file) = found(directory::open(path)).map_err(io_error(path))? else {
                    return Ok(None);
                };
                let map = Map::new(&file).map_err(io_error(path))?;
                map::populate(map.bytes()).map_err(io_error(path))?;
                Ok(Some(map.bytes().clone()))
            }
        }
    }

    /// Returns an object as an open file, a copy if it lies in a bucket; `None` if it does not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn local_file(&self, path: &Path) -> Result<Option<File>, StoreError> {
        match &self.kind {
            Kind::Directory(_) => found(directory::open(path)).map_err(io_error(path)),
            Kind::Bucket(bucket) => bucket.wait(bucket.copy(path)),
        }
    }

    /// Writes an object, and replaces an existing one. The object is durable on return.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.put(path, bytes)),
            Kind::Directory(directory) => {
                let _writing = StoreLock::write_staged(self)?;
                directory.put(path, bytes)
            }
        }
    }

    /// Writes an object as [`Objects::put`] does, before there is a domain to lock.
    pub(crate) fn put_unlocked(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.put(path, bytes)),
            Kind::Directory(directory) => directory.put(path, bytes),
        }
    }

    /// Writes an object that can be made again. A file is not durable on return: after a crash it
    /// may be damaged.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn put_hint(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.put(path, bytes)),
            Kind::Directory(_) => {
                let mut staged = self.stage(path)?;
                staged.write(&bytes)?;
                staged.rename(path)
            }
        }
    }

    /// Replaces an object by what `change` makes of it, atomically: no other writer's object is
    /// lost. In a bucket without conditional writes it may be.
    ///
    /// # Blocking
    /// As for [`Objects::read`]. Waits for other writers.
    pub(crate) fn update(
        &self,
        path: &Path,
        max: usize,
        change: impl Fn(Option<Bytes>) -> Result<Bytes, StoreError>,
    ) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.update(path, max, &change)),
            Kind::Directory(_) => {
                let _changing = StoreLock::change_references(self)?;
                self.put(path, change(self.read(path, max)?)?)
            }
        }
    }

    /// Creates an empty object. Leaves an existing one as it is.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn create(&self, path: &Path) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.create(path)),
            Kind::Directory(_) => match File::create_new(path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io_error(path)(e)),
                _ => Ok(()),
            },
        }
    }

    /// Removes an object. Returns false if it did not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.remove(path)),
            Kind::Directory(_) => Ok(found(fs::remove_file(path)).map_err(io_error(path))?.is_some()),
        }
    }

    /// Removes objects. Those that do not exist are no error.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn delete_all(&self, paths: &[PathBuf]) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.delete_all(paths)),
            Kind::Directory(_) => paths.iter().try_for_each(|path| self.remove(path).map(drop)),
        }
    }

    /// Removes an object, and returns its length in bytes; 0 if it did not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn remove_sized(&self, path: &Path) -> Result<u64, StoreError> {
        let bytes = self.length(path)?;
        self.remove(path)?;
        Ok(bytes.unwrap_or(0))
    }

    /// Returns the length in bytes of an object; `None` if it does not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn length(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.length(path)),
            Kind::Directory(_) => {
                Ok(found(fs::metadata(path)).map_err(io_error(path))?.map(|metadata| metadata.len()))
            }
        }
    }

    /// Returns the time at which an object was written; `None` if it does not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn written(&self, path: &Path) -> Result<Option<SystemTime>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.written(path)),
            Kind::Directory(_) => {
                let written = fs::metadata(path).and_then(|metadata| metadata.modified());
                found(written).map_err(io_error(path))
            }
        }
    }

    /// Returns the bytes of an object as [`Objects::read`] does, and the time at which it was written.
    pub(crate) fn read_written(
        &self,
        path: &Path,
        max: usize,
    ) -> Result<Option<(Bytes, SystemTime)>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.read_written(path, max)),
            Kind::Directory(_) => {
                let (bytes, written) = (self.read(path, max)?, self.written(path)?);
                Ok(bytes.zip(written))
            }
        }
    }

    /// Returns true if two times of writing of an object are the same. Some buckets tell milliseconds
    /// in lists only.
    pub(crate) fn is_same_time(&self, a: SystemTime, b: SystemTime) -> bool {
        let seconds =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        if self.has_locks() { a == b } else { seconds(a) == seconds(b) }
    }

    /// Returns the time of the clock that tells the times of writing.
    ///
    /// # Blocking
    /// Writes an object to a bucket, or the time of a directory's lock, which its file system tells.
    pub(crate) fn now(&self) -> Result<SystemTime, StoreError> {
        match &self.kind {
            Kind::Directory(_) => {
                let path = self.layout.lock();
                directory::now(&path).map_err(io_error(&path))
            }
            Kind::Bucket(_) => {
                let path = self.layout.clock();
                self.put(&path, Bytes::new())?;
                self.written(&path)?.ok_or_else(|| StoreError::NotFound(path.display().to_string()))
            }
        }
    }

    /// Returns the time since some moment of the past, by a clock of this process that is never set.
    pub(crate) fn monotonic(&self) -> Duration {
        match &self.kind {
            Kind::Directory(_) => monotonic(),
            Kind::Bucket(bucket) => bucket.monotonic(),
        }
    }

    /// Moves an object, whose bytes need not be readable, and replaces one that has the name. Does
    /// nothing if it does not exist.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn move_to(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.move_to(from, to)),
            Kind::Directory(_) => {
                let (Some(from_dir), Some(to_dir)) = (from.parent(), to.parent()) else { return Ok(()) };
                fs::create_dir_all(to_dir).map_err(io_error(to_dir))?;
                if found(fs::rename(from, to)).map_err(io_error(to))?.is_some() {
                    for dir in [to_dir, from_dir].into_iter().chain(to_dir.parent()) {
                        directory::sync(dir)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Creates empty objects, as [`Objects::create`] does.
    pub(crate) fn create_all(&self, paths: &[PathBuf]) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Directory(_) => paths.iter().try_for_each(|path| self.create(path)),
            Kind::Bucket(bucket) => bucket.wait(bucket.create_all(paths)),
        }
    }

    /// Returns the lengths of objects, in order, as [`Objects::length`] does.
    pub(crate) fn lengths(&self, paths: &[PathBuf]) -> Result<Vec<Option<u64>>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.lengths(paths)),
            Kind::Directory(_) => paths.iter().map(|path| self.length(path)).collect(),
        }
    }

    pub(crate) fn exists(&self, path: &Path) -> Result<bool, StoreError> {
        Ok(self.length(path)?.is_some())
    }

    /// Returns the names of the objects of a directory, and of its subdirectories. Leaves out names
    /// that are no UTF-8.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] for a directory that does not exist. In a bucket such one is empty.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn names(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.names(dir)),
            Kind::Directory(_) => directory::names(dir),
        }
    }

    /// Does the same, and returns none for a directory that does not exist.
    pub(crate) fn names_if_any(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        if_any(self.names(dir))
    }

    /// Returns the objects of a directory, without those of its subdirectories.
    ///
    /// # Errors
    /// Returns the errors of [`Objects::names`].
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn entries(&self, dir: &Path) -> Result<Vec<Entry>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.entries(dir)),
            Kind::Directory(_) => directory::entries(dir),
        }
    }

    /// Does the same, and returns none for a directory that does not exist.
    pub(crate) fn entries_if_any(&self, dir: &Path) -> Result<Vec<Entry>, StoreError> {
        if_any(self.entries(dir))
    }

    /// Removes all objects below a directory. Returns their number of bytes, or `None` if there was
    /// no such directory, or one that could not be removed because an object was written meanwhile.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn remove_below(&self, dir: &Path) -> Result<Option<u64>, StoreError> {
        match &self.kind {
            Kind::Bucket(bucket) => bucket.wait(bucket.remove_below(dir)),
            Kind::Directory(_) => directory::remove_below(dir),
        }
    }

    /// Makes the entries of directories durable: another process may have written one and not have
    /// done so yet.
    ///
    /// # Blocking
    /// As for [`Objects::read`].
    pub(crate) fn sync(&self, dirs: &BTreeSet<PathBuf>) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Bucket(_) => Ok(()),
            Kind::Directory(_) => dirs.iter().try_for_each(|dir| directory::sync(dir)),
        }
    }
}

/// Returns the time since the start of the machine, which goes on while the machine is suspended.
fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Returns `None` for an object that does not exist.
pub(crate) fn found<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn if_any<T>(outcome: Result<Vec<T>, StoreError>) -> Result<Vec<T>, StoreError> {
    match outcome {
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}
