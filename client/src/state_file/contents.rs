//! The contents of a state file, read with full checks: another version or another program may have
//! written it.

use super::layout::{
    AT_CALLS, AT_COMMIT, AT_DEADLINE_MS, AT_ENDED, AT_FILL, AT_IMAGE, AT_MAGIC, AT_MESSAGES, AT_MESSAGES_OF,
    AT_ON_LOSS, AT_OWNER, AT_OWNER_START, AT_RECORD_CACHE_MIB, AT_RECORD_PAGES, AT_REGISTERED, AT_STATES,
    AT_VERSION, CALL_WORDS, Commit, LOG_WORDS, MAGIC, MAX_CALLS, MESSAGES, ON_LOSS, VERSION, log_range,
};
use super::log::Record;
use super::{StateError, wrong};
use crate::memory::Change;
use crate::options::Options;
use crate::processes::{Call, Process};
use crate::uffd::{Event, MESSAGE_WORDS};
use postcopy_proto::digest::{DIGEST_BYTES, Digest};
use postcopy_proto::page::to_usize;
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The contents of a state file. [`super::replay`] turns `records` into regions and page states.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) image: Digest,
    pub(crate) options: Options,
    /// The process of the first space.
    pub(crate) owner: Option<Process>,
    /// The processes of spaces, as far as they are known for certain.
    pub(crate) processes: BTreeMap<u32, Process>,
    pub(crate) is_registered: bool,
    /// The records of the current log.
    pub(crate) records: Vec<Record>,
    /// The spaces that exist at the end of the log, by id, with their descriptors' numbers.
    pub(crate) spaces: BTreeMap<u32, RawFd>,
    pub(crate) next_space: u32,
    /// The space whose messages were read last.
    pub(crate) messages_of: u32,
    /// The number of received messages that are processed. `messages` has only the other ones.
    pub(crate) messages_done: usize,
    pub(crate) messages: Vec<[u64; MESSAGE_WORDS]>,
    /// The madvise calls that were in progress before the messages were read. Empty if the
    /// session's memory does not need them.
    pub(crate) calls: Vec<Call>,
}

