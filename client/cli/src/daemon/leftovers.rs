//! Descriptors that a killed worker has left in the table. The successor serves the connections,
//! its sessions need the descriptors that state files name, and it closes all others.

use super::{Setup, kernel};
use anyhow::{Context, Result};
use postcopy::state_file::{self, StateError};
use rustix::net::{AddressFamily, SocketAddrUnix, getsockname};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Returns the descriptors that are open.
///
/// # Errors
/// /proc/self/fd cannot be read.
pub(crate) fn open_descriptors() -> Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd").context("/proc/self/fd")?;
    let open: Vec<RawFd> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // This leaves out the descriptor that listed the directory.
    let is_open = |fd: &RawFd| std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
    Ok(open.into_iter().filter(is_open).collect())
}

/// Sorts the open descriptors. Returns the connections, each with the index of its listening
/// socket, and closes the descriptors that have no use. `own` are those that this worker has
/// opened.
///
/// # Errors
/// /proc/self/fd or the runtime directory cannot be read.
pub(crate) fn sort(setup: &Setup, own: &[BorrowedFd<'_>]) -> Result<Vec<(UnixStream, usize)>> {
    let mut keep: BTreeSet<RawFd> = setup.base.iter().copied().collect();
    keep.extend(own.iter().map(AsRawFd::as_raw_fd));
    let mut is_unreadable = false;
    for name in setup.runtime.sessions().context("the runtime directory")? {
        match setup.runtime.state(&name).map(state_file::descriptors) {
            Ok(Ok(listed)) => keep.extend(listed),
            Ok(Err(StateError::Empty | StateError::Ended)) => {}
            // The attempt to resume that session reports the error.
            _ => is_unreadable = true,
        }
    }
    let names: Vec<_> = setup.listeners.iter().map(|(listener, _)| name_of(listener.as_raw_fd())).collect();
    let mut connections = Vec::new();
    for fd in open_descriptors()?.into_iter().filter(|fd| !keep.contains(fd)) {
        // An unreadable state file may name this userfaultfd.
        if is_unreadable && is_userfaultfd(fd) {
            continue;
        }
        let name = name_of(fd);
        let listener = names.iter().position(|of| of.is_some() && *of == name);
        #[expect(unsafe_code, reason = "descriptors by number")]
        // SAFETY: the descriptor is open, and the worker that owned it has died.
        let owned = unsafe { kernel::own_fd(fd) };
        match listener {
            Some(listener) => connections.push((UnixStream::from(owned), listener)),
            None => drop(owned),
        }
    }
    Ok(connections)
}

/// Returns the connections, each with the index of its listening socket. Leaves all other
/// descriptors as they are.
///
/// # Errors
/// /proc/self/fd cannot be read.
pub(crate) fn connections(setup: &Setup) -> Result<Vec<(UnixStream, usize)>> {
    let names: Vec<_> = setup.listeners.iter().map(|(listener, _)| name_of(listener.as_raw_fd())).collect();
    let mut connections = Vec::new();
    for fd in open_descriptors()?.into_iter().filter(|fd| !setup.base.contains(fd)) {
        let name = name_of(fd);
        let Some(listener) = names.iter().position(|of| of.is_some() && *of == name) else { continue };
        #[expect(unsafe_code, reason = "a descriptor by number")]
        // SAFETY: the descriptor is open, and the worker that owned it has died.
        let owned = unsafe { kernel::own_fd(fd) };
        connections.push((UnixStream::from(owned), listener));
    }
    Ok(connections)
}

/// Returns whether a descriptor is a userfaultfd.
pub(crate) fn is_userfaultfd(fd: RawFd) -> bool {
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    target.is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Returns the name of a unix socket, or None for other descriptors.
fn name_of(fd: RawFd) -> Option<SocketAddrUnix> {
    #[expect(unsafe_code, reason = "descriptors by number")]
    // SAFETY: the descriptor stays open meanwhile, because no other thread runs yet that could
    // close it.
    let fd = unsafe { kernel::borrow_fd(fd) };
    let name = getsockname(fd).ok()?;
    if name.address_family() != AddressFamily::UNIX {
        return None;
    }
    SocketAddrUnix::try_from(name).ok()
}
