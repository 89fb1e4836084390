//! Whose memory a session fills: this process's own, which it maps itself; another one's, of which it gets the
//! userfaultfd and is told what lies where; or what a pager that has died has left.

use crate::error::SessionError;
use crate::memory::HUGE_PAGES;
use crate::memory::{Object, ObjectKind, PageState, Place, Region, Space, Spaces, hull, states_for};
use crate::options::Options;
use crate::pager::events;
use crate::processes;
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

/// Between attempts of the kernel's that were put off.
const PAUSE: Duration = Duration::from_micros(200);

/// What the pager needs of the kernel in the process's own memory. EVENT_FORK is not among it: a fork of this
/// process would wait for the pager, which may wait for a lock that the forking thread holds.
const OWN_PROCESS_FEATURES: u64 = uffd::EVENT_REMOVE | uffd::EVENT_REMAP | uffd::EVENT_UNMAP;

/// A span of another process's address space that is filled from a span of an image's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignRegion {
    /// The first address, a multiple of the page size.
    pub address: usize,
    /// Length in bytes, a multiple of the page size; not zero.
    pub len: usize,
    /// The size in bytes of the memory's pages: 4096, whether or not there may be transparent huge pages, or 2 MiB of
    /// hugetlb, which are installed only whole: the first touch of one waits for all of it.
    pub page_bytes: usize,
    /// The file's path in the image.
    pub path: Vec<u8>,
    /// Where in the file it begins, in bytes, a multiple of 4096. The file has all of its pages.
    pub offset_bytes: u64,
    /// Whether it is a shared mapping.
    pub sharing: Sharing,
}

/// Whether others see what is written to memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// No: private anonymous memory, or a private mapping of a memfd or of a file on tmpfs. The kernel refuses MADV_FREE of
    /// the latter after it has told of it: what was absent of that is zero then.
    #[default]
    Private,
    /// Yes: shared anonymous memory, a memfd, a file on tmpfs. Regions with the same number are the same memory where
    /// they are of the same bytes of the image's file. Its holes must not be punched by fallocate(2), of which nothing
    /// tells, and it must not be grown by mremap(2). Poison covers one mapping: what others map without a userfaultfd
    /// of this session reads zeros where a page is absent or lost.
    Shared(u32),
}

/// Memory of another process, for [`crate::Session::attach`].
#[derive(Clone, Copy, Debug)]
pub struct ForeignMemory<'a> {
    /// The userfaultfd that the process has opened. Its API handshake is done, and the regions are registered with it.
    pub uffd: BorrowedFd<'a>,
    /// What lies where.
    pub regions: &'a [ForeignRegion],
    /// Where to keep what a successor needs, if this process may die before the session has ended: a file on tmpfs, or
    /// a memfd; what it held is lost. See [`crate::Session::resume`].
    pub state: Option<&'a File>,
    /// The process, whose page tables and calls of madvise are looked at: what becomes of shared memory, and what is
    /// written to, cannot be known without. Where shared memory has no content yet, and nothing shows what a madvise
    /// asks for, the session ends in an error.
    pub pid: Option<u32>,
    /// Whether the regions are registered with the userfaultfd. If not they will be, one by one, before they are first
    /// touched, and [`crate::session::host::Hosted::set_registered`] is called when all are; until then there should be no background fill.
    pub is_registered: bool,
}

/// Whose memory it is.
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
    /// Its descriptors by the numbers that the state file has for them.
    Left {
        state: State,
        contents: Box<Contents>,
        uffds: HashMap<RawFd, OwnedFd>,
    },
}

