//! The entries to push: a walk of the files, without following links.

use super::PushError;
use crate::transfer::beneath::{Directory, FileId};
use crate::transfer::criu;
use postcopy_proto::path::ImagePath;
use rustix::fs::FileType;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Length at which a path of `parent` links counts as a loop.
const MAX_PATH_BYTES: usize = 1024;

/// An entry to push: its path in the image, and its path on this host.
pub(super) struct Source {
    pub(super) path: ImagePath,
    pub(super) root: Arc<Root>,
    /// The path below the root.
    pub(super) below: PathBuf,
    pub(super) kind: SourceKind,
}

/// A directory that a push has entered, and its path.
pub(super) struct Root {
    pub(super) directory: Directory,
    pub(super) path: PathBuf,
}

pub(super) enum SourceKind {
    File { state: FileState, executable: bool },
    SymbolicLink,
    EmptyDirectory,
}

/// The state of a file. A file that was read while its state stayed the same has not changed
/// meanwhile, as far as the clock of its file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileState {
    id: FileId,
    pub(super) size_bytes: u64,
    /// Seconds and nanoseconds of the last change of the content, and of the metadata.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            id: FileId::of(metadata),
            size_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Returns true for the same file with the same size.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        (self.id, self.size_bytes) == (other.id, other.size_bytes)
    }
}

impl Source {
    /// Returns the path on this host, for messages.
    pub(super) fn from(&self) -> PathBuf {
        self.root.path.join(&self.below)
    }
}

impl SourceKind {
    pub(super) fn file(metadata: &Metadata) -> Self {
        Self::File { state: FileState::of(metadata), executable: metadata.mode() & 0o100 != 0 }
    }
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Arc<Self>, PushError> {
        let directory = Directory::open(path).map_err(file_error(path))?;
        Ok(Arc::new(Self { directory, path: path.to_owned() }))
    }
}

pub(super) fn file_error(path: &Path) -> impl FnOnce(io::Error) -> PushError {
    let path = path.to_owned();
    move |source| PushError::File { path, source }
}

/// Returns the entries to push, in bytewise order of path.
pub(super) fn collect(root: &Path) -> Result<Vec<Source>, PushError> {
    let metadata = root.metadata().map_err(file_error(root))?;
    if metadata.is_file() {
        let path = root.canonicalize().map_err(file_error(root))?;
        let name = path.file_name().unwrap_or_default();
        let source = Source {
            path: ImagePath::try_from(name.as_bytes())?,
            root: Root::open(path.parent().unwrap_or(&path))?,
            below: name.into(),
            kind: SourceKind::file(&metadata),
        };
        return Ok(vec![source]);
    }
    if !metadata.is_dir() {
        return Err(PushError::Kind(root.to_owned()));
    }
    let mut sources = Vec::new();
    collect_below(&Root::open(root)?, &mut sources)?;
    if sources.is_empty() {
        return Err(PushError::Empty(root.to_owned()));
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

/// Adds the entries below the directory to push.
pub(super) fn collect_below(root: &Arc<Root>, sources: &mut Vec<Source>) -> Result<(), PushError> {
    for entry in walkdir::WalkDir::new(&root.path).min_depth(1).follow_root_links(true) {
        let entry = entry.map_err(|e| walk_error(&root.path, e))?;
        let from = entry.path();
        let metadata = entry.metadata().map_err(|e| walk_error(&root.path, e))?;
        let below = from.strip_prefix(&root.path).expect("walkdir stays below its root");
        if metadata.is_symlink() && is_criu_parent(root, below) {
            let holder = below.parent().unwrap_or(Path::new(""));
            let holder = root.directory.directory(holder).map_err(file_error(from))?;
            collect_parent(&holder, from, below.as_os_str().as_bytes(), sources)?;
            continue;
        }
        let kind = if metadata.is_file() {
            SourceKind::file(&metadata)
        } else if metadata.is_symlink() {
            SourceKind::SymbolicLink
        } else if !metadata.is_dir() {
            return Err(PushError::Kind(from.to_owned()));
        } else if from.read_dir().map_err(file_error(from))?.next().is_none() {
            SourceKind::EmptyDirectory
        } else {
            continue;
        };
        let path = ImagePath::try_from(below.as_os_str().as_bytes())?;
        sources.push(Source { path, root: Arc::clone(root), below: below.to_owned(), kind });
    }
    Ok(())
}

/// Returns the error of a walk below `root`, with the path that it concerns.
pub(super) fn walk_error(root: &Path, error: walkdir::Error) -> PushError {
    let path = error.path().unwrap_or(root).to_owned();
    // walkdir's other error is a loop of links, and its own text would repeat the path.
    let source = error.into_io_error().unwrap_or_else(|| rustix::io::Errno::LOOP.into());
    PushError::File { path, source }
}

/// Returns true for the link from CRIU's incremental images to their parents, which the push
/// includes.
pub(super) fn is_criu_parent(root: &Root, link: &Path) -> bool {
    let inventory = || root.directory.file(&link.with_file_name("inventory.img"));
    link.file_name().is_some_and(|name| name == "parent")
        && inventory().is_ok_and(|file| criu::is_image(&file))
}

/// Adds the images in the directory that the link `parent` in `holder` leads to, and in its
/// parents, as the directory `path`; `link` is the path of the link. Other files of these
/// directories are not CRIU's: whoever made the link must not choose what the user stores.
pub(super) fn collect_parent(
    holder: &Directory,
    link: &Path,
    path: &[u8],
    sources: &mut Vec<Source>,
) -> Result<(), PushError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(PushError::Parents(link.to_owned()));
    }
    let directory = holder.follow("parent").map_err(file_error(link))?;
    let root = Arc::new(Root { directory, path: link.to_owned() });
    let (mut has_images, mut has_parent) = (false, false);
    for name in root.directory.names() {
        let name = name.map_err(file_error(link))?;
        let from = link.join(&name);
        has_parent |= name == "parent";
        let kind = root.directory.kind_of(&name).map_err(file_error(&from))?;
        if !name.as_bytes().ends_with(b".img") || kind != FileType::RegularFile {
            continue;
        }
        let file = root.directory.file(Path::new(&name)).map_err(file_error(&from))?;
        has_images |= criu::is_image(&file);
        let path = ImagePath::try_from(&[path, b"/", name.as_bytes()].concat()[..])?;
        let kind = SourceKind::file(&file.metadata().map_err(file_error(&from))?);
        sources.push(Source { path, root: Arc::clone(&root), below: name.into(), kind });
    }
    if !has_images {
        return Err(PushError::NoParent(link.to_owned()));
    }
    if has_parent {
        collect_parent(&root.directory, &link.join("parent"), &[path, b"/parent"].concat(), sources)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn an_error_of_a_walk_names_the_path_once() {
        let root = Path::new("/does/not/exist");
        let error = walkdir::WalkDir::new(root).into_iter().next().unwrap().unwrap_err();
        let error = walk_error(root, error);
        let source = error.source().expect("the operating system's error").to_string();
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
        assert!(!source.contains("/does/not/exist"), "{source}");
    }
}
