//! Decompresses, verifies and installs the frames that the bulk lane delivers, in a thread of the
//! pool.

use super::pool::Filling;
use crate::install::chunk::decode;
use crate::install::hand_over::{HandedOver, Work};
use crate::install::{self, Installed};
use crate::memory::ChunkPages;
use crate::memory::{Region, Spaces};
use crate::options::add;
use crate::record::trace::{Cause, Stages};
use crate::remote::lane::frame_of;
use crate::remote::{Content, Image};
use crate::shared::Shared;
use bytes::Bytes;
use postcopy_proto::frame::FrameDecoder;
use postcopy_proto::manifest::chunk_len;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy_proto::set_frame::{SetDecoder, SetFrame, SetRun};
use postcopy_proto::v1;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;

/// Time for which an installer waits for the pager to install pages that it handed over.
const HANDED_OVER: Duration = Duration::from_millis(20);

/// Data that has arrived and is to be installed. Its permit of the window is free again when the
/// job is dropped.
#[derive(Debug)]
pub(super) struct Job {
    arrived: Arrived,
    _permit: OwnedSemaphorePermit,
    came: Instant,
    /// Time from the request to the arrival.
    wire: Duration,
    /// After an obstacle: the time at which the installer gives up the current piece.
    deadline: Option<Instant>,
    /// Number of stretches of the working set's first frame that were installed before the
    /// obstacle.
    stretches: usize,
}

impl Job {
    /// Makes a job of data that has just arrived.
    pub(super) fn new(arrived: Arrived, permit: OwnedSemaphorePermit, wire: Duration) -> Self {
        Self { arrived, _permit: permit, came: Instant::now(), wire, deadline: None, stretches: 0 }
    }
}

#[derive(Debug)]
pub(super) enum Arrived {
    Frames(Region, VecDeque<v1::ChunkAnswer>),
    Zeros(Range<u64>),
    WorkingSet(VecDeque<Bytes>),
}

/// The reason for an install to stop for the moment: the kernel has no memory, or the pager is
/// slow.
struct Obstacle;

/// The buffers of a thread that installs.
#[derive(Debug, Default)]
pub(super) struct Tools {
    pages: ChunkPages,
    decoder: FrameDecoder,
    set: SetDecoder,
}

/// Decompresses, verifies and installs the jobs of a session.
pub(super) struct Installer<'a> {
    filling: &'a Filling,
    tools: &'a mut Tools,
    /// The times of the stages of the current piece.
    stages: Stages,
    /// True if the job's first piece was tried before.
    is_retry: bool,
    stretches: usize,
}

impl<'a> Installer<'a> {
    pub(super) fn new(filling: &'a Filling, tools: &'a mut Tools) -> Self {
        Self { filling, tools, stages: Stages::default(), is_retry: false, stretches: 0 }
    }

