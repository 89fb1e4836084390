//! Measures that let a daemon survive events that stop or kill its target: memory pressure, a
//! freezer, a limit of descriptors.
//!
//! Each measure is applied as far as the system allows. The daemon logs the ones that failed, and
//! `postcopy doctor` prints all of them on demand.

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;

/// The result of a check or a measure.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) what: &'static str,
    pub(crate) is_good: bool,
    pub(crate) text: String,
    /// The way to make it good.
    pub(crate) advice: &'static str,
}

impl Finding {
    fn new(what: &'static str, is_good: bool, text: impl Into<String>, advice: &'static str) -> Self {
        Self { what, is_good, text: text.into(), advice }
    }

    /// Writes the finding to the log.
    pub(crate) fn log(&self) {
        match self.is_good {
            true => tracing::info!("{}: {}", self.what, self.text),
            false => tracing::warn!("{}: {}", self.what, self.text),
        }
    }
}

/// Protects this process against being killed, as far as allowed. Applies to guardian and worker.
pub(crate) fn prepare() -> Vec<Finding> {
    vec![raise_descriptors(), lower_oom_score(), lock_memory()]
}

/// Raises the limit of open descriptors as far as allowed, because each session needs several.
pub(crate) fn raise_descriptors() -> Finding {
    const WHAT: &str = "open files";
    const WANTED: u64 = 1 << 20;
    let limit = getrlimit(Resource::Nofile);
    // Root may exceed its hard limit.
    let wanted = limit.maximum.map_or(WANTED, |maximum| maximum.max(WANTED));
    for most in [Some(wanted), limit.maximum] {
        let raised = Rlimit { current: most, maximum: most };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            break;
        }
    }
    let now = getrlimit(Resource::Nofile).current;
    let text = now.map_or("no limit".to_owned(), |now| format!("up to {now}"));
    const ADVICE: &str = "each session needs several: raise the hard limit (ulimit -Hn)";
    Finding::new(WHAT, now.is_none_or(|now| now >= 4096), text, ADVICE)
}

/// Lowers the OOM score, so that the kernel kills other processes first.
pub(crate) fn lower_oom_score() -> Finding {
    const WHAT: &str = "OOM score";
    let path = "/proc/self/oom_score_adj";
    let lowered = fs::write(path, "-1000");
    let now = fs::read_to_string(path).unwrap_or_default();
    let now = now.trim();
    let text = match &lowered {
        Ok(()) => format!("{now}: the kernel kills other processes before a daemon"),
        Err(error) => format!("{now}: cannot be lowered ({error})"),
    };
    Finding::new(WHAT, lowered.is_ok(), text, "give the daemon CAP_SYS_RESOURCE")
}

/// Locks this process's own pages in memory, so that serving a fault never waits for swap.
fn lock_memory() -> Finding {
    const WHAT: &str = "memory lock";
    // With a finite limit, later mappings would fail once the lock reaches it.
    let limit = getrlimit(Resource::Memlock);
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    let may = limit.maximum.is_none() || rustix::process::geteuid().is_root();
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let locked = may.then(|| mlockall(flags));
    let text = match locked {
        Some(Ok(())) => "a daemon's pages are never swapped out".to_owned(),
        Some(Err(error)) => format!("a daemon's pages may be swapped out ({error})"),
        None => "a daemon's pages may be swapped out (ulimit -l is not unlimited)".to_owned(),
    };
    Finding::new(
        WHAT,
        locked == Some(Ok(())),
        text,
        "run ulimit -l unlimited before the daemon, or run it as root",
    )
}

/// Returns whether this process is outside of the memory cgroup and the freezer of another process.
/// Inside, it would be stopped or killed with that process, and could not serve it.
///
/// # Errors
/// The process does not exist, or its cgroups cannot be read.
pub(crate) fn is_outside_of(pid: u32) -> Result<Vec<Finding>> {
    let read = |path: String| match fs::read_to_string(&path) {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => {
            bail!("process {pid} does not exist")
        }
        read => read.context(path),
    };
    let target = read(format!("/proc/{pid}/cgroup"))?;
    let own = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let finding = |(what, controller, event): (&'static str, &str, &str)| {
        let (own, target) = (group_of(&own, controller), group_of(&target, controller));
        let is_inside = is_inside(&own, &target);
        let text = match (is_inside, own.as_str(), target.as_str()) {
            (true, ..) => {
                format!("inside of process {pid}'s, {target}: if {event}, the daemon stops, too")
            }
            (false, "/", "/") => {
                "both are in the root cgroup, which has no limit and is never frozen".to_owned()
            }
            (false, _, "/") => {
                format!("process {pid} is in the root cgroup, which has no limit and is never frozen")
            }
            (false, ..) => format!("outside of process {pid}'s ({own}, not in {target})"),
        };
        Finding::new(what, !is_inside, text, "start the daemon outside of that cgroup")
    };
    let memory = ("memory cgroup", "memory", "the cgroup reaches its memory limit");
    Ok([memory, ("freezer", "freezer", "the cgroup is frozen")].map(finding).into())
}

/// Logs if this process could be stopped or killed with another one.
pub(crate) fn log_if_inside_of(pid: u32) {
    match is_outside_of(pid) {
        Ok(findings) => findings.iter().filter(|finding| !finding.is_good).for_each(Finding::log),
        Err(error) => tracing::warn!("{error:#}"),
    }
}

/// Returns the cgroup of a process for a controller: the one of version 1, or else that of version
/// 2.
fn group_of(cgroup: &str, controller: &str) -> String {
    let lines = || cgroup.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let of_v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == controller));
    let group = of_v1.or_else(|| lines().find(|(controllers, _)| controllers.is_empty()));
    group.map_or("/", |(_, path)| path).to_owned()
}

/// Returns whether one cgroup is the other or is below it. The root does not count, because it has
/// no limit and is never frozen.
fn is_inside(own: &str, target: &str) -> bool {
    let below = own.strip_prefix(target).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    target != "/" && below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found() {
        let both = "9:name=systemd:/\n6:freezer,pids:/frozen\n4:memory:/a/b\n0::/unified\n";
        assert_eq!(group_of(both, "memory"), "/a/b");
        assert_eq!(group_of(both, "freezer"), "/frozen");
        assert_eq!(group_of("0::/user.slice/x\n", "memory"), "/user.slice/x");
        assert_eq!(group_of("", "memory"), "/");
    }

    #[test]
    fn the_root_stops_nobody() {
        for (own, target, inside) in [
            ("/", "/", false),
            ("/a", "/a", true),
            ("/a/b", "/a", true),
            ("/ab", "/a", false),
            ("/", "/a", false),
            ("/a", "/", false),
        ] {
            assert_eq!(is_inside(own, target), inside, "{own} in {target}");
        }
    }
}
