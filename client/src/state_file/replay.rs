//! Rebuilds the spaces from a log, as the pager that wrote it had them.
//!
//! The replay runs in two steps, because objects that do not outlive the log may have released
//! their blocks to others. First it applies the log with stand-ins for the page states. Then the
//! remaining objects get their states from the file.

use super::log::{ObjectRecord, Record, RegionRecord};
use super::{Contents, State, StateError, wrong};
use crate::memory::{Arena, ArenaFull, Object, ObjectKind, PageStates, Space, Spaces, Words, runs_in_use};
use crate::remote::Image;
use postcopy_proto::manifest::FileEntry;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Returns the object of a copy, for the id and the object of the base.
type ForkObject<'a> = dyn FnMut(u32, &Arc<Object>) -> Result<Arc<Object>, ArenaFull> + 'a;

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
            Record::Copy { base, space, tables, .. } => self.copy(*base, *space, tables),
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

    /// Returns a stand-in for an object of these pages of a file. No region has had `unused` of the
    /// pages.
    fn stand_in(
        &mut self,
        file: FileEntry,
        pages: Range<usize>,
        unused: usize,
        kind: ObjectKind,
        table_at: usize,
    ) -> Result<Arc<Object>, StateError> {
        let states = PageStates::new(&self.arena, pages.len(), pages.len() - unused)?;
        let chunk_bytes = self.image.root().chunk_size().bytes();
        let object = Arc::new(Object::new(file, pages.start, states, kind, chunk_bytes));
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
        let (first, pages, unused) = (record.first_page, record.pages, record.unused_pages);
        let end = first.checked_add(pages).filter(|end| pages > 0 && *end <= file_pages);
        let Some(end) = end.filter(|_| unused <= pages) else {
            return wrong(format!(
                "its log has an object of {pages} pages, {unused} unused, from page {first} of a file of \
                 {file_pages} pages"
            ));
        };
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
            None => self.stand_in(file, first..end, unused, kind, record.table_at)?,
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
        self.make(child, tables, |spaces, child, object| spaces.fork_with(parent, child, object))
    }

    fn copy(&mut self, base: u32, space: u32, tables: &[(u32, usize)]) -> Result<(), StateError> {
        if self.spaces.space(base).is_none() {
            return wrong(format!("space {space} is a copy of space {base}, which does not exist"));
        }
        self.make(space, tables, |spaces, space, object| spaces.copy_with(base, space, object))
    }

    /// Adds a space that `make` makes of another one. `tables` has the tables of page states of its
    /// private objects, by id.
    fn make(
        &mut self,
        id: u32,
        tables: &[(u32, usize)],
        make: impl FnOnce(&mut Spaces, Arc<Space>, &mut ForkObject) -> Result<(), ArenaFull>,
    ) -> Result<(), StateError> {
        if self.spaces.space(id).is_some() {
            return wrong(format!("its log makes space {id} of another one, but it exists already"));
        }
        let space = self.process(id);
        let tables: HashMap<u32, usize> = tables.iter().copied().collect();
        let mut spaces = std::mem::take(&mut self.spaces);
        let made = make(&mut spaces, space, &mut |id, object| {
            let table = *tables.get(&id).ok_or(ArenaFull)?;
            let kind = ObjectKind { tracks_removals: false, ..object.kind() };
            let (first, states) = (object.first_page(), object.states());
            let pages = first..first + states.pages();
            self.stand_in(object.file, pages, states.unused(), kind, table).map_err(|_| ArenaFull)
        });
        self.spaces = spaces;
        made.or_else(|_| wrong(format!("space {id} lacks page states for an object of its relative")))
    }

    /// Gives the remaining objects their page states, which lie in the file.
    fn finish(mut self, state: &State) -> Result<Spaces, StateError> {
        let left: Vec<_> = self.of_processes.keys().copied().collect();
        if !self.spaces.spaces().map(|space| space.id).eq(left.iter().copied()) {
            return wrong("its log and its replay end with different spaces");
        }
        self.spaces.drop_unheld();
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
        // Several objects may name a block, but not a table.
        let mut tables = live.keys().map(|pointer| self.tables[pointer]);
        if state.arena().adopt(used).is_err() || tables.any(|at| state.arena().is_shared(at)) {
            return wrong("page states overlap one another");
        }
        let mut made: HashMap<*const Object, Arc<Object>> = HashMap::new();
        let chunk_bytes = self.image.root().chunk_size().bytes();
        for (pointer, object) in &live {
            let (table, pages, unused) =
                (self.tables[pointer], object.states().pages(), object.states().unused());
            let states = PageStates::of_predecessor(state.arena(), table, pages, unused);
            let object = Object::new(object.file, object.first_page(), states, object.kind(), chunk_bytes);
            made.insert(*pointer, Arc::new(object));
        }
        let mut spaces = std::mem::take(&mut self.spaces);
        spaces.replace_objects(|object| Arc::clone(&made[&Arc::as_ptr(object)]));
        Ok(spaces)
    }
}
