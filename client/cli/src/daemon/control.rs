//! The control socket in a daemon's runtime directory: lines of text, each with an answer.
//!
//! `drain PID…` fetches all absent pages of these processes, and answers when their sessions have
//! ended in order. `record PID…` sends the pages that they have accessed so far to the server. The
//! answer is `ok`, `unknown` (the daemon serves none of them) or `error REASON`. Lines `busy`
//! precede an answer that takes longer, so that a command tells a daemon at work from a stopped
//! one.

use super::runtime_dir;
use super::served::{Served, Status};
use super::worker::Worker;
use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// The longest line of an answer, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
/// The longest time in which a peer sends nothing of its line.
const SILENCE: Duration = Duration::from_secs(10);
/// The interval of the lines that tell that the daemon is at work.
const BUSY: Duration = Duration::from_secs(2);
/// The longest wait between two checks of a session's progress.
const LOOK: Duration = Duration::from_millis(250);
/// The pause between two attempts to reach a daemon, whose worker may have died.
const PATIENCE: Duration = Duration::from_millis(20);
const ATTEMPTS: u32 = 100;

/// Reads one line and answers it. The worker's end waits for the answer, and not for a line that
/// has not arrived.
pub(crate) fn answer(worker: &Arc<Worker>, stream: UnixStream) {
    let line =
        stream.set_read_timeout(Some(SILENCE)).and_then(|()| line_of(BufReader::new(&stream), MAX_LINE));
    let _busy = worker.busy();
    let (done, wait) = sync_channel::<()>(0);
    let mut to = &stream;
    let said = std::thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(BUSY) == Err(RecvTimeoutError::Timeout) {
                let _ = writeln!(to, "busy");
            }
        });
        let said = line.map_err(anyhow::Error::from).and_then(|line| carry_out(worker, &line));
        drop(done);
        said
    });
    let text = said.unwrap_or_else(|error| format!("error {error:#}").replace('\n', " "));
    // The caller may have closed the connection.
    let _ = writeln!(&stream, "{text}");
}

/// Reads a line of at most `max_bytes` with its line feed. Returns an empty one at the end.
///
/// # Errors
/// The error of the read. [`ErrorKind::InvalidData`]: the line is longer, or is no text.
fn line_of(mut stream: impl BufRead, max_bytes: u64) -> io::Result<String> {
    let mut line = String::new();
    stream.by_ref().take(max_bytes).read_line(&mut line)?;
    // The rest of a longer line would change its meaning.
    if line.len() as u64 == max_bytes && !line.ends_with('\n') {
        let text = format!("the line is longer than {max_bytes} bytes");
        return Err(io::Error::new(ErrorKind::InvalidData, text));
    }
    Ok(line)
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
/// daemon; or another user could answer in place of a daemon.
pub(crate) fn ask_to_drain(root: &Path, named: &[u32]) -> Result<()> {
    named.iter().try_for_each(|pid| ensure_exists(*pid))?;
    let pids = postcopy::with_descendants(named.iter().copied());
    let mut daemons = Daemons::below(root)?;
    for _ in 0..ATTEMPTS {
        // The session of a parent holds the memory of the children that it has forked.
        pids.iter().try_for_each(|pid| daemons.ask("drain", *pid).map(drop))?;
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
        "process {pid}{relation} has memory that has not arrived, and no daemon below {} serves it: a dump would lack that memory{}",
        root.display(),
        daemons.silent()
    )
}

/// Asks the daemons below `root` to send the pages that this process and its descendants have
/// accessed so far to the server.
///
/// # Errors
/// The process does not exist, or no daemon serves it or a descendant; or the error of a daemon; or
/// another user could answer in place of a daemon.
pub(crate) fn ask_to_record(root: &Path, pid: u32) -> Result<()> {
    ensure_exists(pid)?;
    let mut daemons = Daemons::below(root)?;
    for _ in 0..ATTEMPTS {
        let processes = postcopy::with_descendants([pid]);
        let asked: Vec<_> = processes.into_iter().map(|process| daemons.ask("record", process)).collect();
        // All have been asked by now, even after an error of one of them.
        let served = asked.into_iter().collect::<Result<Vec<_>>>()?;
        if served.contains(&true) {
            return Ok(());
        }
        // A worker that has just started may not have the session yet.
        std::thread::park_timeout(PATIENCE);
    }
    bail!("no daemon below {} (--runtime-dir) serves process {pid}{}", root.display(), daemons.silent())
}

/// The daemons below a runtime directory.
#[derive(Debug)]
struct Daemons {
    root: PathBuf,
    /// The directories of daemons that have not answered in time. They are not asked again: a
    /// stopped daemon must not delay a request that another one serves.
    silent: BTreeSet<PathBuf>,
}

/// A message of a thread that asks a daemon.
enum Said {
    Busy,
    Answer(PathBuf, Result<String>),
}

impl Daemons {
    /// # Errors
    /// Another user could put a daemon's socket there.
    fn below(root: &Path) -> Result<Self> {
        if root.exists() {
            runtime_dir::ensure_private(root)?;
        }
        Ok(Self { root: root.to_owned(), silent: BTreeSet::new() })
    }

    /// Sends a request to all daemons at once. Returns whether one serves the process.
    fn ask(&mut self, what: &str, pid: u32) -> Result<bool> {
        let mut waiting: BTreeSet<_> = runtime_dir::all(&self.root).into_iter().collect();
        waiting.retain(|directory| !self.silent.contains(directory));
        let (says, said) = sync_channel(waiting.len());
        for directory in waiting.clone() {
            let (says, line) = (says.clone(), format!("{what} {pid}"));
            let ask = move || {
                let answer = converse(&directory, &line, &says);
                let _ = says.send(Said::Answer(directory, answer));
            };
            std::thread::Builder::new().spawn(ask).context("a thread")?;
        }
        drop(says);
        while !waiting.is_empty() {
            // Connecting to a stopped daemon may take for ever, too.
            let (directory, answer) = match said.recv_timeout(SILENCE + BUSY) {
                Ok(Said::Busy) => continue,
                Ok(Said::Answer(directory, answer)) => (directory, answer),
                Err(_) => break,
            };
            waiting.remove(&directory);
            let line = match answer {
                Err(error) if is_silence(&error) => {
                    self.silent.insert(directory);
                    continue;
                }
                answer => answer?,
            };
            match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
                ("ok", _) => return Ok(true),
                ("error", reason) => bail!("{reason}"),
                _ => {}
            }
        }
        self.silent.extend(waiting);
        Ok(false)
    }

    /// Returns the end of a message about the daemons that have not answered.
    fn silent(&self) -> String {
        let Some(first) = self.silent.first() else { return String::new() };
        let more = self.silent.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" and {more} others") };
        format!(
            ". The daemon of {}{more} has not answered within {SILENCE:?}: is it stopped?",
            first.display()
        )
    }
}

