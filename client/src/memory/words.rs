//! The 64-bit words that an arena allocates: memory of this process, or of a file that a successor
//! maps.

use postcopy_proto::page::to_usize;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use crate::uffd::memory::SharedWords;

/// The number of words in the first segment: 64 KiB.
const FIRST_SEGMENT: usize = 8192;
/// The number of segments. Each one after the first is as long as all before it together, 2^36
/// words in total.
const SEGMENTS: usize = 24;

/// The mapped file that holds a session's state. The mapping needs no descriptor of the file, so
/// that a session with nothing to do keeps none.
#[derive(Debug)]
pub(crate) struct MappedFile(SharedWords);

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// The error of mmap(2).
    pub(crate) fn map(file: impl AsFd) -> io::Result<Self> {
        Ok(Self(SharedWords::map(file)?))
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    /// Allocates memory for these words in the file system. Without it, a store raises SIGBUS if
    /// the file system is full.
    ///
    /// # Errors
    /// As [`SharedWords::reserve`].
    pub(crate) fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
        self.0.reserve(range)
    }

    /// Returns the memory of these words to the file system. They read as 0 afterwards.
    ///
    /// # Errors
    /// As [`SharedWords::give_back`].
    pub(crate) fn give_back(&self, range: &Range<usize>) -> io::Result<()> {
        self.0.give_back(range)
    }
}

/// The memory of an arena, see the module.
#[derive(Debug)]
pub(crate) enum Words {
    /// Memory of this process, mapped segment by segment on demand. Segment 0 has the words below
    /// [`FIRST_SEGMENT`]. Each other segment has the words from one power of two to the next.
    Own(Box<[OnceLock<SharedWords>; SEGMENTS]>),
    /// The words of a file, from its beginning on.
    Mapped(Arc<MappedFile>),
}

impl Words {
    /// Returns words in the memory of this process.
    pub(crate) fn own() -> Self {
        Self::Own(Box::new([const { OnceLock::new() }; SEGMENTS]))
    }

    /// Returns the largest possible number of words.
    pub(crate) fn limit(&self) -> usize {
        match self {
            Self::Own(_) => FIRST_SEGMENT << (SEGMENTS - 1),
            Self::Mapped(file) => file.words().len(),
        }
    }

    /// Ensures that these words have memory. They must lie in one segment.
    ///
    /// # Errors
    /// The error of mmap(2), or as [`SharedWords::reserve`].
    pub(crate) fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
        match self {
            Self::Mapped(file) => file.reserve(range),
            Self::Own(segments) => {
                let (index, first, len) = segment_of(range.start);
                if range.end > first + len || index >= SEGMENTS {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                if segments[index].get().is_none() {
                    // If another thread has already mapped the segment, this mapping is dropped.
                    let _ = segments[index].set(SharedWords::anonymous(len)?);
                }
                Ok(())
            }
        }
    }

    /// Returns `count` words from `at` on, which one call has reserved.
    pub(crate) fn at(&self, at: usize, count: usize) -> &[AtomicU64] {
        match self {
            Self::Mapped(file) => &file.words()[at..at + count],
            Self::Own(segments) => {
                let (index, first, _) = segment_of(at);
                let segment = segments[index].get().expect("these words were reserved");
                &segment[at - first..at - first + count]
            }
        }
    }
}

/// Returns index, first word and length of the segment that holds word `at`.
fn segment_of(at: usize) -> (usize, usize, usize) {
    match at / FIRST_SEGMENT {
        0 => (0, 0, FIRST_SEGMENT),
        quotient => {
            let index = to_usize(u64::from(quotient.ilog2()));
            let first = FIRST_SEGMENT << index;
            (index + 1, first, first)
        }
    }
}

/// A fixed number of words, zero at first: memory of this process, or the first words of a file.
#[derive(Debug)]
pub(crate) enum FixedWords {
    Own(Box<[AtomicU64]>),
    Mapped { file: Arc<MappedFile>, words: usize },
}

impl Deref for FixedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Own(words) => words,
            Self::Mapped { file, words } => &file.words()[..*words],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_follow_one_another() {
        let mut next = 0;
        for number in 0..20 {
            let (index, first, len) = segment_of(next);
            assert_eq!((index, first), (number, next));
            assert_eq!(segment_of(next + len - 1), (index, first, len));
            next += len;
        }
    }
}
