//! A restored process with many extents that forks many children at once: `postcopy criu` beside
//! `criu lazy-pages`.

use crate::criu::{Dumped, wait};
use crate::{Figure, aa, median, percentile};
use anyhow::{Context, Result, ensure};
use postcopy_tests::criu::status;
use postcopy_tests::server::Server;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const EXTENTS: usize = 4000;
const CHILDREN: usize = 100;
/// The memory of the other process of the tree, more than it touches.
const PAGES: usize = 16_384;
const ROUNDS: usize = 10;
/// The words of the program's status before those of single touches.
const HEADER: usize = 8;
const WORDS: usize = HEADER + PAGES;
const AT_ERRORS: usize = 1;
const AT_TIME: usize = 2;
const AT_TOUCHES: usize = 3;
const AT_GO: usize = 4;

/// The measured times of one daemon's restores: the seconds until all children had ended, and the
/// milliseconds of the other process's page faults until then.
#[derive(Default)]
struct Times {
    seconds: Vec<f64>,
    touches_ms: Vec<f64>,
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let arguments = [EXTENTS, CHILDREN, PAGES].map(|number| number.to_string());
    let [extents, children, pages] = arguments.each_ref().map(String::as_str);
    let dumped = Dumped::new("children", &[extents, children, pages, "STATUS"])?;
    let server = dumped.push();
    let [mut theirs, mut filled, mut lazy] = [(); 3].map(|()| Times::default());
    for round in 0..ROUNDS {
        by_criu(&dumped, &mut theirs)?;
        by_us(&dumped, &server, &format!("filled-{round}"), &[], &mut filled)?;
        // Without the fill each page is a fault.
        by_us(&dumped, &server, &format!("lazy-{round}"), &["--fill", "nothing"], &mut lazy)?;
    }
    Ok(vec![
        beside("with the fill", &filled, &theirs),
        beside("without the fill", &lazy, &theirs),
        waits("with the fill", &filled, &theirs),
        waits("without the fill", &lazy, &theirs),
    ])
}

fn by_criu(dumped: &Dumped, times: &mut Times) -> Result<()> {
    let mut daemon = dumped.daemon_of_criu()?;
    let restored = restore(dumped, &dumped.images(), times).context("with criu's own daemon");
    daemon.kill()?;
    daemon.wait()?;
    restored
}

fn by_us(dumped: &Dumped, server: &Server, name: &str, more: &[&str], times: &mut Times) -> Result<()> {
    let (images, mut daemon) = dumped.daemon_of_ours(server.address(), name, more);
    restore(dumped, &images, times)?;
    // Its tasks have ended.
    daemon.wait();
    Ok(())
}

/// Restores, waits until all children have ended, and ends the program.
fn restore(dumped: &Dumped, images: &Path, times: &mut Times) -> Result<()> {
    let path = dumped.status();
    let file = File::options().write(true).open(&path)?;
    file.write_all_at(&[0; WORDS * 8], 0)?;
    // It forks as soon as it runs.
    file.write_all_at(&1_u64.to_ne_bytes(), (AT_GO * 8) as u64)?;
    let mut restored = dumped.criu.restore(images, ["--lazy-pages"]);
    wait(|| status::<HEADER>(&path)[AT_TIME] != 0 || restored.has_ended())
        .with_context(|| format!("{:?}", status::<HEADER>(&path)))?;
    ensure!(!restored.has_ended(), "the restored program has ended: {}", restored.log());
    let words = status::<WORDS>(&path);
    ensure!(words[AT_ERRORS] == 0, "{} pages or children were wrong", words[AT_ERRORS]);
    let touched = usize::try_from(words[AT_TOUCHES])?;
    ensure!(touched > 0, "the other process has touched nothing");
    #[expect(clippy::cast_precision_loss, reason = "some seconds")]
    let thousandths = |word: u64| word as f64 / 1e3;
    times.seconds.push(thousandths(words[AT_TIME]) / 1e3);
    times.touches_ms.extend(words[HEADER..][..touched].iter().map(|us| thousandths(*us)));
    Ok(())
}

fn beside(how: &str, ours: &Times, theirs: &Times) -> Figure {
    let [time, their_time] = [ours, theirs].map(|times| median(&mut times.seconds.clone()));
    let ratio = time / their_time;
    Figure {
        name: format!(
            "CRIU, {CHILDREN} children at once of a process with {EXTENTS} extents, {how}: all have ended, beside `criu lazy-pages`"
        ),
        value: format!(
            "**{ratio:.2} x** ({time:.3} s, {}, beside {their_time:.3} s, {})",
            aa(&ours.seconds),
            aa(&theirs.seconds)
        ),
        bar: "≤ 1.2 x".to_owned(),
        met: ratio <= 1.2,
        raw: json!({ "ours": ours.seconds, "criu": theirs.seconds }),
    }
}

fn waits(how: &str, ours: &Times, theirs: &Times) -> Figure {
    let of = |times: &Times, p| percentile(&mut times.touches_ms.clone(), p);
    let longest = of(ours, 100);
    Figure {
        name: format!("the same, {how}: the longest touch of another process of the tree meanwhile"),
        value: format!(
            "**{longest:.1} ms** of {} (p99 {:.1} ms; with `criu lazy-pages` {:.1} ms, p99 {:.1} ms)",
            ours.touches_ms.len(),
            of(ours, 99),
            of(theirs, 100),
            of(theirs, 99)
        ),
        bar: "≤ 50 ms".to_owned(),
        met: longest <= 50.0,
        raw: json!({ "ms": ours.touches_ms, "criu_ms": theirs.touches_ms }),
    }
}
