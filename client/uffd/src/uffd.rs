//! A userfaultfd, and a pager's calls on it.

use super::ioctl::{Outcome, outcome, update};
use super::open::{Access, OpenError, foreign_features, handshake, open_any, probe};
use super::pagemap::Pagemap;
use super::{EVENT_FORK, EVENT_UNMAP, FEATURES, HUGE_BYTES, PAGE_BYTES, POISON, WP_ASYNC, abi};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::atomic::AtomicU64;
use userfaultfd::RegisterMode;

/// The kind of memory at an address, and for shared memory the presence of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedAt {
    /// Private memory, or no memory.
    Private,
    /// Shared memory whose page exists.
    There,
    /// Shared memory whose page does not exist.
    Absent,
    /// Unknown: an unread event must be read first.
    NotNow,
}

/// The way in which writes are tracked.
#[derive(Debug)]
enum Tracking {
    Off,
    /// Installed pages are write-protected. At the first write the kernel lifts the protection by
    /// itself, and this shows that it has.
    Async(Pagemap),
    /// Installed pages are write-protected. The first write to each is a message, and waits for its
    /// answer.
    Sync,
}

/// A source of zeros, longer than any page. Its length limits one call of [`Uffd::zero`] that
/// copies zeros.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A userfaultfd: non-blocking, close-on-exec, with its API handshake done.
///
/// Addresses and lengths are in bytes, multiples of the page size. The addresses belong to the
/// owner's address space: to this process ([`Uffd::open`]), or to the process that made the
/// descriptor ([`Uffd::adopt`]).
///
/// Any thread may make any call. A call that installs, poisons or protects takes the owner's mmap
/// lock. So it can block for as long as another thread changes that address space: 100 ms and more
/// for a busy one.
///
/// Closing the descriptor turns absent pages into zeros, and their waiters continue with these
/// zeros. So poison absent pages first.
#[derive(Debug)]
pub struct Uffd {
    registrar: userfaultfd::Uffd,
    access: Access,
    /// The features that the kernel has.
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

/// The calls that open a userfaultfd and register memory.
impl Uffd {
    /// Opens a userfaultfd for memory of this process, with exactly the features of these bits
    /// ([`FEATURES`]). With [`WP_ASYNC`] it tracks writes: installed pages are write-protected, and
    /// [`Uffd::pagemap`] lists the written ones.
    ///
    /// # Errors
    /// [`OpenError::Features`] names the features that the kernel lacks;
    /// [`OpenError::Unavailable`], [`OpenError::Setup`]. See userfaultfd(2), ioctl_userfaultfd(2),
    /// UFFDIO_API.
    pub fn open(wanted: u64) -> Result<Self, OpenError> {
        let (access, available) = probe()?;
        let missing: Vec<_> =
            FEATURES.iter().filter(|f| wanted & !available & f.bit != 0).map(|f| f.name).collect();
        if !missing.is_empty() {
            return Err(OpenError::Features(missing.join(", ")));
        }
        // Without CAP_SYS_PTRACE the handshake's answer still names EVENT_FORK, but no caller of
        // this function requests it.
        let (fd, _) = open_any()?;
        handshake(&fd, wanted).map_err(|e| OpenError::Setup(e.into()))?;
        // SAFETY: `fd` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        let tracks = wanted & WP_ASYNC != 0;
        let pagemap = tracks.then(Pagemap::open).transpose().map_err(OpenError::Setup)?;
        let tracking = pagemap.map_or(Tracking::Off, Tracking::Async);
        Ok(Self { registrar, access, available, asked: wanted, tracking })
    }

    /// Adopts a userfaultfd that another process has opened for its memory, with its API handshake
    /// done, and makes the descriptor non-blocking.
    ///
    /// With `tracks_writes`, installed pages are write-protected, and the first write to each is a
    /// message. For that, the owner must have requested
    /// [`PAGEFAULT_FLAG_WP`](crate::PAGEFAULT_FLAG_WP).
    ///
    /// # Errors
    /// [`OpenError::Foreign`]: the descriptor is not a userfaultfd, or lacks the handshake.
    /// [`OpenError::Features`]: the kernel cannot poison, and without poison another process's
    /// memory cannot be made safe. [`OpenError::Setup`].
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

