//! Touches of absent pages while everything else comes in the background, beside the same without that; and touches one
//! after another, which are read ahead, beside touches at random.

use crate::{Figure, PAIRS, aa, median};
use anyhow::{Context, Result};
use postcopy::ServerAddress;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::server::Server;
use serde_json::{Value, json};
use std::time::Duration;

const BYTES: usize = 256 << 20;
const SCANS: usize = 7;
const BAR: f64 = 1.3;

/// On one machine, where the cores are short; and 1 ms away, where 1 Gbit/s are.
pub(crate) fn measure() -> Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    std::fs::write(&path, memory_like(BYTES, 3))?;
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    let quality = Quality { round_trip: Duration::from_millis(1), bytes_per_second: 125e6 };
    let link = Link::to(&server.address().to_string(), quality);
    let mut figures = Vec::new();
    for (address, place) in [(server.address(), "on one machine"), (link.address(), "1 ms and 1 Gbit/s away")]
    {
        figures.push(beside(address, place)?);
        figures.push(scan(address, place)?);
    }
    Ok(figures)
}

fn scan(server: &ServerAddress, place: &str) -> Result<Figure> {
    let (mut forward, mut scattered) = (Vec::new(), Vec::new());
    for round in 0..SCANS {
        let seed = round.to_string();
        let args = ["bench", "mem", "mem", "--no-eager", "--seed", &seed];
        scattered.push(number(&run(server, args), "all_touched_ms")?);
        forward.push(number(&run(server, args.iter().chain(&["--sequential"])), "all_touched_ms")?);
    }
    let ratio = median(&mut forward) / median(&mut scattered);
    Ok(Figure {
        name: format!("256 MiB touched one after another, {place}, beside the same at random"),
        value: format!(
            "**{ratio:.2} x** ({:.0} ms beside {:.0} ms)",
            median(&mut forward),
            median(&mut scattered)
        ),
        bar: "none".into(),
        met: true,
        raw: json!({ "forward_ms": forward, "scattered_ms": scattered }),
    })
}

fn beside(server: &ServerAddress, place: &str) -> Result<Figure> {
    let (mut without, mut with, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..PAIRS {
        let seed = round.to_string();
        let args = ["bench", "mem", "mem", "--no-eager", "--seed", &seed];
        without.push(number(&run(server, args), "touch_p50_us")?);
        let filled = run(server, args.iter().chain(&["--fill"]));
        with.push(number(&filled, "touch_p50_us")?);
        whole.push(number(&filled, "all_touched_ms")?);
    }
    let aa = aa(&without);
    let ratio = median(&mut with) / median(&mut without);
    Ok(Figure {
        name: format!(
            "touch of an absent page while the rest comes in the background, {place}: p50 beside the same without"
        ),
        value: format!(
            "**{ratio:.2} x** ({:.0} us beside {:.0} us, {aa}; all there after {:.0} ms)",
            median(&mut with),
            median(&mut without),
            median(&mut whole)
        ),
        bar: format!("≤ {BAR} x"),
        met: ratio <= BAR,
        raw: json!({ "with_us": with, "without_us": without, "all_ms": whole }),
    })
}

fn number(report: &Value, field: &str) -> Result<f64> {
    report[field].as_f64().with_context(|| format!("{field} is missing"))
}
