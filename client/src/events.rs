//! What a userfaultfd's events do to a session's spaces, regions and page states.
//!
//! Whoever causes an event (madvise, munmap, mremap, fork) sleeps in the kernel until it is read, and as long as one
//! waits to be read the kernel answers every install with EAGAIN. So when the pager, alone in the gate, has read all
//! events and has done here what they say, the states are what the page tables are.

use crate::session::Shared;
use crate::space::Space;
use crate::uffd::Event;
use std::ops::Range;
use std::sync::Arc;

/// Changes states by the events that were read of a space's userfaultfd, and adds the addresses of faults to `faults`.
/// The gate is passed alone.
///
/// # Errors
/// Why the session cannot go on.
pub(crate) fn apply(
    shared: &Shared,
    space: &Arc<Space>,
    events: &mut Vec<Event>,
    faults: &mut Vec<usize>,
) -> Result<(), String> {
    let mut changed = false;
    let mut outcome = Ok(());
    for event in events.drain(..) {
        if let Event::Fault { address } = event {
            faults.push(address);
            continue;
        }
        changed = true;
        let applied = apply_one(shared, space, event);
        outcome = outcome.and(applied);
    }
    if changed {
        shared.pages_changed();
    }
    outcome
}

fn apply_one(shared: &Shared, space: &Arc<Space>, event: Event) -> Result<(), String> {
    match event {
        Event::Fault { .. } => {}
        // The content is about to go: nothing of the image may be installed there any more.
        Event::Remove { addresses } => {
            for region in shared.spaces().overlapping(space, &addresses) {
                region.set_removed(region.pages_in(&addresses));
            }
            wake(space, &addresses);
        }
        Event::Unmap { addresses } => {
            shared.change_spaces(|spaces| {
                for region in spaces.cut(space, &addresses) {
                    region.set_removed(0..region.pages());
                }
            });
            wake(space, &addresses);
        }
        // What is left at the old place with MREMAP_DONTUNMAP is memory of no region, which is zero.
        Event::Remap { from, to } => {
            shared.change_spaces(|spaces| spaces.move_to(space, &from, to));
            wake(space, &from);
        }
        Event::Fork { child } => {
            let child = Arc::new(Space::new(shared.next_space_id(), child));
            shared.change_spaces(|spaces| spaces.fork(space, child));
        }
        Event::Unknown { event } => return Err(format!("the kernel sent event {event:#x}, not asked for")),
    }
    Ok(())
}

/// Has those who sleep on pages of the range look again: what they wait for will not come, or not there.
fn wake(space: &Space, addresses: &Range<usize>) {
    space.uffd.wake(addresses.start, addresses.len());
}
