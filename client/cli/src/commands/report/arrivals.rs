//! The install event of each page, and the one that each fault waited for.

use super::Place;
use postcopy::trace::{Came, Trace};
use std::collections::BTreeMap;
use std::ops::Range;

/// Runs of installed pages by their first places: the end of each, and the number of the first
/// event that installed it.
#[derive(Debug, Default)]
pub(super) struct Arrivals(BTreeMap<Place, (u32, usize)>);

impl Arrivals {
    /// Returns a trace's arrivals and, for each fault in order, the event that the fault waited
    /// for.
    ///
    /// A process may map a page several times, one mapping after another, so the event is the first
    /// one after the fault. Without one after it, an installer was faster than the reading of the
    /// fault.
    pub(super) fn of(trace: &Trace) -> (Self, Vec<Option<usize>>) {
        let mut arrivals = Self::default();
        let mut events = in_time(&trace.came, |came| came.at);
        let mut waited_for = vec![None; trace.touches.len()];
        // This goes backwards in time, so `arrivals` holds the next event of each page.
        for touch in in_time(&trace.touches, |touch| touch.at).into_iter().rev() {
            let touched = &trace.touches[touch];
            while let Some(event) = events.pop_if(|event| trace.came[*event].at >= touched.at) {
                arrivals.add(&trace.came[event], event);
            }
            waited_for[touch] = arrivals.at((touched.space, touched.file, touched.page));
        }
        for event in events.into_iter().rev() {
            arrivals.add(&trace.came[event], event);
        }
        for (touched, waited_for) in trace.touches.iter().zip(&mut waited_for) {
            *waited_for = waited_for.or_else(|| arrivals.at((touched.space, touched.file, touched.page)));
        }
        (arrivals, waited_for)
    }

    /// Returns the arrivals of all processes together, as if they were the first one.
    pub(super) fn in_files(trace: &Trace) -> Self {
        let mut arrivals = Self::default();
        for event in in_time(&trace.came, |came| came.at).into_iter().rev() {
            arrivals.add(&Came { space: 0, ..trace.came[event] }, event);
        }
        arrivals
    }

    /// Adds an event, which must be earlier than all that were added before.
    fn add(&mut self, came: &Came, event: usize) {
        let place = |page| (came.space, came.file, page);
        let Range { start, end } = came.page..came.page + came.pages;
        let before = self.0.range_mut(place(0)..place(start)).next_back();
        if let Some((_, (until, of))) = before.filter(|(_, (until, _))| *until > start) {
            let rest = (*until, *of);
            *until = start;
            if rest.0 > end {
                self.0.insert(place(end), rest);
            }
        }
        let inside: Vec<_> = self.0.range(place(start)..place(end)).map(|(first, _)| *first).collect();
        for first in inside {
            if let Some(rest) = self.0.remove(&first).filter(|(until, _)| *until > end) {
                self.0.insert(place(end), rest);
            }
        }
        self.0.insert(place(start), (end, event));
    }

    /// Returns the event that installed a page first.
    pub(super) fn at(&self, (space, file, page): Place) -> Option<usize> {
        let (_, (end, event)) = self.0.range((space, file, 0)..=(space, file, page)).next_back()?;
        (page < *end).then_some(*event)
    }

    /// Returns all runs: first place, number of pages, number of the event.
    pub(super) fn runs(&self) -> impl Iterator<Item = (Place, u32, usize)> {
        self.0.iter().map(|(place, (end, event))| (*place, end - place.2, *event))
    }
}

/// Returns the numbers of events in the order of their times.
fn in_time<T>(events: &[T], at: impl Fn(&T) -> u64) -> Vec<usize> {
    let mut order: Vec<_> = (0..events.len()).collect();
    order.sort_by_key(|event| at(&events[*event]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::trace::{Cause, Header, Touch};
    use proptest::prelude::*;

    fn trace(came: Vec<Came>, touches: Vec<Touch>) -> Trace {
        let header = Header {
            trace: 1,
            image: String::new(),
            chunk_bytes: 65_536,
            files: Vec::new(),
            started_us: 0,
            working_set: false,
            fill: false,
            record: false,
        };
        Trace { header, touches, came, withheld: Vec::new(), end: None }
    }

    proptest! {
        #[test]
        fn a_page_comes_with_the_first_event_that_has_it_and_a_touch_waits_for_the_next_one(
            events in prop::collection::vec((0..50_u64, 0..2_u32, 0..2_u32, 0..60_u32, 1..20_u32), 0..40),
            touches in prop::collection::vec((0..50_u64, 0..2_u32, 0..2_u32, 0..80_u32), 0..40),
        ) {
            let came = |(at, space, file, page, pages)| {
                let cause = Cause::Demand;
                Came { at, space, file, page, pages, cause, queue: 0, wire: 0, decompress: 0, install: 0 }
            };
            let touch = |(at, space, file, page)| Touch { at, space, file, page };
            let trace = trace(events.into_iter().map(came).collect(), touches.into_iter().map(touch).collect());
            let (arrivals, waited_for) = Arrivals::of(&trace);
            let has = |event: &usize, (space, file, page): Place| {
                let came = &trace.came[*event];
                (came.space, came.file) == (space, file) && (came.page..came.page + came.pages).contains(&page)
            };
            let first = |place, from| {
                let events = (0..trace.came.len()).filter(|event| trace.came[*event].at >= from && has(event, place));
                events.min_by_key(|event| trace.came[*event].at)
            };
            let all = (0..2).flat_map(|space| (0..2).flat_map(move |file| (0..80).map(move |page| (space, file, page))));
            let mut pages = 0;
            for place in all {
                prop_assert_eq!(arrivals.at(place), first(place, 0));
                pages += u32::from(first(place, 0).is_some());
            }
            prop_assert_eq!(arrivals.runs().map(|(_, pages, _)| pages).sum::<u32>(), pages);
            for (touch, waited_for) in trace.touches.iter().zip(waited_for) {
                let place = (touch.space, touch.file, touch.page);
                prop_assert_eq!(waited_for, first(place, touch.at).or_else(|| first(place, 0)));
            }
            let in_files = Arrivals::in_files(&trace);
            for (file, page) in (0..2).flat_map(|file| (0..80).map(move |page| (file, page))) {
                let at = |event: Option<usize>| event.map(|event| trace.came[event].at);
                let of = |space| at(first((space, file, page), 0));
                prop_assert_eq!(at(in_files.at((0, file, page))), of(0).into_iter().chain(of(1)).min());
            }
        }
    }
}
