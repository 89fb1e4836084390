//! The gRPC services of a store.
//!
//! Services check a request here, once. Below them there are only digests, references and runs of
//! chunks. A page passes [`pages`], then [`chunks`] (the chunks of the image, and their content),
//! then the store. All work that may wait for a disk runs in [`work`]. A page whose frame is in
//! memory is answered in the task that read the request.

mod chunks;
mod images;
mod lanes;
mod open;
mod pages;
mod peers;
mod read_file;
#[cfg(test)]
mod tests;
mod upload;
mod work;
mod working_sets;

pub use images::ImageServer;
pub use pages::PageServer;
pub use peers::PeerServer;
pub use working_sets::WorkingSetServer;

use crate::store::{StoreError, chain};
use crate::transport::{exhausted, with_retry_time};
use futures_util::Stream;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use std::pin::Pin;
use tonic::Status;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        let text = chain(&error);
        match error {
            StoreError::NotFound(_) => Self::not_found(text),
            StoreError::Damaged { .. } => Self::data_loss(text),
            StoreError::Invalid { .. } => Self::invalid_argument(text),
            StoreError::Full(_) => Self::resource_exhausted(text),
            StoreError::Busy(_) => exhausted(&text),
            StoreError::Abandoned => Self::cancelled(text),
            StoreError::Bucket { .. } => {
                tracing::error!("{text}");
                with_retry_time(Self::unavailable(text))
            }
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
        StoreError::Invalid { .. }
        | StoreError::Busy(_)
        | StoreError::Abandoned
        | StoreError::Full(_)
        | StoreError::Bucket { .. }
        | StoreError::Io { .. } => v1::ErrorCode::Internal,
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
