//! The memory that a session fills: memory of this process, which the session maps itself; memory
//! of another process, which hands over its userfaultfd and a list of its regions; or memory that a
//! dead pager has left.

use crate::error::SessionError;
use crate::memory::HUGE_PAGES;
use crate::memory::{Object, ObjectKind, PageState, Place, Region, Space, Spaces, hull, states_for};
use crate::options::Options;
use crate::pager::events;
use crate::processes::Process;
use crate::remote::Image;
use crate::remote::ServerAddress;
use crate::shared::Shared;
use crate::state_file::{Contents, State, StateError, replay};
use crate::uffd::{self, Event, HUGE_BYTES, OpenError, Outcome, Uffd};
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pause between attempts while an unread event makes the kernel refuse an ioctl.
const PAUSE: Duration = Duration::from_micros(200);

/// The events that the pager needs for memory of its own process. EVENT_FORK is not one of them: a
/// fork of this process would wait for the pager, which may wait for a lock that the forking thread
/// holds.
const OWN_PROCESS_FEATURES: u64 = uffd::EVENT_REMOVE | uffd::EVENT_REMAP | uffd::EVENT_UNMAP;

/// A span of another process's address space that a span of an image's file fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignRegion {
    /// The first address, a multiple of the page size.
    pub address: usize,
    /// Length in bytes, a multiple of the page size; not zero.
    pub len: usize,
    /// The size of the memory's pages in bytes. 4096 is the size of ordinary memory, with or
    /// without transparent huge pages; 2 MiB is that of hugetlb. The kernel installs hugetlb pages
    /// only whole, so the first access to one waits for all of it.
    pub page_bytes: usize,
    /// The file's path in the image.
    pub path: Vec<u8>,
    /// The offset of the region's first byte in the file, a multiple of 4096. The file must have
    /// all pages of the region.
    pub offset_bytes: u64,
    /// The kind of mapping, private or shared.
    pub sharing: Sharing,
}

/// The kind of a mapping: it decides whether other mappings see a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Private anonymous memory, or a private mapping of a memfd or of a file on tmpfs. Do not use
    /// MADV_FREE on a private mapping of a file: the kernel reports the removal and then refuses
    /// the call, so that absent pages become zeros.
    #[default]
    Private,
    /// Shared anonymous memory, a memfd, or a file on tmpfs. Regions with the same number map the
    /// same memory where they map the same bytes of the image's file.
    ///
    /// Do not punch holes in this memory with fallocate(2), which the kernel does not report, and
    /// do not grow it with mremap(2). Poison covers one mapping only: another mapping without a
    /// userfaultfd of this session reads zeros where a page is absent or lost.
    Shared(u32),
}

/// Memory of another process, for [`crate::Session::attach`].
#[derive(Clone, Copy, Debug)]
pub struct ForeignMemory<'a> {
    /// The userfaultfd that the process has opened, with its API handshake done. The regions are
    /// registered with it, or will be: see `is_registered`.
    pub uffd: BorrowedFd<'a>,
    /// The regions to fill.
    pub regions: &'a [ForeignRegion],
    /// The state file for a successor, if this process may die before the session has ended: a file
    /// on tmpfs, or a memfd. Its old content is lost. See [`crate::Session::resume`].
    pub state: Option<&'a File>,
    /// The process. The session reads its page tables and its madvise calls, which it needs to
    /// track writes and to follow removals in shared memory. Without them, a madvise on shared
    /// memory with absent pages ends the session in an error.
    pub pid: Option<u32>,
    /// True if the regions are registered with the userfaultfd. If not, the process must register
    /// each one before the first access to it. The host then calls
    /// [`crate::session::host::Hosted::set_registered`] once all are registered. Until then the
    /// session should have no background fill.
    pub is_registered: bool,
}

