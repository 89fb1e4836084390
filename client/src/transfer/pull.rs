//! Writes images from a server to files, and checks images without keeping them.
//!
//! Another user may own the directory around the target, and may swap names in it at any time. So a
//! pull reaches its files by open directories only ([`super::beneath`]). An image does not tell who
//! may read its files, and memory holds secrets: the files that a pull writes are for their owner
//! alone.

use crate::memory::ChunkPages;
use crate::remote::{Image, Remote, RemoteError};
use crate::transfer::beneath::Directory;
use crate::transfer::fetch::{Damage, fetch};
use postcopy_proto::manifest::{Entry, EntryKind};
use postcopy_proto::page::to_usize;
use postcopy_proto::path::ImagePath;
use postcopy_proto::reference::Reference;
use rustix::fs::Mode;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The reason why an image could not be pulled or checked.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The server failed, or sent a wrong answer.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The target exists and is not empty.
    #[error("{0} exists already and is not an empty directory")]
    Exists(PathBuf),
    /// The directory beside the target, in which the pull writes, could not be created.
    #[error("{target} cannot be written: no directory can be created in {parent}")]
    Target {
        /// The path of the target.
        target: PathBuf,
        /// The path of the directory around the target, or the target if it exists.
        parent: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("{path}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Chunks could not be fetched with the content that the manifest states.
    #[error("{} of the image's chunks could not be fetched; the first: file {} chunk {}: {}",
        .0.len(), .0[0].path, .0[0].chunk, .0[0].reason)]
    Damaged(Vec<Damage>),
}

/// The result of a pull or a check.
#[derive(Clone, Copy, Debug)]
pub struct PullReport {
    /// Digest of the image.
    pub image: postcopy_proto::digest::Digest,
    /// Number of entries: files, symbolic links and empty directories.
    pub entries: usize,
    /// Bytes of these files together.
    pub size_bytes: u64,
    /// Chunks that were fetched and verified.
    pub chunks: u64,
    /// Bytes of their frames. Manifests and headers are not counted.
    pub frame_bytes: u64,
}

/// The most files that a pull syncs one by one. For more it syncs their file system once, which
/// also writes what other programs have written there: each sync waits for the disk.
const SYNCED_ALONE: usize = 64;

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::File { path, source }
}

/// Fetches and verifies every chunk of an image, and keeps nothing. Fetches one chunk of those with
/// the same digest. Of an image with more than a million different chunks, it may fetch a digest
/// again, because its memory is bounded.
///
/// # Errors
/// Returns [`PullError::Damaged`], which names the chunks that differ from the manifest. After some
/// thousands of them the check ends.
pub async fn verify(remote: &Remote, reference: &Reference) -> Result<PullReport, PullError> {
    let (image, _) = remote.open(reference, &[], false).await?;
    let all = std::iter::once(0..image.root().chunks()).collect();
    let (entries, size_bytes) = (image.root().entries().len(), image.root().size_bytes());
    let mut report = PullReport { image: image.digest(), entries, size_bytes, chunks: 0, frame_bytes: 0 };
    fetch_into(&mut report, remote, &image, all, true, Arc::new(|_, _, _| Ok(()))).await?;
    Ok(report)
}

/// Writes the files of an image to the directory `target`, which must not exist or be empty. Only
/// their owner may read them: files have mode 0600 or 0700, new directories 0700.
///
/// # Errors
/// Returns [`PullError`]; the target is then unchanged.
pub async fn pull(remote: &Remote, reference: &Reference, target: &Path) -> Result<PullReport, PullError> {
    let mut pulling = Pulling::begin(remote, reference, target, |_| true).await?;
    let all = pulling.extents_of(|_| true);
    pulling.fetch(all).await?;
    pulling.finish()
}

/// A part of a file: its path in the image, and a range of its bytes.
pub type Extent = (ImagePath, Range<u64>);

/// Files of an image that are being written to a directory.
///
/// Zeros, and parts that are not fetched, are holes. The files lie in a directory beside the
/// target, or in the target if it exists. They are renamed once all are complete. Dropping this
/// value before then leaves the target unchanged.
#[derive(Debug)]
pub struct Pulling {
    remote: Remote,
    image: Arc<Image>,
    partial: Partial,
    wanted: Vec<Entry>,
    report: PullReport,
}

