//! `postcopy report`: the faults and prefetches of a trace, and their latencies.

mod arrivals;
mod page;
mod waits;

use super::output::{Advised, Output, bytes, printable, time};
use anyhow::{Context, Result};
use arrivals::Arrivals;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::trace::{Cause, Trace, TraceError};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use waits::{Wait, Waiting};

#[derive(Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// The file that --trace has written
    trace: PathBuf,
    /// Write the report also as one HTML page, which loads no other file; replaces an existing file
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A place in memory: space, file, page.
type Place = (u32, u32, u32);

/// The numbers of installed pages, by cause.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Pages {
    /// Pages that a demand fetch brought because threads faulted on them.
    touched: u64,
    /// Other pages of the chunks that demand fetches brought.
    neighbours: u64,
    read_ahead: u64,
    working_set: u64,
    background: u64,
}

impl Pages {
    fn all(&self) -> u64 {
        self.touched + self.neighbours + self.read_ahead + self.working_set + self.background
    }

    /// Returns the numbers with their names.
    fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("faulting", self.touched),
            ("neighbours", self.neighbours),
            ("read ahead", self.read_ahead),
            ("working set", self.working_set),
            ("background", self.background),
        ]
    }
}

/// An estimate of the working set's use, from pages that were withheld at random.
#[derive(Clone, Copy, Debug, Serialize)]
struct Estimate {
    withheld: u64,
    /// Withheld pages that a thread faulted on.
    touched: u64,
    /// Withheld pages that something else brought before any fault, so that their use is unknown.
    brought: u64,
    /// Lower bound of the share of the working set's pages that threads access, 0 to 1. `None` if
    /// no page was withheld.
    #[serde(skip_serializing_if = "Option::is_none")]
    touched_share: Option<f64>,
    /// Upper bound of that share: it counts all pages that something else brought.
    #[serde(skip_serializing_if = "Option::is_none")]
    touched_share_at_most: Option<f64>,
}

/// Page faults on absent pages, and their latencies.
#[derive(Clone, Copy, Debug, Serialize)]
struct Touches {
    count: u64,
    /// Faults for which the trace shows no install, for example because it ends before.
    unanswered: u64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    longest_us: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    image: String,
    /// The session's error, if it had one; `None` also if the trace has no end.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    is_complete: bool,
    lost_events: u64,
    duration_ms: f64,
    touches: Touches,
    /// Sum of all fault latencies.
    waited_ms: f64,
    waiting: Waiting<f64>,
    pages: Pages,
    estimate: Estimate,
}

/// A trace, and the results computed from it.
struct Told {
    trace: Trace,
    waits: Vec<Wait>,
    came: Arrivals,
    /// Time of the first fault on each page.
    touched: BTreeMap<Place, u64>,
    pages: Pages,
    end: u64,
}

pub(crate) fn report(args: &ReportArgs, output: Output) -> Result<ExitCode> {
    let path = || args.trace.display().to_string();
    let file = File::open(&args.trace).with_context(path)?;
    let trace = Trace::read(BufReader::new(file)).map_err(|error| match error {
        TraceError::NotATrace => Advised {
            text: format!("{}: {error}", path()),
            next: "Write one with --trace of bench, firecracker or criu.",
        }
        .into(),
        _ => anyhow::Error::new(error).context(path()),
    });
    let told = Told::new(trace?);
    let report = told.report();
    if let Some(to) = &args.output {
        std::fs::write(to, page::html(&told, &report)).with_context(|| to.display().to_string())?;
    }
    output.show(&report, || text(&report))?;
    Ok(ExitCode::SUCCESS)
}

impl Told {
    fn new(trace: Trace) -> Self {
        let (came, waited_for) = Arrivals::of(&trace);
        let mut touched = BTreeMap::new();
        for touch in &trace.touches {
            touched.entry((touch.space, touch.file, touch.page)).or_insert(touch.at);
        }
        let pages = pages(&trace, &came, &touched);
        let waits = waits::waits(&trace, &waited_for);
        let times = trace.came.iter().map(|c| c.at).chain(trace.touches.iter().map(|t| t.at));
        let end = times.chain(trace.end.iter().map(|end| end.at)).max().unwrap_or(0);
        Self { trace, waits, came, touched, pages, end }
    }

