//! The packs, and the way to the frame of a chunk.
//!
//! Neither the start of a server nor its memory depends on how many packs a store has: of files,
//! some are mapped ([`maps`]), and of a bucket's packs, blocks are in memory ([`blocks`]). A locator
//! ([`super::locators`]) tells the place of a frame; if it is missing or wrong, the chunk index
//! ([`super::index`]) finds another.

mod blocks;
mod disk;
mod hedge;
mod maps;
mod peers;

use crate::store::condemned;
use crate::store::error::{StoreError, damaged, pack_name};
use crate::store::index::ChunkIndex;
use crate::store::index::run::{Found, PackLength, Place};
use crate::store::lock::StoreLock;
use crate::store::objects::{Kind, Objects};
use blocks::Blocks;
use bytes::Bytes;
pub use disk::DiskCache;
use maps::{Maps, Pack};
pub use peers::{PackBlock, PeerReading, Peers};
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::pack::{PackError, PackIndex};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// Bytes at the end of a bucket's pack that are read first: the index of most packs.
const END_BYTES: u64 = 64 << 10;

/// Where the bytes of packs are read.
#[derive(Debug)]
enum Frames {
    Maps(Maps),
    Blocks(Blocks),
}

/// The packs of a store.
#[derive(Debug)]
pub(crate) struct Packs {
    objects: Objects,
    frames: Frames,
    index: ChunkIndex,
}

/// Reads the index of a pack; `None` if the pack does not exist.
///
/// # Errors
/// Returns [`StoreError::Damaged`] with the pack's name, or that it cannot be read.
///
/// # Blocking
/// Waits for the disk, or for two or three requests to the bucket.
pub(crate) fn read_index(
    objects: &Objects,
    digest: Digest,
) -> Result<Option<(PackLength, PackIndex)>, StoreError> {
    let path = objects.layout.pack(&digest);
    let Kind::Bucket(bucket) = objects.kind() else {
        let opened = Pack::open_with_index(&path, digest)?;
        return Ok(opened.map(|(pack, index)| (pack.length(), index)));
    };
    let Some(length) = objects.length(&path)? else { return Ok(None) };
    let wrong = |e| damaged(pack_name(&digest), e);
    if length == 0 {
        return Err(wrong(PackError::Length(0)));
    }
    // A longer object is no pack, and has no index.
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    let read =
        |end_bytes: u64| bucket.wait(bucket.read_range(&path, length.saturating_sub(end_bytes)..length));
    let (mut end, _) = read(END_BYTES)?;
    let needed = PackIndex::end_bytes(&end, bytes).map_err(wrong)?;
    if needed > end.len() {
        (end, _) = read(needed as u64)?;
    }
    let index = PackIndex::parse_end(&end, bytes).map_err(wrong)?;
    let bytes = u32::try_from(length).unwrap_or(u32::MAX);
    Ok(Some((PackLength { pack: digest, bytes }, index)))
}

/// Decodes the frame of a chunk, and compares it with the chunk's digest.
pub(super) fn check_frame(frame: &[u8], chunk: &Digest, pack: &Digest) -> Result<(), StoreError> {
    let outcome = ChunkFrame::parse(frame).and_then(|parsed| {
        let mut plain = vec![0; parsed.chunk_bytes()];
        FrameDecoder::default().decode_verified(&parsed, chunk, &mut plain)
    });
    outcome.map_err(|e| damaged(format!("chunk {chunk} in pack {pack}"), e))
}

impl Packs {
    /// Makes the access to a store's packs. Opens none.
    pub(crate) fn new(objects: &Objects) -> Self {
        let frames = match objects.kind() {
            Kind::Directory(_) => Frames::Maps(Maps::new(&objects.layout)),
            Kind::Bucket(bucket) => Frames::Blocks(Blocks::new(&objects.layout, bucket)),
        };
        Self { objects: objects.clone(), frames, index: ChunkIndex::new(objects) }
    }

