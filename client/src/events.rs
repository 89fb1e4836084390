//! What a userfaultfd's events do to a session's spaces, regions and page states.
//!
//! Whoever causes an event (madvise, munmap, mremap, fork) sleeps in the kernel until it is read, and as long as one
//! waits to be read the kernel answers every install with EAGAIN. So when the pager, alone in the gate, has read all
//! events and has done here what they say, the states are what the page tables are; but for what a thread has changed
//! and not posted yet, which is answered with EAGAIN, too, and may be told of after what others have done since
//! ([`Spaces`]).

use crate::advice::{self, Call};
use crate::page_state::PageState;
use crate::region::RegionState;
use crate::shared::Shared;
use crate::space::{Space, Spaces};
use crate::state::{MESSAGES, StateError};
use crate::uffd::{self, Event};
use std::ops::Range;
use std::sync::Arc;

/// Why not all messages of a userfaultfd were read and done.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) reason: String,
    /// The event is there still, and its causer waits: there is no descriptor or memory for it at the moment.
    pub(crate) may_pass: bool,
}

impl From<String> for Stopped {
    fn from(reason: String) -> Self {
        Self { reason, may_pass: false }
    }
}

/// Reads all messages of a space's userfaultfd, does what its events say, and adds the addresses of its faults to
/// `faults`, and whether the page is write-protected. The gate is passed alone.
///
/// # Errors
/// Why it has stopped.
pub(crate) fn read(
    shared: &Shared,
    space: &Arc<Space>,
    faults: &mut Vec<(usize, bool)>,
) -> Result<(), Stopped> {
    let callers = shared.callers.as_ref().filter(|_| shared.spaces().has_shared());
    let most = if shared.spaces().has_shared() { 1 } else { MESSAGES };
    loop {
        // What a madvise on shared memory asks for can be seen only before its event is read. So one message at a time;
        // and as long as an event is under way, none without a look at who is in madvise. (Where none is, what can be
        // read is a fault. It can go away again, if its page has just come, and an event come right then: that may end
        // the session, by name.)
        let mut calls = None;
        if let Some(callers) = callers {
            if !space.uffd.is_readable().map_err(stopped)? {
                return Ok(());
            }
            calls = space.uffd.has_event().then(|| callers.calls_of_an_event());
            shared.state.note_calls(calls.as_deref().unwrap_or(&[]));
        }
        let received = shared.state.receive(space.id, &space.uffd, most);
        let received = received.map_err(stopped)?;
        for index in 0..received {
            match shared.state.message(index) {
                Event::Fault { address, is_protected } => faults.push((address, is_protected)),
                event => apply(shared, space, event, calls.as_deref(), index + 1)?,
            }
        }
        // A fork's message that there is no descriptor for ends a reading short, and is told of by the next one.
        if received == 0 || received < most && !space.uffd.tells_of_forks() {
            return Ok(());
        }
    }
}

fn stopped(error: std::io::Error) -> Stopped {
    Stopped { may_pass: uffd::may_pass(&error), reason: format!("a userfaultfd cannot be read: {error}") }
}

