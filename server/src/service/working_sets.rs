//! WorkingSetService: receives recordings of page faults, and describes the working sets built from
//! them.
//!
//! A recording is stored once it is complete. The answer follows when a set has been built from it,
//! or after a limited time: see [`builds`].

mod builds;

use crate::service::{Answers, digest, reference, work};
use crate::shutdown::Drain;
use crate::store::{RecordingOf, Store, StoreError, WorkingSet};
use crate::transport::Client;
use builds::Builds;
use futures_util::stream;
use postcopy_proto::digest::Digest;
use postcopy_proto::reference::Reference;
use postcopy_proto::v1;
use postcopy_proto::v1::working_set_service_server::WorkingSetService;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

/// Most spans of all recordings being received: 384 MiB, and up to twice that while they arrive.
const MAX_SPANS: usize = 1 << 25;
/// Most time that an answer waits for the build of a set.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Time without messages after which receiving a recording ends.
const MAX_SILENCE: Duration = Duration::from_secs(30);
/// Time in which a recording must be complete.
const MAX_TIME: Duration = Duration::from_secs(600);
/// Most spans of one message, of at most 18 bytes each.
const SPANS: usize = 65_536;

/// The service for the working sets of a store.
#[derive(Debug)]
pub struct WorkingSetServer {
    store: Arc<Store>,
    drain: Drain,
    share: f64,
    builds: Builds,
    /// One permit for each span of the recordings being received.
    spans: Arc<Semaphore>,
    /// One permit: storing a recording reads the older ones, so one is stored at a time.
    keeping: Arc<Semaphore>,
}

impl WorkingSetServer {
    /// Makes a service that serves `store` until `drain` begins. A page belongs to a working set if
    /// it faulted in at least `share` (0 to 1) of the recordings that could show it.
    #[must_use]
    pub fn new(store: Arc<Store>, drain: Drain, share: f64) -> Self {
        let (spans, keeping) = (Arc::new(Semaphore::new(MAX_SPANS)), Arc::new(Semaphore::new(1)));
        Self { store, drain, share, builds: Builds::default(), spans, keeping }
    }
}

fn describe(image: &Digest, set: &WorkingSet) -> v1::WorkingSet {
    v1::WorkingSet {
        image: (*image).into(),
        recordings: u32::try_from(set.recordings).unwrap_or(u32::MAX),
        pages: set.pages,
        zero_pages: set.zero_pages,
        frame_bytes: set.frame_bytes(),
    }
}

/// The content of one recording's messages.
struct Received {
    image: Option<Digest>,
    id: [u8; 16],
    touched: Vec<v1::PageSpan>,
    unseen: Vec<v1::PageSpan>,
    /// One permit for each of its spans.
    room: Option<OwnedSemaphorePermit>,
    spans: Arc<Semaphore>,
}

impl Received {
    fn new(spans: Arc<Semaphore>) -> Self {
        let (touched, unseen) = (Vec::new(), Vec::new());
        Self { image: None, id: [0; 16], touched, unseen, room: None, spans }
    }

    fn add(&mut self, request: v1::RecordRequest) -> Result<(), Status> {
        match self.image {
            None => {
                self.image = Some(digest("image", &request.image)?);
                let id = request.id.first_chunk().filter(|_| request.id.len() == 16);
                self.id = *id.ok_or_else(|| Status::invalid_argument("id: it has 16 bytes"))?;
            }
            Some(image) if !request.image.is_empty() && request.image != image.as_bytes()[..] => {
                return Err(Status::invalid_argument("image: a recording is of one image, this is another"));
            }
            Some(_) => {}
        }
        // An empty span has no effect, and takes memory.
        if request.touched.iter().chain(&request.unseen).any(|span| span.count == 0) {
            return Err(Status::invalid_argument("a span of no pages"));
        }
        let spans = request.touched.len() + request.unseen.len();
        let more =
            u32::try_from(spans).ok().map(|spans| Arc::clone(&self.spans).try_acquire_many_owned(spans));
        let Some(Ok(more)) = more else {
            return Err(Status::resource_exhausted("too many recordings arrive at once; try again later"));
        };
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
        self.touched.extend(request.touched);
        self.unseen.extend(request.unseen);
        Ok(())
    }
}

#[tonic::async_trait]
impl WorkingSetService for WorkingSetServer {
    type GetWorkingSetStream = Answers<v1::GetWorkingSetResponse>;

