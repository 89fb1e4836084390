//! Pages and chunks, the units of memory and files.

use std::fmt;

/// Bytes of a page: 4 KiB of a file, whatever the host's page size.
pub const PAGE_BYTES: usize = 4096;

/// Most pages of a chunk: 512.
pub const MAX_PAGES_PER_CHUNK: usize = ChunkSize::MAX.bytes() / PAGE_BYTES;

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

const _: () = assert!(usize::BITS == 64, "postcopy is for 64-bit targets");

/// Converts `n` to an index. It always fits, because postcopy is for 64-bit targets only.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, as asserted above")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// Returns true if `bytes` are all zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE_BYTES).all(|part| part == &ZEROS[..part.len()])
}

/// Size of a chunk in bytes: a power of two from 4 KiB to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(u32);

/// A number that is no chunk size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("chunk size {0}: not a power of two from 4096 to 2097152 bytes")]
pub struct ChunkSizeError(pub u64);

impl ChunkSize {
    /// 4 KiB, one page.
    pub const MIN: Self = Self(4 << 10);
    /// 64 KiB, the size for images that state no other.
    pub const DEFAULT: Self = Self(64 << 10);
    /// 2 MiB, one huge page.
    pub const MAX: Self = Self(2 << 20);

    /// Returns the chunk size of this many bytes.
    ///
    /// # Errors
    /// Returns [`ChunkSizeError`] unless `bytes` is a power of two from 4 KiB to 2 MiB.
    pub fn new(bytes: u64) -> Result<Self, ChunkSizeError> {
        match u32::try_from(bytes) {
            Ok(n) if n.is_power_of_two() && (Self::MIN.0..=Self::MAX.0).contains(&n) => Ok(Self(n)),
            _ => Err(ChunkSizeError(bytes)),
        }
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.0 as usize
    }

    /// Returns the size in bytes, in the type of messages.
    #[must_use]
    pub const fn bytes_u32(self) -> u32 {
        self.0
    }

    /// Returns the number of chunks of a file of `size_bytes`; the last one may be shorter.
    #[must_use]
    pub const fn chunks_of(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.0 as u64)
    }

    /// Returns the length in bytes of chunk `index` of a file of `size_bytes`; 0 beyond its end.
    #[must_use]
    pub fn chunk_len(self, size_bytes: u64, index: u64) -> usize {
        let start = index.saturating_mul(u64::from(self.0));
        to_usize(size_bytes.saturating_sub(start).min(u64::from(self.0)))
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 20 => write!(f, "{} MiB", n >> 20),
            n => write!(f, "{} KiB", n >> 10),
        }
    }
}

/// Number of a chunk, counted over all files of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(pub u64);

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Neighbouring pages of one chunk, counted from the chunk's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page: 0 to 511.
    pub first: u16,
    /// Number of pages: 1 to 512.
    pub count: u16,
}

impl PageRun {
    /// Returns the first byte of the run, counted from the chunk's beginning.
    #[must_use]
    pub const fn start_byte(self) -> usize {
        self.first as usize * PAGE_BYTES
    }

    /// Returns the byte after the run's last page, with that page counted as whole.
    #[must_use]
    pub const fn end_byte(self) -> usize {
        self.end_page() * PAGE_BYTES
    }

    /// Returns the page after the run.
    #[must_use]
    pub const fn end_page(self) -> usize {
        self.first as usize + self.count as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_are_powers_of_two_in_range() {
        for good in [4096, 65536, 2 << 20] {
            assert_eq!(ChunkSize::new(good).unwrap().bytes() as u64, good);
        }
        for bad in [0, 1, 2048, 4097, 12288, 4 << 20, u64::MAX, 1 << 32] {
            assert_eq!(ChunkSize::new(bad), Err(ChunkSizeError(bad)));
        }
    }

    #[test]
    fn last_chunk_is_not_padded() {
        let size = ChunkSize::MIN;
        assert_eq!(size.chunks_of(4097), 2);
        assert_eq!(size.chunk_len(4097, 0), 4096);
        assert_eq!(size.chunk_len(4097, 1), 1);
        assert_eq!(size.chunk_len(4097, 2), 0);
        assert_eq!(size.chunk_len(4097, u64::MAX), 0);
    }
}