/// The owner of a session's memory.
#[derive(Debug)]
pub(crate) enum Owner {
    ThisProcess,
    Another {
        uffd: OwnedFd,
        regions: Vec<ForeignRegion>,
        state: Option<File>,
        pid: Option<u32>,
        is_registered: bool,
    },
    /// A dead pager's memory. The descriptors are keyed by their numbers in the state file.
    Left {
        state: State,
        contents: Box<Contents>,
        uffds: HashMap<RawFd, OwnedFd>,
    },
}

impl Owner {
    /// Creates the shared state of a session over this memory.
    ///
    /// # Errors
    /// [`SessionError`]. No descriptor that this closes is the last one of its userfaultfd.
    pub(crate) fn share(
        self,
        address: ServerAddress,
        image: Arc<Image>,
        options: Options,
    ) -> Result<Shared, SessionError> {
        match self {
            Self::ThisProcess => {
                let state = State::own();
                let tracking =
                    if options.track_writes { uffd::PAGEFAULT_FLAG_WP | uffd::WP_ASYNC } else { 0 };
                let features = OWN_PROCESS_FEATURES | tracking;
                let space = Space::new(0, Uffd::open(features)?, state.answers()).of_this_process();
                let mut spaces = Spaces::default();
                spaces.add_space(Arc::new(space));
                Ok(Shared::new(address, image, options, spaces, 1, state, None))
            }
            Self::Another { uffd, regions, state, pid, is_registered } => {
                let tracks = options.track_writes;
                let owner = pid.and_then(Process::of);
                let uffd = Uffd::adopt(uffd, tracks)?;
                let state = match state {
                    None => State::own(),
                    Some(file) => State::create(file, &image.digest(), &options, owner)?,
                };
                let space = Space::new(0, uffd, state.answers()).of_process(owner);
                let space = Arc::new(if is_registered { space } else { space.unregistered() });
                if is_registered {
                    state.set_registered();
                }
                let spaces = spaces_of(&image, &space, &regions, &state, tracks)?;
                state.rewrite(&spaces, 1, None)?;
                // A predecessor without a state file may have read faults without answering them.
                wake_everybody(&spaces);
                Ok(Shared::new(address, image, options, spaces, 1, state, owner))
            }
            Self::Left { state, contents, uffds } => take_over(address, image, state, &contents, uffds),
        }
    }
}

/// Takes over the memory of a dead pager: processes the messages that the pager had read and not
/// processed, and wakes all waiters.
fn take_over(
    address: ServerAddress,
    image: Arc<Image>,
    state: State,
    contents: &Contents,
    mut uffds: HashMap<RawFd, OwnedFd>,
) -> Result<Shared, SessionError> {
    let mut spaces = BTreeMap::new();
    for (id, fd) in &contents.spaces {
        let uffd = uffds.remove(fd).ok_or_else(|| missing(*fd))?;
        let process = contents.processes.get(id).copied();
        let uffd = Uffd::adopt(uffd, contents.options.track_writes && *id == 0)?;
        let space = Space::new(*id, uffd, state.answers()).of_process(process);
        spaces.insert(*id, Arc::new(if contents.is_registered { space } else { space.unregistered() }));
    }
    let spaces = replay(&state, contents, &image, spaces)?;
    if spaces.has_huge() {
        spaces.regions().for_each(|region| region.complete_huge_pages());
    }
    let (options, next_space) = (contents.options, contents.next_space);
    let shared = Shared::new(address, image, options, spaces, next_space, state, contents.owner);
    if let Err(error) = catch_up(&shared, contents, uffds) {
        // The state file may name these descriptors already.
        shared.spaces().leave_open();
        return Err(error.into());
    }
    Ok(shared)
}

