//! Traces of sessions: each fault, and each install with its cause and latency.
//!
//! A session with [`Options::trace`](crate::Options) puts events into a bounded queue, and never
//! blocks on it. [`Session::write_trace`](crate::Session::write_trace) starts the thread that
//! writes them, as lines of JSON. [`Trace::read`] parses them. docs/FORMATS.md describes the
//! format.
//!
//! A trace cannot see accesses to resident pages. A traced session therefore withholds one page in
//! 50 of the working set, chosen at random. The share of these that threads fault on estimates the
//! use of the others. Huge pages are never withheld.

mod notes;

pub use notes::TraceWriter;
pub(crate) use notes::{Notes, Stages, Writer, installing, start};

use postcopy_proto::page::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead};

/// Version of the trace format.
const VERSION: u32 = 1;
/// Most bytes of a line. The longest line is the header, with all paths of an image.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Most events that are read. A fault and an install for each page of 10 GiB make half as many.
const MAX_EVENTS: usize = 10 << 20;
/// Most pages of a file: 16 TiB.
const MAX_FILE_PAGES: u64 = u32::MAX as u64;
/// One in this many pages of the working set is withheld.
pub const WITHHELD_ONE_OF: u64 = 50;

/// The first line of a trace: its image and options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The format's version: 1.
    pub trace: u32,
    /// Digest of the image.
    pub image: String,
    /// Most bytes of a chunk.
    pub chunk_bytes: u64,
    /// The image's regular files, in the order in which events count them, from 0.
    pub files: Vec<TracedFile>,
    /// Start of the trace, in microseconds since 1970.
    pub started_us: u64,
    /// True if the session prefetched the working set.
    pub working_set: bool,
    /// True if the session filled everything in the background from its start.
    pub fill: bool,
    /// True if the session recorded faults, and so installed only the faulting pages.
    pub record: bool,
}

/// A regular file of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedFile {
    /// Path of the file in the image.
    pub path: String,
    /// Length of the file in bytes.
    pub size_bytes: u64,
}

/// The cause of a page's install.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A demand fetch, for this page or for another one of its chunk.
    Demand,
    /// Read-ahead of sequential faults.
    ReadAhead,
    /// Prefetch of the working set.
    WorkingSet,
    /// Background fill, with all other absent pages.
    Background,
}

/// A page fault on an absent page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touch {
    /// Time at which the pager read the fault, in nanoseconds since the trace began.
    pub at: u64,
    /// The faulting process: 0 for the session's first process, other numbers for its forked
    /// children. Shared memory always has 0.
    pub space: u32,
    /// Index of the file in the header.
    pub file: u32,
    /// The page of the file, in units of 4 KiB.
    pub page: u32,
}

/// An install of absent pages. Durations are in nanoseconds; 0 also if the stage did not occur or
/// is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Came {
    /// Time at which the pages were resident, in nanoseconds since the trace began.
    pub at: u64,
    /// The process, as for a fault.
    pub space: u32,
    /// Index of the file in the header.
    pub file: u32,
    /// The first page, in units of 4 KiB.
    pub page: u32,
    /// Number of pages.
    pub pages: u32,
    /// The cause of the install.
    pub cause: Cause,
    /// Time that the request waited to be sent, or the answer waited for an installer.
    pub queue: u64,
    /// Time from sending the request to its answer. Unknown for the working set, which the server
    /// sends in one stream.
    pub wire: u64,
    /// Time to decompress the frame and to compare the content with its digest.
    pub decompress: u64,
    /// Time until the kernel had installed the pages.
    pub install: u64,
}

/// A prefetched page of the working set that was left absent, to see if a thread faults on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withheld {
    /// Time of the decision, in nanoseconds since the trace began.
    pub at: u64,
    /// The process, as for a fault.
    pub space: u32,
    /// Index of the file in the header.
    pub file: u32,
    /// The page, in units of 4 KiB.
    pub page: u32,
}

/// The session's end: the last line, unless the process was killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Time of the end, in nanoseconds since the trace began.
    pub at: u64,
    /// Number of events that were dropped because the queue was full.
    pub lost: u64,
    /// The session's first error, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An event: one line after the header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A page fault on an absent page.
    Touch(Touch),
    /// An install of absent pages.
    Came(Came),
    /// A page that was left absent.
    Withheld(Withheld),
    /// The end of the session.
    End(End),
}

