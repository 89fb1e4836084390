//! Opens files below a directory by paths that lead nowhere else.
//!
//! Another user may own the directory or a part of its tree, and may swap names at any time. So the
//! kernel resolves each path below an open descriptor and follows no symbolic link. A file that is
//! opened must be a regular one, and opening it never waits: a FIFO would wait for its other end.
//! See openat2(2).

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The mode of directories that a transfer makes: for their owner alone.
const DIRECTORY_MODE: Mode = Mode::RWXU;
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// The identity of a file while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the identity of the file with this metadata.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// An open directory. The paths of its methods are relative to it, without `..`.
///
/// # Errors
/// The methods return the error of the system call. They also fail if a part of the path is a
/// symbolic link.
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    /// Opens the directory at `path`, and follows symbolic links.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens a directory of this one, and follows a symbolic link in its place.
    ///
    /// # Errors
    /// Returns the error of the system call. [`io::ErrorKind::PermissionDenied`]: another user owns
    /// the link or this directory, and does not own the link's target. That user would choose a
    /// target that only the caller may read.
    pub fn follow(&self, name: &str) -> io::Result<Self> {
        let link = rustix::fs::openat(
            &self.0,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let found = rustix::fs::fstat(&link)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Symlink {
            return self.directory(Path::new(name));
        }
        let target = rustix::fs::readlinkat(&link, "", Vec::new())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target = Self(rustix::fs::openat(&self.0, target, flags, Mode::empty())?);
        let owner = target.owner()?;
        let trusted = [0, rustix::process::geteuid().as_raw(), owner];
        match [self.owner()?, found.st_uid].into_iter().find(|user| !trusted.contains(user)) {
            None => Ok(target),
            Some(user) => {
                let text = format!("user {user} controls this link, and its target belongs to user {owner}");
                Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
            }
        }
    }

    /// Returns whether `name` in `parent` is this directory.
    ///
    /// # Errors
    /// See [`Directory`].
    pub(crate) fn is_at(&self, parent: &Self, name: &OsStr) -> io::Result<bool> {
        let id = |directory: &Self| {
            let stat = rustix::fs::fstat(&directory.0)?;
            Ok::<_, Errno>((stat.st_dev, stat.st_ino))
        };
        Ok(id(self)? == id(&parent.directory(Path::new(name))?)?)
    }

    fn owner(&self) -> io::Result<u32> {
        Ok(rustix::fs::fstat(&self.0)?.st_uid)
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// See [`Directory`].
    pub fn directory(&self, path: &Path) -> io::Result<Self> {
        self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty(), BENEATH).map(Self)
    }

    /// Opens a directory, and makes those of its path that do not exist.
    ///
    /// # Errors
    /// See [`Directory`].
    pub fn make_directory(&self, path: &Path) -> io::Result<Self> {
        match (self.directory(path), path.file_name()) {
            (Err(error), Some(name)) if error.kind() == io::ErrorKind::NotFound => {
                let parent = self.make_directory(path.parent().unwrap_or(Path::new("")))?;
                rustix::fs::mkdirat(&parent.0, name, DIRECTORY_MODE)?;
                parent.directory(Path::new(name))
            }
            (opened, _) => opened,
        }
    }

    /// Makes a directory that does not exist, and opens it.
    ///
    /// # Errors
    /// See [`Directory`]. [`io::ErrorKind::PermissionDenied`]: another user has put a directory in
    /// its place.
    pub(crate) fn new_directory(&self, name: &OsStr) -> io::Result<Self> {
        rustix::fs::mkdirat(&self.0, name, DIRECTORY_MODE)?;
        let made = self.directory(Path::new(name))?;
        let owner = made.owner()?;
        if owner == rustix::process::geteuid().as_raw() {
            return Ok(made);
        }
        let text = format!("user {owner} has replaced this directory");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// See [`Directory`]. [`io::ErrorKind::InvalidInput`]: the file is not a regular one.
    pub fn file(&self, path: &Path) -> io::Result<File> {
        self.regular(path, OFlags::RDONLY, Mode::empty())
    }

    /// Opens a regular file for writing.
    ///
    /// # Errors
    /// See [`Directory::file`].
    pub(crate) fn file_to_write(&self, path: &Path) -> io::Result<File> {
        self.regular(path, OFlags::WRONLY, Mode::empty())
    }

    /// Creates a file that does not exist, for writing.
    ///
    /// # Errors
    /// See [`Directory`].
    pub(crate) fn new_file(&self, name: &OsStr, mode: Mode) -> io::Result<File> {
        self.regular(Path::new(name), OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, mode)
    }

    /// Creates a symbolic link that does not exist.
    ///
    /// # Errors
    /// See [`Directory`].
    pub(crate) fn new_link(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.0, name)?)
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// See [`Directory`]. [`io::ErrorKind::NotFound`] if `path` is no link.
    pub fn link(&self, path: &Path) -> io::Result<Vec<u8>> {
        let link = self.open_beneath(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty(), BENEATH)?;
        Ok(rustix::fs::readlinkat(&link, "", Vec::new())?.into_bytes())
    }

    /// Returns true if a path leads out of the directory, by a symbolic link on its way or at its
    /// end. A path that leads to nothing in the directory does not lead out.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn leads_out(&self, path: &Path) -> io::Result<bool> {
        loop {
            match self.open_beneath(path, OFlags::PATH, Mode::empty(), ResolveFlags::BENEATH) {
                Ok(_) => return Ok(false),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::XDEV) => return Ok(true),
                    Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(false),
                    // A rename anywhere in the system interfered with a `..`.
                    Some(Errno::AGAIN) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Returns the metadata of an entry of this directory, and follows no link.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn kind_of(&self, name: &OsStr) -> io::Result<FileType> {
        let stat = rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(stat.st_mode))
    }

    /// Returns the names of the entries, in no order.
    pub fn names(&self) -> impl Iterator<Item = io::Result<OsString>> {
        let (entries, error) = match rustix::fs::Dir::read_from(&self.0) {
            Ok(entries) => (Some(entries), None),
            Err(error) => (None, Some(Err(error.into()))),
        };
        let name = |entry: Result<rustix::fs::DirEntry, Errno>| match entry {
            Ok(entry) => match entry.file_name().to_bytes() {
                b"." | b".." => None,
                name => Some(Ok(OsStr::from_bytes(name).to_owned())),
            },
            Err(error) => Some(Err(error.into())),
        };
        error.into_iter().chain(entries.into_iter().flatten().filter_map(name))
    }

    /// Moves an entry of this directory to a name of another one, which must be free if
    /// `only_new` is set.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn rename(&self, name: &OsStr, to: &Self, new: &OsStr, only_new: bool) -> io::Result<()> {
        use rustix::fs::RenameFlags;
        let flags = if only_new { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        Ok(rustix::fs::renameat_with(&self.0, name, &to.0, new, flags)?)
    }

    /// Writes all files of this directory's file system to the disk. See syncfs(2).
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.0)?)
    }

    /// Removes an entry of this directory with all that is below it, and follows no link.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn remove_all(&self, name: &OsStr) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        std::fs::remove_dir_all(Path::new("/proc/self/fd").join(self.0.as_raw_fd().to_string()).join(name))
    }

    fn regular(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<File> {
        let file = File::from(self.open_beneath(path, flags | OFlags::NONBLOCK, mode, BENEATH)?);
        if file.metadata()?.is_file() {
            return Ok(file);
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
    }

    fn open_beneath(&self, path: &Path, flags: OFlags, mode: Mode, how: ResolveFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        match rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, mode, how) {
            Err(Errno::LOOP) if how.contains(ResolveFlags::NO_SYMLINKS) => {
                Err(io::Error::other("a symbolic link is in its path"))
            }
            opened => Ok(opened?),
        }
    }
}

