//! From a chunk's plain bytes to its pages in memory.
//!
//! Knows nothing of where the bytes came from; they have been verified. Only pages that are absent or poisoned are
//! touched, at most 64 KiB in one ioctl, so that nobody waits long behind it.

pub(crate) mod chunk;
pub(crate) mod hand_over;
pub(crate) mod huge;

use crate::memory::{ChunkPages, InstallerPass, MemoryMap, PIECE_PAGES, PageState, Region, Spaces};
use crate::uffd::Outcome;
use postcopy_proto::page::{ChunkIndex, PAGE_BYTES};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between attempts of the kernel's that were put off.
const PAUSE: Duration = Duration::from_micros(200);

static ZEROS: [u8; PIECE_PAGES * PAGE_BYTES] = [0; PIECE_PAGES * PAGE_BYTES];

/// The states of pages that may be installed. Before Linux 6.6 a lost page is inaccessible, and stays so.
pub(crate) fn unresolved(region: &Region) -> &'static [PageState] {
    if region.space.uffd.can_poison() {
        &[PageState::Absent, PageState::Poisoned]
    } else {
        &[PageState::Absent]
    }
}

/// How installing a chunk went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// Nothing of it is left to do: its pages are resident, removed or gone.
    All,
    /// An event waits to be read first; then try again.
    Deferred,
    /// The kernel has no memory at the moment; try again.
    NoMemory,
    /// The session has ended.
    Ended,
}

/// Installs one after another into a region, from a thread of an installer or from the pager.
#[derive(Debug)]
pub(crate) struct Entrance<'a> {
    /// None: the pager itself installs, and no event is read meanwhile.
    map: Option<&'a MemoryMap>,
    /// The spaces that hold the region, as they were last seen.
    seen: Option<Arc<Spaces>>,
}

impl<'a> Entrance<'a> {
    pub(crate) fn new(map: Option<&'a MemoryMap>) -> Self {
        Self { map, seen: None }
    }

    /// Passes the gate as an installer, for one piece, if the region is still what it was.
    ///
    /// # Errors
    /// [`Installed::All`] if its memory was moved or unmapped, or is a child's that is undecided (another pass comes);
    /// [`Installed::Ended`].
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

/// Installs the pages of a chunk that `region` has and that are unresolved, those around region page `first` before the
/// others, and wakes who waits for them. `content` is what the chunk holds.
///
/// # Blocking
/// With a `map` it passes its gate as an installer for each piece; without one it must be the pager.
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
    let Some(all) = region.pages_of(chunk) else { return Installed::All };
    let piece_of = |page: usize| page - (region.place_in_chunk(page) % PIECE_PAGES).min(page - all.start);
    let middle = first.map_or(all.start, piece_of);
    for part in [middle..all.end, all.start..middle] {
        match install_part(map, region, &all, content, part, Guards::MayBe) {
            Installed::All => {}
            other => return other,
        }
    }
    wake_shared(map, region, &all)
}

/// Installs one page of a chunk, and wakes who waits for it.
pub(crate) fn install_page(
    region: &Region,
    chunk: ChunkIndex,
    content: &ChunkPages,
    page: usize,
) -> Installed {
    let all = region.pages_of(chunk).expect("a page of the chunk");
    install_part(None, region, &all, content, page..page + 1, Guards::CannotBe)
}

/// Whether pages may be guard pages (MADV_GUARD_INSTALL): the kernel tells of none, and UFFDIO_COPY lifts a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guards {
    /// Looks for them first.
    MayBe,
    /// A thread has faulted on the page; an access to a guard page is SIGSEGV, and no page fault.
    CannotBe,
}

/// Installs pages `part` of the region's pages `all` of a chunk.
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

/// Installs these pages of a region, as far as they are unresolved: their padded bytes, or None for zeros.
///
/// # Blocking
/// As [`install`].
pub(crate) fn install_pages(
    map: Option<&MemoryMap>,
    region: &Region,
    pages: Range<usize>,
    bytes: Option<&[u8]>,
) -> Installed {
    let start = pages.start;
    let installed = install_runs(map, region, pages.clone(), Guards::MayBe, |run| {
        let len = run.len().min(PIECE_PAGES);
        let at = (run.start - start) * PAGE_BYTES;
        (len, bytes.map(|bytes| &bytes[at..at + len * PAGE_BYTES]))
    });
    match installed {
        Installed::All => wake_shared(map, region, &pages),
        other => other,
    }
}

