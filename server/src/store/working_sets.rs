//! Working sets: recordings of the page faults of restores, and the packs of pages that are
//! prefetched.
//!
//! ```text
//! <domain>/working-sets/<image>/recordings/<id>   an encoded RecordRequest
//! <domain>/working-sets/<image>/sets/<digest>     packs of frames
//! <domain>/working-sets/<image>/current           the digests of the packs to send, one a line
//! ```
//!
//! [`Store::keep_recording`], in [`recordings`], writes a recording. [`Store::build_working_set`]
//! builds the set anew from all recordings: [`choose`] selects the pages, and the code here reads
//! their chunks as a client would and puts them into frames with proofs. `current` is replaced
//! atomically, so a reader finds one complete set or the other. A set belongs to its image, and is
//! removed when the image is collected as garbage.

mod choose;
mod recordings;

pub use recordings::RecordingOf;

use crate::store::error::{StoreError, damaged};
use crate::store::layout::digest_of_name;
use crate::store::lock::StoreLock;
use crate::store::objects::{Entry, Objects};
use crate::store::{Store, StoredChunk, StoredRoot};
use bytes::Bytes;
use choose::Page;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::manifest::{FileEntry, Root, chunk_len};
use postcopy_proto::pack::{SetPackBuilder, set_frames};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, PageRun, is_zero};
use postcopy_proto::proof::Leaves;
use postcopy_proto::set_frame::{SetChunk, SetEncoder, SetFrame};
use postcopy_proto::v1::PageSpan;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Most pages of a frame: 256 KiB, or one longer chunk.
const FRAME_PAGES: usize = 64;
/// Attempts to read a set that is being replaced.
const ATTEMPTS: usize = 3;
/// Compression level of zstd: a set is made once and sent often.
const LEVEL: i32 = 9;
/// Frames that are encoded together: up to 32 MiB of pages in memory. A chunk whose pages lie in
/// several windows is read and decoded for each.
const WINDOW_FRAMES: usize = 128;
/// Most pages of a set: 1 GiB. Restores that fault on more gain little from a larger set.
const MAX_SET_PAGES: usize = (1 << 30) / PAGE_BYTES;
/// Most packs of a set.
const MAX_PACKS: usize = 64;
/// Bytes of the packs of working sets of a bucket that stay in memory.
pub(super) const KEPT_BYTES: usize = 128 << 20;
/// Age from which a pack of a bucket that the current set does not name is removed: longer than the
/// build of a set takes.
const MIN_PACK_AGE: Duration = Duration::from_secs(3600);

/// A working set, ready to be sent.
#[derive(Clone, Debug, Default)]
pub struct WorkingSet {
    /// Number of the image's recordings.
    pub recordings: usize,
    /// The frames in order, as slices of the packs' maps.
    pub frames: Vec<Bytes>,
    /// Number of pages.
    pub pages: u64,
    /// Number of these pages that are zero.
    pub zero_pages: u64,
}

impl WorkingSet {
    /// Returns the bytes of all frames.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }

    /// Returns the pages, in the order of the frames.
    pub fn spans(&self) -> impl Iterator<Item = PageSpan> {
        let frames = self.frames.iter().filter_map(|frame| SetFrame::parse(frame).ok());
        frames.flat_map(|frame| {
            frame.runs().map(|run| PageSpan { file: run.file, first: run.first, count: run.count.into() })
        })
    }
}

fn object(image: &Digest) -> String {
    format!("the working set of image {image}")
}

/// Returns a directory's objects whose names are digests, the oldest first. Returns none if there is
/// no such directory.
fn by_age(objects: &Objects, dir: &Path) -> Result<Vec<Entry>, StoreError> {
    let mut entries = objects.entries_if_any(dir)?;
    entries.retain(|entry| digest_of_name(&entry.name).is_some());
    entries.sort_unstable_by(|a, b| (a.written, &a.name).cmp(&(b.written, &b.name)));
    Ok(entries)
}

