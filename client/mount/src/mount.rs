//! Mounting and unmounting: by mount(2) as root, by fusermount3 as another user.

use crate::protocol::Owner;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::ffi::{CString, OsString};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The type of the file system in /proc/mounts.
const TYPE: &str = "fuse.postcopy";
/// The program of fuse3 that mounts for users, setuid root.
const FUSERMOUNT: &str = "fusermount3";
/// Most bytes of a read.
const MAX_READ: &str = "max_read=1048576";

/// A file system that this process has mounted: its path, and its device number. Others may be
/// mounted over it or in its place, and are not touched.
#[derive(Clone, Debug)]
pub struct Target {
    path: PathBuf,
    device: (u32, u32),
}

/// Mounts a file system at `target`, a directory, and returns it with the descriptor of its
/// requests. A file system of the same kind whose process has died is unmounted before.
///
/// # Errors
/// Such a file system is there, and its process lives. Any error of mount(2); or as a user that is
/// not root, the reason of fusermount3.
pub fn attach(target: &Path, source: &str, allow_other: bool) -> io::Result<(Target, OwnedFd)> {
    let at = |device| Target { path: target.to_owned(), device };
    let mut before = device_of(target)?;
    if let Some(there) = all()?.into_iter().find(|mount| mount.device == before) {
        if is_answering(target) != Some(false) {
            let text = format!("the images of {} are mounted there already", there.server);
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        at(before).detach()?;
        before = device_of(target)?;
    }
    let device = open(target, source, allow_other)?;
    match device_of(target) {
        Ok(now) if now != before => Ok((at(now), device)),
        // Without its descriptor it is dead.
        Ok(_) => Err(io::Error::other("something else was mounted or unmounted there meanwhile")),
        Err(error) => Err(error),
    }
}

/// Returns the device number of a file system, without a request to it.
fn device_of(path: &Path) -> io::Result<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW;
    let found = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::INO)?;
    Ok((found.stx_dev_major, found.stx_dev_minor))
}

fn open(target: &Path, source: &str, allow_other: bool) -> io::Result<OwnedFd> {
    let other = if allow_other { ",allow_other" } else { "" };
    if !is_root() {
        // Commas separate options.
        let source = source.replace('\\', "\\\\").replace(',', "\\,");
        let (_, subtype) = TYPE.split_once('.').expect("a type of FUSE");
        let options = format!(
            "ro,nosuid,nodev,default_permissions,{MAX_READ},subtype={subtype},fsname={source}{other}"
        );
        return by_fusermount(target, &options);
    }
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let device = device.map_err(|error| io::Error::other(format!("/dev/fuse: {error}")))?;
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let fd = device.as_raw_fd();
    let options =
        format!("fd={fd},rootmode=40000,user_id={uid},group_id={gid},default_permissions,{MAX_READ}{other}");
    let options = CString::new(options).expect("no NUL");
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount(source, target, TYPE, flags, &*options)?;
    Ok(device)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Has fusermount3 mount, which sends the descriptor through a socket.
fn by_fusermount(target: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC)?;
    let mut command = Command::new(FUSERMOUNT);
    command.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
    run(command.args(["-o", options, "--"]).arg(target))?;
    drop(theirs);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut sent = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut sent, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = sent.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.ok_or_else(|| io::Error::other(format!("{FUSERMOUNT} has sent no descriptor")))
}

/// Runs fusermount3, whose output is the reason of a failure.
fn run(command: &mut Command) -> io::Result<()> {
    let ended = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            error.kind(),
            format!(
                "{FUSERMOUNT} is not installed, which mounts for users that are not root (package fuse3)"
            ),
        ),
        kind => io::Error::new(kind, format!("{FUSERMOUNT}: {error}")),
    })?;
    if ended.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    Err(io::Error::other(if reason.is_empty() { format!("{FUSERMOUNT}: {}", ended.status) } else { reason }))
}

impl Target {
    /// Returns the path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path that leads to the file system now; `None` if it is unmounted. The
    /// directories above it may have been renamed.
    ///
    /// # Errors
    /// Another file system covers it, or /proc/self/mountinfo cannot be read.
    fn now(&self) -> io::Result<Option<PathBuf>> {
        let Some(mount) = all()?.into_iter().find(|mount| mount.device == self.device) else {
            return Ok(None);
        };
        match device_of(&mount.directory) {
            Ok(device) if device == self.device => Ok(Some(mount.directory)),
            _ => Err(io::Error::other("another file system is mounted over it")),
        }
    }

