//! Fixtures of the tests: a store in a temporary directory, and small images.

use crate::store::{Caller, CommitOutcome, Domain, RecordingOf, Store, StoreError, StoredChunk};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameEncoder;
use postcopy_proto::manifest::{ChunkContent, Manifest, ManifestBuilder};
use postcopy_proto::pack::{PackBuilder, PackIndex};
use postcopy_proto::page::{ChunkIndex, ChunkSize, PAGE_BYTES};
use postcopy_proto::path::ImagePath;
use postcopy_proto::provenance::Labels;

/// Creates a new store.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path(), Domain::DEFAULT).unwrap();
    (dir, store)
}

/// An image of one file, `mem`, in chunks of 4 KiB: data, zeros, and a last one that is shorter.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) plain: Vec<u8>,
    pub(crate) manifest: Manifest,
    pub(crate) pack: Bytes,
}

/// Returns incompressible bytes, derived from a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

impl Store {
    /// Receives and stores a whole pack.
    pub(crate) fn put_pack(&self, digest: Digest, bytes: Bytes, caller: &Caller) -> Result<(), StoreError> {
        let mut staged = self.stage_pack(digest)?;
        staged.write(&bytes)?;
        self.put_staged(&staged, caller)
    }
}

impl Image {
    /// Makes an image of 12 chunks of data, 4 of zeros, and 100 bytes; another seed gives other
    /// data.
    pub(crate) fn of_seed(seed: u64) -> Self {
        let mut plain = noise(seed, 12 * PAGE_BYTES);
        plain[PAGE_BYTES + 10..2 * PAGE_BYTES].fill(7);
        plain.extend(vec![0; 4 * PAGE_BYTES]);
        plain.extend(noise(seed + (1 << 32), 100));
        Self::of(plain)
    }

    /// Makes an image of the chunks of [`Image::of_seed`] and others, in another pack.
    pub(crate) fn with_more_chunks(seed: u64) -> Self {
        Self::of([noise(seed + (1 << 33), 8 * PAGE_BYTES), Self::of_seed(seed).plain].concat())
    }

    /// Makes an image of 1 MiB that does not compress.
    pub(crate) fn large(seed: u64) -> Self {
        Self::of(noise(seed, 256 * PAGE_BYTES))
    }

    fn of(plain: Vec<u8>) -> Self {
        let mut manifest = ManifestBuilder::new(ChunkSize::MIN);
        manifest.file(&ImagePath::try_from(&b"mem"[..]).unwrap(), plain.len() as u64, false);
        let (mut pack, mut encoder) = (PackBuilder::default(), FrameEncoder::new(1));
        for chunk in plain.chunks(PAGE_BYTES) {
            let mut frame = Vec::new();
            if encoder.encode(chunk, &mut frame) {
                pack.push(Digest::of(chunk), &frame);
                manifest.chunk(ChunkContent::Data(Digest::of(chunk)));
            } else {
                manifest.chunk(ChunkContent::Zero);
            }
        }
        Self { plain, manifest: manifest.finish().unwrap(), pack: pack.finish().into() }
    }

    pub(crate) fn digest(&self) -> Digest {
        self.manifest.root.image()
    }

    pub(crate) fn pack_digest(&self) -> Digest {
        Digest::of(&self.pack)
    }

    /// Returns the chunks that are not zero, in the file's order.
    pub(crate) fn data_chunks(&self) -> Vec<Digest> {
        let chunks = self.plain.chunks(PAGE_BYTES).filter(|chunk| chunk.iter().any(|byte| *byte != 0));
        chunks.map(Digest::of).collect()
    }

    /// Returns the number of the chunk whose frame is the pack's first one.
    pub(crate) fn first_chunk_of_pack(&self) -> u64 {
        let index = PackIndex::parse(&self.pack).unwrap();
        let first = index.entries().iter().min_by_key(|entry| entry.offset).unwrap().chunk;
        let mut chunks = self.plain.chunks(PAGE_BYTES);
        chunks.position(|chunk| Digest::of(chunk) == first).unwrap() as u64
    }

    /// Loads the frame of a chunk with data.
    pub(crate) fn load(&self, store: &Store, chunk: u64, check: bool) -> Result<Bytes, StoreError> {
        match store.load_chunk(&self.manifest.root, ChunkIndex(chunk), check)? {
            Some(StoredChunk::Data { frame, .. }) => Ok(frame),
            other => panic!("{other:?}"),
        }
    }

    /// Returns the frame of a chunk with data of the first segment, if it is in memory.
    pub(crate) fn resident(&self, store: &Store, chunk: u32) -> Option<Bytes> {
        let segment = store.cached_segment(&self.manifest.root, 0)?;
        match store.resident_chunk(&segment, chunk)? {
            StoredChunk::Data { frame, .. } => Some(frame),
            StoredChunk::Zero => panic!("chunk {chunk} is zero"),
        }
    }

    fn try_push(&self, store: &Store, reference: &str) -> CommitOutcome {
        if !store.find_missing(self.data_chunks().into_iter()).unwrap().is_empty() {
            store.put_pack(self.pack_digest(), self.pack.clone(), &Caller::default()).unwrap();
        }
        for segment in &self.manifest.segments {
            store.put_segment(segment.clone()).unwrap();
        }
        store
            .commit(
                &reference.parse().unwrap(),
                Labels::default(),
                self.manifest.root_bytes.clone(),
                &Caller::default(),
            )
            .unwrap()
    }

    /// Stores the image under a reference.
    pub(crate) fn push(&self, store: &Store, reference: &str) {
        assert_eq!(self.try_push(store, reference), CommitOutcome::Committed(self.digest()));
    }

    /// Repeats [`Image::push`] until the commit succeeds, because a collector may delete objects in
    /// between.
    pub(crate) fn push_until_committed(&self, store: &Store, reference: &str) {
        while self.try_push(store, reference) != CommitOutcome::Committed(self.digest()) {}
    }
}

/// Returns the identity of a recording of restore `id`, all of one sender.
pub(crate) fn of_restore(id: u8) -> RecordingOf {
    RecordingOf { restore: [id; 16], sender: [0; 16] }
}
