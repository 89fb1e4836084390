//! Identifies the processes of children: the event of a fork tells no pid, and a signal must reach
//! the right process.
//!
//! The kernel creates the child after the pager has read the event. So it is a child of the
//! parent's process, was started after that and, where the parent forks again, before the next
//! event was read; and its memory is registered with a userfaultfd where the space has regions,
//! which neither a program started by exec nor one that was started before has. Where several
//! processes are like that, the order of the forks decides if the parent has one thread, and
//! otherwise the child stays unidentified.

use crate::memory::{Space, Spaces};
use crate::processes::{Candidate, Process};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// The time by which a child may seem older than its fork: the pager notes the fork a moment after
/// it has read the event.
const SLACK_TICKS: u64 = 10;
/// Regions of a space that are compared with a process's mappings.
const COMPARED: usize = 16;
/// Children of one parent that are looked at in one go.
const MOST: usize = 64;

/// A child that is to be identified.
#[derive(Debug)]
struct Child {
    space: Arc<Space>,
    /// When its fork was read, and the next one of its parent, in clock ticks since boot.
    forked: u64,
    next_fork: u64,
}

/// Finds the processes of children whose process is unknown, among candidates in the order of their
/// forks. Returns the spaces that it has found one for.
pub(super) fn identify(spaces: &Spaces, candidates: &[Candidate]) -> Vec<Arc<Space>> {
    let known: BTreeSet<Process> = spaces.spaces().filter_map(|space| space.process()).collect();
    let mut found = Vec::new();
    for parent in spaces.spaces() {
        let children = children_of(spaces, parent.id);
        let Some(process) = parent.process().filter(|_| !children.is_empty()) else { continue };
        let forked = children[0].forked.saturating_sub(SLACK_TICKS);
        let is_candidate = |of: &&Candidate| {
            of.parent == process.pid
                && of.process.start >= forked
                && !known.contains(&of.process)
                && of.process.is_alive()
        };
        let candidates: Vec<&Candidate> = candidates.iter().filter(is_candidate).take(MOST).collect();
        for (space, process) in matches(spaces, &children, &candidates, process.threads() == 1) {
            space.set_process(process);
            found.push(space);
        }
    }
    found
}

/// Returns the children of a space whose processes are unknown, in the order of their forks.
fn children_of(spaces: &Spaces, parent: u32) -> Vec<Child> {
    let of_parent = |space: &&Arc<Space>| space.parent().is_some_and(|(id, _)| id == parent);
    let all: Vec<_> = spaces.spaces().filter(of_parent).collect();
    let forks: Vec<u64> = all.iter().filter_map(|space| Some(space.parent()?.1)).collect();
    let next = |at: usize| forks.get(at + 1).copied().unwrap_or(u64::MAX);
    let child = |(at, space): (usize, &Arc<Space>)| Child {
        space: Arc::clone(space),
        forked: forks[at],
        next_fork: next(at),
    };
    let unknown = |child: &Child| child.space.process().is_none() && !child.space.is_gone();
    all.into_iter().enumerate().map(child).filter(unknown).take(MOST).collect()
}

/// Returns the process of each child for which it is certain. `candidates` are in the order of
/// their forks where the parent `is_single`, with the addresses that are registered.
fn matches(
    spaces: &Spaces,
    children: &[Child],
    candidates: &[&Candidate],
    is_single: bool,
) -> Vec<(Arc<Space>, Process)> {
    let may_be = |child: &Child, of: &Candidate| {
        let times = child.forked.saturating_sub(SLACK_TICKS)..=child.next_fork;
        times.contains(&of.process.start) && has_regions(spaces, &child.space, &of.mappings.registered)
    };
    let of_child = |child: &Child| -> Vec<Process> {
        candidates.iter().filter(|of| may_be(child, of)).map(|of| of.process).collect()
    };
    let possible: Vec<Vec<Process>> = children.iter().map(of_child).collect();
    let is_of_any = |of: &&&Candidate| children.iter().any(|child| may_be(child, of));
    let all: Vec<Process> = candidates.iter().filter(is_of_any).map(|of| of.process).collect();
    let is_only =
        |process: &Process| possible.iter().filter(|possible| possible.contains(process)).count() == 1;
    let in_order = is_single && all.len() == children.len();
    let found = children.iter().zip(&possible).enumerate().filter_map(|(at, (child, possible))| {
        let process = match possible.as_slice() {
            [only] if is_only(only) => *only,
            _ if in_order && possible.contains(&all[at]) => all[at],
            _ => return None,
        };
        Some((Arc::clone(&child.space), process))
    });
    found.collect()
}

