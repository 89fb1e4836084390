//! Measures that let a daemon survive events that stop or kill its target: memory pressure, a
//! freezer, a limit of descriptors.
//!
//! Each measure is applied as far as the system allows. The daemon logs the ones that failed, and
//! `postcopy doctor` prints all of them on demand.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;

/// The result of a check or a measure.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) what: &'static str,
    pub(crate) is_good: bool,
    pub(crate) text: String,
}

impl Finding {
    fn new(what: &'static str, is_good: bool, text: impl Into<String>) -> Self {
        Self { what, is_good, text: text.into() }
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
fn raise_descriptors() -> Finding {
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
    Finding::new(WHAT, now.is_none_or(|now| now >= 4096), text)
}

/// Lowers the OOM score, so that the kernel kills other processes first.
fn lower_oom_score() -> Finding {
    const WHAT: &str = "OOM score";
    let path = "/proc/self/oom_score_adj";
    let lowered = fs::write(path, "-1000");
    let now = fs::read_to_string(path).unwrap_or_default();
    let now = now.trim();
    match lowered {
        Ok(()) => Finding::new(WHAT, true, format!("{now}: others are killed first")),
        Err(error) => {
            Finding::new(WHAT, false, format!("{now}: cannot be lowered ({error}; CAP_SYS_RESOURCE)"))
        }
    }
}

/// Locks this process's own pages in memory, so that serving a fault never waits for swap.
fn lock_memory() -> Finding {
    const WHAT: &str = "memory lock";
    // With a finite limit, later mappings would fail once the lock reaches it.
    let limit = getrlimit(Resource::Memlock);
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    let may = limit.maximum.is_none() || rustix::process::geteuid().is_root();
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match may.then(|| mlockall(flags)) {
        Some(Ok(())) => Finding::new(WHAT, true, "its resident pages are never swapped out"),
        Some(Err(error)) => Finding::new(WHAT, false, format!("memory may be swapped out ({error})")),
        None => Finding::new(WHAT, false, "memory may be swapped out (ulimit -l is not unlimited)"),
    }
}

/// Returns whether this process is outside of the memory cgroup and the freezer of another process.
/// Inside, it would be stopped or killed with that process, and could not serve it.
pub(crate) fn is_outside_of(pid: u32) -> Vec<Finding> {
    let read = |of: &str| fs::read_to_string(format!("/proc/{of}/cgroup")).unwrap_or_default();
    let (own, target) = (read("self"), read(&pid.to_string()));
    let finding = |(what, controller): (&'static str, &str)| {
        let (own, target) = (group_of(&own, controller), group_of(&target, controller));
        let is_inside = is_inside(&own, &target);
        let text = match is_inside {
            true => {
                format!("inside of process {pid}'s, {target}: events that stop that process stop its pager")
            }
            false => format!("outside of process {pid}'s ({own}, not in {target})"),
        };
        Finding::new(what, !is_inside, text)
    };
    [("memory cgroup", "memory"), ("freezer", "freezer")].map(finding).into()
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