impl Pulling {
    /// Creates the files that `is_wanted` selects, at their full lengths. The target must not
    /// exist, or be empty.
    ///
    /// # Errors
    /// Returns [`PullError`]; the target is then unchanged.
    pub async fn begin(
        remote: &Remote,
        reference: &Reference,
        target: &Path,
        is_wanted: impl Fn(&ImagePath) -> bool,
    ) -> Result<Self, PullError> {
        let existing = match Directory::open(target) {
            Ok(directory) if directory.names().next().is_none() => Some(directory),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            _ => return Err(PullError::Exists(target.to_owned())),
        };
        let (image, _) = remote.open(reference, &[], false).await?;
        let wanted: Vec<_> =
            image.root().entries().iter().filter(|entry| is_wanted(&entry.path)).cloned().collect();
        let partial = Partial::create(target, existing)?;
        create_entries(&wanted, &partial)?;
        let size_bytes = wanted.iter().map(size_of_entry).sum();
        let report = PullReport {
            image: image.digest(),
            entries: wanted.len(),
            size_bytes,
            chunks: 0,
            frame_bytes: 0,
        };
        Ok(Self { remote: remote.clone(), image, partial, wanted, report })
    }

    /// Returns the image that is pulled.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Returns the directory in which the files lie until [`Pulling::finish`].
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.partial.directory
    }

    /// Returns the first created symbolic link that leads out of the image and that `is_meant`
    /// selects.
    ///
    /// # Errors
    /// Returns [`PullError::File`] if a link cannot be examined.
    pub fn link_that_leads_out(
        &self,
        is_meant: impl Fn(&ImagePath) -> bool,
    ) -> Result<Option<&ImagePath>, PullError> {
        let is_link = |entry: &&Entry| matches!(entry.kind, EntryKind::SymbolicLink(_));
        for entry in self.wanted.iter().filter(is_link).filter(|entry| is_meant(&entry.path)) {
            let path = local(&entry.path);
            if self.partial.directory.leads_out(path).map_err(self.partial.error(path))? {
                return Ok(Some(&entry.path));
            }
        }
        Ok(None)
    }

    /// Returns the full extents of the created files that `is_meant` selects.
    pub fn extents_of(&self, is_meant: impl Fn(&ImagePath) -> bool) -> Vec<Extent> {
        let meant = self.wanted.iter().filter(|entry| is_meant(&entry.path));
        meant.map(|entry| (entry.path.clone(), 0..size_of_entry(entry))).collect()
    }

    /// Fetches parts of created files, and writes them. Ignores parts beyond a file's end.
    ///
    /// # Errors
    /// Returns [`PullError`] if a part could not be fetched or written.
    pub async fn fetch(&mut self, extents: Vec<Extent>) -> Result<(), PullError> {
        let mut parts: BTreeMap<ImagePath, Vec<Range<u64>>> = BTreeMap::new();
        for (path, bytes) in extents {
            parts.entry(path).or_default().push(bytes);
        }
        let chunk_bytes = self.image.root().chunk_size().bytes() as u64;
        let mut chunks = Vec::new();
        for (path, parts) in &parts {
            let Some(file) = self.image.file(path.as_bytes()) else { continue };
            let first = file.first_chunk.0;
            chunks.extend(parts.iter().map(|bytes| {
                let end = bytes.end.min(file.size_bytes).div_ceil(chunk_bytes);
                first + bytes.start / chunk_bytes..first + end
            }));
        }
        let directory = Arc::clone(&self.partial.directory);
        // Each chunk opens its file anew: an image may have more files than a process may open.
        let sink = move |path: &ImagePath, offset: u64, pages: &ChunkPages| {
            let file = directory.file_to_write(local(path)).map_err(|e| e.to_string())?;
            for (at, bytes) in pages.held_bytes() {
                let start = offset + at as u64;
                for part in &parts[path] {
                    let (from, to) = (part.start.max(start), part.end.min(start + bytes.len() as u64));
                    if from < to {
                        let bytes = &bytes[to_usize(from - start)..to_usize(to - start)];
                        file.write_all_at(bytes, from).map_err(|e| e.to_string())?;
                    }
                }
            }
            Ok(())
        };
        fetch_into(&mut self.report, &self.remote, &self.image, chunks, false, Arc::new(sink)).await
    }

    /// Syncs the files and moves them to the target.
    ///
    /// # Errors
    /// Returns [`PullError::File`] if a file could not be synced or moved.
    pub fn finish(self) -> Result<PullReport, PullError> {
        let files = || self.wanted.iter().filter(|entry| matches!(entry.kind, EntryKind::File(_)));
        if files().nth(SYNCED_ALONE).is_some() {
            self.partial.directory.sync_file_system().map_err(self.partial.error(Path::new("")))?;
        } else {
            for entry in files() {
                let path = local(&entry.path);
                let file = self.partial.directory.file(path);
                file.and_then(|file| file.sync_all()).map_err(self.partial.error(path))?;
            }
        }
        self.partial.rename()?;
        Ok(self.report)
    }
}

fn size_of_entry(entry: &Entry) -> u64 {
    if let EntryKind::File(file) = &entry.kind { file.size_bytes } else { 0 }
}

