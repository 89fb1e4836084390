//! Installs a chunk's plain bytes as pages in memory.
//!
//! This module knows nothing of the bytes' source; its callers have verified them. It changes only
//! absent and poisoned pages, at most 64 KiB with one ioctl, so that the pager never waits long for
//! an installer.

pub(crate) mod chunk;
pub(crate) mod hand_over;
pub(crate) mod huge;

use crate::memory::{ChunkPages, InstallerPass, MemoryMap, PIECE_PAGES, PageState, Region, Spaces};
use crate::uffd::Outcome;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause before the next attempt, after the kernel refused one.
const PAUSE: Duration = Duration::from_micros(200);

static ZEROS: [u8; PIECE_PAGES * PAGE_BYTES] = [0; PIECE_PAGES * PAGE_BYTES];

/// Returns the states of pages that may be installed. Before Linux 6.6 a lost page is made
/// inaccessible, and stays so.
pub(crate) fn unresolved(region: &Region) -> &'static [PageState] {
    if region.space.uffd.can_poison() {
        &[PageState::Absent, PageState::Poisoned]
    } else {
        &[PageState::Absent]
    }
}

/// The outcome of installing a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// No work is left here: the pages are resident, removed or gone. Or a child's memory is still
    /// undecided, and another pass installs its pages.
    All,
    /// An event must be read before the next attempt.
    Deferred,
    /// The kernel lacks memory at the moment; the caller must retry.
    NoMemory,
    /// The session has ended.
    Ended,
}

/// The gate passages of successive installs into a region, from an installer's thread or from the
/// pager.
#[derive(Debug)]
pub(crate) struct Entrance<'a> {
    /// The map whose gate installers pass; `None` in the pager, which reads no event meanwhile.
    map: Option<&'a MemoryMap>,
    /// The spaces that held the region at the last passage.
    seen: Option<Arc<Spaces>>,
}

impl<'a> Entrance<'a> {
    pub(crate) fn new(map: Option<&'a MemoryMap>) -> Self {
        Self { map, seen: None }
    }

    /// Passes the gate as an installer, for one piece, if the region is unchanged.
    ///
    /// # Errors
    /// [`Installed::All`] if the region was moved or unmapped, or belongs to a child that is still
    /// undecided (another pass follows). [`Installed::Ended`] if the session has ended.
    pub(crate) fn enter(&mut self, region: &Region) -> Result<Option<InstallerPass<'a>>, Installed> {
        let Some(map) = self.map else {
            let is_closed = region.space.is_gone() || region.space.is_undecided();
            return if is_closed { Err(Installed::All) } else { Ok(None) };
        };
        let pass = map.gate.enter().ok_or(Installed::Ended)?;
        let spaces = map.spaces();
        let is_same = self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &spaces));
        let is_closed = region.space.is_gone() || region.space.is_undecided();
        if is_closed || !is_same && !spaces.holds(region) {
            return Err(Installed::All);
        }
        self.seen = Some(spaces);
        Ok(Some(pass))
    }
}

/// Installs the unresolved pages of a chunk in `region`, first those around region page `first`,
/// and wakes their waiters. `content` is the content of the chunk.
///
/// # Blocking
/// With a `map`, passes its gate as an installer for each piece. Without one, the caller must be
/// the pager.
pub(crate) fn install(
    map: Option<&MemoryMap>,
    region: &Region,
    chunk: ChunkIndex,
    content: &ChunkPages,
    first: Option<usize>,
) -> Installed {
    if region.gathering().is_some() {
        return huge::install(map, region, chunk, content);
    }
    let Some(all) = region.pages_of_chunk(chunk) else { return Installed::All };
    let piece_of = |page: usize| page - (region.place_in_chunk(page) % PIECE_PAGES).min(page - all.start);
    let middle = first.map_or(all.start, piece_of);
    for part in [middle..all.end, all.start..middle] {
        match install_part(map, region, &all, content, part, Guards::Possible) {
            Installed::All => {}
            other => return other,
        }
    }
    wake_shared(map, region, &all)
}

