//! The recordings of an image: the page faults of its newest restores.

use super::choose::{self, Recording};
use super::{Files, MAX_SET_PAGES, by_age};
use crate::store::Store;
use crate::store::error::StoreError;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, PageSpan};
use prost::Message;
use std::collections::{BTreeSet, HashMap};

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

/// The recordings kept so far, on the way from the newest to the oldest.
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
    /// Returns true if a recording of `bytes` bytes with these faults is kept, and counts it.
    fn takes(&mut self, touched: &[PageSpan], bytes: usize) -> bool {
        let mut files: BTreeSet<Option<u32>> = touched.iter().map(|span| Some(span.file)).collect();
        if files.is_empty() {
            files.insert(None);
        }
        let (pages, bytes) = (self.pages + choose::count(touched), self.bytes + bytes);
        let is_new = files.iter().any(|file| self.of_file.get(file).is_none_or(|count| *count < RECORDINGS));
        let fits =
            self.recordings < MAX_RECORDINGS && pages <= MAX_TOUCHED_PAGES && bytes <= MAX_RECORDINGS_BYTES;
        let takes = self.recordings == 0 || is_new && fits;
        if takes {
            (self.recordings, self.pages, self.bytes) = (self.recordings + 1, pages, bytes);
            for file in files {
                *self.of_file.entry(file).or_default() += 1;
            }
        }
        takes
    }
}

impl Store {
    /// Stores the page faults of a restore, the first 1 GiB of them, for the next build of the
    /// image's working set. `id` is the restore's own.
    ///
    /// Removes the oldest recordings: those with faults only on files that 16 newer recordings
    /// cover, and those beyond 256 recordings or 16 GiB of faulting pages in all.
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
        id: [u8; 16],
        touched: Vec<PageSpan>,
        unseen: Vec<PageSpan>,
    ) -> Result<(), StoreError> {
        let files = Files::new(self.root(image)?);
        touched.iter().chain(&unseen).try_for_each(|span| files.check(span))?;
        let Recording { touched, unseen } = choose::bounded(touched, unseen, MAX_SET_PAGES);
        let recording = v1::RecordRequest { touched, unseen, ..Default::default() };
        let path = self.objects.layout.recordings(image).join(Digest::of(&id).hex());
        self.objects.put(&path, recording.encode_to_vec().into())?;
        self.forget_recordings(image, &files)
    }

    /// Removes recordings that newer ones make superfluous.
    fn forget_recordings(&self, image: &Digest, files: &Files) -> Result<(), StoreError> {
        let mut kept = Kept::default();
        let dir = self.objects.layout.recordings(image);
        for entry in by_age(&self.objects, &dir)?.into_iter().rev() {
            let path = dir.join(&entry.name);
            let Some(bytes) = self.objects.read(&path, MAX_RECORDING_BYTES)? else { continue };
            let touched = parse(&bytes, files).map(|recording| recording.touched).unwrap_or_default();
            if kept.takes(&touched, bytes.len()) {
                continue;
            }
            // A restore may have sent its recording again meanwhile, so that it is new.
            let written = self.objects.written(&path)?;
            if written.is_some_and(|written| self.objects.is_same_time(written, entry.written)) {
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
                Ok(recording) => recordings.push(recording),
                // The other recordings suffice, and this one is removed in its turn.
                Err(reason) => {
                    tracing::warn!("the recording {} is left out: {reason}", path.display());
                }
            }
        }
        Ok(Some(recordings))
    }
}

/// Parses a stored recording with all checks, because the file may have been altered.
fn parse(bytes: &[u8], files: &Files) -> Result<Recording, String> {
    let recording = v1::RecordRequest::decode(bytes).map_err(|error| error.to_string())?;
    let mut spans = recording.touched.iter().chain(&recording.unseen);
    spans.try_for_each(|span| files.check(span)).map_err(|error| error.to_string())?;
    Ok(choose::bounded(recording.touched, recording.unseen, MAX_SET_PAGES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(file: u32, count: usize) -> PageSpan {
        PageSpan { file, first: 0, count: u32::try_from(count).unwrap() }
    }

    /// Returns the number of equal recordings that are kept, each of a file of its own.
    fn kept(pages: usize, bytes: usize) -> usize {
        let mut kept = Kept::default();
        (0..1000).filter(|file| kept.takes(&[span(*file, pages)], bytes)).count()
    }

    #[test]
    fn the_newest_recordings_are_kept_up_to_a_number_of_pages_and_of_bytes() {
        assert_eq!(kept(1, 1), MAX_RECORDINGS);
        assert_eq!(kept(MAX_SET_PAGES, 1), RECORDINGS);
        assert_eq!(kept(1, 1 << 20), MAX_RECORDINGS_BYTES >> 20);
        assert_eq!(kept(1, MAX_RECORDING_BYTES), 2);
        let mut kept = Kept::default();
        assert!(kept.takes(&[span(0, 1)], 2 * MAX_RECORDINGS_BYTES), "the newest one, whatever it is");
    }

    #[test]
    fn of_each_file_the_newest_recordings_are_kept_and_of_those_of_no_file() {
        let mut kept = Kept::default();
        for touched in [vec![span(0, 1)], vec![]] {
            assert_eq!((0..50).filter(|_| kept.takes(&touched, 1)).count(), RECORDINGS);
        }
        assert!(kept.takes(&[span(0, 1), span(1, 1)], 1), "the first one of file 1");
        assert!(!kept.takes(&[span(0, 1)], 1));
    }
}
