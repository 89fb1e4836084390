//! Deadlines and losses: the pager carries out the loss policy for waiters whose page does not
//! arrive.

use super::hold::Held;
use super::ready::Obstacle;
use super::requests::{LOST_RETRY, Waiting};
use super::waiters::{Key, Wait, Waiter, Waiters};
use super::{Pager, TICK};
use crate::install;
use crate::memory::{PageState, Region, Space};
use crate::options::LossPolicy;
use crate::outcome::{FailureEnd, FailureKind};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The number of waiters above which the pager drops those that an installer has resolved.
const MANY: usize = 4096;

impl Pager {
    /// Handles the waiters whose deadline is over, and requests that are due again.
    pub(super) fn check_deadlines(&mut self) {
        let now = Instant::now();
        for (key, waiter) in self.waiters.due(now) {
            if !self.still_waits(key, &waiter) {
                self.waiters.remove(key);
                // Another mapping of the memory may have got the page.
                waiter.space.wake(&self.page_at(&waiter.space, key.1));
                continue;
            }
            match waiter.wait {
                Wait::Fault => {
                    self.waiters.woken(key, now);
                    let page = self.page_at(&waiter.space, key.1);
                    waiter.space.wake(&page);
                }
                // Its thread has not faulted again: a signal took it elsewhere, or it is stopped.
                Wait::Woken => self.waiters.remove(key),
                Wait::Call => self.lose_waiter(key, waiter),
            }
        }
        if self.waiters.len() > MANY {
            let mut waiters = std::mem::replace(&mut self.waiters, Waiters::new(Duration::ZERO));
            waiters.retain(|key, waiter| self.still_waits(key, waiter));
            self.waiters = waiters;
        }
        self.look_at_requests(now);
        self.look_at_failures();
    }

    /// Repeats requests that were put off, and forgets those without waiters.
    fn look_at_requests(&mut self, now: Instant) {
        let shared = Arc::clone(&self.on_exit.shared);
        let waiters = &self.waiters;
        let has_waiters = |chunk| {
            let of_chunk = shared.of_chunk(chunk);
            of_chunk.iter().any(|region| waiters.has(&region.space, &whole_chunk(region, chunk)))
        };
        let waits =
            |(region, page): &Waiting| waiters.has(&region.space, &region.kernel_page_addresses(*page));
        self.requests.look(now, shared.options.fault_deadline, has_waiters, waits);
    }

    /// Ends failures without waiters.
    fn look_at_failures(&mut self) {
        let shared = Arc::clone(&self.on_exit.shared);
        for kind in shared.outcome.open() {
            let goes_on = match kind {
                FailureKind::Chunk { chunk } => {
                    let chunk = ChunkIndex(chunk);
                    let has_waiters =
                        |region: &Region| self.waiters.has(&region.space, &whole_chunk(region, chunk));
                    self.requests.has_chunk(chunk) && shared.of_chunk(chunk).iter().any(has_waiters)
                }
                FailureKind::Segment { segment } => !self.requests.pages_of_segment(segment).is_empty(),
                FailureKind::Page { address } => {
                    shared.spaces().spaces().any(|space| self.waiters.has(space, &(address..address + 1)))
                }
                FailureKind::Fill | FailureKind::Recording | FailureKind::Session => true,
            };
            if !goes_on {
                shared.outcome.recovered(&kind);
            }
        }
    }

    /// Returns whether the page of a waiter is still absent, or its fault deferred.
    fn still_waits(&self, key: Key, waiter: &Waiter) -> bool {
        let spaces = self.shared().spaces();
        if waiter.space.is_gone() {
            return false;
        }
        let is_absent = |(region, page): (Region, usize)| {
            region.next_run(region.extend_to_kernel_pages(&(page..page + 1)), &[PageState::Absent]).is_some()
        };
        spaces.at(&waiter.space, key.1).is_some_and(is_absent) || self.ready.obstacle(key).is_some()
    }

