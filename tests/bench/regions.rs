//! The cost of page faults, forks and attaching with many regions, beside few.

use crate::{Figure, median};
use anyhow::Result;
use postcopy::proto::page::PAGE_BYTES;
use postcopy_tests::faulter::Faulter;
use postcopy_tests::many_regions::ManyRegions;
use serde_json::json;
use std::time::Instant;

const FEW: usize = 100;
const MANY: usize = 60_000;
const FORKED: usize = 20_000;
const PAIRS: usize = 30;
/// Pages that are touched in a row. Those with an image's bytes are as many as few regions have in all pairs.
const FRESH: usize = 100;
const ABSENT: usize = 3;

pub(crate) fn measure() -> Result<Vec<Figure>> {
    // Chunks of one page, so that a fault is one page wherever its region lies.
    let start = |regions| ManyRegions::start(regions, MANY, FRESH * (PAIRS + 1), PAGE_BYTES, 95);
    let (mut few, mut many) = (start(FEW), start(MANY));
    let mut attached: Vec<f64> = (0..5).map(|_| start(MANY).attached.as_secs_f64() * 1000.0).collect();
    let raw_attached = attached.clone();
    let (mut fresh, mut absent) = (Vec::new(), Vec::new());
    let time = |process: &mut ManyRegions, first: usize, count: usize| {
        let started = Instant::now();
        let at = process.faulter.at(0, first);
        process.faulter.main.does(&format!("write {at} {count} 1"));
        started.elapsed().as_secs_f64() * 1e6 / count as f64
    };
    // The first pair warms up.
    for pair in 0..=PAIRS {
        let [with_many, with_few] = [&mut many, &mut few].map(|process| {
            let beyond = process.regions;
            time(process, beyond + pair * FRESH, FRESH)
        });
        fresh.push(with_many / with_few);
        let [with_many, with_few] = [&mut many, &mut few].map(|process| time(process, pair * ABSENT, ABSENT));
        absent.push(with_many / with_few);
    }
    let (raw_fresh, raw_absent) = (fresh.split_off(1), absent.split_off(1));
    let (fresh, absent) = (median(&mut raw_fresh.clone()), median(&mut raw_absent.clone()));
    let (fork, raw_fork) = forks();
    let attach = median(&mut attached);
    Ok(vec![
        Figure {
            name: format!(
                "first touch of fresh memory, {MANY} regions beside {FEW} (median of {PAIRS} pairs)"
            ),
            value: format!("**{fresh:.2} x**"),
            bar: "≤ 1.2 x".to_owned(),
            met: fresh <= 1.2,
            raw: json!({ "ratios": raw_fresh }),
        },
        Figure {
            name: format!("demand touch, {MANY} regions beside {FEW} (median of {PAIRS} pairs)"),
            value: format!("**{absent:.2} x**"),
            bar: "≤ 1.2 x".to_owned(),
            met: absent <= 1.2,
            raw: json!({ "ratios": raw_absent }),
        },
        Figure {
            name: format!("attaching {MANY} regions (median of 5)"),
            value: format!("**{attach:.0} ms**"),
            bar: "≤ 500 ms".to_owned(),
            met: attach <= 500.0,
            raw: json!({ "ms": raw_attached }),
        },
        Figure {
            name: format!(
                "a fork with {FORKED} regions, more than without a userfaultfd (median of {PAIRS} pairs)"
            ),
            value: format!("**{fork:.1} ms**"),
            bar: "≤ 20 ms".to_owned(),
            met: fork <= 20.0,
            raw: json!({ "ms": raw_fork }),
        },
    ])
}

/// The time by which a fork with many regions exceeds one without a userfaultfd.
fn forks() -> (f64, Vec<f64>) {
    let mut served = ManyRegions::start(FORKED, FORKED, 0, PAGE_BYTES, 96);
    // Without features, and registered memory that stays absent: the kernel tells of no fork.
    let mut plain = Faulter::start(0, &[&format!("private:{FORKED}")]);
    let time = |faulter: &mut Faulter| {
        let started = Instant::now();
        let mut child = faulter.fork();
        let took = started.elapsed().as_secs_f64() * 1000.0;
        child.tell("exit");
        took
    };
    let more: Vec<f64> = (0..PAIRS).map(|_| time(&mut served.faulter) - time(&mut plain)).collect();
    (median(&mut more.clone()), more)
}
