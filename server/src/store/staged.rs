//! Packs that are being received: each a staged file.
//!
//! The bytes go to the file as they arrive, so an upload holds one message and 256 KiB in memory,
//! however slow it is. The verification reads the file from the page cache.

use crate::store::error::{self, StoreError};
use crate::store::lock::StoreLock;
use crate::store::map::{self, Map};
use crate::store::objects::StagedFile;
use crate::store::{Caller, Store, condemned};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::pack::{MAX_PACK_CHUNK_BYTES, PackError, PackIndex, check_frame};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;

/// Least number of frames for one thread to check, so that making its decompressor's state pays.
pub(super) const FRAMES_PER_TASK: usize = 32;

/// The threads that verify uploads, one for each core. They have a low priority, so that
/// uploads do not delay the answers to page faults.
pub(super) static VERIFIERS: LazyLock<ThreadPool> = LazyLock::new(|| {
    let yielding = |_| {
        // Without it the threads only yield less.
        let _ = rustix::process::setpriority_process(None, 10);
    };
    let threads = ThreadPoolBuilder::new().thread_name(|n| format!("verifier-{n}")).start_handler(yielding);
    threads.build().expect("threads can be started")
});

/// A pack that is being received. The drop removes its file.
#[derive(Debug)]
pub struct StagedPack {
    digest: Digest,
    staged: StagedFile,
}

impl StagedPack {
    /// Appends bytes to the staged file.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    ///
    /// # Blocking
    /// Writes to the page cache, which may wait for the disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.staged.write(bytes)
    }

    fn verify(&self, caller: &Caller) -> Result<(), StoreError> {
        let invalid = |reason: String| StoreError::Invalid { object: error::pack_name(&self.digest), reason };
        let failed = |e| self.staged.error(e);
        if self.staged.file().metadata().map_err(failed)?.len() == 0 {
            return Err(invalid("it is empty".to_owned()));
        }
        let map = Map::new(self.staged.file()).map_err(failed)?;
        map::populate(map.bytes()).map_err(failed)?;
        let bytes: &Bytes = map.bytes();
        let (actual, checked) =
            VERIFIERS.install(|| rayon::join(|| Digest::of(bytes), || check_upload(bytes, caller)));
        if actual != self.digest {
            return Err(invalid(format!("the bytes have digest {actual}")));
        }
        caller.check()?;
        checked.map_err(|e| invalid(e.to_string()))?;
        match map.was_cut() {
            true => Err(invalid("its file was cut while it was verified".to_owned())),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Begins to receive a pack.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    ///
    /// # Blocking
    /// Creates a file.
    pub fn stage_pack(&self, digest: Digest) -> Result<StagedPack, StoreError> {
        let staged = self.objects.stage(&self.objects.layout.pack(&digest))?;
        Ok(StagedPack { digest, staged })
    }

    /// Verifies a received pack with all of its frames, and stores it. The pack is durable and
    /// served on return.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] with the pack's defect, [`StoreError::Full`], or
    /// [`StoreError::Abandoned`].
    ///
    /// # Blocking
    /// Decodes on all cores, for about a second for each GiB of plain bytes and core, and waits for
    /// the disk.
    pub fn put_staged(&self, staged: &StagedPack, caller: &Caller) -> Result<(), StoreError> {
        staged.verify(caller)?;
        self.put_verified(staged)
    }

    /// Stores a pack whose frames are known to be right.
    pub(super) fn put_verified(&self, staged: &StagedPack) -> Result<(), StoreError> {
        self.objects.publish(&staged.staged, &self.objects.layout.pack(&staged.digest))?;
        let _keep = StoreLock::keep_objects(&self.objects)?;
        // A collector without a grace time may have deleted the pack already. The commit then lists
        // it as missing.
        if self.packs.add(staged.digest)? {
            condemned::pardon(&self.objects, &staged.digest)?;
        }
        Ok(())
    }
}

/// Parses a pack from a client and decodes every frame of it, on all cores. Stops early, without an
/// error, when the caller leaves.
fn check_upload(pack: &[u8], caller: &Caller) -> Result<(), PackError> {
    let index = PackIndex::parse(pack)?;
    check_chunk_bytes(pack, &index)?;
    check_frames(pack, &index, caller)
}

/// Parses a stored pack and decodes every frame of it, on all cores.
pub(crate) fn check_pack(pack: &[u8]) -> Result<PackIndex, PackError> {
    let index = PackIndex::parse(pack)?;
    check_frames(pack, &index, &Caller::default())?;
    Ok(index)
}

fn check_frames(pack: &[u8], index: &PackIndex, caller: &Caller) -> Result<(), PackError> {
    index.entries().par_iter().with_min_len(FRAMES_PER_TASK).try_for_each_init(
        || (FrameDecoder::default(), Vec::new()),
        |(decoder, scratch), entry| match caller.check() {
            Ok(()) => check_frame(entry, pack, decoder, scratch),
            Err(_) => Ok(()),
        },
    )
}

/// Checks the sum of the chunks' lengths, by the headers of the frames: a frame of 100 bytes may
/// stand for 2 MiB, which take time to verify.
fn check_chunk_bytes(pack: &[u8], index: &PackIndex) -> Result<(), PackError> {
    let mut bytes = 0;
    for entry in index.entries() {
        let frame = ChunkFrame::parse(&pack[entry.range()]);
        let frame = frame.map_err(|error| PackError::Frame { chunk: entry.chunk, error })?;
        bytes += frame.chunk_bytes() as u64;
    }
    match bytes <= MAX_PACK_CHUNK_BYTES {
        true => Ok(()),
        false => Err(PackError::ChunkBytes { actual: bytes, max: MAX_PACK_CHUNK_BYTES }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::store;
    use postcopy_proto::frame::FrameEncoder;
    use postcopy_proto::pack::PackBuilder;

    #[test]
    fn a_short_pack_that_takes_long_to_verify_is_refused_before_it_is_decoded() {
        let (_dir, store) = store();
        let mut chunk = vec![0; 2 << 20];
        chunk[7] = 1;
        let (mut frame, mut pack) = (Vec::new(), PackBuilder::default());
        assert!(FrameEncoder::new(1).encode(&chunk, &mut frame));
        // The digests are wrong, which is not found out.
        (0..513u32).for_each(|n| pack.push(Digest::of(&n.to_le_bytes()), &frame));
        let pack: Bytes = pack.finish().into();
        let error = store.put_pack(Digest::of(&pack), pack, &Caller::default()).unwrap_err().to_string();
        assert!(error.contains("1075838976 bytes together, more than 1073741824"), "{error}");
    }
}