/// The reason why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The first line is not the header of a trace.
    #[error("not a trace")]
    NotATrace,
    /// A line is invalid.
    #[error("line {line}: {reason}")]
    Line {
        /// The line's number, from 1.
        line: usize,
        /// The reason why the line is invalid.
        reason: String,
    },
}

/// A parsed trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The image and options of the session.
    pub header: Header,
    /// The page faults, in the order in which the pager read them.
    pub touches: Vec<Touch>,
    /// The installs; in order only among those of one thread.
    pub came: Vec<Came>,
    /// The pages that were left absent.
    pub withheld: Vec<Withheld>,
    /// The end of the session; `None` if its process was killed, or still runs.
    pub end: Option<End>,
}

impl Trace {
    /// Reads a trace. Ignores a last line that is cut, because the process was killed while it
    /// wrote the line.
    ///
    /// # Errors
    /// Returns [`TraceError::NotATrace`], or [`TraceError::Line`], which names the line.
    ///
    /// # Blocking
    /// Reads all of the input; holds at most 64 bytes for each of at most ten million events.
    pub fn read(mut lines: impl BufRead) -> Result<Self, TraceError> {
        let mut number = 0;
        let mut next = || -> Result<Option<(usize, Vec<u8>)>, TraceError> {
            number += 1;
            let mut line = Vec::new();
            io::Read::take(&mut lines, MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
            match line.pop() {
                Some(b'\n') => Ok(Some((number, line))),
                Some(_) if line.len() as u64 + 1 == MAX_LINE_BYTES => Err(wrong(number, "it is too long")),
                _ => Ok(None),
            }
        };
        let (_, first) = next()?.ok_or(TraceError::NotATrace)?;
        let header: Header = serde_json::from_slice(&first).map_err(|_| TraceError::NotATrace)?;
        if header.trace != VERSION {
            return Err(wrong(1, format!("format {}, and this program reads {VERSION}", header.trace)));
        }
        let mut trace =
            Self { header, touches: Vec::new(), came: Vec::new(), withheld: Vec::new(), end: None };
        while let Some((line, bytes)) = next()? {
            let event = serde_json::from_slice(&bytes).map_err(|e| wrong(line, e.to_string()))?;
            if trace.end.is_some() {
                return Err(wrong(line, "it comes after the end"));
            }
            if line > MAX_EVENTS {
                return Err(wrong(line, format!("more than {MAX_EVENTS} events")));
            }
            trace.add(event).map_err(|reason| wrong(line, reason))?;
        }
        Ok(trace)
    }

    fn add(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Touch(touch) => {
                self.check(touch.file, touch.page, 1)?;
                self.touches.push(touch);
            }
            Event::Came(came) => {
                self.check(came.file, came.page, came.pages)?;
                self.came.push(came);
            }
            Event::Withheld(withheld) => {
                self.check(withheld.file, withheld.page, 1)?;
                self.withheld.push(withheld);
            }
            Event::End(end) => self.end = Some(end),
        }
        Ok(())
    }

    /// Checks that a file has these pages.
    fn check(&self, file: u32, page: u32, pages: u32) -> Result<(), String> {
        let files = self.header.files.len();
        let entry = self.header.files.get(file as usize).ok_or(format!("file {file} of {files}"))?;
        let has = entry.size_bytes.div_ceil(PAGE_BYTES as u64).min(MAX_FILE_PAGES);
        let end = u64::from(page) + u64::from(pages);
        (pages > 0 && end <= has).then_some(()).ok_or(format!("pages {page} to {end} of a file of {has}"))
    }
}

