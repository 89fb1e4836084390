//! The queue of a session's trace events, and the thread that writes them as lines.

use super::{Came, Cause, End, Event, Header, Touch, TracedFile, WITHHELD_ONE_OF, Withheld};
use crate::install::{self, Installed};
use crate::memory::{PageState, Region};
use crate::options::Options;
use crate::outcome::Outcome;
use crate::remote::Image;
use serde::Serialize;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Most events that may await writing: some 5 MiB.
const QUEUE: usize = 65_536;
/// Interval between writes. No event wakes the thread, because the wake-up would cost the pager a
/// system call.
const WRITE: Duration = Duration::from_millis(20);

/// Durations of the stages of a page before its install.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stages {
    pub(crate) queue: Duration,
    pub(crate) wire: Duration,
    pub(crate) decompress: Duration,
}

/// The queue of a session's events. Adding one never blocks.
#[derive(Debug)]
pub(crate) struct Notes {
    started: Instant,
    started_us: u64,
    /// Selects the pages that are withheld.
    seed: u64,
    events: SyncSender<Event>,
    /// The receiving end, until the writer takes it. Locked only for that.
    queue: Mutex<Option<Receiver<Event>>>,
    lost: AtomicU64,
}

impl Notes {
    /// Starts a trace; times count from this call.
    pub(crate) fn new() -> Self {
        let (events, queue) = sync_channel(QUEUE);
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            started: Instant::now(),
            started_us: since_1970.as_micros().try_into().unwrap_or(u64::MAX),
            seed: fastrand::u64(..),
            events,
            queue: Mutex::new(Some(queue)),
            lost: AtomicU64::new(0),
        }
    }

    fn note(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn now(&self) -> u64 {
        nanos(self.started.elapsed())
    }

    /// Notes a fault on an absent page.
    pub(crate) fn touched(&self, image: &Image, region: &Region, page: usize) {
        let (space, file, page) = place(image, region, page);
        self.note(Event::Touch(Touch { at: self.now(), space, file, page }));
    }

    /// Returns the parts of `pages` that are not withheld, and notes the withheld pages. `pages`
    /// were prefetched with the working set.
    pub(crate) fn withhold(&self, image: &Image, region: &Region, pages: Range<usize>) -> Vec<Range<usize>> {
        let (mut parts, mut start) = (Vec::new(), pages.start);
        for page in pages.clone() {
            let (space, file, file_page) = place(image, region, page);
            if !is_chosen(self.seed, file, file_page) || region.state(page) != PageState::Absent {
                continue;
            }
            self.note(Event::Withheld(Withheld { at: self.now(), space, file, page: file_page }));
            parts.push(start..page);
            start = page + 1;
        }
        parts.push(start..pages.end);
        parts.retain(|part| !part.is_empty());
        parts
    }

    /// Takes the receiving end; `None` if it was taken before.
    fn take_queue(&self) -> Option<Receiver<Event>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Calls `install` and, if the session is traced, notes the pages that it made resident.
pub(crate) fn installing(
    notes: Option<&Notes>,
    image: &Image,
    region: &Region,
    pages: &Range<usize>,
    cause: Cause,
    stages: Stages,
    install: impl FnOnce() -> Installed,
) -> Installed {
    let Some(notes) = notes else { return install() };
    // A page of 2 MiB is installed whole, with its last chunk.
    let pages = region.extend_to_kernel_pages(pages);
    let were_absent = runs(region, pages, install::unresolved(region));
    let started = Instant::now();
    let installed = install();
    let took = started.elapsed();
    let at = notes.now();
    for run in were_absent.into_iter().flat_map(|run| runs(region, run, &[PageState::Resident])) {
        let (space, file, page) = place(image, region, run.start);
        notes.note(Event::Came(Came {
            at,
            space,
            file,
            page,
            pages: short(run.len()),
            cause,
            queue: nanos(stages.queue),
            wire: nanos(stages.wire),
            decompress: nanos(stages.decompress),
            install: nanos(took),
        }));
    }
    installed
}

/// Returns true for a page that is withheld, in any mapping.
fn is_chosen(seed: u64, file: u32, page: u32) -> bool {
    let seed = seed ^ u64::from(file) << 32 ^ u64::from(page);
    // The generator is seeded twice: first numbers of neighbouring seeds form a grid, and so do the
    // pages that programs fault on.
    let mixed = fastrand::Rng::with_seed(seed).u64(..);
    fastrand::Rng::with_seed(mixed).u64(..WITHHELD_ONE_OF) == 0
}

/// Returns the runs of a region's pages that are in one of these states.
fn runs(region: &Region, pages: Range<usize>, states: &[PageState]) -> Vec<Range<usize>> {
    let (mut found, mut next) = (Vec::new(), pages.start);
    while let Some(run) = region.next_run(next..pages.end, states) {
        next = run.end;
        found.push(run);
    }
    found
}

/// Returns the space, the file and the file's page of a region's page. Shared memory counts as
/// memory of the first process, whichever process faults on it.
fn place(image: &Image, region: &Region, page: usize) -> (u32, u32, u32) {
    let space = if region.is_shared() { 0 } else { region.space.id };
    (space, short(image.place_of(region.file())), short(region.file_pages(page..page + 1).start))
}

fn short(n: usize) -> u32 {
    u32::try_from(n).expect("files have at most 16 TiB")
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// The thread that writes a trace.
#[derive(Debug)]
pub struct TraceWriter(std::thread::JoinHandle<io::Result<()>>);

impl TraceWriter {
    /// Returns true once the trace is written, or writing has failed.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits until the trace is written.
    ///
    /// # Errors
    /// Returns the error of writing. The session continues without a trace.
    ///
    /// # Blocking
    /// Waits until the session has ended, and some 20 ms longer.
    pub fn finish(self) -> io::Result<()> {
        self.0.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes the trace panicked")))
    }
}

/// Starts the thread that writes a session's trace.
///
/// # Errors
/// Returns `Unsupported` if the trace has a writer already, or the error of starting a thread.
pub(crate) fn start(writer: Writer, to: impl Write + Send + 'static) -> io::Result<TraceWriter> {
    let queue = writer.notes.take_queue();
    let queue =
        queue.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the trace is written already"))?;
    let thread = std::thread::Builder::new().name("postcopy-trace".into());
    Ok(TraceWriter(thread.spawn(move || write(&writer, &queue, BufWriter::new(to)))?))
}

/// The inputs of the thread that writes a trace.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) notes: Arc<Notes>,
    pub(crate) image: Arc<Image>,
    pub(crate) options: Options,
    pub(crate) outcome: Arc<Outcome>,
}

fn header(writer: &Writer) -> Header {
    let (image, options) = (&writer.image, &writer.options);
    let file = |path: String, size_bytes| TracedFile { path, size_bytes };
    Header {
        trace: super::VERSION,
        image: image.digest().to_string(),
        chunk_bytes: image.root().chunk_size().bytes() as u64,
        files: image.root().files().map(|(path, entry)| file(path.to_string(), entry.size_bytes)).collect(),
        started_us: writer.notes.started_us,
        working_set: options.working_set,
        fill: options.fill,
        record: options.record,
    }
}

fn write_line(to: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, line)?;
    to.write_all(b"\n")
}

