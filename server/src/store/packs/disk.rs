//! Blocks of packs on a local disk: what a server has read from its bucket it need not read again,
//! also after a restart.
//!
//! ```text
//! <dir>/cache                          "postcopy cache 1\n"; locked by the server that uses it
//! <dir>/blocks/<ab>/<pack>-<number>    a block:
//!     BLAKE3 of the pack's digest, the block's number and all that follows    32 bytes
//!     length of the pack in bytes                                             u64
//!     the block's bytes
//! ```
//!
//! All integers are little-endian. A block is verified when it is read, so nothing needs to be
//! synced: a file that a crash has damaged is removed. When the disk is full, blocks are not kept.

use crate::store::error::{StoreError, io_error};
use crate::store::objects::found;
use bytes::Bytes;
use lru::LruCache;
use postcopy_proto::digest::{DIGEST_BYTES, Digest};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

const FORMAT: &str = "postcopy cache 1\n";
const HEADER_BYTES: usize = DIGEST_BYTES + 8;
/// Bytes of a file system that a file takes beyond its length, on average.
const OVERHEAD_BYTES: u64 = 2048;
/// Time for which nothing is written after a failed write.
const PAUSE: Duration = Duration::from_secs(30);

/// A block of a pack: the pack, and the number of the block.
pub(super) type BlockName = (Digest, u64);

/// A block, and the length of its pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) bytes: Bytes,
    pub(super) pack_bytes: u64,
}

impl Block {
    fn encode(&self, name: &BlockName) -> Vec<u8> {
        let content = [&self.pack_bytes.to_le_bytes()[..], &self.bytes].concat();
        [&digest(name, &content).as_bytes()[..], &content].concat()
    }

    /// Returns the block of a file's bytes; `None` if they are damaged, or another block.
    fn decode(name: &BlockName, file: &Bytes) -> Option<Self> {
        let (expected, content) = file.split_first_chunk::<DIGEST_BYTES>()?;
        let pack_bytes = u64::from_le_bytes(*content.first_chunk()?);
        let is_right = digest(name, content).as_bytes() == expected;
        is_right.then(|| Self { bytes: file.slice(HEADER_BYTES..), pack_bytes })
    }
}

fn digest((pack, number): &BlockName, content: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(pack.as_bytes()).update(&number.to_le_bytes()).update(content);
    hasher.finalize().into()
}

/// The blocks on a disk, at most so many bytes; the least recently used ones are removed.
#[derive(Debug)]
pub struct DiskCache {
    blocks: PathBuf,
    max_bytes: u64,
    /// Locked for a look-up or a change, never while a file is read or written.
    known: Mutex<Known>,
    _lock: File,
}

#[derive(Debug)]
struct Known {
    /// The lengths of the files.
    bytes_of: LruCache<BlockName, u64>,
    bytes: u64,
    /// Nothing is written until then.
    paused_until: Option<Instant>,
}

