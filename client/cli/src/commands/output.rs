//! Output of results: text for people, JSON for programs.

use serde::Serialize;
use std::io::Write;

/// The format of results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

/// Prints a text, with or without a final line break.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    // If the reader has gone, like `head`, printing must neither fail nor panic.
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Escapes the control characters of a name, so that a terminal does not obey them and XML stays
/// valid.
pub(crate) fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
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
            println!("{}", serde_json::json!({ "error": chain }));
        }
        eprintln!("postcopy: {chain}");
        if let Some(next) = next_step(&chain) {
            eprintln!("  {next}");
        }
    }
}

fn next_step(error: &str) -> Option<&'static str> {
    if error.contains("cannot be reached") {
        Some(
            "Is it running? Start one with `postcopyd serve`, or name another with --server or POSTCOPY_SERVER.",
        )
    } else if error.contains("userfaultfd") {
        Some("`postcopy doctor` lists what this machine allows, and how to get what is missing.")
    } else if error.contains("of the image") && !error.contains("of the image's chunks") {
        Some("`postcopy inspect` lists the paths of an image.")
    } else if error.contains("a working set of") {
        Some(
            "Record a restore with --record. `postcopy working-set ls` lists the images that have a working set.",
        )
    } else if error.contains("entity was not found") || error.contains("no such reference") {
        Some("`postcopy ls` lists the server's references.")
    } else {
        None
    }
}

/// Formats bytes for people: `1.50 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::HumanBytes(n).to_string()
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
