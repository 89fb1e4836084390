//! The three ways to open a userfaultfd, and the API handshake that each one needs.

use super::{abi, ioctl};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use std::io;
use std::os::fd::FromRawFd;

/// The way in which this process opens userfaultfds. It decides which faults they report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// userfaultfd(2), with the right to serve faults of the kernel's own accesses.
    Syscall,
    /// /dev/userfaultfd (since Linux 6.1), with that right.
    Device,
    /// userfaultfd(2) without that right (`UFFD_USER_MODE_ONLY`, since Linux 5.11). System calls
    /// that access absent memory, such as read(2) into it, fail with EFAULT.
    UserModeOnly,
}

/// The reason why a userfaultfd cannot be opened or adopted.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel has no userfaultfd, or a sandbox forbids it: seccomp profiles of containers do.
    #[error("the kernel or a sandbox refuses userfaultfd(2)")]
    Unavailable(#[source] io::Error),
    /// The kernel lacks these features. The text has their names as in
    /// [`FEATURES`](crate::FEATURES), separated by commas.
    #[error("this kernel's userfaultfd lacks {0}")]
    Features(String),
    /// A descriptor that was handed in cannot be served; the text has the reason.
    #[error("the descriptor handed in {0}")]
    Foreign(String),
    /// UFFDIO_API failed, or another call that prepares the descriptor.
    #[error("the userfaultfd cannot be set up")]
    Setup(#[source] io::Error),
}

/// Returns the way in which this process opens userfaultfds, and the bits of all features that they
/// can have ([`FEATURES`](crate::FEATURES)). Opens a userfaultfd for that, and closes it again.
///
/// The bits include `EVENT_FORK` even if this process lacks the privilege for it.
///
/// # Errors
/// [`OpenError::Unavailable`] or [`OpenError::Setup`].
pub fn probe() -> Result<(Access, u64), OpenError> {
    let (fd, access) = open_any()?;
    let features = handshake(&fd, 0).map_err(|e| OpenError::Setup(e.into()))?;
    Ok((access, features))
}

/// Opens a userfaultfd by the way with the most rights, without the API handshake.
pub(super) fn open_any() -> Result<(OwnedFd, Access), OpenError> {
    let refused = match open_by_syscall(0) {
        Ok(fd) => return Ok((fd, Access::Syscall)),
        Err(error) => error,
    };
    if let Ok(fd) = open_by_device() {
        return Ok((fd, Access::Device));
    }
    match open_by_syscall(abi::USER_MODE_ONLY) {
        Ok(fd) => Ok((fd, Access::UserModeOnly)),
        Err(_) => Err(OpenError::Unavailable(refused.into())),
    }
}

fn open_by_syscall(flags: u32) -> Result<OwnedFd, Errno> {
    use rustix::mm::UserfaultfdFlags as Flags;
    let flags = Flags::CLOEXEC | Flags::NONBLOCK | Flags::from_bits_retain(flags);
    // SAFETY: a userfaultfd alone changes no memory; it does once ranges are registered.
    unsafe { rustix::mm::userfaultfd(flags) }
}

struct NewFromDevice;

// SAFETY: USERFAULTFD_IOC_NEW takes open flags by value and returns a new fd, or -1.
unsafe impl rustix::ioctl::Ioctl for NewFromDevice {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        abi::IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        let flags = rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        std::ptr::without_provenance_mut(flags.bits() as usize)
    }

    unsafe fn output_from_ptr(
        output: rustix::ioctl::IoctlOutput,
        _argument: *mut std::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the ioctl succeeded, so this is a new fd without another owner.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

fn open_by_device() -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: see NewFromDevice.
    Ok(unsafe { rustix::ioctl::ioctl(&device, NewFromDevice) }?)
}

/// Requests `features` in the API handshake, and returns the features that the kernel has.
pub(super) fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = abi::Api { api: abi::UFFD_API, features, ioctls: 0 };
    ioctl::update::<{ abi::IOC_API }, _>(fd.as_fd(), &mut api)?;
    Ok(api.features)
}

/// Returns the features that another process requested in this userfaultfd's API handshake.
pub(super) fn foreign_features(fd: BorrowedFd<'_>) -> Result<u64, OpenError> {
    /// The kernel sets this bit at UFFDIO_API; see fs/userfaultfd.c.
    const INITIALIZED: u64 = 1 << 31;
    let foreign = |reason: &str| OpenError::Foreign(reason.to_owned());
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let info = std::fs::read_to_string(path).map_err(OpenError::Setup)?;
    // The format is `API:`, then the version, the requested features, and the kernel's features, in
    // hexadecimal.
    let api = info.lines().find_map(|line| line.strip_prefix("API:"));
    let features = api.and_then(|api| api.trim().split(':').nth(1));
    let features = features.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let features = features.ok_or_else(|| foreign("is no userfaultfd"))?;
    if features & INITIALIZED == 0 {
        return Err(foreign("is a userfaultfd without its UFFDIO_API"));
    }
    Ok(features)
}
