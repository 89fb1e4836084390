//! From a server to files, and checking an image without keeping it.

use crate::chunk::ChunkPages;
use crate::fetch::{Damage, data_chunks, fetch};
use crate::image::Image;
use crate::remote::{Remote, RemoteError};
use postcopy_proto::manifest::EntryKind;
use postcopy_proto::path::ImagePath;
use postcopy_proto::reference::Reference;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why an image could not be pulled or checked.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The server, or what it sent.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The target exists and holds something.
    #[error("{0} exists already and is not an empty directory")]
    Exists(PathBuf),
    /// A file could not be written.
    #[error("{path}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Chunks could not be had as the manifest says.
    #[error("{} of the image's chunks cannot be had; the first: file {} chunk {}: {}",
        .0.len(), .0[0].path, .0[0].chunk, .0[0].reason)]
    Damaged(Vec<Damage>),
}

/// What a pull or a check did.
#[derive(Clone, Copy, Debug)]
pub struct PullReport {
    /// The image.
    pub image: postcopy_proto::digest::Digest,
    /// Number of entries: files, symbolic links and empty directories.
    pub entries: usize,
    /// Bytes of all files.
    pub size_bytes: u64,
    /// Chunks that were fetched and verified.
    pub chunks: u64,
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::File { path, source }
}

/// Fetches and verifies every chunk of an image, each digest once, and keeps nothing.
///
/// # Errors
/// [`PullError::Damaged`] names every chunk that is not as the manifest says.
pub async fn verify(remote: &Remote, reference: &Reference) -> Result<PullReport, PullError> {
    let (image, segments) = remote.open(reference, &[], true).await?;
    segments.all_into(&image).await?;
    let chunks = chunks_of(remote, &image, true)?;
    fetch_all(remote, &image, chunks, Arc::new(|_, _, _| Ok(()))).await
}

/// Writes the files of an image to the directory `target`, which must not exist or be empty. The zeros of files become
/// holes. The files appear in a directory beside the target, or in it where it is there, and are renamed when all are
/// complete.
///
/// # Errors
/// [`PullError`]; the target is as it was then.
pub async fn pull(remote: &Remote, reference: &Reference, target: &Path) -> Result<PullReport, PullError> {
    let occupied = match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    if occupied {
        return Err(PullError::Exists(target.to_owned()));
    }
    let (image, segments) = remote.open(reference, &[], true).await?;
    segments.all_into(&image).await?;
    let chunks = chunks_of(remote, &image, false)?;

    let partial = Partial::create(target)?;
    create_entries(&image, &partial.0)?;
    let directory = partial.0.clone();
    // Opened for each chunk: an image may have more files than a process may have open.
    let sink = move |path: &ImagePath, offset: u64, pages: &ChunkPages| {
        let file = File::options().write(true).open(local(&directory, path)).map_err(|e| e.to_string())?;
        for (at, bytes) in pages.held_bytes() {
            file.write_all_at(bytes, offset + at as u64).map_err(|e| e.to_string())?;
        }
        Ok(())
    };
    let report = fetch_all(remote, &image, chunks, Arc::new(sink)).await?;
    for (path, _) in image.root().files() {
        let path = local(&partial.0, path);
        File::open(&path).and_then(|file| file.sync_all()).map_err(file_error(&path))?;
    }
    partial.rename(target)?;
    Ok(report)
}

fn chunks_of(remote: &Remote, image: &Image, distinct: bool) -> Result<Vec<u64>, RemoteError> {
    data_chunks(image, distinct).map_err(|segment| {
        remote
            .address()
            .wrong(format!("manifest of {}", image.digest()), format!("segment {segment} is left out"))
    })
}

async fn fetch_all(
    remote: &Remote,
    image: &Arc<Image>,
    chunks: Vec<u64>,
    sink: Arc<crate::fetch::Sink>,
) -> Result<PullReport, PullError> {
    let count = chunks.len() as u64;
    let damaged = fetch(remote.address(), image, chunks, sink).await?;
    if !damaged.is_empty() {
        return Err(PullError::Damaged(damaged));
    }
    Ok(PullReport {
        image: image.digest(),
        entries: image.root().entries().len(),
        size_bytes: image.root().size_bytes(),
        chunks: count,
    })
}

/// A directory beside the target, or in it where it is there, that is removed unless it becomes the target.
struct Partial(PathBuf);

impl Partial {
    fn create(target: &Path) -> Result<Self, PullError> {
        // `.` and the like have no name.
        let target = std::path::absolute(target).map_err(file_error(target))?;
        // An empty directory may be a file system of its own: its files are made within.
        let parent = if target.exists() { &target } else { target.parent().unwrap_or(&target) };
        fs::create_dir_all(parent).map_err(file_error(parent))?;
        let name = target.file_name().unwrap_or(OsStr::new("image"));
        for n in 0u32.. {
            let mut name = name.to_owned();
            name.push(format!(".partial-{}-{n}", std::process::id()));
            let partial = parent.join(name);
            match fs::create_dir(&partial) {
                // What an earlier pull left behind, or somebody else's.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created.map(|()| Self(partial.clone())).map_err(file_error(&partial)),
            }
        }
        unreachable!("some number is free")
    }

    /// Makes it the target. An empty directory that was there stays the same one: it may be somebody's working
    /// directory, or a file system. What came to lie there meanwhile is kept.
    fn rename(self, target: &Path) -> Result<(), PullError> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if self.0.parent() != std::path::absolute(target).ok().as_deref() {
            return fs::rename(&self.0, target).map_err(file_error(target));
        }
        for entry in fs::read_dir(&self.0).map_err(file_error(&self.0))? {
            let entry = entry.map_err(file_error(&self.0))?;
            let to = target.join(entry.file_name());
            let moved = renameat_with(CWD, entry.path(), CWD, &to, RenameFlags::NOREPLACE);
            moved.map_err(|e| file_error(&to)(e.into()))?;
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing of that name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where a file of the image lies below `directory`. An [`ImagePath`] leads nowhere else, and no part of it is a
/// link: a manifest has no entry below another, and the directory is new.
fn local(directory: &Path, path: &ImagePath) -> PathBuf {
    directory.join(OsStr::from_bytes(path.as_bytes()))
}

fn create_entries(image: &Image, directory: &Path) -> Result<(), PullError> {
    for entry in image.root().entries() {
        let path = local(directory, &entry.path);
        let parent = path.parent().unwrap_or(directory);
        fs::create_dir_all(parent).map_err(file_error(parent))?;
        match &entry.kind {
            EntryKind::EmptyDirectory => fs::create_dir(&path).map_err(file_error(&path))?,
            EntryKind::SymbolicLink(target) => {
                std::os::unix::fs::symlink(OsStr::from_bytes(target), &path).map_err(file_error(&path))?;
            }
            EntryKind::File(file) => {
                let mode = if file.executable { 0o777 } else { 0o666 };
                let created = File::options().write(true).create_new(true).mode(mode).open(&path);
                created.and_then(|created| created.set_len(file.size_bytes)).map_err(file_error(&path))?;
            }
        }
    }
    Ok(())
}
