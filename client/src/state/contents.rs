//! What a state file says, read with all checks: whoever wrote it may have been another version, or anything.

use super::{
    AT_CALLS, AT_COMMIT, AT_DEADLINE_MS, AT_ENDED, AT_FILL, AT_IMAGE, AT_MAGIC, AT_MESSAGES, AT_MESSAGES_OF,
    AT_ON_LOSS, AT_OWNER, AT_SETTLED, AT_STATES, AT_VERSION, CALL_WORDS, MAGIC, MAX_CALLS, MAX_REGIONS,
    MAX_SPACES, MESSAGES, ON_LOSS, REGION_WORDS, SPACE_WORDS, StateError, TABLE_HEAD_WORDS, VERSION,
    table_range, wrong,
};
use crate::advice::Call;
use crate::huge::HUGE_PAGES;
use crate::page_state::WORD_PAGES;
use crate::session::Options;
use crate::uffd::{Event, MESSAGE_WORDS};
use postcopy_proto::digest::{DIGEST_BYTES, Digest};
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

// What a region is.
const SHARED: u64 = 1;
const LEFT: u64 = 2;
const DISPLACED: u64 = 4;
const HUGE: u64 = 8;

/// A region as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionRow {
    pub(crate) space: u32,
    pub(crate) address: usize,
    pub(crate) pages: usize,
    /// The page of the image's file that it begins with.
    pub(crate) first_page: usize,
    pub(crate) file_first_chunk: u64,
    pub(crate) file_bytes: u64,
    /// The word that the page states begin with, and of how many pages they are; several regions may share them.
    pub(crate) states_at: usize,
    pub(crate) states_pages: usize,
    /// The place of the region's first page among them.
    pub(crate) first_state: usize,
    pub(crate) is_shared: bool,
    /// Its pages are of 2 MiB.
    pub(crate) is_huge: bool,
    /// It has been moved, and this is where it was.
    pub(crate) is_left: bool,
    /// Other memory is where it was, and it is still to be told where it went.
    pub(crate) is_displaced: bool,
}

impl RegionRow {
    pub(super) fn words(&self) -> [u64; REGION_WORDS] {
        [
            u64::from(self.space),
            self.address as u64,
            self.pages as u64,
            self.first_page as u64,
            self.file_first_chunk,
            self.file_bytes,
            self.states_at as u64,
            self.states_pages as u64,
            self.first_state as u64,
            if self.is_shared { SHARED } else { 0 }
                | if self.is_left { LEFT } else { 0 }
                | if self.is_displaced { DISPLACED } else { 0 }
                | if self.is_huge { HUGE } else { 0 },
        ]
    }

    fn read(words: [u64; REGION_WORDS], file_words: usize) -> Result<Self, StateError> {
        let row = Self {
            space: u32::try_from(words[0]).unwrap_or(u32::MAX),
            address: to_usize(words[1]),
            pages: to_usize(words[2]),
            first_page: to_usize(words[3]),
            file_first_chunk: words[4],
            file_bytes: words[5],
            states_at: to_usize(words[6]),
            states_pages: to_usize(words[7]),
            first_state: to_usize(words[8]),
            is_shared: words[9] & SHARED != 0,
            is_left: words[9] & LEFT != 0,
            is_displaced: words[9] & DISPLACED != 0,
            is_huge: words[9] & HUGE != 0,
        };
        let end = row.pages.checked_mul(PAGE_BYTES).and_then(|len| row.address.checked_add(len));
        if !row.address.is_multiple_of(PAGE_BYTES) || row.pages == 0 || end.is_none() {
            return wrong(format!("a region of {} pages at {:#x}", row.pages, row.address));
        }
        if row.is_huge
            && ![row.address / PAGE_BYTES, row.pages, row.first_state]
                .iter()
                .all(|n| n.is_multiple_of(HUGE_PAGES))
        {
            return wrong(format!("a region of huge pages at {:#x} of {} pages", row.address, row.pages));
        }
        let states = row.first_state.checked_add(row.pages).filter(|end| *end <= row.states_pages);
        let words = row.states_at.checked_add(row.states_pages.div_ceil(WORD_PAGES));
        if states.is_none() || row.states_at < AT_STATES || words.is_none_or(|end| end > file_words) {
            return wrong(format!("page states at {} of {} pages", row.states_at, row.states_pages));
        }
        let file_pages = to_usize(row.file_bytes).div_ceil(PAGE_BYTES);
        if row.first_page.checked_add(row.pages).is_none_or(|end| end > file_pages) {
            return wrong(format!(
                "{} pages from page {} of a file of {file_pages}",
                row.pages, row.first_page
            ));
        }
        Ok(row)
    }
}

/// What a state file says, checked by itself, but not against the image or the descriptors.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) image: Digest,
    pub(crate) options: Options,
    /// The process that owned the first space, if that was known.
    pub(crate) owner: Option<u32>,
    /// All memory is registered.
    pub(crate) is_settled: bool,
    /// Each with its id and the number of its userfaultfd, in the order of their ids.
    pub(crate) spaces: Vec<(u32, RawFd)>,
    pub(crate) next_space: u32,
    pub(crate) regions: Vec<RegionRow>,
    /// The messages that were read and not done, and the space that they are of.
    pub(crate) messages_of: u32,
    /// How many of the messages received are done; not among these.
    pub(crate) messages_done: usize,
    pub(crate) messages: Vec<[u64; MESSAGE_WORDS]>,
    /// The calls of madvise that were in progress before these were read, if there was memory for which that matters.
    pub(crate) calls: Vec<Call>,
}

