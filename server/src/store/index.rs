//! The chunk index: which packs hold a chunk. A push asks it which chunks are missing, a commit
//! where the others lie. A restore asks the locators ([`super::locators`]) and comes here only if
//! one is missing or wrong.
//!
//! The packs are the truth, and the index a copy of their trailers. It has runs ([`run`]), files
//! that all processes of the store share, and in memory the recent packs that no run covers. A
//! process reads the directory of packs when a chunk is not found, since another process may have
//! stored the chunk. It writes its recent packs to a run when they have become many, and merges
//! shorter runs into it, so that a store has few. A damaged run is deleted, and its packs are
//! read again.
//!
//! Entries of deleted packs stay in a run until it is merged. A caller therefore looks whether a
//! pack exists.

mod merge;
pub(super) mod run;
#[cfg(test)]
mod tests;

use crate::store::error::{StoreError, io_error};
use crate::store::layout::digest_of_name;
use crate::store::objects::bucket::Bucket;
use crate::store::objects::{Entry as ObjectEntry, Kind, Objects};
use crate::store::packs::read_index;
use crate::store::walk;
use merge::{Hashing, MergeError, Merged, merge};
use postcopy_proto::digest::Digest;
use postcopy_proto::pack::PackIndex;
use run::{Entry, Found, PackLength, Place, Run};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

/// Entries of recent packs from which on they become a run: about 12 MiB in memory.
const MAX_RECENT_ENTRIES: usize = 1 << 17;
/// Recent packs from which on they become a run, so that another process reads few trailers.
const MAX_RECENT_PACKS: usize = 1 << 10;
/// Factor of these counts from which on a scan writes a run itself. Up to there, the owner's next
/// [`ChunkIndex::maintain`] does so, because the scan's caller waits.
const SCAN_FACTOR: usize = 4;
/// Packs whose trailers a scan reads before it adds them to the index.
const BATCH: usize = 128;
/// Least number of packs for one thread to read.
const MIN_PART: usize = 16;
/// A new run absorbs runs of up to this many times its entries. So a store of n entries has about
/// log4(n) runs, and each entry is written as many times.
const ABSORBED: u64 = 4;

/// Age below which a directory's time is not trusted. A directory may change again within the same
/// tick of its file system's clock, which is at most 10 ms on Linux and 2 s on FAT.
const RACY_MTIME: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    /// The packs that no run covers, with their lengths in bytes.
    recent_packs: HashMap<Digest, u32>,
    /// Offsets and lengths of the frames of recent packs, by chunk and pack.
    recent: BTreeMap<(Digest, Digest), (u32, u32)>,
    runs: Vec<Arc<Run>>,
    /// Paths of damaged runs that were forgotten since the last reading of the directory.
    lost_runs: Vec<PathBuf>,
}

impl State {
    fn covers(&self, pack: &Digest) -> bool {
        self.recent_packs.contains_key(pack) || self.runs.iter().any(|run| run.covers(pack))
    }

    fn add(&mut self, pack: PackLength, index: &PackIndex) {
        if self.covers(&pack.pack) {
            return;
        }
        self.recent_packs.insert(pack.pack, pack.bytes);
        for entry in index.entries() {
            self.recent.insert((entry.chunk, pack.pack), (entry.offset, entry.length));
        }
    }

    fn find_recent(&self, chunks: &[(Digest, usize)], found: &mut impl FnMut(usize, Found)) {
        for (chunk, number) in chunks {
            let of_chunk = (*chunk, Digest::from([0; 32]))..=(*chunk, Digest::from([0xff; 32]));
            for ((_, pack), (offset, length)) in self.recent.range(of_chunk) {
                let place = Place { pack: *pack, offset: *offset, length: *length };
                found(*number, Found { place, pack_bytes: self.recent_packs[pack] });
            }
        }
    }

    /// Returns the entries of recent packs, in ascending order.
    fn recent_entries(&self) -> Vec<Entry> {
        let entry = |((chunk, pack), (offset, length)): (&(Digest, Digest), &(u32, u32))| -> Entry {
            (*chunk, Place { pack: *pack, offset: *offset, length: *length })
        };
        self.recent.iter().map(entry).collect()
    }

    /// Forgets the recent packs for which `is_covered`.
    fn forget_recent(&mut self, is_covered: impl Fn(&Self, &Digest) -> bool) {
        let mut packs = std::mem::take(&mut self.recent_packs);
        packs.retain(|pack, _| !is_covered(self, pack));
        self.recent.retain(|(_, pack), _| packs.contains_key(pack));
        self.recent_packs = packs;
    }

