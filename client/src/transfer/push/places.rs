//! The places of the chunks of a push: for each chunk, which bytes of which file are read.
//!
//! Over a base, the holes of a file are as in the base's file of the same path. A chunk without
//! data then has the base's digest and is not read. Of a chunk with some data, only these pages are
//! read.

use super::changes::ChangedEntries;
use super::error::PushError;
use super::extents::{self, NoExtents};
use super::reading::Reading;
use super::sources::{FileState, Source, SourceKind, file_error};
use crate::remote::{Content, Image};
use postcopy_proto::MAX_FIND_MISSING;
use postcopy_proto::manifest::{ChunkContent, FileEntry, ManifestBuilder};
use postcopy_proto::page::{ChunkIndex, ChunkSize, PAGE_BYTES, PageRun};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

/// Plain bytes of a batch, which is read, hashed and compressed together. Three batches are in
/// memory at a time.
const BATCH_BYTES: usize = 16 << 20;
/// Most files of a batch. Three batches hold their files open at most, below the usual limit of
/// 1,024.
const BATCH_FILES: usize = 128;
const PAGE: u64 = PAGE_BYTES as u64;

/// The place of a chunk in a file.
pub(super) struct Place {
    pub(super) file: Arc<Reading>,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) part: Part,
}

/// The part of a chunk that is read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    All,
    /// These pages; the others are those of a chunk of the base.
    Pages(Vec<PageRun>, ChunkContent),
    /// Nothing: a hole, or a chunk of the base.
    Nothing(ChunkContent),
}

/// The entries of a push.
pub(super) enum Entries {
    Files(std::vec::IntoIter<Source>),
    Changed(ChangedEntries),
}

/// The places of the chunks of all entries, in order.
pub(super) struct Places {
    pub(super) chunk_size: ChunkSize,
    pub(super) base: Option<Arc<Image>>,
    pub(super) entries: Entries,
    pub(super) current: Option<OpenFile>,
}

impl Places {
    /// Returns the next chunks, at most a batch, and adds the entries that they belong to.
    pub(super) fn batch(&mut self, builder: &mut ManifestBuilder) -> Result<Vec<Place>, PushError> {
        let (mut places, mut data_bytes, mut files) = (Vec::new(), 0, 0);
        // Holes cost no reading, but the second bound covers them, too.
        while data_bytes < BATCH_BYTES && places.len() < MAX_FIND_MISSING {
            let Some(file) = &mut self.current else {
                if files >= BATCH_FILES && !places.is_empty() {
                    break;
                }
                let Some(opened) = self.next_entry(builder)? else { break };
                files += usize::from(opened.is_some());
                self.current = opened;
                continue;
            };
            let Some(place) = file.next_place(self.chunk_size, self.base.as_deref())? else {
                self.current = None;
                continue;
            };
            data_bytes += place.read_bytes();
            places.push(place);
        }
        Ok(places)
    }

    /// Adds the next entry, and opens it if it is a file. Returns `None` after the last one.
    fn next_entry(&mut self, builder: &mut ManifestBuilder) -> Result<Option<Option<OpenFile>>, PushError> {
        match &mut self.entries {
            Entries::Files(sources) => {
                let Some(source) = sources.next() else { return Ok(None) };
                let base = self.base.as_ref().and_then(|base| base.file(source.path.as_bytes()));
                open(&source, base, builder).map(Some)
            }
            Entries::Changed(entries) => Ok(entries.next(builder)),
        }
    }
}

impl Place {
    /// Returns the number of bytes that are kept of the chunk.
    pub(super) fn read_bytes(&self) -> usize {
        match &self.part {
            Part::All | Part::Pages(_, ChunkContent::Zero) => self.len,
            Part::Pages(runs, ChunkContent::Data(_)) => {
                runs.iter().map(|run| run.end_byte().min(self.len) - run.start_byte()).sum()
            }
            Part::Nothing(_) => 0,
        }
    }
}