impl DiskCache {
    /// Opens the cache in `dir`, which is empty, does not exist, or has been a cache. Its blocks stay
    /// up to `max_bytes`.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] for a directory with other content, or one that another server
    /// uses; or [`StoreError::Io`].
    ///
    /// # Blocking
    /// Lists the directory: about 5 us for each block.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<Self, StoreError> {
        let refused = |reason: &str| StoreError::Invalid {
            object: format!("cache {}", dir.display()),
            reason: reason.to_owned(),
        };
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        let marker = dir.join("cache");
        if marker.is_dir() {
            return Err(refused("the directory has other content"));
        }
        let is_new = match found(fs::read(&marker)).map_err(io_error(&marker))? {
            Some(content) if content == FORMAT.as_bytes() => false,
            // A crash has left it without its content.
            Some(content) if content.is_empty() => true,
            Some(_) => return Err(refused("another version of it is not known")),
            None if fs::read_dir(dir).map_err(io_error(dir))?.next().is_none() => true,
            None => return Err(refused("the directory has other content")),
        };
        if is_new {
            fs::write(&marker, FORMAT).map_err(io_error(&marker))?;
        }
        let lock = File::open(&marker).map_err(io_error(&marker))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(refused("another server uses it")),
            Err(TryLockError::Error(e)) => return Err(io_error(&marker)(e)),
        }
        let blocks = dir.join("blocks");
        let known = Known { bytes_of: LruCache::unbounded(), bytes: 0, paused_until: None };
        let cache = Self { blocks, max_bytes, known: Mutex::new(known), _lock: lock };
        for first in 0..=u8::MAX {
            let dir = cache.blocks.join(format!("{first:02x}"));
            fs::create_dir_all(&dir).map_err(io_error(&dir))?;
        }
        cache.list()?;
        Ok(cache)
    }

    /// Learns which blocks exist, the longest unused ones first.
    fn list(&self) -> Result<(), StoreError> {
        let mut files: Vec<(SystemTime, BlockName, u64)> = Vec::new();
        for dir in fs::read_dir(&self.blocks).map_err(io_error(&self.blocks))? {
            let dir = dir.map_err(io_error(&self.blocks))?.path();
            for file in fs::read_dir(&dir).map_err(io_error(&dir))? {
                let file = file.map_err(io_error(&dir))?;
                let metadata = file.metadata().map_err(io_error(&file.path()))?;
                match file.file_name().to_str().and_then(name_of) {
                    Some(name) => files.push((
                        metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        name,
                        metadata.len(),
                    )),
                    // Its writer was killed.
                    None => fs::remove_file(file.path()).map_err(io_error(&file.path()))?,
                }
            }
        }
        files.sort_unstable();
        for (_, name, bytes) in files {
            self.keep(name, bytes);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, (pack, number): &BlockName) -> PathBuf {
        let hex = pack.hex();
        self.blocks.join(&hex[..2]).join(format!("{hex}-{number}"))
    }

    /// Returns a block, verified; `None` if it is not kept.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(super) fn get(&self, name: &BlockName) -> Option<Block> {
        self.lock().bytes_of.get(name)?;
        let path = self.path(name);
        let block = fs::read(&path).ok().and_then(|file| Block::decode(name, &file.into()));
        match &block {
            // The order of use lasts over a restart as times of files.
            Some(_) => drop(File::open(&path).and_then(|file| file.set_modified(SystemTime::now()))),
            None => {
                tracing::warn!("{}: damaged or gone, and is read from the bucket", path.display());
                self.remove(name);
            }
        }
        block
    }

    /// Keeps a block. A failed write is no error: the block is read from the bucket again.
    ///
    /// # Blocking
    /// Writes to the page cache, which may wait for the disk.
    pub(super) fn put(&self, name: &BlockName, block: &Block) {
        if self.lock().paused_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let (path, file) = (self.path(name), block.encode(name));
        let staged = path.with_extension(format!("#{}", fastrand::u64(..)));
        let written = fs::write(&staged, &file).and_then(|()| fs::rename(&staged, &path));
        match written {
            Ok(()) => self.keep(*name, file.len() as u64),
            Err(error) => {
                let _ = fs::remove_file(&staged);
                tracing::warn!("{}: blocks are not kept for {PAUSE:?}: {error}", path.display());
                self.lock().paused_until = Some(Instant::now() + PAUSE);
            }
        }
    }

    /// Removes a block.
    pub(super) fn remove(&self, name: &BlockName) {
        let mut known = self.lock();
        let removed = known.bytes_of.pop(name);
        known.bytes -= removed.map_or(0, |bytes| bytes + OVERHEAD_BYTES);
        drop(known);
        let _ = fs::remove_file(self.path(name));
    }

    /// Notes a file, and removes others that are too many then.
    fn keep(&self, name: BlockName, bytes: u64) {
        let mut removed = Vec::new();
        let mut known = self.lock();
        let before = known.bytes_of.push(name, bytes).map_or(0, |(_, bytes)| bytes + OVERHEAD_BYTES);
        known.bytes = known.bytes + bytes + OVERHEAD_BYTES - before;
        while known.bytes > self.max_bytes
            && let Some((oldest, bytes)) = known.bytes_of.pop_lru()
        {
            known.bytes -= bytes + OVERHEAD_BYTES;
            removed.push(oldest);
        }
        drop(known);
        removed.iter().for_each(|name| drop(fs::remove_file(self.path(name))));
    }
}

