//! Packs that are files: mapped into memory when a frame of them is read.

use crate::store::cache::Cache;
use crate::store::error::{StoreError, damaged, io_error, pack_name};
use crate::store::index::run::{PackLength, Place};
use crate::store::layout::Layout;
use crate::store::map::{self, Map};
use crate::store::objects::directory;
use crate::store::packs::check_frame;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::PackIndex;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most packs that stay open. A process may have 65,530 maps (sysctl vm.max_map_count), and the
/// frames that streams are sending keep the maps of their packs beyond these.
const MAX_OPEN: usize = 1024;

/// Bytes at the end of a pack that are read before it is parsed: more than the index of 16,384 raw
/// 4 KiB chunks.
const INDEX_READ_AHEAD: usize = 1 << 20;

/// A pack, mapped into memory.
#[derive(Debug)]
pub(super) struct Pack {
    digest: Digest,
    map: Map,
    /// The inode of the mapped file. Another file may replace it, when a damaged pack is uploaded
    /// again.
    inode: u64,
    damage_is_logged: AtomicBool,
}

impl Pack {
    /// Maps a pack.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    fn open(path: &Path, digest: Digest) -> Result<Self, StoreError> {
        let file = directory::open(path).map_err(io_error(path))?;
        let inode = file.metadata().map_err(io_error(path))?.ino();
        let map = Map::new(&file).map_err(io_error(path))?;
        Ok(Self { digest, map, inode, damage_is_logged: AtomicBool::new(false) })
    }

    /// Maps a pack and reads its index; `None` if the pack does not exist.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] with the pack's name, or [`StoreError::Io`].
    pub(super) fn open_with_index(
        path: &Path,
        digest: Digest,
    ) -> Result<Option<(Self, PackIndex)>, StoreError> {
        let pack = match Self::open(path, digest) {
            Err(error) if is_gone(&error) => return Ok(None),
            other => other?,
        };
        let bytes = pack.map.bytes();
        let read_ahead = bytes.len().saturating_sub(INDEX_READ_AHEAD);
        map::populate(&bytes[read_ahead..]).map_err(|e| damaged(pack_name(&digest), e))?;
        let index = PackIndex::parse(bytes).map_err(|e| damaged(pack_name(&digest), e))?;
        Ok(Some((pack, index)))
    }

    /// Returns the pack's name and length.
    pub(super) fn length(&self) -> PackLength {
        // A longer file is no pack, and has no index.
        let bytes = u32::try_from(self.map.bytes().len()).unwrap_or(u32::MAX);
        PackLength { pack: self.digest, bytes }
    }

    /// Returns the frame's bytes; `None` if the mapped file is shorter.
    fn frame(&self, place: &Place) -> Option<Bytes> {
        let start = place.offset as usize;
        let range = start..start + place.length as usize;
        (range.end <= self.map.bytes().len()).then(|| self.map.bytes().slice(range))
    }

    /// Returns the frame of a chunk, read from the disk. Decodes it if `check` is set or the map
    /// has lost pages.
    fn load(&self, place: &Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let object = || format!("chunk {chunk} in pack {}", self.digest);
        let frame = self.frame(place).ok_or_else(|| damaged(object(), "the pack is too short"))?;
        map::populate(&frame).map_err(|e| damaged(object(), e))?;
        if check || self.map.was_cut() {
            check_frame(&frame, chunk, &self.digest)?;
        }
        Ok(frame)
    }

    /// Returns true if a new map of the pack would show nothing else.
    fn is_of_same_file(&self, new: &Self) -> bool {
        self.inode == new.inode && self.map.bytes().len() == new.map.bytes().len() && !self.map.was_cut()
    }

    fn log_damage(&self, error: &StoreError) {
        if !self.damage_is_logged.swap(true, Ordering::Relaxed) {
            tracing::error!(pack = %self.digest, "{error}");
        }
    }
}

/// Returns true if a file does not exist, for example because a collector has deleted it.
fn is_gone(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// The open packs of a directory.
#[derive(Debug)]
pub(super) struct Maps {
    layout: Layout,
    open: Cache<Digest, Pack>,
}

impl Maps {
    pub(super) fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone(), open: Cache::new(MAX_OPEN) }
    }

    /// See [`super::Packs::resident_frame`].
    pub(super) fn resident(&self, place: &Place) -> Option<Bytes> {
        let pack = self.open.get(&place.pack).filter(|pack| !pack.map.was_cut())?;
        pack.frame(place).filter(|frame| map::is_resident(frame))
    }

    /// See [`super::Packs::load`].
    pub(super) fn load(&self, place: &Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let known = self.open.get(&place.pack);
        let outcome = known.as_ref().map(|pack| pack.load(place, chunk, check));
        if let (Some(pack), Some(Ok(frame))) = (&known, &outcome)
            && !pack.map.was_cut()
        {
            return Ok(frame.clone());
        }
        // A push may have replaced a damaged file by a good one.
        let pack = match Pack::open(&self.layout.pack(&place.pack), place.pack) {
            Err(error) if is_gone(&error) => {
                self.open.remove(&place.pack);
                return Err(StoreError::NotFound(format!("chunk {chunk}")));
            }
            other => Arc::new(other?),
        };
        if let (Some(known), Some(Err(error))) = (known, outcome)
            && known.is_of_same_file(&pack)
        {
            known.log_damage(&error);
            return Err(error);
        }
        let frame = pack.load(place, chunk, check).inspect_err(|error| pack.log_damage(error));
        self.open.insert(place.pack, pack, 1);
        frame
    }

    /// Keeps a newly written pack open.
    pub(super) fn keep(&self, pack: Pack) {
        self.open.insert(pack.digest, Arc::new(pack), 1);
    }

    /// Releases packs whose files a collector of any process has deleted, because their space is
    /// free once no process maps them.
    pub(super) fn release_deleted(&self) {
        for pack in self.open.keys() {
            let metadata = fs::metadata(self.layout.pack(&pack));
            if metadata.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                self.open.remove(&pack);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> Vec<Digest> {
        self.open.keys()
    }
}
