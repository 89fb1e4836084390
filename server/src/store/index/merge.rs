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

/// Merges entries into a run at `out`, and returns its digest. The run is durable on return.
pub(super) fn merge(
    packs: Vec<PackLength>,
    recent: &[Entry],
    runs: &[Arc<Run>],
    out: Hashing,
    path: &Path,
) -> Result<Digest, MergeError> {
    type Source<'a> = Box<dyn Iterator<Item = Result<Entry, MergeError>> + 'a>;
    let of_run = |run: &Arc<Run>| {
        let run = run.clone();
        move |entry: Result<Entry, StoreError>| entry.map_err(|error| MergeError::Run(run.clone(), error))
    };
    let mut sources: Vec<Source<'_>> = vec![Box::new(recent.iter().map(|entry| Ok(*entry)))];
    sources.extend(runs.iter().map(|run| Box::new(run.all().map(of_run(run))) as Source<'_>));
    let mut writer = RunWriter::new(out, packs);
    // The next entry of each source, with the source's number.
    let mut next = BTreeSet::new();
    let advance = |sources: &mut Vec<Source<'_>>, next: &mut BTreeSet<_>, source: usize| {
        if let Some(entry) = sources[source].next() {
            next.insert((entry?, source));
        }
        Ok::<(), MergeError>(())
    };
    for source in 0..sources.len() {
        advance(&mut sources, &mut next, source)?;
    }
    let mut last = None;
    while let Some((entry, source)) = next.pop_first() {
        // Two runs may cover one pack, if two processes have written them.
        if last.is_none_or(|last: Entry| (last.0, last.1.pack) != (entry.0, entry.1.pack)) {
            writer.push(&entry).map_err(io_error(path))?;
        }
        last = Some(entry);
        advance(&mut sources, &mut next, source)?;
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
