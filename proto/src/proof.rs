//! Proofs: the evidence that a page belongs to a chunk, without the rest of the chunk.
//!
//! A chunk's digest is the root of BLAKE3's own tree over its bytes, in which each page of 4 KiB is
//! a subtree. A proof for some pages holds the chaining values of the largest subtrees without any
//! of these pages, from left to right. The pages and the proof suffice to compute the root. A proof
//! takes at most 32 bytes for each halving of the chunk: 128 bytes for one page of 64 KiB, and less
//! for each page if neighbours share values.
//!
//! See section 2.1 of the BLAKE3 paper, and [`blake3::hazmat`].

use crate::digest::{DIGEST_BYTES, Digest};
use crate::page::{PAGE_BYTES, PageRun};
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

/// A proof that does not hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProofError {
    /// The runs are empty, not ascending, or outside of the chunk.
    #[error("page run {0} is not ascending and in the chunk")]
    Run(usize),
    /// The pages have another number of bytes than the runs.
    #[error("the pages have {actual} bytes, their runs say {expected}")]
    PageBytes {
        /// The actual number of bytes.
        actual: usize,
        /// The required number of bytes.
        expected: usize,
    },
    /// The proof is not a list of chaining values, too short or too long.
    #[error("the proof has {0} bytes, which is not what these pages need")]
    ProofBytes(usize),
    /// The pages differ from those of the chunk.
    #[error("the pages do not belong to chunk {0}")]
    Mismatch(Digest),
}

/// The chaining values of a chunk's pages: for proofs of any of them, and for the digest of a chunk
/// that differs in some of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaves {
    chunk_bytes: usize,
    values: Vec<ChainingValue>,
}

impl Leaves {
    /// Computes the chaining values of a chunk from its bytes.
    #[must_use]
    pub fn of(chunk: &[u8]) -> Self {
        let pages = (0..).step_by(PAGE_BYTES).zip(chunk.chunks(PAGE_BYTES));
        let values = pages.map(|(start, bytes)| Span { start, len: bytes.len() }.chaining_value(bytes));
        Self { chunk_bytes: chunk.len(), values: values.collect() }
    }

    /// Returns the values of a chunk of `chunk_bytes` bytes from their encoding
    /// ([`Leaves::to_bytes`]); `None` if these are another number of values.
    #[must_use]
    pub fn parse(chunk_bytes: usize, bytes: &[u8]) -> Option<Self> {
        let (values, []) = bytes.as_chunks::<DIGEST_BYTES>() else { return None };
        let is_complete = values.len() == chunk_bytes.div_ceil(PAGE_BYTES);
        is_complete.then(|| Self { chunk_bytes, values: values.to_vec() })
    }

    /// Returns the values, 32 bytes each, one after another.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.values.concat()
    }

    /// Returns the chunk's digest; `None` for a chunk of at most one page, for which the values do
    /// not suffice.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        let span = Span { start: 0, len: self.chunk_bytes };
        if span.is_page() {
            return None;
        }
        let (left, right) = span.halves();
        Some(merge_subtrees_root(&self.value(left), &self.value(right), Mode::Hash).into())
    }

    /// Replaces the pages of `runs`, whose bytes are `pages`, one after another, the chunk's last
    /// page not padded.
    ///
    /// # Errors
    /// Returns [`ProofError::Run`] for runs that do not fit the chunk, or [`ProofError::PageBytes`].
    pub fn replace(&mut self, runs: &[PageRun], mut pages: &[u8]) -> Result<(), ProofError> {
        check_runs(self.chunk_bytes, runs)?;
        check_page_bytes(self.chunk_bytes, runs, pages)?;
        for page in runs.iter().flat_map(|run| usize::from(run.first)..run.end_page()) {
            let start = page * PAGE_BYTES;
            let (bytes, rest) = pages.split_at(PAGE_BYTES.min(self.chunk_bytes - start));
            self.values[page] = Span { start, len: bytes.len() }.chaining_value(bytes);
            pages = rest;
        }
        Ok(())
    }

    /// Returns the proof for the pages of `runs`: concatenated chaining values of 32 bytes.
    ///
    /// # Errors
    /// Returns [`ProofError::Run`] for runs that do not fit the chunk.
    pub fn prove(&self, runs: &[PageRun]) -> Result<Vec<u8>, ProofError> {
        check_runs(self.chunk_bytes, runs)?;
        let mut proof = Vec::new();
        self.collect(Span { start: 0, len: self.chunk_bytes }, runs, &mut proof);
        Ok(proof)
    }

    fn collect(&self, span: Span, runs: &[PageRun], proof: &mut Vec<u8>) {
        if !span.touches(runs) {
            proof.extend_from_slice(&self.value(span));
        } else if !span.is_page() {
            let (left, right) = span.halves();
            self.collect(left, runs, proof);
            self.collect(right, runs, proof);
        }
    }

    fn value(&self, span: Span) -> ChainingValue {
        if span.is_page() {
            return self.values[span.start / PAGE_BYTES];
        }
        let (left, right) = span.halves();
        merge_subtrees_non_root(&self.value(left), &self.value(right), Mode::Hash)
    }
}

