//! The report as one HTML page, without scripts and without references to other files.

use super::arrivals::Arrivals;
use super::waits::Wait;
use super::{Report, Told, estimate, memory, millis};
use crate::commands::heat_map::{HeatMap, escaped, shortened};
use crate::commands::output::{printable, time};
use postcopy::proto::v1::PageSpan;
use postcopy::trace::Cause;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

const STYLE: &str = include_str!("page.css");
/// Number of the longest waits that the page lists.
const LONGEST: usize = 20;
/// Size of the drawings, in their own units.
const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 260.0;
/// Margins of a drawing: on the left for its labels, below for the times.
const LEFT: f64 = 60.0;
const BELOW: f64 = 24.0;
/// Decades of the latency axis: from a microsecond to ten seconds.
const DECADES: f64 = 7.0;
/// Number of the time steps for which installed pages are summed.
const STEPS: usize = 100;

pub(super) fn html(told: &Told, report: &Report) -> String {
    let header = &told.trace.header;
    let mut body = format!(
        "<h1>Fault latency of a session</h1>\n<p class=\"image\">{}</p>\n",
        escaped(&printable(&header.image))
    );
    if !report.is_complete {
        body += "<p class=\"warning\">The trace has no end: its process was killed, or still runs.</p>\n";
    }
    if report.lost_events > 0 {
        let _ = writeln!(
            body,
            "<p class=\"warning\">{} events are missing, because the trace's queue was full.</p>",
            report.lost_events
        );
    }
    if let Some(error) = &report.error {
        let _ = writeln!(body, "<p class=\"warning\">{}</p>", escaped(&printable(error)));
    }
    body += &numbers(report);
    body += &section(
        "Faults on absent pages",
        "Each dot is one fault, or several: its time, and its latency from the moment the pager read it from the userfaultfd. \
         The colour is the cause of the page's install: a demand fetch, read-ahead, the working set, or the background fill.",
        &timeline(told),
    );
    body += &section("Parts of the latency", "The sum over all faults.", &waiting(report));
    body += &section(
        "Installed memory, by cause",
        "Installed memory over time: pages of demand fetches with their neighbours, and prefetched pages.",
        &(arrivals(told) + &causes(report)),
    );
    body += &section(
        "Places in the files",
        "Each square is a run of pages, coloured by their mean install time.",
        &heat_map(told),
    );
    body += &section("The longest latencies", "", &longest(told));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>postcopy: fault latency of a session</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

fn section(title: &str, about: &str, content: &str) -> String {
    format!("<section>\n<h2>{title}</h2>\n<p>{about}</p>\n{content}</section>\n")
}

fn micros(us: f64) -> String {
    time(Duration::from_secs_f64((us / 1e6).clamp(0.0, 1e9)))
}

fn numbers(report: &Report) -> String {
    let t = &report.touches;
    let mut numbers = vec![
        ("lasted", micros(report.duration_ms * 1e3)),
        ("faults", t.count.to_string()),
        ("latency in all", micros(report.waited_ms * 1e3)),
        ("p50", micros(t.p50_us)),
        ("p99", micros(t.p99_us)),
        ("longest", micros(t.longest_us)),
        ("installed", memory(report.pages.all())),
    ];
    if t.unanswered > 0 {
        numbers.push(("unanswered", t.unanswered.to_string()));
    }
    let number = |(name, value): &(&str, String)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n");
    format!("<dl class=\"numbers\">\n{}</dl>\n", numbers.iter().map(number).collect::<String>())
}

/// Returns a drawing: an accessible name around the content.
fn drawing(name: &str, height: f64, content: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{name}\">\n{content}</svg>\n")
}

#[expect(clippy::cast_precision_loss, reason = "a place in a drawing")]
fn part(n: u64, of: u64) -> f64 {
    n as f64 / of.max(1) as f64
}

/// Returns the horizontal place of a time.
fn across(told: &Told, at: u64) -> f64 {
    LEFT + part(at, told.end) * (WIDTH - LEFT - 10.0)
}

