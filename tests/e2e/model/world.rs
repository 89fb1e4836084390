//! The processes of a scenario, their memory as it must be, and the session that serves them.

use super::operations::{Batch, Kind, MANY, Scenario, Variant};
use super::rounds::{Expected, Family, Round, Step, Target, Told};
use postcopy::{Changes, ForeignRegion};
use postcopy_tests::PAGE;
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{
    ALL_EVENTS, EVENT_REMOVE, Faulter, Toucher, page_digest, patience, read_from_outside,
};
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::model::{Content, Memory};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Pages of the image, and of the two regions over it, which begin and end within chunks.
pub(super) const IMAGE_PAGES: usize = 1210;
const REGIONS: [Range<usize>; 2] = [5..805, 701..1201];
/// The slots that memory is moved to, far from where the kernel places anything by itself.
pub(super) const SLOTS_AT: usize = 1 << 44;
pub(super) const SLOT_PAGES: usize = 32;
pub(super) const SLOTS: usize = 64;
pub(super) const THREADS: usize = 3;

/// A process of a scenario.
struct Process {
    memory: Memory,
    threads: Vec<Toucher>,
    /// The session was attached to this one.
    is_owner: bool,
    has_forked: bool,
}

/// The changes of memory when a batch is over.
#[derive(Debug)]
pub(super) enum Effect {
    Write(Range<usize>, u8),
    Remove(Range<usize>),
    /// Of shared memory.
    Punch(Vec<usize>),
    Free(Range<usize>),
    Cover(Range<usize>),
    Unmap(Range<usize>),
    Move {
        pages: Range<usize>,
        to: usize,
        grow: usize,
        keep: bool,
    },
}

/// The operations and answers of all scenarios.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) operations: BTreeMap<Kind, usize>,
    pub(super) answers: BTreeMap<&'static str, u64>,
    /// Children that got the pid of a process that had exited.
    pub(super) reused_pids: usize,
    /// Scenarios of [`Variant::Many`].
    pub(super) many: usize,
}

/// See the module.
pub(super) struct World {
    // Dropped first: what it serves is killed after it.
    /// None: the process itself.
    keeper: Option<Keeper>,
    faulter: Faulter,
    processes: Vec<Process>,
    next_mapping: u32,
    variant: Variant,
    shared: Vec<Content>,
    /// The pids of processes that have exited, where new ones may get them.
    exited: Vec<u32>,
    reap: bool,
}

/// The page of the image that a region of [`Variant::Many`] has.
fn place_of(index: usize) -> usize {
    index * 7919 % IMAGE_PAGES
}

/// Returns the kinds of memory of a variant, in the faulter's words.
fn kinds_of(variant: Variant) -> Vec<String> {
    let [first, second] = REGIONS.map(|pages| pages.len());
    match variant {
        Variant::Many => vec![format!("private:{MANY}")],
        Variant::Shared => {
            vec![format!("private:{first}"), format!("memfd:{second}"), format!("again:{second}")]
        }
        _ => vec![format!("private:{first}"), format!("private:{second}")],
    }
}

/// Returns the regions of a variant's memory.
fn regions_of(variant: Variant, faulter: &Faulter) -> Vec<ForeignRegion> {
    let offset = |pages: &Range<usize>| (pages.start * PAGE) as u64;
    match variant {
        Variant::Many => {
            let page = |index: usize| {
                let whole = faulter.region(0, "mem", (place_of(index) * PAGE) as u64);
                ForeignRegion { address: whole.address + index * PAGE, len: PAGE, ..whole }
            };
            (0..MANY).map(page).collect()
        }
        Variant::Shared => {
            let shared = |index| faulter.shared_region(index, "mem", offset(&REGIONS[1]), 1);
            vec![faulter.region(0, "mem", offset(&REGIONS[0])), shared(1), shared(2)]
        }
        _ => (0..2).map(|index| faulter.region(index, "mem", offset(&REGIONS[index]))).collect(),
    }
}

