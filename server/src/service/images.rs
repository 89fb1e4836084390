//! ImageService: receives images into a store, and describes them.

use crate::service::upload::Uploads;
use crate::service::{reference, work};
use crate::shutdown::Drain;
use crate::store::{Caller, CommitOutcome, Store, StoreError, chain};
use postcopy_proto::MAX_FIND_MISSING;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root};
use postcopy_proto::reference::{Reference, TagReference};
use postcopy_proto::v1;
use postcopy_proto::v1::image_service_server::ImageService;
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
            token => Some(page_token(token)?),
        };
        let store = self.store.clone();
        work::look(move || list(&store, after.as_deref(), max)).await.map(Response::new)
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

/// Parses a page token, which is the last reference of the previous page.
fn page_token(token: &str) -> Result<String, Status> {
    let reference: Result<TagReference, _> = token.parse();
    let reference =
        reference.map_err(|_| Status::invalid_argument("page_token: it is not a token of this server"))?;
    Ok(reference.to_string())
}

pub(super) fn list(
    store: &Store,
    after: Option<&str>,
    max: usize,
) -> Result<v1::ListImagesResponse, StoreError> {
    let references = store.references()?;
    let is_before = |r: &TagReference| after.is_some_and(|after| r.to_string().as_str() <= after);
    let rest = &references[references.partition_point(is_before)..];
    let page = &rest[..rest.len().min(max)];
    let images = page.iter().filter_map(|reference| summary_or_damage(store, reference).transpose());
    let images = images.collect::<Result<_, _>>()?;
    let next_page_token = match page.last() {
        Some(last) if rest.len() > page.len() => last.to_string(),
        _ => String::new(),
    };
    Ok(v1::ListImagesResponse { images, next_page_token })
}

/// Describes a reference's image, or its damage. Returns `None` if the reference was removed
/// meanwhile.
fn summary_or_damage(
    store: &Store,
    reference: &TagReference,
) -> Result<Option<v1::ImageSummary>, StoreError> {
    let damaged = |image: Vec<u8>, error: &StoreError| v1::ImageSummary {
        reference: reference.to_string(),
        image: image.into(),
        damage: chain(error),
        ..Default::default()
    };
    let image = match store.resolve(&Reference::Tag(reference.clone())) {
        Ok(image) => image,
        Err(StoreError::NotFound(_)) => return Ok(None),
        Err(error) => return Ok(Some(damaged(Vec::new(), &error))),
    };
    Ok(Some(match store.root(&image) {
        Ok(root) => summary(reference.to_string(), &root),
        Err(error @ StoreError::Busy(_)) => return Err(error),
        Err(error) => damaged(image.as_bytes().to_vec(), &error),
    }))
}

fn summary(reference: String, root: &Root) -> v1::ImageSummary {
    v1::ImageSummary {
        reference,
        image: root.image().into(),
        size_bytes: root.size_bytes(),
        files: u32::try_from(root.files().count()).expect("an image has at most 2^20 entries"),
        chunk_size_bytes: root.chunk_size().bytes_u32(),
        damage: String::new(),
    }
}

/// Most distinct chunks that a description counts at a time: 72 MiB of digests and lengths. More are counted in
/// several passes over the segments.
const CHUNKS_PER_PASS: u64 = 1 << 21;

fn describe(
    store: &Store,
    reference: &Reference,
    caller: &Caller,
) -> Result<v1::GetImageResponse, StoreError> {
    let root = match store.resolve(reference).and_then(|image| store.root(&image)) {
        // The reference exists, but its root does not: a loss, and no wrong name.
        Err(StoreError::NotFound(object)) if object != reference.to_string() => {
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
    let image = Some(summary(reference.to_string(), &root));
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
