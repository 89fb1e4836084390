//! System calls that need unsafe code. Those of userfaultfd are in [`postcopy::uffd`].
#![expect(unsafe_code, reason = "system calls")]

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The option of [`peer_pidfd`]: asm-generic/socket.h.
const SO_PEERPIDFD: libc::c_int = 77;

/// Forks a child that shares the table of descriptors: each of the two processes sees the
/// descriptors that the other opens or closes. The table exists as long as one of them lives.
/// Returns None in the child. Allocates nothing.
///
/// # Errors
/// Any error of clone(2).
///
/// # Safety
/// As fork(2): in a process with several threads the child may call async-signal-safe functions
/// only.
pub(crate) unsafe fn fork_sharing_descriptors() -> io::Result<Option<Pid>> {
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: without a stack the child goes on here, on its own copy of this stack. The caller has
    // promised the rest.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match libc::pid_t::try_from(pid).expect("a pid, or -1") {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        child => Ok(Some(Pid::from_raw(child))),
    }
}

/// Makes the kernel report the end of a child, and keep its exit status until waitpid(2). With the
/// inherited disposition SIG_IGN it does neither: see sigaction(2), SA_NOCLDWAIT.
///
/// # Errors
/// Any error of sigaction(2).
pub(crate) fn watch_children() -> io::Result<()> {
    // SAFETY: the default disposition runs no handler.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    Ok(())
}

/// Ends the process with all of its threads. Runs no exit handler and flushes no buffer.
pub(crate) fn exit_at_once(status: i32) -> ! {
    // SAFETY: the call does not return, so no code runs after it.
    unsafe { libc::_exit(status) }
}

/// Closes a descriptor by its number. Does nothing if that number is not open.
///
/// # Safety
/// No value in this process may own the descriptor.
pub(crate) unsafe fn close_fd(fd: RawFd) {
    // SAFETY: as the caller has promised.
    unsafe { libc::close(fd) };
}

/// Takes ownership of a descriptor by its number.
///
/// # Safety
/// The descriptor is open, and no value in this process owns it.
pub(crate) unsafe fn own_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: as the caller has promised.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Borrows a descriptor by its number.
///
/// # Safety
/// The descriptor stays open for as long as the result is used.
pub(crate) unsafe fn borrow_fd<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: as the caller has promised.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Returns a pidfd of the process that has connected to a socket (SO_PEERPIDFD, Linux 6.5). Unlike
/// the pid, it never names a later process.
///
/// # Errors
/// Any error of getsockopt(2); the process may have exited.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = libc::socklen_t::try_from(size_of_val(&fd)).expect("four bytes");
    // SAFETY: the kernel writes an int to `fd`, and its length to `len`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            std::ptr::from_mut(&mut fd).cast(),
            &raw mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has opened the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes the next look at a socket's messages begin with the first byte (SO_PEEK_OFF). Each further
/// look begins where the last one has ended.
///
/// # Errors
/// Any error of setsockopt(2).
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
