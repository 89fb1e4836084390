//! Words of 64 bits that an arena hands out: memory of this process, or a file that a successor maps.

use postcopy_proto::page::to_usize;
use rustix::fs::FallocateFlags;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use crate::uffd::memory::SharedWords;

/// Words of the first segment: 64 KiB.
const FIRST_SEGMENT: usize = 8192;
/// Each segment but the first two is as long as all before it together: 2^36 words at most.
const SEGMENTS: usize = 24;

/// A file that a session's state lies in, mapped.
#[derive(Debug)]
pub(crate) struct MappedFile {
    words: SharedWords,
    file: OwnedFd,
}

impl MappedFile {
    /// Maps all of a file.
    ///
    /// # Errors
    /// The error of mmap(2) or fcntl(2).
    pub(crate) fn map(file: impl AsFd) -> io::Result<Self> {
        let words = SharedWords::map(&file)?;
        Ok(Self { words, file: file.as_fd().try_clone_to_owned()? })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    /// Has the file system allocate memory for these words: a store to words without memory is SIGBUS where the file
    /// system is full.
    ///
    /// # Errors
    /// The error of fallocate(2).
    pub(crate) fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), range)
    }

    /// Gives the memory of these words back; they read as 0 afterwards.
    ///
    /// # Errors
    /// The error of fallocate(2).
    pub(crate) fn give_back(&self, range: &Range<usize>) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
    }

    fn fallocate(&self, flags: FallocateFlags, range: &Range<usize>) -> io::Result<()> {
        let bytes = |words: usize| (words * size_of::<u64>()) as u64;
        let (start, len) = (bytes(range.start), bytes(range.len()));
        if len == 0 {
            return Ok(());
        }
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, start, len))?)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) enum Words {
    /// Mapped segment by segment, as more is used. Segment 0 has the words below [`FIRST_SEGMENT`]; each other one has
    /// those from a power of two to the next.
    Own(Box<[OnceLock<SharedWords>; SEGMENTS]>),
    /// From the beginning of a file.
    Mapped(Arc<MappedFile>),
}

impl Words {
    /// Words of this process's own.
    pub(crate) fn own() -> Self {
        Self::Own(Box::new([const { OnceLock::new() }; SEGMENTS]))
    }

    /// How many words there can be.
    pub(crate) fn limit(&self) -> usize {
        match self {
            Self::Own(_) => FIRST_SEGMENT << (SEGMENTS - 1),
            Self::Mapped(file) => file.words().len(),
        }
    }

    /// Makes sure that these words have memory. They lie in one segment.
    ///
    /// # Errors
    /// The error of mmap(2) or fallocate(2).
    pub(crate) fn reserve(&self, range: &Range<usize>) -> io::Result<()> {
        match self {
            Self::Mapped(file) => file.reserve(range),
            Self::Own(segments) => {
                let (index, first, len) = segment_of(range.start);
                if range.end > first + len || index >= SEGMENTS {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                if segments[index].get().is_none() {
                    // Another thread may have been faster; then this mapping is dropped.
                    let _ = segments[index].set(SharedWords::anonymous(len)?);
                }
                Ok(())
            }
        }
    }

    /// `count` words from `at` on, which were reserved together.
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

/// Number, first word and length of the segment that a word lies in.
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

/// Words of a fixed number, zero at first: this process's own, or the first ones of a file.
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
