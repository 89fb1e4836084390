//! Packs as memory: the only unsafe code of the server.
//!
//! A page of a map that is not in the page cache costs a disk read when it is touched (a major fault), and
//! SIGBUS if the file was truncated or cannot be read. So nobody touches a frame before [`is_resident`] has
//! said yes, or [`populate`] has read it, which gives an error where a touch would give SIGBUS.
#![expect(unsafe_code, reason = "memory maps, mincore(2), madvise(2)")]

use bytes::Bytes;
use postcopy_proto::frame::MAX_FRAME_BYTES;
use std::ffi::c_void;
use std::fs::File;
use std::io;

/// Pages that the longest frame lies on, whatever its place: one more at each end.
const MAX_FRAME_PAGES: usize = MAX_FRAME_BYTES / 4096 + 2;

/// The file as memory that is mapped until the last slice of it is dropped.
pub(crate) fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: a pack is written under a staged name and never again after it was renamed to its own. Should
    // somebody else write to it, its bytes change (digests tell) or pages vanish (see the module's head).
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Bytes::from_owner(map))
}

/// The page-aligned range that `bytes` lie in.
fn page_range(bytes: &[u8]) -> (*mut c_void, usize, usize) {
    let page = rustix::param::page_size();
    let before = bytes.as_ptr().addr() % page;
    let start = bytes.as_ptr().wrapping_sub(before);
    (start.cast_mut().cast(), before + bytes.len(), page)
}

/// Whether all of a frame is in the page cache, so that touching it waits for no disk. Takes well under 1 us.
pub(crate) fn is_resident(frame: &[u8]) -> bool {
    let (start, len, page) = page_range(frame);
    let pages = len.div_ceil(page);
    let mut resident = [0u8; MAX_FRAME_PAGES];
    let Some(resident) = resident.get_mut(..pages) else { return false };
    // SAFETY: start is page-aligned, and `resident` has a byte for each page of the range; the range
    // itself is only asked about, not touched.
    let outcome = unsafe { libc::mincore(start, len, resident.as_mut_ptr()) };
    outcome == 0 && resident.iter().all(|page| page & 1 == 1)
}

/// Reads all of `bytes` into the page cache and maps it.
///
/// # Errors
/// EFAULT where a touch would be SIGBUS: the file is shorter than its map, or cannot be read.
///
/// # Blocking
/// Waits for the disk. See madvise(2), MADV_POPULATE_READ; Linux 5.14.
pub(crate) fn populate(bytes: &[u8]) -> io::Result<()> {
    let (start, len, _) = page_range(bytes);
    // SAFETY: populating for reading does not change what any mapping holds.
    unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxPopulateRead) }?;
    Ok(())
}
