//! Random operations of several processes and threads on memory that is being filled, compared with
//! a model of it.
//!
//! Threads do the operations of a batch at once, and no two of a batch change the same page. So the
//! model knows the content of memory after each batch. The source of pages holds answers back,
//! reorders them, and sends some twice. The test kills and replaces the pager now and then. Some
//! scenarios have memory of 10,000 regions. In some of these, new processes get the pids of those
//! that have exited.

mod claims;
mod operations;
mod rounds;
mod world;

use crate::session::Source;
use operations::{KINDS, PageSource, Scenario, any_scenario};
use postcopy::{Options, Session};
use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::cli::run;
use postcopy_tests::faulter::page_digest;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use world::{IMAGE_PAGES, Seen, World};

/// The chunk sizes of the image `app`, and of `large`, whose chunks take so long to install that
/// both lanes meet.
const CHUNK: usize = 32 << 10;
const LARGE_CHUNK: usize = 1 << 20;
const MINUTE: Duration = Duration::from_secs(60);

/// The least number of operations in `make test`. `POSTCOPY_SOAK_SECONDS` makes the test longer,
/// `POSTCOPY_SEED` repeats the operations of a run, `POSTCOPY_NO_SHRINKING` shows the first failure
/// unchanged.
const OPERATIONS: usize = 20_000;

/// The least number of frames of working sets that the servers must send.
const FRAMES: usize = 20;
/// The least number of scenarios with many regions, and of children with the pid of a process that
/// has exited.
const MANY_SCENARIOS: usize = 2;
const REUSED_PIDS: usize = 5;

/// The least number of each of the kernel's answers and events.
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

/// Makes the server store a working set of some of the image's pages, in an order of their own.
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

/// Returns the content of the image: compressible pages, and a run of zeros.
fn image_bytes() -> Vec<u8> {
    let mut bytes = memory_like(IMAGE_PAGES * PAGE, 90);
    bytes[300 * PAGE..420 * PAGE].fill(0);
    bytes
}

/// The servers of scenarios. Each repeats some of its answers.
struct Servers {
    quick: Chaos,
    late: Chaos,
    less_late: Chaos,
    /// The frames of working sets that all of them have sent.
    frames: Arc<AtomicUsize>,
}

impl Servers {
    fn start(source: &Source) -> Self {
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
        Self { quick, late, less_late, frames }
    }

    /// Returns the server of a scenario, and its image.
    fn of(&self, source: PageSource) -> (&Chaos, &'static str) {
        match source {
            PageSource::Quick => (&self.quick, "app"),
            PageSource::Late => (&self.late, "app"),
            PageSource::Large => (&self.less_late, "large"),
        }
    }
}

/// The settings of a run, from the environment.
struct Settings {
    soak: Option<Duration>,
    seed: u64,
    shrink: u32,
}

impl Settings {
    fn new() -> Self {
        let variable = |name| std::env::var(name).ok();
        let soak = variable("POSTCOPY_SOAK_SECONDS").map(|s| Duration::from_secs(s.parse().unwrap()));
        let seed = variable("POSTCOPY_SEED").map_or_else(|| fastrand::u64(..), |s| s.parse().unwrap());
        let shrink = if std::env::var_os("POSTCOPY_NO_SHRINKING").is_some() { 0 } else { 200 };
        Self { soak, seed, shrink }
    }

    /// Returns the runner of one case. The seed and the case determine its scenario.
    fn runner(&self, case: u64) -> TestRunner {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&[self.seed.to_le_bytes(), case.to_le_bytes()].concat());
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_time: 60_000,
            max_shrink_iters: self.shrink,
            ..Config::default()
        };
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
    }
}

/// Asserts that the scenarios together did each operation, and got each answer, often enough.
fn assert_enough(seen: &Seen, frames: usize) {
    assert!(frames >= FRAMES, "{frames} frames of working sets of at least {FRAMES}");
    assert!(seen.many >= MANY_SCENARIOS, "{} scenarios with many regions", seen.many);
    assert!(seen.reused_pids >= REUSED_PIDS, "{} pids were given again", seen.reused_pids);
    for (_, kind, least) in KINDS {
        let count = seen.operations.get(&kind).copied().unwrap_or(0);
        assert!(count >= least, "{kind:?}: {count} of at least {least}");
    }
    for (name, least) in ANSWERS {
        let count = seen.answers[name];
        assert!(count >= least, "the kernel's {name:?}: {count} of at least {least}");
    }
}

#[test]
fn random_operations_leave_what_the_model_says() {
    if !is_root() {
        return skip(
            "model::random_operations_leave_what_the_model_says",
            "forks are followed for root alone",
        );
    }
    let settings = Settings::new();
    let seed = settings.seed;
    println!("POSTCOPY_SEED={seed}");
    let bytes = image_bytes();
    let image: Vec<_> = bytes.chunks(PAGE).map(page_digest).collect();
    let source = Source::start(bytes, CHUNK);
    source.push_again("large", LARGE_CHUNK);
    for name in ["app", "large"] {
        make_working_set(&source, name);
    }
    let servers = Servers::start(&source);
    let seen = Mutex::new(Seen::default());
    let scenario = |scenario: Scenario| {
        let (chaos, name) = servers.of(scenario.source);
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
        if operations >= OPERATIONS && settings.soak.is_none_or(|soak| started.elapsed() >= soak) {
            break;
        }
        let result = settings.runner(case).run(&any_scenario(case), scenario);
        result.unwrap_or_else(|error| panic!("POSTCOPY_SEED={seed}, case {case}: {error}"));
    }
    let seen = seen.into_inner().unwrap();
    let frames = servers.frames.load(Ordering::Relaxed);
    println!("{seen:?}, {frames} frames of working sets in {:?}", started.elapsed());
    assert_enough(&seen, frames);
}