/// Processes the messages that the dead pager had read and not processed.
fn catch_up(
    shared: &Shared,
    contents: &Contents,
    mut uffds: HashMap<RawFd, OwnedFd>,
) -> Result<(), StateError> {
    // The descriptors have different numbers in this process.
    shared.state.rewrite(&shared.spaces(), contents.next_space, None)?;
    let of = shared.spaces().space(contents.messages_of).cloned();
    for (index, message) in contents.messages.iter().enumerate() {
        let event = Event::with_child(*message, |fd| uffds.remove(&fd));
        // If the process has exited since, its messages need no processing.
        if let Some(space) = &of {
            let done = contents.messages_done + index + 1;
            events::apply(shared, space, event, Some(&contents.calls), done).map_err(StateError::Wrong)?;
        }
    }
    record_removed_again(shared)?;
    wake_everybody(&shared.spaces());
    Ok(())
}

/// Counts all removed pages as removed and written again. Only the dead pager knew which removals
/// it had reported.
fn record_removed_again(shared: &Shared) -> Result<(), StateError> {
    let spaces = shared.spaces();
    let started = Instant::now();
    let tracked =
        |spaces: &Spaces| -> Vec<_> { spaces.regions().filter(|r| r.removals().is_some()).collect() };
    let mut regions = tracked(&spaces);
    while let Some(region) = regions.pop() {
        if unprotect_removed(&region)? {
            continue;
        }
        // An unread event is in the way. It may move or cut regions. Faults that this reads fault
        // again after the wake.
        for space in spaces.spaces() {
            match events::read(shared, space) {
                Err(stopped) if !stopped.may_pass || started.elapsed() > shared.options.fault_deadline => {
                    return Err(StateError::Wrong(stopped.reason));
                }
                _ => {}
            }
        }
        std::thread::park_timeout(PAUSE);
        regions = tracked(&shared.spaces());
    }
    Ok(())
}

/// Ends the write protection of the region's removed pages, and records their removal again.
/// Returns false if an event must be read first.
fn unprotect_removed(region: &Region) -> Result<bool, StateError> {
    let mut next = 0;
    while let Some(run) = region.next_run(next..region.pages(), &[PageState::Removed]) {
        next = run.end;
        let addresses = region.address(run.start)..region.address(run.end);
        if region.space.uffd.unprotect(addresses) == Outcome::Deferred {
            return Ok(false);
        }
        region.set_removed(run)?;
    }
    Ok(true)
}

/// Wakes all waiters, so that faults that a dead pager had read reach this one. The second range is
/// for processes of which the kernel refuses the first, or that have regions above it.
fn wake_everybody(spaces: &Spaces) {
    for space in spaces.spaces() {
        space.uffd.wake_all();
        if let Some(addresses) = spaces.hull_of(space.id) {
            space.wake(&addresses);
        }
    }
}

fn missing(fd: RawFd) -> OpenError {
    OpenError::Foreign(format!("for number {fd} of the state file is missing"))
}

/// Returns duplicates of the descriptors that a state file names, by their numbers in the file.
/// `given` returns a descriptor for its number.
///
/// # Errors
/// [`SessionError`], if `given` lacks a descriptor.
pub(crate) fn descriptors_left<'a>(
    contents: &Contents,
    mut given: impl FnMut(RawFd) -> Option<BorrowedFd<'a>>,
) -> Result<HashMap<RawFd, OwnedFd>, SessionError> {
    let duplicate = |fd: RawFd| {
        let duplicate = given(fd).ok_or_else(|| missing(fd))?.try_clone_to_owned();
        Ok((fd, duplicate.map_err(|source| SessionError::System { what: "a descriptor", source })?))
    };
    contents.descriptors().into_iter().map(duplicate).collect()
}

/// A region of another process that has passed all checks.
#[derive(Debug)]
struct Checked {
    address: usize,
    file: FileEntry,
    file_pages: Range<usize>,
    kind: ObjectKind,
    sharing: Sharing,
}