    /// Unmounts the file system at once for new users, and for the others when they have closed it.
    /// Does nothing if it is unmounted already.
    ///
    /// # Errors
    /// Another file system covers it. Any error of umount(2); or as a user that is not root, the
    /// reason of fusermount3.
    pub fn detach(&self) -> io::Result<()> {
        let Some(path) = self.now()? else { return Ok(()) };
        if !is_root() {
            return run(Command::new(FUSERMOUNT).args(["-u", "-z", "--"]).arg(path));
        }
        Ok(unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
    }

    /// Ends the file system, which no process serves: requests that wait for an answer, and stores
    /// that wait for one, end with an error. Unmounts it, if this is root.
    ///
    /// # Errors
    /// Any error of umount(2); or as a user that is not root, that of the control file system of
    /// FUSE.
    pub(crate) fn abort(&self) -> io::Result<()> {
        match self.now() {
            Ok(Some(path)) if is_root() => {
                let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                Ok(unmount(path, flags)?)
            }
            _ => std::fs::write(format!("/sys/fs/fuse/connections/{}/abort", self.device.1), "1"),
        }
    }
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The path at which it is mounted.
    pub directory: PathBuf,
    /// The address of the images' server.
    pub server: String,
    /// The user that has mounted it.
    pub user: u32,
    /// The numbers of its device.
    device: (u32, u32),
}

/// Returns the mounts of this host, as far as this process sees them.
///
/// # Errors
/// /proc/self/mountinfo cannot be read.
pub fn all() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// Parses a line of /proc/self/mountinfo, if it is of a mount of this type (proc(5)).
fn parse(line: &[u8]) -> Option<Mount> {
    let text = |field| std::str::from_utf8(field).ok();
    let mut fields = line.split(|byte| *byte == b' ');
    let (major, minor) = text(fields.nth(2)?)?.split_once(':')?;
    let directory = fields.nth(1)?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let (kind, source, options) = (fields.next()?, fields.next()?, fields.next()?);
    if kind != TYPE.as_bytes() {
        return None;
    }
    let user = options.split(|byte| *byte == b',').find_map(|option| option.strip_prefix(b"user_id="))?;
    Some(Mount {
        directory: OsString::from_vec(unescape(directory)).into(),
        server: String::from_utf8_lossy(&unescape(source)).into_owned(),
        user: text(user)?.parse().ok()?,
        device: (major.parse().ok()?, minor.parse().ok()?),
    })
}

/// Replaces the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let value = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(value.unwrap_or(*first));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    plain
}

/// Returns whether a process serves a mount. `None`: there was no answer within a second.
#[must_use]
pub fn is_answering(target: &Path) -> Option<bool> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let target = target.to_owned();
    // It may wait for ever.
    let thread = std::thread::spawn(move || tell.send(!is_dead(&target)));
    let answer = told.recv_timeout(std::time::Duration::from_secs(1)).ok();
    if answer.is_some() {
        let _ = thread.join();
    }
    answer
}

/// Returns true if `target` is a mount whose process has died. The kernel answers stat(2) itself,
/// so this uses statfs(2).
fn is_dead(target: &Path) -> bool {
    matches!(rustix::fs::statfs(target), Err(rustix::io::Errno::NOTCONN))
}

/// Returns the owner of the files: the user of this process.
#[must_use]
pub fn own(mode: u32) -> Owner {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Owner { uid, gid, mode }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mounts_are_found_by_their_type() {
        let line = b"98 26 0:41 / /mnt/a\\040b ro,nosuid - fuse.postcopy http://h:1 ro,user_id=7,group_id=0";
        let (directory, server) = ("/mnt/a b".into(), "http://h:1".to_owned());
        assert_eq!(parse(line), Some(Mount { directory, server, user: 7, device: (0, 41) }));
        assert_eq!(parse(b"98 26 0:41 / /mnt rw shared:1 - fuse.sshfs h: rw,user_id=0"), None);
        assert_eq!(unescape(b"\\134040\\"), b"\\040\\");
    }

    proptest! {
        #[test]
        fn any_line_is_parsed_or_left_out(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }

        #[test]
        fn escapes_are_undone(path in prop::collection::vec(any::<u8>(), 0..40)) {
            let escape = |byte: &u8| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            };
            prop_assert_eq!(unescape(&path.iter().flat_map(escape).collect::<Vec<_>>()), path);
        }
    }
}