/// Returns the block that a file's name names.
fn name_of(name: &str) -> Option<BlockName> {
    let (pack, number) = name.split_once('-')?;
    Some((Digest::from_hex(pack).ok()?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(seed: u8, len: usize) -> (BlockName, Block) {
        let bytes = Bytes::from(vec![seed; len]);
        ((Digest::of(&[seed]), seed.into()), Block { bytes, pack_bytes: 1 << 20 })
    }

    fn open(dir: &tempfile::TempDir, max_bytes: u64) -> DiskCache {
        DiskCache::open(&dir.path().join("cache"), max_bytes).unwrap()
    }

    #[test]
    fn blocks_are_kept_over_a_restart_up_to_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir, 100_000);
        let blocks: Vec<_> = (0..20).map(|seed| block(seed, 10_000)).collect();
        assert_eq!(cache.get(&blocks[0].0), None);
        for (name, block) in &blocks {
            cache.put(name, block);
            // The first one is used again and again.
            assert_eq!(cache.get(&blocks[0].0).as_ref(), Some(&blocks[0].1));
        }
        drop(cache);
        let cache = open(&dir, 100_000);
        let kept = |cache: &DiskCache| blocks.iter().filter(|(name, _)| cache.get(name).is_some()).count();
        assert_eq!(kept(&cache), 8);
        assert_eq!(cache.get(&blocks[19].0).as_ref(), Some(&blocks[19].1));
        assert_eq!(cache.get(&blocks[0].0).as_ref(), Some(&blocks[0].1));
        cache.remove(&blocks[19].0);
        assert_eq!((cache.get(&blocks[19].0), kept(&cache)), (None, 7));
        drop(cache);
        assert_eq!(kept(&open(&dir, 30_000)), 2);
    }

    #[test]
    fn a_damaged_block_is_none_and_left_overs_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (name, block) = block(1, 1000);
        for harm in [&|bytes: &mut Vec<u8>| bytes[500] ^= 1, &|bytes: &mut Vec<u8>| bytes.truncate(7)]
            as [&dyn Fn(&mut Vec<u8>); 2]
        {
            let cache = open(&dir, 100_000);
            cache.put(&name, &block);
            let path = cache.path(&name);
            let mut bytes = fs::read(&path).unwrap();
            harm(&mut bytes);
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.get(&name), None);
            assert!(!path.exists());
        }
        let left_over = open(&dir, 1).path(&name).with_extension("#12");
        fs::write(&left_over, "half a bl").unwrap();
        drop(open(&dir, 100_000));
        assert!(!left_over.exists());
    }

    #[test]
    fn another_server_s_cache_and_other_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir, 1);
        let error = DiskCache::open(&dir.path().join("cache"), 1).unwrap_err().to_string();
        assert!(error.contains("another server uses it"), "{error}");
        drop(cache);
        let error = DiskCache::open(dir.path(), 1).unwrap_err().to_string();
        assert!(error.contains("other content"), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_written_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir, 100_000);
        fs::remove_dir_all(&cache.blocks).unwrap();
        let (name, block) = block(1, 1000);
        cache.put(&name, &block);
        assert_eq!(cache.get(&name), None);
        fs::create_dir_all(cache.path(&name).parent().unwrap()).unwrap();
        cache.put(&name, &block);
        assert_eq!(cache.get(&name), None, "not tried again so soon");
    }

    proptest! {
        #[test]
        fn no_other_bytes_are_a_block(file in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let (name, block) = block(1, 100);
            prop_assert_eq!(Block::decode(&name, &file.into()), None);
            let mut bytes = block.encode(&name);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Block::decode(&name, &bytes.into()), None);
            prop_assert_eq!(Block::decode(&(name.0, 7), &block.encode(&name).into()), None);
        }
    }
}