/// The places of the pages of an image's files.
struct Files {
    root: Arc<StoredRoot>,
    files: Vec<FileEntry>,
}

impl Files {
    fn new(root: Arc<StoredRoot>) -> Self {
        let files = root.files().map(|(_, file)| *file).collect();
        Self { root, files }
    }

    /// Checks that a span lies in a file of the image.
    fn check(&self, span: &PageSpan) -> Result<(), StoreError> {
        let pages =
            self.files.get(span.file as usize).map(|file| file.size_bytes.div_ceil(PAGE_BYTES as u64));
        let end = u64::from(span.first) + u64::from(span.count);
        if span.count > 0 && pages.is_some_and(|pages| end <= pages.min(u32::MAX.into())) {
            return Ok(());
        }
        let reason = match pages {
            None => format!("the image has {} files", self.files.len()),
            Some(pages) => format!("the file has {pages} pages"),
        };
        let object = format!("file {}, page {}, {} pages", span.file, span.first, span.count);
        Err(StoreError::Invalid { object, reason })
    }

    /// Returns the chunk of a page, the page of the file at which the chunk begins, and the page's
    /// number in the chunk.
    fn chunk_of(&self, (file, page): Page) -> (ChunkIndex, u32, u16) {
        let chunk_pages = u32::try_from(self.root.chunk_size().bytes() / PAGE_BYTES).expect("at most 512");
        let entry = &self.files[file as usize];
        let chunk = ChunkIndex(entry.first_chunk.0 + u64::from(page / chunk_pages));
        let in_chunk = u16::try_from(page % chunk_pages).expect("less than 512");
        (chunk, page - page % chunk_pages, in_chunk)
    }

    /// Returns the number of pages of a page's chunk.
    fn pages_of_chunk(&self, page: Page) -> usize {
        let len = chunk_len(self.root.chunk_size(), &self.files[page.0 as usize], self.chunk_of(page).0);
        len.expect("checked: a page of the file").div_ceil(PAGE_BYTES)
    }
}

/// The pages of a chunk that frames will hold.
struct Wanted {
    chunk: ChunkIndex,
    file: u32,
    /// The page of the file at which the chunk begins.
    first_page: u32,
    /// The pages of the chunk, each with the number of its frame, ascending.
    pages: Vec<(usize, u16)>,
}

impl Store {
    /// Builds the image's working set anew from its recordings. It holds the pages that faulted in
    /// at least `share` (0 to 1) of the recordings that could show it. Without recordings there is
    /// no set.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the image does not exist, [`StoreError::Damaged`] if a
    /// chunk cannot be read.
    ///
    /// # Blocking
    /// Compresses the whole set on all cores, some 10 ms for each MiB. Waits while another process
    /// changes the image's working set.
    pub fn build_working_set(&self, image: &Digest, share: f64) -> Result<WorkingSet, StoreError> {
        let files = Files::new(self.root(image)?);
        let lock = StoreLock::change_working_set(&self.objects, image)?;
        let recordings = if lock.is_some() { self.recordings(image, &files)? } else { None };
        let Some(recordings) = recordings else {
            // The recordings were removed before this build's turn.
            return Ok(WorkingSet::default());
        };
        let mut pages = choose::choose(&recordings, share);
        if pages.len() > MAX_SET_PAGES {
            tracing::warn!(
                "the working set of image {image}: the first {MAX_SET_PAGES} of {} pages",
                pages.len()
            );
            pages.truncate(MAX_SET_PAGES);
        }
        let mut current = String::new();
        self.build(&files, &pages, |pack| {
            let digest = Digest::of(&pack);
            current.push_str(&digest.hex());
            current.push('\n');
            self.objects.put(&self.objects.layout.set(image, &digest), pack.into())
        })?;
        self.objects.put(&self.objects.layout.current_set(image), current.clone().into())?;
        self.remove_old_packs(image, &current)?;
        Ok(self.working_set(image)?.unwrap_or_default())
    }

