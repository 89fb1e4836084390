//! Stores pages in the kernel's page cache before a program asks for them.
//!
//! There are three reasons. A read took a part of a chunk, and its other pages are at hand. A file
//! is read from one end to the other. Or an image's file was opened, and the image has a working
//! set. What somebody waits for is answered first.

use crate::images::{Fetched, Images, zeros};
use crate::nodes;
use crate::store::{Pages, Store};
use futures_util::StreamExt;
use lru::LruCache;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::{Entry, EntryKind, FileEntry};
use postcopy::proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy::{ChunkBytes, Reader, RemoteError, ServerAddress, SetPages, WorkingSet};
use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Most files whose reads are watched for their order.
const WALKS: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");
/// The first and the most bytes that are stored ahead of a sequential reader.
const WINDOW_BYTES: Range<u64> = 256 << 10..8 << 20;
/// Bytes of the chunks that are requested at once for a sequential reader.
const AT_ONCE_BYTES: usize = 4 << 20;
/// Most files that are read ahead at once.
const FETCHERS: usize = 8;
/// Most working sets that are stored at once.
const SETS: usize = 4;
/// Attempts at a working set, and the pause between them.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// The state of what is stored ahead.
#[derive(Debug)]
pub(crate) struct Ahead {
    server: ServerAddress,
    images: Arc<Images>,
    store: Store,
    /// The reads of files, by node. Locked for a look at one.
    walks: Mutex<LruCache<u64, Walk>>,
    fetchers: Arc<Semaphore>,
    /// The images whose working sets were stored, or are being stored.
    sets: Mutex<HashSet<Digest>>,
    storing: Semaphore,
}

impl Ahead {
    pub(crate) fn new(server: ServerAddress, images: Arc<Images>, store: Store) -> Self {
        Self {
            server,
            images,
            store,
            walks: Mutex::new(LruCache::new(WALKS)),
            fetchers: Arc::new(Semaphore::new(FETCHERS)),
            sets: Mutex::default(),
            storing: Semaphore::new(SETS),
        }
    }

