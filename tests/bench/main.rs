//! The figures of docs/BENCHMARKS.md, each beside a floor that is measured in the same run.
//!
//! An absolute time says little on a shared machine. So each figure is a ratio to the least that the same work could
//! take, measured alternately with it and in the same placement on the cores. `postcopy-bench [NAME…]` measures
//! all, or those named: touch, fill, pace, push, memory, replay, changes, regions, references, scale,
//! progress, kills, machines, criu, children, criu-remote; and, where they are named, programs, programs-full, mapped, chunks,
//! restores, threads, mount, store, bucket, pushes, collections, neighbour. It
//! prints a table in Markdown and, with `--json FILE`, the raw values.
//! `--only NAME`, `--over NETWORK` and `--rounds N` limit the programs to one, the networks, and how often each is restored.
//! With `--docs DIR`, reports go into DIR/BENCHMARKS.md and DIR/bench, and the table, if it is of all, or of one core
//! (`taskset -c 0`).

mod arms;
mod bucket;
mod changes;
mod children;
mod cpu;
mod criu;
mod daemons;
mod fill;
mod floor;
mod generations;
mod mapped;
mod memory;
mod mount;
mod neighbour;
mod pace;
mod plot;
mod programs;
mod progress;
mod push;
mod references;
mod regions;
mod replay;
mod report;
mod scale;
mod store;
mod sweeps;
mod symbols;
mod touch;
mod workloads;

use crate::programs::Plan;
use crate::report::{Documents, Report};
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::Path;

/// Pairs of what is measured and what it is beside.
const PAIRS: usize = 30;
const MAPPED_ROUNDS: u64 = 30;
const SWEEP_ROUNDS: u64 = 7;

/// One line of the table.
struct Figure {
    name: String,
    value: String,
    bar: String,
    met: bool,
    raw: serde_json::Value,
}

fn main() -> Result<()> {
    // Restored programs are not the business of this system's init, which may look for the dead only now and then.
    nix::sys::prctl::set_child_subreaper(true)?;
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    // Before a thread is pinned.
    let has_one_core = cpu::cores() == 1;
    if names.first().is_some_and(|name| name == "floor-server") {
        return floor::serve();
    }
    let json = option(&mut names, "--json")?;
    let documents = option(&mut names, "--docs")?.map(|docs| Documents {
        folder: Path::new(&docs).join("bench"),
        document: Path::new(&docs).join("BENCHMARKS.md"),
    });
    let _pids = ManyPids::new();
    let rounds = option(&mut names, "--rounds")?.map(|rounds| rounds.parse()).transpose()?;
    let only = option(&mut names, "--only")?;
    let over = option(&mut names, "--over")?;
    let limited = |plan: Plan| plan.limited(only.as_deref(), over.as_deref(), rounds);
    let wanted = |name: &str| names.is_empty() || names.iter().any(|n| n == name);
    let mut figures = Vec::new();
    if wanted("touch") {
        figures.extend(touch::measure()?);
    }
    if wanted("fill") {
        figures.push(fill::measure()?);
    }
    if wanted("pace") {
        figures.extend(pace::measure()?);
    }
    if wanted("push") {
        figures.push(push::measure()?);
    }
    if wanted("memory") {
        figures.push(memory::measure()?);
    }
    if wanted("replay") {
        figures.extend(replay::measure()?);
    }
    if wanted("changes") {
        figures.push(changes::measure()?);
        figures.push(changes::first_write()?);
    }
    if wanted("regions") {
        figures.extend(regions::measure()?);
    }
    if wanted("references") {
        figures.extend(references::measure()?);
    }
    if wanted("scale") {
        figures.extend(scale::measure()?);
    }
    if wanted("progress") {
        figures.extend(progress::measure()?);
    }
    if wanted("kills") {
        figures.push(daemons::kills()?);
    }
    if wanted("machines") {
        figures.extend(daemons::touches()?);
    }
    if wanted("criu") {
        figures.extend(criu::local()?);
    }
    if wanted("children") {
        figures.extend(children::measure()?);
    }
    if wanted("criu-remote") {
        figures.extend(criu::remote()?);
    }
    let all_or_on_one_core = (names.is_empty() || has_one_core) && !figures.is_empty();
    if let (true, Some(documents)) = (all_or_on_one_core, &documents) {
        let name = if has_one_core { "figures-one-core" } else { "figures" }.into();
        documents.write(&Report { name, table: table(&figures), plot: None, raw: raw(&figures) })?;
    }
    let mut show = |mut report: Report, beside: Vec<Figure>| {
        if !beside.is_empty() {
            report.table += &format!("\n{}", table(&beside));
        }
        println!("{}", report.table);
        figures.extend(beside);
        documents.as_ref().map_or(Ok(()), |documents| documents.write(&report))
    };
    // Those that take longer are measured only when they are named.
    let named = |name: &str| names.iter().any(|n| n == name);
    if named("programs") {
        programs::measure(&limited(Plan::short()), &mut show)?;
    }
    if named("programs-full") {
        programs::measure(&limited(Plan::full()), &mut show)?;
    }
    if named("mapped") {
        for network in [programs::NEAR, programs::HERE] {
            let (report, figures) = mapped::measure(network, MAPPED_ROUNDS)?;
            show(report, figures)?;
        }
    }
    if named("chunks") {
        show(sweeps::chunks(SWEEP_ROUNDS)?, Vec::new())?;
    }
    if named("restores") {
        let (report, figures) = sweeps::restores(SWEEP_ROUNDS)?;
        show(report, figures)?;
    }
    if named("threads") {
        let (report, figures) = sweeps::threads(SWEEP_ROUNDS)?;
        show(report, figures)?;
    }
    if named("mount") {
        figures.extend(mount::measure()?);
    }
    if named("store") {
        figures.extend(store::measure()?);
    }
    if named("bucket") {
        figures.extend(bucket::measure()?);
    }
    if named("pushes") {
        figures.push(generations::pushes()?);
    }
    if named("neighbour") {
        figures.push(neighbour::measure()?);
    }
    if named("collections") {
        figures.push(generations::beside_collections()?);
    }
    print!("{}", table(&figures));
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_string_pretty(&raw(&figures))?)?;
    }
    Ok(())
}

