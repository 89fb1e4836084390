//! Packs in a bucket: read in blocks, which stay in memory and on a local disk ([`super::disk`]).
//!
//! A block is read once, however many callers wait for it: from the server that the pack belongs to
//! ([`super::peers`]), or else from the bucket. The blocks of a frame are read at the same time.
//! Where the block before is in memory already, a reader probably goes through the pack, so the
//! next blocks are read ahead of it.

use crate::store::cache::Cache;
use crate::store::error::{StoreError, damaged};
use crate::store::index::run::Place;
use crate::store::layout::Layout;
use crate::store::objects::bucket::Bucket;
use crate::store::packs::check_frame;
use crate::store::packs::disk::{Block, BlockName, DiskCache};
use crate::store::packs::hedge::Hedge;
use crate::store::packs::peers::{PackBlock, PeerReading};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, Shared, select, try_join_all};
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::MAX_FRAME_BYTES;
use postcopy_proto::pack::MAX_PACK_BYTES;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Bytes of a block. A request for fewer takes about as long.
const BLOCK_BYTES: u64 = 256 << 10;
/// Most blocks that are written to the disk at a time.
const MAX_WRITING: usize = 32;
/// Time after which a reader that waits for a peer also asks the bucket.
const PEER_PATIENCE: Duration = Duration::from_secs(1);
/// Most blocks of a pack.
const MAX_BLOCKS: u64 = (MAX_PACK_BYTES as u64).div_ceil(BLOCK_BYTES);
/// Blocks that are read ahead of a reader.
const READ_AHEAD: u64 = 8;

/// The reason why a block could not be read. All who wait for it get it.
#[derive(Clone, Debug)]
enum Failed {
    NotFound,
    Bucket { object: String, reason: String },
}

impl Failed {
    fn into_error(self, object: impl FnOnce() -> String) -> StoreError {
        match self {
            Self::NotFound => StoreError::NotFound(object()),
            Self::Bucket { object, reason } => StoreError::Bucket { object, reason },
        }
    }
}

type Reading = Shared<BoxFuture<'static, Result<Block, Failed>>>;

/// The blocks of the packs of a bucket.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    bucket: Arc<Bucket>,
    kept: Cache<BlockName, Block>,
    hedge: Hedge,
    /// The right to write blocks to the disk.
    writing: Arc<Semaphore>,
    /// The blocks that are being read. Locked for a look-up or a change.
    reading: Mutex<HashMap<(BlockName, From), Reading>>,
}

/// The place from which a block that is not in memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum From {
    /// Another server; if it does not answer, the disk or the bucket.
    Peer,
    /// The disk or the bucket.
    Here,
}

