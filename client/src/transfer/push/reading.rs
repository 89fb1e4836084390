//! Reads the files of a push, in batches of chunks, on all cores.

use super::PushError;
use super::sources::{FileState, Source, SourceKind, file_error};
use postcopy_proto::MAX_FIND_MISSING;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, ManifestBuilder};
use postcopy_proto::page::{ChunkSize, is_zero};
use rayon::prelude::*;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::task::JoinHandle;

/// Plain bytes of a batch, which is read, hashed and compressed together. Three batches are in
/// memory at a time.
const BATCH_BYTES: usize = 16 << 20;
/// Most files of a batch. Three batches hold their files open at most, below the usual limit of
/// 1,024.
const BATCH_FILES: usize = 128;

/// A batch of chunks that were read together.
pub(super) struct Batch {
    pub(super) chunks: Vec<Chunk>,
    /// The plain bytes of all chunks except holes, one after another. Batches reuse the buffer,
    /// because fresh memory costs more than reading into it.
    pub(super) bytes: Vec<u8>,
}

/// A chunk that has been read.
pub(super) struct Chunk {
    pub(super) content: ChunkContent,
    pub(super) len: usize,
    /// The chunk's place in the bytes of the batch; empty for a hole.
    pub(super) bytes: Range<usize>,
}

/// A chunk to send: its digest, and its place in the bytes of the batch.
pub(super) type NewChunk = (Digest, Range<usize>);

/// A file that is being read.
pub(super) struct Reading {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// The state of the file before the first byte was read.
    pub(super) state: FileState,
}

impl Reading {
    /// Checks that the file is as it was before the first byte was read.
    fn ensure_unchanged(&self) -> Result<(), PushError> {
        let metadata = self.file.metadata().map_err(file_error(&self.path))?;
        match FileState::of(&metadata) == self.state {
            true => Ok(()),
            false => Err(PushError::Changed(self.path.clone())),
        }
    }
}

/// The place of a chunk in a file.
pub(super) struct Place {
    pub(super) file: Arc<Reading>,
    pub(super) offset: u64,
    pub(super) len: usize,
    /// True for a hole of the file: the chunk is zeros, and is not read.
    pub(super) hole: bool,
}

/// The places of the chunks of all files, in order.
pub(super) struct Places {
    pub(super) chunk_size: ChunkSize,
    pub(super) sources: std::vec::IntoIter<Source>,
    pub(super) current: Option<OpenFile>,
}

pub(super) struct OpenFile {
    pub(super) file: Arc<Reading>,
    pub(super) size_bytes: u64,
    pub(super) next: u64,
    /// The extent of data that was found last.
    pub(super) data: Range<u64>,
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
                let Some(source) = self.sources.next() else { break };
                self.current = open(&source, builder)?;
                files += usize::from(self.current.is_some());
                continue;
            };
            let Some(place) = file.next_place(self.chunk_size) else {
                self.current = None;
                continue;
            };
            data_bytes += if place.hole { 0 } else { place.len };
            places.push(place);
        }
        Ok(places)
    }
}

pub(super) fn open(source: &Source, builder: &mut ManifestBuilder) -> Result<Option<OpenFile>, PushError> {
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
            let file = Reading { file, path: source.from(), state };
            file.ensure_unchanged()?;
            // Files of /proc and the like have content, but no size.
            if size_bytes == 0 && file.file.read_at(&mut [0], 0).map_err(error)? > 0 {
                return Err(PushError::NoSize(file.path));
            }
            return Ok(Some(OpenFile { file: Arc::new(file), size_bytes, next: 0, data: 0..0 }));
        }
    }
    Ok(None)
}

impl OpenFile {
    pub(super) fn next_place(&mut self, chunk_size: ChunkSize) -> Option<Place> {
        let offset = self.next;
        if offset >= self.size_bytes {
            return None;
        }
        let len = chunk_size.chunk_len(self.size_bytes, offset / chunk_size.bytes() as u64);
        self.next += len as u64;
        if self.data.end <= offset {
            self.data = self.data_after(offset);
        }
        let hole = self.data.start >= self.next;
        Some(Place { file: Arc::clone(&self.file), offset, len, hole })
    }

