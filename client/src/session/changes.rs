//! Changes of memory since the restore. The page tables list the written pages; the pager has
//! recorded the removed pages from its events.

use crate::memory::{PageState, Region};
use crate::shared::Shared;
use crate::uffd::Outcome;
use postcopy_proto::page::PAGE_BYTES;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The pause between attempts while an unread event makes the kernel refuse an ioctl.
const PAUSE: Duration = Duration::from_micros(200);

/// The changes of memory, as runs of bytes in whole pages. The bytes are counted from a region's
/// beginning ([`crate::Region::changes`]), or are addresses of another process
/// ([`crate::Session::changes`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Pages that the program wrote to, or the kernel for it. Pages that were only read, and absent
    /// ones, are not included.
    pub written: Vec<Range<usize>>,
    /// Pages that madvise(2) removed, with or without a write before or after. A page that is
    /// removed and not written is zero; after MADV_FREE it is zero or keeps its content. A madvise
    /// in progress may be included before it has taken effect, so a program that copies the changes
    /// must not let a madvise run at the same time.
    pub removed: Vec<Range<usize>>,
}

/// Returns the changes of a region since its pages were installed, or since the last call with
/// `reset`.
pub(crate) fn of_region(region: &Region, shared: &Shared, reset: bool) -> io::Result<Changes> {
    // All states but poisoned, because poison looks like a written page. Absent pages are included:
    // a thread may write to a page shortly before the installer records it as resident.
    const NOT_LOST: [PageState; 3] = [PageState::Absent, PageState::Resident, PageState::Removed];
    if region.removals().is_none() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // A thread that removes pages continues once the pager has read the event, and the pager
    // records the removal before it leaves the gate. So after this pass all finished removals are
    // recorded. The pass is not kept: a signal handler in this thread may fault on an absent page,
    // and the pager would wait for this thread.
    let Some(pass) = shared.map.gate.enter() else { return Err(io::Error::other("the session has ended")) };
    drop(pass);
    // Taken before the scan for writes: a later removal belongs to the next period, and so do
    // writes after it.
    let removed = removed(region, reset);
    let mut found = Vec::new();
    let mut next = 0;
    let mut look = || {
        while let Some(run) = region.next_run(next..region.pages(), &NOT_LOST) {
            next = run.end;
            let addresses = region.address(run.start)..region.address(run.end);
            region.space.written(addresses, reset, |range, in_memory| {
                found.push((region.pages_in(&range), in_memory));
            })?;
        }
        if reset && !region.space.uffd.protects_by_scan() {
            protect(region, shared, found.iter().map(|(run, _)| run.clone()))?;
        }
        Ok(())
    };
    if let Err(error) = look() {
        if reset {
            let found: Vec<_> = found.into_iter().map(|(run, _)| run).collect();
            put_back(shared, region, &found, &removed);
        }
        return Err(error);
    }
    let mut written = Vec::new();
    for (run, in_memory) in found {
        if in_memory {
            push_run(&mut written, run);
            continue;
        }
        // The page is swapped out, or was poisoned during the scan.
        let mut next = run.start;
        while let Some(kept) = region.next_run(next..run.end, &NOT_LOST) {
            next = kept.end;
            push_run(&mut written, kept);
        }
    }
    let bytes = |runs: Vec<Range<usize>>| {
        runs.into_iter().map(|run| run.start * PAGE_BYTES..run.end * PAGE_BYTES).collect()
    };
    Ok(Changes { written: bytes(written), removed: bytes(removed) })
}

