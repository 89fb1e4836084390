//! The command line of postcopyd.

use crate::end_signals;
use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use postcopy_server::limits::Limits;
use postcopy_server::listen::{Address, Listener};
use postcopy_server::peers::{Fleet, PeerList};
use postcopy_server::serve::serve;
use postcopy_server::store::{
    Bucket, Collected, Collector, Damage, DiskCache, Domain, Location, Plan, Progress, Repacked, Repaired,
    Store, StoreError, Verified, repair, upgrade, verify,
};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Keep page images and serve their pages over gRPC
#[derive(Debug, Parser)]
#[command(name = "postcopyd", version, after_help = "Example:\n  postcopyd serve")]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a store until SIGTERM or SIGINT; prints its address when it is ready
    #[command(
        after_help = "Example:\n  postcopyd serve --store /srv/postcopy --listen unix:/run/postcopy.sock"
    )]
    Serve(Serve),
    /// Delete the objects that no reference needs; safe beside running servers and pushes
    ///
    /// Copies what is needed of small packs and of packs that are mostly garbage into new packs.
    /// Condemns the objects that are not needed, waits for the grace time, and deletes those that are
    /// still not needed.
    #[command(
        after_help = "Examples:\n  postcopyd gc --grace 10m\n  postcopyd gc --dry-run      # what would be deleted\n  postcopyd gc --no-wait     # from cron, once a day"
    )]
    Gc(Gc),
    /// Check every byte of a store; exit status 1 if anything is damaged
    #[command(after_help = "Example:\n  postcopyd verify --store /srv/postcopy")]
    Verify(Verify),
    /// Set damaged objects aside, so that pushes replace them; safe beside running servers
    ///
    /// Copies what is sound of damaged packs into new ones, and moves damaged packs, roots and segments
    /// to the store's directory `damaged`. Deletes nothing.
    #[command(after_help = "Example:\n  postcopyd repair --store /srv/postcopy")]
    Repair(Repair),
    /// Convert a store of format 1, which its servers must not use meanwhile, to format 2
    ///
    /// Rewrites each reference, and leaves images as they are. Run it again if it was interrupted.
    #[command(after_help = "Example:\n  postcopyd upgrade --store /srv/postcopy")]
    Upgrade {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Print completions for a shell
    #[command(after_help = "Example:\n  postcopyd completions bash > /etc/bash_completion.d/postcopyd")]
    Completions {
        /// The shell to print completions for
        shell: clap_complete::Shell,
    },
}

/// The option that names the store.
#[derive(Debug, Args)]
struct StoreArgs {
    /// The store's directory, or the URL of a bucket, such as s3://bucket/prefix [default:
    /// $XDG_DATA_HOME/postcopy or ~/.local/share/postcopy]
    #[arg(long, value_name = "DIR|URL", env = "POSTCOPY_STORE")]
    store: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    store: StoreArgs,
    /// Directory for a cache of what is read from a bucket; empty, or a server's cache before
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Most bytes of the cache, such as 500MiB or 2TiB
    #[arg(long, value_name = "SIZE", default_value = "10GiB", value_parser = size)]
    cache_size: u64,
    /// Most bytes of blocks of packs in memory, for a store in a bucket [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cache_memory: Option<u64>,
    /// All servers of the bucket: http://host:port, separated by commas, or dns:NAME:PORT for the
    /// addresses of a name; each reads a part of the packs from the bucket, and sends it to the others
    #[arg(long, value_name = "LIST")]
    peers: Option<PeerList>,
    /// Address to listen at: host:port (port 0: any free one) or unix:/path
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    listen: String,
    /// Listen at an address that other machines can reach, without encryption or authentication
    #[arg(long)]
    insecure: bool,
    /// Most connections; one client (an IP address, or a user of a Unix socket) may have half of them
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..))]
    max_connections: u32,
    /// Permissions that new files, directories and the socket do not get: a store holds the memory
    /// of programs
    #[arg(long, value_name = "OCTAL", default_value = "077", value_parser = umask)]
    umask: u32,
    /// Share of an image's recordings in which a page must have faulted to belong to the working
    /// set
    #[arg(long, value_name = "0..1", default_value_t = 0.5, value_parser = share)]
    working_set_share: f64,
}

