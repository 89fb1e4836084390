//! The requests of a push: which chunks are missing, uploads of packs, and the commit.

use super::{COMMITS, PushError};
use crate::remote::{Patience, Remote, RemoteError};
use postcopy_proto::buffers::Buffers;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::Manifest;
use postcopy_proto::pack::PackBuilder;
use postcopy_proto::provenance::Labels;
use postcopy_proto::reference::{Reference, TagReference};
use postcopy_proto::v1::commit_response::Outcome;
use postcopy_proto::v1::{self, commit_request, upload_pack_request};
use postcopy_proto::{MAX_FIND_MISSING, MAX_PART_BYTES};
use std::collections::HashSet;

pub(super) async fn find_missing(remote: &Remote, digests: &[Digest]) -> Result<HashSet<Digest>, PushError> {
    let mut missing = HashSet::new();
    for part in digests.chunks(MAX_FIND_MISSING) {
        let request = v1::FindMissingRequest { chunk_digests: Digest::concat(part) };
        let ask = || {
            let (mut images, request) = (remote.images(), request.clone());
            async move { images.find_missing(request).await }
        };
        let response = remote.ask("find missing chunks", Patience::Long, ask).await?;
        let digests = Digest::list(&response.missing_chunk_digests);
        missing.extend(digests.map_err(|e| remote.address().wrong("list of missing chunks", e))?);
    }
    Ok(missing)
}

pub(super) async fn upload(remote: Remote, pack: PackBuilder, buffers: Buffers) -> Result<u64, RemoteError> {
    let finished = tokio::task::spawn_blocking(move || {
        let bytes = buffers.lend(pack.finish());
        (Digest::of(&bytes), bytes)
    });
    let (digest, mut bytes) = finished.await.expect("finishing a pack does not panic");
    let size_bytes = bytes.len() as u64;
    let begin = v1::UploadPackBegin { digest: digest.into(), size_bytes };
    let mut parts = vec![upload_pack_request::Part::Begin(begin)];
    while !bytes.is_empty() {
        let part = bytes.split_to(bytes.len().min(MAX_PART_BYTES));
        parts.push(upload_pack_request::Part::Data(part));
    }
    let part = |part| v1::UploadPackRequest { part: Some(part) };
    let parts: Vec<_> = parts.into_iter().map(part).collect();
    let send = || {
        let (mut images, parts) = (remote.images(), parts.clone());
        async move { images.upload_pack(tokio_stream::iter(parts)).await }
    };
    remote.ask(&format!("upload of pack {digest}"), Patience::Long, send).await?;
    Ok(size_bytes)
}

/// Commits the manifest, and sends the segments that the server lacks. Returns the inner error if
/// the server lacks chunks, or loses segments each time, as beside a collector without a grace
/// time.
pub(super) async fn commit(
    remote: &Remote,
    reference: &TagReference,
    labels: &Labels,
    manifest: &Manifest,
) -> Result<Result<Digest, PushError>, PushError> {
    let address = remote.address();
    for _ in 0..COMMITS {
        let begin = v1::CommitBegin {
            reference: reference.to_string(),
            root_bytes: manifest.root_bytes.len() as u64,
            labels: labels.into(),
        };
        let mut parts = vec![commit_request::Part::Begin(begin)];
        let mut root = manifest.root_bytes.clone();
        while !root.is_empty() {
            let part = root.split_to(root.len().min(MAX_PART_BYTES));
            parts.push(commit_request::Part::RootPart(part));
        }
        let part = |part| v1::CommitRequest { part: Some(part) };
        let parts: Vec<_> = parts.into_iter().map(part).collect();
        let send = || {
            let (mut images, parts) = (remote.images(), parts.clone());
            async move { images.commit(tokio_stream::iter(parts)).await }
        };
        // If another client moves the reference after a commit whose answer was lost, a second
        // commit would move it back.
        let response = match remote.ask(&format!("commit of {reference}"), Patience::Change, send).await {
            Err(error) if error.is_no_answer() && is_committed(remote, reference, manifest).await => {
                return Ok(Ok(manifest.root.image()));
            }
            response => response?,
        };
        let missing = match response.outcome {
            Some(Outcome::Committed(v1::Committed { image })) => {
                let image = Digest::try_from(&image[..]).map_err(|e| address.wrong("image digest", e))?;
                if image != manifest.root.image() {
                    let reason = format!("it is {image}, pushed was {}", manifest.root.image());
                    return Err(address.wrong("committed image", reason).into());
                }
                return Ok(Ok(image));
            }
            Some(Outcome::Missing(missing)) => missing,
            None => return Err(address.wrong("answer to the commit", "it is empty").into()),
        };
        let missing =
            Digest::list(&missing.segment_digests).map_err(|e| address.wrong("list of segments", e))?;
        let missing: HashSet<_> = missing.collect();
        if missing.is_empty() {
            return Ok(Err(PushError::Lost));
        }
        for bytes in manifest.segments.iter().filter(|bytes| missing.contains(&Digest::of(bytes))) {
            let request = v1::UploadSegmentRequest { segment: bytes.clone() };
            let send = || {
                let (mut images, request) = (remote.images(), request.clone());
                async move { images.upload_segment(request).await }
            };
            remote.ask("upload of a segment", Patience::Long, send).await?;
        }
    }
    Ok(Err(PushError::Segments { server: address.to_string() }))
}

/// Returns true if the reference stands for the image, so that its commit was carried out.
async fn is_committed(remote: &Remote, reference: &TagReference, manifest: &Manifest) -> bool {
    let reference = Reference::Tag(reference.clone());
    remote.resolve_again(&reference).await.is_ok_and(|image| image == manifest.root.image())
}
