//! Snapshots of a session's address spaces: one for each process whose memory the session fills.
//!
//! A session begins with one address space. When a process forks, its child gets an address space,
//! if the userfaultfd reports forks. Finding an address or a chunk, changing a region, and a fork
//! take logarithmic time in the number of regions. Snapshots share the nodes of trees that a change
//! leaves alone, and so do a parent and its child.

mod relatives;

use super::arena::{Arena, ArenaFull};
use super::object::Object;
use super::overlaps::Overlaps;
use super::page_states::PageStates;
use super::region::Region;
use super::space::Space;
use imbl::OrdMap;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES, to_usize};
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

/// A region as the trees of its space store it, in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    /// The file's page at the region's beginning.
    first_page: u64,
    pages: u32,
    object: u32,
}

/// An object, and the number of the space's regions that name it.
#[derive(Clone, Debug)]
struct Held {
    object: Arc<Object>,
    regions: u32,
}

/// The records of one process's memory.
#[derive(Clone, Debug)]
struct AddressSpace {
    space: Arc<Space>,
    /// The id of an earlier space that this one has much in common with, see [`relatives`].
    relative: Option<u32>,
    /// The regions by first address. No two overlap.
    regions: OrdMap<usize, Placed>,
    /// The first addresses of the same regions, by page of the image. These pages are numbered over
    /// all files in order.
    by_page: Overlaps<()>,
    objects: OrdMap<u32, Held>,
    next_object: u32,
    moved: Overlaps<Placed>,
    displaced: Overlaps<Placed>,
    /// The next tag that distinguishes equal places.
    next_tag: u64,
    /// The number of pages of all regions.
    pages: usize,
}

/// A snapshot of a session's address spaces, see the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spaces {
    spaces: OrdMap<u32, Arc<AddressSpace>>,
    has_shared: bool,
    has_huge: bool,
}

impl AddressSpace {
    fn new(space: Arc<Space>) -> Self {
        Self {
            space,
            relative: None,
            regions: OrdMap::new(),
            by_page: Overlaps::default(),
            objects: OrdMap::new(),
            next_object: 0,
            moved: Overlaps::default(),
            displaced: Overlaps::default(),
            next_tag: 0,
            pages: 0,
        }
    }

    fn view(&self, address: usize, placed: &Placed) -> Region {
        let object = &self.objects.get(&placed.object).expect("a region's object is held").object;
        let first = to_usize(placed.first_page);
        let pages = first..first + placed.pages as usize;
        Region::new(Arc::clone(&self.space), Arc::clone(object), address, pages)
    }

    fn end(address: usize, placed: &Placed) -> usize {
        address + placed.pages as usize * PAGE_BYTES
    }

    /// Returns the image's pages of a region.
    fn image_pages(&self, placed: &Placed) -> Range<u64> {
        let object = &self.objects.get(&placed.object).expect("a region's object is held").object;
        let first = object.first_image_page() + placed.first_page;
        first..first + u64::from(placed.pages)
    }

    fn add_object(&mut self, object: Arc<Object>) -> u32 {
        let id = self.next_object;
        self.next_object += 1;
        self.objects.insert(id, Held { object, regions: 0 });
        id
    }

    fn hold(&mut self, object: u32) {
        self.objects.get_mut(&object).expect("a region's object is held").regions += 1;
    }

    fn release(&mut self, object: u32) {
        let held = self.objects.get_mut(&object).expect("a region's object is held");
        held.regions -= 1;
        if held.regions == 0 {
            self.objects.remove(&object);
        }
    }

    /// Adds a region at an address where no other region is.
    fn add(&mut self, address: usize, placed: Placed) {
        self.hold(placed.object);
        self.by_page.insert(self.image_pages(&placed), address as u64, ());
        self.pages += placed.pages as usize;
        self.regions.insert(address, placed);
    }

