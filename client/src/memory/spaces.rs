//! Snapshots of a session's address spaces: one for each process whose memory the session fills.
//!
//! A session begins with one address space. When a process forks, its child gets an address space,
//! if the userfaultfd reports forks. Finding an address or a chunk, changing a region, and a fork
//! take logarithmic time in the number of regions. Snapshots share the nodes of trees that a change
//! leaves alone, and so do a parent and its child.

mod address_space;
mod relatives;

use super::arena::{Arena, ArenaFull};
use super::object::Object;
use super::page_states::PageStates;
use super::region::Region;
use super::space::Space;
use address_space::{AddressSpace, Held, Placed};
use imbl::OrdMap;
use postcopy_proto::page::{ChunkIndex, to_usize};
use std::ops::{Bound, Range};
use std::sync::Arc;

/// A change of the address spaces that an event or a page fault causes. It is deterministic:
/// applied to equal spaces it results in equal spaces. So a successor can repeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The owner unmapped memory.
    Unmap { space: u32, addresses: Range<usize> },
    /// The owner moved memory.
    Move { space: u32, from: Range<usize>, to: usize },
    /// The owner mapped shared memory a second time.
    MapAgain { space: u32, from: usize, to: usize },
    /// In this range, shared memory that was moved is still mapped at its old place.
    TakeBack { space: u32, addresses: Range<usize> },
    /// The memory of a child is private, and all of it is resident or removed. The records of its
    /// regions are dropped.
    Clear { space: u32 },
    /// The process has exited.
    Forget { space: u32 },
}

/// The relation of a recorded region to its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The region is mapped at this address, and stands in the address order.
    Here,
    /// The region was moved away from this address. The kernel first reports the move, and then
    /// that the old place is unmapped. Between the two reports, other memory may have been moved to
    /// the old place. With MREMAP_DONTUNMAP the old place stays mapped.
    Moved,
    /// Other memory was moved to this address. So the region must have been moved away or unmapped
    /// before; the report of that is outstanding. The order can be wrong because the kernel
    /// releases its lock before it posts an event, so that another thread may post its event first.
    Displaced,
}

/// A snapshot of a session's address spaces, see the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spaces {
    spaces: OrdMap<u32, Arc<AddressSpace>>,
    has_shared: bool,
    has_huge: bool,
}

impl Spaces {
    /// Adds a space. Its id must be greater than all others.
    pub(crate) fn add_space(&mut self, space: Arc<Space>) {
        self.spaces.insert(space.id, Arc::new(AddressSpace::new(space)));
    }

    /// Adds an object to a space, and returns the object's id there.
    ///
    /// # Panics
    /// If the space does not exist.
    pub(crate) fn add_object(&mut self, space: u32, object: Arc<Object>) -> u32 {
        self.has_shared |= object.kind().is_shared;
        self.has_huge |= object.kind().is_huge;
        self.address_space(space).add_object(object)
    }

    /// Adds an object with this id to a space.
    ///
    /// # Panics
    /// If the space does not exist.
    pub(crate) fn put_object(&mut self, space: u32, id: u32, object: Arc<Object>) {
        self.has_shared |= object.kind().is_shared;
        self.has_huge |= object.kind().is_huge;
        let space = self.address_space(space);
        space.next_object = space.next_object.max(id.saturating_add(1));
        space.objects.insert(id, Held { object, regions: 0 });
    }

    pub(crate) fn object(&self, space: u32, id: u32) -> Option<&Arc<Object>> {
        self.spaces.get(&space)?.objects.get(&id).map(|held| &held.object)
    }

    /// Adds a region of these pages of an object's file, at most 16 TiB. The addresses must be
    /// free.
    ///
    /// # Panics
    /// If the space or the object does not exist.
    pub(crate) fn add(
        &mut self,
        space: u32,
        object: u32,
        place: Place,
        address: usize,
        file_pages: Range<usize>,
    ) {
        let pages = u32::try_from(file_pages.len()).expect("a region has at most 16 TiB");
        let placed = Placed { first_page: file_pages.start as u64, pages, object };
        match place {
            Place::Here => self.address_space(space).add(address, placed),
            _ => self.address_space(space).add_place(place, address, placed),
        }
    }

