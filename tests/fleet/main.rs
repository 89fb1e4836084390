//! Three servers over a bucket of three Garage nodes, and 64 clients that restore images: `make
//! fleet`.
//!
//! First the tests that every kind of store passes run on Azurite, and on the bucket while a node
//! is killed and comes back. Then the CPU time of a block is measured, by the place from which a
//! server reads it. Then the clients restore images from empty caches, and the run is compared with
//! the model of a fleet. Then a server is killed every 2 s. At last everything fails: the disks of
//! the caches are full, a node of Garage is killed and comes back, and servers are killed as
//! before. Every client compares every byte.
//!
//! The model's figures for 100 servers and 10,000 restores a minute are printed at the end. The
//! exit status is 1 if a byte was wrong, a restore failed, or a bar was missed.

mod azurite;
mod balancer;
mod costs;
mod garage;
mod model;
mod restores;
mod servers;

use crate::azurite::Azurite;
use crate::balancer::Balancer;
use crate::garage::Garage;
use crate::model::{Costs, Shape, Work};
use crate::restores::{Images, Outcome};
use crate::servers::{SERVERS, Servers, Setting, postcopyd};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::panic::AssertUnwindSafe;
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const IMAGES: usize = 16;
const CLIENTS: usize = 64;
const BLOCK_BYTES: u64 = 256 << 10;
const MIB: usize = 1 << 20;
/// Time of each part of the run.
const PART: Duration = Duration::from_secs(40);
/// The node of Garage that is killed.
const KILLED_NODE: usize = 1;
/// Time for which a node of Garage runs, and for which it is dead.
const NODE_PAUSE: Duration = Duration::from_secs(5);
/// Time between two kills of servers.
const KILL_PAUSE: Duration = Duration::from_secs(2);
/// Most bytes that the servers read from the bucket, as a multiple of all packs' bytes.
const MOST_READ: f64 = 1.2;
/// Largest ratio of modelled to measured CPU time, or its inverse.
const MOST_APART: f64 = 1.3;

struct Fleet {
    garage: Garage,
    balancer: Balancer,
    images: Images,
    /// Bytes of all packs.
    pack_bytes: u64,
    missed: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let mut garage = Garage::start()?;
    let balancer = Balancer::start(garage.ports())?;
    conformance(&mut garage, &balancer)?;
    let mut fleet =
        Fleet { garage, balancer, images: Images::new(IMAGES), pack_bytes: 0, missed: Vec::new() };
    fleet.push()?;
    let costs = fleet.costs()?;
    fleet.undisturbed(&costs)?;
    fleet.with_kills()?;
    fleet.with_failures()?;
    what_is_needed(&costs);
    for missed in &fleet.missed {
        println!("MISSED: {missed}");
    }
    Ok(if fleet.missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the tests of all kinds of stores on Azurite, and on Garage while a node is killed and comes
/// back.
fn conformance(garage: &mut Garage, balancer: &Balancer) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let test = |args: &[&str]| {
        let mut test = Command::new(&cargo);
        test.args(["test", "--quiet", "--workspace", "--lib"]).args(args);
        test
    };
    ensure!(test(&["--no-run"]).status()?.success(), "the tests cannot be built");
    let conformance = || test(&["store::conformance", "--", "--test-threads=2"]);

    let (azurite, mut tests) = (Azurite::start()?, conformance());
    azurite.set(&mut tests);
    ensure!(tests.status()?.success(), "the tests of the store fail on Azurite");
    drop(azurite);

    let mut tests = conformance();
    tests.env("POSTCOPY_TEST_BUCKET", Garage::url("conformance"));
    Garage::set(&mut tests, balancer.port());
    let mut tests = tests.spawn()?;
    let outcome = kill_a_node_during(garage, &mut tests);
    if outcome.is_err() {
        let _ = (tests.kill(), tests.wait());
    }
    outcome
}

fn kill_a_node_during(garage: &mut Garage, tests: &mut Child) -> Result<()> {
    loop {
        std::thread::park_timeout(NODE_PAUSE);
        if let Some(status) = tests.try_wait()? {
            ensure!(status.success(), "the tests of the store fail on Garage");
            return Ok(());
        }
        // Always the same node: Garage needs two others until it has noticed that this one is back.
        garage.kill(KILLED_NODE)?;
        std::thread::park_timeout(NODE_PAUSE);
        garage.start_again(KILLED_NODE)?;
    }
}

impl Fleet {
    fn setting(&self, memory_mib: usize, disk_mib: usize) -> Setting {
        let (store, bucket) = (Garage::url("store"), self.balancer.port());
        Setting { store, bucket, memory_bytes: memory_mib * MIB, disk_bytes: disk_mib * MIB }
    }