/// Returns the memory of a variant as it must be.
fn memory_of(variant: Variant, faulter: &Faulter) -> Memory {
    let mut memory = Memory::default();
    let at = |index| faulter.at(index, 0) / PAGE;
    if variant == Variant::Many {
        memory.map(0, at(0), (0..MANY).map(|index| Content::Image(place_of(index))));
        return memory;
    }
    memory.map(0, at(0), REGIONS[0].clone().map(Content::Image));
    if variant == Variant::Shared {
        memory.map_shared(1, at(1), REGIONS[1].len());
        memory.map_shared(2, at(2), REGIONS[1].len());
    } else {
        memory.map(1, at(1), REGIONS[1].clone().map(Content::Image));
    }
    if variant == Variant::Tracked {
        memory.track();
    }
    memory
}

impl World {
    /// Starts the processes of a scenario, and a session that serves them.
    pub(super) fn start(server: &str, image: &str, scenario: &Scenario) -> Self {
        let variant = scenario.variant;
        let features = if variant == Variant::RemovesOnly { EVENT_REMOVE } else { ALL_EVENTS };
        let kinds = if variant == Variant::Own { Vec::new() } else { kinds_of(variant) };
        let kinds: Vec<_> = kinds.iter().map(String::as_str).collect();
        let mut faulter = Faulter::start(features, &kinds);
        let (keeper, memory) = match variant {
            Variant::Own => (None, open_own(server, image, scenario, &mut faulter)),
            _ => (Some(attach(server, image, scenario, &faulter)), memory_of(variant, &faulter)),
        };
        faulter.let_go();
        if scenario.reap {
            faulter.main.does("reap");
        }
        let threads = (0..THREADS).map(|_| faulter.thread()).collect();
        let processes = vec![Process { memory, threads, is_owner: true, has_forked: false }];
        let is_shared = variant == Variant::Shared;
        let shared = REGIONS[1].clone().filter(|_| is_shared).map(Content::Image).collect();
        let (exited, reap) = (Vec::new(), scenario.reap);
        Self { keeper, faulter, processes, next_mapping: 3, variant, shared, exited, reap }
    }

    fn mapping(&mut self) -> u32 {
        self.next_mapping += 1;
        self.next_mapping
    }

    /// Does the operations of a batch at once, and compares the memory with the model.
    pub(super) fn batch(&mut self, batch: &Batch, image: &[String], seen: &Mutex<Seen>) {
        let mut round = Round::default();
        for operation in &batch.operations {
            let place = if batch.together { &batch.operations[0] } else { operation };
            let process = place.process % self.processes.len();
            let thread = round.told.iter().filter(|told| told.process == process).count();
            let of = &self.processes[process];
            if !self.variant.has(operation.kind) || thread >= of.threads.len() {
                continue;
            }
            let family = Family {
                processes: self.processes.len(),
                threads: of.threads.len(),
                has_forked: of.has_forked,
                variant: self.variant,
            };
            let target = Target::of(process, &of.memory, place, operation);
            let Some(step) = round.step(operation, target, family) else { continue };
            *seen.lock().unwrap().operations.entry(operation.kind).or_default() += 1;
            if let Step::Tell(say, expected, effect) = step {
                if operation.kind == Kind::Fork {
                    self.offer_pid();
                }
                self.processes[process].threads[thread].tell(&say);
                round.told.push(Told { process, thread, expected });
                round.effects.extend(effect.map(|effect| (process, effect)));
            }
        }
        self.finish(round, image, seen);
    }

    /// Gives the next forked process the pid of one that has exited.
    fn offer_pid(&mut self) {
        if let Some(pid) = self.exited.last().filter(|_| self.reap) {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("root may");
        }
    }

    fn finish(&mut self, mut round: Round, image: &[String], seen: &Mutex<Seen>) {
        if round.kill {
            // The worker reads or does what was just begun.
            let until = Instant::now() + Duration::from_micros(fastrand::u64(..400));
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            self.keeper.as_mut().expect("it is another process").kill_worker();
        }
        if let Some((process, pages)) = round.remote.take() {
            self.remote_read(process, &pages, &round, image);
        }
        let (child, exited) = self.take_answers(&mut round, image, seen);
        self.take_effects(round.effects);
        if round.kill {
            // A page that was removed in this batch may have been removed before the kill.
            let owner = self.processes.iter_mut().find(|process| process.is_owner);
            owner.into_iter().for_each(|owner| owner.memory.forget_told());
        }
        self.processes.extend(child);
        for process in exited.into_iter().rev() {
            let process = self.processes.remove(process);
            if !process.is_owner {
                self.exited.push(process.threads[0].pid);
            }
        }
        if round.changes {
            self.take_changes();
        }
    }