    /// Returns true if the recent packs are at least `factor` times as many as may stay in memory.
    fn is_large(&self, factor: usize) -> bool {
        self.recent.len() >= factor * MAX_RECENT_ENTRIES
            || self.recent_packs.len() >= factor * MAX_RECENT_PACKS
    }
}

/// A file, and its version: the inode, and seconds and nanoseconds of its last change.
type FileVersion = (u64, i64, i64);

fn version_of(metadata: &fs::Metadata) -> FileVersion {
    (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
}

/// The state of the last reading of the directory.
#[derive(Debug, Default)]
struct Scan {
    began: Option<Instant>,
    /// Times of the subdirectories whose packs are all known.
    seen: HashMap<PathBuf, SystemTime>,
    /// Files that are no packs; each is reported once.
    refused: HashSet<(Digest, FileVersion)>,
    /// Damaged runs, which were deleted if that was possible.
    refused_runs: HashSet<PathBuf>,
}

/// The index of a store's chunks.
#[derive(Debug)]
pub(crate) struct ChunkIndex {
    objects: Objects,
    /// Locked for a look-up among recent packs or a change, never while a file is read.
    state: RwLock<State>,
    /// Locked while the directory is read, so that a burst of misses becomes one reading. Taken
    /// before `state`.
    scan: Mutex<Scan>,
    /// Locked while a run is written; true if the store's files cannot be changed. Recent packs then
    /// stay in memory. Taken before `scan` and `state`, or tried under `scan`.
    writing: Mutex<bool>,
}

impl ChunkIndex {
    /// Makes an index that has read nothing yet.
    pub(crate) fn new(objects: &Objects) -> Self {
        Self {
            objects: objects.clone(),
            state: RwLock::default(),
            scan: Mutex::default(),
            writing: Mutex::default(),
        }
    }

    fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        // At worst a panicked writer has omitted entries of a pack, which are then read again.
        read(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `found` with the number and each known place of each chunk.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Reads about two blocks of 4 KiB of each run for a chunk, fewer for many chunks.
    pub(crate) fn find(
        &self,
        chunks: &[Digest],
        mut found: impl FnMut(usize, Found),
    ) -> Result<(), StoreError> {
        let mut wanted: Vec<_> = chunks.iter().enumerate().map(|(number, chunk)| (*chunk, number)).collect();
        wanted.sort_unstable();
        let runs = self.read(|state| {
            state.find_recent(&wanted, &mut found);
            state.runs.clone()
        });
        for run in runs {
            match run.find(&wanted, &mut found) {
                Err(error @ StoreError::Damaged { .. }) => self.forget_run(&run, &error),
                other => other?,
            }
        }
        Ok(())
    }

    /// Returns the known packs. Deleted ones may be among them, and a pack may be named twice.
    pub(crate) fn known_packs(&self) -> Vec<PackLength> {
        self.read(|state| {
            let recent =
                state.recent_packs.iter().map(|(pack, bytes)| PackLength { pack: *pack, bytes: *bytes });
            recent.chain(state.runs.iter().flat_map(|run| run.packs().iter().copied())).collect()
        })
    }

    /// Calls `visit` with each entry, in ascending order of chunk and pack.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] for a damaged run, which is gone then.
    ///
    /// # Blocking
    /// Reads all runs.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Digest, Place)) -> Result<(), StoreError> {
        let (recent, runs) = self.read(|state| (state.recent_entries(), state.runs.clone()));
        let merged = Merged::new(&recent, &runs).and_then(|mut merged| {
            merged.try_for_each(|entry| {
                let (chunk, place) = entry?;
                visit(&chunk, place);
                Ok(())
            })
        });
        merged.map_err(|error| match error {
            MergeError::Store(error) => error,
            MergeError::Run(damaged, error) => {
                self.forget_run(&damaged, &error);
                error
            }
        })
    }

    /// Deletes a damaged run. The next reading of the directory reads its packs.
    fn forget_run(&self, damaged: &Arc<Run>, error: &StoreError) {
        let is_known = self.change(|state| {
            let before = state.runs.len();
            state.runs.retain(|run| !Arc::ptr_eq(run, damaged));
            let is_known = state.runs.len() < before;
            if is_known {
                state.lost_runs.push(damaged.path().to_owned());
            }
            is_known
        });
        if is_known {
            self.delete_run(damaged.path(), error);
        }
    }

    /// Adds a pack that was opened.
    pub(crate) fn add(&self, pack: PackLength, index: &PackIndex) {
        self.change(|state| state.add(pack, index));
    }

    /// Reads the changed parts of the directory again. Returns true if this call, or another one
    /// that began after it, found packs.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Takes about 1 us for each of 256 subdirectories, some microseconds for each pack of the
    /// changed ones, and the time to read new packs' trailers.
    pub(crate) fn scan(&self) -> Result<bool, StoreError> {
        let asked = Instant::now();
        let mut scan = lock(&self.scan);
        if scan.began.is_some_and(|began| began > asked) {
            return Ok(true);
        }
        scan.began = Some(asked.max(Instant::now()));
        let learned = self.read_directory(&mut scan);
        if learned.is_err() {
            // Those who wait read it themselves.
            scan.began = None;
        }
        learned
    }

    fn read_directory(&self, scan: &mut Scan) -> Result<bool, StoreError> {
        for path in self.change(|state| std::mem::take(&mut state.lost_runs)) {
            scan.seen.clear();
            scan.refused_runs.insert(path);
        }
        let mut learned = self.read_runs(scan)?;
        if let Kind::Bucket(bucket) = self.objects.kind() {
            let new = self.new_packs_in_bucket(bucket, scan)?;
            for batch in new.chunks(BATCH) {
                learned |= self.read_packs(batch, scan)?.learned;
                self.write_in_scan();
            }
            return Ok(learned);
        }
        let top = self.objects.layout.packs();
        for dir in fs::read_dir(&top).map_err(io_error(&top))? {
            let dir = dir.map_err(io_error(&top))?;
            let path = dir.path();
            let metadata = dir.metadata().map_err(io_error(&path))?;
            let changed = metadata.modified().map_err(io_error(&path))?;
            if !metadata.is_dir() || scan.seen.get(&path) == Some(&changed) {
                continue;
            }
            // Judged before the listing: packs that are added after it must not share this time.
            let mut is_complete = changed.elapsed().is_ok_and(|age| age > RACY_MTIME);
            let new = self.new_packs_in(&path, scan)?;
            for batch in new.chunks(BATCH) {
                let read = self.read_packs(batch, scan)?;
                learned |= read.learned;
                is_complete &= !read.failed;
                self.write_in_scan();
            }
            if is_complete {
                scan.seen.insert(path, changed);
            }
        }
        Ok(learned)
    }

    /// Writes a run if a scan has read very many packs.
    fn write_in_scan(&self) {
        if !self.read(|state| state.is_large(SCAN_FACTOR)) {
            return;
        }
        // Otherwise another thread writes one already.
        if let Ok(mut is_read_only) = self.writing.try_lock()
            && let Err(error) = self.write_run(&mut is_read_only)
        {
            tracing::warn!("the chunk index stays as it is: {}", crate::store::chain(&error));
        }
    }

    /// Opens the runs that other processes have written, and forgets those that they have deleted.
    fn read_runs(&self, scan: &mut Scan) -> Result<bool, StoreError> {
        let before = self.read(|state| state.runs.clone());
        let mut listed = self.list_runs()?;
        let is_gone = |listed: &HashSet<PathBuf>, run: &Arc<Run>| !listed.contains(run.path());
        if before.iter().any(|run| is_gone(&listed, run)) {
            // A merge during the listing may have hidden both the merged runs and the new one.
            listed.extend(self.list_runs()?);
        }
        let mut new = Vec::new();
        for path in &listed {
            if scan.refused_runs.contains(path)
                || self.read(|state| state.runs.iter().any(|run| run.path() == path))
            {
                continue;
            }
            match self.open_run(path) {
                Ok(None) => {}
                Ok(Some(run)) => new.push(Arc::new(run)),
                Err(error @ StoreError::Damaged { .. }) => {
                    self.delete_run(path, &error);
                    scan.refused_runs.insert(path.clone());
                }
                // Its packs are read from their trailers.
                Err(error) => tracing::warn!("a part of the chunk index is not read: {error}"),
            }
        }
        let learned = !new.is_empty();
        self.change(|state| {
            let count = state.runs.len();
            let was_known = |run: &Arc<Run>| before.iter().any(|known| Arc::ptr_eq(known, run));
            state.runs.retain(|run| !(was_known(run) && is_gone(&listed, run)));
            if state.runs.len() < count {
                // The packs of a deleted run are in a new one, or must be read.
                scan.seen.clear();
            }
            new.retain(|run| !state.runs.iter().any(|known| known.path() == run.path()));
            state.runs.extend(new);
            if learned {
                state.forget_recent(|state, pack| state.runs.iter().any(|run| run.covers(pack)));
            }
        });
        Ok(learned)
    }

    fn list_runs(&self) -> Result<HashSet<PathBuf>, StoreError> {
        let dir = self.objects.layout.index();
        let names = self.objects.names_if_any(&dir)?;
        let runs = names.into_iter().filter(|name| digest_of_name(name).is_some());
        Ok(runs.map(|name| dir.join(name)).collect())
    }

    /// Opens a run; `None` if it does not exist. A run of a bucket is copied to a local file.
    fn open_run(&self, path: &Path) -> Result<Option<Run>, StoreError> {
        let file = self.objects.local_file(path)?;
        file.map(|file| Run::new(file, path)).transpose()
    }

    fn delete_run(&self, path: &Path, error: &StoreError) {
        tracing::error!("made again from the packs: {error}");
        // On a read-only store it stays, and is not opened again.
        let _ = self.objects.remove(path);
    }

    /// Returns the packs of a subdirectory that are unknown.
    fn new_packs_in(&self, dir: &Path, scan: &Scan) -> Result<Vec<NewPack>, StoreError> {
        let mut new = Vec::new();
        for entry in fs::read_dir(dir).map_err(io_error(dir))? {
            let entry = entry.map_err(io_error(dir))?;
            let Some(digest) = entry.file_name().to_str().and_then(digest_of_name) else { continue };
            if self.read(|state| state.covers(&digest)) {
                continue;
            }
            // gc has deleted an entry that vanished meanwhile.
            let Ok(metadata) = entry.metadata() else { continue };
            let version = version_of(&metadata);
            if !scan.refused.contains(&(digest, version)) {
                new.push(NewPack { digest, version });
            }
        }
        Ok(new)
    }

    /// Returns the packs of a bucket that are unknown.
    fn new_packs_in_bucket(&self, bucket: &Bucket, scan: &Scan) -> Result<Vec<NewPack>, StoreError> {
        let layout = &self.objects.layout;
        let listed = bucket.wait(bucket.entries_of(&layout.packs(), &layout.pack_dirs()))?;
        let new = listed.iter().filter_map(|ObjectEntry { name, written, .. }| {
            let since_epoch = written.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let version = (0, since_epoch.as_secs().cast_signed(), since_epoch.subsec_nanos().into());
            let digest = digest_of_name(name).filter(|digest| !self.read(|state| state.covers(digest)))?;
            (!scan.refused.contains(&(digest, version))).then_some(NewPack { digest, version })
        });
        Ok(new.collect())
    }

    /// Reads the trailers of new packs. Logs and skips packs that do not parse.
    ///
    /// # Errors
    /// [`StoreError::Bucket`]. Files that cannot be read are skipped, too.
    fn read_packs(&self, new: &[NewPack], scan: &mut Scan) -> Result<Read, StoreError> {
        let mut read = Read::default();
        for (NewPack { digest, version }, outcome) in new.iter().zip(read_trailers(&self.objects, new)) {
            match outcome {
                Ok(None) => {}
                Ok(Some((length, index))) => {
                    self.add(length, &index);
                    read.learned = true;
                }
                Err(error @ StoreError::Bucket { .. }) => return Err(error),
                Err(error) => {
                    tracing::error!(pack = %digest, "not served: {}", crate::store::chain(&error));
                    // Transient errors, such as too many open files, are retried at the next miss
                    // of a chunk.
                    match error {
                        StoreError::Damaged { .. } => drop(scan.refused.insert((*digest, *version))),
                        _ => read.failed = true,
                    }
                }
            }
        }
        Ok(read)
    }

    /// Writes the recent packs to a run, if they are many. The owner calls it periodically.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Writes up to the whole index anew, some seconds for each GiB. Look-ups go on meanwhile.
    pub(crate) fn maintain(&self) -> Result<(), StoreError> {
        match self.read(|state| state.is_large(1)) {
            true => self.write(),
            false => Ok(()),
        }
    }

    /// Writes the recent packs to a run.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// As for [`ChunkIndex::maintain`].
    pub(crate) fn write(&self) -> Result<(), StoreError> {
        let mut is_read_only = lock(&self.writing);
        self.write_run(&mut is_read_only)
    }

    /// Writes the recent packs and the shorter runs to a new run. Does nothing in a store whose files
    /// cannot be changed.
    fn write_run(&self, is_read_only: &mut bool) -> Result<(), StoreError> {
        if *is_read_only || self.read(|state| state.recent_packs.is_empty()) {
            return Ok(());
        }
        let (recent_packs, recent, mut runs) =
            self.read(|state| (state.recent_packs.clone(), state.recent_entries(), state.runs.clone()));
        let mut entries = recent.len() as u64;
        runs.sort_by_key(|run| run.entries());
        let absorbed: Vec<_> = runs
            .into_iter()
            .take_while(|run| {
                let is_short = run.entries() <= entries * ABSORBED;
                entries += if is_short { run.entries() } else { 0 };
                is_short
            })
            .collect();
        let packs = self.stored_packs(&recent_packs, &absorbed)?;
        let merged = match self.write_merged(packs, &recent, &absorbed) {
            Ok(merged) => merged,
            Err(MergeError::Run(damaged, error)) => {
                self.forget_run(&damaged, &error);
                return Ok(());
            }
            Err(MergeError::Store(StoreError::Io { source, .. }))
                if matches!(
                    source.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) =>
            {
                *is_read_only = true;
                return Ok(());
            }
            Err(MergeError::Store(error)) => return Err(error),
        };
        self.change(|state| {
            state.runs.retain(|run| !absorbed.iter().any(|gone| Arc::ptr_eq(run, gone)));
            // Packs may have been added meanwhile.
            state.forget_recent(|_, pack| recent_packs.contains_key(pack));
            // A scan may have found the file already.
            if !state.runs.iter().any(|run| run.path() == merged.path()) {
                state.runs.push(merged.clone());
            }
        });
        for run in absorbed.iter().filter(|run| run.path() != merged.path()) {
            // Another process may have absorbed it too.
            self.objects.remove(run.path())?;
        }
        Ok(())
    }

    /// Returns the packs that still exist, in ascending order.
    fn stored_packs(
        &self,
        recent: &HashMap<Digest, u32>,
        runs: &[Arc<Run>],
    ) -> Result<Vec<PackLength>, StoreError> {
        let recent = recent.iter().map(|(pack, bytes)| PackLength { pack: *pack, bytes: *bytes });
        let mut packs: Vec<_> =
            recent.chain(runs.iter().flat_map(|run| run.packs().iter().copied())).collect();
        packs.sort_unstable();
        packs.dedup_by_key(|known| known.pack);
        match self.objects.kind() {
            Kind::Directory(_) => {
                packs.retain(|known| self.objects.layout.pack(&known.pack).exists());
            }
            Kind::Bucket(_) => {
                let stored: HashSet<_> = walk::packs(&self.objects)?.into_iter().collect();
                packs.retain(|known| stored.contains(&known.pack));
            }
        }
        Ok(packs)
    }

    fn write_merged(
        &self,
        packs: Vec<PackLength>,
        recent: &[Entry],
        runs: &[Arc<Run>],
    ) -> Result<Arc<Run>, MergeError> {
        let dir = self.objects.layout.index();
        let staged = self.objects.stage(&dir.join(Digest::of(b"").hex()))?;
        let file = || staged.file().try_clone().map_err(|e| staged.error(e));
        let digest = merge(packs, recent, runs, Hashing::new(file()?), &dir)?;
        let path = dir.join(digest.hex());
        // Opened before it has its name, under which another process may absorb and delete it.
        let run = Run::new(file()?, &path)?;
        self.objects.publish(&staged, &path)?;
        Ok(Arc::new(run))
    }

    /// Returns the number of packs.
    #[cfg(test)]
    pub(crate) fn packs(&self) -> usize {
        let of_runs = |state: &State| state.runs.iter().map(|run| run.packs().len()).sum::<usize>();
        self.read(|state| state.recent_packs.len() + of_runs(state))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pack that the index lacks.
struct NewPack {
    digest: Digest,
    version: FileVersion,
}

/// The outcome of reading the trailers of packs.
#[derive(Default)]
struct Read {
    /// Packs were added.
    learned: bool,
    /// A pack could not be read, but may be later.
    failed: bool,
}

/// Reads the trailers of packs, on several threads.
fn read_trailers(
    objects: &Objects,
    new: &[NewPack],
) -> Vec<Result<Option<(PackLength, PackIndex)>, StoreError>> {
    let read = |new: &NewPack| read_index(objects, new.digest);
    if new.len() < MIN_PART {
        return new.iter().map(read).collect();
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let parts = new.chunks(new.len().div_ceil(threads).max(MIN_PART));
    // No threads of a pool that others use: those may wait for the lock under which this runs.
    std::thread::scope(|scope| {
        let parts: Vec<_> =
            parts.map(|part| scope.spawn(move || part.iter().map(read).collect::<Vec<_>>())).collect();
        let joined =
            parts.into_iter().flat_map(|part| part.join().expect("reading a trailer does not panic"));
        joined.collect()
    })
}
