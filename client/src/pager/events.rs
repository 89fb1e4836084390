//! The effects of a userfaultfd's events on a session's spaces, regions and page states.
//!
//! The causer of an event (madvise, munmap, mremap, fork) sleeps in the kernel until the event is
//! read, and while an event is unread the kernel answers every install with EAGAIN. So when the
//! pager, alone in the gate, has read all events and applied them, the page states match the page
//! tables. The exception are changes that a thread has made and not posted yet. Installs meet
//! EAGAIN for these, too, and their events may be read after those of later changes ([`Spaces`]).

use crate::memory::{Change, PageState, Region, Space, Spaces};
use crate::processes::{self, Call};
use crate::shared::Shared;
use crate::state_file::{MESSAGES, Record, StateError};
use crate::uffd::{self, Event};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The reason for which not all messages of a userfaultfd were read and applied.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) reason: String,
    /// True if there is no descriptor or memory for the event at the moment. The event stays in the
    /// queue, and its causer waits.
    pub(crate) may_pass: bool,
}

impl From<String> for Stopped {
    fn from(reason: String) -> Self {
        Self { reason, may_pass: false }
    }
}

/// The most readings of a space in a row. The causer of an event that is read can cause the next
/// one, so with many causers there is always another event.
pub(super) const READINGS: usize = 16;

/// Reads the messages of a space's userfaultfd, at most [`READINGS`] times [`MESSAGES`], and
/// applies the events. Drops the faults. The caller is alone in the gate.
///
/// # Errors
/// The reason for which reading has stopped.
pub(crate) fn read(shared: &Shared, space: &Arc<Space>) -> Result<(), Stopped> {
    for _ in 0..READINGS {
        if !read_some(shared, space, &mut Vec::new(), MESSAGES)? {
            break;
        }
    }
    Ok(())
}

/// Reads at most `most` messages of a space's userfaultfd, and applies the events. Adds each fault
/// to `faults`: its address, and true if the page is write-protected. Returns true if there may be
/// more. The caller is alone in the gate.
///
/// # Errors
/// The reason for which reading has stopped.
pub(crate) fn read_some(
    shared: &Shared,
    space: &Arc<Space>,
    faults: &mut Vec<(usize, bool)>,
    most: usize,
) -> Result<bool, Stopped> {
    let has_shared = shared.spaces().has_shared();
    let callers = shared.callers.as_ref().filter(|_| has_shared);
    let most = if has_shared { 1 } else { most };
    // The kind of a madvise on shared memory can be seen only before its event is read. So messages
    // are read one at a time, and while an event is under way, the threads in madvise are listed
    // before each. (Without an event, the next message is a fault. That fault can vanish, if its
    // page has just been installed, and an event can take its place: that may end the session, with
    // an error that names it.)
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
    // A fork's message for which there is no descriptor ends a reading early, and the next reading
    // reports the error.
    Ok(received > 0 && (received == most || space.uffd.tells_of_forks()))
}

fn stopped(error: std::io::Error) -> Stopped {
    Stopped { may_pass: uffd::may_pass(&error), reason: format!("a userfaultfd cannot be read: {error}") }
}

/// Applies an event, and notes that the first `done` of the received messages are applied. `calls`
/// are the madvise calls that were in progress before the event was read.
///
/// # Errors
/// The reason for which the session cannot continue.
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
        // The kernel is about to drop the content: no byte of the image may be installed there from
        // here on.
        Event::Remove { addresses } => {
            // REMOVE is reported for mapped addresses only, so shared memory that was moved from
            // here must still be mapped here. That region is restored first.
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
        // An mremap with an old size of 0 maps shared memory in a second place.
        Event::Remap { from, to } if from.is_empty() => {
            let change = Change::MapAgain { space: id, from: from.start, to };
            shared.change(change, Some(done)).map_err(full)?;
        }
        // After MREMAP_DONTUNMAP the old place reads zeros, or the same content if the memory is
        // shared.
        Event::Remap { from, to } => {
            let moved = to..to + from.len();
            shared.change(Change::Move { space: id, from: from.clone(), to }, Some(done)).map_err(full)?;
            // The memory may have moved before the session was attached, which registered the old
            // place for tracking. So the new place is registered here, too.
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

/// Adds the space of a child, whose userfaultfd arrived with its parent's event.
fn fork(shared: &Shared, parent: &Space, child: OwnedFd, done: usize) -> Result<(), StateError> {
    let child = parent.uffd.of_child(child);
    let id = shared.next_space_id();
    let child = Space::new(*id.as_ref().unwrap_or(&0), child, shared.state.answers());
    let child = Arc::new(child.forked(parent.id, processes::ticks()));
    let mut spaces = shared.spaces();
    let forked = id.and_then(|id| {
        Arc::make_mut(&mut spaces).fork(parent.id, Arc::clone(&child))?;
        // If all pages are resident or removed, the kernel itself empties what MADV_WIPEONFORK
        // covers.
        if shared.looks_at_children() && !spaces.is_final(id) {
            child.set_undecided();
        }
        let private = spaces.objects_of(id).filter(|(_, object)| !object.kind().is_shared);
        let tables = private.map(|(number, object)| (number, object.states().table_at())).collect();
        let record = Record::Fork { parent: parent.id, child: id, fd: child.uffd.number(), tables };
        shared.set_spaces(Arc::clone(&spaces), &record, Some(done))
    });
    if forked.is_err() {
        // The message is not noted as applied, so a successor takes the descriptor over, and it
        // must stay open.
        std::mem::forget(child);
    }
    forked
}

/// Returns true if shared memory whose REMOVE event was read keeps its content.
///
/// # Errors
/// The content is in doubt, and the pages include absent ones.
fn keeps_content(
    shared: &Shared,
    region: &Region,
    pages: &Range<usize>,
    calls: Option<&[Call]>,
    addresses: &Range<usize>,
) -> Result<bool, String> {
    let known = calls.and_then(|calls| processes::keeps_content(calls, addresses));
    // The call may have begun after the list was made, and lasts a while, so the threads are listed
    // again. If the first list was ambiguous, a second one is no help: a call that it still has
    // need not be the event's.
    let seen = calls.is_some_and(|calls| processes::is_covered(calls, addresses));
    let look = || Some(shared.callers.as_ref()?.calls());
    let known = known.or_else(|| processes::keeps_content(&look().filter(|_| !seen)?, addresses));
    // The next fault of a resident page shows if its content is still there.
    let matters = region.next_run(pages.clone(), &[PageState::Absent, PageState::Poisoned]).is_some();
    known.or((!matters).then_some(true)).ok_or_else(|| {
        let (start, end) = (addresses.start, addresses.end);
        format!(
            "shared memory at {start:#x} to {end:#x} was removed, and nothing shows whether its content stays"
        )
    })
}

/// Wakes the waiters for these pages in all of their mappings.
pub(crate) fn wake_mappings(spaces: &Spaces, region: &Region, pages: &Range<usize>) {
    for (space, addresses) in spaces.mappings(region, pages) {
        wake(&space, &addresses);
    }
}

/// Wakes the waiters in the range, so that they repeat their accesses: no install at these
/// addresses will wake them.
fn wake(space: &Space, addresses: &Range<usize>) {
    space.uffd.wake(addresses.start, addresses.len());
}