/// Does what an event says, and writes down that so many of the messages received are done. `calls` are those of madvise
/// that were in progress before it was read.
///
/// # Errors
/// Why the session cannot go on.
pub(crate) fn apply(
    shared: &Shared,
    space: &Arc<Space>,
    event: Event,
    calls: Option<&[Call]>,
    done: usize,
) -> Result<(), String> {
    let full = |error: StateError| error.to_string();
    let mut spaces = shared.spaces();
    match event {
        Event::Fault { .. } => {}
        // The content is about to go: nothing of the image may be installed there any more.
        Event::Remove { addresses } => {
            // Only of what is mapped there is it told: shared memory that was moved from there, and stays.
            if Arc::make_mut(&mut spaces).take_back_in(space, &addresses) {
                shared.set_spaces(Arc::clone(&spaces), None).map_err(full)?;
            }
            for region in spaces.overlapping(space, &addresses) {
                let pages = region.pages_in(&addresses);
                if !region.is_shared() {
                    region.set_removed(pages);
                } else if !keeps_content(shared, region, &pages, calls, &addresses)? {
                    region.set_removed(pages.clone());
                    wake_mappings(&spaces, region, &pages);
                }
            }
            shared.state.done(done);
            wake(space, &addresses);
        }
        Event::Unmap { addresses } => {
            for region in Arc::make_mut(&mut spaces).unmap(space, &addresses) {
                if !region.is_shared() {
                    region.set_removed(0..region.pages());
                }
            }
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
            wake(space, &addresses);
        }
        // An old size of 0: it is mapped in both places now.
        Event::Remap { from, to } if from.is_empty() => {
            Arc::make_mut(&mut spaces).map_again(space, from.start, to);
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
        }
        // What is left at the old place with MREMAP_DONTUNMAP is zero, or the same if it is shared.
        Event::Remap { from, to } => {
            Arc::make_mut(&mut spaces).move_to(space, &from, to);
            // It may have been moved before the session was attached, which registered it anew for tracking.
            let moved = spaces.overlapping(space, &(to..to + from.len())).iter();
            for region in moved.filter(|region| region.removals().is_some()) {
                let _ = space.uffd.register(region.address(0), region.len());
            }
            shared.set_spaces(spaces, Some(done)).map_err(full)?;
            wake(space, &from);
        }
        Event::Fork { child } => {
            let child = space.uffd.of_child(child);
            let id = shared.next_space_id();
            let child = Arc::new(Space::new(*id.as_ref().unwrap_or(&0), child, &shared.state));
            let forked =
                id.and_then(|_| Arc::make_mut(&mut spaces).fork(space, Arc::clone(&child), &shared.state));
            if let Err(error) = forked.and_then(|()| shared.set_spaces(spaces, Some(done))) {
                // Its message is not done: a successor takes it from there, and it must stay open.
                std::mem::forget(child);
                return Err(full(error));
            }
        }
        Event::Unknown { event } => return Err(format!("the kernel sent event {event:#x}, not asked for")),
    }
    shared.pages_changed();
    Ok(())
}

/// Whether shared memory keeps its content whose REMOVE event was read.
///
/// # Errors
/// If that cannot be known, and matters: where pages are absent.
fn keeps_content(
    shared: &Shared,
    region: &RegionState,
    pages: &Range<usize>,
    calls: Option<&[Call]>,
    addresses: &Range<usize>,
) -> Result<bool, String> {
    let known = calls.and_then(|calls| advice::keeps_content(calls, addresses));
    // It may have begun after the look before the reading; it goes on for a while.
    // Where it was ambiguous it stays so: who is there still is not who is meant.
    let seen = calls.is_some_and(|calls| advice::is_covered(calls, addresses));
    let look = || Some(shared.callers.as_ref()?.calls());
    let known = known.or_else(|| advice::keeps_content(&look().filter(|_| !seen)?, addresses));
    // A resident page's next fault shows whether it is still there.
    let matters = region.next_run(pages.clone(), &[PageState::Absent, PageState::Poisoned]).is_some();
    known.or((!matters).then_some(true)).ok_or_else(|| {
        let (start, end) = (addresses.start, addresses.end);
        format!(
            "shared memory at {start:#x} to {end:#x} was removed, and nothing shows whether its content stays"
        )
    })
}

/// Wakes those who sleep on these pages in any of their mappings.
pub(crate) fn wake_mappings(spaces: &Spaces, region: &RegionState, pages: &Range<usize>) {
    for other in spaces.regions() {
        let addresses = other.same_memory(region, pages);
        if !addresses.is_empty() {
            wake(&other.space, &addresses);
        }
    }
}

/// Has those who sleep on pages of the range look again: what they wait for will not come, or not there.
fn wake(space: &Space, addresses: &Range<usize>) {
    space.uffd.wake(addresses.start, addresses.len());
}
