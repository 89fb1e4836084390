//! `postcopy bench`: maps a file lazily, measures the fault latency, and checks every byte.

use super::output::{Advised, INSPECT, Output, bytes, counted, time};
use anyhow::{Context, Result, bail};
use postcopy::proto::manifest::{ChunkContent, FileEntry};
use postcopy::proto::page::{PAGE_BYTES, is_zero, to_usize};
use postcopy::proto::reference::Reference;
use postcopy::{Content, Image, LossPolicy, Options, Progress, Region, Remote, ServerAddress, Session};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Limit on the time to send the recording to the server.
const RECORDED: Duration = Duration::from_secs(60);

/// Options of `postcopy bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// name, name:tag or name@blake3:…
    reference: Reference,
    /// Path of the file in the image
    file: String,
    /// Number of threads, each of which touches its share of the pages
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Seed of the random order; the report prints it in any case
    #[arg(long)]
    seed: Option<u64>,
    /// Touch the pages in address order instead of a random one
    #[arg(long)]
    sequential: bool,
    /// Fill the region in the background meanwhile (the daemons' --fill takes a value)
    #[arg(long)]
    fill: bool,
    /// Prefetch the image's working set
    #[arg(long)]
    working_set: bool,
    /// Record the page faults, for the image's working set
    #[arg(long)]
    record: bool,
    /// Write the session's events with their times, for `postcopy report`, to this file, which must
    /// not exist (the daemons' --trace takes a directory)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Skip the eager read, to which the lazy one is compared
    #[arg(long)]
    no_eager: bool,
}

/// The measurements. A touch is the first access to a page that was absent at that moment.
#[derive(Debug, Serialize)]
struct Report {
    reference: String,
    image: String,
    file: String,
    size_bytes: u64,
    seed: u64,
    threads: u16,
    pages: u64,
    checked_bytes: u64,
    touches: usize,
    touch_p50_us: f64,
    touch_p90_us: f64,
    touch_p99_us: f64,
    faults: u64,
    demand_chunks: u64,
    read_ahead_chunks: u64,
    bulk_chunks: u64,
    working_set_pages: u64,
    frame_bytes: u64,
    first_byte_ms: f64,
    all_touched_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    eager_ms: Option<f64>,
    /// Duration of the eager read of the whole file, divided by the time to the first byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    eager_to_first_byte: Option<f64>,
}

struct Lazy {
    first_byte: Duration,
    all: Duration,
    touches: Vec<Duration>,
    progress: Progress,
    checked_bytes: u64,
}

pub(crate) fn bench(server: ServerAddress, args: BenchArgs, output: Output) -> Result<ExitCode> {
    let (image, file) = manifest(&server, &args.reference, &args.file)?;
    // The digest fixes the image for every part, even if the tag moves meanwhile.
    let name = "image".parse().expect("a name");
    let fixed = Reference::Digest { name, image: image.digest() };
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut lazy = lazily(&server, &fixed, &args, seed, &image, file, output)?;
    let eager = if args.no_eager { None } else { Some(eagerly(&server, &fixed, &args.file)?) };

    lazy.touches.sort_unstable();
    let percentile = |p: usize| match lazy.touches.len() {
        0 => Duration::ZERO,
        n => lazy.touches[(n - 1) * p / 100],
    };
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let lacks_set = args.working_set && lazy.progress.working_set_pages == 0;
    let report = Report {
        reference: args.reference.to_string(),
        image: image.digest().to_string(),
        file: args.file,
        size_bytes: file.size_bytes,
        seed,
        threads: args.threads,
        pages: lazy.progress.total_pages,
        checked_bytes: lazy.checked_bytes,
        touches: lazy.touches.len(),
        touch_p50_us: ms(percentile(50)) * 1e3,
        touch_p90_us: ms(percentile(90)) * 1e3,
        touch_p99_us: ms(percentile(99)) * 1e3,
        faults: lazy.progress.faults,
        demand_chunks: lazy.progress.demand_chunks,
        read_ahead_chunks: lazy.progress.read_ahead_chunks,
        bulk_chunks: lazy.progress.bulk_chunks,
        working_set_pages: lazy.progress.working_set_pages,
        frame_bytes: lazy.progress.frame_bytes,
        first_byte_ms: ms(lazy.first_byte),
        all_touched_ms: ms(lazy.all),
        eager_ms: eager.map(ms),
        eager_to_first_byte: eager.map(|eager| eager.as_secs_f64() / lazy.first_byte.as_secs_f64()),
    };
    output.show(&report, || text(&report, &lazy, lacks_set, eager, percentile))?;
    Ok(ExitCode::SUCCESS)
}

