//! The pending requests of one demand stream: DEMAND before PREFETCH before BACKGROUND.

use crate::service::chunks::numbers;
use postcopy_proto::v1::{self, RequestClass};
use std::collections::VecDeque;
use std::iter::Peekable;

/// Most requests that a stream reads ahead of its answers, and the number of their runs, of 16 bytes
/// each, from which on it reads no further. HTTP/2's window then holds the client back until a
/// request is answered.
const MAX_REQUESTS: usize = 128;
const MAX_RUNS: usize = 1024;

/// Of this many chunks, one is from the oldest less urgent request. A thread may wait for a chunk
/// that was requested as PREFETCH, so DEMAND must not delay it for ever.
const TURNS: u32 = 16;

/// The urgency of a request, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    Demand,
    Prefetch,
    Background,
}

impl Urgency {
    fn of(request: &v1::FetchChunksRequest) -> Self {
        match request.class() {
            RequestClass::Demand => Self::Demand,
            RequestClass::Prefetch => Self::Prefetch,
            // A class unknown to this version is read as UNSPECIFIED.
            RequestClass::Background | RequestClass::Unspecified => Self::Background,
        }
    }
}

/// A requested chunk or segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Chunk(u64),
    Segment(u32),
}

/// The next chunk or segment to answer, with its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) urgency: Urgency,
    pub(super) id: u64,
    pub(super) attempt: u32,
    pub(super) wanted: Wanted,
}

struct Request {
    /// Number of the request within the stream, ascending.
    arrival: u64,
    id: u64,
    attempt: u32,
    runs: usize,
    wanted: Peekable<Box<dyn Iterator<Item = Wanted> + Send>>,
}

/// The choice of the next answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A loaded answer to a less urgent request.
    Held,
    /// The next chunk or segment of the oldest request of this urgency.
    Request(Urgency),
}

/// The pending requests and loaded answers of a demand stream.
#[derive(Default)]
pub(super) struct Queue {
    /// The requests by urgency. Each has something left to answer.
    requests: [VecDeque<Request>; 3],
    arrivals: u64,
    /// Loaded answers to less urgent requests.
    held: VecDeque<v1::FetchChunksResponse>,
    /// Number of answers given while a less urgent request waited, since its last turn.
    overtaken: u32,
}

impl Queue {
    /// Adds a request whose runs were checked.
    pub(super) fn push(&mut self, request: v1::FetchChunksRequest) {
        let urgency = Urgency::of(&request);
        let runs = request.runs.len();
        let segment = request.segment.into_iter().map(Wanted::Segment);
        let wanted = segment.chain(numbers(request.runs).map(Wanted::Chunk));
        let wanted: Box<dyn Iterator<Item = Wanted> + Send> = Box::new(wanted);
        let mut wanted = wanted.peekable();
        if wanted.peek().is_some() {
            self.arrivals += 1;
            let (arrival, id, attempt) = (self.arrivals, request.id, request.attempt);
            self.requests[urgency as usize].push_back(Request { arrival, id, attempt, runs, wanted });
        }
    }

    /// Keeps a loaded answer to a less urgent request for its turn.
    pub(super) fn hold(&mut self, answer: v1::FetchChunksResponse) {
        self.held.push_back(answer);
    }

