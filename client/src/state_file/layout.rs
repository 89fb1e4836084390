//! The layout of a state file, in words of 64 bits. docs/FORMATS.md describes the same layout for
//! other readers.

use crate::options::LossPolicy;
use crate::uffd::{Event, MESSAGE_WORDS};
use std::ops::Range;

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"postcopy");
pub(super) const VERSION: u64 = 3;

/// The largest number of messages that the pager reads at once.
pub(crate) const MESSAGES: usize = 32;

pub(super) const AT_MAGIC: usize = 0;
pub(super) const AT_VERSION: usize = 1;
pub(super) const AT_IMAGE: usize = 2;
pub(super) const AT_DEADLINE_MS: usize = 6;
pub(super) const AT_ON_LOSS: usize = 7;
pub(super) const AT_FILL: usize = 8;
pub(super) const AT_ENDED: usize = 9;
pub(super) const AT_OWNER: usize = 10;
pub(super) const AT_REGISTERED: usize = 11;
pub(super) const AT_OWNER_START: usize = 12;
/// 0 in files of versions without this limit.
pub(super) const AT_RECORD_PAGES: usize = 13;
/// Likewise 0 in files of versions without this limit.
pub(super) const AT_RECORD_CACHE_MIB: usize = 14;
/// Likewise 0 in files of versions without this count.
pub(super) const AT_LOSSES: usize = 15;
pub(super) const AT_COMMIT: usize = 16;
pub(super) const AT_MESSAGES_OF: usize = 24;
pub(super) const AT_MESSAGES: usize = 32;
pub(super) const AT_ANSWERS: usize = AT_MESSAGES + MESSAGES * MESSAGE_WORDS;
pub(super) const AT_CALLS: usize = AT_ANSWERS + ANSWERS.len();
pub(super) const MAX_CALLS: usize = 16;
pub(super) const CALL_WORDS: usize = 3;
pub(super) const HEADER_WORDS: usize = AT_CALLS + MAX_CALLS * CALL_WORDS;
/// The first of two logs, of at most 512 MiB each. The commit word names the current one.
pub(super) const AT_LOGS: usize = 1024;
pub(super) const LOG_WORDS: usize = (1 << 26) - AT_LOGS / 2;
/// The page states: the rest of the file, enough for 48 TiB of memory.
pub(super) const AT_STATES: usize = 1 << 27;
/// The length of the file: 4 GiB, of which only words in use take memory.
pub(super) const FILE_WORDS: usize = 1 << 29;

const _: () = assert!(HEADER_WORDS <= AT_LOGS && AT_LOGS + 2 * LOG_WORDS == AT_STATES);

/// The loss policies, by their numbers in the file.
pub(super) const ON_LOSS: [LossPolicy; 4] =
    [LossPolicy::Poison, LossPolicy::Wait, LossPolicy::Kill, LossPolicy::Pause];

/// The names of the kernel's answers and messages, in the order of their counters in the file.
pub(super) const ANSWERS: [&str; 12] = [
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

pub(super) fn event(event: &Event) -> usize {
    match event {
        Event::Fault { .. } => 7,
        Event::Remove { .. } => 8,
        Event::Unmap { .. } => 9,
        Event::Remap { .. } => 10,
        Event::Fork { .. } | Event::Unknown { .. } => 11,
    }
}

/// The commit word, the one store that makes a step take effect. It holds the current log, the
/// log's length, and the number of received messages that are processed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Commit {
    /// The current log, 0 or 1.
    pub(super) log: usize,
    pub(super) log_words: usize,
    pub(super) messages_done: usize,
}

const VALID: u64 = 1 << 63;
const LOG_SHIFT: u32 = 62;
const DONE_BITS: u32 = 8;

impl Commit {
    pub(super) fn word(self) -> u64 {
        VALID
            | (self.log as u64) << LOG_SHIFT
            | (self.log_words as u64) << DONE_BITS
            | self.messages_done as u64
    }

    /// Decodes a commit word. Returns None if nothing has been committed yet.
    pub(super) fn of(word: u64) -> Option<Self> {
        let number = postcopy_proto::page::to_usize;
        (word & VALID != 0).then(|| Self {
            log: number(word >> LOG_SHIFT & 1),
            log_words: number(word << 2 >> 2 >> DONE_BITS),
            messages_done: number(word & ((1 << DONE_BITS) - 1)),
        })
    }
}

/// Returns the words of a log.
pub(super) fn log_range(log: usize) -> Range<usize> {
    let start = AT_LOGS + log * LOG_WORDS;
    start..start + LOG_WORDS
}