    /// Takes the answer of each thread, and compares it. Returns the child that was forked, and the
    /// processes that exited.
    fn take_answers(
        &mut self,
        round: &mut Round,
        image: &[String],
        seen: &Mutex<Seen>,
    ) -> (Option<Process>, Vec<usize>) {
        let (mut child, mut exited) = (None, Vec::new());
        for Told { process, thread, expected } in std::mem::take(&mut round.told) {
            let toucher = &mut self.processes[process].threads[thread];
            match expected {
                Expected::Answer(expected) => assert_eq!(toucher.answer(), Some(expected)),
                Expected::Place(pages, grow) => {
                    let to = toucher.answer().expect("it lives").parse::<usize>().expect("an address") / PAGE;
                    round.effects.push((process, Effect::Move { pages, to, grow, keep: false }));
                }
                Expected::Nothing => {
                    assert_eq!(toucher.answer(), None);
                    exited.push(process);
                }
                Expected::Digests(pages) => {
                    let answer = toucher.answer().expect("it lives");
                    let digests: Vec<_> = answer.split_whitespace().map(ToOwned::to_owned).collect();
                    self.compare(process, pages, &digests, round, image);
                }
                Expected::Thread => {
                    let other = self.faulter.started(toucher);
                    self.processes[process].threads.push(other);
                }
                Expected::Child => child = Some(self.forked(process, thread, round, seen)),
            }
        }
        exited.sort_unstable();
        (child, exited)
    }

    fn forked(&mut self, parent: usize, thread: usize, round: &Round, seen: &Mutex<Seen>) -> Process {
        let thread = self.faulter.started(&mut self.processes[parent].threads[thread]);
        let reused = self.exited.iter().position(|pid| *pid == thread.pid);
        if let Some(reused) = reused {
            self.exited.swap_remove(reused);
            seen.lock().unwrap().reused_pids += 1;
        }
        let memory = self.processes[parent].memory.forked(&round.removed(parent));
        self.processes[parent].has_forked = true;
        Process { memory, threads: vec![thread], is_owner: false, has_forked: false }
    }

