//! The kernel's side: userfaultfds and the memory that they watch.
//!
//! All that is `unsafe` for the kernel's sake stands here, in three parts: [`abi`] has the numbers,
//! [`memory`] the mappings, and this file the calls. What the kernel is expected to answer to them is
//! an outcome ([`Outcome`], [`Event`]) and not an error.
//!
//! The `userfaultfd` crate registers, unregisters and wakes. It does not open, read and copy here: its
//! builder fails for ordinary users and hides the kernel's features, its events cannot be read into a
//! buffer of ours, and its copy loses how far an interrupted copy got.

#![expect(unsafe_code, reason = "ioctls on userfaultfds, and mappings")]

mod abi;
pub mod memory;
pub mod pagemap;

pub use pagemap::works as pagemap_scan_works;

use pagemap::Pagemap;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater};
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use userfaultfd::RegisterMode;

/// A page of ordinary memory, in bytes.
pub const PAGE_BYTES: usize = 4096;

const _: () = assert!(usize::BITS == 64, "addresses are words of the kernel's messages");

/// An address or a length as the kernel gives it.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, as asserted above")]
const fn to_usize(n: u64) -> usize {
    n as usize
}

/// A message as words of 64 bits.
pub const MESSAGE_WORDS: usize = size_of::<abi::Msg>() / size_of::<u64>();

/// One thing that a kernel may offer, by its name in ioctl_userfaultfd(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// As in the man page, without `UFFD_FEATURE_`.
    pub name: &'static str,
    /// Its bit in `uffdio_api.features`.
    pub bit: u64,
    /// The first Linux that has it.
    pub since: &'static str,
    /// What postcopy does with it.
    pub used_for: &'static str,
}

macro_rules! features {
    ($($constant:ident = $bit:literal, $since:literal, $used_for:literal;)*) => {
        $(#[doc = concat!("`UFFD_FEATURE_", stringify!($constant), "`, since Linux ", $since, ".")]
        pub const $constant: u64 = 1 << $bit;)*
        /// All features that Linux 6.8 knows, in the order of their bits.
        pub const FEATURES: &[Feature] = &[
            $(Feature { name: stringify!($constant), bit: $constant, since: $since, used_for: $used_for },)*
        ];
    };
}

features! {
    PAGEFAULT_FLAG_WP = 0, "5.7", "knowing what was written to, if asked for";
    EVENT_FORK = 1, "4.11", "another process's children are served, too; needs CAP_SYS_PTRACE";
    EVENT_REMAP = 2, "4.11", "memory that is moved is served where it went";
    EVENT_REMOVE = 3, "4.11", "madvise: memory given back stays given back";
    MISSING_HUGETLBFS = 4, "4.11", "another process's memory of huge pages";
    MISSING_SHMEM = 5, "4.11", "another process's shared memory";
    EVENT_UNMAP = 6, "4.11", "memory that is unmapped is noticed";
    SIGBUS = 7, "4.14", "not used";
    THREAD_ID = 8, "4.14", "not used";
    MINOR_HUGETLBFS = 9, "5.13", "not used";
    MINOR_SHMEM = 10, "5.14", "not used";
    EXACT_ADDRESS = 11, "5.18", "not used";
    WP_HUGETLBFS_SHMEM = 12, "5.19", "the same for private memory of huge pages and of files";
    WP_UNPOPULATED = 13, "6.4", "not used";
    POISON = 14, "6.6", "a page that cannot be had is SIGBUS, never a silent zero";
    WP_ASYNC = 15, "6.7", "knowing what was written to, if asked for";
    MOVE = 16, "6.8", "not used";
}

