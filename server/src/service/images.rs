//! ImageService: receives images into a store, and describes them.

use crate::service::upload::Uploads;
use crate::service::{digest, reference, work};
use crate::shutdown::Drain;
use crate::store::{
    Caller, ChunkPatch, CommitOutcome, Listed, NoReference, PageToken, PatchedChunk, Referred, Store,
    StoreError, chain,
};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root};
use postcopy_proto::provenance::{Labels, Provenance};
use postcopy_proto::reference::{Reference, TagReference};
use postcopy_proto::v1;
use postcopy_proto::v1::image_service_server::ImageService;
use postcopy_proto::{MAX_FIND_MISSING, MAX_PATCHES};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Most references in one answer.
const MAX_PAGE_SIZE: usize = 1000;

/// The service for the images of a store.
#[derive(Debug)]
pub struct ImageServer {
    store: Arc<Store>,
    uploads: Uploads,
    drain: Drain,
}

impl ImageServer {
    /// Makes a service that serves `store` until `drain` begins.
    #[must_use]
    pub fn new(store: Arc<Store>, drain: Drain) -> Self {
        Self { uploads: Uploads::new(store.clone()), store, drain }
    }
}

#[tonic::async_trait]
impl ImageService for ImageServer {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let request = request.into_inner();
        let max = match request.page_size as usize {
            0 => MAX_PAGE_SIZE,
            size => size.min(MAX_PAGE_SIZE),
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|e| Status::invalid_argument(format!("page_token: {e}")))?),
        };
        let store = self.store.clone();
        work::look(move || list(&store, after, max)).await.map(Response::new)
    }

    async fn get_image(
        &self,
        request: Request<v1::GetImageRequest>,
    ) -> Result<Response<v1::GetImageResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let reference: Reference = reference(&request.into_inner().reference)?;
        let store = self.store.clone();
        work::describe(move |caller| describe(&store, &reference, caller)).await.map(Response::new)
    }

    async fn find_missing(
        &self,
        request: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let digests = request.into_inner().chunk_digests;
        let wrong = |e| Status::invalid_argument(format!("chunk_digests: {e}"));
        let count = Digest::list(&digests).map_err(wrong)?.len();
        if count > MAX_FIND_MISSING {
            let reason = format!("chunk_digests: {count} are more than {MAX_FIND_MISSING}");
            return Err(Status::invalid_argument(reason));
        }
        let store = self.store.clone();
        let missing = work::look(move || -> Result<_, StoreError> {
            store.find_missing(Digest::list(&digests).into_iter().flatten())
        });
        let missing_chunk_digests = Digest::concat(&missing.await?);
        Ok(Response::new(v1::FindMissingResponse { missing_chunk_digests }))
    }

    async fn upload_pack(
        &self,
        request: Request<Streaming<v1::UploadPackRequest>>,
    ) -> Result<Response<v1::UploadPackResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        self.uploads.pack(request.into_inner()).await?;
        Ok(Response::new(v1::UploadPackResponse {}))
    }

    async fn patch_chunks(
        &self,
        request: Request<v1::PatchChunksRequest>,
    ) -> Result<Response<v1::PatchChunksResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let patches = request.into_inner().patches;
        if !(1..=MAX_PATCHES).contains(&patches.len()) {
            let reason = format!("patches: {} are not 1 to {MAX_PATCHES}", patches.len());
            return Err(Status::invalid_argument(reason));
        }
        let patch = |v1::ChunkPatch { base, patch }| Ok(ChunkPatch { base: digest("base", &base)?, patch });
        let patches: Vec<_> = patches.into_iter().map(patch).collect::<Result<_, Status>>()?;
        let store = self.store.clone();
        let chunks = work::heavy(move |caller| store.patch_chunks(&patches, caller)).await?;
        let chunk = |patched: Option<PatchedChunk>| match patched {
            None => v1::PatchedChunk::default(),
            Some(PatchedChunk { chunk, base }) => {
                v1::PatchedChunk { chunk: chunk.into(), leaves: base.to_bytes().into() }
            }
        };
        Ok(Response::new(v1::PatchChunksResponse { chunks: chunks.into_iter().map(chunk).collect() }))
    }

    async fn upload_segment(
        &self,
        request: Request<v1::UploadSegmentRequest>,
    ) -> Result<Response<v1::UploadSegmentResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let segment = request.into_inner().segment;
        let store = self.store.clone();
        let digest = work::look(move || store.put_segment(segment)).await?;
        Ok(Response::new(v1::UploadSegmentResponse { digest: digest.into() }))
    }

    async fn commit(
        &self,
        request: Request<Streaming<v1::CommitRequest>>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        use v1::commit_response::Outcome;
        let _in_flight = self.drain.enter()?;
        let outcome = match self.uploads.commit(request.into_inner()).await? {
            CommitOutcome::Committed(image) => Outcome::Committed(v1::Committed { image: image.into() }),
            CommitOutcome::Missing(missing) => Outcome::Missing(v1::Missing {
                segment_digests: Digest::concat(&missing.segments),
                chunk_digests: Digest::concat(&missing.chunks),
            }),
        };
        Ok(Response::new(v1::CommitResponse { outcome: Some(outcome) }))
    }

    async fn tag_image(
        &self,
        request: Request<v1::TagImageRequest>,
    ) -> Result<Response<v1::TagImageResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let request = request.into_inner();
        let source: Reference = reference(&request.source)?;
        let target: TagReference = reference(&request.target)?;
        let store = self.store.clone();
        let image = work::heavy(move |caller| store.tag(&source, &target, caller)).await?;
        Ok(Response::new(v1::TagImageResponse { image: image.into() }))
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let reference: TagReference = reference(&request.into_inner().reference)?;
        let store = self.store.clone();
        work::look(move || store.remove_reference(&reference)).await?;
        Ok(Response::new(v1::DeleteImageResponse {}))
    }
}

