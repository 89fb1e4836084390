//! The command line, as a user runs it.

use crate::binary;
use postcopy::ServerAddress;
use serde_json::Value;
use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

/// `postcopy` with these arguments, for that server; not started yet.
#[must_use]
pub fn postcopy<A: AsRef<OsStr>>(server: &ServerAddress, args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(binary("postcopy"));
    command.args(args).env("POSTCOPY_SERVER", server.to_string()).stdin(Stdio::null());
    command
}

/// Runs `postcopy --json` with these arguments.
///
/// # Panics
/// Unless it ends with status 0 and prints JSON.
#[must_use]
pub fn run<A: AsRef<OsStr>>(server: &ServerAddress, args: impl IntoIterator<Item = A>) -> Value {
    let output = postcopy(server, args).arg("--json").output().expect("postcopy can be started");
    let shown = show(&output);
    assert!(output.status.success(), "{shown}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {shown}"))
}

/// Runs `postcopy` with these arguments; what it wrote to stderr.
///
/// # Panics
/// If it ends with status 0.
#[must_use]
pub fn fail<A: AsRef<OsStr>>(server: &ServerAddress, args: impl IntoIterator<Item = A>) -> String {
    let output = postcopy(server, args).output().expect("postcopy can be started");
    assert!(!output.status.success(), "{}", show(&output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn show(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}
