//! The state file of a session: all that a successor needs to take over when the pager has died. It
//! holds spaces, regions, page states, and the messages that the pager has read but not processed.
//!
//! The file is mapped (a memfd, or a file on tmpfs), and outlives the process; docs/FORMATS.md has
//! the layout. It consists of 64-bit words. The pager appends each change of spaces as a record to
//! a log ([`log`]). When the log has become long, the pager compacts it: it writes the current
//! records as a second log, in a second place. A change takes effect with one store into the commit
//! word, which holds the current log, its length, and the number of processed messages. So at any
//! instruction at which the pager is killed, the file holds the state before a step or after it.
//! Page states change in place, in blocks that an arena allocates; each such step can be repeated.
//!
//! A session that no successor can take over has no file. Its page states lie in the memory of its
//! process.

mod compaction;
mod contents;
mod layout;
mod log;
mod replay;
#[cfg(test)]
mod tests;

pub(crate) use contents::Contents;
pub(crate) use layout::MESSAGES;
pub(crate) use log::Record;
pub(crate) use replay::replay;

use crate::memory::{AnswerCounts, Arena, ArenaFull, FixedWords, MappedFile, Spaces, Words};
use crate::options::Options;
use crate::processes::{Call, Process};
use crate::uffd::{Event, Uffd};
use layout::{
    ANSWERS, AT_ANSWERS, AT_CALLS, AT_COMMIT, AT_DEADLINE_MS, AT_ENDED, AT_FILL, AT_IMAGE, AT_LOGS,
    AT_LOSSES, AT_MAGIC, AT_MESSAGES, AT_MESSAGES_OF, AT_ON_LOSS, AT_OWNER, AT_OWNER_START,
    AT_RECORD_CACHE_MIB, AT_RECORD_PAGES, AT_REGISTERED, AT_STATES, AT_VERSION, CALL_WORDS, Commit,
    FILE_WORDS, HEADER_WORDS, LOG_WORDS, MAGIC, MAX_CALLS, ON_LOSS, VERSION, log_range,
};
use postcopy_proto::digest::Digest;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::uffd::MESSAGE_WORDS;

/// The least number of words of changes before a log is compacted: 256 KiB. The changes must also
/// have more words than the records that the log began with.
const LEAST_CHANGES: usize = 32_768;
/// The words of a log that are reserved at a time: 64 KiB.
const RESERVE_WORDS: usize = 8192;