/// Installs one page of a chunk, and wakes its waiters.
pub(crate) fn install_page(
    region: &Region,
    chunk: ChunkIndex,
    content: &ChunkPages,
    page: usize,
) -> Installed {
    let all = region.pages_of_chunk(chunk).expect("a page of the chunk");
    install_part(None, region, &all, content, page..page + 1, Guards::Impossible)
}

/// The possibility of guard pages (MADV_GUARD_INSTALL). The kernel reports none, and UFFDIO_COPY
/// removes a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guards {
    /// Guard pages are possible, so they are searched for first.
    Possible,
    /// A thread has faulted on the page, so it is no guard page: an access to one raises SIGSEGV
    /// and causes no page fault.
    Impossible,
}

/// Installs the pages `part`; `all` are the region's pages of the chunk.
fn install_part(
    map: Option<&MemoryMap>,
    region: &Region,
    all: &Range<usize>,
    content: &ChunkPages,
    part: Range<usize>,
    guards: Guards,
) -> Installed {
    // A region may begin within a chunk.
    let place = region.place_in_chunk(all.start);
    install_runs(map, region, part, guards, |run| {
        let (piece, held) = content.piece(run.start - all.start + place..run.end - all.start + place);
        let len = piece.len();
        (len, held.then(|| content.bytes_of(piece)))
    })
}

/// Installs the unresolved of these pages. `bytes` are their padded bytes, or `None` for zeros.
///
/// # Blocking
/// The same as for [`install`].
pub(crate) fn install_pages(
    map: Option<&MemoryMap>,
    region: &Region,
    pages: Range<usize>,
    bytes: Option<&[u8]>,
) -> Installed {
    let start = pages.start;
    let installed = install_runs(map, region, pages.clone(), Guards::Possible, |run| {
        let len = run.len().min(PIECE_PAGES);
        let at = (run.start - start) * PAGE_BYTES;
        (len, bytes.map(|bytes| &bytes[at..at + len * PAGE_BYTES]))
    });
    match installed {
        Installed::All => wake_shared(map, region, &pages),
        other => other,
    }
}

/// Installs the unresolved pages of `pages`. For a run, `piece` returns the number of first pages
/// for one ioctl, at most 64 KiB, and their bytes, or `None` for zeros.
fn install_runs<'a>(
    map: Option<&MemoryMap>,
    region: &Region,
    pages: Range<usize>,
    guards: Guards,
    piece: impl Fn(Range<usize>) -> (usize, Option<&'a [u8]>),
) -> Installed {
    // One ioctl must stay within one VMA, and madvise and mprotect of a part split VMAs. So after
    // ENOENT the next ioctl covers one page.
    let (mut next, mut one_page) = (pages.start, false);
    let mut entrance = Entrance::new(map);
    while next < pages.end {
        let pass = match entrance.enter(region) {
            Ok(pass) => pass,
            Err(why) => return why,
        };
        let Some(run) = region.next_run(next..pages.end, unresolved(region)) else { break };
        let (len, bytes) = piece(run.start..if one_page { run.start + 1 } else { run.end });
        if guards == Guards::Possible
            && let Some(guarded) = first_guard(region, run.start..run.start + len)
        {
            // Guard pages have lost their content, and read zeros once the guard is removed.
            if region.set_removed(guarded.clone()).is_err() {
                return Installed::NoMemory;
            }
            region.space.wake(&region.addresses_of(&guarded));
            continue;
        }
        match install_piece(region, run.start..run.start + len, bytes) {
            Step::Next(page) => (next, one_page) = (page, false),
            Step::OnePage => one_page = true,
            Step::Stop(why) => return why,
        }
        drop(pass);
    }
    Installed::All
}

/// Returns the first run of guard pages among these. A guard in shared memory belongs to one
/// mapping, and the pages keep their content.
fn first_guard(region: &Region, pages: Range<usize>) -> Option<Range<usize>> {
    if region.is_shared() {
        return None;
    }
    let guarded = region.space.first_guard(&region.addresses_of(&pages))?;
    Some(region.pages_in(&guarded))
}

