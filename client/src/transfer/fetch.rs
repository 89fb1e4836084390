//! Fetches chunks of an image for a file or a check, outside of any session.
//!
//! Its memory is that of a window of segments ([`chunks`]) and of the requests that are
//! outstanding, whatever the size of the image.

mod chunks;
mod requests;

use crate::memory::ChunkPages;
use crate::remote::lane::frame_of;
use crate::remote::{Image, Remote, RemoteError};
use chunks::Chunks;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::manifest::{FileEntry, chunk_len, chunk_offset};
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::path::ImagePath;
use postcopy_proto::v1;
use requests::Requests;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Most chunks of one request. It also bounds the outstanding chunks, apart from those being
/// decoded: 32 MiB at 64 KiB.
const REQUEST_CHUNKS: usize = 512;
/// Most messages that are decoded at a time.
const DECODING: usize = 8;
/// The number of damaged chunks after which a fetch ends: the rest would only repeat the reason.
const MAX_DAMAGED: usize = 16_384;

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
    /// The chunks that could not be fetched. After some thousands the fetch ends early.
    pub(crate) damaged: Vec<Damage>,
    /// The number of chunks that were fetched.
    pub(crate) chunks: u64,
    /// Bytes of the received frames.
    pub(crate) frame_bytes: u64,
}

/// Fetches the chunks of these ranges that are not zero, verifies each against the manifest, and
/// passes it to `sink`. If `distinct`, it fetches one chunk of those with the same digest, as far
/// as it remembers the digests. Requests each failed chunk once more before it reports the chunk
/// as damaged.
///
/// # Errors
/// Returns [`RemoteError`] if the connection was lost, or the server sent a wrong segment; some
/// chunks are then unchecked.
pub(crate) async fn fetch(
    remote: &Remote,
    image: &Arc<Image>,
    ranges: Vec<Range<u64>>,
    distinct: bool,
    sink: Arc<Sink>,
) -> Result<Fetched, RemoteError> {
    let files = image.root().files().filter(|(_, file)| file.size_bytes > 0);
    let files: Arc<[_]> = files.map(|(path, file)| (path.clone(), *file)).collect();
    let fetch = Fetch { image: Arc::clone(image), files, sink, frame_bytes: Arc::default() };
    let (chunks, mut damaged) = fetch.pass(remote, ranges, distinct, 0).await?;
    if !damaged.is_empty() && damaged.len() < MAX_DAMAGED {
        let again = damaged.iter().map(|damage| damage.chunk.0..damage.chunk.0 + 1).collect();
        (_, damaged) = fetch.pass(remote, again, false, 1).await?;
    }
    Ok(Fetched { damaged, chunks, frame_bytes: fetch.frame_bytes.load(Ordering::Relaxed) })
}

#[derive(Clone)]
struct Fetch {
    image: Arc<Image>,
    files: Arc<[(ImagePath, FileEntry)]>,
    sink: Arc<Sink>,
    frame_bytes: Arc<AtomicU64>,
}

impl Fetch {
    /// Fetches the chunks of `ranges` once. Returns their number, and those that have failed.
    async fn pass(
        &self,
        remote: &Remote,
        ranges: Vec<Range<u64>>,
        distinct: bool,
        attempt: u32,
    ) -> Result<(u64, Vec<Damage>), RemoteError> {
        let mut chunks = Chunks::new(remote, &self.image, ranges, distinct);
        let mut part = chunks.next(REQUEST_CHUNKS).await?;
        let (mut count, mut damaged) = (0, Vec::new());
        let mut requests = Requests::new(remote.address(), self.image.digest(), attempt);
        let mut decoding = JoinSet::new();
        loop {
            // The next request is sent before the last one is answered.
            while requests.outstanding() < REQUEST_CHUNKS && !part.is_empty() {
                count += part.len() as u64;
                requests.send(part).await;
                part = chunks.next(REQUEST_CHUNKS).await?;
            }
            if requests.outstanding() == 0 || damaged.len() >= MAX_DAMAGED {
                break;
            }
            let answers = requests.answers().await?;
            if decoding.len() >= DECODING
                && let Some(done) = decoding.join_next().await
            {
                damaged.extend(done.expect("a sink does not panic"));
            }
            let this = self.clone();
            decoding.spawn_blocking(move || this.take(&answers));
        }
        damaged.extend(decoding.join_all().await.into_iter().flatten());
        Ok((count, damaged))
    }

    fn take(&self, answers: &[(v1::ChunkAnswer, Digest)]) -> Vec<Damage> {
        let (mut pages, mut decoder) = (ChunkPages::default(), FrameDecoder::default());
        let damaged = answers.iter().filter_map(|(answer, digest)| {
            let chunk = ChunkIndex(answer.chunk);
            let (path, file) = self.file_of(chunk)?;
            let reason = self.take_one(path, file, answer, digest, &mut pages, &mut decoder).err()?;
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
        digest: &Digest,
        pages: &mut ChunkPages,
        decoder: &mut FrameDecoder,
    ) -> Result<(), String> {
        let (chunk, chunk_size) = (ChunkIndex(answer.chunk), self.image.root().chunk_size());
        let frame = frame_of(answer, digest).map_err(|no| no.reason)?;
        self.frame_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        let chunk_bytes = chunk_len(chunk_size, file, chunk).ok_or("the file has no such chunk")?;
        pages.decode(decoder, chunk_bytes, digest, frame)?;
        let offset = chunk_offset(chunk_size, file, chunk);
        (self.sink)(path, offset as u64, pages)
    }
}