    fn address_space(&mut self, id: u32) -> &mut AddressSpace {
        Arc::make_mut(self.spaces.get_mut(&id).expect("the space exists"))
    }

    /// Applies a change. Returns the regions, private and shared, that are mapped nowhere in the
    /// space afterwards.
    pub(crate) fn apply(&mut self, change: &Change) -> Vec<Region> {
        let (Change::Unmap { space, .. }
        | Change::Move { space, .. }
        | Change::MapAgain { space, .. }
        | Change::TakeBack { space, .. }
        | Change::Clear { space }
        | Change::Forget { space }) = change;
        if !self.spaces.contains_key(space) {
            return Vec::new();
        }
        match change {
            Change::Unmap { addresses, .. } => return self.address_space(*space).unmap(addresses),
            Change::Move { from, to, .. } => return self.address_space(*space).move_to(from, *to),
            Change::MapAgain { from, to, .. } => self.address_space(*space).map_again(*from, *to),
            Change::TakeBack { addresses, .. } => drop(self.address_space(*space).take_back(addresses)),
            Change::Clear { .. } => {
                self.leave_children(*space);
                let space = self.address_space(*space);
                *space = AddressSpace::new(Arc::clone(&space.space));
            }
            Change::Forget { .. } => {
                self.leave_children(*space);
                self.spaces.remove(space);
            }
        }
        Vec::new()
    }

    /// Returns whether [`Change::TakeBack`] would restore any record.
    pub(crate) fn can_take_back(&self, space: u32, addresses: &Range<usize>) -> bool {
        let Some(space) = self.spaces.get(&space).filter(|space| !space.moved.is_empty()) else {
            return false;
        };
        let mut near = space.moved.near(addresses.start as u64..addresses.end as u64);
        near.any(|(at, _, placed)| {
            let held = space.objects.get(&placed.object);
            held.is_some_and(|held| held.object.kind().is_shared)
                && AddressSpace::part(to_usize(at), placed, addresses).is_some()
        })
    }

    /// Drops objects that no region names. Only a damaged state file has any.
    pub(crate) fn drop_unheld(&mut self) {
        let of = |(id, space): (&u32, &Arc<AddressSpace>)| {
            let unheld = space.objects.iter().filter(|(_, held)| held.regions == 0);
            unheld.map(|(object, _)| (*id, *object)).collect::<Vec<_>>()
        };
        for (space, object) in self.spaces.iter().flat_map(of).collect::<Vec<_>>() {
            self.address_space(space).objects.remove(&object);
        }
    }

    /// Replaces each object by the result of `replace`.
    pub(crate) fn replace_objects(&mut self, mut replace: impl FnMut(&Arc<Object>) -> Arc<Object>) {
        let ids: Vec<_> = self.spaces.keys().copied().collect();
        for id in ids {
            let space = self.address_space(id);
            let objects: Vec<_> = space.objects.keys().copied().collect();
            for object in objects {
                let held = space.objects.get_mut(&object).expect("it was listed");
                held.object = replace(&held.object);
            }
        }
    }

    /// Yields all spaces, ordered by id.
    pub(crate) fn spaces(&self) -> impl Iterator<Item = &Arc<Space>> {
        self.spaces.values().map(|space| &space.space)
    }

