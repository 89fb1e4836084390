//! What a daemon needs to live through what its target does not: memory pressure, a freezer, a limit of descriptors.
//!
//! Each step is done as far as it is allowed, and what was not is said: by the daemon in its log, by `postcopy doctor` on
//! demand.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;

/// Something that was looked at or done: what, and how it is.
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

    /// Writes it to the log.
    pub(crate) fn log(&self) {
        match self.is_good {
            true => tracing::info!("{}: {}", self.what, self.text),
            false => tracing::warn!("{}: {}", self.what, self.text),
        }
    }
}

/// Makes this process as hard to kill as it may be: for guardian and worker alike.
pub(crate) fn prepare() -> Vec<Finding> {
    vec![raise_descriptors(), lower_oom_score(), lock_memory()]
}

/// As many descriptors as are allowed: each session takes some.
fn raise_descriptors() -> Finding {
    const WHAT: &str = "open files";
    const WANTED: u64 = 1 << 20;
    let limit = getrlimit(Resource::Nofile);
    // Root may go beyond what was meant for it.
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

/// Out of memory, others are killed first.
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

/// No page of this process's own has to come back from swap while it serves faults.
fn lock_memory() -> Finding {
    const WHAT: &str = "memory lock";
    // Below an unlimited one, later mappings would fail.
    let limit = getrlimit(Resource::Memlock);
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    let may = limit.maximum.is_none() || rustix::process::geteuid().is_root();
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match may.then(|| mlockall(flags)) {
        Some(Ok(())) => Finding::new(WHAT, true, "what is in memory stays there"),
        Some(Err(error)) => Finding::new(WHAT, false, format!("memory may be swapped out ({error})")),
        None => Finding::new(WHAT, false, "memory may be swapped out (ulimit -l is not unlimited)"),
    }
}

/// Whether this process is outside of the memory cgroup and the freezer of another one: inside, it would be stopped or
/// killed with it, and could not serve it.
pub(crate) fn is_outside_of(pid: u32) -> Vec<Finding> {
    let read = |of: &str| fs::read_to_string(format!("/proc/{of}/cgroup")).unwrap_or_default();
    let (own, target) = (read("self"), read(&pid.to_string()));
    let finding = |(what, controller): (&'static str, &str)| {
        let (own, target) = (group_of(&own, controller), group_of(&target, controller));
        let is_inside = is_inside(&own, &target);
        let text = match is_inside {
            true => format!("inside of process {pid}'s, {target}: what stops that one stops its pager"),
            false => format!("outside of process {pid}'s ({own}, not in {target})"),
        };
        Finding::new(what, !is_inside, text)
    };
    [("memory cgroup", "memory"), ("freezer", "freezer")].map(finding).into()
}

/// The group that a process is in, of a controller: that of version 1, or the one there is in version 2.
fn group_of(cgroup: &str, controller: &str) -> String {
    let lines = || cgroup.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let of_v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == controller));
    let group = of_v1.or_else(|| lines().find(|(controllers, _)| controllers.is_empty()));
    group.map_or("/", |(_, path)| path).to_owned()
}

/// The root is nobody's: it has no limit, and is not frozen.
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