/// How a userfaultfd was had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// By userfaultfd(2), with the right to serve the kernel's own faults.
    Syscall,
    /// From /dev/userfaultfd, with that right.
    Device,
    /// By userfaultfd(2) without it: read(2) and the like on absent memory fail with EFAULT.
    UserModeOnly,
}

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel has none, or a sandbox forbids it.
    #[error("userfaultfd(2) is not to be had here: `postcopy doctor` says why")]
    Unavailable(#[source] io::Error),
    /// The kernel lacks what is needed.
    #[error("this kernel's userfaultfd lacks {0}: `postcopy doctor` says more")]
    Features(String),
    /// A descriptor that was handed in cannot be served.
    #[error("the descriptor handed in {0}")]
    Foreign(String),
    /// UFFDIO_API or watching the fd failed.
    #[error("the userfaultfd cannot be set up")]
    Setup(#[source] io::Error),
}

/// The size of a huge page (hugetlb) in bytes; there are others, which are not served.
pub const HUGE_BYTES: usize = 2 << 20;

/// What an ioctl did to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done.
    Done,
    /// Its first so many bytes are done; then something was in the way. Try the rest.
    Partial {
        /// Multiple of the page size.
        bytes: usize,
    },
    /// Its first page is there already. Nobody was woken.
    AlreadyPresent,
    /// An event waits to be read first (EAGAIN without progress).
    Deferred,
    /// The range is no longer registered, or no longer mapped.
    Gone,
    /// The owner of the memory has exited.
    OwnerGone,
    /// The kernel has no memory for it at the moment.
    NoMemory,
}

/// One message of a userfaultfd. Ranges are of addresses.
#[derive(Debug)]
pub enum Event {
    /// A thread touched an absent page at this address, and sleeps; or it wrote to one that is protected.
    Fault {
        /// The page's first address.
        address: usize,
        /// A write to a protected page.
        is_protected: bool,
    },
    /// This range is about to lose its content (madvise).
    Remove {
        /// Which.
        addresses: Range<usize>,
    },
    /// This range has been unmapped.
    Unmap {
        /// Which.
        addresses: Range<usize>,
    },
    /// A range has been moved (mremap).
    Remap {
        /// Where it was.
        from: Range<usize>,
        /// Where it begins from then on.
        to: usize,
    },
    /// The process has forked, and this is its child's userfaultfd.
    Fork {
        /// Not registered with anybody yet.
        child: OwnedFd,
    },
    /// Something that was not asked for.
    Unknown {
        /// Its number.
        event: u8,
    },
}

/// Whether reading a userfaultfd can go well later: a fork's event takes a descriptor and memory, and stays until there
/// are some.
pub fn may_pass(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// What memory is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedAt {
    /// Nobody else's; or none.
    Private,
    /// A page of shared memory, which is there.
    There,
    /// Shared memory that has no page there.
    Absent,
    /// An event is to be read first.
    NotNow,
}

/// How it is known what was written to.
#[derive(Debug)]
enum Tracking {
    Off,
    /// What is installed is write-protected, and the kernel takes that off at the first write by itself. This tells.
    Async(Pagemap),
    /// The same, but each first write is a message, and waits for its answer.
    Sync,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A userfaultfd: non-blocking, close-on-exec, its API handshake done.
#[derive(Debug)]
pub struct Uffd {
    registrar: userfaultfd::Uffd,
    access: Access,
    /// The features that the kernel has, and those that were asked for.
    available: u64,
    asked: u64,
    tracking: Tracking,
}

// SAFETY: the fd is only used through system calls, which are safe from any thread; the crate's own
// buffer for events is never used here.
unsafe impl Send for Uffd {}
// SAFETY: as above.
unsafe impl Sync for Uffd {}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `registrar` owns the fd, and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.registrar.as_raw_fd()) }
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.registrar.as_raw_fd()
    }
}

fn update<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: each opcode of `abi` is paired by its callers with the struct that it was made from.
    let updater = unsafe { Updater::<OPCODE, T>::new(argument) };
    // SAFETY: as above; the kernel reads and writes that struct, and memory of regions only at addresses
    // that are registered, which nobody takes to be immutable.
    unsafe { rustix::ioctl::ioctl(fd, updater) }
}

/// Opens a userfaultfd by the way with the most rights, without the API handshake.
fn open_any() -> Result<(OwnedFd, Access), OpenError> {
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

// SAFETY: USERFAULTFD_IOC_NEW takes open flags by value and gives a new fd, or -1.
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
        // SAFETY: the ioctl succeeded, so this is a new fd that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

fn open_by_device() -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: see NewFromDevice.
    Ok(unsafe { rustix::ioctl::ioctl(&device, NewFromDevice) }?)
}

fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = abi::Api { api: abi::UFFD_API, features, ioctls: 0 };
    update::<{ abi::IOC_API }, _>(fd.as_fd(), &mut api)?;
    Ok(api.features)
}