/// Returns the changes of memory in the process that a session was attached to, as addresses.
pub(crate) fn of_process(shared: &Shared, reset: bool) -> io::Result<Changes> {
    if !shared.options.track_writes {
        return Err(io::ErrorKind::Unsupported.into());
    }
    loop {
        let regions: Vec<_> = shared.spaces().regions_of(0).collect();
        let mut told = Vec::new();
        let looked: io::Result<()> = regions.iter().try_for_each(|region| {
            told.push(of_region(region, shared, reset)?);
            Ok(())
        });
        // Waits until the pager has recorded the events that it has read.
        drop(shared.map.gate.enter());
        let spaces = shared.spaces();
        let stay = regions.iter().all(|region| spaces.holds(region) || region.space.is_gone());
        if looked.is_ok() && stay {
            return Ok(at_addresses(&regions, told));
        }
        if reset {
            for (region, told) in regions.iter().zip(told) {
                let pages = |runs: Vec<Range<usize>>| -> Vec<_> {
                    runs.into_iter().map(|run| run.start / PAGE_BYTES..run.end / PAGE_BYTES).collect()
                };
                put_back(shared, region, &pages(told.written), &pages(told.removed));
            }
        }
        // The owner moved or cut memory during the scan, so scan it again at its new place.
        if stay {
            looked?;
        }
    }
}

/// Joins the changes of regions, as addresses.
fn at_addresses(regions: &[Region], told: Vec<Changes>) -> Changes {
    let mut all = Changes::default();
    for (region, Changes { written, removed }) in regions.iter().zip(told) {
        let start = region.address(0);
        let placed = |run: Range<usize>| start + run.start..start + run.end;
        written.into_iter().for_each(|run| push_run(&mut all.written, placed(run)));
        removed.into_iter().for_each(|run| push_run(&mut all.removed, placed(run)));
    }
    all
}

/// Returns changes to the next period, because this call could not report them. It finds the pages
/// where they are now, even if the owner has moved them.
fn put_back(shared: &Shared, region: &Region, written: &[Range<usize>], removed: &[Range<usize>]) {
    removed.iter().for_each(|run| region.record_removed(run.clone()));
    let started = Instant::now();
    for run in written {
        let unprotect = || {
            let mappings = shared.spaces().mappings(region, run);
            let mut places = mappings.into_iter().filter(|(space, _)| space.id == region.space.id);
            places.all(|(space, place)| space.uffd.unprotect(place) != Outcome::Deferred)
        };
        while !unprotect() && !shared.has_ended() && started.elapsed() < shared.options.fault_deadline {
            std::thread::park_timeout(PAUSE);
        }
    }
}

/// Returns the runs of removed pages since the last call with `reset`.
fn removed(region: &Region, reset: bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let Some(removals) = region.removals() else { return runs };
    let states = region.state_indices(0..region.pages());
    let words = states.start / 64..states.end.div_ceil(64);
    for (index, word) in
        words.clone().zip(&removals[words]).filter(|(_, word)| word.load(Ordering::Acquire) != 0)
    {
        let first = states.start.saturating_sub(index * 64);
        let end = (states.end - index * 64).min(64);
        let mask = u64::MAX >> (64 - end) & (u64::MAX << first);
        let bits = if reset { word.fetch_and(!mask, Ordering::AcqRel) } else { word.load(Ordering::Acquire) };
        for bit in (first..end).filter(|bit| bits >> bit & 1 == 1) {
            let page = index * 64 + bit - states.start;
            push_run(&mut runs, page..page + 1);
        }
    }
    runs
}

/// Write-protects written pages again. A write before the protection belongs to the present period.
fn protect(region: &Region, shared: &Shared, runs: impl Iterator<Item = Range<usize>>) -> io::Result<()> {
    let started = Instant::now();
    for run in runs {
        let addresses = region.address(run.start)..region.address(run.end);
        // In the gate the region is certain to lie at its addresses: an unread event makes the
        // ioctl fail.
        let protect = || {
            let Some(_pass) = shared.map.gate.enter() else { return Err(io::ErrorKind::BrokenPipe.into()) };
            if !shared.spaces().holds(region) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            region.space.uffd.protect(addresses.clone())
        };
        while !protect()? {
            if started.elapsed() > shared.options.fault_deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::park_timeout(PAUSE);
        }
    }
    Ok(())
}

/// Adds a run after all earlier runs, and joins it with the last one if they are adjacent.
fn push_run(runs: &mut Vec<Range<usize>>, run: Range<usize>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}
