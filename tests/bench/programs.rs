//! Real programs, restored over a link: how soon they give their first answer, by each way of [`Arm`].
//!
//! A working set is recorded with one request, and every run asks another one. The ways take turns.

use crate::arms::{Arm, Dumped, Run};
use crate::cpu::Placement;
use crate::plot::{self, Bar};
use crate::report::Report;
use crate::workloads::Workload;
use crate::{Figure, median, percentile};
use anyhow::Result;
use postcopy::ServerAddress;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::v1::GetWorkingSetRequest;
use postcopy::proto::v1::working_set_service_client::WorkingSetServiceClient;
use postcopy_tests::cli::postcopy;
use postcopy_tests::link::Quality;
use serde_json::json;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

/// Seeds of the requests that are recorded, and compared with one another.
const RECORDED: [u64; 2] = [1, 2];
const FIRST_SEED: u64 = 100;
const GIGABIT: f64 = 125e6;
/// More than a proxy on loopback forwards.
const UNLIMITED: f64 = 1e12;

/// A network, what it is called in files' names, and on which cores its two ends are.
#[derive(Clone, Copy)]
pub(crate) struct Network {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) quality: Quality,
    placement: Placement,
}

const fn network(name: &'static str, about: &'static str, micros: u64, bytes_per_second: f64) -> Network {
    let quality = Quality { round_trip: Duration::from_micros(micros), bytes_per_second };
    Network { name, about, quality, placement: Placement::Any }
}

/// The one of the short benchmark.
pub(crate) const NEAR: Network = network("1ms-1gbit", "1 ms, 1 Gbit/s", 1000, GIGABIT);
pub(crate) const HERE: Network = network("0ms", "no delay, no limit", 0, UNLIMITED);
const ON_ONE_CORE: Network = Network {
    name: "0ms-one-core",
    about: "no delay, no limit, all on one core",
    placement: Placement::One,
    ..HERE
};
const A_CORE_EACH: Network = Network {
    name: "0ms-a-core-each",
    about: "no delay, no limit, server and network on one core, all else on the other",
    placement: Placement::Each,
    ..HERE
};
const NETWORKS: [Network; 8] = [
    NEAR,
    network("10ms-1gbit", "10 ms, 1 Gbit/s", 10_000, GIGABIT),
    network("0ms-1gbit", "no delay, 1 Gbit/s", 0, GIGABIT),
    network("0.2ms-1gbit", "0.2 ms, 1 Gbit/s", 200, GIGABIT),
    HERE,
    network("0.2ms", "0.2 ms, no limit", 200, UNLIMITED),
    network("1ms", "1 ms, no limit", 1000, UNLIMITED),
    network("10ms", "10 ms, no limit", 10_000, UNLIMITED),
];

/// What is measured: programs, networks, and how often.
pub(crate) struct Plan {
    pub(crate) workloads: Vec<(Workload, Vec<Network>)>,
    pub(crate) rounds: u64,
}

impl Plan {
    /// Two programs, one network.
    pub(crate) fn short() -> Self {
        let near = |workload| (workload, vec![NEAR]);
        Self { workloads: [Workload::Redis, Workload::Python].map(near).into(), rounds: 30 }
    }

    /// All programs over two networks, one over all of them, and one pinned to cores as well.
    pub(crate) fn full() -> Self {
        let networks = |workload| match workload {
            Workload::Redis => NETWORKS.to_vec(),
            Workload::Python => vec![NEAR, HERE, ON_ONE_CORE, A_CORE_EACH],
            _ => vec![NEAR, HERE],
        };
        Self { workloads: Workload::ALL.map(|workload| (workload, networks(workload))).into(), rounds: 30 }
    }

    /// Of it the program of that name, over the network of that name, so often; what is not given stays.
    pub(crate) fn limited(mut self, only: Option<&str>, over: Option<&str>, rounds: Option<u64>) -> Self {
        self.workloads.retain(|(workload, _)| only.is_none_or(|name| name == workload.name()));
        for (_, networks) in &mut self.workloads {
            networks.retain(|network| over.is_none_or(|name| name == network.name));
        }
        self.rounds = rounds.unwrap_or(self.rounds);
        self
    }
}

