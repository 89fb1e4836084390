//! Locators: for each segment, where the frames of its chunks lie.
//!
//! ```text
//! "postcopy locs 1\n"    16 bytes
//! segment's digest       32 bytes
//! number of packs        u32
//! number of chunks       u32
//! packs                  32 bytes each
//! for each chunk:        number of its pack, offset, length of its frame, u32 each
//! BLAKE3 of all before   32 bytes
//! ```
//!
//! All integers are little-endian. A chunk that is zero, or whose place is unknown, has length 0.
//! A commit writes the locator of each segment, beside the segment. A locator is a hint: whoever
//! reads a frame falls back to the chunk index, which makes a missing or wrong locator again.

use crate::store::cache::Cache;
use crate::store::error::StoreError;
use crate::store::index::run::Place;
use crate::store::objects::Objects;
use bytes::Bytes;
use postcopy_proto::digest::{DIGEST_BYTES, Digest};
use postcopy_proto::manifest::{ChunkContent, Segment};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const MAGIC: &[u8; 16] = b"postcopy locs 1\n";
const HEADER_BYTES: usize = 16 + DIGEST_BYTES + 8;
const PLACE_BYTES: usize = 12;
/// Most chunks of a segment.
const MAX_CHUNKS: usize = 16_384;
/// Bytes of a locator whose chunks all lie in packs of their own.
const MAX_BYTES: usize = HEADER_BYTES + MAX_CHUNKS * (DIGEST_BYTES + PLACE_BYTES) + DIGEST_BYTES;
/// Bytes of the cache: the places of over two million chunks.
const CACHE_BYTES: usize = 32 << 20;

/// Number of the pack, offset and length.
type Entry = (u32, u32, u32);

/// The places of a segment's chunks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Locator {
    packs: Vec<Digest>,
    chunks: Vec<Entry>,
}

impl Locator {
    /// Makes the locator of a segment from the places of its chunks that are not zero, in order.
    pub(crate) fn new(segment: &Segment, places: &[Option<Place>]) -> Self {
        let mut numbers: HashMap<Digest, u32> = HashMap::new();
        let mut packs = Vec::new();
        let mut places = places.iter();
        let entry = |content| {
            let place = match content {
                ChunkContent::Zero => None,
                ChunkContent::Data(_) => places.next().copied().flatten(),
            };
            let Some(Place { pack, offset, length }) = place else { return (0, 0, 0) };
            let number = *numbers.entry(pack).or_insert_with(|| {
                packs.push(pack);
                u32::try_from(packs.len() - 1).expect("a segment has at most 16,384 chunks")
            });
            (number, offset, length)
        };
        let chunks = segment.contents().map(entry).collect();
        Self { packs, chunks }
    }

    /// Returns the place of the chunk at `place` of the segment, if it is known.
    pub(crate) fn place(&self, place: u32) -> Option<Place> {
        let (pack, offset, length) = *self.chunks.get(place as usize)?;
        (length > 0).then(|| Place { pack: self.packs[pack as usize], offset, length })
    }

    /// Returns this locator with another place for the chunk at `place` of the segment.
    pub(crate) fn with(&self, place: u32, found: Place) -> Self {
        let (mut packs, mut chunks) = (self.packs.clone(), self.chunks.clone());
        let number = packs.iter().position(|pack| *pack == found.pack).unwrap_or_else(|| {
            packs.push(found.pack);
            packs.len() - 1
        });
        let number = u32::try_from(number).expect("a segment has at most 16,384 chunks");
        if let Some(chunk) = chunks.get_mut(place as usize) {
            *chunk = (number, found.offset, found.length);
        }
        Self { packs, chunks }
    }

