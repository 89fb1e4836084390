//! The packs, and the way to the frame of a chunk.
//!
//! A pack is opened, which maps it, when a frame of it is read. [`MAX_OPEN`] packs stay open, so
//! neither the start of a server nor its memory depends on how many packs a store has. A locator
//! ([`super::locators`]) tells the place of a frame; if it is missing or wrong, the chunk index
//! ([`super::index`]) finds another.

use crate::store::cache::Cache;
use crate::store::error::{StoreError, damaged, io_error, pack_name};
use crate::store::index::ChunkIndex;
use crate::store::index::run::{Found, PackLength, Place};
use crate::store::layout::Layout;
use crate::store::map::{self, Map};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::pack::PackIndex;
use std::collections::HashMap;
use std::fs::{self, File};
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
pub(crate) struct Pack {
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
    pub(crate) fn open(path: &Path, digest: Digest) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(io_error(path))?;
        let inode = file.metadata().map_err(io_error(path))?.ino();
        let map = Map::new(&file).map_err(io_error(path))?;
        Ok(Self { digest, map, inode, damage_is_logged: AtomicBool::new(false) })
    }

    /// Maps a pack and reads its index.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] with the pack's name, or [`StoreError::Io`].
    pub(crate) fn open_with_index(path: &Path, digest: Digest) -> Result<(Self, PackIndex), StoreError> {
        let pack = Self::open(path, digest)?;
        let bytes = pack.map.bytes();
        let read_ahead = bytes.len().saturating_sub(INDEX_READ_AHEAD);
        map::populate(&bytes[read_ahead..]).map_err(|e| damaged(pack_name(&digest), e))?;
        let index = PackIndex::parse(bytes).map_err(|e| damaged(pack_name(&digest), e))?;
        Ok((pack, index))
    }

    /// Returns the pack's name and length.
    pub(crate) fn length(&self) -> PackLength {
        // A longer file is no pack, and has no index.
        let bytes = u32::try_from(self.map.bytes().len()).unwrap_or(u32::MAX);
        PackLength { pack: self.digest, bytes }
    }

    /// Returns the whole pack, read from the disk.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if the pack was truncated or cannot be read.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(crate) fn populated(&self) -> Result<&Bytes, StoreError> {
        map::populate(self.map.bytes()).map_err(|e| damaged(pack_name(&self.digest), e))?;
        Ok(self.map.bytes())
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
            let outcome = ChunkFrame::parse(&frame).and_then(|parsed| {
                let mut plain = vec![0; parsed.chunk_bytes()];
                FrameDecoder::default().decode_verified(&parsed, chunk, &mut plain)
            });
            outcome.map_err(|e| damaged(object(), e))?;
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

/// The packs of a store.
#[derive(Debug)]
pub(crate) struct Packs {
    layout: Layout,
    open: Cache<Pack>,
    index: ChunkIndex,
}

