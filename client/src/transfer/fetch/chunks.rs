//! The chunks of an image that a transfer fetches: those of some ranges that are not zero.
//!
//! The segments of an image may be larger than memory, and a short root may name many segments. So
//! the segments are read in a window, as the transfer needs them, and a segment that the window
//! holds already is not read again.

use crate::remote::lane::may_pass;
use crate::remote::{Image, Remote, RemoteError, Repeated, repeat, within};
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ChunkContent, Root, SEGMENT_CHUNKS};
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::v1::{self, fetch_chunks_response::Answer, segment_answer};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use tonic::Status;

/// The segments of a window, which take up to 600 KiB each as data chunks, and as much as bytes
/// while they are read. A window covers 131,072 chunks, so its round trip costs little.
const WINDOW: usize = 8;
/// The number of segments among which a window's are selected: those before may be equal.
const LOOK_AHEAD: usize = 16 * WINDOW;
/// The most digests that [`Chunks`] keeps to fetch each of them once: 32 MiB of digests. It fetches
/// a chunk of a larger image again if as many others lie in between.
const MAX_SEEN: usize = 1 << 20;

/// The data chunks of a segment: their places in it, and their digests.
type DataChunks = Arc<[(u32, Digest)]>;

/// An iterator over the chunks of some ranges that are not zero, in ascending order.
#[derive(Debug)]
pub(super) struct Chunks<'a> {
    remote: &'a Remote,
    image: &'a Image,
    /// Ascending and disjoint. Those before `at` are done.
    ranges: Vec<Range<u64>>,
    at: usize,
    /// The segments of the window, by their digests.
    window: HashMap<Digest, DataChunks>,
    /// The digests that were returned, if each is wanted once.
    seen: Option<HashSet<Digest>>,
}

impl<'a> Chunks<'a> {
    /// Creates the iterator. If `distinct`, it leaves out chunks whose digest it has returned.
    pub(super) fn new(remote: &'a Remote, image: &'a Image, ranges: Vec<Range<u64>>, distinct: bool) -> Self {
        let ranges = disjoint(ranges);
        Self { remote, image, ranges, at: 0, window: HashMap::new(), seen: distinct.then(HashSet::new) }
    }

    /// Returns the next chunks, at most `max`, with their digests. None are left if it returns
    /// none.
    ///
    /// # Errors
    /// [`RemoteError`]: a segment was not sent, or does not match the image's root.
    pub(super) async fn next(&mut self, max: usize) -> Result<Vec<(u64, Digest)>, RemoteError> {
        let mut found = Vec::new();
        while found.len() < max {
            let Some(range) = self.ranges.get(self.at).cloned() else { break };
            if range.is_empty() {
                self.at += 1;
                continue;
            }
            let (segment, place) = Root::segment_of(ChunkIndex(range.start));
            let first = segment * u64::from(SEGMENT_CHUNKS);
            let data = self.segment(u32::try_from(segment).expect("bounded by the root")).await?;
            let end = range.end.min(first + u64::from(SEGMENT_CHUNKS));
            let mut next = end;
            for (at, digest) in &data[data.partition_point(|(at, _)| *at < place)..] {
                let chunk = first + u64::from(*at);
                if chunk >= end {
                    break;
                }
                if found.len() == max {
                    next = chunk;
                    break;
                }
                if self.is_new(digest) {
                    found.push((chunk, *digest));
                }
            }
            self.ranges[self.at].start = next;
        }
        Ok(found)
    }

    fn is_new(&mut self, digest: &Digest) -> bool {
        let Some(seen) = &mut self.seen else { return true };
        if seen.len() >= MAX_SEEN {
            seen.clear();
        }
        seen.insert(*digest)
    }

