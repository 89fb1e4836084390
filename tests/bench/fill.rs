//! The background fill of a compressible file.

use crate::{Figure, PAIRS, aa, cpu, floor, median};
use anyhow::Result;
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::{ChunkFrame, FrameDecoder, FrameEncoder};
use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use serde_json::json;
use std::time::{Duration, Instant};

const BYTES: usize = 512 << 20;
const CHUNK: usize = 64 << 10;
const LEVEL: i32 = 3;

pub(crate) fn measure() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let bytes = memory_like(BYTES, 3);
    std::fs::write(&path, &bytes)?;
    let server = Server::start();
    let pushed = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    let frames = frames(&bytes);
    let (mut ratios, mut times, mut sums) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let before = cpu::time_of(server.pid())?;
        let started = Instant::now();
        let session = Session::open(server.address(), &"mem".parse()?, Options::DEFAULT.fill(true))?;
        let region = session.map("mem")?;
        session.wait_resident(Duration::from_secs(600))?;
        let ours = started.elapsed().as_secs_f64();
        let of_server = (cpu::time_of(server.pid())? - before).as_secs_f64();
        anyhow::ensure!(*region == bytes[..], "wrong bytes");
        drop((region, session));
        let alone = of_server
            + decode_alone(&frames)?
            + hash_alone(&bytes)
            + floor::copy_alone(&bytes, CHUNK)?.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a few cores")]
        let least = alone / cpu::cores() as f64;
        ratios.push(least / ours);
        times.push(ours);
        sums.push(alone);
    }
    let (ratio, aa) = (median(&mut ratios), aa(&times));
    Ok(Figure {
        name: "background fill of 512 MiB, beside cores / (CPU time of the server, and of zstd + BLAKE3 + UFFDIO_COPY alone)"
            .into(),
        value: format!(
            "**{ratio:.2} x** ({:.2} s, {aa}; alone {:.2} s of CPU time, the server included; {:.2} : 1)",
            median(&mut times),
            median(&mut sums),
            pushed["ratio"].as_f64().unwrap_or(f64::NAN)
        ),
        bar: "≥ 0.8 x".into(),
        met: ratio >= 0.8,
        raw: json!({ "ratios": ratios, "seconds": times, "alone_cpu_seconds": sums }),
    })
}

/// The bytes as frames.
pub(crate) fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut encoder = FrameEncoder::new(LEVEL);
    let encode = |chunk| {
        let mut frame = Vec::new();
        encoder.encode(chunk, &mut frame);
        frame
    };
    bytes.chunks(CHUNK).map(encode).collect()
}

pub(crate) fn decode_alone(frames: &[Vec<u8>]) -> Result<f64> {
    let (mut decoder, mut chunk) = (FrameDecoder::default(), vec![0; CHUNK]);
    let started = Instant::now();
    for frame in frames.iter().filter(|frame| !frame.is_empty()) {
        decoder.decode(&ChunkFrame::parse(frame)?, &mut chunk)?;
    }
    Ok(started.elapsed().as_secs_f64())
}

pub(crate) fn hash_alone(bytes: &[u8]) -> f64 {
    let started = Instant::now();
    for chunk in bytes.chunks(CHUNK) {
        std::hint::black_box(Digest::of(chunk));
    }
    started.elapsed().as_secs_f64()
}