impl Packs {
    /// Makes the access to a store's packs. Opens none.
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone(), open: Cache::new(MAX_OPEN), index: ChunkIndex::new(layout) }
    }

    /// Returns the frame at a place, if its pack is open and the frame in memory; `None` also for a
    /// place beyond the pack's end, and a pack that has lost pages. Never waits for a disk.
    pub(crate) fn resident_frame(&self, place: &Place) -> Option<Bytes> {
        let pack = self.open.get(&place.pack).filter(|pack| !pack.map.was_cut())?;
        pack.frame(place).filter(|frame| map::is_resident(frame))
    }

    /// Returns the frame of a chunk at a place. With `check`, decodes it and compares it with the
    /// chunk's digest; without, only ensures that its bytes can be read.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the pack does not exist, or [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(crate) fn load(&self, place: &Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
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

    /// Returns the frame of a chunk from any pack with a good copy, and its place.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if no pack holds the chunk, or [`StoreError::Damaged`] with
    /// the last pack if none has a good copy.
    ///
    /// # Blocking
    /// Waits for the disk, and reads the directory again if necessary.
    pub(crate) fn find_frame(&self, chunk: &Digest, check: bool) -> Result<(Place, Bytes), StoreError> {
        let first = self.find_known_frame(chunk, check);
        if first.is_ok() {
            return first;
        }
        // Another call may have found the pack meanwhile, also if this one finds none.
        self.index.scan()?;
        self.find_known_frame(chunk, check)
    }

    fn find_known_frame(&self, chunk: &Digest, check: bool) -> Result<(Place, Bytes), StoreError> {
        let mut places = Vec::new();
        self.index.find(&[*chunk], |_, found| places.push(found.place))?;
        let mut outcome = Err(StoreError::NotFound(format!("chunk {chunk}")));
        for place in places {
            match self.load(&place, chunk, check) {
                // A deleted pack says nothing of the other ones.
                Err(StoreError::NotFound(_)) => {}
                Ok(frame) => return Ok((place, frame)),
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    /// Adds a newly written pack to the index. Returns false if it is gone already.
    ///
    /// # Errors
    /// Returns the errors of [`Pack::open_with_index`].
    pub(crate) fn add(&self, digest: Digest) -> Result<bool, StoreError> {
        match Pack::open_with_index(&self.layout.pack(&digest), digest) {
            Ok((pack, index)) => {
                self.index.add(pack.length(), &index);
                self.open.insert(digest, Arc::new(pack), 1);
                Ok(true)
            }
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Releases packs whose files a collector of any process has deleted, because their space is
    /// free once no process maps them. Writes the index's recent packs to a run, if they are many.
    ///
    /// # Errors
    /// Returns the errors of [`ChunkIndex::maintain`].
    ///
    /// # Blocking
    /// See [`ChunkIndex::maintain`].
    pub(crate) fn maintain(&self) -> Result<(), StoreError> {
        for pack in self.open.keys() {
            let metadata = fs::metadata(self.layout.pack(&pack));
            if metadata.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                self.open.remove(&pack);
            }
        }
        self.index.maintain()
    }

    /// Returns the open packs, and the number of packs in the index.
    #[cfg(test)]
    pub(crate) fn known(&self) -> (Vec<Digest>, usize) {
        (self.open.keys(), self.index.packs())
    }

    /// Reads the directory, and writes all packs to a run.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Reads the trailers of all packs that no run covers.
    pub(crate) fn write_index(&self) -> Result<(), StoreError> {
        self.index.scan()?;
        self.index.write()
    }

    /// Returns a check of chunks by path.
    pub(crate) fn presence(&self) -> Presence<'_> {
        Presence { packs: self, stored: HashMap::new(), has_scanned: false }
    }

    /// Returns true if the pack's file exists with this length.
    pub(crate) fn is_stored(&self, PackLength { pack, bytes }: PackLength) -> bool {
        let metadata = fs::metadata(self.layout.pack(&pack));
        metadata.is_ok_and(|metadata| metadata.len() == u64::from(bytes))
    }
}

/// A check of chunks by path, whatever the index says. It checks each pack once, so the caller must
/// hold [`super::lock::StoreLock::keep_objects`] while it uses this, or look for the packs again
/// under that lock.
#[derive(Debug)]
pub(crate) struct Presence<'a> {
    packs: &'a Packs,
    /// The packs that were looked for, and whether their files exist.
    stored: HashMap<PackLength, bool>,
    has_scanned: bool,
}

impl Presence<'_> {
    /// Returns for each chunk a place in a pack that exists; `None` if there is none. The caller
    /// relies on these packs from then on.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] from reading the index or the directory.
    pub(crate) fn places(&mut self, chunks: &[Digest]) -> Result<Vec<Option<Place>>, StoreError> {
        let mut places = vec![None; chunks.len()];
        self.find(chunks, &mut places)?;
        if places.contains(&None) && !self.has_scanned {
            self.has_scanned = true;
            self.packs.index.scan()?;
            // The scan may have found a pack again that did not exist before.
            self.stored.retain(|_, is_stored| *is_stored);
            self.find(chunks, &mut places)?;
        }
        Ok(places)
    }

    fn find(&mut self, chunks: &[Digest], places: &mut [Option<Place>]) -> Result<(), StoreError> {
        let Self { packs, stored, .. } = self;
        packs.index.find(chunks, |number, Found { place, pack_bytes }| {
            let pack = PackLength { pack: place.pack, bytes: pack_bytes };
            if places[number].is_none() && *stored.entry(pack).or_insert_with(|| packs.is_stored(pack)) {
                places[number] = Some(place);
            }
        })
    }

    /// Returns the packs that the caller relies on.
    pub(crate) fn relied_on(self) -> Vec<PackLength> {
        self.stored.into_iter().filter(|(_, is_stored)| *is_stored).map(|(pack, _)| pack).collect()
    }
}
