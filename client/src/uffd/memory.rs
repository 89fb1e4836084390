//! Address space of this process that fills on touch.

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::io;

/// Private anonymous memory that nothing was written to yet; unmapped when dropped.
///
/// Children of a fork do not have it (MADV_DONTFORK): nobody would fill it for them, and a touch of theirs
/// is SIGSEGV and not a silent zero.
#[derive(Debug)]
pub(crate) struct Memory {
    start: *mut c_void,
    len: usize,
}

// SAFETY: it is address space, owned by this value alone; nothing about it belongs to a thread.
unsafe impl Send for Memory {}
// SAFETY: through & it only gives addresses and shared slices.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves `len` bytes, a positive multiple of the page size. Takes no memory until pages are installed.
    pub(crate) fn reserve(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        let memory = Self { start, len };
        // SAFETY: the range was mapped just now; the advice changes nothing but what fork does with it.
        unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontFork) }?;
        Ok(memory)
    }

    /// The first address.
    pub(crate) fn start(&self) -> usize {
        self.start.addr()
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first `len` bytes. Reading an absent page waits until it is installed.
    pub(crate) fn slice(&self, len: usize) -> &[u8] {
        assert!(len <= self.len, "within the mapping");
        // SAFETY: mapped readable for as long as `self` lives; a page's bytes do not change after its first
        // read but through `slice_mut`, because the kernel installs each page before it can be read.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), len) }
    }

    /// The first `len` bytes, to be changed. Touching an absent page waits until it is installed.
    pub(crate) fn slice_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len, "within the mapping");
        // SAFETY: mapped writable for as long as `self` lives, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast::<u8>(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and all borrows of it have ended. It cannot fail for a whole mapping.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

/// Makes every later touch of a range of a [`Memory`] SIGSEGV.
pub(crate) fn forbid(start: usize, len: usize) -> io::Result<()> {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: takes rights away and changes no byte. Whoever still reads the range is stopped, which is the
    // purpose.
    unsafe { rustix::mm::mprotect(start, len, MprotectFlags::empty()) }?;
    Ok(())
}
