//! Calls of the kernel that no crate has, but for those of userfaultfd, which are in [`postcopy::uffd`].
#![expect(unsafe_code, reason = "system calls")]

use nix::libc;
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A fork whose child shares the table of descriptors: what one of them opens or closes, the other one has opened or
/// closed, and it stays as long as one of them lives. None in the child. Allocates nothing.
///
/// # Errors
/// Whatever clone(2) answers.
///
/// # Safety
/// As fork(2): of a process with several threads the child may only call what is safe in a signal's handler.
pub(crate) unsafe fn fork_sharing_descriptors() -> io::Result<Option<Pid>> {
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: without a stack the child goes on here, on its own copy of this one; the caller has promised the rest.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match libc::pid_t::try_from(pid).expect("a pid, or -1") {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        child => Ok(Some(Pid::from_raw(child))),
    }
}

/// Ends the process, all of its threads, with nothing run or flushed.
pub(crate) fn exit_at_once(status: i32) -> ! {
    // SAFETY: it does not come back, so that nothing can go wrong after it.
    unsafe { libc::_exit(status) }
}

/// Closes a descriptor by its number; nothing happens if there is none.
///
/// # Safety
/// Nobody in this process may own it.
pub(crate) unsafe fn close_number(fd: RawFd) {
    // SAFETY: as the caller has promised.
    unsafe { libc::close(fd) };
}

/// A descriptor by its number, which is owned from here on.
///
/// # Safety
/// It is open, and nobody in this process owns it.
pub(crate) unsafe fn own_number(fd: RawFd) -> OwnedFd {
    // SAFETY: as the caller has promised.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A descriptor by its number.
///
/// # Safety
/// It stays open for as long as this is used.
pub(crate) unsafe fn borrow_number<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: as the caller has promised.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Where looking at what lies in a socket begins: with its first byte again (SO_PEEK_OFF). Each look goes on where the one
/// before has ended.
///
/// # Errors
/// Whatever setsockopt(2) answers.
pub(crate) fn peek_from_the_beginning(socket: impl AsFd) -> io::Result<()> {
    let zero: libc::c_int = 0;
    let len = libc::socklen_t::try_from(size_of_val(&zero)).expect("four bytes");
    // SAFETY: the kernel reads an int, which `zero` is.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            std::ptr::from_ref(&zero).cast(),
            len,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
