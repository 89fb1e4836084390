//! A userfaultfd, and the calls that a pager makes on it.

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

/// The memory that an address has, as far as other mappings may share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedAt {
    /// Private memory; or none.
    Private,
    /// Shared memory whose page exists.
    There,
    /// Shared memory whose page does not exist.
    Absent,
    /// Unknown until an unread event has been read.
    NotNow,
}

/// How writes are tracked.
#[derive(Debug)]
enum Tracking {
    Off,
    /// Installed pages are write-protected; the kernel lifts that at the first write by itself, and
    /// this tells of it.
    Async(Pagemap),
    /// Installed pages are write-protected; each first write is a message, and waits for its
    /// answer.
    Sync,
}

/// Longer than any page, and as much as a caller may zero at once where zeros are copied.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A userfaultfd: non-blocking, close-on-exec, its API handshake done.
///
/// Addresses and lengths are in bytes, multiples of the page size, of the owner's address space: of
/// this process ([`Uffd::open`]) or of the one that made the descriptor ([`Uffd::adopt`]).
///
/// Every call may be made from any thread. A call that installs, poisons or protects takes the
/// owner's mmap lock: it can block for as long as another thread changes that address space, 100 ms
/// and more at a busy one.
///
/// Closing the descriptor turns absent pages into zeros, and lets their waiters go on with these:
/// poison them first.
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

/// Opening and registering.
impl Uffd {
    /// Opens a userfaultfd for memory of this process, with the features of these bits
    /// ([`FEATURES`]) and no others. With [`WP_ASYNC`] it tracks writes: installed pages are
    /// write-protected, and [`Uffd::pagemap`] lists those written.
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
        // Without CAP_SYS_PTRACE the handshake's answer still names EVENT_FORK; nobody here asks
        // for it.
        let (fd, _) = open_any()?;
        handshake(&fd, wanted).map_err(|e| OpenError::Setup(e.into()))?;
        // SAFETY: `fd` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        let tracks = wanted & WP_ASYNC != 0;
        let pagemap = tracks.then(Pagemap::open).transpose().map_err(OpenError::Setup)?;
        let tracking = pagemap.map_or(Tracking::Off, Tracking::Async);
        Ok(Self { registrar, access, available, asked: wanted, tracking })
    }

    /// Takes over a userfaultfd that another process has opened for its memory, its API handshake
    /// done, and makes it non-blocking. With `tracks_writes`, installed pages are write-protected,
    /// and the first write to each is a message: the owner must have asked for
    /// [`PAGEFAULT_FLAG_WP`](crate::PAGEFAULT_FLAG_WP).
    ///
    /// # Errors
    /// [`OpenError::Foreign`]: the descriptor is no userfaultfd, or lacks the handshake.
    /// [`OpenError::Features`]: the kernel cannot poison, and another process's memory can be made
    /// safe by nothing else. [`OpenError::Setup`].
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

    /// Takes over the userfaultfd of a child, which a fork's message of this one has brought.
    /// Writes of the child are not tracked.
    #[must_use]
    pub fn of_child(&self, child: OwnedFd) -> Self {
        // It is as its parent was when it was made. Cannot fail for a descriptor that is open.
        let _ = rustix::io::ioctl_fionbio(&child, true);
        // SAFETY: `child` is an open userfaultfd, and gives up its ownership.
        let registrar = unsafe { userfaultfd::Uffd::from_raw_fd(child.into_raw_fd()) };
        // Pages that it has inherited write-protected do not stay so for long.
        let tracking = Tracking::Off;
        Self { registrar, access: self.access, available: self.available, asked: self.asked, tracking }
    }

    /// Makes every access to an absent page of the range a fault that is reported here; and where
    /// writes are tracked, every first write to a present one.
    ///
    /// Of this process register only memory that no Rust value uses: a page that this descriptor
    /// installs has whatever bytes the pager gave. [`Memory`](crate::memory::Memory) is such
    /// memory.
    ///
    /// # Errors
    /// Whatever the ioctl answers: EINVAL for a range that is not mapped or cannot be watched,
    /// EBUSY where another userfaultfd watches it. See ioctl_userfaultfd(2), UFFDIO_REGISTER.
    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        let mode = match self.tracking {
            Tracking::Off => RegisterMode::MISSING,
            Tracking::Async(_) | Tracking::Sync => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        self.registrar.register_with_mode(start, len, mode).map(drop).map_err(io::Error::other)
    }

    /// Ends the registration of a range. The waiters of its absent pages go on, and see zeros.
    ///
    /// # Errors
    /// Whatever the ioctl answers: EINVAL for a range that is not mapped. See ioctl_userfaultfd(2),
    /// UFFDIO_UNREGISTER.
    pub fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        let start = std::ptr::without_provenance_mut(start);
        self.registrar.unregister(start, len).map_err(io::Error::other)
    }

    /// Returns whether the kernel's own accesses to absent memory are faults, too: read(2) into it,
    /// for example. Of an adopted userfaultfd that cannot be seen: then, whether this process could
    /// have opened such a one.
    #[must_use]
    pub fn serves_kernel_faults(&self) -> bool {
        self.access != Access::UserModeOnly
    }

    /// Returns whether [`Uffd::poison`] works: since Linux 6.6.
    #[must_use]
    pub fn can_poison(&self) -> bool {
        self.available & POISON != 0
    }

    /// Returns whether it reports munmap(2): [`EVENT_UNMAP`].
    #[must_use]
    pub fn tells_of_unmaps(&self) -> bool {
        self.asked & EVENT_UNMAP != 0
    }

    /// Returns whether it reports forks: [`EVENT_FORK`].
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

