//! A server: its address, connections to it, and single requests for manifests and images.
//!
//! This module knows nothing of memory. The lanes that deliver pages are in
//! [`crate::remote::lane`].

mod asking;
pub(crate) mod backoff;
#[cfg(test)]
mod goaway;
mod image;
pub(crate) mod lane;
mod pings;
pub(crate) mod set_stream;

pub use asking::Patience;
pub(crate) use asking::{Attempts, Repeated, repeat};
pub use image::{Content, Image, ImageSource};

use bytes::BytesMut;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{MAX_ROOT_BYTES, ManifestError, Root};
use postcopy_proto::provenance::Provenance;
use postcopy_proto::v1::image_service_client::ImageServiceClient;
use postcopy_proto::v1::mount_service_client::MountServiceClient;
use postcopy_proto::v1::open_image_response::Part;
use postcopy_proto::v1::page_service_client::PageServiceClient;
use postcopy_proto::v1::working_set_service_client::WorkingSetServiceClient;
use postcopy_proto::v1::{self, segment_answer};
use postcopy_proto::{MAX_MESSAGE_BYTES, page};
use std::fmt;
use std::future::Future;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// The number of requests for a chunk or a segment after which a wrong answer is final. From the
/// second request on, the server checks its own copy.
pub(crate) const MAX_ATTEMPTS: u32 = 3;

/// The server's address if the user names none.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7070";

/// The HTTP/2 window of a demand lane. The default of 64 KiB would cost an additional round trip
/// for one raw chunk.
const DEMAND_WINDOW_BYTES: u32 = 8 << 20;
const BULK_WINDOW_BYTES: u32 = 16 << 20;

/// Where a server listens: `http://host:port` or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddress(String);

/// The reason for a request to a server to fail.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The text is no address.
    #[error("server address {0:?}: neither `http://host:port` nor `unix:/path`, an absolute path")]
    Address(String),
    /// No server answers at the address.
    #[error("server {server} cannot be reached: {reason}")]
    Connect {
        /// The server's address.
        server: String,
        /// The reason that the connection attempt gave.
        reason: String,
        /// True if a server listens there, and this user may not connect to it.
        is_denied: bool,
    },
    /// The server answered with an error, or the connection was lost.
    #[error("server {server}: {}", told(what, status))]
    Status {
        /// The server's address.
        server: String,
        /// The request, in words.
        what: String,
        /// The server's answer.
        status: Box<tonic::Status>,
    },
    /// The server sent invalid data, or data that does not match its digest.
    #[error("server {server} sent a wrong {what}: {reason}")]
    Wrong {
        /// The server's address.
        server: String,
        /// The name of the wrong data.
        what: String,
        /// The fault that was found in the data.
        reason: String,
    },
}

impl RemoteError {
    /// Returns true if the server answered that it does not have the requested object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status, .. } if status.code() == tonic::Code::NotFound)
    }

    /// Returns true if the other end accepted the connection and did not answer as a server of
    /// images does: another program listens there, or the connection was lost.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        let Self::Status { status, .. } = self else { return false };
        is_of_connection(status) || status.code() == tonic::Code::Unimplemented
    }
}

/// Returns whether the connection caused a status. Only the client's own statuses have a source.
fn is_of_connection(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Returns the request and the reason for its failure. A server that lacks an object names it, so
/// the request is left out.
fn told(what: &str, status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::NotFound if !status.message().is_empty() => status.message().to_owned(),
        _ => format!("{what}: {}", reason(status)),
    }
}

/// Returns the reason for a failure in words.
fn reason(status: &tonic::Status) -> String {
    if is_of_connection(status) {
        return format!("the connection failed ({})", innermost(status));
    }
    match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    }
}

impl FromStr for ServerAddress {
    type Err = RemoteError;

    fn from_str(text: &str) -> Result<Self, RemoteError> {
        let wrong = || RemoteError::Address(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self(text.to_owned())) } else { Err(wrong()) };
        }
        let host = text.strip_prefix("http://").ok_or_else(wrong)?.trim_end_matches('/');
        let (name, port) = host.rsplit_once(':').ok_or_else(wrong)?;
        if name.is_empty() || port.parse::<u16>().is_err() || host.contains('/') {
            return Err(wrong());
        }
        Endpoint::from_shared(text.to_owned()).map_err(|_| wrong())?;
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The purpose of a connection. Each lane has its own connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Demand,
    Bulk,
}

