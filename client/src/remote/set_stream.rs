//! The working set of an image, as the bulk lane delivers it.

use crate::remote::lane::BulkLane;
use crate::remote::{Image, RemoteError, ServerAddress, within};
use bytes::Bytes;
use postcopy_proto::page::PAGE_BYTES;
use postcopy_proto::set_frame::SetFrame;
use postcopy_proto::v1;
use tonic::transport::Channel;

/// Most bytes of a message's frames.
const MAX_BYTES: usize = 8 << 20;

/// Frames of a working set that have arrived together.
#[derive(Debug)]
pub(crate) struct SetPart {
    pub(crate) frames: Vec<Bytes>,
    /// Number of pages that the frames hold or take, the larger one.
    pub(crate) pages: usize,
}

/// The stream of a working set's frames. They are not verified here.
#[derive(Debug)]
pub(crate) struct SetStream {
    lane: BulkLane,
    server: ServerAddress,
    /// Number of pages that may still come. A server could send frames for ever, so there are no
    /// more than the image has pages.
    left: u64,
}

impl SetStream {
    /// Requests the working set of `image`.
    pub(crate) fn over(channel: Channel, server: &ServerAddress, image: &Image) -> Self {
        let request = v1::StreamChunksRequest { working_set: true, ..Default::default() };
        let lane = BulkLane::over(channel, server, &image.digest(), Some(request));
        let pages = |(_, file): (_, &postcopy_proto::manifest::FileEntry)| {
            file.size_bytes.div_ceil(PAGE_BYTES as u64)
        };
        Self { lane, server: server.clone(), left: image.root().files().map(pages).sum() }
    }

    /// Waits for the next frames; `None` at the end of the working set.
    ///
    /// # Errors
    /// [`RemoteError`]: the server has answered wrongly, or not for 30 s.
    pub(crate) async fn next(&mut self) -> Result<Option<SetPart>, RemoteError> {
        let server = &self.server;
        let message = within(server, "working set", self.lane.answer()).await??;
        let message = message.ok_or_else(|| server.wrong("working set", "the stream has ended"))?;
        if message.working_set_ended {
            return Ok(None);
        }
        let frames = message.working_set_frames;
        let bytes = frames.iter().map(Bytes::len).sum::<usize>();
        if frames.is_empty() || bytes > MAX_BYTES {
            return Err(server.wrong("working set", "a message that holds nothing, or too much"));
        }
        // An invalid frame counts as one page, because a server could send such frames for ever.
        let pages_of = |frame: &Bytes| SetFrame::parse(frame).map_or(1, |frame| frame.pages().max(1));
        let pages = frames.iter().map(pages_of).sum::<usize>();
        let left = self.left.checked_sub(pages as u64);
        self.left = left.ok_or_else(|| server.wrong("working set", "more pages than the image has"))?;
        Ok(Some(SetPart { frames, pages: pages.max(bytes / PAGE_BYTES) }))
    }

    /// Returns the lane, for other requests.
    pub(crate) fn into_lane(self) -> BulkLane {
        self.lane
    }
}