    fn push(&mut self) -> Result<()> {
        let servers = Servers::start(self.setting(64, 64))?;
        self.images.push(&servers.addresses)?;
        drop(servers);
        let output = postcopyd(&self.setting(0, 0), "verify").arg("--json").output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let verified: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        self.pack_bytes = verified["pack_bytes"].as_u64().context("verify says the bytes of packs")?;
        println!("{IMAGES} images, {} MiB of packs", self.pack_bytes >> 20);
        Ok(())
    }

    /// Returns the count of blocks that all images have in common, and that each has alone.
    fn blocks(&self) -> (u64, u64) {
        let (shared, own) = Images::shares(IMAGES);
        let blocks = self.pack_bytes.div_ceil(BLOCK_BYTES);
        (blocks * shared / 100, blocks * own / 100 / IMAGES as u64)
    }

    fn costs(&self) -> Result<Costs> {
        let servers = Servers::start(self.setting(512, 1024))?;
        let (shared, own) = self.blocks();
        let all = IMAGES as u64 * (shared + own);
        let costs = costs::measure(&servers, &self.images, all, self.pack_bytes.div_ceil(BLOCK_BYTES))?;
        println!(
            "CPU time for a block of 256 KiB, in microseconds: {:.0} to serve it, and {:.0} from the disk, {:.0} from \
             a peer, {:.0} from the bucket",
            costs.serve * 1e6,
            costs.disk * 1e6,
            costs.peer * 1e6,
            costs.bucket * 1e6
        );
        Ok(costs)
    }

    /// Compares what the servers do with what the model says.
    fn undisturbed(&mut self, costs: &Costs) -> Result<()> {
        let (memory_mib, disk_mib) = (32, 1024);
        let servers = Servers::start(self.setting(memory_mib, disk_mib))?;
        let (cpu, received) = (servers.cpu_seconds(), self.balancer.received());
        let outcome = self.images.restore_by_many(CLIENTS, &servers.addresses, PART, 1);
        let (cpu, received) = (servers.cpu_seconds() - cpu, self.balancer.received() - received);
        self.check("undisturbed", &outcome);
        self.check_bytes("undisturbed", received);
        let (shared_blocks, own_blocks) = self.blocks();
        let shape = Shape {
            servers: SERVERS,
            images: IMAGES,
            shared_blocks,
            own_blocks,
            memory_blocks: memory_mib << 2,
            disk_blocks: disk_mib << 2,
            restores: outcome.restores,
            restores_per_second: outcome.restores,
            skew: 0.0,
        };
        let Work { blocks, .. } = shape.run(costs, 1);
        let modelled = costs.of(&blocks);
        println!(
            "model: {modelled:.1} CPU seconds and {} MiB from the bucket; measured: {cpu:.1} s and {} MiB",
            (blocks.bucket * BLOCK_BYTES) >> 20,
            received >> 20
        );
        let apart = (modelled / cpu).max(cpu / modelled);
        self.bar(apart <= MOST_APART, format!("CPU time is {apart:.2} x of the model's, or the inverse"));
        Ok(())
    }

    fn with_kills(&mut self) -> Result<()> {
        let servers = Servers::start(self.setting(32, 1024))?;
        let received = self.balancer.received();
        let outcome =
            while_killing(&servers, || self.images.restore_by_many(CLIENTS, &servers.addresses, PART, 2))?;
        self.check("a server killed every 2 s", &outcome);
        let received = self.balancer.received() - received;
        self.check_bytes("a server killed every 2 s", received);
        Ok(())
    }

    fn with_failures(&mut self) -> Result<()> {
        // Each has room for a part of what it reads.
        let servers = Servers::start(self.setting(32, 24))?;
        let images = &self.images;
        let third = PART / 3;
        for (seed, node) in [(3, None), (4, Some(KILLED_NODE)), (5, None)] {
            if let Some(node) = node {
                self.garage.kill(node)?;
            }
            let part = || images.restore_by_many(CLIENTS, &servers.addresses, third, seed);
            let outcome = while_killing(&servers, part)?;
            if let Some(node) = node {
                self.garage.start_again(node)?;
            }
            let what = match node {
                Some(_) => "the same without a node of Garage",
                None => "full disks, and a server killed every 2 s",
            };
            check(&mut self.missed, what, &outcome);
        }
        Ok(())
    }

