//! The answer to a page fault: a request, or an install that can be done at once.

use super::ready::Obstacle;
use super::waiters::Wait;
use super::{NEAR, Pager};
use crate::install::Installed;
use crate::install::chunk::decode;
use crate::install::huge;
use crate::memory::{Change, PageState, Region, Space};
use crate::outcome::{FailureEnd, FailureKind};
use crate::pager::events;
use crate::record::trace::{Cause, Stages};
use crate::remote::Content;
use crate::uffd::{HUGE_BYTES, Outcome, SharedAt};
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::sync::Arc;
use tokio::time::Instant;

impl Pager {
    pub(super) fn faults(&mut self) {
        let mut faults = std::mem::take(&mut self.faults);
        for (space, address, is_protected) in faults.drain(..) {
            match is_protected {
                true => self.first_write(&space, address),
                false => {
                    self.trace_touch(&space, address);
                    self.fault_came_back(&space, address);
                    self.fault(&space, address);
                }
            }
        }
        // The buffer is reused; poisoning may have read more faults meanwhile.
        faults.append(&mut self.faults);
        self.faults = faults;
    }

    fn trace_touch(&self, space: &Space, address: usize) {
        let shared = self.shared();
        if let Some(trace) = &shared.trace
            && let Some((region, page)) = shared.spaces().at(space, address)
            && region
                .next_run(region.extend_to_kernel_pages(&(page..page + 1)), &[PageState::Absent])
                .is_some()
        {
            trace.touched(&shared.image, &region, page);
        }
    }

    /// Answers a page fault, or requests its page.
    pub(super) fn fault(&mut self, space: &Arc<Space>, address: usize) {
        let spaces = self.shared().spaces();
        let Some((region, page)) = spaces.at(space, address) else {
            return self.fault_outside(space, address);
        };
        // A page of 2 MiB may have removed parts beside absent ones.
        let absent = region.next_run(region.extend_to_kernel_pages(&(page..page + 1)), &[PageState::Absent]);
        match absent.map_or_else(|| region.state(page), |_| PageState::Absent) {
            PageState::Absent => {
                if let Some(recorder) = &self.shared().recorder {
                    recorder.touched(
                        &self.shared().image,
                        &region,
                        region.extend_to_kernel_pages(&(page..page + 1)),
                    );
                }
                let at = region.kernel_page_addresses(page).start;
                self.waiters.add(space, at, Wait::Fault, Instant::now());
                self.ask(&region, page);
            }
            // A resident page was installed since the fault, for another thread, and this fault's
            // thread is woken. If it is not in the page tables, its owner dropped it without an
            // event, and it reads zeros, too.
            PageState::Removed | PageState::Resident if region.gathering().is_some() => {
                self.zero_huge(&region, page);
            }
            PageState::Removed | PageState::Resident => self.zero(space, address),
            PageState::Poisoned => {
                let addresses = region.kernel_page_addresses(page);
                match space.uffd.poison(addresses.start, addresses.len()) {
                    Outcome::Deferred => self.defer(space, address, Obstacle::Event),
                    Outcome::NoMemory | Outcome::Unexpected { .. } => {
                        self.defer(space, address, Obstacle::Memory)
                    }
                    _ => space.uffd.wake(addresses.start, addresses.len()),
                }
            }
        }
    }

    /// Answers the first write to a write-protected page: removes the protection, by which the page
    /// tables note the write.
    pub(super) fn first_write(&mut self, space: &Arc<Space>, address: usize) {
        let spaces = self.shared().spaces();
        let page = spaces.at(space, address).map(|(region, page)| region.kernel_page_addresses(page));
        let page = page.unwrap_or(address..address + PAGE_BYTES);
        match space.uffd.unprotect(page.clone()) {
            Outcome::OwnerGone => space.set_gone(),
            // A retry as a page fault finds the page present and wakes its waiters. The write then
            // sends its message again.
            Outcome::Deferred => self.defer(space, address, Obstacle::Event),
            _ => space.uffd.wake(page.start, page.len()),
        }
    }

    /// Answers a fault in memory of no region: memory that a region has left or grown by, or that
    /// is no longer mapped.
    pub(super) fn fault_outside(&mut self, space: &Arc<Space>, address: usize) {
        let spaces = self.shared().spaces();
        let page = address..address + PAGE_BYTES;
        if !spaces.can_take_back(space.id, &page) {
            if !spaces.has_shared() {
                return self.zero(space, address);
            }
            let page_bytes = if spaces.has_huge() { HUGE_BYTES } else { PAGE_BYTES };
            return match space.uffd.shared_at(address, page_bytes) {
                SharedAt::Private => self.zero(space, address),
                SharedAt::Absent => self.lose_outside(space, address),
                SharedAt::There => space.uffd.wake(address, PAGE_BYTES),
                SharedAt::NotNow => self.defer(space, address, Obstacle::Event),
            };
        }
        self.change(Change::TakeBack { space: space.id, addresses: page });
        if self.broken.is_some() {
            return;
        }
        // The fault is looked up only once more: if other memory is mapped there, nothing was taken
        // back.
        match self.shared().spaces().at(space, address) {
            Some(_) => self.fault(space, address),
            None => self.zero(space, address),
        }
    }

