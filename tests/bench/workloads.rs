//! Programs that nobody here wrote, with data in memory, each of which answers requests on a unix socket.
//!
//! A request follows from a seed, so that the same one can be asked before the dump and after a restore.

use anyhow::{Context, Result, bail, ensure};
use postcopy::proto::digest::Digest;
use postcopy_tests::criu::Criu;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Redis: entries of some 800 bytes, 300 MiB of its memory.
const ENTRIES: u64 = 300_000;
/// Redis: entries that one request reads.
const GETS: usize = 300;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    Redis,
    Python,
    Sqlite,
    Node,
}

impl Workload {
    pub(crate) const ALL: [Self; 4] = [Self::Redis, Self::Python, Self::Sqlite, Self::Node];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Python => "python",
            Self::Sqlite => "sqlite",
            Self::Node => "node",
        }
    }

    /// What it holds, and what a request is.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Redis => "Redis with 300,000 entries; a GET, and then 299 more",
            Self::Python => "Python with numpy and scipy; four of nine computations, of random input",
            Self::Sqlite => "SQLite in memory with 600,000 rows; 60 random queries",
            Self::Node => "Node with an index of 120,000 texts; 200 random searches",
        }
    }

    /// Starts nothing yet: the command of a program that listens at [`socket`].
    pub(crate) fn command(self, criu: &Criu, folder: &Path) -> Command {
        let socket = socket(folder);
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        match self {
            Self::Redis => {
                let mut command = criu.command_to_dump("usr/bin/redis-server", folder);
                command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]);
                command.arg(socket).arg("--dir").arg(folder);
                command
            }
            Self::Python | Self::Sqlite => {
                let name =
                    if matches!(self, Self::Python) { "answer_numbers.py" } else { "answer_queries.py" };
                let mut command = Command::new("env");
                command.arg("OPENBLAS_NUM_THREADS=1").arg(here.join("../.venv-bench/bin/python"));
                command.arg(here.join("programs").join(name)).arg(socket);
                command
            }
            // criu does not know io_uring.
            Self::Node => {
                let mut command = Command::new("env");
                command.args(["UV_USE_IO_URING=0", "node"]);
                command.arg(here.join("programs/answer_text.js")).arg(socket);
                command
            }
        }
    }

    /// Gives it its data, where it does not make them itself.
    pub(crate) fn load(self, folder: &Path) -> Result<()> {
        let Self::Redis = self else { return Ok(()) };
        let mut redis = Redis::connect(folder)?;
        for first in (0..ENTRIES).step_by(1000) {
            (first..first + 1000).try_for_each(|entry| redis.send(&["SET", &key(entry), &order(entry)]))?;
            (0..1000).try_for_each(|_| redis.receive().map(drop))?;
        }
        // Its table has just become larger. As long as entries are being moved, one more with each command, and 100 at each tick
        // of its clock, what a restored one touches first is a matter of chance.
        let mut entries = (0..ENTRIES).cycle();
        while redis.is_moving_entries()? {
            for entry in entries.by_ref().take(1000) {
                redis.send(&["EXISTS", &key(entry)])?;
                redis.receive()?;
            }
        }
        Ok(())
    }

    /// Sends the request of a seed; a digest of the answer, and when the first of it was there.
    pub(crate) fn ask(self, folder: &Path, seed: u64) -> Result<(Digest, Instant)> {
        let Self::Redis = self else {
            let mut stream = BufReader::new(connect(folder)?);
            writeln!(stream.get_mut(), "{seed}")?;
            let mut line = String::new();
            stream.read_line(&mut line)?;
            ensure!(line.len() > 10, "no answer: {line:?}");
            return Ok((Digest::of(line.as_bytes()), Instant::now()));
        };
        let (mut redis, mut random) = (Redis::connect(folder)?, fastrand::Rng::with_seed(seed));
        let (mut answers, mut first) = (Vec::new(), None);
        for _ in 0..GETS {
            redis.send(&["GET", &key(popular(&mut random))])?;
            answers.extend(redis.receive()?);
            first.get_or_insert_with(Instant::now);
        }
        Ok((Digest::of(&answers), first.context("no answer")?))
    }
}

/// Where a program in this folder listens.
pub(crate) fn socket(folder: &Path) -> PathBuf {
    folder.join("socket")
}

/// Waits until it listens.
fn connect(folder: &Path) -> Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket(folder)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(_) if started.elapsed() < PATIENCE => std::thread::park_timeout(Duration::from_micros(500)),
            Err(error) => return Err(error).context("nobody listens"),
        }
    }
}

fn key(entry: u64) -> String {
    format!("order:{entry}")
}

/// An entry, some much more often than others: the one of rank r with a probability of about 1/r, which is how keys of caches are
/// distributed (YCSB's "zipfian"). The ranks are all over the entries.
fn popular(random: &mut fastrand::Rng) -> u64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank"
    )]
    let rank = (ENTRIES as f64).powf(random.f64()) as u64;
    fastrand::Rng::with_seed(rank).u64(0..ENTRIES)
}

/// As an application would store it.
fn order(entry: u64) -> String {
    const NAMES: [&str; 6] = ["Ada", "Grace", "Linus", "Barbara", "Edsger", "Margaret"];
    const ITEMS: [&str; 8] = ["amber", "birch", "copper", "delta", "ember", "fjord", "garnet", "harbor"];
    let mut random = fastrand::Rng::with_seed(entry);
    let mut text = format!(
        r#"{{"id": {entry}, "customer": "{}", "session": "{:032x}", "lines": ["#,
        NAMES[random.usize(0..NAMES.len())],
        random.u128(..)
    );
    for _ in 0..14 {
        let item = ITEMS[random.usize(0..ITEMS.len())];
        let (count, cents) = (random.u32(0..9), random.u32(0..99_999));
        let _ = write!(text, r#"{{"item": "{item}", "count": {count}, "cents": {cents}}}, "#);
    }
    text + "]}"
}

/// A connection to Redis.
struct Redis(BufReader<UnixStream>);

impl Redis {
    fn connect(folder: &Path) -> Result<Self> {
        Ok(Self(BufReader::new(connect(folder)?)))
    }

    fn send(&mut self, words: &[&str]) -> Result<()> {
        let mut text = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| {
            let _ = write!(text, "${}\r\n{word}\r\n", word.len());
        });
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    /// Whether it is moving its entries to a larger table.
    fn is_moving_entries(&mut self) -> Result<bool> {
        self.send(&["INFO", "memory"])?;
        let info = String::from_utf8(self.receive()?)?;
        let moving = info.lines().find_map(|line| line.strip_prefix("mem_overhead_db_hashtable_rehashing:"));
        Ok(moving.context("no word of its table")? != "0")
    }

    /// The next answer: a status, a number or a string.
    fn receive(&mut self) -> Result<Vec<u8>> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        match line.trim().split_at_checked(1) {
            Some(("+" | ":", status)) => Ok(status.into()),
            Some(("$", len)) => {
                let mut bytes = vec![0; len.parse::<usize>().with_context(|| line.clone())? + 2];
                self.0.read_exact(&mut bytes)?;
                Ok(bytes)
            }
            _ => bail!("Redis says {line:?}"),
        }
    }
}
