//! Deletes the objects that no reference needs, beside running servers and pushes.
//!
//! 1. Mark: follow references, and what is leased ([`super::lease`]), to roots, segments and chunks.
//!    Unmarked objects are condemned by an empty object.
//! 2. Wait for the grace time. A push that finds a condemned object pardons it ([`super::commit`]).
//! 3. Mark again, and delete the objects that are still condemned and unmarked. Commits are excluded
//!    meanwhile, in a directory by a lock, in a bucket by a deletion ([`super::lease::stored`]).
//!
//! An unreadable reference or manifest might need any object, so it stops the collection.

use crate::store::error::{OpenError, StoreError};
use crate::store::format::{self, Location};
use crate::store::layout::{Domain, Layout};
use crate::store::lease::stored::{self, Deletion, MAX_DELETIONS};
use crate::store::lease::{Leased, leased};
use crate::store::lock::StoreLock;
use crate::store::manifests::Manifests;
use crate::store::objects::{Objects, directory};
use crate::store::packs::{Packs, read_index};
use crate::store::{condemned, references, walk, working_sets};
use postcopy_proto::digest::Digest;
use postcopy_proto::reference::TagReference;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

/// Age from which a staged file is a left-over even while a process writes another one: writing
/// takes seconds.
const STAGED_MAX_AGE: Duration = Duration::from_secs(3600);
/// Objects that are deleted before the right to do so is renewed.
const BATCH: usize = 1000;
/// Items of parallel work before which the right to delete is renewed: some seconds' work.
const RENEWED: usize = 5000;
/// Most threads that read objects of a bucket.
const MAX_THREADS: usize = 32;
/// Least number of objects for one thread.
const MIN_PART: usize = 16;

/// The result of a collection.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    /// Number of deleted packs.
    pub packs: u64,
    /// Number of deleted roots and segments.
    pub manifests: u64,
    /// Number of deleted working sets, whose images are gone.
    pub working_sets: u64,
    /// Number of deleted files that interrupted writes had left.
    pub left_overs: u64,
    /// Bytes of all deleted files.
    pub bytes: u64,
    /// Number of condemned objects whose grace time is not over.
    pub waiting: u64,
}

/// The effect that a collection would have.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Plan {
    /// Number of packs that would be deleted.
    pub packs: u64,
    /// Number of roots and segments that would be deleted.
    pub manifests: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Number of objects that nothing needs, but whose grace time is not over, or has not begun.
    pub waiting: u64,
    /// Bytes of these.
    pub waiting_bytes: u64,
}

/// The objects that nothing needs.
#[derive(Debug)]
struct Unneeded {
    manifests: Vec<Digest>,
    packs: Vec<Digest>,
}

/// The garbage collector of one domain of a store.
#[derive(Debug)]
pub struct Collector {
    objects: Objects,
    manifests: Manifests,
    packs: Packs,
}

/// Renews the right to delete, in long work.
type Renew<'a> = dyn Fn() -> Result<(), StoreError> + 'a;

/// The objects that references and leases need.
#[derive(Debug, Default)]
struct Marked {
    manifests: HashSet<Digest>,
    chunks: HashSet<Digest>,
    /// Roots, segments and packs that a lease names.
    leased: HashSet<Digest>,
}

impl Marked {
    fn needs_manifest(&self, manifest: &Digest) -> bool {
        self.manifests.contains(manifest) || self.leased.contains(manifest)
    }
}

/// The right to delete objects.
#[derive(Debug)]
struct Deleting {
    _lock: StoreLock,
    /// `None` in a directory.
    announced: Option<Deletion>,
}

impl Deleting {
    /// Waits until no commit relies on these objects, or sees to it that none does from now on.
    fn begin(objects: &Objects, due: &[Digest]) -> Result<Self, StoreError> {
        let lock = StoreLock::delete_objects(objects)?;
        let announced = match objects.has_locks() || due.is_empty() {
            true => None,
            false => Some(Deletion::begin(objects, due)?),
        };
        Ok(Self { _lock: lock, announced })
    }

    fn renew(&self) -> Result<(), StoreError> {
        self.announced.as_ref().map_or(Ok(()), Deletion::renew)
    }

    fn finish(self) {
        if let Some(announced) = self.announced {
            announced.finish();
        }
    }
}

