//! The cost of machines that are idle: the threads and descriptors of the worker that serves them.

use super::{Snapshot, with_root};
use postcopy_tests::vmm::Vmm;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The numbers of idle machines between which the cost of one is measured.
const FEW: usize = 10;
const MANY: usize = 40;
/// A worker is idle once its cost has not changed for this time.
const STEADY: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);

/// The threads and descriptors of a process, by their kinds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cost {
    threads: BTreeMap<String, usize>,
    descriptors: BTreeMap<String, usize>,
}

impl Cost {
    fn of(pid: i32) -> Self {
        let entries = |what| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().flatten();
        // A thread or a descriptor may end during the reading.
        let threads = entries("task").flat_map(|task| std::fs::read_to_string(task.path().join("comm")));
        let targets = entries("fd").flat_map(|fd| std::fs::read_link(fd.path()));
        let kind = |target: &str| {
            match target {
                _ if target.starts_with("socket:") => "socket",
                _ if target.contains("/vm-") => "state file",
                _ if target.ends_with("/pagemap") => "page tables",
                _ => target,
            }
            .to_owned()
        };
        Self {
            threads: counted(threads.map(|name| name.trim().to_owned())),
            descriptors: counted(targets.map(|target| kind(&target.to_string_lossy()))),
        }
    }

    /// Returns the cost of an idle process.
    fn of_idle(pid: i32) -> Self {
        let (mut cost, mut since) = (Self::of(pid), Instant::now());
        while since.elapsed() < STEADY {
            std::thread::park_timeout(PAUSE);
            let next = Self::of(pid);
            if next != cost {
                (cost, since) = (next, Instant::now());
            }
        }
        cost
    }
}

fn counted(kinds: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    kinds.for_each(|kind| *counts.entry(kind).or_default() += 1);
    counts
}

fn sum(counts: &BTreeMap<String, usize>) -> usize {
    counts.values().sum()
}

#[test]
fn an_idle_machine_costs_one_thread_and_seven_descriptors() {
    with_root("an_idle_machine_costs_one_thread_and_seven_descriptors", || {
        let snapshot = Snapshot::push(1);
        let mut daemon = snapshot.daemon(&[]);
        let worker = daemon.worker().as_raw_pid();
        let mut vmms: Vec<Vmm> = Vec::new();
        let mut cost_of = |count| {
            while vmms.len() < count {
                vmms.push(snapshot.vmm(&["small:1"]));
            }
            Cost::of_idle(worker)
        };
        let (few, many) = (cost_of(FEW), cost_of(MANY));
        assert!(vmms.iter_mut().all(|vmm| !vmm.has_ended()));
        let machines = MANY - FEW;
        let text = format!("{FEW} machines: {few:#?}\n{MANY} machines: {many:#?}");
        let (threads, descriptors) =
            (sum(&many.threads) - sum(&few.threads), sum(&many.descriptors) - sum(&few.descriptors));
        assert!(threads <= machines && descriptors <= 7 * machines, "{text}");
    });
}
