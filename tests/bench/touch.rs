//! A touch of an absent page: in chunks of 4 KiB that do not compress, and of 64 KiB that do.

use crate::floor::FloorServer;
use crate::{Figure, PAIRS, cpu, median, percentile};
use anyhow::{Context, Result};
use postcopy::proto::digest::Digest;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use serde_json::json;
use std::time::{Duration, Instant};

const PAGES: usize = 3000;
const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 600;

/// What one round took: p50 of a touch, CPU time of both sides for each touch, all in microseconds.
#[derive(Clone, Copy, Debug)]
struct Round {
    p50: f64,
    client_cpu: f64,
    server_cpu: f64,
}

/// What is touched: so many chunks of that size, each at its beginning.
struct Chunks {
    name: &'static str,
    bytes: Vec<u8>,
    chunk_bytes: usize,
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let pages = Chunks {
        name: "an absent page, 4 KiB that do not compress",
        bytes: noise(PAGES * PAGE_BYTES, 7),
        chunk_bytes: PAGE_BYTES,
    };
    let chunks = Chunks {
        name: "a chunk of 64 KiB that compresses",
        bytes: memory_like(CHUNKS * CHUNK, 8),
        chunk_bytes: CHUNK,
    };
    let (two, one) = (("client and server on a core each", 0, 1), ("all on one core", 0, 0));
    let figures = [
        placement(&pages, two, 1.3)?,
        placement(&pages, one, 1.6)?,
        placement(&chunks, two, 1.25)?,
        placement(&chunks, one, 1.25)?,
    ];
    cpu::unpin()?;
    Ok(figures.into())
}

fn placement(chunks: &Chunks, (name, client, server): (&str, usize, usize), bar: f64) -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    std::fs::write(&path, &chunks.bytes)?;
    let digests: Vec<_> = chunks.bytes.chunks(chunks.chunk_bytes).map(Digest::of).collect();
    let store = folder.path().join("store");
    let mut command = cpu::pinned(server, &postcopy_tests::binary("postcopyd"));
    command.arg("serve").arg("--store").arg(&store).args(["--listen", "127.0.0.1:0"]);
    let postcopyd = Server::spawn(command, &store).map_err(anyhow::Error::msg)?;
    let size = chunks.chunk_bytes.to_string();
    let args = ["push".as_ref(), path.as_os_str(), "mem".as_ref(), "--chunk-size".as_ref(), size.as_ref()];
    let _ = run(postcopyd.address(), args);
    let floor_server = || FloorServer::start(Some(server), &path, chunks.chunk_bytes);
    cpu::pin(client)?;

    let (mut ours, mut floors, mut ratios, mut same) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for seed in 0..PAIRS as u64 {
        let order = order(seed, digests.len(), chunks.chunk_bytes);
        let session = Session::open(postcopyd.address(), &"mem".parse()?, Options::default())?;
        let region = session.map("mem")?;
        let our = round(&region, &order, postcopyd.pid())?;
        drop((region, session));
        let floor = || -> Result<Round> {
            let server = floor_server()?;
            let region = server.map(digests.clone(), chunks.chunk_bytes)?;
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
        name: format!("touch of {}, {name}: p50 beside raw TCP, zstd, BLAKE3, UFFDIO_COPY", chunks.name),
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

/// Where to touch, in bytes.
fn order(seed: u64, chunks: usize, chunk_bytes: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..chunks).map(|chunk| chunk * chunk_bytes).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    order
}

fn round(memory: &[u8], order: &[usize], server: u32) -> Result<Round> {
    let before = (cpu::time_of(std::process::id())?, cpu::time_of(server).context("the server's times")?);
    let mut touches: Vec<f64> = order
        .iter()
        .map(|place| {
            let started = Instant::now();
            std::hint::black_box(memory[*place]);
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