impl Contents {
    /// Returns the numbers of the descriptors that the file names.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let listed = self.spaces.values().copied();
        let coming = self.messages.iter().filter_map(|message| Event::child_of(*message));
        listed.chain(coming).collect()
    }

    pub(super) fn read(words: &[AtomicU64]) -> Result<Self, StateError> {
        let word = |at: usize| words[at].load(Ordering::Acquire);
        if words.len() < AT_STATES {
            // A new file has no length.
            return if words.is_empty() { Err(StateError::Empty) } else { wrong("its end is missing") };
        }
        if word(AT_MAGIC) == 0 {
            return Err(StateError::Empty);
        }
        if word(AT_MAGIC) != MAGIC {
            return wrong("it does not begin as a state file does");
        }
        if word(AT_VERSION) != VERSION {
            return Err(StateError::Version { found: word(AT_VERSION) });
        }
        let Some(commit) = Commit::of(word(AT_COMMIT)) else { return Err(StateError::Empty) };
        if word(AT_ENDED) != 0 {
            return Err(StateError::Ended);
        }
        if commit.log_words > LOG_WORDS || commit.messages_done > MESSAGES {
            return wrong(format!(
                "its commit word names a log of {} words and {} processed messages",
                commit.log_words, commit.messages_done
            ));
        }
        let records = records(&words[log_range(commit.log)][..commit.log_words])?;
        let (spaces, next_space) = spaces(&records)?;
        let message = |index: usize| -> [u64; MESSAGE_WORDS] {
            std::array::from_fn(|i| word(AT_MESSAGES + index * MESSAGE_WORDS + i))
        };
        let call = |index: usize| {
            let [start, end, advice] = std::array::from_fn(|i| word(AT_CALLS + index * CALL_WORDS + i));
            Call { addresses: to_usize(start)..to_usize(end), advice }
        };
        let on_loss = ON_LOSS.get(to_usize(word(AT_ON_LOSS)));
        let Some(on_loss) = on_loss else {
            return wrong(format!("loss policy {} is unknown", word(AT_ON_LOSS)));
        };
        let mut image = [0; DIGEST_BYTES];
        for (index, bytes) in image.chunks_mut(8).enumerate() {
            bytes.copy_from_slice(&word(AT_IMAGE + index).to_le_bytes());
        }
        let done = commit.messages_done;
        let pid = u32::try_from(word(AT_OWNER)).ok().filter(|pid| *pid != 0);
        let owner = pid.map(|pid| Process { pid, start: word(AT_OWNER_START) });
        let identified = records.iter().filter_map(|record| match record {
            Record::Process { space, process } => Some((*space, *process)),
            _ => None,
        });
        Ok(Self {
            image: image.into(),
            options: Options {
                fault_deadline: Duration::from_millis(word(AT_DEADLINE_MS)),
                on_loss: *on_loss,
                fill: word(AT_FILL) & 1 != 0,
                track_writes: word(AT_FILL) & 2 != 0,
                working_set: word(AT_FILL) & 4 != 0,
                record: word(AT_FILL) & 8 != 0,
                record_pages: u32::try_from(word(AT_RECORD_PAGES))
                    .ok()
                    .filter(|pages| (1..=Options::MOST_RECORD_PAGES).contains(pages))
                    .unwrap_or(Options::MOST_RECORD_PAGES),
                record_cache_mib: u32::try_from(word(AT_RECORD_CACHE_MIB))
                    .ok()
                    .filter(|mib| *mib > 0)
                    .unwrap_or(Options::DEFAULT.record_cache_mib),
                trace: word(AT_FILL) & 16 != 0,
                hold_causers: word(AT_FILL) & 32 != 0,
            },
            processes: owner.map(|owner| (0, owner)).into_iter().chain(identified).collect(),
            owner,
            is_registered: word(AT_REGISTERED) != 0,
            records,
            spaces,
            next_space,
            messages_of: u32::try_from(word(AT_MESSAGES_OF))
                .or_else(|_| wrong("the space of its messages is not a number of 32 bits"))?,
            messages_done: done,
            calls: (0..MAX_CALLS).map(call).take_while(|call| call.addresses.end != 0).collect(),
            messages: (done..MESSAGES).map(message).take_while(|message| message[0] != 0).collect(),
        })
    }
}

fn records(log: &[AtomicU64]) -> Result<Vec<Record>, StateError> {
    let (mut records, mut at) = (Vec::new(), 0);
    while at < log.len() {
        let (record, next) = Record::read(|at| log[at].load(Ordering::Acquire), at, log.len())?;
        records.push(record);
        at = next;
    }
    Ok(records)
}

/// Returns the spaces that exist at the end of a log, and the id of the next space.
fn spaces(records: &[Record]) -> Result<(BTreeMap<u32, RawFd>, u32), StateError> {
    let (mut spaces, mut next) = (BTreeMap::new(), 0);
    for record in records {
        if let Record::Fork { parent: base, child: id, .. } | Record::Copy { base, space: id, .. } = record
            && id <= base
        {
            return wrong(format!("its log makes space {id} of space {base}, which has no lower id"));
        }
        match record {
            Record::NextSpace { id } => next = (*id).max(next),
            Record::Space { id, fd }
            | Record::Fork { child: id, fd, .. }
            | Record::Copy { space: id, fd, .. } => {
                next = next.max(id.saturating_add(1));
                if spaces.insert(*id, *fd).is_some() {
                    return wrong(format!("its log creates space {id} twice"));
                }
            }
            Record::Change(Change::Forget { space }) => drop(spaces.remove(space)),
            Record::Object(_) | Record::Region(_) | Record::Change(_) | Record::Process { .. } => {}
        }
    }
    Ok((spaces, next))
}
