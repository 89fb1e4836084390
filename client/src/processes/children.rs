//! The processes that forks have made, and their mappings.
//!
//! A userfaultfd reports a fork before the child has a pid, so the search follows afterwards. It
//! covers the children of the session's processes, and if need be all processes.

use super::{Process, all_parents, children_of, start_of};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time that reading the mappings of one process may take. 20,000 take 60 to 110 ms.
const READ: Duration = Duration::from_secs(5);
/// The ticks of a second (USER_HZ): 100 on all machines that support userfaultfd.
const TICKS_PER_SECOND: u64 = 100;

/// Returns the time since boot in ticks, as [`start_of`] does.
pub(crate) fn ticks() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let part = now.tv_nsec.cast_unsigned() / (1_000_000_000 / TICKS_PER_SECOND);
    now.tv_sec.cast_unsigned() * TICKS_PER_SECOND + part
}

/// Returns the time since an earlier result of [`ticks`].
pub(crate) fn since(earlier: u64) -> Duration {
    Duration::from_millis(ticks().saturating_sub(earlier).saturating_mul(1000 / TICKS_PER_SECOND))
}

/// Returns true if the mappings of a process can be read with their flags. Those of its children
/// probably can, too.
pub(crate) fn can_read_mappings(Process { pid, start }: Process) -> bool {
    File::open(format!("/proc/{pid}/smaps")).is_ok() && start_of(pid) == Some(start)
}

/// The mappings of a process that matter here.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Mappings {
    /// The addresses that are registered with a userfaultfd for missing pages, in order;
    /// neighbours are joined.
    pub(crate) registered: Vec<Range<usize>>,
    /// The addresses that the process's fork has emptied (MADV_WIPEONFORK), in order; neighbours
    /// are joined.
    pub(crate) wiped: Vec<Range<usize>>,
}

impl Mappings {
    /// Reads the mappings of a process, or returns `None` if that is impossible.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let smaps = BufReader::with_capacity(64 << 10, File::open(format!("/proc/{pid}/smaps")).ok()?);
        let mut mappings = Self::default();
        read_mappings(smaps, Instant::now() + READ, |addresses, flags| {
            if flags.registered {
                join(&mut mappings.registered, addresses.clone());
            }
            if flags.wiped {
                join(&mut mappings.wiped, addresses);
            }
        })?;
        Some(mappings)
    }

    /// Returns true if more than half of these addresses are registered. The process may have
    /// unmapped some since its fork.
    pub(crate) fn have_most(&self, regions: &[Range<usize>]) -> bool {
        let all: usize = regions.iter().map(Range::len).sum();
        common_bytes(regions, &self.registered) > all / 2
    }
}

/// Adds a range behind the others, or extends the last one.
pub(crate) fn join(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    match ranges.last_mut().filter(|last| last.end == range.start) {
        Some(last) => last.end = range.end,
        None => ranges.push(range),
    }
}

/// A process that may be the child of a fork.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) process: Process,
    /// The pid of its parent.
    pub(crate) parent: u32,
    /// Its mappings when they were read. Processes with equal mappings share them.
    pub(crate) mappings: Arc<Mappings>,
}

/// The processes that may be children of forks. The mappings of each are read once: a later change
/// says nothing about its fork.
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    /// In the order in which they were found. Those of a parent with one thread are in the order
    /// of their forks.
    list: Vec<Candidate>,
    /// The processes that were read, also those without a result.
    read: HashSet<Process>,
    mappings: HashSet<Arc<Mappings>>,
}

impl Candidates {
    /// Returns the candidates.
    pub(crate) fn list(&self) -> &[Candidate] {
        &self.list
    }

    /// Reads the mappings of new processes: children of `parents`, or all processes if that is
    /// `None`. They were started at `since` or later, in ticks, and are not in `known`. Calls
    /// `progress` after each process. Returns true if there were new processes.
    ///
    /// # Blocking
    /// Reading 20,000 mappings takes 60 to 110 ms.
    pub(crate) fn read_new(
        &mut self,
        parents: Option<&[u32]>,
        since: u64,
        known: &HashSet<Process>,
        progress: impl Fn(),
    ) -> bool {
        let pids = match parents {
            Some(parents) => {
                let of = |parent: &u32| {
                    let parent = *parent;
                    children_of(parent).into_iter().map(move |pid| (pid, parent))
                };
                parents.iter().flat_map(of).collect()
            }
            None => all_parents(),
        };
        let mut has_new = false;
        for (pid, parent) in pids {
            let process = Process::of(pid).filter(|process| process.start >= since);
            let Some(process) = process.filter(|process| !known.contains(process)) else { continue };
            if !self.read.insert(process) {
                continue;
            }
            has_new = true;
            // The pid may have gone to another process meanwhile.
            if let Some(mappings) = Mappings::of(pid).filter(|_| start_of(pid) == Some(process.start)) {
                let mappings = self.share(mappings);
                self.list.push(Candidate { process, parent, mappings });
            }
            progress();
        }
        has_new
    }

    fn share(&mut self, mappings: Mappings) -> Arc<Mappings> {
        match self.mappings.get(&mappings) {
            Some(shared) => Arc::clone(shared),
            None => {
                let shared = Arc::new(mappings);
                self.mappings.insert(Arc::clone(&shared));
                shared
            }
        }
    }

