//! The handling of an answer, from its frame to resident pages.

use super::Pager;
use super::ready::Obstacle;
use super::waiters::Waiters;
use crate::install::chunk::decode;
use crate::install::{self, Installed};
use crate::memory::ChunkPages;
use crate::memory::{PageState, Region};
use crate::options::add;
use crate::pager::read_ahead::STREAMS;
use crate::pager::requests::Refused;
use crate::record::trace::{Cause, Stages};
use crate::remote::lane::{frame_of, may_pass};
use crate::remote::{SegmentRefused, take_segment};
use bytes::Bytes;
use postcopy_proto::page::ChunkIndex;
use postcopy_proto::v1;
use std::time::Duration;
use tokio::time::Instant;

/// Scattered faults that are further apart are no run: as for the pace.
const SCATTERED_APART: Duration = Duration::from_millis(100);

impl Pager {
    /// Handles the answer for a chunk.
    pub(super) fn answer(&mut self, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        let Some((digest, _)) = self.requests.chunk(chunk) else { return };
        let is_ahead = self.requests.is_ahead(chunk);
        self.requests.answered(chunk, Instant::now());
        if !is_ahead {
            self.note_latency(chunk);
        }
        let frame = match frame_of(answer, &digest) {
            Ok(frame) => frame.clone(),
            Err(no) if no.may_pass => return self.requests.chunk_busy(chunk, no.reason, Instant::now()),
            Err(no) => return self.refuse(chunk, &no.reason),
        };
        let counters = &self.shared().counters;
        add(&counters.demand_chunks, 1);
        add(&counters.read_ahead_chunks, usize::from(is_ahead));
        add(&counters.frame_bytes, frame.len());
        self.install(chunk, frame);
    }

    /// Updates the estimates of answer times with the time that this answer took.
    pub(super) fn note_latency(&mut self, chunk: ChunkIndex) {
        let now = Instant::now();
        let waited = self.requests.waited_for(chunk, now);
        self.usual.note(waited);
        if self.scattered.remove(&chunk) {
            self.scattered_answered(waited, now);
        }
        // If the fill holds the lock, this sample is skipped.
        if let Ok(mut pace) = self.shared().pace.try_lock()
            && let Some(asked_at) = now.checked_sub(waited)
            && pace.answered(asked_at.into_std(), now.into_std())
        {
            self.shared().fill_may_go_on.notify_one();
        }
    }

    /// Paces read-ahead by the answer for a fault that goes on with no stream, where there is a run
    /// of these: the first faults of streams look the same, and as many streams as are told apart
    /// may begin at once.
    fn scattered_answered(&mut self, waited: Duration, now: Instant) {
        let (run, last) = self.scattered_run;
        let goes_on = last.is_some_and(|last| now.saturating_duration_since(last) < SCATTERED_APART);
        let run = if goes_on { run + 1 } else { 1 };
        self.scattered_run = (run, Some(now));
        if run > STREAMS
            && let Some(asked_at) = now.checked_sub(waited)
        {
            self.ahead_pace.answered(asked_at.into_std(), now.into_std());
        }
    }

