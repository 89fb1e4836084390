//! The log of a daemon. No line may delay a fault or a successor. So the log drops lines when
//! the pipe or terminal is full (a pipe without an active reader, a stopped terminal). It reports
//! their number when it accepts lines again.
//!
//! The flags of the descriptor stay as they are, because other processes share it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2, write};
use std::fmt::{self, Write as _};
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::Field;

/// The size up to which a pipe accepts a write completely or not at all: PIPE_BUF of Linux.
const WHOLE_BYTES: usize = 4096;
/// The offset that means the current position to pwritev2(2).
const CURRENT: u64 = u64::MAX;
/// The longest wait for stdout, from which programs that start a daemon read its lines.
const STDOUT_PATIENCE: Duration = Duration::from_secs(1);

/// The number of lines that stderr did not accept and the log has not yet reported.
static LOST: AtomicU64 = AtomicU64::new(0);

/// A writer to the log of daemons, which is stderr.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log;

impl Write for Log {
    /// Consumes all bytes, whether stderr accepts them or they are lost. Allocates nothing.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        let lost = LOST.load(Ordering::Relaxed);
        let mut note = [0; 80];
        let mut rest = &mut note[..];
        if lost > 0 && writeln!(rest, "postcopy: the log was full: {lost} lines are lost").is_ok() {
            let unused = rest.len();
            if try_write(stderr, &note[..note.len() - unused], Duration::ZERO) {
                LOST.fetch_sub(lost, Ordering::Relaxed);
            }
        }
        if !try_write(stderr, line, Duration::ZERO) {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats a field of an event. Escapes control characters, which a path or the text of a peer may
/// have: an event is one line, and a terminal does not obey it.
pub(crate) fn field(
    to: &mut tracing_subscriber::fmt::format::Writer<'_>,
    field: &Field,
    value: &dyn fmt::Debug,
) -> fmt::Result {
    match field.name() {
        "message" => write!(Escaping(to), "{value:?}"),
        name => write!(Escaping(to), " {name}={value:?}"),
    }
}

struct Escaping<'a, W>(&'a mut W);

impl<W: fmt::Write> fmt::Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c.is_control() {
            true => write!(self.0, "{}", c.escape_default()),
            false => self.0.write_char(c),
        })
    }
}

/// The time in which the log has at most [`MOST_REFUSALS`] lines about refused connections.
const REFUSAL_WINDOW: Duration = Duration::from_secs(10);
/// A peer that connects again and again must not fill a disk with the log.
const MOST_REFUSALS: u64 = 20;

/// The log of refused connections, which counts lines beyond a bound instead of writing them.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<Option<Window>>);

/// A time in which connections were refused.
#[derive(Debug)]
struct Window {
    since: Instant,
    refused: u64,
}

impl Refusals {
    /// Logs the reason why a connection was refused.
    pub(crate) fn log(&self, reason: &str) {
        self.report();
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window = window.get_or_insert_with(|| Window { since: Instant::now(), refused: 0 });
        window.refused += 1;
        if window.refused <= MOST_REFUSALS {
            tracing::error!("{reason}");
        }
    }

    /// Logs how many reasons were left out, once their time is over.
    pub(crate) fn report(&self) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(over) = window.take_if(|window| window.since.elapsed() >= REFUSAL_WINDOW) else { return };
        if over.refused > MOST_REFUSALS {
            let more = over.refused - MOST_REFUSALS;
            tracing::error!("{more} more connections were refused within {REFUSAL_WINDOW:?}");
        }
    }
}

/// Writes a line to stdout for the program that has started the daemon.
///
/// # Blocking
/// Waits for at most a second for each 4096 bytes.
pub(crate) fn say(text: &str) {
    try_write(rustix::stdio::stdout(), format!("{text}\n").as_bytes(), STDOUT_PATIENCE);
}

/// Writes the messages of panics to the log. A thread that panics ends the worker, and the log must
/// not delay that.
pub(crate) fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let line = format!("postcopy: thread {}: {panic}\n", thread.name().unwrap_or("without a name"));
        let _ = Log.write_all(line.as_bytes());
    }));
}

/// Writes all bytes if `to` accepts each part within `patience`. Returns false if it did not; then
/// the first parts may have been written.
fn try_write(to: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> bool {
    bytes.chunks(WHOLE_BYTES).all(|part| {
        let timeout = Timespec::try_from(patience).ok();
        let mut polled = [PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)];
        let is_ready = poll(&mut polled, timeout.as_ref()) == Ok(1);
        is_ready && polled[0].revents().contains(PollFlags::OUT) && write_now(to, part) == Ok(part.len())
    })
}

/// Writes without waiting, where the kernel can: another process may have filled the pipe since
/// poll(2). A file may refuse RWF_NOWAIT, but a plain write to it does not wait for a reader. A
/// write to a terminal, or to a pipe before Linux 6.4, may block.
fn write_now(to: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    let is_file = fstat(to).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    if is_file {
        return write(to, bytes);
    }
    match pwritev2(to, &[IoSlice::new(bytes)], CURRENT, ReadWriteFlags::NOWAIT) {
        // Terminals do not support RWF_NOWAIT, and neither do pipes before Linux 6.4.
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::SPIPE) => write(to, bytes),
        written => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_full_pipe_takes_nothing_and_keeps_nobody_waiting() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut written = 0;
        while try_write(writer.as_fd(), &[1; 1000], Duration::ZERO) {
            written += 1000;
        }
        assert!(written >= 60_000, "{written} bytes");
        assert_eq!(write_now(writer.as_fd(), &[1; WHOLE_BYTES]), Err(Errno::AGAIN), "without a poll before");
        reader.read_exact(&mut vec![0; 60_000]).unwrap();
        assert!(try_write(writer.as_fd(), &[1; 1000], Duration::ZERO), "it has room again");
        drop(reader);
        assert!(!try_write(writer.as_fd(), &[1; 1000], Duration::ZERO), "its reader is gone");
    }

    #[test]
    fn control_characters_do_not_make_lines() {
        let (mut line, text) = (String::new(), "a\nERROR forged\x1b[2J\u{9b}é");
        write!(Escaping(&mut line), "peer: {text}").unwrap();
        assert_eq!(line, r"peer: a\nERROR forged\u{1b}[2J\u{9b}é");
    }

    #[test]
    fn a_file_takes_lines_of_any_length() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(try_write(file.as_fd(), &[7; 10_000], Duration::ZERO));
        io::Seek::rewind(&mut file).unwrap();
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, [7; 10_000]);
    }
}
