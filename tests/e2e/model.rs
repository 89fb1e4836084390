//! Random operations of several processes and threads on memory that is being filled, compared with a model of it.
//!
//! Operations come in batches: those of a batch are done at once, by threads of their own, and never two that change
//! the same page; so what memory must be after a batch is known. The source of pages holds answers back, has them
//! overtake each other, and sends some twice. The pager is killed now and then, and replaced.

mod claims;
mod operations;

use crate::session::Source;
use claims::{Claims, SHARED, overlap};
use operations::{Batch, KINDS, Kind, MAX_PROCESSES, PageSource, Scenario, Variant, any_scenario};
use postcopy::{Changes, Options, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::cli::run;
use postcopy_tests::faulter::{
    ALL_EVENTS, EVENT_REMOVE, Faulter, Toucher, page_digest, patience, read_from_outside,
};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::model::{Content, Memory};
use postcopy_tests::{is_root, skip, wait_until};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Chunks of the image `app`, and of `large`, whose installing takes long enough for both lanes to meet.
const CHUNK: usize = 32 << 10;
const LARGE_CHUNK: usize = 1 << 20;
/// Pages of the image, and of the two regions over it, which begin and end within chunks.
const IMAGE_PAGES: usize = 1210;
const REGIONS: [Range<usize>; 2] = [5..805, 701..1201];
/// Where memory is moved to: slots far from where the kernel places anything by itself.
const SLOTS_AT: usize = 1 << 44;
const SLOT_PAGES: usize = 32;
const SLOTS: usize = 64;
const THREADS: usize = 3;
const MINUTE: Duration = Duration::from_secs(60);

/// What `make test` does at least. `POSTCOPY_SOAK_SECONDS` goes on for so long, `POSTCOPY_SEED` repeats a run as far as
/// its operations go, `POSTCOPY_NO_SHRINKING` shows the first failure as it came.
const OPERATIONS: usize = 20_000;

/// How many frames of working sets must have come.
const FRAMES: usize = 20;

/// How often the kernel must have answered or told what.
const ANSWERS: [(&str, u64); 9] = [
    ("done", 1000),
    ("present", 100),
    ("deferred", 10),
    ("gone", 10),
    ("fault", 1000),
    ("remove", 500),
    ("unmap", 100),
    ("remap", 100),
    ("fork", 100),
];

struct Process {
    memory: Memory,
    threads: Vec<Toucher>,
    /// The one that the session was attached to.
    is_owner: bool,
    has_forked: bool,
}

/// What a thread was told, and what it must answer.
enum Expected {
    /// Where the kernel has moved these pages to, which are so many more there.
    Place(Range<usize>, usize),
    /// Digests of pages; those that are changed meanwhile may be anything.
    Digests(Range<usize>),
    Answer(String),
    Child,
    Thread,
    Nothing,
}

/// What is done to memory when a batch is over.
enum Effect {
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

/// What has been done and seen in all scenarios.
#[derive(Debug, Default)]
struct Seen {
    operations: BTreeMap<Kind, usize>,
    answers: BTreeMap<&'static str, u64>,
}

struct World {
    // Dropped first: what it serves is killed after it.
    /// None: the process itself.
    keeper: Option<Keeper>,
    faulter: Faulter,
    processes: Vec<Process>,
    next_mapping: u32,
    variant: Variant,
    shared: Vec<Content>,
}

impl World {
    fn start(server: &str, image: &str, scenario: &Scenario) -> Self {
        let variant = scenario.variant;
        if variant == Variant::Own {
            return Self::start_own(server, image, scenario);
        }
        let features = if variant == Variant::RemovesOnly { EVENT_REMOVE } else { ALL_EVENTS };
        let is_shared = variant == Variant::Shared;
        let [first, second] = REGIONS.map(|pages| pages.len());
        let kinds = [
            format!("private:{first}"),
            format!("{}:{second}", if is_shared { "memfd" } else { "private" }),
            format!("again:{second}"),
        ];
        let kinds: Vec<_> = kinds.iter().map(String::as_str).take(if is_shared { 3 } else { 2 }).collect();
        let mut faulter = Faulter::start(features, &kinds);
        let region = |index: usize| {
            let place = |pages: &Range<usize>| (pages.start * PAGE) as u64;
            match (index, is_shared) {
                (0, _) => faulter.region(0, "mem", place(&REGIONS[0])),
                (_, true) => faulter.shared_region(index, "mem", place(&REGIONS[1]), 1),
                (_, false) => faulter.region(index, "mem", place(&REGIONS[1])),
            }
        };
        let regions: Vec<_> = (0..kinds.len()).map(region).collect();
        let track = variant == Variant::Tracked;
        let how = Serving {
            fill: scenario.fill,
            working_set: scenario.working_set,
            record: scenario.record,
            track,
            alone: false,
            kill: false,
        };
        let mut keeper = Keeper::start(server, image, how, &faulter, &regions);
        if track {
            // Memory that was grown before is registered for tracking in part, and cannot be moved at once then.
            assert_eq!(keeper.take_changes(), Changes::default());
        }
        faulter.let_go();
        let mut memory = Memory::default();
        for index in 0..regions.len() {
            let mapping = u32::try_from(index).unwrap();
            let at = faulter.at(index, 0) / PAGE;
            match (index, is_shared) {
                (0, _) => memory.map(mapping, at, REGIONS[0].clone().map(Content::Image)),
                (_, true) => memory.map_shared(mapping, at, second),
                (_, false) => memory.map(mapping, at, REGIONS[1].clone().map(Content::Image)),
            }
        }
        if track {
            memory.track();
        }
        let threads = (0..THREADS).map(|_| faulter.thread()).collect();
        let processes = vec![Process { memory, threads, is_owner: true, has_forked: false }];
        let shared = REGIONS[1].clone().map(Content::Image).collect();
        Self { keeper: Some(keeper), faulter, processes, next_mapping: 3, variant, shared }
    }

    fn start_own(server: &str, image: &str, scenario: &Scenario) -> Self {
        let mut faulter = Faulter::start(ALL_EVENTS, &[]);
        faulter.let_go();
        let Scenario { fill, working_set, record, .. } = scenario;
        let at = faulter.main.ask(&format!("open {server} {image} {fill} {working_set} {record}"));
        let mut memory = Memory::default();
        let at = at.parse::<usize>().expect("an address") / PAGE;
        memory.map(0, at, (0..IMAGE_PAGES).map(Content::Image));
        memory.track();
        let threads = (0..THREADS).map(|_| faulter.thread()).collect();
        let processes = vec![Process { memory, threads, is_owner: true, has_forked: false }];
        Self { keeper: None, faulter, processes, next_mapping: 3, variant: Variant::Own, shared: Vec::new() }
    }

    fn mapping(&mut self) -> u32 {
        self.next_mapping += 1;
        self.next_mapping
    }

    /// Does a batch of operations at once, and compares.
    fn batch(&mut self, batch: &Batch, image: &[String], seen: &Mutex<Seen>) {
        let mut claims = Claims::default();
        let mut told: Vec<(usize, usize, Expected)> = Vec::new();
        let mut effects = Vec::new();
        let mut remote = Vec::new();
        let (mut kill, mut started, mut changes) = (false, false, false);
        // Whether content of shared memory is kept or dropped is seen by who calls madvise at the time: two that say
        // different things make it unknown, which ends a session.
        let mut punched = false;
        for operation in &batch.operations {
            let place = if batch.together { &batch.operations[0] } else { operation };
            if !self.variant.has(operation.kind) {
                continue;
            }
            let process = place.process % self.processes.len();
            let thread = told.iter().filter(|(who, ..)| *who == process).count();
            if thread >= self.processes[process].threads.len() {
                continue;
            }
            let memory = &self.processes[process].memory;
            let pages = memory.run(place.page, operation.pages, false);
            let of_one = memory.run(place.page, operation.pages, true);
            let shared = memory.shared(&pages);
            let shared_of_one = memory.shared(&of_one);
            let says_otherwise = match operation.kind {
                Kind::Punch => !claims.removes.is_empty(),
                Kind::Remove => punched,
                _ => false,
            };
            if self.variant == Variant::Shared && says_otherwise {
                continue;
            }
            let is_exit = operation.kind == Kind::Exit;
            // Its children could not be found any more.
            if is_exit && self.variant == Variant::Shared && self.processes[process].has_forked {
                continue;
            }
            let to = SLOTS_AT / PAGE + operation.other % SLOTS * SLOT_PAGES;
            let grow = 1 + operation.other % 7;
            let byte = u8::try_from(operation.other % 255 + 1).unwrap();
            let at = |pages: &Range<usize>| format!("{} {}", pages.start * PAGE, pages.len());
            let (say, expected, effect) = match operation.kind {
                Kind::Read if !pages.is_empty() && claims.read(process, &pages, &shared) => {
                    (format!("read {}", at(&pages)), Expected::Digests(pages), None)
                }
                Kind::KernelRead if !pages.is_empty() && claims.read(process, &pages, &shared) => {
                    (format!("kernel-read {}", at(&pages)), Expected::Digests(pages), None)
                }
                Kind::RemoteRead
                    if !pages.is_empty() && remote.is_empty() && claims.read(process, &pages, &shared) =>
                {
                    remote.push((process, pages));
                    count(seen, operation.kind);
                    continue;
                }
                Kind::Write | Kind::KernelWrite
                    if !pages.is_empty() && claims.change(process, &pages, &shared) =>
                {
                    let how = if operation.kind == Kind::Write { "write" } else { "kernel-write" };
                    let effect = Effect::Write(pages.clone(), byte);
                    (format!("{how} {} {byte}", at(&pages)), Expected::Answer("done".into()), Some(effect))
                }
                Kind::Remove if !pages.is_empty() && claims.remove(process, &pages) => {
                    let effect = Effect::Remove(pages.clone());
                    (format!("advise 4 {}", at(&pages)), Expected::Answer("done".into()), Some(effect))
                }
                Kind::Punch
                    if !of_one.is_empty()
                        && shared_of_one.len() == of_one.len()
                        && claims.punch(process, &of_one, &shared_of_one) =>
                {
                    punched = true;
                    let effect = Effect::Punch(shared_of_one);
                    (format!("advise 9 {}", at(&of_one)), Expected::Answer("done".into()), Some(effect))
                }
                // Its own turn: when all others are done.
                Kind::Changes => {
                    changes = true;
                    count(seen, operation.kind);
                    continue;
                }
                Kind::Free
                    if !pages.is_empty() && shared.is_empty() && claims.change(process, &pages, &[]) =>
                {
                    let effect = Effect::Free(pages.clone());
                    (format!("advise 8 {}", at(&pages)), Expected::Answer("done".into()), Some(effect))
                }
                // Half of a page that may be dropped at any time would be gone for who reads it then.
                Kind::PageOut
                    if !pages.is_empty()
                        && if memory.is_lazy(&pages) {
                            claims.change(process, &pages, &shared)
                        } else {
                            claims.read(process, &pages, &shared)
                        } =>
                {
                    (format!("advise 21 {}", at(&pages)), Expected::Answer("done".into()), None)
                }
                Kind::Cover if !pages.is_empty() && claims.change(process, &pages, &[]) => {
                    let effect = Effect::Cover(pages.clone());
                    (format!("cover {}", at(&pages)), Expected::Answer("done".into()), Some(effect))
                }
                Kind::Unmap if !pages.is_empty() && claims.change(process, &pages, &[]) => {
                    let effect = Effect::Unmap(pages.clone());
                    (format!("unmap {}", at(&pages)), Expected::Answer("done".into()), Some(effect))
                }
                Kind::Shrink if of_one.len() > 1 && claims.change(process, &of_one, &[]) => {
                    let left = of_one.len() / 2;
                    let effect = Effect::Unmap(of_one.start + left..of_one.end);
                    let same = (of_one.start * PAGE).to_string();
                    (format!("remap {} {left} 0 0", at(&of_one)), Expected::Answer(same), Some(effect))
                }
                // Beyond the end of the shared memory there is nothing.
                Kind::Grow | Kind::Regrow if !shared_of_one.is_empty() => continue,
                Kind::Move | Kind::Grow | Kind::MoveAndKeep if !of_one.is_empty() => {
                    let grow = if operation.kind == Kind::Grow { grow } else { 0 };
                    let keep = operation.kind == Kind::MoveAndKeep;
                    let (len, new_len) = (of_one.len(), of_one.len() + grow);
                    let target = to..to + new_len;
                    let apart = target.end <= of_one.start || of_one.end <= target.start;
                    let both = apart && claims.change(process, &of_one, &[]);
                    if !both || !claims.change(process, &target, &[]) {
                        continue;
                    }
                    let flags = if keep { 1 | 4 } else { 1 };
                    let say = format!("remap {} {len} {new_len} {flags} {}", of_one.start * PAGE, to * PAGE);
                    let effect = Effect::Move { pages: of_one, to, grow, keep };
                    (say, Expected::Answer((to * PAGE).to_string()), Some(effect))
                }
                // As realloc does it: to wherever the kernel finds room, which may be where other memory is moved from
                // or unmapped at the same time.
                Kind::Regrow if !of_one.is_empty() && claims.change(process, &of_one, &[]) => {
                    let say = format!("remap {} {} 1 0", at(&of_one), of_one.len() + grow);
                    (say, Expected::Place(of_one, grow), None)
                }
                Kind::Fork if !started && self.processes.len() < MAX_PROCESSES && claims.fork(process) => {
                    started = true;
                    ("fork".to_owned(), Expected::Child, None)
                }
                Kind::Thread if !started && self.processes[process].threads.len() < THREADS => {
                    if claims.exits.contains(&process) || claims.forks.contains(&process) {
                        continue;
                    }
                    started = true;
                    // So that it does not exit meanwhile.
                    claims.reads.push((process, 0..0));
                    ("thread".to_owned(), Expected::Thread, None)
                }
                Kind::Exit if self.processes.len() > claims.exits.len() + 1 && claims.exit(process) => {
                    ("exit".to_owned(), Expected::Nothing, None)
                }
                Kind::Kill if !kill => {
                    kill = true;
                    count(seen, operation.kind);
                    continue;
                }
                _ => continue,
            };
            count(seen, operation.kind);
            self.processes[process].threads[thread].tell(&say);
            told.push((process, thread, expected));
            effects.extend(effect.map(|effect| (process, effect)));
        }
        if kill {
            // While it reads what was just begun, or does it.
            let until = Instant::now() + Duration::from_micros(fastrand::u64(..400));
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            self.keeper.as_mut().expect("it is another process").kill_worker();
        }
        for (process, pages) in remote {
            self.remote_read(process, &pages, &claims, image);
        }
        let mut child = None;
        let mut exited = Vec::new();
        for (process, thread, expected) in told {
            let toucher = &mut self.processes[process].threads[thread];
            match expected {
                Expected::Answer(expected) => assert_eq!(toucher.answer(), Some(expected)),
                Expected::Place(pages, grow) => {
                    let to = toucher.answer().expect("it lives").parse::<usize>().expect("an address") / PAGE;
                    effects.push((process, Effect::Move { pages, to, grow, keep: false }));
                }
                Expected::Nothing => {
                    assert_eq!(toucher.answer(), None);
                    exited.push(process);
                }
                Expected::Digests(pages) => {
                    let answer = toucher.answer().expect("it lives");
                    let digests: Vec<_> = answer.split_whitespace().map(ToOwned::to_owned).collect();
                    self.compare(process, pages, &digests, &claims, image);
                }
                Expected::Thread => {
                    let other = self.faulter.started(toucher);
                    self.processes[process].threads.push(other);
                }
                Expected::Child => {
                    let thread = self.faulter.started(toucher);
                    let removed = claims.removes.iter().filter(|(who, _)| *who == process);
                    let removed: Vec<_> = removed.map(|(_, pages)| pages.clone()).collect();
                    let memory = self.processes[process].memory.forked(&removed);
                    self.processes[process].has_forked = true;
                    child =
                        Some(Process { memory, threads: vec![thread], is_owner: false, has_forked: false });
                }
            }
        }
        self.take_effects(effects);
        if kill {
            // What was removed in this very batch may have been so before.
            let owner = self.processes.iter_mut().find(|process| process.is_owner);
            owner.into_iter().for_each(|owner| owner.memory.forget_told());
        }
        self.processes.extend(child);
        exited.sort_unstable();
        for process in exited.into_iter().rev() {
            self.processes.remove(process);
        }
        if changes {
            self.take_changes();
        }
    }

    /// Sees that what the first process has changed is told of.
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
        claims: &Claims,
        image: &[String],
    ) {
        assert_eq!(digests.len(), pages.len());
        for (page, digest) in pages.zip(digests) {
            let memory = &mut self.processes[process].memory;
            let shared = memory.shared(&(page..page + 1));
            let punched = shared.iter().any(|page| overlap(&claims.removes, SHARED, &(*page..page + 1)));
            if !punched && !overlap(&claims.removes, process, &(page..page + 1)) {
                let seen = memory.seen(page, digest, image, &self.shared);
                seen.unwrap_or_else(|wrong| panic!("process {process}: {wrong}"));
            }
        }
    }

    /// Reads from here, as a debugger does.
    fn remote_read(&mut self, process: usize, pages: &Range<usize>, claims: &Claims, image: &[String]) {
        let pid = self.processes[process].threads[0].pid;
        let (address, len) = (pages.start * PAGE, pages.len() * PAGE);
        let bytes = within(patience(), move || read_from_outside(pid, address, len)).expect("it can be read");
        assert_eq!(bytes.len(), len);
        let digests: Vec<_> = bytes.chunks(PAGE).map(page_digest).collect();
        self.compare(process, pages.clone(), &digests, claims, image);
    }

    /// What is unmapped and moved away first: something else may have gone there.
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
    fn end(mut self, image: &[String], seen: &Mutex<Seen>) {
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
                self.compare(process, pages, &digests, &Claims::default(), image);
            }
        }
        let mut seen = seen.lock().unwrap();
        if let Some(keeper) = &self.keeper {
            for (name, count) in postcopy::state_file::answers(keeper.state()).unwrap() {
                *seen.answers.entry(name).or_default() += count;
            }
        }
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

fn count(seen: &Mutex<Seen>, kind: Kind) {
    *seen.lock().unwrap().operations.entry(kind).or_default() += 1;
}

/// Has the server make a working set of some of the image's pages, in an order of their own.
fn make_working_set(source: &Source, name: &str) {
    let sets = || {
        let Value::Array(sets) = run(source.server.address(), ["working-set", "ls"]) else {
            panic!("no list")
        };
        sets.len()
    };
    let before = sets();
    let options = Options::DEFAULT.record(true);
    let session = Session::open(source.server.address(), &name.parse().unwrap(), options).unwrap();
    let region = session.map("mem").unwrap();
    for page in (0..IMAGE_PAGES).map(|i| i * 7 % IMAGE_PAGES).filter(|page| page % 40 < 15) {
        std::hint::black_box(region[page * PAGE]);
    }
    drop(region);
    assert!(session.close(MINUTE));
    session.wait_recorded(MINUTE).unwrap();
    wait_until("it is made", || sets() > before);
}

#[test]
fn random_operations_leave_what_the_model_says() {
    if !is_root() {
        return skip(
            "model::random_operations_leave_what_the_model_says",
            "forks are followed for root alone",
        );
    }
    let soak = std::env::var("POSTCOPY_SOAK_SECONDS").ok().map(|s| Duration::from_secs(s.parse().unwrap()));
    let seed = std::env::var("POSTCOPY_SEED").ok().map_or_else(|| fastrand::u64(..), |s| s.parse().unwrap());
    println!("POSTCOPY_SEED={seed}");
    let shrink = if std::env::var_os("POSTCOPY_NO_SHRINKING").is_some() { 0 } else { 200 };
    let mut bytes = memory_like(IMAGE_PAGES * PAGE, 90);
    bytes[300 * PAGE..420 * PAGE].fill(0);
    let image: Vec<_> = bytes.chunks(PAGE).map(page_digest).collect();
    let source = Source::start(bytes, CHUNK);
    source.push_again("large", LARGE_CHUNK);
    for name in ["app", "large"] {
        make_working_set(&source, name);
    }
    let frames = Arc::new(AtomicUsize::new(0));
    let twice = |lies: Lies| {
        let frames = Arc::clone(&frames);
        let lies = lies.set_frame(move |frame| {
            frames.fetch_add(1, Ordering::Relaxed);
            frame
        });
        lies.chunk(|_, answer| vec![answer.clone(); 1 + usize::from(fastrand::u8(..8) == 0)])
    };
    let ms = Duration::from_millis;
    let chaos = |lies| Chaos::start(source.server.address(), twice(lies));
    let (quick, late) = (chaos(Lies::default()), chaos(Lies::default().late(ms(2), ms(200))));
    let less_late = chaos(Lies::default().late(ms(3), ms(3)));
    let seen = Mutex::new(Seen::default());

    let scenario = |scenario: Scenario| {
        let (chaos, name) = match scenario.source {
            PageSource::Quick => (&quick, "app"),
            PageSource::Late => (&late, "app"),
            PageSource::Large => (&less_late, "large"),
        };
        let mut world = World::start(&chaos.address().to_string(), name, &scenario);
        for batch in &scenario.batches {
            world.batch(batch, &image, &seen);
        }
        world.end(&image, &seen);
        Ok(())
    };
    let started = Instant::now();
    for case in 0u64.. {
        let operations: usize = seen.lock().unwrap().operations.values().sum();
        if operations >= OPERATIONS && soak.is_none_or(|soak| started.elapsed() >= soak) {
            break;
        }
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&[seed.to_le_bytes(), case.to_le_bytes()].concat());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let (max_shrink_time, max_shrink_iters) = (60_000, shrink);
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_time,
            max_shrink_iters,
            ..Config::default()
        };
        let result = TestRunner::new_with_rng(config, rng).run(&any_scenario(), scenario);
        result.unwrap_or_else(|error| panic!("POSTCOPY_SEED={seed}, case {case}: {error}"));
    }
    let seen = seen.into_inner().unwrap();
    let frames = frames.load(Ordering::Relaxed);
    println!("{seen:?}, {frames} frames of working sets in {:?}", started.elapsed());
    assert!(frames >= FRAMES, "{frames} frames of working sets of at least {FRAMES}");
    for (_, kind, least) in KINDS {
        let count = seen.operations.get(&kind).copied().unwrap_or(0);
        assert!(count >= least, "{kind:?}: {count} of at least {least}");
    }
    for (name, least) in ANSWERS {
        assert!(
            seen.answers[name] >= least,
            "the kernel's {name:?}: {} of at least {least}",
            seen.answers[name]
        );
    }
}
