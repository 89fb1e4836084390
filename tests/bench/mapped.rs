//! A mapped file: the Rust compiler's own library, of which some symbols are resolved and read.

use crate::arms::{copy, forget};
use crate::cpu::{self, Placement};
use crate::plot::{self, Bar};
use crate::programs::{Network, Recorded, mib, quartiles};
use crate::report::Report;
use crate::symbols::{Library, resolve};
use crate::{Figure, median};
use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use postcopy::proto::digest::Digest;
use postcopy::{Options, Session};
use postcopy_tests::cli::run;
use postcopy_tests::link::Link;
use postcopy_tests::server::Server;
use postcopy_tests::wait_until;
use serde_json::json;
use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const RESOLVED: usize = 300;
const FIRST_SEED: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Here,
    Cold,
    Copied,
    Lazy,
    WorkingSet,
    All,
}

const WAYS: [(Way, &str, usize); 6] = [
    (Way::Here, "the file is here, MAP_PRIVATE", 5),
    (Way::Cold, "the same, not in the page cache", 5),
    (Way::Copied, "copied, then MAP_PRIVATE", 1),
    (Way::Lazy, "postcopy, by touch alone", 0),
    (Way::WorkingSet, "postcopy, working set", 0),
    (Way::All, "postcopy, working set and all", 0),
];

/// What one took: seconds until the symbols were there and until everything was, bytes on the wire, CPU seconds here and of
/// the server.
struct Run {
    answered: f64,
    resident: Option<f64>,
    wire: u64,
    client_cpu: f64,
    server_cpu: f64,
}

fn find() -> Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("rustc")?;
    let folder = Path::new(String::from_utf8(output.stdout)?.trim()).join("lib");
    let is_driver = |path: &PathBuf| path.to_string_lossy().contains("librustc_driver");
    let mut paths = std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(is_driver).context("the toolchain has no librustc_driver")
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "a map of a file that nobody changes")]
    // SAFETY: the file is the benchmark's own.
    let map = unsafe { Mmap::map(&file) }?;
    Ok(map)
}

struct Pushed<'a> {
    server: Server,
    folder: &'a Path,
    names: Vec<&'a [u8]>,
    bytes: &'a [u8],
}

impl<'a> Pushed<'a> {
    fn chosen(&self, seed: u64) -> (Vec<&'a [u8]>, Digest) {
        let mut random = fastrand::Rng::with_seed(seed);
        let names: Vec<_> = (0..RESOLVED).map(|_| self.names[random.usize(0..self.names.len())]).collect();
        let expected = resolve(self.bytes, &names).expect("they are in the file");
        (names, expected)
    }

    fn record(&self, seed: u64) -> Result<()> {
        let options = Options::DEFAULT.record(true);
        let session = Session::open(self.server.address(), &"driver".parse()?, options)?;
        let region = session.map("driver.so")?;
        let (names, expected) = self.chosen(seed);
        ensure!(resolve(&region, &names)? == expected, "wrong bytes");
        drop(region);
        ensure!(session.close(PATIENCE), "it does not end");
        Ok(session.wait_recorded(PATIENCE)?)
    }

    fn run(&self, way: Way, network: Network, seed: u64) -> Result<Run> {
        let (names, expected) = self.chosen(seed);
        match way {
            Way::Cold => forget(self.folder)?,
            // Into the page cache.
            _ => drop(std::fs::read(self.folder.join("driver.so"))?),
        }
        let link = Link::to(&self.server.address().to_string(), network.quality);
        let (mut cpu, server_cpu) = (cpu::time_of_this()?, cpu::time_of(self.server.pid())?);
        let started = Instant::now();
        let seconds = || started.elapsed().as_secs_f64();
        if let Way::Here | Way::Cold | Way::Copied = way {
            if way == Way::Copied {
                copy(self.bytes.len() as u64, network.quality, Placement::Any)?;
                cpu = cpu::time_of_this()?;
            }
            ensure!(resolve(&map(&self.folder.join("driver.so"))?, &names)? == expected, "wrong bytes");
            let client_cpu = (cpu::time_of_this()? - cpu).as_secs_f64();
            let (answered, wire) = (seconds(), self.bytes.len() as u64);
            return Ok(Run { answered, resident: None, wire, client_cpu, server_cpu: 0.0 });
        }
        let (working_set, fill) = (way != Way::Lazy, way == Way::All);
        let options = Options::DEFAULT.working_set(working_set).fill(fill);
        let session = Session::open(link.address(), &"driver".parse()?, options)?;
        let region = session.map("driver.so")?;
        ensure!(resolve(&region, &names)? == expected, "wrong bytes");
        let answered = seconds();
        let mut resident = None;
        if fill {
            session.wait_resident(PATIENCE)?;
            resident = Some(seconds());
        }
        let wire = link.received();
        drop((region, session));
        wait_until("the end of its connections", || link.cpu_time().is_some());
        let cpu = cpu::time_of_this()? - cpu - link.cpu_time().unwrap_or_default();
        let server_cpu = cpu::time_of(self.server.pid())? - server_cpu;
        let (client_cpu, server_cpu) = (cpu.as_secs_f64(), server_cpu.as_secs_f64());
        Ok(Run { answered, resident, wire, client_cpu, server_cpu })
    }
}

