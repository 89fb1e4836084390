//! Patches: the changed pages of a chunk, over another chunk of the same length.
//!
//! A patch has the layout of a chunk's frame, with kind 2. Pages outside of all runs are those of
//! the other chunk, and a page within a run may be zero. A client sends patches; a server stores
//! the whole chunks that it makes of them.

use super::{ChunkFrame, FrameDecoder, FrameEncoder, FrameError, Kind};
use crate::page::{ChunkSize, PAGE_BYTES, PageRun};

/// A patch with a valid header; its coded bytes are unchecked.
#[derive(Clone, Copy, Debug)]
pub struct Patch<'a>(ChunkFrame<'a>);

impl<'a> Patch<'a> {
    /// Parses `bytes` as one patch, and checks its header.
    ///
    /// # Errors
    /// Returns the defect of the header, or [`FrameError::Length`] if bytes follow the patch.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        ChunkFrame::parse_whole(bytes, Kind::Patch).map(Self)
    }

    /// Returns the length of both chunks in bytes: 1 to 2 MiB.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.0.chunk_bytes
    }

    /// Returns the changed pages, ascending.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = PageRun> + use<'a> {
        self.0.runs()
    }
}

impl FrameDecoder {
    /// Replaces the changed pages of `chunk`, which holds the plain bytes of the other chunk.
    /// Returns the bytes of the changed pages, one after another.
    ///
    /// # Errors
    /// Returns [`FrameError::ChunkLength`] if `chunk` has another length than the patch's chunks,
    /// [`FrameError::Decode`] if the coded bytes are damaged; `chunk` is then unchanged.
    pub fn apply(&mut self, patch: &Patch<'_>, chunk: &mut [u8]) -> Result<&[u8], FrameError> {
        let frame = &patch.0;
        if chunk.len() != frame.chunk_bytes {
            return Err(FrameError::ChunkLength { actual: frame.chunk_bytes, expected: chunk.len() });
        }
        let mut held = std::mem::take(&mut self.held);
        held.resize(frame.plain_bytes, 0);
        let outcome = self.decode_held(frame, &mut held);
        self.held = held;
        outcome?;
        let mut taken = 0;
        for run in frame.runs() {
            let place = run.start_byte()..run.end_byte().min(chunk.len());
            let bytes = place.len();
            chunk[place].copy_from_slice(&self.held[taken..taken + bytes]);
            taken += bytes;
        }
        Ok(&self.held)
    }
}

impl FrameEncoder {
    /// Appends a patch to `out`. `pages` has the bytes of the pages of `runs`, one after another, a
    /// chunk's last page not padded.
    ///
    /// # Panics
    /// Panics if `runs` are not ascending, apart and in the chunk, or `pages` has another length.
    pub fn encode_patch(&mut self, chunk_bytes: usize, runs: &[PageRun], pages: &[u8], out: &mut Vec<u8>) {
        assert!((1..=ChunkSize::MAX.bytes()).contains(&chunk_bytes), "a chunk has 1 byte to 2 MiB");
        let (mut first_allowed, mut bytes) = (0, 0);
        for run in runs {
            assert!(run.count > 0 && usize::from(run.first) >= first_allowed, "ascending and apart");
            assert!(run.end_page() <= chunk_bytes.div_ceil(PAGE_BYTES), "in the chunk");
            first_allowed = run.end_page() + 1;
            bytes += run.end_byte().min(chunk_bytes) - run.start_byte();
        }
        assert!(bytes > 0 && bytes == pages.len(), "the pages of the runs");
        self.encode_held(Kind::Patch, chunk_bytes, runs, pages, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two chunks of the same length, and the runs of pages in which they may differ.
    fn any_change() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, Vec<PageRun>)> {
        let pages = proptest::collection::vec((any::<u8>(), any::<Option<u8>>()), 1..20);
        (pages, 0..PAGE_BYTES, any::<prop::sample::Index>()).prop_map(|(pages, cut, one)| {
            let one = one.index(pages.len());
            let (mut before, mut after) = (Vec::new(), Vec::new());
            let mut runs: Vec<PageRun> = Vec::new();
            for (page, (number, (old, new))) in (0u16..).zip(pages.into_iter().enumerate()) {
                let new = if number == one { Some(new.unwrap_or(0)) } else { new };
                before.extend([old; PAGE_BYTES]);
                after.extend([new.unwrap_or(old); PAGE_BYTES]);
                match runs.last_mut() {
                    _ if new.is_none() => {}
                    Some(run) if run.end_page() == usize::from(page) => run.count += 1,
                    _ => runs.push(PageRun { first: page, count: 1 }),
                }
            }
            let bytes = before.len() - cut;
            before.truncate(bytes);
            after.truncate(bytes);
            (before, after, runs)
        })
    }

    fn patch_of(after: &[u8], runs: &[PageRun]) -> Vec<u8> {
        let bytes = |run: &PageRun| &after[run.start_byte()..run.end_byte().min(after.len())];
        let pages: Vec<u8> = runs.iter().flat_map(bytes).copied().collect();
        let mut patch = Vec::new();
        FrameEncoder::new(3).encode_patch(after.len(), runs, &pages, &mut patch);
        patch
    }

    #[test]
    fn a_patch_is_no_chunk_s_frame_and_a_frame_no_patch() {
        let patch = patch_of(&[7; 8192], &[PageRun { first: 1, count: 1 }]);
        assert_eq!(ChunkFrame::parse(&patch).unwrap_err(), FrameError::Kind(2));
        let mut frame = Vec::new();
        assert!(FrameEncoder::new(3).encode(&[7; 8192], &mut frame));
        assert_eq!(Patch::parse(&frame).unwrap_err(), FrameError::Kind(0));
        let other = FrameDecoder::default().apply(&Patch::parse(&patch).unwrap(), &mut [0; 8191]).err();
        assert_eq!(other, Some(FrameError::ChunkLength { actual: 8192, expected: 8191 }));
    }

    proptest! {
        #[test]
        fn a_patch_makes_one_chunk_of_the_other((before, after, runs) in any_change()) {
            let patch = patch_of(&after, &runs);
            let patch = Patch::parse(&patch).unwrap();
            prop_assert_eq!(patch.runs().collect::<Vec<_>>(), runs);
            let mut chunk = before;
            FrameDecoder::default().apply(&patch, &mut chunk).unwrap();
            prop_assert_eq!(chunk, after);
        }

        #[test]
        fn any_bytes_are_a_patch_or_an_error(
            (_, after, runs) in any_change(),
            at in any::<prop::sample::Index>(),
            byte: u8,
        ) {
            let mut bytes = patch_of(&after, &runs);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(patch) = Patch::parse(&bytes) {
                let _ = FrameDecoder::default().apply(&patch, &mut vec![0; patch.chunk_bytes()]);
            }
        }
    }
}