    /// Asserts that the session reports the changes by the first process.
    fn take_changes(&mut self) {
        let Some(owner) = self.processes.iter_mut().find(|process| process.is_owner) else { return };
        let (changes, at) = match &mut self.keeper {
            Some(keeper) => (keeper.take_changes(), 0),
            None => {
                let answer = owner.threads[0].ask("changes");
                let (written, removed) = serde_json::from_str(&answer).expect("runs");
                (Changes { written, removed }, owner.memory.runs()[0].start)
            }
        };
        let pages = |runs: Vec<Range<usize>>| {
            runs.into_iter().flat_map(|run| at + run.start / PAGE..at + run.end / PAGE).collect()
        };
        let told = owner.memory.told(&pages(changes.written), &pages(changes.removed));
        told.unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    fn compare(
        &mut self,
        process: usize,
        pages: Range<usize>,
        digests: &[String],
        round: &Round,
        image: &[String],
    ) {
        assert_eq!(digests.len(), pages.len());
        for (page, digest) in pages.zip(digests) {
            let memory = &mut self.processes[process].memory;
            let shared = memory.shared(&(page..page + 1));
            if !round.may_be_removed(process, page, &shared) {
                let seen = memory.seen(page, digest, image, &self.shared);
                seen.unwrap_or_else(|wrong| panic!("process {process}: {wrong}"));
            }
        }
    }

    /// Reads from the test's process, as a debugger does.
    fn remote_read(&mut self, process: usize, pages: &Range<usize>, round: &Round, image: &[String]) {
        let pid = self.processes[process].threads[0].pid;
        let (address, len) = (pages.start * PAGE, pages.len() * PAGE);
        let bytes = within(patience(), move || read_from_outside(pid, address, len)).expect("it can be read");
        assert_eq!(bytes.len(), len);
        let digests: Vec<_> = bytes.chunks(PAGE).map(page_digest).collect();
        self.compare(process, pages.clone(), &digests, round, image);
    }

    /// Applies the effects of a batch. Memory is unmapped and moved away first, because other
    /// memory may be there then.
    fn take_effects(&mut self, effects: Vec<(usize, Effect)>) {
        let mut moved = Vec::new();
        for (process, effect) in effects {
            let mapping = self.mapping();
            let memory = &mut self.processes[process].memory;
            match effect {
                Effect::Write(pages, byte) => memory.write(pages, Content::Byte(byte), &mut self.shared),
                Effect::Punch(pages) => pages.into_iter().for_each(|page| self.shared[page] = Content::Zero),
                Effect::Remove(pages) => memory.remove(pages),
                Effect::Free(pages) => memory.free(pages),
                Effect::Cover(pages) => memory.map(mapping, pages.start, pages.map(|_| Content::Zero)),
                Effect::Unmap(pages) => memory.unmap(pages),
                Effect::Move { pages, to, grow, keep } => {
                    let taken = memory.take(&pages);
                    if keep {
                        // Shared memory stays in both places.
                        memory.map(mapping, pages.start, pages.clone().map(|_| Content::Zero));
                        memory.share(pages.start, &taken);
                    }
                    moved.push((process, taken, to, pages.len(), grow));
                }
            }
        }
        for (process, pages, to, len, grow) in moved {
            let mapping = self.mapping();
            let memory = &mut self.processes[process].memory;
            memory.unmap(to..to + len + grow);
            memory.put(pages, to, mapping);
            memory.map(mapping, to + len, (0..grow).map(|_| Content::Zero));
        }
    }

    /// Reads everything, and ends all.
    pub(super) fn end(mut self, image: &[String], seen: &Mutex<Seen>) {
        let tell = |process: &mut Process| {
            let runs = process.memory.runs();
            for pages in &runs {
                process.threads[0].tell(&format!("read {} {}", pages.start * PAGE, pages.len()));
            }
            runs
        };
        let told: Vec<_> = self.processes.iter_mut().map(tell).collect();
        for (process, runs) in told.into_iter().enumerate() {
            for pages in runs {
                let answer = self.processes[process].threads[0].answer().expect("it lives");
                let digests: Vec<_> = answer.split_whitespace().map(ToOwned::to_owned).collect();
                self.compare(process, pages, &digests, &Round::default(), image);
            }
        }
        let mut seen = seen.lock().unwrap();
        if let Some(keeper) = &self.keeper {
            for (name, count) in postcopy::state_file::answers(keeper.state()).unwrap() {
                *seen.answers.entry(name).or_default() += count;
            }
        }
        seen.many += usize::from(self.variant == Variant::Many);
        drop(seen);
        for process in &mut self.processes {
            process.threads[0].tell("exit");
        }
        self.faulter.kill();
        // Takes a second: the exit is looked for so often.
        if let Some(keeper) = &mut self.keeper
            && fastrand::u8(..16) == 0
        {
            keeper.assert_ends();
        }
    }
}

/// Has a keeper serve the faulter's memory.
fn attach(server: &str, image: &str, scenario: &Scenario, faulter: &Faulter) -> Keeper {
    let track = scenario.variant == Variant::Tracked;
    let Scenario { fill, working_set, record, .. } = *scenario;
    let how = Serving { fill, working_set, record, track, alone: false, kill: false };
    let mut keeper = Keeper::start(server, image, how, faulter, &regions_of(scenario.variant, faulter));
    if track {
        // Memory that has grown is registered for tracking in part, so mremap cannot move it at
        // once.
        assert_eq!(keeper.take_changes(), Changes::default());
    }
    keeper
}

/// Has the faulter fill memory of its own. Returns that memory as it must be.
fn open_own(server: &str, image: &str, scenario: &Scenario, faulter: &mut Faulter) -> Memory {
    let Scenario { fill, working_set, record, .. } = scenario;
    let at = faulter.main.ask(&format!("open {server} {image} {fill} {working_set} {record}"));
    let at = at.parse::<usize>().expect("an address") / PAGE;
    let mut memory = Memory::default();
    memory.map(0, at, (0..IMAGE_PAGES).map(Content::Image));
    memory.track();
    memory
}
