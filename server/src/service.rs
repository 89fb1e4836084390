//! The gRPC services of a store.
//!
//! Services check a request here, once. Below them there are only digests, references and runs of
//! chunks. A page passes [`pages`], then [`chunks`] (the chunks of the image, and their content),
//! then the store. All work that may wait for a disk runs in [`blocking`]. A page whose frame is in
//! memory is answered in the task that read the request.

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

/// Runs work that waits for a disk, or computes for long, outside of the async workers.
async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    // The panic's message and place are on stderr.
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

/// Returns the error for one chunk or segment, in the form of its answer.
fn error_of(error: &StoreError) -> v1::Error {
    let code = match error {
        StoreError::NotFound(_) => v1::ErrorCode::NotFound,
        StoreError::Damaged { .. } => v1::ErrorCode::DataLoss,
        StoreError::Invalid { .. } | StoreError::Full(_) | StoreError::Io { .. } => v1::ErrorCode::Internal,
    };
    v1::Error { code: code.into(), message: chain(error) }
}

/// Parses a digest of a request.
fn digest(field: &str, bytes: &[u8]) -> Result<Digest, Status> {
    Digest::try_from(bytes).map_err(|e| Status::invalid_argument(format!("{field}: {e}")))
}

/// Parses a reference of a request.
fn reference<T>(text: &str) -> Result<T, Status>
where
    T: std::str::FromStr<Err = postcopy_proto::reference::ReferenceError>,
{
    text.parse().map_err(|e: T::Err| Status::invalid_argument(e.to_string()))
}