/// Returns the first spaces of a session: one space, with the regions of its owner.
///
/// # Errors
/// [`SessionError::Region`] for the first invalid region.
fn spaces_of(
    image: &Image,
    space: &Arc<Space>,
    regions: &[ForeignRegion],
    state: &State,
    tracks: bool,
) -> Result<Spaces, SessionError> {
    let checked = check(image, space, regions, tracks)?;
    let mut spaces = Spaces::default();
    spaces.add_space(Arc::clone(space));
    for group in objects_of(&checked) {
        let (first, kind) = (&checked[group[0]], checked[group[0]].kind);
        let pages = group.iter().map(|index| &checked[*index].file_pages);
        let hull = hull(pages.clone().cloned()).expect("a group has a region, and no region is empty");
        let states = states_for(state.arena(), &hull, pages.cloned()).map_err(StateError::from)?;
        let object = Object::new(first.file, hull.start, states, kind, image.root().chunk_size().bytes());
        let object = spaces.add_object(space.id, Arc::new(object));
        for region in group.iter().map(|index| &checked[*index]) {
            spaces.add(space.id, object, Place::Here, region.address, region.file_pages.clone());
        }
    }
    if tracks {
        for region in spaces.regions() {
            let registered = space.uffd.register(region.address(0), region.len());
            registered.map_err(|error| SessionError::NoTracking(error.to_string()))?;
        }
    }
    Ok(spaces)
}

/// Groups regions into objects, and returns the indices of each group. A group has all mappings of
/// the same shared memory, or private regions of which no two have a page of the file in common.
fn objects_of(regions: &[Checked]) -> Vec<Vec<usize>> {
    /// The largest gap in the file between neighbours in a group, 4 GiB, which keeps the tables of
    /// page states small.
    const FAR_PAGES: usize = 1 << 20;
    let mut shared: BTreeMap<(u32, u64), Vec<usize>> = BTreeMap::new();
    let mut private: Vec<usize> = Vec::new();
    for (index, region) in regions.iter().enumerate() {
        match region.sharing {
            Sharing::Shared(object) => {
                shared.entry((object, region.file.first_chunk.0)).or_default().push(index)
            }
            Sharing::Private => private.push(index),
        }
    }
    // Huge pages must begin at multiples of 512 pages from their object's beginning.
    let class = |index: usize| {
        let Checked { file, file_pages, kind, .. } = &regions[index];
        (file.first_chunk.0, kind.is_huge, if kind.is_huge { file_pages.start % HUGE_PAGES } else { 0 })
    };
    private.sort_unstable_by_key(|index| (class(*index), regions[*index].file_pages.start));
    let mut objects: Vec<Vec<usize>> = shared.into_values().collect();
    // The groups of the current class that a region can join, by the page after their last region.
    let mut open: BTreeMap<(usize, usize), ()> = BTreeMap::new();
    let mut last_class = None;
    for index in private {
        if last_class.replace(class(index)) != Some(class(index)) {
            open.clear();
        }
        let pages = &regions[index].file_pages;
        let before = open.range(..=(pages.start, usize::MAX)).next_back().map(|(key, ())| *key);
        let number = match before.filter(|(end, _)| pages.start - end <= FAR_PAGES) {
            Some(key) => {
                open.remove(&key);
                key.1
            }
            None => {
                objects.push(Vec::new());
                objects.len() - 1
            }
        };
        objects[number].push(index);
        open.insert((pages.end, number), ());
    }
    objects
}

