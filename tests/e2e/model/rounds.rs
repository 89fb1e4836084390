//! A batch of operations under way: the orders to threads, and the answers that they must give.

use super::claims::{Claims, SHARED, overlap};
use super::operations::{Kind, MAX_PROCESSES, Operation, Variant};
use super::world::{Effect, SLOT_PAGES, SLOTS, SLOTS_AT, THREADS};
use postcopy_tests::PAGE;
use postcopy_tests::model::Memory;
use std::ops::Range;

/// The number of times that a storm gives its pages back.
const STORM: usize = 200;

/// The answer that a thread must give.
#[derive(Debug)]
pub(super) enum Expected {
    /// The place to which the kernel has moved these pages, which are so many more there.
    Place(Range<usize>, usize),
    /// Digests of pages; those that are changed meanwhile may be anything.
    Digests(Range<usize>),
    Answer(String),
    Child,
    Thread,
    Nothing,
}

/// A thread that was told something.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) process: usize,
    pub(super) thread: usize,
    pub(super) expected: Expected,
}

/// The way in which an operation is done, if it can be done.
#[derive(Debug)]
pub(super) enum Step {
    /// A thread gets this order, must give this answer, and changes memory in this way.
    Tell(String, Expected, Option<Effect>),
    /// The test itself does the operation once all threads have their orders.
    Later,
}

/// The process and the pages of an operation.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) process: usize,
    pages: Range<usize>,
    /// Those of `pages` that are of one mapping.
    of_one: Range<usize>,
    /// The pages of the shared memory that these are.
    shared: Vec<usize>,
    shared_of_one: Vec<usize>,
    is_lazy: bool,
}

impl Target {
    /// Returns the target at `place`: `operation` itself, or the first operation of a batch at one
    /// place.
    pub(super) fn of(process: usize, memory: &Memory, place: &Operation, operation: &Operation) -> Self {
        let pages = memory.run(place.page, operation.pages, false);
        let of_one = memory.run(place.page, operation.pages, true);
        let (shared, shared_of_one) = (memory.shared(&pages), memory.shared(&of_one));
        let is_lazy = memory.is_lazy(&pages);
        Self { process, pages, of_one, shared, shared_of_one, is_lazy }
    }
}

/// The threads and processes of a target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    pub(super) processes: usize,
    pub(super) threads: usize,
    pub(super) has_forked: bool,
    pub(super) variant: Variant,
}

/// See the module.
#[derive(Default)]
pub(super) struct Round {
    pub(super) claims: Claims,
    pub(super) told: Vec<Told>,
    pub(super) effects: Vec<(usize, Effect)>,
    pub(super) remote: Option<(usize, Range<usize>)>,
    pub(super) kill: bool,
    pub(super) changes: bool,
    /// A process or a thread is being started.
    started: bool,
    punched: bool,
}

fn at(pages: &Range<usize>) -> String {
    format!("{} {}", pages.start * PAGE, pages.len())
}

/// A step whose thread answers "done".
fn does(say: String, effect: impl Into<Option<Effect>>) -> Option<Step> {
    Some(Step::Tell(say, Expected::Answer("done".into()), effect.into()))
}

impl Round {
    /// Returns the step of an operation, and claims its pages. `None` if the operation cannot be
    /// done beside those of the batch.
    pub(super) fn step(&mut self, operation: &Operation, target: Target, family: Family) -> Option<Step> {
        if family.variant == Variant::Shared && self.contradicts(operation.kind) {
            return None;
        }
        match operation.kind {
            Kind::Read | Kind::KernelRead | Kind::RemoteRead => self.read(operation.kind, target),
            Kind::Write | Kind::KernelWrite | Kind::Free | Kind::PageOut => self.write(operation, target),
            Kind::Remove | Kind::Storm | Kind::Punch => self.remove(operation.kind, target),
            Kind::Cover | Kind::Unmap | Kind::Shrink => self.unmap(operation.kind, target),
            Kind::Move | Kind::Grow | Kind::MoveAndKeep | Kind::Regrow => self.relocate(operation, target),
            Kind::Fork | Kind::Thread | Kind::Exit => self.life(operation.kind, target.process, family),
            Kind::Changes => {
                self.changes = true;
                Some(Step::Later)
            }
            Kind::Kill if !self.kill => {
                self.kill = true;
                Some(Step::Later)
            }
            Kind::Kill => None,
        }
    }