impl Owner {
    /// What a session over this memory begins with.
    ///
    /// # Errors
    /// [`SessionError`]; then no descriptor is the only one of its userfaultfd here.
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
                let owner = pid.and_then(|pid| Some((pid, processes::start_of(pid)?)));
                let uffd = Uffd::adopt(uffd, tracks)?;
                let state = match state {
                    None => State::own(),
                    Some(file) => State::create(file, &image.digest(), &options, owner)?,
                };
                let space = Space::new(0, uffd, state.answers()).of_process(pid);
                let space = Arc::new(if is_registered { space } else { space.unregistered() });
                if is_registered {
                    state.set_registered();
                }
                let spaces = spaces_of(&image, &space, &regions, &state, tracks)?;
                state.rewrite(&spaces, 1, None)?;
                // Of faults that somebody has read who served it before.
                wake_everybody(&spaces);
                Ok(Shared::new(address, image, options, spaces, 1, state, owner))
            }
            Self::Left { state, contents, uffds } => take_over(address, image, state, &contents, uffds),
        }
    }
}

/// Takes over what a pager has left that died: does what was read and not done, and wakes all who wait.
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
        // The others' pids are not known.
        let pid = contents.owner.map(|(pid, _)| pid).filter(|_| *id == 0);
        let uffd = Uffd::adopt(uffd, contents.options.track_writes && *id == 0)?;
        let space = Space::new(*id, uffd, state.answers()).of_process(pid);
        spaces.insert(*id, Arc::new(if contents.is_registered { space } else { space.unregistered() }));
    }
    let spaces = replay(&state, contents, &image, spaces)?;
    spaces.regions().for_each(|region| region.complete_huge_pages());
    let (options, next_space) = (contents.options, contents.next_space);
    let shared = Shared::new(address, image, options, spaces, next_space, state, contents.owner);
    if let Err(error) = catch_up(&shared, contents, uffds) {
        // The file may name these now.
        shared.spaces().leave_open();
        return Err(error.into());
    }
    Ok(shared)
}

/// Does what was read and not done.
fn catch_up(
    shared: &Shared,
    contents: &Contents,
    mut uffds: HashMap<RawFd, OwnedFd>,
) -> Result<(), StateError> {
    // The descriptors have other numbers here.
    shared.state.rewrite(&shared.spaces(), contents.next_space, None)?;
    let of = shared.spaces().space(contents.messages_of).cloned();
    for (index, message) in contents.messages.iter().enumerate() {
        let event = Event::with_child(*message, |fd| uffds.remove(&fd));
        // Of a process that has exited since, nothing is left to be done.
        if let Some(space) = &of {
            let done = contents.messages_done + index + 1;
            events::apply(shared, space, event, Some(&contents.calls), done).map_err(StateError::Wrong)?;
        }
    }
    count_removed_again(shared)?;
    wake_everybody(&shared.spaces());
    Ok(())
}