    /// Adopts a child's userfaultfd, which a fork's message of this userfaultfd contains.
    /// Writes of the child are not tracked.
    #[must_use]
    pub fn of_child(&self, child: OwnedFd) -> Self {
        // The child's descriptor inherits the flags of its parent's at the fork. The call cannot
        // fail for an open descriptor.
        let _ = rustix::io::ioctl_fionbio(&child, true);
        // SAFETY: `child` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(child.into_raw_fd()) };
        // The pages that the child inherited write-protected do not stay so for long.
        let tracking = Tracking::Off;
        Self { registrar, access: self.access, available: self.available, asked: self.asked, tracking }
    }

    /// Makes every access to an absent page of the range a fault of this userfaultfd. If writes are
    /// tracked, so is every first write to a present page.
    ///
    /// In this process, register only memory that no Rust value uses: an installed page has
    /// arbitrary bytes, which the pager provides. [`Memory`](crate::memory::Memory) is such memory.
    ///
    /// # Errors
    /// The error of the ioctl: EINVAL for a range that is not mapped or cannot be registered, EBUSY
    /// if it is registered with another userfaultfd. See ioctl_userfaultfd(2), UFFDIO_REGISTER.
    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        let mode = match self.tracking {
            Tracking::Off => RegisterMode::MISSING,
            Tracking::Async(_) | Tracking::Sync => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        self.registrar.register_with_mode(start, len, mode).map(drop).map_err(io::Error::other)
    }

    /// Ends the registration of a range. The waiters of its absent pages continue, and read zeros.
    ///
    /// # Errors
    /// The error of the ioctl: EINVAL for a range that is not mapped. See ioctl_userfaultfd(2),
    /// UFFDIO_UNREGISTER.
    pub fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        self.registrar.unregister(start, len).map_err(io::Error::other)
    }

    /// Returns whether the kernel's own accesses to absent memory are faults, too, such as those of
    /// read(2) into it. An adopted userfaultfd does not reveal this. Then the result says whether
    /// this process could have opened such a userfaultfd.
    #[must_use]
    pub fn serves_kernel_faults(&self) -> bool {
        self.access != Access::UserModeOnly
    }

    /// Returns whether [`Uffd::poison`] works, as it does since Linux 6.6.
    #[must_use]
    pub fn can_poison(&self) -> bool {
        self.available & POISON != 0
    }

    /// Returns whether this userfaultfd reports munmap(2): [`EVENT_UNMAP`].
    #[must_use]
    pub fn tells_of_unmaps(&self) -> bool {
        self.asked & EVENT_UNMAP != 0
    }

    /// Returns whether this userfaultfd reports forks: [`EVENT_FORK`].
    #[must_use]
    pub fn tells_of_forks(&self) -> bool {
        self.asked & EVENT_FORK != 0
    }

    /// Returns the number of the descriptor.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.as_raw_fd()
    }
}

