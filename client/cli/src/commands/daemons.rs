//! The commands `postcopy firecracker` and `postcopy criu`, which start a daemon.

use super::origin::{self, Restorer};
use crate::daemon::criu::Criu;
use crate::daemon::firecracker::{self, Backing, Firecracker};
use crate::daemon::runtime_dir::{self, RuntimeDir};
use crate::daemon::starter::Starter;
use crate::daemon::{Program, Setup, ask_to_drain, own_files};
use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};
use postcopy::proto::digest::Digest;
use postcopy::proto::reference::Reference;
use postcopy::{Image, LossPolicy, Options, ServerAddress};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing::level_filters::LevelFilter;

/// The pages that a session fetches besides those of page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fill {
    /// Only faults, with the rest of their chunk and read-ahead
    Nothing,
    /// The image's working set: the pages that earlier restores accessed, in first-touch order
    WorkingSet,
    /// The working set first, and then all other pages in the background
    All,
}

/// The options of prefetch and of recording.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Ahead {
    /// Pages to fetch before the program accesses them [default: working-set for a microVM, all for
    /// processes, nothing with --record]
    #[arg(long, value_enum)]
    fill: Option<Fill>,
    /// Do not prefetch the working set
    #[arg(long)]
    no_working_set: bool,
    /// Record which pages are accessed, for the image's working set
    #[arg(long)]
    record: bool,
}

impl Ahead {
    /// Returns the user's choice, or else its default: `default`, and nothing when recording.
    fn fill(self, default: Fill) -> Fill {
        self.fill.unwrap_or(if self.record { Fill::Nothing } else { default })
    }

