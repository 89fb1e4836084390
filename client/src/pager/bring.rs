//! Pages that a call requests and no thread has faulted on: `Hosted::bring`, `Region::read_at`.
//!
//! A call may name any number of pages. So the pager requests their chunks in a window, and ranges
//! take turns: a long one delays a short one by a window at most.

use super::{Pager, Wait};
use crate::memory::{PageState, Region, Spaces};
use postcopy_proto::page::ChunkIndex;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// The plain bytes of the chunks that may be outstanding for calls: at 100 ms a round trip they
/// allow 160 MB a second.
const WINDOW_BYTES: usize = 16 << 20;

/// The pages that calls have requested, as the module describes them.
#[derive(Debug, Default)]
pub(super) struct Brings {
    /// The pages whose chunks are still to be requested.
    ranges: VecDeque<(Region, Range<usize>)>,
    /// A page of each chunk that is outstanding.
    outstanding: Vec<(Region, usize)>,
}

impl Pager {
    /// Installs pages as if a thread had faulted on them.
    pub(super) fn bring(&mut self, region: Region, pages: Range<usize>) {
        self.brings.ranges.push_back((region, pages));
        self.bring_more();
    }

    /// Requests chunks as far as the window has room.
    pub(super) fn bring_more(&mut self) {
        if self.brings.ranges.is_empty() {
            return;
        }
        let shared = Arc::clone(&self.on_exit.shared);
        let spaces = shared.spaces();
        self.brings.outstanding.retain(|(region, page)| absent(&spaces, region, *page..page + 1).is_some());
        let window = (WINDOW_BYTES / shared.image.root().chunk_size().bytes()).max(1);
        while self.brings.outstanding.len() < window {
            let Some((region, pages)) = self.brings.ranges.pop_front() else { return };
            let Some(run) = absent(&spaces, &region, pages.clone()) else { continue };
            let chunk = region.chunk_of(run.start);
            if shared.recorder.is_some() {
                self.bring_recorded(&region, chunk, &pages);
            }
            let at = region.kernel_page_addresses(run.start).start;
            self.waiters.add(&region.space, at, Wait::Call, Instant::now());
            self.ask(&region, run.start);
            self.brings.outstanding.push((region.clone(), run.start));
            // One page requests its whole chunk.
            let next = region.pages_of_chunk(chunk).map_or(run.end, |pages| pages.end);
            if next < pages.end {
                self.brings.ranges.push_back((region, next..pages.end));
            }
        }
    }

    /// Notes these pages as accessed, as far as the chunk has them, and has the chunk installed
    /// whole. For record mode.
    fn bring_recorded(&mut self, region: &Region, chunk: ChunkIndex, pages: &Range<usize>) {
        let of_chunk = region.pages_of_chunk(chunk).expect("a page of the region");
        if let Some(recorder) = &self.shared().recorder {
            let image = &self.shared().image;
            recorder.touched(image, region, of_chunk.start.max(pages.start)..of_chunk.end.min(pages.end));
            recorder.brought(image, region, of_chunk);
        }
        self.frame_cache.forget(chunk);
        self.whole.insert(chunk);
    }
}

/// Returns the first absent pages among these. Pages of a region that was moved or unmapped since
/// are none: a thread that faults on them is served.
fn absent(spaces: &Spaces, region: &Region, pages: Range<usize>) -> Option<Range<usize>> {
    if !spaces.holds(region) {
        return None;
    }
    region.next_run(pages, &[PageState::Absent])
}