/// Wakes the waiters of this mapping: an install through another mapping of the memory does not
/// wake them.
///
/// The wake happens inside the gate. A wake removes pending faults from the queue. Outside the
/// gate, the pager could see such a fault, and then read an event instead, without having searched
/// for the thread that caused the event.
fn wake_shared(map: Option<&MemoryMap>, region: &Region, pages: &Range<usize>) -> Installed {
    if !region.is_shared() {
        return Installed::All;
    }
    match Entrance::new(map).enter(region) {
        Ok(_pass) => region.space.wake(&region.addresses_of(pages)),
        Err(why) => return why,
    }
    Installed::All
}

enum Step {
    /// Continue with this page.
    Next(usize),
    /// Try the first page alone.
    OnePage,
    Stop(Installed),
}

fn install_piece(region: &Region, pages: Range<usize>, bytes: Option<&[u8]>) -> Step {
    let uffd = &region.space.uffd;
    let (address, len) = (region.address(pages.start), pages.len() * PAGE_BYTES);
    // UFFDIO_ZEROPAGE reports poison as a present page; UFFDIO_COPY replaces it.
    let poisoned = region.next_run(pages.clone(), &[PageState::Poisoned]).is_some();
    let outcome = match bytes {
        Some(bytes) => uffd.copy(address, bytes),
        None if poisoned => uffd.copy(address, &ZEROS[..len]),
        None => uffd.zero(address, len),
    };
    match region.space.counted(outcome) {
        Outcome::Done => {
            region.set_resident(pages.clone());
            Step::Next(pages.end)
        }
        Outcome::Partial { bytes } => {
            let done = pages.start + bytes / PAGE_BYTES;
            region.set_resident(pages.start..done);
            Step::Next(done)
        }
        // The page was poisoned meanwhile. UFFDIO_ZEROPAGE reports poison as a present page; a copy
        // replaces it.
        Outcome::AlreadyPresent
            if bytes.is_none() && !poisoned && region.state(pages.start) == PageState::Poisoned =>
        {
            Step::Next(pages.start)
        }
        Outcome::AlreadyPresent => {
            // The other lane installed the page, another mapping did, or a pager that was killed
            // before it could note the install. Or a thread wrote to the page after a removal whose
            // event is unread.
            region.set_resident(pages.start..pages.start + 1);
            uffd.wake(address, PAGE_BYTES);
            Step::Next(pages.start + 1)
        }
        Outcome::Deferred => Step::Stop(Installed::Deferred),
        Outcome::NoMemory | Outcome::Unexpected { .. } => Step::Stop(Installed::NoMemory),
        Outcome::Gone if pages.len() > 1 => Step::OnePage,
        Outcome::Gone => {
            gone(region, pages.start);
            Step::Next(pages.end)
        }
        Outcome::OwnerGone => {
            region.space.set_gone();
            Step::Next(pages.end)
        }
    }
}

