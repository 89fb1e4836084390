//! Files of a mount: cold faults beside a session's, warm pages beside those of tmpfs and ext4.

use crate::{Figure, median};
use anyhow::Result;
use memmap2::{Mmap, MmapOptions};
use postcopy::{Options, Session};
use postcopy_tests::PAGE;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::mounted::Mounted;
use postcopy_tests::server::Server;
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;
const COLD_BYTES: usize = 128 << 20;
const COLD_FAULTS: usize = 1000;
const WARM_BYTES: usize = 512 << 20;
const WARM_PAGES: usize = 16_384;
const THREADS: usize = 16;
const ROUNDS: u64 = 9;

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let mut figures = cold()?;
    figures.extend(warm()?);
    Ok(figures)
}

/// A folder with a file of so many bytes, and a server that has it as the image mem.
fn pushed(bytes: usize) -> Result<(tempfile::TempDir, Server)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    std::fs::write(&path, memory_like(bytes, 40))?;
    let server = Server::start();
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), "mem".as_ref()]);
    Ok((folder, server))
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "a map of a file that never changes")]
    // SAFETY: the file is the benchmark's own.
    let map = unsafe { Mmap::map(&file) }?;
    Ok(map)
}

/// Touches a page of each chunk. Returns the time of each touch.
fn touch(memory: &[u8], chunks: &[usize]) -> Vec<Duration> {
    let touch = |chunk: &usize| {
        let started = Instant::now();
        std::hint::black_box(memory[chunk * CHUNK + CHUNK / 2]);
        started.elapsed()
    };
    chunks.iter().map(touch).collect()
}

/// Returns the p50 of touches by one thread in microseconds, and the touches a second of 16.
fn both(memory: &[u8], seed: u64) -> (f64, f64) {
    let mut chunks: Vec<usize> = (0..COLD_BYTES / CHUNK).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut chunks);
    let (one, many) = chunks.split_at(COLD_FAULTS);
    let mut times: Vec<f64> = touch(memory, one).iter().map(|time| time.as_secs_f64() * 1e6).collect();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for part in many[..COLD_FAULTS].chunks(COLD_FAULTS.div_ceil(THREADS)) {
            scope.spawn(move || touch(memory, part));
        }
    });
    let rate = COLD_FAULTS as f64 / started.elapsed().as_secs_f64();
    (median(&mut times), rate)
}

fn cold() -> Result<Vec<Figure>> {
    let (_folder, server) = pushed(COLD_BYTES)?;
    let (mut ones, mut many, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for seed in 0..ROUNDS {
        // A new daemon has no chunk in memory, and a new file system no page.
        let mounted = Mounted::start(server.address(), &[]);
        let by_mount = both(&map(&mounted.image("mem", "latest").join("mem"))?, seed);
        drop(mounted);
        let session = Session::open(server.address(), &"mem".parse()?, Options::default())?;
        let region = session.map("mem")?;
        let by_session = both(&region, seed);
        ones.push(by_mount.0 / by_session.0);
        many.push(by_mount.1 / by_session.1);
        raw.push(json!({ "mount": [by_mount.0, by_mount.1], "session": [by_session.0, by_session.1] }));
    }
    let (one, many) = (median(&mut ones), median(&mut many));
    Ok(vec![
        Figure {
            name: "a cold fault in a file of a mount, 64 KiB chunk, beside the same in a session".into(),
            value: format!("{one:.2} x (p50)"),
            bar: "≤ 1.5 x".into(),
            met: one <= 1.5,
            raw: json!(raw),
        },
        Figure {
            name: "cold faults a second by 16 threads in a file of a mount, beside a session".into(),
            value: format!("{many:.2} x"),
            bar: "≥ 0.7 x".into(),
            met: many >= 0.7,
            raw: json!(many),
        },
    ])
}

/// Seconds for the reads and then the first writes of random pages, and for reading the file whole.
#[derive(Clone, Copy)]
struct Warm {
    reads: f64,
    writes: f64,
    whole: f64,
}

fn warm_times(path: &Path, pages: &[usize]) -> Result<Warm> {
    let file = File::open(path)?;
    // A hypervisor may have taken pages away.
    let whole = || -> Result<f64> {
        let (mut file, mut buffer, started) = (&file, vec![0; 1 << 20], Instant::now());
        std::os::unix::fs::FileExt::read_at(file, &mut buffer[..1], 0)?;
        std::io::Seek::rewind(&mut file)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(started.elapsed().as_secs_f64())
    };
    whole()?;
    let whole = whole()?;
    #[expect(unsafe_code, reason = "a map of a file that never changes")]
    // SAFETY: the file is the benchmark's own.
    let mut memory = unsafe { MmapOptions::new().map_copy(&file) }?;
    let started = Instant::now();
    std::hint::black_box(pages.iter().fold(0, |sum: u8, page| sum.wrapping_add(memory[page * PAGE])));
    let reads = started.elapsed().as_secs_f64();
    let started = Instant::now();
    pages.iter().for_each(|page| memory[page * PAGE] = 1);
    Ok(Warm { reads, writes: started.elapsed().as_secs_f64(), whole })
}

fn warm() -> Result<Vec<Figure>> {
    let (folder, server) = pushed(WARM_BYTES)?;
    let in_memory = tempfile::tempdir_in("/dev/shm")?;
    std::fs::copy(folder.path().join("mem"), in_memory.path().join("mem"))?;
    let mounted = Mounted::start(server.address(), &[]);
    let of_mount = mounted.image("mem", "latest").join("mem");
    let mut times: [Vec<Warm>; 3] = Default::default();
    for seed in 0..ROUNDS {
        let mut random = fastrand::Rng::with_seed(seed);
        let pages: Vec<_> = (0..WARM_PAGES).map(|_| random.usize(0..WARM_BYTES / PAGE)).collect();
        let paths = [&of_mount, &in_memory.path().join("mem"), &folder.path().join("mem")];
        for (times, path) in times.iter_mut().zip(paths) {
            times.push(warm_times(path, &pages)?);
        }
    }
    let ratio = |of: fn(&Warm) -> f64, beside: usize| {
        let pairs = times[0].iter().zip(&times[beside]);
        median(&mut pairs.map(|(mount, other)| of(mount) / of(other)).collect::<Vec<_>>())
    };
    let figure = |name: &str, beside: usize, of: fn(&Warm) -> f64, bar: f64| {
        let (value, beside) = (ratio(of, beside), ["", "tmpfs", "ext4"][beside]);
        let (value, met) = (format!("{value:.2} x"), value <= bar);
        let name = format!("{name} of a mount, warm, beside {beside}");
        Figure { name, value, bar: format!("≤ {bar} x"), met, raw: json!(null) }
    };
    Ok(vec![
        figure("64 MiB of 512 read at random, MAP_PRIVATE,", 1, |time| time.reads, 1.3),
        figure("64 MiB of 512 written at random after that, MAP_PRIVATE,", 1, |time| time.writes, 1.3),
        figure("64 MiB of 512 read at random, MAP_PRIVATE,", 2, |time| time.reads, 8.0),
        figure("64 MiB of 512 written at random after that, MAP_PRIVATE,", 2, |time| time.writes, 2.2),
        figure("reading a file of 512 MiB", 1, |time| time.whole, 1.1),
        figure("reading a file of 512 MiB", 2, |time| time.whole, 1.1),
    ])
}