    /// Verifies a chunk's frame and installs its pages.
    pub(super) fn install(&mut self, chunk: ChunkIndex, frame: Bytes) {
        let Some((digest, (waiting, page))) = self.requests.chunk(chunk) else { return };
        let shared = &self.on_exit.shared;
        let decoder = &mut self.decoder;
        let came = Instant::now();
        if let Err(reason) =
            decode(&mut self.pages, decoder, &shared.image, waiting.file(), chunk, &digest, &frame)
        {
            return self.refuse(chunk, &reason);
        }
        let stages = Stages { decompress: came.elapsed(), ..self.requests.stages(chunk) };
        if self.is_recorded(chunk) {
            let (region, page) = (waiting.clone(), *page);
            return self.install_recorded(chunk, &frame, &region, page, stages);
        }
        let is_ahead = self.requests.is_ahead(chunk);
        let cause = if is_ahead { Cause::ReadAhead } else { Cause::Demand };
        let mut outcome = Installed::All;
        let (waiting_at, waiting_space) = (waiting.address(*page), waiting.space.id);
        for region in shared.of_chunk(chunk) {
            let is_same_space = region.space.id == waiting_space;
            // A process and its children each have a copy of a page, and most children access few.
            if !is_same_space && !is_wanted(&self.waiters, &region, chunk) {
                continue;
            }
            let first = region.page_at(waiting_at).filter(|_| is_same_space && !is_ahead);
            match self.install_in(&region, chunk, first, cause, stages) {
                Installed::All => resolved(&mut self.waiters, &region, chunk),
                // Waiters in other regions fault again, and each has its own deadline.
                Installed::NoMemory if first.is_none() => region.wake_chunk(chunk),
                installed => outcome = installed,
            }
        }
        match outcome {
            Installed::All => {
                self.whole.remove(&chunk);
                self.ready.has_memory();
                self.requests.chunk_done(chunk);
            }
            Installed::Deferred => self.requests.defer(chunk, frame, None),
            Installed::NoMemory => {
                add(&self.shared().counters.memory_waits, 1);
                self.ready.wait_for(Obstacle::Memory);
                self.requests.defer(chunk, frame, self.ready.next_attempt());
            }
            Installed::Ended => unreachable!("the pager itself closes the gate"),
        }
        self.shared().outcome.pages_changed();
    }

    /// Installs the faulting page of the chunk that was decoded last, in record mode, and keeps the
    /// other pages. Huge pages are installed and recorded whole.
    fn install_recorded(
        &mut self,
        chunk: ChunkIndex,
        frame: &[u8],
        waiting: &Region,
        page: usize,
        stages: Stages,
    ) {
        let installed = match waiting.gathering() {
            Some(_) => Installed::All,
            None => self.install_one(waiting, chunk, &self.pages, page, stages),
        };
        for other in self.shared().of_chunk(chunk) {
            // Waiters for other pages of the chunk fault again.
            if other.gathering().is_none()
                || self.install_in(&other, chunk, None, Cause::Demand, stages) != Installed::All
            {
                other.wake_chunk(chunk);
            }
        }
        self.requests.chunk_done(chunk);
        if self.lacks_pages(chunk) {
            self.frame_cache.keep(chunk, frame);
            self.frame_cache.swap(chunk, &mut self.pages);
        }
        self.one_installed(waiting, chunk, page, installed);
    }

    /// Installs the pages of the chunk that was decoded last, the faulting page first.
    fn install_in(
        &self,
        region: &Region,
        chunk: ChunkIndex,
        touched: Option<usize>,
        cause: Cause,
        stages: Stages,
    ) -> Installed {
        if let Some(page) = touched.filter(|_| region.gathering().is_none()) {
            let install = || install::install_page(region, chunk, &self.pages, page);
            match self.shared().installing(region, &(page..page + 1), cause, stages, install) {
                Installed::All => {}
                other => return other,
            }
        }
        let Some(pages) = region.pages_of_chunk(chunk) else { return Installed::All };
        let install = || install::install(None, region, chunk, &self.pages, touched);
        self.shared().installing(region, &pages, cause, stages, install)
    }

    /// Installs the faulting page of a chunk. In a region of huge pages it installs all pages of
    /// the chunk.
    pub(super) fn install_one(
        &self,
        region: &Region,
        chunk: ChunkIndex,
        content: &ChunkPages,
        page: usize,
        stages: Stages,
    ) -> Installed {
        if region.gathering().is_some() {
            let pages = region.pages_of_chunk(chunk).expect("a page of the chunk");
            let install = || install::install(None, region, chunk, content, None);
            return self.shared().installing(region, &pages, Cause::Demand, stages, install);
        }
        let install = || install::install_page(region, chunk, content, page);
        self.shared().installing(region, &(page..page + 1), Cause::Demand, stages, install)
    }

    /// Returns true if the pages of a chunk are recorded and installed one by one.
    pub(super) fn is_recorded(&self, chunk: ChunkIndex) -> bool {
        self.shared().recorder.is_some() && !self.whole.contains(&chunk)
    }

