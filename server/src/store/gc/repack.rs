//! Repacks worn packs: merges small ones, and copies the live chunks out of those that are mostly
//! dead.
//!
//! 1. Choose the packs, from what [`super::uses`] has found. Young ones are left alone: an upload in
//!    progress may own them.
//! 2. Order their chunks: those of working sets as restores touch them, then those of all images as
//!    their files have them. So neighbours in a file are neighbours in a pack.
//! 3. Copy the frames into new packs, verified. A damaged frame stays where it is.
//! 4. Write the locators of the segments whose chunks have moved.
//!
//! No pack is deleted here. The new packs are preferred to the worn ones from then on, so the
//! collector condemns those, and deletes them after the grace time. A repacking that is interrupted
//! leaves some new packs, which are good ones.

use crate::store::error::StoreError;
use crate::store::gc::Collector;
use crate::store::gc::mark::Marked;
use crate::store::gc::uses::{PackUse, Uses, chunk_bytes};
use crate::store::index::run::Place;
use crate::store::lease::stored;
use crate::store::locators::Locator;
use crate::store::{chain, working_sets};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::ChunkFrame;
use postcopy_proto::manifest::{ChunkContent, Root};
use postcopy_proto::pack::{MAX_PACK_BYTES, MAX_PACK_CHUNK_BYTES, PackBuilder, PackIndex};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Most bytes of a new pack, about: a server that reads it once needs little memory, and a request
/// of it to a bucket takes little time.
const PACK_BYTES: u64 = 16 << 20;
/// Most bytes that a collection copies, so that it ends. The next one goes on.
const MAX_COPIED_BYTES: u64 = 4 << 30;
/// Most chunks that a collection copies. They take about 200 bytes of memory each.
const MAX_COPIED_CHUNKS: u64 = 1 << 20;
/// Images that are read at a time while the chunks are ordered, and segments of these.
const ORDERED: usize = 256;

/// The result of a repacking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Repacked {
    /// Number of packs of which nothing is needed afterwards.
    #[serde(rename = "repacked")]
    pub packs: u64,
    /// Number of new packs.
    #[serde(rename = "repacked_into")]
    pub new_packs: u64,
    /// Bytes of the chunks that were copied.
    #[serde(rename = "repacked_bytes")]
    pub bytes: u64,
}

/// The packs that are repacked.
struct Choice {
    /// The packs, with their lengths.
    sources: HashMap<Digest, u64>,
    /// The chunks to copy, in ascending order, with their places in these packs.
    chunks: Vec<(Digest, Vec<Place>)>,
    /// Bytes of these chunks.
    bytes: u64,
}

/// The order in which chunks are copied.
#[derive(Default)]
struct Order {
    /// Numbers of the chosen chunks.
    chunks: Vec<usize>,
    /// For each of these, the most bytes of the chunk.
    plain_bytes: Vec<u64>,
    /// The segments that have such chunks.
    segments: Vec<(Arc<Root>, u32)>,
}

/// Returns the number of new packs for chunks of so many bytes. All are of similar length, so none
/// is small unless it is the only one.
fn packs_for(bytes: u64) -> u64 {
    bytes.div_ceil(PACK_BYTES).max(1)
}

/// Returns true if it is worth copying: it makes fewer packs, or frees a quarter of what it copies.
fn pays(packs: u64, pack_bytes: u64, new_packs: u64, bytes: u64) -> bool {
    new_packs < packs || pack_bytes.saturating_sub(bytes) >= bytes.div_ceil(4).max(1)
}

impl Order {
    /// Returns the least number of packs that have room for the chunks, whose frames may be short.
    fn packs_of_plain_bytes(&self) -> u64 {
        self.plain_bytes.iter().sum::<u64>().div_ceil(MAX_PACK_CHUNK_BYTES)
    }
}

impl Choice {
    /// Returns the number of sources that are empty afterwards, and their bytes, if `kept` stay.
    fn repacked(&self, kept: &HashSet<Digest>) -> (u64, u64) {
        let emptied = self.sources.iter().filter(|(pack, _)| !kept.contains(pack));
        emptied.fold((0, 0), |(packs, bytes), (_, pack_bytes)| (packs + 1, bytes + pack_bytes))
    }

    fn number(&self, chunk: &Digest) -> Option<usize> {
        self.chunks.binary_search_by(|(known, _)| known.cmp(chunk)).ok()
    }
}

