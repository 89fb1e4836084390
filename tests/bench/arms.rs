//! Ways to restore a program that CRIU has dumped, over a link, until it has given its first answer.

use crate::cpu::{self, Placement};
use crate::workloads::{Workload, socket};
use anyhow::{Context, Result, ensure};
use postcopy::proto::digest::Digest;
use postcopy_tests::cli::run;
use postcopy_tests::criu::{Criu, Program, Restored};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::server::Server;
use postcopy_tests::wait_until;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;
use tempfile::TempDir;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arm {
    /// The images lie here, in the page cache.
    Local,
    /// The images lie here, on disk.
    Cold,
    /// `criu lazy-pages`, with the images here.
    CriuLazy,
    /// All images are copied over the link first.
    Copied,
    Lazy,
    WorkingSet,
    /// The working set, and then everything.
    All,
    /// The same as `WorkingSet`: how far two measurements of one thing are apart.
    Again,
}

impl Arm {
    pub(crate) const EACH: [Self; 8] = [
        Self::Local,
        Self::Cold,
        Self::CriuLazy,
        Self::Copied,
        Self::Lazy,
        Self::WorkingSet,
        Self::All,
        Self::Again,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "images here, criu restore",
            Self::Cold => "images here, not in the page cache",
            Self::CriuLazy => "images here, criu lazy-pages",
            Self::Copied => "images copied, then criu restore",
            Self::Lazy => "postcopy, by touch alone",
            Self::WorkingSet => "postcopy, working set",
            Self::All => "postcopy, working set and all",
            Self::Again => "postcopy, working set, again",
        }
    }

    pub(crate) fn is_remote(self) -> bool {
        !matches!(self, Self::Local | Self::Cold | Self::CriuLazy)
    }

    fn fill(self) -> &'static str {
        match self {
            Self::WorkingSet | Self::Again => "working-set",
            Self::All => "all",
            _ => "nothing",
        }
    }
}

/// What one restore took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Seconds until the first answer was there.
    pub(crate) first: f64,
    /// Seconds until the whole request was answered.
    pub(crate) answered: f64,
    /// Seconds until all memory was there as well; none where it never is.
    pub(crate) resident: Option<f64>,
    pub(crate) wire_bytes: u64,
    /// CPU seconds of everything that was started here but the program itself, and the server's.
    pub(crate) client_cpu: f64,
    pub(crate) server_cpu: f64,
    /// The most memory that the daemon has had, where there is one of ours.
    pub(crate) peak_bytes: Option<u64>,
}

/// Seconds until the first and the whole answer, and until all memory was there; the most memory of the daemon.
type Answered = ((f64, f64), Option<f64>, Option<u64>);

/// A program that was dumped, and stored.
pub(crate) struct Dumped {
    workload: Workload,
    criu: Criu,
    folder: TempDir,
    pub(crate) server: Server,
    pub(crate) image_bytes: u64,
    /// The answers before the dump, by seed.
    answers: Vec<(u64, Digest)>,
    restores: usize,
    /// CPU seconds of restored programs, which are our children once criu has ended.
    of_programs: f64,
    placement: Placement,
}

impl Dumped {
    /// Starts it, asks what will be asked, dumps and pushes it.
    pub(crate) fn new(workload: Workload, seeds: impl Iterator<Item = u64>) -> Result<Self> {
        let criu = Criu::find().map_err(anyhow::Error::msg)?;
        let folder = tempfile::tempdir()?;
        let mut program = Program::start(&workload.command(&criu, folder.path()));
        workload.load(folder.path())?;
        let ask = |seed| Ok((seed, workload.ask(folder.path(), seed)?.0));
        let answers = seeds.map(ask).collect::<Result<Vec<_>>>().context(workload.name())?;
        let images = folder.path().join("images");
        criu.dump(program.pid(), &images);
        program.wait();
        let sizes = std::fs::read_dir(&images)?.map(|entry| Ok(entry?.metadata()?.len()));
        let image_bytes = sizes.sum::<Result<u64>>()?;
        let server = Server::start();
        let _ = run(server.address(), ["push".as_ref(), images.as_os_str(), "app".as_ref()]);
        Ok(Self {
            workload,
            criu,
            folder,
            server,
            image_bytes,
            answers,
            restores: 0,
            of_programs: 0.0,
            placement: Placement::Any,
        })
    }

