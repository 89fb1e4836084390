//! Address spaces: one for each process whose memory a session fills, and what lies where in it.
//!
//! A session begins with one. A process that forks gets its child another one, where userfaultfd tells of it.

use crate::region::RegionState;
use crate::state::{Answers, State, StateError};
use crate::uffd::pagemap::Pagemap;
use crate::uffd::{Outcome, Uffd};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The memory of one process, as its userfaultfd sees it.
#[derive(Debug)]
pub(crate) struct Space {
    /// Of all spaces that the session has had, in the order of their coming.
    pub(crate) id: u32,
    pub(crate) uffd: Arc<Uffd>,
    answers: Answers,
    gone: AtomicBool,
    /// Its memory is registered; if not, what is not registered is so because that is still to come.
    settled: AtomicBool,
    /// What its process has mapped, where that process is known.
    pagemap: Option<Pagemap>,
}

impl Space {
    /// A space of a session with this state.
    pub(crate) fn new(id: u32, uffd: Uffd, state: &State) -> Self {
        let (answers, gone, settled) = (state.answers(), AtomicBool::new(false), AtomicBool::new(true));
        Self { id, uffd: Arc::new(uffd), answers, gone, settled, pagemap: None }
    }

    /// The same, where memory is still to be registered.
    pub(crate) fn unsettled(self) -> Self {
        self.settled.store(false, Ordering::Release);
        self
    }

    /// All memory is registered.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Whether it is.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// The same, of a process that is known by its pid.
    pub(crate) fn of_process(self, pid: Option<u32>) -> Self {
        Self { pagemap: pid.and_then(|pid| Pagemap::of(pid).ok()), ..self }
    }

    /// Gives the ranges of addresses that were written to since they were installed or protected anew, and whether they
    /// are in memory: what is not may be swapped out, or poison. Absent pages are left alone. With `reset` they are
    /// protected anew, without losing a write, where the look can do that.
    ///
    /// # Errors
    /// Unsupported where that was not asked for, or nothing can be seen.
    pub(crate) fn written(
        &self,
        addresses: Range<usize>,
        reset: bool,
        give: impl FnMut(Range<usize>, bool),
    ) -> io::Result<()> {
        let pagemap = self.uffd.pagemap().or(self.pagemap.as_ref()).ok_or(io::ErrorKind::Unsupported)?;
        pagemap.written(addresses, reset && self.uffd.protects_by_scan(), give)
    }

    /// Whether something can be seen of what is mapped.
    pub(crate) fn has_pagemap(&self) -> bool {
        self.pagemap.is_some()
    }

    /// Whether a page is seen to be mapped; false, too, where nothing can be seen.
    pub(crate) fn is_present(&self, address: usize) -> bool {
        self.pagemap.as_ref().is_some_and(|pagemap| pagemap.is_present(address))
    }

    /// Counts an answer of the kernel, and gives it back.
    pub(crate) fn counted(&self, outcome: Outcome) -> Outcome {
        self.answers.count(outcome)
    }

    /// Whether the process has exited, as far as somebody has noticed.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// The process has exited.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }
}

/// A session's spaces, and their regions in the order of spaces and addresses; none overlaps another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spaces {
    spaces: Vec<Arc<Space>>,
    regions: Vec<Arc<RegionState>>,
    /// Where regions were that have been moved. The kernel tells that memory has been moved, and only then that it is
    /// not mapped at its old place any more, where other memory may have been moved to meanwhile. With MREMAP_DONTUNMAP
    /// it stays mapped.
    left: Vec<Arc<RegionState>>,
    /// Regions where other memory has been moved to: they must have been moved away or unmapped before, which is still
    /// to be told. The kernel lets go of its lock before it posts an event, and another thread's may come first.
    displaced: Vec<Arc<RegionState>>,
}

impl Spaces {
    /// Spaces in the order of their ids, and regions of theirs, which do not overlap.
    pub(crate) fn new(spaces: Vec<Arc<Space>>, mut regions: Vec<Arc<RegionState>>) -> Self {
        regions.sort_by_key(|region| (region.space.id, region.address(0)));
        Self { spaces, regions, left: Vec::new(), displaced: Vec::new() }
    }

