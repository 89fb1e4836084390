//! The state file: all that a successor needs to serve on when a session's pager has died. It holds spaces, regions,
//! page states, and the messages that the pager had read and not yet done.
//!
//! The file is mapped (a memfd, or one on tmpfs), and outlives the process; docs/FORMATS.md has the layout. Everything
//! is words of 64 bits. Each change of spaces is a record that is appended to a log ([`log`]); when the log has become
//! long it is written anew, as what there is now, into a second place. A change becomes true by one store into the
//! commit word: it says which log holds, how long it is, and how many messages are done. So whenever the pager is
//! killed, the file says either what was before a step or what is after it. Page states are changed in place, in
//! blocks that an arena hands out: each step of theirs can be done again.
//!
//! A session that no successor can take over has no file. Its page states lie in memory of its own.

mod contents;
mod layout;
mod log;
mod replay;

pub(crate) use contents::Contents;
pub(crate) use layout::MESSAGES;
pub(crate) use log::Record;
pub(crate) use replay::replay;

use crate::memory::{AnswerCounts, Arena, ArenaFull, FixedWords, MappedFile, Spaces, Words};
use crate::options::Options;
use crate::processes::Call;
use crate::uffd::{Event, Uffd};
use layout::{
    ANSWERS, AT_ANSWERS, AT_CALLS, AT_COMMIT, AT_DEADLINE_MS, AT_ENDED, AT_FILL, AT_IMAGE, AT_LOGS, AT_MAGIC,
    AT_MESSAGES, AT_MESSAGES_OF, AT_ON_LOSS, AT_OWNER, AT_OWNER_START, AT_RECORD_CACHE_MIB, AT_RECORD_PAGES,
    AT_REGISTERED, AT_STATES, AT_VERSION, CALL_WORDS, Commit, FILE_WORDS, HEADER_WORDS, LOG_WORDS, MAGIC,
    MAX_CALLS, ON_LOSS, VERSION, log_range,
};
use log::{ObjectRecord, RegionRecord};
use postcopy_proto::digest::Digest;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::uffd::MESSAGE_WORDS;

/// A log is written anew when its changes have more words than what it began with, and than this: 256 KiB.
const LEAST_CHANGES: usize = 32_768;
/// How much of a log is reserved at once, in words: 64 KiB.
const RESERVE_WORDS: usize = 8192;

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
        /// The version that the file names.
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

impl From<ArenaFull> for StateError {
    fn from(_: ArenaFull) -> Self {
        Self::Full("more page states")
    }
}

fn wrong<T>(reason: impl Into<String>) -> Result<T, StateError> {
    Err(StateError::Wrong(reason.into()))
}

/// The logs of a file. The pager alone writes to them.
#[derive(Debug)]
struct Logs {
    file: Arc<MappedFile>,
    /// Held for writing a record or a log.
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    /// Of each log, how many words the file system has set aside.
    reserved: [usize; 2],
    /// How many words the current log began with.
    base_words: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    header: Arc<FixedWords>,
    arena: Arc<Arena>,
    logs: Option<Logs>,
}

impl State {
    /// For a session that no successor can take over.
    pub(crate) fn own() -> Self {
        let header = FixedWords::Own((0..HEADER_WORDS).map(|_| AtomicU64::new(0)).collect());
        let state =
            Self { header: Arc::new(header), arena: Arc::new(Arena::new(Words::own(), 0)), logs: None };
        state.commit(Commit::default());
        state
    }

