//! The records of one process's memory: its regions, and where they were moved from.

use super::{Place, hull};
use crate::memory::overlaps::Overlaps;
use crate::memory::{Object, PageState, Region, Space};
use imbl::OrdMap;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::ops::Range;
use std::sync::Arc;

/// A region as the trees of its space store it, in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The file's page at the region's beginning.
    pub(super) first_page: u64,
    pub(super) pages: u32,
    pub(super) object: u32,
}

/// An object, and the number of the space's regions that name it.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) object: Arc<Object>,
    pub(super) regions: u32,
}

/// The records of one process's memory.
#[derive(Clone, Debug)]
pub(super) struct AddressSpace {
    pub(super) space: Arc<Space>,
    /// The id of an earlier space that this one has much in common with, see [`super::relatives`].
    pub(super) relative: Option<u32>,
    /// The regions by first address. No two overlap.
    pub(super) regions: OrdMap<usize, Placed>,
    /// The first addresses of the same regions, by page of the image. These pages are numbered over
    /// all files in order.
    pub(super) by_page: Overlaps<()>,
    pub(super) objects: OrdMap<u32, Held>,
    pub(super) next_object: u32,
    pub(super) moved: Overlaps<Placed>,
    pub(super) displaced: Overlaps<Placed>,
    /// The next tag that distinguishes equal places.
    pub(super) next_tag: u64,
    /// The number of pages of all regions.
    pub(super) pages: usize,
}

impl AddressSpace {
    pub(super) fn new(space: Arc<Space>) -> Self {
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

    pub(super) fn view(&self, address: usize, placed: &Placed) -> Region {
        let object = &self.objects.get(&placed.object).expect("a region's object is held").object;
        let first = to_usize(placed.first_page);
        let pages = first..first + placed.pages as usize;
        Region::new(Arc::clone(&self.space), Arc::clone(object), address, pages)
    }

    pub(super) fn end(address: usize, placed: &Placed) -> usize {
        address + placed.pages as usize * PAGE_BYTES
    }

    /// Returns the image's pages of a region.
    pub(super) fn image_pages(&self, placed: &Placed) -> Range<u64> {
        let object = &self.objects.get(&placed.object).expect("a region's object is held").object;
        let first = object.first_image_page() + placed.first_page;
        first..first + u64::from(placed.pages)
    }

    pub(super) fn add_object(&mut self, object: Arc<Object>) -> u32 {
        let id = self.next_object;
        self.next_object += 1;
        self.objects.insert(id, Held { object, regions: 0 });
        id
    }

    pub(super) fn hold(&mut self, object: u32) {
        self.objects.get_mut(&object).expect("a region's object is held").regions += 1;
    }

    pub(super) fn release(&mut self, object: u32) {
        let held = self.objects.get_mut(&object).expect("a region's object is held");
        held.regions -= 1;
        if held.regions == 0 {
            self.objects.remove(&object);
        }
    }

    /// Adds a region at an address where no other region is.
    pub(super) fn add(&mut self, address: usize, placed: Placed) {
        self.hold(placed.object);
        self.by_page.insert(self.image_pages(&placed), address as u64, ());
        self.pages += placed.pages as usize;
        self.regions.insert(address, placed);
    }

    pub(super) fn remove(&mut self, address: usize) {
        let Some(placed) = self.regions.remove(&address) else { return };
        self.by_page.remove(self.image_pages(&placed), address as u64);
        self.pages -= placed.pages as usize;
        self.release(placed.object);
    }

    pub(super) fn add_place(&mut self, place: Place, address: usize, placed: Placed) {
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
    pub(super) fn overlapping(&self, addresses: &Range<usize>) -> impl Iterator<Item = (usize, Placed)> {
        let before = self.regions.get_prev(&addresses.start).filter(|(at, placed)| {
            **at < addresses.start && Self::end(**at, placed) > addresses.start && !addresses.is_empty()
        });
        let after = self.regions.range(addresses.start..addresses.end.max(addresses.start));
        before.into_iter().map(|(at, placed)| (*at, *placed)).chain(after.map(|(at, placed)| (*at, *placed)))
    }

    /// Returns the part of a region that lies in a range of addresses, with the part's first
    /// address.
    pub(super) fn part(address: usize, placed: &Placed, addresses: &Range<usize>) -> Option<(usize, Placed)> {
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
    pub(super) fn cut(&mut self, addresses: &Range<usize>) -> Vec<(usize, Placed)> {
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

    pub(super) fn release_all(&mut self, parts: &[(usize, Placed)]) {
        parts.iter().for_each(|(_, placed)| self.release(placed.object));
    }

    pub(super) fn places(&mut self, place: Place) -> &mut Overlaps<Placed> {
        match place {
            Place::Moved => &mut self.moved,
            Place::Displaced | Place::Here => &mut self.displaced,
        }
    }

    /// Removes the parts of moved or displaced regions that lie in `ranges`, and returns them. Each
    /// address is taken once, and is removed from `ranges`. The objects stay held until
    /// [`AddressSpace::release_all`].
    pub(super) fn take_places(
        &mut self,
        place: Place,
        ranges: &mut Vec<Range<usize>>,
    ) -> Vec<(usize, Placed)> {
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
    pub(super) fn other_places(&self) -> Vec<(Place, usize, Placed)> {
        let moved = self.moved.iter().map(|(at, tag, placed)| (tag, Place::Moved, at, *placed));
        let displaced = self.displaced.iter().map(|(at, tag, placed)| (tag, Place::Displaced, at, *placed));
        let mut places: Vec<_> = moved.chain(displaced).collect();
        places.sort_unstable_by_key(|(tag, ..)| *tag);
        places.into_iter().map(|(_, place, at, placed)| (place, to_usize(at), placed)).collect()
    }

    pub(super) fn views(&self, parts: &[(usize, Placed)]) -> Vec<Region> {
        parts.iter().map(|(at, placed)| self.view(*at, placed)).collect()
    }

    /// Removes unmapped memory from the records, and returns the private and shared regions, or
    /// parts, that were mapped there. Where memory was moved away from these addresses, the event
    /// means the moved memory, not memory that was moved there since.
    pub(super) fn unmap(&mut self, addresses: &Range<usize>) -> Vec<Region> {
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
    pub(super) fn move_to(&mut self, from: &Range<usize>, to: usize) -> Vec<Region> {
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
    pub(super) fn map_again(&mut self, from: usize, to: usize) {
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
    pub(super) fn take_back(&mut self, addresses: &Range<usize>) -> bool {
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

    pub(super) fn unresolved(&self, poison_can_be_undone: bool) -> usize {
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
        let states = [PageState::Absent, PageState::Poisoned];
        let states = if poison_can_be_undone { &states[..] } else { &states[..1] };
        let count = |region: Region| states.iter().map(|state| region.count(*state)).sum::<usize>();
        private + shared.map(|(at, placed)| count(self.view(*at, placed))).sum::<usize>()
    }
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
