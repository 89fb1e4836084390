//! The outstanding requests of a session's pager on the demand lane: chunks and segments that page
//! faults need. It also selects those that the next message requests. It knows nothing of the lane
//! or of memory, and takes the time from its caller.

use crate::memory::{Region, Spaces};
use crate::record::trace::Stages;
use crate::remote::MAX_ATTEMPTS;
use crate::remote::lane::runs_of;
use crate::underway::Underway;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::page::{ChunkIndex, to_usize};
use postcopy_proto::{MAX_DEMAND_CHUNKS, v1};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Time until a lost chunk or segment is requested again, while faults still wait for it.
pub(super) const LOST_RETRY: Duration = Duration::from_secs(1);

/// Back-off before a retry, after the server could not answer for the moment.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// A chunk that was requested ahead and has a waiter is requested as DEMAND, too, once it has been
/// outstanding for so long, or for so many times the latency of an answer. Earlier, both answers
/// would arrive.
const LATE_AHEAD: Duration = Duration::from_millis(20);
const LATE_ANSWERS: u32 = 2;

/// A page that has a waiter.
pub(crate) type Waiting = (Region, usize);

/// A chunk that was requested and is not installed yet.
#[derive(Debug)]
struct Chunk {
    digest: Digest,
    /// A page of the chunk that has a waiter; it is installed first.
    first: Waiting,
    /// True for read-ahead without a waiter. If it cannot be fetched it is forgotten.
    is_ahead: bool,
    /// It is one of those that are under way ahead.
    is_counted: bool,
    attempt: u32,
    /// Number of answers that were wrong or errors.
    refusals: u32,
    /// Time of the first request.
    since: Instant,
    /// Times of the last request and of its answer.
    sent: Option<Instant>,
    answered: Option<Instant>,
    /// The frame of a deferred install, with the time of the next attempt; `None` in place of a
    /// time if an unread event blocks the install.
    frame: Option<(Bytes, Option<Instant>)>,
    /// Time of the next request, after the chunk was lost or the server was busy.
    again_at: Option<Instant>,
    /// The server's reason for being busy.
    busy: Option<String>,
}

/// A segment that was requested, and the pages that need it.
#[derive(Debug)]
struct Segment {
    /// The pages by space and address, each once.
    pages: BTreeMap<(u32, usize), Waiting>,
    refusals: u32,
    since: Instant,
    again_at: Option<Instant>,
    busy: Option<String>,
}

/// The consequence of a wrong answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The chunk or segment is requested again.
    AskedAgain,
    /// The last attempt has failed.
    Final,
    /// No request is outstanding, or none that has a waiter.
    Unknown,
}

/// The outstanding requests of a pager.
#[derive(Debug)]
pub(crate) struct Requests {
    chunks: HashMap<ChunkIndex, Chunk>,
    segments: BTreeMap<u32, Segment>,
    /// Chunks to request with the next message, by attempt.
    chunks_to_ask: Vec<(u32, ChunkIndex)>,
    /// Read-ahead to request when there is nothing else.
    ahead_to_ask: Vec<ChunkIndex>,
    /// Number of chunks that were requested ahead and have neither an answer nor a waiter.
    ahead_under_way: usize,
    /// Chunks that were requested ahead and have a waiter, with the time at which to request them
    /// as DEMAND.
    late_ahead: Vec<(Instant, ChunkIndex)>,
    /// The set of all requested chunks, for the fill.
    underway: Arc<Underway>,
    segments_to_ask: Vec<u32>,
    last_id: u64,
    /// Number of frames that have arrived and are not installed.
    arrived: usize,
}

impl Requests {
    /// Makes an empty set of requests. It keeps all requested chunks in `underway`.
    pub(crate) fn new(underway: Arc<Underway>) -> Self {
        Self {
            chunks: HashMap::new(),
            segments: BTreeMap::new(),
            chunks_to_ask: Vec::new(),
            ahead_to_ask: Vec::new(),
            ahead_under_way: 0,
            late_ahead: Vec::new(),
            underway,
            segments_to_ask: Vec::new(),
            last_id: 0,
            arrived: 0,
        }
    }

    /// Returns true if a segment is outstanding.
    pub(crate) fn awaits_segment(&self) -> bool {
        !self.segments.is_empty()
    }

