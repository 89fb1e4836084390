//! Merges runs and recent packs into a new run.

use crate::store::error::{StoreError, io_error};
use crate::store::index::run::{Entry, PackLength, Run, RunWriter};
use postcopy_proto::digest::Digest;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

/// The reason why a run was not written.
pub(super) enum MergeError {
    /// One of the merged runs is damaged.
    Run(Arc<Run>, StoreError),
    Store(StoreError),
}

impl From<StoreError> for MergeError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

type Source<'a> = Box<dyn Iterator<Item = Result<Entry, MergeError>> + 'a>;

/// The entries of recent packs and of runs, in ascending order of chunk and pack, each once.
pub(super) struct Merged<'a> {
    sources: Vec<Source<'a>>,
    /// The next entry of each source, with the source's number.
    next: BTreeSet<(Entry, usize)>,
    last: Option<Entry>,
}

impl<'a> Merged<'a> {
    pub(super) fn new(recent: &'a [Entry], runs: &'a [Arc<Run>]) -> Result<Self, MergeError> {
        let of_run = |run: &'a Arc<Run>| -> Source<'a> {
            Box::new(run.all().map(|entry| entry.map_err(|error| MergeError::Run(run.clone(), error))))
        };
        let mut sources: Vec<Source<'a>> = vec![Box::new(recent.iter().map(|entry| Ok(*entry)))];
        sources.extend(runs.iter().map(of_run));
        let count = sources.len();
        let mut merged = Self { sources, next: BTreeSet::new(), last: None };
        (0..count).try_for_each(|source| merged.advance(source))?;
        Ok(merged)
    }

    fn advance(&mut self, source: usize) -> Result<(), MergeError> {
        if let Some(entry) = self.sources[source].next() {
            self.next.insert((entry?, source));
        }
        Ok(())
    }
}

impl Iterator for Merged<'_> {
    type Item = Result<Entry, MergeError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some((entry, source)) = self.next.pop_first() {
            if let Err(error) = self.advance(source) {
                return Some(Err(error));
            }
            // Two runs may cover one pack, if two processes have written them.
            let last = self.last.replace(entry);
            if last.is_none_or(|last| (last.0, last.1.pack) != (entry.0, entry.1.pack)) {
                return Some(Ok(entry));
            }
        }
        None
    }
}

/// Merges entries into a run at `out`, and returns its digest. The run is durable on return.
pub(super) fn merge(
    packs: Vec<PackLength>,
    recent: &[Entry],
    runs: &[Arc<Run>],
    out: Hashing,
    path: &Path,
) -> Result<Digest, MergeError> {
    let mut writer = RunWriter::new(out, packs);
    for entry in Merged::new(recent, runs)? {
        writer.push(&entry?).map_err(io_error(path))?;
    }
    let (digest, file) = writer.finish().and_then(Hashing::finish).map_err(io_error(path))?;
    file.sync_all().map_err(io_error(path))?;
    Ok(digest)
}

/// A file and the digest of the bytes written to it.
pub(super) struct Hashing {
    out: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Hashing {
    pub(super) fn new(file: File) -> Self {
        Self { out: BufWriter::with_capacity(1 << 20, file), hasher: blake3::Hasher::new() }
    }

    fn finish(self) -> io::Result<(Digest, File)> {
        let digest = Digest::try_from(&self.hasher.finalize().as_bytes()[..]).map_err(io::Error::other)?;
        Ok((digest, self.out.into_inner().map_err(io::IntoInnerError::into_error)?))
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
