//! Decodes a frame into a chunk's verified pages.

use crate::memory::ChunkPages;
use crate::remote::Image;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::manifest::{FileEntry, chunk_len};
use postcopy_proto::page::ChunkIndex;

/// Decompresses `frame` into `pages`, and verifies it. `file` is the image's file that the chunk
/// belongs to, `digest` the chunk's digest in the manifest.
///
/// # Errors
/// Returns the reason why the frame is not the chunk's. The content of `pages` is then unspecified
/// and must not be used.
pub(crate) fn decode(
    pages: &mut ChunkPages,
    decoder: &mut FrameDecoder,
    image: &Image,
    file: &FileEntry,
    chunk: ChunkIndex,
    digest: &Digest,
    frame: &[u8],
) -> Result<(), String> {
    let chunk_bytes =
        chunk_len(image.root().chunk_size(), file, chunk).ok_or("the file has no such chunk")?;
    pages.decode(decoder, chunk_bytes, digest, frame)
}