    fn working_set(self, default: Fill) -> bool {
        self.fill(default) != Fill::Nothing && !self.no_working_set
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnLoss {
    /// Poison the page: accesses raise SIGBUS
    Poison,
    /// Kill the program
    Kill,
    /// Stop the program (SIGSTOP); the fault stays pending
    Pause,
    /// Keep the fault pending, and report it
    Wait,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// The time that a fault may take before --on-loss applies, such as 500ms, 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = deadline)]
    fault_deadline: Duration,
    /// The action on a fault that is lost
    #[arg(long, value_enum, default_value_t = OnLoss::Wait)]
    on_loss: OnLoss,
    /// The time after SIGTERM in which programs' memory can become resident, such as 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// The directory, on tmpfs, of the state that outlives a daemon's worker [default:
    /// /run/postcopy for root, else $XDG_RUNTIME_DIR/postcopy; /dev/shm/postcopy-UID if that is not
    /// on tmpfs]
    #[arg(long, value_name = "DIR", env = "POSTCOPY_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// Never hold threads by ptrace(2) that cause events (madvise, munmap, mremap, fork) without a
    /// pause. Three or more of them in a process can then delay its page faults until the fault
    /// deadline
    #[arg(long)]
    no_hold: bool,
    /// Write a trace of each process's memory for `postcopy report`, as a file in this directory
    #[arg(long, value_name = "DIR")]
    trace: Option<PathBuf>,
}

impl DaemonArgs {
    fn root(&self) -> PathBuf {
        self.runtime_dir.clone().unwrap_or_else(runtime_dir::default_root)
    }

    fn options(&self, ahead: Ahead, fill: Fill) -> Result<Options> {
        ensure!(
            !(ahead.no_working_set && ahead.fill == Some(Fill::WorkingSet)),
            "--fill working-set and --no-working-set contradict each other: give one of them"
        );
        let on_loss = match self.on_loss {
            OnLoss::Poison => LossPolicy::Poison,
            OnLoss::Kill => LossPolicy::Kill,
            OnLoss::Pause => LossPolicy::Pause,
            OnLoss::Wait => LossPolicy::Wait,
        };
        let options = Options::DEFAULT
            .fault_deadline(self.fault_deadline)
            .on_loss(on_loss)
            .working_set(ahead.working_set(fill))
            .fill(ahead.fill(fill) == Fill::All)
            .record(ahead.record)
            .trace(self.trace.is_some())
            .track_writes(false)
            .hold_causers(!self.no_hold);
        Ok(options)
    }

    fn setup(
        &self,
        server: ServerAddress,
        images: Vec<(String, Arc<Image>)>,
        options: Options,
        runtime: RuntimeDir,
    ) -> Result<Setup> {
        let traces = match &self.trace {
            Some(path) => {
                let is_other = path.exists() && !path.is_dir();
                ensure!(!is_other, "--trace needs a directory, and {} is none", path.display());
                let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
                let made = made.and_then(|()| std::path::absolute(path));
                let made = made.and_then(|path| own_files::ensure_way(&path).map(|()| path));
                Some(made.with_context(|| path.display().to_string())?)
            }
            None => None,
        };
        Setup::new(server, images, options, self.grace, runtime, traces)
    }
}

/// Opens images, each of them once. Leaves no thread behind, which the guardian relies on.
fn open_images(server: &ServerAddress, references: &[Reference]) -> Result<Vec<Arc<Image>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let mut opened: BTreeMap<String, Arc<Image>> = BTreeMap::new();
    let mut images = Vec::new();
    for reference in references {
        let name = reference.to_string();
        if !opened.contains_key(&name) {
            let image = runtime.block_on(Image::open(server, reference))?;
            opened.insert(name.clone(), image);
        }
        images.push(Arc::clone(&opened[&name]));
    }
    Ok(images)
}

pub(super) fn tell_systemd() {
    // The call fails if systemd does not expect a notification.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

pub(super) fn exit_code(status: i32) -> ExitCode {
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

#[derive(Debug, Args)]
pub(crate) struct FirecrackerArgs {
    /// The socket that Firecracker connects to (`backend_path` of its mem_backend); may be repeated
    #[arg(long, value_name = "PATH", required_unless_present = "adopt")]
    socket: Vec<PathBuf>,
    /// The image of the snapshot: name, name:tag or name@blake3:…; one for all sockets, or one for
    /// each, in their order
    #[arg(long, value_name = "REFERENCE", required = true)]
    image: Vec<Reference>,
    /// Fail unless an image has this digest, blake3:…; one for all images, or one for each
    #[arg(long, value_name = "DIGEST")]
    expect: Vec<Digest>,
    /// The memory's file in the image, if several files have the length of the guest's memory; one
    /// for all images, or one for each
    #[arg(long, value_name = "PATH")]
    file: Vec<String>,
    /// Take over the microVM of this Firecracker process, whose daemon has died altogether
    #[arg(long, value_name = "PID", conflicts_with = "socket", value_parser = super::pid)]
    adopt: Option<u32>,
    /// Assert, for --adopt without a state file, that no balloon or the like has given back a page
    #[arg(long, requires = "adopt", conflicts_with = "socket")]
    nothing_was_removed: bool,
    #[command(flatten)]
    ahead: Ahead,
    #[command(flatten)]
    daemon: DaemonArgs,
}

pub(crate) fn firecracker(server: ServerAddress, args: &FirecrackerArgs) -> Result<ExitCode> {
    let count = args.socket.len().max(1);
    let each = |given: usize, what: &str| {
        ensure!(
            given <= 1 || given == count,
            "{given} {what} for {count} sockets: give one, or one for each"
        );
        Ok(())
    };
    each(args.image.len(), "images")?;
    each(args.file.len(), "files")?;
    ensure!(
        args.expect.len() <= 1 || args.expect.len() == args.image.len(),
        "{} digests (--expect) for {} images: give one, or one for each",
        args.expect.len(),
        args.image.len()
    );
    let images = open_images(&server, &args.image)?;
    for (index, (reference, image)) in args.image.iter().zip(&images).enumerate() {
        let expected = args.expect.get(index).or(args.expect.first());
        origin::ensure_expected(reference, image, expected)?;
        origin::ensure_fits(reference, image, Restorer::Firecracker)?;
        tracing::info!("{}", origin::line(reference, image));
    }
    let backing = |index: usize| {
        let of = |len: usize| index.min(len - 1);
        let image = of(images.len());
        Backing {
            image: Arc::clone(&images[image]),
            reference: args.image[image].to_string(),
            file: if args.file.is_empty() { None } else { Some(args.file[of(args.file.len())].clone()) },
        }
    };
    let backings: Vec<_> = (0..count).map(backing).collect();
    for backing in &backings {
        if let Some(file) = &backing.file {
            let found = backing.image.file(file.as_bytes());
            found.with_context(|| format!("--file: {} has no file {file:?}", backing.reference))?;
        }
    }
    let root = args.daemon.root();
    let runtime = firecracker::runtime_dir(&root)?;
    let named = args.image.iter().map(ToString::to_string).zip(images.iter().cloned()).collect();
    let options = args.daemon.options(args.ahead, Fill::WorkingSet)?;
    let mut setup = args.daemon.setup(server, named, options, runtime)?;
    for path in &args.socket {
        setup.listen(path)?;
    }
    let adopted = args.adopt.map(|pid| firecracker::adopt(&mut setup, &root, pid, args.nothing_was_removed));
    let program: Arc<dyn Program> = Arc::new(Firecracker { backings, adopted: adopted.transpose()? });
    Ok(exit_code(setup.run(program, tell_systemd)?))
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct CriuArgs {
    #[command(subcommand)]
    pub(crate) command: Option<CriuCommand>,
    /// The directory that `postcopy pull --criu` has created
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// The directory of the socket and other files, as for `criu restore` [default: --images-dir]
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// The image that was pushed: name, name:tag or name@blake3:…
    #[arg(long, value_name = "REFERENCE", required = true)]
    image: Option<Reference>,
    /// Fail unless the image has this digest, blake3:…
    #[arg(long, value_name = "DIGEST")]
    expect: Option<Digest>,
    /// End with status 1 if no `criu restore` connects within this time [default: wait for ever, as
    /// criu's own daemon does], such as 10m
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait_for_restore: Option<Duration>,
    /// Write the daemon's pid to this file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Write a zero byte to this descriptor when the daemon is ready
    #[arg(long, value_name = "FD")]
    status_fd: Option<RawFd>,
    /// Continue in the background once the daemon is ready
    #[arg(short = 'd', long)]
    daemon: bool,
    /// Write the log to this file
    #[arg(short = 'o', long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Log level as a number, or as many v's: 0 and 1 errors, 2 warnings, 3 and more information
    /// [default: 3]
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "1", value_parser = verbosity)]
    pub(crate) verbosity: Option<u8>,
    #[command(flatten)]
    ahead: Ahead,
    #[command(flatten)]
    common: DaemonArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CriuCommand {
    /// Fetch all absent memory of processes that are being restored, and wait until it is resident
    #[command(
        after_help = "Example:\n  postcopy criu drain 4711\n  criu dump -t 4711 -D images --action-script postcopy-criu-drain"
    )]
    Drain {
        /// The processes, and all that they have forked. In a script of `criu dump`: the process
        /// that is dumped
        #[arg(value_parser = super::pid)]
        pids: Vec<u32>,
        /// The daemon's --runtime-dir [default: that of the daemons]
        #[arg(long, value_name = "DIR", env = "POSTCOPY_RUNTIME_DIR")]
        runtime_dir: Option<PathBuf>,
    },
}

fn deadline(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("--on-loss would apply to every fault: give a time such as 30s".to_owned()),
        parsed => parsed.map_err(|error| error.to_string()),
    }
}

