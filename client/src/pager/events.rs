//! What a userfaultfd's events do to a session's spaces, regions and page states.
//!
//! Whoever causes an event (madvise, munmap, mremap, fork) sleeps in the kernel until it is read, and as long as one
//! waits to be read the kernel answers every install with EAGAIN. So when the pager, alone in the gate, has read all
//! events and has done here what they say, the states are what the page tables are; but for what a thread has changed
//! and not posted yet, which is answered with EAGAIN, too, and may be told of after what others have done since
//! ([`Spaces`]).

use crate::memory::{Change, PageState, Region, Space, Spaces};
use crate::processes::{self, Call};
use crate::shared::Shared;
use crate::state_file::{MESSAGES, Record, StateError};
use crate::uffd::{self, Event};
use std::ops::Range;
use std::os::fd::OwnedFd;
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
    while read_some(shared, space, faults, MESSAGES)? {}
    Ok(())
}

/// Reads at most `most` messages, and does what they say: whether there may be more.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_some(
    shared: &Shared,
    space: &Arc<Space>,
    faults: &mut Vec<(usize, bool)>,
    most: usize,
) -> Result<bool, Stopped> {
    let has_shared = shared.spaces().has_shared();
    let callers = shared.callers.as_ref().filter(|_| has_shared);
    let most = if has_shared { 1 } else { most };
    // What a madvise on shared memory asks for can be seen only before its event is read. So one message at a time;
    // and as long as an event is under way, none without a look at who is in madvise. (Where none is, what can be
    // read is a fault. It can go away again, if its page has just come, and an event come right then: that may end
    // the session, by name.)
    let mut calls = None;
    if let Some(callers) = callers {
        if !space.uffd.is_readable().map_err(stopped)? {
            return Ok(false);
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
    // A fork's message that there is no descriptor for ends a reading short, and the next one tells of it.
    Ok(received > 0 && (received == most || space.uffd.tells_of_forks()))
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
    let id = space.id;
    match event {
        Event::Fault { .. } => {}
        // The content is about to go: nothing of the image may be installed there any more.
        Event::Remove { addresses } => {
            // REMOVE is reported for mapped addresses only, so shared memory that was moved from here must still be
            // mapped here.
            if shared.spaces().can_take_back(id, &addresses) {
                let change = Change::TakeBack { space: id, addresses: addresses.clone() };
                shared.change(change, None).map_err(full)?;
            }
            let spaces = shared.spaces();
            for region in spaces.overlapping(space, &addresses) {
                let pages = region.pages_in(&addresses);
                let keeps = region.is_shared() && keeps_content(shared, &region, &pages, calls, &addresses)?;
                if !keeps {
                    region.set_removed(pages.clone()).map_err(|error| full(error.into()))?;
                }
                if region.is_shared() && !keeps {
                    wake_mappings(&spaces, &region, &pages);
                }
            }
            shared.state.done(done);
            wake(space, &addresses);
        }
        Event::Unmap { addresses } => {
            let change = Change::Unmap { space: id, addresses: addresses.clone() };
            shared.change(change, Some(done)).map_err(full)?;
            wake(space, &addresses);
        }
        // An old size of 0: it is mapped in both places now.
        Event::Remap { from, to } if from.is_empty() => {
            let change = Change::MapAgain { space: id, from: from.start, to };
            shared.change(change, Some(done)).map_err(full)?;
        }
        // What is left at the old place with MREMAP_DONTUNMAP is zero, or the same if it is shared.
        Event::Remap { from, to } => {
            let moved = to..to + from.len();
            shared.change(Change::Move { space: id, from: from.clone(), to }, Some(done)).map_err(full)?;
            // It may have been moved before the session was attached, which registered it anew for tracking.
            for region in shared.spaces().overlapping(space, &moved) {
                if region.removals().is_some() {
                    let _ = space.uffd.register(region.address(0), region.len());
                }
            }
            wake(space, &from);
        }
        Event::Fork { child } => fork(shared, space, child, done).map_err(full)?,
        Event::Unknown { event } => return Err(format!("the kernel sent event {event:#x}, not asked for")),
    }
    shared.outcome.pages_changed();
    Ok(())
}

/// Adds the space of a child, whose userfaultfd came with its parent's event.
fn fork(shared: &Shared, parent: &Space, child: OwnedFd, done: usize) -> Result<(), StateError> {
    let child = parent.uffd.of_child(child);
    let id = shared.next_space_id();
    let child = Space::new(*id.as_ref().unwrap_or(&0), child, shared.state.answers());
    let child = Arc::new(child.forked(parent.id, processes::ticks()));
    let mut spaces = shared.spaces();
    let forked = id.and_then(|id| {
        Arc::make_mut(&mut spaces).fork(parent.id, Arc::clone(&child))?;
        // Where all pages have come the kernel empties them by itself.
        if shared.looks_at_children() && !spaces.is_final(id) {
            child.set_undecided();
        }
        let private = spaces.objects_of(id).filter(|(_, object)| !object.kind().is_shared);
        let tables = private.map(|(number, object)| (number, object.states().table_at())).collect();
        let record = Record::Fork { parent: parent.id, child: id, fd: child.uffd.number(), tables };
        shared.set_spaces(Arc::clone(&spaces), &record, Some(done))
    });
    if forked.is_err() {
        // Its message is not done: a successor takes it from there, and the descriptor must stay open.
        std::mem::forget(child);
    }
    forked
}

/// Whether shared memory keeps its content whose REMOVE event was read.
///
/// # Errors
/// If that cannot be known, and matters: where pages are absent.
fn keeps_content(
    shared: &Shared,
    region: &Region,
    pages: &Range<usize>,
    calls: Option<&[Call]>,
    addresses: &Range<usize>,
) -> Result<bool, String> {
    let known = calls.and_then(|calls| processes::keeps_content(calls, addresses));
    // It may have begun after the look before the reading; it goes on for a while.
    // Where it was ambiguous it stays so: who is there still is not who is meant.
    let seen = calls.is_some_and(|calls| processes::is_covered(calls, addresses));
    let look = || Some(shared.callers.as_ref()?.calls());
    let known = known.or_else(|| processes::keeps_content(&look().filter(|_| !seen)?, addresses));
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
pub(crate) fn wake_mappings(spaces: &Spaces, region: &Region, pages: &Range<usize>) {
    for (space, addresses) in spaces.mappings(region, pages) {
        wake(&space, &addresses);
    }
}

/// Has those who sleep on pages of the range look again: what they wait for will not come, or not there.
fn wake(space: &Space, addresses: &Range<usize>) {
    space.uffd.wake(addresses.start, addresses.len());
}