/// Which removals had been told of died with the pager that knew: all count as new, and so does what was written since.
fn count_removed_again(shared: &Shared) -> Result<(), StateError> {
    let spaces = shared.spaces();
    let started = Instant::now();
    let tracked =
        |spaces: &Spaces| -> Vec<_> { spaces.regions().filter(|r| r.removals().is_some()).collect() };
    let mut regions = tracked(&spaces);
    while let Some(region) = regions.pop() {
        if unprotect_removed(&region)? {
            continue;
        }
        // An event is in the way, which may move or cut regions. Faults come back.
        for space in spaces.spaces() {
            match events::read(shared, space, &mut Vec::new()) {
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

/// False: an event must be read first.
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

/// Brings back the faults that a pager had read which has died.
fn wake_everybody(spaces: &Spaces) {
    for space in spaces.spaces() {
        space.uffd.wake_all();
    }
    for region in spaces.regions() {
        region.space.wake(&region.addresses());
    }
}

fn missing(fd: RawFd) -> OpenError {
    OpenError::Foreign(format!("as number {fd}, which the state file names, was not given"))
}

/// The descriptors that a state file names, as duplicates of those that `given` gives by number.
///
/// # Errors
/// [`SessionError`], if one is not given.
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

/// A region of another process that was found to be possible.
#[derive(Debug)]
struct Checked {
    address: usize,
    file: FileEntry,
    file_pages: Range<usize>,
    kind: ObjectKind,
    sharing: Sharing,
}

/// The first space of a session: regions that were registered by their owner.
///
/// # Errors
/// [`SessionError::Region`]: the first that cannot be.
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

/// Which regions have an object in common, by their numbers: all mappings of the same shared memory, and regions of
/// private memory that have other pages of the same file each.
fn objects_of(regions: &[Checked]) -> Vec<Vec<usize>> {
    /// Regions that are further apart in the file have objects of their own, so that tables stay small: 4 GiB.
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
    // Huge pages of an object begin at whole ones of it.
    let class = |index: usize| {
        let Checked { file, file_pages, kind, .. } = &regions[index];
        (file.first_chunk.0, kind.is_huge, if kind.is_huge { file_pages.start % HUGE_PAGES } else { 0 })
    };
    private.sort_unstable_by_key(|index| (class(*index), regions[*index].file_pages.start));
    let mut objects: Vec<Vec<usize>> = shared.into_values().collect();
    // Of the current class: objects that can go on, by the page behind their last region.
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
/// [`SessionError::Region`]: the first that cannot be.
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
        let reason = "that takes the process's pid, and the right to read /proc/PID/pagemap";
        return Err(SessionError::NoTracking(reason.into()));
    }
    let mut checked = Vec::with_capacity(regions.len());
    let mut files: HashMap<&[u8], FileEntry> = HashMap::new();
    // By address: the end, and which one it is.
    let mut placed: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    // By object and file: the pages of it that regions have.
    let mut objects: HashMap<(u32, u64), Range<usize>> = HashMap::new();
    for (index, region) in regions.iter().enumerate() {
        let ForeignRegion { address, len, page_bytes, .. } = *region;
        let wrong = |reason: String| SessionError::Region { index, address, len, reason };
        let end = address.checked_add(len).ok_or_else(|| wrong("its end is beyond all addresses".into()))?;
        if ![PAGE_BYTES, HUGE_BYTES].contains(&page_bytes) {
            return Err(wrong(format!("pages of {page_bytes} bytes; there are such of 4096 and of 2 MiB")));
        }
        if len == 0 || !address.is_multiple_of(page_bytes) || !len.is_multiple_of(page_bytes) {
            let rule = format!("address and length must be multiples of {page_bytes}, the length not zero");
            return Err(wrong(rule));
        }
        // None of those before overlaps another, so that only the last one that begins before this one's end can do so.
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
                wrong(format!("{path:?} has {size} bytes, so not these pages from byte {offset} on"))
            })?;
        if let Sharing::Shared(object) = region.sharing {
            let span = objects.entry((object, file.first_chunk.0)).or_insert(pages.clone());
            if !span.start.abs_diff(pages.start).is_multiple_of(page_bytes / PAGE_BYTES) {
                return Err(wrong("it is not a whole number of pages from others of the same memory".into()));
            }
            *span = span.start.min(pages.start)..span.end.max(pages.end);
        }
        let not_registered = || wrong("there is no memory registered with this userfaultfd".into());
        let found = match space.uffd.is_huge(address) {
            Err(_) if !space.is_registered() => None,
            is_huge => is_huge.map_err(|_| not_registered())?,
        };
        if tracks && region.sharing != Sharing::Private {
            let reason = format!("region {index} is shared memory, which others can write to unseen");
            return Err(SessionError::NoTracking(reason));
        }
        let is_huge = page_bytes == HUGE_BYTES;
        if found == Some(!is_huge) {
            let found = if is_huge { "4096 bytes" } else { "2 MiB" };
            return Err(wrong(format!(
                "it was said to have pages of {page_bytes} bytes, and has such of {found}"
            )));
        }
        let is_shared = region.sharing != Sharing::Private;
        let kind = ObjectKind { is_shared, is_huge, tracks_removals: tracks };
        let sharing = region.sharing;
        checked.push(Checked { address, file, file_pages: pages, kind, sharing });
    }
    Ok(checked)
}

/// The pages of a file from a byte on; None if none begins there, or there are too many.
fn pages(offset_bytes: u64, len: usize) -> Option<Range<usize>> {
    let offset = usize::try_from(offset_bytes).ok().filter(|offset| offset.is_multiple_of(PAGE_BYTES))?;
    Some(offset / PAGE_BYTES..offset.checked_add(len)? / PAGE_BYTES)
}