pub(crate) fn measure(plan: &Plan, mut done: impl FnMut(Report, Vec<Figure>) -> Result<()>) -> Result<()> {
    for (workload, networks) in &plan.workloads {
        let asked = FIRST_SEED..FIRST_SEED + plan.rounds;
        let mut dumped = Dumped::new(*workload, RECORDED.into_iter().chain(asked.clone()))?;
        let address = dumped.server.address().clone();
        let recorded = Recorded::new(&address, "app", |seed| dumped.record(seed))?;
        for network in networks {
            dumped.place(network.placement)?;
            let mut runs = Arm::EACH.map(|arm| (arm, Vec::new()));
            for seed in asked.clone() {
                for (arm, runs) in &mut runs {
                    let run = dumped.run(*arm, network.quality, seed)?;
                    eprintln!("{} {} {}: {run:.3?}", workload.name(), network.name, arm.name());
                    runs.push(run);
                }
            }
            let mut figures = figures(*workload, *network, &dumped, &recorded, &runs);
            let mut report = report(*workload, *network, &dumped, &recorded, &runs);
            let traced = Traced::new(&mut dumped, *network, plan.rounds)?;
            report.table += &traced.table();
            report.raw["traced"] = traced.raw();
            figures.push(traced.figure(*workload, *network));
            done(report, figures)?;
        }
        dumped.place(Placement::Any)?;
    }
    Ok(())
}

/// More restores of each way of ours, with traces, in turns: who has waited how long, and what came why.
struct Traced(Vec<(Arm, Vec<Waits>)>);

/// What the traces of one restore say, of all of its images: milliseconds, microseconds, MiB.
#[derive(Default)]
struct Waits {
    touches: f64,
    waited_ms: f64,
    p50_us: f64,
    p99_us: f64,
    /// By [`CAUSES`].
    came: Vec<f64>,
}

const CAUSES: [&str; 5] = ["touched", "neighbours", "read_ahead", "working_set", "background"];
const TRACED_ROUNDS: u64 = 7;

impl Traced {
    fn new(dumped: &mut Dumped, network: Network, rounds: u64) -> Result<Self> {
        let mut arms = [Arm::Lazy, Arm::WorkingSet, Arm::All].map(|arm| (arm, Vec::new()));
        for seed in FIRST_SEED..FIRST_SEED + rounds.min(TRACED_ROUNDS) {
            for (arm, waits) in &mut arms {
                let reports = dumped.trace(*arm, network.quality, seed)?;
                eprintln!("{} {}: {}", network.name, arm.name(), json!(reports));
                waits.push(Waits::of(&reports));
            }
        }
        Ok(Self(arms.into()))
    }

    fn middle(&self, arm: Arm, field: impl Fn(&Waits) -> f64) -> f64 {
        let of_arm = self.0.iter().filter(|(of, _)| *of == arm).flat_map(|(_, waits)| waits);
        median(&mut of_arm.map(field).collect::<Vec<_>>())
    }

    fn table(&self) -> String {
        let mut table = format!(
            "\n{} restores more of each, with traces (`postcopy report`), medians: touches that waited, for how long, and \
             memory by why it came.\n\n\
             | | touches | p50 | p99 | together | touched | neighbours | read ahead | working set | background |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
            self.0[0].1.len()
        );
        for (arm, _) in &self.0 {
            let [touches, p50, p99, together] = [
                self.middle(*arm, |waits| waits.touches),
                self.middle(*arm, |waits| waits.p50_us / 1e3),
                self.middle(*arm, |waits| waits.p99_us / 1e3),
                self.middle(*arm, |waits| waits.waited_ms),
            ];
            let name = arm.name();
            let _ = write!(table, "| {name} | {touches:.0} | {p50:.2} ms | {p99:.1} ms | {together:.0} ms |");
            for cause in 0..CAUSES.len() {
                let _ = write!(table, " {:.1} MiB |", self.middle(*arm, |waits| waits.came[cause]));
            }
            table.push('\n');
        }
        table
    }