/// The features that a userfaultfd was asked for which somebody else made, and whose handshake is done.
fn foreign_features(fd: BorrowedFd<'_>) -> Result<u64, OpenError> {
    /// Set once UFFDIO_API was done; see fs/userfaultfd.c.
    const INITIALIZED: u64 = 1 << 31;
    let foreign = |reason: &str| OpenError::Foreign(reason.to_owned());
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let info = std::fs::read_to_string(path).map_err(OpenError::Setup)?;
    // `API:`, then the version, the features asked for, and those that there are, in hexadecimal.
    let api = info.lines().find_map(|line| line.strip_prefix("API:"));
    let features = api.and_then(|api| api.trim().split(':').nth(1));
    let features = features.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let features = features.ok_or_else(|| foreign("is no userfaultfd"))?;
    if features & INITIALIZED == 0 {
        return Err(foreign("is a userfaultfd without its UFFDIO_API"));
    }
    Ok(features)
}

/// What this kernel and these privileges offer: how a userfaultfd is had, and the features' bits.
///
/// # Errors
/// [`OpenError::Unavailable`] or [`OpenError::Setup`].
pub fn probe() -> Result<(Access, u64), OpenError> {
    let (fd, access) = open_any()?;
    let features = handshake(&fd, 0).map_err(|e| OpenError::Setup(e.into()))?;
    Ok((access, features))
}

impl Uffd {
    /// Opens a userfaultfd for memory of this process, with these features and no others.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::Features`] names those that the kernel lacks.
    pub fn open(wanted: u64) -> Result<Self, OpenError> {
        let (access, available) = probe()?;
        let missing: Vec<_> =
            FEATURES.iter().filter(|f| wanted & !available & f.bit != 0).map(|f| f.name).collect();
        if !missing.is_empty() {
            return Err(OpenError::Features(missing.join(", ")));
        }
        // Without CAP_SYS_PTRACE the handshake's answer still names EVENT_FORK; nobody here asks for it.
        let (fd, _) = open_any()?;
        handshake(&fd, wanted).map_err(|e| OpenError::Setup(e.into()))?;
        // SAFETY: `fd` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        let tracks = wanted & WP_ASYNC != 0;
        let pagemap = tracks.then(Pagemap::open).transpose().map_err(OpenError::Setup)?;
        let tracking = pagemap.map_or(Tracking::Off, Tracking::Async);
        Ok(Self { registrar, access, available, asked: wanted, tracking })
    }

    /// Takes over a userfaultfd that another process has opened for its memory, its API handshake done.
    ///
    /// # Errors
    /// [`OpenError::Foreign`]: it is none. [`OpenError::Features`]: the kernel cannot poison, and somebody else's
    /// memory can be made safe by nothing else.
    pub fn adopt(fd: OwnedFd, tracks_writes: bool) -> Result<Self, OpenError> {
        let asked = foreign_features(fd.as_fd())?;
        let (access, available) = probe()?;
        if available & POISON == 0 {
            return Err(OpenError::Features("POISON".to_owned()));
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| OpenError::Setup(e.into()))?;
        // SAFETY: `fd` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        let tracking = if tracks_writes { Tracking::Sync } else { Tracking::Off };
        Ok(Self { registrar, access, available, asked, tracking })
    }

    /// Whether the kernel's own accesses to absent memory are served, too.
    pub fn serves_kernel_faults(&self) -> bool {
        self.access != Access::UserModeOnly
    }

    /// Whether pages can be poisoned.
    pub fn can_poison(&self) -> bool {
        self.available & POISON != 0
    }

    /// Whether it tells of memory that is unmapped.
    pub fn tells_of_unmaps(&self) -> bool {
        self.asked & EVENT_UNMAP != 0
    }

    /// Whether it tells of forks.
    pub fn tells_of_forks(&self) -> bool {
        self.asked & EVENT_FORK != 0
    }

    /// Whether an event has not been read whose causer has changed memory already, or is about to.
    pub fn has_event(&self) -> bool {
        self.look() == Err(Errno::AGAIN)
    }

    /// Has the first touch of each absent page of the range reported here.
    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        let mode = match self.tracking {
            Tracking::Off => RegisterMode::MISSING,
            Tracking::Async(_) | Tracking::Sync => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        self.registrar.register_with_mode(start, len, mode).map(drop).map_err(io::Error::other)
    }

