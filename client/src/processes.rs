//! Processes as /proc shows them: identity by pid and start time, children, registered memory, and
//! system calls in progress.
//!
//! The calls decide about shared memory. REMOVE events are the same for MADV_DONTNEED, which keeps
//! the content, and for MADV_REMOVE, which drops it. The caller sleeps in madvise(2) until the
//! pager has read the event, and /proc shows the arguments of its call.

mod children;

pub(crate) use children::{Candidate, Candidates, Mappings, can_read_mappings, join, since, ticks};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The number of madvise(2).
#[cfg(target_arch = "x86_64")]
const MADVISE: u64 = 28;
#[cfg(not(target_arch = "x86_64"))]
const MADVISE: u64 = 233;
const MADV_REMOVE: u64 = 9;
/// The numbers of all calls that cause events: mmap, munmap, brk, mremap, madvise, clone, fork,
/// vfork, clone3.
#[cfg(target_arch = "x86_64")]
const CAUSES: &[u64] = &[9, 11, 12, 25, MADVISE, 56, 57, 58, 435];
#[cfg(not(target_arch = "x86_64"))]
const CAUSES: &[u64] = &[214, 215, 216, 220, 222, MADVISE, 435];

/// The time for a thread that has begun to cause an event to reach its sleep.
const SOON: Duration = Duration::from_millis(2);

/// A madvise in progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) addresses: Range<usize>,
    pub(crate) advice: u64,
}

impl Call {
    fn covers(&self, event: &Range<usize>) -> bool {
        self.addresses.start <= event.start && event.end <= self.addresses.end
    }
}

/// A thread that sleeps in a call that causes an event.
#[derive(Debug, PartialEq, Eq)]
struct Asleep {
    /// Its file `syscall` under /proc, and the content.
    path: PathBuf,
    call: String,
}

/// A snapshot of what the threads do.
#[derive(Debug, Default)]
struct Look {
    asleep: Vec<Asleep>,
    /// At least one thread is running.
    runs: bool,
}

/// A process that the kernel cannot confuse with another one: it gives the pid of a process that
/// has exited to a new one, which was started later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// The time of its start: see [`start_of`].
    pub(crate) start: u64,
}

impl Process {
    /// Returns the process that has this pid now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start: start_of(pid)? })
    }

    /// Sends it a signal. Returns false if it has exited.
    pub(crate) fn signal(self, signal: Signal) -> bool {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return false };
        let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return false };
        // After pidfd_open: the descriptor is this process's, or that of an earlier owner of the
        // pid.
        start_of(self.pid) == Some(self.start) && rustix::process::pidfd_send_signal(&pidfd, signal).is_ok()
    }

    /// Returns whether it has a thread left.
    pub(crate) fn is_alive(self) -> bool {
        start_of(self.pid) == Some(self.start) && is_alive(self.pid)
    }

    /// Returns its number of threads; 0 where /proc does not tell.
    pub(crate) fn threads(self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count)
    }

    /// Returns whether memory of it is registered with a userfaultfd for missing pages. Reads
    /// /proc/PID/smaps, some 5 us a mapping.
    fn has_registered(self) -> bool {
        Mappings::of(self.pid).is_some_and(|mappings| !mappings.registered.is_empty())
    }
}

/// The processes whose calls are inspected: the memory's owner and its descendants.
#[derive(Debug)]
pub(crate) struct Callers {
    owner: Process,
    /// The living ones that were found so far, each with the time of its start.
    found: Mutex<BTreeMap<u32, u64>>,
    /// Threads that slept before the last event was read, and may not have woken yet.
    seen: Mutex<Vec<Asleep>>,
}

impl Callers {
    /// Starts with the owner.
    pub(crate) fn of(owner: Process) -> Self {
        let (found, seen) = (Mutex::new([(owner.pid, owner.start)].into()), Mutex::default());
        Self { owner, found, seen }
    }

    /// Returns the owner.
    pub(crate) fn owner(&self) -> Process {
        self.owner
    }