    /// Removes the packs of sets before the current one. Streams that still send from a removed pack
    /// have it in memory.
    fn remove_old_packs(&self, image: &Digest, current: &str) -> Result<(), StoreError> {
        let dir = self.objects.layout.sets(image);
        let packs = by_age(&self.objects, &dir)?;
        // Without a lock, another server may have written the youngest ones for a set of its own.
        let min_age = if self.objects.has_locks() { Duration::ZERO } else { MIN_PACK_AGE };
        let newest = packs.last().map(|pack| pack.written);
        for pack in packs {
            let age = newest.and_then(|newest| newest.duration_since(pack.written).ok()).unwrap_or_default();
            if age >= min_age && !current.contains(&pack.name) {
                self.objects.remove(&dir.join(&pack.name))?;
            }
        }
        Ok(())
    }

    /// Calls `store` with each pack of the frames of these pages, in this order. Holds the pages of
    /// [`WINDOW_FRAMES`] frames and one pack at a time.
    fn build(
        &self,
        files: &Files,
        pages: &[Page],
        mut store: impl FnMut(Vec<u8>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let (mut pack, mut stored) = (SetPackBuilder::default(), 0);
        let numbers = frame_numbers(files, pages);
        for window in windows(&numbers) {
            let cut = self.cut(files, &pages[window.clone()], &numbers[window])?;
            let encode = |encoder: &mut SetEncoder, chunks: Vec<SetChunk>| encoder.encode(&chunks).0;
            let frames: Vec<Vec<u8>> =
                cut.into_par_iter().map_init(|| SetEncoder::new(LEVEL), encode).collect();
            for frame in frames {
                if !pack.fits(frame.len()) {
                    stored += 1;
                    if stored == MAX_PACKS {
                        tracing::warn!(
                            "a working set is longer than {MAX_PACKS} packs; the pages after these are left out"
                        );
                        return store(pack.finish());
                    }
                    store(std::mem::take(&mut pack).finish())?;
                }
                pack.push(&frame);
            }
        }
        store(pack.finish())
    }

    /// Returns the pages of chunks for each frame; `numbers` are the frames of the pages. Reads each
    /// chunk once, for all frames that hold some of it.
    fn cut(
        &self,
        files: &Files,
        pages: &[Page],
        numbers: &[usize],
    ) -> Result<Vec<Vec<SetChunk>>, StoreError> {
        // The keys are file and chunk, ascending, as in frames.
        let mut wanted: BTreeMap<(u32, u32), Wanted> = BTreeMap::new();
        let first_frame = numbers.first().copied().unwrap_or_default();
        for (page, number) in pages.iter().zip(numbers) {
            let (chunk, first_page, in_chunk) = files.chunk_of(*page);
            let of_chunk = || Wanted { chunk, file: page.0, first_page, pages: Vec::new() };
            let wanted = wanted.entry((page.0, first_page)).or_insert_with(of_chunk);
            wanted.pages.push((*number, in_chunk));
        }
        let wanted: Vec<_> = wanted.into_values().collect();
        let cut: Vec<_> = wanted
            .par_iter()
            .map_init(
                || (FrameDecoder::default(), Vec::new()),
                |(decoder, plain), wanted| self.cut_chunk(files, wanted, decoder, plain),
            )
            .collect::<Result<_, _>>()?;
        let mut frames = vec![Vec::new(); numbers.last().map_or(0, |last| last + 1 - first_frame)];
        for (frame, chunk) in cut.into_iter().flatten() {
            frames[frame - first_frame].push(chunk);
        }
        Ok(frames)
    }

    /// Returns the parts of a chunk for frames, each with the number of its frame.
    fn cut_chunk(
        &self,
        files: &Files,
        wanted: &Wanted,
        decoder: &mut FrameDecoder,
        plain: &mut Vec<u8>,
    ) -> Result<Vec<(usize, SetChunk)>, StoreError> {
        let Wanted { chunk, file, first_page, pages } = wanted;
        let len = chunk_len(files.root.chunk_size(), &files.files[*file as usize], *chunk);
        plain.clear();
        plain.resize(len.expect("checked: a page of the file"), 0);
        self.read_chunk(&files.root, *chunk, decoder, plain)?;
        let leaves = (!is_zero(plain)).then(|| Leaves::of(plain));
        let of_frames = pages.chunk_by(|(a, _), (b, _)| a == b);
        let cut = of_frames.map(|of_frame| {
            let runs = runs_of(of_frame.iter().map(|(_, page)| *page).collect());
            let spans = runs.iter().map(|run| run.start_byte()..run.end_byte().min(plain.len()));
            let pages = spans.flat_map(|span| &plain[span]).copied().collect();
            let proof = leaves.as_ref().map(|leaves| leaves.prove(&runs).expect("pages of the chunk"));
            let proof = proof.unwrap_or_default();
            (of_frame[0].0, SetChunk { file: *file, first_page: *first_page, runs, pages, proof })
        });
        Ok(cut.collect())
    }

    fn read_chunk(
        &self,
        root: &Root,
        chunk: ChunkIndex,
        decoder: &mut FrameDecoder,
        bytes: &mut [u8],
    ) -> Result<(), StoreError> {
        let Some(StoredChunk::Data { chunk, frame }) = self.load_chunk(root, chunk, false)? else {
            return Ok(());
        };
        let frame = ChunkFrame::parse(&frame);
        let decoded = frame.and_then(|frame| decoder.decode_verified(&frame, &chunk, bytes));
        decoded.map_err(|e| damaged(format!("chunk {chunk}"), e.to_string()))
    }

    /// Returns the working set of an image, if it has one. Its frames are in memory.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if `current` or a pack is damaged.
    ///
    /// # Blocking
    /// Reads the packs.
    pub fn working_set(&self, image: &Digest) -> Result<Option<WorkingSet>, StoreError> {
        // The set in `current` may be replaced before its packs are open.
        for _ in 0..ATTEMPTS {
            match self.current_set(image) {
                Err(StoreError::NotFound(_)) => {}
                other => return other,
            }
        }
        self.current_set(image)
    }

    fn current_set(&self, image: &Digest) -> Result<Option<WorkingSet>, StoreError> {
        let Some(mut set) = read_set(&self.objects, image, |pack| self.set_pack(image, pack))? else {
            return Ok(None);
        };
        set.recordings = by_age(&self.objects, &self.objects.layout.recordings(image))?.len();
        Ok(Some(set))
    }

    /// Returns a pack of a working set: mapped from its file, or read from the bucket once for many
    /// restores.
    fn set_pack(&self, image: &Digest, pack: &Digest) -> Result<Option<Bytes>, StoreError> {
        let path = self.objects.layout.set(image, pack);
        if self.objects.has_locks() {
            return self.objects.map(&path);
        }
        if let Some(kept) = self.sets.get(pack) {
            return Ok(Some(kept.as_ref().clone()));
        }
        let read = self.objects.map(&path)?;
        if let Some(bytes) = &read {
            self.sets.insert(*pack, Arc::new(bytes.clone()), bytes.len());
        }
        Ok(read)
    }

    /// Returns the images that have working sets, in order of their digests.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Reads a directory.
    pub fn images_with_working_sets(&self) -> Result<Vec<Digest>, StoreError> {
        let mut images = images(&self.objects)?;
        let paths: Vec<_> = images.iter().map(|image| self.objects.layout.current_set(image)).collect();
        let mut lengths = self.objects.lengths(&paths)?.into_iter();
        images.retain(|_| lengths.next().flatten().is_some());
        images.sort_unstable();
        Ok(images)
    }

    /// Removes the working set of an image and its recordings. Returns false if there was none.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Waits for the disk, and for a process that builds the set.
    pub fn remove_working_set(&self, image: &Digest) -> Result<bool, StoreError> {
        match StoreLock::change_working_set(&self.objects, image)? {
            Some(_lock) => Ok(self.objects.remove_below(&self.objects.layout.working_set(image))?.is_some()),
            None => Ok(false),
        }
    }
}

/// Reads the working set of an image, without the number of its recordings.
fn read_set(
    objects: &Objects,
    image: &Digest,
    read_pack: impl Fn(&Digest) -> Result<Option<Bytes>, StoreError>,
) -> Result<Option<WorkingSet>, StoreError> {
    let wrong = |reason: String| damaged(object(image), reason);
    let Some(current) = objects.read(&objects.layout.current_set(image), MAX_PACKS * 65)? else {
        return Ok(None);
    };
    let mut set = WorkingSet::default();
    for line in String::from_utf8_lossy(&current).lines() {
        let digest = Digest::from_hex(line).map_err(|e| wrong(format!("`current`: {e}")))?;
        let pack = read_pack(&digest)?.ok_or_else(|| StoreError::NotFound(object(image)))?;
        for range in set_frames(&pack).map_err(|e| wrong(e.to_string()))? {
            let frame = pack.slice(range);
            let parsed = SetFrame::parse(&frame).map_err(|e| wrong(e.to_string()))?;
            for run in parsed.runs() {
                set.pages += u64::from(run.count);
                set.zero_pages += if run.is_zero { u64::from(run.count) } else { 0 };
            }
            set.frames.push(frame);
        }
    }
    Ok(Some(set))
}

/// Returns the chunks of an image's working set, in the order in which restores touch them. An image
/// without a set has none.
///
/// # Errors
/// Returns the errors of [`Store::working_set`].
///
/// # Blocking
/// Reads the packs of the set.
pub(crate) fn touched_chunks(objects: &Objects, root: &Root) -> Result<Vec<ChunkIndex>, StoreError> {
    let image = root.image();
    let layout = &objects.layout;
    let set = read_set(objects, &image, |pack| objects.map(&layout.set(&image, pack)))?.unwrap_or_default();
    let files: Vec<_> = root.files().map(|(_, file)| *file).collect();
    let chunk_pages = (root.chunk_size().bytes() / PAGE_BYTES) as u64;
    let mut chunks = Vec::new();
    for PageSpan { file, first, count } in set.spans() {
        let Some(file) = files.get(file as usize) else { continue };
        let pages = u64::from(first)..u64::from(first) + u64::from(count);
        let of_file = pages.start / chunk_pages..pages.end.div_ceil(chunk_pages);
        chunks.extend(of_file.map(|chunk| ChunkIndex(file.first_chunk.0 + chunk)));
    }
    chunks.dedup();
    Ok(chunks)
}

/// Returns the frame number of each page. Keeps a chunk in one frame if all its pages follow one
/// another.
fn frame_numbers(files: &Files, pages: &[Page]) -> Vec<usize> {
    let (mut numbers, mut number, mut held) = (Vec::with_capacity(pages.len()), 0, 0);
    for run in pages.chunk_by(|a, b| files.chunk_of(*a).0 == files.chunk_of(*b).0) {
        let is_whole = run.len() == files.pages_of_chunk(run[0]);
        for part in run.chunks(if is_whole { run.len() } else { 1 }) {
            if held > 0 && held + part.len() > FRAME_PAGES {
                (number, held) = (number + 1, 0);
            }
            held += part.len();
            numbers.extend(std::iter::repeat_n(number, part.len()));
        }
    }
    numbers
}

/// Returns the ranges of pages whose frames are encoded together. `numbers` are the pages' frames.
fn windows(numbers: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    let of_windows = numbers.chunk_by(|a, b| a / WINDOW_FRAMES == b / WINDOW_FRAMES);
    of_windows.map(move |window| {
        let range = start..start + window.len();
        start = range.end;
        range
    })
}

/// Returns page numbers as ascending runs.
fn runs_of(mut pages: Vec<u16>) -> Vec<PageRun> {
    pages.sort_unstable();
    let mut runs: Vec<PageRun> = Vec::new();
    for first in pages {
        match runs.last_mut() {
            Some(last) if last.end_page() == usize::from(first) => last.count += 1,
            _ => runs.push(PageRun { first, count: 1 }),
        }
    }
    runs
}

/// Returns the images that may have working sets.
pub(crate) fn images(objects: &Objects) -> Result<Vec<Digest>, StoreError> {
    let names = objects.names_if_any(&objects.layout.working_sets())?;
    Ok(names.iter().filter_map(|name| digest_of_name(name)).collect())
}

/// Removes the working sets of deleted images. Returns their number, and the bytes of their files.
/// Skips a set that is being built.
pub(crate) fn remove_orphans(objects: &Objects) -> Result<(u64, u64), StoreError> {
    let (mut removed, mut freed) = (0, 0);
    for image in images(objects)? {
        if objects.exists(&objects.layout.manifest(&image))? {
            continue;
        }
        if let Some(_lock) = StoreLock::try_change_working_set(objects, &image)?
            && let Some(bytes) = objects.remove_below(&objects.layout.working_set(&image))?
        {
            (removed, freed) = (removed + 1, freed + bytes);
        }
    }
    Ok((removed, freed))
}

#[cfg(test)]
mod tests {
    use super::recordings::RECORDINGS;
    use super::*;
    use crate::fixtures::{Image, of_restore, store};
    use crate::store::objects::directory::bytes_below;
    use crate::store::{Collector, Domain};
    use postcopy_proto::manifest::ChunkContent;
    use postcopy_proto::page::ChunkSize;
    use postcopy_proto::set_frame::{Expected, SetDecoder};
    use std::fs;
    use std::time::Duration;