    /// On which cores the server and the restores from now on are.
    pub(crate) fn place(&mut self, placement: Placement) -> Result<()> {
        self.placement = placement;
        placement.server(self.server.pid())?;
        placement.near()
    }

    fn link(&self, quality: Quality) -> Result<Link> {
        self.placement.far()?;
        let link = Link::to(&self.server.address().to_string(), quality);
        self.placement.near()?;
        Ok(link)
    }

    fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    /// Asks, and compares with the answer before the dump: seconds until the first and the whole answer.
    fn ask(&self, seed: u64, started: Instant) -> Result<(f64, f64)> {
        let expected = self.answers.iter().find(|(asked, _)| *asked == seed).context("a known seed")?.1;
        let (answer, first) = self.workload.ask(self.folder.path(), seed)?;
        let answered = started.elapsed();
        ensure!(answer == expected, "a wrong answer");
        Ok(((first - started).as_secs_f64(), answered.as_secs_f64()))
    }

    /// Restores it without memory and asks, so that the server makes a working set of what is touched.
    pub(crate) fn record(&mut self, seed: u64) -> Result<()> {
        let address = self.server.address().clone();
        let lazy = self.pull(&address)?;
        let path = lazy.to_str().context("a path of ours")?;
        let mut daemon = Daemon::start(&address, ["criu", "-D", path, "--image", "app", "--record"]);
        let restored = self.restore(&lazy, &["--lazy-pages"]);
        self.ask(seed, Instant::now())?;
        drop(restored);
        daemon.wait();
        Ok(())
    }

    /// One restore.
    pub(crate) fn run(&mut self, arm: Arm, quality: Quality, seed: u64) -> Result<Run> {
        if arm == Arm::Cold {
            forget(&self.images())?;
        }
        let link = self.link(quality)?;
        let before = self.cpu()?;
        let started = Instant::now();
        let ((first, answered), resident, peak_bytes) = match arm {
            Arm::Local | Arm::Cold => self.plainly(seed, started)?,
            Arm::CriuLazy => self.by_criu(seed, started)?,
            Arm::Copied => {
                copy(self.image_bytes, quality, self.placement)?;
                self.plainly(seed, started)?
            }
            Arm::Lazy | Arm::WorkingSet | Arm::All | Arm::Again => {
                self.by_us(arm, &link, seed, started, &[])?
            }
        };
        let after = self.cpu()?;
        let wire_bytes = if arm == Arm::Copied { self.image_bytes } else { link.received() };
        Ok(Run {
            first,
            answered,
            resident,
            wire_bytes,
            client_cpu: after.0 - before.0,
            server_cpu: after.1 - before.1,
            peak_bytes,
        })
    }

    /// CPU seconds of what has been started here, and of the server.
    fn cpu(&self) -> Result<(f64, f64)> {
        Ok((cpu::seconds_of_children()? - self.of_programs, cpu::seconds_of(self.server.pid())?))
    }

    /// Ends a restored program.
    fn end(&mut self, mut restored: Restored) -> Result<()> {
        self.of_programs += cpu::seconds_of(restored.pid())?;
        restored.kill();
        Ok(())
    }

    fn plainly(&mut self, seed: u64, started: Instant) -> Result<Answered> {
        let restored = self.restore(&self.images(), &[]);
        let answered = self.ask(seed, started)?;
        self.end(restored)?;
        Ok((answered, Some(answered.0), None))
    }

