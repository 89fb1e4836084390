//! ImageService: receives images into a store, and describes them.

use crate::service::upload::Uploads;
use crate::service::{blocking, reference};
use crate::shutdown::Drain;
use crate::store::{CommitOutcome, Store, StoreError, chain};
use postcopy_proto::MAX_FIND_MISSING;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root};
use postcopy_proto::reference::{Reference, TagReference};
use postcopy_proto::v1;
use postcopy_proto::v1::image_service_server::ImageService;
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
        blocking(move || list(&store, after.as_deref(), max)).await.map(Response::new)
    }

    async fn get_image(
        &self,
        request: Request<v1::GetImageRequest>,
    ) -> Result<Response<v1::GetImageResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let reference: Reference = reference(&request.into_inner().reference)?;
        let store = self.store.clone();
        blocking(move || describe(&store, &reference)).await.map(Response::new)
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
        let missing = blocking(move || -> Result<_, StoreError> {
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
        let digest = blocking(move || store.put_segment(segment)).await?;
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
        let image = blocking(move || store.tag(&source, &target)).await?;
        Ok(Response::new(v1::TagImageResponse { image: image.into() }))
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let _in_flight = self.drain.enter()?;
        let reference: TagReference = reference(&request.into_inner().reference)?;
        let store = self.store.clone();
        blocking(move || store.remove_reference(&reference)).await?;
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
    let images = page.iter().filter_map(|reference| summary_or_damage(store, reference)).collect();
    let next_page_token = match page.last() {
        Some(last) if rest.len() > page.len() => last.to_string(),
        _ => String::new(),
    };
    Ok(v1::ListImagesResponse { images, next_page_token })
}

/// Describes a reference's image, or its damage. Returns `None` if the reference was removed
/// meanwhile.
fn summary_or_damage(store: &Store, reference: &TagReference) -> Option<v1::ImageSummary> {
    let damaged = |image: Vec<u8>, error: &StoreError| v1::ImageSummary {
        reference: reference.to_string(),
        image: image.into(),
        damage: chain(error),
        ..Default::default()
    };
    let image = match store.resolve(&Reference::Tag(reference.clone())) {
        Ok(image) => image,
        Err(StoreError::NotFound(_)) => return None,
        Err(error) => return Some(damaged(Vec::new(), &error)),
    };
    Some(match store.root(&image) {
        Ok(root) => summary(reference.to_string(), &root),
        Err(error) => damaged(image.as_bytes().to_vec(), &error),
    })
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

fn describe(store: &Store, reference: &Reference) -> Result<v1::GetImageResponse, StoreError> {
    let root = match store.resolve(reference).and_then(|image| store.root(&image)) {
        // The reference exists, but its root does not: a loss, and no wrong name.
        Err(StoreError::NotFound(object)) if object != reference.to_string() => {
            let reason = "it is gone from the store".to_owned();
            return Err(StoreError::Damaged { object, reason });
        }
        other => other?,
    };
    let mut zero_chunks = 0;
    let mut digests = Vec::new();
    for index in 0..root.segment_digests().len() {
        let index = u32::try_from(index).expect("a root of 64 MiB has fewer");
        for content in store.segment(&root, index)?.contents() {
            match content {
                ChunkContent::Zero => zero_chunks += 1,
                ChunkContent::Data(digest) => digests.push(digest),
            }
        }
    }
    let chunks = digests.len() as u64;
    digests.sort_unstable();
    digests.dedup();
    let stored_bytes = digests.iter().filter_map(|digest| store.frame_bytes(digest)).map(u64::from).sum();
    Ok(v1::GetImageResponse {
        image: Some(summary(reference.to_string(), &root)),
        chunks,
        zero_chunks,
        distinct_chunks: digests.len() as u64,
        stored_bytes,
    })
}
