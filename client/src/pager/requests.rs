//! What a session's pager has asked for on the demand lane, and until when: chunks and segments that faults wait
//! for, and those of them that the next message asks for. Knows nothing of the lane, of memory, or of the time
//! but what it is told.

use crate::bits::Underway;
use crate::memory::{Region, Spaces};
use crate::record::trace::Stages;
use crate::remote::MAX_ATTEMPTS;
use crate::remote::lane::runs_of;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::page::{ChunkIndex, to_usize};
use postcopy_proto::{MAX_DEMAND_CHUNKS, v1};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How soon something lost is asked for again, where faults go on waiting for it.
const LOST_RETRY: Duration = Duration::from_secs(1);

/// How soon something is asked for again that the server could not give at the moment.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// A chunk that was asked for ahead and that somebody waits for is asked for as DEMAND, too, when it has been under way
/// for so long, or for so many times what an answer takes. Sooner, both answers would come.
const LATE_AHEAD: Duration = Duration::from_millis(20);
const LATE_ANSWERS: u32 = 2;

/// A page that somebody waits for.
pub(crate) type Waiting = (Region, usize);

/// A chunk that was asked for and has not been installed.
#[derive(Debug)]
struct Chunk {
    digest: Digest,
    /// A page of it that somebody waits for; installed first.
    first: Waiting,
    /// Nobody waits for it yet. If it cannot be had it is forgotten.
    is_ahead: bool,
    /// It is one of those that are under way ahead.
    is_counted: bool,
    attempt: u32,
    /// Answers that were wrong or errors.
    refusals: u32,
    deadline: Instant,
    /// When it was asked for last, and answered.
    sent: Option<Instant>,
    answered: Option<Instant>,
    /// The frame has arrived, and the install was deferred; until then, or None: until events let it through.
    frame: Option<(Bytes, Option<Instant>)>,
    /// Given up, or not to be had at the moment: ask again at this time.
    again_at: Option<Instant>,
    /// Why it was not to be had at the moment.
    busy: Option<String>,
}

/// A segment that was asked for, and the pages that need it.
#[derive(Debug)]
struct Segment {
    /// Each page once: by its space and address.
    pages: BTreeMap<(u32, usize), Waiting>,
    refusals: u32,
    deadline: Instant,
    again_at: Option<Instant>,
    busy: Option<String>,
}

/// What becomes of something whose answer was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is asked for again.
    AskedAgain,
    /// That was the last attempt.
    Final,
    /// Nobody waits for it.
    Unknown,
}

/// What nobody has answered in time.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// With the reason, where the server has said one.
    pub(crate) chunks: Vec<(ChunkIndex, Option<String>)>,
    pub(crate) segments: Vec<(u32, Option<String>)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Requests {
    /// How long an answer may take.
    patience: Duration,
    chunks: HashMap<ChunkIndex, Chunk>,
    segments: BTreeMap<u32, Segment>,
    /// To be asked for with the next message, by attempt.
    chunks_to_ask: Vec<(u32, ChunkIndex)>,
    /// To be asked for when there is nothing else.
    ahead_to_ask: Vec<ChunkIndex>,
    /// How many were asked for ahead, and have no answer and no waiter.
    ahead_under_way: usize,
    /// Asked for ahead and waited for: when to ask for them as DEMAND.
    late_ahead: Vec<(Instant, ChunkIndex)>,
    /// The chunks of all this, for the fill.
    underway: Arc<Underway>,
    segments_to_ask: Vec<u32>,
    last_id: u64,
    /// How many frames have arrived that are not installed.
    arrived: usize,
}

