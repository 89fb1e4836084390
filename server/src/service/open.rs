//! OpenImage: sends the manifest of an image.

use crate::service::{reference, work};
use crate::shutdown::InFlight;
use crate::store::{Store, StoredRoot};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::Stream;
use postcopy_proto::MAX_PART_BYTES;
use postcopy_proto::manifest::{EntryKind, Root};
use postcopy_proto::provenance::Provenance;
use postcopy_proto::reference::Reference;
use postcopy_proto::v1::{self, open_image_response::Part};
use std::ops::Range;
use std::sync::Arc;
use tonic::Status;

/// Resolves the reference, and checks that the image has the paths, before it sends anything.
pub(super) async fn open_image(
    store: Arc<Store>,
    request: v1::OpenImageRequest,
    in_flight: InFlight,
) -> Result<impl Stream<Item = Result<v1::OpenImageResponse, Status>>, Status> {
    let reference: Reference = reference(&request.reference)?;
    let reader = store.clone();
    let (root, provenance) = work::open(move || reader.open_reference(&reference)).await?;
    let order = Order::new(&root, &request)?;
    Ok(parts(store, root, provenance, order, request.more_segments_bytes as usize, in_flight))
}

/// Most paths of one request.
const MAX_FIRST_PATHS: usize = 4096;

/// The segments to send: those of the first paths, then, if requested, all others.
struct Order {
    ranges: Vec<Range<u32>>,
    /// A bit for each segment that was sent: a root may name two million.
    sent: Vec<u64>,
}

impl Order {
    fn new(root: &Root, request: &v1::OpenImageRequest) -> Result<Self, Status> {
        if request.first_paths.len() > MAX_FIRST_PATHS {
            let reason =
                format!("first_paths: {} are more than {MAX_FIRST_PATHS}", request.first_paths.len());
            return Err(Status::invalid_argument(reason));
        }
        let mut ranges = Vec::new();
        for path in &request.first_paths {
            match root.entry(path).map(|entry| &entry.kind) {
                None => return Err(no_such_path(path)),
                Some(EntryKind::File(file)) => ranges.push(root.segments_of(file)),
                Some(EntryKind::SymbolicLink(_) | EntryKind::EmptyDirectory) => {}
            }
        }
        if request.all_segments {
            ranges.push(0..all_segments(root));
        }
        Ok(Self { ranges, sent: vec![0; root.segment_digests().len().div_ceil(64)] })
    }

    /// Returns true once for each segment.
    fn is_first(&mut self, segment: u32) -> bool {
        let (word, bit) = (&mut self.sent[segment as usize / 64], 1 << (segment % 64));
        let is_first = *word & bit == 0;
        *word |= bit;
        is_first
    }
}

fn all_segments(root: &Root) -> u32 {
    u32::try_from(root.segment_digests().len()).expect("a root of 64 MiB has fewer")
}

async fn segment(store: &Arc<Store>, root: &Arc<StoredRoot>, index: u32) -> Result<Bytes, Status> {
    let (store, root) = (Arc::clone(store), Arc::clone(root));
    work::read(move || store.read_segment(&root, index)).await
}

fn part_of(index: u32, segment: Bytes) -> v1::OpenImageResponse {
    let result = Some(v1::segment_answer::Result::Segment(segment));
    v1::OpenImageResponse { part: Some(Part::Segment(v1::SegmentAnswer { index, result })) }
}

/// Returns the error for a path that the image lacks.
pub(super) fn no_such_path(path: &[u8]) -> Status {
    let path = String::from_utf8_lossy(&path[..path.len().min(80)]).into_owned();
    Status::not_found(format!("path {path:?} is no file of the image"))
}

fn parts(
    store: Arc<Store>,
    root: Arc<StoredRoot>,
    provenance: Option<Provenance>,
    mut order: Order,
    mut more_bytes: usize,
    in_flight: InFlight,
) -> impl Stream<Item = Result<v1::OpenImageResponse, Status>> {
    try_stream! {
        let _in_flight = in_flight;
        let image = root.image().into();
        let mut bytes = root.bytes().clone();
        let opened = v1::ImageOpened {
            image,
            root_bytes: bytes.len() as u64,
            provenance: provenance.as_ref().map(Into::into),
        };
        yield v1::OpenImageResponse { part: Some(Part::Opened(opened)) };
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(MAX_PART_BYTES));
            yield v1::OpenImageResponse { part: Some(Part::RootPart(part)) };
        }
        for index in std::mem::take(&mut order.ranges).into_iter().flatten() {
            if order.is_first(index) {
                let segment = segment(&store, &root, index).await?;
                yield part_of(index, segment);
            }
        }
        let more = if more_bytes == 0 { 0 } else { all_segments(&root) };
        for index in 0..more {
            if !order.is_first(index) {
                continue;
            }
            // The client has not requested this segment. If it cannot be read, the request that
            // needs it gets the error.
            let Ok(segment) = segment(&store, &root, index).await else { break };
            let Some(rest) = more_bytes.checked_sub(segment.len()) else { break };
            more_bytes = rest;
            yield part_of(index, segment);
        }
    }
}
