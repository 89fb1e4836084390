//! The command line of `postcopy`: its options, and the dispatch to `commands/*.rs`.

mod archive;
mod bench;
mod daemons;
mod doctor;
mod heat_map;
mod images;
mod interrupts;
mod mount;
mod origin;
mod output;
mod report;
mod working_sets;

use crate::daemon::log::{self, Log};
use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, Parser, Subcommand};
use output::Output;
use postcopy::proto::digest::Digest;
use postcopy::proto::page::ChunkSize;
use postcopy::proto::provenance::Labels;
use postcopy::proto::reference::{Reference, TagReference};
use postcopy::{DEFAULT_SERVER, ServerAddress};
use std::path::PathBuf;
use std::process::ExitCode;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// The heading of the options that all commands have.
const GLOBAL: &str = "Global options";

/// Restore memory before its pages have arrived: push, inspect, pull and measure page images
#[derive(Debug, Parser)]
#[command(name = "postcopy", version, max_term_width = 100)]
#[command(
    after_help = "Example:\n  postcopyd serve &\n  postcopy push ./model.bin model:v1\n  postcopy bench model:v1 model.bin\n\nPOSTCOPY_LOG in the environment sets the log level: error, warn or info."
)]
struct Cli {
    /// The server: http://host:port or unix:/path
    #[arg(long, global = true, env = "POSTCOPY_SERVER", default_value = DEFAULT_SERVER, help_heading = GLOBAL)]
    server: String,
    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Store a file or a directory tree as an image; of a checkpoint's archive (.tar, .tar.gz,
    /// .tar.zst), store the content
    #[command(
        after_help = "Examples:\n  postcopy push ./snapshot vm/web:v1 --chunk-size 65536\n  postcopy push ./diff-snapshot vm/web:v2 --base vm/web:v1"
    )]
    Push {
        /// The file or directory
        path: PathBuf,
        /// name or name:tag
        reference: TagReference,
        /// An image of the server: in files that it has, holes stand for its bytes and not for
        /// zeros, as in a diff snapshot of Firecracker
        #[arg(long, value_name = "REFERENCE")]
        base: Option<Reference>,
        /// Chunk size in bytes: a power of two from 4096 to 2097152 [default: that of the base, or
        /// else 65536]
        #[arg(long, value_parser = chunk_size)]
        chunk_size: Option<ChunkSize>,
        /// Compression level of zstd, from 1 to 19
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
        level: i32,
        /// A label of the reference; may be given several times. Firecracker's state file and
        /// CRIU's dump.log give labels by themselves
        #[arg(long, value_name = "KEY=VALUE", value_parser = Labels::parse_one)]
        label: Vec<(String, String)>,
    },
    /// Write an image's files to a new directory
    #[command(
        after_help = "Examples:\n  postcopy pull vm/web:v1 ./snapshot\n  postcopy pull vm/web:v1 ./state --only '*.state'\n  postcopy pull app:v1 ./images --criu"
    )]
    Pull {
        /// name, name:tag or name@blake3:…
        reference: Reference,
        /// The target directory; it must not exist, or be empty
        directory: PathBuf,
        /// Write only the files whose paths match: * and ? within a name, ** across directories;
        /// may be given several times
        #[arg(long, value_name = "GLOB")]
        only: Vec<globset::Glob>,
        /// Write CRIU's images without the memory that is restored lazily: the part that `criu
        /// restore --lazy-pages` reads itself
        #[arg(long, conflicts_with = "only")]
        criu: bool,
        /// Fail unless the reference stands for the image with this digest, blake3:…
        #[arg(long, value_name = "DIGEST")]
        expect: Option<Digest>,
    },
    /// List the references of the server
    #[command(after_help = "Example:\n  postcopy ls --json")]
    Ls,
    /// List the entries of an image, and its sizes
    #[command(after_help = "Example:\n  postcopy inspect vm/web:v1")]
    Inspect {
        /// name, name:tag or name@blake3:…
        reference: Reference,
    },
    /// Fetch every chunk of an image and check it against the manifest
    #[command(after_help = "Example:\n  postcopy verify vm/web:v1")]
    Verify {
        /// name, name:tag or name@blake3:…
        reference: Reference,
    },
    /// Remove a reference (`postcopyd gc` reclaims its space)
    #[command(after_help = "Example:\n  postcopy rm vm/web:v1")]
    Rm {
        /// name or name:tag
        reference: TagReference,
    },
    /// Point another reference to an image
    #[command(after_help = "Example:\n  postcopy tag vm/web:v1 vm/web:stable")]
    Tag {
        /// name, name:tag or name@blake3:…
        source: Reference,
        /// name or name:tag
        target: TagReference,
    },
    /// Inspect, send and remove working sets: the pages that restores of an image fault on
    #[command(subcommand, after_help = "Example:\n  postcopy working-set ls")]
    WorkingSet(working_sets::WorkingSetCommand),
    /// Map a file lazily, touch its pages in random order, check every byte, and print the times
    #[command(after_help = "Example:\n  postcopy bench model:v1 model.bin --threads 4")]
    Bench(bench::BenchArgs),
    /// Report the page faults of a trace, and the causes of their latency (--trace of bench,
    /// firecracker and criu); -o draws them
    #[command(
        after_help = "Example:\n  postcopy bench model:v1 model.bin --trace model.jsonl\n  postcopy report model.jsonl -o model.html"
    )]
    Report(report::ReportArgs),
    /// Restore microVMs: serve the memory of Firecracker's snapshots
    #[command(after_help = concat!(
        "Example:\n  postcopy firecracker --socket /run/vm.sock --image vm/web:v1\n\n",
        "Exit status: 0: nothing was lost; 1: it could not serve; 2: wrong arguments; 3: a machine was killed or stopped, lost pages, or was left \
         without memory that had not arrived. The log says which."
    ))]
    Firecracker(daemons::FirecrackerArgs),
    /// Restore processes, in place of `criu lazy-pages`
    #[command(
        after_help = concat!(
            "Example:\n  postcopy pull app:v1 images --criu\n  postcopy criu -D images --image app:v1 &\n",
            "  criu restore -D images --lazy-pages\n\n",
            "Exit status: 0: nothing was lost; 1: the restore failed, or it could not serve; 2: wrong arguments; 3: a \
             process was killed or \
             stopped, lost pages, or was left without memory that had not arrived. The log says which."
        )
    )]
    Criu(daemons::CriuArgs),
    /// Mount the images of a server as files, whose pages all programs of this host share. Runs
    /// until it is unmounted, or until SIGTERM
    #[command(
        after_help = "Example:\n  postcopy mount /mnt/images &\n  ls /mnt/images/app/v1/\n  umount /mnt/images"
    )]
    Mount(mount::MountArgs),
    /// Ask your mount to store an image's working set in the page cache. The mount's server is
    /// used, and not --server
    #[command(after_help = "Example:\n  postcopy mount /mnt/images &\n  postcopy warm app:v1")]
    Warm(mount::WarmArgs),
    /// Report the features that this kernel and these privileges allow
    #[command(after_help = "Example:\n  postcopy doctor\n  postcopy doctor --pid 4711")]
    Doctor {
        /// Also report if this shell is outside of the memory cgroup and the freezer of this
        /// process
        #[arg(long, value_parser = pid)]
        pid: Option<u32>,
    },
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  postcopy completions bash > /etc/bash_completion.d/postcopy")]
    Completions {
        /// The shell to print the script for
        shell: clap_complete::Shell,
    },
}

