//! A push to a server on the same machine, its verifying included.

use crate::{Figure, PAIRS, aa, median};
use anyhow::Result;
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::FrameEncoder;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use rayon::prelude::*;
use serde_json::json;
use std::time::Instant;

const BYTES: usize = 1 << 30;
const CHUNK: usize = 64 << 10;
const LEVEL: i32 = 3;

pub(crate) fn measure() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let bytes = memory_like(BYTES, 5);
    std::fs::write(&path, &bytes)?;
    // So that writing it back is over when the clock runs.
    std::fs::File::open(&path)?.sync_all()?;
    let (mut ratios, mut times, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        // A new, empty store each time.
        let server = Server::start();
        let started = Instant::now();
        let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
        let ours = started.elapsed().as_secs_f64();
        drop(server);
        let alone = alone(&bytes);
        ratios.push(alone / ours);
        times.push(ours);
        floors.push(alone);
    }
    let spread = aa(&times);
    let ratio = median(&mut ratios);
    Ok(Figure {
        name: "push of 1 GiB to a server on the same machine, beside zstd + BLAKE3 alone on all cores".into(),
        value: format!(
            "**{ratio:.2} x** ({:.2} s, {spread}; alone {:.2} s)",
            median(&mut times),
            median(&mut floors)
        ),
        bar: "≥ 0.55 x".into(),
        met: ratio >= 0.55,
        raw: json!({ "ratios": ratios, "seconds": times, "alone_seconds": floors }),
    })
}

fn alone(bytes: &[u8]) -> f64 {
    let started = Instant::now();
    bytes.par_chunks(CHUNK).for_each_init(
        || (FrameEncoder::new(LEVEL), Vec::new()),
        |(encoder, frame), chunk| {
            frame.clear();
            encoder.encode(chunk, frame);
            std::hint::black_box(Digest::of(chunk));
        },
    );
    started.elapsed().as_secs_f64()
}
