//! Pushes of an image's changes, without its files.

use super::error::PushError;
use super::places::{Extents, OpenFile};
use super::reading::Reading;
use crate::remote::Image;
use postcopy_proto::manifest::{Entry, EntryKind, ManifestBuilder};
use postcopy_proto::page::PAGE_BYTES;
use postcopy_proto::path::ImagePath;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Reads changed pages: fills the buffer with the bytes of the file from this offset on. Several
/// threads call it. The offsets are multiples of 4096.
pub type ReadChanged = Arc<dyn Fn(&ImagePath, u64, &mut [u8]) -> io::Result<()> + Send + Sync>;

/// The changes of an image.
#[derive(Clone)]
pub struct ImageChanges {
    changed: BTreeMap<ImagePath, Vec<Range<u64>>>,
    read: ReadChanged,
}

impl std::fmt::Debug for ImageChanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageChanges").field("changed", &self.changed).finish_non_exhaustive()
    }
}

impl ImageChanges {
    /// Makes a set of changes, as yet empty, whose bytes `read` reads.
    #[must_use]
    pub fn new(read: ReadChanged) -> Self {
        Self { changed: BTreeMap::new(), read }
    }

    /// Adds a range of bytes of a file that may differ from the image. The push reads all pages
    /// that contain a part of it.
    pub fn add(&mut self, path: ImagePath, bytes: Range<u64>) {
        self.changed.entry(path).or_default().push(bytes);
    }
}

/// The entries of an image, of which some files have changed.
pub(super) struct ChangedEntries {
    image: Arc<Image>,
    next: usize,
    changed: BTreeMap<ImagePath, VecDeque<Range<u64>>>,
    read: ReadChanged,
}

impl ChangedEntries {
    pub(super) fn new(image: &Arc<Image>, changes: &ImageChanges) -> Result<Self, PushError> {
        let mut changed = BTreeMap::new();
        for (path, ranges) in &changes.changed {
            let wrong = |reason: String| PushError::Changes { path: path.clone(), reason };
            let file = image.file(path.as_bytes());
            let size = file.ok_or_else(|| wrong("the image has no such file".to_owned()))?.size_bytes;
            if let Some(range) = ranges.iter().find(|range| range.start > range.end) {
                return Err(wrong(format!("the changes from byte {} end at {}", range.start, range.end)));
            }
            if let Some(beyond) = ranges.iter().find(|range| range.end > size) {
                return Err(wrong(format!("the changes end at byte {}, and the file at {size}", beyond.end)));
            }
            changed.insert(path.clone(), whole_pages(ranges, size));
        }
        Ok(Self { image: Arc::clone(image), next: 0, changed, read: Arc::clone(&changes.read) })
    }

    /// Adds the next entry, and returns it if it is a file. Returns `None` after the last one.
    pub(super) fn next(&mut self, builder: &mut ManifestBuilder) -> Option<Option<OpenFile>> {
        let Entry { path, kind } = self.image.root().entries().get(self.next)?;
        self.next += 1;
        match kind {
            EntryKind::EmptyDirectory => builder.empty_directory(path),
            EntryKind::SymbolicLink(target) => builder.symbolic_link(path, target),
            EntryKind::File(file) => {
                builder.file(path, file.size_bytes, file.executable);
                let reading = Reading::of_memory(path.clone(), Arc::clone(&self.read));
                return Some(Some(OpenFile {
                    file: Arc::new(reading),
                    size_bytes: file.size_bytes,
                    next: 0,
                    extents: Extents::Listed(self.changed.remove(path).unwrap_or_default()),
                    base: Some(*file),
                }));
            }
        }
        Some(None)
    }
}

/// Returns the whole pages of these ranges in a file, in ascending order, joined.
fn whole_pages(ranges: &[Range<u64>], size: u64) -> VecDeque<Range<u64>> {
    const PAGE: u64 = PAGE_BYTES as u64;
    let mut ranges: Vec<_> = ranges
        .iter()
        .filter(|range| range.start < range.end)
        .map(|range| range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE).min(size))
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: VecDeque<Range<u64>> = VecDeque::new();
    for range in ranges {
        match joined.back_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push_back(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_whole_pages_within_the_file() {
        let ranges =
            [9000..9001, 0..0, 4096..5000, 20_000..20_100, 12_288..12_289, 30_000..30_001, 4000..4097];
        assert_eq!(whole_pages(&ranges, 30_100), [0..20_480, 28_672..30_100]);
        let ranges = &ranges[..4];
        assert_eq!(whole_pages(ranges, 20_100), [4096..12_288, 16_384..20_100]);
        assert_eq!(whole_pages(&[5000..5001, 30_000..30_001], 1 << 20), [4096..8192, 28_672..32_768]);
    }
}