/// Returns the length of the proof for the pages of `runs`, ascending, in a chunk of `chunk_bytes`.
#[must_use]
pub fn proof_bytes(chunk_bytes: usize, runs: &[PageRun]) -> usize {
    fn values(span: Span, runs: &[PageRun]) -> usize {
        match span.touches(runs) {
            false => 1,
            true if span.is_page() => 0,
            true => {
                let (left, right) = span.halves();
                values(left, runs) + values(right, runs)
            }
        }
    }
    values(Span { start: 0, len: chunk_bytes }, runs) * DIGEST_BYTES
}

/// Checks that `pages` belong to the chunk with this digest and length.
///
/// `pages` are the runs' bytes, one after another, zero pages included, the chunk's last page not
/// padded. The length comes from the manifest: a proof without the chunk's last page does not show
/// it.
///
/// # Errors
/// Returns the defect of the arguments, or [`ProofError::Mismatch`] if the pages differ.
pub fn verify(
    chunk: &Digest,
    chunk_bytes: usize,
    runs: &[PageRun],
    pages: &[u8],
    proof: &[u8],
) -> Result<(), ProofError> {
    check_runs(chunk_bytes, runs)?;
    check_page_bytes(chunk_bytes, runs, pages)?;
    let (values, []) = proof.as_chunks::<DIGEST_BYTES>() else {
        return Err(ProofError::ProofBytes(proof.len()));
    };
    let mut walk = Walk { runs, pages, values: values.iter() };
    let root = walk.root(chunk_bytes).ok_or(ProofError::ProofBytes(proof.len()))?;
    if walk.values.len() != 0 {
        return Err(ProofError::ProofBytes(proof.len()));
    }
    if root == *chunk { Ok(()) } else { Err(ProofError::Mismatch(*chunk)) }
}

fn check_runs(chunk_bytes: usize, runs: &[PageRun]) -> Result<(), ProofError> {
    let pages = chunk_bytes.div_ceil(PAGE_BYTES);
    let mut next = 0;
    for (index, run) in runs.iter().enumerate() {
        if run.count == 0 || usize::from(run.first) < next || run.end_page() > pages {
            return Err(ProofError::Run(index));
        }
        next = run.end_page();
    }
    if runs.is_empty() { Err(ProofError::Run(0)) } else { Ok(()) }
}

fn check_page_bytes(chunk_bytes: usize, runs: &[PageRun], pages: &[u8]) -> Result<(), ProofError> {
    let expected = runs.iter().map(|run| run.end_byte().min(chunk_bytes) - run.start_byte()).sum();
    match pages.len() == expected {
        true => Ok(()),
        false => Err(ProofError::PageBytes { actual: pages.len(), expected }),
    }
}

/// A subtree, as bytes of the chunk: a power of two of whole pages, or the rest up to the chunk's
/// end.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    len: usize,
}

impl Span {
    fn halves(self) -> (Self, Self) {
        let left = crate::page::to_usize(left_subtree_len(self.len as u64));
        (Self { start: self.start, len: left }, Self { start: self.start + left, len: self.len - left })
    }

    fn is_page(self) -> bool {
        self.len <= PAGE_BYTES
    }

    fn touches(self, runs: &[PageRun]) -> bool {
        runs.iter().any(|run| run.start_byte() < self.start + self.len && run.end_byte() > self.start)
    }

    /// Returns true if the runs contain all of its pages.
    fn is_in(self, runs: &[PageRun]) -> bool {
        let mut covered = self.start;
        for run in runs.iter().filter(|run| run.end_byte() > self.start) {
            if run.start_byte() > covered {
                return false;
            }
            covered = run.end_byte();
            if covered >= self.start + self.len {
                return true;
            }
        }
        false
    }

    fn chaining_value(self, bytes: &[u8]) -> ChainingValue {
        blake3::Hasher::new().set_input_offset(self.start as u64).update(bytes).finalize_non_root()
    }
}

struct Walk<'a> {
    runs: &'a [PageRun],
    pages: &'a [u8],
    values: std::slice::Iter<'a, [u8; DIGEST_BYTES]>,
}

