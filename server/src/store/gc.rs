//! Deletes the objects that no reference needs, beside running servers and pushes.
//!
//! 1. Mark: follow references, and what is leased ([`super::lease`]), to roots, segments and chunks.
//!    Roots and segments that are not marked are condemned by an empty object, and so are packs
//!    that are not the preferred ones of a marked chunk ([`uses`]).
//! 2. Wait for the grace time. A push that relies on a condemned object pardons it
//!    ([`super::commit`]).
//! 3. Mark again, and decode the copies of condemned packs' chunks in other packs. Then exclude
//!    commits and other collectors, in a directory by a lock, in a bucket by a deletion
//!    ([`super::lease::stored`]). Mark the images of new references, and delete the objects that
//!    are still condemned and that nothing needs ([`judge`]). In a directory this happens in
//!    rounds, between which pushes have their turn.
//!
//! An unreadable reference or manifest might need any object, so it stops the collection.

mod judge;
mod mark;
mod progress;
mod repack;
#[cfg(test)]
mod tests;
mod uses;

pub use progress::Progress;
pub use repack::Repacked;

use crate::store::error::{OpenError, StoreError};
use crate::store::format::{self, Location};
use crate::store::layout::{Domain, Layout};
use crate::store::lease::stored::{self, Deletion, MAX_DELETIONS};
use crate::store::locators::Locators;
use crate::store::lock::StoreLock;
use crate::store::manifests::Manifests;
use crate::store::objects::{Objects, directory};
use crate::store::packs::Packs;
use crate::store::{condemned, walk, working_sets};
use judge::{Garbage, Judged};
use mark::Marked;
use postcopy_proto::digest::Digest;
use progress::Reporter;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use uses::Uses;

/// Age from which a staged file is a left-over even while a process writes another one: writing
/// takes seconds.
const STAGED_MAX_AGE: Duration = Duration::from_secs(3600);
/// Time by which an entry may be ahead of the store's clock: others may have written it meanwhile.
const FUTURE: Duration = Duration::from_secs(60);
/// Objects that are deleted before the right to do so is renewed.
const BATCH: usize = 1000;
/// Objects that are deleted from a directory under one lock, which takes about half a second.
const ROUND: usize = if cfg!(test) { 3 } else { 1000 };

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
    /// The packs that would be repacked.
    #[serde(flatten)]
    pub repacked: Repacked,
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
    locators: Locators,
    reporter: Reporter,
}

/// The right to delete objects.
#[derive(Debug)]
pub(super) struct Deleting {
    _lock: StoreLock,
    /// `None` in a directory.
    announced: Option<Deletion>,
}

impl Deleting {
    /// Waits until no commit relies on these objects, or sees to it that none does from now on.
    pub(super) fn begin(objects: &Objects, due: &[Digest]) -> Result<Self, StoreError> {
        let lock = StoreLock::delete_objects(objects)?;
        let announced = match objects.has_locks() || due.is_empty() {
            true => None,
            false => Some(Deletion::begin(objects, due)?),
        };
        Ok(Self { _lock: lock, announced })
    }

    pub(super) fn renew(&self) -> Result<(), StoreError> {
        self.announced.as_ref().map_or(Ok(()), Deletion::renew)
    }

    /// Returns the packs on whose copies no deletion may rely: those that this collector or one beside
    /// it may delete. Of two collectors that would each rely on the other's pack, one finds it here.
    fn gone(&self, due: &[Digest]) -> Result<HashSet<Digest>, StoreError> {
        let mut gone = self.announced.as_ref().map_or(Ok(HashSet::new()), Deletion::others)?;
        gone.extend(due);
        Ok(gone)
    }

    pub(super) fn finish(self) {
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
        let (manifests, packs) = (Manifests::new(objects), Packs::new(objects));
        let (locators, reporter) = (Locators::new(objects), Reporter::default());
        Self { objects: objects.clone(), manifests, packs, locators, reporter }
    }

    /// Calls `report` from time to time during the collector's work, from the thread that works.
    #[must_use]
    pub fn with_progress(mut self, report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.reporter = Reporter(Box::new(report));
        self
    }

    /// Returns the step in which the store's clock tells times: an object may seem younger by that.
    #[must_use]
    pub fn clock_step(&self) -> Duration {
        // Linux's file systems take the time of the last timer tick, at least 100 a second.
        if self.objects.has_locks() { Duration::from_millis(20) } else { Duration::from_secs(1) }
    }

