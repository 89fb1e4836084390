//! The control socket in a daemon's runtime directory: lines of text, each with an answer.
//!
//! `drain PID…` fetches all absent pages of these processes, and answers when their sessions have
//! ended in order. `record PID…` sends the pages that they have accessed so far to the server. The
//! answer is `ok`, `unknown` (the daemon serves none of them) or `error REASON`.

use super::runtime_dir;
use super::served::{Served, Status};
use super::worker::Worker;
use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// The longest time in which a peer sends nothing of its line.
const SILENCE: Duration = Duration::from_secs(10);
/// The longest wait between two checks of a session's progress.
const LOOK: Duration = Duration::from_millis(250);
/// The pause between two attempts to reach a daemon, whose worker may have died.
const PATIENCE: Duration = Duration::from_millis(20);
const ATTEMPTS: u32 = 100;

/// Reads one line and answers it. The worker's end waits for the answer, and not for a line that
/// has not arrived.
pub(crate) fn answer(worker: &Arc<Worker>, stream: UnixStream) {
    let mut line = String::new();
    let mut lines = BufReader::new(std::io::Read::take(&stream, MAX_LINE));
    let read = stream.set_read_timeout(Some(SILENCE)).and_then(|()| lines.read_line(&mut line));
    let _busy = worker.busy();
    let said = read.map_err(anyhow::Error::from).and_then(|_| carry_out(worker, &line));
    let text = said.unwrap_or_else(|error| format!("error {error:#}").replace('\n', " "));
    // The caller may have closed the connection.
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
        // Sessions of a process that has exited hold the memory of its children.
        "drain" => sessions.iter().filter(|served| is_named(served) || !served.name.is_alive()).collect(),
        "record" => sessions.iter().filter(|served| is_named(served)).collect(),
        _ => bail!("{line:?} is not known"),
    };
    let done = served.iter().map(|served| match what {
        "drain" => drain(worker, served),
        _ => served.send_recording(),
    });
    // All of them run, and the first error is the answer.
    done.reduce(Result::and).unwrap_or(Ok(()))?;
    Ok(if served.is_empty() { "unknown".into() } else { "ok".into() })
}

/// Fetches the absent pages of a session, and ends it.
fn drain(worker: &Worker, served: &Served) -> Result<()> {
    let pid = served.name.pid;
    let (mut most, mut progressed) = (0, Instant::now());
    loop {
        // A session that has failed is replaced by another one.
        let session = served.session();
        served.fill()?;
        let status = served.look();
        let progress = session.progress();
        if status == Status::Resident {
            // The thread that watches over the session sees its end.
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
        let reason = session.error().unwrap_or_else(|| "no page arrives".into());
        ensure!(progressed.elapsed() < worker.setup.options.fault_deadline, "process {pid}: {reason}");
        served.wait(LOOK);
    }
}

/// Checks that a process exists.
///
/// # Errors
/// It does not.
pub(crate) fn ensure_exists(pid: u32) -> Result<()> {
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "process {pid} does not exist");
    Ok(())
}

/// Asks the daemons below `root` to fetch all absent pages of these processes and of their
/// descendants, and waits for that.
///
/// # Errors
/// A process does not exist, or has absent memory and no daemon serves it; or the error of a
/// daemon.
pub(crate) fn ask_to_drain(root: &Path, named: &[u32]) -> Result<()> {
    named.iter().try_for_each(|pid| ensure_exists(*pid))?;
    let pids = postcopy::with_descendants(named.iter().copied());
    for _ in 0..ATTEMPTS {
        // The session of a parent holds the memory of the children that it has forked.
        pids.iter().try_for_each(|pid| ask(root, "drain", *pid).map(drop))?;
        let absent = pids.iter().map(|pid| has_absent_memory(*pid)).collect::<Result<Vec<_>>>()?;
        if !absent.contains(&true) {
            return Ok(());
        }
        std::thread::park_timeout(PATIENCE);
    }
    let has_absent = |pid: &&u32| has_absent_memory(**pid).unwrap_or(true);
    let pid = pids.iter().find(has_absent).context("its memory has arrived meanwhile: ask again")?;
    let relation = if named.contains(pid) { "" } else { ", a descendant," };
    bail!(
        "process {pid}{relation} has memory that has not arrived, and no daemon below {} serves it: a dump would lack that memory",
        root.display()
    )
}

/// Asks the daemons below `root` to send the pages that this process and its descendants have
/// accessed so far to the server.
///
/// # Errors
/// The process does not exist, or no daemon serves it or a descendant; or the error of a daemon.
pub(crate) fn ask_to_record(root: &Path, pid: u32) -> Result<()> {
    ensure_exists(pid)?;
    for _ in 0..ATTEMPTS {
        let processes = postcopy::with_descendants([pid]);
        let asked: Vec<_> = processes.into_iter().map(|process| ask(root, "record", process)).collect();
        // All have been asked by now, even after an error of one of them.
        let served = asked.into_iter().collect::<Result<Vec<_>>>()?;
        if served.contains(&true) {
            return Ok(());
        }
        // A worker that has just started may not have the session yet.
        std::thread::park_timeout(PATIENCE);
    }
    bail!("no daemon below {} (--runtime-dir) serves process {pid}", root.display())
}

/// Sends a request to the daemon that serves a process. Returns whether one serves it.
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

/// Returns a daemon's answer to a line, or an empty answer if the daemon has ended.
fn converse(directory: &Path, line: &str) -> Result<String> {
    for _ in 0..ATTEMPTS {
        let Ok(mut stream) = UnixStream::connect(directory.join("control")) else { break };
        let mut answer = String::new();
        let asked = writeln!(stream, "{line}").and_then(|()| BufReader::new(&stream).read_line(&mut answer));
        match asked {
            Ok(1..) => return Ok(answer),
            // The worker has died: its successor answers.
            Ok(0) => {}
            Err(error) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()) => {}
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
        }
        std::thread::park_timeout(PATIENCE);
    }
    Ok(String::new())
}

/// Returns whether a process has memory that is registered with a userfaultfd (`um` among the
/// VmFlags of proc_pid_smaps(5)).
fn has_absent_memory(pid: u32) -> Result<bool> {
    let smaps = match std::fs::read(format!("/proc/{pid}/smaps")) {
        Ok(smaps) => smaps,
        // The process has exited.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => {
            return Ok(false);
        }
        Err(error) => bail!(
            "process {pid}: its mappings cannot be read ({error}). Run this command as root or as the process's owner"
        ),
    };
    let smaps = String::from_utf8_lossy(&smaps);
    let mut flags =
        smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:")).flat_map(str::split_whitespace);
    Ok(flags.any(|flag| flag == "um"))
}