impl Requests {
    /// An answer may take so long; what is asked for is in `underway`, too.
    pub(crate) fn new(patience: Duration, underway: Arc<Underway>) -> Self {
        Self {
            patience,
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

    /// Whether nobody waits for anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.segments.is_empty()
    }

    /// Whether the chunk has been asked for and is not done.
    pub(crate) fn has_chunk(&self, chunk: ChunkIndex) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// Somebody waits for a chunk from now on, if it has been asked for and is not done: whether it has. An answer takes
    /// `usual` of late.
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
            wanted.deadline = now + self.patience;
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

    /// Asks for chunks as DEMAND that were asked for ahead, are waited for, and are late.
    pub(crate) fn ask_late(&mut self, now: Instant) {
        let chunks = &self.chunks;
        let late = self.late_ahead.extract_if(.., |(at, _)| *at <= now).map(|(_, chunk)| chunk);
        let unanswered = late.filter_map(|chunk| Some((chunks.get(&chunk)?, chunk)));
        let unanswered =
            unanswered.filter(|(wanted, _)| wanted.answered.is_none() && wanted.again_at.is_none());
        self.chunks_to_ask.extend(unanswered.map(|(wanted, chunk)| (wanted.attempt, chunk)));
    }

    /// How many chunks are under way that were asked for ahead; None where no other is to be asked for.
    pub(crate) fn ahead_under_way(&self) -> Option<usize> {
        (!self.ahead_to_ask.is_empty()).then_some(self.ahead_under_way)
    }

    /// Asks for a chunk that has not been asked for.
    pub(crate) fn add_chunk(&mut self, chunk: ChunkIndex, digest: Digest, first: Waiting, now: Instant) {
        self.add(chunk, digest, first, false, now);
        self.chunks_to_ask.push((0, chunk));
    }

    /// The same for one that nobody waits for; `page` is one of those that it is for.
    pub(crate) fn add_ahead(&mut self, chunk: ChunkIndex, digest: Digest, page: Waiting, now: Instant) {
        self.add(chunk, digest, page, true, now);
        self.ahead_to_ask.push(chunk);
    }

    fn add(&mut self, chunk: ChunkIndex, digest: Digest, first: Waiting, is_ahead: bool, now: Instant) {
        let deadline = now + self.patience;
        let wanted = Chunk {
            digest,
            first,
            is_ahead,
            is_counted: false,
            attempt: 0,
            refusals: 0,
            deadline,
            sent: None,
            answered: None,
            frame: None,
            again_at: None,
            busy: None,
        };
        self.underway.add(chunk);
        self.chunks.insert(chunk, wanted);
    }

    /// Asks for the segment that a page needs, unless that has been done.
    pub(crate) fn add_segment(&mut self, index: u32, page: Waiting, now: Instant) {
        let deadline = now + self.patience;
        let wanted = self.segments.entry(index).or_insert_with(|| {
            self.segments_to_ask.push(index);
            Segment { pages: BTreeMap::new(), refusals: 0, deadline, again_at: None, busy: None }
        });
        wanted.pages.insert((page.0.space.id, page.0.address(page.1)), page);
    }

    /// Whether there is something to be asked for, and at most so many chunks ahead.
    pub(crate) fn has_message(&self, ahead: usize) -> bool {
        !self.chunks_to_ask.is_empty()
            || !self.segments_to_ask.is_empty()
            || (ahead > 0 && !self.ahead_to_ask.is_empty())
    }

    /// The next message: what is to be asked for, as far as one message may, and at most so many chunks ahead.
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

    /// A chunk has an answer.
    pub(crate) fn answered(&mut self, chunk: ChunkIndex, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.answered = Some(now);
            self.ahead_under_way -= usize::from(std::mem::take(&mut wanted.is_counted));
        }
    }