    /// Returns whether an operation contradicts an earlier one on shared memory. The pager sees
    /// from the calls of madvise in progress whether content is kept or dropped, and two that
    /// differ end a session.
    fn contradicts(&self, kind: Kind) -> bool {
        match kind {
            Kind::Punch => !self.claims.removes.is_empty(),
            Kind::Remove | Kind::Storm => self.punched,
            _ => false,
        }
    }

    fn read(&mut self, kind: Kind, target: Target) -> Option<Step> {
        let Target { process, pages, shared, .. } = target;
        let is_taken = kind == Kind::RemoteRead && self.remote.is_some();
        if pages.is_empty() || is_taken || !self.claims.read(process, &pages, &shared) {
            return None;
        }
        match kind {
            Kind::RemoteRead => {
                self.remote = Some((process, pages));
                Some(Step::Later)
            }
            Kind::KernelRead => {
                Some(Step::Tell(format!("kernel-read {}", at(&pages)), Expected::Digests(pages), None))
            }
            _ => Some(Step::Tell(format!("read {}", at(&pages)), Expected::Digests(pages), None)),
        }
    }

    fn write(&mut self, operation: &Operation, target: Target) -> Option<Step> {
        let Target { process, pages, shared, is_lazy, .. } = target;
        // Half of a page that may be dropped at any time would be gone for a thread that reads it
        // then.
        let only_reads = operation.kind == Kind::PageOut && !is_lazy;
        let is_refused = pages.is_empty() || operation.kind == Kind::Free && !shared.is_empty();
        let may = !is_refused
            && match only_reads {
                true => self.claims.read(process, &pages, &shared),
                false => self.claims.change(process, &pages, &shared),
            };
        if !may {
            return None;
        }
        let byte = u8::try_from(operation.other % 255 + 1).unwrap();
        let place = at(&pages);
        match operation.kind {
            Kind::Free => does(format!("advise 8 {place}"), Effect::Free(pages)),
            Kind::PageOut => does(format!("advise 21 {place}"), None),
            Kind::KernelWrite => does(format!("kernel-write {place} {byte}"), Effect::Write(pages, byte)),
            _ => does(format!("write {place} {byte}"), Effect::Write(pages, byte)),
        }
    }

    fn remove(&mut self, kind: Kind, target: Target) -> Option<Step> {
        let Target { process, pages, of_one, shared_of_one, .. } = target;
        if kind == Kind::Punch {
            let is_shared = !of_one.is_empty() && shared_of_one.len() == of_one.len();
            if !is_shared || !self.claims.punch(process, &of_one, &shared_of_one) {
                return None;
            }
            self.punched = true;
            return does(format!("advise 9 {}", at(&of_one)), Effect::Punch(shared_of_one));
        }
        if pages.is_empty() || !self.claims.remove(process, &pages) {
            return None;
        }
        let say = match kind {
            Kind::Storm => format!("advise-often 4 {} {STORM}", at(&pages)),
            _ => format!("advise 4 {}", at(&pages)),
        };
        does(say, Effect::Remove(pages))
    }