    /// Returns the frame at a place, if it is in memory; `None` also for a place beyond the pack's
    /// end, and a mapped pack that has lost pages. Never waits for a disk.
    pub(crate) fn resident_frame(&self, place: &Place) -> Option<Bytes> {
        match &self.frames {
            Frames::Maps(maps) => maps.resident(place),
            Frames::Blocks(blocks) => blocks.resident(place),
        }
    }

    /// Returns the frame of a chunk at a place. With `check`, decodes it and compares it with the
    /// chunk's digest; without, only ensures that its bytes can be read.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the pack does not exist, or [`StoreError::Damaged`].
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn load(&self, place: &Place, chunk: &Digest, check: bool) -> Result<Bytes, StoreError> {
        match &self.frames {
            Frames::Maps(maps) => maps.load(place, chunk, check),
            Frames::Blocks(blocks) => blocks.load(place, chunk, check),
        }
    }

    /// Returns a block of a pack, for another server: asks none itself.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the pack does not exist, or [`StoreError::Invalid`] for a
    /// block that no pack has, or if the store is a directory.
    pub(crate) async fn block(&self, pack: Digest, block: u64) -> Result<PackBlock, StoreError> {
        match &self.frames {
            Frames::Blocks(blocks) => blocks.block_here(pack, block).await,
            Frames::Maps(_) => {
                let reason = "the store is a directory, which has none".to_owned();
                Err(StoreError::Invalid { object: format!("block {block}"), reason })
            }
        }
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
    /// Returns the errors of [`read_index`].
    ///
    /// # Blocking
    /// As there.
    pub(crate) fn add(&self, digest: Digest) -> Result<bool, StoreError> {
        let found = match &self.frames {
            Frames::Blocks(_) => read_index(&self.objects, digest)?,
            Frames::Maps(maps) => {
                let opened = Pack::open_with_index(&self.objects.layout.pack(&digest), digest)?;
                opened.map(|(pack, index)| {
                    let length = pack.length();
                    maps.keep(pack);
                    (length, index)
                })
            }
        };
        if let Some((length, index)) = &found {
            self.index.add(*length, index);
        }
        Ok(found.is_some())
    }

    /// Writes a pack that the store makes of its own frames, and adds it to the index. Returns false
    /// if it is gone already, by a collector without a grace time.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`], [`StoreError::Bucket`].
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket, and for collectors.
    pub(crate) fn store(&self, digest: Digest, pack: &[u8]) -> Result<bool, StoreError> {
        let path = self.objects.layout.pack(&digest);
        let mut staged = self.objects.stage(&path)?;
        staged.write(pack)?;
        self.objects.publish(&staged, &path)?;
        let _keep = StoreLock::keep_objects(&self.objects)?;
        let exists = self.add(digest)?;
        if exists {
            condemned::pardon(&self.objects, &digest)?;
        }
        Ok(exists)
    }

    /// Releases deleted packs that are mapped. Writes the index's recent packs to a run, if they are
    /// many.
    ///
    /// # Errors
    /// Returns the errors of [`ChunkIndex::maintain`].
    ///
    /// # Blocking
    /// See [`ChunkIndex::maintain`].
    pub(crate) fn maintain(&self) -> Result<(), StoreError> {
        if let Frames::Maps(maps) = &self.frames {
            maps.release_deleted();
        }
        self.index.maintain()
    }

    /// Returns the mapped packs, and the number of packs in the index.
    #[cfg(test)]
    pub(crate) fn known(&self) -> (Vec<Digest>, usize) {
        let open = match &self.frames {
            Frames::Maps(maps) => maps.open(),
            Frames::Blocks(_) => Vec::new(),
        };
        (open, self.index.packs())
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

    /// Returns the chunk index, after it has read the directory.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Bucket`].
    ///
    /// # Blocking
    /// Reads the trailers of all packs that the index lacks.
    pub(crate) fn scanned_index(&self) -> Result<&ChunkIndex, StoreError> {
        self.index.scan()?;
        Ok(&self.index)
    }

    /// Returns a check of chunks by path.
    pub(crate) fn presence(&self) -> Presence<'_> {
        let (stored, relied_on) = (HashMap::new(), HashSet::new());
        Presence { packs: self, stored, relied_on, condemned: None, has_scanned: false }
    }

    /// Returns for each pack whether it exists with this length.
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn are_stored(&self, packs: &[PackLength]) -> Result<Vec<bool>, StoreError> {
        let paths: Vec<_> = packs.iter().map(|known| self.objects.layout.pack(&known.pack)).collect();
        let lengths = self.objects.lengths(&paths)?;
        let are_stored = packs.iter().zip(lengths).map(|(pack, length)| length == Some(pack.bytes.into()));
        Ok(are_stored.collect())
    }
}

/// A place, and its pack.
type Known = (PackLength, Place);

/// A check of chunks by path, whatever the index says. It checks each pack once, so the caller must
/// hold [`super::lock::StoreLock::keep_objects`] while it uses this, or look for the packs again
/// under that lock.
///
/// Of several packs that hold a chunk, the caller relies on one: if possible one that no collector
/// has condemned, since a pack that was repacked would else be pardoned with each push. A chunk that
/// is only known in condemned packs may lie in a new one, so the directory is read for it, too.
#[derive(Debug)]
pub(crate) struct Presence<'a> {
    packs: &'a Packs,
    /// The packs that were looked for, and whether their files exist.
    stored: HashMap<PackLength, bool>,
    relied_on: HashSet<PackLength>,
    /// `None` until a chunk is found.
    condemned: Option<HashSet<Digest>>,
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
        if !self.has_scanned && !places.iter().all(|place| self.is_lasting(place.as_ref())) {
            self.has_scanned = true;
            self.packs.index.scan()?;
            // The scan may have found a pack again that did not exist before.
            self.stored.retain(|_, is_stored| *is_stored);
            self.find(chunks, &mut places)?;
        }
        self.relied_on.extend(places.iter().flatten().map(|(known, _)| *known));
        Ok(places.into_iter().map(|place| place.map(|(_, place)| place)).collect())
    }

    /// Finds the places of chunks that have none, or one in a condemned pack.
    fn find(&mut self, chunks: &[Digest], places: &mut [Option<Known>]) -> Result<(), StoreError> {
        let mut found: Vec<(usize, Known)> = Vec::new();
        self.packs.index.find(chunks, |number, Found { place, pack_bytes }| {
            if !self.is_lasting(places[number].as_ref()) {
                found.push((number, (PackLength { pack: place.pack, bytes: pack_bytes }, place)));
            }
        })?;
        let mut unknown: Vec<_> = found.iter().map(|(_, (pack, _))| *pack).collect();
        unknown.sort_unstable();
        unknown.dedup();
        unknown.retain(|pack| !self.stored.contains_key(pack));
        let are_stored = self.packs.are_stored(&unknown)?;
        self.stored.extend(unknown.into_iter().zip(are_stored));
        found.retain(|(_, (pack, _))| self.stored[pack]);
        if !found.is_empty() && self.condemned.is_none() {
            let listed = condemned::list(&self.packs.objects)?;
            self.condemned = Some(listed.into_iter().map(|(object, _)| object).collect());
        }
        for (number, known) in found {
            let rank = |(pack, _): &Known| (self.is_condemned(pack), Reverse(pack.bytes), pack.pack);
            if places[number].as_ref().is_none_or(|before| rank(&known) < rank(before)) {
                places[number] = Some(known);
            }
        }
        Ok(())
    }

    fn is_condemned(&self, pack: &PackLength) -> bool {
        self.condemned.as_ref().is_some_and(|condemned| condemned.contains(&pack.pack))
    }

    fn is_lasting(&self, place: Option<&Known>) -> bool {
        place.is_some_and(|(pack, _)| !self.is_condemned(pack))
    }

    /// Returns the packs that the caller relies on.
    pub(crate) fn relied_on(self) -> Vec<PackLength> {
        self.relied_on.into_iter().collect()
    }
}