    fn estimate(&self) -> Estimate {
        // A page that is mapped twice is withheld in each mapping.
        let places =
            self.trace.withheld.iter().map(|withheld| (withheld.space, withheld.file, withheld.page));
        let places: BTreeSet<Place> = places.collect();
        let (mut touched, mut brought) = (0, 0);
        for place in &places {
            let came = self.came.at(*place).map(|event| self.trace.came[event].at);
            match (self.touched.get(place), came) {
                (Some(at), came) if came.is_none_or(|came| *at <= came) => touched += 1,
                (_, Some(_)) => brought += 1,
                _ => {}
            }
        }
        let withheld = places.len() as u64;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let share = |pages: u64| (withheld > 0).then(|| pages as f64 / withheld as f64);
        let (touched_share, touched_share_at_most) = (share(touched), share(touched + brought));
        Estimate { withheld, touched, brought, touched_share, touched_share_at_most }
    }

    fn report(&self) -> Report {
        let mut sorted: Vec<u64> = self.waits.iter().map(|wait| wait.took).collect();
        sorted.sort_unstable();
        let percentile = |p: usize| sorted.get(sorted.len().saturating_sub(1) * p / 100);
        let us = |p| micros(*percentile(p).unwrap_or(&0));
        let waiting = self.waits.iter().fold(Waiting::default(), |sum, wait| sum.and(wait.waiting));
        let end = self.trace.end.as_ref();
        Report {
            image: self.trace.header.image.clone(),
            error: end.and_then(|end| end.error.clone()),
            is_complete: end.is_some(),
            lost_events: end.map_or(0, |end| end.lost),
            duration_ms: millis(self.end),
            touches: Touches {
                count: self.trace.touches.len() as u64,
                unanswered: (self.trace.touches.len() - self.waits.len()) as u64,
                p50_us: us(50),
                p90_us: us(90),
                p99_us: us(99),
                longest_us: us(100),
            },
            waited_ms: millis(waiting.sum()),
            waiting: waiting.map(millis),
            pages: self.pages,
            estimate: self.estimate(),
        }
    }
}

