//! Helpers for the tests of this crate: spaces and regions of which nothing is registered.

use super::{Object, ObjectKind, Place, Region, Space, Spaces, states_for};
use crate::state_file::State;
use crate::uffd::{EVENT_UNMAP, Uffd};
use postcopy_proto::manifest::FileEntry;
use std::ops::Range;
use std::sync::Arc;

/// Returns a space of which nothing is registered.
pub(crate) fn any_space(id: u32) -> Arc<Space> {
    let uffd = Uffd::open(EVENT_UNMAP).expect("the kernel provides a userfaultfd");
    Arc::new(Space::new(id, uffd, State::own().answers()))
}

/// Returns an object of these pages of a file.
pub(crate) fn any_object(
    state: &State,
    file: FileEntry,
    pages: Range<usize>,
    chunk_bytes: usize,
) -> Arc<Object> {
    let states = states_for(state.arena(), &pages, [pages.clone()]).unwrap();
    Arc::new(Object::new(file, pages.start, states, ObjectKind::default(), chunk_bytes))
}

/// Returns a region at `address` of these pages of a file.
pub(crate) fn any_region(
    space: &Arc<Space>,
    address: usize,
    file: FileEntry,
    pages: Range<usize>,
    chunk_bytes: usize,
) -> Region {
    let object = any_object(&State::own(), file, pages.clone(), chunk_bytes);
    Region::new(Arc::clone(space), object, address, pages)
}

/// Returns one space with regions, each given by its address and its pages of the file.
pub(crate) fn spaces_with(
    space: &Arc<Space>,
    state: &State,
    file: FileEntry,
    kind: ObjectKind,
    chunk_bytes: usize,
    regions: &[(usize, Range<usize>)],
) -> Spaces {
    let mut spaces = Spaces::default();
    spaces.add_space(Arc::clone(space));
    for (address, pages) in regions {
        let states = states_for(state.arena(), pages, [pages.clone()]).unwrap();
        let object =
            spaces.add_object(0, Arc::new(Object::new(file, pages.start, states, kind, chunk_bytes)));
        spaces.add(0, object, Place::Here, *address, pages.clone());
    }
    spaces
}
