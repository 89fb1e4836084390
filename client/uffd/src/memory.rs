//! Mappings of this process: memory to be filled, and words that it shares with other processes.

use rustix::fd::AsFd;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::ops::Deref;
use std::sync::atomic::AtomicU64;

/// Private anonymous memory whose pages are absent; unmapped when dropped.
///
/// Register it ([`Uffd::register`](crate::Uffd::register)) before the first access: until then an
/// access gets zeros, as from any anonymous memory. Unregister it before the drop, where munmap(2)
/// is an event of the userfaultfd: the drop would wait until that is read.
///
/// Children of a fork do not inherit it (MADV_DONTFORK): no pager would serve them, and their
/// access is SIGSEGV and not a silent zero.
#[derive(Debug)]
pub struct Memory {
    start: *mut c_void,
    len: usize,
}

// SAFETY: it is address space, owned by this value alone; nothing about it belongs to a thread.
unsafe impl Send for Memory {}
// SAFETY: through & it only gives addresses and shared slices.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves `len` bytes, a positive multiple of the page size. Takes no memory until pages are
    /// installed.
    ///
    /// # Errors
    /// Whatever mmap(2) or madvise(2) answers: EINVAL for no bytes, ENOMEM.
    pub fn reserve(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        let memory = Self { start, len };
        // SAFETY: the range was mapped just now; the advice changes nothing but what fork does with
        // it.
        unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontFork) }?;
        Ok(memory)
    }

    /// The first address.
    #[must_use]
    pub fn start(&self) -> usize {
        self.start.addr()
    }

    /// The length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the first `len` bytes.
    ///
    /// # Blocking
    /// Reading an absent page waits until it is installed. A poisoned page is SIGBUS.
    ///
    /// # Panics
    /// Beyond the mapping's length.
    #[must_use]
    pub fn slice(&self, len: usize) -> &[u8] {
        assert!(len <= self.len, "within the mapping");
        // SAFETY: mapped readable for as long as `self` lives; a page's bytes do not change after
        // its first read but through `slice_mut`, because the kernel installs each page before it
        // can be read.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), len) }
    }

    /// Returns the first `len` bytes, to be changed. As [`Memory::slice`] otherwise.
    #[must_use]
    pub fn slice_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len, "within the mapping");
        // SAFETY: mapped writable for as long as `self` lives, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast::<u8>(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and all borrows of it have ended. It cannot fail for a whole
        // mapping.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

/// Makes every later access to a range SIGSEGV (PROT_NONE): of a [`Memory`] whose absent pages
/// nobody will fill, where the kernel cannot poison. `start` and `len` are in bytes, multiples of
/// the page size.
///
/// # Errors
/// Whatever mprotect(2) answers: ENOMEM where the process has too many mappings. Then a longer
/// range may do.
pub fn forbid(start: usize, len: usize) -> io::Result<()> {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: takes rights away and changes no byte. Whoever still reads the range is stopped,
    // which is the purpose.
    unsafe { rustix::mm::mprotect(start, len, MprotectFlags::empty()) }?;
    Ok(())
}

/// A file as atomic words that several processes may map; unmapped when dropped.
///
/// For state that outlives its process: messages that were read into it
/// ([`Uffd::read_messages`](crate::Uffd::read_messages)) are found by a successor.
#[derive(Debug)]
pub struct SharedWords {
    start: *mut c_void,
    words: usize,
}

// SAFETY: it is memory of atomic words, owned by this value; nothing about it belongs to a thread.
unsafe impl Send for SharedWords {}
// SAFETY: through & it only gives atomic words.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the whole words of a file, for reading and writing. The file must not become shorter:
    /// an access beyond its end is SIGBUS.
    ///
    /// # Errors
    /// Whatever fstat(2) or mmap(2) answers.
    pub fn map(file: impl AsFd) -> io::Result<Self> {
        let bytes = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        let words = bytes / size_of::<u64>();
        if words == 0 {
            return Ok(Self { start: std::ptr::null_mut(), words });
        }
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0) }?;
        Ok(Self { start, words })
    }
}

impl SharedWords {
    /// Maps `words` words of this process's own, all of them 0. They take memory as they are written to.
    ///
    /// # Errors
    /// The error of mmap(2).
    pub fn anonymous(words: usize) -> io::Result<Self> {
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        let bytes = words * size_of::<u64>();
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) }?;
        Ok(Self { start, words })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        if self.words == 0 {
            return &[];
        }
        // SAFETY: mapped readable and writable for as long as `self` lives, aligned to pages;
        // whoever else has the file mapped changes these words atomically, too.
        unsafe { std::slice::from_raw_parts(self.start.cast::<AtomicU64>(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and all borrows of it have ended. An empty one was never
        // mapped, and fails.
        let _ = unsafe { rustix::mm::munmap(self.start, self.words * size_of::<u64>()) };
    }
}
