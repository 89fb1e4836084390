//! A run of the chunk index: an immutable file that names the places of the chunks of some packs.
//!
//! ```text
//! blocks of 4096 bytes, each with up to 92 entries, the digest of its first 4064 bytes at the end
//! pack table, for each pack in ascending order: digest 32 bytes, length in bytes u32
//! trailer, 64 bytes:
//!     BLAKE3 of the pack table and of the next 16 bytes    32 bytes
//!     number of entries           u64
//!     number of packs             u32
//!     zero                        u32
//!     "postcopy index 1"          16 bytes
//! ```
//!
//! An entry has the chunk's digest (32 bytes), the number of its pack in the table, the offset of
//! its frame in the pack and its length (u32 each). Entries are in strictly ascending order of
//! chunk and pack; only the last block has fewer than 92. All integers are little-endian.
//!
//! Digests are uniformly distributed, so a search reads about two blocks, whatever the run's
//! length.

use crate::store::error::{StoreError, damaged, io_error};
use postcopy_proto::digest::{DIGEST_BYTES, Digest};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK_BYTES: usize = 4096;
const ENTRY_BYTES: usize = DIGEST_BYTES + 12;
const BLOCK_ENTRIES: usize = 92;
const BLOCK_CONTENT_BYTES: usize = BLOCK_BYTES - DIGEST_BYTES;
const TABLE_ENTRY_BYTES: usize = DIGEST_BYTES + 4;
const TRAILER_BYTES: usize = 64;
const MAGIC: &[u8; 16] = b"postcopy index 1";
/// Most packs of a run: their table is in memory.
const MAX_PACKS: usize = 1 << 26;
/// Probes of a search by interpolation. A search that needs more goes on by bisection.
const INTERPOLATIONS: u32 = 4;

const _: () = assert!(BLOCK_ENTRIES * ENTRY_BYTES <= BLOCK_CONTENT_BYTES);

/// The place of a chunk's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) pack: Digest,
    /// First byte of the frame, from the pack's beginning.
    pub(crate) offset: u32,
    /// Length of the frame in bytes.
    pub(crate) length: u32,
}

/// A pack, and its length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PackLength {
    pub(crate) pack: Digest,
    pub(crate) bytes: u32,
}

/// The place of a chunk's frame, and the length of its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) pack_bytes: u32,
}

/// An entry: a chunk and its place.
pub(crate) type Entry = (Digest, Place);

/// An open run.
#[derive(Debug)]
pub(crate) struct Run {
    path: PathBuf,
    file: File,
    packs: Vec<PackLength>,
    entries: u64,
}