    /// In a file, whatever it held before.
    ///
    /// # Errors
    /// [`StateError::Map`].
    pub(crate) fn create(
        file: impl AsFd,
        image: &Digest,
        options: &Options,
        owner: Option<(u32, u64)>,
    ) -> Result<Self, StateError> {
        let bytes = (FILE_WORDS * size_of::<u64>()) as u64;
        rustix::fs::ftruncate(&file, 0).map_err(|error| StateError::Map(error.into()))?;
        rustix::fs::ftruncate(&file, bytes).map_err(|error| StateError::Map(error.into()))?;
        let state = Self::of(file)?;
        for (index, bytes) in image.as_bytes().chunks(8).enumerate() {
            state.set(AT_IMAGE + index, u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
        }
        state.set(
            AT_DEADLINE_MS,
            u64::try_from(options.fault_deadline.as_millis()).unwrap_or(u64::MAX).max(1),
        );
        let on_loss = ON_LOSS.iter().position(|policy| *policy == options.on_loss);
        state.set(AT_ON_LOSS, on_loss.expect("all are listed") as u64);
        let Options { fill, track_writes, working_set, record, trace, hold_causers, .. } = *options;
        let bits = [fill, track_writes, working_set, record, trace, hold_causers].into_iter().enumerate();
        state.set(AT_FILL, bits.map(|(bit, is_on)| u64::from(is_on) << bit).sum());
        state.set(AT_RECORD_PAGES, options.record_pages.into());
        state.set(AT_RECORD_CACHE_MIB, options.record_cache_mib.into());
        let (pid, start) = owner.unwrap_or_default();
        state.set(AT_OWNER, pid.into());
        state.set(AT_OWNER_START, start);
        state.set(AT_VERSION, VERSION);
        state.set(AT_MAGIC, MAGIC);
        Ok(state)
    }

    /// The state that a session which died has left in a file, and what it says. [`replay`] must follow.
    ///
    /// # Errors
    /// [`StateError`]; the file is left as it is.
    pub(crate) fn open(file: impl AsFd) -> Result<(Self, Contents), StateError> {
        let mapped = MappedFile::map(&file).map_err(StateError::Map)?;
        let contents = Contents::read(mapped.words())?;
        let state = Self::of(file)?;
        if let Some(logs) = &state.logs {
            logs.written().base_words = state.committed().log_words;
        }
        Ok((state, contents))
    }

    fn of(file: impl AsFd) -> Result<Self, StateError> {
        let file = Arc::new(MappedFile::map(file).map_err(StateError::Map)?);
        file.reserve(&(0..AT_LOGS)).map_err(StateError::Map)?;
        let arena = Arena::new(Words::Mapped(Arc::clone(&file)), AT_STATES);
        let logs = Logs { file: Arc::clone(&file), written: Mutex::default() };
        Ok(Self {
            header: Arc::new(FixedWords::Mapped { file, words: HEADER_WORDS }),
            arena: Arc::new(arena),
            logs: Some(logs),
        })
    }

    fn set(&self, at: usize, value: u64) {
        self.header[at].store(value, Ordering::Release);
    }

    /// What page states lie in.
    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// All words of the file, if there is one.
    fn file_words(&self) -> Option<&[AtomicU64]> {
        self.logs.as_ref().map(|logs| logs.file.words())
    }

    /// Whether a successor can take the session over.
    pub(crate) fn has_file(&self) -> bool {
        self.logs.is_some()
    }

    /// Notes that all memory of the process is registered.
    pub(crate) fn set_registered(&self) {
        self.set(AT_REGISTERED, 1);
    }

    /// Notes that the session has ended in order: no successor is to take it over.
    pub(crate) fn end(&self) {
        self.set(AT_ENDED, 1);
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

    /// Reads the next messages of a space's userfaultfd, at most `most`: how many. Those before must be done.
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
        self.done(0);
        uffd.read_messages(&messages[..most * MESSAGE_WORDS])
    }

    /// What a message says that was received, not to be called more than once.
    pub(crate) fn message(&self, index: usize) -> Event {
        let at = AT_MESSAGES + index * MESSAGE_WORDS;
        let message = std::array::from_fn(|word| self.header[at + word].load(Ordering::Acquire));
        let message = Event::of(message);
        self.header[AT_ANSWERS + layout::event(&message)].fetch_add(1, Ordering::Relaxed);
        message
    }

    /// To count what the kernel answers.
    pub(crate) fn answers(&self) -> AnswerCounts {
        AnswerCounts::new(Arc::clone(&self.header), AT_ANSWERS)
    }

    fn committed(&self) -> Commit {
        Commit::of(self.header[AT_COMMIT].load(Ordering::Acquire)).unwrap_or_default()
    }

    fn commit(&self, commit: Commit) {
        self.set(AT_COMMIT, commit.word());
    }

    /// The first `messages_done` of the messages received are done, and have changed nothing but page states.
    pub(crate) fn done(&self, messages_done: usize) {
        // An empty file stays empty until its first log is written.
        if let Some(commit) = Commit::of(self.header[AT_COMMIT].load(Ordering::Acquire)) {
            self.commit(Commit { messages_done, ..commit });
        }
    }

    /// Appends a change to the log, after which there are `spaces`; with the same store `messages_done` of the messages
    /// received are done. None: as many as before.
    ///
    /// # Errors
    /// [`StateError::Full`]; what was written down before holds.
    pub(crate) fn append(
        &self,
        record: &Record,
        spaces: &Spaces,
        next_space: u32,
        messages_done: Option<usize>,
    ) -> Result<(), StateError> {
        let committed = self.committed();
        let messages_done = messages_done.unwrap_or(committed.messages_done);
        let Some(logs) = &self.logs else {
            self.done(messages_done);
            return Ok(());
        };
        let mut words = Vec::new();
        record.write(&mut words);
        let log_words = committed.log_words + words.len();
        let mut written = logs.written();
        if log_words > 2 * written.base_words + LEAST_CHANGES || log_words > LOG_WORDS {
            drop(written);
            return self.rewrite(spaces, next_space, Some(messages_done));
        }
        logs.write(&mut written, committed.log, committed.log_words, &words)?;
        drop(written);
        self.commit(Commit { log_words, messages_done, ..committed });
        Ok(())
    }

    /// Writes the log anew, as what there is now.
    ///
    /// # Errors
    /// As [`State::append`].
    pub(crate) fn rewrite(
        &self,
        spaces: &Spaces,
        next_space: u32,
        messages_done: Option<usize>,
    ) -> Result<(), StateError> {
        let committed = self.committed();
        let messages_done = messages_done.unwrap_or(committed.messages_done);
        let Some(logs) = &self.logs else {
            self.done(messages_done);
            return Ok(());
        };
        let words = words_of(spaces, next_space);
        let log = 1 - committed.log;
        let mut written = logs.written();
        logs.write(&mut written, log, 0, &words)?;
        written.base_words = words.len();
        self.commit(Commit { log, log_words: words.len(), messages_done });
        // Memory of the other log; without that it is kept.
        if logs.file.give_back(&log_range(committed.log)).is_ok() {
            written.reserved[committed.log] = 0;
        }
        Ok(())
    }
}

impl Logs {
    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes words behind the first `before` of a log.
    fn write(
        &self,
        written: &mut Written,
        log: usize,
        before: usize,
        words: &[u64],
    ) -> Result<(), StateError> {
        let (range, end) = (log_range(log), before + words.len());
        if end > LOG_WORDS {
            return Err(StateError::Full("more regions"));
        }
        let reserved = &mut written.reserved[log];
        if end > *reserved {
            let more = (end + RESERVE_WORDS).min(LOG_WORDS);
            let reserve = self.file.reserve(&(range.start + *reserved..range.start + more));
            reserve.map_err(|_| StateError::Full("more, and neither has its file system"))?;
            *reserved = more;
        }
        for (word, value) in self.file.words()[range][before..end].iter().zip(words) {
            word.store(*value, Ordering::Release);
        }
        Ok(())
    }
}

/// A log that says what there is.
fn words_of(spaces: &Spaces, next_space: u32) -> Vec<u64> {
    let mut words = Vec::new();
    Record::NextSpace { id: next_space }.write(&mut words);
    for space in spaces.spaces() {
        let id = space.id;
        Record::Space { id, fd: space.uffd.number() }.write(&mut words);
        for (object_id, object) in spaces.objects_of(id) {
            let record = ObjectRecord {
                space: id,
                id: object_id,
                table_at: object.states().table_at(),
                pages: object.states().pages(),
                first_page: object.first_page(),
                file_first_chunk: object.file.first_chunk.0,
                file_bytes: object.file.size_bytes,
                is_shared: object.kind().is_shared,
                is_huge: object.kind().is_huge,
            };
            Record::Object(record).write(&mut words);
        }
        for (place, object, region) in spaces.places_of(id) {
            let (address, file_pages) = (region.address(0), region.file_pages(0..region.pages()));
            Record::Region(RegionRecord { space: id, object, place, address, file_pages }).write(&mut words);
        }
    }
    words
}

/// How often the kernel has answered or told what, by name, since the session was attached: outcomes of UFFDIO_COPY,
/// UFFDIO_ZEROPAGE and UFFDIO_POISON, and messages.
///
/// # Errors
/// [`StateError`], but for that of a session that has ended.
pub fn answers(state: impl AsFd) -> Result<impl Iterator<Item = (&'static str, u64)>, StateError> {
    let file = MappedFile::map(state).map_err(StateError::Map)?;
    match Contents::read(file.words()) {
        Ok(_) | Err(StateError::Ended) => {}
        Err(error) => return Err(error),
    }
    let counts: Vec<_> = file.words()[AT_ANSWERS..]
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .take(ANSWERS.len())
        .collect();
    Ok(ANSWERS.into_iter().zip(counts))
}

/// The numbers of the descriptors that a session needs which is to be resumed from this state file: its userfaultfds,
/// and those of children whose messages were read and not done. Whoever restarts a process that has died, and shares its
/// table of descriptors, keeps these open.
///
/// # Errors
/// [`StateError`].
pub fn descriptors(state: impl AsFd) -> Result<Vec<RawFd>, StateError> {
    let file = MappedFile::map(state).map_err(StateError::Map)?;
    Ok(Contents::read(file.words())?.descriptors())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_space, spaces_with};
    use crate::memory::{Change, ObjectKind, PageState, Region, Space};
    use crate::options::LossPolicy;
    use crate::remote::Image;
    use postcopy_proto::manifest::{ChunkContent, FileEntry, ManifestBuilder};
    use postcopy_proto::page::ChunkSize;
    use postcopy_proto::path::ImagePath;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::ops::Range;
    use std::time::Duration;