/// Reading messages, and asking how things are.
impl Uffd {
    /// Reads the messages that wait, at most as many as `words` has room for
    /// ([`MESSAGE_WORDS`](crate::MESSAGE_WORDS) each), and returns how many. Decode them with
    /// [`Event::of`](crate::Event::of).
    ///
    /// The kernel writes into `words` itself. In memory that another process maps, too
    /// ([`SharedWords`](crate::memory::SharedWords)), a message that was read is not lost when this
    /// process is killed.
    ///
    /// Reading an event lets its causer go on. So whatever must not happen meanwhile is to be
    /// excluded around this call.
    ///
    /// # Errors
    /// Whatever read(2) answers but EAGAIN and EINTR; [`may_pass`](crate::may_pass) says which may
    /// pass.
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

    /// Returns whether a message waits.
    ///
    /// # Errors
    /// Whatever poll(2) answers.
    pub fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)));
        Ok(ready? > 0)
    }

    /// Returns whether an event is unread whose causer has changed the address space, or is about
    /// to.
    #[must_use]
    pub fn has_event(&self) -> bool {
        self.look() == Err(Errno::AGAIN)
    }

    /// Returns whether the owner of the memory has exited.
    #[must_use]
    pub fn is_owner_gone(&self) -> bool {
        self.look() == Err(Errno::SRCH)
    }

    /// Does an ioctl without effect, for its answer.
    fn look(&self) -> Result<(), Errno> {
        // At any address: the kernel answers what is asked for here before it looks for memory. Low
        // enough for processes of 32 bits.
        self.map_cached(1 << 31, PAGE_BYTES)
    }

    /// Returns whether the page of shared memory at an address exists, in this mapping or another
    /// one, and maps it here. `len` is the size of the kernel's page there.
    #[must_use]
    pub fn is_cached(&self, address: usize, len: usize) -> bool {
        matches!(self.map_cached(address, len), Ok(()) | Err(Errno::EXIST))
    }

    /// Returns what memory an address has, and maps a page of shared memory that exists.
    /// `page_bytes` is the size of the kernel's pages there.
    #[must_use]
    pub fn shared_at(&self, address: usize, page_bytes: usize) -> SharedAt {
        match self.map_cached(address - address % page_bytes, page_bytes) {
            Ok(()) | Err(Errno::EXIST) => SharedAt::There,
            Err(Errno::FAULT) => SharedAt::Absent,
            Err(Errno::AGAIN) => SharedAt::NotNow,
            // Private anonymous memory has nothing that could be mapped.
            Err(_) => SharedAt::Private,
        }
    }

    /// Returns whether the pages at an address are huge pages of 2 MiB (hugetlb); None where an
    /// event must be read first, or the owner has exited.
    ///
    /// # Errors
    /// ENOENT: no memory at that address is registered here.
    pub fn is_huge(&self, address: usize) -> io::Result<Option<bool>> {
        // Private memory has nothing that could be mapped, and is refused like a range that is not
        // of whole pages; then the one of 2 MiB is, too.
        let small = self.map_cached(address, PAGE_BYTES);
        let huge = self.map_cached(address - address % HUGE_BYTES, HUGE_BYTES);
        match small {
            Err(Errno::NOENT) => Err(Errno::NOENT.into()),
            Err(Errno::AGAIN | Errno::SRCH) => Ok(None),
            Err(Errno::INVAL) => Ok(Some(!matches!(huge, Err(Errno::INVAL | Errno::NOENT)))),
            _ => Ok(Some(false)),
        }
    }

    /// Maps pages of shared memory that exist already (UFFDIO_CONTINUE), and wakes nobody.
    fn map_cached(&self, address: usize, len: usize) -> Result<(), Errno> {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut continue_ = abi::Continue { range, mode: abi::MODE_DONTWAKE, mapped: 0 };
        update::<{ abi::IOC_CONTINUE }, _>(self.as_fd(), &mut continue_)
    }
}

