//! The version of a store, in its object `format`; and how a store is opened and created.

use crate::store::error::{OpenError, io_error};
use crate::store::layout::{Domain, FORMAT, FORMAT_1, Layout};
use crate::store::objects::bucket::Bucket;
use crate::store::objects::directory::{self, Directory};
use crate::store::objects::{Kind, Objects};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes of `format` that are read.
const MAX_FORMAT_BYTES: usize = 80;

/// Where a store lies.
#[derive(Clone, Debug)]
pub enum Location {
    /// In a local directory.
    Directory(PathBuf),
    /// In a bucket.
    Bucket(Arc<Bucket>),
}

impl From<&PathBuf> for Location {
    fn from(dir: &PathBuf) -> Self {
        Self::Directory(dir.clone())
    }
}

impl From<&Path> for Location {
    fn from(dir: &Path) -> Self {
        Self::Directory(dir.to_owned())
    }
}

/// Opens the store at `location`, and creates its missing directories. Warns if others may read it.
pub(super) fn open(location: &Location, domain: Domain) -> Result<Objects, OpenError> {
    match location {
        Location::Directory(dir) => open_directory(dir, domain),
        Location::Bucket(bucket) => {
            let objects = of_bucket(bucket, domain);
            match is_store_in(&objects)? {
                true => Ok(objects),
                false => Err(OpenError::Missing(objects.name())),
            }
        }
    }
}

/// Opens the store at `location`. Creates it if the directory or the part of the bucket is empty or
/// does not exist.
pub(super) fn open_or_create(location: &Location, domain: Domain) -> Result<Objects, OpenError> {
    match location {
        Location::Directory(dir) => {
            let layout = Layout::new(dir, domain);
            if !is_store(&layout)? {
                fs::create_dir_all(dir).map_err(io_error(dir))?;
                let objects = Objects::new(layout, Kind::Directory(Arc::new(Directory::new(dir)?)));
                objects.put_unlocked(&objects.layout.format(), FORMAT.into())?;
            }
            open_directory(dir, domain)
        }
        Location::Bucket(bucket) => {
            let objects = of_bucket(bucket, domain);
            if !is_store_in(&objects)? {
                objects.put_unlocked(&objects.layout.format(), FORMAT.into())?;
            }
            Ok(objects)
        }
    }
}

fn of_bucket(bucket: &Arc<Bucket>, domain: Domain) -> Objects {
    Objects::new(Layout::new(bucket.prefix(), domain), Kind::Bucket(bucket.clone()))
}

pub(super) fn open_directory(dir: &Path, domain: Domain) -> Result<Objects, OpenError> {
    let missing = |_| OpenError::Missing(dir.to_owned());
    // An absolute path, so that later changes of the working directory do not matter.
    let layout = Layout::new(&dir.canonicalize().map_err(missing)?, domain);
    if !is_store(&layout)? {
        return Err(OpenError::Missing(dir.to_owned()));
    }
    directory::create_domain(&layout)?;
    if directory::is_open_to_others(&layout) {
        tracing::warn!("other users may read {}: chmod it to 700, unless they are meant to", dir.display());
    }
    let directory = Directory::new(layout.root())?;
    Ok(Objects::new(layout, Kind::Directory(Arc::new(directory))))
}

/// Returns true for a store of the version that this code knows, false for an empty or missing
/// directory.
pub(super) fn is_store(layout: &Layout) -> Result<bool, OpenError> {
    let path = layout.format();
    let mut found = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MAX_FORMAT_BYTES as u64).read_to_end(&mut found));
    match read {
        Ok(_) => check(layout.root().to_owned(), &found),
        Err(e) if e.kind() == io::ErrorKind::NotFound => check_empty(layout).map(|()| false),
        Err(e) => Err(io_error(&path)(e).into()),
    }
}

fn is_store_in(objects: &Objects) -> Result<bool, OpenError> {
    let layout = &objects.layout;
    let read = || objects.read(&layout.format(), MAX_FORMAT_BYTES);
    let mut found = read()?;
    if found.is_none() {
        if objects.names(layout.root())?.is_empty() {
            return Ok(false);
        }
        // Another server may have created the store meanwhile.
        found = read()?;
    }
    match found {
        Some(found) => check(objects.name(), &found),
        None => Err(OpenError::NotAStore(objects.name())),
    }
}

fn check(root: PathBuf, found: &[u8]) -> Result<bool, OpenError> {
    if found == FORMAT.as_bytes() {
        return Ok(true);
    }
    if found == FORMAT_1.as_bytes() {
        return Err(OpenError::Old(root));
    }
    let found = String::from_utf8_lossy(found).trim_end().to_owned();
    Err(OpenError::Format { path: root.join("format"), found, known: FORMAT.trim_end() })
}

/// Rejects a directory with other content, for example a home directory named by mistake.
fn check_empty(layout: &Layout) -> Result<(), OpenError> {
    let root = layout.root();
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io_error(root))?,
    };
    for entry in entries {
        let entry = entry.map_err(io_error(root))?;
        // Another process may be writing `format`, or was killed while it did.
        if !entry.file_name().as_encoded_bytes().starts_with(b"format#") {
            return Err(OpenError::NotAStore(root.to_owned()));
        }
    }
    Ok(())
}
