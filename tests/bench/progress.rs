//! Page faults, the fill and poison, while threads of the same process call madvise(MADV_DONTNEED)
//! without a pause.

use crate::{Figure, median, percentile};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{LossPolicy, Options};
use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::faulter::EVENT_REMOVE;
use postcopy_tests::fixtures::noise;
use postcopy_tests::stored::StoredFile;
use postcopy_tests::storm::Storm;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: usize = 64 << 20;
const CHUNK: usize = 64 << 10;
const ROUNDS: usize = 5;
const TOUCHES: usize = 200;
const FILLS: usize = 10;
const FILL_PATIENCE: Duration = Duration::from_secs(20);
/// The pages that a balloon gives back when it takes 28 MiB.
const BALLOON: usize = 7168;
const BALLOONS: usize = 20;
const DEADLINE: Duration = Duration::from_secs(1);

/// Threads that call madvise.
#[derive(Clone, Copy)]
struct Causers {
    threads: usize,
    /// True if the session may hold them.
    are_held: bool,
    /// The bars on the 99th percentile and on the longest touch.
    bars_ms: [f64; 2],
}

/// In a program's own memory no session can hold them; in another process's memory the daemons do.
const CAUSERS: [Causers; 6] = [
    Causers { threads: 1, are_held: false, bars_ms: [20.0, 200.0] },
    Causers { threads: 2, are_held: false, bars_ms: [20.0, 200.0] },
    Causers { threads: 1, are_held: true, bars_ms: [20.0, 200.0] },
    Causers { threads: 2, are_held: true, bars_ms: [20.0, 200.0] },
    Causers { threads: 4, are_held: true, bars_ms: [100.0, 300.0] },
    Causers { threads: 8, are_held: true, bars_ms: [100.0, 300.0] },
];
/// The fill has a bar with one and two threads only.
const FILL_CAUSERS: usize = 4;

impl Causers {
    fn name(self) -> String {
        let threads = if self.threads == 1 { "thread" } else { "threads" };
        let held = if self.are_held { "held where needed" } else { "not held" };
        format!("{} {threads} in madvise without a pause, {held}", self.threads)
    }
}

/// In a session that may hold the threads that cause events, or may not.
fn options(may_hold: bool) -> Options {
    Options::DEFAULT.hold_causers(may_hold)
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    // Chunks of one page, so that each touch is a page fault.
    let pages = Arc::new(StoredFile::start(noise(BYTES, 97), PAGE_BYTES));
    let mut figures = touches(&pages)?;
    figures.push(balloon(&pages, false)?);
    figures.push(balloon(&pages, true)?);
    drop(pages);
    let chunks = Arc::new(StoredFile::start(noise(BYTES, 98), CHUNK));
    figures.extend(fills(&chunks)?);
    figures.extend(poison(&chunks)?);
    Ok(figures)
}

