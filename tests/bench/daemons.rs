//! `postcopy firecracker`: what a killed worker costs, and how soon a machine has touched what it needs.

use crate::{Figure, PAIRS, aa, median, percentile};
use anyhow::{Result, ensure};
use postcopy_tests::PAGE;
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::descriptors;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::wait_until;
use serde_json::json;
use std::cell::Cell;
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use userfaultfd::{Event, Uffd};

const KILLS: usize = 100;
/// Of 512 MiB of `memory_like`, those that are not zero pages.
const WITH_BYTES_MIB: usize = 512 * 10 / 11;

struct Snapshot {
    server: Server,
    folder: TempDir,
    daemons: Cell<usize>,
}

impl Snapshot {
    fn push(mib: usize, chunk_bytes: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let memory = folder.path().join("mem");
        std::fs::write(&memory, memory_like(mib << 20, 5))?;
        let server = Server::start();
        let chunk_bytes = chunk_bytes.to_string();
        let args = [
            "push".as_ref(),
            memory.as_os_str(),
            "vm".as_ref(),
            "--chunk-size".as_ref(),
            chunk_bytes.as_ref(),
        ];
        let _ = run(server.address(), args);
        Ok(Self { server, folder, daemons: Cell::new(0) })
    }

    fn memory(&self) -> PathBuf {
        self.folder.path().join("mem")
    }

    fn daemon(&self, fill: &str) -> (Daemon, PathBuf) {
        self.daemon_with(&["--fill", fill])
    }

    /// Each at a socket of its own: a worker that was killed may still be ending.
    fn daemon_with(&self, more: &[&str]) -> (Daemon, PathBuf) {
        self.daemons.set(self.daemons.get() + 1);
        let socket = self.folder.path().join(format!("socket-{}", self.daemons.get()));
        let path = socket.to_str().expect("a path of ours");
        let args = ["firecracker", "--socket", path, "--image", "vm"];
        (Daemon::start(self.server.address(), args.iter().chain(more)), socket)
    }
}

/// The longest touch while a worker is killed, and in as long a time in which none is.
pub(crate) fn kills() -> Result<Figure> {
    // Each touch of a page is a fault.
    let snapshot = Snapshot::push(256, PAGE)?;
    let (mut waits, mut undisturbed) = (Vec::new(), Vec::new());
    let (mut daemon, socket) = snapshot.daemon("nothing");
    while waits.len() < KILLS {
        let mut vmm = Vmm::start(&socket, &snapshot.memory(), "new", &["small:256"]);
        vmm.loaded();
        for round in 0..20 {
            for kill in [false, true] {
                vmm.tell(&format!("run 1 0.1 {round}{}", u8::from(kill)));
                if kill {
                    std::thread::park_timeout(Duration::from_millis(20));
                    daemon.kill_worker();
                }
                let touches = vmm.touches();
                ensure!(touches.wrong == 0, "wrong bytes");
                #[expect(clippy::cast_precision_loss, reason = "some milliseconds")]
                let longest = touches.longest_us as f64 / 1000.0;
                if kill { &mut waits } else { &mut undisturbed }.push(longest);
            }
        }
    }
    let (p50, p99) = (percentile(&mut waits, 50), percentile(&mut waits, 99));
    Ok(Figure {
        name: format!(
            "{} kill -9s of the worker of a machine that faults all the time: the longest wait",
            waits.len()
        ),
        value: format!(
            "p50 **{p50:.0} ms**, p99 **{p99:.0} ms** (without: p50 {:.1} ms, p99 {:.1} ms)",
            percentile(&mut undisturbed, 50),
            percentile(&mut undisturbed, 99)
        ),
        bar: "p99 < 50 ms".into(),
        met: p99 < 50.0,
        raw: json!({ "waits_ms": waits, "undisturbed_ms": undisturbed }),
    })
}

/// A handler as Firecracker's example is one: it copies each page from a map of the local file.
fn example_handler(socket: &Path, memory: &Path) -> Result<std::thread::JoinHandle<()>> {
    let (listener, file) = (UnixListener::bind(socket)?, File::open(memory)?);
    Ok(std::thread::spawn(move || {
        #[expect(unsafe_code, reason = "a map of a file that nobody changes")]
        // SAFETY: the file is the benchmark's own.
        let map = unsafe { memmap2::Mmap::map(&file) }.expect("a file can be mapped");
        let (stream, _) = listener.accept().expect("a machine connects");
        let (uffd, text) = descriptors::receive(&stream);
        let regions: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let base =
            usize::try_from(regions[0]["base_host_virt_addr"].as_u64().expect("a number")).expect("64 bits");
        rustix::io::ioctl_fionbio(&uffd, false).expect("a descriptor");
        #[expect(unsafe_code, reason = "a userfaultfd that was received")]
        // SAFETY: `uffd` gives its descriptor up.
        let uffd = unsafe { <Uffd as std::os::fd::FromRawFd>::from_raw_fd(uffd.into_raw_fd()) };
        while let Ok(Some(event)) = uffd.read_event() {
            let Event::Pagefault { addr, .. } = event else { continue };
            let page = addr.addr() - addr.addr() % PAGE;
            let source: *const c_void = map[page - base..].as_ptr().cast();
            #[expect(unsafe_code, reason = "as the crate has it")]
            // SAFETY: the map has a page there.
            let copied =
                unsafe { uffd.copy(source, std::ptr::with_exposed_provenance_mut(page), PAGE, true) };
            if copied.is_err() {
                return;
            }
        }
    }))
}