    const CHUNK: usize = 65536;

    /// An image of one file of 900 pages.
    fn image() -> Image {
        let mut manifest = ManifestBuilder::new(ChunkSize::DEFAULT);
        manifest.file(&ImagePath::try_from(&b"a"[..]).unwrap(), 900 * 4096, false);
        (0..57).for_each(|_| manifest.chunk(ChunkContent::Zero));
        Image::new(manifest.finish().unwrap().root)
    }

    fn file_of(image: &Image) -> FileEntry {
        image.files()[0]
    }

    fn state_file() -> File {
        rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }

    fn create(file: &File) -> State {
        let options = Options {
            fault_deadline: Duration::from_millis(1234),
            on_loss: LossPolicy::Wait,
            working_set: true,
            fill: true,
            trace: true,
            record_pages: 77,
            record_cache_mib: 3,
            ..Options::default()
        };
        State::create(file, &Digest::of(b"image"), &options, None).unwrap()
    }

    /// One space with two regions of some states.
    fn two_regions(state: &State) -> Spaces {
        let regions = [(90 * 4096, 0..40), (400 * 4096, 300..900)];
        let spaces =
            spaces_with(&any_space(0), state, file_of(&image()), ObjectKind::default(), CHUNK, &regions);
        spaces.regions().for_each(|region| region.set_resident(1..2));
        spaces
    }