/// The calls that read messages and look up states.
impl Uffd {
    /// Reads the unread messages, at most as many as `words` has room for
    /// ([`MESSAGE_WORDS`](crate::MESSAGE_WORDS) each), and returns their number. Decode them with
    /// [`Event::of`](crate::Event::of).
    ///
    /// The kernel writes directly into `words`. If another process maps them, too
    /// ([`SharedWords`](crate::memory::SharedWords)), a message that was read is not lost when this
    /// process is killed.
    ///
    /// Reading an event lets the thread that caused it continue. So exclude around this call
    /// everything that must not run at the same time.
    ///
    /// # Errors
    /// The error of read(2), except EAGAIN and EINTR; [`may_pass`](crate::may_pass) returns whether
    /// the error may pass.
    pub fn read_messages(&self, words: &[AtomicU64]) -> io::Result<usize> {
        let start = words.as_ptr().cast_mut().cast();
        loop {
            // SAFETY: the kernel writes within `words`, which may be changed through &; any bytes
            // are words.
            let read = unsafe { libc::read(self.as_raw_fd(), start, size_of_val(words)) };
            if let Ok(bytes) = usize::try_from(read) {
                return Ok(bytes / size_of::<abi::Msg>());
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(0),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }

    /// Returns whether a message is unread.
    ///
    /// # Errors
    /// The error of poll(2).
    pub fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)));
        Ok(ready? > 0)
    }

    /// Returns whether an event is unread whose causing thread has changed the address space, or is
    /// about to.
    #[must_use]
    pub fn has_event(&self) -> bool {
        self.look() == Err(Errno::AGAIN)
    }

    /// Returns whether the owner of the memory has exited.
    #[must_use]
    pub fn is_owner_gone(&self) -> bool {
        self.look() == Err(Errno::SRCH)
    }

    /// Makes an ioctl without effect, for its answer.
    fn look(&self) -> Result<(), Errno> {
        // The address does not matter: the kernel checks for events and for the owner before it
        // looks for memory. It is low enough for processes of 32 bits.
        self.map_cached(1 << 31, PAGE_BYTES)
    }

    /// Returns whether the page of shared memory at an address exists, in this mapping or another
    /// one, and maps it here if so. `len` is the size of the kernel's page there.
    #[must_use]
    pub fn is_cached(&self, address: usize, len: usize) -> bool {
        matches!(self.map_cached(address, len), Ok(()) | Err(Errno::EXIST))
    }

    /// Returns the kind of memory at an address, and maps a page of shared memory that exists.
    /// `page_bytes` is the size of the kernel's pages there.
    #[must_use]
    pub fn shared_at(&self, address: usize, page_bytes: usize) -> SharedAt {
        match self.map_cached(address - address % page_bytes, page_bytes) {
            Ok(()) | Err(Errno::EXIST) => SharedAt::There,
            Err(Errno::FAULT) => SharedAt::Absent,
            Err(Errno::AGAIN) => SharedAt::NotNow,
            // Private anonymous memory has no existing page that could be mapped.
            Err(_) => SharedAt::Private,
        }
    }

    /// Returns whether the pages at an address are huge pages of 2 MiB (hugetlb). Returns None if
    /// an event must be read first, or if the owner has exited.
    ///
    /// # Errors
    /// ENOENT: no memory at that address is registered with this userfaultfd.
    pub fn is_huge(&self, address: usize) -> io::Result<Option<bool>> {
        // The kernel refuses private memory with the same error as a range that is not made of
        // whole pages. But then it refuses the range of 2 MiB, too.
        let small = self.map_cached(address, PAGE_BYTES);
        let huge = self.map_cached(address - address % HUGE_BYTES, HUGE_BYTES);
        match (small, huge) {
            (Err(Errno::NOENT), _) => Err(Errno::NOENT.into()),
            (Err(Errno::AGAIN | Errno::SRCH), _) => Ok(None),
            // An event may come between the two calls.
            (Err(Errno::INVAL), Err(Errno::AGAIN | Errno::SRCH)) => Ok(None),
            (Err(Errno::INVAL), Err(Errno::INVAL | Errno::NOENT)) => Ok(Some(false)),
            (Err(Errno::INVAL), _) => Ok(Some(true)),
            _ => Ok(Some(false)),
        }
    }

    /// Maps pages of shared memory that exist already (UFFDIO_CONTINUE). Wakes no waiter.
    fn map_cached(&self, address: usize, len: usize) -> Result<(), Errno> {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut continue_ = abi::Continue { range, mode: abi::MODE_DONTWAKE, mapped: 0 };
        update::<{ abi::IOC_CONTINUE }, _>(self.as_fd(), &mut continue_)
    }
}

/// The calls that resolve faults.
impl Uffd {
    /// Installs `source` at `address` page by page, each page atomically, and wakes the waiters of
    /// the installed pages. Stops at the first page that is present.
    ///
    /// `source` must not lie in memory that a userfaultfd watches and this thread serves: a fault
    /// on it would wait for this thread. For huge pages, `address` and the length must be multiples
    /// of [`HUGE_BYTES`].
    ///
    /// See ioctl_userfaultfd(2), UFFDIO_COPY.
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

