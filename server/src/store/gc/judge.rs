//! Judges condemned objects: which of them nothing needs.
//!
//! A pack that holds a marked chunk may be deleted if another pack holds a copy of it. The chunk
//! index proposes these packs; before the deletion, the collector decodes the copies, and reads the other
//! packs' own indexes. It relies on no pack that it, or a collector beside it, may delete: see
//! [`super::Deleting::gone`].

use crate::store::chain;
use crate::store::error::StoreError;
use crate::store::gc::Collector;
use crate::store::gc::mark::{Marked, Renew};
use crate::store::index::run::{Found, Place};
use crate::store::packs::read_index;
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::PackIndex;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Packs whose indexes are read together.
const READ_TOGETHER: usize = 64;
/// Chunks from which on their copies are looked for: 32 MiB of digests.
const BATCH_CHUNKS: usize = 1 << 20;

/// Condemned objects: those that nothing needs, with their kinds, and the others.
#[derive(Debug, Default)]
pub(super) struct Judged {
    pub(super) garbage: Vec<(Digest, Garbage)>,
    pub(super) needed: Vec<Digest>,
}

/// The kind of an object that nothing needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Garbage {
    Manifest,
    Pack,
}

/// A condemned object, by itself.
enum Seen {
    /// It is needed, does not exist, or cannot be read.
    Needed,
    Manifest,
    /// A pack, with the marked chunks that it holds.
    Pack(Vec<Digest>),
}

/// The places of chunks of condemned packs in other packs.
#[derive(Debug, Default)]
pub(super) struct Copies {
    places: HashMap<Digest, Vec<Place>>,
}

impl Copies {
    fn add(&mut self, found: impl Iterator<Item = (Place, Digest)>) {
        found.for_each(|(place, chunk)| self.places.entry(chunk).or_default().push(place));
    }

    fn of<'a>(&'a self, chunk: &Digest, gone: &'a HashSet<Digest>) -> impl Iterator<Item = &'a Place> {
        self.places.get(chunk).into_iter().flatten().filter(|place| !gone.contains(&place.pack))
    }
}

impl Collector {
    /// Returns the copies of these packs' chunks in packs that are not among them. Decodes them, and
    /// leaves out those whose frames are damaged.
    pub(super) fn sound_copies(&self, condemned: &[Digest]) -> Result<Copies, StoreError> {
        let outside = condemned.iter().copied().collect();
        let mut copies = Copies::default();
        // In batches, because the chunks that have no copies may be many.
        let (mut chunks, mut done) = (Vec::new(), 0);
        for packs in condemned.chunks(READ_TOGETHER) {
            let read = self.parallel_part(packs, &|object| match read_index(&self.objects, *object) {
                Ok(Some((_, index))) => Ok(index.entries().iter().map(|entry| entry.chunk).collect()),
                // No pack, or one that is kept because it cannot be read.
                _ => Ok(Vec::new()),
            })?;
            chunks.extend(read.into_iter().flatten());
            done += packs.len();
            if chunks.len() < BATCH_CHUNKS && done < condemned.len() {
                continue;
            }
            let found = self.find_copies(std::mem::take(&mut chunks), &outside)?;
            let are_sound =
                self.parallel_part(&found, &|(place, chunk)| match self.packs.load(place, chunk, true) {
                    Ok(_) => Ok(true),
                    Err(error @ StoreError::Bucket { .. }) => Err(error),
                    // Another copy may be sound. If none is, the pack is kept.
                    Err(_) => Ok(false),
                })?;
            let found = found.into_iter().zip(are_sound).filter(|(_, is_sound)| *is_sound);
            copies.add(found.map(|(copy, _)| copy));
            self.reporter.report("condemned objects compared", done as u64, condemned.len() as u64);
        }
        Ok(copies)
    }

