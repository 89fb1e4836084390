//! The recordings of an image: the page faults of its newest restores.
//!
//! Recordings that are too many go in turns of their senders: the newest of each sender stay before
//! the second newest of any. So a sender of many recordings has one voice among those of others, and
//! alone cannot move a set that two others have recorded.

use super::choose::{self, Recording};
use super::{Files, MAX_SET_PAGES, by_age};
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::objects::Entry;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, PageSpan};
use prost::Message;
use std::collections::{BTreeMap, HashMap};

/// Number of recordings that are kept for each file: the newest ones with faults on it. A restore
/// of several processes makes one recording for each, and each process faults on files of its own.
pub(super) const RECORDINGS: usize = 16;
/// Most recordings that are kept of an image.
const MAX_RECORDINGS: usize = 256;
/// Most bytes of a recording that is read again.
const MAX_RECORDING_BYTES: usize = 32 << 20;
/// Most faulting pages, and most bytes, of all recordings of an image together.
const MAX_TOUCHED_PAGES: u64 = (RECORDINGS * MAX_SET_PAGES) as u64;
const MAX_RECORDINGS_BYTES: usize = 2 * MAX_RECORDING_BYTES;
const SENDER_BYTES: usize = 16;

/// A recording's restore and sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordingOf {
    /// The restore's own id. A later recording with the same id replaces this one.
    pub restore: [u8; 16],
    /// The client that sent the recording.
    pub sender: [u8; SENDER_BYTES],
}

/// A stored recording, as far as it matters for which ones stay.
struct Stored {
    entry: Entry,
    /// Empty for recordings of older servers.
    sender: Vec<u8>,
    /// Its files with faults, ascending; none if it cannot be read.
    files: Vec<u32>,
    pages: u64,
    bytes: usize,
}

impl Stored {
    fn new(entry: Entry, bytes: &[u8], files: &Files) -> Self {
        let (sender, touched) = match parse(bytes, files) {
            Ok((sender, recording)) => (sender, recording.touched),
            Err(_) => (Vec::new(), Vec::new()),
        };
        let mut of_files: Vec<u32> = touched.iter().map(|span| span.file).collect();
        of_files.sort_unstable();
        of_files.dedup();
        Self { entry, sender, files: of_files, pages: choose::count(&touched), bytes: bytes.len() }
    }

    /// Returns its files; `None` stands for none.
    fn files(&self) -> impl Iterator<Item = Option<u32>> {
        let none = self.files.is_empty().then_some(None);
        self.files.iter().copied().map(Some).chain(none)
    }
}

/// Sorts recordings, the newest first, by turns: how many newer ones of its sender have faults on
/// one of its files, at most.
fn in_turns(newest_first: Vec<Stored>) -> impl Iterator<Item = Stored> {
    let mut of_senders: HashMap<(Vec<u8>, Option<u32>), usize> = HashMap::new();
    let mut turns: BTreeMap<usize, Vec<Stored>> = BTreeMap::new();
    for stored in newest_first {
        let mut turn = 0;
        for file in stored.files() {
            let newer = of_senders.entry((stored.sender.clone(), file)).or_default();
            turn = turn.max(*newer);
            *newer += 1;
        }
        turns.entry(turn).or_default().push(stored);
    }
    turns.into_values().flatten()
}

/// The recordings kept so far, in the order in which they are chosen.
#[derive(Default)]
struct Kept {
    /// Number of recordings for each file; `None` counts those that have no faults or cannot be
    /// read.
    of_file: HashMap<Option<u32>, usize>,
    recordings: usize,
    pages: u64,
    bytes: usize,
}

impl Kept {
    /// Returns true if a recording is kept, and counts it.
    fn takes(&mut self, stored: &Stored) -> bool {
        let (pages, bytes) = (self.pages + stored.pages, self.bytes + stored.bytes);
        let has_room = |file| self.of_file.get(&file).is_none_or(|count| *count < RECORDINGS);
        let is_new = stored.files().any(has_room);
        let fits =
            self.recordings < MAX_RECORDINGS && pages <= MAX_TOUCHED_PAGES && bytes <= MAX_RECORDINGS_BYTES;
        let takes = self.recordings == 0 || is_new && fits;
        if takes {
            (self.recordings, self.pages, self.bytes) = (self.recordings + 1, pages, bytes);
            for file in stored.files() {
                *self.of_file.entry(file).or_default() += 1;
            }
        }
        takes
    }
}