/// Makes each unresolved page of `pages` raise SIGBUS (before Linux 6.6: SIGSEGV), and wakes its
/// waiters. Returns false at once if no memory is left for the pages' states. Returns false after
/// `patience` without progress, because the kernel lacks memory or an event cannot be read.
///
/// Calls `read_events` when an event must be read first.
pub(crate) fn poison(
    map: &MemoryMap,
    region: &Region,
    pages: Range<usize>,
    patience: Duration,
    mut read_events: impl FnMut(),
) -> bool {
    const UNRESOLVED: [PageState; 2] = [PageState::Absent, PageState::Poisoned];
    let uffd = &region.space.uffd;
    let unit = region.pages_per_kernel_page();
    let mut next = pages.start;
    // The limit shrinks after an ioctl that met two VMAs, or memory that is gone.
    let mut most = usize::MAX;
    let mut progressed = Instant::now();
    let mut were_absent = 0..0;
    // Poisoned pages are included: poison belongs to one mapping, and a killed pager may have set
    // the state without poisoning all mappings.
    while let Some(run) = region.next_run(next..pages.end, &UNRESOLVED) {
        // An event that was read may have moved the region.
        if !map.spaces().holds(region) {
            return true;
        }
        let run = run.start..run.end.min(run.start.saturating_add(most));
        // The run is cut to pages in the state of its first page.
        let run = region.next_run(run.clone(), &[region.state(run.start)]).unwrap_or(run);
        if region.state(run.start) == PageState::Absent {
            // The state changes before the ioctl: an installer that finds poison on a page in state
            // absent would note the page as resident.
            if region.set_poisoned(run.clone()).is_err() {
                return false;
            }
            were_absent = run.clone();
        }
        let (address, len) = (region.address(run.start), run.len() * PAGE_BYTES);
        let before = next;
        next = match poison_run(region, address, len) {
            Outcome::Done => {
                uffd.wake(address, len);
                most = most.saturating_mul(2);
                run.end
            }
            Outcome::Partial { bytes } => {
                uffd.wake(address, bytes);
                run.start + bytes / PAGE_BYTES
            }
            Outcome::AlreadyPresent => {
                // An installer was faster, or the page is poisoned already.
                if were_absent.contains(&run.start) {
                    region.set_resident(run.start..run.start + unit);
                }
                uffd.wake(address, unit * PAGE_BYTES);
                run.start + unit
            }
            // The thread that caused the event must run before the kernel admits the ioctl.
            Outcome::Deferred => {
                read_events();
                std::thread::yield_now();
                run.start
            }
            Outcome::NoMemory | Outcome::Unexpected { .. } => {
                std::thread::park_timeout(PAUSE);
                run.start
            }
            Outcome::Gone if run.len() > unit => {
                most = (run.len() / 2).next_multiple_of(unit);
                run.start
            }
            Outcome::Gone => {
                gone(region, run.start);
                run.end
            }
            Outcome::OwnerGone => {
                region.space.set_gone();
                return true;
            }
        };
        if next > before {
            progressed = Instant::now();
        } else if progressed.elapsed() > patience {
            return false;
        }
    }
    true
}

fn poison_run(region: &Region, address: usize, len: usize) -> Outcome {
    let uffd = &region.space.uffd;
    if uffd.can_poison() {
        return region.space.counted(uffd.poison(address, len));
    }
    let page = (address - region.address(0)) / PAGE_BYTES;
    forbid(region, page..page + len / PAGE_BYTES);
    Outcome::Done
}

/// Handles a page that is not registered or not mapped.
///
/// While an event is unread the state stays, because the event may be a move. Without one, the loss
/// is final, and a page of private memory becomes removed, unless its space is yet to be
/// registered.
pub(crate) fn gone(region: &Region, page: usize) {
    let uffd = &region.space.uffd;
    if !uffd.has_event() && !region.is_shared() && region.space.is_registered() {
        // If the kernel lacks memory for this, the page stays absent, and its next fault repeats
        // the attempt.
        let _ = region.set_removed(region.extend_to_kernel_pages(&(page..page + 1)));
    }
    let addresses = region.kernel_page_addresses(page);
    uffd.wake(addresses.start, addresses.len());
}