    fn remove(&mut self, address: usize) {
        let Some(placed) = self.regions.remove(&address) else { return };
        self.by_page.remove(self.image_pages(&placed), address as u64);
        self.pages -= placed.pages as usize;
        self.release(placed.object);
    }

    fn add_place(&mut self, place: Place, address: usize, placed: Placed) {
        self.hold(placed.object);
        let addresses = address as u64..Self::end(address, &placed) as u64;
        let tag = self.next_tag;
        self.next_tag += 1;
        match place {
            Place::Here => unreachable!("regions in the address order have no tag"),
            Place::Moved => self.moved.insert(addresses, tag, placed),
            Place::Displaced => self.displaced.insert(addresses, tag, placed),
        }
    }

    /// Yields the regions that have pages in a range of addresses.
    fn overlapping(&self, addresses: &Range<usize>) -> impl Iterator<Item = (usize, Placed)> {
        let before = self.regions.get_prev(&addresses.start).filter(|(at, placed)| {
            **at < addresses.start && Self::end(**at, placed) > addresses.start && !addresses.is_empty()
        });
        let after = self.regions.range(addresses.start..addresses.end.max(addresses.start));
        before.into_iter().map(|(at, placed)| (*at, *placed)).chain(after.map(|(at, placed)| (*at, *placed)))
    }

    /// Returns the part of a region that lies in a range of addresses, with the part's first
    /// address.
    fn part(address: usize, placed: &Placed, addresses: &Range<usize>) -> Option<(usize, Placed)> {
        let start = address.max(addresses.start);
        let end = Self::end(address, placed).min(addresses.end);
        let skipped = start.checked_sub(address)? / PAGE_BYTES;
        let pages =
            u32::try_from(end.checked_sub(start)?.div_ceil(PAGE_BYTES)).ok().filter(|pages| *pages > 0)?;
        let first_page = placed.first_page + skipped as u64;
        Some((start, Placed { first_page, pages, object: placed.object }))
    }

    /// Removes a range of addresses from the regions, and returns the removed regions or parts of
    /// regions. Their objects stay held until the caller passes them to
    /// [`AddressSpace::release_all`].
    fn cut(&mut self, addresses: &Range<usize>) -> Vec<(usize, Placed)> {
        let hit: Vec<_> = self.overlapping(addresses).collect();
        let mut inside = Vec::with_capacity(hit.len());
        for (at, placed) in hit {
            self.hold(placed.object);
            self.remove(at);
            let end = Self::end(at, &placed);
            for rest in [at..addresses.start.max(at), addresses.end.min(end)..end] {
                if let Some((at, part)) = Self::part(at, &placed, &rest) {
                    self.add(at, part);
                }
            }
            inside.extend(Self::part(at, &placed, addresses));
        }
        inside
    }

    fn release_all(&mut self, parts: &[(usize, Placed)]) {
        parts.iter().for_each(|(_, placed)| self.release(placed.object));
    }

    fn places(&mut self, place: Place) -> &mut Overlaps<Placed> {
        match place {
            Place::Moved => &mut self.moved,
            Place::Displaced | Place::Here => &mut self.displaced,
        }
    }

    /// Removes the parts of moved or displaced regions that lie in `ranges`, and returns them. Each
    /// address is taken once, and is removed from `ranges`. The objects stay held until
    /// [`AddressSpace::release_all`].
    fn take_places(&mut self, place: Place, ranges: &mut Vec<Range<usize>>) -> Vec<(usize, Placed)> {
        let mut taken = Vec::new();
        let Some(whole) = hull(ranges.iter().cloned()).filter(|_| !self.places(place).is_empty()) else {
            return taken;
        };
        let near = self.places(place).near(whole.start as u64..whole.end as u64);
        let mut near: Vec<_> = near.map(|(at, tag, placed)| (tag, to_usize(at), *placed)).collect();
        // Oldest first: the order in which these places were recorded.
        near.sort_unstable_by_key(|(tag, ..)| *tag);
        for (tag, at, placed) in near {
            let region = at..Self::end(at, &placed);
            let mut kept = vec![region.clone()];
            for range in std::mem::take(ranges) {
                let Some((start, part)) = Self::part(at, &placed, &range) else {
                    ranges.push(range);
                    continue;
                };
                let hit = start..Self::end(start, &part);
                kept = kept.into_iter().flat_map(|kept| without(&kept, &hit)).collect();
                ranges.extend(without(&range, &hit));
                self.hold(part.object);
                taken.push((start, part));
            }
            if kept.first() != Some(&region) {
                self.places(place).remove(region.start as u64..region.end as u64, tag);
                for rest in kept {
                    let part = Self::part(at, &placed, &rest);
                    let (at, part) = part.expect("the remaining part is not empty");
                    self.add_place(place, at, part);
                }
                self.release(placed.object);
            }
        }
        taken
    }

