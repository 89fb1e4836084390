//! Which event has brought which pages.

use super::Place;
use postcopy::trace::{Came, Trace};
use std::collections::BTreeMap;
use std::ops::Range;

/// Runs of pages by their first places: where they end, and which event has brought them first.
#[derive(Debug, Default)]
pub(super) struct Arrivals(BTreeMap<Place, (u32, Came)>);

impl Arrivals {
    pub(super) fn of(trace: &Trace) -> Self {
        let mut arrivals = Self::default();
        for came in &trace.came {
            arrivals.add(came.page..came.page + came.pages, came);
        }
        arrivals
    }

    /// Notes an event for those of its pages that have not come before.
    fn add(&mut self, pages: Range<u32>, came: &Came) {
        let (place, mut next) = (|page| (came.space, came.file, page), pages.start);
        while next < pages.end {
            if let Some((end, _)) = self.run_at(place(next)) {
                next = end;
                continue;
            }
            let following = self.0.range(place(next)..place(pages.end)).next();
            let end = following.map_or(pages.end, |((.., first), _)| *first);
            self.0.insert(place(next), (end, *came));
            next = end;
        }
    }

    fn run_at(&self, (space, file, page): Place) -> Option<(u32, &Came)> {
        let (_, (end, came)) = self.0.range((space, file, 0)..=(space, file, page)).next_back()?;
        (page < *end).then_some((*end, came))
    }

    /// What has brought a page.
    pub(super) fn at(&self, place: Place) -> Option<&Came> {
        self.run_at(place).map(|(_, came)| came)
    }

    /// All runs: their first places, how many pages, and what has brought them.
    pub(super) fn runs(&self) -> impl Iterator<Item = (Place, u32, &Came)> {
        self.0.iter().map(|(place, (end, came))| (*place, end - place.2, came))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::trace::Cause;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn each_page_came_with_the_first_event_that_has_it(
            events in prop::collection::vec((0..2_u32, 0..2_u32, 0..60_u32, 1..20_u32), 0..40),
        ) {
            let (mut arrivals, mut model) = (Arrivals::default(), HashMap::new());
            for (at, (space, file, page, pages)) in (0..).zip(&events) {
                let (space, file, page, pages) = (*space, *file, *page, *pages);
                let cause = Cause::Demand;
                let came =
                    Came { at, space, file, page, pages, cause, queue: 0, wire: 0, decompress: 0, install: 0 };
                arrivals.add(page..page + pages, &came);
                for page in page..page + pages {
                    model.entry((space, file, page)).or_insert(at);
                }
            }
            let all = (0..2).flat_map(|space| (0..2).flat_map(move |file| (0..80).map(move |page| (space, file, page))));
            for place in all {
                prop_assert_eq!(arrivals.at(place).map(|came| came.at), model.get(&place).copied());
            }
            let pages: u32 = arrivals.runs().map(|(_, pages, _)| pages).sum();
            prop_assert_eq!(pages as usize, model.len());
        }
    }
}