impl ServerAddress {
    /// Connects, in the current runtime.
    ///
    /// # Errors
    /// [`RemoteError::Connect`], after at most 5 s.
    pub(crate) async fn connect(&self, purpose: Purpose) -> Result<Channel, RemoteError> {
        let window = match purpose {
            Purpose::Demand => DEMAND_WINDOW_BYTES,
            Purpose::Bulk => BULK_WINDOW_BYTES,
        };
        let endpoint =
            Endpoint::from_shared(self.0.clone()).map_err(|_| RemoteError::Address(self.0.clone()))?;
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .initial_stream_window_size(window)
            .initial_connection_window_size(window)
            .http2_keep_alive_interval(pings::interval())
            .keep_alive_timeout(pings::TIMEOUT);
        endpoint.connect().await.map_err(|error| {
            let error = innermost(&error);
            let kind = error.downcast_ref().map(io::Error::kind);
            RemoteError::Connect {
                server: self.0.clone(),
                reason: error.to_string(),
                is_denied: kind == Some(io::ErrorKind::PermissionDenied),
            }
        })
    }

    pub(crate) fn status(&self, what: impl Into<String>) -> impl FnOnce(tonic::Status) -> RemoteError {
        let (server, what) = (self.0.clone(), what.into());
        move |status| {
            pings::note(&status);
            RemoteError::Status { server, what, status: Box::new(status) }
        }
    }

    pub(crate) fn wrong(&self, what: impl Into<String>, reason: impl fmt::Display) -> RemoteError {
        RemoteError::Wrong { server: self.0.clone(), what: what.into(), reason: reason.to_string() }
    }
}

/// The most bytes of segments that the server sends unasked with a root. For small images they save
/// the first fault a round trip.
const MORE_SEGMENTS_BYTES: u32 = 128 << 10;

/// The most answers for each segment of an image: a server may send one twice.
const MAX_TIMES: usize = 2;

/// The longest time that a server may take for an answer that is due.
const MAX_SILENCE: Duration = Duration::from_secs(30);

/// Returns the output of `answer`, if it is ready within 30 s.
///
/// # Errors
/// [`RemoteError::Wrong`], which names `what` the caller waited for.
pub(crate) async fn within<T>(
    server: &ServerAddress,
    what: &str,
    answer: impl Future<Output = T>,
) -> Result<T, RemoteError> {
    let answer = tokio::time::timeout(MAX_SILENCE, answer).await;
    answer.map_err(|_| server.wrong(what, format!("none came within {MAX_SILENCE:?}")))
}

/// Returns the error at the end of the chain, for example "Connection refused".
fn innermost<'a>(mut error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    while let Some(source) = error.source() {
        error = source;
    }
    error
}

/// A connection to a server, for manifests and images.
#[derive(Clone, Debug)]
pub struct Remote {
    address: ServerAddress,
    channel: Channel,
}

impl Remote {
    /// Connects to a server, in the current runtime.
    ///
    /// # Errors
    /// [`RemoteError::Connect`], after at most 5 s.
    pub async fn connect(address: ServerAddress) -> Result<Self, RemoteError> {
        let channel = address.connect(Purpose::Bulk).await?;
        Ok(Self { address, channel })
    }

    /// Returns the server's address.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// Returns a function that makes the error of a request, which `what` describes, from the
    /// server's status.
    pub fn failed(&self, what: impl Into<String>) -> impl FnOnce(tonic::Status) -> RemoteError {
        self.address.status(what)
    }

    /// Returns the error about wrong data of the server, which `what` names.
    pub fn wrong(&self, what: impl Into<String>, reason: impl fmt::Display) -> RemoteError {
        self.address.wrong(what, reason)
    }

