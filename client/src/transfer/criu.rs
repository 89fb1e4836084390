//! The files of CRIU's images, as far as a push tells them from others.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The number that images begin with since CRIU 2.0, before their own.
pub const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
/// The number of pagemap-*.img.
pub const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// The number of inventory.img.
pub const INVENTORY_MAGIC: u32 = 0x5831_3116;

/// Returns whether a file begins with one of CRIU's magic numbers, in the machine's byte order.
#[must_use]
pub fn is_image(file: &File) -> bool {
    let mut magic = [0; 4];
    let read = file.read_exact_at(&mut magic, 0);
    read.is_ok() && [IMG_COMMON_MAGIC, PAGEMAP_MAGIC, INVENTORY_MAGIC].contains(&u32::from_ne_bytes(magic))
}