    /// Stores the rest of the chunks that a read has fetched. If the file is read from one end to
    /// the other, begins to store what comes next.
    pub(crate) fn after_read(
        self: &Arc<Self>,
        node: u64,
        (reader, file): (Arc<Reader>, FileEntry),
        read: &Range<u64>,
        fetched: &[Fetched],
    ) {
        for chunk in fetched {
            for rest in rests(chunk, read) {
                self.store.try_store(Pages { node, ..rest });
            }
        }
        let chunk_bytes = reader.image().root().chunk_size().bytes() as u64;
        let ahead = {
            let mut walks = self.walks.lock().unwrap_or_else(PoisonError::into_inner);
            walks.get_or_insert_mut(node, Walk::default).next(read, chunk_bytes)
        };
        let ahead = ahead.start..ahead.end.min(file.size_bytes);
        if ahead.is_empty() {
            return;
        }
        let Ok(turn) = Arc::clone(&self.fetchers).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            this.fetch(node, &reader, &file, ahead).await;
            drop(turn);
        });
    }

    /// Fetches and stores the chunks of a part of a file, but for one page in the middle. A read of
    /// that page tells how far the reader has come.
    async fn fetch(&self, node: u64, reader: &Reader, file: &FileEntry, part: Range<u64>) {
        let chunk_bytes = reader.image().root().chunk_size().bytes();
        let at_once = (AT_ONCE_BYTES / chunk_bytes).max(2);
        let chunk_bytes = chunk_bytes as u64;
        let numbers = part.start / chunk_bytes..part.end.div_ceil(chunk_bytes);
        let middle = numbers.start + (numbers.end - numbers.start) / 2;
        let chunk = |number: u64| async move {
            let chunk = ChunkIndex(file.first_chunk.0 + number);
            (number, self.images.chunk(reader, file, chunk).await)
        };
        let mut chunks = futures_util::stream::iter(numbers).map(chunk).buffered(at_once);
        while let Some((number, read)) = chunks.next().await {
            let content = match read {
                Ok(ChunkBytes::Data(content)) => content,
                // The kernel gets zeros faster than they are stored.
                Ok(ChunkBytes::Zeros(_)) => continue,
                // The program that reads it gets the error.
                Err(_) => return,
            };
            let left_out = if number == middle { PAGE_BYTES.min(content.len()) } else { 0 };
            let offset = number * chunk_bytes + left_out as u64;
            self.store.store(Pages { node, offset, content: content.slice(left_out..) }).await;
        }
    }

    /// Stores the working set of an image, a file of which has been opened, if it was not yet.
    pub(crate) fn opened(self: &Arc<Self>, image: Digest, node: u64) {
        if self.sets.lock().unwrap_or_else(PoisonError::into_inner).insert(image) {
            let this = Arc::clone(self);
            let runtime = tokio::runtime::Handle::current();
            // Pages are decompressed there.
            tokio::task::spawn_blocking(move || runtime.block_on(this.store_set(image, node)));
        }
    }

    async fn store_set(&self, image: Digest, node: u64) {
        let _turn = self.storing.acquire().await.expect("it is never closed");
        for _ in 0..ATTEMPTS {
            match self.try_store_set(&image, node).await {
                Ok(0) => return,
                Ok(pages) => return tracing::info!("image {image}: stored {pages} pages of its working set"),
                Err(error) => tracing::warn!("the working set of image {image}: {error}"),
            }
            tokio::time::sleep(PAUSE).await;
        }
        // The next open tries again.
        self.sets.lock().unwrap_or_else(PoisonError::into_inner).remove(&image);
    }

    /// Returns the number of pages.
    async fn try_store_set(&self, image: &Digest, node: u64) -> Result<u64, RemoteError> {
        let reader = self.images.reader(image).await?;
        let entries = reader.image().root().entries();
        let is_file = |(_, entry): &(u32, &Entry)| matches!(entry.kind, EntryKind::File(_));
        let files: Vec<_> = (0..).zip(entries).filter(is_file).collect();
        let mut set = WorkingSet::open(&self.server, reader.image()).await?;
        let (mut looked_up, mut count) = (HashSet::new(), 0);
        while let Some(pages) = set.next().await? {
            for SetPages { file, offset, content } in pages {
                let Some((entry, of)) = files.get(file) else { continue };
                if looked_up.insert(file) {
                    let image = format!("{}/{image}/", crate::BY_DIGEST).into_bytes();
                    self.store.look_up([&image, of.path.as_bytes()].concat()).await;
                }
                let node = nodes::of_entry(node, *entry);
                let contents = match content {
                    ChunkBytes::Data(content) => vec![content],
                    ChunkBytes::Zeros(len) => zeros(len),
                };
                let mut offset = offset;
                for content in contents {
                    let bytes = content.len();
                    self.store.store(Pages { node, offset, content }).await;
                    offset += bytes as u64;
                    count += bytes.div_ceil(PAGE_BYTES) as u64;
                }
            }
        }
        Ok(count)
    }
}

/// Returns the pages of a chunk before and after a read, which has taken a part of it.
fn rests(chunk: &Fetched, read: &Range<u64>) -> impl Iterator<Item = Pages> {
    let (start, end) = (chunk.offset, chunk.offset + chunk.content.len() as u64);
    let page = PAGE_BYTES as u64;
    let before = start..(read.start / page * page).clamp(start, end);
    let after = read.end.next_multiple_of(page).clamp(start, end)..end;
    let slice = move |part: Range<u64>| {
        let within = usize_of(part.start - start)..usize_of(part.end - start);
        Pages { node: 0, offset: part.start, content: chunk.content.slice(within) }
    };
    [before, after].into_iter().filter(|part| !part.is_empty()).map(slice)
}

