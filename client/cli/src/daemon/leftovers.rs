//! What a worker that was killed has left in the table of descriptors: connections, which are served on; what state files
//! name, which its sessions need; and all else, which nobody needs and is closed.

use super::{Setup, kernel};
use anyhow::{Context, Result};
use postcopy::state_file::{self, StateError};
use rustix::net::{AddressFamily, SocketAddrUnix, getsockname};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

/// The descriptors that are open.
///
/// # Errors
/// If /proc does not tell.
pub(crate) fn open_descriptors() -> Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd").context("/proc/self/fd")?;
    let open: Vec<RawFd> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // But for the one that listed the directory.
    let is_open = |fd: &RawFd| std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
    Ok(open.into_iter().filter(is_open).collect())
}

/// Sorts what there is: gives the connections, and at which of the sockets they came, and closes what nobody needs. `own`
/// is what this worker has opened.
///
/// # Errors
/// If /proc does not tell.
pub(crate) fn sort(setup: &Setup, own: &[BorrowedFd<'_>]) -> Result<Vec<(UnixStream, usize)>> {
    let mut keep: BTreeSet<RawFd> = setup.base.iter().copied().collect();
    keep.extend(own.iter().map(AsRawFd::as_raw_fd));
    let mut is_unreadable = false;
    for name in setup.runtime.sessions().context("the runtime directory")? {
        match setup.runtime.state(&name).map(state_file::descriptors) {
            Ok(Ok(listed)) => keep.extend(listed),
            Ok(Err(StateError::Empty | StateError::Ended)) => {}
            // It is told of when it is to be resumed.
            _ => is_unreadable = true,
        }
    }
    let names: Vec<_> = setup.listeners.iter().map(|(listener, _)| name_of(listener.as_raw_fd())).collect();
    let mut connections = Vec::new();
    for fd in open_descriptors()?.into_iter().filter(|fd| !keep.contains(fd)) {
        // It may be one that such a file names.
        if is_unreadable && is_userfaultfd(fd) {
            continue;
        }
        let name = name_of(fd);
        let listener = names.iter().position(|of| of.is_some() && *of == name);
        #[expect(unsafe_code, reason = "descriptors by number")]
        // SAFETY: it is open, and whoever owned it has died.
        let owned = unsafe { kernel::own_number(fd) };
        match listener {
            Some(listener) => connections.push((UnixStream::from(owned), listener)),
            None => drop(owned),
        }
    }
    Ok(connections)
}

/// Whether a descriptor is a userfaultfd.
pub(crate) fn is_userfaultfd(fd: RawFd) -> bool {
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    target.is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

/// The name of a unix socket, if that is what it is.
fn name_of(fd: RawFd) -> Option<SocketAddrUnix> {
    #[expect(unsafe_code, reason = "descriptors by number")]
    // SAFETY: nobody closes it meanwhile: there is one thread yet that could.
    let fd = unsafe { kernel::borrow_number(fd) };
    let name = getsockname(fd).ok()?;
    if name.address_family() != AddressFamily::UNIX {
        return None;
    }
    SocketAddrUnix::try_from(name).ok()
}