    /// What tells of writes to this process's memory, if that was asked for.
    pub fn pagemap(&self) -> Option<&Pagemap> {
        if let Tracking::Async(pagemap) = &self.tracking { Some(pagemap) } else { None }
    }

    /// Whether what is written to is to be known.
    pub fn tracks(&self) -> bool {
        !matches!(self.tracking, Tracking::Off)
    }

    /// Whether a look at what was written can protect it anew; else [`Uffd::protect`] does.
    pub fn protects_by_scan(&self) -> bool {
        !matches!(self.tracking, Tracking::Sync)
    }

    /// Has the next write to each of these pages, which are there, reported here. False: an event is to be read first.
    ///
    /// # Errors
    /// Whatever the ioctl answers; not that there is no such memory any more, or nobody who could write to it.
    pub fn protect(&self, addresses: Range<usize>) -> io::Result<bool> {
        match self.write_protect(addresses, abi::WRITEPROTECT_ON) {
            Ok(()) | Err(Errno::NOENT | Errno::SRCH) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets writes to these pages pass from now on, and wakes who waits for that. Deferred: as in [`Uffd::protect`].
    pub fn unprotect(&self, addresses: Range<usize>) -> Outcome {
        outcome(self.write_protect(addresses, 0), 0, 0)
    }

    fn write_protect(&self, addresses: Range<usize>, mode: u64) -> Result<(), Errno> {
        let range = abi::Range { start: addresses.start as u64, len: addresses.len() as u64 };
        let mut protect = abi::WriteProtect { range, mode };
        update::<{ abi::IOC_WRITEPROTECT }, _>(self.as_fd(), &mut protect)
    }

    /// Ends that. Whoever sleeps on an absent page of the range goes on, and sees zeros.
    pub fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        self.registrar.unregister(start, len).map_err(io::Error::other)
    }

    /// Lets those who sleep on pages of the range try again.
    pub fn wake(&self, start: usize, len: usize) {
        // Fails only for a range that is not page-aligned or empty, which no caller has.
        let _ = self.registrar.wake(std::ptr::without_provenance_mut(start), len);
    }

    /// The same for all pages that there can be.
    pub fn wake_all(&self) {
        // Of a process with fewer addresses than most the kernel refuses it; that one has regions to be woken.
        self.wake(abi::FIRST_ADDRESS, abi::LAST_ADDRESS - abi::FIRST_ADDRESS);
    }

    /// Installs `source` at `address`, page by page, each at once, and wakes who waits for them.
    pub fn copy(&self, address: usize, source: &[u8]) -> Outcome {
        let mut copy = abi::Copy {
            dst: address as u64,
            src: source.as_ptr().addr() as u64,
            len: source.len() as u64,
            mode: if matches!(self.tracking, Tracking::Off) { 0 } else { abi::COPY_MODE_WP },
            ..Default::default()
        };
        let result = update::<{ abi::IOC_COPY }, _>(self.as_fd(), &mut copy);
        outcome(result, copy.copy, source.len())
    }

    /// Whether the owner of the memory has exited.
    pub fn is_owner_gone(&self) -> bool {
        self.look() == Err(Errno::SRCH)
    }

    /// An ioctl that does nothing, and answers how things are.
    fn look(&self) -> Result<(), Errno> {
        // At any address: that there is no such memory comes after what is asked for here.
        // Low enough for processes of 32 bits.
        self.map_cached(1 << 31, PAGE_BYTES)
    }

    /// Whether a page of shared memory is there, in this mapping or another one. It is mapped then.
    pub fn is_cached(&self, address: usize, len: usize) -> bool {
        matches!(self.map_cached(address, len), Ok(()) | Err(Errno::EXIST))
    }

    /// What is at an address, as far as others may have it mapped, too. A page that is there is mapped then.
    /// `page_bytes` is the size of the kernel's pages there.
    pub fn shared_at(&self, address: usize, page_bytes: usize) -> SharedAt {
        match self.map_cached(address - address % page_bytes, page_bytes) {
            Ok(()) | Err(Errno::EXIST) => SharedAt::There,
            Err(Errno::FAULT) => SharedAt::Absent,
            Err(Errno::AGAIN) => SharedAt::NotNow,
            // Private anonymous memory has nothing that could be mapped.
            Err(_) => SharedAt::Private,
        }
    }

    /// Whether the pages at an address are of 2 MiB (hugetlb); None: an event is to be read first, or the owner is gone.
    ///
    /// # Errors
    /// That there is no memory that was registered here.
    pub fn is_huge(&self, address: usize) -> io::Result<Option<bool>> {
        // Private memory has nothing that could be mapped, and is refused like a range that is not of whole pages; then
        // the one of 2 MiB is, too.
        let small = self.map_cached(address, PAGE_BYTES);
        let huge = self.map_cached(address - address % HUGE_BYTES, HUGE_BYTES);
        match small {
            Err(Errno::NOENT) => Err(Errno::NOENT.into()),
            Err(Errno::AGAIN | Errno::SRCH) => Ok(None),
            Err(Errno::INVAL) => Ok(Some(!matches!(huge, Err(Errno::INVAL | Errno::NOENT)))),
            _ => Ok(Some(false)),
        }
    }

    /// Maps what there is already of shared memory.
    fn map_cached(&self, address: usize, len: usize) -> Result<(), Errno> {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut continue_ = abi::Continue { range, mode: abi::MODE_DONTWAKE, mapped: 0 };
        update::<{ abi::IOC_CONTINUE }, _>(self.as_fd(), &mut continue_)
    }

    /// Whether there is a message to be read.
    ///
    /// # Errors
    /// Whatever poll(2) answers.
    pub fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)));
        Ok(ready? > 0)
    }

    /// Installs zeros, at most 64 KiB. A poisoned page counts as present; use [`Uffd::copy`] for it.
    pub fn zero(&self, address: usize, len: usize) -> Outcome {
        // Nothing could protect them before somebody writes to them.
        if matches!(self.tracking, Tracking::Sync) {
            return self.copy(address, &ZEROS[..len]);
        }
        let zero = |mode| {
            let range = abi::Range { start: address as u64, len: len as u64 };
            let mut zero = abi::ZeroPage { range, mode, ..Default::default() };
            let result = update::<{ abi::IOC_ZEROPAGE }, _>(self.as_fd(), &mut zero);
            outcome(result, zero.zeropage, len)
        };
        let Tracking::Async(pagemap) = &self.tracking else { return zero(0) };
        let unseen = pagemap.unseen(|| {
            let outcome = zero(abi::MODE_DONTWAKE);
            let done = match outcome {
                Outcome::Done => len,
                Outcome::Partial { bytes } => bytes,
                _ => return outcome,
            };
            // It cannot protect what it installs. Whoever writes before that is done has a page of his own by then,
            // which is not protected. An error leaves them unprotected: they count as written to.
            let _ = pagemap.protect_zeros(address..address + done);
            self.wake(address, done);
            outcome
        });
        // These take memory, and are protected at once.
        unseen.unwrap_or_else(|| self.copy(address, &ZEROS[..len]))
    }

    /// Makes every later touch of the range's absent pages SIGBUS, also after this fd is closed, and wakes
    /// who waits for them. Stops at the first page that is there.
    pub fn poison(&self, address: usize, len: usize) -> Outcome {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut poison = abi::Poison { range, ..Default::default() };
        let result = update::<{ abi::IOC_POISON }, _>(self.as_fd(), &mut poison);
        outcome(result, poison.updated, len)
    }

    /// Takes over the userfaultfd of a child, made by a fork of a process whose userfaultfd this is.
    pub fn of_child(&self, child: OwnedFd) -> Self {
        // It is as its parent was when it was made. Cannot fail for a descriptor that is open.
        let _ = rustix::io::ioctl_fionbio(&child, true);
        // SAFETY: `child` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(child.into_raw_fd()) };
        // Nobody is told what it writes. What it has inherited that is protected is not so for long.
        let tracking = Tracking::Off;
        Self { registrar, access: self.access, available: self.available, asked: self.asked, tracking }
    }

    /// The number of its descriptor.
    pub fn number(&self) -> RawFd {
        self.as_raw_fd()
    }

    /// Reads messages that there are, as many as `words` has room for at most: how many. Reading an event lets its
    /// causer go on. Nobody else may use `words` meanwhile.
    ///
    /// # Errors
    /// Whatever read(2) answers but EAGAIN.
    pub fn read_messages(&self, words: &[AtomicU64]) -> io::Result<usize> {
        let start = words.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: atomic words may be changed through &, are as long, and any bytes are words; nobody uses them.
        let buffer = unsafe { std::slice::from_raw_parts_mut(start, size_of_val(words)) };
        loop {
            match rustix::io::read(self, &mut *buffer) {
                Ok(bytes) => return Ok(bytes / size_of::<abi::Msg>()),
                Err(Errno::AGAIN) => return Ok(0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Event {
    /// What a message says that was read just now, not more than once.
    pub fn of(message: [u64; MESSAGE_WORDS]) -> Self {
        Self::with_child(message, |fd| {
            // SAFETY: reading the message made this descriptor, and nobody else knows of it.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        })
    }

    /// What a message says, where `child` gives a child's descriptor by its number.
    pub fn with_child(message: [u64; MESSAGE_WORDS], child: impl FnOnce(RawFd) -> Option<OwnedFd>) -> Self {
        let [_, a, b, c] = message.map(to_usize);
        let event = message[0].to_ne_bytes()[0];
        match event {
            // With UFFD_FEATURE_EXACT_ADDRESS it is not the page's.
            abi::EVENT_PAGEFAULT => {
                let is_protected = message[1] & abi::PAGEFAULT_IS_WP != 0;
                Self::Fault { address: b - b % PAGE_BYTES, is_protected }
            }
            abi::EVENT_REMOVE => Self::Remove { addresses: a..b },
            abi::EVENT_UNMAP => Self::Unmap { addresses: a..b },
            abi::EVENT_REMAP => Self::Remap { from: a..a + c, to: b },
            _ => match Self::child_of(message).and_then(child) {
                Some(child) => Self::Fork { child },
                None => Self::Unknown { event },
            },
        }
    }

    /// The number of the descriptor that a message of a fork brings.
    pub fn child_of(message: [u64; MESSAGE_WORDS]) -> Option<RawFd> {
        let [a, b, c, d, ..] = message[1].to_ne_bytes();
        (message[0].to_ne_bytes()[0] == abi::EVENT_FORK).then(|| RawFd::from_ne_bytes([a, b, c, d]))
    }
}

fn outcome(result: Result<(), Errno>, done: i64, len: usize) -> Outcome {
    let done = usize::try_from(done).unwrap_or(0);
    match result {
        Ok(()) if done == len => Outcome::Done,
        Ok(()) | Err(Errno::AGAIN) if done > 0 => Outcome::Partial { bytes: done },
        Err(_) if done > 0 => Outcome::Partial { bytes: done },
        Ok(()) | Err(Errno::AGAIN) => Outcome::Deferred,
        Err(Errno::EXIST) => Outcome::AlreadyPresent,
        Err(Errno::NOMEM) => Outcome::NoMemory,
        Err(Errno::SRCH) => Outcome::OwnerGone,
        // ENOENT: not registered. EFAULT and EINVAL: unmapped, or mapped anew, in between.
        Err(_) => Outcome::Gone,
    }
}

/// A userfaultfd that the current tokio runtime watches.
#[derive(Debug)]
pub struct AsyncUffd(AsyncFd<std::sync::Arc<Uffd>>);

impl AsyncUffd {
    /// Must be called in a runtime.
    ///
    /// # Errors
    /// Whatever epoll answers.
    pub fn new(uffd: std::sync::Arc<Uffd>) -> io::Result<Self> {
        // SAFETY: the Arc keeps the one fd open for as long as the AsyncFd lives.
        let watched = unsafe { AsyncFd::register_with_interest(uffd, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// Whether there may be messages; if not, the task is woken when there are.
    ///
    /// # Errors
    /// If the runtime is shutting down.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<Readable<'_>>> {
        self.0.poll_read_ready(context).map(|ready| Ok(Readable(ready?)))
    }
}

/// There may be messages. Dropped without [`Readable::drained`] it says so again.
#[derive(Debug)]
pub struct Readable<'a>(tokio::io::unix::AsyncFdReadyGuard<'a, std::sync::Arc<Uffd>>);

impl Readable<'_> {
    /// All messages have been read: wait for new ones.
    pub fn drained(mut self) {
        self.0.clear_ready();
    }
}