fn usize_of(value: u64) -> usize {
    usize::try_from(value).expect("less than a chunk")
}

/// The order in which a file is read.
#[derive(Debug, Default)]
struct Walk {
    /// A sequential reader's next read begins here: after the last read, or where pages are stored
    /// already.
    expected: Range<u64>,
    /// Bytes to store ahead; 0 if the last read was not in order.
    window: u64,
}

impl Walk {
    /// Notes a read. Returns the part of the file to store ahead, which may be empty.
    fn next(&mut self, read: &Range<u64>, chunk_bytes: u64) -> Range<u64> {
        let end_of_chunk = read.end.next_multiple_of(chunk_bytes);
        if read.start == 0 || !(self.expected.start..=self.expected.end).contains(&read.start) {
            *self = Self { expected: read.end..end_of_chunk, window: 0 };
            return 0..0;
        }
        let stored = self.expected.end.max(end_of_chunk);
        self.expected = read.end..stored;
        self.window = (self.window * 2).clamp(WINDOW_BYTES.start, WINDOW_BYTES.end);
        if stored - read.end > self.window / 2 {
            return 0..0;
        }
        self.expected.end = (read.end + self.window).next_multiple_of(chunk_bytes).max(stored);
        stored..self.expected.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const CHUNK: u64 = 64 << 10;

    #[test]
    fn sequential_reads_are_fetched_ahead_and_scattered_ones_are_not() {
        let mut walk = Walk::default();
        assert!(walk.next(&(0..CHUNK), CHUNK).is_empty());
        let first = walk.next(&(CHUNK..2 * CHUNK), CHUNK);
        assert_eq!(first, 2 * CHUNK..2 * CHUNK + WINDOW_BYTES.start);
        // The page in the middle.
        let middle = first.start + (first.end - first.start) / 2;
        let second = walk.next(&(middle..middle + 4096), CHUNK);
        assert_eq!(second.start, first.end);
        assert!(second.end >= middle + 2 * WINDOW_BYTES.start);
        assert!(walk.next(&(first.end..first.end + 4096), CHUNK).end > second.start, "the end of a part");
        assert!(walk.next(&(1 << 30..(1 << 30) + 4096), CHUNK).is_empty());
        assert!(walk.next(&(1 << 20..(1 << 20) + 4096), CHUNK).is_empty());
    }

    #[test]
    fn each_byte_of_a_sequential_walk_is_fetched_ahead_once() {
        let (mut walk, mut at, mut fetched) = (Walk::default(), 0, 2 * CHUNK);
        while at < 64 << 20 {
            let ahead = walk.next(&(at..at + 4096), CHUNK);
            if !ahead.is_empty() {
                assert_eq!(ahead.start, fetched.max(ahead.start.min(fetched)), "without a gap");
                assert!(ahead.end - at <= WINDOW_BYTES.end + CHUNK + 4096);
                fetched = ahead.end;
            }
            at += 4096;
        }
        assert!(fetched > 64 << 20);
    }

    #[test]
    fn the_rest_of_a_chunk_are_its_whole_pages_outside_of_the_read() {
        let content = Bytes::from(vec![0; 10_000]);
        let chunk = Fetched { offset: 65_536, content };
        let parts = |read: Range<u64>| {
            rests(&chunk, &read).map(|pages| (pages.offset, pages.content.len())).collect::<Vec<_>>()
        };
        assert_eq!(parts(65_536..69_632), [(69_632, 5_904)]);
        assert_eq!(parts(69_632..73_728), [(65_536, 4_096), (73_728, 1_808)]);
        assert_eq!(parts(69_700..69_701), [(65_536, 4_096), (73_728, 1_808)]);
        assert_eq!(parts(0..65_536), [(65_536, 10_000)]);
        assert_eq!(parts(65_536..81_920), []);
    }
}