    /// How long a chunk that has an answer waited to be asked for, and was under way then.
    pub(crate) fn stages(&self, chunk: ChunkIndex) -> Stages {
        let stages = || {
            let wanted = self.chunks.get(&chunk)?;
            let (sent, asked) = (wanted.sent?, wanted.deadline.checked_sub(self.patience)?);
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

    /// Asks again for everything that has no answer yet: the lane is a new one.
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

    /// What the manifest says of a chunk that was asked for, and the page of it that is installed first.
    pub(crate) fn chunk(&self, chunk: ChunkIndex) -> Option<(Digest, &Waiting)> {
        self.chunks.get(&chunk).map(|wanted| (wanted.digest, &wanted.first))
    }

    /// Whether a chunk was asked for that nobody waits for yet.
    pub(crate) fn is_ahead(&self, chunk: ChunkIndex) -> bool {
        self.chunks.get(&chunk).is_some_and(|wanted| wanted.is_ahead)
    }

    /// How long ago a chunk was asked for first; since then it may have been given up and asked for anew.
    pub(crate) fn waited_for(&self, chunk: ChunkIndex, now: Instant) -> Duration {
        let asked = self.chunks.get(&chunk).and_then(|wanted| wanted.deadline.checked_sub(self.patience));
        asked.map_or(Duration::ZERO, |asked| now.saturating_duration_since(asked))
    }

    /// Since when somebody waits for a page that is not given up for the moment: the one who came last.
    pub(crate) fn wait_since(&self) -> Option<Instant> {
        let chunks = self.chunks.values().filter(|wanted| !wanted.is_ahead);
        let chunks = chunks.map(|wanted| (wanted.deadline, wanted.again_at));
        let segments = self.segments.values().map(|wanted| (wanted.deadline, wanted.again_at));
        let deadlines = chunks.chain(segments).filter(|(_, again_at)| again_at.is_none());
        deadlines.filter_map(|(deadline, _)| deadline.checked_sub(self.patience)).max()
    }

    /// Nobody waits for the chunk any more.
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

    /// Forgets chunks that `has_come` says the fill has brought since.
    pub(crate) fn forget_brought(&mut self, has_come: impl Fn(ChunkIndex) -> bool) {
        self.forget_chunks(|chunk, _| has_come(chunk));
        self.chunks_to_ask.retain(|(_, chunk)| self.chunks.contains_key(chunk));
    }

    /// Keeps a frame that has arrived and could not be installed: until `at` without memory, or None where an event is
    /// in the way.
    pub(crate) fn defer(&mut self, chunk: ChunkIndex, frame: Bytes, at: Option<Instant>) {
        if let Some(wanted) = self.chunks.get_mut(&chunk)
            && wanted.frame.replace((frame, at)).is_none()
        {
            self.arrived += 1;
        }
    }

    /// Whether frames have arrived that wait for nothing but events.
    pub(crate) fn has_ready(&self) -> bool {
        self.arrived > 0 && self.chunks.values().any(|wanted| matches!(wanted.frame, Some((_, None))))
    }

    /// Takes it that there is no memory for the frames that wait for events: they are tried again at this time.
    pub(crate) fn suspect_memory(&mut self, at: Instant) {
        for frame in self.chunks.values_mut().filter_map(|wanted| wanted.frame.as_mut()) {
            frame.1.get_or_insert(at);
        }
    }

    /// When to try again to install a frame that there was no memory for, or to ask for what is late.
    pub(crate) fn next_attempt(&self) -> Option<Instant> {
        let frames = self.chunks.values().filter(|_| self.arrived > 0);
        let frames = frames.filter_map(|wanted| wanted.frame.as_ref()?.1);
        frames.chain(self.late_ahead.iter().map(|(at, _)| *at)).min()
    }

    /// Takes the frames that can be tried now.
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

    /// The answer for a chunk was wrong, or an error.
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

    /// The server could not give a chunk at the moment: asks again in a while, within its deadline.
    pub(crate) fn chunk_busy(&mut self, chunk: ChunkIndex, reason: String, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.busy = Some(reason);
            wanted.again_at = Some(now + BUSY_RETRY);
        }
    }

    /// As [`Requests::chunk_busy`].
    pub(crate) fn segment_busy(&mut self, index: u32, reason: String, now: Instant) {
        if let Some(wanted) = self.segments.get_mut(&index) {
            wanted.busy = Some(reason);
            wanted.again_at = Some(now + BUSY_RETRY);
        }
    }

    /// The answer for a segment was wrong, or an error.
    pub(crate) fn segment_refused(&mut self, index: u32) -> Refused {
        let Some(wanted) = self.segments.get_mut(&index) else { return Refused::Unknown };
        wanted.refusals += 1;
        if wanted.refusals >= MAX_ATTEMPTS {
            return Refused::Final;
        }
        self.segments_to_ask.push(index);
        Refused::AskedAgain
    }

    /// The segment came, or is given up: the pages that needed it.
    pub(crate) fn segment_done(&mut self, index: u32) -> Vec<Waiting> {
        self.segments.remove(&index).into_iter().flat_map(|wanted| wanted.pages.into_values()).collect()
    }

    /// The chunk is lost, but its faults go on waiting: it is asked for again in a while.
    pub(crate) fn chunk_later(&mut self, chunk: ChunkIndex, now: Instant) {
        if let Some(wanted) = self.chunks.get_mut(&chunk) {
            wanted.again_at = Some(now + LOST_RETRY);
            wanted.deadline = now + LOST_RETRY + self.patience;
            wanted.refusals = 0;
        }
    }

    /// As [`Requests::chunk_later`].
    pub(crate) fn segment_later(&mut self, index: u32, now: Instant) {
        if let Some(wanted) = self.segments.get_mut(&index) {
            wanted.again_at = Some(now + LOST_RETRY);
            wanted.deadline = now + LOST_RETRY + self.patience;
            wanted.refusals = 0;
        }
    }

    /// Extends all deadlines.
    pub(crate) fn extend_deadlines(&mut self, by: Duration) {
        self.chunks.values_mut().for_each(|wanted| wanted.deadline += by);
        self.segments.values_mut().for_each(|wanted| wanted.deadline += by);
    }

    /// What is late; asks again for what was to be asked for again by now.
    pub(crate) fn late(&mut self, now: Instant) -> Late {
        let mut late = Late::default();
        self.forget_chunks(|_, wanted| {
            wanted.is_ahead && (wanted.deadline <= now || wanted.again_at.is_some_and(|at| at <= now))
        });
        for (chunk, wanted) in &mut self.chunks {
            if wanted.deadline <= now {
                let put_off =
                    wanted.frame.is_some().then(|| "it came, and could not be installed".to_owned());
                late.chunks.push((*chunk, put_off.or(wanted.busy.take())));
            } else if wanted.again_at.take_if(|at| *at <= now).is_some() {
                wanted.attempt += 1;
                self.chunks_to_ask.push((wanted.attempt, *chunk));
            }
        }
        for (index, wanted) in &mut self.segments {
            if wanted.deadline <= now {
                late.segments.push((*index, wanted.busy.take()));
            } else if wanted.again_at.take_if(|at| *at <= now).is_some() {
                self.segments_to_ask.push(*index);
            }
        }
        late
    }

    /// Forgets a region, of which `rest` are left: another one of the same file may wait for the same chunk.
    pub(crate) fn forget(&mut self, region: &Region, rest: &Spaces) {
        let is_it = |other: &Region| Arc::ptr_eq(&other.object, &region.object);
        let chunk_pages = region.object.chunk_pages();
        for (chunk, wanted) in self.chunks.iter_mut().filter(|(_, wanted)| is_it(&wanted.first.0)) {
            let other = rest.of_chunk(*chunk, chunk_pages).find(|other| !is_it(other));
            if let Some(other) = other
                && let Some(pages) = other.pages_of(*chunk)
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

    /// Read-ahead of chunks 5 to 8 of which two were sent, and when.
    fn two_of_four_ahead() -> (Requests, Instant) {
        let (mut requests, now) = (Requests::new(Duration::from_secs(60), Arc::default()), Instant::now());
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
        // One is answered, another one waited for, and one is lost.
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
        // The other one comes in time.
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