/// Makes these pages inaccessible (SIGSEGV), for kernels before Linux 6.6.
fn forbid(region: &Region, pages: Range<usize>) {
    use crate::uffd::memory::forbid;
    if forbid(region.address(pages.start), pages.len() * PAGE_BYTES).is_ok() {
        return;
    }
    // Each run is a VMA of its own, and the process has reached its limit. Then the whole region is
    // protected, resident pages included.
    let all = forbid(region.address(0), region.len());
    all.expect("the protection of a whole mapping of our own can be taken away");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Object, ObjectKind, Place, Space, states_for};
    use crate::state_file::State;
    use crate::uffd::Uffd;
    use crate::uffd::memory::Memory;
    use postcopy_proto::manifest::FileEntry;

    const PAGES: usize = PIECE_PAGES;

    /// Maps and registers a region of one chunk.
    fn region(memory: &Memory) -> (MemoryMap, Region) {
        let state = State::own();
        let space = Arc::new(Space::new(0, Uffd::open(0).unwrap(), state.answers()));
        space.uffd.register(memory.start(), memory.len()).unwrap();
        let file =
            FileEntry { size_bytes: memory.len() as u64, first_chunk: ChunkIndex(0), executable: false };
        let states = states_for(state.arena(), &(0..PAGES), std::iter::once(0..PAGES)).unwrap();
        let object = Arc::new(Object::new(file, 0, states, ObjectKind::default(), memory.len()));
        let mut spaces = Spaces::default();
        spaces.add_space(Arc::clone(&space));
        let id = spaces.add_object(0, Arc::clone(&object));
        spaces.add(0, id, Place::Here, memory.start(), 0..PAGES);
        (MemoryMap::new(spaces), Region::new(space, object, memory.start(), 0..PAGES))
    }

    fn install_zeros(region: &Region) -> Installed {
        let mut content = ChunkPages::default();
        content.set_zeros(region.len());
        install(None, region, ChunkIndex(0), &content, None)
    }

    #[test]
    fn resident_pages_are_kept_and_absent_ones_installed() {
        let memory = Memory::reserve(PAGES * PAGE_BYTES).unwrap();
        let (_map, region) = region(&memory);
        // No state was noted for these pages: their installer was killed.
        for page in [0, 5, 6, 15] {
            let copied = region.space.uffd.copy(region.address(page), &[7; PAGE_BYTES]);
            assert_eq!(copied, Outcome::Done);
        }
        let two = region.space.uffd.zero(region.address(4), 2 * PAGE_BYTES);
        assert_eq!(two, Outcome::Partial { bytes: PAGE_BYTES });
        assert_eq!(region.space.uffd.zero(region.address(4), PAGE_BYTES), Outcome::AlreadyPresent);
        assert_eq!(install_zeros(&region), Installed::All);
        assert_eq!(region.count(PageState::Resident), PAGES);
        for (page, bytes) in memory.slice(PAGES * PAGE_BYTES).chunks(PAGE_BYTES).enumerate() {
            let byte = if [0, 5, 6, 15].contains(&page) { 7 } else { 0 };
            assert!(bytes.iter().all(|b| *b == byte), "page {page}");
        }
    }

    #[test]
    fn poison_leaves_resident_pages_alone() {
        let memory = Memory::reserve(PAGES * PAGE_BYTES).unwrap();
        let (map, region) = region(&memory);
        for page in [3, 9] {
            assert_eq!(region.space.uffd.copy(region.address(page), &[7; PAGE_BYTES]), Outcome::Done);
        }
        region.set_removed(12..13).unwrap();
        let minute = Duration::from_secs(60);
        assert!(poison(&map, &region, 1..PAGES, minute, || unreachable!("nobody causes an event")));
        let states = [(0, PageState::Absent), (1, PageState::Poisoned), (3, PageState::Resident)];
        for (page, state) in states.into_iter().chain([(9, PageState::Resident), (12, PageState::Removed)]) {
            assert_eq!(region.state(page), state, "page {page}");
        }
        // A late install replaces the poison.
        assert_eq!(install_zeros(&region), Installed::All);
        assert_eq!((region.count(PageState::Resident), region.count(PageState::Removed)), (PAGES - 1, 1));
        assert_eq!(memory.slice(PAGES * PAGE_BYTES)[PAGE_BYTES], 0);
    }

    #[test]
    fn memory_that_is_gone_is_left_alone() {
        let memory = Memory::reserve(PAGES * PAGE_BYTES).unwrap();
        let (map, region) = region(&memory);
        region.space.uffd.unregister(region.address(4), 4 * PAGE_BYTES).unwrap();
        assert_eq!(install_zeros(&region), Installed::All);
        assert_eq!(region.count(PageState::Resident), PAGES - 4);
        // No event reports this, so the removal is final.
        assert_eq!(region.count(PageState::Removed), 4);
        assert_eq!(map.spaces().unresolved(true), 0);
    }
}