fn milliseconds(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

fn touches(source: &Arc<StoredFile>) -> Result<Vec<Figure>> {
    let mut alone_ms = Vec::new();
    let mut beside_ms = CAUSERS.map(|_| Vec::new());
    let touch = |threads, may_hold, times: &mut Vec<f64>| {
        let mut storm = Storm::start(source, threads, options(may_hold), EVENT_REMOVE, None);
        times.extend(storm.touch(TOUCHES).into_iter().map(milliseconds));
        ensure!(storm.session.error().is_none(), "{:?}", storm.session.error());
        Ok(())
    };
    for _ in 0..ROUNDS {
        touch(0, false, &mut alone_ms)?;
        for (causers, times) in CAUSERS.iter().zip(&mut beside_ms) {
            touch(causers.threads, causers.are_held, times)?;
        }
    }
    let alone = median(&mut alone_ms);
    let figure = |(causers, times): (Causers, Vec<f64>)| {
        let [bar, longest_bar] = causers.bars_ms;
        let mut sorted = times.clone();
        let [p50, p99, longest] = [50, 99, 100].map(|p| percentile(&mut sorted, p));
        Figure {
            name: format!("page faults beside {}", causers.name()),
            value: format!(
                "p99 **{p99:.1} ms**, longest **{longest:.0} ms** (p50 {p50:.1} ms; without them {alone:.2} ms)"
            ),
            bar: format!("p99 ≤ {bar:.0} ms, longest ≤ {longest_bar:.0} ms"),
            met: p99 <= bar && longest <= longest_bar,
            raw: json!({ "ms": times, "without_ms": alone_ms }),
        }
    };
    Ok(CAUSERS.into_iter().zip(beside_ms).map(figure).collect())
}

/// Thousands of madvises in a row, as a balloon does them.
fn balloon(source: &Arc<StoredFile>, may_hold: bool) -> Result<Figure> {
    let mut times = Vec::new();
    let mut longest_of_each = Vec::new();
    for _ in 0..BALLOONS {
        let mut storm = Storm::start(source, 0, options(may_hold), EVENT_REMOVE, None);
        // Opening a session is not part of it.
        storm.touch(1);
        let took: Vec<f64> = storm.touch_beside_a_balloon(BALLOON).into_iter().map(milliseconds).collect();
        longest_of_each.push(took.iter().copied().fold(0.0, f64::max));
        times.extend(took);
        ensure!(storm.session.error().is_none(), "{:?}", storm.session.error());
    }
    let count = times.len();
    let [p50, p99, longest] = [50, 99, 100].map(|p| percentile(&mut times.clone(), p));
    Ok(Figure {
        name: format!(
            "page faults beside a balloon's {BALLOON} madvises in a row, {}, {BALLOONS} times",
            if may_hold { "held where needed" } else { "not held" }
        ),
        value: format!("p99 **{p99:.1} ms** (p50 {p50:.2} ms, longest {longest:.1} ms, {count} faults)"),
        bar: "p99 ≤ 3 ms".to_owned(),
        met: p99 <= 3.0,
        raw: json!({ "ms": times, "longest_ms": longest_of_each }),
    })
}

fn fills(source: &Arc<StoredFile>) -> Result<Vec<Figure>> {
    let causers = &CAUSERS[..FILL_CAUSERS];
    let fill = |threads, may_hold| -> Result<f64> {
        let storm = Storm::start(source, threads, options(may_hold), EVENT_REMOVE, None);
        let started = Instant::now();
        storm.session.fill()?;
        // A fill that takes longer counts as this long.
        let _ = storm.session.wait_resident(FILL_PATIENCE);
        ensure!(storm.session.error().is_none(), "{:?}", storm.session.error());
        Ok(started.elapsed().as_secs_f64())
    };
    let (mut alone, mut beside) = (Vec::new(), vec![Vec::new(); causers.len()]);
    for _ in 0..FILLS {
        alone.push(fill(0, false)?);
        for (causers, times) in causers.iter().zip(&mut beside) {
            times.push(fill(causers.threads, causers.are_held)?);
        }
    }
    let figure = |(causers, times): (&Causers, &Vec<f64>)| {
        let mut ratios: Vec<f64> = times.iter().zip(&alone).map(|(time, alone)| time / alone).collect();
        let (ratio, [time, without]) =
            (median(&mut ratios), [times, &alone].map(|times| median(&mut times.clone())));
        Figure {
            name: format!(
                "fill of {} MiB beside {}, beside the same without them",
                BYTES >> 20,
                causers.name()
            ),
            value: format!("**{ratio:.2} x** ({time:.2} s beside {without:.2} s)"),
            bar: "≤ 3 x".to_owned(),
            met: ratio <= 3.0,
            raw: json!({ "seconds": times, "beside_seconds": alone }),
        }
    };
    Ok(causers.iter().zip(&beside).map(figure).collect())
}

/// From a server that never answers for a chunk.
fn poison(source: &Arc<StoredFile>) -> Result<Vec<Figure>> {
    let lies = Lies::default().chunk(|_, _: ChunkAnswer| Vec::new());
    let silent = Chaos::start(source.server.address(), lies);
    let mut late_ms = CAUSERS.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (causers, times) in CAUSERS.iter().zip(&mut late_ms) {
            let options = options(causers.are_held).fault_deadline(DEADLINE).on_loss(LossPolicy::Poison);
            let mut storm =
                Storm::start(source, causers.threads, options, EVENT_REMOVE, Some(silent.address()));
            let address = storm.faulter.at(0, 3);
            let started = Instant::now();
            storm.faulter.main.tell(&format!("timed-read {address}"));
            let answer = storm.faulter.main.answer();
            let took = started.elapsed();
            ensure!(answer.is_none(), "a page that the server has not sent: {answer:?}");
            ensure!(storm.faulter.dies_of() == Signal::SIGBUS as i32, "another signal than SIGBUS");
            ensure!(took >= DEADLINE, "poisoned after {took:?}, before its deadline");
            times.push(milliseconds(took.saturating_sub(DEADLINE)));
        }
    }
    let figure = |(causers, times): (Causers, Vec<f64>)| {
        let longest = percentile(&mut times.clone(), 100);
        Figure {
            name: format!("poison beside {}: how long after the deadline", causers.name()),
            value: format!("at most **{longest:.0} ms** of {ROUNDS}"),
            bar: "≤ 1 s".to_owned(),
            met: longest <= 1000.0,
            raw: json!({ "ms": times }),
        }
    };
    Ok(CAUSERS.into_iter().zip(late_ms).map(figure).collect())
}
