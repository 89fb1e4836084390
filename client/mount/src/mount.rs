//! Mounting and unmounting: by mount(2) as root, by fusermount3 as another user.

use crate::protocol::Owner;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

/// The type of the file system in /proc/mounts.
const TYPE: &str = "fuse.postcopy";
/// The program of fuse3 that mounts for users, setuid root.
const FUSERMOUNT: &str = "fusermount3";
/// Most bytes of a read.
const MAX_READ: &str = "max_read=1048576";

/// Mounts a file system at `target`, a directory, and returns the descriptor of its requests. A
/// file system whose process has died is unmounted before.
///
/// # Errors
/// Any error of mount(2); or as a user that is not root, the reason of fusermount3.
pub fn attach(target: &Path, source: &str, allow_other: bool) -> io::Result<OwnedFd> {
    if is_dead(target) {
        detach(target)?;
    }
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
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
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
        _ => error,
    })?;
    if ended.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    Err(io::Error::other(if reason.is_empty() { format!("{FUSERMOUNT}: {}", ended.status) } else { reason }))
}

/// Unmounts a file system at once for new users, and for the others when they have closed it.
///
/// # Errors
/// Any error of umount(2); or as a user that is not root, the reason of fusermount3.
pub fn detach(target: &Path) -> io::Result<()> {
    if !is_root() {
        return run(Command::new(FUSERMOUNT).args(["-u", "-z", "--"]).arg(target));
    }
    Ok(unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// Ends a file system that no process serves: requests that wait for an answer, and stores that
/// wait for one, end with an error. Unmounts it, if this is root.
///
/// # Errors
/// Any error of umount(2); or as a user that is not root, that of the control file system of FUSE.
pub(crate) fn abort(target: &Path) -> io::Result<()> {
    if !is_root() {
        let flags = rustix::fs::AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(rustix::fs::CWD, target, flags, rustix::fs::StatxFlags::INO)?;
        return std::fs::write(format!("/sys/fs/fuse/connections/{}/abort", found.stx_dev_minor), "1");
    }
    Ok(unmount(target, UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
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
