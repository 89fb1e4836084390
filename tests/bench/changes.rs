//! How long it takes to know what was written in 1 GiB.

use crate::{Figure, median};
use anyhow::{Result, ensure};
use postcopy::proto::page::PAGE_BYTES;
use postcopy::{ForeignMemory, Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::{noise, sparse};
use postcopy_tests::server::Server;
use serde_json::json;
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 30;
const WRITTEN: usize = 1000;
const RUNS: usize = 30;
const BAR_MS: f64 = 5.0;

pub(crate) fn measure() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    // Half of it takes memory, the other half are zero pages: the kernel looks at each of both.
    let island = noise(BYTES / 2, 12);
    sparse(&path, BYTES as u64, &[(0, &island)]);
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    let options = Options::DEFAULT.track_writes(true).fill(true);
    let session = Session::open(server.address(), &"mem".parse()?, options)?;
    let mut region = session.map("mem")?;
    session.wait_resident(Duration::from_secs(600))?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let mut written = std::collections::BTreeSet::new();
        for _ in 0..WRITTEN {
            let page = fastrand::usize(..BYTES / PAGE_BYTES);
            region[page * PAGE_BYTES] = 1;
            written.insert(page);
        }
        let started = Instant::now();
        let changes = region.take_changes()?;
        times.push(started.elapsed().as_secs_f64() * 1000.0);
        let told: usize = changes.written.iter().map(|run| run.len() / PAGE_BYTES).sum();
        ensure!(told == written.len(), "{told} pages told of, {} written", written.len());
    }
    let raw = times.clone();
    let ms = median(&mut times);
    Ok(Figure {
        name: format!("what was written, {WRITTEN} scattered pages of 1 GiB, with reset (median of {RUNS})"),
        value: format!("**{ms:.1} ms**"),
        bar: format!("≤ {BAR_MS} ms"),
        met: ms <= BAR_MS,
        raw: json!({ "ms": raw }),
    })
}

/// What the first write to a page of another process costs where that is tracked, which waits for the pager.
pub(crate) fn first_write() -> Result<Figure> {
    const PAGES: usize = 2000;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    std::fs::write(&path, noise(PAGES * PAGE_BYTES, 13))?;
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    let attach = |track_writes: bool| -> Result<(Faulter, Session)> {
        let faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
        let options = Options::DEFAULT.track_writes(track_writes).fill(true);
        let regions = [faulter.region(0, "mem", 0)];
        let pid = Some(faulter.main.pid);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid, is_registered: true };
        let session = Session::attach(server.address(), &"mem".parse()?, options, &memory)?;
        session.wait_resident(Duration::from_secs(60))?;
        Ok((faulter, session))
    };
    let ((mut tracked, session), (mut plain, _plain)) = (attach(true)?, attach(false)?);
    let mut costs = Vec::new();
    for _ in 0..RUNS {
        session.take_changes()?;
        let time = |faulter: &mut Faulter| {
            let started = Instant::now();
            faulter.main.does(&format!("write {} {PAGES} 1", faulter.at(0, 0)));
            started.elapsed().as_secs_f64() * 1e6 / PAGES as f64
        };
        costs.push(time(&mut tracked) - time(&mut plain));
        let told: usize = session.changes()?.written.iter().map(|run| run.len() / PAGE_BYTES).sum();
        ensure!(told == PAGES, "{told} pages told of, {PAGES} written");
    }
    let raw = costs.clone();
    let us = median(&mut costs);
    Ok(Figure {
        name: format!(
            "first write to a page of another process, tracked: more than without (median of {RUNS} pairs)"
        ),
        value: format!("**{us:.0} us**"),
        bar: "none".to_owned(),
        met: true,
        raw: json!({ "us": raw }),
    })
}
