//! The threads that decompress, verify and install what comes over the bulk lane.

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
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// The first pause before an install is tried again that the kernel has no memory for, and the longest.
const MEMORY_PAUSE: Range<Duration> = Duration::from_micros(200)..Duration::from_millis(50);
/// How soon one that gives way looks whether it is quiet.
const GIVE_WAY: Duration = Duration::from_millis(2);

/// What an installer does next. The permit is given back when that is done.
pub(super) struct Job {
    arrived: Arrived,
    permit: OwnedSemaphorePermit,
    came: Instant,
    /// From asking for it to its coming.
    wire: Duration,
}

impl Job {
    /// What has come now.
    pub(super) fn new(arrived: Arrived, permit: OwnedSemaphorePermit, wire: Duration) -> Self {
        Self { arrived, permit, came: Instant::now(), wire }
    }
}

pub(super) enum Arrived {
    Frames(Region, Vec<v1::ChunkAnswer>),
    Zeros(Range<u64>),
    WorkingSet(Vec<Bytes>),
}

/// Why a chunk was refused most lately: said when the fill gives up.
pub(super) type Refused = Arc<Mutex<Option<String>>>;

/// A thread that decompresses, verifies and installs.
pub(super) struct Installer {
    shared: Arc<Shared>,
    refused: Refused,
    /// It is of the half of them that does nothing while somebody touches what is absent.
    gives_way: bool,
    pages: ChunkPages,
    decoder: FrameDecoder,
    set: SetDecoder,
    /// Of what is being installed.
    stages: Stages,
}

impl Installer {
    pub(super) fn new(shared: Arc<Shared>, refused: Refused, gives_way: bool) -> Self {
        Self {
            shared,
            refused,
            gives_way,
            pages: ChunkPages::default(),
            decoder: FrameDecoder::default(),
            set: SetDecoder::default(),
            stages: Stages::default(),
        }
    }

    pub(super) fn run(mut self, queue: &Mutex<mpsc::Receiver<Job>>) {
        loop {
            while self.gives_way && self.shared.cores.are_shared(Instant::now()) {
                std::thread::park_timeout(GIVE_WAY);
            }
            // Held while waiting, by one of the installers: whoever has the lock takes the next job.
            let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(job) = job else { return };
            self.stages = Stages { queue: job.came.elapsed(), wire: job.wire, ..Stages::default() };
            match job.arrived {
                Arrived::Frames(region, answers) => {
                    for answer in &answers {
                        self.frame(&region, answer);
                    }
                }
                Arrived::WorkingSet(frames) => frames.iter().for_each(|frame| self.set_frame(frame)),
                Arrived::Zeros(chunks) => {
                    for chunk in chunks {
                        self.zeros(ChunkIndex(chunk));
                    }
                }
            }
            self.shared.outcome.pages_changed();
            drop(job.permit);
        }
    }

    /// Installs a chunk. What is wrong with it leaves it absent; the next pass asks again.
    fn frame(&mut self, region: &Region, answer: &v1::ChunkAnswer) {
        let chunk = ChunkIndex(answer.chunk);
        if let Err(reason) = self.verified_frame(region, chunk, answer) {
            self.refuse(&format!("chunk {chunk}"), &reason);
        }
        self.shared.in_bulk.remove(chunk);
    }