/// 64 MiB of 512, touched page by page at random.
pub(crate) fn touches() -> Result<Vec<Figure>> {
    let snapshot = Snapshot::push(512, 64 << 10)?;
    let touch = |socket: &Path, round: usize, ready: &dyn Fn(u32)| -> Result<f64> {
        let started = Instant::now();
        let mut vmm = Vmm::start(socket, &snapshot.memory(), "new", &["small:512"]);
        vmm.loaded();
        ready(vmm.pid());
        vmm.tell(&format!("touch 64 {round}"));
        ensure!(vmm.touches().wrong == 0, "wrong bytes");
        Ok(started.elapsed().as_secs_f64())
    };
    let (mut example, mut lazy, mut filled, mut filled_first, mut mapped) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..PAIRS {
        let socket = snapshot.folder.path().join(format!("example-{round}"));
        let handler = example_handler(&socket, &snapshot.memory())?;
        example.push(touch(&socket, round, &|_| {})?);
        // It ends with its machine, or sleeps on in its read.
        drop(handler);
        for (fill, times) in [("nothing", &mut lazy), ("all", &mut filled)] {
            let (_daemon, socket) = snapshot.daemon(fill);
            times.push(touch(&socket, round, &|_| {})?);
        }
        let (_daemon, socket) = snapshot.daemon("all");
        let is_there = |pid| wait_until("all memory", || resident_mib(pid) >= WITH_BYTES_MIB);
        filled_first.push(touch(&socket, round, &is_there)?);
        mapped.push(touch_mapped(&snapshot.memory(), round)?);
    }
    // The same touches, noted by a restore before; only now, as the server sends a set to all that ask.
    let mut set = Vec::new();
    for round in 0..PAIRS {
        let (mut daemon, socket) = snapshot.daemon_with(&["--record"]);
        touch(&socket, round, &|_| {})?;
        daemon.assert_says("is gone");
        daemon.terminate();
        daemon.wait();
        let (_daemon, socket) = snapshot.daemon("working-set");
        set.push(touch(&socket, round, &|_| {})?);
        let removed = postcopy(snapshot.server.address(), ["working-set", "rm", "vm"]).status()?;
        ensure!(removed.success(), "a working set can be removed");
    }
    let figure = |name: &str, times: &[f64], beside: &str, base: &[f64], bar: f64| {
        let (time, base_time) = (median(&mut times.to_vec()), median(&mut base.to_vec()));
        let ratio = time / base_time;
        Figure {
            name: format!("64 MiB of 512 touched at random, {name}, beside {beside}"),
            value: format!(
                "**{ratio:.2} x** ({time:.2} s, {}, beside {base_time:.2} s, {})",
                aa(times),
                aa(base)
            ),
            bar: format!("≤ {bar} x"),
            met: ratio <= bar,
            raw: json!({ "seconds": times, "beside_seconds": base }),
        }
    };
    let handler = "a handler that copies 4 KiB from the local file";
    Ok(vec![
        figure("with background fill", &filled, handler, &example, 0.5),
        figure("without", &lazy, handler, &example, 1.6),
        figure("with their working set", &set, "without one", &lazy, 0.35),
        figure("with their working set", &set, "bringing everything first", &filled_first, 0.3),
        figure("with their working set", &set, "the local file mapped, in the page cache", &mapped, 1.5),
    ])
}

/// How much memory a process has that is there, zero pages left out.
fn resident_mib(pid: u32) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok());
    (pages.unwrap_or(0) * PAGE) >> 20
}

/// The same touches and comparisons in a map of the local file, which the page cache has; by this process.
fn touch_mapped(memory: &Path, seed: usize) -> Result<f64> {
    let started = Instant::now();
    let file = File::open(memory)?;
    #[expect(unsafe_code, reason = "a map of a file that nobody changes")]
    // SAFETY: the file is the benchmark's own.
    let map = unsafe { memmap2::Mmap::map(&file) }?;
    let mut pages: Vec<usize> = (0..map.len() / PAGE).collect();
    fastrand::Rng::with_seed(seed as u64).shuffle(&mut pages);
    let mut truth = [0; PAGE];
    for page in pages.into_iter().take((64 << 20) / PAGE) {
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut truth, (page * PAGE) as u64)?;
        ensure!(map[page * PAGE..][..PAGE] == truth, "wrong bytes");
    }
    Ok(started.elapsed().as_secs_f64())
}
