//! Makes every way out of the pager (return, error, panic) a safe one when it is dropped: what is unresolved is poisoned,
//! and only then are the regions let go of. Where a successor can come, and the end is none in order, all is left to it as
//! it is.

use crate::install;
use crate::memory::{Change, Object, Region, Space};
use crate::pager::events;
use crate::pager::hold::Held;
use crate::shared::Shared;
use crate::state_file::StateError;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Regions that are poisoned, by space, address, length and object: kept, so that no object that comes has the address
/// of one that is done.
type Done = HashMap<(u32, usize, usize, *const Object), Region>;

fn key(region: &Region) -> (u32, usize, usize, *const Object) {
    (region.space.id, region.address(0), region.len(), Arc::as_ptr(&region.object))
}

/// How long poison and events take turns before the causers of events are held, as in the pager.
const HOLD_AFTER: Duration = Duration::from_millis(3);
/// Beyond all addresses that a process has.
const ADDRESSES: usize = 1 << 57;

/// See the module.
#[derive(Debug)]
pub(crate) struct OnExit {
    pub(crate) shared: Arc<Shared>,
    /// Until then whoever opens the session has its descriptors, too.
    pub(crate) is_open: bool,
    pub(crate) in_order: bool,
    /// It was asked to leave all to whoever takes it over.
    pub(crate) leaves: bool,
}

impl OnExit {
    /// Poisons what is absent in all regions, also of processes that are forked meanwhile; false if that cannot be done.
    fn poison(&self, done: &mut Done) -> bool {
        let shared = &self.shared;
        loop {
            // Shared memory that was moved may be mapped at its old place still.
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
                    shared
                        .outcome
                        .report("memory could not be made safe at the session's end; its faults wait");
                    return false;
                }
                done.insert(key(&region), region);
            }
            for space in spaces.spaces() {
                self.read(space);
            }
        }
    }

    /// Lets threads go that were held: they stop when their events are read.
    fn let_go(&self, held: Option<Held>) {
        let Some(mut held) = held else { return };
        let started = Instant::now();
        while !held.release() && started.elapsed() < self.shared.options.fault_deadline {
            self.shared.spaces().spaces().for_each(|space| self.read(space));
            std::thread::yield_now();
        }
    }

    /// Reads what a space has to tell. Faults are left: poisoning wakes them.
    fn read(&self, space: &Arc<Space>) {
        let _ = events::read(&self.shared, space, &mut Vec::new());
    }
}

/// Takes all shared memory back that was moved and may be mapped at its old place still.
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
        if self.is_open && !self.in_order && shared.outcome.error().is_none() {
            shared.outcome.report("the pager has failed (a panic, which was printed)");
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
                // Poison stays. Without this an munmap would wait for somebody to read its event. It waits for a fork that
                // is copying, whose child is told of after it.
                let _ = region.space.uffd.unregister(region.address(0), region.len());
            }
            for space in spaces.spaces() {
                self.read(space);
            }
            if shared.spaces().regions().all(|region| done.contains_key(&key(&region))) {
                break;
            }
        }
        // Only now nobody has anything to do here any more.
        shared.state.end();
        shared.end();
    }
}