    /// Sends a request, which `what` names, and again for up to 30 s while the server refuses it
    /// because of its load, and for up to 10 s if the connection is cut. `attempt` sends it once.
    ///
    /// # Errors
    /// [`RemoteError::Status`]: the server's answer. [`RemoteError::Wrong`]: none came within the
    /// time of `patience`.
    pub async fn ask<T, F>(
        &self,
        what: &str,
        patience: Patience,
        attempt: impl FnMut() -> F,
    ) -> Result<T, RemoteError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        asking::ask(&self.address, what, patience, attempt).await
    }

    /// Waits for the next message of a stream, which `what` names. None: the stream has ended.
    ///
    /// # Errors
    /// [`RemoteError::Status`]: the server's answer. [`RemoteError::Wrong`]: none came within 30 s.
    pub async fn next_of<T>(
        &self,
        what: &str,
        stream: &mut tonic::Streaming<T>,
    ) -> Result<Option<T>, RemoteError> {
        within(&self.address, what, stream.message()).await?.map_err(self.address.status(what))
    }

    /// Returns the generated client of the server's working set service.
    #[must_use]
    pub fn working_sets(&self) -> WorkingSetServiceClient<Channel> {
        WorkingSetServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns the generated client of the server's image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns the generated client of a mount's service. Its server is `postcopy mount`.
    #[must_use]
    pub fn mount(&self) -> MountServiceClient<Channel> {
        MountServiceClient::new(self.channel.clone())
    }

    /// Returns the generated client of the server's page service.
    #[must_use]
    pub fn pages(&self) -> PageServiceClient<Channel> {
        page_client(self.channel.clone())
    }

    /// Returns the digest of the image that `reference` stands for now.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn resolve(
        &self,
        reference: &postcopy_proto::reference::Reference,
    ) -> Result<Digest, RemoteError> {
        repeat(Repeated::Refused, || self.resolve_once(reference)).await
    }

    /// Does the same, also over another connection if this one was cut.
    pub(crate) async fn resolve_again(
        &self,
        reference: &postcopy_proto::reference::Reference,
    ) -> Result<Digest, RemoteError> {
        repeat(Repeated::Cut, || self.resolve_once(reference)).await
    }

    async fn resolve_once(
        &self,
        reference: &postcopy_proto::reference::Reference,
    ) -> Result<Digest, RemoteError> {
        let what = format!("opening {reference}");
        let request = v1::OpenImageRequest { reference: reference.to_string(), ..Default::default() };
        let mut pages = self.pages();
        let stream = within(&self.address, "manifest", pages.open_image(request)).await?;
        let mut stream = stream.map_err(self.address.status(&what))?.into_inner();
        let part = within(&self.address, "manifest", stream.message()).await?;
        match part.map_err(self.address.status(&what))?.and_then(|part| part.part) {
            Some(Part::Opened(opened)) => {
                Digest::try_from(&opened.image[..]).map_err(|e| self.address.wrong("image digest", e))
            }
            _ => Err(self.address.wrong("answer", "its first part is not `opened`")),
        }
    }

    /// Opens the image that `reference` stands for. Returns the image as soon as its root has
    /// arrived, and the stream of its segments: first those of `first_paths`, then all others if
    /// `all_segments` is set.
    ///
    /// # Errors
    /// [`RemoteError`]. [`RemoteError::Wrong`] if the root does not match the digest that the
    /// reference names, or that the server returned for it.
    pub async fn open(
        &self,
        reference: &postcopy_proto::reference::Reference,
        first_paths: &[&[u8]],
        all_segments: bool,
    ) -> Result<(Arc<Image>, Segments), RemoteError> {
        repeat(Repeated::Refused, || self.open_once(reference, first_paths, all_segments)).await
    }

    async fn open_once(
        &self,
        reference: &postcopy_proto::reference::Reference,
        first_paths: &[&[u8]],
        all_segments: bool,
    ) -> Result<(Arc<Image>, Segments), RemoteError> {
        let request = v1::OpenImageRequest {
            reference: reference.to_string(),
            first_paths: first_paths.iter().map(|path| path.to_vec().into()).collect(),
            all_segments,
            more_segments_bytes: if first_paths.is_empty() { MORE_SEGMENTS_BYTES } else { 0 },
        };
        let what = format!("opening {reference}");
        let mut pages = self.pages();
        let stream = within(&self.address, "manifest", pages.open_image(request)).await?;
        let stream = stream.map_err(self.address.status(&what))?.into_inner();
        let mut segments = Segments { address: self.address.clone(), what, stream, count: 0 };

        let opened = match segments.next_part().await? {
            Some(Part::Opened(opened)) => opened,
            _ => return Err(self.address.wrong("answer", "its first part is not `opened`")),
        };
        let image = Digest::try_from(&opened.image[..]).map_err(|e| self.address.wrong("image digest", e))?;
        if let postcopy_proto::reference::Reference::Digest { image: wanted, .. } = reference
            && image != *wanted
        {
            return Err(self.address.wrong("image", format!("it is {image}, asked for was {wanted}")));
        }
        // It proves nothing, so one that this version does not understand must not stop a restore.
        let provenance = opened.provenance.and_then(|provenance| Provenance::try_from(provenance).ok());
        let root = segments.root(opened.root_bytes).await?;
        let root =
            Root::parse(&root, &image).map_err(|e| self.address.wrong(format!("root of {image}"), e))?;
        Ok((Arc::new(Image::new(root).with_provenance(provenance)), segments))
    }
}