    /// Returns true if no request is outstanding.
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.segments.is_empty()
    }

    /// Returns true if the chunk was requested and is not done.
    pub(crate) fn has_chunk(&self, chunk: ChunkIndex) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// Adds a waiter to an outstanding chunk; read-ahead becomes a demand fetch. An answer takes
    /// `usual` of late. Returns false if the chunk was not requested.
    pub(crate) fn waits_for(
        &mut self,
        chunk: ChunkIndex,
        first: &Waiting,
        now: Instant,
        usual: Duration,
    ) -> bool {
        let Some(wanted) = self.chunks.get_mut(&chunk) else { return false };
        if std::mem::take(&mut wanted.is_ahead) {
            wanted.first = first.clone();
            wanted.since = now;
            self.ahead_under_way -= usize::from(std::mem::take(&mut wanted.is_counted));
            if let Some(place) = self.ahead_to_ask.iter().position(|ahead| *ahead == chunk) {
                self.ahead_to_ask.remove(place);
                self.chunks_to_ask.push((wanted.attempt, chunk));
            } else if let Some(sent) = wanted.sent.filter(|_| wanted.answered.is_none()) {
                let late = sent + (usual * LATE_ANSWERS).max(LATE_AHEAD);
                self.late_ahead.push((late.max(now), chunk));
            }
        }
        true
    }

    /// Requests chunks as DEMAND that were requested ahead, have a waiter, and are late.
    pub(crate) fn ask_late(&mut self, now: Instant) {
        let chunks = &self.chunks;
        let late = self.late_ahead.extract_if(.., |(at, _)| *at <= now).map(|(_, chunk)| chunk);
        let unanswered = late.filter_map(|chunk| Some((chunks.get(&chunk)?, chunk)));
        let unanswered =
            unanswered.filter(|(wanted, _)| wanted.answered.is_none() && wanted.again_at.is_none());
        self.chunks_to_ask.extend(unanswered.map(|(wanted, chunk)| (wanted.attempt, chunk)));
    }

    /// Returns the number of outstanding chunks that were requested ahead; None if no other is to
    /// be requested.
    pub(crate) fn ahead_under_way(&self) -> Option<usize> {
        (!self.ahead_to_ask.is_empty()).then_some(self.ahead_under_way)
    }

    /// Requests a chunk that is not outstanding.
    pub(crate) fn add_chunk(&mut self, chunk: ChunkIndex, digest: Digest, first: Waiting, now: Instant) {
        self.add(chunk, digest, first, false, now);
        self.chunks_to_ask.push((0, chunk));
    }

    /// Requests read-ahead, a chunk without a waiter; `page` is one of the pages that it is for.
    pub(crate) fn add_ahead(&mut self, chunk: ChunkIndex, digest: Digest, page: Waiting, now: Instant) {
        self.add(chunk, digest, page, true, now);
        self.ahead_to_ask.push(chunk);
    }

    fn add(&mut self, chunk: ChunkIndex, digest: Digest, first: Waiting, is_ahead: bool, now: Instant) {
        let wanted = Chunk {
            digest,
            first,
            is_ahead,
            is_counted: false,
            attempt: 0,
            refusals: 0,
            since: now,
            sent: None,
            answered: None,
            frame: None,
            again_at: None,
            busy: None,
        };
        self.underway.add(chunk);
        self.chunks.insert(chunk, wanted);
    }

    /// Requests the segment that a page needs, unless it is outstanding, and adds the page to it.
    pub(crate) fn add_segment(&mut self, index: u32, page: Waiting, now: Instant) {
        let wanted = self.segments.entry(index).or_insert_with(|| {
            self.segments_to_ask.push(index);
            Segment { pages: BTreeMap::new(), refusals: 0, since: now, again_at: None, busy: None }
        });
        wanted.pages.insert((page.0.space.id, page.0.address(page.1)), page);
    }

    /// Returns true if there is something to request, with at most `ahead` chunks of read-ahead.
    pub(crate) fn has_message(&self, ahead: usize) -> bool {
        !self.chunks_to_ask.is_empty()
            || !self.segments_to_ask.is_empty()
            || (ahead > 0 && !self.ahead_to_ask.is_empty())
    }

    /// Returns the next message: as many of the pending requests as one message may hold, with at
    /// most `ahead` chunks of read-ahead.
    pub(crate) fn message(&mut self, now: Instant, ahead: usize) -> v1::FetchChunksRequest {
        self.last_id += 1;
        if self.chunks_to_ask.is_empty() && self.segments_to_ask.is_empty() {
            let count = self.ahead_to_ask.len().min(to_usize(MAX_DEMAND_CHUNKS)).min(ahead);
            let chunks: Vec<_> = self.ahead_to_ask.drain(..count).collect();
            for chunk in &chunks {
                self.sent(*chunk, now);
                if let Some(wanted) = self.chunks.get_mut(chunk) {
                    self.ahead_under_way += usize::from(!std::mem::replace(&mut wanted.is_counted, true));
                }
            }
            let runs = runs_of(chunks.into_iter().map(|chunk| chunk.0));
            let class = v1::RequestClass::Prefetch.into();
            return v1::FetchChunksRequest { id: self.last_id, class, runs, ..Default::default() };
        }
        let attempt = self.chunks_to_ask.first().map_or(0, |(attempt, _)| *attempt);
        let of_attempt = (0..MAX_DEMAND_CHUNKS).zip(&self.chunks_to_ask);
        let count = of_attempt.take_while(|(_, (a, _))| *a == attempt).count();
        let chunks: Vec<_> = self.chunks_to_ask.drain(..count).map(|(_, chunk)| chunk).collect();
        chunks.iter().for_each(|chunk| self.sent(*chunk, now));
        v1::FetchChunksRequest {
            id: self.last_id,
            attempt,
            class: v1::RequestClass::Demand.into(),
            image: Bytes::new(),
            runs: runs_of(chunks.into_iter().map(|chunk| chunk.0)),
            segment: self.segments_to_ask.pop(),
        }
    }

    fn sent(&mut self, chunk: ChunkIndex, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.sent = Some(now);
        }
    }

    /// Notes the time of a chunk's answer.
    pub(crate) fn answered(&mut self, chunk: ChunkIndex, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.answered = Some(now);
            self.ahead_under_way -= usize::from(std::mem::take(&mut wanted.is_counted));
        }
    }

    /// Returns the time that an answered chunk waited to be requested, and the time of its request.
    pub(crate) fn stages(&self, chunk: ChunkIndex) -> Stages {
        let stages = || {
            let wanted = self.chunks.get(&chunk)?;
            let (sent, asked) = (wanted.sent?, wanted.since);
            let (queue, wire) =
                (sent.checked_duration_since(asked), wanted.answered?.checked_duration_since(sent));
            Some(Stages {
                queue: queue.unwrap_or_default(),
                wire: wire.unwrap_or_default(),
                ..Stages::default()
            })
        };
        stages().unwrap_or_default()
    }

    /// Requests everything again that has no answer yet, over a new lane. Forgets unanswered
    /// read-ahead.
    pub(crate) fn ask_all_again(&mut self) {
        self.chunks_to_ask.clear();
        self.late_ahead.clear();
        self.forget_chunks(|_, wanted| wanted.is_ahead && wanted.frame.is_none());
        for (chunk, wanted) in &mut self.chunks {
            if wanted.frame.is_none() && wanted.again_at.is_none() {
                wanted.attempt += 1;
                self.chunks_to_ask.push((wanted.attempt, *chunk));
            }
        }
        self.chunks_to_ask.sort_unstable();
        let asked = self.segments.iter().filter(|(_, wanted)| wanted.again_at.is_none());
        self.segments_to_ask = asked.map(|(index, _)| *index).collect();
    }

    /// Returns the digest of an outstanding chunk, and its page that is installed first.
    pub(crate) fn chunk(&self, chunk: ChunkIndex) -> Option<(Digest, &Waiting)> {
        self.chunks.get(&chunk).map(|wanted| (wanted.digest, &wanted.first))
    }

    /// Returns true if a chunk is outstanding as read-ahead without a waiter.
    pub(crate) fn is_ahead(&self, chunk: ChunkIndex) -> bool {
        self.chunks.get(&chunk).is_some_and(|wanted| wanted.is_ahead)
    }

    /// Returns the time since the first request of a chunk. The chunk may have been given up and
    /// requested again since then.
    pub(crate) fn waited_for(&self, chunk: ChunkIndex, now: Instant) -> Duration {
        let asked = self.chunks.get(&chunk).map(|wanted| wanted.since);
        asked.map_or(Duration::ZERO, |asked| now.saturating_duration_since(asked))
    }

    /// Returns the start of the latest wait for a chunk or segment that is not given up for the
    /// moment.
    pub(crate) fn wait_since(&self) -> Option<Instant> {
        let chunks = self.chunks.values().filter(|wanted| !wanted.is_ahead);
        let chunks = chunks.map(|wanted| (wanted.since, wanted.again_at));
        let segments = self.segments.values().map(|wanted| (wanted.since, wanted.again_at));
        let all = chunks.chain(segments).filter(|(_, again_at)| again_at.is_none());
        all.map(|(since, _)| since).max()
    }

    /// Removes a chunk that has no waiter left.
    pub(crate) fn chunk_done(&mut self, chunk: ChunkIndex) {
        let done = self.chunks.remove(&chunk);
        self.ahead_under_way -= usize::from(done.as_ref().is_some_and(|wanted| wanted.is_counted));
        self.arrived -= usize::from(done.is_some_and(|wanted| wanted.frame.is_some()));
        self.underway.remove(chunk);
    }

    fn forget_chunks(&mut self, is_forgotten: impl Fn(ChunkIndex, &Chunk) -> bool) {
        self.chunks.retain(|chunk, wanted| {
            let is_forgotten = is_forgotten(*chunk, wanted);
            if is_forgotten {
                self.underway.remove(*chunk);
                self.arrived -= usize::from(wanted.frame.is_some());
                self.ahead_under_way -= usize::from(wanted.is_counted);
            }
            !is_forgotten
        });
        self.ahead_to_ask.retain(|chunk| self.chunks.contains_key(chunk));
    }

    /// Forgets chunks that the fill has installed since, as `has_come` says.
    pub(crate) fn forget_brought(&mut self, has_come: impl Fn(ChunkIndex) -> bool) {
        self.forget_chunks(|chunk, _| has_come(chunk));
        self.chunks_to_ask.retain(|(_, chunk)| self.chunks.contains_key(chunk));
    }

    /// Keeps a frame whose install was deferred: until `at` if memory is lacking, or with `None`
    /// until events let it through.
    pub(crate) fn defer(&mut self, chunk: ChunkIndex, frame: Bytes, at: Option<Instant>) {
        if let Some(wanted) = self.chunks.get_mut(&chunk)
            && wanted.frame.replace((frame, at)).is_none()
        {
            self.arrived += 1;
        }
    }

    /// Returns true if frames have arrived that only events block.
    pub(crate) fn has_ready(&self) -> bool {
        self.arrived > 0 && self.chunks.values().any(|wanted| matches!(wanted.frame, Some((_, None))))
    }

    /// Treats frames that wait for events as lacking memory: they are tried again at this time.
    pub(crate) fn suspect_memory(&mut self, at: Instant) {
        for frame in self.chunks.values_mut().filter_map(|wanted| wanted.frame.as_mut()) {
            frame.1.get_or_insert(at);
        }
    }

    /// Returns the time of the next install of a frame that lacked memory, or of the next request
    /// for a late chunk.
    pub(crate) fn next_attempt(&self) -> Option<Instant> {
        let frames = self.chunks.values().filter(|_| self.arrived > 0);
        let frames = frames.filter_map(|wanted| wanted.frame.as_ref()?.1);
        frames.chain(self.late_ahead.iter().map(|(at, _)| *at)).min()
    }

    /// Takes the frames whose install can be tried now.
    pub(crate) fn take_ready(&mut self, now: Instant) -> Vec<(ChunkIndex, Bytes)> {
        if self.arrived == 0 {
            return Vec::new();
        }
        let is_due = |frame: &mut (Bytes, Option<Instant>)| frame.1.is_none_or(|at| at <= now);
        let due = self
            .chunks
            .iter_mut()
            .filter_map(|(chunk, wanted)| Some((*chunk, wanted.frame.take_if(is_due)?.0)));
        let due: Vec<_> = due.collect();
        self.arrived -= due.len();
        due
    }

    /// Notes a wrong answer or an error for a chunk. Requests the chunk again, unless all attempts
    /// have failed.
    pub(crate) fn chunk_refused(&mut self, chunk: ChunkIndex) -> Refused {
        let Some(wanted) = self.chunks.get_mut(&chunk) else { return Refused::Unknown };
        if wanted.is_ahead {
            self.chunk_done(chunk);
            return Refused::Unknown;
        }
        wanted.refusals += 1;
        wanted.attempt += 1;
        if wanted.refusals >= MAX_ATTEMPTS {
            return Refused::Final;
        }
        self.chunks_to_ask.push((wanted.attempt, chunk));
        Refused::AskedAgain
    }

    /// Notes that the server is busy. The chunk is requested again after a back-off, within its
    /// deadline.
    pub(crate) fn chunk_busy(&mut self, chunk: ChunkIndex, reason: String, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.busy = Some(reason);
            wanted.again_at = Some(now + BUSY_RETRY);
        }
    }

    /// Notes that the server is busy, as [`Requests::chunk_busy`] does for a chunk.
    pub(crate) fn segment_busy(&mut self, index: u32, reason: String, now: Instant) {
        if let Some(wanted) = self.segments.get_mut(&index) {
            wanted.busy = Some(reason);
            wanted.again_at = Some(now + BUSY_RETRY);
        }
    }

    /// Notes a wrong answer or an error for a segment. Requests the segment again, unless all
    /// attempts have failed.
    pub(crate) fn segment_refused(&mut self, index: u32) -> Refused {
        let Some(wanted) = self.segments.get_mut(&index) else { return Refused::Unknown };
        wanted.refusals += 1;
        if wanted.refusals >= MAX_ATTEMPTS {
            return Refused::Final;
        }
        self.segments_to_ask.push(index);
        Refused::AskedAgain
    }

    /// Removes a segment that has arrived or is given up, and returns the pages that needed it.
    pub(crate) fn segment_done(&mut self, index: u32) -> Vec<Waiting> {
        self.segments.remove(&index).into_iter().flat_map(|wanted| wanted.pages.into_values()).collect()
    }

    /// Notes that a chunk is lost while its faults keep waiting. It is requested again later.
    pub(crate) fn chunk_later(&mut self, chunk: ChunkIndex, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.again_at = Some(now + LOST_RETRY);
            wanted.refusals = 0;
        }
    }

    /// Notes that a segment is lost, as [`Requests::chunk_later`] does for a chunk.
    pub(crate) fn segment_later(&mut self, index: u32, now: Instant) {
        if let Some(wanted) = self.segments.get_mut(&index) {
            wanted.again_at = Some(now + LOST_RETRY);
            wanted.refusals = 0;
        }
    }

    /// Sends the retries that are due. Forgets chunks and segments that are older than `patience`
    /// and have no waiter, as `has_waiters` and `waits` tell.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        patience: Duration,
        has_waiters: impl Fn(ChunkIndex) -> bool,
        waits: impl Fn(&Waiting) -> bool,
    ) {
        let is_old = |since: Instant| now.saturating_duration_since(since) >= patience;
        self.forget_chunks(|chunk, wanted| match wanted.is_ahead {
            true => is_old(wanted.since) || wanted.again_at.is_some_and(|at| at <= now),
            false => is_old(wanted.since) && !has_waiters(chunk),
        });
        self.chunks_to_ask.retain(|(_, chunk)| self.chunks.contains_key(chunk));
        for (chunk, wanted) in &mut self.chunks {
            if wanted.again_at.take_if(|at| *at <= now).is_some() {
                wanted.attempt += 1;
                self.chunks_to_ask.push((wanted.attempt, *chunk));
            }
        }
        self.segments.retain(|_, wanted| !is_old(wanted.since) || wanted.pages.values().any(&waits));
        self.segments_to_ask.retain(|index| self.segments.contains_key(index));
        for (index, wanted) in &mut self.segments {
            if wanted.again_at.take_if(|at| *at <= now).is_some() {
                self.segments_to_ask.push(*index);
            }
        }
    }

    /// Returns the known reason for a chunk's delay.
    pub(crate) fn chunk_reason(&self, chunk: ChunkIndex) -> Option<String> {
        let wanted = self.chunks.get(&chunk)?;
        let came = wanted.frame.is_some().then(|| "the chunk arrived, but could not be installed".to_owned());
        came.or_else(|| wanted.busy.clone())
    }

    /// Returns the segment that pages at these addresses of a space need, with the known reason for
    /// its delay.
    pub(crate) fn segment_of(&self, space: u32, addresses: &Range<usize>) -> Option<(u32, Option<String>)> {
        let pages = (space, addresses.start)..(space, addresses.end);
        let needs = |segment: &Segment| segment.pages.range(pages.clone()).next().is_some();
        let (index, segment) = self.segments.iter().find(|(_, segment)| needs(segment))?;
        Some((*index, segment.busy.clone()))
    }

    /// Returns the pages that need a segment.
    pub(crate) fn pages_of_segment(&self, index: u32) -> Vec<Waiting> {
        self.segments.get(&index).into_iter().flat_map(|wanted| wanted.pages.values().cloned()).collect()
    }

    /// Forgets a region. `rest` are the remaining spaces: another region of the same file may wait
    /// for the same chunk.
    pub(crate) fn forget(&mut self, region: &Region, rest: &Spaces) {
        let is_it = |other: &Region| Arc::ptr_eq(&other.object, &region.object);
        let chunk_pages = region.object.chunk_pages();
        for (chunk, wanted) in self.chunks.iter_mut().filter(|(_, wanted)| is_it(&wanted.first.0)) {
            let other = rest.of_chunk(*chunk, chunk_pages).find(|other| !is_it(other));
            if let Some(other) = other
                && let Some(pages) = other.pages_of_chunk(*chunk)
            {
                wanted.first = (other, pages.start);
            }
        }
        self.forget_chunks(|_, wanted| is_it(&wanted.first.0));
        for wanted in self.segments.values_mut() {
            wanted.pages.retain(|_, (other, _)| !is_it(other));
        }
        self.segments.retain(|_, wanted| !wanted.pages.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_region, any_space};
    use postcopy_proto::manifest::FileEntry;
    use postcopy_proto::page::PAGE_BYTES;

    const MILLI: Duration = Duration::from_millis(1);

    fn waiting() -> Waiting {
        let file = FileEntry { size_bytes: 32 << 12, first_chunk: ChunkIndex(0), executable: false };
        (any_region(&any_space(0), 0, file, 0..32, PAGE_BYTES), 0)
    }

    /// Requests read-ahead of chunks 5 to 8, of which two are sent. Returns the time of that, too.
    fn two_of_four_ahead() -> (Requests, Instant) {
        let (mut requests, now) = (Requests::new(Arc::default()), Instant::now());
        for chunk in 5..9 {
            requests.add_ahead(ChunkIndex(chunk), Digest::of(b"chunk"), waiting(), now);
        }
        let message = requests.message(now, 2);
        assert_eq!(message.runs, [v1::ChunkRun { first: 5, count: 2 }]);
        assert_eq!(message.class(), v1::RequestClass::Prefetch);
        (requests, now)
    }

    #[test]
    fn read_ahead_is_sent_as_far_as_there_is_room() {
        let (mut requests, now) = two_of_four_ahead();
        assert_eq!(requests.ahead_under_way(), Some(2));
        assert!(!requests.has_message(0) && requests.has_message(1));
        // One chunk is answered, another one gets a waiter, and the lane loses one.
        requests.answered(ChunkIndex(5), now);
        requests.chunk_done(ChunkIndex(5));
        assert_eq!(requests.ahead_under_way(), Some(1));
        assert!(requests.waits_for(ChunkIndex(6), &waiting(), now, MILLI));
        assert_eq!(requests.ahead_under_way(), Some(0));
        requests.message(now, 9);
        assert_eq!((requests.ahead_under_way(), requests.ahead_under_way), (None, 2));
        requests.ask_all_again();
        assert_eq!(requests.ahead_under_way, 0);
    }

    #[test]
    fn what_was_asked_for_ahead_and_is_late_is_asked_for_once_more_when_a_fault_waits_for_it() {
        let (mut requests, now) = two_of_four_ahead();
        assert!(requests.waits_for(ChunkIndex(6), &waiting(), now + MILLI, MILLI));
        assert!(requests.waits_for(ChunkIndex(5), &waiting(), now + MILLI, 30 * MILLI));
        assert_eq!(requests.next_attempt(), Some(now + 20 * MILLI));
        requests.ask_late(now + 19 * MILLI);
        assert!(!requests.has_message(0), "it may be near");
        requests.ask_late(now + 20 * MILLI);
        let message = requests.message(now + 20 * MILLI, 0);
        assert_eq!(message.runs, [v1::ChunkRun { first: 6, count: 1 }]);
        assert_eq!((message.class(), message.attempt), (v1::RequestClass::Demand, 0));
        // The answer to the other chunk arrives in time.
        requests.answered(ChunkIndex(5), now + 50 * MILLI);
        assert!(requests.waits_for(ChunkIndex(6), &waiting(), now + 70 * MILLI, MILLI));
        requests.ask_late(now + 70 * MILLI);
        assert!(!requests.has_message(0) && requests.next_attempt().is_none());
    }

    #[test]
    fn what_a_fault_waits_for_and_was_not_sent_is_not_read_ahead_any_more() {
        let (mut requests, now) = two_of_four_ahead();
        assert!(requests.waits_for(ChunkIndex(8), &waiting(), now, MILLI));
        let message = requests.message(now, 0);
        assert_eq!(message.runs, [v1::ChunkRun { first: 8, count: 1 }]);
        assert_eq!(message.class(), v1::RequestClass::Demand);
    }
}
