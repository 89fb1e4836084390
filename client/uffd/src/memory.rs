//! Mappings of this process: memory to be filled, and words that several processes share.

use super::PAGE_BYTES;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

/// The number of words in a page.
const PAGE_WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Private anonymous memory whose pages are absent. The drop unmaps it.
///
/// Register the memory ([`Uffd::register`](crate::Uffd::register)) before the first access: until
/// then an access reads zeros, as in any anonymous memory. If the userfaultfd reports munmap(2),
/// unregister the memory before the drop, which would otherwise wait until the pager has read the
/// event.
///
/// A fork does not copy the memory to the child (MADV_DONTFORK). No pager would serve the child, so
/// its access raises SIGSEGV and never reads a silent zero.
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
    /// Reserves `len` bytes, a positive multiple of the page size. The memory takes no space until
    /// pages are installed.
    ///
    /// # Errors
    /// The error of mmap(2) or madvise(2): EINVAL for `len` 0, ENOMEM.
    pub fn reserve(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        let memory = Self { start, len };
        // SAFETY: the range was mapped just now; the advice changes only the effect of a fork on
        // it.
        unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontFork) }?;
        Ok(memory)
    }

    /// Returns the first address.
    #[must_use]
    pub fn start(&self) -> usize {
        self.start.addr()
    }

    /// Returns the length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the first `len` bytes.
    ///
    /// # Blocking
    /// An access to an absent page waits until the page is installed. An access to a poisoned page
    /// raises SIGBUS.
    ///
    /// # Panics
    /// If `len` exceeds the mapping's length.
    #[must_use]
    pub fn slice(&self, len: usize) -> &[u8] {
        assert!(len <= self.len, "within the mapping");
        // SAFETY: mapped readable for as long as `self` lives; a page's bytes do not change after
        // its first read but through `slice_mut`, because the kernel installs each page before it
        // can be read.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), len) }
    }

    /// Returns the first `len` bytes for writing. Blocks and panics as [`Memory::slice`].
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

/// Makes every later access to a range raise SIGSEGV (PROT_NONE). This is for a [`Memory`] whose
/// absent pages no pager will fill, on a kernel that cannot poison. `start` and `len` are in bytes,
/// multiples of the page size.
///
/// # Errors
/// The error of mprotect(2): ENOMEM if the process has too many mappings. A longer range may
/// succeed then.
pub fn forbid(start: usize, len: usize) -> io::Result<()> {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: takes rights away and changes no byte. A thread that still reads the range is
    // stopped, which is the purpose.
    unsafe { rustix::mm::mprotect(start, len, MprotectFlags::empty()) }?;
    Ok(())
}

/// A file as atomic words that several processes may map. The drop unmaps it.
///
/// It holds state that outlives its process: a successor finds messages that were read into it
/// ([`Uffd::read_messages`](crate::Uffd::read_messages)).
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
    /// an access beyond its end raises SIGBUS.
    ///
    /// # Errors
    /// The error of fstat(2) or mmap(2).
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

    /// Allocates memory for these words in the file system. Without it, a store raises SIGBUS if
    /// the file system is full. Needs no descriptor of the file.
    ///
    /// # Errors
    /// ENOSPC: the file system is full. Other errors of madvise(2), MADV_POPULATE_WRITE.
    ///
    /// # Panics
    /// If the words do not lie in the mapping.
    pub fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
        match self.advise(range, Advice::LinuxPopulateWrite) {
            // A store there would raise SIGBUS.
            Err(Errno::FAULT) => Err(Errno::NOSPC.into()),
            reserved => Ok(reserved?),
        }
    }

    /// Returns the memory of these words to the file system. They read as 0 afterwards. The range
    /// must begin and end with a page.
    ///
    /// # Errors
    /// EINVAL if the range does not begin with a page. Other errors of madvise(2), MADV_REMOVE.
    ///
    /// # Panics
    /// As [`SharedWords::reserve`].
    pub fn give_back(&self, range: &Range<usize>) -> io::Result<()> {
        if !range.end.is_multiple_of(PAGE_WORDS) || !range.start.is_multiple_of(PAGE_WORDS) {
            return Err(Errno::INVAL.into());
        }
        Ok(self.advise(range, Advice::LinuxRemove)?)
    }

    /// Gives an advice on the pages that hold these words. The advice must not change the words
    /// that other callers use.
    fn advise(&self, range: &Range<usize>, advice: Advice) -> rustix::io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.words, "within the mapping");
        if range.is_empty() {
            return Ok(());
        }
        let first = range.start / PAGE_WORDS * PAGE_WORDS;
        let start = self.start.wrapping_byte_add(first * size_of::<u64>());
        let bytes = (range.end - first) * size_of::<u64>();
        // SAFETY: the pages lie in this mapping. Its words are atomic, and the advice unmaps no
        // address: at most the words read as 0.
        rustix::io::retry_on_intr(|| unsafe { rustix::mm::madvise(start, bytes, advice) })
    }
}

impl SharedWords {
    /// Maps `words` words of this process's own, all of them 0. A word takes memory once it is
    /// written.
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
        // SAFETY: mapped readable and writable for as long as `self` lives, aligned to pages; any
        // other process with the file mapped changes these words atomically, too.
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