    /// With regions that were moved, as they were at their old places, and with displaced ones.
    pub(crate) fn with(self, left: Vec<Arc<RegionState>>, displaced: Vec<Arc<RegionState>>) -> Self {
        Self { left, displaced, ..self }
    }

    /// Regions where other memory is, and of which it is still to be told where they went.
    pub(crate) fn displaced(&self) -> &[Arc<RegionState>] {
        &self.displaced
    }

    /// Regions that were moved, as they were at their old places.
    pub(crate) fn left(&self) -> &[Arc<RegionState>] {
        &self.left
    }

    pub(crate) fn spaces(&self) -> &[Arc<Space>] {
        &self.spaces
    }

    pub(crate) fn regions(&self) -> &[Arc<RegionState>] {
        &self.regions
    }

    /// The regions that have pages of a chunk.
    pub(crate) fn of_chunk(&self, chunk: ChunkIndex) -> impl Iterator<Item = &Arc<RegionState>> {
        self.regions.iter().filter(move |region| region.chunks().contains(&chunk.0))
    }

    /// The region and its page at an address.
    pub(crate) fn at(&self, space: &Space, address: usize) -> Option<(&Arc<RegionState>, usize)> {
        let region = self.overlapping(space, &(address..address + 1)).first()?;
        Some((region, region.page_at(address)?))
    }

    /// The regions that have pages in a range of addresses.
    pub(crate) fn overlapping(&self, space: &Space, addresses: &Range<usize>) -> &[Arc<RegionState>] {
        let start =
            self.regions.partition_point(|r| (r.space.id, r.addresses().end) <= (space.id, addresses.start));
        let end = self.regions.partition_point(|r| (r.space.id, r.address(0)) < (space.id, addresses.end));
        &self.regions[start..end.max(start)]
    }

    /// Adds a region where none is.
    pub(crate) fn add(&mut self, region: Arc<RegionState>) {
        let place = (region.space.id, region.address(0));
        let at = self.regions.partition_point(|other| (other.space.id, other.address(0)) < place);
        self.regions.insert(at, region);
    }

    /// Takes a range of addresses out, and gives the regions that lay in it, whole or in part, as they were in it.
    pub(crate) fn cut(&mut self, space: &Space, addresses: &Range<usize>) -> Vec<RegionState> {
        let hit = self.overlapping(space, addresses).to_vec();
        self.regions.retain(|region| !hit.iter().any(|hit| Arc::ptr_eq(hit, region)));
        let mut inside = Vec::new();
        for region in hit {
            let cut = region.pages_in(addresses);
            for rest in [0..cut.start, cut.end..region.pages()] {
                if !rest.is_empty() {
                    self.add(Arc::new(region.part(rest.clone(), region.address(rest.start))));
                }
            }
            inside.push(region.part(cut.clone(), region.address(cut.start)));
            region.end();
        }
        inside
    }

    /// Memory has been unmapped: gives the regions that lay there, whole or in part, as they were in it. Where memory
    /// was moved away from, that is meant, and not what has been moved there since.
    pub(crate) fn unmap(&mut self, space: &Space, addresses: &Range<usize>) -> Vec<RegionState> {
        let mut rest = vec![addresses.clone()];
        take_parts(&mut self.left, space, &mut rest);
        let mut unmapped = take_parts(&mut self.displaced, space, &mut rest);
        for part in rest {
            unmapped.extend(self.cut(space, &part));
        }
        unmapped
    }

