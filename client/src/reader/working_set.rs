//! The verified pages of a working set, for callers that are no sessions.

use crate::reader::ChunkBytes;
use crate::remote::Purpose::Bulk;
use crate::remote::set_stream::SetStream;
use crate::remote::{Image, Remote, RemoteError, ServerAddress};
use bytes::Bytes;
use postcopy_proto::page::PAGE_BYTES;
use postcopy_proto::reference::Reference;
use postcopy_proto::set_frame::{SetDecoder, SetFrame};
use std::collections::VecDeque;
use std::sync::Arc;

/// Neighbouring pages of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetPages {
    /// The file's place among the image's regular files.
    pub file: usize,
    /// Offset of the first page in the file, in bytes.
    pub offset: u64,
    /// The bytes, up to the file's end.
    pub content: ChunkBytes,
}

/// The pages of an image's working set, in order of first touch, as they arrive.
#[derive(Debug)]
pub struct WorkingSet {
    server: ServerAddress,
    image: Arc<Image>,
    stream: SetStream,
    /// Frames that have arrived.
    frames: VecDeque<Bytes>,
    decoder: SetDecoder,
}

impl WorkingSet {
    /// Requests the working set of an image, and the segments that prove it, in the current
    /// runtime.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn open(server: &ServerAddress, image: &Arc<Image>) -> Result<Self, RemoteError> {
        let channel = server.connect(Bulk).await?;
        let stream = SetStream::over(channel, server, image);
        let is_complete = |index| image.segment(index).is_some();
        if !(0..image.root().segment_digests().len()).all(|at| u32::try_from(at).is_ok_and(is_complete)) {
            let name = "image".parse().expect("a name");
            let reference = Reference::Digest { name, image: image.digest() };
            let (_, segments) = Remote::connect(server.clone()).await?.open(&reference, &[], true).await?;
            segments.all_into(image).await?;
        }
        let (server, image, frames) = (server.clone(), Arc::clone(image), VecDeque::new());
        Ok(Self { server, image, stream, frames, decoder: SetDecoder::default() })
    }

    /// Waits for the next pages, those of one frame; `None` at the end. An image without a working
    /// set ends at once.
    ///
    /// # Errors
    /// [`RemoteError`]: among others, pages that are not the image's.
    pub async fn next(&mut self) -> Result<Option<Vec<SetPages>>, RemoteError> {
        while self.frames.is_empty() {
            let Some(part) = self.stream.next().await? else { return Ok(None) };
            self.frames.extend(part.frames);
        }
        let frame = self.frames.pop_front().expect("there is one");
        let decoded = SetFrame::parse(&frame).and_then(|frame| self.decoder.decode(&frame, &*self.image));
        decoded.map_err(|error| self.server.wrong("working set", error))?;
        let pages = self.decoder.stretches().filter_map(|(run, bytes)| {
            let offset = u64::from(run.first) * PAGE_BYTES as u64;
            let file_bytes = self.image.files().get(run.file as usize)?.size_bytes;
            let held = usize::from(run.count) * PAGE_BYTES;
            let left = file_bytes.saturating_sub(offset);
            let len = usize::try_from(left).map_or(held, |left| left.min(held));
            let content = match bytes {
                Some(bytes) => ChunkBytes::Data(Bytes::copy_from_slice(&bytes[..len])),
                None => ChunkBytes::Zeros(len),
            };
            Some(SetPages { file: run.file as usize, offset, content })
        });
        Ok(Some(pages.collect()))
    }
}
