//! The outstanding requests of a fetch, and the bulk lane that answers them.
//!
//! If the connection is cut, the fetch opens another lane and requests again the chunks whose
//! answers are missing.

use super::REQUEST_CHUNKS;
use crate::remote::lane::{BulkLane, runs_of};
use crate::remote::{Attempts, RemoteError, Repeated, ServerAddress, within};
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct Requests<'a> {
    address: &'a ServerAddress,
    image: Digest,
    /// The number of times that this fetch has requested each of its chunks before.
    attempt: u32,
    /// None before the first answer is wanted, and after a cut.
    lane: Option<BulkLane>,
    /// The requested chunks that the server has not answered, with their digests. Each answer is
    /// accepted once, and only if this map holds its chunk: a server may send any answer.
    missing: BTreeMap<u64, Digest>,
    attempts: Attempts,
    id: u64,
}

impl<'a> Requests<'a> {
    pub(super) fn new(address: &'a ServerAddress, image: Digest, attempt: u32) -> Self {
        let attempts = Attempts::new(Repeated::Cut);
        Self { address, image, attempt, lane: None, missing: BTreeMap::new(), attempts, id: 0 }
    }

    /// Returns the number of chunks whose answers are missing.
    pub(super) fn outstanding(&self) -> usize {
        self.missing.len()
    }

    /// Requests chunks, at most [`REQUEST_CHUNKS`].
    pub(super) async fn send(&mut self, chunks: Vec<(u64, Digest)>) {
        if self.lane.is_some() {
            self.request(chunks.iter().map(|(chunk, _)| *chunk)).await;
        }
        self.missing.extend(chunks);
    }

    async fn request(&mut self, chunks: impl IntoIterator<Item = u64>) {
        let Some(lane) = &self.lane else { return };
        self.id += 1;
        let (id, attempt, runs) = (self.id, self.attempt, runs_of(chunks));
        let request = v1::StreamChunksRequest { id, attempt, runs, ..Default::default() };
        // A closed queue means a lost lane, and the next answer has the reason.
        let _ = lane.requests.send(request).await;
    }

    /// Waits for the next answers, with the digests of their chunks.
    ///
    /// # Errors
    /// [`RemoteError`]: the connection was lost and not made again in time, the server refused the
    /// requests, or it sent an answer that was not requested.
    pub(super) async fn answers(&mut self) -> Result<Vec<(v1::ChunkAnswer, Digest)>, RemoteError> {
        loop {
            match self.next().await {
                Ok(answers) => {
                    self.attempts = Attempts::new(Repeated::Cut);
                    return Ok(answers);
                }
                Err(error) => {
                    self.lane = None;
                    self.attempts.after(error).await?;
                }
            }
        }
    }

    async fn next(&mut self) -> Result<Vec<(v1::ChunkAnswer, Digest)>, RemoteError> {
        if self.lane.is_none() {
            self.lane = Some(BulkLane::open(self.address, &self.image).await?);
            let missing: Vec<u64> = self.missing.keys().copied().collect();
            for part in missing.chunks(REQUEST_CHUNKS) {
                self.request(part.iter().copied()).await;
            }
        }
        let lane = self.lane.as_mut().expect("it was opened above");
        let wrong = |reason: String| self.address.wrong("bulk answer", reason);
        let message = within(self.address, "bulk answer", lane.answer()).await??;
        let message = message.ok_or_else(|| wrong("the stream has ended".to_owned()))?;
        if message.chunks.is_empty() {
            return Err(wrong("it holds nothing".to_owned()));
        }
        let with_digest = |answer: v1::ChunkAnswer| match self.missing.remove(&answer.chunk) {
            Some(digest) => Ok((answer, digest)),
            None => Err(wrong(format!("chunk {} was not asked for, or has come before", answer.chunk))),
        };
        message.chunks.into_iter().map(with_digest).collect()
    }
}
