//! ReadFile: plain bytes, decoded and verified by the server.

use crate::service::open::no_such_path;
use crate::service::{reference, work};
use crate::shutdown::InFlight;
use crate::store::{Store, StoreError, StoredChunk, StoredRoot};
use async_stream::try_stream;
use bytes::Bytes;
use futures_util::Stream;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder, FrameError};
use postcopy_proto::manifest::{EntryKind, FileEntry, Root};
use postcopy_proto::page::{ChunkIndex, to_usize};
use postcopy_proto::reference::Reference;
use postcopy_proto::v1;
use std::ops::Range;
use std::sync::Arc;
use tonic::Status;

/// Checks that the file has these bytes, before it sends anything.
pub(super) async fn read_file(
    store: Arc<Store>,
    request: v1::ReadFileRequest,
    in_flight: InFlight,
) -> Result<impl Stream<Item = Result<v1::ReadFileResponse, Status>>, Status> {
    let reference: Reference = reference(&request.reference)?;
    let reader = store.clone();
    let (root, _) = work::open(move || reader.open_reference(&reference)).await?;
    let file = match root.entry(&request.path).map(|entry| &entry.kind) {
        None => return Err(no_such_path(&request.path)),
        Some(EntryKind::File(file)) => *file,
        Some(EntryKind::SymbolicLink(_)) => {
            return Err(Status::failed_precondition("the path is a symbolic link, and no regular file"));
        }
        Some(EntryKind::EmptyDirectory) => {
            return Err(Status::failed_precondition("the path is a directory, and no regular file"));
        }
    };
    let range = byte_range(&request, file.size_bytes)?;
    Ok(parts(store, root, file, range, in_flight))
}

/// Bytes of one answer. Each stream holds a piece of this size, or one chunk.
const PIECE_BYTES: usize = 256 << 10;

fn byte_range(request: &v1::ReadFileRequest, size_bytes: u64) -> Result<Range<u64>, Status> {
    let start = request.offset_bytes;
    let end = match request.length_bytes {
        Some(length) => start.checked_add(length),
        None => Some(size_bytes),
    };
    match end {
        Some(end) if start <= size_bytes && end <= size_bytes => Ok(start..end),
        _ => {
            Err(Status::out_of_range(format!("offset or length reach beyond the file's {size_bytes} bytes")))
        }
    }
}

fn parts(
    store: Arc<Store>,
    root: Arc<StoredRoot>,
    file: FileEntry,
    range: Range<u64>,
    in_flight: InFlight,
) -> impl Stream<Item = Result<v1::ReadFileResponse, Status>> {
    try_stream! {
        let _in_flight = in_flight;
        let mut at = range.start;
        while at < range.end {
            let end = piece_end(&root, at, range.end);
            let (store, root) = (store.clone(), root.clone());
            let mut piece = work::read(move || read_piece(&store, &root, &file, at..end)).await?;
            while !piece.is_empty() {
                let data = piece.split_to(piece.len().min(PIECE_BYTES));
                yield v1::ReadFileResponse { data };
            }
            at = end;
        }
    }
}

/// Returns the end of a piece that begins at `at`: whole chunks of 256 KiB together, or one chunk,
/// so that the server decodes no chunk twice.
fn piece_end(root: &Root, at: u64, range_end: u64) -> u64 {
    let chunk = u64::from(root.chunk_size().bytes_u32());
    let piece = chunk.max(PIECE_BYTES as u64);
    (at - at % chunk + piece).min(range_end)
}

fn read_piece(store: &Store, root: &Root, file: &FileEntry, range: Range<u64>) -> Result<Bytes, StoreError> {
    let size = root.chunk_size();
    let chunk_bytes = u64::from(size.bytes_u32());
    let mut decoder = FrameDecoder::default();
    let mut plain = Vec::new();
    let mut out = Vec::with_capacity(to_usize(range.end - range.start));
    for index in range.start / chunk_bytes..range.end.div_ceil(chunk_bytes) {
        let start = index * chunk_bytes;
        plain.resize(size.chunk_len(file.size_bytes, index), 0);
        let chunk = ChunkIndex(file.first_chunk.0 + index);
        read_chunk(store, root, chunk, &mut decoder, &mut plain)?;
        let from = to_usize(range.start.saturating_sub(start));
        let to = to_usize(range.end - start).min(plain.len());
        out.extend_from_slice(&plain[from..to]);
    }
    Ok(out.into())
}

/// Decodes the chunk from the first copy, and from a good one if the first is damaged.
fn read_chunk(
    store: &Store,
    root: &Root,
    index: ChunkIndex,
    decoder: &mut FrameDecoder,
    plain: &mut [u8],
) -> Result<(), StoreError> {
    let mut decoded = Ok(());
    for check in [false, true] {
        match store.load_chunk(root, index, check)? {
            None => return Err(StoreError::NotFound(format!("chunk {index}"))),
            Some(StoredChunk::Zero) => plain.fill(0),
            Some(StoredChunk::Data { chunk, frame }) => {
                let outcome = ChunkFrame::parse(&frame)
                    .and_then(|frame| decoder.decode_verified(&frame, &chunk, plain));
                decoded = outcome.map_err(|e| damaged(&chunk, &e));
            }
        }
        if decoded.is_ok() {
            break;
        }
    }
    decoded
}

fn damaged(chunk: &Digest, error: &FrameError) -> StoreError {
    StoreError::Damaged { object: format!("chunk {chunk}"), reason: error.to_string() }
}