    /// Poisons a page by which shared memory has grown and which the session does not know. Zeros
    /// there would be visible to all processes that map it.
    pub(super) fn lose_outside(&mut self, space: &Arc<Space>, address: usize) {
        let shared = Arc::clone(&self.on_exit.shared);
        let reason = format!("shared memory at {address:#x} is beyond what the session was told of");
        shared.outcome.add(FailureKind::Page { address }, &reason, Some(FailureEnd::Poisoned));
        match space.uffd.poison(address, PAGE_BYTES) {
            Outcome::Deferred => return self.defer(space, address, Obstacle::Event),
            Outcome::NoMemory | Outcome::Unexpected { .. } => {
                return self.defer(space, address, Obstacle::Memory);
            }
            Outcome::Gone => {
                if let Some(first) = self.huge_outside(space, address) {
                    let _ = space.uffd.poison(first, HUGE_BYTES);
                }
            }
            _ => {}
        }
        space.uffd.wake(address, PAGE_BYTES);
    }

    /// Installs a zero page at an address that belongs to no region.
    pub(super) fn zero(&mut self, space: &Arc<Space>, address: usize) {
        match space.counted(space.uffd.zero(address, PAGE_BYTES)) {
            Outcome::Done | Outcome::Partial { .. } => {}
            Outcome::OwnerGone => space.set_gone(),
            Outcome::AlreadyPresent => {
                // Or a write-protect mark is in the way, which a child has inherited from tracked
                // memory.
                if self.shared().options.track_writes && !space.uffd.tracks() {
                    let _ = space.uffd.unprotect(address..address + PAGE_BYTES);
                }
                space.uffd.wake(address, PAGE_BYTES);
            }
            Outcome::Gone => {
                if let Some(first) = self.huge_outside(space, address) {
                    let _ = space.counted(space.uffd.copy(first, &huge::ZEROS));
                }
                space.uffd.wake(address, PAGE_BYTES);
            }
            Outcome::Deferred => self.defer(space, address, Obstacle::Event),
            Outcome::NoMemory | Outcome::Unexpected { .. } => self.defer(space, address, Obstacle::Memory),
        }
    }

    /// Returns the page of 2 MiB that may be at an address of no region. Where memory with such
    /// pages was moved from or has grown, the kernel takes whole pages only.
    pub(super) fn huge_outside(&self, space: &Space, address: usize) -> Option<usize> {
        let spaces = self.shared().spaces();
        let first = address - address % HUGE_BYTES;
        let is_free = spaces.overlapping(space, &(first..first + HUGE_BYTES)).is_empty();
        (spaces.has_huge() && is_free).then_some(first)
    }

    /// Installs zeros for a page of 2 MiB.
    pub(super) fn zero_huge(&mut self, region: &Region, page: usize) {
        let space = &region.space;
        let addresses = region.kernel_page_addresses(page);
        match space.counted(space.uffd.copy(addresses.start, &huge::ZEROS)) {
            Outcome::Done => {}
            Outcome::OwnerGone => space.set_gone(),
            Outcome::Gone => space.uffd.wake(addresses.start, addresses.len()),
            // The page is resident, or the kernel had no huge page for it: `is_mapped` tells the
            // two apart.
            Outcome::AlreadyPresent => {
                space.uffd.wake(addresses.start, addresses.len());
                if !region.is_mapped(page) {
                    self.defer(space, addresses.start, Obstacle::Memory);
                }
            }
            Outcome::Partial { .. } | Outcome::Deferred => {
                self.defer(space, addresses.start, Obstacle::Event)
            }
            Outcome::NoMemory | Outcome::Unexpected { .. } => {
                self.defer(space, addresses.start, Obstacle::Memory)
            }
        }
    }