    /// Returns the regions at places that they were moved from, in the order in which these were
    /// recorded.
    fn other_places(&self) -> Vec<(Place, usize, Placed)> {
        let moved = self.moved.iter().map(|(at, tag, placed)| (tag, Place::Moved, at, *placed));
        let displaced = self.displaced.iter().map(|(at, tag, placed)| (tag, Place::Displaced, at, *placed));
        let mut places: Vec<_> = moved.chain(displaced).collect();
        places.sort_unstable_by_key(|(tag, ..)| *tag);
        places.into_iter().map(|(_, place, at, placed)| (place, to_usize(at), placed)).collect()
    }

    fn views(&self, parts: &[(usize, Placed)]) -> Vec<Region> {
        parts.iter().map(|(at, placed)| self.view(*at, placed)).collect()
    }

    /// Removes unmapped memory from the records, and returns the private and shared regions, or
    /// parts, that were mapped there. Where memory was moved away from these addresses, the event
    /// means the moved memory, not memory that was moved there since.
    fn unmap(&mut self, addresses: &Range<usize>) -> Vec<Region> {
        let mut rest = vec![addresses.clone()];
        let moved = self.take_places(Place::Moved, &mut rest);
        let mut unmapped = self.take_places(Place::Displaced, &mut rest);
        for part in rest {
            unmapped.extend(self.cut(&part));
        }
        let views = self.views(&unmapped);
        self.release_all(&moved);
        self.release_all(&unmapped);
        views
    }

    /// Records that memory was moved to `to`. Returns the regions that this overwrote, if the
    /// userfaultfd does not report unmaps; with reports, the memory at `to` must have been moved or
    /// unmapped before. If shared memory moves away from a place that it was moved from before, it
    /// was still mapped there.
    fn move_to(&mut self, from: &Range<usize>, to: usize) -> Vec<Region> {
        self.take_back(from);
        let mut rest = vec![from.clone()];
        let mut moved = self.take_places(Place::Displaced, &mut rest);
        for part in rest {
            moved.extend(self.cut(&part));
        }
        let displaced = self.cut(&(to..to + from.len()));
        let tells_of_unmaps = self.space.uffd.tells_of_unmaps();
        for (at, placed) in &moved {
            self.add(to + (at - from.start), *placed);
            if tells_of_unmaps {
                self.add_place(Place::Moved, *at, *placed);
            }
        }
        let lost = if tells_of_unmaps { Vec::new() } else { self.views(&displaced) };
        for (at, placed) in displaced.iter().filter(|_| tells_of_unmaps) {
            self.add_place(Place::Displaced, *at, *placed);
        }
        self.release_all(&moved);
        self.release_all(&displaced);
        lost
    }

