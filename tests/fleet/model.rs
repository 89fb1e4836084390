//! A model of a fleet: which server reads which blocks from where, and the CPU time that takes.
//!
//! It knows images only as blocks of packs. A server takes a block from its memory, or from the
//! pack's owner, which has it in memory, on its disk, or in the bucket; both keep it. The CPU time
//! of each step is measured by [`crate::costs`].

use fastrand::Rng;
use lru::LruCache;
use std::collections::HashSet;

/// Blocks of a pack of 16 MiB.
const PACK_BLOCKS: u64 = 64;

/// CPU seconds that a server takes for one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    /// To send it from memory, with its share of a restore's other requests.
    pub(crate) serve: f64,
    /// To read it from its disk.
    pub(crate) disk: f64,
    /// To get it from another server, that server's time included, its disk's not.
    pub(crate) peer: f64,
    /// To read it from the bucket, and to write it to its disk.
    pub(crate) bucket: f64,
}

/// A fleet, and the restores of its clients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) servers: usize,
    pub(crate) images: usize,
    /// Blocks that all images have in common, and blocks of each alone.
    pub(crate) shared_blocks: u64,
    pub(crate) own_blocks: u64,
    /// Blocks that fit into a server's memory, and onto its disk.
    pub(crate) memory_blocks: usize,
    pub(crate) disk_blocks: usize,
    /// The number of restores, and how many there are in a second.
    pub(crate) restores: usize,
    pub(crate) restores_per_second: usize,
    /// The exponent of Zipf's law for the images' popularity; 0 if all are alike.
    pub(crate) skew: f64,
}

/// Counts of blocks, by the place from which they came.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Blocks {
    pub(crate) served: u64,
    pub(crate) disk: u64,
    pub(crate) peer: u64,
    pub(crate) bucket: u64,
}

/// The work of a fleet.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) blocks: Blocks,
    pub(crate) distinct_blocks: u64,
    /// Of each second: the blocks from the bucket, and the CPU seconds of the busiest server.
    pub(crate) seconds: Vec<(u64, f64)>,
}

struct Server {
    memory: LruCache<u64, ()>,
    disk: LruCache<u64, ()>,
    /// CPU seconds in the present second.
    busy: f64,
}

impl Costs {
    /// Returns the CPU seconds of so many blocks.
    #[expect(clippy::cast_precision_loss, reason = "counts")]
    pub(crate) fn of(&self, blocks: &Blocks) -> f64 {
        let each = [
            (blocks.served, self.serve),
            (blocks.disk, self.disk),
            (blocks.peer, self.peer),
            (blocks.bucket, self.bucket),
        ];
        each.iter().map(|(count, cost)| *count as f64 * cost).sum()
    }
}

impl Shape {
    /// Lets the fleet work from empty caches on.
    pub(crate) fn run(&self, costs: &Costs, seed: u64) -> Work {
        let mut random = Rng::with_seed(seed);
        let capacity = |blocks: usize| blocks.try_into().expect("at least one block");
        let server = |_| Server {
            memory: LruCache::new(capacity(self.memory_blocks)),
            disk: LruCache::new(capacity(self.disk_blocks)),
            busy: 0.0,
        };
        let mut servers: Vec<_> = (0..self.servers).map(server).collect();
        let popularity = Popularity::new(self.images, self.skew);
        let (mut work, mut distinct) = (Work::default(), HashSet::new());
        for restore in 0..self.restores {
            if restore % self.restores_per_second == 0 {
                work.seconds.push((0, 0.0));
                servers.iter_mut().for_each(|server| server.busy = 0.0);
            }
            let at = random.usize(..self.servers);
            let image = popularity.pick(&mut random) as u64;
            let own = self.shared_blocks + image * self.own_blocks;
            for block in (0..self.shared_blocks).chain(own..own + self.own_blocks) {
                distinct.insert(block);
                let blocks = read(&mut servers, at, block, costs);
                work.blocks.add(&blocks);
                if let Some((from_bucket, busiest)) = work.seconds.last_mut() {
                    *from_bucket += blocks.bucket;
                    *busiest = busiest.max(servers[at].busy);
                }
            }
        }
        work.distinct_blocks = distinct.len() as u64;
        work
    }
}

/// Lets a server send a block.
fn read(servers: &mut [Server], at: usize, block: u64, costs: &Costs) -> Blocks {
    let mut blocks = Blocks { served: 1, ..Blocks::default() };
    if servers[at].memory.get(&block).is_none() {
        let owner = owner(servers.len(), block / PACK_BLOCKS);
        if owner != at {
            blocks.peer = 1;
        }
        if owner == at || servers[owner].memory.get(&block).is_none() {
            match servers[owner].disk.get(&block) {
                Some(()) => blocks.disk = 1,
                None => blocks.bucket = 1,
            }
            servers[owner].disk.put(block, ());
            servers[owner].memory.put(block, ());
        }
        servers[at].memory.put(block, ());
    }
    // The asking server is charged for the owner's work, too: the sum over all servers is the same.
    servers[at].busy += costs.of(&blocks);
    blocks
}

/// Returns the server that a pack belongs to: the one with the highest hash of both.
fn owner(servers: usize, pack: u64) -> usize {
    let hash = |server: &usize| Rng::with_seed(pack * 1_000_003 + *server as u64).u64(..);
    (0..servers).max_by_key(hash).unwrap_or(0)
}

/// Zipf's law: the image of rank n is picked in proportion to 1/n^skew.
struct Popularity {
    sums: Vec<f64>,
}

impl Popularity {
    #[expect(clippy::cast_precision_loss, reason = "ranks")]
    fn new(images: usize, skew: f64) -> Self {
        let mut sum = 0.0;
        let share = |rank: usize| {
            sum += ((rank + 1) as f64).powf(-skew);
            sum
        };
        Self { sums: (0..images).map(share).collect() }
    }

    fn pick(&self, random: &mut Rng) -> usize {
        let point = random.f64() * self.sums.last().copied().unwrap_or(0.0);
        self.sums.partition_point(|sum| *sum <= point).min(self.sums.len() - 1)
    }
}

impl Blocks {
    fn add(&mut self, other: &Self) {
        self.served += other.served;
        self.disk += other.disk;
        self.peer += other.peer;
        self.bucket += other.bucket;
    }
}