impl Collector {
    /// Makes a collector for the store at `location`.
    ///
    /// # Errors
    /// Returns [`OpenError`] if there is no store.
    pub fn open(location: impl Into<Location>, domain: Domain) -> Result<Self, OpenError> {
        Ok(Self::new(&format::open(&location.into(), domain)?))
    }

    fn new(objects: &Objects) -> Self {
        Self { objects: objects.clone(), manifests: Manifests::new(objects), packs: Packs::new(objects) }
    }

    /// Returns what [`Collector::condemn`] and [`Collector::sweep`] would do, and changes nothing but
    /// the chunk index.
    ///
    /// # Errors
    /// Returns the errors of [`Collector::condemn`].
    ///
    /// # Blocking
    /// As for [`Collector::condemn`], and looks at each object that is not needed.
    pub fn plan(&self, grace: Duration) -> Result<Plan, StoreError> {
        let unneeded = self.unneeded()?;
        let now = self.objects.now()?;
        let since: HashMap<_, _> = condemned::list(&self.objects)?.into_iter().collect();
        let layout = &self.objects.layout;
        let paths = |objects: &[Digest], path: fn(&Layout, &Digest) -> PathBuf| -> Vec<_> {
            objects.iter().map(|object| path(layout, object)).collect()
        };
        let lengths = |paths: &[PathBuf]| -> Result<u64, StoreError> {
            Ok(self.objects.lengths(paths)?.into_iter().flatten().sum())
        };
        let is_due =
            |object: &Digest| since.get(object).is_some_and(|since| stored::age(now, *since) >= grace);
        let (packs, young_packs): (Vec<_>, Vec<_>) = unneeded.packs.into_iter().partition(is_due);
        let (manifests, young): (Vec<_>, Vec<_>) = unneeded.manifests.into_iter().partition(is_due);
        Ok(Plan {
            packs: packs.len() as u64,
            manifests: manifests.len() as u64,
            bytes: lengths(&paths(&packs, Layout::pack))? + lengths(&paths(&manifests, Layout::manifest))?,
            waiting: (young_packs.len() + young.len()) as u64,
            waiting_bytes: lengths(&paths(&young_packs, Layout::pack))?
                + lengths(&paths(&young, Layout::manifest))?,
        })
    }

    /// Returns the objects that nothing needs.
    fn unneeded(&self) -> Result<Unneeded, StoreError> {
        let marked = self.mark(&|| Ok(()))?;
        let mut manifests = walk::manifests(&self.objects)?.0;
        manifests.retain(|manifest| !marked.needs_manifest(manifest));
        let mut packs = walk::packs(&self.objects)?;
        let use_of = self.packs.use_of(&marked.chunks)?;
        // The index lacks packs that cannot be read: they may be needed.
        packs.retain(|pack| use_of.get(pack) == Some(&false) && !marked.leased.contains(pack));
        Ok(Unneeded { manifests, packs })
    }

    /// Condemns the objects that no reference needs. Returns the time since the last one was
    /// condemned; `None` if nothing is condemned.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if a reference or manifest cannot be read; nothing was
    /// changed.
    ///
    /// # Blocking
    /// Reads all manifests, the chunk index, and the trailers of all packs that the index lacks.
    pub fn condemn(&self) -> Result<Option<Duration>, StoreError> {
        let Unneeded { manifests: mut unneeded, packs } = self.unneeded()?;
        unneeded.extend(packs);
        let condemned: HashSet<_> = condemned::list(&self.objects)?.into_iter().map(|(d, _)| d).collect();
        unneeded.retain(|object| !condemned.contains(object));
        condemned::condemn(&self.objects, &unneeded)?;
        let newest = condemned::list(&self.objects)?.into_iter().map(|(_, since)| since).max();
        let now = self.objects.now()?;
        Ok(newest.map(|newest| stored::age(now, newest)))
    }