    fn change(state: &State, spaces: &mut Spaces, change: Change, done: Option<usize>) {
        for region in spaces.apply(&change) {
            region.set_removed(0..region.pages()).unwrap();
        }
        state.append(&Record::Change(change), spaces, 2, done).unwrap();
    }

    /// The parent forks, and moves some of its memory.
    fn fork_and_move(state: &State, spaces: &mut Spaces) {
        let child = any_space(1);
        spaces.fork(0, Arc::clone(&child)).unwrap();
        let tables = spaces.objects_of(1).map(|(id, object)| (id, object.states().table_at())).collect();
        let record = Record::Fork { parent: 0, child: 1, fd: child.uffd.number(), tables };
        state.append(&record, spaces, 2, None).unwrap();
        let from = 95 * 4096..100 * 4096;
        change(state, spaces, Change::Move { space: 0, from, to: 2000 * 4096 }, Some(3));
    }

    fn take_over(file: &File) -> Result<(State, Contents, Spaces), StateError> {
        let (state, contents) = State::open(file)?;
        let spaces: BTreeMap<u32, Arc<Space>> =
            contents.spaces.keys().map(|id| (*id, any_space(*id))).collect();
        let spaces = replay(&state, &contents, &image(), spaces)?;
        Ok((state, contents, spaces))
    }

    /// Space, address, pages of the file, their states, and whether the region is in the address order.
    type Row = (u32, usize, Range<usize>, Vec<PageState>, bool);

    /// All regions, wherever they belong.
    fn all(spaces: &Spaces) -> Vec<Row> {
        let ids: Vec<_> = spaces.spaces().map(|space| space.id).collect();
        let row = |(place, _, region): (crate::memory::Place, u32, Region)| {
            let states = (0..region.pages()).map(|page| region.state(page)).collect();
            let is_here = place == crate::memory::Place::Here;
            (region.space.id, region.address(0), region.file_pages(0..region.pages()), states, is_here)
        };
        ids.iter().flat_map(|id| spaces.places_of(*id)).map(row).collect()
    }