    /// Returns the addresses of the page at an address, which may be one of 2 MiB.
    fn page_at(&self, space: &Space, address: usize) -> Range<usize> {
        let at = self.shared().spaces().at(space, address);
        at.map_or(address..address + PAGE_BYTES, |(region, page)| region.kernel_page_addresses(page))
    }

    /// Carries out the loss policy for a page fault whose thread was woken at its deadline, and
    /// that faults again.
    pub(super) fn fault_came_back(&mut self, space: &Arc<Space>, address: usize) {
        if !self.waiters.has_woken() {
            return;
        }
        let address = self.page_at(space, address).start;
        let waiter =
            self.waiters.get((space.id, address)).filter(|waiter| waiter.wait == Wait::Woken).cloned();
        if let Some(waiter) = waiter
            && self.still_waits((space.id, address), &waiter)
        {
            self.lose_waiter((space.id, address), waiter);
        }
    }

    /// Carries out the loss policy for a waiter.
    fn lose_waiter(&mut self, key: Key, waiter: Waiter) {
        let (kind, reason) = self.why(key, &waiter);
        self.lose_waiters(vec![(key, waiter)], kind, &reason);
    }

    /// Returns the failure that keeps a page from being installed, and the reason.
    fn why(&self, key: Key, waiter: &Waiter) -> (FailureKind, String) {
        let shared = self.shared();
        let deadline = shared.options.fault_deadline;
        let (image, server, address) = (shared.image.digest(), &shared.address, key.1);
        let of_page = |reason: &str| {
            let reason = format!("the page at {address:#x}: {reason} for {deadline:?}");
            (FailureKind::Page { address }, reason)
        };
        match (self.ready.obstacle(key), waiter.space.unexpected()) {
            (Some(Obstacle::Memory), Some(error)) => {
                return of_page(&format!("the kernel refused the install ({error})"));
            }
            (Some(Obstacle::Memory), None) => return of_page("the kernel had no memory"),
            (Some(Obstacle::Event), _) => return of_page("its process caused events without a pause"),
            (Some(Obstacle::Fill), _) => return of_page("the background fill did not bring it"),
            (None, _) => {}
        }
        let Some((region, page)) = shared.spaces().at(&waiter.space, address) else {
            return of_page("it is in no region");
        };
        let late = || self.late_reason();
        let whole = region.extend_to_kernel_pages(&(page..page + 1));
        let mut chunks = whole.clone().map(|page| region.chunk_of(page));
        if let Some(chunk) = chunks.find(|chunk| self.requests.has_chunk(*chunk)) {
            let reason = self.requests.chunk_reason(chunk).unwrap_or_else(late);
            let kind = FailureKind::Chunk { chunk: chunk.0 };
            return (kind, format!("chunk {chunk} of image {image} from {server}: {reason}"));
        }
        let addresses = region.address(whole.start)..region.address(whole.end);
        if let Some((segment, reason)) = self.requests.segment_of(waiter.space.id, &addresses) {
            let reason = reason.unwrap_or_else(late);
            let kind = FailureKind::Segment { segment };
            return (kind, format!("segment {segment} of image {image} from {server}: {reason}"));
        }
        of_page("it was not installed")
    }

