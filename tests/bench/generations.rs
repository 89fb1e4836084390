//! A store that lives long: thousands of pushes that change a part of an image, and restores beside
//! collections that repack it.

use crate::{Figure, aa, median, percentile};
use anyhow::{Context, Result, ensure};
use postcopy::{Options, ServerAddress, Session};
use postcopy_tests::PAGE;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
/// The image of the pushes, and the part that each changes.
const BYTES: usize = 1 << 30;
const CHANGED: usize = MIB;
/// The number of pushes without POSTCOPY_BENCH_PUSHES.
const PUSHES: usize = 10_000;
/// Pushes that are compared, alternately to the old store and to a new one.
const COMPARED: usize = 20;
/// Pushes between two collections.
const COLLECTED: usize = 500;
/// The image of the restores, their rate, and how long they go on with and without collections.
const RESTORED: usize = 16 * MIB;
const RESTORE_PAUSE: Duration = Duration::from_millis(500);
const TURN: Duration = Duration::from_secs(60);
/// The number of turns without POSTCOPY_BENCH_TURNS.
const TURNS: usize = 10;
const TOUCHES: usize = 100;

/// Returns the number in a variable of the environment, or else `default`.
fn number(variable: &'static str, default: usize) -> Result<usize> {
    std::env::var(variable).map_or(Ok(default), |number| number.parse().context(variable))
}

/// A file whose written parts are what a push changes.
struct Diffs {
    folder: TempDir,
}

impl Diffs {
    /// On a disk: other file systems do not tell what was written.
    fn new() -> Result<Self> {
        let target = std::env::current_exe()?.parent().context("a folder")?.to_owned();
        Ok(Self { folder: tempfile::tempdir_in(target)? })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("mem")
    }

    /// Makes a file of holes but for one part, which differs by number.
    fn write(&self, bytes: usize, number: usize) -> Result<PathBuf> {
        let path = self.path();
        let _ = std::fs::remove_file(&path);
        let file = File::create(&path)?;
        file.set_len(bytes as u64)?;
        let places = bytes / CHANGED;
        file.write_all_at(&noise(CHANGED, number as u64), (number * 7 % places * CHANGED) as u64)?;
        file.sync_all()?;
        Ok(path)
    }
}

/// Returns the seconds that a push of a change over the image takes.
fn push_over(address: &ServerAddress, path: &Path, reference: &str) -> f64 {
    let started = Instant::now();
    let base = ["--base".as_ref(), reference.as_ref()];
    let _ = run(address, ["push".as_ref(), path.as_os_str(), reference.as_ref()].into_iter().chain(base));
    started.elapsed().as_secs_f64()
}

pub(crate) fn pushes() -> Result<Figure> {
    let count = number("POSTCOPY_BENCH_PUSHES", PUSHES)?;
    let diffs = Diffs::new()?;
    let [old, new] = ["old", "new"].map(|name| Server::on(&diffs.folder.path().join(name), "127.0.0.1:0"));
    for server in [&old, &new] {
        std::fs::write(diffs.path(), memory_like(BYTES, 31))?;
        let _ = run(server.address(), ["push".as_ref(), diffs.path().as_os_str(), "image".as_ref()]);
    }
    let store = StoreDir::of(&old);
    let (mut times, mut packs) = (Vec::with_capacity(count), Vec::new());
    for number in 1..=count {
        let path = diffs.write(BYTES, number)?;
        times.push(push_over(old.address(), &path, "image"));
        if number % COLLECTED == 0 {
            let _ = store.gc(&["--grace", "1s"]);
            packs.push(store.packs().len());
        }
    }
    let (mut late, mut early) = (Vec::new(), Vec::new());
    for number in count + 1..=count + 10 + COMPARED {
        let path = diffs.write(BYTES, number)?;
        late.push(push_over(old.address(), &path, "image") * 1e3);
        early.push(push_over(new.address(), &path, "image") * 1e3);
    }
    let raw = json!({ "seconds": times, "packs": packs, "late_ms": late, "early_ms": early });
    let spread = aa(&early[10..]);
    let [late, early] = [late, early].map(|times| median(&mut times[10..].to_vec()));
    let ratio = late / early;
    Ok(Figure {
        name: format!(
            "a push of 1 MiB changed of 1 GiB after {count} others, beside one after 10 others in a new store"
        ),
        value: format!(
            "**{ratio:.2} x** ({late:.0} ms beside {early:.0} ms, {spread}; packs after each gc: {packs:?})"
        ),
        bar: "≤ 1.1 x".into(),
        met: ratio <= 1.1,
        raw,
    })
}