/// Describes the next references, at least one of them unless there are no more.
pub(super) fn list(
    store: &Store,
    mut after: Option<PageToken>,
    max: usize,
) -> Result<v1::ListImagesResponse, StoreError> {
    loop {
        let page = store.references(after.as_ref(), max)?;
        let images = summaries(store, page.entries)?;
        let next_page_token = page.next.as_ref().map(ToString::to_string).unwrap_or_default();
        if !images.is_empty() || page.next.is_none() {
            return Ok(v1::ListImagesResponse { images, next_page_token });
        }
        // All of these have been removed, and the walk's listing may name many more such.
        after = page.next.map(PageToken::of_another_walk);
    }
}

/// Describes the images of references, or their damage. Leaves out references that were removed
/// meanwhile.
fn summaries(store: &Store, entries: Vec<Listed>) -> Result<Vec<v1::ImageSummary>, StoreError> {
    let resolved: Vec<_> = entries.into_par_iter().filter_map(|entry| resolve(store, entry)).collect();
    let mut images: Vec<Digest> =
        resolved.iter().filter_map(|(_, referred)| Some(referred.as_ref().ok()?.image)).collect();
    images.sort_unstable();
    images.dedup();
    let passing = images.into_par_iter().map(|image| (image, store.passing_root(&image, summary)));
    let mut summaries: HashMap<Digest, v1::ImageSummary> = HashMap::new();
    for (image, root) in passing.collect::<Vec<_>>() {
        let described = match root {
            // Each of these takes much memory, so they are read one after another.
            Ok(None) => store.root(&image).map(|root| summary(&root)),
            Ok(Some(summary)) => Ok(summary),
            Err(error) => Err(error),
        };
        summaries.insert(
            image,
            match described {
                Ok(summary) => summary,
                Err(error @ StoreError::Busy(_)) => return Err(error),
                Err(error) => damaged(image.into(), &error),
            },
        );
    }
    let describe = |(reference, referred): (String, Result<Referred, StoreError>)| match referred {
        Ok(Referred { image, provenance }) => {
            // All labels of a page could have more bytes than a message.
            let provenance =
                provenance.map(|provenance| Provenance { labels: Labels::default(), ..provenance });
            let provenance = provenance.as_ref().map(Into::into);
            v1::ImageSummary { reference, provenance, ..summaries[&image].clone() }
        }
        Err(error) => v1::ImageSummary { reference, ..damaged(Bytes::new(), &error) },
    };
    Ok(resolved.into_iter().map(describe).collect())
}