impl Walk<'_> {
    fn root(&mut self, chunk_bytes: usize) -> Option<Digest> {
        let span = Span { start: 0, len: chunk_bytes };
        if span.is_in(self.runs) {
            return Some(Digest::of(self.take(chunk_bytes)));
        }
        let (left, right) = span.halves();
        let (left, right) = (self.value(left)?, self.value(right)?);
        Some(merge_subtrees_root(&left, &right, Mode::Hash).into())
    }

    fn value(&mut self, span: Span) -> Option<ChainingValue> {
        if !span.touches(self.runs) {
            return self.values.next().copied();
        }
        if span.is_in(self.runs) {
            return Some(span.chaining_value(self.take(span.len)));
        }
        let (left, right) = span.halves();
        let (left, right) = (self.value(left)?, self.value(right)?);
        Some(merge_subtrees_non_root(&left, &right, Mode::Hash))
    }

    fn take(&mut self, len: usize) -> &[u8] {
        let (bytes, rest) = self.pages.split_at(len);
        self.pages = rest;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn pages_of(chunk: &[u8], runs: &[PageRun]) -> Vec<u8> {
        let bytes = |run: &PageRun| chunk[run.start_byte()..run.end_byte().min(chunk.len())].to_vec();
        runs.iter().flat_map(bytes).collect()
    }

    #[test]
    fn one_page_of_64_kib_needs_128_bytes() {
        let leaves = Leaves::of(&noise(65536));
        assert_eq!(leaves.prove(&[PageRun { first: 5, count: 1 }]).unwrap().len(), 128);
        assert!(leaves.prove(&[PageRun { first: 0, count: 16 }]).unwrap().is_empty());
    }

    fn any_case() -> impl Strategy<Value = (usize, Vec<PageRun>)> {
        (1usize..40 * PAGE_BYTES, proptest::collection::vec(any::<bool>(), 40)).prop_map(|(len, held)| {
            let pages = u16::try_from(len.div_ceil(PAGE_BYTES)).unwrap();
            let mut runs: Vec<PageRun> = (0..pages)
                .filter(|&p| held[usize::from(p)])
                .map(|first| PageRun { first, count: 1 })
                .collect();
            if runs.is_empty() {
                runs.push(PageRun { first: pages - 1, count: 1 });
            }
            (len, runs)
        })
    }

    proptest! {
        #[test]
        fn proofs_hold_and_only_for_their_bytes((len, runs) in any_case(), at in any::<prop::sample::Index>()) {
            let chunk = noise(len);
            let digest = Digest::of(&chunk);
            let proof = Leaves::of(&chunk).prove(&runs).unwrap();
            prop_assert_eq!(proof.len(), proof_bytes(len, &runs));
            let mut pages = pages_of(&chunk, &runs);
            verify(&digest, len, &runs, &pages, &proof).unwrap();

            let at_page = at.index(pages.len());
            pages[at_page] ^= 1;
            prop_assert_eq!(verify(&digest, len, &runs, &pages, &proof), Err(ProofError::Mismatch(digest)));
            pages[at_page] ^= 1;
            if !proof.is_empty() {
                let mut other = proof.clone();
                other[at.index(proof.len())] ^= 1;
                prop_assert_eq!(verify(&digest, len, &runs, &pages, &other), Err(ProofError::Mismatch(digest)));
                let short = &proof[..proof.len() - 32];
                prop_assert_eq!(verify(&digest, len, &runs, &pages, short), Err(ProofError::ProofBytes(short.len())));
            }
            let mut long = proof.clone();
            long.extend([0; 32]);
            prop_assert_eq!(verify(&digest, len, &runs, &pages, &long), Err(ProofError::ProofBytes(long.len())));
        }

        #[test]
        fn leaves_tell_the_digest_of_a_chunk_with_other_pages((len, runs) in any_case()) {
            let mut chunk = noise(len);
            let mut leaves = Leaves::parse(len, &Leaves::of(&chunk).to_bytes()).unwrap();
            let digest = |chunk: &[u8]| (len > PAGE_BYTES).then(|| Digest::of(chunk));
            prop_assert_eq!(leaves.digest(), digest(&chunk));
            for run in &runs {
                chunk[run.start_byte()..run.end_byte().min(len)].fill(0);
            }
            let mut pages = pages_of(&chunk, &runs);
            leaves.replace(&runs, &pages).unwrap();
            prop_assert_eq!(&leaves, &Leaves::of(&chunk));
            prop_assert_eq!(leaves.digest(), digest(&chunk));
            pages.pop();
            prop_assert!(leaves.replace(&runs, &pages).is_err());
            prop_assert_eq!(Leaves::parse(len, &leaves.to_bytes()[1..]), None);
            prop_assert_eq!(Leaves::parse(len + PAGE_BYTES, &leaves.to_bytes()), None);
        }

        #[test]
        fn any_proof_is_an_error_and_no_panic(len in 0usize..1 << 21, first: u16, count: u16,
            pages in proptest::collection::vec(any::<u8>(), 0..9000), proof in proptest::collection::vec(any::<u8>(), 0..300)) {
            let runs = [PageRun { first, count }];
            prop_assert!(verify(&Digest::of(b""), len, &runs, &pages, &proof).is_err());
        }
    }
}
