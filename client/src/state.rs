//! What a successor needs to serve on when a session's pager has died: spaces, regions, page states, and the messages
//! that were read and not yet done.
//!
//! It lies in a file that is mapped (a memfd, or one on tmpfs), which outlives the process; docs/FORMATS.md has the
//! layout. Everything is words of 64 bits. What changes together becomes true by one store into the commit word: it
//! names the table that holds, of two, and counts the messages that are done. So whenever the pager is killed, the
//! file says either what was before a step or what is after it. Page states are changed in place: each step of theirs
//! can be done again.
//!
//! A session that nobody can take over has no file, and its page states lie in memory of its own.

mod contents;

pub(crate) use contents::{Contents, RegionRow};

use crate::advice::Call;
use crate::page_state::{PageStates, WORD_PAGES};
use crate::session::{LossPolicy, Options};
use crate::space::Spaces;
use crate::uffd::memory::SharedWords;
use crate::uffd::{Event, MESSAGE_WORDS, Outcome, Uffd};
use postcopy_proto::digest::Digest;
use postcopy_proto::page::to_usize;
use rustix::fs::FallocateFlags;
use std::collections::BTreeMap;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const MAGIC: u64 = u64::from_le_bytes(*b"postcopy");
const VERSION: u64 = 1;

/// Messages that are read at once.
pub(crate) const MESSAGES: usize = 32;
const MAX_SPACES: usize = 1 << 12;
const MAX_REGIONS: usize = 1 << 17;

// Places of words.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_IMAGE: usize = 2;
const AT_DEADLINE_MS: usize = 6;
const AT_ON_LOSS: usize = 7;
const AT_FILL: usize = 8;
const AT_ENDED: usize = 9;
const AT_OWNER: usize = 10;
const AT_SETTLED: usize = 11;
const AT_COMMIT: usize = 16;
const AT_MESSAGES_OF: usize = 24;
const AT_MESSAGES: usize = 32;
const AT_ANSWERS: usize = AT_MESSAGES + MESSAGES * MESSAGE_WORDS;
const AT_CALLS: usize = AT_ANSWERS + ANSWERS.len();
const MAX_CALLS: usize = 16;
const CALL_WORDS: usize = 3;
const HEADER_WORDS: usize = AT_CALLS + MAX_CALLS * CALL_WORDS;
const AT_TABLES: usize = 512;
const TABLE_HEAD_WORDS: usize = 8;
const SPACE_WORDS: usize = 2;
const REGION_WORDS: usize = 10;
const TABLE_WORDS: usize = TABLE_HEAD_WORDS + MAX_SPACES * SPACE_WORDS + MAX_REGIONS * REGION_WORDS;
const AT_STATES: usize = AT_TABLES + 2 * TABLE_WORDS;
/// 4 GiB, of which only what is used takes memory: page states for 64 TiB.
const FILE_WORDS: usize = 1 << 29;

/// By their numbers in the file.
const ON_LOSS: [LossPolicy; 4] = [LossPolicy::Poison, LossPolicy::Wait, LossPolicy::Kill, LossPolicy::Pause];

/// What the kernel can answer or tell, in the order of their counts in the file.
const ANSWERS: [&str; 12] = [
    "done",
    "partial",
    "present",
    "deferred",
    "gone",
    "exited",
    "no memory",
    "fault",
    "remove",
    "unmap",
    "remap",
    "fork",
];

fn answer(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Done => 0,
        Outcome::Partial { .. } => 1,
        Outcome::AlreadyPresent => 2,
        Outcome::Deferred => 3,
        Outcome::Gone => 4,
        Outcome::OwnerGone => 5,
        Outcome::NoMemory => 6,
    }
}

fn event(event: &Event) -> usize {
    match event {
        Event::Fault { .. } => 7,
        Event::Remove { .. } => 8,
        Event::Unmap { .. } => 9,
        Event::Remap { .. } => 10,
        Event::Fork { .. } | Event::Unknown { .. } => 11,
    }
}

/// Counts what the kernel answers.
#[derive(Clone, Debug)]
pub(crate) struct Answers(Arc<Words>);