/// Checks the regions that a process has registered.
///
/// # Errors
/// [`SessionError::Region`] for the first invalid region.
fn check(
    image: &Image,
    space: &Arc<Space>,
    regions: &[ForeignRegion],
    tracks: bool,
) -> Result<Vec<Checked>, SessionError> {
    if tracks && !uffd::pagemap_scan_works() {
        return Err(SessionError::NoTracking("the kernel lacks PAGEMAP_SCAN (Linux 6.7)".into()));
    }
    if tracks && !space.has_pagemap() {
        let reason = "it needs the process's pid, and the right to read /proc/PID/pagemap";
        return Err(SessionError::NoTracking(reason.into()));
    }
    let mut checked = Vec::with_capacity(regions.len());
    let mut files: HashMap<&[u8], FileEntry> = HashMap::new();
    // By address: the region's end and its index.
    let mut placed: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    // By number of shared memory and by file: the pages that regions have.
    let mut objects: HashMap<(u32, u64), Range<usize>> = HashMap::new();
    for (index, region) in regions.iter().enumerate() {
        let ForeignRegion { address, len, page_bytes, .. } = *region;
        let wrong = |reason: String| SessionError::Region { index, address, len, reason };
        let end = address.checked_add(len).ok_or_else(|| wrong("its end is beyond all addresses".into()))?;
        if ![PAGE_BYTES, HUGE_BYTES].contains(&page_bytes) {
            return Err(wrong(format!(
                "it has pages of {page_bytes} bytes; only 4096 bytes and 2 MiB are supported"
            )));
        }
        if len == 0 || !address.is_multiple_of(page_bytes) || !len.is_multiple_of(page_bytes) {
            let rule =
                format!("its address and length must be multiples of {page_bytes}, and the length not zero");
            return Err(wrong(rule));
        }
        // The earlier regions are disjoint. So only the last one that begins before this one's end
        // can overlap it.
        if let Some((_, (other_end, other))) = placed.range(..end).next_back()
            && address < *other_end
        {
            return Err(wrong(format!("it overlaps region {other}")));
        }
        placed.insert(address, (end, index));
        let path = String::from_utf8_lossy(&region.path);
        let file = match files.get(&*region.path) {
            Some(file) => *file,
            None => {
                image.file(&region.path).ok_or_else(|| wrong(format!("no file {path:?} of the image")))?
            }
        };
        files.insert(&region.path, file);
        let pages = pages(region.offset_bytes, len)
            .filter(|pages| pages.end <= to_usize(file.size_bytes).div_ceil(PAGE_BYTES))
            .filter(|pages| u32::try_from(pages.len()).is_ok())
            .ok_or_else(|| {
                let (offset, size) = (region.offset_bytes, file.size_bytes);
                wrong(format!(
                    "{path:?} has {size} bytes, which is too short for these pages from byte {offset} on"
                ))
            })?;
        if let Sharing::Shared(object) = region.sharing {
            let span = objects.entry((object, file.first_chunk.0)).or_insert(pages.clone());
            if !span.start.abs_diff(pages.start).is_multiple_of(page_bytes / PAGE_BYTES) {
                return Err(wrong(
                    "it does not lie a whole number of pages from other regions of the same memory".into(),
                ));
            }
            *span = span.start.min(pages.start)..span.end.max(pages.end);
        }
        let not_registered = || wrong("it has no memory registered with this userfaultfd".into());
        let found = match space.uffd.is_huge(address) {
            Err(_) if !space.is_registered() => None,
            is_huge => is_huge.map_err(|_| not_registered())?,
        };
        if tracks && region.sharing != Sharing::Private {
            let reason =
                format!("region {index} is shared memory, to which other processes can write untracked");
            return Err(SessionError::NoTracking(reason));
        }
        let is_huge = page_bytes == HUGE_BYTES;
        if found == Some(!is_huge) {
            let found = if is_huge { "4096 bytes" } else { "2 MiB" };
            return Err(wrong(format!(
                "it was declared with pages of {page_bytes} bytes, and has such of {found}"
            )));
        }
        let is_shared = region.sharing != Sharing::Private;
        let kind = ObjectKind { is_shared, is_huge, tracks_removals: tracks };
        let sharing = region.sharing;
        checked.push(Checked { address, file, file_pages: pages, kind, sharing });
    }
    Ok(checked)
}

/// Returns the pages of a file from a byte on. Returns None if no page begins there, or if the end
/// overflows.
fn pages(offset_bytes: u64, len: usize) -> Option<Range<usize>> {
    let offset = usize::try_from(offset_bytes).ok().filter(|offset| offset.is_multiple_of(PAGE_BYTES))?;
    Some(offset / PAGE_BYTES..offset.checked_add(len)? / PAGE_BYTES)
}