    fn encode(&self, segment: &Digest) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], segment.as_bytes()].concat();
        for count in [self.packs.len(), self.chunks.len()] {
            let count = u32::try_from(count).expect("a segment has at most 16,384 chunks");
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        self.packs.iter().for_each(|pack| bytes.extend_from_slice(pack.as_bytes()));
        for (pack, offset, length) in &self.chunks {
            [pack, offset, length].into_iter().for_each(|n| bytes.extend_from_slice(&n.to_le_bytes()));
        }
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    /// Returns the locator of a segment of so many chunks; `None` if the bytes are another one, or
    /// damaged.
    pub(crate) fn decode(bytes: &[u8], segment: &Digest, chunks: u32) -> Option<Self> {
        let (content, digest) = bytes.split_last_chunk::<DIGEST_BYTES>()?;
        let (header, rest) = content.split_at_checked(HEADER_BYTES)?;
        let is_its_own = header[..16] == MAGIC[..] && header[16..16 + DIGEST_BYTES] == segment.as_bytes()[..];
        let number = |bytes: &[u8]| u32::from_le_bytes(*bytes.first_chunk().expect("4 bytes of a number"));
        let (packs, count) = (number(&header[48..]) as usize, number(&header[52..]));
        if !is_its_own || count != chunks || packs > MAX_CHUNKS || Digest::of(content).as_bytes() != digest {
            return None;
        }
        let (packs, places) = rest.split_at_checked(packs * DIGEST_BYTES)?;
        let packs: Vec<_> = Digest::list(packs).ok()?.collect();
        let (places, []) = places.as_chunks::<PLACE_BYTES>() else { return None };
        let entry = |bytes: &[u8; PLACE_BYTES]| (number(bytes), number(&bytes[4..]), number(&bytes[8..]));
        let chunks: Vec<Entry> = places.iter().map(entry).collect();
        let is_valid = |(pack, _, length): &Entry| *length == 0 || (*pack as usize) < packs.len();
        (chunks.len() == count as usize && chunks.iter().all(is_valid)).then_some(Self { packs, chunks })
    }

    fn bytes(&self) -> usize {
        self.packs.len() * DIGEST_BYTES + self.chunks.len() * PLACE_BYTES
    }
}

/// Number of locks under which locators are read or made.
const LOADS: usize = 64;

/// The locators of a store.
#[derive(Debug)]
pub(crate) struct Locators {
    objects: Objects,
    cache: Cache<Digest, Locator>,
    /// Locked while a locator is read or made, by its segment, so that a burst of misses makes it
    /// once.
    loading: [Mutex<()>; LOADS],
}

impl Locators {
    pub(crate) fn new(objects: &Objects) -> Self {
        let loading = std::array::from_fn(|_| Mutex::new(()));
        Self { objects: objects.clone(), cache: Cache::new(CACHE_BYTES), loading }
    }

    /// Waits until no other thread reads or makes the locator of this segment.
    pub(crate) fn loading(&self, segment: &Digest) -> MutexGuard<'_, ()> {
        let lock = &self.loading[usize::from(segment.as_bytes()[0]) % LOADS];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the locator of a segment, if it is in memory.
    pub(crate) fn cached(&self, segment: &Digest) -> Option<Arc<Locator>> {
        self.cache.get(segment)
    }

    /// Reads the encoding of a segment's locator; `None` if it is missing, or a file that cannot be
    /// read.
    ///
    /// # Errors
    /// [`StoreError::Bucket`].
    ///
    /// # Blocking
    /// Waits for the disk, or the bucket.
    pub(crate) fn read(&self, segment: &Digest) -> Result<Option<Bytes>, StoreError> {
        match self.objects.read(&self.objects.layout.locator(segment), MAX_BYTES) {
            Err(StoreError::Io { .. }) => Ok(None),
            other => other,
        }
    }

    /// Keeps a locator in memory.
    pub(crate) fn keep(&self, segment: &Digest, locator: Arc<Locator>) {
        let bytes = locator.bytes();
        self.cache.insert(*segment, locator, bytes);
    }