fn text(
    r: &Report,
    lazy: &Lazy,
    lacks_set: bool,
    eager: Option<Duration>,
    percentile: impl Fn(usize) -> Duration,
) -> String {
    let hint = match lacks_set {
        true => ": `postcopy working-set ls` lists the images that have one, --record makes one",
        false => "",
    };
    let mut text = format!(
        "{} of {}: {}, every byte right\n\
         \x20 first byte     {} after the start: connect, open, map, touch\n\
         \x20 touch          p50 {}  p90 {}  p99 {}  ({} of absent pages, {}, seed {})\n\
         \x20 faults         {}, answered with {} chunks on demand ({} of them read ahead), {} in the background\n\
         \x20 working set    {} pages{hint}\n\
         \x20 on the wire    {} of frames for {} of memory\n\
         \x20 all touched    {}\n",
        r.file,
        r.reference,
        bytes(r.size_bytes),
        time(lazy.first_byte),
        time(percentile(50)),
        time(percentile(90)),
        time(percentile(99)),
        counted(r.touches as u64, "touch", "touches"),
        counted(r.threads.into(), "thread", "threads"),
        r.seed,
        r.faults,
        r.demand_chunks,
        r.read_ahead_chunks,
        r.bulk_chunks,
        r.working_set_pages,
        bytes(r.frame_bytes),
        bytes(r.pages * PAGE_BYTES as u64),
        time(lazy.all),
    );
    if let (Some(eager), Some(ratio)) = (eager, r.eager_to_first_byte) {
        text += &format!(
            "  eager read     {} for all of it: {ratio:.1} x the lazy time to the first byte, {:.1} x that to all bytes\n",
            time(eager),
            eager.as_secs_f64() / lazy.all.as_secs_f64(),
        );
    }
    text
}

/// Opens the image and fetches the segments of the file, with which the memory is compared.
fn manifest(server: &ServerAddress, reference: &Reference, path: &str) -> Result<(Arc<Image>, FileEntry)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let remote = Remote::connect(server.clone()).await?;
        let lacks = || Advised {
            text: format!("path {path:?} is no regular file of the image {reference}"),
            next: INSPECT,
        };
        let (image, segments) = match remote.open(reference, &[path.as_bytes()], false).await {
            // The server lacks the path if it has the image.
            Err(error) if error.is_not_found() && remote.open(reference, &[], false).await.is_ok() => {
                return Err(lacks().into());
            }
            opened => opened?,
        };
        segments.all_into(&image).await?;
        let file = image.file(path.as_bytes()).ok_or_else(lacks)?;
        Ok((image, file))
    })
}

fn lazily(
    server: &ServerAddress,
    reference: &Reference,
    args: &BenchArgs,
    seed: u64,
    image: &Image,
    file: FileEntry,
    output: Output,
) -> Result<Lazy> {
    let started = Instant::now();
    // A lost page is an error of this command. Under the default policy, SIGBUS would end the
    // process.
    let options = Options::DEFAULT
        .on_loss(LossPolicy::Wait)
        .fill(args.fill)
        .working_set(args.working_set)
        .record(args.record)
        .trace(args.trace.is_some());
    let create =
        |path: &PathBuf| File::create_new(path).with_context(|| format!("--trace {}", path.display()));
    let trace = args.trace.as_ref().map(create);
    let trace = trace.transpose()?;
    let session = Session::open(server, reference, options)?;
    let trace = trace.map(|file| session.write_trace(file)).transpose().context("--trace")?;
    let region = session.map(&args.file)?;
    let mut order: Vec<usize> = (0..region.len().div_ceil(PAGE_BYTES)).collect();
    if !args.sequential {
        fastrand::Rng::with_seed(seed).shuffle(&mut order);
    }

    let threads = usize::from(args.threads);
    let pagemap = Pagemap::open()?;
    let done = AtomicBool::new(false);
    let lazy = std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let result = touch_all(&region, &order, threads, started, &pagemap);
            let checked = check(&region, image, file);
            done.store(true, Ordering::Release);
            (result, checked)
        });
        while !done.load(Ordering::Acquire) && !toucher.is_finished() {
            if let Some(reason) = session.wait_error(Duration::from_millis(20)) {
                // The touching threads sleep in the kernel, and only the end of the process ends
                // them.
                let error = anyhow::anyhow!("a page could not be fetched: {reason}");
                output.error(&error);
                std::process::exit(1);
            }
        }
        let Ok(((first_byte, all, touches), checked)) = toucher.join() else { bail!("a thread panicked") };
        Ok(Lazy { first_byte, all, touches, progress: session.progress(), checked_bytes: checked? })
    })?;
    drop(region);
    if !session.close(RECORDED) {
        bail!("the session did not end; its recording may be incomplete");
    }
    session.wait_recorded(RECORDED).map_err(|reason| anyhow::anyhow!("not recorded: {reason}"))?;
    if let (Some(trace), Some(path)) = (trace, &args.trace) {
        trace.finish().with_context(|| path.display().to_string())?;
    }
    Ok(lazy)
}

