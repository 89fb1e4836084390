//! Faults do not name their threads, so their addresses tell streams apart: a fault on the chunk
//! after a stream's last one continues the stream. The window doubles each time that a stream has
//! used up half of it. A fault elsewhere starts another stream, without a window. Accesses to
//! prefetched pages cause no faults: the next fault of the stream lies behind them.

use std::ops::Range;

/// The most streams. A new one replaces the stream that has been idle longest.
pub(crate) const STREAMS: usize = 16;
/// The largest window, in plain bytes.
const MOST_BYTES: usize = 2 << 20;

#[derive(Debug)]
struct Stream {
    /// The chunk after the stream's last fault.
    next: u64,
    /// The chunk after the last that was requested.
    asked: u64,
    /// Number of chunks to request ahead.
    window: u64,
}

/// The streams of a session's faults, as the module describes them.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// The streams, the one with the latest fault last.
    streams: Vec<Stream>,
    most: u64,
}

impl ReadAhead {
    pub(crate) fn new(chunk_bytes: usize) -> Self {
        Self { streams: Vec::with_capacity(STREAMS), most: (MOST_BYTES / chunk_bytes).max(1) as u64 }
    }

    /// Notes a fault on a chunk. Returns the chunks to request ahead, or `None` if the fault
    /// continues no stream.
    pub(crate) fn touched(&mut self, chunk: u64) -> Option<Range<u64>> {
        // A fault on another page of the last chunk does not move the stream.
        let place = self.streams.iter().rposition(|s| (s.next - 1..=s.asked).contains(&chunk));
        let Some(place) = place else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream { next: chunk + 1, asked: chunk + 1, window: 0 });
            return None;
        };
        let mut stream = self.streams.remove(place);
        let mut ahead = 0..0;
        if chunk >= stream.next {
            stream.next = chunk + 1;
            if stream.asked.saturating_sub(stream.next) <= stream.window / 2 {
                stream.window = (stream.window * 2).clamp(1, self.most);
                let from = stream.asked.max(stream.next);
                stream.asked = from + stream.window;
                ahead = from..stream.asked;
            }
        }
        self.streams.push(stream);
        Some(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_scan_is_read_ahead_by_more_and_more_and_each_chunk_once() {
        let mut ahead = ReadAhead::new(64 << 10);
        let (mut asked, mut sizes) = (Vec::new(), Vec::new());
        for chunk in 100..1000 {
            let range = ahead.touched(chunk).unwrap_or_default();
            // A chunk that was not read ahead is requested for its fault.
            if !asked.contains(&chunk) {
                asked.push(chunk);
            }
            if !range.is_empty() {
                sizes.push(range.end - range.start);
            }
            asked.extend(range);
        }
        assert_eq!(sizes[..6], [1, 2, 4, 8, 16, 32]);
        assert!(sizes[6..].iter().all(|size| *size == 32), "at most 2 MiB");
        assert!(asked.is_sorted() && asked.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    }

    #[test]
    fn what_came_ahead_is_not_seen_and_the_scan_goes_on_behind_it() {
        let mut ahead = ReadAhead::new(64 << 10);
        assert_eq!(ahead.touched(5), None);
        let mut touch = 6;
        for size in [1, 2, 4, 8] {
            let range = ahead.touched(touch).unwrap();
            assert_eq!(range, touch + 1..touch + 1 + size);
            touch = range.end;
        }
        // The scan continues elsewhere.
        assert_eq!(ahead.touched(900), None);
        assert_eq!(ahead.touched(901), Some(902..903));
    }

    #[test]
    fn several_scans_at_once_are_told_apart() {
        let mut ahead = ReadAhead::new(64 << 10);
        for step in 0..10 {
            for scan in 0..STREAMS as u64 {
                let range = ahead.touched(scan * 1000 + step).unwrap_or_default();
                assert_eq!(range.is_empty(), ![1, 2, 3, 6].contains(&step));
            }
        }
    }

    proptest! {
        #[test]
        fn scattered_touches_bring_nothing_and_any_bring_only_what_lies_ahead(
            chunks in proptest::collection::vec(0u64..50, 0..300),
        ) {
            let (mut ahead, mut scattered) = (ReadAhead::new(64 << 10), ReadAhead::new(64 << 10));
            for chunk in chunks {
                prop_assert!(scattered.touched(chunk * 2).unwrap_or_default().is_empty(), "every second chunk at most");
                let range = ahead.touched(chunk).unwrap_or_default();
                prop_assert!(range.is_empty() || range.start > chunk && range.end - range.start <= 32);
            }
        }
    }
}
