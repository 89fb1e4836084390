//! Marks the objects that references and leases need, on several threads.

use crate::store::error::StoreError;
use crate::store::gc::Collector;
use crate::store::lease::{Leased, leased};
use crate::store::references;
use postcopy_proto::digest::Digest;
use postcopy_proto::reference::TagReference;
use std::collections::HashSet;

/// Items of parallel work before which the right to delete is renewed: some seconds' work.
const RENEWED: usize = 5000;
/// Most threads that read objects of a bucket.
const MAX_THREADS: usize = 32;
/// Least number of objects for one thread.
const MIN_PART: usize = 16;

/// Renews the right to delete, in long work.
pub(super) type Renew<'a> = dyn Fn() -> Result<(), StoreError> + 'a;

/// The objects that references and leases need.
#[derive(Debug, Default)]
pub(super) struct Marked {
    /// The images, in order of their first reference, and then those of streams.
    pub(super) images: Vec<Digest>,
    manifests: HashSet<Digest>,
    pub(super) chunks: HashSet<Digest>,
    /// Roots, segments and packs that a lease names.
    pub(super) leased: HashSet<Digest>,
}

impl Marked {
    pub(super) fn needs_manifest(&self, manifest: &Digest) -> bool {
        self.manifests.contains(manifest) || self.leased.contains(manifest)
    }
}

impl Collector {
    /// Returns what is needed. Calls `renew` from time to time.
    pub(super) fn mark(&self, renew: &Renew<'_>) -> Result<Marked, StoreError> {
        let mut marked = Marked::default();
        self.mark_more(&mut marked, renew)?;
        Ok(marked)
    }

    /// Adds what is needed since an earlier mark. Reads the manifests of other images alone.
    pub(super) fn mark_more(&self, marked: &mut Marked, renew: &Renew<'_>) -> Result<(), StoreError> {
        // The leases first: a commit writes its reference before it gives up its lease.
        let Leased { images, objects } = leased(&self.objects)?;
        marked.leased.extend(objects);
        let references = references::list(&self.objects)?;
        let referred = self.parallel("references read", &references, renew, |reference| {
            references::read(&self.objects, reference)
        })?;
        // Each image with one of its references, for messages.
        let mut names: Vec<(Digest, Option<&TagReference>)> = Vec::new();
        for (reference, referred) in references.iter().zip(referred) {
            // `None`: the reference was removed after it was listed.
            names.extend(referred.map(|referred| (referred.image, Some(reference))));
        }
        self.mark_images(marked, names, renew)?;
        self.mark_leased(marked, images, renew)
    }

    /// Adds what leases need that were taken since an earlier mark. An image of which a part was
    /// deleted before its lease is lost already.
    pub(super) fn mark_leases(&self, marked: &mut Marked, renew: &Renew<'_>) -> Result<(), StoreError> {
        let Leased { images, objects } = leased(&self.objects)?;
        marked.leased.extend(objects);
        for image in images {
            match self.mark_leased(marked, vec![image], renew) {
                Err(StoreError::NotFound(_)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn mark_leased(
        &self,
        marked: &mut Marked,
        images: Vec<Digest>,
        renew: &Renew<'_>,
    ) -> Result<(), StoreError> {
        let mut names = Vec::new();
        for image in images {
            // A stream may outlive an image that was damaged or removed by hand.
            if !marked.manifests.contains(&image) && self.manifests.is_stored(&image)? {
                names.push((image, None));
            }
        }
        self.mark_images(marked, names, renew)
    }

    /// Adds what those of these images need that are not marked.
    fn mark_images(
        &self,
        marked: &mut Marked,
        mut names: Vec<(Digest, Option<&TagReference>)>,
        renew: &Renew<'_>,
    ) -> Result<(), StoreError> {
        names.retain(|(image, _)| marked.manifests.insert(*image));
        let roots = self.parallel("images read", &names, renew, |(image, name)| {
            self.manifests.read_root(image).map_err(|error| needed_by(*name, error))
        })?;
        marked.images.extend(names.iter().map(|(image, _)| *image));
        let mut segments = Vec::new();
        for (root, (_, name)) in roots.iter().zip(&names) {
            for (index, digest) in (0..).zip(root.segment_digests()) {
                if marked.manifests.insert(*digest) {
                    segments.push((root, index, *name));
                }
            }
        }
        let chunks = self.parallel("segments read", &segments, renew, |(root, index, name)| {
            let segment = self.manifests.passing_segment(root, *index);
            Ok(segment.map_err(|error| needed_by(*name, error))?.digests().collect::<Vec<_>>())
        })?;
        marked.chunks.extend(chunks.into_iter().flatten());
        Ok(())
    }

    /// Calls `work` with each item, for many items on several threads: those of a bucket mostly wait.
    /// Calls `renew` before each [`RENEWED`] items, and reports the progress of `name` after them.
    pub(super) fn parallel<T: Sync, R: Send>(
        &self,
        name: &'static str,
        items: &[T],
        renew: &Renew<'_>,
        work: impl Fn(&T) -> Result<R, StoreError> + Sync,
    ) -> Result<Vec<R>, StoreError> {
        let mut all = Vec::with_capacity(items.len());
        for part in items.chunks(RENEWED) {
            renew()?;
            all.extend(self.parallel_part(part, &work)?);
            self.reporter.report(name, all.len() as u64, items.len() as u64);
        }
        Ok(all)
    }

    /// Does the same for few items, without renewal and reports.
    pub(super) fn parallel_part<T: Sync, R: Send>(
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