impl Collector {
    /// Returns what [`Collector::repack`] would do.
    pub(super) fn plan_repacking(
        &self,
        marked: &Marked,
        uses: &Uses,
        min_age: Duration,
    ) -> Result<Repacked, StoreError> {
        Ok(self.choose(marked, uses, min_age)?.map_or(Repacked::default(), |choice| Repacked {
            packs: choice.sources.len() as u64,
            new_packs: packs_for(choice.bytes),
            bytes: choice.bytes,
        }))
    }

    /// Repacks packs that are at least `min_age` old.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Bucket`], [`StoreError::Damaged`] for a manifest. A full disk
    /// ends the repacking, and is no error.
    ///
    /// # Blocking
    /// Copies up to 4 GiB, and reads all manifests if there is something to copy.
    pub(super) fn repack(
        &self,
        marked: &Marked,
        uses: &Uses,
        min_age: Duration,
    ) -> Result<Repacked, StoreError> {
        let Some(choice) = self.choose(marked, uses, min_age)? else { return Ok(Repacked::default()) };
        let order = self.order(marked, &choice)?;
        let (mut repacked, mut moved) = (Repacked::default(), HashMap::new());
        match self.copy(&choice, &order, &mut repacked, &mut moved) {
            Err(error @ StoreError::Full { .. }) => tracing::warn!("repacking ends early: {}", chain(&error)),
            other => other?,
        }
        if !moved.is_empty() {
            self.move_places(&order.segments, &moved);
        }
        Ok(repacked)
    }

    /// Chooses packs to repack; `None` if that does not pay.
    fn choose(&self, marked: &Marked, uses: &Uses, min_age: Duration) -> Result<Option<Choice>, StoreError> {
        let mut worn: Vec<(Digest, PackUse)> = uses.packs.iter().map(|(pack, used)| (*pack, *used)).collect();
        worn.retain(|(pack, used)| used.is_worn() && used.is_needed && !marked.leased.contains(pack));
        if worn.iter().all(|(_, used)| !used.is_mostly_dead()) && worn.len() < 2 {
            return Ok(None);
        }
        let now = self.objects.now()?;
        let layout = &self.objects.layout;
        let written = self.parallel("ages of packs read", &worn, &|| Ok(()), |(pack, _)| {
            self.objects.written(&layout.pack(pack))
        })?;
        let mut written = written.into_iter();
        let is_old = |written| stored::age(now, written) >= min_age;
        worn.retain(|_| written.next().flatten().is_some_and(is_old));
        // The packs with least to copy come first, so that the bounds exclude few packs.
        worn.sort_unstable_by_key(|(pack, used)| (used.owed_bytes, *pack));
        let (mut bytes, mut chunks) = (0, 0);
        worn.retain(|(_, used)| {
            (bytes, chunks) = (bytes + used.owed_bytes, chunks + used.owed_chunks);
            bytes <= MAX_COPIED_BYTES && chunks <= MAX_COPIED_CHUNKS
        });
        if worn.iter().all(|(_, used)| !used.is_mostly_dead()) && worn.len() < 2 {
            return Ok(None);
        }
        let sources: HashMap<_, _> = worn.iter().map(|(pack, used)| (*pack, used.bytes)).collect();
        let places = uses.worn.iter().filter(|(_, place)| sources.contains_key(&place.pack));
        let mut chunks: Vec<(Digest, Vec<Place>)> = Vec::new();
        for (chunk, place) in places {
            match chunks.last_mut() {
                Some((last, places)) if last == chunk => places.push(*place),
                _ => chunks.push((*chunk, vec![*place])),
            }
        }
        let bytes = chunks.iter().map(|(_, places)| chunk_bytes(&places[0])).sum();
        let choice = Choice { sources, chunks, bytes };
        let (packs, pack_bytes) = choice.repacked(&HashSet::new());
        Ok(pays(packs, pack_bytes, packs_for(bytes), bytes).then_some(choice))
    }

