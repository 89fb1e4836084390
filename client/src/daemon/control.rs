//! What others ask a daemon for, over a socket in its runtime directory: lines of text, each with an answer.
//!
//! `drain PID…` fills the sessions of these processes now, and answers when they have ended in order: `ok`, `unknown`
//! (none of them is served here) or `error REASON`.

use super::Worker;
use super::runtime_dir;
use super::served::{Served, Status};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The most bytes of a line.
const MAX_LINE: u64 = 64 << 10;
/// How often it is looked whether all is there.
const LOOK: Duration = Duration::from_millis(5);
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
    if words.next() != Some("drain") {
        bail!("{line:?} is not known");
    }
    let pids = words.map(|pid| pid.parse().with_context(|| format!("{pid:?} is no pid")));
    let pids: Vec<u32> = pids.collect::<Result<_>>()?;
    let served = worker.sessions();
    let served: Vec<_> = served.into_iter().filter(|served| pids.contains(&served.name.pid)).collect();
    if served.is_empty() {
        return Ok("unknown".into());
    }
    for served in served {
        drain(&served)?;
    }
    Ok("ok".into())
}

/// Fills a session and ends it.
fn drain(served: &Served) -> Result<()> {
    loop {
        // After a failure it is another one.
        served.session().fill()?;
        match served.look() {
            Status::Ended => return Ok(()),
            Status::Resident => {
                served.end();
                return Ok(());
            }
            Status::Serving => {}
        }
        if let Some(reason) = served.session().error() {
            bail!("process {}: {reason}", served.name.pid);
        }
        std::thread::park_timeout(LOOK);
    }
}

/// Has the daemons below `root` fill the memory of these processes, and waits until they have.
///
/// # Errors
/// What a daemon says; or that a process has absent memory, and no daemon says that it serves it.
pub(crate) fn ask_to_drain(root: &Path, pids: &[u32]) -> Result<()> {
    for pid in pids {
        let mut attempt = 0;
        while !drain_one(root, *pid)? {
            if !has_absent_memory(*pid) {
                break;
            }
            attempt += 1;
            if attempt > ATTEMPTS {
                bail!(
                    "process {pid} has memory that has not arrived, and no daemon below {} serves it: \
                     a dump would lack that memory",
                    root.display()
                );
            }
            std::thread::park_timeout(PATIENCE);
        }
    }
    Ok(())
}

/// Whether a daemon has drained it.
fn drain_one(root: &Path, pid: u32) -> Result<bool> {
    for directory in runtime_dir::all(root) {
        let Ok(mut stream) = UnixStream::connect(directory.join("control")) else { continue };
        let mut line = String::new();
        let asked =
            writeln!(stream, "drain {pid}").and_then(|()| BufReader::new(&stream).read_line(&mut line));
        match asked {
            // Its worker has died: ask the next one.
            Err(error) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()) => {
                continue;
            }
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
            Ok(_) => {}
        }
        match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
            ("ok", _) => return Ok(true),
            ("error", reason) => bail!("{reason}"),
            _ => {}
        }
    }
    Ok(false)
}

/// Whether a process has memory that a userfaultfd tells of (`um` among the VmFlags of proc_pid_smaps(5)).
fn has_absent_memory(pid: u32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.flat_map(str::split_whitespace).any(|flag| flag == "um")
}