impl Store {
    /// Stores the page faults of a restore, the first 1 GiB of them, for the next build of the
    /// image's working set.
    ///
    /// Removes recordings: those with faults only on files that 16 others cover, and those beyond
    /// 256 recordings or 16 GiB of faulting pages in all. The newest of each sender stay before the
    /// second newest of any.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the image does not exist, [`StoreError::Invalid`] if a
    /// span lies outside of the image; nothing is then stored.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn keep_recording(
        &self,
        image: &Digest,
        of: RecordingOf,
        touched: Vec<PageSpan>,
        unseen: Vec<PageSpan>,
    ) -> Result<(), StoreError> {
        let files = Files::new(self.root(image)?);
        touched.iter().chain(&unseen).try_for_each(|span| files.check(span))?;
        let Recording { touched, unseen } = choose::bounded(touched, unseen, MAX_SET_PAGES);
        let id = of.sender.to_vec().into();
        let recording = v1::RecordRequest { id, touched, unseen, ..Default::default() };
        let path = self.objects.layout.recordings(image).join(Digest::of(&of.restore).hex());
        self.objects.put(&path, recording.encode_to_vec().into())?;
        self.forget_recordings(image, &files)
    }

    /// Removes recordings that others make superfluous.
    fn forget_recordings(&self, image: &Digest, files: &Files) -> Result<(), StoreError> {
        let dir = self.objects.layout.recordings(image);
        let mut stored = Vec::new();
        for entry in by_age(&self.objects, &dir)?.into_iter().rev() {
            let Some(bytes) = self.objects.read(&dir.join(&entry.name), MAX_RECORDING_BYTES)? else {
                continue;
            };
            stored.push(Stored::new(entry, &bytes, files));
        }
        let mut kept = Kept::default();
        for superfluous in in_turns(stored).filter(|stored| !kept.takes(stored)) {
            let path = dir.join(&superfluous.entry.name);
            // A restore may have sent its recording again meanwhile, so that it is new.
            let written = self.objects.written(&path)?;
            if written.is_some_and(|written| self.objects.is_same_time(written, superfluous.entry.written)) {
                self.objects.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Returns the recordings; `None` if there are none at all.
    pub(super) fn recordings(
        &self,
        image: &Digest,
        files: &Files,
    ) -> Result<Option<Vec<Recording>>, StoreError> {
        let dir = self.objects.layout.recordings(image);
        let entries = by_age(&self.objects, &dir)?;
        if entries.is_empty() {
            return Ok(None);
        }
        let mut recordings = Vec::new();
        for entry in entries {
            let path = dir.join(&entry.name);
            let Some(bytes) = self.objects.read(&path, MAX_RECORDING_BYTES)? else { continue };
            match parse(&bytes, files) {
                Ok((_, recording)) => recordings.push(recording),
                // The other recordings suffice, and this one is removed in its turn.
                Err(reason) => {
                    tracing::warn!("the recording {} is left out: {reason}", path.display());
                }
            }
        }
        Ok(Some(recordings))
    }
}

/// Parses a stored recording with all checks, because the file may have been altered. Returns its
/// sender, too.
fn parse(bytes: &[u8], files: &Files) -> Result<(Vec<u8>, Recording), String> {
    let recording = v1::RecordRequest::decode(bytes).map_err(|error| error.to_string())?;
    let mut spans = recording.touched.iter().chain(&recording.unseen);
    spans.try_for_each(|span| files.check(span)).map_err(|error| error.to_string())?;
    let sender = recording.id.iter().copied().take(SENDER_BYTES).collect();
    Ok((sender, choose::bounded(recording.touched, recording.unseen, MAX_SET_PAGES)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a recording of sender `sender` with faults on `file`, if any.
    fn stored(sender: u8, file: Option<u32>, pages: usize, bytes: usize) -> Stored {
        let entry = Entry { name: format!("{sender}"), bytes: 0, written: std::time::UNIX_EPOCH };
        let files = file.into_iter().collect();
        Stored { entry, sender: vec![sender], files, pages: pages as u64, bytes }
    }

    /// Returns the number of equal recordings that are kept, each of a file of its own.
    fn kept(pages: usize, bytes: usize) -> usize {
        let mut kept = Kept::default();
        (0..1000).filter(|file| kept.takes(&stored(0, Some(*file), pages, bytes))).count()
    }

    #[test]
    fn the_newest_recordings_are_kept_up_to_a_number_of_pages_and_of_bytes() {
        assert_eq!(kept(1, 1), MAX_RECORDINGS);
        assert_eq!(kept(MAX_SET_PAGES, 1), RECORDINGS);
        assert_eq!(kept(1, 1 << 20), MAX_RECORDINGS_BYTES >> 20);
        assert_eq!(kept(1, MAX_RECORDING_BYTES), 2);
        let mut kept = Kept::default();
        let newest = stored(0, Some(0), 1, 2 * MAX_RECORDINGS_BYTES);
        assert!(kept.takes(&newest), "the newest one, whatever it is");
    }

    #[test]
    fn of_each_file_the_newest_recordings_are_kept_and_of_those_of_no_file() {
        let mut kept = Kept::default();
        for file in [Some(0), None] {
            assert_eq!((0..50).filter(|_| kept.takes(&stored(0, file, 1, 1))).count(), RECORDINGS);
        }
        let both = Stored { files: vec![0, 1], ..stored(0, None, 1, 1) };
        assert!(kept.takes(&both), "the first one of file 1");
        assert!(!kept.takes(&stored(0, Some(0), 1, 1)));
    }

    #[test]
    fn a_sender_of_many_recordings_has_one_voice_among_others() {
        // The newest first: a stranger's, then those of three senders.
        let senders = [vec![9; 40], vec![1; 16], vec![2; 16], vec![3]].concat();
        let recordings = senders.into_iter().map(|sender| stored(sender, Some(0), 1, 1)).collect();
        let mut kept = Kept::default();
        let kept: Vec<_> = in_turns(recordings).filter(|stored| kept.takes(stored)).collect();
        let of = |sender: u8| kept.iter().filter(|stored| stored.sender == [sender]).count();
        assert_eq!([of(9), of(1), of(2), of(3)], [5, 5, 5, 1]);
        // Processes of one restore have files of their own, and each is its file's newest.
        let of_files = (0..20).map(|file| stored(1, Some(file), 1, 1)).collect();
        assert_eq!(
            in_turns(of_files).map(|stored| stored.files[0]).collect::<Vec<_>>(),
            Vec::from_iter(0..20)
        );
    }
}
