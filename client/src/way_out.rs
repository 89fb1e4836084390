//! Makes every way out of the pager (return, error, panic) a safe one when it is dropped: what is unresolved is poisoned,
//! and only then are the regions let go of. Where a successor can come, and the end is none in order, all is left to it as
//! it is.

use crate::events;
use crate::install;
use crate::region::RegionState;
use crate::shared::Shared;
use crate::space::Space;
use std::collections::HashMap;
use std::sync::Arc;

/// Regions that are poisoned. Kept, so that none that comes has the address of one that is done.
type Done = HashMap<*const RegionState, Arc<RegionState>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct WayOut {
    pub(crate) shared: Arc<Shared>,
    /// Until then whoever opens the session has its descriptors, too.
    pub(crate) is_open: bool,
    pub(crate) in_order: bool,
    /// It was asked to leave all to whoever takes it over.
    pub(crate) leaves: bool,
}

impl WayOut {
    /// Poisons what is absent in all regions, also of processes that are forked meanwhile; false if that cannot be done.
    fn poison(&self, done: &mut Done) -> bool {
        let shared = &self.shared;
        loop {
            // Shared memory that was moved may be mapped at its old place still.
            let mut spaces = shared.spaces();
            Arc::make_mut(&mut spaces).take_all_back();
            if let Err(error) = shared.set_spaces(Arc::clone(&spaces), None) {
                shared.report(&error.to_string());
                return false;
            }
            let is_left = |region: &&Arc<RegionState>| !done.contains_key(&Arc::as_ptr(region));
            let left: Vec<_> = spaces.regions().iter().filter(is_left).cloned().collect();
            if left.is_empty() {
                return true;
            }
            for region in left {
                let patience = shared.options.fault_deadline;
                if !install::poison(&region, 0..region.pages(), patience, || self.read(&region.space)) {
                    shared.report("memory could not be made safe at the session's end; its faults wait");
                    return false;
                }
                done.insert(Arc::as_ptr(&region), region);
            }
            for space in spaces.spaces() {
                self.read(space);
            }
        }
    }

    /// Reads what a space has to tell. Faults are left: poisoning wakes them.
    fn read(&self, space: &Arc<Space>) {
        let _ = events::read(&self.shared, space, &mut Vec::new());
    }
}

impl Drop for WayOut {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.gate.close();
        if self.is_open && !self.in_order && shared.error().is_none() {
            shared.report("the pager has failed (a panic, which was printed)");
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
            if shared.spaces().regions().iter().all(|region| done.contains_key(&Arc::as_ptr(region))) {
                break;
            }
        }
        // Only now nobody has anything to do here any more.
        shared.state.end();
        shared.end();
    }
}