/// Resolving faults.
impl Uffd {
    /// Installs `source` at `address`: page by page, each one atomically, and wakes the waiters of
    /// those installed. Stops at the first page that is present.
    ///
    /// `source` must not lie in memory that a userfaultfd watches and this thread serves: its fault
    /// would wait for this thread. For huge pages, address and length are multiples of
    /// [`HUGE_BYTES`].
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
    /// Where writes are tracked, the zeros may be copied, and then take memory.
    ///
    /// See ioctl_userfaultfd(2), UFFDIO_ZEROPAGE.
    ///
    /// # Panics
    /// Where writes are tracked, for more than 64 KiB at once.
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
            // It cannot protect what it installs. Whoever writes before that is done has a page of
            // his own by then, which is not protected. An error leaves them unprotected: they count
            // as written to.
            let _ = pagemap.protect_zeros(address..address + done);
            self.wake(address, done);
            outcome
        });
        // These take memory, and are protected at once.
        unseen.unwrap_or_else(|| self.copy(address, &ZEROS[..len]))
    }

    /// Poisons absent pages: every later access is SIGBUS, also after this descriptor is closed.
    /// Wakes the waiters. Stops at the first page that is present.
    ///
    /// [`Uffd::copy`] heals a poisoned page. Since Linux 6.6: see [`Uffd::can_poison`], and
    /// ioctl_userfaultfd(2), UFFDIO_POISON.
    pub fn poison(&self, address: usize, len: usize) -> Outcome {
        let range = abi::Range { start: address as u64, len: len as u64 };
        let mut poison = abi::Poison { range, ..Default::default() };
        let result = update::<{ abi::IOC_POISON }, _>(self.as_fd(), &mut poison);
        outcome(result, poison.updated, len)
    }

    /// Wakes the waiters of a range: each one accesses its page again, and is a new fault where
    /// that is still absent.
    ///
    /// That also brings faults back which another reader of this descriptor has read and not
    /// resolved.
    pub fn wake(&self, start: usize, len: usize) {
        // Fails only for a range that is not page-aligned or empty, which no caller has.
        let _ = self.registrar.wake(std::ptr::without_provenance_mut(start), len);
    }

    /// Wakes the waiters of all addresses that a process of 64 bits can have, as [`Uffd::wake`]. Of
    /// an owner with a smaller address space the kernel refuses that: wake its ranges one by one.
    pub fn wake_all(&self) {
        self.wake(abi::FIRST_ADDRESS, abi::LAST_ADDRESS - abi::FIRST_ADDRESS);
    }
}

/// Tracking writes.
impl Uffd {
    /// Returns whether writes are tracked.
    #[must_use]
    pub fn tracks(&self) -> bool {
        !matches!(self.tracking, Tracking::Off)
    }

    /// Returns what lists the pages written, where the kernel tracks writes to this process's
    /// memory ([`WP_ASYNC`]).
    #[must_use]
    pub fn pagemap(&self) -> Option<&Pagemap> {
        if let Tracking::Async(pagemap) = &self.tracking { Some(pagemap) } else { None }
    }

    /// Returns whether [`Pagemap::written`] can protect the pages that it lists; else
    /// [`Uffd::protect`] does.
    #[must_use]
    pub fn protects_by_scan(&self) -> bool {
        !matches!(self.tracking, Tracking::Sync)
    }

    /// Write-protects present pages: the next write to each is a fault. Returns false where an
    /// event must be read first. A range without memory, and an owner that has exited, count as
    /// protected.
    ///
    /// # Errors
    /// Whatever else the ioctl answers. See ioctl_userfaultfd(2), UFFDIO_WRITEPROTECT.
    pub fn protect(&self, addresses: Range<usize>) -> io::Result<bool> {
        match self.write_protect(addresses, abi::WRITEPROTECT_ON) {
            Ok(()) | Err(Errno::NOENT | Errno::SRCH) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets writes to these pages pass from now on, and wakes the writers that wait. Answers
    /// [`Outcome::Done`] or an outcome without progress.
    pub fn unprotect(&self, addresses: Range<usize>) -> Outcome {
        outcome(self.write_protect(addresses, 0), 0, 0)
    }

    fn write_protect(&self, addresses: Range<usize>, mode: u64) -> Result<(), Errno> {
        let range = abi::Range { start: addresses.start as u64, len: addresses.len() as u64 };
        let mut protect = abi::WriteProtect { range, mode };
        update::<{ abi::IOC_WRITEPROTECT }, _>(self.as_fd(), &mut protect)
    }
}