    /// The background fill is not to raise what a touch waits.
    fn figure(&self, workload: Workload, network: Network) -> Figure {
        let [with, without] = [Arm::All, Arm::WorkingSet].map(|arm| self.middle(arm, |waits| waits.p50_us));
        let ratio = with / without;
        Figure {
            name: format!(
                "{}, {}: p50 of touches with everything behind the working set, beside the working set alone",
                workload.name(),
                network.about
            ),
            value: format!("**{ratio:.2} x** ({with:.0} us beside {without:.0} us)"),
            bar: "≤ 1.3 x".into(),
            met: ratio <= 1.3,
            raw: json!({ "ratio": ratio }),
        }
    }

    fn raw(&self) -> serde_json::Value {
        let of = |waits: &[Waits], field: fn(&Waits) -> f64| waits.iter().map(field).collect::<Vec<_>>();
        let arms = self.0.iter().map(|(arm, waits)| {
            let raw = json!({ "touches": of(waits, |w| w.touches), "p50_us": of(waits, |w| w.p50_us),
                "p99_us": of(waits, |w| w.p99_us), "waited_ms": of(waits, |w| w.waited_ms) });
            (arm.name().to_owned(), raw)
        });
        arms.collect::<serde_json::Map<_, _>>().into()
    }
}

impl Waits {
    /// Of an image that has no touches there is nothing to say of how long they took: the one with the most counts there.
    fn of(reports: &[serde_json::Value]) -> Self {
        let number =
            |report: &serde_json::Value, at: &str| report.pointer(at).and_then(|value| value.as_f64());
        let sum = |at: &str| reports.iter().filter_map(|report| number(report, at)).sum::<f64>();
        let touches = |report: &&serde_json::Value| number(report, "/touches/count").unwrap_or(0.0);
        let most = reports.iter().max_by(|a, b| touches(a).total_cmp(&touches(b)));
        let of_most = |at: &str| most.and_then(|report| number(report, at)).unwrap_or(0.0);
        Self {
            touches: sum("/touches/count"),
            waited_ms: sum("/waited_ms"),
            p50_us: of_most("/touches/p50_us"),
            p99_us: of_most("/touches/p99_us"),
            came: CAUSES.iter().map(|cause| sum(&format!("/pages/{cause}")) / 256.0).collect(),
        }
    }
}

/// What two recordings have in common. The first one is the image's working set afterwards.
pub(crate) struct Recorded {
    pub(crate) pages: usize,
    pub(crate) frame_bytes: u64,
    /// Of the first, the share that the second has not touched.
    pub(crate) wasted: f64,
    /// Of the second, the share that is not in the first.
    pub(crate) missed: f64,
}

impl Recorded {
    /// Of an image, of which `record` records a request.
    pub(crate) fn new(
        server: &ServerAddress,
        image: &str,
        mut record: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let [first, second] = RECORDED;
        record(second)?;
        let (other, _) = working_set(server, image)?;
        let removed = postcopy(server, ["working-set", "rm", image]).status()?;
        anyhow::ensure!(removed.success(), "a working set can be removed");
        record(first)?;
        let (pages, frame_bytes) = working_set(server, image)?;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let share = |a: &BTreeSet<_>, b: &BTreeSet<_>| a.difference(b).count() as f64 / a.len() as f64;
        Ok(Self {
            pages: pages.len(),
            frame_bytes,
            wasted: share(&pages, &other),
            missed: share(&other, &pages),
        })
    }
}

