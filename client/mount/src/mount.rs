//! Mounting and unmounting.

use crate::protocol::Owner;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// The type of the file system in /proc/mounts.
const TYPE: &str = "fuse.postcopy";

/// Mounts a file system at `target`, a directory, and returns the descriptor of its requests. A
/// file system whose process has died is unmounted before.
///
/// # Errors
/// Any error of mount(2). Only root may mount.
pub fn attach(target: &Path, source: &str, allow_other: bool) -> io::Result<OwnedFd> {
    if is_dead(target) {
        detach(target)?;
    }
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let other = if allow_other { ",allow_other" } else { "" };
    let fd = device.as_raw_fd();
    let options = format!(
        "fd={fd},rootmode=40000,user_id={uid},group_id={gid},default_permissions,max_read=1048576{other}"
    );
    let options = CString::new(options).expect("no NUL");
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount(source, target, TYPE, flags, &*options)?;
    Ok(device)
}

/// Unmounts a file system at once for new users, and for the others when they have closed it.
///
/// # Errors
/// Any error of umount(2).
pub fn detach(target: &Path) -> io::Result<()> {
    Ok(unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// Unmounts a file system that no process serves: requests that wait for an answer, and stores that
/// wait for one, end with an error.
///
/// # Errors
/// Any error of umount(2).
pub(crate) fn detach_by_force(target: &Path) -> io::Result<()> {
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