    /// Returns the number of loaded answers that wait.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Returns true if no request and no answer waits.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.requests.iter().all(VecDeque::is_empty)
    }

    /// Returns true if the stream must not be read any further.
    pub(super) fn is_full(&self) -> bool {
        let requests = || self.requests.iter().flatten();
        requests().count() >= MAX_REQUESTS
            || requests().map(|request| request.runs).sum::<usize>() >= MAX_RUNS
    }

    /// Returns true if a DEMAND request waits.
    pub(super) fn has_demand(&self) -> bool {
        !self.requests[Urgency::Demand as usize].is_empty()
    }

    fn is_overdue(&self) -> bool {
        self.overtaken + 1 >= TURNS
    }

    /// Returns the choice of the next answer. Without `may_begin`, excludes less urgent requests,
    /// which may need the disk.
    pub(super) fn next(&self, may_begin: bool) -> Option<Choice> {
        let ahead = [Urgency::Prefetch, Urgency::Background];
        let ahead =
            || ahead.into_iter().filter(|urgency| may_begin && !self.requests[*urgency as usize].is_empty());
        let arrival =
            |urgency: &Urgency| self.requests[*urgency as usize].front().map(|request| request.arrival);
        let held = (!self.held.is_empty()).then_some(Choice::Held);
        let demand = self.has_demand().then_some(Choice::Request(Urgency::Demand));
        let oldest = || ahead().min_by_key(arrival).map(Choice::Request);
        let overdue = if self.is_overdue() { held.or_else(oldest) } else { None };
        overdue.or(demand).or(held).or_else(|| ahead().next().map(Choice::Request))
    }

    /// Takes a loaded answer.
    pub(super) fn take_held(&mut self) -> Option<v1::FetchChunksResponse> {
        self.overtaken = 0;
        self.held.pop_front()
    }

    /// Takes the next chunk or segment of the oldest request of this urgency.
    pub(super) fn take(&mut self, urgency: Urgency) -> Option<Turn> {
        let less_urgent = &self.requests[urgency as usize + 1..];
        let overtakes = less_urgent.iter().any(|requests| !requests.is_empty()) || !self.held.is_empty();
        self.overtaken = if overtakes && !self.is_overdue() { self.overtaken + 1 } else { 0 };
        let requests = &mut self.requests[urgency as usize];
        let request = requests.front_mut()?;
        let (id, attempt, wanted) = (request.id, request.attempt, request.wanted.next()?);
        if request.wanted.peek().is_none() {
            requests.pop_front();
        }
        Some(Turn { urgency, id, attempt, wanted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: u64, class: RequestClass, runs: &[(u64, u32)]) -> v1::FetchChunksRequest {
        let runs = runs.iter().map(|&(first, count)| v1::ChunkRun { first, count }).collect();
        v1::FetchChunksRequest { id, class: class.into(), runs, ..Default::default() }
    }

    fn take(queue: &mut Queue) -> Option<(u64, Wanted)> {
        match queue.next(true)? {
            Choice::Request(urgency) => queue.take(urgency).map(|turn| (turn.id, turn.wanted)),
            Choice::Held => panic!("nothing is held"),
        }
    }

    #[test]
    fn urgent_requests_overtake_and_equal_ones_keep_their_order() {
        let mut queue = Queue::default();
        queue.push(request(1, RequestClass::Unspecified, &[(1, 1)]));
        queue.push(request(2, RequestClass::Prefetch, &[(2, 2)]));
        assert_eq!(take(&mut queue), Some((2, Wanted::Chunk(2))));
        let mut with_segment = request(3, RequestClass::Demand, &[(7, 1), (5, 1)]);
        with_segment.segment = Some(9);
        queue.push(with_segment);
        queue.push(request(4, RequestClass::Demand, &[(u64::MAX, 1)]));
        queue.push(request(5, RequestClass::Background, &[(6, 1)]));
        queue.push(request(6, RequestClass::Demand, &[]));
        let rest: Vec<_> = std::iter::from_fn(|| take(&mut queue)).collect();
        let chunk = |id, chunk| (id, Wanted::Chunk(chunk));
        let expected = [
            (3, Wanted::Segment(9)),
            chunk(3, 7),
            chunk(3, 5),
            chunk(4, u64::MAX),
            chunk(2, 3),
            chunk(1, 1),
            chunk(5, 6),
        ];
        assert_eq!(rest, expected);
        assert!(queue.is_empty());
    }

    #[test]
    fn less_urgent_requests_are_not_starved() {
        let mut queue = Queue::default();
        queue.push(request(1, RequestClass::Background, &[(0, 1000)]));
        queue.push(request(2, RequestClass::Prefetch, &[(0, 1000)]));
        queue.push(request(3, RequestClass::Demand, &[(0, 1000)]));
        let given: Vec<_> = (0..160).filter_map(|_| take(&mut queue)).map(|(id, _)| id).collect();
        let of = |id| given.iter().filter(|given| **given == id).count();
        assert_eq!((of(3), of(2), of(1)), (150, 0, 10), "the oldest of the less urgent ones");
    }

    #[test]
    fn a_held_answer_is_less_urgent_and_is_not_starved() {
        let mut queue = Queue::default();
        queue.push(request(1, RequestClass::Prefetch, &[(0, 1)]));
        queue.push(request(2, RequestClass::Demand, &[(0, 100)]));
        queue.hold(v1::FetchChunksResponse::default());
        for _ in 0..15 {
            assert_eq!(take(&mut queue).map(|(id, _)| id), Some(2));
        }
        assert_eq!(queue.next(false), Some(Choice::Held));
        assert!(queue.take_held().is_some());
        assert_eq!(queue.next(false), Some(Choice::Request(Urgency::Demand)));
    }

    #[test]
    fn a_full_queue_has_room_when_a_request_is_answered() {
        let mut queue = Queue::default();
        for id in 0..128 {
            assert!(!queue.is_full());
            queue.push(request(id, RequestClass::Prefetch, &[(0, 2)]));
        }
        assert!(queue.is_full());
        take(&mut queue);
        assert!(queue.is_full());
        take(&mut queue);
        assert!(!queue.is_full());
        queue.push(request(0, RequestClass::Demand, &[(0, 1); 1024]));
        assert!(queue.is_full(), "by its runs");
    }
}
