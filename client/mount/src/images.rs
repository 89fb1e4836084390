//! The images that are in use, and the bytes of their files.
//!
//! An image is opened by its digest when a node of it is first used, so also by a successor, which
//! has the nodes alone. Its chunks are verified by [`Reader`]; those read last stay in memory for a
//! moment, because a chunk is longer than most reads.

use bytes::Bytes;
use futures_util::future::try_join_all;
use lru::LruCache;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::FileEntry;
use postcopy::proto::page::ChunkIndex;
use postcopy::proto::reference::Reference;
use postcopy::proto::v1::RequestClass;
use postcopy::{ChunkBytes, Content, Image, ReadError, Reader, Remote, RemoteError, ServerAddress};
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::Instant;

/// Most bytes of chunks that stay in memory, for all images together.
const KEPT_BYTES: usize = 32 << 20;
/// Most images that stay open.
const MAX_OPEN: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");
/// Most images with open files that are kept from being deleted: each takes a connection.
const MAX_LEASES: usize = 512;
/// Pause before the next attempt to open an image of a server that cannot be reached.
const PAUSE: Duration = Duration::from_millis(100);
/// Most chunks whose failures are remembered, and for how long.
const MAX_FAILED: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");
const FAILED: Duration = Duration::from_millis(500);
/// Most chunks of a file whose holes are looked for: their digests take 32 MiB of memory.
const MAX_SEEK_CHUNKS: u64 = 1 << 20;
/// The pause between looks for reads that wait, and the most of them.
const LOOK: Duration = Duration::from_millis(2);
const LOOKS: u32 = 50;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The images of one server that are in use.
#[derive(Debug)]
pub(crate) struct Images {
    address: ServerAddress,
    deadline: Duration,
    /// Locked to find or add one. An image is opened without the lock, once for all who wait.
    open: Mutex<LruCache<Digest, Arc<OnceCell<Arc<Reader>>>>>,
    /// Locked to find, add or remove a chunk.
    kept: Mutex<Kept>,
    /// Number of reads that wait for their answers.
    reading: AtomicUsize,
    /// The images that have open files. Locked for a look or a change.
    in_use: Mutex<HashMap<Digest, InUse>>,
    /// The chunks that could not be had, and when that was known. Locked for a look.
    failed: Mutex<LruCache<(Digest, ChunkIndex), (Instant, ReadError)>>,
}

/// The use of an image: the number of its open files, and the reader, whose connection is a lease.
#[derive(Debug, Default)]
struct InUse {
    count: usize,
    reader: Option<Arc<Reader>>,
}