/// Adds an entry. Returns a file with its counterpart in the base.
pub(super) fn open(
    source: &Source,
    base: Option<FileEntry>,
    builder: &mut ManifestBuilder,
) -> Result<Option<OpenFile>, PushError> {
    let directory = &source.root.directory;
    let error = |e| file_error(&source.from())(e);
    match source.kind {
        SourceKind::EmptyDirectory => builder.empty_directory(&source.path),
        SourceKind::SymbolicLink => {
            builder.symbolic_link(&source.path, &directory.link(&source.below).map_err(error)?);
        }
        SourceKind::File { state, executable } => {
            let size_bytes = state.size_bytes;
            builder.file(&source.path, size_bytes, executable);
            let file = directory.file(&source.below).map_err(error)?;
            let path = source.from();
            let (state, extents) = match base {
                Some(_) => written_parts(&file, &path, state)?,
                None => (state, Extents::Found(0..0)),
            };
            let reading = Reading::of_file(file, path, state);
            reading.ensure_unchanged()?;
            let file = reading.file().expect("made of a file");
            // Files of /proc and the like have content, but no size.
            if size_bytes == 0 && file.read_at(&mut [0], 0).map_err(error)? > 0 {
                return Err(PushError::NoSize(reading.path));
            }
            let opened = OpenFile { file: Arc::new(reading), size_bytes, next: 0, extents, base };
            return Ok(Some(opened));
        }
    }
    Ok(None)
}

/// Returns the parts of a file that were written, and the state of the file. To find them, the
/// content is written to the file system, which may set the time of modification.
fn written_parts(file: &File, path: &Path, before: FileState) -> Result<(FileState, Extents), PushError> {
    let io_error = |e| file_error(path)(e);
    let wrong = |reason: &str| PushError::Holes { path: path.to_owned(), reason: reason.to_owned() };
    let extents = extents::written(file, before.size_bytes).map_err(|error| match error {
        NoExtents::Unsupported => wrong("its file system does not tell which parts were written"),
        NoExtents::Unwritten => wrong("some of its parts were allocated, and never written"),
        NoExtents::Io(error) => io_error(error),
    })?;
    let metadata = file.metadata().map_err(io_error)?;
    let state = FileState::of(&metadata);
    if !state.is_same_file(&before) {
        return Err(PushError::Changed(path.to_owned()));
    }
    let has_holes = before.size_bytes > 0 && extents.front() != Some(&(0..before.size_bytes));
    if metadata.blksize() > PAGE && has_holes {
        return Err(wrong(&format!("its file system keeps blocks of {} bytes", metadata.blksize())));
    }
    Ok((state, Extents::Listed(extents)))
}

/// A file whose chunks are told one after another.
pub(super) struct OpenFile {
    pub(super) file: Arc<Reading>,
    pub(super) size_bytes: u64,
    pub(super) next: u64,
    pub(super) extents: Extents,
    /// The file of the same path in the base.
    pub(super) base: Option<FileEntry>,
}

/// The parts of a file that are read.
pub(super) enum Extents {
    /// Those with data, as the file system tells; this one was found last.
    Found(Range<u64>),
    /// These, in ascending order.
    Listed(std::collections::VecDeque<Range<u64>>),
}

impl OpenFile {
    pub(super) fn next_place(
        &mut self,
        chunk_size: ChunkSize,
        base: Option<&Image>,
    ) -> Result<Option<Place>, PushError> {
        let offset = self.next;
        if offset >= self.size_bytes {
            return Ok(None);
        }
        let len = chunk_size.chunk_len(self.size_bytes, offset / chunk_size.bytes() as u64);
        self.next += len as u64;
        let data = self.data_in(offset..self.next);
        let is_all = data.first().is_some_and(|run| *run == (offset..self.next));
        let part = match (base, &self.base) {
            _ if is_all => Part::All,
            (Some(base), Some(file)) => {
                let content = self.content_in(base, file, offset, len)?;
                match data.is_empty() {
                    true => Part::Nothing(content),
                    false => Part::Pages(self.pages(&data, offset)?, content),
                }
            }
            _ if data.is_empty() => Part::Nothing(ChunkContent::Zero),
            _ => Part::All,
        };
        Ok(Some(Place { file: Arc::clone(&self.file), offset, len, part }))
    }