    /// Deletes objects that were condemned at least `grace` ago and are still not needed, and files
    /// that interrupted writes left. Ages are those of the store's clock.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if a reference or manifest cannot be read; nothing was
    /// deleted.
    ///
    /// # Blocking
    /// Delays commits while it reads all manifests and deletes. In a bucket, it makes those fail that
    /// need one of the objects which it deletes.
    pub fn sweep(&self, grace: Duration) -> Result<Collected, StoreError> {
        let now = self.objects.now()?;
        let (mut due, young): (Vec<_>, Vec<_>) = condemned::list(&self.objects)?
            .into_iter()
            .partition(|(_, since)| stored::age(now, *since) >= grace);
        due.truncate(MAX_DELETIONS);
        let due: Vec<_> = due.into_iter().map(|(object, _)| object).collect();
        let deleting = Deleting::begin(&self.objects, &due)?;
        let renew = || deleting.renew();
        let marked = self.mark(&renew)?;
        let mut collected = Collected::default();
        let Judged { garbage, needed } = self.garbage_of(&marked, &due, &renew)?;
        condemned::pardon_all(&self.objects, &needed)?;
        let of_kind = |wanted: Garbage| -> Vec<Digest> {
            garbage.iter().filter(|(_, kind)| *kind == wanted).map(|(object, _)| *object).collect()
        };
        // Manifests, which include roots, are deleted first: a client must not reach by digest an
        // image whose packs are gone.
        let layout = &self.objects.layout;
        for digests in of_kind(Garbage::Manifest).chunks(BATCH) {
            let manifests = digests.iter().map(|digest| layout.manifest(digest));
            let paths: Vec<_> =
                manifests.chain(digests.iter().map(|digest| layout.locator(digest))).collect();
            collected.bytes += self.delete(&deleting, digests, &paths)?;
            collected.manifests += digests.len() as u64;
        }
        for digests in of_kind(Garbage::Pack).chunks(BATCH) {
            let paths: Vec<_> = digests.iter().map(|digest| layout.pack(digest)).collect();
            collected.bytes += self.delete(&deleting, digests, &paths)?;
            collected.packs += digests.len() as u64;
        }
        let (working_sets, bytes) = working_sets::remove_orphans(&self.objects)?;
        collected.working_sets = working_sets;
        collected.bytes += bytes;
        deleting.finish();
        let young: Vec<_> = young.into_iter().map(|(object, _)| object).collect();
        let Judged { garbage, needed } = self.garbage_of(&marked, &young, &|| Ok(()))?;
        collected.waiting = garbage.len() as u64;
        condemned::pardon_all(&self.objects, &needed)?;
        self.delete_left_overs(grace, &mut collected)?;
        Ok(collected)
    }

    /// Deletes objects and their entries. Returns their bytes.
    fn delete(&self, deleting: &Deleting, digests: &[Digest], paths: &[PathBuf]) -> Result<u64, StoreError> {
        let bytes = self.objects.lengths(paths)?.into_iter().flatten().sum();
        deleting.renew()?;
        self.objects.delete_all(paths)?;
        condemned::pardon_all(&self.objects, digests)?;
        Ok(bytes)
    }

    /// Returns what is needed. Calls `renew` from time to time.
    fn mark(&self, renew: &Renew<'_>) -> Result<Marked, StoreError> {
        // The leases first: a commit writes its reference before it gives up its lease.
        let Leased { images, objects } = leased(&self.objects)?;
        let mut marked = Marked { leased: objects, ..Marked::default() };
        let references = references::list(&self.objects)?;
        let referred =
            self.parallel(&references, renew, |reference| references::read(&self.objects, reference))?;
        // Each image with one of its references, for messages.
        let mut names: HashMap<Digest, Option<&TagReference>> = HashMap::new();
        for (reference, referred) in references.iter().zip(referred) {
            // `None`: the reference was removed after it was listed.
            if let Some(referred) = referred {
                names.entry(referred.image).or_insert(Some(reference));
            }
        }
        for image in images {
            // A stream may outlive an image that was damaged or removed by hand.
            if !names.contains_key(&image) && self.manifests.is_stored(&image)? {
                names.insert(image, None);
            }
        }
        let names: Vec<_> = names.into_iter().collect();
        let roots = self.parallel(&names, renew, |(image, name)| {
            self.manifests.read_root(image).map_err(|error| needed_by(*name, error))
        })?;
        marked.manifests.extend(names.iter().map(|(image, _)| *image));
        let mut segments = Vec::new();
        for (root, (_, name)) in roots.iter().zip(&names) {
            for (index, digest) in (0..).zip(root.segment_digests()) {
                if marked.manifests.insert(*digest) {
                    segments.push((root, index, *name));
                }
            }
        }
        let chunks = self.parallel(&segments, renew, |(root, index, name)| {
            let segment = self.manifests.passing_segment(root, *index);
            Ok(segment.map_err(|error| needed_by(*name, error))?.digests().collect::<Vec<_>>())
        })?;
        marked.chunks.extend(chunks.into_iter().flatten());
        Ok(marked)
    }