    impl Expected for Image {
        fn chunk_size(&self) -> ChunkSize {
            ChunkSize::MIN
        }

        fn file(&self, place: u32) -> Option<FileEntry> {
            let first_chunk = ChunkIndex(0);
            (place == 0).then_some(FileEntry {
                size_bytes: self.plain.len() as u64,
                first_chunk,
                executable: false,
            })
        }

        fn chunk(&self, chunk: ChunkIndex) -> Option<ChunkContent> {
            let bytes = self.plain.chunks(PAGE_BYTES).nth(postcopy_proto::page::to_usize(chunk.0))?;
            let is_zero = postcopy_proto::page::is_zero(bytes);
            Some(if is_zero { ChunkContent::Zero } else { ChunkContent::Data(Digest::of(bytes)) })
        }
    }

    fn span(first: u32, count: u32) -> PageSpan {
        PageSpan { file: 0, first, count }
    }

    fn record(store: &Store, image: &Image, id: u8, touched: Vec<PageSpan>) -> WorkingSet {
        store.keep_recording(&image.digest(), of_restore(id), touched, Vec::new()).unwrap();
        store.build_working_set(&image.digest(), 0.5).unwrap()
    }

    #[test]
    fn a_set_holds_the_pages_of_its_recordings_and_goes_with_its_image() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        let record = |id: u8, touched: Vec<PageSpan>| record(&store, &image, id, touched);
        record(1, vec![span(0, 17)]);
        // The same restore sends its recording again.
        let set = record(1, vec![span(14, 3), span(3, 1)]);
        assert_eq!((set.recordings, set.pages, set.zero_pages), (1, 4, 2));
        let mut decoder = SetDecoder::default();
        decoder.decode(&SetFrame::parse(&set.frames[0]).unwrap(), &image).unwrap();
        for (run, bytes) in decoder.pages() {
            let (start, len) = (run.first as usize * PAGE_BYTES, usize::from(run.count) * PAGE_BYTES);
            let mut plain = image.plain[start..(start + len).min(image.plain.len())].to_vec();
            plain.resize(len, 0);
            assert_eq!(bytes.map_or(vec![0; len], <[u8]>::to_vec), plain);
        }
        for id in 2..20 {
            let set = record(id, vec![span(5, 1)]);
            assert!(set.recordings <= RECORDINGS);
        }
        let set = store.working_set(&image.digest()).unwrap().unwrap();
        assert_eq!(set.spans().collect::<Vec<_>>(), [span(5, 1)]);
        assert_eq!(
            by_age(&store.objects, &store.objects.layout.sets(&image.digest())).unwrap().len(),
            1,
            "older sets are removed"
        );