/// The pages of the image's working set, and the bytes of its frames.
fn working_set(server: &ServerAddress, image: &str) -> Result<(BTreeSet<(u32, u32)>, u64)> {
    let address = server.to_string();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut service = WorkingSetServiceClient::connect(address).await?;
        let request = GetWorkingSetRequest { reference: image.into() };
        let mut parts = service.get_working_set(request).await?.into_inner();
        let (mut pages, mut frame_bytes) = (BTreeSet::new(), 0);
        while let Some(part) = parts.message().await? {
            frame_bytes += part.working_set.map_or(0, |set| set.frame_bytes);
            let span = |span: postcopy::proto::v1::PageSpan| {
                (span.first..span.first + span.count).map(move |page| (span.file, page))
            };
            pages.extend(part.pages.into_iter().flat_map(span));
        }
        Ok((pages, frame_bytes))
    })
}

fn of(runs: &[Run], field: impl Fn(&Run) -> f64) -> Vec<f64> {
    runs.iter().map(field).collect()
}

/// The first quartile, the median, the third quartile.
pub(crate) fn quartiles(values: &[f64]) -> (f64, f64, f64) {
    let of = |p| percentile(&mut values.to_vec(), p);
    (of(25), of(50), of(75))
}

fn first(runs: &[(Arm, Vec<Run>)], arm: Arm) -> Vec<f64> {
    let runs = runs.iter().find(|(of, _)| *of == arm).map(|(_, runs)| &runs[..]);
    of(runs.unwrap_or_default(), |run| run.first)
}

#[expect(clippy::cast_precision_loss, reason = "bytes as MiB")]
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn report(
    workload: Workload,
    network: Network,
    dumped: &Dumped,
    recorded: &Recorded,
    runs: &[(Arm, Vec<Run>)],
) -> Report {
    let name = format!("{}-{}", workload.name(), network.name);
    let Recorded { pages, frame_bytes, wasted, missed } = recorded;
    let mut table = format!(
        "**{}**, restored over {}. {} runs each, in turns; medians, and quartiles of the first answer. Images: {:.0} MiB. The \
         working set, recorded with another request: {pages} pages, {:.1} MiB on the wire; a request leaves {:.0} % of it \
         untouched, and {:.1} % of what it touches is not in it.\n\n\
         | | first answer | whole request | all there | on the wire | CPU here | CPU of the server | memory of the daemon |\n|---|---|---|---|---|---|---|---|\n",
        workload.about(),
        network.about,
        runs[0].1.len(),
        mib(dumped.image_bytes),
        mib(*frame_bytes),
        wasted * 100.0,
        missed * 100.0
    );
    let mut bars = Vec::new();
    for (arm, runs) in runs {
        let (low, middle, high) = quartiles(&of(runs, |run| run.first));
        let whole = median(&mut of(runs, |run| run.answered));
        let mut resident: Vec<f64> = runs.iter().filter_map(|run| run.resident).collect();
        let resident = match median(&mut resident) {
            seconds if seconds.is_nan() => "–".to_owned(),
            seconds => format!("{seconds:.2} s"),
        };
        let wire = median(&mut of(runs, |run| mib(run.wire_bytes)));
        let wire = if arm.is_remote() { format!("{wire:.1} MiB") } else { "–".to_owned() };
        let mut peak: Vec<f64> = runs.iter().filter_map(|run| run.peak_bytes.map(mib)).collect();
        let peak = match median(&mut peak) {
            mib if mib.is_nan() => "–".to_owned(),
            mib => format!("{mib:.0} MiB"),
        };
        let _ = writeln!(
            table,
            "| {} | **{middle:.3} s** ({low:.3} to {high:.3}) | {whole:.3} s | {resident} | {wire} | {:.2} s | {:.2} s | {peak} |",
            arm.name(),
            median(&mut of(runs, |run| run.client_cpu)),
            median(&mut of(runs, |run| run.server_cpu))
        );
        let group = match arm {
            Arm::Lazy | Arm::WorkingSet | Arm::All => 0,
            Arm::Copied => 1,
            Arm::Local | Arm::Cold | Arm::CriuLazy => 5,
            Arm::Again => continue,
        };
        bars.push(Bar { name: arm.name().into(), low, middle, high, group });
    }
    let (low, high) = same(runs);
    let _ = writeln!(
        table,
        "\nThe first answer with the working set, taken twice in each round: one beside the other (A/A) {low:.2} to {high:.2} x."
    );
    let raw: serde_json::Map<_, _> = runs
        .iter()
        .map(|(arm, runs)| {
            let raw = json!({ "first": of(runs, |r| r.first), "answered": of(runs, |r| r.answered), "resident": runs.iter().map(|r| r.resident).collect::<Vec<_>>(),
                "wire_bytes": runs.iter().map(|r| r.wire_bytes).collect::<Vec<_>>(),
                "peak_bytes": runs.iter().map(|r| r.peak_bytes).collect::<Vec<_>>(),
                "client_cpu": of(runs, |r| r.client_cpu), "server_cpu": of(runs, |r| r.server_cpu) });
            (arm.name().to_owned(), raw)
        })
        .collect();
    let title = format!("{}: seconds to the first answer, over {}", workload.name(), network.about);
    Report {
        name,
        table,
        plot: Some(plot::bars(&title, "s", &bars)),
        raw: json!({ "arms": raw, "image_bytes": dumped.image_bytes, "working_set_pages": pages,
            "working_set_bytes": frame_bytes, "wasted": wasted, "missed": missed, "aa": [low, high] }),
    }
}