    /// Returns the processes that are alive.
    fn processes(&self) -> BTreeMap<u32, u64> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.retain(|process, start| start_of(*process) == Some(*start) && is_alive(*process));
        let mut all = found.keys().copied().collect();
        add_children(&mut all);
        for process in all {
            if let (Entry::Vacant(new), Some(start)) = (found.entry(process), start_of(process)) {
                new.insert(start);
            }
        }
        found.clone()
    }

    /// Returns the calls of madvise in progress, while an event is under way. The causer may not
    /// sleep yet, and its call is invisible until then. So this looks again as long as a thread
    /// runs and no thread sleeps that did not sleep before the last event.
    ///
    /// # Blocking
    /// For 2 ms at most.
    pub(crate) fn calls_of_an_event(&self) -> Vec<Call> {
        let started = Instant::now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let look = self.look();
            if !look.runs || look.asleep.iter().any(|new| !seen.contains(new)) || started.elapsed() > SOON {
                *seen = look.asleep;
                return seen.iter().filter_map(|asleep| call_of(&asleep.call)).collect();
            }
            std::thread::yield_now();
        }
    }

    /// Returns the calls of madvise in progress.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.look().asleep.iter().filter_map(|asleep| call_of(&asleep.call)).collect()
    }

    /// Returns the threads that may cause events now: those in a call that does, and running ones.
    pub(crate) fn causers(&self) -> Vec<i32> {
        let processes = self.processes();
        let of = |process: &u32| {
            std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten()
        };
        let causes = |task: std::fs::DirEntry| {
            let call = std::fs::read_to_string(task.path().join("syscall")).ok()?;
            let number = call.split_whitespace().next()?;
            let causes = number == "running" || number.parse().is_ok_and(|number| CAUSES.contains(&number));
            causes.then(|| task.file_name().to_str()?.parse().ok())?
        };
        processes.keys().flat_map(of).filter_map(causes).collect()
    }

    /// Sends a signal to the owner, and to those of its descendants that have memory which is
    /// registered with a userfaultfd, as its own was when they were forked. Returns whether it has
    /// reached any.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        let all = self.processes().into_iter().map(|(pid, start)| Process { pid, start });
        let has_memory = |process: &Process| *process == self.owner || process.has_registered();
        all.filter(has_memory).filter(|process| process.signal(signal)).count() > 0
    }

    /// Takes a snapshot. A child appears in /proc a moment after the event of its fork, so this
    /// looks for children each time.
    fn look(&self) -> Look {
        let mut look = Look::default();
        self.processes().keys().for_each(|process| look.add_threads_of(*process));
        look
    }
}

/// Sends a signal to a process that was started at `start`, in clock ticks since boot, and to those
/// of its descendants that have memory which is registered with a userfaultfd. Returns whether it
/// has reached any: a process that has got the pid since is left alone.
pub fn signal_process_tree(pid: u32, start: u64, signal: Signal) -> bool {
    Callers::of(Process { pid, start }).signal(signal)
}

/// Returns the start time of a process, in clock ticks since boot: field 22 of /proc/PID/stat.
/// None: the process does not exist.
pub(crate) fn start_of(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Returns whether memory keeps its content whose REMOVE event was read while these calls were in
/// progress; None if they do not tell. An event concerns one mapping, so it may cover a part of a
/// call.
pub(crate) fn keeps_content(calls: &[Call], event: &Range<usize>) -> Option<bool> {
    let covers = |call: &&Call| call.covers(event);
    let mut keeps = calls.iter().filter(covers).map(|call| call.advice != MADV_REMOVE);
    let first = keeps.next()?;
    keeps.all(|other| other == first).then_some(first)
}

/// Returns whether one of these calls may have caused the event.
pub(crate) fn is_covered(calls: &[Call], event: &Range<usize>) -> bool {
    calls.iter().any(|call| call.covers(event))
}

/// Returns whether a process has a thread left: one that has exited may stay as a zombie. True
/// where /proc cannot be read at the moment.
fn is_alive(process: u32) -> bool {
    let has_ended = |stat: &str| {
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_some_and(|state| state.starts_with(['Z', 'X']))
    };
    match std::fs::read_to_string(format!("/proc/{process}/stat")) {
        // Its first thread may have ended before the others.
        Ok(stat) if has_ended(&stat) => {
            std::fs::read_dir(format!("/proc/{process}/task")).is_ok_and(|tasks| tasks.count() > 1)
        }
        Ok(_) => true,
        Err(error) => !matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)),
    }
}