    fn shared(&self) -> &'a Shared {
        &self.filling.shared
    }

    /// Does a job. If an obstacle stops it, returns the rest of the job.
    pub(super) fn install(mut self, mut job: Job) -> Option<Job> {
        self.stages = Stages { queue: job.came.elapsed(), wire: job.wire, ..Stages::default() };
        (self.is_retry, self.stretches) = (job.deadline.is_some(), job.stretches);
        loop {
            let installed = match &mut job.arrived {
                Arrived::Frames(region, answers) => answers.front().map(|answer| self.frame(region, answer)),
                Arrived::WorkingSet(frames) => frames.front().map(|frame| self.set_frame(frame)),
                Arrived::Zeros(chunks) => (!chunks.is_empty()).then(|| self.zeros(ChunkIndex(chunks.start))),
            };
            let Some(installed) = installed else { break };
            if installed.is_err() {
                let patience = self.shared().options.fault_deadline;
                let deadline = *job.deadline.get_or_insert_with(|| Instant::now() + patience);
                if Instant::now() < deadline {
                    job.stretches = self.stretches;
                    return Some(job);
                }
                // After the deadline the piece is left to a later pass, or to page faults.
            }
            match &mut job.arrived {
                Arrived::Frames(_, answers) => {
                    if let Some(answer) = answers.pop_front() {
                        self.shared().in_bulk.remove(ChunkIndex(answer.chunk));
                    }
                }
                Arrived::WorkingSet(frames) => drop(frames.pop_front()),
                Arrived::Zeros(chunks) => chunks.start += 1,
            }
            (self.is_retry, self.stretches, job.deadline) = (false, 0, None);
        }
        self.shared().outcome.pages_changed();
        None
    }

    /// Installs a chunk. A wrong chunk stays absent, and the next pass requests it again.
    fn frame(&mut self, region: &Region, answer: &v1::ChunkAnswer) -> Result<(), Obstacle> {
        let chunk = ChunkIndex(answer.chunk);
        self.verified_frame(region, chunk, answer).unwrap_or_else(|reason| {
            self.refuse(&format!("chunk {chunk}"), &reason);
            Ok(())
        })
    }

    fn refuse(&self, what: &str, reason: &str) {
        let image = self.shared().image.digest();
        let reason = format!("{what} of image {image}: {reason}");
        *self.filling.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    /// Installs a frame of the working set. The pages of a wrong frame are left to page faults.
    fn set_frame(&mut self, frame: &Bytes) -> Result<(), Obstacle> {
        let shared = self.shared();
        if !self.is_retry {
            add(&shared.counters.frame_bytes, frame.len());
        }
        let image = &shared.image;
        let installed = SetFrame::parse(frame).and_then(|frame| {
            let spaces = shared.spaces();
            let mut runs = frame.runs();
            let is_wanted = |run: SetRun| {
                set_regions(image, &spaces, run).into_iter().any(|(region, pages)| {
                    region
                        .next_run(region.extend_to_kernel_pages(&pages), install::unresolved(&region))
                        .is_some()
                })
            };
            // Faults may have fetched all of its pages meanwhile.
            if runs.any(is_wanted) {
                let before = Instant::now();
                self.tools.set.decode(&frame, &**image)?;
                self.stages.decompress = before.elapsed();
                return Ok(self.install_set(&spaces));
            }
            Ok(Ok(()))
        });
        installed.unwrap_or_else(|error| {
            self.refuse("a frame of the working set", &error.to_string());
            Ok(())
        })
    }

    /// Installs the frame that was decoded last.
    fn install_set(&mut self, spaces: &Spaces) -> Result<(), Obstacle> {
        let shared = self.shared();
        let image = &shared.image;
        let done = self.stretches;
        for (number, (run, bytes)) in self.tools.set.stretches().enumerate().skip(done) {
            for (region, pages) in set_regions(image, spaces, run) {
                if region.gathering().is_some() {
                    continue;
                }
                let parts = match &shared.trace {
                    Some(trace) => trace.withhold(image, &region, pages),
                    None => vec![pages],
                };
                for pages in parts {
                    let before = region.file_pages(pages.clone()).start - run.first as usize;
                    let bytes =
                        bytes.map(|bytes| &bytes[before * PAGE_BYTES..(before + pages.len()) * PAGE_BYTES]);
                    self.bring(&region, &pages, Cause::WorkingSet, Work::Pages(bytes))?;
                    add(&shared.counters.working_set_pages, pages.len());
                }
            }
            self.stretches = number + 1;
        }
        if spaces.has_huge() { self.install_set_chunks(spaces) } else { Ok(()) }
    }

    /// Installs the frame's pages in regions with huge pages, which gather whole chunks. Only
    /// chunks that the frame holds completely are installed.
    fn install_set_chunks(&mut self, spaces: &Spaces) -> Result<(), Obstacle> {
        let shared = self.shared();
        let image = &shared.image;
        let chunk_size = image.root().chunk_size();
        let chunk_pages = chunk_size.bytes() / PAGE_BYTES;
        let runs: Vec<_> = self.tools.set.pages().collect();
        let place = |run: &SetRun| (run.file, run.first as usize / chunk_pages);
        for runs in runs.chunk_by(|(a, _), (b, _)| place(a) == place(b)) {
            let (file, number) = place(&runs[0].0);
            let file = &image.files()[file as usize];
            let chunk = ChunkIndex(file.first_chunk.0 + number as u64);
            let Some(chunk_bytes) = chunk_len(chunk_size, file, chunk) else { continue };
            let held: usize = runs.iter().map(|(run, _)| usize::from(run.count)).sum();
            if held < chunk_bytes.div_ceil(PAGE_BYTES) {
                continue;
            }
            let in_chunk = runs.iter().map(|(run, bytes)| {
                let first = run.first as usize % chunk_pages;
                (first..first + usize::from(run.count), *bytes)
            });
            self.tools.pages.set(chunk_bytes, in_chunk);
            for region in spaces.of_chunk(chunk, chunk_pages).filter(|region| region.gathering().is_some()) {
                let pages = region.pages_of_chunk(chunk).expect("a region of the chunk");
                // A chunk that is resident was installed before the obstacle.
                if self.is_retry && !is_wanted(&region, chunk) {
                    continue;
                }
                self.bring(&region, &pages, Cause::WorkingSet, Work::Chunk(chunk, &self.tools.pages))?;
                add(&shared.counters.working_set_pages, held);
            }
        }
        Ok(())
    }

    fn verified_frame(
        &mut self,
        region: &Region,
        chunk: ChunkIndex,
        answer: &v1::ChunkAnswer,
    ) -> Result<Result<(), Obstacle>, String> {
        let shared = self.shared();
        let image = &shared.image;
        let (Some(_), Content::Data(digest)) = (region.pages_of_chunk(chunk), image.content(chunk)) else {
            return Err("it was not asked for".to_owned());
        };
        let frame = frame_of(answer, &digest).map_err(|no| no.reason)?;
        if !self.is_retry {
            add(&shared.counters.bulk_chunks, 1);
            add(&shared.counters.frame_bytes, frame.len());
        }
        // A fault may have fetched the chunk meanwhile.
        if shared.of_chunk(chunk).iter().any(|region| is_wanted(region, chunk)) {
            let before = Instant::now();
            let Tools { pages, decoder, .. } = &mut *self.tools;
            decode(pages, decoder, image, region.file(), chunk, &digest, frame)?;
            self.stages.decompress = before.elapsed();
            return Ok(self.install_chunk(chunk));
        }
        Ok(Ok(()))
    }

    fn zeros(&mut self, chunk: ChunkIndex) -> Result<(), Obstacle> {
        if self.shared().image.content(chunk) == Content::Zero {
            self.tools.pages.set_zeros(self.shared().image.root().chunk_size().bytes());
            return self.install_chunk(chunk);
        }
        Ok(())
    }

    fn install_chunk(&self, chunk: ChunkIndex) -> Result<(), Obstacle> {
        // Other regions of the same file get the pages, too, so the fill does not request the chunk
        // again for them. Young children are left out.
        let regions = self.shared().of_chunk(chunk).into_iter();
        for region in regions.filter(|region| region.is_shared() || !region.space.is_young()) {
            let pages = region.pages_of_chunk(chunk).expect("a region of the chunk");
            self.bring(&region, &pages, Cause::Background, Work::Chunk(chunk, &self.tools.pages))?;
        }
        Ok(())
    }

    /// Installs prefetched pages of a region. If an unread event blocks the install, the pager does
    /// it.
    fn bring(
        &self,
        region: &Region,
        pages: &Range<usize>,
        cause: Cause,
        work: Work<'_>,
    ) -> Result<(), Obstacle> {
        let shared = self.shared();
        if let Some(recorder) = &shared.recorder {
            recorder.brought(&shared.image, region, pages.clone());
        }
        let deadline = Instant::now() + shared.options.fault_deadline;
        let install = || match work.install(Some(&shared.map), region, pages) {
            Installed::Deferred => {
                let (handed_over, outcome) = HandedOver::new(region, pages, work, deadline);
                if !shared.to_pager.send(handed_over) {
                    return Installed::NoMemory;
                }
                match outcome.recv_timeout(HANDED_OVER) {
                    Ok(installed) => installed,
                    Err(RecvTimeoutError::Timeout) => Installed::NoMemory,
                    Err(RecvTimeoutError::Disconnected) => Installed::Ended,
                }
            }
            installed => installed,
        };
        match shared.installing(region, pages, cause, self.stages, install) {
            // A later pass installs deferred pages.
            Installed::All | Installed::Ended | Installed::Deferred => Ok(()),
            Installed::NoMemory => Err(Obstacle),
        }
    }
}

fn is_wanted(region: &Region, chunk: ChunkIndex) -> bool {
    let pages = region.pages_of_chunk(chunk).expect("a region of the chunk");
    region.next_run(pages, install::unresolved(region)).is_some()
}

/// Returns the regions that have pages of a run, each with its pages of the run.
fn set_regions(image: &Image, spaces: &Spaces, run: SetRun) -> Vec<(Region, Range<usize>)> {
    let Some(file) = image.files().get(run.file as usize) else { return Vec::new() };
    let chunk_pages = image.root().chunk_size().bytes() / PAGE_BYTES;
    let first = run.first as usize;
    let in_image = file.first_chunk.0 * chunk_pages as u64 + u64::from(run.first);
    let regions = spaces.of_image_pages(in_image..in_image + u64::from(run.count));
    let pages = regions.map(|region| {
        let pages = region.pages_of_file(first..first + usize::from(run.count));
        (region, pages)
    });
    pages.filter(|(_, pages)| !pages.is_empty()).collect()
}