/// What two measurements of the same thing in one round differ by: the middle 94 % of their ratios.
fn same(runs: &[(Arm, Vec<Run>)]) -> (f64, f64) {
    let pairs = first(runs, Arm::Again).into_iter().zip(first(runs, Arm::WorkingSet));
    let mut ratios: Vec<f64> = pairs.map(|(again, once)| again / once).collect();
    (percentile(&mut ratios, 3), percentile(&mut ratios, 97))
}

/// What is beside a bar.
fn figures(
    workload: Workload,
    network: Network,
    dumped: &Dumped,
    recorded: &Recorded,
    runs: &[(Arm, Vec<Run>)],
) -> Vec<Figure> {
    let name = |what: &str| format!("{}, {}: {what}", workload.name(), network.about);
    let middle = |arm| median(&mut first(runs, arm));
    let beside = |what: &str, arm: Arm, other: f64, bar: f64| {
        let ratio = middle(arm) / other;
        Figure {
            name: name(what),
            value: format!("**{ratio:.2} x** ({:.3} s beside {other:.3} s)", middle(arm)),
            bar: format!("≤ {bar} x"),
            met: ratio <= bar,
            raw: json!({ "ratio": ratio }),
        }
    };
    let all = runs.iter().find(|(arm, _)| *arm == Arm::All).map(|(_, runs)| &runs[..]).unwrap_or_default();
    let wire = median(&mut of(all, |run| mib(run.wire_bytes))) / mib(dumped.image_bytes);
    let share = |what: &str, ratio: f64| Figure {
        name: name(what),
        value: format!("**{ratio:.2} x**"),
        bar: "≤ 0.45 x".into(),
        met: ratio <= 0.45,
        raw: json!({ "ratio": ratio }),
    };
    let set = mib(recorded.frame_bytes) / mib((recorded.pages * PAGE_BYTES) as u64);
    let mut figures = vec![
        share("the working set on the wire, proofs included, beside its plain size", set),
        share("bytes on the wire until all is there, beside the images'", wire),
    ];
    if network.name == HERE.name {
        let local = middle(Arm::Local).min(middle(Arm::CriuLazy));
        figures.push(beside(
            "first answer with a working set, beside the better of criu's ways with the images here",
            Arm::WorkingSet,
            local,
            0.75,
        ));
    }
    if network.name == NEAR.name {
        let copied = middle(Arm::Copied);
        figures.push(beside(
            "first answer with a working set, beside copying the images first",
            Arm::WorkingSet,
            copied,
            0.15,
        ));
    }
    figures
}