    /// Memory has been moved to `to`. What was there must have gone before. What shared memory was moved from, and is
    /// moved once more, was mapped there still.
    pub(crate) fn move_to(&mut self, space: &Space, from: &Range<usize>, to: usize) {
        self.take_back_in(space, from);
        let mut rest = vec![from.clone()];
        let mut moved = take_parts(&mut self.displaced, space, &mut rest);
        for part in rest {
            moved.extend(self.cut(space, &part));
        }
        let displaced = self.cut(space, &(to..to + from.len()));
        for region in moved {
            let start = to + (region.address(0) - from.start);
            self.add(Arc::new(region.part(0..region.pages(), start)));
            self.leave(region);
        }
        if space.uffd.tells_of_unmaps() {
            self.displaced.extend(displaced.into_iter().map(Arc::new));
        }
    }

    /// Shared memory has been mapped another time, by mremap with an old size of 0. How much of it nobody tells: all that
    /// may be, up to what else is there.
    pub(crate) fn map_again(&mut self, space: &Space, from: usize, to: usize) {
        self.take_back_in(space, &(from..from + PAGE_BYTES));
        let Some((region, page)) = self.at(space, from) else { return };
        let (region, most) = (Arc::clone(region), region.address(region.pages()) - from);
        let other = self.overlapping(space, &(to..to + most)).first().map(|other| other.address(0));
        let pages = other.map_or(most, |other| other.saturating_sub(to)) / PAGE_BYTES;
        if pages > 0 {
            self.add(Arc::new(region.part(page..page + pages, to)));
        }
    }

    /// Whether some memory is of huge pages.
    pub(crate) fn has_huge(&self) -> bool {
        self.regions.iter().any(|region| region.gathering().is_some())
    }

    fn leave(&mut self, region: RegionState) {
        if region.space.uffd.tells_of_unmaps() {
            self.left.push(Arc::new(region));
        }
    }

    /// Takes back a region at an address that memory was moved from, and that is mapped there still: shared memory is
    /// the same in both places. Whether there was one.
    pub(crate) fn take_back(&mut self, space: &Space, address: usize) -> bool {
        let found = self.left.iter().position(|left| {
            left.is_shared() && left.space.id == space.id && left.page_at(address).is_some()
        });
        let Some(found) = found else { return false };
        let left = self.left.remove(found);
        let mut free = vec![left.addresses()];
        let mut taken = Vec::new();
        for region in self.overlapping(space, &left.addresses()) {
            free = free.into_iter().flat_map(|part| without(&part, &region.addresses())).collect();
            taken.push(left.pages_in(&region.addresses()));
        }
        // Where other memory is now an UNMAP is to come still.
        self.left.extend(
            taken.into_iter().map(|part| Arc::new(left.part(part.clone(), left.address(part.start)))),
        );
        for part in free {
            self.add(Arc::new(left.part(left.pages_in(&part), part.start)));
        }
        true
    }

    /// The same for all such places in a range of addresses. Whether there were any.
    pub(crate) fn take_back_in(&mut self, space: &Space, addresses: &Range<usize>) -> bool {
        let inside = |left: &Range<usize>| left.start.max(addresses.start)..left.end.min(addresses.end);
        let places = self.left.iter().filter(|left| left.space.id == space.id).map(|left| left.addresses());
        let places: Vec<_> = places.map(|left| inside(&left)).filter(|place| !place.is_empty()).collect();
        let taken = places.into_iter().filter(|place| self.take_back(space, place.start));
        taken.count() > 0
    }

    /// Whether there is memory that is mapped elsewhere, too.
    pub(crate) fn has_shared(&self) -> bool {
        self.regions.iter().any(|region| region.is_shared())
    }

    /// The same for all such places.
    pub(crate) fn take_all_back(&mut self) {
        for left in self.left.clone() {
            self.take_back(&left.space, left.address(0));
        }
    }

    /// Keeps the descriptors open until the process ends: closing them would turn what is absent into zeros, and a
    /// successor needs them.
    pub(crate) fn leave_open(&self) {
        for space in &self.spaces {
            std::mem::forget(Arc::clone(&space.uffd));
        }
    }