async fn fetch_into(
    report: &mut PullReport,
    remote: &Remote,
    image: &Arc<Image>,
    chunks: Vec<Range<u64>>,
    distinct: bool,
    sink: Arc<crate::transfer::fetch::Sink>,
) -> Result<(), PullError> {
    let fetched = fetch(remote, image, chunks, distinct, sink).await?;
    if !fetched.damaged.is_empty() {
        return Err(PullError::Damaged(fetched.damaged));
    }
    report.chunks += fetched.chunks;
    report.frame_bytes += fetched.frame_bytes;
    Ok(())
}

/// A directory beside the target, or in it if the target exists. Dropping it removes the directory,
/// unless it has become the target.
#[derive(Debug)]
struct Partial {
    directory: Arc<Directory>,
    /// The directory that holds it.
    parent: Directory,
    name: OsString,
    /// Its path, for messages.
    path: PathBuf,
    /// The absolute path of the target.
    target: PathBuf,
    is_within: bool,
}

impl Partial {
    /// Creates the directory. An `existing` target may be a mount point, so the files are created
    /// within it.
    fn create(target: &Path, existing: Option<Directory>) -> Result<Self, PullError> {
        // `.` and the like have no name.
        let target = std::path::absolute(target).map_err(file_error(target))?;
        let is_within = existing.is_some();
        let above = if is_within { Some(&*target) } else { target.parent() };
        let above = above.unwrap_or(&target).to_owned();
        let parent = match existing {
            Some(existing) => existing,
            None => std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&above)
                .and_then(|()| Directory::open(&above))
                .map_err(file_error(&above))?,
        };
        let base = target.file_name().unwrap_or(OsStr::new("image"));
        for n in 0u32.. {
            let mut name = base.to_owned();
            name.push(format!(".partial-{}-{n}", std::process::id()));
            let path = above.join(&name);
            match parent.new_directory(&name) {
                // An earlier pull left this directory behind, or another program made it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(PullError::Target { target, parent: above, source }),
                Ok(directory) => {
                    return Ok(Self {
                        directory: Arc::new(directory),
                        parent,
                        name,
                        path,
                        target,
                        is_within,
                    });
                }
            }
        }
        unreachable!("some number is free")
    }

    /// Returns the error about the file at `path` in this directory.
    fn error(&self, path: &Path) -> impl FnOnce(io::Error) -> PullError + use<> {
        let path = self.path.join(path);
        move |source| PullError::File { path, source }
    }

    /// Moves the files to the target.
    ///
    /// An empty target directory is kept, because it may be a working directory or a mount point.
    /// Files that appeared in it meanwhile are not overwritten.
    fn rename(self) -> Result<(), PullError> {
        if !self.is_within {
            let name = self.target.file_name().unwrap_or_default();
            if !self.directory.is_at(&self.parent, &self.name).map_err(file_error(&self.path))? {
                let replaced = io::Error::other("it was replaced during the pull");
                return Err(file_error(&self.path)(replaced));
            }
            let renamed = self.parent.rename(&self.name, &self.parent, name, false);
            return renamed.map_err(file_error(&self.target));
        }
        for name in self.directory.names() {
            let name = name.map_err(file_error(&self.path))?;
            let moved = self.directory.rename(&name, &self.parent, &name, true);
            moved.map_err(file_error(&self.target.join(&name)))?;
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename the name does not exist.
        let _ = self.parent.remove_all(&self.name);
    }
}

/// Returns the path of an image's file below the directory of a pull.
fn local(path: &ImagePath) -> &Path {
    Path::new(OsStr::from_bytes(path.as_bytes()))
}

fn create_entries(entries: &[Entry], partial: &Partial) -> Result<(), PullError> {
    // Entries are sorted by path, so neighbours often have the same parent.
    let mut last: Option<(&Path, Directory)> = None;
    for entry in entries {
        let path = local(&entry.path);
        let parent = match (&entry.kind, path.parent()) {
            (EntryKind::EmptyDirectory, _) => path,
            (_, parent) => parent.unwrap_or(Path::new("")),
        };
        let parent = match last.take().filter(|(last, _)| *last == parent) {
            Some((_, directory)) => (parent, directory),
            None => (parent, partial.directory.make_directory(parent).map_err(partial.error(path))?),
        };
        let name = path.file_name().unwrap_or_default();
        create_entry(&parent.1, name, &entry.kind).map_err(partial.error(path))?;
        last = Some(parent);
    }
    Ok(())
}

/// Creates a file or a link in `parent`. An empty directory exists already.
fn create_entry(parent: &Directory, name: &OsStr, kind: &EntryKind) -> io::Result<()> {
    match kind {
        EntryKind::EmptyDirectory => Ok(()),
        EntryKind::SymbolicLink(target) => parent.new_link(name, OsStr::from_bytes(target)),
        EntryKind::File(file) => {
            let mode = if file.executable { Mode::RWXU } else { Mode::RUSR | Mode::WUSR };
            parent.new_file(name, mode)?.set_len(file.size_bytes)
        }
    }
}
