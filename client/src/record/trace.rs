//! What a session did, and when: who waited for what, and what came why.
//!
//! A session with [`Options::trace`](crate::Options) notes events in a bounded queue, for which it does not wait;
//! [`Session::write_trace`](crate::Session::write_trace) starts the thread that writes them, as lines of JSON.
//! [`Trace::read`] reads them again. docs/FORMATS.md describes them.
//!
//! A touch of a page that is there cannot be seen. So a traced session withholds one page in 50 of the working set, chosen at
//! random: which of these are touched is an estimate for the others. Of huge pages none is withheld.

mod notes;

pub use notes::TraceWriter;
pub(crate) use notes::{Notes, Stages, Writer, installing, start};

use postcopy_proto::page::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead};

/// The version of the format.
const VERSION: u32 = 1;
/// Longer ones are no trace's: a line with all paths of an image is the longest.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// More are not read: 10 GiB of memory that is touched page by page is half of it.
const MAX_EVENTS: usize = 10 << 20;
/// Files have at most 16 TiB.
const MAX_FILE_PAGES: u64 = u32::MAX as u64;
/// Of the working set's pages one in so many is withheld.
pub const WITHHELD_ONE_OF: u64 = 50;

/// What a trace is of: its first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The format's version: 1.
    pub trace: u32,
    /// The image's digest.
    pub image: String,
    /// The most bytes of a chunk.
    pub chunk_bytes: u64,
    /// The image's regular files, in the order in which events count them, from 0.
    pub files: Vec<TracedFile>,
    /// When it began: microseconds since 1970.
    pub started_us: u64,
    /// Whether the working set was asked for.
    pub working_set: bool,
    /// Whether everything was to be brought from the beginning on.
    pub fill: bool,
    /// Whether touches were recorded, and so brought no neighbours.
    pub record: bool,
}

/// A file of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedFile {
    /// Its path.
    pub path: String,
    /// Its length.
    pub size_bytes: u64,
}

/// Why a page was brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It was touched, or is of the same chunk as one that was.
    Demand,
    /// Touches went forward to it.
    ReadAhead,
    /// It is of the working set.
    WorkingSet,
    /// It was brought in the background, with all that was absent.
    Background,
}

/// A thread has touched an absent page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touch {
    /// When that was read from the userfaultfd: nanoseconds since the trace began.
    pub at: u64,
    /// Whose memory: 0 is the process that the session began with, others were forked. 0 for memory that they share.
    pub space: u32,
    /// Of which file.
    pub file: u32,
    /// Which page of the file, of 4 KiB.
    pub page: u32,
}

/// Pages were installed that were absent. The times are nanoseconds; 0 where there was no such thing, or it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Came {
    /// When they were there: nanoseconds since the trace began.
    pub at: u64,
    /// As for a touch.
    pub space: u32,
    /// Of which file.
    pub file: u32,
    /// The first one.
    pub page: u32,
    /// How many.
    pub pages: u32,
    /// Why.
    pub cause: Cause,
    /// How long the request waited to be sent, or what came waited for a thread.
    pub queue: u64,
    /// From sending the request to its answer. Not known of the working set, which is sent in one stream.
    pub wire: u64,
    /// Decompressing it, and comparing it with its digest.
    pub decompress: u64,
    /// Until the kernel had installed them.
    pub install: u64,
}

/// A page of the working set has come and was left absent, to see whether it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withheld {
    /// When.
    pub at: u64,
    /// As for a touch.
    pub space: u32,
    /// Of which file.
    pub file: u32,
    /// Which page.
    pub page: u32,
}

/// The session's end: the last line, where nobody killed the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub at: u64,
    /// Events that were not written, because there were too many at once.
    pub lost: u64,
    /// What went wrong first, if something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A line after the first one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// See there.
    Touch(Touch),
    /// See there.
    Came(Came),
    /// See there.
    Withheld(Withheld),
    /// See there.
    End(End),
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A line is not what it should be.
    #[error("line {line}: {reason}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// A trace that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What it is of.
    pub header: Header,
    /// Touches, as they were read.
    pub touches: Vec<Touch>,
    /// What came, in order as far as one thread has installed it.
    pub came: Vec<Came>,
    /// What was withheld.
    pub withheld: Vec<Withheld>,
    /// None: its process was killed, or has not ended.
    pub end: Option<End>,
}

impl Trace {
    /// Reads a trace. A last line that is cut was written by a process that was killed, and is left out.
    ///
    /// # Errors
    /// [`TraceError`], which names the line.
    ///
    /// # Blocking
    /// Reads all of it; holds at most 64 bytes for each event, of at most ten million.
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
        let (_, first) = next()?.ok_or_else(|| wrong(1, "there is none"))?;
        let header: Header =
            serde_json::from_slice(&first).map_err(|e| wrong(1, format!("no trace: {e}")))?;
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

    /// Sees that a file has these pages.
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
            // In the order of each kind.
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

        /// A process may be killed at any time: what it had written by then is a trace.
        #[test]
        fn a_trace_that_is_cut_is_read(events in prop::collection::vec(any_event(), 0..20), cut: prop::sample::Index) {
            let whole = text(&header(), &events);
            let cut = cut.index(whole.len() + 1);
            let read = Trace::read(&whole.as_bytes()[..cut]);
            let lines = whole[..cut].matches('\n').count();
            match lines {
                0 => prop_assert_eq!(read.unwrap_err().to_string(), "line 1: there is none"),
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
        assert_eq!(Trace::read(&b""[..]).unwrap_err().to_string(), "line 1: there is none");
    }
}
