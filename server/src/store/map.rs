//! Memory maps of packs.
//!
//! An access to a mapped page outside of the page cache costs a disk read (a major fault), or
//! SIGBUS if the file was truncated or cannot be read. So no code accesses a frame before
//! [`is_resident`] has returned true, or [`populate`] has read it, which returns an error in place
//! of SIGBUS. If the file is cut between that check and the access, [`cut`] handles it: the access
//! reads zeros, which fit no digest, and [`Map::was_cut`] returns true.
#![expect(unsafe_code, reason = "memory maps, mincore(2), madvise(2)")]

mod cut;

use bytes::Bytes;
use postcopy_proto::frame::MAX_FRAME_BYTES;
use std::ffi::c_void;
use std::fs::File;
use std::io;

/// Most pages that a frame lies on, at any offset: one more at each end.
const MAX_FRAME_PAGES: usize = MAX_FRAME_BYTES / 4096 + 2;

/// A mapped file, which stays mapped until the last slice of it is dropped.
#[derive(Debug)]
pub(crate) struct Map {
    bytes: Bytes,
    /// The watched range; `bytes` keep it from being released.
    watched: &'static cut::Span,
}

/// The owner of a map's memory, which all slices share.
struct Owner {
    watched: &'static cut::Span,
    map: memmap2::Mmap,
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // The watch ends before the memory is unmapped, because another mapping may reuse the
        // addresses.
        self.watched.release();
    }
}

impl Map {
    /// Maps the whole file.
    ///
    /// # Errors
    /// Returns the error of mmap(2) or sigaction(2).
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: a pack is written under a staged name and never again after its rename. If
        // another program writes to it, its bytes change, which digests detect, or pages vanish
        // (see the module's head).
        let map = unsafe { memmap2::Mmap::map(file) }?;
        let watched = cut::watch(map.as_ptr().addr(), map.len())?;
        Ok(Self { bytes: Bytes::from_owner(Owner { watched, map }), watched })
    }

    /// Returns the file's bytes.
    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Returns true if an access found pages missing. They read as zeros since then, whatever the
    /// file holds later.
    pub(crate) fn was_cut(&self) -> bool {
        self.watched.was_cut()
    }
}

/// Returns the page-aligned range of `bytes`.
fn page_range(bytes: &[u8]) -> (*mut c_void, usize, usize) {
    let page = rustix::param::page_size();
    let before = bytes.as_ptr().addr() % page;
    let start = bytes.as_ptr().wrapping_sub(before);
    (start.cast_mut().cast(), before + bytes.len(), page)
}

/// Returns true if all of a frame is in the page cache, so that an access waits for no disk. Takes
/// well under 1 us.
pub(crate) fn is_resident(frame: &[u8]) -> bool {
    let (start, len, page) = page_range(frame);
    let pages = len.div_ceil(page);
    let mut resident = [0u8; MAX_FRAME_PAGES];
    let Some(resident) = resident.get_mut(..pages) else { return false };
    // SAFETY: start is page-aligned, and `resident` has a byte for each page of the range.
    // mincore(2) reports on the range without accessing it.
    let outcome = unsafe { libc::mincore(start, len, resident.as_mut_ptr()) };
    outcome == 0 && resident.iter().all(|page| page & 1 == 1)
}

/// Reads all of `bytes` into the page cache and maps it.
///
/// # Errors
/// Returns EFAULT where an access would raise SIGBUS: the file is shorter than its map, or cannot
/// be read.
///
/// # Blocking
/// Waits for the disk. See madvise(2), MADV_POPULATE_READ; Linux 5.14.
pub(crate) fn populate(bytes: &[u8]) -> io::Result<()> {
    let (start, len, _) = page_range(bytes);
    // SAFETY: populating for reading does not change what any mapping holds.
    unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxPopulateRead) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_touch_beyond_the_end_of_a_cut_file_reads_zeros_and_is_told() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 3 * 4096]).unwrap();
        let (map, other) = (Map::new(&file).unwrap(), Map::new(&file).unwrap());
        let touch = |map: &Map| std::hint::black_box(map.bytes())[2 * 4096 + 5];
        assert_eq!((touch(&map), map.was_cut()), (7, false));
        file.set_len(4096).unwrap();
        assert_eq!((touch(&map), map.was_cut()), (0, true));
        assert_eq!(map.bytes()[4095], 7, "what the file still has is as it was");
        assert!(!other.was_cut(), "nobody touched it");
        drop(map);
        let new = Map::new(&file).unwrap();
        assert!(!new.was_cut(), "the dropped map's place in the list says nothing of another map");
    }

    /// SIGBUS on other addresses still kills the process, which a child of the test shows.
    #[test]
    fn other_bus_errors_still_kill() {
        if std::env::var_os("DIE_BY_SIGBUS").is_some() {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            let _watched = Map::new(&file).unwrap();
            // SAFETY: a file of the test's own, which it truncates on purpose.
            let unwatched = unsafe { memmap2::Mmap::map(&file) }.unwrap();
            file.set_len(0).unwrap();
            std::hint::black_box(std::hint::black_box(&unwatched)[0]);
            return;
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["store::map::tests::other_bus_errors_still_kill", "--exact"]).env("DIE_BY_SIGBUS", "1");
        let status = child.output().unwrap().status;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGBUS), "{status}");
    }
}