/// Returns these processes and their living descendants.
#[must_use]
pub fn with_descendants(processes: impl IntoIterator<Item = u32>) -> BTreeSet<u32> {
    let mut all = processes.into_iter().collect();
    add_children(&mut all);
    all
}

/// Adds the children of these processes, and theirs.
fn add_children(processes: &mut BTreeSet<u32>) {
    // Kernels without CONFIG_PROC_CHILDREN have no file for children.
    let parents = if Path::new("/proc/1/task/1/children").exists() { None } else { Some(all_parents()) };
    let mut new: Vec<u32> = processes.iter().copied().collect();
    while let Some(process) = new.pop() {
        let children = match &parents {
            None => children_of(process),
            Some(parents) => {
                parents.iter().filter(|(_, of)| *of == process).map(|(child, _)| *child).collect()
            }
        };
        new.extend(children.into_iter().filter(|child| processes.insert(*child)));
    }
}

fn children_of(process: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Returns all processes, each with its parent.
fn all_parents() -> Vec<(u32, u32)> {
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let parent = |process: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name in parentheses may hold anything.
        Some((process, stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?))
    };
    std::fs::read_dir("/proc").into_iter().flatten().filter_map(number).filter_map(parent).collect()
}

impl Look {
    fn add_threads_of(&mut self, process: u32) {
        for task in std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let path = task.path().join("syscall");
            let Ok(call) = std::fs::read_to_string(&path) else { continue };
            let number = call.split_whitespace().next();
            self.runs |= number == Some("running");
            if number.and_then(|number| number.parse().ok()).is_some_and(|number| CAUSES.contains(&number)) {
                self.asleep.push(Asleep { path, call });
            }
        }
    }
}

/// Parses a madvise from a line of /proc/PID/task/TID/syscall: its number in decimal, its arguments
/// in hexadecimal.
fn call_of(line: &str) -> Option<Call> {
    let mut words = line.split_whitespace();
    if words.next()?.parse() != Ok(MADVISE) {
        return None;
    }
    let mut argument = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (start, len, advice) =
        (usize::try_from(argument()?).ok()?, usize::try_from(argument()?).ok()?, argument()?);
    let end = start.checked_add(len)?.checked_next_multiple_of(4096)?;
    Some(Call { addresses: start..end, advice })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn an_event_is_kept_or_dropped_as_its_call_says_or_it_is_not_known() {
        let keep = call_of("28 0x7f0000002000 0x3fff 0x4 0x1 0x0 0x0 0x7ffd 0x7f71").unwrap();
        assert_eq!(keep, Call { addresses: 0x7f00_0000_2000..0x7f00_0000_6000, advice: 4 });
        let drop = Call { addresses: 0x7f00_0000_4000..0x7f00_0000_8000, advice: 9 };
        let calls = [keep, drop];
        let page = |n: usize| 0x7f00_0000_0000 + n * 0x1000..0x7f00_0000_0000 + (n + 1) * 0x1000;
        assert_eq!(keeps_content(&calls, &page(2)), Some(true));
        assert_eq!(keeps_content(&calls, &page(7)), Some(false));
        assert_eq!(keeps_content(&calls, &page(5)), None, "both are possible");
        assert_eq!(keeps_content(&calls, &page(9)), None, "nobody is there");
    }

    #[test]
    fn a_process_that_got_the_pid_of_an_owner_is_not_signalled() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start = start_of(child.id()).unwrap();
        assert!(!Callers::of(Process { pid: child.id(), start: start - 1 }).signal(Signal::KILL));
        assert!(child.try_wait().unwrap().is_none(), "it is another process");
        assert!(Callers::of(Process { pid: child.id(), start }).signal(Signal::KILL));
        assert!(!child.wait().unwrap().success());
        assert!(!Callers::of(Process { pid: child.id(), start }).signal(Signal::KILL), "it has exited");
    }

    proptest! {
        #[test]
        fn any_line_is_a_call_or_none(line in "(28|running|-1|233)?( (0x)?[0-9a-g]{0,17}){0,8}") {
            let _ = call_of(&line);
        }
    }
}