fn wrong(line: usize, reason: impl Into<String>) -> TraceError {
    TraceError::Line { line, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        let file = |path: &str, pages: u64| TracedFile { path: path.into(), size_bytes: pages * 4096 };
        Header {
            trace: 1,
            image: "blake3:00".into(),
            chunk_bytes: 65_536,
            files: vec![file("mem", 100), file("a \"b\"\n", 7)],
            started_us: 1,
            working_set: true,
            fill: false,
            record: false,
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let cause =
            prop::sample::select(vec![Cause::Demand, Cause::ReadAhead, Cause::WorkingSet, Cause::Background]);
        let place = (0..2_u32, 0..7_u32, any::<u64>(), any::<u32>());
        prop_oneof![
            place.clone().prop_map(|(file, page, at, space)| Event::Touch(Touch { at, space, file, page })),
            place.clone().prop_map(|(file, page, at, space)| Event::Withheld(Withheld {
                at,
                space,
                file,
                page
            })),
            (place, cause, any::<[u64; 4]>()).prop_map(|((file, page, at, space), cause, times)| {
                let [queue, wire, decompress, install] = times;
                let pages = 7 - page;
                Event::Came(Came { at, space, file, page, pages, cause, queue, wire, decompress, install })
            }),
        ]
    }

    fn text(header: &Header, events: &[Event]) -> String {
        let line = |event| serde_json::to_string(event).unwrap() + "\n";
        serde_json::to_string(header).unwrap() + "\n" + &events.iter().map(line).collect::<String>()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(events in prop::collection::vec(any_event(), 0..20), lost: u64) {
            let end = End { at: 9, lost, error: Some("no".into()) };
            let all: Vec<_> = events.iter().cloned().chain([Event::End(end.clone())]).collect();
            let mut read = Trace::read(text(&header(), &all).as_bytes()).unwrap();
            prop_assert_eq!(&read.end, &Some(end));
            // Each kind keeps its order.
            for event in &events {
                match event {
                    Event::Touch(touch) => prop_assert_eq!(read.touches.remove(0), *touch),
                    Event::Came(came) => prop_assert_eq!(read.came.remove(0), *came),
                    Event::Withheld(withheld) => prop_assert_eq!(read.withheld.remove(0), *withheld),
                    Event::End(_) => unreachable!(),
                }
            }
            prop_assert!(read.touches.is_empty() && read.came.is_empty() && read.withheld.is_empty());
        }

        /// A process may be killed at any time; the lines that it had written form a trace.
        #[test]
        fn a_trace_that_is_cut_is_read(events in prop::collection::vec(any_event(), 0..20), cut: prop::sample::Index) {
            let whole = text(&header(), &events);
            let cut = cut.index(whole.len() + 1);
            let read = Trace::read(&whole.as_bytes()[..cut]);
            let lines = whole[..cut].matches('\n').count();
            match lines {
                0 => prop_assert_eq!(read.unwrap_err().to_string(), "not a trace"),
                _ => {
                    let read = read.unwrap();
                    prop_assert_eq!(read.touches.len() + read.came.len() + read.withheld.len(), lines - 1);
                    prop_assert!(read.end.is_none());
                }
            }
        }

        #[test]
        fn any_bytes_are_a_trace_or_an_error_that_names_the_line(
            events in prop::collection::vec(any_event(), 0..5),
            at: prop::sample::Index,
            bytes in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut text = text(&header(), &events).into_bytes();
            let at = at.index(text.len());
            text.splice(at..(at + bytes.len()).min(text.len()), bytes);
            match Trace::read(text.as_slice()) {
                Ok(read) => prop_assert!(read.came.iter().all(|came| came.page + came.pages <= 100)),
                Err(TraceError::Line { line, .. }) => prop_assert!((1..=events.len() + 22).contains(&line)),
                Err(TraceError::NotATrace) => {}
                Err(TraceError::Io(error)) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn what_is_not_of_the_image_or_comes_after_the_end_is_refused() {
        let reason =
            |lines: &str| Trace::read((text(&header(), &[]) + lines).as_bytes()).unwrap_err().to_string();
        let touch =
            |file, page| format!("{{\"touch\":{{\"at\":1,\"space\":0,\"file\":{file},\"page\":{page}}}}}\n");
        assert_eq!(reason(&touch(2, 0)), "line 2: file 2 of 2");
        assert_eq!(reason(&touch(1, 7)), "line 2: pages 7 to 8 of a file of 7");
        let end = "{\"end\":{\"at\":1,\"lost\":0}}\n".to_owned();
        assert_eq!(reason(&(touch(0, 0) + &end + &touch(0, 1))), "line 4: it comes after the end");
        let other = Header { trace: 2, ..header() };
        let error = Trace::read(text(&other, &[]).as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "line 1: format 2, and this program reads 1");
        assert_eq!(Trace::read(&b""[..]).unwrap_err().to_string(), "not a trace");
    }
}