    /// Reports that the pages of waiters are lost, and carries out the loss policy.
    fn lose_waiters(&mut self, waiters: Vec<(Key, Waiter)>, kind: FailureKind, reason: &str) {
        let shared = Arc::clone(&self.on_exit.shared);
        let policy = shared.options.on_loss;
        shared.state.count_losses(waiters.len());
        let is_signalled = self.signal_waiters(&waiters, policy);
        // Before poison: a program that sees the poison must find the reason.
        shared.outcome.add(kind.clone(), reason, None);
        let mut end = match policy {
            LossPolicy::Wait => None,
            LossPolicy::Poison => Some(FailureEnd::Poisoned),
            LossPolicy::Kill => Some(FailureEnd::Killed),
            LossPolicy::Pause => Some(FailureEnd::Paused),
        };
        for (key, waiter) in waiters {
            let is_dealt_with = policy == LossPolicy::Wait || is_signalled.contains(&key.0);
            if !is_dealt_with {
                end = Some(FailureEnd::Poisoned);
                self.poison_waiter(key, &waiter);
            }
            if is_dealt_with && policy != LossPolicy::Kill {
                self.waiters.again(key, Instant::now() + LOST_RETRY);
            } else {
                self.waiters.remove(key);
            }
        }
        if let Some(end) = end {
            shared.outcome.add(kind.clone(), reason, Some(end));
        }
        match kind {
            FailureKind::Chunk { chunk } => self.requests.chunk_later(ChunkIndex(chunk), Instant::now()),
            FailureKind::Segment { segment } => self.requests.segment_later(segment, Instant::now()),
            _ => {}
        }
        self.look_at_requests(Instant::now());
        shared.outcome.pages_changed();
    }

    /// Signals the processes of these waiters under `Kill` and `Pause`. Returns the spaces whose
    /// process is known.
    fn signal_waiters(&self, waiters: &[(Key, Waiter)], policy: LossPolicy) -> BTreeSet<u32> {
        if !matches!(policy, LossPolicy::Kill | LossPolicy::Pause) {
            return BTreeSet::new();
        }
        let spaces: BTreeMap<u32, &Arc<Space>> =
            waiters.iter().map(|((space, _), waiter)| (*space, &waiter.space)).collect();
        spaces.into_iter().filter(|(_, space)| self.signal(space, policy)).map(|(id, _)| id).collect()
    }

    /// Kills or stops the process of a space. Returns false if that process is not known for
    /// certain.
    fn signal(&self, space: &Arc<Space>, policy: LossPolicy) -> bool {
        if !self.is_foreign {
            use nix::sys::signal::{
                Signal::{SIGKILL, SIGSTOP},
                raise,
            };
            // To this thread: a stop takes effect before another thread learns of the loss.
            return raise(if policy == LossPolicy::Kill { SIGKILL } else { SIGSTOP }).is_ok();
        }
        let signal = if policy == LossPolicy::Kill { Signal::KILL } else { Signal::STOP };
        if space.process().is_none() {
            for space in self.forks.identify(&self.shared().spaces()) {
                self.note_process(&space);
            }
        }
        space.process().is_some_and(|process| process.signal(signal))
    }

    /// Keeps the process of a child that was identified for a successor.
    pub(super) fn note_process(&self, space: &Space) {
        if let Some(process) = space.process() {
            self.shared().note_process(space.id, process);
        }
    }

    fn poison_waiter(&mut self, key: Key, waiter: &Waiter) {
        match self.shared().spaces().at(&waiter.space, key.1) {
            Some((region, page))
                if region
                    .next_run(region.extend_to_kernel_pages(&(page..page + 1)), &[PageState::Absent])
                    .is_some() =>
            {
                // The whole chunk: its other pages are lost for the same reason.
                match region.gathering() {
                    Some(_) => self.poison(&region, region.extend_to_kernel_pages(&(page..page + 1))),
                    None => self.poison_chunk(&region, region.chunk_of(page)),
                }
            }
            // The page stays removed: image content must not appear there.
            at => {
                let page = key.1..key.1 + PAGE_BYTES;
                let page = at.map_or(page, |(region, page)| region.kernel_page_addresses(page));
                let _ = waiter.space.uffd.poison(page.start, page.len());
                waiter.space.wake(&page);
            }
        }
    }

