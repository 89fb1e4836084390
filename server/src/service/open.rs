//! OpenImage: sends the manifest of an image.

use crate::service::{reference, work};
use crate::shutdown::InFlight;
use crate::store::{Store, StoredRoot};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::Stream;
use postcopy_proto::MAX_PART_BYTES;
use postcopy_proto::manifest::{EntryKind, Root};
use postcopy_proto::reference::Reference;
use postcopy_proto::v1::{self, open_image_response::Part};
use std::collections::HashSet;
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
    let root = work::look(move || reader.root(&reader.resolve(&reference)?)).await?;
    let order = segment_order(&root, &request)?;
    Ok(parts(store, root, order, request.more_segments_bytes as usize, in_flight))
}

/// Returns the numbers of the segments to send: those of the first paths, then, if requested, all
/// others.
fn segment_order(root: &Root, request: &v1::OpenImageRequest) -> Result<Vec<u32>, Status> {
    let mut is_listed = vec![false; root.segment_digests().len()];
    let mut order = Vec::new();
    let mut list = |segments: std::ops::Range<u32>| {
        for segment in segments {
            if !std::mem::replace(&mut is_listed[segment as usize], true) {
                order.push(segment);
            }
        }
    };
    for path in &request.first_paths {
        match root.entry(path).map(|entry| &entry.kind) {
            None => return Err(no_such_path(path)),
            Some(EntryKind::File(file)) => list(root.segments_of(file)),
            Some(EntryKind::SymbolicLink(_) | EntryKind::EmptyDirectory) => {}
        }
    }
    if request.all_segments {
        list(0..all_segments(root));
    }
    Ok(order)
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
    order: Vec<u32>,
    mut more_bytes: usize,
    in_flight: InFlight,
) -> impl Stream<Item = Result<v1::OpenImageResponse, Status>> {
    try_stream! {
        let _in_flight = in_flight;
        let image = root.image().into();
        let mut bytes = root.bytes().clone();
        let opened = v1::ImageOpened { image, root_bytes: bytes.len() as u64 };
        yield v1::OpenImageResponse { part: Some(Part::Opened(opened)) };
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(MAX_PART_BYTES));
            yield v1::OpenImageResponse { part: Some(Part::RootPart(part)) };
        }
        for index in &order {
            let segment = segment(&store, &root, *index).await?;
            yield part_of(*index, segment);
        }
        let more = if more_bytes == 0 { 0 } else { all_segments(&root) };
        let sent: HashSet<u32> = order.into_iter().collect();
        for index in (0..more).filter(|index| !sent.contains(index)) {
            // The client has not requested this segment. If it cannot be read, the request that
            // needs it gets the error.
            let Ok(segment) = segment(&store, &root, index).await else { break };
            let Some(rest) = more_bytes.checked_sub(segment.len()) else { break };
            more_bytes = rest;
            yield part_of(index, segment);
        }
    }
}
