//! From what happens to a trace's events, and from these to lines.

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

/// Events that may wait to be written: some 5 MiB.
const QUEUE: usize = 65_536;
/// How often they are written. Nobody wakes the thread: that would cost whoever notes something a system call.
const WRITE: Duration = Duration::from_millis(20);

/// What is known of pages' way before they were installed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stages {
    pub(crate) queue: Duration,
    pub(crate) wire: Duration,
    pub(crate) decompress: Duration,
}

/// A session's events. Whoever notes one does not wait.
#[derive(Debug)]
pub(crate) struct Notes {
    started: Instant,
    started_us: u64,
    /// Which pages are withheld.
    seed: u64,
    events: SyncSender<Event>,
    /// Until somebody writes them. Held for taking it.
    queue: Mutex<Option<Receiver<Event>>>,
    lost: AtomicU64,
}

impl Notes {
    /// From now on.
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

    /// A page is touched, and is absent.
    pub(crate) fn touched(&self, image: &Image, region: &Region, page: usize) {
        let (space, file, page) = place(image, region, page);
        self.note(Event::Touch(Touch { at: self.now(), space, file, page }));
    }

    /// The parts of `pages` that are not withheld, of pages that the working set has brought; notes those that are.
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

    /// Who writes takes the queue; None: somebody has.
    fn take_queue(&self) -> Option<Receiver<Event>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Has pages installed, and notes which of them have come by that, where there is a trace.
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
    // Of a page of 2 MiB all comes with its last chunk.
    let pages = region.whole(pages);
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

/// Whether a page is one of those that are withheld, wherever it is mapped.
fn is_chosen(seed: u64, file: u32, page: u32) -> bool {
    let seed = seed ^ u64::from(file) << 32 ^ u64::from(page);
    // Twice: first numbers of neighbouring seeds form a grid, and so do pages that programs touch.
    let mixed = fastrand::Rng::with_seed(seed).u64(..);
    fastrand::Rng::with_seed(mixed).u64(..WITHHELD_ONE_OF) == 0
}

/// The parts of a region's pages that are in one of these states.
fn runs(region: &Region, pages: Range<usize>, states: &[PageState]) -> Vec<Range<usize>> {
    let (mut found, mut next) = (Vec::new(), pages.start);
    while let Some(run) = region.next_run(next..pages.end, states) {
        next = run.end;
        found.push(run);
    }
    found
}

/// Whose a region's page is, of which file of the image, and which page of it. Memory that processes share is one, whoever
/// touches it: the first one's.
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

/// A trace that is being written.
#[derive(Debug)]
pub struct TraceWriter(std::thread::JoinHandle<io::Result<()>>);

impl TraceWriter {
    /// Whether all is written, or cannot be.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// Why it could not be written. The session goes on without.
    ///
    /// # Blocking
    /// Until the session has ended, and some 20 ms.
    pub fn finish(self) -> io::Result<()> {
        self.0.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes the trace has failed")))
    }
}

/// Starts the thread that writes a session's trace.
///
/// # Errors
/// Unsupported where it is written already; the error of starting a thread.
pub(crate) fn start(writer: Writer, to: impl Write + Send + 'static) -> io::Result<TraceWriter> {
    let queue = writer.notes.take_queue();
    let queue =
        queue.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the trace is written already"))?;
    let thread = std::thread::Builder::new().name("postcopy-trace".into());
    Ok(TraceWriter(thread.spawn(move || write(&writer, &queue, BufWriter::new(to)))?))
}

/// What the thread needs that writes a trace.
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
        // Looked at first: what was noted before the end is there then.
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

    /// As often as if each page was chosen on its own: also two that are so many pages apart.
    #[test]
    fn one_page_in_fifty_is_chosen_without_a_pattern() {
        const PAGES: u32 = 20_000;
        for seed in (0..20).map(|seed: u64| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
            let chosen: Vec<_> = (0..PAGES).map(|page| is_chosen(seed, 1, page)).collect();
            let count = chosen.iter().filter(|is_chosen| **is_chosen).count();
            // 400 are expected, and 8 pairs. More or less come but once in a million runs.
            assert!((300..500).contains(&count), "{count} for seed {seed}");
            for apart in [1, 2, 16, 512] {
                let pairs = chosen.iter().zip(&chosen[apart..]).filter(|(a, b)| **a && **b).count();
                assert!(pairs < 28, "{pairs} pairs {apart} apart for seed {seed}");
            }
        }
    }
}