    /// Returns the parts of a range that hold data, joined where they are adjacent.
    fn data_in(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let data = self.data_after(at);
            let (start, end) = (data.start.max(at), data.end.min(range.end));
            if start >= range.end {
                break;
            }
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(start..end),
            }
            at = end;
        }
        found
    }

    /// Returns the first extent of data that ends after `offset`.
    fn data_after(&mut self, offset: u64) -> Range<u64> {
        match &mut self.extents {
            Extents::Found(data) => {
                if data.end <= offset {
                    *data = self.file.file().map_or(u64::MAX..u64::MAX, |file| next_data(file, offset));
                }
                data.clone()
            }
            Extents::Listed(extents) => {
                while extents.front().is_some_and(|extent| extent.end <= offset) {
                    extents.pop_front();
                }
                extents.front().cloned().unwrap_or(u64::MAX..u64::MAX)
            }
        }
    }

    /// Returns the content of a chunk in the base's file; zeros beyond its end.
    fn content_in(
        &self,
        base: &Image,
        file: &FileEntry,
        offset: u64,
        len: usize,
    ) -> Result<ChunkContent, PushError> {
        let chunk_size = base.root().chunk_size();
        let index = offset / chunk_size.bytes() as u64;
        let base_len = chunk_size.chunk_len(file.size_bytes, index);
        let content = match base_len {
            0 => Content::Zero,
            _ => base.content(ChunkIndex(file.first_chunk.0 + index)),
        };
        match content {
            Content::Zero => Ok(ChunkContent::Zero),
            Content::Data(digest) if base_len == len => Ok(ChunkContent::Data(digest)),
            Content::Data(_) => Err(PushError::BaseSize {
                path: self.file.path.clone(),
                actual: self.size_bytes,
                base: file.size_bytes,
                offset,
            }),
            Content::SegmentMissing(_) | Content::OutOfRange => {
                unreachable!("all segments of the base are here, and it has this chunk")
            }
        }
    }

    /// Returns the pages of a chunk with data.
    fn pages(&self, data: &[Range<u64>], offset: u64) -> Result<Vec<PageRun>, PushError> {
        let page = |byte: u64| u16::try_from((byte - offset) / PAGE).expect("a chunk has at most 512 pages");
        let run = |extent: &Range<u64>| {
            let is_whole = extent.start.is_multiple_of(PAGE)
                && (extent.end.is_multiple_of(PAGE) || extent.end >= self.size_bytes);
            if !is_whole {
                let reason = "its file system has extents that are no whole pages of 4 KiB".to_owned();
                return Err(PushError::Holes { path: self.file.path.clone(), reason });
            }
            let first = page(extent.start);
            Ok(PageRun { first, count: page(extent.end.next_multiple_of(PAGE)) - first })
        };
        data.iter().map(run).collect()
    }
}