/// Returns an entry's text and its image. Returns `None` if the reference was removed meanwhile.
fn resolve(store: &Store, entry: Listed) -> Option<(String, Result<Referred, StoreError>)> {
    match entry {
        Err(NoReference { text, error }) => Some((text, Err(error))),
        Ok(reference) => match store.refer(&Reference::Tag(reference.clone())) {
            Err(StoreError::NotFound(_)) => None,
            referred => Some((reference.to_string(), referred)),
        },
    }
}

/// Makes the summary of a damaged image, or of one whose digest is not known.
fn damaged(image: Bytes, error: &StoreError) -> v1::ImageSummary {
    v1::ImageSummary { image, damage: chain(error), ..Default::default() }
}

/// Describes an image, without its reference.
fn summary(root: &Root) -> v1::ImageSummary {
    v1::ImageSummary {
        reference: String::new(),
        image: root.image().into(),
        size_bytes: root.size_bytes(),
        files: u32::try_from(root.files().count()).expect("an image has at most 2^20 entries"),
        chunk_size_bytes: root.chunk_size().bytes_u32(),
        damage: String::new(),
        provenance: None,
    }
}

/// Most distinct chunks that a description counts at a time: 72 MiB of digests and lengths. More
/// are counted in several passes over the segments.
const CHUNKS_PER_PASS: u64 = 1 << 21;

fn describe(
    store: &Store,
    reference: &Reference,
    caller: &Caller,
) -> Result<v1::GetImageResponse, StoreError> {
    let referred = store.refer(reference)?;
    let root = match store.root(&referred.image) {
        // The reference exists, but its root does not: a loss, and no wrong name.
        Err(StoreError::NotFound(object)) if matches!(reference, Reference::Tag(_)) => {
            let reason = "it is gone from the store".to_owned();
            return Err(StoreError::Damaged { object, reason });
        }
        other => other?,
    };
    let segments = Segments::of(&root);
    // Of the distinct segments, each once.
    let mut data_chunks: u64 = 0;
    let (mut chunks, mut zero_chunks) = (0, 0);
    for (index, times) in &segments.0 {
        caller.check()?;
        for (content, _) in store.passing_segment(&root, *index)?.contents() {
            match content {
                ChunkContent::Zero => zero_chunks += times,
                ChunkContent::Data(_) => {
                    chunks += times;
                    data_chunks += 1;
                }
            }
        }
    }
    let (mut distinct_chunks, mut stored_bytes) = (0, 0);
    let passes = data_chunks.div_ceil(CHUNKS_PER_PASS);
    for pass in 0..passes {
        let mut frames = Vec::new();
        for (index, _) in &segments.0 {
            caller.check()?;
            for (content, frame_bytes) in store.passing_segment(&root, *index)?.contents() {
                if let ChunkContent::Data(digest) = content
                    && pass_of(&digest, passes) == pass
                {
                    frames.push((digest, frame_bytes));
                }
            }
        }
        frames.sort_unstable();
        // Copies of a chunk may have frames of different lengths.
        frames.dedup_by_key(|(digest, _)| *digest);
        distinct_chunks += frames.len() as u64;
        stored_bytes += frames.iter().map(|(_, bytes)| u64::from(*bytes)).sum::<u64>();
    }
    let provenance = referred.provenance.as_ref().map(Into::into);
    let image = Some(v1::ImageSummary { reference: reference.to_string(), provenance, ..summary(&root) });
    Ok(v1::GetImageResponse { image, chunks, zero_chunks, distinct_chunks, stored_bytes })
}

/// The distinct segments of an image: the number of each, and how many times the root names it. A
/// hostile root names one segment a million times.
struct Segments(Vec<(u32, u64)>);

impl Segments {
    fn of(root: &Root) -> Self {
        let mut places: HashMap<Digest, usize> = HashMap::new();
        let mut segments: Vec<(u32, u64)> = Vec::new();
        for (index, digest) in (0..).zip(root.segment_digests()) {
            let place = *places.entry(*digest).or_insert(segments.len());
            match segments.get_mut(place) {
                Some((_, times)) => *times += 1,
                None => segments.push((index, 1)),
            }
        }
        Self(segments)
    }
}

/// Returns the pass that counts a chunk.
fn pass_of(digest: &Digest, passes: u64) -> u64 {
    let first = digest.as_bytes().first_chunk().expect("a digest has 32 bytes");
    u64::from_le_bytes(*first) % passes
}
