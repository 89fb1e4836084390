//! The files that a daemon writes for its user: its log, its pidfile and its traces.
//!
//! The directory of such a file may belong to another user, for example the work directory of a
//! restore. That user could lead the daemon to any file of its own user by a link, wait for its
//! secrets in a file of theirs, or stop it with a FIFO. So the daemon walks to the directory name
//! by name, follows links of root and of its own user only, and writes to new files and to regular
//! files of its own user.

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, fcntl_setfl, fstat, ftruncate, openat, readlinkat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// The most links on the way to a file, as in path_resolution(7).
const MAX_LINKS: u32 = 40;

/// Creates a file, or empties an existing one of this user. An absolute path may also name a
/// terminal, a pipe that has a reader, or another device.
///
/// # Errors
/// Any error of open(2); a link or a file of another user is in the way.
pub(crate) fn create(path: &Path, mode: u32) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
    // A file system may show a new file as another user's (NFS, 9p, FAT).
    match create_new(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other,
    }
    let file = open(path, flags, mode)?;
    let stat = fstat(&file)?;
    let own = rustix::process::geteuid().as_raw();
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if stat.st_uid != own => {
            let text =
                format!("it belongs to user {}, and this is user {own}. Name another file", stat.st_uid);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        FileType::RegularFile if stat.st_nlink > 1 => {
            return Err(io::Error::other("it has several names (hard links). Name another file"));
        }
        FileType::RegularFile => ftruncate(&file, 0)?,
        _ if path.is_absolute() => {}
        _ => return Err(io::Error::other("it is not a regular file. Name another file")),
    }
    fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// Creates a file that does not exist.
///
/// # Errors
/// Any error of open(2); a link of another user is in the way.
pub(crate) fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    open(path, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, mode)
}

/// Checks that no link of another user leads to a directory.
///
/// # Errors
/// Such a link does; or the directory does not exist.
pub(crate) fn ensure_way(directory: &Path) -> io::Result<()> {
    directory_of(&directory.join("file")).map(drop)
}

/// Removes a file.
///
/// # Errors
/// Any error of unlink(2); a link of another user is in the way.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let (directory, name) = directory_of(path)?;
    Ok(unlinkat(&directory, name, AtFlags::empty())?)
}

fn open(path: &Path, flags: OFlags, mode: u32) -> io::Result<File> {
    let (flags, mode) = (flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode));
    // The kernel and root make the links there, for example /dev/stderr. All users may write to
    // /dev/shm and /dev/mqueue.
    let is_below = |roots: &[&str]| roots.iter().any(|root| path.starts_with(root));
    if is_below(&["/dev", "/proc"]) && !is_below(&["/dev/shm", "/dev/mqueue"]) {
        return Ok(rustix::fs::open(path, flags, mode)?.into());
    }
    let (directory, name) = directory_of(path)?;
    match openat(&directory, name, flags | OFlags::NOFOLLOW, mode) {
        Err(Errno::LOOP) => Err(io::Error::other("it is a symbolic link. Name another file")),
        Err(Errno::NXIO) => Err(io::Error::other("it is a pipe without a reader. Name another file")),
        opened => Ok(opened?.into()),
    }
}

/// Opens the directory of a file. Returns it with the file's name.
fn directory_of(path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let names =
        |path: &Path| path.components().rev().map(|part| part.as_os_str().to_owned()).collect::<Vec<_>>();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut directory = openat(CWD, ".", flags | OFlags::DIRECTORY, Mode::empty())?;
    let (mut rest, mut links) = (names(path), 0);
    while let Some(name) = rest.pop() {
        if rest.is_empty() {
            return Ok((directory, name));
        }
        // The name of the root is absolute.
        let next = openat(&directory, &name, flags | OFlags::NOFOLLOW, Mode::empty())?;
        let stat = fstat(&next)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            directory = next;
            continue;
        }
        links += 1;
        let (owner, own) = (stat.st_uid, rustix::process::geteuid().as_raw());
        if links > MAX_LINKS || ![0, own].contains(&owner) {
            let name = name.as_bytes().escape_ascii();
            let text = format!("{name} in its path is a symbolic link of user {owner}. Name another file");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let target = OsString::from_vec(readlinkat(&next, "", Vec::new())?.into_bytes());
        rest.extend(names(Path::new(&target)));
    }
    Err(io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{chown, lchown, symlink};

    /// Tests that open a FIFO the wrong way would wait for ever.
    #[test]
    fn a_log_is_a_new_file_or_a_regular_one_of_this_user() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("mine"), "old and long").unwrap();
        for name in ["mine", "new"] {
            create(&at(name), 0o600).unwrap().write_all(b"log").unwrap();
            assert_eq!(fs::read(at(name)).unwrap(), b"log");
        }
        fs::hard_link(at("mine"), at("twice")).unwrap();
        symlink("new", at("link")).unwrap();
        rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for (name, reason) in [
            ("twice", "hard links"),
            ("link", "symbolic link"),
            ("fifo", "without a reader"),
            ("", "directory"),
        ] {
            let error = create(&at(name), 0o600).unwrap_err().to_string();
            assert!(error.contains(reason), "{name}: {error}");
        }
        assert_eq!(fs::read(at("new")).unwrap(), b"log");
        create(Path::new("/dev/null"), 0o600).unwrap().write_all(b"log").unwrap();
        let (_reader, writer) = io::pipe().unwrap();
        let pipe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
        create(Path::new(&pipe), 0o600).unwrap().write_all(b"log").unwrap();
    }

    #[test]
    fn no_file_and_no_link_of_another_user_is_used() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can make files of other users");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("real/sub")).unwrap();
        fs::write(at("theirs"), "old").unwrap();
        chown(at("theirs"), Some(4711), None).unwrap();
        assert!(create(&at("theirs"), 0o600).unwrap_err().to_string().contains("belongs to user 4711"));
        assert_eq!(fs::read(at("theirs")).unwrap(), b"old");
        symlink("real", at("own")).unwrap();
        symlink(at("real"), at("absolute")).unwrap();
        symlink("own/sub", at("through")).unwrap();
        for (way, name) in [("own", "a"), ("absolute", "b"), ("through", "c"), ("own/sub/..", "d")] {
            drop(create_new(&at(way).join(name), 0o600).unwrap());
            remove(&at(way).join(name)).unwrap();
        }
        lchown(at("own"), Some(4711), None).unwrap();
        for way in ["own", "own/sub", "through"] {
            let error = create(&at(way).join("shadow"), 0o600).unwrap_err().to_string();
            assert!(error.contains("own in its path is a symbolic link of user 4711"), "{error}");
        }
        assert!(!at("real/shadow").exists() && !at("real/sub/shadow").exists());
    }
}