    fn unmap(&mut self, kind: Kind, target: Target) -> Option<Step> {
        let Target { process, pages, of_one, .. } = target;
        if kind == Kind::Shrink {
            if of_one.len() < 2 || !self.claims.change(process, &of_one, &[]) {
                return None;
            }
            let left = of_one.len() / 2;
            let same = Expected::Answer((of_one.start * PAGE).to_string());
            let say = format!("remap {} {left} 0 0", at(&of_one));
            return Some(Step::Tell(say, same, Some(Effect::Unmap(of_one.start + left..of_one.end))));
        }
        if pages.is_empty() || !self.claims.change(process, &pages, &[]) {
            return None;
        }
        match kind {
            Kind::Cover => does(format!("cover {}", at(&pages)), Effect::Cover(pages)),
            _ => does(format!("unmap {}", at(&pages)), Effect::Unmap(pages)),
        }
    }

    fn relocate(&mut self, operation: &Operation, target: Target) -> Option<Step> {
        let Target { process, of_one, shared_of_one, .. } = target;
        let kind = operation.kind;
        // Beyond the end of the shared memory there is nothing.
        let is_refused = matches!(kind, Kind::Grow | Kind::Regrow) && !shared_of_one.is_empty();
        if of_one.is_empty() || is_refused {
            return None;
        }
        let grow = if matches!(kind, Kind::Grow | Kind::Regrow) { 1 + operation.other % 7 } else { 0 };
        let (len, new_len) = (of_one.len(), of_one.len() + grow);
        if kind == Kind::Regrow {
            // As realloc does: to an address that the kernel chooses. Other memory may be moved or
            // unmapped from there at the same time.
            let say = format!("remap {} {new_len} 1 0", at(&of_one));
            let may = self.claims.change(process, &of_one, &[]);
            return may.then_some(Step::Tell(say, Expected::Place(of_one, grow), None));
        }
        let to = SLOTS_AT / PAGE + operation.other % SLOTS * SLOT_PAGES;
        let place = to..to + new_len;
        let apart = place.end <= of_one.start || of_one.end <= place.start;
        let may =
            apart && self.claims.change(process, &of_one, &[]) && self.claims.change(process, &place, &[]);
        if !may {
            return None;
        }
        let keep = kind == Kind::MoveAndKeep;
        let flags = if keep { 1 | 4 } else { 1 };
        let say = format!("remap {} {len} {new_len} {flags} {}", of_one.start * PAGE, to * PAGE);
        let expected = Expected::Answer((to * PAGE).to_string());
        Some(Step::Tell(say, expected, Some(Effect::Move { pages: of_one, to, grow, keep })))
    }

    fn life(&mut self, kind: Kind, process: usize, family: Family) -> Option<Step> {
        match kind {
            Kind::Fork if !self.started && family.processes < MAX_PROCESSES && self.claims.fork(process) => {
                self.started = true;
                Some(Step::Tell("fork".to_owned(), Expected::Child, None))
            }
            Kind::Thread if !self.started && family.threads < THREADS => {
                if self.claims.exits.contains(&process) || self.claims.forks.contains(&process) {
                    return None;
                }
                self.started = true;
                // So that it does not exit meanwhile.
                self.claims.reads.push((process, 0..0));
                Some(Step::Tell("thread".to_owned(), Expected::Thread, None))
            }
            // The children of one that has exited could not be found any more.
            Kind::Exit if family.variant == Variant::Shared && family.has_forked => None,
            Kind::Exit if family.processes > self.claims.exits.len() + 1 && self.claims.exit(process) => {
                Some(Step::Tell("exit".to_owned(), Expected::Nothing, None))
            }
            _ => None,
        }
    }

    /// Returns whether a page may have been removed during the batch. Both contents are right then.
    pub(super) fn may_be_removed(&self, process: usize, page: usize, shared: &[usize]) -> bool {
        shared.iter().any(|page| overlap(&self.claims.removes, SHARED, &(*page..page + 1)))
            || overlap(&self.claims.removes, process, &(page..page + 1))
    }

    /// Returns the pages of a process that are removed during the batch.
    pub(super) fn removed(&self, process: usize) -> Vec<Range<usize>> {
        let of_process = self.claims.removes.iter().filter(|(who, _)| *who == process);
        of_process.map(|(_, pages)| pages.clone()).collect()
    }
}
