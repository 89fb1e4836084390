//! The index of all frames, made from the trailers of all packs, and the packs as memory.
//!
//! The directory is the truth, and the index a copy. The store makes the index from the directory
//! at open, and extends it by uploads. If a chunk is not found, the store reads the directory
//! again, because another process may have stored the chunk.

use crate::store::error::{StoreError, damaged, io_error, pack_name};
use crate::store::layout::{Layout, digest_of_name};
use crate::store::map::{self, Map};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::pack::{PackEntry, PackIndex};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet, hash_map};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

/// Age below which a directory's time is not trusted. A directory may change again within the same
/// tick of its file system's clock, which is at most 10 ms on Linux and 2 s on FAT.
const RACY_MTIME: Duration = Duration::from_secs(2);

/// Bytes at the end of a pack that are read before it is parsed: more than the index of 16,384 raw
/// 4 KiB chunks.
const INDEX_READ_AHEAD: usize = 1 << 20;

/// A pack, mapped into memory.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) digest: Digest,
    map: Map,
    /// The inode of the mapped file. Another file may replace it, when a damaged pack is uploaded
    /// again.
    inode: u64,
    damage_is_logged: AtomicBool,
}

impl Pack {
    /// Maps a pack and reads its index.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] with the pack's name, or [`StoreError::Io`].
    pub(crate) fn open(path: &Path, digest: Digest) -> Result<(Self, PackIndex), StoreError> {
        let file = File::open(path).map_err(io_error(path))?;
        let inode = file.metadata().map_err(io_error(path))?.ino();
        let map = Map::new(&file).map_err(io_error(path))?;
        let index = read_index(&map, &digest)?;
        Ok((Self { digest, map, inode, damage_is_logged: AtomicBool::new(false) }, index))
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
    fn frame(&self, place: Place) -> Option<Bytes> {
        let start = place.offset as usize;
        let range = start..start + place.length as usize;
        (range.end <= self.map.bytes().len()).then(|| self.map.bytes().slice(range))
    }

    /// Returns the frame of a chunk, read from the disk. Decodes it if `check` is set or the map
    /// has lost pages.
    fn load(&self, place: Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let too_short = || damaged(pack_name(&self.digest), "it is shorter than it was");
        let frame = self.frame(place).ok_or_else(too_short)?;
        let object = || format!("chunk {chunk} in pack {}", self.digest);
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

    fn log_damage(&self, error: &StoreError) {
        if !self.damage_is_logged.swap(true, Ordering::Relaxed) {
            tracing::error!(pack = %self.digest, "{error}");
        }
    }

    /// Returns true if the file still exists with the same length.
    fn is_stored(&self, layout: &Layout) -> bool {
        let metadata = fs::metadata(layout.pack(&self.digest));
        metadata.is_ok_and(|metadata| metadata.len() == self.map.bytes().len() as u64)
    }
}

/// Reads the index of a mapped pack, together with the bytes before it.
fn read_index(map: &Map, digest: &Digest) -> Result<PackIndex, StoreError> {
    let bytes = map.bytes();
    let read_ahead = bytes.len().saturating_sub(INDEX_READ_AHEAD);
    map::populate(&bytes[read_ahead..]).map_err(|e| damaged(pack_name(digest), e))?;
    PackIndex::parse(bytes).map_err(|e| damaged(pack_name(digest), e))
}

/// Returns true if a file was deleted between its listing and its opening.
fn is_gone(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// The place of a frame: its pack, as a number in [`Index::packs`], and its bytes there.
#[derive(Clone, Copy, Debug)]
struct Place {
    pack: u32,
    offset: u32,
    length: u32,
}

#[derive(Debug, Default)]
struct Index {
    /// The packs by number; `None` for deleted ones.
    packs: Vec<Option<Arc<Pack>>>,
    numbers: HashMap<Digest, u32>,
    places: HashMap<Digest, Place>,
    /// Further places of the few chunks that lie in several packs.
    more_places: HashMap<Digest, Vec<Place>>,
}

impl Index {
    fn add(&mut self, pack: Pack, index: &PackIndex) {
        if let Some(&number) = self.numbers.get(&pack.digest) {
            // An equal digest means equal places.
            self.packs[number as usize] = Some(Arc::new(pack));
            return;
        }
        let number = u32::try_from(self.packs.len()).expect("fewer packs than maps that Linux allows");
        self.numbers.insert(pack.digest, number);
        self.packs.push(Some(Arc::new(pack)));
        self.places.reserve(index.entries().len());
        for entry in index.entries() {
            let place = Place { pack: number, offset: entry.offset, length: entry.length };
            match self.places.entry(entry.chunk) {
                hash_map::Entry::Vacant(vacant) => {
                    vacant.insert(place);
                }
                hash_map::Entry::Occupied(_) => self.more_places.entry(entry.chunk).or_default().push(place),
            }
        }
    }

    /// Forgets a pack and its chunks, unless another file has replaced it.
    fn remove(&mut self, pack: &Arc<Pack>, entries: &[PackEntry]) {
        let Some(&number) = self.numbers.get(&pack.digest) else { return };
        if !self.pack(number).is_some_and(|known| Arc::ptr_eq(known, pack)) {
            return;
        }
        self.packs[number as usize] = None;
        self.numbers.remove(&pack.digest);
        for entry in entries {
            let mut rest: Vec<_> = self.places(&entry.chunk).filter(|place| place.pack != number).collect();
            self.places.remove(&entry.chunk);
            self.more_places.remove(&entry.chunk);
            if let Some(first) = rest.pop() {
                self.places.insert(entry.chunk, first);
            }
            if !rest.is_empty() {
                self.more_places.insert(entry.chunk, rest);
            }
        }
    }

    fn pack(&self, number: u32) -> Option<&Arc<Pack>> {
        self.packs[number as usize].as_ref()
    }

    fn places(&self, chunk: &Digest) -> impl Iterator<Item = Place> {
        let first = self.places.get(chunk).copied();
        let more = first.and_then(|_| self.more_places.get(chunk)).into_iter().flatten().copied();
        first.into_iter().chain(more)
    }
}

/// The state of the last reading of the directory.
#[derive(Debug, Default)]
struct Scan {
    began: Option<Instant>,
    /// Times of the subdirectories whose packs are all known.
    seen: HashMap<PathBuf, SystemTime>,
    /// Files that are no packs; each is reported once.
    refused: HashSet<(Digest, u64)>,
}

/// The packs of a store.
#[derive(Debug)]
pub(crate) struct Packs {
    layout: Layout,
    /// Read for every page. Never held across an await, a disk access or the copy of a frame.
    index: RwLock<Index>,
    /// Locked while the directory is read, so that a burst of misses becomes one reading. Taken
    /// before `index`.
    scan: Mutex<Scan>,
}

impl Packs {
    /// Reads the trailers of all packs. Logs and skips packs that do not parse.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if the directory cannot be read.
    pub(crate) fn open(layout: &Layout) -> Result<Self, StoreError> {
        let packs = Self { layout: layout.clone(), index: RwLock::default(), scan: Mutex::default() };
        packs.scan()?;
        Ok(packs)
    }

    fn read<T>(&self, read: impl FnOnce(&Index) -> T) -> T {
        // At worst a panicked writer has omitted places of a pack, which are then read again.
        read(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn insert(&self, packs: Vec<(Pack, PackIndex)>) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        packs.into_iter().for_each(|(pack, entries)| index.add(pack, &entries));
    }

    /// Returns the frame of a chunk, if it is known and in memory. Never waits for a disk.
    pub(crate) fn resident_frame(&self, chunk: &Digest) -> Option<Bytes> {
        let frame = self.read(|index| {
            let place = *index.places.get(chunk)?;
            index.pack(place.pack).filter(|pack| !pack.map.was_cut())?.frame(place)
        })?;
        map::is_resident(&frame).then_some(frame)
    }

    /// Returns the frame of a chunk, from any pack with a good copy. With `check`, decodes it and
    /// compares it with the chunk's digest; without, only ensures that its bytes can be read.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if no pack holds the chunk, or [`StoreError::Damaged`] with
    /// the last pack if none has a good copy.
    ///
    /// # Blocking
    /// Waits for the disk, and reads the directory again if necessary.
    pub(crate) fn load_frame(&self, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let first = self.load_known_frame(chunk, check);
        if first.is_ok() {
            return first;
        }
        let reopened = self.reopen_cut(chunk);
        if !self.scan()? && !reopened {
            return first;
        }
        self.load_known_frame(chunk, check)
    }

    /// Maps those packs of a chunk again whose maps have lost pages. Returns true if one is
    /// complete again.
    fn reopen_cut(&self, chunk: &Digest) -> bool {
        let cut = self.read(|index| {
            let packs = index.places(chunk).filter_map(|place| index.pack(place.pack));
            packs.filter(|pack| pack.map.was_cut()).map(|pack| pack.digest).collect::<Vec<_>>()
        });
        let opened = cut.into_iter().map(|digest| Pack::open(&self.layout.pack(&digest), digest));
        let opened: Vec<_> = opened.filter_map(Result::ok).collect();
        let learned = !opened.is_empty();
        self.insert(opened);
        learned
    }

    fn load_known_frame(&self, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        let copies: Vec<_> = self.read(|index| {
            let copies = index.places(chunk).map(|place| Some((index.pack(place.pack)?.clone(), place)));
            copies.flatten().collect()
        });
        let mut outcome = Err(StoreError::NotFound(format!("chunk {chunk}")));
        for (pack, place) in copies {
            outcome = pack.load(place, chunk, check);
            match &outcome {
                Ok(_) => break,
                Err(error) => pack.log_damage(error),
            }
        }
        outcome
    }

    /// Returns the length in bytes of a chunk's frame, if a pack holds it.
    pub(crate) fn frame_bytes(&self, chunk: &Digest) -> Option<u32> {
        self.read(|index| index.places.get(chunk).map(|place| place.length))
    }

    /// Returns true if the pack is known and its file exists.
    pub(crate) fn is_stored(&self, pack: &Digest) -> bool {
        let known = self.read(|index| index.pack(*index.numbers.get(pack)?).cloned());
        known.is_some_and(|pack| pack.is_stored(&self.layout))
    }

    /// Adds a newly written pack to the index. Returns false if it is gone already.
    ///
    /// # Errors
    /// Returns the errors of [`Pack::open`].
    pub(crate) fn add(&self, digest: Digest) -> Result<bool, StoreError> {
        match Pack::open(&self.layout.pack(&digest), digest) {
            Ok(opened) => self.insert(vec![opened]),
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Releases packs whose files a collector of any process has deleted. Their space is free once
    /// no process maps them.
    ///
    /// # Blocking
    /// Takes about 1 us for each pack, and the time to read deleted packs' indexes.
    pub(crate) fn forget_deleted(&self) {
        let known: Vec<_> = self.read(|index| index.packs.iter().flatten().cloned().collect());
        for pack in known {
            let metadata = fs::metadata(self.layout.pack(&pack.digest));
            if !metadata.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                continue;
            }
            let index = read_index(&pack.map, &pack.digest);
            // Without the index the pack's places stay, and lead nowhere.
            let entries = index.as_ref().map_or(&[][..], PackIndex::entries);
            // If the pack is stored again, its directory may look as it did when it was last read.
            let directory = self.layout.pack(&pack.digest).parent().map(Path::to_owned);
            let mut scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
            directory.and_then(|directory| scan.seen.remove(&directory));
            self.index.write().unwrap_or_else(PoisonError::into_inner).remove(&pack, entries);
        }
    }

    /// Returns a check of chunks by path.
    pub(crate) fn presence(&self) -> Presence<'_> {
        Presence { packs: self, stored: HashMap::new(), relied_on: HashSet::new(), has_scanned: false }
    }

    /// Reads the changed parts of the directory again. Returns true if this call, or another one
    /// that began after it, found packs.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Takes about 1 us for each of 256 subdirectories, and the time to read new packs' indexes.
    pub(crate) fn scan(&self) -> Result<bool, StoreError> {
        let asked = Instant::now();
        let mut scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
        if scan.began.is_some_and(|began| began > asked) {
            return Ok(true);
        }
        scan.began = Some(asked.max(Instant::now()));
        let new = self.new_packs(&mut scan)?;
        let opened: Vec<_> = new
            .into_par_iter()
            .map(|(path, digest, inode)| (digest, inode, Pack::open(&path, digest)))
            .collect();
        let mut packs = Vec::new();
        for (digest, inode, outcome) in opened {
            match outcome {
                Ok(opened) => packs.push(opened),
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    tracing::error!(pack = %digest, "not served: {}", crate::store::chain(&error));
                    // Transient errors, such as too many open files, are retried at the next miss
                    // of a chunk.
                    match error {
                        StoreError::Damaged { .. } => drop(scan.refused.insert((digest, inode))),
                        _ => scan.seen.clear(),
                    }
                }
            }
        }
        let learned = !packs.is_empty();
        self.insert(packs);
        Ok(learned)
    }

    /// Returns the packs of changed subdirectories that are unknown, or another file than the known
    /// one.
    fn new_packs(&self, scan: &mut Scan) -> Result<Vec<(PathBuf, Digest, u64)>, StoreError> {
        let top = self.layout.packs();
        let mut new = Vec::new();
        for dir in fs::read_dir(&top).map_err(io_error(&top))? {
            let dir = dir.map_err(io_error(&top))?;
            let path = dir.path();
            let metadata = dir.metadata().map_err(io_error(&path))?;
            let changed = metadata.modified().map_err(io_error(&path))?;
            if !metadata.is_dir() || scan.seen.get(&path) == Some(&changed) {
                continue;
            }
            if changed.elapsed().is_ok_and(|age| age > RACY_MTIME) {
                scan.seen.insert(path.clone(), changed);
            }
            self.new_packs_in(&path, scan, &mut new)?;
        }
        Ok(new)
    }

    fn new_packs_in(
        &self,
        dir: &Path,
        scan: &Scan,
        new: &mut Vec<(PathBuf, Digest, u64)>,
    ) -> Result<(), StoreError> {
        for entry in fs::read_dir(dir).map_err(io_error(dir))? {
            let entry = entry.map_err(io_error(dir))?;
            let Some(digest) = digest_of_name(&entry.file_name()) else { continue };
            // gc has deleted an entry that vanished meanwhile.
            let Ok(metadata) = entry.metadata() else { continue };
            let inode = metadata.ino();
            let known = self.read(|index| Some(index.pack(*index.numbers.get(&digest)?)?.inode));
            if known != Some(inode) && !scan.refused.contains(&(digest, inode)) {
                new.push((entry.path(), digest, inode));
            }
        }
        Ok(())
    }
}

/// A check of chunks by path, independent of the index. It checks each pack once, so the caller
/// must hold [`super::lock::StoreLock::keep_objects`] while it uses this, or look for the packs
/// again under that lock.
#[derive(Debug)]
pub(crate) struct Presence<'a> {
    packs: &'a Packs,
    stored: HashMap<u32, bool>,
    relied_on: HashSet<Digest>,
    has_scanned: bool,
}

impl Presence<'_> {
    /// Returns true if a pack that holds the chunk exists. The caller relies on that pack from then
    /// on.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] from reading the directory again.
    pub(crate) fn has(&mut self, chunk: &Digest) -> Result<bool, StoreError> {
        if self.is_known(chunk) {
            return Ok(true);
        }
        if self.has_scanned {
            return Ok(false);
        }
        self.has_scanned = true;
        self.packs.scan()?;
        // The scan may have found a pack again that did not exist before.
        self.stored.clear();
        Ok(self.is_known(chunk))
    }

    fn is_known(&mut self, chunk: &Digest) -> bool {
        let Self { packs, stored, relied_on, .. } = self;
        packs.read(|index| {
            index.places(chunk).any(|place| {
                let Some(pack) = index.pack(place.pack) else { return false };
                let is_stored = stored.entry(place.pack).or_insert_with(|| pack.is_stored(&packs.layout));
                if *is_stored {
                    relied_on.insert(pack.digest);
                }
                *is_stored
            })
        })
    }

    /// Returns the packs that the caller relies on.
    pub(crate) fn relied_on(self) -> HashSet<Digest> {
        self.relied_on
    }
}
