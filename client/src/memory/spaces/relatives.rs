//! Relatives among address spaces: forks, copies, and the differences between two address spaces.
//!
//! A fork shares the trees of its parent, until one of the two changes. So the state file describes
//! an address space as a copy of an earlier one, with the differences. The search for differences
//! skips the nodes that both trees share: its time grows with the number of differences.
//!
//! Each address space names its *relative*, a living space with a lower id. That is its parent.
//! After the parent's end it is the space that the parent leaves its child to
//! ([`Spaces::leave_children`]).

use super::{AddressSpace, Held, Place, Placed, Spaces};
use crate::memory::overlaps::Overlaps;
use crate::memory::{ArenaFull, Object, Region, Space};
use imbl::ordmap::DiffItem;
use postcopy_proto::page::to_usize;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// The largest number of differences for each region of a copy. Dropping a region takes less time
/// than adding one, but a small space is not worth a search through all regions of a large one.
const MOST_DIFFERENCES: usize = 8;

/// The steps that make one address space of a copy of another one, the base, in this order. From an
/// empty base, they are the whole address space.
#[derive(Debug)]
pub(crate) struct Differences {
    /// The private objects of the base by id, with the space's own object, if it keeps this one.
    pub(crate) private: Vec<(u32, Option<Arc<Object>>)>,
    /// The ranges of addresses whose regions the space does not keep.
    pub(crate) removed: Vec<Range<usize>>,
    /// The objects that the remaining regions do not hold.
    pub(crate) objects: Vec<(u32, Arc<Object>)>,
    /// The regions that the space has beside the remaining ones, with their objects' ids.
    pub(crate) regions: Vec<(Place, u32, Region)>,
}

impl AddressSpace {
    /// Returns the records of `space`, which has the same regions and objects. Regions at places
    /// that they were moved from are left out.
    fn copy(&self, space: Arc<Space>) -> Self {
        let (relative, moved, displaced) = (Some(self.space.id), Overlaps::default(), Overlaps::default());
        let mut copy = Self { space, relative, moved, displaced, ..self.clone() };
        let unheld = self.displaced.iter().chain(self.moved.iter());
        unheld.for_each(|(.., placed)| copy.release(placed.object));
        copy
    }

    /// Replaces the private objects. `fork` returns the new object for an id and an old object.
    fn fork_objects(
        &mut self,
        mut fork: impl FnMut(u32, &Arc<Object>) -> Result<Arc<Object>, ArenaFull>,
    ) -> Result<(), ArenaFull> {
        let private = self.objects.iter().filter(|(_, held)| !held.object.kind().is_shared);
        let private: Vec<_> = private.map(|(id, held)| (*id, Arc::clone(&held.object))).collect();
        for (id, object) in private {
            self.objects.get_mut(&id).expect("it was listed").object = fork(id, &object)?;
        }
        Ok(())
    }

    /// Returns the records of a child, whose space is `child`. `fork` makes its private objects.
    ///
    /// # Errors
    /// [`ArenaFull`].
    fn fork(
        &self,
        child: Arc<Space>,
        fork: impl FnMut(u32, &Arc<Object>) -> Result<Arc<Object>, ArenaFull>,
    ) -> Result<Self, ArenaFull> {
        let mut forked = self.copy(child);
        forked.fork_objects(fork)?;
        // The child gets no outstanding reports of its parent. Of the moved memory, only shared
        // memory may still be mapped at its old place in the child.
        for (at, _, placed) in self.moved.iter() {
            // The old place may have been the object's last holder.
            let held = self.objects.get(&placed.object).expect("a region's object is held");
            if held.object.kind().is_shared {
                let object = Arc::clone(&held.object);
                forked.objects.entry(placed.object).or_insert(Held { object, regions: 0 });
                forked.add_place(Place::Moved, to_usize(at), *placed);
            }
        }
        Ok(forked)
    }

    /// Returns the differences of this space from a copy of `base`.
    fn differences(&self, base: &Self) -> Differences {
        let mut copy = base.copy(Arc::clone(&self.space));
        let private = copy.objects.iter().filter(|(_, held)| !held.object.kind().is_shared);
        let private: Vec<u32> = private.map(|(id, _)| *id).collect();
        let [removed, added] = self.changed_regions(base);
        removed.iter().for_each(|(_, placed)| copy.release(placed.object));
        let own = |id: &u32| self.objects.get(id).filter(|_| copy.objects.contains_key(id));
        let own = |id: u32| (id, own(&id).map(|held| Arc::clone(&held.object)));
        let other = self.objects.iter().filter(|(id, _)| !copy.objects.contains_key(*id));
        let added = added.into_iter().map(|(at, placed)| (Place::Here, at, placed));
        let regions = added.chain(self.other_places());
        let view = |(place, at, placed): (_, _, Placed)| (place, placed.object, self.view(at, &placed));
        Differences {
            private: private.into_iter().map(own).collect(),
            removed: base.ranges_of(&removed),
            objects: other.map(|(id, held)| (*id, Arc::clone(&held.object))).collect(),
            regions: regions.map(view).collect(),
        }
    }

    /// Returns the regions that only `base` has, and those that only this space has, by address.
    fn changed_regions(&self, base: &Self) -> [Vec<(usize, Placed)>; 2] {
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        for difference in base.regions.diff(&self.regions) {
            match difference {
                DiffItem::Remove(at, placed) => removed.push((*at, *placed)),
                DiffItem::Add(at, placed) => added.push((*at, *placed)),
                DiffItem::Update { old, new } => {
                    removed.push((*old.0, *old.1));
                    added.push((*new.0, *new.1));
                }
            }
        }
        [removed, added]
    }

