//! Makes every way out of the pager (return, error, panic) safe: its drop poisons all unresolved
//! pages, and only then releases the regions. If a successor may take over and the session did not
//! end in order, the drop leaves everything unchanged.

use crate::install;
use crate::memory::{Change, Object, Region, Space};
use crate::pager::events;
use crate::pager::hold::Held;
use crate::shared::Shared;
use crate::state_file::StateError;
use crate::uffd::Uffd;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Poisoned regions, by space, addresses, object and its page. The map keeps the regions, so that
/// no new object gets the address of a poisoned one.
type Done = HashMap<Key, Region>;

type Key = (u32, Range<usize>, *const Object, usize);

fn key(region: &Region) -> Key {
    let first_page = region.file_pages(0..region.pages()).start;
    (region.space.id, region.addresses(), Arc::as_ptr(&region.object), first_page)
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
    fn poison(&self, done: &mut Done, held: &mut Held) -> bool {
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
                let poisoned = install::poison(&shared.map, &region, 0..region.pages(), patience, || {
                    held.hold_causers(shared);
                    self.read(&region.space);
                });
                if !poisoned {
                    shared.outcome.report(
                        "memory could not be poisoned at the session's end; faults on it stay pending",
                    );
                    return false;
                }
                // Memory that an event has moved meanwhile is poisoned at its new address.
                if region.space.is_gone() || shared.spaces().holds(&region) {
                    done.insert(key(&region), region);
                }
            }
            for space in spaces.spaces() {
                self.read(space);
            }
        }
    }

    /// Unregisters all regions. Poison outlasts the registration. While a range is registered, an
    /// munmap blocks until its event is read. Returns false if an event was under way: only the
    /// event tells where a thread in mremap has moved memory, and with it the registration.
    fn unregister(&self) -> bool {
        let spaces = self.shared.spaces();
        for region in spaces.regions() {
            // UFFDIO_UNREGISTER waits for a fork that copies page tables; its FORK event follows.
            let _ = region.space.uffd.unregister(region.address(0), region.len());
        }
        let is_quiet =
            |uffd: &Uffd| uffd.is_owner_gone() || !uffd.has_event() && !uffd.is_readable().unwrap_or(false);
        spaces.spaces().all(|space| is_quiet(&space.uffd))
    }

    /// Releases held threads. A thread stops only after the pager has read its event.
    fn let_go(&self, mut held: Held) {
        let started = Instant::now();
        while !held.release() && started.elapsed() < self.shared.options.fault_deadline {
            self.shared.spaces().spaces().for_each(|space| self.read(space));
            std::thread::yield_now();
        }
    }

    /// Reads a space's events. Faults are dropped, because poisoning wakes them.
    fn read(&self, space: &Arc<Space>) {
        let _ = events::read(&self.shared, space);
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
        // Threads stay held until the end: one that moves memory without a pause would move it
        // between two steps.
        let (mut done, mut held, started) = (Done::new(), Held::new(), Instant::now());
        let is_safe = loop {
            if !self.poison(&mut done, &mut held) {
                break false;
            }
            if self.unregister() {
                break true;
            }
            if started.elapsed() > shared.options.fault_deadline {
                shared.outcome.report("memory that moves stays registered at the session's end");
                break false;
            }
            held.hold_causers(shared);
            shared.spaces().spaces().for_each(|space| self.read(space));
        };
        self.let_go(held);
        if !is_safe {
            shared.leave_open();
            return shared.end();
        }
        // No region is left for a successor.
        shared.state.end();
        shared.end();
    }
}