    /// Returns the data chunks of a segment, and reads a window of segments if it lacks this one.
    async fn segment(&mut self, index: u32) -> Result<DataChunks, RemoteError> {
        let digests = self.image.root().segment_digests();
        let digest = digests[index as usize];
        if let Some(data) = self.window.get(&digest) {
            return Ok(Arc::clone(data));
        }
        let mut wanted: Vec<u32> = Vec::new();
        let count = u32::try_from(digests.len()).unwrap_or(u32::MAX);
        for next in (index..count).take(LOOK_AHEAD) {
            let is_there = |other: &u32| digests[*other as usize] == digests[next as usize];
            if wanted.len() < WINDOW && self.wants(next) && !wanted.iter().any(is_there) {
                wanted.push(next);
            }
        }
        self.window.clear();
        // The server may refuse for a moment in the middle of a long transfer, or start again.
        self.window.extend(repeat(Repeated::Cut, || self.read(&wanted)).await?);
        self.window.get(&digest).cloned().ok_or_else(|| self.left_out(index))
    }

    /// Returns whether a range that is not done has chunks of a segment.
    fn wants(&self, segment: u32) -> bool {
        let first = u64::from(segment) * u64::from(SEGMENT_CHUNKS);
        let rest = &self.ranges[self.at..];
        let next = rest.partition_point(|range| range.end <= first);
        rest.get(next).is_some_and(|range| range.start < first + u64::from(SEGMENT_CHUNKS))
    }

    /// Reads these segments.
    async fn read(&self, segments: &[u32]) -> Result<Vec<(Digest, DataChunks)>, RemoteError> {
        let address = self.remote.address();
        let image = self.image.digest();
        let request = |segment: &u32| v1::FetchChunksRequest {
            id: u64::from(*segment),
            class: v1::RequestClass::Background.into(),
            image: image.into(),
            segment: Some(*segment),
            ..Default::default()
        };
        let requests: Vec<_> = segments.iter().map(request).collect();
        let mut pages = self.remote.pages();
        let opened = pages.fetch_chunks(tokio_stream::iter(requests));
        let what = format!("segments of {image}");
        let answers = within(address, &what, opened).await?;
        let mut answers = answers.map_err(address.status(&what))?.into_inner();
        let mut missing: HashSet<u32> = segments.iter().copied().collect();
        let mut read = Vec::new();
        while !missing.is_empty() {
            let message = within(address, &what, answers.message()).await?;
            let Some(message) = message.map_err(address.status(&what))? else {
                return Err(self.left_out(*missing.iter().min().expect("one is missing")));
            };
            let Some(Answer::Segment(answer)) = message.answer else {
                return Err(address.wrong("answer", "a part that is no segment"));
            };
            if !missing.remove(&answer.index) {
                return Err(self.wrong(answer.index, "it was not requested, or is sent again"));
            }
            let bytes = match answer.result {
                Some(segment_answer::Result::Segment(bytes)) => bytes,
                Some(segment_answer::Result::Error(error)) if may_pass(&error) => {
                    return Err(address.status(&what)(Status::unavailable(error.message)));
                }
                Some(segment_answer::Result::Error(error)) => {
                    return Err(self.wrong(answer.index, error.message));
                }
                None => return Err(self.wrong(answer.index, "the answer is empty")),
            };
            let segment = self.image.root().check_segment(answer.index, &bytes);
            let segment = segment.map_err(|error| self.wrong(answer.index, error))?;
            let data = (0..).zip(segment.contents()).filter_map(|(place, content)| match content {
                ChunkContent::Zero => None,
                ChunkContent::Data(digest) => Some((place, digest)),
            });
            read.push((self.image.root().segment_digests()[answer.index as usize], data.collect()));
        }
        Ok(read)
    }

    fn wrong(&self, segment: u32, reason: impl std::fmt::Display) -> RemoteError {
        self.remote.address().wrong(format!("segment {segment} of {}", self.image.digest()), reason)
    }

    fn left_out(&self, segment: u32) -> RemoteError {
        let what = format!("manifest of {}", self.image.digest());
        self.remote.address().wrong(what, format!("segment {segment} is left out"))
    }
}

/// Sorts ranges, joins those that overlap or touch, and drops empty ones.
fn disjoint(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_or_touch_become_one() {
        let ranges = vec![9..9, 4..6, 0..2, 5..7, 2..3, 1..2, 8..9];
        assert_eq!(disjoint(ranges), [0..3, 4..7, 8..9]);
    }
}
