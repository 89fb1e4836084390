//! Files that are being written, and become objects when they are complete.

use crate::store::error::{StoreError, io_error};
use crate::store::lock::StoreLock;
use crate::store::map::Map;
use crate::store::objects::{Kind, Objects, directory};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that is being written. The drop removes it.
#[derive(Debug)]
pub(crate) struct StagedFile {
    file: File,
    /// `None` for a file without a name, whose content goes to a bucket.
    path: Option<PathBuf>,
    /// Protects the file from removal as a left-over.
    _writing: StoreLock,
}

impl Objects {
    /// Begins an object that will lie at `place`, or beside it.
    ///
    /// # Blocking
    /// Creates a file.
    pub(crate) fn stage(&self, place: &Path) -> Result<StagedFile, StoreError> {
        let writing = StoreLock::write_staged(self)?;
        let (file, path) = match self.kind() {
            Kind::Bucket(bucket) => (bucket.spool()?, None),
            Kind::Directory(_) => {
                let dir = place.parent().expect("an object lies in a directory");
                fs::create_dir_all(dir).map_err(io_error(dir))?;
                // Unique, because two writers may write one object at a time.
                let mut path = place.to_owned().into_os_string();
                path.push(format!("#{}", fastrand::u64(..)));
                let path = PathBuf::from(path);
                let file = File::options().read(true).write(true).create_new(true).open(&path);
                (file.map_err(io_error(&path))?, Some(path))
            }
        };
        Ok(StagedFile { file, path, _writing: writing })
    }

    /// Makes an object at `place` of a staged file. It is durable on return.
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn publish(&self, staged: &StagedFile, place: &Path) -> Result<(), StoreError> {
        match self.kind() {
            Kind::Bucket(bucket) => {
                let map = Map::new(&staged.file).map_err(io_error(place))?;
                bucket.wait(bucket.put_large(place, map.bytes().clone()))
            }
            Kind::Directory(_) => {
                staged.file.sync_all().map_err(io_error(place))?;
                staged.rename(place)?;
                // The directory, and the one that names it, because it may be new.
                place.ancestors().skip(1).take(2).try_for_each(directory::sync)
            }
        }
    }
}

impl StagedFile {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Appends bytes.
    ///
    /// # Blocking
    /// Writes to the page cache, which may wait for the disk.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|e| self.error(e))
    }

    /// Gives the file its name, without making it durable.
    pub(crate) fn rename(&self, place: &Path) -> Result<(), StoreError> {
        let path = self.path.as_ref().expect("a file of a directory");
        fs::rename(path, place).map_err(io_error(place))
    }

    /// Makes the error of an operation on the file.
    pub(crate) fn error(&self, error: std::io::Error) -> StoreError {
        let spool = std::env::temp_dir();
        io_error(self.path.as_ref().unwrap_or(&spool))(error)
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // After the rename there is none. On failure it is a left-over, which gc removes.
            let _ = fs::remove_file(path);
        }
    }
}