fn table(figures: &[Figure]) -> String {
    let row = |Figure { name, value, bar, met, .. }: &Figure| {
        format!("| {name} | {value} | {bar} | {} |\n", if *met { "met" } else { "missed" })
    };
    let rows: String = figures.iter().map(row).collect();
    format!("| figure | measured | bar | |\n|---|---|---|---|\n{rows}")
}

fn raw(figures: &[Figure]) -> serde_json::Value {
    figures.iter().map(|f| json!({ "name": f.name, "met": f.met, "raw": f.raw })).collect()
}

/// A dumped program comes back under its own pid, which must not go round to another process meanwhile: as many pids as
/// systems of 64 bits usually have, until this is dropped.
struct ManyPids(Option<String>);

impl ManyPids {
    const FILE: &str = "/proc/sys/kernel/pid_max";

    fn new() -> Self {
        let before = std::fs::read_to_string(Self::FILE).ok();
        // Who may not write it restores no programs.
        Self(before.filter(|_| std::fs::write(Self::FILE, "4194304").is_ok()))
    }
}

impl Drop for ManyPids {
    fn drop(&mut self) {
        _ = self.0.take().map(|before| std::fs::write(Self::FILE, before));
    }
}

/// Takes an option and its value out of the arguments.
fn option(arguments: &mut Vec<String>, name: &str) -> Result<Option<String>> {
    let Some(at) = arguments.iter().position(|argument| argument == name) else { return Ok(None) };
    ensure!(at + 1 < arguments.len(), "{name} needs a value");
    Ok(arguments.drain(at..at + 2).nth(1))
}

/// How far apart runs of the same are: each beside the one before it, in the order in which they were measured.
fn aa(runs: &[f64]) -> String {
    let mut ratios: Vec<f64> = runs.windows(2).map(|pair| pair[1] / pair[0]).collect();
    format!("A/A {:.2} to {:.2}", percentile(&mut ratios, 3), percentile(&mut ratios, 97))
}

/// The middle of the values, which are sorted by this.
fn median(values: &mut [f64]) -> f64 {
    percentile(values, 50)
}

fn percentile(values: &mut [f64], p: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => values[(n - 1) * p / 100],
    }
}
