//! Reads the directories of references.

use crate::store::error::{StoreError, io_error};
use crate::store::layout::is_staged;
use crate::store::objects::{Kind, Objects};
use crate::store::references::names::{Group, escape};
use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, fstat, openat, statat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The name of the directory that holds the tags of a name.
pub(super) const TAGS: &str = "_tags";
/// Bytes of entries that the kernel returns at a time.
const BUFFER_BYTES: usize = 32 << 10;
/// Age from which on a directory's time says that the directory has not changed since. Two changes
/// within one tick of the file system's clock leave the same time; no clock ticks less often.
const SETTLED: Duration = Duration::from_secs(2);

/// The components of names that a directory holds, or tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The parts of names at one level. The directory of the top level may hold tags of an empty
    /// name, which are no references.
    Parts {
        /// True at the top level.
        is_top: bool,
    },
    /// The tags of one name.
    Tags,
}

/// A directory of references.
#[derive(Debug)]
pub(super) enum Directory {
    Open(OpenDirectory),
    /// One of a bucket, with the names of its objects and of its subdirectories.
    Listed {
        objects: Vec<String>,
        subdirectories: Vec<String>,
    },
}

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    fd: OwnedFd,
    path: PathBuf,
}

/// A directory's identity and the time of its last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    changed: SystemTime,
}

impl Directory {
    /// Opens a directory. Returns `None` if there is none, which is common: a part of a name need
    /// not have tags. A symbolic link in place of `_tags` is no directory.
    pub(super) fn open(objects: &Objects, path: &Path, content: Content) -> Result<Option<Self>, StoreError> {
        match objects.kind() {
            Kind::Directory(_) => Ok(OpenDirectory::open(path, content)?.map(Self::Open)),
            Kind::Bucket(bucket) => {
                let (objects, subdirectories) = bucket.wait(bucket.tree(path))?;
                let exists = content == (Content::Parts { is_top: true })
                    || !(objects.is_empty() && subdirectories.is_empty());
                Ok(exists.then_some(Self::Listed { objects, subdirectories }))
            }
        }
    }

    /// Returns the directory's stamp; `None` if it has changed just now, and may change again
    /// without another stamp, and for one of a bucket.
    pub(super) fn stamp(&self) -> Result<Option<Stamp>, StoreError> {
        match self {
            Self::Open(directory) => directory.stamp(),
            Self::Listed { .. } => Ok(None),
        }
    }

    /// Calls `each` for the components of the directory, escaped, with the groups of their keys,
    /// until `each` breaks. The order is the file system's.
    pub(super) fn for_each(
        &self,
        content: Content,
        mut each: impl FnMut(&str, &[Group]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        let mut text = String::new();
        let entry = |name: &[u8], is_dir: bool| {
            let groups: &[Group] = match content {
                Content::Tags if is_staged(OsStr::from_bytes(name)) => return ControlFlow::Continue(()),
                Content::Tags => &[Group::Tag],
                Content::Parts { .. } if !is_dir => return ControlFlow::Continue(()),
                Content::Parts { .. } if name != TAGS.as_bytes() => &[Group::Below, Group::Tags],
                Content::Parts { is_top: true } => return each("", &[Group::Tags]),
                // The tags are a group of the directory above.
                Content::Parts { is_top: false } => return ControlFlow::Continue(()),
            };
            escape(name, &mut text);
            each(&text, groups)
        };
        match self {
            Self::Open(directory) => directory.for_each(content, entry),
            Self::Listed { objects, subdirectories } => {
                let objects = objects.iter().map(|name| (name, false));
                let mut all = objects.chain(subdirectories.iter().map(|name| (name, true)));
                let mut entry = entry;
                let _ = all.try_for_each(|(name, is_dir)| entry(name.as_bytes(), is_dir));
                Ok(())
            }
        }
    }
}

impl OpenDirectory {
    fn open(path: &Path, content: Content) -> Result<Option<Self>, StoreError> {
        let links = if content == Content::Tags { OFlags::NOFOLLOW } else { OFlags::empty() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | links;
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path: path.to_owned() })),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(io_error(path)(error.into())),
        }
    }

    fn stamp(&self) -> Result<Option<Stamp>, StoreError> {
        let stat = fstat(&self.fd).map_err(|e| self.error(e))?;
        // The time of a change, not of a modification, because programs can set the latter.
        let since_epoch = u64::try_from(stat.st_ctime).ok().zip(u32::try_from(stat.st_ctime_nsec).ok());
        let Some((seconds, nanoseconds)) = since_epoch else { return Ok(None) };
        let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        let is_settled = changed.elapsed().is_ok_and(|age| age > SETTLED);
        Ok(is_settled.then_some(Stamp { device: stat.st_dev, inode: stat.st_ino, changed }))
    }

    /// Calls `each` for the names of the directory, until `each` breaks, and says which of them are
    /// directories.
    fn for_each(
        &self,
        content: Content,
        mut each: impl FnMut(&[u8], bool) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut entries = RawDir::new(self.fd.as_fd(), &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| self.error(e))?;
            let name = entry.file_name();
            if [&b"."[..], b".."].contains(&name.to_bytes()) {
                continue;
            }
            // Whether an entry with a tag's name is a directory does not matter.
            let is_dir = content != Content::Tags && self.is_dir(name, entry.file_type())?;
            if each(name.to_bytes(), is_dir).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Returns true for a directory. Symbolic links are not followed, because they could form cycles.
    fn is_dir(&self, name: &std::ffi::CStr, kind: FileType) -> Result<bool, StoreError> {
        if kind != FileType::Unknown {
            return Ok(kind == FileType::Directory);
        }
        match statat(&self.fd, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.error(error)),
        }
    }

    fn error(&self, error: Errno) -> StoreError {
        io_error(&self.path)(io::Error::from(error))
    }
}