    /// Calls `work` with each item, for many items on several threads: those of a bucket mostly wait.
    /// Calls `renew` before each [`RENEWED`] items.
    fn parallel<T: Sync, R: Send>(
        &self,
        items: &[T],
        renew: &Renew<'_>,
        work: impl Fn(&T) -> Result<R, StoreError> + Sync,
    ) -> Result<Vec<R>, StoreError> {
        let mut all = Vec::with_capacity(items.len());
        for items in items.chunks(RENEWED) {
            renew()?;
            all.extend(self.parallel_part(items, &work)?);
        }
        Ok(all)
    }

    fn parallel_part<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: &(impl Fn(&T) -> Result<R, StoreError> + Sync),
    ) -> Result<Vec<R>, StoreError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.objects.has_locks() { cores } else { MAX_THREADS };
        let part = items.len().div_ceil(threads).max(MIN_PART);
        if items.len() <= part {
            return items.iter().map(work).collect();
        }
        std::thread::scope(|scope| {
            let parts: Vec<_> = items
                .chunks(part)
                .map(|part| scope.spawn(move || part.iter().map(work).collect::<Result<Vec<_>, _>>()))
                .collect();
            let mut all = Vec::with_capacity(items.len());
            for part in parts {
                all.extend(part.join().expect("reading an object does not panic")?);
            }
            Ok(all)
        })
    }

    fn delete_left_overs(&self, grace: Duration, collected: &mut Collected) -> Result<(), StoreError> {
        let nobody_writes = StoreLock::try_delete_staged(&self.objects)?;
        // A commit may have written a locator while its segment was deleted.
        for path in walk::manifests(&self.objects)?.1 {
            // The segment may have been written during the listing.
            if !self.objects.exists(&path.with_extension(""))? {
                collected.left_overs += 1;
                collected.bytes += self.objects.remove_sized(&path)?;
            }
        }
        if !self.objects.has_locks() {
            // A bucket has no staged files.
            return Ok(());
        }
        let mut staged = Vec::new();
        directory::staged(self.objects.layout.domain(), &mut staged)?;
        for path in staged {
            let Some(written) = self.objects.written(&path)? else { continue };
            let age = written.elapsed().unwrap_or_default();
            if nobody_writes.is_some() || age > STAGED_MAX_AGE.max(grace) {
                collected.left_overs += 1;
                collected.bytes += self.objects.remove_sized(&path)?;
            }
        }
        Ok(())
    }

    /// Returns those of the condemned objects that are garbage, with their kinds, and the others.
    fn garbage_of(
        &self,
        marked: &Marked,
        condemned: &[Digest],
        renew: &Renew<'_>,
    ) -> Result<Judged, StoreError> {
        let kinds = self.parallel(condemned, renew, |object| self.garbage(marked, *object))?;
        let mut judged = Judged::default();
        for (object, kind) in condemned.iter().zip(kinds) {
            match kind {
                Some(kind) => judged.garbage.push((*object, kind)),
                None => judged.needed.push(*object),
            }
        }
        Ok(judged)
    }

    /// Returns what a condemned object is; `None` if it is needed, does not exist, or cannot be read.
    fn garbage(&self, marked: &Marked, object: Digest) -> Result<Option<Garbage>, StoreError> {
        let layout = &self.objects.layout;
        if marked.needs_manifest(&object) {
            return Ok(None);
        }
        if self.objects.exists(&layout.manifest(&object))? {
            return Ok(Some(Garbage::Manifest));
        }
        // The pack's own index, since the chunk index is a copy of it.
        match read_index(&self.objects, object) {
            Ok(None) => Ok(None),
            Ok(Some((_, index))) => {
                let is_needed = index.entries().iter().any(|entry| marked.chunks.contains(&entry.chunk));
                Ok((!is_needed).then_some(Garbage::Pack))
            }
            Err(error) => {
                let error = crate::store::chain(&error);
                tracing::warn!(pack = %object, "kept, though it may be garbage: {error}");
                Ok(None)
            }
        }
    }
}

