//! A server on a store of a million packs and as many references: its start, its memory, and the time until it has
//! answered. The store's files are written by the formats of docs/FORMATS.md, because as many pushes would take hours.

use crate::Figure;
use anyhow::{Context, Result};
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::FrameEncoder;
use postcopy::proto::pack::PackBuilder;
use postcopy::proto::page::PAGE_BYTES;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::resident_kib;
use postcopy_tests::server::Server;
use rayon::prelude::*;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The count of packs, and of references, without POSTCOPY_BENCH_PACKS.
const PACKS: u32 = 1_000_000;
const IMAGE_BYTES: usize = 16 << 20;
const READY: Duration = Duration::from_secs(1);
const MEMORY_MIB: u64 = 200;

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let packs = match std::env::var("POSTCOPY_BENCH_PACKS") {
        Ok(packs) => packs.parse().context("POSTCOPY_BENCH_PACKS")?,
        Err(_) => PACKS,
    };
    let folder = tempfile::tempdir()?;
    let (store, image, other) =
        (folder.path().join("store"), folder.path().join("mem"), folder.path().join("other"));
    fs::write(&image, memory_like(IMAGE_BYTES, 3))?;
    fs::write(&other, memory_like(IMAGE_BYTES, 4))?;
    let server = Server::on(&store, "127.0.0.1:0");
    let _ = run(server.address(), ["push".as_ref(), image.as_os_str(), "image".as_ref()]);
    drop(server);
    fill(&store, packs)?;
    let started = Instant::now();
    let server = Server::on(&store, "127.0.0.1:0");
    let ready = started.elapsed();
    let asked = Instant::now();
    let _ = run(server.address(), ["bench", "image", "mem", "--no-eager"]);
    let served = asked.elapsed();
    let memory = resident_kib(server.pid()) >> 10;
    // The first look for missing chunks reads the trailers of all packs, because this store has no index yet.
    let push = |name: &str| {
        let asked = Instant::now();
        let _ = run(server.address(), ["push".as_ref(), other.as_os_str(), name.as_ref()]);
        asked.elapsed()
    };
    let (indexed, pushed) = (push("first"), push("second"));
    let with_index = resident_kib(server.pid()) >> 10;
    drop(server);
    let server = Server::on(&store, "127.0.0.1:0");
    fs::write(&other, memory_like(IMAGE_BYTES, 5))?;
    let asked = Instant::now();
    let _ = run(server.address(), ["push".as_ref(), other.as_os_str(), "third".as_ref()]);
    let pushed_anew = asked.elapsed();
    let anew = resident_kib(server.pid()) >> 10;
    Ok(vec![Figure {
        name: format!("server on a store of {packs} packs and as many references"),
        value: format!(
            "ready after **{ready:.2?}**, all pages of an image of 16 MiB {served:.2?}, **{memory} MiB**; first push of 16 MiB \
             {indexed:.1?}, next {pushed:.2?}, {with_index} MiB; after a new start {pushed_anew:.2?}, {anew} MiB"
        ),
        bar: format!("ready in {READY:?}, {MEMORY_MIB} MiB"),
        met: ready <= READY && memory.max(anew) <= MEMORY_MIB,
        raw: json!({
            "packs": packs, "ready_seconds": ready.as_secs_f64(), "served_seconds": served.as_secs_f64(),
            "memory_mib": memory, "index_seconds": indexed.as_secs_f64(), "push_seconds": pushed.as_secs_f64(),
            "memory_with_index_mib": with_index, "push_after_start_seconds": pushed_anew.as_secs_f64(),
            "memory_after_start_mib": anew,
        }),
    }])
}

/// Adds packs of a chunk each, and references to the image.
fn fill(store: &Path, packs: u32) -> Result<()> {
    let domain = store.join("default");
    let reference = fs::read(domain.join("refs/image/_tags/latest"))?;
    let write = |encoder: &mut FrameEncoder, number: u32| -> Result<()> {
        let mut chunk = vec![0; PAGE_BYTES];
        chunk[..4].copy_from_slice(&(number + 1).to_le_bytes());
        let (mut frame, mut pack) = (Vec::new(), PackBuilder::default());
        encoder.encode(&chunk, &mut frame);
        pack.push(Digest::of(&chunk), &frame);
        let pack = pack.finish();
        let name = Digest::of(&pack).hex();
        let dir = domain.join("packs").join(&name[..2]);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), pack)?;
        let tags = domain.join(format!("refs/app{}/_tags", number / 1000));
        fs::create_dir_all(&tags)?;
        fs::write(tags.join(format!("v{number}")), &reference)?;
        Ok(())
    };
    (0..packs).into_par_iter().try_for_each_init(|| FrameEncoder::new(1), write)
}
