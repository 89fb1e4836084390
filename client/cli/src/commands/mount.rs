//! The commands `postcopy mount` and `postcopy warm`.

use super::daemons::{exit_code, tell_systemd};
use super::images::with_remote;
use super::output::{Advised, Output, bytes, counted, printable};
use crate::daemon::{mounted, runtime_dir};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use postcopy::proto::page::PAGE_BYTES;
use postcopy::proto::reference::{Reference, TagReference};
use postcopy::proto::v1;
use postcopy::{Remote, RemoteError, ServerAddress};
use postcopy_mount::{Settings, mount};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Most bytes that the kernel may read ahead: what it takes in one request.
const MAX_READ_AHEAD: u32 = 1 << 20;

/// Time for which `postcopy warm` asks a mount again whose worker has died, and the pause before.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The directory to mount at, which must exist. What it holds is hidden meanwhile
    #[arg(required_unless_present = "list")]
    directory: Option<PathBuf>,
    /// List the mounts of this host, of all users, and end
    #[arg(long, conflicts_with = "directory")]
    list: bool,
    /// List this tag only, name or name:tag; may be repeated. Other images are readable by digest
    /// [default: all tags of the server]
    #[arg(long, value_name = "REFERENCE")]
    image: Vec<TagReference>,
    /// Let other users read the files, as their mode allows
    #[arg(long)]
    allow_other: bool,
    /// The mode of directories and executable files, octal. Other files have it without x
    #[arg(long, value_name = "MODE", default_value = "0500", value_parser = mode)]
    mode: u32,
    /// The time that a read may take before its program gets an error (EIO), such as 500ms or 30s
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Bytes that the kernel reads ahead around page faults. Sequential reads are read ahead in any
    /// case
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(4096..=i64::from(MAX_READ_AHEAD)))]
    read_ahead: u32,
    /// The directory of the socket that `postcopy warm` uses: yours, and on tmpfs [default:
    /// /run/postcopy for root, else $XDG_RUNTIME_DIR/postcopy; /dev/shm/postcopy-UID if that is not
    /// on tmpfs]
    #[arg(long, env = "POSTCOPY_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct WarmArgs {
    /// name, name:tag, or name@blake3:<digest>
    reference: Reference,
    /// Then store the rest of the image, too
    #[arg(long)]
    fill: bool,
    /// The --runtime-dir of the mount [default: that of `postcopy mount`]
    #[arg(long, env = "POSTCOPY_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o555 == 0);
    mode.ok_or_else(|| "it must be octal, without write permissions, for example 0555".to_owned())
}

/// Mounts images, and serves them until they are unmounted.
pub(crate) fn mount(server: ServerAddress, args: &MountArgs, output: Output) -> Result<ExitCode> {
    let Some(directory) = args.directory.as_ref().filter(|_| !args.list) else {
        list(output)?;
        return Ok(ExitCode::SUCCESS);
    };
    ensure!(args.deadline > Duration::ZERO, "--deadline: it must be longer than 0s");
    let found = std::fs::metadata(directory);
    // A mount whose daemons were killed does not answer, and is replaced.
    let is_dead = found.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotConnected);
    if !is_dead {
        let shown = || format!("{}: it must be a directory that exists", directory.display());
        ensure!(found.with_context(shown)?.is_dir(), "{} is no directory", directory.display());
    }
    let only = args.image.iter().map(ToString::to_string).collect();
    let settings = Settings {
        server,
        only: if args.image.is_empty() { None } else { Some(only) },
        deadline: args.deadline,
        read_ahead_bytes: args.read_ahead,
        owner: mount::own(args.mode),
    };
    let runtime = args.runtime_dir.clone().unwrap_or_else(runtime_dir::default_root);
    mounted::run(directory, &settings, args.allow_other, &runtime, tell_systemd).map(exit_code)
}

/// A mount, as `--list` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    directory: PathBuf,
    server: String,
    user: u32,
    state: &'static str,
}

fn list(output: Output) -> Result<()> {
    let mounts = mount::all().context("/proc/self/mountinfo")?;
    let shown = |mount: mount::Mount| {
        let state = match mount::is_answering(&mount.directory) {
            Some(true) => "serving",
            Some(false) => "dead",
            None => "no answer",
        };
        Shown { directory: mount.directory, server: mount.server, user: mount.user, state }
    };
    let shown: Vec<_> = mounts.into_iter().map(shown).collect();
    let line = |of: &Shown| {
        let directory = printable(&of.directory.to_string_lossy());
        format!("{directory}  {}  user {}  {}\n", printable(&of.server), of.user, of.state)
    };
    output.show(&shown, || match shown.is_empty() {
        true => "no images are mounted: postcopy mount DIR".to_owned(),
        false => shown.iter().map(line).collect(),
    })
}

/// The result of `postcopy warm`.
#[derive(Debug, Serialize)]
struct Warmed {
    reference: String,
    pages: u64,
    bytes: u64,
}

/// Has this user's mount store pages of an image in the page cache.
pub(crate) fn warm(args: &WarmArgs, output: Output) -> Result<ExitCode> {
    let root = args.runtime_dir.clone().unwrap_or_else(runtime_dir::default_root);
    let socket = std::path::absolute(mounted::socket(&root)).context("--runtime-dir")?;
    if root.exists() {
        runtime_dir::ensure_private(&root)?;
    }
    let address: ServerAddress = format!("unix:{}", socket.display()).parse()?;
    let request = v1::WarmRequest { reference: args.reference.to_string(), fill: args.fill };
    let started = Instant::now();
    let warmed = loop {
        let asked = with_remote(address.clone(), |remote| Box::pin(ask_to_warm(remote, request.clone())));
        let error = match asked {
            Ok(warmed) => break warmed,
            Err(error) => error,
        };
        match error.downcast_ref() {
            // Its worker was killed. Another one answers soon, and finds what was stored.
            Some(error @ RemoteError::Status { .. })
                if error.is_no_answer() && started.elapsed() < PATIENCE =>
            {
                std::thread::park_timeout(PAUSE);
            }
            // The error is the mount's, whose address is of no use here.
            Some(RemoteError::Status { status, .. }) => bail!("{}", status.message()),
            Some(RemoteError::Connect { .. }) => {
                let text = format!("{}: no mount answers there", socket.display());
                let next =
                    "Mount the images of a server: postcopy mount DIR; or name the mount's --runtime-dir";
                return Err(Advised { text, next }.into());
            }
            _ => return Err(error),
        }
    };
    output.show(&warmed, || {
        let Warmed { reference, pages, .. } = &warmed;
        match pages {
            0 => format!(
                "{reference}: nothing was stored: the image has no working set (--fill stores all of it)"
            ),
            _ => {
                format!("{reference}: stored {} ({})", counted(*pages, "page", "pages"), bytes(warmed.bytes))
            }
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Asks a mount to store pages, and waits for it.
async fn ask_to_warm(remote: Remote, request: v1::WarmRequest) -> Result<Warmed> {
    let what = format!("storing {}", request.reference);
    let stream = remote.mount().warm(request.clone()).await.map_err(remote.failed(&*what))?;
    let (mut stream, mut pages) = (stream.into_inner(), 0);
    while let Some(progress) = remote.next_of(&what, &mut stream).await? {
        pages = progress.pages;
    }
    Ok(Warmed { reference: request.reference, pages, bytes: pages * PAGE_BYTES as u64 })
}
