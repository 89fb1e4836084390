//! The recordings of an image: what restores of it have touched, the newest of them.

use super::choose::{self, Recording};
use super::{Files, MAX_SET_PAGES, by_age};
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::objects::{self, read_bounded};
use postcopy_proto::digest::Digest;
use postcopy_proto::v1::{self, PageSpan};
use prost::Message;
use std::collections::{BTreeSet, HashMap};
use std::fs;

/// Recordings that are kept of an image: the newest ones that have touched the same file. A restore of several processes makes one
/// for each, and each touches files of its own.
pub(super) const RECORDINGS: usize = 16;
/// Recordings that are kept of an image, of whatever files.
const MAX_RECORDINGS: usize = 256;
/// The longest recording that is read again.
const MAX_RECORDING_BYTES: usize = 32 << 20;
/// Touched pages, and bytes, of all recordings of an image together.
const MAX_TOUCHED_PAGES: u64 = (RECORDINGS * MAX_SET_PAGES) as u64;
const MAX_RECORDINGS_BYTES: usize = 2 * MAX_RECORDING_BYTES;

/// What is kept, as it is gone through from the newest recording to the oldest.
#[derive(Default)]
struct Kept {
    /// Recordings by the files that they touch; by none those that touch nothing, or cannot be read.
    of_file: HashMap<Option<u32>, usize>,
    recordings: usize,
    pages: u64,
    bytes: usize,
}

impl Kept {
    /// Whether a recording of so many bytes that has touched this is kept, too.
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
    /// Keeps what a restore has touched, under an id of 16 bytes that is its own, for the next build of the image's working
    /// set: the first 1 GiB of it. The oldest recordings are forgotten: those that have touched only files that 16 newer ones have
    /// touched, and those beyond 256, or beyond 16 GiB of touched pages, in all.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]: there is no such image. [`StoreError::Invalid`]: a span is not of the image; nothing is kept.
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
        let path = self.layout.recordings(image).join(Digest::of(&id).hex());
        self.objects.put(&path, recording.encode_to_vec().into())?;
        self.forget_recordings(image, &files)
    }

    /// Removes those that newer ones make superfluous.
    fn forget_recordings(&self, image: &Digest, files: &Files) -> Result<(), StoreError> {
        let mut kept = Kept::default();
        for (time, path) in by_age(&self.layout.recordings(image))?.into_iter().rev() {
            let Some(bytes) = read_bounded(&path, MAX_RECORDING_BYTES)? else { continue };
            let touched = parse(&bytes, files).map(|recording| recording.touched).unwrap_or_default();
            if kept.takes(&touched, bytes.len()) {
                continue;
            }
            // One that its restore has told anew meanwhile is not old any more.
            let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
            if written.is_ok_and(|written| written == time) {
                objects::remove(&path)?;
            }
        }
        Ok(())
    }

    /// The recordings; None if there are none at all.
    pub(super) fn recordings(
        &self,
        image: &Digest,
        files: &Files,
    ) -> Result<Option<Vec<Recording>>, StoreError> {
        let paths = by_age(&self.layout.recordings(image))?;
        if paths.is_empty() {
            return Ok(None);
        }
        let mut recordings = Vec::new();
        for (_, path) in paths {
            let Some(bytes) = read_bounded(&path, MAX_RECORDING_BYTES)? else { continue };
            match parse(&bytes, files) {
                Ok(recording) => recordings.push(recording),
                // The others say enough, and it is forgotten in its turn.
                Err(reason) => {
                    tracing::warn!("the recording {} is left out: {reason}", path.display());
                }
            }
        }
        Ok(Some(recordings))
    }
}

/// A recording that was kept, with all checks: it may have been altered since.
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

    /// How many of equal ones are kept, each of a file of its own.
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