    async fn record(
        &self,
        request: Request<Streaming<v1::RecordRequest>>,
    ) -> Result<Response<v1::WorkingSet>, Status> {
        let _in_flight = self.drain.enter()?;
        let sender = request.extensions().get().map_or([0; 16], Client::id);
        let mut requests = request.into_inner();
        let mut received = Received::new(Arc::clone(&self.spans));
        let deadline = Instant::now() + MAX_TIME;
        loop {
            let until = deadline.min(Instant::now() + MAX_SILENCE);
            let request = tokio::time::timeout_at(until, requests.message()).await;
            let too_slow = "the recording sent no message for 30 s, or took more than 10 minutes";
            match request.map_err(|_| Status::deadline_exceeded(too_slow))?? {
                Some(request) => received.add(request)?,
                None => break,
            }
        }
        let Received { image, id, touched, unseen, room, .. } = received;
        let image = image.ok_or_else(|| Status::invalid_argument("image: the first message names it"))?;
        let store = Arc::clone(&self.store);
        let turn = Arc::clone(&self.keeping).acquire_owned().await.expect("it is never closed");
        work::look(move || {
            let _held = (room, turn);
            store.keep_recording(&image, RecordingOf { restore: id, sender }, touched, unseen)
        })
        .await?;
        let (store, share) = (Arc::clone(&self.store), self.share);
        let build = move || Ok(describe(&image, &store.build_working_set(&image, share)?));
        let built = tokio::time::timeout(MAX_WAIT, self.builds.next(image, build)).await;
        if let Ok(built) = built {
            return built.map(Response::new);
        }
        // The recording is stored, and the build goes on without a waiter.
        let store = Arc::clone(&self.store);
        let set = work::look(move || store.working_set(&image)).await?.unwrap_or_default();
        Ok(Response::new(describe(&image, &set)))
    }

    async fn get_working_set(
        &self,
        request: Request<v1::GetWorkingSetRequest>,
    ) -> Result<Response<Self::GetWorkingSetStream>, Status> {
        let _in_flight = self.drain.enter()?;
        let wanted: Reference = reference(&request.into_inner().reference)?;
        let store = Arc::clone(&self.store);
        let (image, set) = work::look(move || -> Result<_, StoreError> {
            let image = store.resolve(&wanted)?;
            let set = store.working_set(&image)?;
            Ok((image, set.ok_or_else(|| StoreError::NotFound(format!("a working set of {wanted}")))?))
        })
        .await?;
        let first =
            v1::GetWorkingSetResponse { working_set: Some(describe(&image, &set)), pages: Vec::new() };
        let spans: Vec<_> = set.spans().collect();
        let parts = spans
            .chunks(SPANS)
            .map(|pages| v1::GetWorkingSetResponse { working_set: None, pages: pages.to_vec() });
        let parts: Vec<_> = std::iter::once(first).chain(parts).map(Ok).collect();
        Ok(Response::new(Box::pin(stream::iter(parts))))
    }

    async fn list_working_sets(
        &self,
        _request: Request<v1::ListWorkingSetsRequest>,
    ) -> Result<Response<v1::ListWorkingSetsResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let store = Arc::clone(&self.store);
        let working_sets = work::look(move || -> Result<Vec<_>, StoreError> {
            let sets = store.images_with_working_sets()?.into_iter().filter_map(|image| {
                match store.working_set(&image) {
                    Ok(set) => set.map(|set| describe(&image, &set)),
                    // The next recording builds this set anew, so the list omits it.
                    Err(error) => {
                        tracing::warn!("a working set is left out: {error}");
                        None
                    }
                }
            });
            Ok(sets.collect())
        });
        Ok(Response::new(v1::ListWorkingSetsResponse { working_sets: working_sets.await? }))
    }

    async fn delete_working_set(
        &self,
        request: Request<v1::DeleteWorkingSetRequest>,
    ) -> Result<Response<v1::DeleteWorkingSetResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let wanted: Reference = reference(&request.into_inner().reference)?;
        let store = Arc::clone(&self.store);
        let turn = self.builds.turn().await;
        work::look(move || -> Result<_, StoreError> {
            let _turn = turn;
            let image = store.resolve(&wanted)?;
            match store.remove_working_set(&image)? {
                true => Ok(Response::new(v1::DeleteWorkingSetResponse {})),
                false => Err(StoreError::NotFound(format!("a working set of {wanted}"))),
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recordings_that_come_at_a_time_take_a_bounded_amount_of_memory() {
        let room = Arc::new(Semaphore::new(3));
        let spans = |count: u32| v1::RecordRequest {
            image: vec![1; 32].into(),
            id: vec![2; 16].into(),
            touched: (0..count).map(|first| v1::PageSpan { file: 0, first, count: 1 }).collect(),
            ..Default::default()
        };
        let (mut first, mut second) = (Received::new(Arc::clone(&room)), Received::new(Arc::clone(&room)));
        first.add(spans(1)).unwrap();
        first.add(spans(1)).unwrap();
        assert_eq!(second.add(spans(2)).unwrap_err().code(), tonic::Code::ResourceExhausted);
        drop(first);
        second.add(spans(2)).unwrap();
    }
}
