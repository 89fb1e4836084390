//! Images that share most of their bytes, and clients that restore them and compare every byte.

use anyhow::{Context, Result, ensure};
use postcopy::{Options, ServerAddress, Session};
use postcopy_tests::PAGE;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bytes that all images have in common, and bytes of each alone.
const SHARED_BYTES: usize = 16 << 20;
const OWN_BYTES: usize = 8 << 20;
/// Pages that a client touches before the rest of the image is there.
const TOUCHES: usize = 100;
/// Time in which a server that was killed serves again, at most.
const PATIENCE: Duration = Duration::from_secs(30);

/// Images of different bytes, by number.
pub(crate) struct Images {
    bytes: Vec<Vec<u8>>,
}

/// The work of clients.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) restores: usize,
    /// Seconds of each touch, and of each restore until all of it was there.
    pub(crate) touches: Vec<f64>,
    pub(crate) complete: Vec<f64>,
    /// Wrong bytes, lost pages, and sessions that ended.
    pub(crate) failures: Vec<String>,
}

impl Images {
    pub(crate) fn new(count: usize) -> Self {
        let shared = memory_like(SHARED_BYTES, 100);
        let image = |number: usize| {
            let seed = number as u64;
            [&shared[..], &memory_like(OWN_BYTES / 2, seed), &noise(OWN_BYTES / 2, seed)].concat()
        };
        Self { bytes: (0..count).map(image).collect() }
    }

    /// Returns the percentages of the distinct bytes of so many images that all have in common, and
    /// that belong to one each.
    pub(crate) fn shares(count: usize) -> (u64, u64) {
        // The noise does not compress, and the rest to a fifth.
        let own = count * (OWN_BYTES / 2 + OWN_BYTES / 10);
        let shared = (100 * (SHARED_BYTES / 5) / (SHARED_BYTES / 5 + own)) as u64;
        (shared, 100 - shared)
    }

    pub(crate) fn count(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the name of an image.
    pub(crate) fn name(number: usize) -> String {
        format!("image-{number}")
    }

    /// Pushes all of them.
    pub(crate) fn push(&self, addresses: &[ServerAddress]) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("mem");
        for (number, (bytes, address)) in self.bytes.iter().zip(addresses.iter().cycle()).enumerate() {
            std::fs::write(&path, bytes)?;
            let _ = run(address, ["push".as_ref(), path.as_os_str(), Self::name(number).as_ref()]);
        }
        Ok(())
    }

    /// Restores an image: touches some pages, waits for all others, and compares every byte.
    pub(crate) fn restore(&self, address: &ServerAddress, number: usize, seed: u64) -> Result<Outcome> {
        let (bytes, started) = (&self.bytes[number], Instant::now());
        let session = open(address, number)?;
        let region = session.map("mem")?;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut touches = Vec::with_capacity(TOUCHES);
        for _ in 0..TOUCHES {
            let at = random.usize(..bytes.len() / PAGE) * PAGE + random.usize(..PAGE);
            let touched = Instant::now();
            ensure!(region[at] == bytes[at], "image {number} has a wrong byte at {at}");
            touches.push(touched.elapsed().as_secs_f64());
        }
        session.wait_resident(4 * PATIENCE).with_context(|| format!("image {number}"))?;
        let complete = vec![started.elapsed().as_secs_f64()];
        ensure!(region[..] == bytes[..], "image {number} has wrong bytes");
        Ok(Outcome { restores: 1, touches, complete, failures: Vec::new() })
    }

    /// Lets `clients` threads restore images until `time` is over. Each restore picks a server at
    /// random, as a balancer does.
    pub(crate) fn restore_by_many(
        &self,
        clients: usize,
        addresses: &[ServerAddress],
        time: Duration,
        seed: u64,
    ) -> Outcome {
        let (all, end) = (Mutex::new(Outcome::default()), Instant::now() + time);
        std::thread::scope(|scope| {
            for client in 0..clients {
                let all = &all;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed * 1000 + client as u64);
                    while Instant::now() < end {
                        let address = &addresses[random.usize(..addresses.len())];
                        let outcome = self.restore(address, random.usize(..self.count()), random.u64(..));
                        all.lock().expect("no holder panics").add(outcome);
                    }
                });
            }
        });
        all.into_inner().expect("no holder panics")
    }
}

impl Outcome {
    fn add(&mut self, other: Result<Self>) {
        match other {
            Ok(other) => {
                self.restores += other.restores;
                self.touches.extend(other.touches);
                self.complete.extend(other.complete);
            }
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }
}

/// Opens an image; retries while the server does not answer.
fn open(address: &ServerAddress, number: usize) -> Result<Session> {
    let reference = Images::name(number).parse()?;
    let started = Instant::now();
    loop {
        match Session::open(address, &reference, Options::DEFAULT.fill(true).fault_deadline(PATIENCE)) {
            Ok(session) => return Ok(session),
            Err(error) if started.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
}