fn is_silence(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|io| matches!(io.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

/// Returns a daemon's answer to a line, or an empty answer if the daemon has ended.
fn converse(directory: &Path, line: &str, says: &SyncSender<Said>) -> Result<String> {
    let shown = || directory.display().to_string();
    for _ in 0..ATTEMPTS {
        let Ok(mut stream) = UnixStream::connect(directory.join("control")) else { break };
        let owner = rustix::net::sockopt::socket_peercred(&stream).with_context(shown)?.uid.as_raw();
        let own = rustix::process::geteuid().as_raw();
        ensure!([0, own].contains(&owner), "{}: user {owner} listens there, and this is user {own}", shown());
        let asked = stream.set_read_timeout(Some(SILENCE)).and_then(|()| writeln!(stream, "{line}"));
        // One reader for all lines: it may hold those that follow.
        let mut lines = BufReader::new(&stream);
        let mut answer = asked.and_then(|()| line_of(&mut lines, MAX_ANSWER));
        while answer.as_ref().is_ok_and(|answer| answer == "busy\n") {
            let _ = says.send(Said::Busy);
            answer = line_of(&mut lines, MAX_ANSWER);
        }
        match answer {
            // The worker has died: its successor answers.
            Ok(answer) if answer.is_empty() => {}
            Ok(answer) => return Ok(answer),
            Err(error) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()) => {}
            Err(error) => return Err(error).with_context(shown),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_refused_and_not_cut() {
        assert_eq!(line_of(&b"drain 1\nrest"[..], 9).unwrap(), "drain 1\n");
        assert_eq!(line_of(&b"drain 12\n"[..], 9).unwrap(), "drain 12\n");
        assert_eq!(line_of(&b"drain 12"[..], 9).unwrap(), "drain 12");
        let error = line_of(&b"drain 123"[..], 9).unwrap_err();
        assert!(error.to_string().contains("longer than 9 bytes"), "{error}");
    }

    /// Makes the directory of a daemon below `root` whose socket behaves as `serve` says.
    fn daemon(root: &Path, number: u32, serve: impl FnOnce(UnixStream) + Send + 'static) {
        let directory = root.join(format!("criu-{number}-0"));
        std::fs::create_dir(&directory).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(directory.join("control")).unwrap();
        std::thread::spawn(move || serve(listener.accept().unwrap().0));
    }

    #[test]
    fn a_daemon_that_is_silent_or_never_ends_its_answer_does_not_delay_another_ones() {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        daemon(root.path(), 1, |stream| {
            std::thread::park_timeout(Duration::from_secs(60));
            drop(stream);
        });
        daemon(root.path(), 2, |mut stream| {
            assert!(line_of(BufReader::new(&stream), MAX_LINE).unwrap() == "drain 7\n");
            // Longer than the patience of the caller.
            for _ in 0..7 {
                writeln!(stream, "busy").unwrap();
                std::thread::park_timeout(BUSY);
            }
            writeln!(stream, "ok").unwrap();
        });
        let mut daemons = Daemons::below(root.path()).unwrap();
        assert!(daemons.ask("drain", 7).unwrap());
        assert!(daemons.silent().contains("criu-1-0 has not answered"), "{}", daemons.silent());
        // Lines that arrive together; the request is not sent again.
        daemon(root.path(), 4, |mut stream| {
            line_of(BufReader::new(&stream), MAX_LINE).unwrap();
            stream.write_all(b"busy\nbusy\nok\n").unwrap();
        });
        let (says, _said) = sync_channel(10);
        assert_eq!(converse(&root.path().join("criu-4-0"), "record 7", &says).unwrap(), "ok\n");
        daemon(root.path(), 3, |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
        let error = daemons.ask("drain", 7).unwrap_err();
        assert!(format!("{error:#}").contains("longer than 1048576 bytes"), "{error:#}");
    }
}