    /// Returns ranges of addresses that have these regions, which are in order, and no others.
    fn ranges_of(&self, regions: &[(usize, Placed)]) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (at, placed) in regions {
            let end = Self::end(*at, placed);
            let first_after = |last: &Range<usize>| self.regions.range(last.end..).next();
            let follows = |last: &Range<usize>| first_after(last).is_some_and(|(next, _)| next == at);
            match ranges.last_mut().filter(|last| follows(last)) {
                Some(last) => last.end = end,
                None => ranges.push(*at..end),
            }
        }
        ranges
    }

    /// Returns the base from which this space differs least, or none if it differs from all of them
    /// in far more regions than it has.
    fn nearest<'a>(&self, bases: impl Iterator<Item = &'a Arc<Self>>) -> Option<&'a Arc<Self>> {
        let bases = bases.filter(|base| self.has_objects_like(base));
        let mut searches: Vec<_> = bases.map(|base| (base, base.regions.diff(&self.regions))).collect();
        // The searches take turns, so that all of them end with the shortest one.
        (0..=self.regions.len() * MOST_DIFFERENCES).find_map(|_| {
            searches.iter_mut().find_map(|(base, search)| search.next().is_none().then_some(*base))
        })
    }

    /// Returns whether each id that both spaces use names objects that differ only in their states.
    fn has_objects_like(&self, other: &Self) -> bool {
        self.objects
            .iter()
            .all(|(id, held)| other.objects.get(id).is_none_or(|other| held.object.is_related(&other.object)))
    }
}

impl Spaces {
    /// Adds the space of a child that `parent` has just forked. Only the pager calls this, alone in
    /// the gate.
    ///
    /// # Errors
    /// [`ArenaFull`]; nothing has changed.
    pub(crate) fn fork(&mut self, parent: u32, child: Arc<Space>) -> Result<(), ArenaFull> {
        self.fork_with(parent, child, |_, object| object.fork().map(Arc::new))
    }

    /// Adds the space of a forked child. `fork` returns the child's object for the id and the
    /// object of its parent.
    ///
    /// # Errors
    /// The error of `fork`.
    pub(crate) fn fork_with(
        &mut self,
        parent: u32,
        child: Arc<Space>,
        fork: impl FnMut(u32, &Arc<Object>) -> Result<Arc<Object>, ArenaFull>,
    ) -> Result<(), ArenaFull> {
        let Some(parent) = self.spaces.get(&parent) else {
            self.add_space(child);
            return Ok(());
        };
        let (id, forked) = (child.id, parent.fork(child, fork)?);
        self.spaces.insert(id, Arc::new(forked));
        Ok(())
    }

    /// Adds a space as a copy of `base`, without regions at places that they were moved from.
    /// `fork` is that of [`Spaces::fork_with`].
    ///
    /// # Errors
    /// The error of `fork`.
    ///
    /// # Panics
    /// If `base` does not exist.
    pub(crate) fn copy_with(
        &mut self,
        base: u32,
        space: Arc<Space>,
        fork: impl FnMut(u32, &Arc<Object>) -> Result<Arc<Object>, ArenaFull>,
    ) -> Result<(), ArenaFull> {
        let (id, mut copy) = (space.id, self.spaces[&base].copy(space));
        copy.fork_objects(fork)?;
        self.spaces.insert(id, Arc::new(copy));
        Ok(())
    }

    /// Leaves the children of a space, which ends, to other relatives: the eldest child to the
    /// relative of the space, the others to the eldest.
    pub(super) fn leave_children(&mut self, ended: u32) {
        let mut relative = self.spaces.get(&ended).and_then(|space| space.relative);
        let children = self.spaces.iter().filter(|(_, space)| space.relative == Some(ended));
        let children: Vec<_> = children.map(|(id, _)| *id).collect();
        for child in &children {
            self.address_space(*child).relative = relative;
            relative = children.first().copied();
        }
    }

    /// Returns all spaces, ordered by id, each with the id of an earlier space: of the relative and
    /// the largest earlier space with the same relative, the one that it differs from less. The
    /// second one helps if the relative has unmapped its memory since. A space that has little in
    /// common with both gets none.
    pub(crate) fn with_bases(&self) -> Vec<(&Arc<Space>, Option<u32>)> {
        let mut largest: HashMap<Option<u32>, &Arc<AddressSpace>> = HashMap::new();
        let mut bases = Vec::new();
        for space in self.spaces.values() {
            let relative = space.relative.and_then(|relative| self.spaces.get(&relative));
            let sibling = largest.get(&space.relative).copied();
            let base = space.nearest(relative.into_iter().chain(sibling));
            bases.push((&space.space, base.map(|base| base.space.id)));
            if sibling.is_none_or(|sibling| sibling.regions.len() < space.regions.len()) {
                largest.insert(space.relative, space);
            }
        }
        bases
    }

    /// Returns the differences of a space from a copy of another one, or from an empty space.
    ///
    /// # Panics
    /// If one of the two spaces does not exist.
    pub(crate) fn differences(&self, space: u32, base: Option<u32>) -> Differences {
        let space = &self.spaces[&space];
        match base {
            Some(base) => space.differences(&self.spaces[&base]),
            None => space.differences(&AddressSpace::new(Arc::clone(&space.space))),
        }
    }

    /// Returns the number of regions that two spaces share in memory.
    #[cfg(test)]
    pub(crate) fn shared_regions(&self, one: u32, other: u32) -> usize {
        let other = &self.spaces[&other].regions;
        let is_same = |(at, placed): &(&usize, &Placed)| {
            other.get(*at).is_some_and(|other| std::ptr::eq(*placed, other))
        };
        self.spaces[&one].regions.iter().filter(is_same).count()
    }
}