/// Reads a whole file of at most `max_bytes`.
///
/// # Errors
/// Returns the error of the system call. [`io::ErrorKind::FileTooLarge`]: the file is longer.
pub fn read_at_most(file: &File, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        let text = format!("it is longer than {max_bytes} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory with a file `in/file`, a secret beside the directory, and a FIFO.
    fn scratch() -> (tempfile::TempDir, Directory) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(root.join("in/file"), "content").unwrap();
        std::fs::write(folder.path().join("secret"), "secret").unwrap();
        symlink("../secret", root.join("link")).unwrap();
        symlink("in", root.join("within")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), FileType::Fifo, mode, 0).unwrap();
        let directory = Directory::open(&root).unwrap();
        (folder, directory)
    }

    #[test]
    fn only_regular_files_are_opened_and_no_link_is_followed() {
        let (_folder, directory) = scratch();
        let file = directory.file(Path::new("in/file")).unwrap();
        assert_eq!(read_at_most(&file, 7).unwrap(), b"content");
        let long = read_at_most(&directory.file(Path::new("in/file")).unwrap(), 6).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::FileTooLarge);
        for bad in ["link", "within/file", "up/secret", "../secret", "/etc/passwd", "fifo", "in", "none"] {
            assert!(directory.file(Path::new(bad)).is_err(), "{bad}");
            assert!(directory.file_to_write(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(directory.directory(Path::new("within")).is_err());
        assert_eq!(directory.link(Path::new("link")).unwrap(), b"../secret");
        assert!(directory.link(Path::new("within/file")).is_err());
        assert!(directory.make_directory(Path::new("up/new")).is_err());
        assert!(directory.make_directory(Path::new("a/b/c")).is_ok());
        assert!(directory.directory(Path::new("a/b/c")).is_ok());
    }

    #[test]
    fn a_link_that_leads_out_is_told_from_others() {
        let (_folder, directory) = scratch();
        let leads_out = |path: &str| directory.leads_out(Path::new(path)).unwrap();
        assert!(leads_out("link") && leads_out("up") && leads_out("up/nothing"));
        assert!(
            !leads_out("within") && !leads_out("within/file") && !leads_out("fifo") && !leads_out("none")
        );
    }
}
