//! Stores pages in the kernel's page cache before a program asks for them.
//!
//! A read has taken a part of a chunk, and its other pages are at hand; or a file is read from one
//! end to the other. The read is answered first.

use crate::images::{Fetched, Images};
use crate::store::{Pages, Store};
use futures_util::StreamExt;
use lru::LruCache;
use postcopy::proto::manifest::FileEntry;
use postcopy::proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy::{ChunkBytes, Reader};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

/// Most files whose reads are watched for their order.
const WALKS: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");
/// The first and the most bytes that are stored ahead of a sequential reader.
const WINDOW_BYTES: Range<u64> = 256 << 10..8 << 20;
/// Bytes of the chunks that are requested at once for a sequential reader.
const AT_ONCE_BYTES: usize = 4 << 20;
/// Most files that are read ahead at once.
const FETCHERS: usize = 8;

/// A file of an image.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) reader: Arc<Reader>,
    pub(crate) file: FileEntry,
}

/// The state of what is stored ahead.
#[derive(Debug)]
pub(crate) struct Ahead {
    images: Arc<Images>,
    store: Store,
    /// The reads of files, by node. Locked for a look at one.
    walks: Mutex<LruCache<u64, Walk>>,
    fetchers: Arc<Semaphore>,
}

impl Ahead {
    pub(crate) fn new(images: Arc<Images>, store: Store) -> Self {
        Self {
            images,
            store,
            walks: Mutex::new(LruCache::new(WALKS)),
            fetchers: Arc::new(Semaphore::new(FETCHERS)),
        }
    }

    /// Notes a read before it is answered, so that a program's reads are noted in their order.
    /// Returns the chunks of the file to fetch ahead, which may be none.
    pub(crate) fn note(&self, node: u64, of: &Opened, read: &Range<u64>) -> Range<u64> {
        let chunk_bytes = of.reader.image().root().chunk_size().bytes() as u64;
        let chunks = read.start / chunk_bytes..read.end.div_ceil(chunk_bytes);
        let mut walks = self.walks.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = walks.get_or_insert_mut(node, Walk::default).next(&chunks, chunk_bytes);
        ahead.start..ahead.end.min(of.file.size_bytes.div_ceil(chunk_bytes))
    }

    /// Stores the rest of the chunks that a read has fetched, and begins to fetch others.
    pub(crate) fn after_read(
        self: &Arc<Self>,
        node: u64,
        of: Opened,
        (read, fetched): (&Range<u64>, &[Fetched]),
        ahead: Range<u64>,
    ) {
        for chunk in fetched {
            for rest in rests(chunk, read) {
                self.store.try_store(Pages { node, ..rest });
            }
        }
        if ahead.is_empty() {
            return;
        }
        let Ok(turn) = Arc::clone(&self.fetchers).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            this.fetch(node, &of, ahead).await;
            drop(turn);
        });
    }

    /// Fetches and stores chunks of a file, but for one page in their middle. A read of that page
    /// tells how far the reader has come.
    async fn fetch(&self, node: u64, of: &Opened, numbers: Range<u64>) {
        let Opened { reader, file } = of;
        let chunk_bytes = reader.image().root().chunk_size().bytes();
        let at_once = (AT_ONCE_BYTES / chunk_bytes).max(2);
        let chunk_bytes = chunk_bytes as u64;
        let middle = numbers.start + (numbers.end - numbers.start) / 2;
        let chunk = |number: u64| async move {
            let chunk = ChunkIndex(file.first_chunk.0 + number);
            (number, self.images.chunk_soon(reader, file, chunk, number == middle).await)
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

/// The order in which a file's chunks are read.
#[derive(Debug, Default)]
struct Walk {
    /// The chunk that was read last.
    at: u64,
    /// The chunks before this one are stored, or are being stored.
    stored: u64,
    /// Bytes to store ahead; 0 if the last chunk was not read in order.
    window: u64,
}

impl Walk {
    /// Notes a read of chunks. Returns those to store ahead, which may be none.
    fn next(&mut self, read: &Range<u64>, chunk_bytes: u64) -> Range<u64> {
        // Reads of neighbouring chunks may pass each other.
        let is_old = read.end <= self.at + 1 && read.start + 1 >= self.at;
        if is_old || read.is_empty() {
            return 0..0;
        }
        let last = read.end - 1;
        if !(self.at..=self.stored.max(self.at + 1)).contains(&read.start) {
            *self = Self { at: last, stored: read.end, window: 0 };
            return 0..0;
        }
        self.at = last;
        self.stored = self.stored.max(read.end);
        self.window = (self.window * 2).clamp(WINDOW_BYTES.start, WINDOW_BYTES.end);
        let start = self.stored;
        if (start - read.end) * chunk_bytes <= self.window / 2 {
            self.stored = start.max(read.end + self.window.div_ceil(chunk_bytes));
        }
        start..self.stored
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
        assert!(walk.next(&(0..1), CHUNK).is_empty(), "the first one");
        assert!(walk.next(&(0..1), CHUNK).is_empty(), "the same one");
        let first = walk.next(&(1..2), CHUNK);
        assert_eq!(first, 2..2 + WINDOW_BYTES.start / CHUNK);
        assert!(walk.next(&(0..1), CHUNK).is_empty(), "one that was late");
        let middle = first.start + (first.end - first.start) / 2;
        let second = walk.next(&(middle..middle + 1), CHUNK);
        assert_eq!(second.start, first.end);
        assert!(second.end > middle + WINDOW_BYTES.start / CHUNK, "more than before");
        assert!(!walk.next(&(second.end..second.end + 1), CHUNK).is_empty(), "at its end");
        for scattered in [1000, 900, 902, 1000, 2000] {
            assert!(walk.next(&(scattered..scattered + 1), CHUNK).is_empty(), "{scattered}");
        }
    }

    #[test]
    fn each_chunk_of_a_sequential_walk_is_fetched_ahead_once() {
        for chunk_bytes in [4 << 10, CHUNK, 2 << 20] {
            let mut walk = Walk::default();
            let (mut at, mut fetched) = (0, 2);
            while at * chunk_bytes < 256 << 20 {
                let ahead = walk.next(&(at..at + 1), chunk_bytes);
                if !ahead.is_empty() {
                    assert_eq!(ahead.start, fetched, "no gap, and none twice");
                    assert!((ahead.end - at - 1) * chunk_bytes <= WINDOW_BYTES.end + chunk_bytes);
                    fetched = ahead.end;
                }
                at += 1;
            }
            assert!(fetched >= at);
        }
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
