//! What others ask a daemon for, over a socket in its runtime directory: lines of text, each with an answer.
//!
//! `drain PID…` fills the sessions of these processes now, and answers when they have ended in order. `record PID…` tells the
//! server what they have touched so far. The answer is `ok`, `unknown` (none of them is served here) or `error REASON`.

use super::Worker;
use super::runtime_dir;
use super::served::{Served, Status};
use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most bytes of a line.
const MAX_LINE: u64 = 64 << 10;
/// How often it is looked whether something comes.
const LOOK: Duration = Duration::from_millis(250);
/// How long a daemon may take to come back whose worker has died.
const PATIENCE: Duration = Duration::from_millis(20);
const ATTEMPTS: u32 = 100;

/// Answers one line.
pub(crate) fn answer(worker: &Arc<Worker>, stream: UnixStream) {
    let mut line = String::new();
    let mut lines = BufReader::new(std::io::Read::take(&stream, MAX_LINE));
    let said = lines.read_line(&mut line).map_err(anyhow::Error::from).and_then(|_| carry_out(worker, &line));
    let text = said.unwrap_or_else(|error| format!("error {error:#}").replace('\n', " "));
    // Whoever has asked may be gone.
    let _ = writeln!(&stream, "{text}");
}

fn carry_out(worker: &Arc<Worker>, line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let what = words.next().unwrap_or_default();
    let pids = words.map(|pid| pid.parse().with_context(|| format!("{pid:?} is no pid")));
    let pids: Vec<u32> = pids.collect::<Result<_>>()?;
    let is_named = |served: &Served| pids.contains(&served.name.pid);
    let sessions = worker.sessions();
    let served: Vec<_> = match what {
        // What a process has left behind that has exited is its children's.
        "drain" => sessions.iter().filter(|served| is_named(served) || !served.name.is_alive()).collect(),
        "record" => sessions.iter().filter(|served| is_named(served)).collect(),
        _ => bail!("{line:?} is not known"),
    };
    let done = served.iter().map(|served| match what {
        "drain" => drain(worker, served),
        _ => served.send_recording(),
    });
    // The others are done, too.
    done.reduce(Result::and).unwrap_or(Ok(()))?;
    Ok(if served.is_empty() { "unknown".into() } else { "ok".into() })
}

/// Fills a session and ends it.
fn drain(worker: &Worker, served: &Served) -> Result<()> {
    let pid = served.name.pid;
    let (mut most, mut progressed) = (0, Instant::now());
    loop {
        // After a failure it is another one.
        let session = served.session();
        served.fill()?;
        let status = served.look();
        let progress = session.progress();
        if status == Status::Resident {
            // Whoever watches over it notices.
            let _ = served.end();
        }
        ensure!(
            progress.poisoned_pages == 0,
            "process {pid}: {} of its pages are lost",
            progress.poisoned_pages
        );
        if status != Status::Serving {
            return Ok(());
        }
        if progress.resident_pages > most {
            (most, progressed) = (progress.resident_pages, Instant::now());
        }
        let reason = session.error().unwrap_or_else(|| "nothing comes".into());
        ensure!(progressed.elapsed() < worker.setup.options.fault_deadline, "process {pid}: {reason}");
        served.wait(LOOK);
    }
}

/// Has the daemons below `root` fill the memory of these processes, and waits until they have.
///
/// # Errors
/// What a daemon says; or that a process has absent memory, and no daemon says that it serves it.
pub(crate) fn ask_to_drain(root: &Path, pids: &BTreeSet<u32>) -> Result<()> {
    for _ in 0..ATTEMPTS {
        // That of a process that was forked comes with its parent's.
        pids.iter().try_for_each(|pid| ask(root, "drain", *pid).map(drop))?;
        let absent = pids.iter().map(|pid| has_absent_memory(*pid)).collect::<Result<Vec<_>>>()?;
        if !absent.contains(&true) {
            return Ok(());
        }
        std::thread::park_timeout(PATIENCE);
    }
    let has_absent = |pid: &&u32| has_absent_memory(**pid).unwrap_or(true);
    let pid = pids.iter().find(has_absent).context("it has come after all: ask again")?;
    bail!(
        "process {pid} has memory that has not arrived, and no daemon below {} serves it: a dump would lack that memory",
        root.display()
    )
}

/// Has the daemons below `root` tell the server what this process, and those that it has forked, have touched so far.
///
/// # Errors
/// What a daemon says; or that none says that it serves one of them.
pub(crate) fn ask_to_record(root: &Path, pid: u32) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let processes = postcopy::with_descendants([pid]);
        let asked: Vec<_> = processes.into_iter().map(|process| ask(root, "record", process)).collect();
        // All have been asked, whatever one of them says.
        let served = asked.into_iter().collect::<Result<Vec<_>>>()?;
        if served.contains(&true) {
            return Ok(());
        }
        // A worker that has just begun may not have it yet.
        std::thread::park_timeout(PATIENCE);
    }
    bail!("no daemon below {} (--runtime-dir) serves process {pid}", root.display())
}

/// Has something done by the daemon that serves a process: whether there is one.
fn ask(root: &Path, what: &str, pid: u32) -> Result<bool> {
    for directory in runtime_dir::all(root) {
        let line = converse(&directory, &format!("{what} {pid}"))?;
        match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
            ("ok", _) => return Ok(true),
            ("error", reason) => bail!("{reason}"),
            _ => {}
        }
    }
    Ok(false)
}

/// What a daemon says to a line; nothing where there is none any more.
fn converse(directory: &Path, line: &str) -> Result<String> {
    for _ in 0..ATTEMPTS {
        let Ok(mut stream) = UnixStream::connect(directory.join("control")) else { break };
        let mut answer = String::new();
        let asked = writeln!(stream, "{line}").and_then(|()| BufReader::new(&stream).read_line(&mut answer));
        match asked {
            Ok(1..) => return Ok(answer),
            // Its worker has died: ask the next one.
            Ok(0) => {}
            Err(error) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()) => {}
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
        }
        std::thread::park_timeout(PATIENCE);
    }
    Ok(String::new())
}

/// Whether a process has memory that a userfaultfd tells of (`um` among the VmFlags of proc_pid_smaps(5)).
fn has_absent_memory(pid: u32) -> Result<bool> {
    let smaps = match std::fs::read(format!("/proc/{pid}/smaps")) {
        Ok(smaps) => smaps,
        // It has exited.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => {
            return Ok(false);
        }
        Err(error) => return Err(error).with_context(|| format!("the mappings of process {pid}")),
    };
    let smaps = String::from_utf8_lossy(&smaps);
    let mut flags =
        smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:")).flat_map(str::split_whitespace);
    Ok(flags.any(|flag| flag == "um"))
}