    fn refuse(&self, what: &str, reason: &str) {
        let image = self.shared.image.digest();
        let reason = format!("{what} of image {image}: {reason}");
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    /// Installs a working set's frame. What is wrong with it leaves its pages to whoever touches them.
    fn set_frame(&mut self, frame: &Bytes) {
        add(&self.shared.counters.frame_bytes, frame.len());
        let shared = Arc::clone(&self.shared);
        let image = &shared.image;
        let installed = SetFrame::parse(frame).and_then(|frame| {
            let spaces = shared.spaces();
            let mut runs = frame.runs();
            let is_wanted = |run: SetRun| {
                set_regions(image, &spaces, run).into_iter().any(|(region, pages)| {
                    region.next_run(region.whole(&pages), install::unresolved(&region)).is_some()
                })
            };
            // Faults may have overtaken all of it.
            if runs.any(is_wanted) {
                let before = Instant::now();
                self.set.decode(&frame, &**image)?;
                self.stages.decompress = before.elapsed();
                self.install_set(&spaces);
            }
            Ok(())
        });
        if let Err(error) = installed {
            self.refuse("a frame of the working set", &error.to_string());
        }
    }

    /// Installs what was decoded last.
    fn install_set(&mut self, spaces: &Spaces) {
        let image = Arc::clone(&self.shared.image);
        for (run, bytes) in self.set.stretches() {
            for (region, pages) in set_regions(&image, spaces, run) {
                if region.gathering().is_some() {
                    continue;
                }
                let parts = match &self.shared.trace {
                    Some(trace) => trace.withhold(&image, &region, pages),
                    None => vec![pages],
                };
                for pages in parts {
                    let before = region.file_pages(pages.clone()).start - run.first as usize;
                    let bytes =
                        bytes.map(|bytes| &bytes[before * PAGE_BYTES..(before + pages.len()) * PAGE_BYTES]);
                    self.bring(&region, &pages, Cause::WorkingSet, Work::Pages(bytes));
                    add(&self.shared.counters.working_set_pages, pages.len());
                }
            }
        }
        if spaces.has_huge() {
            self.install_set_chunks(spaces);
        }
    }

    /// The same into huge pages, which are gathered by chunks: those that the frame has all of.
    fn install_set_chunks(&mut self, spaces: &Spaces) {
        let image = Arc::clone(&self.shared.image);
        let chunk_size = image.root().chunk_size();
        let chunk_pages = chunk_size.bytes() / PAGE_BYTES;
        let runs: Vec<_> = self.set.pages().collect();
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
            self.pages.set(chunk_bytes, in_chunk);
            for region in spaces.of_chunk(chunk, chunk_pages).filter(|region| region.gathering().is_some()) {
                let pages = region.pages_of(chunk).expect("a region of the chunk");
                self.bring(&region, &pages, Cause::WorkingSet, Work::Chunk(chunk, &self.pages));
                add(&self.shared.counters.working_set_pages, held);
            }
        }
    }

    fn verified_frame(
        &mut self,
        region: &Region,
        chunk: ChunkIndex,
        answer: &v1::ChunkAnswer,
    ) -> Result<(), String> {
        let shared = Arc::clone(&self.shared);
        let image = &shared.image;
        let (Some(_), Content::Data(digest)) = (region.pages_of(chunk), image.content(chunk)) else {
            return Err("it was not asked for".to_owned());
        };
        let frame = frame_of(answer, &digest).map_err(|no| no.reason)?;
        add(&shared.counters.bulk_chunks, 1);
        add(&shared.counters.frame_bytes, frame.len());
        // A fault may have overtaken it.
        let is_wanted = |region: &Region| {
            let pages = region.pages_of(chunk).expect("a region of the chunk");
            region.next_run(pages, install::unresolved(region)).is_some()
        };
        if shared.of_chunk(chunk).iter().any(is_wanted) {
            let before = Instant::now();
            decode(&mut self.pages, &mut self.decoder, image, region.file(), chunk, &digest, frame)?;
            self.stages.decompress = before.elapsed();
            self.install(chunk);
        }
        Ok(())
    }

    fn zeros(&mut self, chunk: ChunkIndex) {
        if self.shared.image.content(chunk) == Content::Zero {
            self.pages.set_zeros(self.shared.image.root().chunk_size().bytes());
            self.install(chunk);
        }
    }

    fn install(&self, chunk: ChunkIndex) {
        // Those of other regions over the same file are not asked for then.
        for region in self.shared.of_chunk(chunk) {
            let pages = region.pages_of(chunk).expect("a region of the chunk");
            self.bring(&region, &pages, Cause::Background, Work::Chunk(chunk, &self.pages));
        }
    }

    /// Prefetches pages of a region. The pager installs where an event is in the way; without memory this tries again.
    fn bring(&self, region: &Region, pages: &Range<usize>, cause: Cause, work: Work<'_>) {
        let shared = &self.shared;
        if let Some(recorder) = &shared.recorder {
            recorder.brought(&shared.image, region, pages.clone());
        }
        let deadline = Instant::now() + shared.options.fault_deadline;
        let install = || match work.install(Some(&shared.map), region, pages) {
            Installed::Deferred => {
                let (handed_over, outcome) = HandedOver::new(region, pages, work, deadline);
                shared.to_pager.send(handed_over);
                outcome.recv().unwrap_or(Installed::Ended)
            }
            installed => installed,
        };
        let mut pause = MEMORY_PAUSE.start;
        while Instant::now() < deadline {
            match shared.installing(region, pages, cause, self.stages, install) {
                // Deferred: another pass has it.
                Installed::All | Installed::Ended | Installed::Deferred => return,
                Installed::NoMemory => std::thread::park_timeout(pause),
            }
            pause = (pause * 2).min(MEMORY_PAUSE.end);
        }
    }
}

/// The regions that have pages of a run, and which of theirs.
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