#[derive(Debug, Args)]
struct Gc {
    #[command(flatten)]
    store: StoreArgs,
    /// Time from condemning an object to its deletion, longer than a push takes, such as 90s or 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// Do not wait: delete only objects that were condemned at least the grace time ago
    #[arg(long)]
    no_wait: bool,
    /// Say what would be deleted and repacked, and change nothing
    #[arg(long, conflicts_with = "no_wait")]
    dry_run: bool,
    /// Leave packs as they are that are small or mostly garbage
    #[arg(long)]
    no_repack: bool,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Verify {
    #[command(flatten)]
    store: StoreArgs,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Repair {
    #[command(flatten)]
    store: StoreArgs,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// Gives up root's rights for those of the store's owner, whose server could not read root's files.
/// The owner is that of the file `format`: the directory may be older than the store.
fn become_owner(location: &Location) -> anyhow::Result<()> {
    let Location::Directory(dir) = location else { return Ok(()) };
    // A missing store is an error of the command.
    let Ok(metadata) = std::fs::metadata(dir.join("format")) else { return Ok(()) };
    let (user, group) = (metadata.uid(), metadata.gid());
    if !rustix::process::geteuid().is_root() || user == 0 {
        return Ok(());
    }
    #[expect(
        unsafe_code,
        clippy::multiple_unsafe_ops_per_block,
        reason = "the C library changes all threads"
    )]
    // SAFETY: the calls have no preconditions; the list has one group.
    let failed = unsafe {
        libc::setgroups(1, &raw const group) != 0 || libc::setgid(group) != 0 || libc::setuid(user) != 0
    };
    match failed {
        true => Err(io::Error::last_os_error())
            .with_context(|| format!("root cannot become the store's owner, user {user}")),
        false => Ok(()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "it must be a number above 0 and at most 1".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let unit = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "it must be a number of bytes, or of KiB, MiB, GiB or TiB".to_owned())
}

fn umask(text: &str) -> Result<u32, String> {
    let mask = u32::from_str_radix(text, 8).ok().filter(|mask| *mask <= 0o777);
    mask.ok_or_else(|| "it must be an octal number up to 777".to_owned())
}

impl Cli {
    /// Returns true if output, including errors, must be JSON.
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Command::Gc(options) => options.json,
            Command::Verify(options) => options.json,
            Command::Repair(options) => options.json,
            Command::Serve(_) | Command::Upgrade { .. } | Command::Completions { .. } => false,
        }
    }

