//! Servers over a bucket beside a server of a directory: restores from warm caches, the first
//! answer from cold ones, and pushes. The bucket is an S3 server in this process, so its work is
//! done by the same cores.

use crate::{Figure, aa, median, percentile};
use anyhow::{Context, Error, Result, ensure};
use postcopy::{Options, ServerAddress, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::s3::S3Server;
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, binary};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const ROUNDS: u64 = 15;
const PATIENCE: Duration = Duration::from_secs(300);
/// The image of the restores, and the chunks in it that are touched.
const BYTES: usize = 64 * MIB;
const CHUNK: usize = 64 << 10;
const TOUCHES: usize = 500;
const RESTORES: usize = 64;
/// The files of many restores at a time, and of pushes.
const SMALL_BYTES: usize = 16 * MIB;
const PUSHED_BYTES: usize = 256 * MIB;
/// The network to a distant bucket.
const FAR: Quality = Quality { round_trip: Duration::from_millis(20), bytes_per_second: 1e9 };
/// Requests for the first chunk of an image, one after another.
const FIRST_REQUESTS: u32 = 4;
/// Pages of the working set of the cold restores.
const SET_PAGES: usize = 1024;

/// A server over a bucket, reached through `endpoint` if there is one.
fn serve(s3: &S3Server, endpoint: Option<&ServerAddress>, more: &[&str]) -> Result<Server> {
    let mut command = Command::new(binary("postcopyd"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--store", &s3.url("s")]).args(more);
    s3.set(&mut command);
    if let Some(endpoint) = endpoint {
        command.env("AWS_ENDPOINT", endpoint.to_string());
    }
    Server::spawn(command, Path::new("")).map_err(Error::msg)
}

fn push(server: &Server, file: &Path, reference: &str) -> f64 {
    let started = Instant::now();
    let _ = run(server.address(), ["push".as_ref(), file.as_os_str(), reference.as_ref()]);
    started.elapsed().as_secs_f64()
}

fn open(address: &ServerAddress, reference: &str, options: Options) -> Result<Session> {
    Ok(Session::open(address, &reference.parse()?, options)?)
}

/// Returns the median of the times of touches of absent chunks.
fn touch(address: &ServerAddress, bytes: &[u8], seed: u64) -> Result<f64> {
    let session = open(address, "large", Options::DEFAULT)?;
    let region = session.map("mem")?;
    let mut chunks: Vec<usize> = (0..BYTES / CHUNK).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut chunks);
    let mut times = Vec::with_capacity(TOUCHES);
    for chunk in &chunks[..TOUCHES] {
        let (at, started) = (chunk * CHUNK + 77, Instant::now());
        let byte = region[at];
        times.push(started.elapsed().as_secs_f64());
        ensure!(byte == bytes[at], "a wrong byte");
    }
    Ok(median(&mut times))
}

/// Returns the seconds until a whole image is there.
fn fill(address: &ServerAddress, reference: &str) -> Result<f64> {
    let started = Instant::now();
    let session = open(address, reference, Options::DEFAULT.fill(true))?;
    let _region = session.map("mem")?;
    session.wait_resident(PATIENCE)?;
    Ok(started.elapsed().as_secs_f64())
}

fn many(address: &ServerAddress) -> Result<f64> {
    let started = Instant::now();
    std::thread::scope(|scope| {
        let restores: Vec<_> = (0..RESTORES).map(|_| scope.spawn(|| fill(address, "small"))).collect();
        restores.into_iter().try_for_each(|restore| restore.join().expect("no panic").map(drop))
    })?;
    Ok(started.elapsed().as_secs_f64())
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    let mut figures = warm()?;
    figures.extend(cold()?);
    figures.push(pushes()?);
    Ok(figures)
}

fn warm() -> Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let (large, small) = (folder.path().join("large"), folder.path().join("small"));
    std::fs::create_dir_all(&large)?;
    std::fs::create_dir_all(&small)?;
    let bytes = memory_like(BYTES, 21);
    std::fs::write(large.join("mem"), &bytes)?;
    std::fs::write(small.join("mem"), memory_like(SMALL_BYTES, 22))?;
    let (s3, directory) = (S3Server::start(), Server::start());
    let cache = folder.path().join("cache");
    let cache = cache.to_str().context("a plain path")?;
    let in_memory = serve(&s3, None, &[])?;
    for server in [&directory, &in_memory] {
        push(server, &large, "large");
        push(server, &small, "small");
    }
    // As good as no memory: each block comes from the disk.
    let on_disk = serve(&s3, None, &["--cache", cache, "--cache-memory", "1MiB"])?;
    for server in [&in_memory, &on_disk] {
        for reference in ["large", "small"] {
            let _ = run(server.address(), ["verify", reference]);
        }
    }
    let places = [("memory", &in_memory), ("its disk alone", &on_disk)];
    let mut figures = Vec::new();
    for (place, server) in places {
        let mut measured: [(Vec<f64>, Vec<f64>); 3] = Default::default();
        for seed in 0..ROUNDS {
            let arms = |server: &Server| -> Result<[f64; 3]> {
                let address = server.address();
                Ok([touch(address, &bytes, seed)?, fill(address, "large")?, many(address)?])
            };
            // The two arms alternate in being first.
            let (ours, theirs) = if seed % 2 == 0 {
                let ours = arms(server)?;
                (ours, arms(&directory)?)
            } else {
                let theirs = arms(&directory)?;
                (arms(server)?, theirs)
            };
            for (value, (of_bucket, of_directory)) in measured.iter_mut().enumerate() {
                of_bucket.push(ours[value]);
                of_directory.push(theirs[value]);
            }
        }
        let names = ["a touch (p50)", "64 MiB until all is there", "64 restores of 16 MiB at a time"];
        for (name, (mut of_bucket, mut of_directory)) in names.into_iter().zip(measured) {
            let spread = aa(&of_directory);
            let mut ratios: Vec<f64> = of_directory.iter().zip(&of_bucket).map(|(d, b)| d / b).collect();
            let raw = json!({ "bucket": of_bucket, "directory": of_directory });
            let ratio = median(&mut ratios);
            let [ours, theirs] = [median(&mut of_bucket), median(&mut of_directory)].map(|s| s * 1e3);
            figures.push(Figure {
                name: format!("{name}: a server over a bucket, from {place}, beside one of a directory"),
                value: format!("**{ratio:.2} x** ({ours:.2} ms beside {theirs:.2} ms, {spread})"),
                bar: "≥ 0.95 x".into(),
                met: ratio >= 0.95,
                raw,
            });
        }
    }
    Ok(figures)
}

