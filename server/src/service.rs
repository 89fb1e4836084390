//! The gRPC services over a store.
//!
//! A request is checked here, once: what goes further is a digest, a reference, a run of chunks. The way of a
//! page is [`pages`], then [`chunks`] (which of the image's chunks, and what holds it), then the store. All that
//! may wait for a disk runs by [`blocking`]; a page whose frame is in memory is answered without leaving
//! the task that read the request.

mod chunks;
mod images;
mod lanes;
mod open;
mod pages;
mod read_file;
#[cfg(test)]
mod tests;
mod upload;
mod working_sets;

pub use images::ImageServer;
pub use pages::PageServer;
pub use working_sets::WorkingSetServer;

use crate::store::{StoreError, chain};
use futures_util::Stream;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use std::pin::Pin;
use tonic::Status;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs what waits for a disk, or computes for long, where no async worker waits for it.
async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    // The panic's message went to stderr with its place.
    done.map_err(|_| Status::internal("the server panicked on this request"))?.map_err(Into::into)
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        let text = chain(&error);
        match error {
            StoreError::NotFound(_) => Self::not_found(text),
            StoreError::Damaged { .. } => Self::data_loss(text),
            StoreError::Invalid { .. } => Self::invalid_argument(text),
            StoreError::Full(_) => Self::resource_exhausted(text),
            StoreError::Io { .. } => {
                tracing::error!("{text}");
                Self::internal(text)
            }
        }
    }
}

/// The error of one chunk or segment, for its answer.
fn error_of(error: &StoreError) -> v1::Error {
    let code = match error {
        StoreError::NotFound(_) => v1::ErrorCode::NotFound,
        StoreError::Damaged { .. } => v1::ErrorCode::DataLoss,
        StoreError::Invalid { .. } | StoreError::Full(_) | StoreError::Io { .. } => v1::ErrorCode::Internal,
    };
    v1::Error { code: code.into(), message: chain(error) }
}

/// Reads a digest of a request.
fn digest(field: &str, bytes: &[u8]) -> Result<Digest, Status> {
    Digest::try_from(bytes).map_err(|e| Status::invalid_argument(format!("{field}: {e}")))
}

/// Reads a reference of a request.
fn reference<T>(text: &str) -> Result<T, Status>
where
    T: std::str::FromStr<Err = postcopy_proto::reference::ReferenceError>,
{
    text.parse().map_err(|e: T::Err| Status::invalid_argument(e.to_string()))
}