    /// Writes the locator of a segment, and replaces an existing one. It is not durable on return:
    /// after a crash it may be damaged, and is then made again.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`], [`StoreError::Bucket`].
    ///
    /// # Blocking
    /// Writes a file, or waits for the bucket.
    pub(crate) fn write(&self, segment: &Digest, locator: &Locator) -> Result<(), StoreError> {
        self.objects.put_hint(&self.objects.layout.locator(segment), locator.encode(segment).into())
    }

    /// Returns true if a segment has a locator, whatever it holds.
    pub(crate) fn exists(&self, segment: &Digest) -> Result<bool, StoreError> {
        self.objects.exists(&self.objects.layout.locator(segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::Image;
    use proptest::prelude::*;

    fn example() -> (Digest, Segment, Locator) {
        let image = Image::of_seed(1);
        let bytes = &image.manifest.segments[0];
        let segment = Segment::parse(bytes).unwrap();
        let place = |n: u32| Place { pack: Digest::of(&(n % 3).to_le_bytes()), offset: n * 100, length: n };
        let places: Vec<_> = (0..13).map(|n| (n != 4).then(|| place(n))).collect();
        let locator = Locator::new(&segment, &places);
        (Digest::of(bytes), segment, locator)
    }

    #[test]
    fn a_locator_names_the_places_of_data_and_none_of_zeros() {
        let (digest, segment, locator) = example();
        let decoded = Locator::decode(&locator.encode(&digest), &digest, segment.chunks()).unwrap();
        assert_eq!(decoded, locator);
        let known: Vec<_> = (0..=segment.chunks()).filter(|n| locator.place(*n).is_some()).collect();
        // Of 12 chunks of data, 4 of zeros and a last one, the first has length 0 and the fifth no place.
        assert_eq!(known, [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 16]);
        let last = Place { pack: Digest::of(&[0; 4]), offset: 1200, length: 12 };
        assert_eq!(locator.place(16), Some(last));
    }

    #[test]
    fn a_chunk_has_another_place_and_the_others_keep_theirs() {
        let (digest, segment, locator) = example();
        let found = Place { pack: Digest::of(b"other"), offset: 7, length: 9 };
        let changed = locator.with(3, found).with(16, found);
        assert_eq!((changed.place(3), changed.place(16)), (Some(found), Some(found)));
        assert!((0..16).filter(|n| *n != 3).all(|n| changed.place(n) == locator.place(n)));
        let decoded = Locator::decode(&changed.encode(&digest), &digest, segment.chunks());
        assert_eq!(decoded, Some(changed));
    }

    #[test]
    fn a_locator_of_another_segment_is_none() {
        let (digest, segment, locator) = example();
        let bytes = locator.encode(&digest);
        assert_eq!(Locator::decode(&bytes, &Digest::of(b"other"), segment.chunks()), None);
        assert_eq!(Locator::decode(&bytes, &digest, segment.chunks() + 1), None);
    }

    proptest! {
        #[test]
        fn changed_bytes_are_no_locator(at in any::<prop::sample::Index>(), bit in 0..8u32, cut in 0..3usize) {
            let (digest, segment, locator) = example();
            let mut bytes = locator.encode(&digest);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            bytes.truncate(bytes.len() - cut * 7);
            prop_assert_eq!(Locator::decode(&bytes, &digest, segment.chunks()), None);
        }

        #[test]
        fn no_bytes_make_it_panic(
            packs in 0..5u32,
            chunks in 0..5u32,
            rest in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let digest = Digest::of(b"segment");
            let mut bytes = [&MAGIC[..], digest.as_bytes(), &packs.to_le_bytes(), &chunks.to_le_bytes(), &rest].concat();
            bytes.extend_from_slice(Digest::of(&bytes.clone()).as_bytes());
            if let Some(locator) = Locator::decode(&bytes, &digest, chunks) {
                (0..chunks).for_each(|chunk| assert!(locator.place(chunk).is_none_or(|place| place.length > 0)));
            }
        }
    }
}
