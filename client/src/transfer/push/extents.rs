//! The parts of a file that were written, by FIEMAP.
//!
//! SEEK_DATA does not serve for this: it also takes pages for data that were only read (in
//! unwritten extents, or through a mapping on tmpfs), and rounds to large pages. See the kernel's
//! Documentation/filesystems/fiemap.rst.

use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;

/// Extents that one call returns.
const EXTENTS: usize = 256;
/// Write the content first.
const FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 1;
/// The place is not known yet, since the content is not written.
const EXTENT_UNKNOWN: u32 = 2;
/// Allocated and not written: reads as zeros.
const EXTENT_UNWRITTEN: u32 = 0x800;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// The number of the call: _IOWR('f', 11, a request without extents).
const FIEMAP: u32 = 0xC020_660B;

/// The reason why nothing is known of a file's parts.
#[derive(Debug)]
pub(super) enum NoExtents {
    /// The file system does not tell them.
    Unsupported,
    /// Some parts were allocated, and never written.
    Unwritten,
    /// The error of the system call.
    Io(std::io::Error),
}

/// Returns the written parts of a file of so many bytes, in ascending order, joined.
///
/// # Blocking
/// Writes the file's content to its file system.
pub(super) fn written(file: &File, size_bytes: u64) -> Result<VecDeque<Range<u64>>, NoExtents> {
    let mut found: VecDeque<Range<u64>> = VecDeque::new();
    let mut start = 0;
    while start < size_bytes {
        let mut request = Request {
            start,
            length: u64::MAX - start,
            flags: FLAG_SYNC,
            mapped_extents: 0,
            extent_count: u32::try_from(EXTENTS).expect("a small number"),
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        match ask(file, &mut request) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => return Err(NoExtents::Unsupported),
            Err(error) => return Err(NoExtents::Io(error.into())),
        }
        let extents = &request.extents[..request.mapped_extents as usize];
        for extent in extents {
            if extent.flags & EXTENT_UNWRITTEN != 0 && extent.logical < size_bytes {
                return Err(NoExtents::Unwritten);
            }
            if extent.flags & EXTENT_UNKNOWN != 0 {
                return Err(NoExtents::Unsupported);
            }
            let range = extent.logical..(extent.logical + extent.length).min(size_bytes);
            match found.back_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.end == range.start => last.end = range.end,
                _ => found.push_back(range),
            }
        }
        match extents.last() {
            Some(last) if last.flags & EXTENT_LAST == 0 => start = last.logical + last.length,
            _ => break,
        }
    }
    Ok(found)
}

#[expect(unsafe_code, reason = "an ioctl that no crate has")]
fn ask(file: &File, request: &mut Request) -> Result<(), Errno> {
    // SAFETY: this is the struct of the call with this number.
    let request = unsafe { Updater::<FIEMAP, Request>::new(request) };
    // SAFETY: the call changes the request only, which has room for as many extents as it says.
    unsafe { ioctl(file, request) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, fallocate};
    use std::os::unix::fs::FileExt;

    /// A file on the file system of the build.
    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn written_pages_are_told_however_many_and_holes_that_were_read_are_not() {
        let file = file(4096 * 4000);
        assert!(written(&file, 4096 * 4000).unwrap().is_empty());
        let mut expected = VecDeque::new();
        for page in (1..4000).step_by(3) {
            file.write_all_at(&[0; 4096], page * 4096).unwrap();
            file.read_exact_at(&mut [0; 4096], (page + 1) * 4096).unwrap();
            expected.push_back(page * 4096..(page + 1) * 4096);
        }
        assert_eq!(written(&file, 4096 * 4000).unwrap(), expected);
    }

    #[test]
    fn allocated_parts_that_nobody_has_written_are_an_error() {
        let file = file(1 << 20);
        file.write_all_at(&[1; 4096], 0).unwrap();
        fallocate(&file, FallocateFlags::empty(), 1 << 19, 4096).unwrap();
        assert!(matches!(written(&file, 1 << 20), Err(NoExtents::Unwritten)));
        // Such parts beyond the file's end do not matter.
        file.set_len(1 << 19).unwrap();
        fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 4096).unwrap();
        let found: Vec<_> =
            written(&file, 1 << 19).unwrap().into_iter().map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(0, 4096)]);
    }

    #[test]
    fn a_file_system_that_tells_nothing_is_an_error() {
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(written(&file.into(), 4096), Err(NoExtents::Unsupported)));
    }
}