/// The reason why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file is empty: no session has been attached with it yet. Attach one, instead of resuming
    /// it.
    #[error("the state file is empty")]
    Empty,
    /// The file's session has ended in order.
    #[error("the session of the state file has ended")]
    Ended,
    /// The file was written by another version of postcopy.
    #[error("the state file is of version {found}, not {VERSION}")]
    Version {
        /// The version that the file names.
        found: u64,
    },
    /// The content is not what a session writes; the text names the contradiction.
    #[error("the state file: {0}")]
    Wrong(String),
    /// The file has no room left; the text names the content that does not fit.
    #[error("the state file has no room for {0}; the session cannot go on")]
    Full(&'static str),
    /// The file cannot be created or mapped.
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

/// The logs of a file. Only the pager writes to them.
#[derive(Debug)]
struct Logs {
    file: Arc<MappedFile>,
    /// The progress of writing. The lock is held while a record or a log is written.
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    /// The number of words that the file system has allocated to each log.
    reserved: [usize; 2],
    /// The number of words that the current log began with.
    base_words: usize,
}

/// The state of a session, in a file or in the process's own memory, see the module.
#[derive(Debug)]
pub(crate) struct State {
    header: Arc<FixedWords>,
    arena: Arc<Arena>,
    logs: Option<Logs>,
}

impl State {
    /// Returns the state of a session that no successor can take over.
    pub(crate) fn own() -> Self {
        let header = FixedWords::Own((0..HEADER_WORDS).map(|_| AtomicU64::new(0)).collect());
        let state =
            Self { header: Arc::new(header), arena: Arc::new(Arena::new(Words::own(), 0)), logs: None };
        state.commit(Commit::default());
        state
    }

    /// Creates the state in a file, and discards the file's old content.
    ///
    /// # Errors
    /// [`StateError::Map`].
    pub(crate) fn create(
        file: impl AsFd,
        image: &Digest,
        options: &Options,
        owner: Option<Process>,
    ) -> Result<Self, StateError> {
        let bytes = (FILE_WORDS * size_of::<u64>()) as u64;
        rustix::fs::ftruncate(&file, 0).map_err(|error| StateError::Map(error.into()))?;
        rustix::fs::ftruncate(&file, bytes).map_err(|error| StateError::Map(error.into()))?;
        let state = Self::of(file)?;
        for (index, bytes) in image.as_bytes().chunks(8).enumerate() {
            state.set(
                AT_IMAGE + index,
                u64::from_le_bytes(bytes.try_into().expect("a digest is four times eight bytes")),
            );
        }
        state.set(
            AT_DEADLINE_MS,
            u64::try_from(options.fault_deadline.as_millis()).unwrap_or(u64::MAX).max(1),
        );
        let on_loss = ON_LOSS.iter().position(|policy| *policy == options.on_loss);
        state.set(AT_ON_LOSS, on_loss.expect("`ON_LOSS` lists every policy") as u64);
        let Options { fill, track_writes, working_set, record, trace, hold_causers, .. } = *options;
        let bits = [fill, track_writes, working_set, record, trace, hold_causers].into_iter().enumerate();
        state.set(AT_FILL, bits.map(|(bit, is_on)| u64::from(is_on) << bit).sum());
        if let Some(owner) = owner {
            state.set(AT_OWNER, owner.pid.into());
            state.set(AT_OWNER_START, owner.start);
        }
        state.set(AT_RECORD_PAGES, options.record_pages.into());
        state.set(AT_RECORD_CACHE_MIB, options.record_cache_mib.into());
        state.set(AT_VERSION, VERSION);
        state.set(AT_MAGIC, MAGIC);
        Ok(state)
    }

    /// Opens the state that a dead session left in a file, and reads the file's contents. The
    /// caller must call [`replay`] next.
    ///
    /// # Errors
    /// [`StateError`]; the file stays as it is.
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

    /// Returns the arena that holds the page states.
    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Returns all words of the file, if the session has one.
    fn file_words(&self) -> Option<&[AtomicU64]> {
        self.logs.as_ref().map(|logs| logs.file.words())
    }

    /// Returns whether the session has a file, so that a successor can take it over.
    pub(crate) fn has_file(&self) -> bool {
        self.logs.is_some()
    }

    /// Records that all memory of the process is registered.
    pub(crate) fn set_registered(&self) {
        self.set(AT_REGISTERED, 1);
    }

    /// Records that the session has ended in order: no successor may take it over.
    pub(crate) fn end(&self) {
        self.set(AT_ENDED, 1);
    }

    /// Counts waiters whose page is lost. The pager calls this before it carries out the loss
    /// policy, because it may be killed at any step.
    pub(crate) fn count_losses(&self, waiters: usize) {
        self.header[AT_LOSSES].fetch_add(waiters as u64, Ordering::AcqRel);
    }

    /// Returns the number of waiters whose page was lost, since the session was attached.
    pub(crate) fn losses(&self) -> u64 {
        self.header[AT_LOSSES].load(Ordering::Acquire)
    }

    /// Records the madvise calls in progress, before the pager receives messages: after the read,
    /// the calls may have returned. If there are more calls than fit, records none, because an
    /// incomplete list could mislead a successor.
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

    /// Reads the next messages of a space's userfaultfd, at most `most`, and returns their number.
    /// The pager must have processed all earlier messages.
    ///
    /// # Errors
    /// The error of read(2); EAGAIN counts as no message.
    pub(crate) fn receive(&self, space: u32, uffd: &Uffd, most: usize) -> io::Result<usize> {
        let messages = &self.header[AT_MESSAGES..AT_ANSWERS];
        // Cleared before the number of processed messages: a successor must not take an old message
        // for a new one.
        for word in messages {
            word.store(0, Ordering::Release);
        }
        self.set(AT_MESSAGES_OF, space.into());
        self.done(0);
        uffd.read_messages(&messages[..most * MESSAGE_WORDS])
    }

    /// Decodes a received message and counts it. The pager calls this once for each message.
    pub(crate) fn message(&self, index: usize) -> Event {
        let at = AT_MESSAGES + index * MESSAGE_WORDS;
        let message = std::array::from_fn(|word| self.header[at + word].load(Ordering::Acquire));
        let message = Event::of(message);
        self.header[AT_ANSWERS + layout::event(&message)].fetch_add(1, Ordering::Relaxed);
        message
    }

    /// Returns the counters of the kernel's answers.
    pub(crate) fn answers(&self) -> AnswerCounts {
        AnswerCounts::new(Arc::clone(&self.header), AT_ANSWERS)
    }

    fn committed(&self) -> Commit {
        Commit::of(self.header[AT_COMMIT].load(Ordering::Acquire)).unwrap_or_default()
    }

    fn commit(&self, commit: Commit) {
        self.set(AT_COMMIT, commit.word());
    }

    /// Records that the first `messages_done` received messages are processed, and have changed
    /// nothing but page states.
    pub(crate) fn done(&self, messages_done: usize) {
        // A file without a commit counts as empty, and stays so until its first log is written.
        if let Some(commit) = Commit::of(self.header[AT_COMMIT].load(Ordering::Acquire)) {
            self.commit(Commit { messages_done, ..commit });
        }
    }

    /// Appends a change to the log; `spaces` is the result of the change. The same store records
    /// that `messages_done` of the received messages are processed. None keeps the number.
    ///
    /// # Errors
    /// [`StateError::Full`]; the state before the change holds.
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

    /// Compacts the log: writes the current records as a new log.
    ///
    /// # Errors
    /// As for [`State::append`].
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
        let words = compaction::words_of(spaces, next_space);
        let log = 1 - committed.log;
        let mut written = logs.written();
        logs.write(&mut written, log, 0, &words)?;
        written.base_words = words.len();
        self.commit(Commit { log, log_words: words.len(), messages_done });
        // Frees the memory of the old log. If that fails, the log stays reserved.
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

    /// Writes words to a log, after its first `before` words.
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
            reserve.map_err(|_| StateError::Full("more records, because its file system is full"))?;
            *reserved = more;
        }
        for (word, value) in self.file.words()[range][before..end].iter().zip(words) {
            word.store(*value, Ordering::Release);
        }
        Ok(())
    }
}

