//! The command `postcopy mount`.

use super::daemons::{exit_code, tell_systemd};
use crate::daemon::mounted;
use anyhow::{Context, Result, ensure};
use clap::Args;
use postcopy::ServerAddress;
use postcopy::proto::reference::TagReference;
use postcopy_mount::{Settings, mount};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Most bytes that the kernel may read ahead: what it takes in one request.
const MAX_READ_AHEAD: u32 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The directory to mount at, which must exist
    directory: PathBuf,
    /// Show this image only, name or name:tag; may be repeated [default: all of the server]
    #[arg(long, value_name = "REFERENCE")]
    image: Vec<TagReference>,
    /// Let other users read the files, as their mode allows
    #[arg(long)]
    allow_other: bool,
    /// Permissions of directories and executable files; other files lack those to execute
    #[arg(long, value_name = "MODE", default_value = "0500", value_parser = mode)]
    mode: u32,
    /// The time that a read may take before its program gets an error (EIO), such as 500ms or 30s
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Most bytes that the kernel reads ahead by itself. The daemon reads ahead for sequential
    /// reads in any case
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(4096..=i64::from(MAX_READ_AHEAD)))]
    read_ahead: u32,
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o555 == 0);
    mode.ok_or_else(|| "it must be octal, without write permissions, for example 0555".to_owned())
}

/// Mounts images, and serves them until they are unmounted.
pub(crate) fn mount(server: ServerAddress, args: &MountArgs) -> Result<ExitCode> {
    ensure!(args.deadline > Duration::ZERO, "--deadline: it must be longer than 0s");
    let found = std::fs::metadata(&args.directory);
    // A mount whose daemons were killed does not answer, and is replaced.
    let is_dead = found.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotConnected);
    if !is_dead {
        let shown = || format!("{}: mount at a directory that exists", args.directory.display());
        ensure!(found.with_context(shown)?.is_dir(), "{} is no directory", args.directory.display());
    }
    let only = args.image.iter().map(ToString::to_string).collect();
    let settings = Settings {
        server,
        only: if args.image.is_empty() { None } else { Some(only) },
        deadline: args.deadline,
        read_ahead_bytes: args.read_ahead,
        owner: mount::own(args.mode),
    };
    mounted::run(&args.directory, &settings, args.allow_other, tell_systemd).map(exit_code)
}