/// The chunks that were read last.
#[derive(Debug)]
struct Kept {
    chunks: LruCache<(Digest, ChunkIndex), Bytes>,
    bytes: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A change is complete, or a chunk is not kept.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Images {
    pub(crate) fn new(address: ServerAddress, deadline: Duration) -> Self {
        let kept = Kept { chunks: LruCache::unbounded(), bytes: 0 };
        let open = Mutex::new(LruCache::new(MAX_OPEN));
        Self {
            address,
            deadline,
            open,
            kept: Mutex::new(kept),
            reading: AtomicUsize::new(0),
            failed: Mutex::new(LruCache::new(MAX_FAILED)),
            in_use: Mutex::default(),
        }
    }

    /// Returns the reader of an image, and opens the image if no node of it was used before.
    ///
    /// # Errors
    /// [`RemoteError`]: the server does not have the image, or cannot be reached in time.
    pub(crate) async fn reader(&self, digest: &Digest) -> Result<Arc<Reader>, RemoteError> {
        if let Some(reader) = lock(&self.in_use).get(digest).and_then(|of| of.reader.clone()) {
            return Ok(reader);
        }
        let cell = Arc::clone(lock(&self.open).get_or_insert(*digest, Arc::default));
        let open = || async {
            let image = self.open(digest).await?;
            Ok(Arc::new(Reader::start(self.address.clone(), image, self.deadline)))
        };
        let opened = cell.get_or_try_init(open).await.cloned();
        if opened.is_err() {
            lock(&self.open).pop(digest);
        }
        opened
    }

    /// Counts an open file of an image.
    pub(crate) fn opened(&self, image: &Digest) {
        lock(&self.in_use).entry(*image).or_default().count += 1;
    }

    /// Counts the end of an open file. The last one ends the lease.
    pub(crate) fn closed(&self, image: &Digest) {
        let mut in_use = lock(&self.in_use);
        let Some(of) = in_use.get_mut(image) else { return };
        of.count -= 1;
        if of.count == 0
            && let Some(InUse { reader: Some(reader), .. }) = in_use.remove(image)
        {
            reader.keep(false);
        }
    }

    /// Keeps an image that has open files from being deleted: by a connection to the server.
    pub(crate) async fn keep(&self, image: &Digest) {
        // The server may be away; then the next open tries again.
        let Ok(reader) = self.reader(image).await else { return };
        let mut in_use = lock(&self.in_use);
        let leases = in_use.values().filter(|of| of.reader.is_some()).count();
        if let Some(of) = in_use.get_mut(image).filter(|_| leases < MAX_LEASES) {
            reader.keep(true);
            of.reader = Some(reader);
        }
    }

    async fn open(&self, digest: &Digest) -> Result<Arc<Image>, RemoteError> {
        // People alone read the name.
        let name = "mounted".parse().expect("a name");
        let reference = Reference::Digest { name, image: *digest };
        let until = Instant::now() + self.deadline;
        loop {
            let opened = async {
                let remote = Remote::connect(self.address.clone()).await?;
                Ok(remote.open(&reference, &[], false).await?.0)
            };
            match opened.await {
                Err(RemoteError::Connect { .. }) if Instant::now() < until => {}
                Err(error) if error.is_no_answer() && Instant::now() < until => {}
                other => return other,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reads bytes of a file; fewer, if the file ends before.
    ///
    /// # Errors
    /// [`ReadError`].
    pub(crate) async fn read(
        &self,
        reader: &Reader,
        file: &FileEntry,
        range: Range<u64>,
    ) -> Result<Read, ReadError> {
        let range = range.start.min(file.size_bytes)..range.end.min(file.size_bytes);
        if range.is_empty() {
            return Ok(Read::default());
        }
        let chunk_bytes = reader.image().root().chunk_size().bytes() as u64;
        let chunks = range.start / chunk_bytes..range.end.div_ceil(chunk_bytes);
        let part = |number: u64| {
            let start = number * chunk_bytes;
            let within = range.start.max(start) - start..range.end.min(start + chunk_bytes) - start;
            self.part(reader, file, number, within)
        };
        let mut read = Read::default();
        self.reading.fetch_add(1, Ordering::Relaxed);
        let _read = OnDrop(|| {
            self.reading.fetch_sub(1, Ordering::Relaxed);
        });
        for (pieces, fetched) in try_join_all(chunks.map(part)).await? {
            read.pieces.extend(pieces);
            read.fetched.extend(fetched);
        }
        Ok(read)
    }

    /// Returns a part of a file's chunk `number`, and the chunk if it was fetched now.
    async fn part(
        &self,
        reader: &Reader,
        file: &FileEntry,
        number: u64,
        within: Range<u64>,
    ) -> Result<(Vec<Bytes>, Option<Fetched>), ReadError> {
        let within = usize_of(within.start)..usize_of(within.end);
        let chunk = ChunkIndex(file.first_chunk.0 + number);
        let key = (reader.image().digest(), chunk);
        if let Some(bytes) = self.kept(&key) {
            return Ok((vec![bytes.slice(within)], None));
        }
        match self.demand(reader, file, chunk).await? {
            ChunkBytes::Zeros(_) => Ok((zeros(within.len()), None)),
            ChunkBytes::Data(bytes) => {
                // The kernel keeps what it has read.
                if within.len() < bytes.len() {
                    lock(&self.kept).keep(key, bytes.clone());
                }
                let piece = bytes.slice(within);
                let offset = number * reader.image().root().chunk_size().bytes() as u64;
                Ok((vec![piece], Some(Fetched { offset, content: bytes })))
            }
        }
    }

    /// Asks the server for a chunk, unless it has just failed: the kernel repeats a read that was
    /// part of its read-ahead, and the program would wait for the deadline twice.
    async fn demand(
        &self,
        reader: &Reader,
        file: &FileEntry,
        chunk: ChunkIndex,
    ) -> Result<ChunkBytes, ReadError> {
        let key = (reader.image().digest(), chunk);
        if let Some((at, error)) = lock(&self.failed).get(&key)
            && at.elapsed() < FAILED
        {
            return Err(error.clone());
        }
        let read = reader.chunk(file, chunk).await;
        match &read {
            Ok(_) => lock(&self.failed).pop(&key),
            Err(error) => lock(&self.failed).put(key, (Instant::now(), error.clone())),
        };
        read
    }

    /// Returns the offset of the first data, or of the first hole, from `offset` on; `None` if
    /// there is none. Chunks of zeros are holes. Files of very many chunks are taken for data.
    ///
    /// # Errors
    /// [`RemoteError`]: a part of the manifest cannot be had.
    pub(crate) async fn seek(
        &self,
        reader: &Reader,
        (path, file): (&[u8], &FileEntry),
        offset: u64,
        to_hole: bool,
    ) -> Result<Option<u64>, RemoteError> {
        if offset >= file.size_bytes {
            return Ok(None);
        }
        let image = reader.image();
        let chunk_bytes = image.root().chunk_size().bytes() as u64;
        let end = file.size_bytes.div_ceil(chunk_bytes);
        if end > MAX_SEEK_CHUNKS {
            return Ok(Some(if to_hole { file.size_bytes } else { offset }));
        }
        let content = |number: u64| image.content(ChunkIndex(file.first_chunk.0 + number));
        if image.root().segments_of(file).any(|index| image.segment(index).is_none()) {
            let name = "mounted".parse().expect("a name");
            let reference = Reference::Digest { name, image: image.digest() };
            let remote = Remote::connect(self.address.clone()).await?;
            let (_, segments) = remote.open(&reference, &[path], false).await?;
            segments.all_into(image).await?;
        }
        let is_wanted = |number: &u64| (content(*number) == Content::Zero) == to_hole;
        let found = (offset / chunk_bytes..end).find(is_wanted);
        let found = found.map(|number| (number * chunk_bytes).max(offset));
        Ok(found.or(to_hole.then_some(file.size_bytes)))
    }

    /// Waits until no read waits for its answer, but not for long: reads may never cease.
    pub(crate) async fn no_read_waits(&self) {
        for _ in 0..LOOKS {
            if self.reading.load(Ordering::Relaxed) == 0 {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn kept(&self, key: &(Digest, ChunkIndex)) -> Option<Bytes> {
        lock(&self.kept).chunks.get(key).cloned()
    }

    /// Returns a chunk of a file that a program is likely to read soon. With `is_kept`, it stays in
    /// memory for a read that asks for a part of it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub(crate) async fn chunk_soon(
        &self,
        reader: &Reader,
        file: &FileEntry,
        chunk: ChunkIndex,
        is_kept: bool,
    ) -> Result<ChunkBytes, ReadError> {
        let key = (reader.image().digest(), chunk);
        if let Some(bytes) = self.kept(&key) {
            return Ok(ChunkBytes::Data(bytes));
        }
        let read = reader.chunk_ahead(file, chunk, RequestClass::Prefetch).await?;
        if let ChunkBytes::Data(bytes) = &read
            && is_kept
        {
            lock(&self.kept).keep(key, bytes.clone());
        }
        Ok(read)
    }
}

/// The bytes of a read.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) pieces: Vec<Bytes>,
    /// The chunks that the server had to be asked for.
    pub(crate) fetched: Vec<Fetched>,
}

/// A chunk of a file.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// The offset of its first byte in the file.
    pub(crate) offset: u64,
    pub(crate) content: Bytes,
}

/// Returns zeros in pieces.
pub(crate) fn zeros(len: usize) -> Vec<Bytes> {
    let part = |at: usize| Bytes::from_static(&ZEROS[..ZEROS.len().min(len - at)]);
    (0..len).step_by(ZEROS.len()).map(part).collect()
}

/// Calls a function when it is dropped, also by a request that is given up.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Kept {
    fn keep(&mut self, key: (Digest, ChunkIndex), bytes: Bytes) {
        self.bytes += bytes.len();
        let before = self.chunks.put(key, bytes);
        self.bytes -= before.map_or(0, |before| before.len());
        while self.bytes > KEPT_BYTES
            && let Some((_, oldest)) = self.chunks.pop_lru()
        {
            self.bytes -= oldest.len();
        }
    }
}

fn usize_of(value: u64) -> usize {
    usize::try_from(value).expect("less than a chunk")
}
