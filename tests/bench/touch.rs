//! A touch of an absent page, 4 KiB chunks, incompressible.

use crate::floor::FloorServer;
use crate::{Figure, cpu, median, percentile};
use anyhow::{Context, Result};
use postcopy::proto::digest::Digest;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::noise;
use postcopy_tests::server::Server;
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

const PAGES: usize = 3000;
const PAIRS: usize = 30;

/// What one round took: p50 of a touch, CPU time of both sides for each touch, all in microseconds.
#[derive(Clone, Copy, Debug)]
struct Round {
    p50: f64,
    client_cpu: f64,
    server_cpu: f64,
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let bytes = noise(PAGES * PAGE_BYTES, 7);
    std::fs::write(&path, &bytes)?;
    let digests: Vec<_> = bytes.chunks(PAGE_BYTES).map(Digest::of).collect();
    let two_cores = placement("client and server on a core each", 0, 1, 1.4, &path, &digests)?;
    let one_core = placement("all on one core", 0, 0, 1.8, &path, &digests)?;
    cpu::unpin()?;
    Ok(vec![two_cores, one_core])
}

fn placement(
    name: &str,
    client: usize,
    server: usize,
    bar: f64,
    path: &Path,
    digests: &[Digest],
) -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let store = folder.path().join("store");
    let mut command = cpu::pinned(server, &postcopy_tests::binary("postcopyd"));
    command.arg("serve").arg("--store").arg(&store).args(["--listen", "127.0.0.1:0"]);
    let postcopyd = Server::spawn(command, &store).map_err(anyhow::Error::msg)?;
    let args = ["push".as_ref(), path.as_os_str(), "mem".as_ref(), "--chunk-size".as_ref(), "4096".as_ref()];
    let _ = run(postcopyd.address(), args);
    let floor_server = || FloorServer::start(server, path);
    cpu::pin(client)?;

    let (mut ours, mut floors, mut ratios, mut same) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for seed in 0..PAIRS as u64 {
        let order = order(seed);
        let session = Session::open(postcopyd.address(), &"mem".parse()?, Options::default())?;
        let region = session.map("mem")?;
        let our = round(&region, &order, postcopyd.pid())?;
        drop((region, session));
        let floor = || -> Result<Round> {
            let server = floor_server()?;
            let region = server.map(digests.to_vec())?;
            round(region.bytes(), &order, server.pid())
        };
        let (floor_a, floor_b) = (floor()?, floor()?);
        ratios.push(our.p50 / floor_a.p50);
        same.push(floor_b.p50 / floor_a.p50);
        ours.push(our);
        floors.push(floor_a);
    }
    let ratio = median(&mut ratios);
    let aa = (percentile(&mut same, 3), percentile(&mut same, 97));
    let of = |rounds: &[Round], field: fn(&Round) -> f64| {
        median(&mut rounds.iter().map(field).collect::<Vec<_>>())
    };
    let p50 = (of(&ours, |r| r.p50), of(&floors, |r| r.p50));
    let cpu = (of(&ours, |r| r.client_cpu), of(&floors, |r| r.client_cpu));
    let server_cpu = (of(&ours, |r| r.server_cpu), of(&floors, |r| r.server_cpu));
    Ok(Figure {
        name: format!("touch of an absent page, {name}: p50 beside raw TCP + BLAKE3 + UFFDIO_COPY"),
        value: format!(
            "**{ratio:.2} x** ({:.0} us beside {:.0} us; A/A {:.2} to {:.2}). CPU a fault: client {:.0} us beside {:.0}, server {:.0} us beside {:.0}",
            p50.0, p50.1, aa.0, aa.1, cpu.0, cpu.1, server_cpu.0, server_cpu.1
        ),
        bar: format!("≤ {bar} x"),
        met: ratio <= bar,
        raw: json!({ "ratios": ratios, "aa": same, "p50_us": [p50.0, p50.1], "client_cpu_us": [cpu.0, cpu.1],
            "server_cpu_us": [server_cpu.0, server_cpu.1] }),
    })
}

fn order(seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..PAGES).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    order
}

fn round(memory: &[u8], order: &[usize], server: u32) -> Result<Round> {
    let before = (cpu::time_of(std::process::id())?, cpu::time_of(server).context("the server's times")?);
    let mut touches: Vec<f64> = order
        .iter()
        .map(|page| {
            let started = Instant::now();
            std::hint::black_box(memory[page * PAGE_BYTES]);
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    let after = (cpu::time_of(std::process::id())?, cpu::time_of(server)?);
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let each = |after: Duration, before: Duration| (after - before).as_secs_f64() * 1e6 / order.len() as f64;
    Ok(Round {
        p50: median(&mut touches),
        client_cpu: each(after.0, before.0),
        server_cpu: each(after.1, before.1),
    })
}