/// Returns whether all of these addresses are registered at which the space has regions (the first
/// ones are compared).
fn has_regions(spaces: &Spaces, space: &Space, registered: &[Range<usize>]) -> bool {
    let is_registered = |addresses: Range<usize>| {
        registered.iter().any(|range| range.start <= addresses.start && addresses.end <= range.end)
    };
    let regions = spaces.regions_of(space.id).take(COMPARED);
    let mut compared = regions.map(|region| region.address(0)..region.address(region.pages())).peekable();
    compared.peek().is_some() && compared.all(is_registered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_space, spaces_with};
    use crate::memory::{ObjectKind, Place};
    use crate::processes::Mappings;
    use crate::state_file::State;
    use crate::uffd::{EVENT_UNMAP, Uffd};
    use postcopy_proto::manifest::FileEntry;
    use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};

    const ADDRESS: usize = 0x7000_0000;
    const PAGES: usize = 4;

    /// A parent, and children of it whose forks were read at these times.
    fn family(forks: &[u64]) -> Spaces {
        let (parent, state) = (any_space(0), State::own());
        let file = FileEntry {
            first_chunk: ChunkIndex(0),
            size_bytes: (PAGES * PAGE_BYTES) as u64,
            executable: false,
        };
        let regions = [(ADDRESS, 0..PAGES)];
        let mut spaces = spaces_with(&parent, &state, file, ObjectKind::default(), PAGE_BYTES, &regions);
        for (id, ticks) in (1..).zip(forks) {
            let uffd = Uffd::open(EVENT_UNMAP).unwrap();
            let child = Space::new(id, uffd, state.answers()).forked(0, *ticks);
            spaces.fork(0, Arc::new(child)).unwrap();
        }
        assert!(spaces.places_of(1).all(|(place, _, _)| place == Place::Here));
        spaces
    }

    fn candidate(pid: u32, start: u64, pages: usize) -> Candidate {
        let registered = (pages > 0).then_some(ADDRESS..ADDRESS + pages * PAGE_BYTES);
        let mappings = Mappings { registered: registered.into_iter().collect(), wiped: Vec::new() };
        Candidate { process: Process { pid, start }, parent: 1, mappings: Arc::new(mappings) }
    }

    fn processes(starts: &[u64]) -> Vec<Candidate> {
        (100..).zip(starts).map(|(pid, start)| candidate(pid, *start, PAGES)).collect()
    }

    /// The pid that each child is found to have, by the child's id.
    fn found(spaces: &Spaces, candidates: &[Candidate], is_single: bool) -> Vec<(u32, u32)> {
        let candidates: Vec<&Candidate> = candidates.iter().collect();
        let found = matches(spaces, &children_of(spaces, 0), &candidates, is_single);
        found.into_iter().map(|(space, process)| (space.id, process.pid)).collect()
    }

    #[test]
    fn children_are_told_apart_by_when_they_were_forked() {
        let spaces = family(&[1000, 2000, 3000]);
        assert_eq!(found(&spaces, &processes(&[1001, 2001, 3002]), false), [(1, 100), (2, 101), (3, 102)]);
        // One that began before its fork, and one that has exited.
        assert_eq!(found(&spaces, &processes(&[900, 2001]), false), [(2, 101)]);
    }

    #[test]
    fn forks_at_one_time_are_told_apart_by_their_order_where_the_parent_has_one_thread() {
        let spaces = family(&[1000, 1001]);
        let candidates = processes(&[1001, 1001]);
        assert_eq!(found(&spaces, &candidates, false), []);
        assert_eq!(found(&spaces, &candidates, true), [(1, 100), (2, 101)]);
        // One of the children has exited, and it is not known which.
        assert_eq!(found(&spaces, &candidates[..1], true), []);
    }

    #[test]
    fn a_program_that_was_started_by_exec_is_no_candidate() {
        let spaces = family(&[1000]);
        let mut candidates = vec![candidate(100, 1001, 0), candidate(101, 1002, PAGES)];
        assert_eq!(found(&spaces, &candidates, true), [(1, 101)]);
        candidates[1] = candidate(101, 1002, 1);
        assert_eq!(found(&spaces, &candidates, true), []);
    }
}