    /// Returns true for the command that serves until a signal ends it.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.command, Command::Serve(_))
    }

    /// Runs the command.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Serve(options) => options.run().await,
            Command::Gc(options) => options.run().await,
            Command::Verify(options) => options.run().await,
            Command::Repair(options) => options.run().await,
            Command::Upgrade { store } => {
                rustix::process::umask(Mode::from_raw_mode(0o077));
                let location = store.location()?;
                become_owner(&location)?;
                let Location::Directory(dir) = location else {
                    anyhow::bail!("stores in buckets have format 2 from the beginning");
                };
                let converted = upgrade(&dir, Domain::DEFAULT)?;
                say(format_args!("the store has format 2; {converted} references were converted"))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "postcopyd", &mut script);
                say(format_args!("{}", String::from_utf8_lossy(&script).trim_end()))?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl StoreArgs {
    fn location(&self) -> anyhow::Result<Location> {
        Ok(match self.bucket()? {
            Some(bucket) => Location::Bucket(Arc::new(bucket)),
            None => Location::Directory(self.dir()?),
        })
    }

    fn bucket(&self) -> anyhow::Result<Option<Bucket>> {
        let url = self.store.as_ref().and_then(|store| store.to_str()).filter(|store| store.contains("://"));
        Ok(url.map(Bucket::of_url).transpose()?)
    }

    fn dir(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.store {
            return Ok(dir.clone());
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        let data = data.context("neither HOME nor XDG_DATA_HOME is set: name the store with --store DIR")?;
        Ok(data.join("postcopy"))
    }
}

impl Serve {
    fn location(&self, fleet: Option<&Arc<Fleet>>) -> anyhow::Result<Location> {
        let Some(mut bucket) = self.store.bucket()? else {
            let of_buckets = [
                ("--cache", self.cache.is_some()),
                ("--cache-memory", self.cache_memory.is_some()),
                ("--peers", fleet.is_some()),
            ];
            if let Some((option, _)) = of_buckets.iter().find(|(_, is_given)| *is_given) {
                anyhow::bail!("{option} is for a store in a bucket");
            }
            return self.store.location();
        };
        if let Some(bytes) = self.cache_memory {
            bucket = bucket.with_cache_memory(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        if let Some(dir) = &self.cache {
            bucket = bucket.with_cache(DiskCache::open(dir, self.cache_size)?);
        }
        if let Some(fleet) = fleet {
            bucket = bucket.with_peers(Arc::new(fleet.clone()));
        }
        Ok(Location::Bucket(Arc::new(bucket)))
    }

    async fn run(self) -> anyhow::Result<ExitCode> {
        rustix::process::umask(Mode::from_raw_mode(self.umask));
        let address: Address = self.listen.parse()?;
        let fleet = self.peers.clone().map(|list| Arc::new(Fleet::new(list)));
        let location = self.location(fleet.as_ref())?;
        let end = end_signals::first().context("a thread for signals")?;
        let listener = Listener::bind(&address, self.insecure)?;
        let url = listener.url().context("the listener's own address")?;
        let store = Arc::new(blocking(move || Store::open_or_create(location, Domain::DEFAULT)).await??);
        tracing::info!(store = %store.name().display(), %url, "serving");
        // The parent process reads this line, if it still exists.
        let _ = writeln!(io::stdout(), "postcopyd listening on {url}");
        let limits = Limits::default().with_connections(connections(self.max_connections));
        serve(store, listener, limits, self.working_set_share, fleet, end).await?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Does work that waits for a disk or a bucket.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("the message is above")
}

/// Descriptors for other things than connections: files of the store, locks, leases.
const OTHER_DESCRIPTORS: u64 = 512;

/// Raises the limit on descriptors to the hard limit. Returns the number of connections that the
/// limit has room for, at most `wanted`.
fn connections(wanted: u32) -> u32 {
    let limit = getrlimit(Resource::Nofile);
    // On failure the old limit stays, and is read below.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let room = descriptors.saturating_sub(OTHER_DESCRIPTORS).max(descriptors / 2).max(1);
    let connections = u32::try_from(room).unwrap_or(u32::MAX).min(wanted);
    if connections < wanted {
        tracing::warn!("at most {connections} connections: the process may have {descriptors} descriptors");
    }
    connections
}

impl Gc {
    async fn run(self) -> anyhow::Result<ExitCode> {
        rustix::process::umask(Mode::from_raw_mode(0o077));
        let location = self.store.location()?;
        become_owner(&location)?;
        let collector = blocking(|| Collector::open(location, Domain::DEFAULT)).await??;
        let collector = Arc::new(match io::stderr().is_terminal() {
            true => collector.with_progress(show_progress()),
            false => collector,
        });
        if self.dry_run {
            let (grace, repacks) = (self.grace, !self.no_repack);
            let plan = blocking(move || collector.plan(grace)).await?.map_err(not_deleted)?;
            let repacked = if repacks { plan.repacked } else { Repacked::default() };
            return self.say_plan(&Plan { repacked, ..plan });
        }
        let report = self.collect(collector).await?.map_err(not_deleted)?;
        if self.json {
            return print_json(&report).map(|()| ExitCode::SUCCESS);
        }
        let Report { repacked: Repacked { packs, new_packs, bytes }, collected } = report;
        if new_packs > 0 {
            say(format_args!("repacked {packs} packs into {new_packs}: copied {bytes} bytes"))?;
        }
        let Collected { packs, manifests, working_sets, left_overs, bytes, waiting } = collected;
        let deleted = format!(
            "{packs} packs, {manifests} manifests, {working_sets} working sets, {left_overs} left-overs"
        );
        let later = if waiting > 0 { " for a run after the grace time" } else { "" };
        say(format_args!("deleted {deleted}: {bytes} bytes; {waiting} objects condemned, waiting{later}"))?;
        Ok(ExitCode::SUCCESS)
    }

    fn say_plan(&self, plan: &Plan) -> anyhow::Result<ExitCode> {
        if self.json {
            return print_json(plan).map(|()| ExitCode::SUCCESS);
        }
        let Plan { packs, manifests, bytes, waiting, waiting_bytes, repacked } = plan;
        if repacked.new_packs > 0 {
            let Repacked { packs, new_packs, bytes } = repacked;
            say(format_args!("would repack {packs} packs into {new_packs}: copy {bytes} bytes"))?;
        }
        say(format_args!(
            "would delete {packs} packs, {manifests} manifests: {bytes} bytes; {waiting} more objects of \
             {waiting_bytes} bytes after their grace time"
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    async fn collect(&self, collector: Arc<Collector>) -> anyhow::Result<Result<Report, StoreError>> {
        let (condemner, grace, repacks) = (collector.clone(), self.grace, !self.no_repack);
        let step = collector.clock_step();
        let condemn = move || match repacks {
            true => condemner.repack_and_condemn(grace),
            false => condemner.condemn().map(|latest| (Repacked::default(), latest)),
        };
        let (repacked, latest) = match blocking(condemn).await? {
            Ok(condemned) => condemned,
            Err(error) => return Ok(Err(error)),
        };
        if let Some(latest) = latest.filter(|_| !self.no_wait) {
            let step = if self.grace.is_zero() { Duration::ZERO } else { step };
            let wait = self.grace.saturating_sub(latest) + step;
            tracing::info!("unreferenced objects are condemned; they are deleted in {wait:.0?}");
            tokio::time::sleep(wait).await;
        }
        let collected = blocking(move || collector.sweep(grace)).await?;
        Ok(collected.map(|collected| Report { collected, repacked }))
    }
}

/// The result of `gc`.
#[derive(Debug, serde::Serialize)]
struct Report {
    #[serde(flatten)]
    collected: Collected,
    #[serde(flatten)]
    repacked: Repacked,
}

/// Time between two lines about one part of a collection's work.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

/// Returns a function that prints the progress of a collection: the end of each part of the work,
/// and a line from time to time.
fn show_progress() -> impl Fn(Progress) {
    let last = Mutex::new(Instant::now());
    move |progress| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.done == progress.total || last.elapsed() >= PROGRESS_PAUSE {
            *last = Instant::now();
            // The work goes on without a reader.
            let _ = writeln!(io::stderr(), "postcopyd: {progress}");
        }
    }
}

fn not_deleted(error: StoreError) -> anyhow::Error {
    match error {
        StoreError::Damaged { .. } => anyhow::Error::from(error)
            .context("nothing was deleted, because an object cannot be read; run `postcopyd verify`"),
        other => other.into(),
    }
}

impl Verify {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let location = self.store.location()?;
        become_owner(&location)?;
        let verified = blocking(|| verify(location, Domain::DEFAULT)).await??;
        let is_sound = verified.damage.is_empty();
        if self.json {
            print_json(&verified)?;
        } else {
            for Damage { object, reason } in &verified.damage {
                say(format_args!("damaged: {object}: {reason}"))?;
            }
            let Verified { packs, pack_bytes, chunks, manifests, references, .. } = verified;
            let sound = if is_sound { "sound" } else { "damaged; sound are" };
            say(format_args!(
                "{sound}: {packs} packs ({pack_bytes} bytes, {chunks} chunks), {manifests} manifests, {references} references"
            ))?;
        }
        Ok(if is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Repair {
    async fn run(self) -> anyhow::Result<ExitCode> {
        rustix::process::umask(Mode::from_raw_mode(0o077));
        let location = self.store.location()?;
        become_owner(&location)?;
        let repaired = blocking(|| repair(location, Domain::DEFAULT)).await??;
        let exit = if repaired.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        if self.json {
            print_json(&repaired)?;
            return Ok(exit);
        }
        let Repaired { set_aside, chunks, errors } = repaired;
        for Damage { object, reason } in &set_aside {
            say(format_args!("set aside: {object}: {reason}"))?;
        }
        for Damage { object, reason } in &errors {
            say(format_args!("error: {object}: {reason}"))?;
        }
        let next = match set_aside.len() {
            0 => "",
            _ => "; push the images again that `postcopyd verify` names now",
        };
        say(format_args!(
            "{} objects set aside, {chunks} sound chunks of them copied{next}",
            set_aside.len()
        ))?;
        Ok(exit)
    }
}

fn print_json(report: &impl serde::Serialize) -> anyhow::Result<()> {
    say(format_args!("{}", serde_json::to_string(report)?))
}

/// Prints a line. Returns an error where `println!` would panic, for example on a closed pipe.
fn say(line: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context("standard output")
}