impl Answers {
    /// Counts an answer, and gives it back.
    pub(crate) fn count(&self, outcome: Outcome) -> Outcome {
        self.0[AT_ANSWERS + answer(outcome)].fetch_add(1, Ordering::Relaxed);
        outcome
    }
}

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Nothing was written to it yet: the session is to be attached, not resumed.
    #[error("the state file is empty")]
    Empty,
    /// The session that it is of has ended in order.
    #[error("the session of the state file has ended")]
    Ended,
    /// Written by another version.
    #[error("the state file is of version {found}, not {VERSION}")]
    Version {
        /// That.
        found: u64,
    },
    /// It is not what a session has written.
    #[error("the state file: {0}")]
    Wrong(String),
    /// It is not large enough for what the session has become.
    #[error("the state file has no room for {0}")]
    Full(&'static str),
    /// It cannot be made, or mapped.
    #[error("the state file cannot be mapped")]
    Map(#[source] io::Error),
}

fn wrong<T>(reason: impl Into<String>) -> Result<T, StateError> {
    Err(StateError::Wrong(reason.into()))
}

/// Words of a session: its own, or a part of its state file.
#[derive(Debug)]
pub(crate) enum Words {
    Own(Box<[AtomicU64]>),
    Mapped(Extent),
}

impl Words {
    /// So many words of this process's own, all 0.
    pub(crate) fn own(count: usize) -> Self {
        Self::Own((0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Own(words) => words,
            Self::Mapped(extent) => &extent.file.words[extent.range.clone()],
        }
    }
}

/// A part of the file that page states lie in; given back when dropped.
#[derive(Debug)]
pub(crate) struct Extent {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.file.extents().remove(&self.range.start);
    }
}

#[derive(Debug)]
struct MappedFile {
    words: SharedWords,
    file: OwnedFd,
    /// Of each table, how many words of it the file system has set aside.
    reserved: [AtomicUsize; 2],
    /// Where extents begin and end. Held for changing it alone.
    extents: Mutex<BTreeMap<usize, usize>>,
}

impl MappedFile {
    fn extents(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, usize>> {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds room for so many words.
    fn allocate(self: &Arc<Self>, count: usize) -> Result<Extent, StateError> {
        let mut extents = self.extents();
        let mut start = AT_STATES;
        for (other, end) in extents.iter() {
            if other - start >= count.max(1) {
                break;
            }
            start = *end;
        }
        // One at least: its beginning names it.
        let range = start..start + count.max(1);
        if range.end > self.words.len() {
            return Err(StateError::Full("more page states"));
        }
        extents.insert(range.start, range.end);
        drop(extents);
        // Dropped on the way out, it gives its place back.
        let extent = Extent { file: Arc::clone(self), range: range.clone() };
        self.reserve(&range)?;
        for word in &self.words[range] {
            word.store(0, Ordering::Relaxed);
        }
        Ok(extent)
    }

    /// Has the file system set memory aside for words: writing to them is SIGBUS where there is none left.
    fn reserve(&self, range: &Range<usize>) -> Result<(), StateError> {
        let bytes = |words: usize| (words * size_of::<u64>()) as u64;
        let (start, len) = (bytes(range.start), bytes(range.len()));
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), start, len);
        rustix::io::retry_on_intr(reserve)
            .map_err(|_| StateError::Full("more, and neither has its file system"))
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    header: Arc<Words>,
    file: Option<Arc<MappedFile>>,
}

impl State {
    /// For a session that nobody can take over.
    pub(crate) fn own() -> Self {
        Self { header: Arc::new(Words::own(HEADER_WORDS)), file: None }
    }

    /// In a file, whatever it held before.
    ///
    /// # Errors
    /// [`StateError::Map`].
    pub(crate) fn create(
        file: impl AsFd,
        image: &Digest,
        options: &Options,
        owner: Option<u32>,
    ) -> Result<Self, StateError> {
        let bytes = (FILE_WORDS * size_of::<u64>()) as u64;
        rustix::fs::ftruncate(&file, 0).map_err(|error| StateError::Map(error.into()))?;
        rustix::fs::ftruncate(&file, bytes).map_err(|error| StateError::Map(error.into()))?;
        let state = Self::of(file.as_fd(), BTreeMap::new())?;
        for (index, bytes) in image.as_bytes().chunks(8).enumerate() {
            state.set(AT_IMAGE + index, u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
        }
        state.set(
            AT_DEADLINE_MS,
            u64::try_from(options.fault_deadline.as_millis()).unwrap_or(u64::MAX).max(1),
        );
        let on_loss = ON_LOSS.iter().position(|policy| *policy == options.on_loss);
        state.set(AT_ON_LOSS, on_loss.expect("all are listed") as u64);
        let Options { fill, track_writes, working_set, record, trace, .. } = *options;
        let bits = [fill, track_writes, working_set, record, trace].into_iter().enumerate();
        state.set(AT_FILL, bits.map(|(bit, is_on)| u64::from(is_on) << bit).sum());
        state.set(AT_OWNER, owner.unwrap_or(0).into());
        state.set(AT_VERSION, VERSION);
        state.set(AT_MAGIC, MAGIC);
        Ok(state)
    }

    /// The state that a session which died has left in a file, and what it says.
    ///
    /// # Errors
    /// [`StateError`]; the file is left as it is.
    pub(crate) fn open(file: impl AsFd) -> Result<(Self, Contents), StateError> {
        let words = SharedWords::map(&file).map_err(StateError::Map)?;
        let contents = Contents::read(&words)?;
        let extent =
            |row: &RegionRow| (row.states_at, row.states_at + row.states_pages.div_ceil(WORD_PAGES).max(1));
        let extents = contents.regions.iter().map(extent).collect();
        drop(words);
        Ok((Self::of(file.as_fd(), extents)?, contents))
    }

    fn of(file: BorrowedFd<'_>, extents: BTreeMap<usize, usize>) -> Result<Self, StateError> {
        let words = SharedWords::map(file).map_err(StateError::Map)?;
        let file = file.try_clone_to_owned().map_err(StateError::Map)?;
        let file = MappedFile { words, file, reserved: Default::default(), extents: Mutex::new(extents) };
        let file = Arc::new(file);
        file.reserve(&(0..AT_TABLES))?;
        // Not among the extents: it is never given back.
        let header = Words::Mapped(Extent { file: Arc::clone(&file), range: 0..HEADER_WORDS });
        Ok(Self { header: Arc::new(header), file: Some(file) })
    }

    fn set(&self, at: usize, value: u64) {
        self.header[at].store(value, Ordering::Release);
    }

    /// Whether somebody can take the session over.
    pub(crate) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// All memory of the process is registered.
    pub(crate) fn settle(&self) {
        self.set(AT_SETTLED, 1);
    }

    /// The session ends in order: nobody is to take it over.
    pub(crate) fn end(&self) {
        self.set(AT_ENDED, 1);
    }

    /// States for so many pages, all absent.
    ///
    /// # Errors
    /// [`StateError::Full`].
    pub(crate) fn page_states(&self, pages: usize) -> Result<PageStates, StateError> {
        let count = pages.div_ceil(WORD_PAGES);
        let words = match &self.file {
            None => Words::own(count),
            Some(file) => Words::Mapped(file.allocate(count)?),
        };
        Ok(PageStates::new(words, pages))
    }

    /// The page states that a row of this file tells of. To be called once for each.
    pub(crate) fn page_states_of(&self, row: &RegionRow) -> PageStates {
        let file = Arc::clone(self.file.as_ref().expect("rows are of a file"));
        let end = file.extents().get(&row.states_at).copied().expect("a row of this file");
        PageStates::new(Words::Mapped(Extent { file, range: row.states_at..end }), row.states_pages)
    }

    /// Notes the calls of madvise in progress before messages are received: after that nothing shows them any more.
    /// Of more than can be noted none is: what some of them say need not be right.
    pub(crate) fn note_calls(&self, calls: &[Call]) {
        let calls = if calls.len() > MAX_CALLS { &[] } else { calls };
        for index in 0..MAX_CALLS {
            let call = calls.get(index).map_or([0; CALL_WORDS], |call| {
                [call.addresses.start as u64, call.addresses.end as u64, call.advice]
            });
            for (word, value) in call.into_iter().enumerate() {
                self.set(AT_CALLS + index * CALL_WORDS + word, value);
            }
        }
    }

    /// The place of page states in the file.
    fn place(&self, states: &PageStates) -> usize {
        match states.words() {
            Words::Own(_) => 0,
            Words::Mapped(extent) => extent.range.start,
        }
    }

    /// Reads the next messages of a space's userfaultfd, at most so many: how many. Those before must be done.
    ///
    /// # Errors
    /// Whatever read(2) answers but EAGAIN.
    pub(crate) fn receive(&self, space: u32, uffd: &Uffd, most: usize) -> io::Result<usize> {
        let messages = &self.header[AT_MESSAGES..AT_ANSWERS];
        // Before the count of those done: what is left of the old ones must not look new.
        for word in messages {
            word.store(0, Ordering::Release);
        }
        self.set(AT_MESSAGES_OF, space.into());
        self.commit(self.generation(), 0);
        uffd.read_messages(&messages[..most * MESSAGE_WORDS])
    }

    /// What a message says that was received, not to be called more than once.
    pub(crate) fn message(&self, index: usize) -> Event {
        let at = AT_MESSAGES + index * MESSAGE_WORDS;
        let message = std::array::from_fn(|word| self.header[at + word].load(Ordering::Acquire));
        let message = Event::of(message);
        self.header[AT_ANSWERS + event(&message)].fetch_add(1, Ordering::Relaxed);
        message
    }

    /// To count what the kernel answers.
    pub(crate) fn answers(&self) -> Answers {
        Answers(Arc::clone(&self.header))
    }

    fn generation(&self) -> u64 {
        self.header[AT_COMMIT].load(Ordering::Acquire) >> 32
    }

    fn commit(&self, generation: u64, done: usize) {
        self.set(AT_COMMIT, generation << 32 | done as u64);
    }

    /// The first `done` of the messages received are done, and have changed nothing but page states.
    pub(crate) fn done(&self, done: usize) {
        self.commit(self.generation(), done);
    }

    /// Writes spaces and regions down, and with the same store that `done` of the messages received are done; None: as
    /// many as before.
    ///
    /// # Errors
    /// [`StateError::Full`]; what was written down before holds.
    pub(crate) fn write(
        &self,
        spaces: &Spaces,
        next_space: u32,
        done: Option<usize>,
    ) -> Result<(), StateError> {
        let done_before = self.header[AT_COMMIT].load(Ordering::Acquire) & u64::from(u32::MAX);
        let done = done.unwrap_or(to_usize(done_before));
        let Some(file) = &self.file else {
            self.done(done);
            return Ok(());
        };
        if spaces.spaces().len() > MAX_SPACES {
            return Err(StateError::Full("more processes"));
        }
        if spaces.regions().len() + spaces.left().len() + spaces.displaced().len() > MAX_REGIONS {
            return Err(StateError::Full("more regions"));
        }
        // Generations count to 2^32 and begin anew; 0 is that of a file that nothing was written to.
        let generation = match self.generation() {
            generation if generation >= u64::from(u32::MAX) => 2,
            generation => generation + 1,
        };
        let regions = spaces.regions().iter().map(|region| (region, false, false));
        let left = spaces.left().iter().map(|left| (left, true, false));
        let displaced = spaces.displaced().iter().map(|displaced| (displaced, false, true));
        let rows: Vec<_> = regions.chain(left).chain(displaced).collect();
        let range = table_range(generation);
        let needed = TABLE_HEAD_WORDS + MAX_SPACES * SPACE_WORDS + rows.len() * REGION_WORDS;
        let reserved = &file.reserved[to_usize(generation % 2)];
        if needed > reserved.load(Ordering::Relaxed) {
            let ahead = (needed + needed / 2).min(TABLE_WORDS);
            file.reserve(&(range.start..range.start + ahead))?;
            reserved.store(ahead, Ordering::Relaxed);
        }
        let table = &file.words[range];
        let write = |at: usize, words: &[u64]| {
            for (word, value) in table[at..at + words.len()].iter().zip(words) {
                word.store(*value, Ordering::Release);
            }
        };
        let counts = [spaces.spaces().len(), rows.len()].map(|count| count as u64);
        write(0, &[counts[0], counts[1], next_space.into()]);
        for (index, space) in spaces.spaces().iter().enumerate() {
            let fd = u64::from(space.uffd.number().cast_unsigned());
            write(TABLE_HEAD_WORDS + index * SPACE_WORDS, &[space.id.into(), fd]);
        }
        let regions_at = TABLE_HEAD_WORDS + MAX_SPACES * SPACE_WORDS;
        for (index, (region, is_left, is_displaced)) in rows.into_iter().enumerate() {
            let row = RegionRow { is_left, is_displaced, ..region.row(self.place(region.states())) };
            write(regions_at + index * REGION_WORDS, &row.words());
        }
        self.commit(generation, done);
        Ok(())
    }
}

fn table_range(generation: u64) -> Range<usize> {
    let start = AT_TABLES + to_usize(generation % 2) * TABLE_WORDS;
    start..start + TABLE_WORDS
}

/// How often the kernel has answered or told what, by name, since the session was attached: outcomes of UFFDIO_COPY,
/// UFFDIO_ZEROPAGE and UFFDIO_POISON, and messages.
///
/// # Errors
/// [`StateError`].
pub fn answers(state: impl AsFd) -> Result<impl Iterator<Item = (&'static str, u64)>, StateError> {
    let words = SharedWords::map(state).map_err(StateError::Map)?;
    Contents::read(&words)?;
    let counts: Vec<_> =
        words[AT_ANSWERS..].iter().map(|word| word.load(Ordering::Relaxed)).take(ANSWERS.len()).collect();
    Ok(ANSWERS.into_iter().zip(counts))
}

/// The numbers of the descriptors that a session needs which is to be resumed from this state file: its userfaultfds,
/// and those of children whose messages were read and not done. Whoever restarts a process that has died, and shares its
/// table of descriptors, keeps these open.
///
/// # Errors
/// [`StateError`].
pub fn descriptors(state: impl AsFd) -> Result<Vec<RawFd>, StateError> {
    let words = SharedWords::map(state).map_err(StateError::Map)?;
    Ok(Contents::read(&words)?.descriptors())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_state::PageState;
    use crate::region::{Common, RegionState};
    use crate::space::tests::any_space;
    use postcopy_proto::manifest::FileEntry;
    use postcopy_proto::page::ChunkIndex;
    use proptest::prelude::*;
    use std::fs::File;
    use std::time::Duration;

    const FILE: FileEntry =
        FileEntry { size_bytes: 900 * 4096, first_chunk: ChunkIndex(7), executable: false };

    fn state_file() -> File {
        rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }

    fn create(file: &File) -> State {
        let options = Options {
            fault_deadline: Duration::from_millis(1234),
            on_loss: LossPolicy::Wait,
            working_set: true,
            fill: true,
            record: false,
            trace: true,
            track_writes: false,
        };
        State::create(file, &Digest::of(b"image"), &options, None).unwrap()
    }

    /// Two spaces with regions of some states.
    fn some_spaces(state: &State) -> Spaces {
        let space = any_space(0);
        let region = |start: usize, pages: Range<usize>| {
            let states = state.page_states(pages.len()).unwrap();
            states.set_resident(1..2);
            Arc::new(RegionState::new(
                Arc::clone(&space),
                start * 4096,
                FILE,
                pages,
                65536,
                Common::new(states, false, false),
            ))
        };
        let mut spaces =
            Spaces::new(vec![Arc::clone(&space)], vec![region(90, 0..40), region(400, 300..900)]);
        spaces.fork(&space, any_space(1), state).unwrap();
        spaces.move_to(&space, &(95 * 4096..100 * 4096), 2000 * 4096);
        spaces
    }

    #[test]
    fn a_successor_finds_what_was_written_last() {
        let file = state_file();
        assert!(matches!(State::open(&file), Err(StateError::Empty)));
        let state = create(&file);
        assert!(matches!(State::open(&file), Err(StateError::Empty)), "no table yet");
        let spaces = some_spaces(&state);
        state.write(&spaces, 2, Some(3)).unwrap();
        state.done(5);
        // Room for these is found beside those that are in use.
        let more = state.page_states(70).unwrap();
        more.set_removed(0..70);

        let (successor, contents) = State::open(&file).unwrap();
        assert_eq!((contents.image, contents.next_space), (Digest::of(b"image"), 2));
        assert_eq!((contents.messages_of, contents.messages_done, contents.messages.len()), (0, 5, 0));
        let Options { fault_deadline, on_loss, fill, .. } = contents.options;
        assert_eq!((fault_deadline.as_millis(), on_loss, fill), (1234, LossPolicy::Wait, true));
        let fds: Vec<_> = spaces.spaces().iter().map(|space| (space.id, space.uffd.number())).collect();
        assert_eq!(
            (&contents.spaces, contents.descriptors()),
            (&fds, fds.iter().map(|(_, fd)| *fd).collect())
        );
        let rows: Vec<_> = spaces.regions().iter().map(|r| r.row(state.place(r.states()))).collect();
        let (left, regions): (Vec<_>, Vec<_>) = contents.regions.iter().cloned().partition(|row| row.is_left);
        assert_eq!((&regions, left.len()), (&rows, 1));
        assert_eq!((left[0].address, left[0].pages), (95 * 4096, 5));
        for region in spaces.regions() {
            region.set_poisoned(2..3);
        }
        let row = regions.last().unwrap();
        let states = successor.page_states_of(row);
        let found = [0, 1, 2].map(|page| states.get(row.first_state + page));
        assert_eq!(found, [PageState::Absent, PageState::Resident, PageState::Poisoned]);
        let room = successor.page_states(9).unwrap();
        assert!(rows.iter().all(|row| row.states_at != successor.place(&room)));
        state.end();
        assert!(matches!(State::open(&file), Err(StateError::Ended)));
    }

    #[test]
    fn either_the_old_table_holds_or_the_new_one() {
        let file = state_file();
        let state = create(&file);
        let mut spaces = some_spaces(&state);
        for (index, next_space) in (10..20).enumerate() {
            state.write(&spaces, next_space, Some(index)).unwrap();
            let rows = spaces.regions().len() + spaces.left().len();
            spaces.cut(&spaces.spaces()[0].clone(), &((401 + 2 * index) * 4096..(402 + 2 * index) * 4096));
            let contents = State::open(&file).unwrap().1;
            assert_eq!((contents.next_space, contents.messages_done), (next_space, index));
            assert_eq!(contents.regions.len(), rows);
        }
        // Room that nobody uses is used again, and is as new.
        let place = state.place(&state.page_states(100).unwrap());
        let again = state.page_states(100).unwrap();
        assert_eq!(state.place(&again), place);
        again.set_removed(0..100);
        drop(again);
        let again = state.page_states(100).unwrap();
        assert_eq!((state.place(&again), again.count(0..100, PageState::Absent)), (place, 100));
        // The generations begin anew.
        state.commit(u64::from(u32::MAX), 0);
        state.write(&spaces, 3, Some(0)).unwrap();
        assert_eq!(State::open(&file).unwrap().1.next_space, 3);
    }

    /// Places of words that mean something: of the header, of the table's head and spaces, and of its regions.
    fn any_place() -> impl Strategy<Value = usize> {
        let table = AT_TABLES + TABLE_WORDS;
        let regions = table + TABLE_HEAD_WORDS + MAX_SPACES * SPACE_WORDS;
        prop_oneof![0..HEADER_WORDS, table..table + 12, regions..regions + 6 * REGION_WORDS]
    }

    proptest! {
        /// Whatever is changed in a file, it is read as something that can be, or refused.
        #[test]
        fn any_words_are_a_state_or_an_error(
            changes in prop::collection::vec((any_place(), any::<u64>(), 0u32..64), 1..6), len in 0u64..1 << 30,
        ) {
            let file = state_file();
            let state = create(&file);
            state.write(&some_spaces(&state), 2, Some(0)).unwrap();
            for (at, value, shift) in changes {
                SharedWords::map(&file).unwrap()[at].store(value >> shift, Ordering::Release);
            }
            if let Ok((state, contents)) = State::open(&file) {
                for row in &contents.regions {
                    prop_assert!(contents.spaces.iter().any(|(id, _)| *id == row.space));
                    prop_assert!(row.first_state + row.pages <= row.states_pages);
                }
                if let Some(row) = contents.regions.first() {
                    prop_assert_eq!(state.page_states_of(row).pages(), row.states_pages);
                }
            }
            // What never was one.
            let other = state_file();
            other.set_len(len).unwrap();
            prop_assert!(State::open(&other).is_err());
        }
    }
}