impl Run {
    /// Makes a run of an open file, and reads its table of packs. `path` is the object's.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] with the path, or [`StoreError::Io`].
    pub(crate) fn new(file: File, path: &Path) -> Result<Self, StoreError> {
        let length = file.metadata().map_err(io_error(path))?.len();
        let wrong = |reason: &str| damaged(path.display().to_string(), reason);
        let trailer_at = length.checked_sub(TRAILER_BYTES as u64).ok_or_else(|| wrong("it is too short"))?;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at).map_err(io_error(path))?;
        if trailer[48..] != MAGIC[..] {
            return Err(wrong("it does not end as an index does"));
        }
        let entries = u64::from_le_bytes(*trailer[32..].first_chunk().expect("the trailer is longer"));
        let packs = u32_at(&trailer, 40) as usize;
        let blocks_bytes = entries.div_ceil(BLOCK_ENTRIES as u64).checked_mul(BLOCK_BYTES as u64);
        let table_bytes = packs * TABLE_ENTRY_BYTES;
        if packs > MAX_PACKS
            || blocks_bytes.and_then(|b| b.checked_add(table_bytes as u64)) != Some(trailer_at)
        {
            return Err(wrong("its length does not fit its trailer"));
        }
        let mut table = vec![0; table_bytes];
        file.read_exact_at(&mut table, trailer_at - table_bytes as u64).map_err(io_error(path))?;
        if table_digest(&table, &trailer[DIGEST_BYTES..48]).as_bytes()[..] != trailer[..DIGEST_BYTES] {
            return Err(wrong("its table of packs does not fit its digest"));
        }
        let packs: Vec<_> = table.chunks_exact(TABLE_ENTRY_BYTES).map(pack_length).collect();
        match packs.is_sorted_by(|a, b| a.pack < b.pack) {
            true => Ok(Self { path: path.to_owned(), file, packs, entries }),
            false => Err(wrong("its packs are not in ascending order")),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the packs, in ascending order.
    pub(crate) fn packs(&self) -> &[PackLength] {
        &self.packs
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Returns true if the run has the entries of this pack.
    pub(crate) fn covers(&self, pack: &Digest) -> bool {
        self.packs.binary_search_by(|known| known.pack.cmp(pack)).is_ok()
    }

    fn blocks(&self) -> u64 {
        self.entries.div_ceil(BLOCK_ENTRIES as u64)
    }

    /// Reads a block and verifies it.
    fn block(&self, number: u64) -> Result<Block, StoreError> {
        let mut bytes = [0; BLOCK_BYTES];
        let read = self.file.read_exact_at(&mut bytes, number * BLOCK_BYTES as u64);
        let wrong =
            |reason: &str| damaged(self.path.display().to_string(), format!("block {number}: {reason}"));
        // A run that cannot be read is as good as a damaged one, because it can be made again.
        read.map_err(|e| wrong(&e.to_string()))?;
        if Digest::of(&bytes[..BLOCK_CONTENT_BYTES]).as_bytes()[..] != bytes[BLOCK_CONTENT_BYTES..] {
            return Err(wrong("it does not fit its digest"));
        }
        let rest = self.entries - number * BLOCK_ENTRIES as u64;
        let entries = usize::try_from(rest).map_or(BLOCK_ENTRIES, |rest| rest.min(BLOCK_ENTRIES));
        let block = Block { number, bytes, entries };
        match (0..entries).all(|n| (block.pack(n) as usize) < self.packs.len()) {
            true => Ok(block),
            false => Err(wrong("an entry names a pack that its table does not have")),
        }
    }

    /// Calls `found` with each place of each chunk. The chunks are ascending and may be equal, each
    /// with a number that `found` gets.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] for a block that is damaged or cannot be read.
    ///
    /// # Blocking
    /// Reads up to two blocks for each chunk.
    pub(crate) fn find(
        &self,
        chunks: &[(Digest, usize)],
        found: &mut impl FnMut(usize, Found),
    ) -> Result<(), StoreError> {
        let mut last: Option<Block> = None;
        for same in chunks.chunk_by(|a, b| a.0 == b.0) {
            let chunk = &same[0].0;
            let mut next = self.first_block_of(chunk, last.take())?;
            while let Some(block) = next {
                for entry in block.first_not_below(chunk)..block.entries {
                    if block.chunk(entry) != chunk.as_bytes() {
                        break;
                    }
                    let place = self.found(&block, entry);
                    same.iter().for_each(|(_, number)| found(*number, place));
                }
                let goes_on = block.last() == chunk.as_bytes() && block.number + 1 < self.blocks();
                next = if goes_on { Some(self.block(block.number + 1)?) } else { None };
                last = Some(block);
            }
        }
        Ok(())
    }

    /// Returns the first block whose last entry is not below `chunk`; `None` if there is none.
    /// Begins at `from`, which must not lie behind it.
    fn first_block_of(&self, chunk: &Digest, from: Option<Block>) -> Result<Option<Block>, StoreError> {
        let (mut low, mut low_key) = (0, 0);
        if let Some(block) = from {
            if block.last() >= chunk.as_bytes() {
                return Ok(Some(block));
            }
            (low, low_key) = (block.number + 1, key(block.last()));
        }
        let (mut high, mut high_key, mut nearest) = (self.blocks(), u64::MAX, None);
        for probe in 0.. {
            if low == high {
                break;
            }
            let middle = match probe < INTERPOLATIONS {
                true => interpolate(low..high, low_key, high_key, key(chunk.as_bytes())),
                false => low.midpoint(high),
            };
            let block = self.block(middle)?;
            if block.last() < chunk.as_bytes() {
                (low, low_key) = (middle + 1, key(block.last()));
            } else {
                let is_first = block.chunk(0) < chunk.as_bytes();
                (high, high_key, nearest) = (middle, key(block.chunk(0)), Some(block));
                if is_first {
                    break;
                }
            }
        }
        Ok(nearest)
    }

    fn found(&self, block: &Block, entry: usize) -> Found {
        let PackLength { pack, bytes } = self.packs[block.pack(entry) as usize];
        let (offset, length) = block.range(entry);
        Found { place: Place { pack, offset, length }, pack_bytes: bytes }
    }

    /// Returns all entries, in order; an error in place of a block that cannot be read.
    pub(crate) fn all(&self) -> impl Iterator<Item = Result<Entry, StoreError>> {
        (0..self.blocks()).flat_map(|number| match self.block(number) {
            Ok(block) => (0..block.entries).map(|n| Ok(self.entry(&block, n))).collect(),
            Err(error) => vec![Err(error)],
        })
    }

    fn entry(&self, block: &Block, entry: usize) -> Entry {
        let chunk = Digest::try_from(&block.chunk(entry)[..]).expect("it has the length of a digest");
        (chunk, self.found(block, entry).place)
    }
}

/// A verified block.
struct Block {
    number: u64,
    bytes: [u8; BLOCK_BYTES],
    entries: usize,
}

impl Block {
    fn chunk(&self, entry: usize) -> &[u8; DIGEST_BYTES] {
        self.bytes[entry * ENTRY_BYTES..].first_chunk().expect("a block has room for 92 entries")
    }

    fn pack(&self, entry: usize) -> u32 {
        u32_at(&self.bytes, entry * ENTRY_BYTES + DIGEST_BYTES)
    }

    fn range(&self, entry: usize) -> (u32, u32) {
        let at = entry * ENTRY_BYTES + DIGEST_BYTES + 4;
        (u32_at(&self.bytes, at), u32_at(&self.bytes, at + 4))
    }

    fn last(&self) -> &[u8; DIGEST_BYTES] {
        self.chunk(self.entries - 1)
    }

    fn first_not_below(&self, chunk: &Digest) -> usize {
        let (mut low, mut high) = (0, self.entries);
        while low < high {
            let middle = low.midpoint(high);
            match self.chunk(middle) < chunk.as_bytes() {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }
}

/// Writes a run.
#[derive(Debug)]
pub(crate) struct RunWriter<W> {
    out: W,
    block: Vec<u8>,
    entries: u64,
    packs: Vec<PackLength>,
}

impl<W: Write> RunWriter<W> {
    /// Begins a run of these packs, which are in strictly ascending order.
    pub(crate) fn new(out: W, packs: Vec<PackLength>) -> Self {
        Self { out, block: Vec::with_capacity(BLOCK_BYTES), entries: 0, packs }
    }

    /// Appends an entry. Entries come in strictly ascending order of chunk and pack, and name packs
    /// of the run; an entry of another pack is left out.
    pub(crate) fn push(&mut self, (chunk, place): &Entry) -> io::Result<()> {
        let Ok(pack) = self.packs.binary_search_by(|known| known.pack.cmp(&place.pack)) else {
            return Ok(());
        };
        let pack = u32::try_from(pack).expect("a run has at most 2^26 packs");
        self.block.extend_from_slice(chunk.as_bytes());
        for number in [pack, place.offset, place.length] {
            self.block.extend_from_slice(&number.to_le_bytes());
        }
        self.entries += 1;
        match self.block.len() == BLOCK_ENTRIES * ENTRY_BYTES {
            true => self.end_block(),
            false => Ok(()),
        }
    }

    fn end_block(&mut self) -> io::Result<()> {
        self.block.resize(BLOCK_CONTENT_BYTES, 0);
        let digest = Digest::of(&self.block);
        self.block.extend_from_slice(digest.as_bytes());
        self.out.write_all(&self.block)?;
        self.block.clear();
        Ok(())
    }

    /// Ends the run, and returns the writer.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        if !self.block.is_empty() {
            self.end_block()?;
        }
        let mut table = Vec::with_capacity(self.packs.len() * TABLE_ENTRY_BYTES);
        for PackLength { pack, bytes } in &self.packs {
            table.extend_from_slice(pack.as_bytes());
            table.extend_from_slice(&bytes.to_le_bytes());
        }
        let packs = u32::try_from(self.packs.len()).expect("a run has at most 2^26 packs");
        let counts = [&self.entries.to_le_bytes()[..], &packs.to_le_bytes(), &[0; 4]].concat();
        self.out.write_all(&table)?;
        self.out.write_all(table_digest(&table, &counts).as_bytes())?;
        self.out.write_all(&counts)?;
        self.out.write_all(MAGIC)?;
        Ok(self.out)
    }
}

/// Returns the digest of the pack table and of the counts after it.
fn table_digest(table: &[u8], counts: &[u8]) -> Digest {
    blake3::Hasher::new().update(table).update(counts).finalize().into()
}

/// Returns the first 8 bytes of a digest as a number, which digests are ordered by.
fn key(digest: &[u8; DIGEST_BYTES]) -> u64 {
    u64::from_be_bytes(*digest.first_chunk().expect("a digest has 32 bytes"))
}

/// Returns the block in which `key` lies if keys are uniformly distributed over the blocks.
fn interpolate(blocks: std::ops::Range<u64>, low_key: u64, high_key: u64, key: u64) -> u64 {
    let (span, into) = (high_key.saturating_sub(low_key), key.saturating_sub(low_key));
    let count = u128::from(blocks.end - blocks.start);
    let step = (u128::from(into) * count).checked_div(u128::from(span)).unwrap_or(0);
    u64::try_from(step).map_or(blocks.end - 1, |step| (blocks.start + step).min(blocks.end - 1))
}

fn pack_length(bytes: &[u8]) -> PackLength {
    let pack = Digest::try_from(&bytes[..DIGEST_BYTES]).expect("it has the length");
    PackLength { pack, bytes: u32_at(bytes, DIGEST_BYTES) }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("the caller's bytes are longer"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn digest(seed: u32) -> Digest {
        Digest::of(&seed.to_le_bytes())
    }

    /// Writes a run of `entries` (chunk and pack by their seeds) into a file.
    fn run_of(entries: &BTreeMap<(Digest, Digest), (u32, u32)>) -> (tempfile::NamedTempFile, Run) {
        let packs: BTreeSet<_> = entries.keys().map(|(_, pack)| *pack).collect();
        let packs = packs.into_iter().map(|pack| PackLength { pack, bytes: 7 }).collect();
        let mut writer = RunWriter::new(Vec::new(), packs);
        for ((chunk, pack), (offset, length)) in entries {
            writer.push(&(*chunk, Place { pack: *pack, offset: *offset, length: *length })).unwrap();
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&writer.finish().unwrap()).unwrap();
        let run = Run::new(file.reopen().unwrap(), file.path()).unwrap();
        (file, run)
    }

    /// Returns the places of the chunks, each with its chunk's number.
    fn found(run: &Run, chunks: &[Digest]) -> Vec<(usize, Place)> {
        let mut wanted: Vec<_> = chunks.iter().enumerate().map(|(n, chunk)| (*chunk, n)).collect();
        wanted.sort_unstable();
        let mut all = Vec::new();
        run.find(&wanted, &mut |n, found| all.push((n, found.place))).unwrap();
        all.sort_unstable();
        all
    }

    proptest! {
        /// Many copies of few chunks fill whole blocks with one digest.
        #[test]
        fn a_run_finds_each_place_of_each_chunk_and_no_other(
            entries in prop::collection::vec((0..2000u32, 0..300u32, any::<(u32, u32)>()), 0..3000),
            copies in 0..400u32,
            wanted in prop::collection::vec(0..2100u32, 0..300),
            twice in prop::collection::vec(0..2100u32, 0..300),
        ) {
            let mut by_key: BTreeMap<_, _> =
                entries.iter().map(|(chunk, pack, range)| ((digest(*chunk), digest(pack + 5000)), *range)).collect();
            by_key.extend((0..copies).map(|pack| ((digest(7), digest(pack + 9000)), (1, 2))));
            let (_file, run) = run_of(&by_key);
            let places: Vec<Entry> = by_key
                .iter()
                .map(|((chunk, pack), (offset, length))| {
                    (*chunk, Place { pack: *pack, offset: *offset, length: *length })
                })
                .collect();
            prop_assert_eq!(&run.all().collect::<Result<Vec<_>, _>>().unwrap(), &places);
            // An image may have a chunk many times.
            let twice = twice.iter().flat_map(|n| [*n, *n]);
            let chunks: Vec<_> = wanted.into_iter().chain(twice).map(digest).collect();
            let mut expected = Vec::new();
            for (number, wanted) in chunks.iter().enumerate() {
                let of_chunk = places.partition_point(|(chunk, _)| chunk < wanted);
                let same = places[of_chunk..].iter().take_while(|(chunk, _)| chunk == wanted);
                expected.extend(same.map(|(_, place)| (number, *place)));
            }
            expected.sort_unstable();
            prop_assert_eq!(found(&run, &chunks), expected);
        }

        #[test]
        fn damaged_bytes_are_an_error_and_no_place(at in any::<prop::sample::Index>(), bit in 0..8u32) {
            let entries = (0..200).map(|n| ((digest(n), digest(n % 3 + 500)), (n, 1))).collect();
            let (file, _) = run_of(&entries);
            let mut bytes = std::fs::read(file.path()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            std::fs::write(file.path(), &bytes).unwrap();
            if let Ok(run) = Run::new(file.reopen().unwrap(), file.path()) {
                prop_assert!(run.all().collect::<Result<Vec<_>, _>>().is_err());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..9000),
            ends_well in any::<bool>(),
        ) {
            if ends_well {
                bytes.extend_from_slice(MAGIC);
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            if let Ok(run) = Run::new(file.reopen().unwrap(), file.path()) {
                run.all().for_each(drop);
            }
        }
    }

    /// Each chunk is looked for twice, also those at the end of a block.
    #[test]
    fn a_chunk_is_found_as_often_as_it_is_asked_for() {
        let entries = (0..2000).map(|n| ((digest(n), digest(9000)), (n, 1))).collect();
        let (_file, run) = run_of(&entries);
        let chunks: Vec<_> = (0..2000).flat_map(|n| [digest(n), digest(n)]).collect();
        assert_eq!(found(&run, &chunks).len(), chunks.len());
    }

    #[test]
    fn digests_that_are_not_uniform_are_found_too() {
        let skewed = |n: u32| {
            let mut bytes = [0; 32];
            bytes[28..].copy_from_slice(&n.to_be_bytes());
            Digest::try_from(&bytes[..]).unwrap()
        };
        let entries = (0..50_000).map(|n| ((skewed(n * 3), digest(1)), (n, 1))).collect();
        let (_file, run) = run_of(&entries);
        for n in (0..150_000).step_by(1001) {
            assert_eq!(found(&run, &[skewed(n)]).len(), usize::from(n % 3 == 0), "{n}");
        }
    }
}
