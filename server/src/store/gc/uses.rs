//! The packs that marked chunks need, by the chunk index.
//!
//! Several packs may hold a chunk. One of them is preferred, by an order of all packs that every
//! collector finds anew; a pack is needed if it is the preferred one of a marked chunk. First come
//! the good packs: long ones that are mostly live. The others are worn: repacking ([`super::repack`])
//! puts their chunks into new packs. The order is such that the new packs come before the worn ones
//! from which they were made, which then are not needed.

use crate::store::error::StoreError;
use crate::store::index::ChunkIndex;
use crate::store::index::run::Place;
use crate::store::packs::Packs;
use postcopy_proto::digest::Digest;
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// Bytes from which on a pack is not small.
pub(super) const SMALL_BYTES: u64 = 4 << 20;
/// Bytes of a chunk's entry in a pack's index.
const ENTRY_BYTES: u64 = 44;
/// Bytes of a pack's header and trailer.
const ENDS_BYTES: u64 = 80;

/// A pack, and how much of it is needed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PackUse {
    /// Length of the pack.
    pub(super) bytes: u64,
    /// Bytes of the marked chunks, whatever other packs hold them.
    live_bytes: u64,
    /// For a worn pack, bytes of the marked chunks that no good pack holds.
    pub(super) owed_bytes: u64,
    /// Number of these chunks.
    pub(super) owed_chunks: u64,
    /// The pack is the preferred one of a marked chunk.
    pub(super) is_needed: bool,
}

impl PackUse {
    /// Returns true if less than half of the pack is live.
    pub(super) fn is_mostly_dead(&self) -> bool {
        2 * (self.live_bytes + ENDS_BYTES) < self.bytes
    }

    pub(super) fn is_worn(&self) -> bool {
        self.bytes < SMALL_BYTES || self.is_mostly_dead()
    }

    /// Returns the order of good packs among each other.
    fn good_rank(&self, pack: Digest) -> (Reverse<u64>, u64, Digest) {
        (Reverse(self.live_bytes), self.bytes, pack)
    }

    /// Returns the order of worn packs among each other. A new pack that holds all that some packs
    /// owe comes before each of them: it owes more, or as much in fewer bytes.
    fn worn_rank(&self, pack: Digest) -> (Reverse<u64>, u64, Digest) {
        (Reverse(self.owed_bytes), self.bytes, pack)
    }
}

/// Returns the bytes that a chunk takes in a pack.
pub(super) fn chunk_bytes(place: &Place) -> u64 {
    u64::from(place.length) + ENTRY_BYTES
}

/// The uses of all stored packs that the chunk index knows. It lacks those that cannot be read.
#[derive(Debug, Default)]
pub(super) struct Uses {
    pub(super) packs: HashMap<Digest, PackUse>,
    /// The places of marked chunks that no good pack holds, in ascending order of chunk.
    pub(super) worn: Vec<(Digest, Place)>,
}

impl Uses {
    /// Reads the chunk index twice, for the packs that are stored and the chunks that are marked.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Bucket`].
    ///
    /// # Blocking
    /// Reads the whole chunk index, and the trailers of all packs that it lacks.
    pub(super) fn find(
        packs: &Packs,
        stored: &HashSet<Digest>,
        marked: &HashSet<Digest>,
    ) -> Result<Self, StoreError> {
        loop {
            match Self::read(packs.scanned_index()?, stored, marked) {
                // A damaged run, which is gone now.
                Err(StoreError::Damaged { .. }) => {}
                other => return other,
            }
        }
    }

    fn read(
        index: &ChunkIndex,
        stored: &HashSet<Digest>,
        marked: &HashSet<Digest>,
    ) -> Result<Self, StoreError> {
        let mut uses = Self::default();
        let known = index.known_packs().into_iter().filter(|known| stored.contains(&known.pack));
        uses.packs.extend(
            known.map(|known| (known.pack, PackUse { bytes: known.bytes.into(), ..PackUse::default() })),
        );
        index.visit(&mut |chunk, place| {
            if marked.contains(chunk)
                && let Some(used) = uses.packs.get_mut(&place.pack)
            {
                used.live_bytes += chunk_bytes(&place);
            }
        })?;
        let (mut chunk_before, mut places) = (None, Vec::new());
        index.visit(&mut |chunk, place| {
            if chunk_before != Some(*chunk) {
                chunk_before.iter().for_each(|before| uses.add(before, &places));
                (chunk_before, places) = (Some(*chunk), Vec::new());
            }
            if uses.packs.contains_key(&place.pack) && marked.contains(chunk) {
                places.push(place);
            }
        })?;
        chunk_before.iter().for_each(|before| uses.add(before, &places));
        uses.prefer_worn();
        Ok(uses)
    }

    /// Adds the places of a marked chunk.
    fn add(&mut self, chunk: &Digest, places: &[Place]) {
        let good = places.iter().map(|place| place.pack).filter(|pack| !self.packs[pack].is_worn());
        if let Some(pack) = good.min_by_key(|pack| self.packs[pack].good_rank(*pack)) {
            self.need(&pack);
            return;
        }
        for place in places {
            let used = self.packs.entry(place.pack).or_default();
            used.owed_bytes += chunk_bytes(place);
            used.owed_chunks += 1;
            self.worn.push((*chunk, *place));
        }
    }

    /// Finds the preferred packs of the chunks that no good pack holds.
    fn prefer_worn(&mut self) {
        let worn = std::mem::take(&mut self.worn);
        for places in worn.chunk_by(|a, b| a.0 == b.0) {
            let packs = places.iter().map(|(_, place)| place.pack);
            let preferred = packs.min_by_key(|pack| self.packs[pack].worn_rank(*pack));
            preferred.iter().for_each(|pack| self.need(pack));
        }
        self.worn = worn;
    }

    fn need(&mut self, pack: &Digest) {
        self.packs.entry(*pack).or_default().is_needed = true;
    }
}