    fn check(&mut self, what: &str, outcome: &Outcome) {
        check(&mut self.missed, what, outcome);
    }

    fn check_bytes(&mut self, what: &str, received: u64) {
        #[expect(clippy::cast_precision_loss, reason = "a quotient")]
        let read = received as f64 / self.pack_bytes as f64;
        println!("{what}: the servers read {read:.2} x of the packs' bytes from the bucket");
        self.bar(read <= MOST_READ, format!("{what}: {read:.2} x of the bytes, beyond {MOST_READ} x"));
    }

    fn bar(&mut self, is_met: bool, what: String) {
        if !is_met {
            self.missed.push(what);
        }
    }
}

/// Prints what clients have done, and notes failures.
fn check(missed: &mut Vec<String>, what: &str, outcome: &Outcome) {
    let ms = |values: &[f64], share: f64| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let at = (values.len().saturating_sub(1) as f64 * share) as usize;
        values.get(at).copied().unwrap_or(f64::NAN) * 1e3
    };
    println!(
        "{what}: {} restores, a touch {:.2} ms (p50), {:.0} ms (p99); complete after {:.0} ms (p50), {:.0} ms (p99)",
        outcome.restores,
        ms(&outcome.touches, 0.5),
        ms(&outcome.touches, 0.99),
        ms(&outcome.complete, 0.5),
        ms(&outcome.complete, 0.99),
    );
    missed.extend(outcome.failures.iter().map(|failure| format!("{what}: {failure}")));
}

/// Kills a server after the other while `work` goes on.
fn while_killing<T>(servers: &Servers, work: impl FnOnce() -> T) -> Result<T> {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| -> Result<usize> {
            let mut kills = 0;
            while !is_over.load(Ordering::Relaxed) {
                servers.replace(kills % SERVERS)?;
                kills += 1;
                std::thread::park_timeout(KILL_PAUSE);
            }
            Ok(kills)
        });
        // The killer ends also if this panics.
        let result = std::panic::catch_unwind(AssertUnwindSafe(work));
        is_over.store(true, Ordering::Relaxed);
        match killer.join() {
            Ok(kills) => println!("{} servers were killed", kills?),
            Err(_) => bail!("a server did not come up again"),
        }
        result.map_err(|_| anyhow!("a client panicked"))
    })
}

/// Prints what the model says of a large fleet.
#[expect(clippy::cast_precision_loss, reason = "counts")]
fn what_is_needed(costs: &Costs) {
    // A restore reads 32 MiB of packs. Half of that is common to all images.
    for (servers, memory_gib, disk_gib) in [(3, 16, 64), (10, 4, 16), (100, 1, 4)] {
        let (minutes, each_second) = (5, 10_000 / 60);
        let shape = Shape {
            servers,
            images: 1000,
            shared_blocks: 64,
            own_blocks: 64,
            memory_blocks: memory_gib << 12,
            disk_blocks: disk_gib << 12,
            restores: minutes * 60 * each_second,
            restores_per_second: each_second,
            skew: 0.9,
        };
        let Work { blocks, distinct_blocks, seconds } = shape.run(costs, 1);
        let most = |value: fn(&(u64, f64)) -> f64| seconds.iter().map(value).fold(0.0, f64::max);
        let last = seconds.len().saturating_sub(60);
        let late: u64 = seconds[last..].iter().map(|second| second.0).sum();
        println!(
            "{servers} servers with {memory_gib} GiB of memory and {disk_gib} GiB of disk each, 1,000 images, 10,000 \
             restores a minute: {:.2} cores on average, {:.2} in the busiest second of a server; {:.0} MiB/s sent to clients by \
             each; {:.0} reads of the bucket in the first second, {:.1} a second in the last minute; each block left \
             the bucket {:.2} times",
            costs.of(&blocks) / servers as f64 / seconds.len() as f64,
            most(|second| second.1),
            blocks.served as f64 / seconds.len() as f64 / servers as f64 / 4.0,
            most(|second| second.0 as f64),
            late as f64 / 60.0,
            blocks.bucket as f64 / distinct_blocks as f64,
        );
    }
}