impl Blocks {
    pub(super) fn new(layout: &Layout, bucket: &Arc<Bucket>) -> Self {
        let inner = Inner {
            layout: layout.clone(),
            bucket: bucket.clone(),
            kept: Cache::new(bucket.cache_memory()),
            hedge: Hedge::default(),
            writing: Arc::new(Semaphore::new(MAX_WRITING)),
            reading: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// See [`super::Packs::resident_frame`].
    pub(super) fn resident(&self, place: &Place) -> Option<Bytes> {
        if place.length as usize > MAX_FRAME_BYTES {
            return None;
        }
        let blocks = blocks_of(place).map(|block| self.inner.kept.get(&(place.pack, block)));
        let blocks: Option<Vec<_>> = blocks.map(|block| Some(block?.bytes.clone())).collect();
        cut(place, &blocks?)
    }

    /// See [`super::Packs::load`].
    pub(super) fn load(&self, place: &Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let frame = self.read(place, chunk, From::Peer)?;
        if !check || check_frame(&frame, chunk, &place.pack).is_ok() {
            return Ok(frame);
        }
        // A push may have replaced a damaged pack by a good one, or another server's copy is damaged.
        blocks_of(place).for_each(|block| self.inner.forget(&(place.pack, block)));
        let frame = self.read(place, chunk, From::Here)?;
        check_frame(&frame, chunk, &place.pack).inspect_err(|error| {
            tracing::error!(pack = %place.pack, "{error}");
        })?;
        if let Some(peers) = self.inner.bucket.peers() {
            peers.distrust(&place.pack);
        }
        Ok(frame)
    }

    fn read(&self, place: &Place, chunk: &Digest, from: From) -> Result<Bytes, StoreError> {
        let object = || format!("chunk {chunk} in pack {}", place.pack);
        if place.length as usize > MAX_FRAME_BYTES {
            return Err(damaged(object(), "no frame is that long"));
        }
        let blocks: Vec<_> = blocks_of(place).collect();
        let reads: Vec<_> = blocks.iter().map(|block| self.block((place.pack, *block), from)).collect();
        self.read_ahead(place.pack, &blocks);
        let blocks = self.inner.bucket.wait(try_join_all(reads));
        let blocks = blocks.map_err(|failed| failed.into_error(|| format!("chunk {chunk}")))?;
        let blocks: Vec<_> = blocks.into_iter().map(|block| block.bytes).collect();
        cut(place, &blocks).ok_or_else(|| damaged(object(), "the pack is too short"))
    }

    fn read_ahead(&self, pack: Digest, blocks: &[u64]) {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return };
        let before = first.checked_sub(1).and_then(|before| self.inner.kept.get(&(pack, before)));
        if let Some(Block { pack_bytes, .. }) = before.as_deref() {
            let end = pack_bytes.div_ceil(BLOCK_BYTES).min(last + 1 + READ_AHEAD);
            (last + 1..end).for_each(|block| drop(self.block((pack, block), From::Peer)));
        }
    }

    /// See [`super::Packs::block`].
    pub(super) async fn block_here(&self, pack: Digest, block: u64) -> Result<PackBlock, StoreError> {
        if block >= MAX_BLOCKS {
            let reason = format!("a pack has at most {MAX_BLOCKS}");
            return Err(StoreError::Invalid { object: format!("block {block}"), reason });
        }
        let read = self.block((pack, block), From::Here).await;
        read.map(Into::into).map_err(|failed| failed.into_error(|| format!("pack {pack}")))
    }

    /// Returns a block, which is read if it is not in memory.
    fn block(&self, name: BlockName, from: From) -> Reading {
        let ready = |kept: Arc<Block>| std::future::ready(Ok(kept.as_ref().clone())).boxed().shared();
        if let Some(kept) = self.inner.kept.get(&name) {
            return ready(kept);
        }
        let asked = match (from, self.inner.bucket.peers()) {
            (From::Peer, Some(peers)) => peers.read(&name.0, name.1),
            _ => None,
        };
        let from = if asked.is_some() { From::Peer } else { From::Here };
        let mut reading = self.inner.lock();
        if let Some(begun) = reading.get(&(name, from)) {
            return begun.clone();
        }
        // Another thread may have read it meanwhile.
        if let Some(kept) = self.inner.kept.get(&name) {
            return ready(kept);
        }
        let blocks = self.clone();
        let read = self.inner.bucket.start(async move {
            let inner = &blocks.inner;
            let outcome = match asked {
                Some(asked) => blocks.answer_of(name, asked).await,
                None => inner.read(name).await,
            };
            if let Ok(block) = &outcome
                && !block.bytes.is_empty()
            {
                inner.kept.insert(name, Arc::new(block.clone()), block.bytes.len());
            }
            inner.lock().remove(&(name, from));
            outcome
        });
        let read = read.map(|outcome| {
            let ended =
                |_| Failed::Bucket { object: "block".to_owned(), reason: "the server ends".to_owned() };
            outcome.map_err(ended).flatten()
        });
        let read = read.boxed().shared();
        reading.insert((name, from), read.clone());
        read
    }
}

impl Blocks {
    /// Waits for a block of another server; if it does not answer in time, also for the bucket.
    async fn answer_of(&self, name: BlockName, mut asked: PeerReading) -> Result<Block, Failed> {
        let answered = match tokio::time::timeout(PEER_PATIENCE, &mut asked).await {
            Ok(answered) => answered,
            Err(_) => match select(asked, self.block(name, From::Here)).await {
                Either::Left((answered, _)) => answered,
                Either::Right((outcome, _)) => return outcome,
            },
        };
        match answered.map(Block::from).filter(|block| is_whole(name.1, block)) {
            Some(block) => Ok(block),
            None => self.block(name, From::Here).await,
        }
    }
}

/// Returns true if a block of this number has the length that its pack's length gives.
fn is_whole(number: u64, block: &Block) -> bool {
    let rest = block.pack_bytes.saturating_sub(number * BLOCK_BYTES);
    block.pack_bytes <= MAX_PACK_BYTES as u64 && block.bytes.len() as u64 == rest.min(BLOCK_BYTES)
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, HashMap<(BlockName, From), Reading>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, name: &BlockName) {
        self.kept.remove(name);
        if let Some(disk) = self.bucket.cache() {
            disk.remove(name);
        }
    }