    /// Adds the space of a process that `parent` has forked.
    ///
    /// # Errors
    /// [`StateError::Full`].
    pub(crate) fn fork(
        &mut self,
        parent: &Space,
        child: Arc<Space>,
        state: &State,
    ) -> Result<(), StateError> {
        let regions = self.regions.iter().filter(|region| region.space.id == parent.id);
        let forked = regions.map(|region| match region.is_shared() {
            true => Ok(Arc::new(region.shared_with(&child))),
            false => Ok(Arc::new(region.forked(&child, state.page_states(region.pages())?))),
        });
        let forked: Vec<_> = forked.collect::<Result<_, StateError>>()?;
        // What its parent is still to be told of, the child is not: only what may be mapped there still.
        let left = self.left.iter().filter(|left| left.space.id == parent.id && left.is_shared());
        let left: Vec<_> = left.map(|left| Arc::new(left.shared_with(&child))).collect();
        self.left.extend(left);
        // Ids grow: they go to the end.
        self.regions.extend(forked);
        self.spaces.push(child);
        Ok(())
    }

    /// Forgets spaces whose process has exited.
    pub(crate) fn forget_gone(&mut self) {
        self.regions.retain(|region| !region.space.is_gone());
        self.left.retain(|region| !region.space.is_gone());
        self.displaced.retain(|region| !region.space.is_gone());
        self.spaces.retain(|space| !space.is_gone());
    }
}

/// Takes those parts of regions out that lie in `ranges`, each address once, and out of the ranges, too.
fn take_parts(
    regions: &mut Vec<Arc<RegionState>>,
    space: &Space,
    ranges: &mut Vec<Range<usize>>,
) -> Vec<RegionState> {
    let mut taken = Vec::new();
    for region in std::mem::take(regions) {
        let mut kept = vec![region.addresses()];
        for range in std::mem::take(ranges) {
            let pages = region.pages_in(&range);
            if region.space.id != space.id || pages.is_empty() {
                ranges.push(range);
                continue;
            }
            let part = region.address(pages.start)..region.address(pages.end);
            kept = kept.into_iter().flat_map(|kept| without(&kept, &part)).collect();
            ranges.extend(without(&range, &part));
            taken.push(region.part(pages, part.start));
        }
        regions
            .extend(kept.into_iter().map(|kept| Arc::new(region.part(region.pages_in(&kept), kept.start))));
    }
    taken
}

