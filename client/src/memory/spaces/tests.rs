//! Tests of the snapshots of address spaces.

use super::*;
use crate::memory::tests::{any_space, spaces_with};
use crate::memory::{ObjectKind, PageState};
use crate::state_file::State;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::PAGE_BYTES;
use proptest::prelude::*;
use std::collections::BTreeMap;

const FILE: FileEntry = FileEntry { size_bytes: 400 * 4096, first_chunk: ChunkIndex(0), executable: false };

#[derive(Clone, Debug)]
enum Step {
    Cut(Range<usize>),
    Move(Range<usize>, usize),
    Remove(Range<usize>),
    Fork,
}

fn any_step() -> impl Strategy<Value = (prop::sample::Index, Step)> {
    let range = (0usize..60, 1usize..30).prop_map(|(start, len)| start..start + len);
    let step = prop_oneof![
        range.clone().prop_map(Step::Cut),
        (range.clone(), 0usize..400).prop_map(|(from, to)| Step::Move(from, to)),
        range.prop_map(Step::Remove),
        Just(Step::Fork),
    ];
    (any::<prop::sample::Index>(), step)
}

proptest! {
    /// Every page stays findable with its state, after any sequence of moves, unmaps and forks.
    #[test]
    fn pages_are_found_where_they_went(steps in prop::collection::vec(any_step(), 0..20)) {
        let bytes = |pages: &Range<usize>| bytes(pages.clone());
        let root = any_space(0);
        let state = State::own();
        let regions = [(40 * PAGE_BYTES, 200..215), (5 * PAGE_BYTES, 101..130)];
        let mut spaces = spaces_with(&root, &state, FILE, ObjectKind::default(), 4 * PAGE_BYTES, &regions);
        // The model: for each page of each space, its page of the file and its state.
        let mut model = vec![BTreeMap::new()];
        model[0].extend((5..34).map(|page| (page, (page + 96, PageState::Absent))));
        model[0].extend((40..55).map(|page| (page, (page + 160, PageState::Absent))));
        for (which, step) in steps {
            let which = which.index(model.len());
            let space = spaces.spaces().nth(which).cloned().unwrap();
            let here = &mut model[which];
            match step {
                Step::Cut(pages) => {
                    unmap(&mut spaces, &space, bytes(&pages));
                    here.retain(|page, _| !pages.contains(page));
                }
                Step::Move(from, to) => {
                    let to = to.max(from.end);
                    // As mremap does it: the kernel first unmaps the target, and at the end the
                    // old place.
                    unmap(&mut spaces, &space, bytes(&(to..to + from.len())));
                    here.retain(|page, _| !(to..to + from.len()).contains(page));
                    move_to(&mut spaces, &space, bytes(&from), to * PAGE_BYTES);
                    unmap(&mut spaces, &space, bytes(&from));
                    let moved: Vec<_> = here.range(from.clone()).map(|(page, what)| (*page, *what)).collect();
                    here.retain(|page, _| !from.contains(page));
                    here.extend(moved.into_iter().map(|(page, what)| (page - from.start + to, what)));
                }
                Step::Remove(pages) => {
                    for region in spaces.overlapping(&space, &bytes(&pages)) {
                        region.set_removed(region.pages_in(&bytes(&pages))).unwrap();
                    }
                    here.range_mut(pages).for_each(|(_, what)| what.1 = PageState::Removed);
                }
                Step::Fork => {
                    let child = any_space(u32::try_from(model.len()).unwrap());
                    spaces.fork(space.id, child).unwrap();
                    let forked = model[which].clone();
                    model.push(forked);
                }
            }
        }
        for (space, model) in spaces.spaces().zip(&model) {
            for page in 0..430 {
                let found = spaces.at(space, page * PAGE_BYTES).map(|(region, at)| {
                    let same = |other: &Region| other.space.id == space.id && other.addresses() == region.addresses();
                    assert!(spaces.holds(&region) && spaces.of_chunk(region.chunk_of(at), 4).any(|r| same(&r)));
                    let chunk = usize::try_from(region.chunk_of(at).0).unwrap();
                    (chunk * 4 + region.place_in_chunk(at), region.state(at))
                });
                prop_assert_eq!(found, model.get(&page).copied(), "page {}", page);
            }
        }
        let regions: Vec<_> = spaces.regions().collect();
        let in_order = |pair: &[Region]| {
            let (first, next) = (&pair[0], &pair[1]);
            (first.space.id, first.addresses().end) <= (next.space.id, next.addresses().start)
        };
        prop_assert!(regions.windows(2).all(in_order));
        prop_assert_eq!(spaces.pages(), model.iter().map(BTreeMap::len).sum::<usize>());
        let absent = model.iter().flat_map(BTreeMap::values).filter(|(_, state)| *state == PageState::Absent);
        prop_assert_eq!(spaces.unresolved(true), absent.count());
    }
}