/// Yields how often the kernel gave each answer, by name, since the session was attached. The
/// answers are outcomes of UFFDIO_COPY, UFFDIO_ZEROPAGE and UFFDIO_POISON, and the messages of the
/// userfaultfds. Works with a live session, and with one that has ended.
///
/// # Errors
/// [`StateError`], except [`StateError::Ended`].
pub fn answers(state: impl AsFd) -> Result<impl Iterator<Item = (&'static str, u64)>, StateError> {
    let file = map_counts(state)?;
    let counts: Vec<_> = file.words()[AT_ANSWERS..]
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .take(ANSWERS.len())
        .collect();
    Ok(ANSWERS.into_iter().zip(counts))
}

/// Returns how often faults were lost, so that the loss policy applied, since the session was
/// attached. Works with a live session, and with one that has ended.
///
/// # Errors
/// [`StateError`], except [`StateError::Ended`].
pub fn losses(state: impl AsFd) -> Result<u64, StateError> {
    Ok(map_counts(state)?.words()[AT_LOSSES].load(Ordering::Acquire))
}

/// Maps the file of a session, which may have ended.
fn map_counts(state: impl AsFd) -> Result<MappedFile, StateError> {
    let file = MappedFile::map(state).map_err(StateError::Map)?;
    match Contents::read(file.words()) {
        Ok(_) | Err(StateError::Ended) => Ok(file),
        Err(error) => Err(error),
    }
}

/// Returns the descriptors that a successor of the session needs: its userfaultfds, and those of
/// children whose fork messages were read and not processed. A process that shares the table of
/// descriptors with a dead pager must keep these open until a successor resumes the session.
///
/// # Errors
/// [`StateError`].
pub fn descriptors(state: impl AsFd) -> Result<Vec<RawFd>, StateError> {
    let file = MappedFile::map(state).map_err(StateError::Map)?;
    Ok(Contents::read(file.words())?.descriptors())
}
