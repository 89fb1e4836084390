//! What a madvise on shared memory asks for: REMOVE events are the same for MADV_DONTNEED, which keeps the content, and
//! for MADV_REMOVE, which drops it. Whoever causes one sleeps in the system call until it is read, and /proc shows the
//! arguments of system calls.

mod children;

pub(crate) use children::{Child, Process, Search, can_read_mappings, ticks};

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
/// The numbers of all calls that cause events: mmap, munmap, brk, mremap, madvise, clone, fork, vfork, clone3.
#[cfg(target_arch = "x86_64")]
const CAUSES: &[u64] = &[9, 11, 12, 25, MADVISE, 56, 57, 58, 435];
#[cfg(not(target_arch = "x86_64"))]
const CAUSES: &[u64] = &[214, 215, 216, 220, 222, MADVISE, 435];

/// How long it is waited for somebody who has begun to cause an event, and does not sleep yet.
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
    /// Its file under /proc, and what that says.
    path: PathBuf,
    call: String,
}

/// What the threads do.
#[derive(Debug, Default)]
struct Look {
    asleep: Vec<Asleep>,
    /// Some do not sleep.
    runs: bool,
}

/// The processes whose calls are looked at: the memory's owner, and what it has forked.
#[derive(Debug)]
pub(crate) struct Callers {
    /// Those that are alive, as far as they have been found, each with the time that it was started at: the kernel gives
    /// the pid of a process that has exited to another one.
    found: Mutex<BTreeMap<u32, u64>>,
    /// Who was seen before the last event was read, and may not have noticed that yet.
    seen: Mutex<Vec<Asleep>>,
    owner: Process,
}

impl Callers {
    /// The owner, which was started at that time ([`start_of`]), and whatever it forks.
    pub(crate) fn of(owner: u32, start: u64) -> Self {
        let (found, seen) = (Mutex::new([(owner, start)].into()), Mutex::default());
        Self { found, seen, owner: (owner, start) }
    }

    /// The owner.
    pub(crate) fn owner(&self) -> Process {
        self.owner
    }

    /// The processes that there are now.
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

    /// The calls of madvise in progress, while an event is under way. Who causes it may not sleep yet, and cannot be seen
    /// then: so as long as somebody runs, and nobody sleeps who did not before the last event, it looks again.
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

    /// The calls of madvise in progress.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.look().asleep.iter().filter_map(|asleep| call_of(&asleep.call)).collect()
    }

    /// The threads that may cause events now: those in a call that does, and those that run.
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

    /// Sends a signal to the owner, and to all that it has forked: false if none of them is there.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        let send = |(process, start): (u32, u64)| {
            let pid = Pid::from_raw(process.cast_signed())?;
            let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
            // Looked at after that: the descriptor is of this process, or of one that got its pid before.
            (start_of(process) == Some(start)).then_some(())?;
            rustix::process::pidfd_send_signal(&pidfd, signal).ok()
        };
        self.processes().into_iter().filter_map(send).count() > 0
    }

    /// A child can be seen a moment after its fork is told of; so they are looked for each time.
    fn look(&self) -> Look {
        let mut look = Look::default();
        self.processes().keys().for_each(|process| look.add_threads_of(*process));
        look
    }
}

/// Sends a signal to a process that was started at `start`, in clock ticks since boot, and to all
/// its descendants. Returns whether it reached any of them: a process that has the pid only since
/// then is left alone.
pub fn signal_process_tree(pid: u32, start: u64, signal: Signal) -> bool {
    Callers::of(pid, start).signal(signal)
}

/// When a process was started, in clock ticks since the machine was: field 22 of /proc/PID/stat. None: there is no such
/// process.
pub(crate) fn start_of(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether memory keeps its content whose REMOVE event was read while these calls were in progress; None if that cannot
/// be known. An event is of one mapping, so it may be of a part of what the call is of.
pub(crate) fn keeps_content(calls: &[Call], event: &Range<usize>) -> Option<bool> {
    let covers = |call: &&Call| call.covers(event);
    let mut keeps = calls.iter().filter(covers).map(|call| call.advice != MADV_REMOVE);
    let first = keeps.next()?;
    keeps.all(|other| other == first).then_some(first)
}

/// Whether one of these calls may have caused the event.
pub(crate) fn is_covered(calls: &[Call], event: &Range<usize>) -> bool {
    calls.iter().any(|call| call.covers(event))
}

/// Whether a process has a thread left: those that have exited may stay for a while, until somebody asks how. Where that
/// cannot be read at the moment, it has.
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

/// These processes, and all that they have forked that is alive.
#[must_use]
pub fn with_descendants(processes: impl IntoIterator<Item = u32>) -> BTreeSet<u32> {
    let mut all = processes.into_iter().collect();
    add_children(&mut all);
    all
}

/// Adds the children of these processes, and theirs.
fn add_children(processes: &mut BTreeSet<u32>) {
    // A kernel need not tell of children by themselves.
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

/// All processes, each with its parent.
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

/// A madvise from a line of /proc/PID/task/TID/syscall: its number in decimal, its arguments in hexadecimal.
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
        assert!(!Callers::of(child.id(), start - 1).signal(Signal::KILL));
        assert!(child.try_wait().unwrap().is_none(), "it is another process");
        assert!(Callers::of(child.id(), start).signal(Signal::KILL));
        assert!(!child.wait().unwrap().success());
        assert!(!Callers::of(child.id(), start).signal(Signal::KILL), "it has exited");
    }

    proptest! {
        #[test]
        fn any_line_is_a_call_or_none(line in "(28|running|-1|233)?( (0x)?[0-9a-g]{0,17}){0,8}") {
            let _ = call_of(&line);
        }
    }
}
