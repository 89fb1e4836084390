//! Working sets alone: what recording and replaying one takes, beside what it could take.

use crate::programs::mib;
use crate::{Figure, PAIRS, aa, cpu, fill, floor, median};
use anyhow::{Result, ensure};
use postcopy::proto::page::PAGE_BYTES;
use postcopy::{Options, Region, ServerAddress, Session};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::server::Server;
use serde_json::json;
use std::time::{Duration, Instant};

const BYTES: usize = 512 << 20;
const SET_PAGES: usize = (64 << 20) / PAGE_BYTES;
/// What a recording is made of for its cost: fewer, because each is a round trip.
const FEW_PAGES: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(120);
const GIGABIT: f64 = 125e6;

struct Pushed {
    server: Server,
    bytes: Vec<u8>,
    /// In the order of their touches.
    pages: Vec<usize>,
}

impl Pushed {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("mem");
        let bytes = memory_like(BYTES, 21);
        std::fs::write(&path, &bytes)?;
        let server = Server::start();
        let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
        let mut pages: Vec<usize> = (0..BYTES / PAGE_BYTES).collect();
        fastrand::Rng::with_seed(22).shuffle(&mut pages);
        Ok(Self { server, bytes, pages })
    }

    fn touch(&self, region: &Region, pages: &[usize]) -> Result<()> {
        for page in pages {
            ensure!(region[page * PAGE_BYTES] == self.bytes[page * PAGE_BYTES], "a wrong byte");
        }
        Ok(())
    }

    /// How many seconds it takes to touch these pages, of a session whose recording is told to the server.
    fn touched(&self, record: bool, pages: &[usize]) -> Result<f64> {
        let (region, session) = open(self.server.address(), Options::DEFAULT.record(record))?;
        let started = Instant::now();
        self.touch(&region, pages)?;
        let seconds = started.elapsed().as_secs_f64();
        drop(region);
        ensure!(session.close(PATIENCE), "it does not end");
        if record {
            session.wait_recorded(PATIENCE)?;
        }
        Ok(seconds)
    }

    /// How many seconds it takes to touch them where each is a fault that is answered by a copy of what lies here.
    fn touched_here(&self, pages: &[usize]) -> Result<f64> {
        let held: Vec<u8> =
            pages.iter().flat_map(|page| &self.bytes[page * PAGE_BYTES..][..PAGE_BYTES]).copied().collect();
        let region = floor::fill_on_touch(pages.len(), PAGE_BYTES, move |index, page| {
            page.copy_from_slice(&held[index * PAGE_BYTES..][..PAGE_BYTES]);
            Ok(())
        })?;
        let started = Instant::now();
        for index in 0..pages.len() {
            std::hint::black_box(region.bytes()[index * PAGE_BYTES]);
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

fn open(address: &ServerAddress, options: Options) -> Result<(Region, Session)> {
    let session = Session::open(address, &"mem".parse()?, options)?;
    Ok((session.map("mem")?, session))
}

fn forget_set(server: &Server) -> Result<()> {
    let removed = postcopy(server.address(), ["working-set", "rm", "mem"]).status()?;
    ensure!(removed.success(), "a working set can be removed");
    Ok(())
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let pushed = Pushed::new()?;
    let mut figures = vec![recording(&pushed)?];
    forget_set(&pushed.server)?;
    pushed.touched(true, &pushed.pages[..SET_PAGES])?;
    for round_trip_ms in [0, 1, 10] {
        figures.extend(replay(&pushed, round_trip_ms)?);
    }
    Ok(figures)
}

fn recording(pushed: &Pushed) -> Result<Figure> {
    let pages = &pushed.pages[..FEW_PAGES];
    let (mut recorded, mut plain, mut here, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        plain.push(pushed.touched(false, pages)?);
        recorded.push(pushed.touched(true, pages)?);
        here.push(pushed.touched_here(pages)?);
        let last = plain.len() - 1;
        ratios.push((recorded[last] - plain[last]) / here[last]);
    }
    let (ratio, aa) = (median(&mut ratios), aa(&plain));
    Ok(Figure {
        name: "recording: more than without, beside faults on the same pages that are answered here".into(),
        value: format!(
            "**{ratio:.2} x** ({:.3} s beside {:.3} s, {aa}; faults answered here {:.3} s)",
            median(&mut recorded),
            median(&mut plain),
            median(&mut here)
        ),
        bar: "≤ 1.2 x".into(),
        met: ratio <= 1.2,
        raw: json!({ "recorded": recorded, "plain": plain, "here": here, "ratios": ratios }),
    })
}

fn replay(pushed: &Pushed, round_trip_ms: u64) -> Result<Vec<Figure>> {
    let quality = Quality { round_trip: Duration::from_millis(round_trip_ms), bytes_per_second: GIGABIT };
    let held: Vec<u8> = pushed.pages[..SET_PAGES]
        .iter()
        .flat_map(|page| &pushed.bytes[page * PAGE_BYTES..][..PAGE_BYTES])
        .copied()
        .collect();
    let frames = fill::frames(&held);
    let options = || Options::DEFAULT.working_set(true);
    let (mut times, mut floors, mut ratios, mut missed, mut wire) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), 0);
    let (mut touched, mut touched_ratios) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let link = Link::to(&pushed.server.address().to_string(), quality);
        let started = Instant::now();
        let (region, session) = open(link.address(), options())?;
        while session.progress().working_set_pages < SET_PAGES as u64 {
            ensure!(started.elapsed() < PATIENCE, "{:?}", session.progress());
            std::thread::park_timeout(Duration::from_micros(500));
        }
        times.push(started.elapsed().as_secs_f64());
        pushed.touch(&region, &pushed.pages[..SET_PAGES])?;
        wire = session.progress().frame_bytes;
        drop((region, session));
        let alone = fill::decode_alone(&frames)?
            + fill::hash_alone(&held)
            + floor::copy_alone(&held, PAGE_BYTES)?.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "bytes and cores")]
        let least = (wire as f64 / GIGABIT).max(alone / cpu::cores() as f64);
        floors.push(least);
        ratios.push(times[times.len() - 1] / least);
        // And a program that touches it at once.
        let started = Instant::now();
        let (region, session) = open(link.address(), options())?;
        pushed.touch(&region, &pushed.pages[..SET_PAGES])?;
        touched.push(started.elapsed().as_secs_f64());
        touched_ratios.push(touched[touched.len() - 1] / least);
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        missed.push(session.progress().faults as f64 / SET_PAGES as f64);
    }
    let (ratio, share, touched_ratio) =
        (median(&mut ratios), median(&mut missed), median(&mut touched_ratios));
    let (same, same_touched) = (aa(&times), aa(&touched));
    let place = format!("a working set of 64 MiB, pages at random, {round_trip_ms} ms and 1 Gbit/s away");
    Ok(vec![
        Figure {
            name: format!(
                "{place}: all there, beside the larger of its time on the wire and its CPU time on all cores"
            ),
            value: format!(
                "**{ratio:.2} x** ({:.3} s beside {:.3} s, {same}; {:.1} MiB on the wire)",
                median(&mut times),
                median(&mut floors),
                mib(wire)
            ),
            bar: "≤ 1.3 x".into(),
            met: ratio <= 1.3,
            raw: json!({ "seconds": times, "floors": floors, "wire_bytes": wire }),
        },
        Figure {
            name: format!("{place}, touched at once in that order: all touched, beside the same"),
            value: format!(
                "**{touched_ratio:.2} x** ({:.3} s beside {:.3} s, {same_touched})",
                median(&mut touched),
                median(&mut floors)
            ),
            bar: "≤ 1.3 x".into(),
            met: touched_ratio <= 1.3,
            raw: json!({ "seconds": touched, "ratios": touched_ratios }),
        },
        Figure {
            name: format!("{place}, touched at once in that order: faults beside pages"),
            value: format!("**{:.1} %**", share * 100.0),
            bar: "≤ 3 %".into(),
            met: share <= 0.03,
            raw: json!({ "shares": missed }),
        },
    ])
}
