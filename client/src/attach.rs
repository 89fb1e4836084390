//! Whose memory a session fills: this process's own, which it maps itself, or another one's, of which it gets
//! the userfaultfd and is told what lies where.

use crate::image::Image;
use crate::region::RegionState;
use crate::session::SessionError;
use crate::space::Space;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A span of another process's address space that is filled from a span of an image's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignRegion {
    /// The first address, a multiple of the page size of 4 KiB.
    pub address: usize,
    /// Length in bytes, a multiple of the page size; not zero.
    pub len: usize,
    /// The file's path in the image.
    pub path: Vec<u8>,
    /// Where in the file it begins, in bytes, a multiple of the page size. The file has all of its pages.
    pub offset_bytes: u64,
}

/// Whose memory it is.
#[derive(Debug)]
pub(crate) enum Owner {
    ThisProcess,
    Another { uffd: OwnedFd, regions: Vec<ForeignRegion> },
}

/// What a pager knows of regions that were registered by their owner.
///
/// # Errors
/// [`SessionError::Region`]: the first that cannot be.
pub(crate) fn regions(
    image: &Image,
    space: &Arc<Space>,
    regions: &[ForeignRegion],
) -> Result<Vec<Arc<RegionState>>, SessionError> {
    let mut states: Vec<Arc<RegionState>> = Vec::new();
    for (index, region) in regions.iter().enumerate() {
        let ForeignRegion { address, len, .. } = *region;
        let wrong = |reason: String| SessionError::Region { index, address, len, reason };
        let end = address.checked_add(len).ok_or_else(|| wrong("its end is beyond all addresses".into()))?;
        if len == 0 || !address.is_multiple_of(PAGE_BYTES) || !len.is_multiple_of(PAGE_BYTES) {
            return Err(wrong("address and length must be multiples of 4096, the length not zero".into()));
        }
        if let Some(other) = states.iter().position(|other| !other.pages_in(&(address..end)).is_empty()) {
            return Err(wrong(format!("it overlaps region {other}")));
        }
        let path = String::from_utf8_lossy(&region.path);
        let file = image.file(&region.path).ok_or_else(|| wrong(format!("no file {path:?} of the image")))?;
        let pages = pages(region.offset_bytes, len)
            .filter(|pages| pages.end <= to_usize(file.size_bytes).div_ceil(PAGE_BYTES))
            .ok_or_else(|| {
                let (offset, size) = (region.offset_bytes, file.size_bytes);
                wrong(format!("{path:?} has {size} bytes, so not these pages from byte {offset} on"))
            })?;
        let chunk_bytes = image.root().chunk_size().bytes();
        states.push(Arc::new(RegionState::new(Arc::clone(space), address, file, pages, chunk_bytes)));
    }
    Ok(states)
}

/// The pages of a file from a byte on; None if none begins there, or there are too many.
fn pages(offset_bytes: u64, len: usize) -> Option<Range<usize>> {
    let offset = usize::try_from(offset_bytes).ok().filter(|offset| offset.is_multiple_of(PAGE_BYTES))?;
    Some(offset / PAGE_BYTES..offset.checked_add(len)? / PAGE_BYTES)
}
