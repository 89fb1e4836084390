//! Selects the pages of a working set from recordings. The code is pure.
//!
//! A page is chosen if it faulted in at least a given share of the recordings that could show a
//! fault on it. A recording cannot show faults on pages that an earlier working set or a background
//! fill had installed, so it does not count for these. The order is that of the mean first-touch
//! position. A page that faulted beside prefetched pages is placed after as many.

use postcopy_proto::v1::PageSpan;
use std::collections::HashMap;

/// A page: the place of its file in the image, and its number in the file.
pub(crate) type Page = (u32, u32);

/// The page faults of one restore.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recording {
    /// The pages that faulted, in first-touch order.
    pub(crate) touched: Vec<PageSpan>,
    /// The pages that were installed without a fault.
    pub(crate) unseen: Vec<PageSpan>,
}

pub(crate) fn pages(spans: &[PageSpan]) -> impl Iterator<Item = Page> {
    // A span's end was checked to fit.
    spans.iter().flat_map(|span| (span.first..span.first + span.count).map(|page| (span.file, page)))
}

/// Returns the number of pages of the spans.
pub(crate) fn count(spans: &[PageSpan]) -> u64 {
    spans.iter().map(|span| u64::from(span.count)).sum()
}

/// Pages of 2 MiB.
const HUGE_PAGES: u32 = 512;
/// Most runs of unseen pages of one recording.
const MOST_UNSEEN: usize = 1 << 20;

/// Returns a recording of the first `most` faulting pages; later ones become unseen.
///
/// Unseen pages become ascending runs that are apart. If these are too many, they become one run
/// for each file, from its first unseen page to its last.
pub(crate) fn bounded(touched: Vec<PageSpan>, mut unseen: Vec<PageSpan>, most: usize) -> Recording {
    let mut left = u32::try_from(most).expect("a small number");
    let mut first = Vec::new();
    for span in touched {
        let count = span.count.min(left);
        left -= count;
        if count > 0 {
            first.push(PageSpan { count, ..span });
        }
        if count < span.count {
            unseen.push(PageSpan { first: span.first + count, count: span.count - count, ..span });
        }
    }
    unseen.sort_unstable_by_key(|span| (span.file, span.first));
    unseen.dedup_by(|next, last| {
        // A span's end was checked to fit.
        let end = last.first + last.count;
        let is_one = next.file == last.file && next.first <= end;
        if is_one {
            last.count = end.max(next.first + next.count) - last.first;
        }
        is_one
    });
    if unseen.len() > MOST_UNSEEN {
        unseen.dedup_by(|next, last| {
            let is_one = next.file == last.file;
            if is_one {
                last.count = next.first + next.count - last.first;
            }
            is_one
        });
    }
    Recording { touched: first, unseen }
}

/// A page that faulted in a recording.
struct Seen {
    page: Page,
    /// Number of recordings in which it faulted.
    times: usize,
    /// Sum of its positions in their orders.
    places: u64,
}

/// Returns the pages of the working set, in the order of sending. `share` is from 0 to 1.
pub(crate) fn choose(recordings: &[Recording], share: f64) -> Vec<Page> {
    let seen = seen(recordings);
    let blind = blind(recordings, &seen);
    let is_chosen = |seen: &Seen, blind: usize| {
        #[expect(clippy::cast_precision_loss, reason = "a few recordings")]
        let (times, could) = (seen.times as f64, recordings.len().saturating_sub(blind) as f64);
        times >= share * could
    };
    let chosen = seen.into_iter().zip(blind).filter(|(seen, blind)| is_chosen(seen, *blind));
    let mut chosen: Vec<Seen> = chosen.map(|(seen, _)| seen).collect();
    // Means are compared exactly, as fractions; equal ones by address.
    let scaled = |a: &Seen, b: &Seen| u128::from(a.places) * b.times as u128;
    chosen.sort_unstable_by(|a, b| scaled(a, b).cmp(&scaled(b, a)).then(a.page.cmp(&b.page)));
    together(chosen.into_iter().map(|seen| seen.page).collect())
}