fn verbosity(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(level) => Ok(level),
        // -v is 1 and -vv is 2: the parser takes the first v for the option itself.
        Err(_) if text.bytes().all(|byte| byte == b'v') => {
            Ok(u8::try_from(text.len() + 1).unwrap_or(u8::MAX))
        }
        Err(_) => Err("a number, or v's".to_owned()),
    }
}

/// Returns the log level that corresponds to a level of CRIU.
pub(crate) fn log_level(verbosity: Option<u8>) -> LevelFilter {
    match verbosity {
        Some(0 | 1) => LevelFilter::ERROR,
        Some(2) => LevelFilter::WARN,
        None | Some(_) => LevelFilter::INFO,
    }
}

pub(crate) fn criu(server: impl FnOnce() -> Result<ServerAddress>, args: &CriuArgs) -> Result<ExitCode> {
    if let Some(CriuCommand::Drain { pids, runtime_dir }) = &args.command {
        let root = runtime_dir.clone().unwrap_or_else(runtime_dir::default_root);
        return drain(&root, pids);
    }
    // Before anything is opened: the process that leaves has nothing to clean up.
    let mut starter = Starter::new(args.status_fd)?;
    if args.daemon {
        starter.detach()?;
    }
    let (server, reference) = (server()?, args.image.clone().context("--image")?);
    let name = reference.to_string();
    let images = open_images(&server, std::slice::from_ref(&reference))?;
    let options = args.common.options(args.ahead, Fill::All)?;
    let image = Arc::clone(&images[0]);
    origin::ensure_expected(&reference, &image, args.expect.as_ref())?;
    origin::ensure_fits(&reference, &image, Restorer::Criu)?;
    let line = origin::line(&reference, &image);
    let criu = Criu::new(image, &name, &args.images_dir, options.fill, args.wait_for_restore)?;
    // The daemon starts the fill once all tasks are restored.
    let options = options.fill(false);
    let root = std::path::absolute(args.common.root())?;
    let work_dir = args.work_dir.as_ref().unwrap_or(&args.images_dir);
    // Relative paths begin at the work directory, as those of criu do.
    std::env::set_current_dir(work_dir).with_context(|| format!("--work-dir {}", work_dir.display()))?;
    let mut setup = args.common.setup(
        server,
        vec![(name, Arc::clone(&images[0]))],
        options,
        RuntimeDir::create(&root, "criu")?,
    )?;
    setup.listen(Path::new("lazy-pages.socket"))?;
    if let Some(path) = &args.pidfile {
        let written =
            own_files::create(path, 0o644).and_then(|mut file| write!(file, "{}", std::process::id()));
        written.with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.log_file {
        starter.log_to(path).with_context(|| path.display().to_string())?;
    }
    tracing::info!("{line}");
    let on_ready = || {
        tell_systemd();
        starter.tell_ready();
    };
    let ended = setup.run(Arc::new(criu), on_ready);
    if let Some(path) = &args.pidfile {
        let _ = own_files::remove(path);
    }
    starter.ended(ended).map(exit_code)
}

/// Drains processes for a user, or as a script of `criu dump`, which passes its action and process
/// in the environment.
fn drain(root: &Path, pids: &[u32]) -> Result<ExitCode> {
    let mut pids = pids.to_vec();
    if pids.is_empty() {
        let action = std::env::var("CRTOOLS_SCRIPT_ACTION")
            .ok()
            .context("name a process: postcopy criu drain PID. Only `criu dump` sets CRTOOLS_SCRIPT_ACTION in its place")?;
        if action != "pre-dump" {
            return Ok(ExitCode::SUCCESS);
        }
        let pid =
            std::env::var("CRTOOLS_INIT_PID").context("CRTOOLS_INIT_PID: criu does not say which process")?;
        pids.push(pid.parse().with_context(|| format!("CRTOOLS_INIT_PID is {pid:?}"))?);
    }
    ask_to_drain(root, &pids)?;
    Ok(ExitCode::SUCCESS)
}
