//! Output of results: text for people, JSON for programs.

use postcopy::pull::PullError;
use postcopy::push::PushError;
use postcopy::{RemoteError, ServerAddress, SessionError};
use serde::Serialize;
use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io::Write;

/// The format of results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

/// Prints a text without its trailing white space, and a line break.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    is_printed(text).map(drop)
}

/// Prints a text as [`print`] does. Returns false if its reader has gone.
pub(crate) fn is_printed(text: &str) -> anyhow::Result<bool> {
    // If the reader has gone, like `head`, printing must neither fail nor panic.
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        printed => Ok(printed.is_ok()),
    }
}

/// Prints a line to stderr. Ignores errors, because no place is left to report them.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Returns true for separators of lines, marks of direction and characters of no width (Unicode,
/// categories Zl, Zp and the usual ones of Cf).
fn is_format_control(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Escapes the control characters of a name, so that a terminal does not obey them and XML stays
/// valid, and those that are invisible or change the order of a line.
pub(crate) fn printable(name: &str) -> String {
    let is_shown = |c: char| !(c.is_control() || is_format_control(c));
    name.chars().flat_map(|c| if is_shown(c) { vec![c] } else { c.escape_default().collect() }).collect()
}

impl Output {
    /// Prints `value` as JSON if that was asked for, else `text`.
    pub(crate) fn show(self, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        print(&if self.json { serde_json::to_string_pretty(value)? } else { text() })
    }

    /// Prints an error with its causes and, for some errors, the next step.
    pub(crate) fn error(self, error: &anyhow::Error) {
        // The chain may contain text of a server or a file.
        let chain = format!("{error:#}").split('\n').map(printable).collect::<Vec<_>>().join("\n");
        if self.json {
            // The exit status reports the error in any case.
            let _ = print(&serde_json::json!({ "error": chain }).to_string());
        }
        complain(&format!("postcopy: {chain}"));
        if let Some(next) = error.chain().find_map(next_step) {
            complain(&format!("  {next}"));
        }
    }
}

/// An error with advice on the next step.
#[derive(Debug)]
pub(crate) struct Advised {
    pub(crate) text: String,
    pub(crate) next: &'static str,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl Error for Advised {}

/// The next step after an error about a path that the image lacks.
pub(crate) const INSPECT: &str = "`postcopy inspect` lists the paths of an image.";
/// The next step after an error about a working set that cannot be removed.
pub(crate) const LIST_SETS: &str = "`postcopy working-set ls` lists the images that have a working set.";
/// The next step after an error about a working set that the server lacks.
pub(crate) const RECORD: &str =
    "Record a restore with --record. `postcopy working-set ls` lists the images that have a working set.";

/// Returns the next step for the user after one error of a chain.
fn next_step(error: &(dyn Error + 'static)) -> Option<Cow<'static, str>> {
    if let Some(advised) = error.downcast_ref::<Advised>() {
        return Some(advised.next.into());
    }
    if let Some(remote) = remote_error(error) {
        return match remote {
            RemoteError::Connect { is_denied: true, .. } => {
                Some("A server listens there, but only the owner of its socket may connect. Run this as that user.".into())
            }
            RemoteError::Connect { .. } => Some(
                "Is it running? Start one with `postcopyd serve`, or name another with --server or POSTCOPY_SERVER."
                    .into(),
            ),
            RemoteError::Address(text) => {
                let whole = format!("http://{text}");
                whole.parse::<ServerAddress>().is_ok().then(|| format!("Write {whole}.").into())
            }
            _ if remote.is_no_answer() => {
                Some("Does a postcopyd answer there? Check --server or POSTCOPY_SERVER.".into())
            }
            _ if remote.is_not_found() => {
                Some("`postcopy ls` lists the server's references, `postcopy inspect` the paths of an image.".into())
            }
            _ => None,
        };
    }
    match error.downcast_ref() {
        Some(SessionError::Uffd(_)) => {
            Some("`postcopy doctor` lists what this machine allows, and how to get what is missing.".into())
        }
        Some(SessionError::NoSuchFile { .. }) => Some(INSPECT.into()),
        _ => matches!(error.downcast_ref(), Some(PullError::Exists(_)))
            .then_some("Name a new directory, or remove this one.".into()),
    }
}

/// Returns the [`RemoteError`] that `error` is or wraps.
fn remote_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a RemoteError> {
    let shown = match (error.downcast_ref(), error.downcast_ref(), error.downcast_ref()) {
        (Some(SessionError::Remote(remote)), ..)
        | (_, Some(PushError::Remote(remote)), _)
        | (.., Some(PullError::Remote(remote))) => Some(remote),
        _ => None,
    };
    shown.or_else(|| error.downcast_ref())
}

/// Formats bytes for people: `1.50 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::HumanBytes(n).to_string()
}

/// Formats a number with its noun: `1 file`, `2 files`.
pub(crate) fn counted(n: u64, one: &str, several: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { several })
}

/// Formats a time for people: `12.3 ms`.
pub(crate) fn time(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
