//! Receives packs and roots: streams of parts whose total length is announced.

use crate::service::{digest, reference, work};
use crate::store::{CommitOutcome, Store};
use crate::transport::exhausted;
use bytes::Bytes;
use postcopy_proto::manifest::MAX_ROOT_BYTES;
use postcopy_proto::pack::MAX_PACK_BYTES;
use postcopy_proto::page::to_usize;
use postcopy_proto::provenance::{LabelError, Labels};
use postcopy_proto::reference::TagReference;
use postcopy_proto::v1::{self, commit_request, upload_pack_request};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::{Status, Streaming};

/// Most bytes of roots in memory that are being received: four of the largest size.
const MAX_ROOTS_BYTES: usize = 256 << 20;

/// Time without bytes after which an upload ends.
const MAX_SILENCE: Duration = Duration::from_secs(30);

/// Time in which an upload must be complete: this, and as long as its bytes take at the least rate.
/// Otherwise an upload could hold its place for ever with a byte every few seconds.
const MIN_TIME: Duration = Duration::from_secs(60);
const LEAST_BYTES_PER_SECOND: usize = 8 << 10;

/// Bytes that an upload collects before it writes them.
const WRITE_BYTES: usize = 256 << 10;

/// The receiver of uploads, within bounds of memory and time.
#[derive(Debug)]
pub(super) struct Uploads {
    store: Arc<Store>,
    /// One permit for each byte of a root.
    roots: Arc<Semaphore>,
}

impl Uploads {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store, roots: Arc::new(Semaphore::new(MAX_ROOTS_BYTES)) }
    }

    pub(super) async fn pack(&self, mut parts: Streaming<v1::UploadPackRequest>) -> Result<(), Status> {
        let begin = match next(&mut parts).await?.and_then(|request| request.part) {
            Some(upload_pack_request::Part::Begin(begin)) => begin,
            _ => return Err(Status::invalid_argument("the first message of an upload is `begin`")),
        };
        let announced = digest("begin.digest", &begin.digest)?;
        let size = bounded_size("begin.size_bytes", begin.size_bytes, MAX_PACK_BYTES)?;
        let mut parts = Parts::new(parts, size, |request: v1::UploadPackRequest| match request.part {
            Some(upload_pack_request::Part::Data(data)) => Some(data),
            _ => None,
        });
        let store = self.store.clone();
        if work::look(move || store.keep_pack(&announced)).await? {
            while parts.next().await?.is_some() {}
            return Ok(());
        }
        let store = self.store.clone();
        let mut staged = work::look(move || store.stage_pack(announced)).await?;
        let mut unwritten = Vec::new();
        loop {
            let part = parts.next().await?;
            let is_last = part.is_none();
            // Short parts are written together.
            unwritten.extend_from_slice(&part.unwrap_or_default());
            if is_last || unwritten.len() >= WRITE_BYTES {
                (staged, unwritten) = work::write(move || {
                    staged.write(&unwritten)?;
                    unwritten.clear();
                    Ok((staged, unwritten))
                })
                .await?;
            }
            if is_last {
                break;
            }
        }
        let store = self.store.clone();
        work::heavy(move |caller| store.put_staged(&staged, caller)).await
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
        let wrong = |e: LabelError| Status::invalid_argument(format!("begin.labels: {e}"));
        let labels: Labels = begin.labels.try_into().map_err(wrong)?;
        let size = bounded_size("begin.root_bytes", begin.root_bytes, MAX_ROOT_BYTES)?;
        let mut parts = Parts::new(parts, size, |request: v1::CommitRequest| match request.part {
            Some(commit_request::Part::RootPart(part)) => Some(part),
            _ => None,
        });
        let (mut root, mut memory) = (Vec::new(), self.reserve(0)?);
        while let Some(part) = parts.next().await? {
            memory.merge(self.reserve(part.len())?);
            root.extend_from_slice(&part);
        }
        let store = self.store.clone();
        work::heavy(move |caller| {
            // Held until the bytes are freed, even if the client disconnects.
            let _memory = memory;
            store.commit(&target, labels, root.into(), caller)
        })
        .await
    }

    fn reserve(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Status> {
        let permits = u32::try_from(bytes).expect("a message is shorter");
        let reserved = Arc::clone(&self.roots).try_acquire_many_owned(permits);
        reserved.map_err(|_| exhausted("the server receives as many bytes of roots as it may"))
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

/// The parts of an upload, which must have exactly the announced bytes.
struct Parts<T, F> {
    parts: Streaming<T>,
    data: F,
    announced: usize,
    received: usize,
    deadline: Instant,
}

impl<T, F: Fn(T) -> Option<Bytes>> Parts<T, F> {
    fn new(parts: Streaming<T>, announced: usize, data: F) -> Self {
        let seconds = (announced / LEAST_BYTES_PER_SECOND) as u64;
        let deadline = Instant::now() + MIN_TIME + Duration::from_secs(seconds);
        Self { parts, data, announced, received: 0, deadline }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let message = tokio::time::timeout_at(self.deadline, next(&mut self.parts)).await;
        let too_slow = |_| Status::deadline_exceeded("the upload is slower than 8 KiB/s");
        let Some(message) = message.map_err(too_slow)?? else {
            let (received, announced) = (self.received, self.announced);
            return match received == announced {
                true => Ok(None),
                false => Err(Status::invalid_argument(format!(
                    "{received} bytes came, {announced} were announced"
                ))),
            };
        };
        let Some(part) = (self.data)(message) else {
            return Err(Status::invalid_argument("each message after `begin` must hold bytes"));
        };
        if part.is_empty() {
            return Err(Status::invalid_argument("a part is empty"));
        }
        self.received += part.len();
        if self.received > self.announced {
            let announced = self.announced;
            let reason = format!("the upload has more than the announced {announced} bytes");
            return Err(Status::invalid_argument(reason));
        }
        Ok(Some(part))
    }
}