        store.remove_reference(&"a".parse().unwrap()).unwrap();
        let all = || bytes_below(store.objects.layout.domain()).unwrap();
        let of_set = store.objects.layout.working_set(&image.digest());
        let (set_bytes, before) = (bytes_below(&of_set).unwrap(), all());
        let collector = Collector::open(dir.path(), Domain::DEFAULT).unwrap();
        collector.condemn().unwrap();
        let collected = collector.sweep(Duration::ZERO).unwrap();
        assert_eq!(collected.working_sets, 1);
        assert!(collected.bytes > set_bytes && collected.bytes == before - all(), "{collected:?}");
        assert!(store.images_with_working_sets().unwrap().is_empty());
    }

    #[test]
    fn recordings_that_were_forgotten_before_the_build_make_no_set() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        store.keep_recording(&image.digest(), of_restore(1), vec![span(0, 4)], Vec::new()).unwrap();
        assert!(store.remove_working_set(&image.digest()).unwrap());
        assert_eq!(store.build_working_set(&image.digest(), 0.5).unwrap().recordings, 0);
        assert!(store.images_with_working_sets().unwrap().is_empty());
    }

    #[test]
    fn two_processes_build_one_after_the_other() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        record(&store, &image, 0, vec![span(0, 1)]);
        let held = StoreLock::change_working_set(&store.objects, &image.digest()).unwrap().unwrap();
        assert!(StoreLock::try_change_working_set(&store.objects, &image.digest()).unwrap().is_none());
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let store = Store::open(dir.path(), Domain::DEFAULT).unwrap();
                record(&store, &image, 1, vec![span(0, 2)])
            });
            let recordings =
                || by_age(&store.objects, &store.objects.layout.recordings(&image.digest())).unwrap().len();
            while recordings() < 2 {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            std::thread::park_timeout(Duration::from_millis(200));
            assert!(!other.is_finished());
            // The directory that the build waits for is then replaced.
            fs::remove_dir_all(store.objects.layout.working_set(&image.digest())).unwrap();
            store.keep_recording(&image.digest(), of_restore(2), vec![span(0, 3)], Vec::new()).unwrap();
            drop(held);
            assert_eq!(other.join().unwrap().recordings, 1);
        });
        std::thread::scope(|scope| {
            for process in 0..2 {
                let (store, image) = (Store::open(dir.path(), Domain::DEFAULT).unwrap(), &image);
                scope.spawn(move || {
                    for id in 0..20 {
                        record(&store, image, 2 * id + process, vec![span(u32::from(id % 12), 1)]);
                    }
                });
            }
        });
        assert_eq!(store.working_set(&image.digest()).unwrap().unwrap().recordings, RECORDINGS);
        assert_eq!(by_age(&store.objects, &store.objects.layout.sets(&image.digest())).unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_set_is_an_error_that_names_its_image() {
        let (_dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a");
        record(&store, &image, 1, vec![span(0, 4)]);
        let dir = store.objects.layout.sets(&image.digest());
        let pack = by_age(&store.objects, &dir).unwrap().remove(0);
        fs::write(dir.join(&pack.name), b"postcopy").unwrap();
        let error = store.working_set(&image.digest()).unwrap_err();
        assert!(
            matches!(&error, StoreError::Damaged { object, .. } if object.contains(&image.digest().to_string()))
        );
        // The next recording builds the set anew.
        record(&store, &image, 2, vec![span(0, 4)]);
        assert_eq!(store.working_set(&image.digest()).unwrap().unwrap().pages, 4);
    }
}