    /// Forgets processes that have exited.
    pub(crate) fn forget_exited(&mut self) {
        self.read.retain(|process| start_of(process.pid) == Some(process.start));
        self.list.retain(|candidate| self.read.contains(&candidate.process));
        self.mappings.retain(|mappings| Arc::strong_count(mappings) > 1);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flags {
    /// True if a userfaultfd receives the mapping's faults.
    registered: bool,
    /// True if a fork empties the mapping in the child.
    wiped: bool,
}

/// Calls `give` with each mapping of /proc/PID/smaps and its flags. Returns `None` if the file
/// cannot be read, or not in time.
fn read_mappings(
    mut smaps: impl BufRead,
    until: Instant,
    mut give: impl FnMut(Range<usize>, Flags),
) -> Option<()> {
    let (mut line, mut addresses) = (Vec::new(), None);
    loop {
        line.clear();
        if smaps.read_until(b'\n', &mut line).ok()? == 0 {
            return Some(());
        }
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let has = |flag: &[u8]| flags.split(u8::is_ascii_whitespace).any(|word| word == flag);
            let flags = Flags { registered: has(b"um"), wiped: has(b"wf") };
            give(addresses.take()?, flags);
        } else if line.first().is_some_and(|byte| !byte.is_ascii_uppercase()) {
            addresses = Some(addresses_of(&line)?);
            if Instant::now() > until {
                return None;
            }
        }
    }
}

/// Returns the addresses at the start of a mapping's first line.
fn addresses_of(line: &[u8]) -> Option<Range<usize>> {
    let line = std::str::from_utf8(line.split(|byte| *byte == b' ').next()?).ok()?;
    let (start, end) = line.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// Returns the number of addresses that both lists contain. Each list is in order.
fn common_bytes(one: &[Range<usize>], other: &[Range<usize>]) -> usize {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut common = 0;
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        common += a.end.min(b.end).saturating_sub(a.start.max(b.start));
        _ = if a.end <= b.end { one.next() } else { other.next() };
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000004000 rw-p 00000000 00:00 0 \n\
Size:                 16 kB\n\
ProtectionKey:         0\n\
VmFlags: rd wr mr mw me ac um \n\
7f0000004000-7f0000006000 rw-p 00000000 00:00 0                          [anon:wf um]\n\
Size:                  8 kB\n\
VmFlags: rd wr mr mw me wf ac um \n\
7f0000008000-7f0000009000 rw-p 00000000 00:00 0 \n\
Size:                  4 kB\n\
VmFlags: rd wr mr mw me wf \n";

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn mappings_are_read_with_their_flags() {
        let mut found = Vec::new();
        read_mappings(SMAPS.as_bytes(), late(), |addresses, flags| found.push((addresses, flags))).unwrap();
        let of = |start: usize, end: usize, registered, wiped| {
            (0x7f00_0000_0000 + start..0x7f00_0000_0000 + end, Flags { registered, wiped })
        };
        let expected =
            [of(0, 0x4000, true, false), of(0x4000, 0x6000, true, true), of(0x8000, 0x9000, false, true)];
        assert_eq!(found, expected);
        let past = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        assert_eq!(read_mappings(SMAPS.as_bytes(), past, |_, _| {}), None);
        assert_eq!(read_mappings(&b"no address\n"[..], late(), |_, _| {}), None);
    }

    proptest::proptest! {
        #[test]
        fn any_smaps_are_read(text in "(([0-9a-f]{0,17}-[0-9a-f]{0,17} rw|VmFlags:( um| wf)?|\\PC{0,9})\n){0,9}") {
            let _ = read_mappings(text.as_bytes(), late(), |_, _| {});
        }
    }

    #[test]
    fn what_two_lists_of_ranges_have_in_common() {
        assert_eq!(common_bytes(&[0..10, 20..30], &[5..25, 28..40]), 12);
        assert_eq!(common_bytes(&[0..10, 20..30], &[10..20, 30..40]), 0);
        assert_eq!(common_bytes(&[0..30, 70..80], &[1..2, 3..5, 29..60]), 4);
    }

    #[test]
    fn a_process_is_read_once_and_forgotten_when_it_has_exited() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.start <= ticks());
        let (mut candidates, known) = (Candidates::default(), HashSet::new());
        let parents = [std::process::id()];
        assert!(candidates.read_new(Some(&parents), process.start, &known, || {}));
        let found = candidates.list().iter().find(|candidate| candidate.process == process).unwrap();
        assert_eq!(found.parent, std::process::id());
        assert!(!found.mappings.have_most(&[0x1000..0x2000, 0x3000..0x4000]));
        assert!(candidates.read.contains(&process));
        child.kill().unwrap();
        child.wait().unwrap();
        candidates.forget_exited();
        assert!(candidates.list().iter().all(|candidate| candidate.process != process));
    }

    #[test]
    fn known_and_earlier_processes_are_no_candidates() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        let mut candidates = Candidates::default();
        candidates.read_new(None, process.start, &HashSet::from([process]), || {});
        candidates.read_new(None, process.start + 1, &HashSet::new(), || {});
        assert!(candidates.list().iter().all(|candidate| candidate.process != process));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
