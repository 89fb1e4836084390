//! What becomes of faults that cannot be answered.

use super::ready::{HOLD_AFTER, Obstacle};
use super::{Pager, TICK};
use crate::install;
use crate::memory::{PageState, Region, Space};
use crate::requests::Late;
use crate::session::LossPolicy;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// What becomes of a fault that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Poison,
    Wait,
}

impl Pager {
    /// What becomes of a fault that is lost. Who is killed or stopped is so now.
    pub(super) fn fate(&self) -> Fate {
        use rustix::process::Signal;
        let shared = self.shared();
        crate::shared::add(&shared.counters.losses, 1);
        match shared.options.on_loss {
            LossPolicy::Poison => return Fate::Poison,
            LossPolicy::Wait => {}
            LossPolicy::Kill => self.signal(Signal::KILL),
            LossPolicy::Pause => self.signal(Signal::STOP),
        }
        Fate::Wait
    }

    /// Sends a signal to the memory's owner and its children, or to this process where the memory is its own.
    fn signal(&self, signal: rustix::process::Signal) {
        if self.is_foreign {
            self.shared().signal_owners(signal);
        } else {
            // Cannot fail.
            let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        }
    }

    /// A chunk cannot be had: reports it, and does with its faults what the loss policy says.
    pub(super) fn lose(&mut self, chunk: ChunkIndex, reason: &str) {
        let shared = Arc::clone(&self.way_out.shared);
        let image = shared.image.digest();
        shared.report(&format!("chunk {chunk} of image {image} from {}: {reason}", shared.address));
        match self.fate() {
            Fate::Poison => {
                self.requests.chunk_done(chunk);
                for region in shared.of_chunk(chunk) {
                    self.poison_chunk(&region, chunk);
                }
            }
            Fate::Wait => self.requests.chunk_later(chunk, Instant::now()),
        }
        shared.pages_changed();
    }

    pub(super) fn lose_segment(&mut self, index: u32, reason: &str) {
        let shared = Arc::clone(&self.way_out.shared);
        let image = shared.image.digest();
        shared.report(&format!("segment {index} of image {image} from {}: {reason}", shared.address));
        match self.fate() {
            Fate::Poison => {
                for (region, page) in self.requests.segment_done(index) {
                    // The whole chunk, as when a chunk is lost: one page stands for all that were asked for.
                    self.poison_chunk(&region, region.chunk_of(page));
                }
            }
            Fate::Wait => self.requests.segment_later(index, Instant::now()),
        }
        shared.pages_changed();
    }

    /// A fault could not be answered for as long as it may take, because of this.
    pub(super) fn lose_page(&mut self, space: &Arc<Space>, address: usize, obstacle: Obstacle) {
        let shared = Arc::clone(&self.way_out.shared);
        let deadline = shared.options.fault_deadline;
        let reason = match (obstacle, space.unexpected()) {
            (Obstacle::Memory, Some(error)) => format!("the kernel refused the install ({error})"),
            (Obstacle::Memory, None) => "the kernel had no memory".to_owned(),
            (Obstacle::Event, _) => "its process caused events without a pause".to_owned(),
            (Obstacle::Fill, _) => "the background fill did not bring it".to_owned(),
        };
        shared.report(&format!("the page at {address:#x}: {reason} for {deadline:?}"));
        if self.fate() == Fate::Wait {
            return self.defer(space, address, obstacle);
        }
        match shared.spaces().at(space, address) {
            Some((region, page)) if region.state(page) == PageState::Absent => {
                self.poison(&region, region.whole(&(page..page + 1)));
            }
            // It stays removed: nothing of the image may come there.
            other => {
                let page = address..address + PAGE_BYTES;
                let page = other.map_or(page, |(region, page)| region.whole_addresses(page));
                let _ = space.uffd.poison(page.start, page.len());
                space.uffd.wake(page.start, page.len());
            }
        }
    }

    pub(super) fn poison_chunk(&mut self, region: &Region, chunk: ChunkIndex) {
        if let Some(pages) = region.pages_of(chunk) {
            self.poison(region, region.whole(&pages));
        }
    }

    pub(super) fn poison(&mut self, region: &Region, pages: Range<usize>) {
        let shared = Arc::clone(&self.way_out.shared);
        let patience = shared.options.fault_deadline;
        let (started, mut held) = (Instant::now(), None);
        let poisoned = install::poison(&shared.map, region, pages, patience, || {
            if held.is_none() && started.elapsed() > HOLD_AFTER {
                held = self.hold_causers();
            }
            // Where installers are inside, the next attempt comes when they have left: new ones wait.
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
            shared.report("a lost page could not be poisoned; its faults wait");
        }
        self.faults();
    }

    /// Extends all deadlines by the time that this thread did not run in (SIGSTOP, a suspended machine): the answer may
    /// lie in its socket. A tick was due at `due`.
    pub(super) fn extend_deadlines(&mut self, due: Instant) {
        let late = due.elapsed();
        if late > TICK {
            self.requests.extend_deadlines(late);
            self.ready.extend_deadlines(late);
        }
    }

    pub(super) fn check_deadlines(&mut self) {
        let Late { chunks, segments } = self.requests.late(Instant::now());
        if chunks.is_empty() && segments.is_empty() {
            return;
        }
        let reason = self.late_reason();
        for (chunk, said) in chunks {
            self.lose(chunk, said.as_deref().unwrap_or(&reason));
        }
        for (index, said) in segments {
            self.lose_segment(index, said.as_deref().unwrap_or(&reason));
        }
    }

    pub(super) fn late_reason(&self) -> String {
        let deadline = self.shared().options.fault_deadline;
        let state = if self.lane.is_ok() { "connected" } else { "not reachable" };
        format!("no answer within {deadline:?}; the server is {state}")
    }
}