    /// Orders the chunks to copy. Those that no image has any more are left out.
    fn order(&self, marked: &Marked, choice: &Choice) -> Result<Order, StoreError> {
        let mut order = Order::default();
        let mut is_placed = vec![false; choice.chunks.len()];
        let mut place = |order: &mut Order, number: usize, root: &Root| {
            if !std::mem::replace(&mut is_placed[number], true) {
                order.chunks.push(number);
                order.plain_bytes.push(root.chunk_size().bytes() as u64);
            }
        };
        let with_sets: HashSet<_> = working_sets::images(&self.objects)?.into_iter().collect();
        for image in marked.images.iter().filter(|image| with_sets.contains(image)) {
            match self.touched(image) {
                Ok((root, touched)) => {
                    let numbers = touched.iter().filter_map(|chunk| choice.number(chunk));
                    numbers.for_each(|number| place(&mut order, number, &root));
                }
                // Only the order suffers.
                Err(error) => tracing::warn!("repacking ignores a working set: {}", chain(&error)),
            }
        }
        let mut read = HashSet::new();
        for (number, images) in marked.images.chunks(ORDERED).enumerate() {
            let roots = self.parallel_part(images, &|image| match self.manifests.read_root(image) {
                // It was removed, and another collector has deleted it.
                Err(StoreError::NotFound(_)) => Ok(None),
                other => other.map(|root| Some(Arc::new(root))),
            })?;
            let segments: Vec<_> = roots
                .iter()
                .flatten()
                .flat_map(|root| {
                    (0..).zip(root.segment_digests()).map(move |(index, digest)| (root, index, digest))
                })
                .filter(|(_, _, digest)| read.insert(**digest))
                .collect();
            for segments in segments.chunks(ORDERED) {
                let numbers = self.parallel_part(segments, &|(root, index, _)| match self
                    .manifests
                    .passing_segment(root, *index)
                {
                    Err(StoreError::NotFound(_)) => Ok(Vec::new()),
                    other => Ok(other?.digests().filter_map(|chunk| choice.number(&chunk)).collect()),
                })?;
                for ((root, index, _), numbers) in segments.iter().zip(numbers) {
                    if !numbers.is_empty() {
                        order.segments.push((Arc::clone(root), *index));
                    }
                    numbers.into_iter().for_each(|number| place(&mut order, number, root));
                }
            }
            let done = (number * ORDERED + images.len()) as u64;
            self.reporter.report("images ordered", done, marked.images.len() as u64);
        }
        Ok(order)
    }

    /// Returns an image's root, and the chunks of its working set, in order.
    fn touched(&self, image: &Digest) -> Result<(Root, Vec<Digest>), StoreError> {
        let root = self.manifests.read_root(image)?;
        let (mut segments, mut touched) = (HashMap::new(), Vec::new());
        for chunk in working_sets::touched_chunks(&self.objects, &root)? {
            let (index, place) = Root::segment_of(chunk);
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            if let std::collections::hash_map::Entry::Vacant(entry) = segments.entry(index) {
                entry.insert(self.manifests.passing_segment(&root, index)?);
            }
            if let Some(ChunkContent::Data(chunk)) = segments[&index].chunk(place) {
                touched.push(chunk);
            }
        }
        Ok((root, touched))
    }

    /// Copies chunks into new packs, and adds their places to `moved`.
    fn copy(
        &self,
        choice: &Choice,
        order: &Order,
        repacked: &mut Repacked,
        moved: &mut HashMap<Digest, Place>,
    ) -> Result<(), StoreError> {
        let bytes_of = |number: &usize| chunk_bytes(&choice.chunks[*number].1[0]);
        let all_bytes: u64 = order.chunks.iter().map(bytes_of).sum();
        let (packs, filled) = (choice.sources.len() as u64, order.packs_of_plain_bytes());
        // These packs are short because their chunks have 1 GiB each pack; merging saves few packs.
        if filled > packs_for(all_bytes) && 2 * filled > packs {
            return Ok(());
        }
        let (mut rest, mut rest_bytes) = (&order.chunks[..], all_bytes);
        // The packs of damaged frames.
        let mut kept = HashSet::new();
        while !rest.is_empty() {
            let pack_bytes = rest_bytes / packs_for(rest_bytes);
            let mut bytes = 0;
            let before = rest.iter().take_while(|number| {
                let goes_on = bytes < pack_bytes;
                bytes += if goes_on { bytes_of(number) } else { 0 };
                goes_on
            });
            let (numbers, after) = rest.split_at(before.count());
            (rest, rest_bytes) = (after, rest_bytes - bytes);
            let frames = self.parallel_part(numbers, &|number| self.sound_frame(&choice.chunks[*number]))?;
            let (mut pack, mut plain_bytes, mut packs) = (PackBuilder::default(), 0, Vec::new());
            for (number, frame) in numbers.iter().zip(frames) {
                let (chunk, places) = &choice.chunks[*number];
                let Some((frame, frame_plain_bytes)) = frame else {
                    kept.extend(places.iter().map(|place| place.pack));
                    continue;
                };
                if plain_bytes + frame_plain_bytes > MAX_PACK_CHUNK_BYTES
                    || !pack.fits(frame.len(), MAX_PACK_BYTES)
                {
                    packs.push(std::mem::take(&mut pack).finish());
                    plain_bytes = 0;
                }
                pack.push(*chunk, &frame);
                plain_bytes += frame_plain_bytes;
            }
            if !pack.is_empty() {
                packs.push(pack.finish());
            }
            // Damaged frames may have left too little to copy.
            let (emptied, emptied_bytes) = choice.repacked(&kept);
            if bytes == all_bytes && !pays(emptied, emptied_bytes, packs.len() as u64, bytes) {
                return Ok(());
            }
            for pack in packs {
                let bytes = self.write_pack(pack, choice, moved)?;
                repacked.bytes += bytes;
                repacked.new_packs += u64::from(bytes > 0);
            }
            self.reporter.report("bytes repacked", all_bytes - rest_bytes, all_bytes);
        }
        repacked.packs = choice.repacked(&kept).0;
        Ok(())
    }