/// Touches pages in the given order. Returns the time to the first page, the time to all pages, and
/// the latency of each page that was absent.
fn touch_all(
    region: &Region,
    order: &[usize],
    threads: usize,
    started: Instant,
    pagemap: &Pagemap,
) -> (Duration, Duration, Vec<Duration>) {
    let Some((&first, rest)) = order.split_first() else {
        return (started.elapsed(), started.elapsed(), Vec::new());
    };
    let mut touches: Vec<Duration> = touch(region, first, pagemap).into_iter().collect();
    let first_byte = started.elapsed();
    std::thread::scope(|scope| {
        let shares = rest.chunks(rest.len().div_ceil(threads).max(1));
        let threads: Vec<_> = shares
            .map(|share| {
                scope.spawn(move || {
                    share.iter().filter_map(|&page| touch(region, page, pagemap)).collect::<Vec<_>>()
                })
            })
            .collect();
        for thread in threads {
            touches.extend(thread.join().unwrap_or_default());
        }
    });
    (first_byte, started.elapsed(), touches)
}

fn touch(region: &Region, page: usize, pagemap: &Pagemap) -> Option<Duration> {
    let byte = &region[page * PAGE_BYTES..][..1];
    let absent = !pagemap.is_present(byte);
    let before = Instant::now();
    std::hint::black_box(byte[0]);
    absent.then(|| before.elapsed())
}

/// The kernel's record of this process's resident pages. The session's page states change only a
/// moment after an install.
struct Pagemap(File);

impl Pagemap {
    fn open() -> Result<Self> {
        Ok(Self(File::open("/proc/self/pagemap").context("/proc/self/pagemap")?))
    }

    fn is_present(&self, byte: &[u8]) -> bool {
        let entry_at = byte.as_ptr().addr() / PAGE_BYTES * 8;
        let mut entry = [0; 8];
        let read = self.0.read_exact_at(&mut entry, entry_at as u64);
        // Bit 63: present; bit 62: swapped out. See Documentation/admin-guide/mm/pagemap.rst.
        read.is_ok() && u64::from_ne_bytes(entry) >> 62 != 0
    }
}

/// Compares every byte of the region with the manifest, and returns the number of bytes.
fn check(region: &Region, image: &Image, file: FileEntry) -> Result<u64> {
    let chunk_bytes = image.root().chunk_size().bytes();
    for (index, bytes) in (0u64..).zip(region.chunks(chunk_bytes)) {
        let chunk = postcopy::proto::page::ChunkIndex(file.first_chunk.0 + index);
        let expected = match image.content(chunk) {
            Content::Zero => ChunkContent::Zero,
            Content::Data(digest) => ChunkContent::Data(digest),
            Content::SegmentMissing(_) | Content::OutOfRange => bail!("chunk {chunk} is not in the manifest"),
        };
        let right = match expected {
            ChunkContent::Zero => is_zero(bytes),
            ChunkContent::Data(digest) => postcopy::proto::digest::Digest::of(bytes) == digest,
        };
        if !right {
            bail!(
                "chunk {chunk} (from byte {}) is in memory with wrong bytes",
                to_usize(index) * chunk_bytes
            );
        }
    }
    Ok(region.len() as u64)
}

/// Returns the time until all of the file is resident, from opening the session.
fn eagerly(server: &ServerAddress, reference: &Reference, path: &str) -> Result<Duration> {
    let started = Instant::now();
    let session = Session::open(server, reference, Options::DEFAULT.fill(true))?;
    let _region = session.map(path)?;
    session.wait_resident(Duration::from_secs(3600))?;
    Ok(started.elapsed())
}
