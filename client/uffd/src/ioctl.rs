//! The one function through which all ioctls go, and the meaning of their answers.

use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater};

pub(super) fn update<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: each opcode of `abi` is paired by its callers with the struct that it was made from.
    let updater = unsafe { Updater::<OPCODE, T>::new(argument) };
    // SAFETY: as above; the kernel reads and writes that struct, and memory of regions only at
    // addresses that are registered, which no Rust value treats as immutable.
    unsafe { rustix::ioctl::ioctl(fd, updater) }
}

/// The kernel's answer to an ioctl over a range.
///
/// None of these is an error: each one is expected in a race of a pager with the owner of the
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The call covered the whole range.
    Done,
    /// The call covered a part of the range, up to a present page or an unread event. Call again
    /// for the rest; the outcome of that call tells the reason.
    Partial {
        /// The number of bytes done, from the range's first one on; a multiple of the page size.
        bytes: usize,
    },
    /// The first page is present already (EEXIST). The call has not woken its waiters: see
    /// [`Uffd::wake`](crate::Uffd::wake).
    AlreadyPresent,
    /// The event of a change of the address space is unread (EAGAIN without progress). Read the
    /// event ([`Uffd::read_messages`](crate::Uffd::read_messages)), then call again.
    Deferred,
    /// The range is no longer registered, or no longer mapped (ENOENT, EFAULT, EINVAL).
    Gone,
    /// The owner of the memory has exited (ESRCH).
    OwnerGone,
    /// The kernel has no free memory for the call at the moment (ENOMEM). Call again later.
    NoMemory,
    /// An error that ioctl_userfaultfd(2) does not name for this call. The call did nothing.
    Unexpected {
        /// The error's number, as in errno(3).
        errno: i32,
    },
}

/// Decodes an answer: the call's error, and the signed count of bytes that the kernel has left in
/// the argument. The count is a negative errno if the call did nothing.
pub(super) fn outcome(result: Result<(), Errno>, done: i64, len: usize) -> Outcome {
    let done = usize::try_from(done).unwrap_or(0);
    match result {
        Ok(()) if done == len => Outcome::Done,
        Ok(()) | Err(Errno::AGAIN) if done > 0 => Outcome::Partial { bytes: done },
        Err(_) if done > 0 => Outcome::Partial { bytes: done },
        Ok(()) | Err(Errno::AGAIN) => Outcome::Deferred,
        Err(Errno::EXIST) => Outcome::AlreadyPresent,
        Err(Errno::NOMEM) => Outcome::NoMemory,
        Err(Errno::SRCH) => Outcome::OwnerGone,
        // The range is not registered, or the owner has unmapped it, or mapped it anew, since.
        Err(Errno::NOENT | Errno::FAULT | Errno::INVAL) => Outcome::Gone,
        Err(error) => Outcome::Unexpected { errno: error.raw_os_error() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_is_not_known_is_none_of_those_that_are() {
        for errno in [Errno::NOENT, Errno::FAULT, Errno::INVAL] {
            assert_eq!(outcome(Err(errno), 0, 4096), Outcome::Gone, "{errno}");
        }
        for errno in [Errno::PERM, Errno::IO, Errno::BADF, Errno::OPNOTSUPP, Errno::HWPOISON] {
            let expected = Outcome::Unexpected { errno: errno.raw_os_error() };
            assert_eq!(
                outcome(Err(errno), -11, 4096),
                expected,
                "an unknown error must not count as memory that is gone"
            );
            assert_eq!(outcome(Err(errno), 4096, 8192), Outcome::Partial { bytes: 4096 });
        }
    }
}