/// Returns the labels of the time axis.
fn times(told: &Told) -> String {
    let label = |quarter: u64| {
        let at = u64::try_from(u128::from(told.end) * u128::from(quarter) / 4).unwrap_or(u64::MAX);
        let anchor = ["start", "middle", "middle", "middle", "end"][usize::try_from(quarter).unwrap_or(0)];
        let x = across(told, at);
        format!(
            "<text x=\"{x:.0}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>\n",
            HEIGHT + 18.0,
            micros(millis(at) * 1e3)
        )
    };
    (0..=4).map(label).collect()
}

fn class_of(wait: &Wait) -> &'static str {
    match wait.cause {
        Cause::Demand => "faulting",
        Cause::ReadAhead => "read-ahead",
        Cause::WorkingSet => "working-set",
        Cause::Background => "background",
    }
}

/// Returns the height of a latency on a logarithmic axis, from 0 to 1.
fn up(nanos: u64) -> f64 {
    ((millis(nanos) * 1e3).max(1.0).log10() / DECADES).min(1.0)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a drawing")]
fn whole(units: f64) -> u16 {
    units.round() as u16
}

fn timeline(told: &Told) -> String {
    let mut content = String::new();
    for (decade, label) in (0_u8..).zip(["1 us", "10 us", "100 us", "1 ms", "10 ms", "100 ms", "1 s", "10 s"])
    {
        let y = HEIGHT - f64::from(decade) / DECADES * (HEIGHT - 10.0);
        let _ = writeln!(
            content,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.0}\" y2=\"{y:.0}\"/><text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{label}</text>",
            WIDTH - 10.0,
            LEFT - 6.0,
            y + 4.0
        );
    }
    // Waits at the same place share one dot.
    let dot = |wait: &Wait| {
        let (x, y) = (across(told, wait.touch.at), HEIGHT - up(wait.took) * (HEIGHT - 10.0));
        (class_of(wait), whole(x), whole(y))
    };
    for (class, x, y) in told.waits.iter().map(dot).collect::<BTreeSet<_>>() {
        let _ = writeln!(content, "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"2\"/>");
    }
    content += &times(told);
    let key =
        |(class, name): (&str, &str)| format!("<span><span class=\"key {class}\"></span>{name}</span>\n");
    let keys = [
        ("faulting", "demand fetch"),
        ("read-ahead", "read ahead"),
        ("working-set", "working set"),
        ("background", "background"),
    ];
    drawing("Latency of faults, over time", HEIGHT + BELOW, &content)
        + &format!("<p class=\"keys\">{}</p>\n", keys.map(key).concat())
}

/// Returns a bar of shares, and a table of their amounts.
fn shares<const N: usize>(name: &str, parts: [(&str, f64, String); N]) -> String {
    let all: f64 = parts.iter().map(|(_, share, _)| share).sum();
    let (mut bar, mut table, mut x) = (String::new(), String::new(), 0.0);
    for (name, share, shown) in parts {
        let share = if all > 0.0 { share / all } else { 0.0 };
        let class = name.replace(' ', "-");
        let width = share * WIDTH;
        let _ = writeln!(
            bar,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"28\"/>"
        );
        x += width;
        let _ = writeln!(
            table,
            "<tr><th><span class=\"key {class}\"></span>{name}</th><td>{shown}</td><td>{:.1} %</td></tr>",
            share * 100.0
        );
    }
    drawing(name, 28.0, &bar) + &format!("<table>\n{table}</table>\n")
}

fn waiting(report: &Report) -> String {
    let parts = report.waiting.named().map(|(name, ms)| (name, ms, micros(ms * 1e3)));
    shares("Parts of the latency", parts)
        + "<p class=\"small\">queue: until the request was sent, or an installer was free; wire: until the answer arrived; \
           other: for the manifest's segment that names \
           the chunk, behind other pages of the same answer, in the working set's stream, or for installs that the kernel deferred. The times do not include \
           the wake-up of the pager and of the thread that faulted.</p>\n"
}

