//! Rebuilds the spaces from a log, as the pager that wrote it had them.
//!
//! The replay runs in two steps, because objects that do not outlive the log may have released
//! their blocks to others. First it applies the log with stand-ins for the page states. Then the
//! remaining objects get their states from the file.

use super::log::{ObjectRecord, Record, RegionRecord};
use super::{Contents, State, StateError, wrong};
use crate::memory::{
    Arena, ArenaFull, Object, ObjectKind, PageStates, Space, Spaces, Words, runs_in_use, union,
};
use crate::remote::Image;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A replay in progress.
struct Replay<'a> {
    spaces: Spaces,
    /// The session's spaces, by id. For a process that has exited, a stand-in uses the userfaultfd
    /// of another one.
    of_processes: BTreeMap<u32, Arc<Space>>,
    /// The arena of the stand-ins' page states.
    arena: Arc<Arena>,
    /// The position in the file of each stand-in's table of page states.
    tables: HashMap<*const Object, usize>,
    /// All stand-ins, so that no stand-in gets the address of a dropped one.
    objects: Vec<Arc<Object>>,
    shared: HashMap<usize, Arc<Object>>,
    files: HashMap<u64, FileEntry>,
    image: &'a Image,
    tracks_removals: bool,
}

/// Rebuilds the spaces of a state file. `spaces` has the spaces that exist at the end of the log,
/// by id.
///
/// # Errors
/// [`StateError::Wrong`] names the contradiction; the file stays as it is.
pub(crate) fn replay(
    state: &State,
    contents: &Contents,
    image: &Image,
    spaces: BTreeMap<u32, Arc<Space>>,
) -> Result<Spaces, StateError> {
    let files = image.root().files().filter(|(_, file)| file.size_bytes > 0);
    let mut replay = Replay {
        spaces: Spaces::default(),
        of_processes: spaces,
        arena: Arc::new(Arena::new(Words::own(), 0)),
        tables: HashMap::new(),
        objects: Vec::new(),
        shared: HashMap::new(),
        files: files.map(|(_, file)| (file.first_chunk.0, *file)).collect(),
        image,
        tracks_removals: contents.options.track_writes,
    };
    if replay.of_processes.is_empty() {
        return Ok(replay.spaces);
    }
    for record in &contents.records {
        replay.apply(record)?;
    }
    replay.finish(state)
}

