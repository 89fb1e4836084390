//! Receives packs and roots: streams of parts whose total length is announced.

use crate::service::{digest, reference, work};
use crate::store::{CommitOutcome, Store};
use bytes::Bytes;
use postcopy_proto::buffers::Buffers;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::MAX_ROOT_BYTES;
use postcopy_proto::pack::MAX_PACK_BYTES;
use postcopy_proto::page::to_usize;
use postcopy_proto::reference::TagReference;
use postcopy_proto::v1::{self, commit_request, upload_pack_request};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, Streaming};

/// Most bytes of uploads in memory at a time: four packs of the largest size.
const MAX_UPLOAD_BYTES: usize = 256 << 20;

/// Number of buffers that are kept for later uploads, and their greatest length: that of the client
/// library's packs.
const IDLE_BUFFERS: usize = 2;
const IDLE_BUFFER_BYTES: usize = 16 << 20;

/// Time without bytes after which an upload ends, so that it does not hold its memory for ever.
const MAX_SILENCE: Duration = Duration::from_secs(30);

/// The receiver of uploads, within bounds of memory.
#[derive(Debug)]
pub(super) struct Uploads {
    store: Arc<Store>,
    /// One permit for each announced byte, taken before the bytes are received.
    memory: Arc<Semaphore>,
    buffers: Buffers,
}

impl Uploads {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let buffers = Buffers::new(IDLE_BUFFERS, IDLE_BUFFER_BYTES);
        Self { store, memory: Arc::new(Semaphore::new(MAX_UPLOAD_BYTES)), buffers }
    }

    pub(super) async fn pack(&self, mut parts: Streaming<v1::UploadPackRequest>) -> Result<(), Status> {
        let begin = match next(&mut parts).await?.and_then(|request| request.part) {
            Some(upload_pack_request::Part::Begin(begin)) => begin,
            _ => return Err(Status::invalid_argument("the first message of an upload is `begin`")),
        };
        let announced = digest("begin.digest", &begin.digest)?;
        let size = bounded_size("begin.size_bytes", begin.size_bytes, MAX_PACK_BYTES)?;
        let data = |request: v1::UploadPackRequest| match request.part {
            Some(upload_pack_request::Part::Data(data)) => Some(data),
            _ => None,
        };
        let store = self.store.clone();
        if work::look(move || store.keep_pack(&announced)).await? {
            return receive(&mut parts, size, data, |_| {}).await;
        }
        let memory = self.reserve(size).await?;
        let mut bytes = self.buffers.take(size);
        receive(&mut parts, size, data, |part| bytes.extend_from_slice(&part)).await?;
        self.store_pack(announced, self.buffers.lend(bytes), memory).await
    }

    async fn store_pack(
        &self,
        announced: Digest,
        bytes: Bytes,
        memory: OwnedSemaphorePermit,
    ) -> Result<(), Status> {
        let store = self.store.clone();
        work::heavy(move |caller| {
            // The permit is held until the bytes are freed, even if the client disconnects.
            let _memory = memory;
            store.put_pack(announced, bytes, caller)
        })
        .await
    }

    pub(super) async fn commit(
        &self,
        mut parts: Streaming<v1::CommitRequest>,
    ) -> Result<CommitOutcome, Status> {
        let begin = match next(&mut parts).await?.and_then(|request| request.part) {
            Some(commit_request::Part::Begin(begin)) => begin,
            _ => return Err(Status::invalid_argument("the first message of a commit is `begin`")),
        };
        let target: TagReference = reference(&begin.reference)?;
        let size = bounded_size("begin.root_bytes", begin.root_bytes, MAX_ROOT_BYTES)?;
        let root_part = |request: v1::CommitRequest| match request.part {
            Some(commit_request::Part::RootPart(part)) => Some(part),
            _ => None,
        };
        let memory = self.reserve(size).await?;
        let mut root = Vec::with_capacity(size);
        receive(&mut parts, size, root_part, |part| root.extend_from_slice(&part)).await?;
        let store = self.store.clone();
        work::heavy(move |caller| {
            let _memory = memory;
            store.commit(&target, root.into(), caller)
        })
        .await
    }

    async fn reserve(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Status> {
        let bytes = u32::try_from(bytes).expect("bounded to 64 MiB");
        let reserved = self.memory.clone().acquire_many_owned(bytes).await;
        Ok(reserved.expect("the semaphore is never closed"))
    }
}

fn bounded_size(field: &str, bytes: u64, max: usize) -> Result<usize, Status> {
    match bytes <= max as u64 {
        true => Ok(to_usize(bytes)),
        false => Err(Status::invalid_argument(format!("{field}: {bytes} bytes are more than {max}"))),
    }
}

/// Returns the next message of an upload; `None` after the last.
async fn next<T>(parts: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let message = tokio::time::timeout(MAX_SILENCE, parts.message()).await;
    message.map_err(|_| Status::deadline_exceeded("the upload sent no bytes for 30 s"))?
}

/// Receives exactly the announced bytes.
async fn receive<T>(
    parts: &mut Streaming<T>,
    announced: usize,
    data: impl Fn(T) -> Option<Bytes>,
    mut keep: impl FnMut(Bytes),
) -> Result<(), Status> {
    let mut received = 0;
    while let Some(message) = next(parts).await? {
        let Some(part) = data(message) else {
            return Err(Status::invalid_argument("each message after `begin` must hold bytes"));
        };
        if part.is_empty() {
            // An empty part would let a client hold memory for ever without sending bytes.
            return Err(Status::invalid_argument("a part is empty"));
        }
        received += part.len();
        if received > announced {
            return Err(Status::invalid_argument(format!(
                "the upload has more than the announced {announced} bytes"
            )));
        }
        keep(part);
    }
    match received == announced {
        true => Ok(()),
        false => Err(Status::invalid_argument(format!("{received} bytes came, {announced} were announced"))),
    }
}