/// Condemned objects: those that nothing needs, with their kinds, and the others.
#[derive(Debug, Default)]
struct Judged {
    garbage: Vec<(Digest, Garbage)>,
    needed: Vec<Digest>,
}

/// The kind of an object that nothing needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Garbage {
    Manifest,
    Pack,
}

/// Adds the reference, if there is one, to the error of its image.
fn needed_by(reference: Option<&TagReference>, error: StoreError) -> StoreError {
    let Some(reference) = reference else { return error };
    let (object, reason) = match error {
        StoreError::Damaged { object, reason } => (object, reason),
        StoreError::NotFound(object) => (object, "it is gone".to_owned()),
        other => return other,
    };
    StoreError::Damaged { object: format!("reference {reference}: {object}"), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{Image, store};
    use crate::store::{Caller, CommitOutcome, Store, verify};
    use postcopy_proto::provenance::Labels;
    use std::fs;
    use std::path::Path;

    fn collector(dir: &Path) -> Collector {
        Collector::open(dir, Domain::DEFAULT).unwrap()
    }

    fn collect(dir: &Path) -> Collected {
        collector(dir).condemn().unwrap();
        collector(dir).sweep(Duration::ZERO).unwrap()
    }

    #[test]
    fn what_no_reference_needs_is_deleted_and_the_rest_is_not() {
        let (dir, store) = store();
        let (kept, removed) = (Image::of_seed(1), Image::of_seed(2));
        kept.push(&store, "a/b:kept");
        removed.push(&store, "a:removed");
        assert_eq!(collect(dir.path()), Collected::default());
        store.remove_reference(&"a:removed".parse().unwrap()).unwrap();
        let collected = collect(dir.path());
        assert_eq!((collected.packs, collected.manifests, collected.waiting), (1, 2, 0));
        let segment = &removed.manifest.root.segment_digests()[0];
        assert!(!store.objects.layout.locator(segment).exists());
        assert!(collected.bytes > removed.pack.len() as u64);
        assert_eq!(collect(dir.path()), Collected::default());
        let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((verified.packs, verified.manifests, verified.references), (1, 2, 1));
        assert_eq!(verified.damage, []);
    }

    #[test]
    fn a_server_that_runs_on_notices() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        assert!(image.load(&store, 0, false).is_ok());
        let chunk = image.data_chunks()[0];
        store.remove_reference(&"a:1".parse().unwrap()).unwrap();
        collect(dir.path());
        assert_eq!(store.find_missing([chunk].into_iter()).unwrap(), [chunk]);
        let outcome = store
            .commit(
                &"a:1".parse().unwrap(),
                Labels::default(),
                image.manifest.root_bytes.clone(),
                &Caller::default(),
            )
            .unwrap();
        assert!(matches!(outcome, CommitOutcome::Missing(missing) if !missing.segments.is_empty()));
        assert!(image.resident(&store, 0).is_some(), "a server that has it mapped still serves it");
        image.push(&store, "a:1");
        assert_eq!(verify(dir.path(), Domain::DEFAULT).unwrap().damage, []);
    }

    #[test]
    fn grace_time_is_waited_for() {
        let (dir, store) = store();
        store.put_pack(Image::of_seed(1).pack_digest(), Image::of_seed(1).pack, &Caller::default()).unwrap();
        collector(dir.path()).condemn().unwrap();
        let collected = collector(dir.path()).sweep(Duration::from_secs(3600)).unwrap();
        assert_eq!(collected, Collected { waiting: 1, ..Collected::default() });
        assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 1);
    }

    #[test]
    fn what_a_push_finds_is_pardoned() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        let pack = image.pack_digest();
        store.put_pack(pack, image.pack.clone(), &Caller::default()).unwrap();
        let pardons: [&dyn Fn(); 3] = [
            &|| assert_eq!(store.find_missing(image.data_chunks().into_iter()).unwrap(), []),
            &|| assert!(store.keep_pack(&pack).unwrap()),
            &|| image.push(&store, "a:1"),
        ];
        for pardon in pardons {
            collector(dir.path()).condemn().unwrap();
            pardon();
            assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 0);
            assert!(store.objects.layout.pack(&pack).exists());
        }
    }

    #[test]
    fn nothing_is_deleted_when_something_cannot_be_read() {
        let (dir, store) = store();
        let (image, garbage) = (Image::of_seed(1), Image::of_seed(2));
        image.push(&store, "a:1");
        store.put_pack(garbage.pack_digest(), garbage.pack.clone(), &Caller::default()).unwrap();
        collector(dir.path()).condemn().unwrap();
        let layout = &store.objects.layout;
        let objects = [
            layout.manifest(&image.digest()),
            layout.manifest(&image.manifest.root.segment_digests()[0]),
            layout.reference(&"a:1".parse().unwrap()),
        ];
        for path in objects {
            let good = fs::read(&path).unwrap();
            fs::write(&path, &good[1..]).unwrap();
            for outcome in [
                collector(dir.path()).condemn().map(|_| ()),
                collector(dir.path()).sweep(Duration::ZERO).map(|_| ()),
            ] {
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains("reference a:1"), "{error}");
            }
            fs::write(&path, good).unwrap();
            assert!(layout.pack(&garbage.pack_digest()).exists());
        }
        assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 1);
    }

    #[test]
    fn a_pack_that_does_not_parse_is_kept() {
        let (dir, store) = store();
        let pack = Image::of_seed(1).pack_digest();
        store.put_pack(pack, Image::of_seed(1).pack, &Caller::default()).unwrap();
        fs::write(store.objects.layout.pack(&pack), b"damaged").unwrap();
        assert_eq!(collect(dir.path()), Collected::default());
    }

    #[test]
    fn left_overs_are_deleted_unless_somebody_is_writing() {
        let (dir, store) = store();
        let layout = &store.objects.layout;
        let pack = layout.pack(&Digest::of(b"x"));
        fs::create_dir_all(pack.parent().unwrap()).unwrap();
        let staged =
            [pack.with_extension("#1"), layout.manifests().join("y#12"), layout.references().join("z#1")];
        staged.iter().for_each(|path| fs::write(path, "left over").unwrap());
        let writing = StoreLock::write_staged(&store.objects).unwrap();
        assert_eq!(collect(dir.path()).left_overs, 0);
        drop(writing);
        let collected = collect(dir.path());
        assert_eq!((collected.left_overs, collected.bytes), (3, 27));
        assert!(staged.iter().all(|path| !path.exists()));
    }

    #[test]
    fn a_locator_without_its_segment_is_a_left_over() {
        let (dir, store) = store();
        let image = Image::of_seed(1);
        image.push(&store, "a:1");
        let orphan = store.objects.layout.locator(&Digest::of(b"x"));
        fs::write(&orphan, "left over").unwrap();
        let collected = collect(dir.path());
        assert_eq!((collected.left_overs, collected.bytes), (1, 9));
        assert!(!orphan.exists());
        assert!(store.objects.layout.locator(&image.manifest.root.segment_digests()[0]).exists());
    }

    /// A process that relies on an object keeps the collector from deleting it until the reference
    /// exists.
    #[test]
    fn commits_beside_collections_lose_nothing() {
        let (dir, store) = store();
        let pushes = |seed: u64| {
            let store = Store::open(dir.path(), Domain::DEFAULT).unwrap();
            for round in 0..20 {
                let image = Image::of_seed(seed * 100 + round % 4);
                let reference = format!("push{seed}:{round}");
                image.push_until_committed(&store, &reference);
                if round % 2 == 0 {
                    store.remove_reference(&reference.parse().unwrap()).unwrap();
                }
            }
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        let deleted = std::thread::scope(|scope| {
            let collecting = scope.spawn(|| {
                let mut deleted = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    deleted += collect(dir.path()).packs;
                }
                deleted
            });
            let pushing = [1, 2, 3].map(|seed| scope.spawn(move || pushes(seed)));
            let outcomes = pushing.map(|pushing| pushing.join());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            outcomes.into_iter().for_each(|outcome| outcome.unwrap());
            collecting.join().unwrap()
        });
        let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
        assert_eq!((verified.references, verified.damage), (30, vec![]));
        assert!(deleted > 0, "the collector had something to delete");
        drop(store);
    }
}