/// Touches of two restores a second, in a quiet store, and beside pushes and collections.
pub(crate) fn beside_collections() -> Result<Figure> {
    let diffs = Diffs::new()?;
    let server = Server::on(&diffs.folder.path().join("store"), "127.0.0.1:0");
    let bytes = memory_like(RESTORED, 32);
    std::fs::write(diffs.path(), &bytes)?;
    let _ = run(server.address(), ["push".as_ref(), diffs.path().as_os_str(), "served".as_ref()]);
    std::fs::write(diffs.path(), memory_like(16 * RESTORED, 33))?;
    let _ = run(server.address(), ["push".as_ref(), diffs.path().as_os_str(), "image".as_ref()]);
    let (mut quiet, mut beside, mut collections) = (Vec::new(), Vec::new(), 0);
    for turn in 0..number("POSTCOPY_BENCH_TURNS", TURNS)? {
        quiet.extend(restores(server.address(), &bytes, turn as u64)?);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let others = scope.spawn(|| work_on(&server, &diffs, turn, &is_over));
            beside.extend(restores(server.address(), &bytes, turn as u64)?);
            is_over.store(true, Ordering::Relaxed);
            collections += others.join().expect("no panic")?;
            Ok(())
        })?;
    }
    let raw = json!({ "quiet_us": quiet, "beside_us": beside });
    let [alone, with] = [percentile(&mut quiet, 99), percentile(&mut beside, 99)];
    let ratio = with / alone;
    let [p50_alone, p50_with] = [percentile(&mut quiet, 50), percentile(&mut beside, 50)];
    Ok(Figure {
        name: "p99 of touches of two restores a second, while pushes and collections go on, beside a quiet store".into(),
        value: format!(
            "**{ratio:.2} x** ({with:.0} us beside {alone:.0} us; p50 {p50_with:.0} and {p50_alone:.0} us; {collections} collections)"
        ),
        bar: "≤ 1.3 x".into(),
        met: ratio <= 1.3,
        raw,
    })
}

/// Pushes and collects until it is over. Returns the number of collections.
fn work_on(server: &Server, diffs: &Diffs, turn: usize, is_over: &AtomicBool) -> Result<usize> {
    let (store, mut collections) = (StoreDir::of(server), 0);
    while !is_over.load(Ordering::Relaxed) {
        for number in 0..5 {
            let path = diffs.write(16 * RESTORED, (turn * 1000 + collections) * 5 + number)?;
            push_over(server.address(), &path, "image");
        }
        let _ = store.gc(&["--grace", "1s"]);
        collections += 1;
    }
    Ok(collections)
}

/// Restores twice a second for a turn. Returns the microseconds of each touch.
fn restores(address: &ServerAddress, bytes: &[u8], seed: u64) -> Result<Vec<f64>> {
    let (started, mut touches) = (Instant::now(), Vec::new());
    let mut random = fastrand::Rng::with_seed(seed);
    while started.elapsed() < TURN {
        let began = Instant::now();
        let session = Session::open(address, &"served".parse()?, Options::DEFAULT)?;
        let region = session.map("mem")?;
        for _ in 0..TOUCHES {
            let at = random.usize(..RESTORED / PAGE) * PAGE + 9;
            if region.is_resident(at) {
                continue;
            }
            let touched = Instant::now();
            let byte = region[at];
            touches.push(touched.elapsed().as_secs_f64() * 1e6);
            ensure!(byte == bytes[at], "a wrong byte");
        }
        std::thread::park_timeout(RESTORE_PAUSE.saturating_sub(began.elapsed()));
    }
    Ok(touches)
}