impl Replay<'_> {
    fn apply(&mut self, record: &Record) -> Result<(), StateError> {
        match record {
            Record::NextSpace { .. } | Record::Process { .. } => Ok(()),
            Record::Space { id, .. } => {
                let space = self.process(*id);
                self.spaces.add_space(space);
                Ok(())
            }
            Record::Object(object) => self.add_object(object),
            Record::Region(region) => self.add_region(region),
            Record::Change(change) => {
                drop(self.spaces.apply(change));
                Ok(())
            }
            Record::Fork { parent, child, tables, .. } => self.fork(*parent, *child, tables),
        }
    }

    /// Returns the space with this id, or a stand-in for it.
    fn process(&self, id: u32) -> Arc<Space> {
        let known = self.of_processes.get(&id).map(Arc::clone);
        known.unwrap_or_else(|| {
            let other = self.of_processes.values().next().expect("`replay` returns early without spaces");
            Arc::new(other.stand_in(id))
        })
    }

    fn stand_in(
        &mut self,
        file: FileEntry,
        first_page: usize,
        pages: usize,
        kind: ObjectKind,
        table_at: usize,
    ) -> Result<Arc<Object>, StateError> {
        let states = PageStates::new(&self.arena, pages, pages)?;
        let chunk_bytes = self.image.root().chunk_size().bytes();
        let object = Arc::new(Object::new(file, first_page, states, kind, chunk_bytes));
        self.tables.insert(Arc::as_ptr(&object), table_at);
        self.objects.push(Arc::clone(&object));
        Ok(object)
    }

    fn add_object(&mut self, record: &ObjectRecord) -> Result<(), StateError> {
        let file =
            self.files.get(&record.file_first_chunk).filter(|file| file.size_bytes == record.file_bytes);
        let Some(file) = file.copied() else {
            let chunk = record.file_first_chunk;
            return wrong(format!("the image has no file that begins with chunk {chunk}"));
        };
        let file_pages = to_usize(file.size_bytes).div_ceil(PAGE_BYTES);
        let end = record.first_page.checked_add(record.pages);
        if record.pages == 0 || end.is_none_or(|end| end > file_pages) {
            let (pages, first) = (record.pages, record.first_page);
            return wrong(format!(
                "its log has an object of {pages} pages from page {first} of a file of {file_pages} pages"
            ));
        }
        if self.spaces.space(record.space).is_none() || self.spaces.object(record.space, record.id).is_some()
        {
            return wrong(format!(
                "object {} of space {} exists twice, or without its space",
                record.id, record.space
            ));
        }
        let kind = ObjectKind {
            is_shared: record.is_shared,
            is_huge: record.is_huge,
            tracks_removals: self.tracks_removals && record.space == 0,
        };
        let known = record.is_shared.then(|| self.shared.get(&record.table_at).cloned()).flatten();
        let object = match known {
            Some(object)
                if object.file == file
                    && object.first_page() == record.first_page
                    && object.states().pages() == record.pages
                    && object.kind().is_huge == record.is_huge =>
            {
                object
            }
            Some(_) => {
                return wrong(format!(
                    "two different objects share the page states at word {}",
                    record.table_at
                ));
            }
            None => self.stand_in(file, record.first_page, record.pages, kind, record.table_at)?,
        };
        if record.is_shared {
            self.shared.insert(record.table_at, Arc::clone(&object));
        }
        self.spaces.put_object(record.space, record.id, object);
        Ok(())
    }

    fn add_region(&mut self, record: &RegionRecord) -> Result<(), StateError> {
        let object = self.spaces.object(record.space, record.object).cloned();
        let Some(object) = object else {
            return wrong(format!("a region names object {}, which does not exist", record.object));
        };
        let has = object.first_page()..object.first_page() + object.states().pages();
        let (address, pages) = (record.address, &record.file_pages);
        if pages.start < has.start || pages.end > has.end {
            return wrong(format!(
                "the region at {address:#x} has pages {pages:?}, but its object only {has:?}"
            ));
        }
        let unit = if object.kind().is_huge { crate::memory::HUGE_PAGES } else { 1 };
        let places = [address / PAGE_BYTES, pages.len(), pages.start - has.start];
        if !places.iter().all(|place| place.is_multiple_of(unit)) {
            return wrong(format!(
                "the region of huge pages at {address:#x}, of {} pages, is not aligned to them",
                pages.len()
            ));
        }
        let addresses = address..address + pages.len() * PAGE_BYTES;
        let space = Arc::clone(self.spaces.space(record.space).expect("a space with an object exists"));
        let is_here = record.place == crate::memory::Place::Here;
        if is_here && !self.spaces.overlapping(&space, &addresses).is_empty() {
            return wrong(format!("the region at {address:#x} overlaps another"));
        }
        self.spaces.add(record.space, record.object, record.place, address, pages.clone());
        Ok(())
    }

    fn fork(&mut self, parent: u32, child: u32, tables: &[(u32, usize)]) -> Result<(), StateError> {
        if self.spaces.space(child).is_some() {
            return wrong(format!("space {parent} forks to space {child}, which exists already"));
        }
        let space = self.process(child);
        let mut spaces = self.spaces.clone();
        let forked = spaces.fork_with(parent, space, |id, object| {
            let table = tables.iter().find(|(of, _)| *of == id).map(|(_, at)| *at).ok_or(ArenaFull)?;
            let kind = ObjectKind { tracks_removals: false, ..object.kind() };
            let (file, first, pages) = (object.file, object.first_page(), object.states().pages());
            self.stand_in(file, first, pages, kind, table).map_err(|_| ArenaFull)
        });
        if forked.is_err() {
            return wrong(format!("space {child} has no page states for an object of its parent"));
        }
        self.spaces = spaces;
        Ok(())
    }

    /// Gives the remaining objects their page states, which lie in the file.
    fn finish(mut self, state: &State) -> Result<Spaces, StateError> {
        let left: Vec<_> = self.of_processes.keys().copied().collect();
        if !self.spaces.spaces().map(|space| space.id).eq(left.iter().copied()) {
            return wrong("its log and its replay end with different spaces");
        }
        let mut live: HashMap<*const Object, Arc<Object>> = HashMap::new();
        for id in left {
            let objects =
                self.spaces.objects_of(id).map(|(_, object)| (Arc::as_ptr(object), Arc::clone(object)));
            live.extend(objects);
        }
        let words = state.file_words().expect("a session with a log has a file");
        let mut used = Vec::new();
        for (pointer, object) in &live {
            let (at, pages) = (self.tables[pointer], object.states().pages());
            let table_end = at.checked_add(crate::memory::table_words(pages));
            if at < super::layout::AT_STATES || table_end.is_none_or(|end| end > words.len()) {
                return wrong(format!("a table of page states lies outside of its place, at word {at}"));
            }
            used.extend(runs_in_use(at, pages, |at| words[at].load(Ordering::Acquire)));
        }
        if state.arena().adopt(used).is_err() {
            return wrong("page states overlap one another");
        }
        let mut made: HashMap<*const Object, Arc<Object>> = HashMap::new();
        let chunk_bytes = self.image.root().chunk_size().bytes();
        for (pointer, object) in &live {
            let states = PageStates::left(state.arena(), self.tables[pointer], object.states().pages());
            let object = Object::new(object.file, object.first_page(), states, object.kind(), chunk_bytes);
            made.insert(*pointer, Arc::new(object));
        }
        let mut spaces = std::mem::take(&mut self.spaces);
        spaces.replace_objects(|object| Arc::clone(&made[&Arc::as_ptr(object)]));
        recount(&spaces);
        Ok(spaces)
    }
}

/// Counts the unresolved pages of all regions.
fn recount(spaces: &Spaces) {
    let mut covered: HashMap<*const Object, (Arc<Object>, Vec<std::ops::Range<usize>>)> = HashMap::new();
    let ids: Vec<_> = spaces.spaces().map(|space| space.id).collect();
    for (_, _, region) in ids.iter().flat_map(|id| spaces.places_of(*id)) {
        let of = covered
            .entry(Arc::as_ptr(&region.object))
            .or_insert_with(|| (Arc::clone(&region.object), Vec::new()));
        of.1.push(region.placed(0..region.pages()));
    }
    for (object, runs) in covered.into_values() {
        let runs = union(runs);
        object.states().recount(runs.iter().cloned());
    }
}
