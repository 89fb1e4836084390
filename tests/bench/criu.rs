//! `postcopy criu` beside criu's own ways: a plain restore, and `criu lazy-pages`.

use crate::arms::copy;
use crate::cpu::Placement;
use crate::{Figure, PAIRS, aa, median};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use postcopy::ServerAddress;
use postcopy_tests::cli::run;
use postcopy_tests::criu::{Criu, Program, Restored, compile, status, wait_for_status};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::server::Server;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// In sixteenths of the touches: how far on other touches begin. The order is the program's, which jumps by so many pages.
const OTHER: u64 = 3 * 40_503;
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that was dumped.
pub(crate) struct Dumped {
    pub(crate) criu: Criu,
    folder: TempDir,
}

/// A heap that was dumped.
struct Heap {
    dumped: Dumped,
    pages: u64,
    /// The page that touching begins with.
    start: u64,
}

/// How long parts of a restore took, in seconds since it began.
#[derive(Default)]
struct Times {
    heartbeat: Vec<f64>,
    quarter: Vec<f64>,
    drained: Vec<f64>,
}

impl Dumped {
    /// Starts a program of tests/programs with these arguments, of which STATUS is its status file, and dumps it when it says
    /// that it runs.
    pub(crate) fn new(program: &str, arguments: &[&str]) -> Result<Self> {
        let criu = Criu::find().map_err(anyhow::Error::msg)?;
        let folder = tempfile::tempdir()?;
        let dumped = Self { criu, folder };
        let mut command = Command::new(compile(program, dumped.folder.path()));
        for argument in arguments {
            match *argument {
                "STATUS" => command.arg(dumped.status()),
                argument => command.arg(argument),
            };
        }
        let mut program = Program::start(&command);
        wait_for_status(&dumped.status());
        dumped.criu.dump(program.pid(), &dumped.images());
        program.wait();
        Ok(dumped)
    }

    /// A server that has it.
    pub(crate) fn push(&self) -> Server {
        let (server, images) = (Server::start(), self.images());
        let args = ["push".as_ref(), images.as_os_str(), "app".as_ref()];
        let _ = run(server.address(), args);
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.path("images")
    }

    pub(crate) fn status(&self) -> PathBuf {
        self.path("status")
    }

    /// Starts criu's own daemon.
    pub(crate) fn daemon_of_criu(&self) -> Result<Child> {
        let images = self.images();
        let socket = images.join("lazy-pages.socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = self.criu.command("usr/sbin/criu");
        command.args(["lazy-pages", "-D"]).arg(&images).stderr(Stdio::null());
        let daemon = command.spawn()?;
        wait(|| socket.exists())?;
        Ok(daemon)
    }

    /// Starts ours with what that server has, and returns it with a directory of this name to restore from.
    pub(crate) fn daemon_of_ours(
        &self,
        server: &ServerAddress,
        name: &str,
        more: &[&str],
    ) -> (PathBuf, Daemon) {
        let images = self.path(name);
        let args = ["pull".as_ref(), "app".as_ref(), images.as_os_str(), "--criu".as_ref()];
        let _ = run(server, args);
        let args = ["criu", "-D", images.to_str().expect("a path of ours"), "--image", "app"];
        let daemon = Daemon::start(server, args.iter().chain(more));
        (images, daemon)
    }
}

impl Heap {
    fn new(mib: u32) -> Result<Self> {
        let dumped = Dumped::new("heap", &[&mib.to_string(), "STATUS", "0"])?;
        Ok(Self { dumped, pages: u64::from(mib) << 8, start: 0 })
    }