/// Applies an unmap as [`crate::shared::Shared::change`] does.
fn unmap(spaces: &mut Spaces, space: &Space, addresses: Range<usize>) -> usize {
    let unmapped = spaces.apply(&Change::Unmap { space: space.id, addresses });
    for region in unmapped.iter().filter(|region| !region.is_shared()) {
        region.set_removed(0..region.pages()).unwrap();
    }
    unmapped.len()
}

fn move_to(spaces: &mut Spaces, space: &Space, from: Range<usize>, to: usize) {
    spaces.apply(&Change::Move { space: space.id, from, to });
}

fn has_places(spaces: &Spaces, space: &Space) -> bool {
    spaces.places_of(space.id).any(|(place, ..)| place != Place::Here)
}

/// Returns two regions of ten pages each, at pages 20 and 100. Addresses and pages of the file
/// have the same numbers.
fn two_regions(space: &Arc<Space>, kind: ObjectKind) -> Spaces {
    let region = |start: usize| (start * PAGE_BYTES, start..start + 10);
    spaces_with(space, &State::own(), FILE, kind, 16 * PAGE_BYTES, &[region(20), region(100)])
}

fn bytes(pages: Range<usize>) -> Range<usize> {
    pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
}

/// Returns the pages of the file at these pages of the space.
fn found<const N: usize>(spaces: &Spaces, space: &Space, pages: [usize; N]) -> [Option<usize>; N] {
    pages.map(|page| {
        let (region, at) = spaces.at(space, page * PAGE_BYTES)?;
        Some(region.place_in_chunk(at) + 16 * usize::try_from(region.chunk_of(at).0).unwrap())
    })
}

#[test]
fn memory_that_is_moved_where_other_memory_was_moved_from_stays() {
    let space = any_space(0);
    let mut spaces = two_regions(&space, ObjectKind::default());
    // Two threads: the second one moves memory to the old place of the first one's memory, and
    // reports it before the first one reports the unmap.
    move_to(&mut spaces, &space, bytes(20..30), 200 * PAGE_BYTES);
    move_to(&mut spaces, &space, bytes(100..110), 18 * PAGE_BYTES);
    assert_eq!(unmap(&mut spaces, &space, bytes(20..30)), 0);
    assert_eq!(unmap(&mut spaces, &space, bytes(100..110)), 0);
    assert!(!has_places(&spaces, &space));
    let expected = [Some(100), Some(104), Some(109), None, Some(20), Some(29)];
    assert_eq!(found(&spaces, &space, [18, 22, 27, 28, 200, 209]), expected);
    // The next unmap of this place means the memory that lies there.
    assert_eq!(unmap(&mut spaces, &space, bytes(20..25)), 1);
}

#[test]
fn memory_that_is_told_of_too_late_goes_where_it_went() {
    let space = any_space(0);
    let mut spaces = two_regions(&space, ObjectKind::default());
    // The memory at 20 was moved to 200 first, and then other memory to 20. The reports arrive
    // in the other order.
    move_to(&mut spaces, &space, bytes(100..110), 20 * PAGE_BYTES);
    move_to(&mut spaces, &space, bytes(20..30), 200 * PAGE_BYTES);
    unmap(&mut spaces, &space, bytes(100..110));
    assert_eq!(unmap(&mut spaces, &space, bytes(20..30)), 0);
    let expected = [Some(100), Some(109), Some(20), Some(29)];
    assert_eq!(found(&spaces, &space, [20, 29, 200, 209]), expected);
    assert!(!has_places(&spaces, &space));
}

#[test]
fn shared_memory_that_stays_where_it_was_moved_from_is_moved_again() {
    let space = any_space(0);
    let mut spaces = two_regions(&space, ObjectKind { is_shared: true, ..ObjectKind::default() });
    move_to(&mut spaces, &space, bytes(20..30), 200 * PAGE_BYTES);
    move_to(&mut spaces, &space, bytes(22..25), 300 * PAGE_BYTES);
    assert_eq!(
        found(&spaces, &space, [20, 200, 300, 302, 29]),
        [Some(20), Some(20), Some(22), Some(24), Some(29)]
    );
    // The memory moves once more from a place that it left twice, and is then mapped a second
    // time from there.
    move_to(&mut spaces, &space, bytes(23..24), 310 * PAGE_BYTES);
    let again = Change::MapAgain { space: 0, from: 23 * PAGE_BYTES, to: 320 * PAGE_BYTES };
    spaces.apply(&again);
    assert_eq!(found(&spaces, &space, [310, 311, 320, 321]), [Some(23), None, Some(23), None]);
}