    /// Yields the spaces with a greater id, or all spaces, ordered by id.
    pub(crate) fn spaces_after(&self, id: Option<u32>) -> impl Iterator<Item = &Arc<Space>> {
        let after = (id.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        self.spaces.range(after).map(|(_, space)| &space.space)
    }

    pub(crate) fn space(&self, id: u32) -> Option<&Arc<Space>> {
        self.spaces.get(&id).map(|space| &space.space)
    }

    /// Yields all regions, ordered by space and address.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        let of = |space: &'_ Arc<AddressSpace>| {
            let space = Arc::clone(space);
            let regions: Vec<_> = space.regions.iter().map(|(at, placed)| (*at, *placed)).collect();
            regions.into_iter().map(move |(at, placed)| space.view(at, &placed))
        };
        self.spaces.values().flat_map(of)
    }

    /// Yields the regions of one space, ordered by address.
    pub(crate) fn regions_of(&self, space: u32) -> impl Iterator<Item = Region> {
        let space = self.spaces.get(&space);
        space.into_iter().flat_map(|space| space.regions.iter().map(|(at, placed)| space.view(*at, placed)))
    }

    /// Returns the range from the first address of a space's regions to the last one.
    pub(crate) fn hull_of(&self, space: u32) -> Option<Range<usize>> {
        let regions = &self.spaces.get(&space)?.regions;
        let ((first, _), (last, placed)) = regions.get_min().zip(regions.get_max())?;
        Some(*first..AddressSpace::end(*last, placed))
    }

    /// Yields the objects of one space, with their ids.
    pub(crate) fn objects_of(&self, space: u32) -> impl Iterator<Item = (u32, &Arc<Object>)> {
        let space = self.spaces.get(&space);
        space.into_iter().flat_map(|space| space.objects.iter().map(|(id, held)| (*id, &held.object)))
    }

    /// Yields the regions of one space, moved and displaced ones included, with their objects' ids.
    #[cfg(test)]
    pub(crate) fn places_of(&self, space: u32) -> impl Iterator<Item = (Place, u32, Region)> {
        self.differences(space, None).regions.into_iter()
    }

    /// Returns the number of pages of all regions.
    #[cfg(test)]
    pub(crate) fn pages(&self) -> usize {
        self.spaces.values().map(|space| space.pages).sum()
    }

    /// Returns whether no space has a region.
    pub(crate) fn is_empty(&self) -> bool {
        self.spaces.values().all(|space| space.regions.is_empty())
    }

    /// Yields the regions that have pages of a chunk.
    pub(crate) fn of_chunk(&self, chunk: ChunkIndex, chunk_pages: usize) -> impl Iterator<Item = Region> {
        let first = chunk.0 * chunk_pages as u64;
        self.of_image_pages(first..first + chunk_pages as u64)
    }

    /// Yields the regions that have some of these pages, which are numbered over all files of the
    /// image.
    pub(crate) fn of_image_pages(&self, pages: Range<u64>) -> impl Iterator<Item = Region> {
        self.spaces.values().flat_map(move |space| {
            let pages = pages.clone();
            space.by_page.near(pages.clone()).filter_map(move |(_, at, ())| {
                let at = to_usize(at);
                let region = space.view(at, space.regions.get(&at)?);
                let here = region.image_pages();
                (here.start < pages.end && pages.start < here.end).then_some(region)
            })
        })
    }

    /// Returns all mappings of these pages' memory: each one's space, and the pages' addresses in
    /// it.
    pub(crate) fn mappings(&self, region: &Region, pages: &Range<usize>) -> Vec<(Arc<Space>, Range<usize>)> {
        let first = region.image_pages().start + pages.start as u64;
        let others = self.of_image_pages(first..first + pages.len() as u64);
        let addresses = others.map(|other| (Arc::clone(&other.space), other.same_memory(region, pages)));
        addresses.filter(|(_, addresses)| !addresses.is_empty()).collect()
    }

    /// Returns the region and its page at an address.
    pub(crate) fn at(&self, space: &Space, address: usize) -> Option<(Region, usize)> {
        let space = self.spaces.get(&space.id)?;
        let (at, placed) = space.regions.get_prev(&address)?;
        let region = space.view(*at, placed);
        let page = region.page_at(address)?;
        Some((region, page))
    }

    /// Returns the regions that have pages in a range of addresses.
    pub(crate) fn overlapping(&self, space: &Space, addresses: &Range<usize>) -> Vec<Region> {
        let Some(space) = self.spaces.get(&space.id) else { return Vec::new() };
        space.overlapping(addresses).map(|(at, placed)| space.view(at, &placed)).collect()
    }

    /// Returns whether a region of an earlier snapshot is unchanged, and its process alive.
    pub(crate) fn holds(&self, region: &Region) -> bool {
        let Some(space) = self.spaces.get(&region.space.id) else { return false };
        let is_same = |placed: &Placed| {
            let now = space.view(region.address(0), placed);
            Arc::ptr_eq(&now.object, &region.object)
                && now.file_pages(0..now.pages()) == region.file_pages(0..region.pages())
        };
        !region.space.is_gone() && space.regions.get(&region.address(0)).is_some_and(is_same)
    }

    /// Returns whether the spaces have or had shared memory.
    pub(crate) fn has_shared(&self) -> bool {
        self.has_shared
    }

    /// Returns whether the spaces have or had huge pages.
    pub(crate) fn has_huge(&self) -> bool {
        self.has_huge
    }

    /// Returns the number of unresolved pages: absent pages, and poisoned ones if poison can be
    /// undone. A page of shared memory counts once for each mapping.
    pub(crate) fn unresolved(&self, poison_can_be_undone: bool) -> usize {
        self.unresolved_in(poison_can_be_undone, |_| true)
    }

    /// Returns the number of unresolved pages of some spaces.
    pub(crate) fn unresolved_in(&self, poison_can_be_undone: bool, is_one: impl Fn(&Space) -> bool) -> usize {
        // A process that has exited has no waiters.
        let spaces = self.spaces.values().filter(|space| !space.space.is_gone() && is_one(&space.space));
        spaces.map(|space| space.unresolved(poison_can_be_undone)).sum()
    }

    /// Returns whether a space has regions, and all of their pages are private, and resident or
    /// removed: no change of their states can follow.
    pub(crate) fn is_final(&self, space: u32) -> bool {
        self.spaces.get(&space).is_some_and(|space| {
            let has_shared = space.objects.values().any(|held| held.object.kind().is_shared);
            !space.objects.is_empty() && !has_shared && space.unresolved(true) == 0
        })
    }

    /// Leaks the descriptors, so that they stay open until the process ends. Closing them would
    /// turn absent pages into zeros, and a successor needs them.
    pub(crate) fn leave_open(&self) {
        for space in self.spaces() {
            std::mem::forget(Arc::clone(&space.uffd));
        }
    }
}

