//! The chunks of the one image that a stream serves.

use crate::service::{digest, error_of, work};
use crate::store::{Lease, Located, Store, StoreError, StoredChunk, StoredRoot, chain};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::Root;
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::v1::{self, chunk_answer::Result as Answer};
use std::sync::Arc;
use tonic::Status;

/// The image of a stream, from which the stream requests chunks.
#[derive(Clone, Debug)]
pub(super) struct Chunks {
    store: Arc<Store>,
    root: Arc<StoredRoot>,
    /// Protects the image from garbage collection while it is served.
    _lease: Option<Arc<Lease>>,
    /// The last segment that was used: neighbouring chunks are mostly in the same one.
    last: Option<(u32, Located)>,
}

impl Chunks {
    /// Opens the image that a stream's first message names.
    ///
    /// # Errors
    /// Returns INVALID_ARGUMENT, NOT_FOUND, or DATA_LOSS.
    pub(super) async fn bind(store: &Arc<Store>, image: &[u8]) -> Result<Self, Status> {
        if image.is_empty() {
            return Err(Status::invalid_argument("image: a stream's first message names it"));
        }
        let image = digest("image", image)?;
        let (root, lease) = match (store.cached_root(&image), store.shared_lease(&image)) {
            (Some(root), Some(lease)) => (root, Some(lease)),
            _ => {
                let store = store.clone();
                work::open(move || store.root(&image).map(|root| (root, take_lease(&store, &image)))).await?
            }
        };
        Ok(Self { store: store.clone(), root, _lease: lease, last: None })
    }

    /// Returns the digest of the image.
    pub(super) fn image(&self) -> Digest {
        self.root.image()
    }

    /// Checks that a later message names the same image, or none.
    pub(super) fn check_image(&self, image: &[u8]) -> Result<(), Status> {
        match image.is_empty() || image == self.root.image().as_bytes() {
            true => Ok(()),
            false => Err(Status::invalid_argument("image: a stream serves one image, this is another")),
        }
    }

    /// Returns the answer for a chunk, if it needs no disk.
    pub(super) fn answer_now(&mut self, chunk: u64) -> Option<Answer> {
        if chunk >= self.root.chunks() {
            return Some(self.out_of_range(chunk));
        }
        let (index, place) = Root::segment_of(ChunkIndex(chunk));
        let index = u32::try_from(index).expect("bounded by the root");
        if self.last.as_ref().is_none_or(|(last, _)| *last != index) {
            self.last = Some((index, self.store.cached_segment(&self.root, index)?));
        }
        let (_, segment) = self.last.as_ref()?;
        if place >= segment.chunks() {
            return Some(self.out_of_range(chunk));
        }
        let resident = self.store.resident_chunk(segment, place);
        if let (None, Some(newer)) = (&resident, self.store.cached_segment(&self.root, index)) {
            // A load may have replaced a wrong locator.
            self.last = Some((index, newer));
        }
        resident.map(answer)
    }

    /// Returns the answer for a chunk, if it needs no disk except for its segment. A segment serves
    /// thousands of chunks, so the answers wait for it, and keep their order.
    pub(super) async fn answer_soon(&mut self, chunk: u64) -> Option<Answer> {
        let now = self.answer_now(chunk);
        let (segment, _) = Root::segment_of(ChunkIndex(chunk));
        let segment = u32::try_from(segment).ok()?;
        if now.is_some() || self.last.as_ref().is_some_and(|(last, _)| *last == segment) {
            return now;
        }
        let (store, root) = (self.store.clone(), self.root.clone());
        self.last = Some((segment, work::demand(move || Ok(store.segment(&root, segment)?)).await.ok()?));
        self.answer_now(chunk)
    }

    /// Returns the answer for a chunk, from the disk if necessary. With `check`, decodes and
    /// verifies its frame.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(super) fn load(&self, chunk: u64, check: bool) -> Answer {
        let load = || -> Result<Answer, StoreError> {
            let stored = self.store.load_chunk(&self.root, ChunkIndex(chunk), check)?;
            Ok(stored.map_or_else(|| self.out_of_range(chunk), answer))
        };
        load().unwrap_or_else(|error| {
            let mut error = error_of(&error);
            error.message = format!("chunk {chunk}: {}", error.message);
            Answer::Error(error)
        })
    }

    fn out_of_range(&self, chunk: u64) -> Answer {
        let message = format!("chunk {chunk}: the image has {} chunks", self.root.chunks());
        Answer::Error(v1::Error { code: v1::ErrorCode::OutOfRange.into(), message })
    }

    /// Returns the answer for a segment.
    ///
    /// # Blocking
    /// Reads a file.
    pub(super) fn load_segment(&self, index: u32) -> v1::SegmentAnswer {
        use v1::segment_answer::Result as Answer;
        let segments = self.root.segment_digests().len();
        let result = if index as usize >= segments {
            let message = format!("segment {index}: the image has {segments} segments");
            Answer::Error(v1::Error { code: v1::ErrorCode::OutOfRange.into(), message })
        } else {
            match self.store.read_segment(&self.root, index) {
                Ok(bytes) => Answer::Segment(bytes),
                Err(error) => Answer::Error(error_of(&error)),
            }
        };
        v1::SegmentAnswer { index, result: Some(result) }
    }
}

fn answer(stored: StoredChunk) -> Answer {
    match stored {
        StoredChunk::Zero => Answer::Zero(v1::ZeroChunk {}),
        StoredChunk::Data { frame, .. } => Answer::Frame(frame),
    }
}

/// Takes the lease of an image. On failure the image is served without one: a full disk must not
/// stop reads.
fn take_lease(store: &Store, image: &Digest) -> Option<Arc<Lease>> {
    let lease = store.lease(image);
    lease.inspect_err(|e| tracing::warn!(%image, "served without a lease: {}", chain(e))).ok()
}

/// Checks that no run is empty or ends beyond 2^64, and that the runs have at most `max` chunks
/// together. No runs at all are valid: they bind a stream to its image before it needs chunks.
pub(super) fn check_runs(runs: &[v1::ChunkRun], max: u64) -> Result<(), Status> {
    if runs.iter().any(|run| run.count == 0) {
        return Err(Status::invalid_argument("runs: one has a count of 0"));
    }
    if let Some(run) = runs.iter().find(|run| run.first.checked_add(u64::from(run.count) - 1).is_none()) {
        let v1::ChunkRun { first, count } = run;
        let reason = format!("runs: {count} chunks from {first} on end beyond the largest number");
        return Err(Status::invalid_argument(reason));
    }
    // A message has room for fewer than 2^32 runs, so the sum fits.
    let chunks: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    match chunks <= max {
        true => Ok(()),
        false => Err(Status::invalid_argument(format!("runs: {chunks} chunks are more than {max}"))),
    }
}

/// Returns the numbers of the chunks of checked runs, in order.
pub(super) fn numbers(runs: Vec<v1::ChunkRun>) -> impl Iterator<Item = u64> + Send + 'static {
    runs.into_iter().flat_map(|run| (0..u64::from(run.count)).map(move |n| run.first + n))
}