    /// Handles the outcome of installing one page of a kept chunk.
    pub(super) fn one_installed(
        &mut self,
        region: &Region,
        chunk: ChunkIndex,
        page: usize,
        installed: Installed,
    ) {
        match installed {
            Installed::All => self.waiters.resolved(&region.space, &region.kernel_page_addresses(page)),
            installed => self.defer_install(region, page, installed),
        }
        if !self.lacks_pages(chunk) {
            self.frame_cache.forget(chunk);
        }
        self.shared().outcome.pages_changed();
    }

    /// Defers the fault on a page, unless its install has succeeded.
    pub(super) fn defer_install(&mut self, region: &Region, page: usize, installed: Installed) {
        let obstacle = match installed {
            Installed::All => return,
            Installed::Deferred => Obstacle::Event,
            Installed::NoMemory => Obstacle::Memory,
            Installed::Ended => unreachable!("the pager itself closes the gate"),
        };
        self.defer(&region.space, region.address(page), obstacle);
    }

    /// Returns true if a region without huge pages still has absent pages of the chunk. Regions
    /// with huge pages have taken all of it.
    fn lacks_pages(&self, chunk: ChunkIndex) -> bool {
        self.shared().of_chunk(chunk).into_iter().filter(|region| region.gathering().is_none()).any(
            |region| {
                let pages = region.pages_of_chunk(chunk).expect("a region of the chunk");
                region.next_run(pages, &[PageState::Absent]).is_some()
            },
        )
    }

    pub(super) fn install_zeros(&mut self, region: &Region, chunk: ChunkIndex, page: usize) {
        let shared = &self.on_exit.shared;
        self.pages.set_zeros(shared.image.root().chunk_size().bytes());
        if self.is_recorded(chunk) {
            let installed = self.install_one(region, chunk, &self.pages, page, Stages::default());
            return self.one_installed(region, chunk, page, installed);
        }
        match self.install_in(region, chunk, Some(page), Cause::Demand, Stages::default()) {
            Installed::All => {
                self.whole.remove(&chunk);
                resolved(&mut self.waiters, region, chunk);
            }
            installed => self.defer_install(region, page, installed),
        }
        self.shared().outcome.pages_changed();
    }

    /// Handles a wrong answer or an error: requests the chunk again, or gives it up.
    pub(super) fn refuse(&mut self, chunk: ChunkIndex, reason: &str) {
        match self.requests.chunk_refused(chunk) {
            Refused::AskedAgain | Refused::Unknown => {}
            Refused::Final => self.lose(chunk, reason),
        }
    }

    pub(super) fn segment_answer(&mut self, answer: &v1::SegmentAnswer) {
        let taken = take_segment(&self.shared().image, answer);
        if let Err(SegmentRefused::Server(error)) = &taken
            && may_pass(error)
        {
            return self.requests.segment_busy(answer.index, error.message.clone(), Instant::now());
        }
        if let Err(reason) = taken {
            return match self.requests.segment_refused(answer.index) {
                Refused::AskedAgain | Refused::Unknown => {}
                Refused::Final => self.lose_segment(answer.index, &reason.to_string()),
            };
        }
        for (region, page) in self.requests.segment_done(answer.index) {
            // The fault is looked up by its address, because the region may have been moved or
            // removed.
            self.fault(&region.space, region.address(page));
        }
    }
}

/// Returns true if a chunk is to be installed in the region of a process that has not requested it:
/// in shared memory, where a page has waiters, and where a page is poisoned.
fn is_wanted(waiters: &Waiters, region: &Region, chunk: ChunkIndex) -> bool {
    let Some(pages) = region.pages_of_chunk(chunk) else { return false };
    region.is_shared()
        || waiters.has(&region.space, &region.addresses_of(&region.extend_to_kernel_pages(&pages)))
        || region.next_run(pages, &[PageState::Poisoned]).is_some()
}

/// Removes the waiters for a region's pages of a chunk.
fn resolved(waiters: &mut Waiters, region: &Region, chunk: ChunkIndex) {
    // A page of 2 MiB may lack other chunks.
    if region.gathering().is_none()
        && let Some(pages) = region.pages_of_chunk(chunk)
    {
        waiters.resolved(&region.space, &(region.address(pages.start)..region.address(pages.end)));
    }
}