/// Returns the next extent of data of a file; all that follows if the file system cannot tell.
fn next_data(file: &File, offset: u64) -> Range<u64> {
    use rustix::fs::{SeekFrom, seek};
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start..seek(file, SeekFrom::Hole(start)).unwrap_or(u64::MAX).max(start + 1),
        // No data up to the end. If the file was cut, its state has changed, which is looked at
        // after each batch.
        Err(rustix::io::Errno::NXIO) => u64::MAX..u64::MAX,
        Err(_) => offset..u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::super::encoding::Encoders;
    use super::super::reading::read_batch;
    use super::super::sources::collect;
    use super::*;
    use rustix::fs::FileType;

    #[test]
    fn a_file_that_changes_between_its_first_and_its_last_byte_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let change: [(&str, &dyn Fn()); 3] = [
            ("its content", &|| {
                std::fs::File::options().write(true).open(&file).unwrap().write_all_at(b"B", 3).unwrap()
            }),
            ("its end", &|| {
                std::fs::File::options().write(true).open(&file).unwrap().set_len(200_000).unwrap()
            }),
            ("its time", &|| {
                let times = std::fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
                std::fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
            }),
        ];
        for (what, change) in change {
            std::fs::write(&file, vec![b'A'; 100_000]).unwrap();
            let builder = &mut ManifestBuilder::new(ChunkSize::DEFAULT);
            let entries = Entries::Files(collect(&file).unwrap().into_iter());
            let mut places = Places { chunk_size: ChunkSize::DEFAULT, base: None, entries, current: None };
            let opened = places.next_entry(builder).unwrap().unwrap();
            let read = || {
                let OpenFile { file, size_bytes, .. } = opened.as_ref().unwrap();
                let extents = Extents::Found(0..0);
                let current = OpenFile {
                    file: Arc::clone(file),
                    size_bytes: *size_bytes,
                    next: 0,
                    extents,
                    base: None,
                };
                let entries = Entries::Files(Vec::new().into_iter());
                let mut places =
                    Places { chunk_size: ChunkSize::DEFAULT, base: None, entries, current: Some(current) };
                let batch = places.batch(&mut ManifestBuilder::new(ChunkSize::DEFAULT)).unwrap();
                read_batch(batch, Vec::new(), &Encoders::new(3))
            };
            assert!(read().is_ok());
            // The kernel's clock for files ticks every few milliseconds.
            std::thread::park_timeout(std::time::Duration::from_millis(20));
            change();
            let Err(error) = read() else { panic!("{what}") };
            assert!(error.to_string().contains("file changed while it was read"), "{what}: {error}");
        }
    }

    #[test]
    fn a_file_without_a_size_that_has_content_is_an_error() {
        let sources = collect(std::path::Path::new("/proc/cpuinfo")).unwrap();
        let Err(error) = open(&sources[0], None, &mut ManifestBuilder::new(ChunkSize::DEFAULT)) else {
            panic!("it was opened")
        };
        assert!(error.to_string().contains("/proc/cpuinfo has content"), "{error}");
    }

    #[test]
    fn a_file_that_is_replaced_before_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (root, secret) = (folder.path().join("root"), folder.path().join("secret"));
        let file = root.join("in/file");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(&secret, "secret").unwrap();
        let replace: [(&str, &dyn Fn()); 4] = [
            ("link", &|| std::os::unix::fs::symlink(&secret, &file).unwrap()),
            ("file", &|| std::fs::hard_link(&secret, &file).unwrap()),
            ("fifo", &|| {
                let mode = rustix::fs::Mode::RUSR;
                rustix::fs::mknodat(rustix::fs::CWD, &file, FileType::Fifo, mode, 0).unwrap();
            }),
            ("directory", &|| {
                std::fs::rename(root.join("in"), root.join("was")).unwrap();
                std::fs::rename(&secret, folder.path().join("file")).unwrap();
                std::os::unix::fs::symlink(folder.path(), root.join("in")).unwrap();
            }),
        ];
        for (what, replace) in replace {
            let _ = std::fs::remove_file(&file);
            std::fs::write(&file, "public").unwrap();
            let sources = collect(&root).unwrap();
            std::fs::rename(&file, root.join("old")).unwrap();
            replace();
            let opened = open(&sources[0], None, &mut ManifestBuilder::new(ChunkSize::DEFAULT));
            assert!(opened.is_err(), "a {what}");
            std::fs::remove_file(root.join("old")).unwrap();
        }
    }
}
