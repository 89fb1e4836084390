//! Makes every way out of the pager (return, error, panic) safe: its drop poisons all unresolved
//! pages, and only then releases the regions. If a successor may take over and the session did not
//! end in order, the drop leaves everything unchanged.

use crate::install;
use crate::memory::{Change, Object, Region, Space};
use crate::pager::events;
use crate::pager::hold::Held;
use crate::pager::ready::HOLD_AFTER;
use crate::shared::Shared;
use crate::state_file::StateError;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// Poisoned regions, by space, address, length and object. The map keeps the regions, so that no
/// new object gets the address of a poisoned one.
type Done = HashMap<(u32, usize, usize, *const Object), Region>;

fn key(region: &Region) -> (u32, usize, usize, *const Object) {
    (region.space.id, region.address(0), region.len(), Arc::as_ptr(&region.object))
}

/// A bound above all addresses of a process.
const ADDRESSES: usize = 1 << 57;

/// The guard whose drop makes the session's memory safe.
#[derive(Debug)]
pub(crate) struct OnExit {
    pub(crate) shared: Arc<Shared>,
    /// False while the session is being opened: the opening thread also holds the descriptors.
    pub(crate) is_open: bool,
    pub(crate) in_order: bool,
    /// True if the pager was asked to leave everything to a successor.
    pub(crate) leaves: bool,
}

impl OnExit {
    /// Poisons the absent pages of all regions, also of processes that are forked meanwhile.
    /// Returns false if that is impossible.
    fn poison(&self, done: &mut Done) -> bool {
        let shared = &self.shared;
        loop {
            // Moved shared memory may still be mapped at its old address.
            if let Err(error) = take_all_back(shared) {
                shared.outcome.report(&error.to_string());
                return false;
            }
            let spaces = shared.spaces();
            let left: Vec<_> = spaces.regions().filter(|region| !done.contains_key(&key(region))).collect();
            if left.is_empty() {
                return true;
            }
            for region in left {
                let patience = shared.options.fault_deadline;
                let (started, mut held) = (Instant::now(), None);
                let poisoned = install::poison(&shared.map, &region, 0..region.pages(), patience, || {
                    if held.is_none() && started.elapsed() > HOLD_AFTER {
                        held = Held::hold_causers(shared);
                    }
                    self.read(&region.space);
                });
                self.let_go(held);
                if !poisoned {
                    shared.outcome.report(
                        "memory could not be poisoned at the session's end; faults on it stay pending",
                    );
                    return false;
                }
                done.insert(key(&region), region);
            }
            for space in spaces.spaces() {
                self.read(space);
            }
        }
    }

    /// Releases held threads. A thread stops only after the pager has read its event.
    fn let_go(&self, held: Option<Held>) {
        let Some(mut held) = held else { return };
        let started = Instant::now();
        while !held.release() && started.elapsed() < self.shared.options.fault_deadline {
            self.shared.spaces().spaces().for_each(|space| self.read(space));
            std::thread::yield_now();
        }
    }

    /// Reads a space's events. Faults are dropped, because poisoning wakes them.
    fn read(&self, space: &Arc<Space>) {
        let _ = events::read(&self.shared, space, &mut Vec::new());
    }
}

/// Takes back all moved shared memory that may still be mapped at its old address.
fn take_all_back(shared: &Shared) -> Result<(), StateError> {
    let all = 0..ADDRESSES;
    let ids: Vec<_> = shared.spaces().spaces().map(|space| space.id).collect();
    for id in ids {
        if shared.spaces().can_take_back(id, &all) {
            shared.change(Change::TakeBack { space: id, addresses: all.clone() }, None)?;
        }
    }
    Ok(())
}

impl Drop for OnExit {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.map.gate.close();
        if self.is_open && !self.in_order && !shared.outcome.has_session_failed() {
            shared.outcome.report("the pager panicked; stderr has the message");
        }
        if !self.in_order && (shared.has_successor() || self.leaves && shared.state.has_file()) {
            shared.leave_open();
            return shared.end();
        }
        if !self.is_open {
            return shared.end();
        }
        let mut done = Done::new();
        loop {
            if !self.poison(&mut done) {
                shared.leave_open();
                return shared.end();
            }
            let spaces = shared.spaces();
            for region in spaces.regions() {
                // Poison outlasts the registration. While the range is registered, an munmap blocks
                // until its event is read. UFFDIO_UNREGISTER waits for a fork that copies page
                // tables; the loop below reads its FORK event.
                let _ = region.space.uffd.unregister(region.address(0), region.len());
            }
            for space in spaces.spaces() {
                self.read(space);
            }
            if shared.spaces().regions().all(|region| done.contains_key(&key(&region))) {
                break;
            }
        }
        // No region is left for a successor.
        shared.state.end();
        shared.end();
    }
}