    /// Returns the next extent of data; the rest of the file if the file system cannot tell.
    pub(super) fn data_after(&self, offset: u64) -> Range<u64> {
        use rustix::fs::{SeekFrom, seek};
        match seek(&self.file.file, SeekFrom::Data(offset)) {
            Ok(start) => {
                start..seek(&self.file.file, SeekFrom::Hole(start)).unwrap_or(u64::MAX).max(start + 1)
            }
            // ENXIO: no data up to the end. The file may have been cut; reading its last byte shows
            // that.
            Err(rustix::io::Errno::NXIO) => self.size_bytes - 1..u64::MAX,
            Err(_) => offset..u64::MAX,
        }
    }
}

pub(super) fn spawn_read(places: Vec<Place>, buffer: Vec<u8>) -> JoinHandle<Result<Batch, PushError>> {
    tokio::task::spawn_blocking(move || read_batch(&places, buffer))
}

pub(super) fn read_batch(places: &[Place], mut buffer: Vec<u8>) -> Result<Batch, PushError> {
    let bytes_of = |place: &Place| if place.hole { 0 } else { place.len };
    buffer.resize(places.iter().map(bytes_of).sum(), 0);
    let (mut rest, mut end) = (&mut buffer[..], 0);
    let mut parts = Vec::with_capacity(places.len());
    for place in places {
        let (part, after) = rest.split_at_mut(bytes_of(place));
        rest = after;
        let start = end;
        end += part.len();
        parts.push((place, part, start..end));
    }
    let read = |(place, part, bytes)| read(place, part, bytes);
    let chunks = parts.into_par_iter().map(read).collect::<Result<_, _>>()?;
    // A writer may have changed a file between two of its chunks, so the batch is not the file.
    let ends = places.chunk_by(|a, b| Arc::ptr_eq(&a.file, &b.file));
    ends.filter_map(<[Place]>::first).try_for_each(|place| place.file.ensure_unchanged())?;
    Ok(Batch { chunks, bytes: buffer })
}

/// Reads a chunk into `buffer`, which is the range `bytes` of the batch.
pub(super) fn read(place: &Place, buffer: &mut [u8], bytes: Range<usize>) -> Result<Chunk, PushError> {
    let Reading { file, path, .. } = &*place.file;
    if !place.hole {
        file.read_exact_at(buffer, place.offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => PushError::Changed(path.clone()),
            _ => PushError::File { path: path.clone(), source },
        })?;
    }
    let zero = place.hole || is_zero(buffer);
    let content = if zero { ChunkContent::Zero } else { ChunkContent::Data(Digest::of(buffer)) };
    Ok(Chunk { content, len: place.len, bytes })
}

#[cfg(test)]
mod tests {
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
            let sources = collect(&file).unwrap().into_iter();
            let mut places = Places { chunk_size: ChunkSize::DEFAULT, sources, current: None };
            let batch = places.batch(builder).unwrap();
            assert!(read_batch(&batch, Vec::new()).is_ok());
            // The kernel's clock for files ticks every few milliseconds.
            std::thread::park_timeout(std::time::Duration::from_millis(20));
            change();
            let Err(error) = read_batch(&batch, Vec::new()) else { panic!("{what}") };
            assert!(error.to_string().contains("file changed while it was read"), "{what}: {error}");
        }
    }

    #[test]
    fn a_file_without_a_size_that_has_content_is_an_error() {
        let sources = collect(std::path::Path::new("/proc/cpuinfo")).unwrap();
        let Err(error) = open(&sources[0], &mut ManifestBuilder::new(ChunkSize::DEFAULT)) else {
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
            let opened = open(&sources[0], &mut ManifestBuilder::new(ChunkSize::DEFAULT));
            assert!(opened.is_err(), "a {what}");
            std::fs::remove_file(root.join("old")).unwrap();
        }
    }
}