fn chunk_size(text: &str) -> Result<ChunkSize, String> {
    let bytes = text.parse().map_err(|_| "it must be a number of bytes, for example 65536".to_owned())?;
    ChunkSize::new(bytes).map_err(|e| e.to_string())
}

fn pid(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "it must be a process id, for example 4711".to_owned())
}

/// Returns the log level that POSTCOPY_LOG names, or else `default`.
fn log_level(default: LevelFilter) -> Result<LevelFilter> {
    let named = std::env::var_os("POSTCOPY_LOG").unwrap_or_default();
    if named.is_empty() {
        return Ok(default);
    }
    let level = named.to_str().and_then(|named| named.parse().ok());
    // Release builds leave the levels below information out.
    let level = level.filter(|level| *level <= STATIC_MAX_LEVEL);
    level.with_context(|| format!("POSTCOPY_LOG is {named:?}: it must be error, warn or info"))
}

/// Runs the command. Returns success only if all of it was done and every byte was right.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output { json: cli.json };
    let (level, is_logged_to_file) = match &cli.command {
        Command::Firecracker(_) | Command::Mount(_) => (LevelFilter::INFO, false),
        Command::Criu(args) => (daemons::log_level(args.verbosity), args.log_file.is_some()),
        _ => (LevelFilter::ERROR, false),
    };
    let level = match log_level(level) {
        Ok(level) => level,
        Err(error) => {
            output.error(&error);
            return ExitCode::FAILURE;
        }
    };
    let is_daemon = matches!(cli.command, Command::Firecracker(_) | Command::Criu(_) | Command::Mount(_));
    let writer = if is_daemon { BoxMakeWriter::new(|| Log) } else { BoxMakeWriter::new(std::io::stderr) };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .fmt_fields(tracing_subscriber::fmt::format::debug_fn(log::field))
        .with_ansi(!is_logged_to_file && std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        // Reporting such an error would panic once the reader of stderr has gone.
        .log_internal_errors(false)
        .with_writer(writer)
        .init();
    match run(cli, output) {
        Ok(code) => code,
        Err(error) => {
            output.error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, output: Output) -> Result<ExitCode> {
    let server = || cli.server.parse::<ServerAddress>().context("--server or POSTCOPY_SERVER");
    match cli.command {
        Command::Push { path, reference, base, chunk_size, level, label } => {
            let mut labels = Labels::default();
            for (key, value) in label {
                ensure!(labels.get(&key).is_none(), "--label {key}: it is given twice");
                labels.set(&key, &value).context("--label")?;
            }
            let options = postcopy::push::PushOptions { chunk_size, level, labels, base };
            images::push(server()?, &path, &reference, options, output)
        }
        Command::Pull { reference, directory, only, criu, expect } => {
            let part = if criu { images::Part::Criu } else { images::Part::of(only)? };
            images::pull(server()?, &reference, &directory, part, expect.as_ref(), output)
        }
        Command::Ls => images::list(server()?, output),
        Command::Inspect { reference } => images::inspect(server()?, &reference, output),
        Command::Verify { reference } => images::verify(server()?, &reference, output),
        Command::Rm { reference } => images::remove(server()?, &reference, output),
        Command::Tag { source, target } => images::tag(server()?, &source, &target, output),
        Command::WorkingSet(command) => working_sets::run(server()?, command, output),
        Command::Bench(args) => bench::bench(server()?, args, output),
        Command::Report(args) => report::report(&args, output),
        Command::Firecracker(args) => daemons::firecracker(server()?, &args),
        Command::Criu(args) => daemons::criu(server, &args),
        Command::Mount(args) => mount::mount(server()?, &args, output),
        Command::Warm(args) => mount::warm(&args, output),
        Command::Doctor { pid } => doctor::doctor(pid, output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "postcopy", &mut script);
            output::print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
