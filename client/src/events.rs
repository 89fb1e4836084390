//! What a userfaultfd's events do to a session's spaces, regions and page states.
//!
//! Whoever causes an event (madvise, munmap, mremap, fork) sleeps in the kernel until it is read, and as long as one
//! waits to be read the kernel answers every install with EAGAIN. So when the pager, alone in the gate, has read all
//! events and has done here what they say, the states are what the page tables are.

use crate::session::Shared;
use crate::space::Space;
use crate::state::{MESSAGES, StateError};
use crate::uffd::Event;
use std::ops::Range;
use std::sync::Arc;

/// Reads all messages of a space's userfaultfd, does what its events say, and adds the addresses of its faults to
/// `faults`. The gate is passed alone.
///
/// # Errors
/// Why the session cannot go on.
pub(crate) fn read(shared: &Shared, space: &Arc<Space>, faults: &mut Vec<usize>) -> Result<(), String> {
    loop {
        let received = shared.state.receive(space.id, &space.uffd);
        let received = received.map_err(|error| format!("a userfaultfd cannot be read: {error}"))?;
        for index in 0..received {
            match shared.state.message(index) {
                Event::Fault { address } => faults.push(address),
                event => apply(shared, space, event, index + 1)?,
            }
        }
        if received < MESSAGES {
            return Ok(());
        }
    }
}

/// Does what an event says, and writes down that so many of the messages received are done.
///
/// # Errors
/// As [`read`].
pub(crate) fn apply(shared: &Shared, space: &Arc<Space>, event: Event, done: usize) -> Result<(), String> {
    let full = |error: StateError| error.to_string();
    let mut spaces = shared.spaces();
    match event {
        Event::Fault { .. } => {}
        // The content is about to go: nothing of the image may be installed there any more.
        Event::Remove { addresses } => {
            for region in spaces.overlapping(space, &addresses) {
                region.set_removed(region.pages_in(&addresses));
            }
            shared.state.done(done);
            wake(space, &addresses);
        }
        Event::Unmap { addresses } => {
            for region in Arc::make_mut(&mut spaces).cut(space, &addresses) {
                region.set_removed(0..region.pages());
            }
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
            wake(space, &addresses);
        }
        // What is left at the old place with MREMAP_DONTUNMAP is memory of no region, which is zero.
        Event::Remap { from, to } => {
            Arc::make_mut(&mut spaces).move_to(space, &from, to);
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
            wake(space, &from);
        }
        Event::Fork { child } => {
            let child = Space::new(shared.next_space_id(), space.uffd.of_child(child), &shared.state);
            let child = Arc::new(child);
            if let Err(error) = Arc::make_mut(&mut spaces).fork(space, Arc::clone(&child), &shared.state) {
                // Its message is not done: a successor takes it from there, and it must stay open.
                std::mem::forget(child);
                return Err(full(error));
            }
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
        }
        Event::Unknown { event } => return Err(format!("the kernel sent event {event:#x}, not asked for")),
    }
    shared.pages_changed();
    Ok(())
}

/// Has those who sleep on pages of the range look again: what they wait for will not come, or not there.
fn wake(space: &Space, addresses: &Range<usize>) {
    space.uffd.wake(addresses.start, addresses.len());
}