pub(crate) fn measure(network: Network, rounds: u64) -> Result<(Report, Vec<Figure>)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("driver.so");
    std::fs::copy(find()?, &path)?;
    let bytes = std::fs::read(&path)?;
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "driver".as_ref()]);
    let pushed =
        Pushed { server, folder: folder.path(), names: Library::new(&bytes)?.names()?, bytes: &bytes };
    let Recorded { pages, frame_bytes, wasted, missed } =
        Recorded::new(pushed.server.address(), "driver", |seed| pushed.record(seed))?;
    let mut runs = WAYS.map(|(way, name, group)| (way, name, group, Vec::new()));
    for seed in FIRST_SEED..FIRST_SEED + rounds {
        for (way, name, _, runs) in &mut runs {
            let run = pushed.run(*way, network, seed).with_context(|| name.to_string())?;
            eprintln!("mapped, {name}: {:.3} s", run.answered);
            runs.push(run);
        }
    }
    let mut table = format!(
        "**A mapped file**: librustc_driver, {:.0} MiB with {} symbols, of which {RESOLVED} random ones are resolved by its hash table \
         and read, over {}. {rounds} runs each, in turns. The working set, recorded with other symbols: {pages} pages, {:.1} MiB on the \
         wire; 300 symbols leave {:.0} % of it untouched, and {:.1} % of what they touch is not in it.\n\n\
         | | symbols read | all there | on the wire | CPU here | CPU of the server |\n|---|---|---|---|---|---|\n",
        mib(bytes.len() as u64),
        pushed.names.len(),
        network.about,
        mib(frame_bytes),
        wasted * 100.0,
        missed * 100.0
    );
    let (mut bars, mut raw) = (Vec::new(), serde_json::Map::new());
    for (way, name, group, runs) in &runs {
        let answered: Vec<f64> = runs.iter().map(|run| run.answered).collect();
        let resident: Vec<f64> = runs.iter().filter_map(|run| run.resident).collect();
        let wire: Vec<f64> = runs.iter().map(|run| mib(run.wire)).collect();
        let (low, middle, high) = quartiles(&answered);
        let all = if resident.is_empty() {
            "–".into()
        } else {
            format!("{:.2} s", median(&mut resident.clone()))
        };
        let is_here = matches!(way, Way::Here | Way::Cold);
        let carried = if is_here { "–".into() } else { format!("{:.1} MiB", median(&mut wire.clone())) };
        let of = |field: fn(&Run) -> f64| runs.iter().map(field).collect::<Vec<f64>>();
        let (here, there) = (of(|run| run.client_cpu), of(|run| run.server_cpu));
        let _ = writeln!(
            table,
            "| {name} | **{middle:.4} s** ({low:.4} to {high:.4}) | {all} | {carried} | {:.3} s | {:.3} s |",
            median(&mut here.clone()),
            median(&mut there.clone())
        );
        bars.push(Bar { name: (*name).into(), low, middle, high, group: *group });
        raw.insert(
            (*name).into(),
            json!({ "answered": answered, "resident": resident, "wire_mib": wire,
            "client_cpu": here, "server_cpu": there }),
        );
    }
    let (copied, set) = (bars[2].middle, bars[4].middle);
    let ratio = set / copied;
    let figure = Figure {
        name: format!(
            "a mapped file, {}: symbols read with a working set, beside copying the file first",
            network.about
        ),
        value: format!("**{ratio:.2} x** ({set:.3} s beside {copied:.3} s)"),
        bar: "≤ 0.15 x".into(),
        met: ratio <= 0.15,
        raw: json!({ "ratio": ratio }),
    };
    let title =
        format!("300 symbols of librustc_driver: seconds until they are read, over {}", network.about);
    let plot = Some(plot::bars(&title, "s", &bars));
    let name = format!("mapped-{}", network.name);
    Ok((Report { name, table, plot, raw: raw.into() }, vec![figure]))
}