    #[test]
    fn a_successor_finds_what_was_written_last() {
        let file = state_file();
        assert!(matches!(State::open(&file), Err(StateError::Empty)));
        let state = create(&file);
        assert!(matches!(State::open(&file), Err(StateError::Empty)), "no log yet");
        let mut spaces = two_regions(&state);
        state.rewrite(&spaces, 1, None).unwrap();
        fork_and_move(&state, &mut spaces);
        state.done(5);
        // Both go their own way.
        spaces.regions_of(0).for_each(|region| region.set_resident(0..1));
        spaces.regions_of(1).for_each(|region| region.set_removed(2..3).unwrap());

        let (successor, contents, found) = take_over(&file).unwrap();
        assert_eq!((contents.image, contents.next_space), (Digest::of(b"image"), 2));
        assert_eq!((contents.messages_of, contents.messages_done, contents.messages.len()), (0, 5, 0));
        let Options { fault_deadline, on_loss, fill, record_pages, record_cache_mib, .. } = contents.options;
        assert_eq!((record_pages, record_cache_mib), (77, 3));
        assert_eq!((fault_deadline.as_millis(), on_loss, fill), (1234, LossPolicy::Wait, true));
        let fds: Vec<_> = spaces.spaces().map(|space| space.uffd.number()).collect();
        assert_eq!(contents.descriptors(), fds);
        assert_eq!(all(&found), all(&spaces));
        assert_eq!(found.unresolved(true), spaces.unresolved(true));
        // The successor's changes are of the same file, and leave the other process's states alone.
        found.regions_of(0).for_each(|region| region.set_poisoned(3..4).unwrap());
        let of_child =
            |spaces: &Spaces| spaces.regions_of(1).map(|region| region.state(3)).collect::<Vec<_>>();
        assert!(of_child(&found).iter().all(|state| *state == PageState::Absent));
        found.regions_of(1).for_each(|region| region.set_resident(3..4));
        let seen = all(&found);
        successor.rewrite(&found, 2, Some(0)).unwrap();
        drop((state, spaces));
        assert_eq!(all(&take_over(&file).unwrap().2), seen);
        successor.end();
        assert!(matches!(State::open(&file), Err(StateError::Ended)));
    }

    #[test]
    fn a_child_outlives_its_parent_in_the_log() {
        let file = state_file();
        let state = create(&file);
        let mut spaces = two_regions(&state);
        state.rewrite(&spaces, 1, None).unwrap();
        fork_and_move(&state, &mut spaces);
        change(&state, &mut spaces, Change::Forget { space: 0 }, None);
        let contents = State::open(&file).unwrap().1;
        assert_eq!(contents.descriptors(), [spaces.space(1).unwrap().uffd.number()]);
        assert_eq!(all(&take_over(&file).unwrap().2), all(&spaces));
    }

    #[test]
    fn a_log_that_becomes_long_is_written_anew() {
        let file = state_file();
        let state = create(&file);
        let mut spaces = two_regions(&state);
        state.rewrite(&spaces, 1, None).unwrap();
        let mut longest = 0;
        for round in 0..20_000 {
            let (from, to) = if round % 2 == 0 { (400, 5000) } else { (5000, 400) };
            let addresses = from * 4096..(from + 600) * 4096;
            let moved = Change::Move { space: 0, from: addresses.clone(), to: to * 4096 };
            change(&state, &mut spaces, moved, None);
            change(&state, &mut spaces, Change::Unmap { space: 0, addresses }, Some(round % 3));
            longest = longest.max(state.committed().log_words);
        }
        assert!(longest < 2 * LEAST_CHANGES, "{longest} words");
        let (_, contents, found) = take_over(&file).unwrap();
        assert_eq!(contents.messages_done, 19_999 % 3);
        assert_eq!(all(&found), all(&spaces));
        let status = rustix::fs::fstat(&file).unwrap();
        assert!(status.st_blocks < 2 << 11, "{} blocks of 512 bytes", status.st_blocks);
    }

    /// Places of words that mean something: of the header, of the log, and of page states.
    fn any_place() -> impl Strategy<Value = usize> {
        let log = log_range(1).start;
        prop_oneof![0..HEADER_WORDS, log..log + 70, AT_STATES..AT_STATES + 64]
    }

    proptest! {
        /// Whatever is changed in a file, it is read as something that can be, or refused.
        #[test]
        fn any_words_are_a_state_or_an_error(
            changes in prop::collection::vec((any_place(), any::<u64>(), 0u32..64), 1..6), len in 0u64..1 << 30,
        ) {
            let file = state_file();
            let state = create(&file);
            let mut spaces = two_regions(&state);
            state.rewrite(&spaces, 1, Some(0)).unwrap();
            fork_and_move(&state, &mut spaces);
            for (at, value, shift) in changes {
                let words = MappedFile::map(&file).unwrap();
                let before = words.words()[at].load(Ordering::Acquire);
                words.words()[at].store(if shift % 2 == 0 { value >> shift } else { before ^ 1 << shift }, Ordering::Release);
            }
            if let Ok((_, _, spaces)) = take_over(&file) {
                for region in spaces.regions() {
                    prop_assert!(region.pages() <= 900);
                    region.set_resident(0..region.pages());
                    prop_assert_ne!(region.state(0), PageState::Absent);
                }
            }
            // What never was one.
            let other = state_file();
            other.set_len(len).unwrap();
            prop_assert!(State::open(&other).is_err());
        }
    }
}
