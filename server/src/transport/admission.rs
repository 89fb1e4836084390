//! The number of requests in flight, by service: in all, and of one client.
//!
//! Each request holds memory for its message and its answers, so their number bounds memory. A
//! request beyond the bound is refused before the server reads its message.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// Time after which a refused client may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A kind of requests, with a bound of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A demand lane, for its whole life: 32 KiB of requested runs, besides answers.
    DemandLane,
    /// A bulk lane, for its whole life: a request of up to 16,384 runs.
    BulkLane,
    /// An image that is opened: one segment at a time.
    Manifest,
    /// A file that is read: 256 KiB of plain bytes, or one chunk.
    Plain,
    /// A message of at most 4 MiB.
    Images,
    /// A message of at most 4 MiB, and a recording that grows with each.
    WorkingSets,
    /// Health and reflection.
    Other,
}

/// The kinds, in the order of their numbers.
const KINDS: [Kind; 7] = [
    Kind::DemandLane,
    Kind::BulkLane,
    Kind::Manifest,
    Kind::Plain,
    Kind::Images,
    Kind::WorkingSets,
    Kind::Other,
];

impl Kind {
    fn of(path: &str) -> Self {
        match path.trim_start_matches('/').split_once('/') {
            Some(("postcopy.v1.PageService", "FetchChunks")) => Self::DemandLane,
            Some(("postcopy.v1.PageService", "StreamChunks")) => Self::BulkLane,
            Some(("postcopy.v1.PageService", "OpenImage")) => Self::Manifest,
            Some(("postcopy.v1.PageService", "ReadFile")) => Self::Plain,
            Some(("postcopy.v1.ImageService", _)) => Self::Images,
            Some(("postcopy.v1.WorkingSetService", _)) => Self::WorkingSets,
            _ => Self::Other,
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::DemandLane => "demand lanes",
            Self::BulkLane => "bulk lanes",
            Self::Manifest => "requests to open an image",
            Self::Plain => "requests to read a file",
            Self::Images => "requests for images",
            Self::WorkingSets => "requests for working sets",
            Self::Other => "requests",
        }
    }

    /// Returns the most requests at a time of a whole server.
    fn limit(self) -> usize {
        match self {
            Self::DemandLane => 8192,
            Self::BulkLane => 2048,
            Self::Manifest => 512,
            Self::Plain | Self::Other => 256,
            Self::Images => 128,
            Self::WorkingSets => 64,
        }
    }
}

/// Permits for requests: of a whole server, or of one client.
#[derive(Debug)]
pub(crate) struct Quota {
    by_kind: [Arc<Semaphore>; KINDS.len()],
}

impl Quota {
    fn with(limit: impl Fn(Kind) -> usize) -> Arc<Self> {
        Arc::new(Self { by_kind: KINDS.map(|kind| Arc::new(Semaphore::new(limit(kind)))) })
    }

    /// Makes the permits of a whole server.
    pub(crate) fn of_server() -> Arc<Self> {
        Self::with(Kind::limit)
    }

    /// Makes the permits of one client: half as many.
    pub(crate) fn of_client() -> Arc<Self> {
        Self::with(|kind| kind.limit() / 2)
    }

    fn try_take(&self, kind: Kind) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.by_kind[kind as usize]).try_acquire_owned().ok()
    }
}

/// The permits of one request, held until the drop.
#[derive(Debug)]
pub(crate) struct Permits {
    _of_server: OwnedSemaphorePermit,
    _of_client: OwnedSemaphorePermit,
}

/// Takes the permits for a request to `path`.
///
/// # Errors
/// RESOURCE_EXHAUSTED, with a time to retry.
pub(crate) fn admit(server: &Quota, client: &Quota, path: &str) -> Result<Permits, Status> {
    let kind = Kind::of(path);
    let of_client = client.try_take(kind).ok_or_else(|| {
        exhausted(&format!("this client has {} {} in flight", kind.limit() / 2, kind.in_words()))
    })?;
    let of_server = server.try_take(kind).ok_or_else(|| {
        exhausted(&format!("the server has {} {} in flight", kind.limit(), kind.in_words()))
    })?;
    Ok(Permits { _of_server: of_server, _of_client: of_client })
}

/// Returns RESOURCE_EXHAUSTED for a bound that holds for a moment. The trailer
/// `grpc-retry-pushback-ms` tells when to retry.
pub(crate) fn exhausted(reason: &str) -> Status {
    let seconds = RETRY_AFTER.as_secs();
    with_retry_time(Status::resource_exhausted(format!("{reason}; try again in {seconds} s")))
}

/// Tells the client when to repeat the request, also one that changes something.
pub(crate) fn with_retry_time(mut status: Status) -> Status {
    let milliseconds = i32::try_from(RETRY_AFTER.as_millis()).expect("a second");
    status.metadata_mut().insert("grpc-retry-pushback-ms", milliseconds.into());
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_are_in_the_order_of_their_numbers() {
        KINDS.into_iter().enumerate().for_each(|(number, kind)| assert_eq!(kind as usize, number));
    }

    #[test]
    fn a_client_takes_at_most_half_of_a_servers_requests() {
        let (server, clients) = (Quota::of_server(), [(); 3].map(|()| Quota::of_client()));
        let commit = "/postcopy.v1.ImageService/Commit";
        let take = |client: &Quota| {
            let permits = std::iter::from_fn(|| admit(&server, client, commit).ok());
            permits.collect::<Vec<_>>()
        };
        let first = take(&clients[0]);
        assert_eq!((first.len(), take(&clients[1]).len()), (64, 64));
        let _second = take(&clients[1]);
        let status = admit(&server, &clients[2], commit).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
        assert!(status.message().contains("the server has 128 requests for images"), "{status}");
        assert!(admit(&server, &clients[2], "/postcopy.v1.PageService/FetchChunks").is_ok());
        drop(first);
        assert!(admit(&server, &clients[2], commit).is_ok());
    }
}