/// Counts the installed pages by cause.
fn pages(trace: &Trace, came: &Arrivals, touched: &BTreeMap<Place, u64>) -> Pages {
    let mut pages = Pages::default();
    for ((space, file, page), count, event) in came.runs() {
        let (came, end, count) = (&trace.came[event], page + count, u64::from(count));
        match came.cause {
            Cause::Demand => {
                let touches = touched.range((space, file, page)..(space, file, end));
                let before = touches.filter(|(_, at)| **at <= came.at).count() as u64;
                pages.touched += before;
                pages.neighbours += count - before;
            }
            Cause::ReadAhead => pages.read_ahead += count,
            Cause::WorkingSet => pages.working_set += count,
            Cause::Background => pages.background += count,
        }
    }
    pages
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

fn micros(nanos: u64) -> f64 {
    millis(nanos) * 1e3
}

fn memory(pages: u64) -> String {
    bytes(pages.saturating_mul(PAGE_BYTES as u64))
}

fn text(report: &Report) -> String {
    let t = &report.touches;
    let us = |us: f64| time(Duration::from_secs_f64(us / 1e6));
    let ms = |ms: f64| us(ms * 1e3);
    let pages = report.pages.named().map(|(name, pages)| format!("{} {name}", memory(pages)));
    let waiting = report.waiting.named().map(|(name, time)| format!("{name} {}", ms(time)));
    let mut text = format!(
        "{}\n\
         \x20 lasted         {}{}\n\
         \x20 faults         {}, p50 {}  p90 {}  p99 {}  longest {}\n\
         \x20 waited         {} in all: {}\n\
         \x20 installed      {}: {}\n",
        printable(&report.image),
        ms(report.duration_ms),
        if report.is_complete { "" } else { ", without an end: the process was killed, or still runs" },
        t.count,
        us(t.p50_us),
        us(t.p90_us),
        us(t.p99_us),
        us(t.longest_us),
        ms(report.waited_ms),
        waiting.join(", "),
        memory(report.pages.all()),
        pages.join(", "),
    );
    if let Some(line) = estimate(report) {
        text += &format!("  working set    {line}\n");
    }
    if report.touches.unanswered > 0 {
        text += &format!("  unanswered     {} of the faults\n", report.touches.unanswered);
    }
    if report.lost_events > 0 {
        text +=
            &format!("  lost           {} events, because the trace's queue was full\n", report.lost_events);
    }
    if let Some(error) = &report.error {
        text += &format!("  error          {}\n", printable(error));
    }
    text
}

/// Returns the line about the working set's use, if pages were withheld.
fn estimate(report: &Report) -> Option<String> {
    let e = &report.estimate;
    let (least, most) = (e.touched_share? * 100.0, e.touched_share_at_most? * 100.0);
    Some(match e.brought {
        0 => format!(
            "an estimate: {least:.0} % of its pages were accessed ({} of {} that were withheld at random)",
            e.touched, e.withheld
        ),
        brought => format!(
            "an estimate: {least:.0} to {most:.0} % of its pages were accessed (of {} that were withheld at random, {} \
             faulted, and {brought} had another cause of install first)",
            e.withheld, e.touched
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::trace::{Came, End, Header, Touch, TracedFile, Withheld};
    use proptest::prelude::*;

    fn header(files: Vec<TracedFile>) -> Header {
        Header {
            trace: 1,
            image: "<i>\u{1b}".to_owned(),
            chunk_bytes: 65_536,
            files,
            started_us: 0,
            working_set: true,
            fill: true,
            record: false,
        }
    }

    fn came(at: u64, space: u32, page: u32, pages: u32, cause: Cause) -> Came {
        Came { at, space, file: 0, page, pages, cause, queue: 0, wire: 0, decompress: 0, install: 0 }
    }

    fn touch(at: u64, page: u32) -> Touch {
        Touch { at, space: 0, file: 0, page }
    }

    fn told(came: Vec<Came>, touches: Vec<Touch>, withheld: &[u32]) -> Told {
        let header = header(vec![TracedFile { path: "<b>".to_owned(), size_bytes: 16 << 40 }]);
        let withheld =
            withheld.iter().map(|page| Withheld { at: 1, space: 0, file: 0, page: *page }).collect();
        Told::new(Trace { header, touches, came, withheld, end: None })
    }

    /// Background pages were not accessed until their install; their later use cannot be seen.
    #[test]
    fn of_what_came_otherwise_it_is_not_known_whether_it_is_touched() {
        let background = came(100, 0, 0, 50, Cause::Background);
        let told =
            told(vec![came(60, 0, 7, 1, Cause::Demand), background], vec![touch(50, 7)], &[7, 8, 9, 9, 60]);
        let (report, estimate) = (told.report(), told.estimate());
        assert_eq!((estimate.withheld, estimate.touched, estimate.brought), (4, 1, 2));
        assert_eq!((estimate.touched_share, estimate.touched_share_at_most), (Some(0.25), Some(0.75)));
        assert!(
            text(&report).contains("25 to 75 % of its pages were accessed (of 4 that"),
            "{}",
            text(&report)
        );
        let of_one = super::tests::told(Vec::new(), vec![touch(50, 7)], &[7, 8]).report();
        assert!(text(&of_one).contains(" 50 % of its pages were accessed (1 of 2 that"), "{}", text(&of_one));
    }

    /// A process may map a file twice, one time after another.
    #[test]
    fn a_touch_of_another_mapping_has_waited_for_what_came_after_it() {
        let events = vec![came(20, 0, 0, 16, Cause::Demand), came(1300, 0, 0, 16, Cause::Demand)];
        let report = told(events, vec![touch(10, 3), touch(1000, 3)], &[]).report();
        assert_eq!((report.touches.count, report.touches.unanswered), (2, 0));
        assert!((report.waited_ms - 310e-6).abs() < 1e-9, "{}", report.waited_ms);
    }

    proptest! {
        /// The author of a trace may write any events that the format allows.
        #[test]
        fn any_trace_is_told_and_drawn(
            events in prop::collection::vec((any::<[u64; 5]>(), any::<[u32; 3]>(), 0..4_usize), 0..30),
            touches in prop::collection::vec((any::<u64>(), 0..3_u32, any::<u32>()), 0..30),
            end: Option<(u64, u64)>,
        ) {
            let causes = [Cause::Demand, Cause::ReadAhead, Cause::WorkingSet, Cause::Background];
            let event = |([at, queue, wire, decompress, install], [space, page, pages], cause): ([u64; 5], [u32; 3], usize)| {
                let pages = pages.min(u32::MAX - page).max(1);
                Came { at, space, file: 0, page: page.min(u32::MAX - 1), pages, cause: causes[cause], queue, wire, decompress, install }
            };
            let touches = touches.into_iter().map(|(at, space, page)| Touch { at, space, file: 0, page });
            let mut told = told(events.into_iter().map(event).collect(), touches.collect(), &[0, u32::MAX - 1]);
            let error = Some("<p>\u{7}".to_owned());
            told.trace.end = end.map(|(at, lost)| End { at, lost, error });
            let told = Told::new(told.trace);
            let report = told.report();
            let html = page::html(&told, &report);
            for shown in [text(&report), html.clone()] {
                prop_assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{}", shown);
                prop_assert!(!shown.contains("NaN") && !shown.contains("inf"), "{}", shown);
            }
            prop_assert!(!html.contains("<b>") && !html.contains("<i>") && !html.contains("<p>\\"), "{}", html);
        }
    }
}