/// Returns a client of the page service over `channel` that takes messages of up to 4 MiB.
pub(crate) fn page_client(channel: Channel) -> PageServiceClient<Channel> {
    PageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// The stream of an image's segments.
#[derive(Debug)]
pub struct Segments {
    address: ServerAddress,
    what: String,
    stream: tonic::Streaming<v1::OpenImageResponse>,
    /// The number of segments that have arrived.
    count: usize,
}

impl Segments {
    async fn next_part(&mut self) -> Result<Option<Part>, RemoteError> {
        let part = within(&self.address, "manifest", self.stream.message()).await?;
        match part.map_err(self.address.status(&self.what))? {
            None => Ok(None),
            Some(v1::OpenImageResponse { part: Some(part) }) => Ok(Some(part)),
            Some(v1::OpenImageResponse { part: None }) => Err(self.address.wrong("answer", "an empty part")),
        }
    }

    async fn root(&mut self, root_bytes: u64) -> Result<BytesMut, RemoteError> {
        if root_bytes > MAX_ROOT_BYTES as u64 {
            return Err(self
                .address
                .wrong("root", format!("{root_bytes} bytes are more than {MAX_ROOT_BYTES}")));
        }
        let expected = page::to_usize(root_bytes);
        let mut root = BytesMut::new();
        while root.len() < expected {
            match self.next_part().await? {
                Some(Part::RootPart(part)) if part.is_empty() => {
                    return Err(self.address.wrong("root", "a part of it is empty"));
                }
                Some(Part::RootPart(part)) if root.len() + part.len() <= expected => {
                    root.extend_from_slice(&part)
                }
                _ => return Err(self.address.wrong("root", format!("not the announced {expected} bytes"))),
            }
        }
        Ok(root)
    }

    /// Waits for the next segment and adds it to `image`. Returns the segment's number, or `None`
    /// at the end of the stream.
    ///
    /// # Errors
    /// [`RemoteError`]. [`RemoteError::Wrong`] if the segment does not match the root; then it is
    /// not added.
    pub async fn next_into(&mut self, image: &Image) -> Result<Option<u32>, RemoteError> {
        let answer = match self.next_part().await? {
            None => return Ok(None),
            Some(Part::Segment(answer)) => answer,
            Some(_) => return Err(self.address.wrong("answer", "a part that is no segment")),
        };
        self.count += 1;
        if self.count > MAX_TIMES * image.root().segment_digests().len() {
            return Err(self.address.wrong("manifest", "its segments are sent again and again"));
        }
        take_segment(image, &answer).map_err(|reason| {
            self.address.wrong(format!("segment {} of {}", answer.index, image.digest()), reason)
        })?;
        Ok(Some(answer.index))
    }

    /// Adds the requested segments to `image`, to the end of the stream. A server may leave some
    /// out: [`Image::content`] tells which are missing.
    ///
    /// # Errors
    /// The same as those of [`Segments::next_into`].
    pub async fn all_into(mut self, image: &Image) -> Result<(), RemoteError> {
        while self.next_into(image).await?.is_some() {}
        Ok(())
    }
}

/// The reason for which a segment was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SegmentRefused {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("{}", .0.message)]
    Server(v1::Error),
    #[error("the answer is empty")]
    Empty,
}

/// Adds a segment that the server answered with to `image`, after checking it against the root.
pub(crate) fn take_segment(image: &Image, answer: &v1::SegmentAnswer) -> Result<(), SegmentRefused> {
    match &answer.result {
        Some(segment_answer::Result::Segment(bytes)) => Ok(image.add_segment(answer.index, bytes)?),
        Some(segment_answer::Result::Error(error)) => Err(SegmentRefused::Server(error.clone())),
        None => Err(SegmentRefused::Empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_http_or_unix() {
        for good in ["http://127.0.0.1:7070", "http://[::1]:80", "http://host:1/", "unix:/run/p.sock"] {
            assert!(good.parse::<ServerAddress>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:7070",
            "https://h:1",
            "http://h",
            "http://:1",
            "http://h:x",
            "unix:p",
            "http://h:1/x",
        ] {
            assert!(bad.parse::<ServerAddress>().is_err(), "{bad}");
        }
    }
}
