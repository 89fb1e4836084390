//! A million regions over many processes, and the memory that the state of regions and of pages
//! takes.

use crate::Figure;
use anyhow::{Result, ensure};
use nix::libc;
use postcopy::SharedPager;
use postcopy::proto::page::PAGE_BYTES;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::many_regions::{Layout, ManyRegions};
use postcopy_tests::stored::StoredFile;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;
const PROCESSES: usize = 64;
const REGIONS: usize = 1_000_000;
/// The number of regions of each process that are accessed.
const TOUCHED: usize = 64;

const FEW: usize = 100;
const MANY: usize = 60_000;
/// A region whose states take a whole block of the state file.
const BLOCK_PAGES: usize = 16_384;
const BLOCKS: usize = 1024;
/// The time after which the memory that an attach frees in the background is free.
const SETTLED: Duration = Duration::from_millis(300);

/// The memory of sessions: what this process has allocated, and their state files.
#[derive(Clone, Copy)]
struct Memory {
    heap: u64,
    state: u64,
}

impl Memory {
    /// Returns the memory that starting these processes takes. They have one session each.
    fn of(start: impl FnOnce() -> Vec<ManyRegions>) -> (Self, Vec<ManyRegions>) {
        let before = heap_bytes();
        let started = start();
        std::thread::park_timeout(SETTLED);
        let heap = heap_bytes().saturating_sub(before);
        (Self { heap, state: started.iter().map(ManyRegions::state_bytes).sum() }, started)
    }

    /// Returns how much more this is than the other, divided among so many.
    #[expect(clippy::cast_precision_loss, reason = "a quotient")]
    fn more_than(self, other: Self, count: usize) -> [f64; 2] {
        let each = |more: u64, less: u64| more.saturating_sub(less) as f64 / count as f64;
        [each(self.heap, other.heap), each(self.state, other.state)]
    }
}

/// Returns the number of bytes that this process has allocated and not freed, with the allocator's
/// own data.
fn heap_bytes() -> u64 {
    #[expect(unsafe_code, reason = "the allocator of the C library")]
    // SAFETY: it has no preconditions.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

pub(crate) fn measure() -> Result<Vec<Figure>> {
    Ok(vec![a_million()?, region_bytes(), page_bits()])
}

fn a_million() -> Result<Figure> {
    let each = REGIONS / PROCESSES;
    let source = Arc::new(StoredFile::start(memory_like(each * PAGE_BYTES, 99), CHUNK));
    let pagers = (0..crate::cpu::cores()).map(|_| SharedPager::new()).collect::<Result<Vec<_>, _>>()?;
    let layout = Layout { regions: each, region_pages: 1, beyond: 0 };
    let (memory, mut processes) = Memory::of(|| {
        let start = |process| ManyRegions::attach(&source, layout, Some(&pagers[process % pagers.len()]));
        (0..PROCESSES).map(start).collect()
    });
    let attached: Duration = processes.iter().map(|process| process.attached).sum();
    let started = Instant::now();
    for touch in 0..TOUCHED {
        for (number, process) in processes.iter_mut().enumerate() {
            process.assert_reads((touch * each / TOUCHED + number * 241) % each);
        }
    }
    let touched = started.elapsed();
    for process in &processes {
        ensure!(process.session.error().is_none(), "{:?}", process.session.error());
    }
    let count = TOUCHED * PROCESSES;
    let ms_each = touched.as_secs_f64() * 1000.0 / count as f64;
    let mib = [memory.heap >> 20, memory.state >> 20];
    Ok(Figure {
        name: format!("{REGIONS} regions over {PROCESSES} processes, {} shared pagers", pagers.len()),
        value: format!(
            "**served**: attached in {:.2} s, {count} touches with right bytes of {ms_each:.2} ms on average, {} MiB of heap and {} MiB of state files",
            attached.as_secs_f64(),
            mib[0],
            mib[1]
        ),
        bar: "served".to_owned(),
        met: true,
        raw: json!({ "attached_seconds": attached.as_secs_f64(), "touched_seconds": touched.as_secs_f64(),
            "heap_bytes": memory.heap, "state_bytes": memory.state }),
    })
}

fn region_bytes() -> Figure {
    let source = Arc::new(StoredFile::start(memory_like(MANY * PAGE_BYTES, 100), CHUNK));
    let start = |regions| {
        let layout = Layout { regions, region_pages: 1, beyond: 0 };
        Memory::of(|| vec![ManyRegions::attach(&source, layout, None)])
    };
    // The first session makes what all sessions of a process share.
    let _warm = start(FEW);
    let [(few, _few), (many, _many)] = [FEW, MANY].map(start);
    let [heap, state] = many.more_than(few, MANY - FEW);
    let bytes = heap + state;
    Figure {
        name: format!("state of a region, from {FEW} to {MANY} regions"),
        value: format!("**{bytes:.0} bytes** (heap {heap:.0}, state file {state:.0})"),
        bar: "≤ 96 bytes".to_owned(),
        met: bytes <= 96.0,
        raw: json!({ "heap_bytes": heap, "state_bytes": state }),
    }
}

/// Returns the bits that the state of a page takes if no block of states is left out: one page of
/// each block is resident.
fn page_bits() -> Figure {
    let source = Arc::new(StoredFile::start(memory_like(BLOCK_PAGES * PAGE_BYTES, 101), CHUNK));
    let start = |regions| {
        let layout = Layout { regions, region_pages: BLOCK_PAGES, beyond: 0 };
        Memory::of(|| {
            let mut process = ManyRegions::attach(&source, layout, None);
            (0..regions).for_each(|region| process.assert_reads(region));
            vec![process]
        })
    };
    let _warm = start(1);
    let [(few, _few), (many, _many)] = [1, BLOCKS].map(start);
    let [heap, state] = many.more_than(few, (BLOCKS - 1) * BLOCK_PAGES).map(|bytes| bytes * 8.0);
    let bits = heap + state;
    Figure {
        name: format!("state of a page, from {BLOCK_PAGES} to {} pages", BLOCKS * BLOCK_PAGES),
        value: format!("**{bits:.2} bits** (heap {heap:.2}, state file {state:.2})"),
        bar: "≤ 3 bits".to_owned(),
        met: bits <= 3.0,
        raw: json!({ "heap_bits": heap, "state_bits": state }),
    }
}