    /// Installs zeros, which take no memory until the owner writes to them, and wakes the waiters.
    /// A poisoned page counts as present: use [`Uffd::copy`] for it, and for huge pages.
    ///
    /// If writes are tracked, this may copy the zeros, which then take memory.
    ///
    /// See ioctl_userfaultfd(2), UFFDIO_ZEROPAGE.
    ///
    /// # Panics
    /// If writes are tracked, for more than 64 KiB at once.
    pub fn zero(&self, address: usize, len: usize) -> Outcome {
        // Zero pages could be protected only after the install, and a write may precede that.
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
            // The ioctl cannot protect the pages that it installs. A write before the protection
            // gives the owner a page of its own, which this does not protect. After an error the
            // pages stay unprotected, and so count as written.
            let _ = pagemap.protect_zeros(address..address + done);
            self.wake(address, done);
            outcome
        });
        // A scan is in progress. Copied zeros take memory, but the copy protects them at once.
        unseen.unwrap_or_else(|| self.copy(address, &ZEROS[..len]))
    }

    /// Poisons absent pages, and wakes their waiters. Every later access raises SIGBUS, even after
    /// this descriptor is closed. Stops at the first page that is present.
    ///
    /// [`Uffd::copy`] replaces a poisoned page. Since Linux 6.6: see [`Uffd::can_poison`], and
    /// ioctl_userfaultfd(2), UFFDIO_POISON.
    pub fn poison(&self, address: usize, len: usize) -> Outcome {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut poison = abi::Poison { range, ..Default::default() };
        let result = update::<{ abi::IOC_POISON }, _>(self.as_fd(), &mut poison);
        outcome(result, poison.updated, len)
    }

    /// Wakes the waiters of a range. Each one accesses its page again, and faults again if the page
    /// is still absent.
    ///
    /// So a pager also gets the faults again that another reader of this descriptor has read and
    /// not resolved.
    pub fn wake(&self, start: usize, len: usize) {
        // Fails only for a range that is not page-aligned or empty, which no caller has.
        let _ = self.registrar.wake(std::ptr::without_provenance_mut(start), len);
    }

    /// Wakes, as [`Uffd::wake`], the waiters of all addresses that a 64-bit process can have. For
    /// an owner with a smaller address space the kernel refuses this call: wake its ranges one by
    /// one.
    pub fn wake_all(&self) {
        self.wake(abi::FIRST_ADDRESS, abi::LAST_ADDRESS - abi::FIRST_ADDRESS);
    }
}

/// The calls that track writes.
impl Uffd {
    /// Returns whether writes are tracked.
    #[must_use]
    pub fn tracks(&self) -> bool {
        !matches!(self.tracking, Tracking::Off)
    }

    /// Returns the list of written pages, if the kernel tracks writes to this process's memory
    /// ([`WP_ASYNC`]).
    #[must_use]
    pub fn pagemap(&self) -> Option<&Pagemap> {
        if let Tracking::Async(pagemap) = &self.tracking { Some(pagemap) } else { None }
    }

    /// Returns whether [`Pagemap::written`] can protect the pages that it lists. If not, use
    /// [`Uffd::protect`].
    #[must_use]
    pub fn protects_by_scan(&self) -> bool {
        !matches!(self.tracking, Tracking::Sync)
    }

    /// Write-protects present pages: the next write to each is a fault. Returns false if an event
    /// must be read first. A range without memory, and an owner that has exited, count as
    /// protected.
    ///
    /// # Errors
    /// Any other error of the ioctl. See ioctl_userfaultfd(2), UFFDIO_WRITEPROTECT.
    pub fn protect(&self, addresses: Range<usize>) -> io::Result<bool> {
        match self.write_protect(addresses, abi::WRITEPROTECT_ON) {
            Ok(()) | Err(Errno::NOENT | Errno::SRCH) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the write protection of these pages, and wakes the writers that wait. Returns
    /// [`Outcome::Done`], or an outcome without progress.
    pub fn unprotect(&self, addresses: Range<usize>) -> Outcome {
        outcome(self.write_protect(addresses, 0), 0, 0)
    }

    fn write_protect(&self, addresses: Range<usize>, mode: u64) -> Result<(), Errno> {
        let range = abi::Range { start: addresses.start as u64, len: addresses.len() as u64 };
        let mut protect = abi::WriteProtect { range, mode };
        update::<{ abi::IOC_WRITEPROTECT }, _>(self.as_fd(), &mut protect)
    }
}