    /// Returns places of chunks by the chunk index, outside of some packs, in the order in which they
    /// lie.
    fn find_copies(
        &self,
        mut chunks: Vec<Digest>,
        outside: &HashSet<Digest>,
    ) -> Result<Vec<(Place, Digest)>, StoreError> {
        let mut found = Vec::new();
        if chunks.is_empty() {
            return Ok(found);
        }
        chunks.sort_unstable();
        chunks.dedup();
        self.packs.scanned_index()?.find(&chunks, |number, Found { place, .. }| {
            if !outside.contains(&place.pack) {
                found.push((place, chunks[number]));
            }
        })?;
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Judges condemned objects by what is stored now. Relies on none of the packs that are `gone`,
    /// and on no copies but `sound` ones; with `None`, on those that the chunk index knows.
    pub(super) fn judge(
        &self,
        marked: &Marked,
        condemned: &[Digest],
        sound: Option<&Copies>,
        gone: &HashSet<Digest>,
        renew: &Renew<'_>,
    ) -> Result<Judged, StoreError> {
        let seen =
            self.parallel("condemned objects read", condemned, renew, |object| self.look(marked, *object))?;
        let chunks: Vec<_> = seen.iter().flat_map(Seen::chunks).copied().collect();
        let mut found = Copies::default();
        if sound.is_none() {
            found.add(self.find_copies(chunks.clone(), gone)?.into_iter());
        }
        let copies = sound.unwrap_or(&found);
        let relied_on: BTreeSet<_> =
            chunks.iter().flat_map(|chunk| copies.of(chunk, gone)).map(|place| place.pack).collect();
        // The packs' own indexes, since the chunk index is a copy of them. One that cannot be read
        // holds no copies.
        let relied_on: Vec<_> = relied_on.into_iter().collect();
        // Another process may have died before it synced them.
        if sound.is_some() && !relied_on.is_empty() {
            let layout = &self.objects.layout;
            let dirs = relied_on.iter().filter_map(|pack| layout.pack(pack).parent().map(ToOwned::to_owned));
            self.objects.sync(&dirs.chain([layout.packs()]).collect())?;
        }
        let indexes = self.parallel("packs of copies read", &relied_on, renew, |pack| {
            Ok(read_index(&self.objects, *pack).ok().flatten().map(|(_, index)| (*pack, index)))
        })?;
        let indexes: HashMap<_, _> = indexes.into_iter().flatten().collect();
        let has_copy = |chunk: &Digest| {
            let mut places = copies.of(chunk, gone);
            places.any(|place| indexes.get(&place.pack).is_some_and(|index| holds(index, chunk, place)))
        };
        let mut judged = Judged::default();
        for (object, seen) in condemned.iter().zip(seen) {
            match seen {
                Seen::Manifest => judged.garbage.push((*object, Garbage::Manifest)),
                Seen::Pack(chunks) if chunks.iter().all(has_copy) => {
                    judged.garbage.push((*object, Garbage::Pack));
                }
                Seen::Pack(_) | Seen::Needed => judged.needed.push(*object),
            }
        }
        Ok(judged)
    }

    fn look(&self, marked: &Marked, object: Digest) -> Result<Seen, StoreError> {
        let layout = &self.objects.layout;
        if marked.needs_manifest(&object) {
            return Ok(Seen::Needed);
        }
        if self.objects.exists(&layout.manifest(&object))? {
            return Ok(Seen::Manifest);
        }
        match read_index(&self.objects, object) {
            Ok(None) => Ok(Seen::Needed),
            Ok(Some((_, index))) => {
                let chunks = index.entries().iter().map(|entry| entry.chunk);
                Ok(Seen::Pack(chunks.filter(|chunk| marked.chunks.contains(chunk)).collect()))
            }
            Err(error) => {
                tracing::warn!(pack = %object, "kept, though it may be garbage: {}", chain(&error));
                Ok(Seen::Needed)
            }
        }
    }
}

impl Seen {
    fn chunks(&self) -> &[Digest] {
        match self {
            Self::Pack(chunks) => chunks,
            Self::Needed | Self::Manifest => &[],
        }
    }
}

/// Returns true if a pack's index has this place of a chunk.
fn holds(index: &PackIndex, chunk: &Digest, place: &Place) -> bool {
    let found = index.entries().binary_search_by(|entry| entry.chunk.cmp(chunk));
    found.is_ok_and(|at| {
        let entry = index.entries()[at];
        (entry.offset, entry.length) == (place.offset, place.length)
    })
}