    /// Requests the missing chunks of an absent page, unless they are outstanding.
    pub(super) fn ask(&mut self, region: &Region, page: usize) {
        let Some(gathering) = region.gathering() else { return self.ask_chunk(region, page) };
        let whole = region.extend_to_kernel_pages(&(page..page + 1));
        let mut next = whole.start;
        let mut missing = Vec::new();
        while next < whole.end {
            let of_chunk = region.pages_of_chunk(region.chunk_of(next)).expect("a page of the region");
            let pages = next..of_chunk.end.min(whole.end);
            next = pages.end;
            if !gathering.has(&region.state_indices(pages.clone())) {
                missing.push(pages.start);
            }
        }
        for page in &missing {
            self.ask_chunk(region, *page);
        }
        // All chunks have arrived, but an earlier install did not succeed.
        if missing.is_empty() {
            let install = || huge::install_gathered(region, whole.start);
            match self.shared().installing(region, &whole, Cause::Demand, Stages::default(), install) {
                Installed::All => events::wake_mappings(&self.shared().spaces(), region, &whole),
                installed => self.defer_install(region, whole.start, installed),
            }
        }
    }

    /// Requests the chunk of an absent page, unless it is outstanding.
    pub(super) fn ask_chunk(&mut self, region: &Region, page: usize) {
        let chunk = region.chunk_of(page);
        let now = Instant::now();
        if !self.requests.waits_for(chunk, &(region.clone(), page), now, self.usual.time()) {
            self.ask_anew(region, chunk, page, now);
        }
        if self.shared().recorder.is_none() && region.gathering().is_none() {
            self.read_ahead(region, chunk, now);
        }
    }

    /// Requests read-ahead beyond a chunk with a fault, if the faults are sequential.
    pub(super) fn read_ahead(&mut self, region: &Region, touched: ChunkIndex, now: Instant) {
        let shared = Arc::clone(&self.on_exit.shared);
        let Some(ahead) = self.ahead.touched(touched.0) else {
            if self.requests.has_chunk(touched) {
                self.scattered.insert(touched);
            }
            return;
        };
        for chunk in ahead.map(ChunkIndex) {
            // The region ends here.
            let Some(pages) = region.pages_of_chunk(chunk) else { break };
            let is_wanted = region.next_run(pages.clone(), &[PageState::Absent]).is_some();
            if is_wanted
                && let Content::Data(digest) = shared.image.content(chunk)
                && !self.requests.has_chunk(chunk)
                && (region.space.is_young() || !shared.in_bulk.has(chunk))
            {
                self.requests.add_ahead(chunk, digest, (region.clone(), pages.start), now);
            }
        }
    }

    pub(super) fn ask_anew(&mut self, region: &Region, chunk: ChunkIndex, page: usize, now: Instant) {
        if self.has_kept(region, chunk)
            && let Some(kept) = self.frame_cache.pages(chunk)
        {
            let stages = Stages { decompress: now.elapsed(), ..Stages::default() };
            let installed = self.install_one(region, chunk, kept, page, stages);
            return self.one_installed(region, chunk, page, installed);
        }
        let waiting = (region.clone(), page);
        match self.shared().image.content(chunk) {
            Content::Data(_) if self.is_coming(region, chunk, now) => {
                self.defer(&region.space, region.address(page), Obstacle::Fill);
            }
            Content::Data(digest) => {
                self.requests.add_chunk(chunk, digest, waiting, now);
                self.spin.asked(now, self.usual.time());
            }
            Content::Zero => self.install_zeros(region, chunk, page),
            Content::SegmentMissing(index) => self.requests.add_segment(index, waiting, now),
            Content::OutOfRange => unreachable!("regions are made from the image's own files"),
        }
    }

    /// Returns true if a chunk is kept. Then its pages are decoded.
    fn has_kept(&mut self, region: &Region, chunk: ChunkIndex) -> bool {
        let Some(frame) = self.frame_cache.frame(chunk) else { return false };
        if self.frame_cache.pages(chunk).is_some() {
            return true;
        }
        let image = &self.on_exit.shared.image;
        let Content::Data(digest) = image.content(chunk) else { return false };
        let decoded =
            decode(&mut self.pages, &mut self.decoder, image, region.file(), chunk, &digest, &frame);
        if decoded.is_ok() {
            self.frame_cache.swap(chunk, &mut self.pages);
        }
        decoded.is_ok()
    }

    /// Returns true if the fill has requested a chunk whose answer may arrive as soon as that of a
    /// new request. If answers are fast, the chunk is requested in any case.
    pub(super) fn is_coming(&mut self, region: &Region, chunk: ChunkIndex, now: Instant) -> bool {
        // The answer is not installed in a young child.
        if region.space.is_young() || !self.shared().in_bulk.has(chunk) || self.usual.time() < NEAR {
            return false;
        }
        let since = *self.behind.entry(chunk).or_insert(now);
        now.saturating_duration_since(since) < self.usual.time().min(self.shared().options.fault_deadline / 4)
    }
}