    /// Records that shared memory was mapped a second time, by mremap with an old size of 0. The
    /// kernel reports no length, so this assumes the longest possible one: to the end of the
    /// region, or to the next region at the new place.
    fn map_again(&mut self, from: usize, to: usize) {
        self.take_back(&(from..from + PAGE_BYTES));
        let Some((at, placed)) = self.overlapping(&(from..from + 1)).next() else { return };
        let rest = Self::part(at, &placed, &(from..Self::end(at, &placed)))
            .expect("the region has the page at `from`");
        let most = to..to + (Self::end(at, &placed) - from);
        let other = self.overlapping(&most).next().map_or(most.end, |(other, _)| other.max(to));
        let pages = u32::try_from((other - to) / PAGE_BYTES).unwrap_or(u32::MAX).min(rest.1.pages);
        if pages > 0 {
            self.add(to, Placed { pages, ..rest.1 });
        }
    }

    /// Restores the records of shared memory in a range that it was moved from, because it is still
    /// mapped there. Both places map the same memory. Returns whether there was such memory.
    fn take_back(&mut self, addresses: &Range<usize>) -> bool {
        let near = self.moved.near(addresses.start as u64..addresses.end as u64);
        let mut near: Vec<_> = near.map(|(at, tag, placed)| (tag, to_usize(at), *placed)).collect();
        near.retain(|(_, at, placed)| {
            let is_shared = self.objects.get(&placed.object).is_some_and(|held| held.object.kind().is_shared);
            is_shared && Self::part(*at, placed, addresses).is_some()
        });
        near.sort_unstable_by_key(|(tag, ..)| *tag);
        for (tag, at, placed) in &near {
            let whole = *at..Self::end(*at, placed);
            self.moved.remove(whole.start as u64..whole.end as u64, *tag);
            let others: Vec<_> =
                self.overlapping(&whole).map(|(at, other)| at..Self::end(at, &other)).collect();
            let mut free = vec![whole];
            for other in &others {
                free = free.into_iter().flat_map(|part| without(&part, other)).collect();
                // Other memory lies here. The UNMAP event of the old place is outstanding.
                if let Some((at, part)) = Self::part(*at, placed, other) {
                    self.add_place(Place::Moved, at, part);
                }
            }
            for part in free {
                let (at, part) = Self::part(*at, placed, &part).expect("the free part lies in the region");
                self.add(at, part);
            }
            self.release(placed.object);
        }
        !near.is_empty()
    }
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
        // A process that has exited has no waiters.
        let spaces = self.spaces.values().filter(|space| !space.space.is_gone());
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

impl AddressSpace {
    fn unresolved(&self, poison_can_be_undone: bool) -> usize {
        let of_object = |held: &Held| match held.object.kind().is_shared {
            // Each unmapped page of a private object is counted as removed. Unmapped shared memory
            // is not, so its mappings are counted below.
            true => 0,
            false => held.object.unresolved(poison_can_be_undone),
        };
        let private: usize = self.objects.values().map(of_object).sum();
        if self.objects.values().all(|held| !held.object.kind().is_shared) {
            return private;
        }
        let is_shared = |placed: &Placed| {
            self.objects.get(&placed.object).is_some_and(|held| held.object.kind().is_shared)
        };
        let shared = self.regions.iter().filter(|(_, placed)| is_shared(placed));
        let states = [super::PageState::Absent, super::PageState::Poisoned];
        let states = if poison_can_be_undone { &states[..] } else { &states[..1] };
        let count = |region: Region| states.iter().map(|state| region.count(*state)).sum::<usize>();
        private + shared.map(|(at, placed)| count(self.view(*at, placed))).sum::<usize>()
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

/// Yields the parts of a range that lie outside of another one.
fn without(range: &Range<usize>, other: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let before = range.start..other.start.clamp(range.start, range.end);
    let after = other.end.clamp(range.start, range.end)..range.end;
    // For disjoint ranges, one of the two parts is the whole range, and the other one is empty.
    [before, after].into_iter().filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_space, spaces_with};
    use crate::memory::{ObjectKind, PageState};
    use crate::state_file::State;
    use postcopy_proto::manifest::FileEntry;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const FILE: FileEntry =
        FileEntry { size_bytes: 400 * 4096, first_chunk: ChunkIndex(0), executable: false };

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