/// The first answer of a server that has read nothing yet, with a working set.
fn cold() -> Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let bytes = memory_like(BYTES, 23);
    std::fs::write(&path, &bytes)?;
    let s3 = S3Server::start();
    let warm = serve(&s3, None, &[])?;
    push(&warm, &path, "large");
    let pages: Vec<usize> = (0..SET_PAGES).map(|page| page * 13 % (BYTES / PAGE)).collect();
    let recorder = open(warm.address(), "large", Options::DEFAULT.record(true))?;
    let region = recorder.map("mem")?;
    for page in &pages {
        ensure!(region[page * PAGE] == bytes[page * PAGE], "a wrong byte");
    }
    recorder.send_recording(PATIENCE)?;
    drop((region, recorder));
    let link = Link::to(&s3.endpoint(), FAR);
    let restore = |server: &Server| -> Result<[f64; 2]> {
        let started = Instant::now();
        let session = open(server.address(), "large", Options::DEFAULT.working_set(true))?;
        let region = session.map("mem")?;
        ensure!(region[pages[0] * PAGE] == bytes[pages[0] * PAGE], "a wrong byte");
        let first = started.elapsed().as_secs_f64();
        for page in &pages {
            ensure!(region[page * PAGE] == bytes[page * PAGE], "a wrong byte");
        }
        Ok([first, started.elapsed().as_secs_f64()])
    };
    let round_trips = FAR.round_trip.as_secs_f64() * f64::from(FIRST_REQUESTS);
    let (mut firsts, mut alls, mut ratios, mut of_all) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let server = serve(&s3, Some(link.address()), &[])?;
        let [first, all] = restore(&server)?;
        let [_, warm_all] = restore(&warm)?;
        ratios.push(first / (round_trips + warm_all));
        of_all.push(all / (round_trips + warm_all));
        firsts.push(first * 1e3);
        alls.push(all * 1e3);
    }
    let raw = json!({ "first_ms": firsts, "all_ms": alls });
    let (first, all) = (median(&mut ratios), median(&mut of_all));
    let about = "a server that starts, over a bucket with 20 ms a request";
    let worst = percentile(&mut ratios, 100);
    Ok(vec![
        Figure {
            name: format!(
                "first page from {about}, beside 4 requests and the working set's time from a warm server"
            ),
            value: format!("**{first:.2} x** ({:.0} ms; worst {worst:.2} x)", median(&mut firsts)),
            bar: "≤ 1 x".into(),
            met: first <= 1.0,
            raw: raw.clone(),
        },
        Figure {
            name: format!("{SET_PAGES} pages of a working set from {about}, beside the same"),
            value: format!("**{all:.2} x** ({:.0} ms)", median(&mut alls)),
            bar: "none".into(),
            met: true,
            raw,
        },
    ])
}

fn pushes() -> Result<Figure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("mem");
    let (mut ratios, mut to_bucket, mut to_directory) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        std::fs::write(&path, memory_like(PUSHED_BYTES, 24 + round))?;
        std::fs::File::open(&path)?.sync_all()?;
        let (s3, directory) = (S3Server::start(), Server::start());
        let server = serve(&s3, None, &[])?;
        let (bucket, dir) = (push(&server, &path, "image"), push(&directory, &path, "image"));
        ratios.push(dir / bucket);
        to_bucket.push(bucket);
        to_directory.push(dir);
    }
    let spread = aa(&to_directory);
    let raw = json!({ "bucket": to_bucket, "directory": to_directory });
    let ratio = median(&mut ratios);
    Ok(Figure {
        name: "push of 256 MiB to a server over a bucket, beside a push to a directory".into(),
        value: format!(
            "**{ratio:.2} x** ({:.2} s beside {:.2} s, {spread})",
            median(&mut to_bucket),
            median(&mut to_directory)
        ),
        bar: "≥ 0.8 x".into(),
        met: ratio >= 0.8,
        raw,
    })
}
