//! Packs and frames made by hand, and uploads of them as a client may send that is not honest.

use crate::store::Rpc;
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::FrameEncoder;
use postcopy::proto::pack::PackBuilder;
use postcopy::proto::v1::{self, upload_pack_request};
use tonic::Status;

/// Uploads a pack in these parts.
///
/// # Errors
/// The server's status.
pub fn upload(rpc: &Rpc, parts: Vec<Option<upload_pack_request::Part>>) -> Result<(), Status> {
    let parts = parts.into_iter().map(|part| v1::UploadPackRequest { part });
    rpc.wait(rpc.images().upload_pack(tokio_stream::iter(parts))).map(|_| ())
}

/// Returns the first part of an upload.
#[must_use]
pub fn begin(digest: impl Into<bytes::Bytes>, size_bytes: usize) -> Option<upload_pack_request::Part> {
    let begin = v1::UploadPackBegin { digest: digest.into(), size_bytes: size_bytes as u64 };
    Some(upload_pack_request::Part::Begin(begin))
}

/// Returns a part that holds bytes of the pack.
#[must_use]
pub fn data(bytes: impl Into<bytes::Bytes>) -> Option<upload_pack_request::Part> {
    Some(upload_pack_request::Part::Data(bytes.into()))
}

/// Returns the messages with which an honest client uploads a pack.
pub fn upload_parts(pack: &[u8]) -> impl Iterator<Item = v1::UploadPackRequest> {
    let parts = pack.chunks(1 << 20).map(|part| data(part.to_vec()));
    let parts = [begin(Digest::of(pack), pack.len())].into_iter().chain(parts);
    parts.map(|part| v1::UploadPackRequest { part })
}

/// Uploads a pack as an honest client does.
///
/// # Errors
/// The server's status.
pub fn upload_whole(rpc: &Rpc, pack: &[u8]) -> Result<(), Status> {
    let parts: Vec<_> = upload_parts(pack).collect();
    rpc.wait(rpc.images().upload_pack(tokio_stream::iter(parts))).map(|_| ())
}

/// Returns the frame of a chunk.
///
/// # Panics
/// If the chunk is zero: a zero chunk has no frame.
#[must_use]
pub fn frame_of(chunk: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    assert!(FrameEncoder::new(1).encode(chunk, &mut frame), "the chunk is not zero");
    frame
}

/// Returns a pack of these frames, each with the digest of its chunk.
#[must_use]
pub fn pack_of(frames: &[(Digest, Vec<u8>)]) -> Vec<u8> {
    let mut builder = PackBuilder::default();
    frames.iter().for_each(|(digest, frame)| builder.push(*digest, frame));
    builder.finish()
}
