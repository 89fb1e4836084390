//! Cores and the time spent on them.

use anyhow::{Result, bail};
use rustix::process::Pid;
use rustix::thread::CpuSet;
use rustix::time::{ClockId, clock_gettime};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// On which cores the two ends of a network are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Where the kernel puts them.
    Any,
    /// All on one.
    One,
    /// The server and the network on one, all else on another.
    Each,
}

impl Placement {
    /// Puts this thread, and what it starts from now on, on the near end.
    pub(crate) fn near(self) -> Result<()> {
        match self {
            Self::Any => unpin(),
            Self::One | Self::Each => pin(0),
        }
    }

    /// Puts this thread, and what it starts from now on, on the far end.
    pub(crate) fn far(self) -> Result<()> {
        Ok(rustix::thread::sched_setaffinity(None, &self.far_end())?)
    }

    /// Puts all threads of a server on the far end.
    pub(crate) fn server(self, pid: u32) -> Result<()> {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw);
            rustix::thread::sched_setaffinity(task, &self.far_end())?;
        }
        Ok(())
    }

    fn far_end(self) -> CpuSet {
        match self {
            Self::Any => all(),
            Self::One => only(0),
            Self::Each => only(1),
        }
    }
}

/// Pins this thread, and those that it starts from now on.
pub(crate) fn pin(core: usize) -> Result<()> {
    Ok(rustix::thread::sched_setaffinity(None, &only(core))?)
}

/// Lets this thread, and those that it starts from now on, run on all cores.
pub(crate) fn unpin() -> Result<()> {
    Ok(rustix::thread::sched_setaffinity(None, &all())?)
}

fn only(core: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(core);
    set
}

fn all() -> CpuSet {
    let mut set = CpuSet::new();
    (0..cores()).for_each(|core| set.set(core));
    set
}

/// How many cores this process had when it began, whatever this thread may use of them now.
pub(crate) fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// A command that runs pinned.
pub(crate) fn pinned(core: usize, program: &std::path::Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(program);
    command
}

/// CPU time of all threads that a process has at the moment.
pub(crate) fn time_of(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += stat.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// CPU time of this process, its threads that have ended included.
pub(crate) fn time_of_this() -> Result<Duration> {
    Ok(clock_gettime(ClockId::ProcessCPUTime).try_into()?)
}

/// The most memory that a process has had at a time, in bytes.
pub(crate) fn peak_of(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let Some(kib) = line.split_whitespace().next() else { bail!("it has no VmHWM") };
    Ok(kib.parse::<u64>()? << 10)
}

/// CPU seconds of a process, its threads that have ended included.
pub(crate) fn seconds_of(pid: u32) -> Result<f64> {
    Ok(Times::of(&format!("{pid}"))?.own)
}

/// CPU seconds of the children that this process has waited for, and of theirs.
pub(crate) fn seconds_of_children() -> Result<f64> {
    Ok(Times::of("self")?.children)
}

/// What proc_pid_stat(5) says, in hundredths of a second there.
struct Times {
    own: f64,
    children: f64,
}

impl Times {
    fn of(process: &str) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        // After the name, which may hold anything: the third field and on.
        let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
        let ticks: Vec<f64> = fields.skip(11).take(4).filter_map(|field| field.parse().ok()).collect();
        let &[user, system, of_children, system_of_children] = ticks.as_slice() else { bail!("{stat:?}") };
        Ok(Self { own: (user + system) / 100.0, children: (of_children + system_of_children) / 100.0 })
    }
}
