//! What the end-to-end tests have in common: real servers, the real command line, and files to push.
//!
//! [`server`] starts `postcopyd` on a store of its own; [`cli`] runs `postcopy`; [`fixtures`] makes files whose bytes
//! follow from a seed. Everything that is started ends with the value that started it.

pub mod cgroup;
pub mod chaos;
pub mod cli;
pub mod criu;
pub mod daemon;
pub mod dav;
pub mod descriptors;
pub mod faulter;
pub mod fixtures;
pub mod h2_client;
pub mod keeper;
pub mod link;
pub mod many_regions;
pub mod model;
pub mod mounted;
pub mod mounts;
pub mod pool;
pub mod proxy;
pub mod reverse_proxy;
pub mod s3;
pub mod server;
pub mod stopped_pager;
pub mod store;
pub mod stored;
pub mod storm;
pub mod uploads;
pub mod vmm;

use rustix::event::{PollFd, PollFlags, Timespec};
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// The bytes of a page of this machine.
pub const PAGE: usize = 4096;

/// The workspace's binary of that name, beside the test's own. `make` builds it first: cargo does not, across
/// packages.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("a program has a path");
    let directory = this.parent().expect("a program lies in a directory");
    // A test lies in target/PROFILE/deps, a binary in target/PROFILE.
    let directory = directory.parent().filter(|_| directory.ends_with("deps")).unwrap_or(directory);
    let path = directory.join(name);
    assert!(path.exists(), "{} is not there: run `cargo build --workspace --bins` first", path.display());
    path
}

/// Whether a line, or the end, can be read.
pub(crate) fn is_readable(lines: &BufReader<UnixStream>) -> bool {
    is_readable_within(lines, Duration::ZERO)
}

/// Waits until a line, or the end, can be read, and returns whether it can within this time.
pub(crate) fn is_readable_within(lines: &BufReader<UnixStream>, patience: Duration) -> bool {
    let mut fds = [PollFd::new(lines.get_ref(), PollFlags::IN)];
    let patience = Timespec::try_from(patience).expect("not too long");
    !lines.buffer().is_empty() || rustix::event::poll(&mut fds, Some(&patience)).is_ok_and(|ready| ready > 0)
}

/// Says loudly that a test cannot run here, and why. In CI (`CI=true`) that is a failure.
///
/// # Panics
/// In CI.
pub fn skip(test: &str, why: &str) {
    // Not eprintln!, which nobody sees of a test that passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
    assert!(std::env::var_os("CI").is_none(), "{test} must not be skipped in CI: {why}");
}

/// Whether this process runs as root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the resident memory of a process; 0 if it is gone.
#[must_use]
pub fn resident_kib(pid: u32) -> u64 {
    of_status(pid, "VmRSS:")
}

/// Returns the resident memory of a process that is no file's; 0 if it is gone.
#[must_use]
pub fn anonymous_kib(pid: u32) -> u64 {
    of_status(pid, "RssAnon:")
}

fn of_status(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0 kB");
    line.trim_end_matches(" kB").trim().parse().unwrap_or(0)
}

/// Waits until `done` says so; looks every few milliseconds.
///
/// # Panics
/// After a minute, naming `what`.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !done() {
        assert!(started.elapsed().as_secs() < 60, "{what} did not happen within a minute");
        std::thread::park_timeout(std::time::Duration::from_millis(3));
    }
}