fn causes(report: &Report) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    let parts = report.pages.named().map(|(name, pages)| (name, pages as f64, memory(pages)));
    let mut text = shares("Pages by cause", parts);
    if let Some(line) = estimate(report) {
        let _ =
            writeln!(text, "<p>The working set, {line}. A trace cannot see accesses to resident pages.</p>");
    }
    text
}

/// Draws the installed memory over time, one cause above another.
fn arrivals(told: &Told) -> String {
    const CLASSES: [&str; 4] = ["faulting", "read-ahead", "working-set", "background"];
    let mut sums = [[0_u64; STEPS]; 4];
    for (_, pages, event) in told.came.runs() {
        let came = &told.trace.came[event];
        let class = match came.cause {
            Cause::Demand => 0,
            Cause::ReadAhead => 1,
            Cause::WorkingSet => 2,
            Cause::Background => 3,
        };
        let step = u128::from(came.at) * STEPS as u128 / (u128::from(told.end) + 1);
        sums[class][usize::try_from(step).unwrap_or(0).min(STEPS - 1)] += u64::from(pages);
    }
    let all: u64 = sums.iter().flatten().sum();
    let mut content = String::new();
    let mut below = [0_u64; STEPS];
    for (class, steps) in CLASSES.into_iter().zip(sums) {
        let (mut upper, mut so_far) = (below, 0);
        for (step, pages) in upper.iter_mut().zip(steps) {
            so_far += pages;
            *step += so_far;
        }
        let point = |(step, pages): (usize, &u64)| {
            let x = LEFT + part(step as u64 + 1, STEPS as u64) * (WIDTH - LEFT - 10.0);
            format!("{x:.1},{:.1}", HEIGHT - part(*pages, all) * (HEIGHT - 10.0))
        };
        let mut points = vec![format!("{LEFT},{HEIGHT}")];
        points.extend(upper.iter().enumerate().map(point));
        let lower: Vec<_> = below.iter().enumerate().map(point).collect();
        points.extend(lower.into_iter().rev());
        let _ = writeln!(content, "<polygon class=\"{class}\" points=\"{}\"/>", points.join(" "));
        below = upper;
    }
    let _ = writeln!(content, "<text x=\"{LEFT}\" y=\"14\">{}</text>", memory(all));
    content += &times(told);
    drawing("Installed memory, over time", HEIGHT + BELOW, &content)
}

fn heat_map(told: &Told) -> String {
    let arrivals = Arrivals::in_files(&told.trace);
    let mut runs: Vec<_> = arrivals.runs().collect();
    runs.sort_by_key(|(_, _, event)| told.trace.came[*event].at);
    let spans: Vec<_> =
        runs.into_iter().map(|((_, file, first), count, _)| PageSpan { file, first, count }).collect();
    let files: Vec<_> =
        told.trace.header.files.iter().map(|file| (file.path.clone(), file.size_bytes)).collect();
    let map = HeatMap::new(&files, &spans, "not installed");
    format!("<div class=\"map\">\n{}</div>\n", map.svg())
}

fn longest(told: &Told) -> String {
    let mut waits: Vec<&Wait> = told.waits.iter().collect();
    waits.sort_by_key(|wait| std::cmp::Reverse(wait.took));
    let mut table = String::from(
        "<tr><th>at</th><th>latency</th><th>file</th><th>page</th><th>queue</th><th>wire</th><th>decompress</th><th>install</th><th>other</th></tr>\n",
    );
    for wait in waits.into_iter().take(LONGEST) {
        let time = |nanos: u64| micros(millis(nanos) * 1e3);
        let path = told.trace.header.files.get(wait.touch.file as usize).map_or("", |file| &file.path);
        let parts: String =
            wait.waiting.named().iter().map(|(_, nanos)| format!("<td>{}</td>", time(*nanos))).collect();
        let _ = writeln!(
            table,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td>{parts}</tr>",
            time(wait.touch.at),
            time(wait.took),
            escaped(&shortened(&printable(path))),
            wait.touch.page
        );
    }
    format!("<div class=\"wide\"><table class=\"list\">\n{table}</table></div>\n")
}
