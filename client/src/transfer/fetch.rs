//! Fetches chunks of an image for a file or a check, outside of any session.

use crate::install::chunk::decode;
use crate::memory::ChunkPages;
use crate::remote::lane::{BulkLane, frame_of, runs_of};
use crate::remote::{Content, Image};
use crate::remote::{RemoteError, ServerAddress, within};
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::manifest::{FileEntry, chunk_offset};
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::path::ImagePath;
use postcopy_proto::v1;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Most chunks of one request. It also bounds the outstanding chunks, apart from those being
/// decoded: 32 MiB at 64 KiB.
const REQUEST_CHUNKS: usize = 512;
/// Most messages that are decoded at a time.
const DECODING: usize = 8;

/// The consumer of chunks. Its arguments are a chunk's file, the byte of the file at which the
/// chunk begins, and its verified content. Several threads call it.
pub(crate) type Sink = dyn Fn(&ImagePath, u64, &ChunkPages) -> Result<(), String> + Send + Sync;

/// A chunk that could not be fetched, with the reason.
#[derive(Clone, Debug)]
pub struct Damage {
    /// The file that the chunk belongs to.
    pub path: ImagePath,
    /// The number of the chunk in the image.
    pub chunk: ChunkIndex,
    /// The reason: a wrong answer, or a failure of the consumer.
    pub reason: String,
}

/// The result of a fetch.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    /// The chunks that could not be fetched.
    pub(crate) damaged: Vec<Damage>,
    /// Bytes of the received frames.
    pub(crate) frame_bytes: u64,
}

/// Returns the chunks of an image that are not zero, each digest once if `distinct`.
///
/// # Errors
/// Returns the number of a segment that has not arrived. Its content is unknown, and must not be
/// taken for zeros.
pub(crate) fn data_chunks(image: &Image, distinct: bool) -> Result<Vec<u64>, u32> {
    let mut seen = HashSet::new();
    let mut chunks = Vec::new();
    for chunk in 0..image.root().chunks() {
        match image.content(ChunkIndex(chunk)) {
            Content::Data(digest) if !distinct || seen.insert(digest) => chunks.push(chunk),
            Content::Data(_) | Content::Zero => {}
            Content::SegmentMissing(segment) => return Err(segment),
            Content::OutOfRange => unreachable!("bounded by the root"),
        }
    }
    Ok(chunks)
}

/// Fetches these chunks, verifies each against the manifest, and passes it to `sink`. Requests each
/// failed chunk once more before it reports the chunk as damaged.
///
/// # Errors
/// Returns [`RemoteError`] if the connection was lost; some chunks are then unchecked.
pub(crate) async fn fetch(
    address: &ServerAddress,
    image: &Arc<Image>,
    chunks: Vec<u64>,
    sink: Arc<Sink>,
) -> Result<Fetched, RemoteError> {
    let files = image.root().files().filter(|(_, file)| file.size_bytes > 0);
    let files: Arc<[_]> = files.map(|(path, file)| (path.clone(), *file)).collect();
    let fetch = Fetch { image: Arc::clone(image), files, sink, frame_bytes: Arc::default() };
    let mut damaged = fetch.pass(address, &chunks, 0).await?;
    if !damaged.is_empty() {
        let again: Vec<u64> = damaged.iter().map(|damage| damage.chunk.0).collect();
        damaged = fetch.pass(address, &again, 1).await?;
    }
    Ok(Fetched { damaged, frame_bytes: fetch.frame_bytes.load(Ordering::Relaxed) })
}

#[derive(Clone)]
struct Fetch {
    image: Arc<Image>,
    files: Arc<[(ImagePath, FileEntry)]>,
    sink: Arc<Sink>,
    frame_bytes: Arc<AtomicU64>,
}

impl Fetch {
    async fn pass(
        &self,
        address: &ServerAddress,
        chunks: &[u64],
        attempt: u32,
    ) -> Result<Vec<Damage>, RemoteError> {
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let mut lane = BulkLane::open(address, &self.image.digest()).await?;
        // Each chunk is accepted once, and only if this set holds it: a server may send any answer.
        let mut missing: HashSet<u64> = HashSet::new();
        let mut damaged = Vec::new();
        let mut decoding = JoinSet::new();
        let mut parts = chunks.chunks(REQUEST_CHUNKS);
        let mut id = 0;
        loop {
            // The next request is sent before the last one is answered.
            while missing.len() < REQUEST_CHUNKS {
                let Some(part) = parts.next() else { break };
                missing.extend(part);
                id += 1;
                let runs = runs_of(part.iter().copied());
                let request = v1::StreamChunksRequest { id, attempt, runs, ..Default::default() };
                // A closed queue means a lost lane, and the next message has the reason.
                let _ = lane.requests.send(request).await;
            }
            if missing.is_empty() {
                break;
            }
            let message = within(address, "bulk answer", lane.answer()).await??;
            let message = message.ok_or_else(|| address.wrong("bulk answer", "the stream has ended"))?;
            if message.chunks.is_empty() {
                return Err(address.wrong("bulk answer", "it holds nothing"));
            }
            if let Some(answer) = message.chunks.iter().find(|answer| !missing.remove(&answer.chunk)) {
                let reason = format!("chunk {} was not asked for, or has come before", answer.chunk);
                return Err(address.wrong("bulk answer", reason));
            }
            if decoding.len() >= DECODING
                && let Some(done) = decoding.join_next().await
            {
                damaged.extend(done.expect("a sink does not panic"));
            }
            let this = self.clone();
            decoding.spawn_blocking(move || this.take(&message.chunks));
        }
        damaged.extend(decoding.join_all().await.into_iter().flatten());
        Ok(damaged)
    }

    fn take(&self, answers: &[v1::ChunkAnswer]) -> Vec<Damage> {
        let (mut pages, mut decoder) = (ChunkPages::default(), FrameDecoder::default());
        let damaged = answers.iter().filter_map(|answer| {
            let chunk = ChunkIndex(answer.chunk);
            let (path, file) = self.file_of(chunk)?;
            let reason = self.take_one(path, file, answer, &mut pages, &mut decoder).err()?;
            Some(Damage { path: path.clone(), chunk, reason })
        });
        damaged.collect()
    }

    fn file_of(&self, chunk: ChunkIndex) -> Option<&(ImagePath, FileEntry)> {
        let after = self.files.partition_point(|(_, file)| file.first_chunk <= chunk);
        self.files[..after].last()
    }

    fn take_one(
        &self,
        path: &ImagePath,
        file: &FileEntry,
        answer: &v1::ChunkAnswer,
        pages: &mut ChunkPages,
        decoder: &mut FrameDecoder,
    ) -> Result<(), String> {
        let chunk = ChunkIndex(answer.chunk);
        let Content::Data(digest) = self.image.content(chunk) else {
            return Err("it was not asked for".into());
        };
        let frame = frame_of(answer, &digest).map_err(|no| no.reason)?;
        self.frame_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        decode(pages, decoder, &self.image, file, chunk, &digest, frame)?;
        let offset = chunk_offset(self.image.root().chunk_size(), file, chunk);
        (self.sink)(path, offset as u64, pages)
    }
}
