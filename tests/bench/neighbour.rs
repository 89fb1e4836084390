//! The touches of a client beside another one that asks for everything.

use crate::{Figure, percentile};
use anyhow::{Result, ensure};
use postcopy::{Options, Session};
use postcopy_tests::cli::postcopy;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use serde_json::json;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const MIB: usize = 1 << 20;
const BYTES: usize = 256 * MIB;
const CHUNK: usize = 64 << 10;
const TOUCHES: usize = 600;
const ROUNDS: u64 = 15;
/// Processes of the other client.
const GREEDY: usize = 4;

/// Does `work` while other processes read the whole image again and again.
fn beside_greedy<T>(server: &Server, work: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..GREEDY {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    // Its own work waits for all others', as if another machine did it.
                    let verify = postcopy(server.address(), ["verify", "image"]);
                    let mut idle = Command::new("chrt");
                    idle.args(["--idle", "0"]).arg(verify.get_program()).args(verify.get_args());
                    let _ = idle.env("POSTCOPY_SERVER", server.address().to_string()).output();
                }
            });
        }
        let result = work();
        is_over.store(true, Ordering::Relaxed);
        result
    })
}

pub(crate) fn measure() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let bytes = memory_like(BYTES, 41);
    std::fs::write(&path, &bytes)?;
    let server = Server::start();
    let _ = postcopy_tests::cli::run(server.address(), ["push".as_ref(), path.as_os_str(), "image".as_ref()]);
    let (mut quiet, mut beside) = (Vec::new(), Vec::new());
    for seed in 0..ROUNDS {
        quiet.extend(touches(&server, &bytes, seed)?);
        beside.extend(beside_greedy(&server, || touches(&server, &bytes, seed))?);
    }
    let raw = json!({ "quiet_us": quiet, "beside_us": beside });
    let [alone, with] = [percentile(&mut quiet, 99), percentile(&mut beside, 99)];
    let ratio = with / alone;
    Ok(Figure {
        name: format!("p99 of a client's touches beside {GREEDY} processes of another that read everything"),
        value: format!("**{ratio:.2} x** ({with:.0} us beside {alone:.0} us)"),
        bar: "≤ 2 x".into(),
        met: ratio <= 2.0,
        raw,
    })
}

/// Returns the microseconds of touches of absent chunks.
fn touches(server: &Server, bytes: &[u8], seed: u64) -> Result<Vec<f64>> {
    let session = Session::open(server.address(), &"image".parse()?, Options::DEFAULT)?;
    let region = session.map("mem")?;
    let mut chunks: Vec<usize> = (0..BYTES / CHUNK).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut chunks);
    let touch = |chunk: &usize| {
        let (at, started) = (chunk * CHUNK + 5, Instant::now());
        let byte = region[at];
        let took = started.elapsed().as_secs_f64() * 1e6;
        ensure!(byte == bytes[at], "a wrong byte");
        Ok(took)
    };
    chunks[..TOUCHES].iter().map(touch).collect()
}