    /// Reads a block from the disk, or else from the bucket.
    async fn read(&self, name: BlockName) -> Result<Block, Failed> {
        let Some(disk) = self.bucket.cache() else { return self.fetch(name).await };
        if let Some(block) = with_disk(disk.clone(), move |disk| disk.get(&name)).await.flatten() {
            return Ok(block);
        }
        let block = self.fetch(name).await?;
        // No reader waits for the write. If the disk is slower than the bucket, fewer blocks are kept.
        if !block.bytes.is_empty()
            && let Ok(writing) = self.writing.clone().try_acquire_owned()
        {
            let (kept, disk) = (block.clone(), disk.clone());
            drop(tokio::spawn(with_disk(disk, move |disk| {
                disk.put(&name, &kept);
                drop(writing);
            })));
        }
        Ok(block)
    }

    async fn fetch(&self, (pack, block): BlockName) -> Result<Block, Failed> {
        let start = block * BLOCK_BYTES;
        let path = self.layout.pack(&pack);
        let read = self.hedge.read(|| self.bucket.read_range(&path, start..start + BLOCK_BYTES)).await;
        if let Err(StoreError::Bucket { .. }) = read
            && let Ok(Some(pack_bytes)) = self.bucket.length(&path).await
            && pack_bytes <= start
        {
            // A truncated pack, or a wrong locator.
            return Ok(Block { bytes: Bytes::new(), pack_bytes });
        }
        read.map(|(bytes, pack_bytes)| Block { bytes, pack_bytes }).map_err(|error| match error {
            StoreError::NotFound(_) => Failed::NotFound,
            StoreError::Bucket { object, reason } => Failed::Bucket { object, reason },
            other => Failed::Bucket { object: pack.to_string(), reason: other.to_string() },
        })
    }
}

/// Does work that waits for the disk, outside of the threads that wait for the network. Returns
/// `None` only if that panics.
async fn with_disk<T: Send + 'static>(
    disk: Arc<DiskCache>,
    work: impl FnOnce(&DiskCache) -> T + Send + 'static,
) -> Option<T> {
    tokio::task::spawn_blocking(move || work(&disk)).await.ok()
}

/// Returns the numbers of the blocks on which a frame lies.
fn blocks_of(place: &Place) -> std::ops::RangeInclusive<u64> {
    let (start, length) = (u64::from(place.offset), u64::from(place.length));
    start / BLOCK_BYTES..=(start + length.max(1) - 1) / BLOCK_BYTES
}

/// Returns a frame from its blocks; `None` if they end before it.
fn cut(place: &Place, blocks: &[Bytes]) -> Option<Bytes> {
    let block_bytes = usize::try_from(BLOCK_BYTES).expect("a small number");
    let start = place.offset as usize % block_bytes;
    let end = start + place.length as usize;
    if let [block] = blocks {
        return (end <= block.len()).then(|| block.slice(start..end));
    }
    let all = blocks.concat();
    // Only the last block of a pack is shorter.
    let are_whole = blocks.iter().rev().skip(1).all(|block| block.len() == block_bytes);
    (are_whole && end <= all.len()).then(|| Bytes::from(all).slice(start..end))
}