    /// Returns a sound frame of a chunk, and the length of the chunk.
    fn sound_frame(
        &self,
        (chunk, places): &(Digest, Vec<Place>),
    ) -> Result<Option<(Bytes, u64)>, StoreError> {
        for place in places {
            match self.packs.load(place, chunk, true) {
                Ok(frame) => {
                    let parsed = ChunkFrame::parse(&frame).expect("it was verified");
                    let plain_bytes = parsed.chunk_bytes() as u64;
                    return Ok(Some((frame, plain_bytes)));
                }
                Err(error @ StoreError::Bucket { .. }) => return Err(error),
                // Damaged, or deleted by another collector. The log has it.
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Stores a new pack, and adds the places of its chunks to `moved`. Returns the bytes of these.
    fn write_pack(
        &self,
        pack: Vec<u8>,
        choice: &Choice,
        moved: &mut HashMap<Digest, Place>,
    ) -> Result<u64, StoreError> {
        let digest = Digest::of(&pack);
        // If a collector has deleted the new pack already, the chunks remain in the worn packs.
        if !choice.sources.contains_key(&digest) && !self.packs.store(digest, &pack)? {
            return Ok(0);
        }
        let index = PackIndex::parse(&pack).expect("it was built here");
        for entry in index.entries() {
            moved.insert(entry.chunk, Place { pack: digest, offset: entry.offset, length: entry.length });
        }
        Ok(index.entries().iter().map(|entry| u64::from(entry.length)).sum())
    }

    /// Writes the locators of segments, with the new places of chunks. They are hints, so an error
    /// is none of the repacking's.
    fn move_places(&self, segments: &[(Arc<Root>, u32)], moved: &HashMap<Digest, Place>) {
        let moved = self.parallel("locators written", segments, &|| Ok(()), |(root, index)| {
            if let Err(error) = self.move_places_of(root, *index, moved) {
                tracing::debug!(
                    "the locator of segment {index} of image {}: {}",
                    root.image(),
                    chain(&error)
                );
            }
            Ok(())
        });
        moved.map(drop).unwrap_or_default();
    }

    fn move_places_of(
        &self,
        root: &Root,
        index: u32,
        moved: &HashMap<Digest, Place>,
    ) -> Result<(), StoreError> {
        let segment = self.manifests.passing_segment(root, index)?;
        let digest = &root.segment_digests()[index as usize];
        let read = self.locators.read(digest)?;
        // A reader makes a missing or damaged one.
        let Some(known) = read.and_then(|bytes| Locator::decode(&bytes, digest, segment.chunks())) else {
            return Ok(());
        };
        let place = |(number, content)| match content {
            ChunkContent::Zero => None,
            ChunkContent::Data(chunk) => Some(moved.get(&chunk).copied().or_else(|| known.place(number))),
        };
        let places: Vec<_> = (0..).zip(segment.contents()).filter_map(place).collect();
        self.locators.write(digest, &Locator::new(&segment, &places))
    }
}
