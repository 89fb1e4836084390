//! How figures change with the size of chunks, with restores at a time, and with threads that fault in one session.

use crate::floor::{self, FloorServer};
use crate::plot::{self, Line};
use crate::programs::NEAR;
use crate::report::Report;
use crate::{Figure, median};
use anyhow::{Result, ensure};
use postcopy::{Options, Region, ServerAddress, Session};
use postcopy_tests::PAGE;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::link::Link;
use postcopy_tests::server::Server;
use serde_json::json;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(300);
/// In KiB.
const CHUNKS: [usize; 6] = [4, 16, 64, 256, 1024, 2048];
const COUNTS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// A file on a server.
struct Pushed {
    server: Server,
    bytes: Vec<u8>,
}

impl Pushed {
    fn new(bytes: Vec<u8>, chunk_bytes: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes)?;
        let (server, chunk_bytes) = (Server::start(), chunk_bytes.to_string());
        let size = ["--chunk-size".as_ref(), chunk_bytes.as_ref()];
        let args = ["push".as_ref(), path.as_os_str(), "mem".as_ref()].into_iter().chain(size);
        let _ = run(server.address(), args);
        Ok(Self { server, bytes })
    }

    /// Touches pages in that order: how many seconds that took.
    fn touch(&self, region: &Region, pages: impl Iterator<Item = usize>) -> Result<f64> {
        let started = Instant::now();
        for page in pages {
            let at = page * PAGE + page % PAGE;
            ensure!(region[at] == self.bytes[at], "a wrong byte");
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

fn open(address: &ServerAddress, fill: bool) -> Result<(Region, Session)> {
    let session = Session::open(address, &"mem".parse()?, Options::DEFAULT.fill(fill))?;
    Ok((session.map("mem")?, session))
}

fn some_pages(bytes: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = (0..bytes / PAGE).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut pages);
    pages.truncate(count);
    pages
}

#[expect(clippy::cast_precision_loss, reason = "counts and sizes")]
fn float(value: usize) -> f64 {
    value as f64
}

/// Measures for each of `sizes` in turn, in each round: of each value the medians, by size.
fn in_turns<const VALUES: usize>(
    rounds: u64,
    sizes: &[usize],
    mut measure: impl FnMut(usize, u64) -> Result<[f64; VALUES]>,
) -> Result<[Vec<(f64, f64)>; VALUES]> {
    let mut measured: Vec<_> = sizes.iter().map(|size| (*size, [const { Vec::new() }; VALUES])).collect();
    for round in 0..rounds {
        for (size, values) in &mut measured {
            values.iter_mut().zip(measure(*size, round)?).for_each(|(values, value)| values.push(value));
        }
    }
    let points = |value: usize| {
        measured.iter_mut().map(|(size, values)| (float(*size), median(&mut values[value]))).collect()
    };
    Ok(std::array::from_fn(points))
}

/// Scattered and sequential touches of a file, by the size of its chunks.
pub(crate) fn chunks(rounds: u64) -> Result<Report> {
    const SCATTERED: usize = 500;
    const SEQUENTIAL: usize = 4096;
    let pushed = |kib: usize| Ok((kib, Pushed::new(memory_like(64 * MIB, 11), kib << 10)?));
    let pushed = CHUNKS.into_iter().map(pushed).collect::<Result<HashMap<_, _>>>()?;
    let [scattered, sequential, wire] = in_turns(rounds, &CHUNKS, |kib, seed| {
        let pushed = &pushed[&kib];
        let link = Link::to(&pushed.server.address().to_string(), NEAR.quality);
        let (region, _session) = open(link.address(), false)?;
        let before = link.received();
        let pages = some_pages(pushed.bytes.len(), SCATTERED, seed);
        let touch = pushed.touch(&region, pages.into_iter())? / float(SCATTERED) * 1e3;
        let received = float(usize::try_from(link.received() - before)?) / float(SCATTERED) / 1024.0;
        let (region, _session) = open(link.address(), false)?;
        Ok([touch, float(SEQUENTIAL * PAGE / MIB) / pushed.touch(&region, 0..SEQUENTIAL)?, received])
    })?;
    let mut table = format!(
        "**Size of chunks**: a file of 64 MiB that compresses, over {}. {SCATTERED} pages at random (until most chunks are there), \
         and {SEQUENTIAL} in a row; {rounds} rounds.\n\n\
         | KiB | a scattered touch | KiB on the wire for each | in a row |\n|---|---|---|---|\n",
        NEAR.about
    );
    for ((a, b), c) in scattered.iter().zip(&sequential).zip(&wire) {
        let _ = writeln!(table, "| {} | {:.2} ms | {:.1} | {:.0} MiB/s |", a.0, a.1, c.1, b.1);
    }
    let raw = json!({ "scattered_ms": scattered, "sequential_mib_s": sequential, "wire_kib": wire });
    let lines = [Line { name: "500 scattered touches".into(), points: scattered }];
    let plot = plot::lines("Milliseconds a touch, by the size of chunks", "KiB a chunk", "ms", &lines);
    Ok(Report { name: "chunks".into(), table, plot: Some(plot), raw })
}

/// Whole restores from one server at a time.
pub(crate) fn restores(rounds: u64) -> Result<(Report, Vec<Figure>)> {
    const BYTES: usize = 16 * MIB;
    let pushed = Pushed::new(memory_like(BYTES, 12), 64 << 10)?;
    let one = || -> Result<f64> {
        let started = Instant::now();
        let (region, session) = open(pushed.server.address(), true)?;
        session.wait_resident(PATIENCE)?;
        let seconds = started.elapsed().as_secs_f64();
        pushed.touch(&region, (0..BYTES / PAGE).step_by(97))?;
        Ok(seconds)
    };
    let [rates, slowest] = in_turns(rounds, &COUNTS, |count, _| {
        let started = Instant::now();
        let mut seconds = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        let rate = float(count * BYTES / MIB) / started.elapsed().as_secs_f64();
        let most = seconds.iter().copied().fold(0.0, f64::max);
        Ok([rate, most / median(&mut seconds)])
    })?;
    let mut table = format!(
        "**Restores at a time** of 16 MiB each, from one server on the same machine, in sessions of one process; {rounds} rounds.\n\n\
         | restores | MiB/s of all | the slowest beside the median |\n|---|---|---|\n"
    );
    for (rate, slow) in rates.iter().zip(&slowest) {
        let _ = writeln!(table, "| {} | {:.0} | {:.2} x |", rate.0, rate.1, slow.1);
    }
    let best = rates.iter().map(|rate| rate.1).fold(0.0, f64::max);
    let (share, slow) = (rates[COUNTS.len() - 1].1 / best, slowest[COUNTS.len() - 1].1);
    let figures = vec![
        Figure {
            name: "64 restores at a time: throughput beside the best of 1 to 64".into(),
            value: format!("**{share:.2} x**"),
            bar: "≥ 0.8 x".into(),
            met: share >= 0.8,
            raw: json!({ "rates": rates }),
        },
        Figure {
            name: "64 restores at a time: the slowest beside the median".into(),
            value: format!("**{slow:.2} x**"),
            bar: "≤ 3 x".into(),
            met: slow <= 3.0,
            raw: json!({ "slowest": slowest }),
        },
    ];
    let raw = json!({ "mib_s": rates, "slowest": slowest });
    let lines = [Line { name: "all restores together".into(), points: rates }];
    let plot = plot::lines("Restores of 16 MiB from one server", "restores at a time", "MiB/s", &lines);
    Ok((Report { name: "restores".into(), table, plot: Some(plot), raw }, figures))
}

/// Threads that fault in one session.
pub(crate) fn threads(rounds: u64) -> Result<(Report, Vec<Figure>)> {
    const BYTES: usize = 32 * MIB;
    const TOUCHES: usize = 4096;
    let pushed = Pushed::new(noise(BYTES, 13), PAGE)?;
    let link = Link::to(&pushed.server.address().to_string(), NEAR.quality);
    let places =
        [("the same machine", pushed.server.address().clone()), (NEAR.about, link.address().clone())];
    let floor = ThreadsFloor::new(&pushed.bytes)?;
    let (mut lines, mut floors) = (Vec::new(), Vec::new());
    for (name, address) in places {
        let [points] = in_turns(rounds, &COUNTS, |count, seed| {
            let (region, _session) = open(&address, false)?;
            let pages = some_pages(BYTES, TOUCHES.min(512 * count), seed);
            let started = Instant::now();
            std::thread::scope(|scope| {
                let parts = pages.chunks(pages.len() / count);
                let touch = |part: &[usize]| pushed.touch(&region, part.iter().copied());
                let threads: Vec<_> = parts.map(|part| scope.spawn(move || touch(part))).collect();
                threads.into_iter().try_for_each(|t| t.join().expect("no panic").map(drop))
            })?;
            let rate = float(pages.len()) / started.elapsed().as_secs_f64() / 1e3;
            if count == THREADS && lines.is_empty() {
                floors.push(floor.rate(&pages)?);
            }
            Ok([rate])
        })?;
        lines.push(Line { name: name.into(), points });
    }
    let mut table = format!(
        "**Threads that fault in one session**, in chunks of 4 KiB that do not compress; {rounds} rounds; thousands of faults a second.\n\n\
         | threads | the same machine | {} |\n|---|---|---|\n",
        NEAR.about
    );
    for (near, far) in lines[0].points.iter().zip(&lines[1].points) {
        let _ = writeln!(table, "| {} | {:.1} | {:.1} |", near.0, near.1, far.1);
    }
    let raw = json!({ "here": lines[0].points, "near": lines[1].points });
    let plot = plot::lines("Faults a second in one session", "threads", "k/s", &lines);
    let floor = median(&mut floors);
    let ours = lines[0].points.iter().find(|point| point.0 == 16.0).map_or(0.0, |point| point.1);
    let ratio = ours / floor;
    let figure = Figure {
        name: "16 threads that fault in one session: faults a second, beside 1 / (1 / local faults + 1 / raw TCP fetches)".into(),
        value: format!("**{ratio:.2} x** ({ours:.1} beside {floor:.1} thousand)"),
        bar: "≥ 0.6 x".into(),
        met: ratio >= 0.6,
        raw: json!({ "thousands_a_second": ours, "floor": floor }),
    };
    Ok((Report { name: "threads".into(), table, plot: Some(plot), raw }, vec![figure]))
}

/// Threads of the floor.
const THREADS: usize = 16;

/// What the faults of so many threads could take: local ones, and then as many fetches, as many of which are under way.
struct ThreadsFloor {
    server: FloorServer,
    bytes: Arc<[u8]>,
    _file: tempfile::NamedTempFile,
}

impl ThreadsFloor {
    fn new(bytes: &[u8]) -> Result<Self> {
        let mut file = tempfile::NamedTempFile::new()?;
        std::io::Write::write_all(&mut file, bytes)?;
        let server = FloorServer::start(None, file.path(), PAGE)?;
        Ok(Self { server, bytes: bytes.into(), _file: file })
    }

    /// Thousands of faults a second.
    fn rate(&self, pages: &[usize]) -> Result<f64> {
        let source = Arc::clone(&self.bytes);
        let memory = floor::fill_on_touch(self.bytes.len() / PAGE, PAGE, move |index, page| {
            page.copy_from_slice(&source[index * PAGE..][..PAGE]);
            Ok(())
        })?;
        let (memory, started) = (memory.bytes(), Instant::now());
        std::thread::scope(|scope| {
            for part in pages.chunks(pages.len() / THREADS) {
                scope.spawn(move || {
                    part.iter().for_each(|page| {
                        std::hint::black_box(memory[page * PAGE]);
                    })
                });
            }
        });
        let local = float(pages.len()) / started.elapsed().as_secs_f64();
        let fetched = self.server.fetch(pages, THREADS)?;
        Ok(1.0 / (1.0 / local + 1.0 / fetched) / 1e3)
    }
}