    /// With criu's own daemon.
    fn by_criu(&self, times: &mut Times) -> Result<()> {
        let mut daemon = self.dumped.daemon_of_criu()?;
        let (_restored, started) = self.restore(&self.dumped.images(), &["--lazy-pages"], times)?;
        daemon.wait()?;
        times.drained.push(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// With ours, and what that server has. One that records brings no more than is touched, and ends with its program.
    fn by_us(&self, server: &Server, name: &str, more: &[&str], times: &mut Times) -> Result<()> {
        let (images, mut daemon) = self.dumped.daemon_of_ours(server.address(), name, more);
        let (restored, started) = self.restore(&images, &["--lazy-pages"], times)?;
        if more.is_empty() {
            daemon.wait();
            times.drained.push(started.elapsed().as_secs_f64());
        }
        drop(restored);
        daemon.wait();
        Ok(())
    }

    /// Restores and measures the time to the first heartbeat, and until a quarter of the pages has been touched.
    fn restore(&self, images: &Path, more: &[&str], times: &mut Times) -> Result<(Restored, Instant)> {
        let path = self.dumped.status();
        let file = std::fs::File::options().write(true).open(&path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8], 0)?;
        let started = Instant::now();
        let restored = self.dumped.criu.restore_here(images, more);
        wait(|| status::<1>(&path)[0] != 0)?;
        times.heartbeat.push(started.elapsed().as_secs_f64());
        let [_, _, _, quarters] = status(&path);
        std::os::unix::fs::FileExt::write_all_at(&file, &self.start.to_ne_bytes(), 32)?;
        restored.signal(Signal::SIGUSR2);
        wait(|| status::<4>(&path)[3] != quarters)?;
        times.quarter.push(started.elapsed().as_secs_f64());
        ensure!(status::<2>(&path)[1] == 0, "wrong bytes");
        Ok((restored, started))
    }
}

/// Waits until `done` says so.
pub(crate) fn wait(mut done: impl FnMut() -> bool) -> Result<()> {
    let started = Instant::now();
    while !done() {
        ensure!(started.elapsed() < PATIENCE, "it hangs");
        std::thread::park_timeout(Duration::from_micros(500));
    }
    Ok(())
}

/// Local images in the page cache.
pub(crate) fn local() -> Result<Vec<Figure>> {
    let (mut heap, empty) = (Heap::new(256)?, Heap::new(1)?);
    let server = heap.dumped.push();
    let new = Times::default;
    let (mut ours, mut theirs, mut plain, mut nothing) = (new(), new(), new(), new());
    for round in 0..PAIRS {
        drop(empty.restore(&empty.dumped.images(), &[], &mut nothing)?);
        drop(heap.restore(&heap.dumped.images(), &[], &mut plain)?);
        heap.by_criu(&mut theirs)?;
        heap.by_us(&server, &format!("lazy-{round}"), &[], &mut ours)?;
    }
    // What one restore has touched, for the next ones, which touch the same, or others: a quarter of them the same.
    heap.by_us(&server, "recorded", &["--record"], &mut new())?;
    let (mut same, mut other) = (new(), new());
    let (mut theirs_same, mut theirs_other) = (new(), new());
    for round in 0..PAIRS {
        heap.start = 0;
        heap.by_criu(&mut theirs_same)?;
        heap.by_us(&server, &format!("same-{round}"), &[], &mut same)?;
        heap.start = OTHER * heap.pages / 16;
        heap.by_criu(&mut theirs_other)?;
        heap.by_us(&server, &format!("other-{round}"), &[], &mut other)?;
    }
    let more_ms = (median(&mut ours.heartbeat) - median(&mut nothing.heartbeat)) * 1000.0;
    let heartbeat = Figure {
        name: "CRIU, 256 MiB, local images: first heartbeat, more than a plain restore of an empty program takes".into(),
        value: format!(
            "**{more_ms:.0} ms** ({:.0} ms beside {:.0} ms; a plain restore of this one {:.0} ms, criu's lazy one {:.0} ms)",
            median(&mut ours.heartbeat) * 1000.0,
            median(&mut nothing.heartbeat) * 1000.0,
            median(&mut plain.heartbeat) * 1000.0,
            median(&mut theirs.heartbeat) * 1000.0
        ),
        bar: "≤ 15 ms".into(),
        met: more_ms <= 15.0,
        raw: json!({ "ours": ours.heartbeat, "empty": nothing.heartbeat, "plain": plain.heartbeat, "criu": theirs.heartbeat }),
    };
    let beside = |name: &str, ours: &mut Vec<f64>, theirs: &mut Vec<f64>, bar: f64| {
        let (same, theirs_same) = (aa(ours), aa(theirs));
        let ratio = median(ours) / median(theirs);
        Figure {
            name: format!("the same: {name}, beside `criu lazy-pages` on the same dump"),
            value: format!(
                "**{ratio:.2} x** ({:.2} s, {same}, beside {:.2} s, {theirs_same})",
                median(ours),
                median(theirs)
            ),
            bar: format!("≤ {bar} x"),
            met: ratio <= bar,
            raw: json!({ "ours": ours, "criu": theirs }),
        }
    };
    let mut figures = vec![heartbeat];
    let mut both = |how: &str, ours: &mut Times, theirs: &mut Times, [quarter, all]: [f64; 2]| {
        let name = |what: &str| format!("{what}{how}");
        figures.push(beside(
            &name("25 % of the pages touched at random"),
            &mut ours.quarter,
            &mut theirs.quarter,
            quarter,
        ));
        figures.push(beside(&name("all transferred"), &mut ours.drained, &mut theirs.drained, all));
    };
    both("", &mut ours, &mut theirs, [1.0, 0.7]);
    both(", with a working set of the same touches", &mut same, &mut theirs_same, [0.6, 0.6]);
    both(", with a working set of other touches", &mut other, &mut theirs_other, [0.6, 0.6]);
    Ok(figures)
}

/// A store that is 1 ms away, over 1 Gbit/s.
pub(crate) fn remote() -> Result<Vec<Figure>> {
    let heap = Heap::new(256)?;
    let server = heap.dumped.push();
    let quality = Quality { round_trip: Duration::from_millis(1), bytes_per_second: 125e6 };
    let images = heap.dumped.images();
    let bytes: u64 =
        std::fs::read_dir(&images)?.map(|entry| Ok(entry?.metadata()?.len())).sum::<Result<u64>>()?;
    let (mut ours, mut copied, mut wire) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..PAIRS {
        let mut times = Times::default();
        let started = Instant::now();
        copy(bytes, quality, Placement::Any)?;
        let copying = started.elapsed().as_secs_f64();
        drop(heap.restore(&images, &[], &mut times)?);
        copied.push(copying + times.heartbeat[0]);

        let link = Link::to(&server.address().to_string(), quality);
        let started = Instant::now();
        let (lazy, mut daemon) = heap.dumped.daemon_of_ours(link.address(), &format!("remote-{round}"), &[]);
        let before = started.elapsed().as_secs_f64();
        let mut times = Times::default();
        let (restored, _) = heap.restore(&lazy, &["--lazy-pages"], &mut times)?;
        ours.push(before + times.heartbeat[0]);
        daemon.wait();
        drop(restored);
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        wire.push(link.received() as f64 / bytes as f64);
    }
    let (same, copied_same) = (aa(&ours), aa(&copied));
    let ratio = median(&mut ours) / median(&mut copied);
    let wire_ratio = median(&mut wire);
    Ok(vec![
        Figure {
            name: "CRIU, 256 MiB, 1 ms and 1 Gbit/s away: first heartbeat (images pulled, daemon started, restored) beside copying the images and restoring".into(),
            value: format!(
                "**{ratio:.2} x** ({:.2} s, {same}, beside {:.2} s, {copied_same})",
                median(&mut ours),
                median(&mut copied)
            ),
            bar: "≤ 0.15 x".into(),
            met: ratio <= 0.15,
            raw: json!({ "ours": ours, "copied": copied }),
        },
        Figure {
            name: "the same: bytes over the wire until all is there, beside the images'".into(),
            value: format!("**{wire_ratio:.2} x**"),
            bar: "≤ 0.5 x".into(),
            met: wire_ratio <= 0.5,
            raw: json!({ "ratios": wire }),
        },
    ])
}