    /// Returns what [`Collector::repack_and_condemn`] and [`Collector::sweep`] would do, and changes
    /// nothing but the chunk index.
    ///
    /// # Errors
    /// Returns the errors of [`Collector::condemn`].
    ///
    /// # Blocking
    /// As for [`Collector::condemn`], and looks at each object that is not needed.
    pub fn plan(&self, grace: Duration) -> Result<Plan, StoreError> {
        let marked = self.mark(&|| Ok(()))?;
        let uses = self.uses(&marked)?;
        let unneeded = self.unneeded(&marked, &uses)?;
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
            repacked: self.plan_repacking(&marked, &uses, grace)?,
        })
    }

    fn uses(&self, marked: &Marked) -> Result<Uses, StoreError> {
        let stored = walk::packs(&self.objects)?.into_iter().collect();
        let uses = Uses::find(&self.packs, &stored, &marked.chunks)?;
        self.reporter.report("packs looked at", uses.packs.len() as u64, stored.len() as u64);
        Ok(uses)
    }

    /// Returns the objects that nothing needs.
    fn unneeded(&self, marked: &Marked, uses: &Uses) -> Result<Unneeded, StoreError> {
        let mut manifests = walk::manifests(&self.objects)?.0;
        manifests.retain(|manifest| !marked.needs_manifest(manifest));
        // Packs that cannot be read are not among these: they may be needed.
        let unneeded = uses.packs.iter().filter(|(_, used)| !used.is_needed).map(|(pack, _)| *pack);
        Ok(Unneeded { manifests, packs: unneeded.filter(|pack| !marked.leased.contains(pack)).collect() })
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
        let marked = self.mark(&|| Ok(()))?;
        self.condemn_unneeded(&marked, &self.uses(&marked)?)
    }

    /// Repacks packs that are at least `min_age` old, and then condemns as [`Collector::condemn`]
    /// does, also the packs that were repacked.
    ///
    /// # Errors
    /// Returns the errors of [`Collector::condemn`].
    ///
    /// # Blocking
    /// As for [`Collector::condemn`], and copies up to 4 GiB.
    pub fn repack_and_condemn(&self, min_age: Duration) -> Result<(Repacked, Option<Duration>), StoreError> {
        let marked = self.mark(&|| Ok(()))?;
        let mut uses = self.uses(&marked)?;
        let repacked = self.repack(&marked, &uses, min_age)?;
        if repacked.new_packs > 0 {
            uses = self.uses(&marked)?;
        }
        Ok((repacked, self.condemn_unneeded(&marked, &uses)?))
    }

    fn condemn_unneeded(&self, marked: &Marked, uses: &Uses) -> Result<Option<Duration>, StoreError> {
        let Unneeded { manifests: mut unneeded, packs } = self.unneeded(marked, uses)?;
        unneeded.extend(packs);
        let (listed, now) = (condemned::list(&self.objects)?, self.objects.now()?);
        // An entry of the future is of a clock that was wrong, and would stay for as long.
        let is_future = |since: &SystemTime| since.duration_since(now).is_ok_and(|ahead| ahead > FUTURE);
        let (future, condemned): (Vec<_>, Vec<_>) =
            listed.into_iter().partition(|(_, since)| is_future(since));
        let future: Vec<_> = future.into_iter().map(|(object, _)| object).collect();
        condemned::pardon_all(&self.objects, &future)?;
        let condemned: HashSet<_> = condemned.into_iter().map(|(object, _)| object).collect();
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
    /// Returns [`StoreError::Damaged`] if a reference or manifest cannot be read; then it deletes
    /// nothing more.
    ///
    /// # Blocking
    /// Delays commits while it reads the references and the manifests of new images, and while it
    /// deletes, in rounds of some hundred milliseconds. In a bucket, it makes those fail that need one
    /// of the objects which it deletes.
    pub fn sweep(&self, grace: Duration) -> Result<Collected, StoreError> {
        let now = self.objects.now()?;
        let is_due = |(_, since): &(Digest, SystemTime)| stored::age(now, *since) >= grace;
        let (mut due, young): (Vec<_>, Vec<_>) =
            condemned::list(&self.objects)?.into_iter().partition(is_due);
        due.truncate(MAX_DELETIONS);
        let announced: Vec<_> = due.iter().map(|(object, _)| *object).collect();
        let since: HashMap<_, _> = due.into_iter().collect();
        // An object that was pardoned and condemned again meanwhile has another time.
        let is_listed = |(object, written): &(Digest, SystemTime)| {
            since.get(object).is_some_and(|since| self.objects.is_same_time(*since, *written))
        };
        // Before commits are delayed, because it takes long.
        let copies = self.sound_copies(&announced)?;
        let mut marked = self.mark(&|| Ok(()))?;
        let (mut collected, mut is_first) = (Collected::default(), true);
        let mut left = self.in_order(&announced)?;
        let gone = loop {
            // In a bucket all objects are announced together.
            let round = if self.objects.has_locks() { ROUND.min(left.len()) } else { left.len() };
            let rest = left.split_off(round);
            let deleting = Deleting::begin(&self.objects, &left)?;
            let renew = || deleting.renew();
            // A commit or tag after the first round pardons the objects of its image.
            match std::mem::take(&mut is_first) {
                true => self.mark_more(&mut marked, &renew)?,
                false => self.mark_leases(&mut marked, &renew)?,
            }
            // After the mark: a collector that began later has then marked what this one has.
            let gone = deleting.gone(&announced)?;
            let due = self.still_due(&left, is_listed)?;
            let judged = self.judge(&marked, &due, Some(&copies), &gone, &renew)?;
            self.delete_garbage(&deleting, judged, &mut collected)?;
            if rest.is_empty() {
                let (working_sets, bytes) = working_sets::remove_orphans(&self.objects)?;
                collected.working_sets = working_sets;
                collected.bytes += bytes;
            }
            deleting.finish();
            if rest.is_empty() {
                break gone;
            }
            let done = announced.len() - rest.len();
            self.reporter.report("condemned objects judged", done as u64, announced.len() as u64);
            left = rest;
        };
        let young: Vec<_> = young.into_iter().map(|(object, _)| object).collect();
        // The collection after the grace time checks the copies.
        let gone = gone.into_iter().chain(young.iter().copied()).collect();
        let Judged { garbage, needed } = self.judge(&marked, &young, None, &gone, &|| Ok(()))?;
        collected.waiting = garbage.len() as u64;
        condemned::pardon_all(&self.objects, &needed)?;
        self.delete_left_overs(grace, &mut collected)?;
        Ok(collected)
    }

    /// Returns condemned objects in the order of their deletion, roots and segments before packs: a
    /// client must not reach by digest an image whose packs are gone.
    fn in_order(&self, condemned: &[Digest]) -> Result<Vec<Digest>, StoreError> {
        if !self.objects.has_locks() {
            // One round holds all.
            return Ok(condemned.to_vec());
        }
        let paths: Vec<_> = condemned.iter().map(|object| self.objects.layout.manifest(object)).collect();
        let lengths = self.objects.lengths(&paths)?;
        let (manifests, packs): (Vec<_>, Vec<_>) =
            condemned.iter().zip(lengths).partition(|(_, length)| length.is_some());
        Ok(manifests.into_iter().chain(packs).map(|(object, _)| *object).collect())
    }

    /// Returns those of a round's objects that no push has pardoned meanwhile: those whose entries
    /// are the listed ones.
    fn still_due(
        &self,
        round: &[Digest],
        is_listed: impl Fn(&(Digest, SystemTime)) -> bool,
    ) -> Result<Vec<Digest>, StoreError> {
        if !self.objects.has_locks() {
            let listed = condemned::list(&self.objects)?.into_iter().filter(is_listed);
            let listed: HashSet<_> = listed.map(|(object, _)| object).collect();
            return Ok(round.iter().copied().filter(|object| listed.contains(object)).collect());
        }
        let mut due = Vec::new();
        for object in round {
            let since = self.objects.written(&self.objects.layout.condemned(object))?;
            due.extend(since.map(|since| (*object, since)).filter(&is_listed).map(|(object, _)| object));
        }
        Ok(due)
    }

    /// Deletes what nothing needs, and pardons the other objects.
    fn delete_garbage(
        &self,
        deleting: &Deleting,
        Judged { garbage, needed }: Judged,
        collected: &mut Collected,
    ) -> Result<(), StoreError> {
        condemned::pardon_all(&self.objects, &needed)?;
        let layout = &self.objects.layout;
        let of_kind = |wanted: Garbage| -> Vec<Digest> {
            garbage.iter().filter(|(_, kind)| *kind == wanted).map(|(object, _)| *object).collect()
        };
        for digests in of_kind(Garbage::Manifest).chunks(BATCH) {
            let manifests = digests.iter().map(|digest| layout.manifest(digest));
            let paths: Vec<_> =
                manifests.chain(digests.iter().map(|digest| layout.locator(digest))).collect();
            collected.bytes += self.delete(deleting, digests, &paths)?;
            collected.manifests += digests.len() as u64;
        }
        let packs = of_kind(Garbage::Pack);
        let before = collected.packs;
        for digests in packs.chunks(BATCH) {
            let paths: Vec<_> = digests.iter().map(|digest| layout.pack(digest)).collect();
            collected.bytes += self.delete(deleting, digests, &paths)?;
            collected.packs += digests.len() as u64;
            self.reporter.report("packs deleted", collected.packs - before, packs.len() as u64);
        }
        Ok(())
    }

    /// Deletes objects and their entries. Returns their bytes.
    fn delete(&self, deleting: &Deleting, digests: &[Digest], paths: &[PathBuf]) -> Result<u64, StoreError> {
        let bytes = self.objects.lengths(paths)?.into_iter().flatten().sum();
        deleting.renew()?;
        self.objects.delete_all(paths)?;
        condemned::pardon_all(&self.objects, digests)?;
        Ok(bytes)
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
}