fn write(writer: &Writer, queue: &Receiver<Event>, mut to: impl Write) -> io::Result<()> {
    let Writer { notes, outcome, .. } = writer;
    write_line(&mut to, &header(writer))?;
    loop {
        // This is read before the queue is emptied, so that all events before the end are written.
        let has_ended = outcome.has_ended();
        for event in queue.try_iter() {
            write_line(&mut to, &event)?;
        }
        if has_ended {
            let (lost, error) = (notes.lost.load(Ordering::Relaxed), outcome.error());
            let error = error.map(|error| error.to_string());
            write_line(&mut to, &Event::End(End { at: notes.now(), lost, error }))?;
            return to.flush();
        }
        to.flush()?;
        outcome.wait_end(WRITE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages are chosen as if each was drawn on its own; so are pairs at these distances.
    #[test]
    fn one_page_in_fifty_is_chosen_without_a_pattern() {
        const PAGES: u32 = 20_000;
        for seed in (0..20).map(|seed: u64| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
            let chosen: Vec<_> = (0..PAGES).map(|page| is_chosen(seed, 1, page)).collect();
            let count = chosen.iter().filter(|is_chosen| **is_chosen).count();
            // 400 are expected, and 8 pairs. Random draws leave these bounds once in a million
            // runs.
            assert!((300..500).contains(&count), "{count} for seed {seed}");
            for apart in [1, 2, 16, 512] {
                let pairs = chosen.iter().zip(&chosen[apart..]).filter(|(a, b)| **a && **b).count();
                assert!(pairs < 28, "{pairs} pairs {apart} apart for seed {seed}");
            }
        }
    }
}