    fn by_criu(&mut self, seed: u64, started: Instant) -> Result<Answered> {
        let images = self.images();
        let socket = images.join("lazy-pages.socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = self.criu.command("usr/sbin/criu");
        command.args(["lazy-pages", "-D"]).arg(&images).stdout(Stdio::null()).stderr(Stdio::null());
        let mut daemon = command.spawn()?;
        wait_until("a socket of criu's", || socket.exists());
        let restored = self.restore(&images, &["--lazy-pages"]);
        let answered = self.ask(seed, started)?;
        daemon.wait()?;
        let resident = started.elapsed().as_secs_f64();
        self.end(restored)?;
        Ok((answered, Some(resident), None))
    }

    /// Another restore, of ours, with a trace: what `postcopy report` says of it.
    pub(crate) fn trace(&mut self, arm: Arm, quality: Quality, seed: u64) -> Result<Vec<serde_json::Value>> {
        let link = self.link(quality)?;
        let folder = tempfile::tempdir()?;
        let traces = folder.path().to_str().context("a path of ours")?;
        self.by_us(arm, &link, seed, Instant::now(), &["--trace", traces])?;
        let traces = std::fs::read_dir(folder.path())?;
        let report = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry?.path();
            Ok(run(self.server.address(), ["report".as_ref(), path.as_os_str()]))
        };
        traces.map(report).collect()
    }

    fn by_us(
        &mut self,
        arm: Arm,
        link: &Link,
        seed: u64,
        started: Instant,
        more: &[&str],
    ) -> Result<Answered> {
        let lazy = self.pull(link.address())?;
        let path = lazy.to_str().context("a path of ours")?;
        let args = ["criu", "-D", path, "--image", "app", "--fill", arm.fill()];
        let mut daemon = Daemon::start(link.address(), args.iter().chain(more));
        let restored = self.restore(&lazy, &["--lazy-pages"]);
        let answered = self.ask(seed, started)?;
        // Unless it has just ended, all being there.
        let peak_bytes = daemon.worker_now().and_then(|worker| cpu::peak_of(worker).ok());
        let mut resident = None;
        if arm == Arm::All {
            daemon.wait();
            resident = Some(started.elapsed().as_secs_f64());
        }
        // It ends with its program, and its CPU time is known then.
        self.end(restored)?;
        daemon.wait();
        std::fs::remove_dir_all(lazy)?;
        Ok((answered, resident, peak_bytes))
    }

    fn pull(&mut self, server: &postcopy::ServerAddress) -> Result<PathBuf> {
        self.restores += 1;
        let lazy = self.folder.path().join(format!("lazy-{}", self.restores));
        let _ = run(server, ["pull".as_ref(), "app".as_ref(), lazy.as_os_str(), "--criu".as_ref()]);
        Ok(lazy)
    }

    fn restore(&self, images: &Path, more: &[&str]) -> Restored {
        let _ = std::fs::remove_file(socket(self.folder.path()));
        self.criu.restore_here(images, more)
    }
}

/// Has the page cache forget the files of a directory.
pub(crate) fn forget(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() {
            let file = File::open(path)?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// Sends so many bytes over a link.
pub(crate) fn copy(bytes: u64, quality: Quality, placement: Placement) -> Result<()> {
    placement.far()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let link = Link::to(&format!("http://{}", listener.local_addr()?), quality);
    let sender = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let piece = vec![7; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            let count = usize::try_from(left)?.min(piece.len());
            stream.write_all(&piece[..count])?;
            left -= count as u64;
        }
        Ok(())
    });
    placement.near()?;
    let address = link.address().to_string();
    let mut stream = TcpStream::connect(address.trim_start_matches("http://"))?;
    let (mut piece, mut received) = (vec![0; 1 << 20], 0);
    while received < bytes {
        let count = stream.read(&mut piece)?;
        ensure!(count > 0, "the link has ended");
        received += count as u64;
    }
    sender.join().expect("it does not panic")
}