    /// Loses the waiters of a chunk that the server cannot deliver.
    pub(super) fn lose(&mut self, chunk: ChunkIndex, reason: &str) {
        let shared = Arc::clone(&self.on_exit.shared);
        let mut lost = Vec::new();
        for region in shared.of_chunk(chunk) {
            let waiters = self.waiters.at(&region.space, &whole_chunk(&region, chunk));
            lost.extend(waiters.into_iter().map(|(address, waiter)| ((region.space.id, address), waiter)));
        }
        lost.retain(|(key, waiter)| self.still_waits(*key, waiter));
        if lost.is_empty() {
            return self.requests.chunk_done(chunk);
        }
        let reason =
            format!("chunk {chunk} of image {} from {}: {reason}", shared.image.digest(), shared.address);
        self.lose_waiters(lost, FailureKind::Chunk { chunk: chunk.0 }, &reason);
    }

    /// Loses the waiters of a segment that the server cannot deliver.
    pub(super) fn lose_segment(&mut self, segment: u32, reason: &str) {
        let shared = Arc::clone(&self.on_exit.shared);
        let mut lost = Vec::new();
        for (region, page) in self.requests.pages_of_segment(segment) {
            let waiters = self.waiters.at(&region.space, &region.kernel_page_addresses(page));
            lost.extend(waiters.into_iter().map(|(address, waiter)| ((region.space.id, address), waiter)));
        }
        lost.retain(|(key, waiter)| self.still_waits(*key, waiter));
        if lost.is_empty() {
            drop(self.requests.segment_done(segment));
            return;
        }
        let image = shared.image.digest();
        let reason = format!("segment {segment} of image {image} from {}: {reason}", shared.address);
        self.lose_waiters(lost, FailureKind::Segment { segment }, &reason);
    }

    pub(super) fn poison_chunk(&mut self, region: &Region, chunk: ChunkIndex) {
        if let Some(pages) = region.pages_of_chunk(chunk) {
            self.poison(region, region.extend_to_kernel_pages(&pages));
        }
    }

    pub(super) fn poison(&mut self, region: &Region, pages: Range<usize>) {
        let shared = Arc::clone(&self.on_exit.shared);
        let patience = shared.options.fault_deadline;
        let mut held = Held::new();
        let addresses = region.address(pages.start)..region.address(pages.end);
        let poisoned = install::poison(&shared.map, region, pages, patience, || {
            held.hold_causers(&shared);
            // While installers are in the gate, the next attempt follows when they have left; new
            // ones wait.
            let Some(_pass) = shared.map.gate.try_enter_alone() else { return };
            if let Err(stopped) = self.read(&region.space)
                && !stopped.may_pass
            {
                self.broken.get_or_insert(stopped.reason);
            }
        });
        shared.map.gate.stop_waiting();
        self.let_go(held);
        if !poisoned {
            shared.outcome.report("a lost page could not be poisoned; its faults wait");
            // They fault again, and each fault on a page of this state poisons it again.
            region.space.wake(&addresses);
        }
        self.faults();
    }

    /// Extends all deadlines by the time in which this thread did not run (SIGSTOP, a suspended
    /// machine): the answer may lie in its socket. A tick was due at `due`.
    pub(super) fn extend_deadlines(&mut self, due: Instant) {
        let late = due.elapsed();
        if late > TICK {
            self.waiters.extend_deadlines(late);
        }
    }

    pub(super) fn late_reason(&self) -> String {
        let deadline = self.shared().options.fault_deadline;
        let state = match (&self.lane, &self.lane_error) {
            (_, Some(error)) => format!("not reachable ({error})"),
            (Ok(_), None) => "connected".to_owned(),
            (Err(_), None) => "not reachable".to_owned(),
        };
        format!("no answer within {deadline:?}; the server is {state}")
    }
}

/// Returns the addresses of a region's pages of a chunk, extended to whole pages of 2 MiB for huge
/// pages.
fn whole_chunk(region: &Region, chunk: ChunkIndex) -> Range<usize> {
    let pages = region.pages_of_chunk(chunk).map_or(0..0, |pages| region.extend_to_kernel_pages(&pages));
    region.address(pages.start)..region.address(pages.end)
}