/// Moves the pages of each complete 2 MiB page together, to the place of the first of them: memory
/// of huge pages gets all of it or nothing.
fn together(pages: Vec<Page>) -> Vec<Page> {
    let huge = |(file, page): Page| (file, page / HUGE_PAGES);
    let mut counts: HashMap<Page, u32> = HashMap::new();
    for page in &pages {
        *counts.entry(huge(*page)).or_default() += 1;
    }
    counts.retain(|_, count| *count == HUGE_PAGES);
    let mut ordered = Vec::with_capacity(pages.len());
    for page in pages {
        let (file, number) = huge(page);
        match counts.get_mut(&(file, number)) {
            None => ordered.push(page),
            Some(0) => {}
            Some(count) => {
                let first = number * HUGE_PAGES;
                ordered.extend((first..first + *count).map(|page| (file, page)));
                *count = 0;
            }
        }
    }
    ordered
}

/// Returns the pages that faulted in the recordings, by page.
fn seen(recordings: &[Recording]) -> Vec<Seen> {
    let mut touches: Vec<(Page, usize, u64)> = Vec::new();
    for (number, recording) in recordings.iter().enumerate() {
        let places = count(&recording.unseen)..;
        touches.extend(pages(&recording.touched).zip(places).map(|(page, place)| (page, number, place)));
    }
    touches.sort_unstable();
    // The first touch of each recording counts.
    touches.dedup_by_key(|(page, number, _)| (*page, *number));
    let of_pages = touches.chunk_by(|(a, ..), (b, ..)| a == b);
    let places = |touches: &[(Page, usize, u64)]| touches.iter().map(|(.., place)| place).sum();
    let seen = |touches: &[(Page, usize, u64)]| Seen {
        page: touches[0].0,
        times: touches.len(),
        places: places(touches),
    };
    of_pages.map(seen).collect()
}

