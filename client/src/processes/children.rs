//! The search for the process that a fork has made, and for its mappings that MADV_WIPEONFORK has
//! emptied.
//!
//! A userfaultfd reports a fork before the child has a pid, so the search follows afterwards. It
//! covers the parent's children if the parent is known, else all processes. A match was started
//! since the fork was reported, and has the session's regions registered at the same addresses.
//! Several matches are accepted if they have the same mappings emptied.

use super::{Process, all_parents, children_of, start_of};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::time::{Duration, Instant};

/// The first and the longest pause between attempts to find a child.
const PAUSES: Range<Duration> = Duration::from_micros(100)..Duration::from_millis(10);
/// Time after which the search covers all processes, because the parent may not have the child.
const ELSEWHERE: Duration = Duration::from_millis(5);
/// The ticks of a second (USER_HZ): 100 on all machines that support userfaultfd.
const TICKS_PER_SECOND: u64 = 100;

/// Returns the time since boot in ticks, as [`start_of`] does.
pub(crate) fn ticks() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let part = now.tv_nsec.cast_unsigned() / (1_000_000_000 / TICKS_PER_SECOND);
    now.tv_sec.cast_unsigned() * TICKS_PER_SECOND + part
}

/// Returns true if the mappings of a process can be read with their flags. Those of its children
/// probably can, too.
pub(crate) fn can_read_mappings(Process { pid, start }: Process) -> bool {
    File::open(format!("/proc/{pid}/smaps")).is_ok() && start_of(pid) == Some(start)
}

/// A search for a child.
#[derive(Debug)]
pub(crate) struct Search {
    /// The child's parent, if that is known.
    pub(crate) parent: Option<Process>,
    /// The earliest time at which the child was started, in ticks ([`ticks`]).
    pub(crate) since: u64,
    /// The addresses that are registered with the child's userfaultfd, in order.
    pub(crate) regions: Vec<Range<usize>>,
    /// The time at which to give up.
    pub(crate) until: Instant,
}

/// A child that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Child {
    /// The child's process, or `None` if several match with the same mappings emptied.
    pub(crate) process: Option<Process>,
    /// The addresses that the fork has emptied, in order.
    pub(crate) wiped: Vec<Range<usize>>,
}

impl Search {
    /// Searches for the child until it is found, has exited, or the time is over. Processes in
    /// `known` are not the child.
    ///
    /// # Blocking
    /// Blocks until then. Reading 20,000 mappings takes 60 to 110 ms.
    pub(crate) fn find(&self, known: &HashSet<Process>, has_exited: impl Fn() -> bool) -> Option<Child> {
        let (started, mut pause) = (Instant::now(), PAUSES.start);
        // Each process's mappings are read only once, because a later change says nothing about the
        // fork.
        let mut seen: BTreeMap<Process, Option<Vec<Range<usize>>>> = BTreeMap::new();
        loop {
            for process in self.candidates(started.elapsed() > ELSEWHERE) {
                if !known.contains(&process) {
                    seen.entry(process).or_insert_with(|| self.look_at(process));
                }
            }
            if has_exited() {
                return None;
            }
            let mut matching = seen.iter().filter_map(|(process, wiped)| Some((*process, wiped.as_ref()?)));
            if let Some((process, wiped)) = matching.next() {
                let others: Vec<_> = matching.map(|(_, other)| other).collect();
                let process = others.is_empty().then_some(process);
                return others
                    .iter()
                    .all(|other| *other == wiped)
                    .then(|| Child { process, wiped: wiped.clone() });
            }
            if Instant::now() + pause > self.until {
                return None;
            }
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(PAUSES.end);
        }
    }

    /// Returns the processes that may be the child.
    fn candidates(&self, elsewhere: bool) -> Vec<Process> {
        let parent = self.parent.filter(|parent| start_of(parent.pid) == Some(parent.start));
        let pids = match parent {
            Some(parent) if !elsewhere => children_of(parent.pid),
            _ => all_parents().into_iter().map(|(pid, _)| pid).collect(),
        };
        let process = |pid| Process::of(pid).filter(|process| process.start >= self.since);
        pids.into_iter().filter_map(process).collect()
    }

    /// Returns the addresses of a process that the fork has emptied, or `None` if it does not have
    /// the regions.
    fn look_at(&self, Process { pid, start }: Process) -> Option<Vec<Range<usize>>> {
        let smaps = BufReader::with_capacity(64 << 10, File::open(format!("/proc/{pid}/smaps")).ok()?);
        let (mut registered, mut wiped) = (Vec::new(), Vec::new());
        read_mappings(smaps, self.until, |addresses, flags| {
            if flags.registered {
                registered.push(addresses.clone());
            }
            if flags.wiped {
                wiped.push(addresses);
            }
        })?;
        let all: usize = self.regions.iter().map(Range::len).sum();
        // The process may have unmapped some regions since.
        let is_it = start_of(pid) == Some(start) && common_bytes(&self.regions, &registered) > all / 2;
        is_it.then_some(wiped)
    }
}

/// Returns the addresses at which a process's memory is registered for missing pages, in order;
/// neighbours are joined.
pub(super) fn registered(pid: u32) -> Vec<Range<usize>> {
    let Ok(smaps) = File::open(format!("/proc/{pid}/smaps")) else { return Vec::new() };
    let mut found: Vec<Range<usize>> = Vec::new();
    let until = Instant::now() + Duration::from_secs(1);
    let _ = read_mappings(BufReader::with_capacity(64 << 10, smaps), until, |addresses, flags| {
        match found.last_mut().filter(|last| last.end == addresses.start) {
            Some(last) if flags.registered => last.end = addresses.end,
            _ if flags.registered => found.push(addresses),
            _ => {}
        }
    });
    found
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
    fn a_process_without_the_regions_is_not_the_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let parent = std::process::id();
        let search = Search {
            parent: Process::of(parent),
            since: start_of(child.id()).unwrap(),
            regions: vec![0x1000..0x2000, 0x3000..0x4000],
            until: Instant::now() + Duration::from_millis(50),
        };
        assert!(search.since <= ticks());
        assert!(search.candidates(false).iter().any(|process| process.pid == child.id()));
        assert_eq!(search.find(&HashSet::new(), || false), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