/// Installs what is unresolved of `pages`. `piece` says of such a run how many of its first pages, at most 64 KiB, are
/// installed by one ioctl, and gives their bytes, or None for zeros.
fn install_runs<'a>(
    map: Option<&MemoryMap>,
    region: &Region,
    pages: Range<usize>,
    guards: Guards,
    piece: impl Fn(Range<usize>) -> (usize, Option<&'a [u8]>),
) -> Installed {
    // One ioctl is for one VMA, and madvise or mprotect of a part splits them: then page by page.
    let (mut next, mut one_page) = (pages.start, false);
    let mut entrance = Entrance::new(map);
    while next < pages.end {
        let pass = match entrance.enter(region) {
            Ok(pass) => pass,
            Err(why) => return why,
        };
        let Some(run) = region.next_run(next..pages.end, unresolved(region)) else { break };
        let (len, bytes) = piece(run.start..if one_page { run.start + 1 } else { run.end });
        if guards == Guards::MayBe
            && let Some(guarded) = first_guard(region, run.start..run.start + len)
        {
            // They have lost their content, and are zero once the guard is lifted.
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

/// The first run of guard pages among these. Guards of shared memory are of one mapping, and its pages keep their content.
fn first_guard(region: &Region, pages: Range<usize>) -> Option<Range<usize>> {
    if region.is_shared() {
        return None;
    }
    let guarded = region.space.first_guard(&region.addresses_of(&pages))?;
    Some(region.pages_in(&guarded))
}

/// What came through another mapping has woken nobody here. In the gate, too: it takes away faults that the pager may just
/// have seen waiting, and what it reads in their place is an event whose caller it has not looked for.
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
    /// Go on with this page.
    Next(usize),
    /// Try the first page alone.
    OnePage,
    Stop(Installed),
}

fn install_piece(region: &Region, pages: Range<usize>, bytes: Option<&[u8]>) -> Step {
    let uffd = &region.space.uffd;
    let (address, len) = (region.address(pages.start), pages.len() * PAGE_BYTES);
    // UFFDIO_ZEROPAGE takes poison for a page that is there; a copy goes over it.
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
        // Lost in between: poison looks as if a page were there, and a copy goes over it.
        Outcome::AlreadyPresent
            if bytes.is_none() && !poisoned && region.state(pages.start) == PageState::Poisoned =>
        {
            Step::Next(pages.start)
        }
        Outcome::AlreadyPresent => {
            // It was installed by the other lane, through another mapping, or by a pager that was killed before it
            // could note that; or written after a removal whose event is still to be read.
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

/// Makes every unresolved page of `pages` SIGBUS, and wakes who waits for it. False: it could not be done within
/// `patience`, because the kernel has no memory, or an event cannot be read.
///
/// `read_events` is called when an event must be read first.
pub(crate) fn poison(
    map: &MemoryMap,
    region: &Region,
    pages: Range<usize>,
    patience: Duration,
    mut read_events: impl FnMut(),
) -> bool {
    const UNRESOLVED: [PageState; 2] = [PageState::Absent, PageState::Poisoned];
    let uffd = &region.space.uffd;
    let unit = region.unit();
    let mut next = pages.start;
    // Less where one ioctl meets two VMAs, or memory that is gone.
    let mut most = usize::MAX;
    let mut progressed = Instant::now();
    let mut were_absent = 0..0;
    // Those that are poisoned, too: poison belongs to a mapping, and whoever has set the state may have been killed.
    while let Some(run) = region.next_run(next..pages.end, &UNRESOLVED) {
        // An event that was read may have moved it.
        if !map.spaces().holds(region) {
            return true;
        }
        let run = run.start..run.end.min(run.start.saturating_add(most));
        // Of one state: what is at the beginning of the run is all over it.
        let run = region.next_run(run.clone(), &[region.state(run.start)]).unwrap_or(run);
        if region.state(run.start) == PageState::Absent {
            // Before the kernel is asked: poison that looks absent would be taken for a page that is there.
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
                // An installer was faster. Else it is poison that is there.
                if were_absent.contains(&run.start) {
                    region.set_resident(run.start..run.start + unit);
                }
                uffd.wake(address, unit * PAGE_BYTES);
                run.start + unit
            }
            // The event's causer must run before the kernel lets it through.
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

/// A page is no longer registered, or not mapped. If an event is to be read yet, that decides what becomes of it, which
/// may be that it has only been moved; else nothing will tell of it, and it is final. Or it is still to be registered.
pub(crate) fn gone(region: &Region, page: usize) {
    let uffd = &region.space.uffd;
    if !uffd.has_event() && !region.is_shared() && region.space.is_registered() {
        // Without memory for that the page stays absent, and its next fault comes here again.
        let _ = region.set_removed(region.whole(&(page..page + 1)));
    }
    let addresses = region.whole_addresses(page);
    uffd.wake(addresses.start, addresses.len());
}

/// Before Linux 6.6: no access at all to these pages, which is SIGSEGV.
fn forbid(region: &Region, pages: Range<usize>) {
    use crate::uffd::memory::forbid;
    if forbid(region.address(pages.start), pages.len() * PAGE_BYTES).is_ok() {
        return;
    }
    // Each run is a VMA of its own, and there are no more to be had: then all of the region, what is there, too.
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

    /// A region of one chunk, registered.
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
    fn pages_that_are_there_are_left_and_the_rest_comes() {
        let memory = Memory::reserve(PAGES * PAGE_BYTES).unwrap();
        let (_map, region) = region(&memory);
        // Nobody has noted these: their installer was killed.
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
    fn poison_goes_around_what_is_there() {
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
        // What comes after all goes over it.
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
        // Nothing tells of it, so that it is final.
        assert_eq!(region.count(PageState::Removed), 4);
        assert_eq!(map.spaces().unresolved(true), 0);
    }
}