impl Contents {
    /// The numbers of the descriptors that it names.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let listed = self.spaces.iter().map(|(_, fd)| *fd);
        let coming = self.messages.iter().filter_map(|message| Event::child_of(*message));
        listed.chain(coming).collect()
    }

    pub(super) fn read(words: &[AtomicU64]) -> Result<Self, StateError> {
        let word = |at: usize| words[at].load(Ordering::Acquire);
        if words.len() < AT_STATES {
            // A new file has no length yet.
            return if words.is_empty() { Err(StateError::Empty) } else { wrong("it has been cut") };
        }
        if word(AT_MAGIC) == 0 {
            return Err(StateError::Empty);
        }
        if word(AT_MAGIC) != MAGIC {
            return wrong("it is something else");
        }
        if word(AT_VERSION) != VERSION {
            return Err(StateError::Version { found: word(AT_VERSION) });
        }
        let (generation, done) = (word(AT_COMMIT) >> 32, to_usize(word(AT_COMMIT) & u64::from(u32::MAX)));
        if generation == 0 {
            return Err(StateError::Empty);
        }
        if word(AT_ENDED) != 0 {
            return Err(StateError::Ended);
        }
        let table = &words[table_range(generation)];
        let word_of_table = |at: usize| table[at].load(Ordering::Acquire);
        let (space_count, region_count) = (to_usize(word_of_table(0)), to_usize(word_of_table(1)));
        if space_count > MAX_SPACES || region_count > MAX_REGIONS || done > MESSAGES {
            return wrong(format!("{space_count} spaces, {region_count} regions, {done} messages done"));
        }
        let next_space = u32::try_from(word_of_table(2)).or_else(|_| wrong("the number of a next space"))?;
        let mut spaces: Vec<(u32, RawFd)> = Vec::new();
        for index in 0..space_count {
            let at = TABLE_HEAD_WORDS + index * SPACE_WORDS;
            let id = u32::try_from(word_of_table(at)).ok().filter(|id| *id < next_space);
            let id = id.filter(|id| spaces.last().is_none_or(|(last, _)| last < id));
            let fd = RawFd::try_from(word_of_table(at + 1)).ok();
            let (Some(id), Some(fd)) = (id, fd) else { return wrong(format!("space {index} of the table")) };
            spaces.push((id, fd));
        }
        let mut regions: Vec<RegionRow> = Vec::new();
        let mut extents = BTreeMap::new();
        for index in 0..region_count {
            let at = TABLE_HEAD_WORDS + MAX_SPACES * SPACE_WORDS + index * REGION_WORDS;
            let row = RegionRow::read(std::array::from_fn(|i| word_of_table(at + i)), words.len())?;
            let end = |row: &RegionRow| (row.space, row.address + row.pages * PAGE_BYTES);
            // Those that were moved come last, in any order.
            let has_gone = |row: &RegionRow| row.is_left || row.is_displaced;
            let out_of_order = |last: &RegionRow| match (has_gone(last), has_gone(&row)) {
                (false, false) => end(last) > (row.space, row.address),
                (true, has_gone) => !has_gone,
                (false, true) => false,
            };
            if regions.last().is_some_and(out_of_order) {
                return wrong(format!("region {index} of the table is not after the one before"));
            }
            if spaces.binary_search_by_key(&row.space, |(id, _)| *id).is_err() {
                return wrong(format!("region {index} of the table is of a space that is not there"));
            }
            let kind = (row.states_pages, row.is_huge, row.is_shared);
            if *extents.entry(row.states_at).or_insert(kind) != kind {
                return wrong(format!("page states at {} are of two lengths, or kinds", row.states_at));
            }
            regions.push(row);
        }
        let mut last_end = AT_STATES;
        for (at, (pages, ..)) in extents {
            if at < last_end {
                return wrong(format!("page states at {at} overlap others"));
            }
            last_end = at + pages.div_ceil(WORD_PAGES).max(1);
        }
        let message = |index: usize| -> [u64; MESSAGE_WORDS] {
            std::array::from_fn(|i| word(AT_MESSAGES + index * MESSAGE_WORDS + i))
        };
        let call = |index: usize| {
            let [start, end, advice] = std::array::from_fn(|i| word(AT_CALLS + index * CALL_WORDS + i));
            Call { addresses: to_usize(start)..to_usize(end), advice }
        };
        let on_loss = ON_LOSS.get(to_usize(word(AT_ON_LOSS)));
        let Some(on_loss) = on_loss else { return wrong(format!("loss policy {}", word(AT_ON_LOSS))) };
        let mut image = [0; DIGEST_BYTES];
        for (index, bytes) in image.chunks_mut(8).enumerate() {
            bytes.copy_from_slice(&word(AT_IMAGE + index).to_le_bytes());
        }
        Ok(Self {
            image: image.into(),
            options: Options {
                fault_deadline: Duration::from_millis(word(AT_DEADLINE_MS)),
                on_loss: *on_loss,
                fill: word(AT_FILL) & 1 != 0,
                track_writes: word(AT_FILL) & 2 != 0,
                working_set: word(AT_FILL) & 4 != 0,
                record: word(AT_FILL) & 8 != 0,
                trace: word(AT_FILL) & 16 != 0,
            },
            owner: u32::try_from(word(AT_OWNER)).ok().filter(|pid| *pid != 0),
            is_settled: word(AT_SETTLED) != 0,
            spaces,
            next_space,
            regions,
            messages_of: u32::try_from(word(AT_MESSAGES_OF))
                .or_else(|_| wrong("whose messages these are"))?,
            messages_done: done,
            calls: (0..MAX_CALLS).map(call).take_while(|call| call.addresses.end != 0).collect(),
            messages: (done..MESSAGES).map(message).take_while(|message| message[0] != 0).collect(),
        })
    }
}
