//! What a madvise on shared memory asks for: REMOVE events are the same for MADV_DONTNEED, which keeps the content, and
//! for MADV_REMOVE, which drops it. Whoever causes one sleeps in the system call until it is read, and /proc shows the
//! arguments of system calls.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The number of madvise(2).
#[cfg(target_arch = "x86_64")]
const MADVISE: u64 = 28;
#[cfg(not(target_arch = "x86_64"))]
const MADVISE: u64 = 233;
const MADV_REMOVE: u64 = 9;

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

/// The processes whose calls are looked at: the memory's owner, and what it has forked.
#[derive(Debug)]
pub(crate) struct Callers {
    /// Those that are alive, as far as they have been found, and how many have been found. Changed by the pager alone.
    found: Mutex<(BTreeSet<u32>, usize)>,
    /// How many there have been.
    count: AtomicUsize,
}

impl Callers {
    /// The owner, and so many that it has forked and they have.
    pub(crate) fn of(owner: u32, children: usize) -> Self {
        Self { found: Mutex::new(([owner].into(), 1)), count: AtomicUsize::new(1 + children) }
    }

    /// One more has been forked.
    pub(crate) fn add_child(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The calls of madvise in progress. A child cannot be seen yet when its fork is told of, and looking for children
    /// takes long; so that is done only while some have not been found.
    pub(crate) fn calls(&self) -> Vec<Call> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let (processes, count) = &mut *found;
        processes.retain(|process| is_alive(*process));
        if *count < self.count.load(Ordering::Relaxed) {
            let before = processes.len();
            add_children(processes);
            *count += processes.len() - before;
        }
        let calls = processes.iter().flat_map(|process| calls_of(*process)).collect();
        drop(found);
        calls
    }
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

/// Whether a process has a thread left: those that have exited may stay for a while, until somebody asks how.
fn is_alive(process: u32) -> bool {
    let state =
        |stat: &str| stat.rsplit_once(')').map(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']));
    let leader = std::fs::read_to_string(format!("/proc/{process}/stat"));
    let leader_lives = leader.is_ok_and(|stat| state(&stat).unwrap_or(false));
    leader_lives || std::fs::read_dir(format!("/proc/{process}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

/// Adds the children of these processes, and theirs.
fn add_children(processes: &mut BTreeSet<u32>) {
    let numbers = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let all: Vec<u32> = std::fs::read_dir("/proc").into_iter().flatten().filter_map(numbers).collect();
    let parent_of = |process: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name in parentheses may hold anything.
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let parents: Vec<_> = all.iter().filter_map(|process| Some((*process, parent_of(process)?))).collect();
    loop {
        let before = processes.len();
        let children: Vec<_> = parents
            .iter()
            .filter(|(child, parent)| processes.contains(parent) && !processes.contains(child))
            .map(|(child, _)| *child)
            .filter(|child| is_alive(*child))
            .collect();
        processes.extend(children);
        if processes.len() == before {
            return;
        }
    }
}

fn calls_of(process: u32) -> Vec<Call> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
    let call = |task: std::io::Result<std::fs::DirEntry>| {
        call_of(&std::fs::read_to_string(task.ok()?.path().join("syscall")).ok()?)
    };
    tasks.filter_map(call).collect()
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

    proptest! {
        #[test]
        fn any_line_is_a_call_or_none(line in "(28|running|-1|233)?( (0x)?[0-9a-g]{0,17}){0,8}") {
            let _ = call_of(&line);
        }
    }
}