/// Returns for each of these ascending pages the number of recordings that could not show a fault
/// on it.
fn blind(recordings: &[Recording], seen: &[Seen]) -> Vec<usize> {
    // The numbers of runs that begin and end before each page. A page lies in as many runs as have
    // begun and not ended.
    let (mut begun, mut ended) = (vec![0; seen.len() + 1], vec![0; seen.len() + 1]);
    for run in recordings.iter().flat_map(|recording| &recording.unseen) {
        let place = |page| seen.partition_point(|seen| seen.page < (run.file, page));
        begun[place(run.first)] += 1;
        ended[place(run.first + run.count)] += 1;
    }
    let mut now = 0;
    let changed = |(begun, ended): (usize, usize)| {
        now = now + begun - ended;
        now
    };
    begun.into_iter().zip(ended).take(seen.len()).map(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection;
    use proptest::prelude::*;

    fn spans(pages: &[u32]) -> Vec<PageSpan> {
        pages.iter().map(|&first| PageSpan { file: 0, first, count: 1 }).collect()
    }

    fn recording(touched: &[u32], unseen: &[u32]) -> Recording {
        bounded(spans(touched), spans(unseen), 100)
    }

    fn chosen(recordings: &[Recording]) -> Vec<u32> {
        choose(recordings, 0.5).into_iter().map(|(_, page)| page).collect()
    }

    #[test]
    fn what_is_touched_beyond_a_bound_is_not_taken_for_untouched() {
        let span = |first, count| PageSpan { file: 0, first, count };
        let long = bounded(
            vec![span(5, 2), span(20, 4), span(1, 1)],
            vec![span(30, 1), span(29, 1), span(29, 2)],
            3,
        );
        assert_eq!(long.touched, [span(5, 2), span(20, 1)]);
        assert_eq!(long.unseen, [span(1, 1), span(21, 3), span(29, 2)]);
        let others = vec![recording(&[1], &[]); 2];
        assert_eq!(chosen(&[others, vec![long; 3]].concat()), [1, 5, 6, 20], "1 in two of two");
    }

    #[test]
    fn one_recording_is_taken_as_it_is() {
        assert_eq!(chosen(&[recording(&[5, 1, 3], &[])]), [5, 1, 3]);
        assert!(chosen(&[]).is_empty());
        assert_eq!(
            chosen(&[recording(&[5, 5, 5], &[]), recording(&[1], &[]), recording(&[1], &[])]),
            [1],
            "once each"
        );
    }

    #[test]
    fn half_of_the_recordings_are_enough_and_less_is_not() {
        let recordings = [recording(&[1, 2], &[]), recording(&[1], &[]), recording(&[1, 3], &[])];
        assert_eq!(chosen(&recordings), [1]);
        assert_eq!(chosen(&recordings[..2]), [1, 2]);
    }

    #[test]
    fn what_was_brought_is_neither_taken_for_touched_nor_for_untouched() {
        let first = recording(&[1, 2], &[]);
        // 1 and 2 were prefetched; only 9 was a fault.
        let replayed = recording(&[9], &[1, 2]);
        let mut recordings = vec![first, replayed.clone()];
        assert_eq!(chosen(&recordings), [1, 2, 9], "what came beside them comes after them");
        // The number of restores that prefetched them does not matter.
        recordings.extend(vec![replayed; 10]);
        assert_eq!(chosen(&recordings), [1, 2, 9]);
        // Recordings without a prefetch or fault of these pages count against them.
        recordings.extend(vec![recording(&[7], &[]); 2]);
        assert_eq!(chosen(&recordings), [9], "1 and 2 in one of three");
    }

    #[test]
    fn the_order_is_that_of_the_average_first_touch() {
        let recordings = [recording(&[1, 2, 3], &[]), recording(&[3, 2, 1], &[]), recording(&[2, 3, 1], &[])];
        assert_eq!(chosen(&recordings), [2, 3, 1]);
    }

    #[test]
    fn huge_pages_come_one_after_another() {
        let huge = |first: u32| (first..first + HUGE_PAGES).collect::<Vec<_>>();
        let (a, b) = (huge(0), huge(1024));
        let recordings = [recording_of(&[a.clone(), b.clone()]), recording_of(&[b.clone(), a.clone()])];
        assert_eq!(chosen(&recordings), [a, b].concat());
        // An incomplete huge page keeps first-touch order.
        let part = recording_of(&[(0..511).rev().collect(), vec![2000]]);
        assert_eq!(chosen(&[part]), (0..511).rev().chain([2000]).collect::<Vec<_>>());
    }

    fn recording_of(touched: &[Vec<u32>]) -> Recording {
        bounded(spans(&touched.concat()), Vec::new(), 10_000)
    }

    fn any_recording() -> impl Strategy<Value = Recording> {
        let span =
            (0..2_u32, 0..40_u32, 1..6_u32).prop_map(|(file, first, count)| PageSpan { file, first, count });
        let spans = || collection::vec(span.clone(), 0..12);
        (spans(), spans()).prop_map(|(touched, unseen)| bounded(touched, unseen, 30))
    }

    proptest! {
        /// The definition, applied page by page.
        #[test]
        fn chosen_is_what_enough_of_those_that_could_see_it_have_touched(
            recordings in collection::vec(any_recording(), 0..8),
            share in 0.0..1.0_f64,
        ) {
            let has = |spans: &[PageSpan], page: Page| pages(spans).any(|other| other == page);
            let is_chosen = |page: &Page| {
                let times = recordings.iter().filter(|recording| has(&recording.touched, *page)).count();
                let could = recordings.iter().filter(|recording| !has(&recording.unseen, *page)).count();
                times > 0 && times as f64 >= share * could as f64
            };
            let all = (0..2).flat_map(|file| (0..50).map(move |page| (file, page)));
            let mut chosen = choose(&recordings, share);
            chosen.sort_unstable();
            prop_assert_eq!(chosen, all.filter(is_chosen).collect::<Vec<_>>());
        }
    }
}