/// Returns the page states of an object for `pages` of its file. `regions` are the pages that
/// regions will have.
///
/// # Errors
/// [`ArenaFull`].
pub(crate) fn states_for(
    arena: &Arc<Arena>,
    pages: &Range<usize>,
    regions: impl IntoIterator<Item = Range<usize>>,
) -> Result<PageStates, ArenaFull> {
    let covered = union(regions).iter().map(|run| run.len()).sum();
    PageStates::new(arena, pages.len(), covered)
}

/// Returns the range from the lowest start to the highest end of some ranges. Empty ranges do not
/// count; without others the result is None.
pub(crate) fn hull(ranges: impl Iterator<Item = Range<usize>>) -> Option<Range<usize>> {
    let ranges = ranges.filter(|range| !range.is_empty());
    ranges.reduce(|hull, range| hull.start.min(range.start)..hull.end.max(range.end))
}

/// Returns disjoint runs that together have all pages of `runs`.
fn union(runs: impl IntoIterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<_> = runs.into_iter().filter(|run| !run.is_empty()).collect();
    all.sort_unstable_by_key(|run| run.start);
    let mut union: Vec<Range<usize>> = Vec::new();
    for run in all {
        match union.last_mut().filter(|last| run.start <= last.end) {
            Some(last) => last.end = last.end.max(run.end),
            None => union.push(run),
        }
    }
    union
}

#[cfg(test)]
mod tests;