/// What is left of a range without another one.
fn without(range: &Range<usize>, other: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let before = range.start..other.start.clamp(range.start, range.end);
    let after = other.end.clamp(range.start, range.end)..range.end;
    // Where they do not meet, one of them is the whole range, and the other one empty.
    [before, after].into_iter().filter(|part| !part.is_empty())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::page_state::PageState;
    use crate::region::Common;
    use crate::uffd::EVENT_UNMAP;
    use postcopy_proto::manifest::FileEntry;
    use postcopy_proto::page::PAGE_BYTES;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// A space of which nothing is registered.
    pub(crate) fn any_space(id: u32) -> Arc<Space> {
        let uffd = Uffd::open(EVENT_UNMAP).expect("a userfaultfd can be had");
        Arc::new(Space::new(id, uffd, &State::own()))
    }

    const FILE: FileEntry =
        FileEntry { size_bytes: 400 * 4096, first_chunk: ChunkIndex(0), executable: false };

    #[derive(Clone, Debug)]
    enum Change {
        Cut(Range<usize>),
        Move(Range<usize>, usize),
        Remove(Range<usize>),
        Fork,
    }

    fn any_change() -> impl Strategy<Value = (prop::sample::Index, Change)> {
        let range = (0usize..60, 1usize..30).prop_map(|(start, len)| start..start + len);
        let change = prop_oneof![
            range.clone().prop_map(Change::Cut),
            (range.clone(), 0usize..400).prop_map(|(from, to)| Change::Move(from, to)),
            range.prop_map(Change::Remove),
            Just(Change::Fork),
        ];
        (any::<prop::sample::Index>(), change)
    }

    proptest! {
        /// Pages stay what they are, wherever they go, whatever is cut, and however often it is forked.
        #[test]
        fn pages_are_found_where_they_went(changes in prop::collection::vec(any_change(), 0..20)) {
            let bytes = |pages: &Range<usize>| bytes(pages.clone());
            let root = any_space(0);
            let state = State::own();
            let region = |start: usize, pages: Range<usize>| {
                let states = state.page_states(pages.len()).unwrap();
                let (space, chunk_bytes) = (Arc::clone(&root), 4 * PAGE_BYTES);
                Arc::new(RegionState::new(space, start * PAGE_BYTES, FILE, pages, chunk_bytes, Common::new(states, false, false)))
            };
            let mut spaces = Spaces::new(vec![Arc::clone(&root)], vec![region(40, 200..215), region(5, 101..130)]);
            // What is at each page of each space: a page of the file, and its state.
            let mut model = vec![BTreeMap::new()];
            model[0].extend((5..34).map(|page| (page, (page + 96, PageState::Absent))));
            model[0].extend((40..55).map(|page| (page, (page + 160, PageState::Absent))));
            for (which, change) in changes {
                let which = which.index(model.len());
                let space = Arc::clone(&spaces.spaces()[which]);
                let here = &mut model[which];
                match change {
                    Change::Cut(pages) => {
                        spaces.unmap(&space, &bytes(&pages));
                        here.retain(|page, _| !pages.contains(page));
                    }
                    Change::Move(from, to) => {
                        let to = to.max(from.end);
                        // As mremap does it: what was there is unmapped first, and what was moved afterwards.
                        spaces.unmap(&space, &bytes(&(to..to + from.len())));
                        here.retain(|page, _| !(to..to + from.len()).contains(page));
                        spaces.move_to(&space, &bytes(&from), to * PAGE_BYTES);
                        spaces.unmap(&space, &bytes(&from));
                        let moved: Vec<_> = here.range(from.clone()).map(|(page, what)| (*page, *what)).collect();
                        here.retain(|page, _| !from.contains(page));
                        here.extend(moved.into_iter().map(|(page, what)| (page - from.start + to, what)));
                    }
                    Change::Remove(pages) => {
                        for region in spaces.overlapping(&space, &bytes(&pages)) {
                            region.set_removed(region.pages_in(&bytes(&pages)));
                        }
                        here.range_mut(pages).for_each(|(_, what)| what.1 = PageState::Removed);
                    }
                    Change::Fork => {
                        let child = any_space(u32::try_from(model.len()).unwrap());
                        spaces.fork(&space, child, &state).unwrap();
                        let forked = model[which].clone();
                        model.push(forked);
                    }
                }
            }
            for (space, model) in spaces.spaces().iter().zip(&model) {
                for page in 0..430 {
                    let found = spaces.at(space, page * PAGE_BYTES).map(|(region, at)| {
                        assert!(region.is_alive() && spaces.of_chunk(region.chunk_of(at)).any(|r| Arc::ptr_eq(r, region)));
                        let chunk = usize::try_from(region.chunk_of(at).0).unwrap();
                        (chunk * 4 + region.place_in_chunk(at), region.state(at))
                    });
                    prop_assert_eq!(found, model.get(&page).copied(), "page {}", page);
                }
            }
            let in_order = |pair: &[Arc<RegionState>]| {
                let (first, next) = (&pair[0], &pair[1]);
                (first.space.id, first.addresses().end) <= (next.space.id, next.addresses().start)
            };
            prop_assert!(spaces.regions().windows(2).all(in_order));
        }
    }

    /// Two regions of ten pages each, at pages 20 and 100, of these pages of the file.
    fn two_regions(space: &Arc<Space>) -> Spaces {
        let region = |start: usize| {
            let states = State::own().page_states(10).unwrap();
            let (address, pages) = (start * PAGE_BYTES, start..start + 10);
            Arc::new(RegionState::new(
                Arc::clone(space),
                address,
                FILE,
                pages,
                16 * PAGE_BYTES,
                Common::new(states, false, false),
            ))
        };
        Spaces::new(vec![Arc::clone(space)], vec![region(20), region(100)])
    }

    fn bytes(pages: Range<usize>) -> Range<usize> {
        pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
    }

    /// Which pages of the file are at these pages.
    fn found<const N: usize>(spaces: &Spaces, space: &Space, pages: [usize; N]) -> [Option<usize>; N] {
        pages.map(|page| {
            let (region, at) = spaces.at(space, page * PAGE_BYTES)?;
            Some(region.place_in_chunk(at) + 16 * usize::try_from(region.chunk_of(at).0).unwrap())
        })
    }

    #[test]
    fn memory_that_is_moved_where_other_memory_was_moved_from_stays() {
        let space = any_space(0);
        let mut spaces = two_regions(&space);
        // Two threads: the second one is told where the first one's memory was, before its unmapping is told of.
        spaces.move_to(&space, &bytes(20..30), 200 * PAGE_BYTES);
        spaces.move_to(&space, &bytes(100..110), 18 * PAGE_BYTES);
        assert!(spaces.unmap(&space, &bytes(20..30)).is_empty());
        assert!(spaces.unmap(&space, &bytes(100..110)).is_empty());
        assert!(spaces.left().is_empty());
        let expected = [Some(100), Some(104), Some(109), None, Some(20), Some(29)];
        assert_eq!(found(&spaces, &space, [18, 22, 27, 28, 200, 209]), expected);
        // And its own unmapping is meant when it comes.
        assert_eq!(spaces.unmap(&space, &bytes(20..25)).len(), 1);
    }

    #[test]
    fn memory_that_is_told_of_too_late_goes_where_it_went() {
        let space = any_space(0);
        let mut spaces = two_regions(&space);
        // It was moved from 20 to 200 first, and then other memory to 20; but that is told of before.
        spaces.move_to(&space, &bytes(100..110), 20 * PAGE_BYTES);
        spaces.move_to(&space, &bytes(20..30), 200 * PAGE_BYTES);
        spaces.unmap(&space, &bytes(100..110));
        assert!(spaces.unmap(&space, &bytes(20..30)).is_empty());
        let expected = [Some(100), Some(109), Some(20), Some(29)];
        assert_eq!(found(&spaces, &space, [20, 29, 200, 209]), expected);
        assert!(spaces.left().is_empty() && spaces.displaced().is_empty());
    }

    #[test]
    fn shared_memory_that_stays_where_it_was_moved_from_is_moved_again() {
        let space = any_space(0);
        let shared = two_regions(&space)
            .regions
            .into_iter()
            .map(|region| Arc::new(Arc::try_unwrap(region).expect("nobody else has it").shared()));
        let mut spaces = Spaces::new(vec![Arc::clone(&space)], shared.collect());
        spaces.move_to(&space, &bytes(20..30), 200 * PAGE_BYTES);
        spaces.move_to(&space, &bytes(22..25), 300 * PAGE_BYTES);
        assert_eq!(
            found(&spaces, &space, [20, 200, 300, 302, 29]),
            [Some(20), Some(20), Some(22), Some(24), Some(29)]
        );
        // And once more from where it has been twice; and mapped another time from there.
        spaces.move_to(&space, &bytes(23..24), 310 * PAGE_BYTES);
        spaces.map_again(&space, 23 * PAGE_BYTES, 320 * PAGE_BYTES);
        assert_eq!(found(&spaces, &space, [310, 311, 320, 321]), [Some(23), None, Some(23), None]);
    }

    #[test]
    fn what_is_left_of_ranges() {
        let left = |range, other| without(&range, &other).flatten().collect::<Vec<usize>>();
        let pages = |range: Range<usize>| range.collect::<Vec<_>>();
        assert_eq!(left(10..20, 12..15), [pages(10..12), pages(15..20)].concat());
        assert_eq!(left(10..20, 5..15), pages(15..20));
        assert_eq!(left(10..20, 15..25), pages(10..15));
        assert_eq!(left(10..20, 0..5), pages(10..20));
        assert_eq!(left(10..20, 20..25), pages(10..20));
        assert!(left(10..20, 10..20).is_empty());
    }
}
