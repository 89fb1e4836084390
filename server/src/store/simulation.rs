//! Servers and collectors over one bucket, in many orders of their requests.
//!
//! The store's own code runs, each actor on a thread of its own. A request of an actor waits for its
//! turn: when all actors wait, a random one goes on. So a seed gives one order, where no hash map orders requests. The bucket's clock
//! is the simulation's, and every turn takes time, sometimes as long as leases last. An actor may
//! die at any request, like a process that is killed.

use crate::fixtures::Image;
use crate::store::{Bucket, Caller, Collector, CommitOutcome, Domain, Location, Store, StoreError, verify};
use futures_util::stream::{BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use postcopy_proto::provenance::Labels;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::{Duration, SystemTime};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Actor {
    Running,
    Waiting,
    Ended,
}

#[derive(Debug)]
struct State {
    random: fastrand::Rng,
    now: Duration,
    written: HashMap<Key, Duration>,
    actors: Vec<Actor>,
    /// The actor whose turn it is.
    turn: Option<usize>,
}

impl State {
    /// Gives a random actor its turn, if all of them wait.
    fn go_on(&mut self) {
        if self.turn.is_some() || self.actors.contains(&Actor::Running) {
            return;
        }
        let waiting: Vec<_> =
            (0..self.actors.len()).filter(|actor| self.actors[*actor] == Actor::Waiting).collect();
        self.turn = self.random.choice(waiting);
    }
}

#[derive(Debug)]
struct World {
    bucket: InMemory,
    state: Mutex<State>,
    changed: Condvar,
}

/// The bucket, as one actor reaches it.
#[derive(Debug)]
struct Seen {
    world: Arc<World>,
    actor: usize,
    /// The number of requests until the actor dies.
    lives_for: Mutex<u64>,
    /// Locked while one of the actor's threads waits for a turn.
    waiting: Mutex<()>,
}

impl Seen {
    /// Waits for the actor's turn. A write is on its way for a minute at most; before a reading, the
    /// actor may have been stopped for long.
    fn wait(&self, is_write: bool) -> Result<()> {
        let _one_at_a_time = self.waiting.lock().unwrap();
        let mut state = self.world.state.lock().unwrap();
        state.actors[self.actor] = Actor::Waiting;
        state.go_on();
        self.world.changed.notify_all();
        while state.turn != Some(self.actor) {
            state = self.world.changed.wait(state).unwrap();
        }
        state.turn = None;
        state.actors[self.actor] = Actor::Running;
        let stops = !is_write && state.random.u8(..) < 4;
        let seconds = if stops { state.random.u64(0..1500) } else { state.random.u64(0..20) };
        state.now += Duration::from_secs(seconds);
        drop(state);
        let mut lives_for = self.lives_for.lock().unwrap();
        *lives_for = lives_for.saturating_sub(1);
        match *lives_for {
            0 => Err(Error::Generic { store: "simulation", source: "the process is dead".into() }),
            _ => Ok(()),
        }
    }

    fn set_time(&self, meta: &mut ObjectMeta) {
        let state = self.world.state.lock().unwrap();
        let written = state.written.get(&meta.location).copied().unwrap_or_default();
        meta.last_modified = (SystemTime::UNIX_EPOCH + written).into();
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a simulated bucket")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Seen {
    async fn put_opts(&self, key: &Key, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.wait(true)?;
        let put = self.world.bucket.put_opts(key, payload, options).await?;
        let mut state = self.world.state.lock().unwrap();
        let now = state.now;
        state.written.insert(key.clone(), now);
        Ok(put)
    }

    async fn put_multipart_opts(&self, _: &Key, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unreachable!("the images are small")
    }

    async fn get_opts(&self, key: &Key, options: GetOptions) -> Result<GetResult> {
        self.wait(false)?;
        let mut result = self.world.bucket.get_opts(key, options).await?;
        self.set_time(&mut result.meta);
        Ok(result)
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        match self.wait(true) {
            Ok(()) => self.world.bucket.delete_stream(keys),
            Err(error) => futures_util::stream::iter([Err(error)]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.wait(false) {
            Ok(()) => self.world.bucket.list(prefix),
            Err(error) => futures_util::stream::iter([Err(error)]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        // The 256 directories of packs would be most of all requests.
        if !prefix.is_some_and(|prefix| prefix.as_ref().contains("/packs/")) {
            self.wait(false)?;
        }
        let mut listed = self.world.bucket.list_with_delimiter(prefix).await?;
        listed.objects.iter_mut().for_each(|meta| self.set_time(meta));
        Ok(listed)
    }

    async fn copy_opts(&self, _: &Key, _: &Key, _: CopyOptions) -> Result<()> {
        unreachable!("the store copies nothing")
    }
}

static IMAGES: LazyLock<[Image; 4]> = LazyLock::new(|| {
    [Image::of_seed(1), Image::with_more_chunks(1), Image::of_seed(2), Image::with_more_chunks(3)]
});
/// An image that keeps its reference. All its chunks are also chunks of the last one above.
static KEPT: LazyLock<Image> = LazyLock::new(|| Image::of_seed(3));
const NAMES: [&str; 3] = ["a", "b", "c"];

/// What an actor does, until it has done it or dies.
type Work = fn(&Location, &mut fastrand::Rng) -> std::result::Result<(), StoreError>;

fn push(place: &Location, random: &mut fastrand::Rng) -> std::result::Result<(), StoreError> {
    let store = Store::open(place.clone(), Domain::DEFAULT).map_err(|_| StoreError::Abandoned)?;
    for _ in 0..2 {
        let image = &IMAGES[random.usize(..IMAGES.len())];
        let reference = NAMES[random.usize(..NAMES.len())].parse().expect("a reference");
        let mut missing = store.find_missing(image.data_chunks().into_iter())?;
        for _ in 0..5 {
            if !missing.is_empty() {
                store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default())?;
            }
            store.put_segment(image.manifest.segments[0].clone())?;
            let root = image.manifest.root_bytes.clone();
            match store.commit(&reference, Labels::default(), root, &Caller::default()) {
                Ok(CommitOutcome::Committed(_)) => break,
                Ok(CommitOutcome::Missing(lost)) => missing = lost.chunks,
                Err(StoreError::Busy(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn change(place: &Location, random: &mut fastrand::Rng) -> std::result::Result<(), StoreError> {
    let store = Store::open(place.clone(), Domain::DEFAULT).map_err(|_| StoreError::Abandoned)?;
    for _ in 0..4 {
        let name = NAMES[random.usize(..NAMES.len())];
        let target = NAMES[random.usize(..NAMES.len())].parse().expect("a reference");
        let image = IMAGES[random.usize(..IMAGES.len())].digest();
        let changed = match random.u8(0..3) {
            0 => store.remove_reference(&target),
            1 => store.tag(&name.parse().expect("one"), &target, &Caller::default()).map(|_| ()),
            _ => {
                let source = format!("x@{image}").parse().expect("a reference");
                store.tag(&source, &target, &Caller::default()).map(|_| ())
            }
        };
        match changed {
            Ok(()) | Err(StoreError::NotFound(_) | StoreError::Busy(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn collect(place: &Location, random: &mut fastrand::Rng) -> std::result::Result<(), StoreError> {
    let collector = Collector::open(place.clone(), Domain::DEFAULT).map_err(|_| StoreError::Abandoned)?;
    for _ in 0..3 {
        if random.bool() {
            let min_age = [0, 60, 900][random.usize(..3)];
            collector.repack_and_condemn(Duration::from_secs(min_age))?;
        } else {
            collector.condemn()?;
        }
        let grace = [0, 60, 900][random.usize(..3)];
        match collector.sweep(Duration::from_secs(grace)) {
            Ok(_) | Err(StoreError::Busy(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads the image that keeps its reference, as servers do that start and go on. An error is a
/// failure.
fn read(place: &Location, random: &mut fastrand::Rng) -> std::result::Result<(), StoreError> {
    for _ in 0..6 {
        let store = Store::open(place.clone(), Domain::DEFAULT).map_err(|_| StoreError::Abandoned)?;
        let root = store.root(&KEPT.digest())?;
        // Its packs may be replaced after that.
        store.segment(&root, 0)?;
        for _ in 0..2 {
            KEPT.load(&store, random.u64(..12), true)?;
        }
    }
    Ok(())
}

/// Runs a simulation. Returns the damage of the store at its end.
fn simulate(seed: u64) -> String {
    let works: [Work; 7] = [push, push, change, change, collect, collect, read];
    let mut random = fastrand::Rng::with_seed(seed);
    let state = State {
        random: random.fork(),
        now: Duration::from_secs(1_000_000_000),
        written: HashMap::new(),
        actors: vec![Actor::Running; works.len()],
        turn: None,
    };
    let (state, changed) = (Mutex::new(state), Condvar::new());
    let world = Arc::new(World { bucket: InMemory::new(), state, changed });
    let reached_by = |store: Arc<dyn ObjectStore>| {
        let clock = world.clone();
        let bucket = Bucket::new(store, "store", "simulation:").unwrap();
        Location::Bucket(Arc::new(bucket.with_clock(move || clock.state.lock().unwrap().now)))
    };
    // Without turns: the beginning, and the end.
    let quiet = reached_by(Arc::new(world.bucket.clone()));
    let store = Store::open_or_create(quiet.clone(), Domain::DEFAULT).unwrap();
    IMAGES.iter().zip(NAMES).for_each(|(image, name)| image.push(&store, name));
    KEPT.push(&store, "kept");
    std::thread::scope(|scope| {
        for (actor, work) in works.into_iter().enumerate() {
            // Every third dies before its end.
            let lives_for = if random.u8(0..3) == 0 { random.u64(1..60) } else { u64::MAX };
            let (world, mut random) = (world.clone(), random.fork());
            let seen = Seen {
                world: world.clone(),
                actor,
                lives_for: Mutex::new(lives_for),
                waiting: Mutex::default(),
            };
            let place = reached_by(Arc::new(seen));
            scope.spawn(move || {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let outcome = work(&place, &mut random);
                    drop(place);
                    match outcome {
                        // It has died.
                        Ok(()) | Err(StoreError::Bucket { .. } | StoreError::Abandoned) => {}
                        Err(error) => panic!("seed {seed}, actor {actor}: {error}"),
                    }
                }));
                let mut state = world.state.lock().unwrap();
                state.actors[actor] = Actor::Ended;
                state.go_on();
                world.changed.notify_all();
                drop(state);
                outcome.unwrap();
            });
        }
    });
    let damage = verify(quiet, Domain::DEFAULT).unwrap().damage;
    if damage.is_empty() { String::new() } else { format!("seed {seed}: {damage:?}") }
}

/// No order of the requests of pushes, tags, removals and collectors that repack, no death and no
/// pause loses a part of an image that a reference names, or shows an error to a reader of it.
#[test]
fn no_order_of_requests_loses_what_a_reference_needs() {
    let seeds = std::env::var("POSTCOPY_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(2000);
    let (next, wrong) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < seeds)
                {
                    let damage = simulate(seed);
                    if !damage.is_empty() {
                        wrong.lock().unwrap().push(damage);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {seeds}: {:#?}", wrong.len(), &wrong[..wrong.len().min(3)]);
}
