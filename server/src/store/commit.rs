//! Commits of images: first the image's objects exist, then its root, then its reference.

use crate::store::error::{StoreError, damaged};
use crate::store::index::run::PackLength;
use crate::store::lease::stored::Reliance;
use crate::store::locators::Locator;
use crate::store::lock::StoreLock;
use crate::store::objects::Objects;
use crate::store::{Caller, Referred, Store, condemned, references};
use bytes::Bytes;
use postcopy_proto::MAX_FIND_MISSING;
use postcopy_proto::digest::Digest;
use postcopy_proto::manifest::{ManifestError, Root, Segment};
use postcopy_proto::provenance::Labels;
use postcopy_proto::reference::{Reference, TagReference};
use std::collections::{BTreeSet, HashSet};

/// The outcome of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The reference points to this image.
    Committed(Digest),
    /// Nothing was changed, because these objects are missing.
    Missing(Missing),
}

/// The objects that an image lacks. If segments are missing, their chunks are unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Missing segments, at most 65,536.
    pub segments: Vec<Digest>,
    /// Missing chunks, at most 65,536.
    pub chunks: Vec<Digest>,
}

impl Missing {
    fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.chunks.is_empty()
    }
}

/// Most attempts to find all objects of an image, which a collector may delete meanwhile.
const RELIANCES: usize = 4;

/// The objects of an image, found.
enum Found {
    /// All exist, and stay until this is dropped.
    Complete(Kept),
    Missing(Missing),
}

/// The protection of objects from collectors: a lock in a directory, a lease in a bucket.
#[derive(Debug)]
struct Kept {
    _lock: StoreLock,
    lease: Option<Reliance>,
}

impl Kept {
    fn new(objects: &Objects, parts: &[Digest]) -> Result<Self, StoreError> {
        let lock = StoreLock::keep_objects(objects)?;
        let lease = match objects.has_locks() {
            true => None,
            false => Some(Reliance::take(objects, parts)?),
        };
        Ok(Self { _lock: lock, lease })
    }

    /// Ends the protection after the reference has been written.
    fn finish(self) {
        if let Some(lease) = self.lease {
            lease.finish();
        }
    }

    /// Checks that the objects are still protected.
    fn check(&self) -> Result<(), StoreError> {
        self.lease.as_ref().map_or(Ok(()), Reliance::check)
    }
}

impl Store {
    /// Returns the chunks that no pack holds, in the same order. Protects the others for at least
    /// gc's grace time.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    ///
    /// # Blocking
    /// Checks each pack concerned, and waits for a collector's deletes.
    pub fn find_missing(&self, chunks: impl Iterator<Item = Digest>) -> Result<Vec<Digest>, StoreError> {
        let _keep = StoreLock::keep_objects(&self.objects)?;
        let mut presence = self.packs.presence();
        let mut missing: Vec<_> = chunks.collect();
        let places = presence.places(&missing)?;
        let mut places = places.iter();
        missing.retain(|_| places.next().is_some_and(Option::is_none));
        self.pardon_all(presence.relied_on().iter().map(|known| &known.pack))?;
        Ok(missing)
    }

    /// Stores a root and points the reference to it, with these labels, if all objects that the root
    /// refers to exist.
    ///
    /// # Errors
    /// Returns [`StoreError::Invalid`] if the bytes are no root or a segment does not fit it,
    /// [`StoreError::Damaged`] if a stored segment is damaged, [`StoreError::Abandoned`].
    ///
    /// # Blocking
    /// Reads each of the image's segments once, waits for the disk and for a collector's deletes.
    pub fn commit(
        &self,
        reference: &TagReference,
        labels: Labels,
        root: Bytes,
        caller: &Caller,
    ) -> Result<CommitOutcome, StoreError> {
        let parsed = Root::parse_any(&root)
            .map_err(|e| StoreError::Invalid { object: "root".into(), reason: e.to_string() })?;
        let image = parsed.image();
        match self.rely_on(&parsed, caller)? {
            Found::Missing(missing) => Ok(CommitOutcome::Missing(missing)),
            Found::Complete(kept) => {
                self.objects.put(&self.objects.layout.manifest(&image), root)?;
                references::write(&self.objects, reference, &image, labels, || kept.check())?;
                kept.finish();
                Ok(CommitOutcome::Committed(image))
            }
        }
    }

    /// Points `target` to the image of `source`, with the source's labels.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] if the source does not exist, or a part of its image is
    /// gone, or [`StoreError::Abandoned`].
    ///
    /// # Blocking
    /// The same as for [`Store::commit`].
    pub fn tag(
        &self,
        source: &Reference,
        target: &TagReference,
        caller: &Caller,
    ) -> Result<Digest, StoreError> {
        let found = self.resolve(source)?;
        let kept = match source {
            // An image with a tag is safe from gc, as long as the lock keeps the tag from losing it.
            Reference::Tag(_) if self.objects.has_locks() => Kept::new(&self.objects, &[])?,
            _ => {
                let root = self.manifests.root(&found)?;
                let Found::Complete(kept) = self.rely_on(&root, caller)? else {
                    return Err(StoreError::NotFound(format!("a part of image {found}")));
                };
                kept
            }
        };
        let Referred { image, provenance } = self.refer(source)?;
        if image != found && !self.objects.has_locks() {
            return Err(StoreError::Busy("the reference was moved meanwhile"));
        }
        let labels = provenance.unwrap_or_default().labels;
        references::write(&self.objects, target, &image, labels, || kept.check())?;
        kept.finish();
        Ok(image)
    }

    /// Checks that all objects of the image exist, makes them durable, and pardons them. Reads and
    /// parses the segments without a lock, and under the lock only looks for the objects again.
    fn rely_on(&self, root: &Root, caller: &Caller) -> Result<Found, StoreError> {
        let segments: HashSet<_> = root.segment_digests().iter().copied().collect();
        for _ in 0..RELIANCES {
            let packs = match self.packs_of(root, &segments, caller)? {
                Ok(packs) => packs,
                Err(missing) => return Ok(Found::Missing(missing)),
            };
            let mut parts: Vec<_> = packs.iter().map(|known| known.pack).collect();
            parts.extend(segments.iter().copied().chain([root.image()]));
            let kept = Kept::new(&self.objects, &parts)?;
            // Otherwise a collector has deleted some of them meanwhile.
            if self.packs.are_stored(&packs)?.iter().all(|is_stored| *is_stored)
                && self.manifests.lacking(segments.iter().copied())?.is_empty()
            {
                self.make_entries_last(&packs)?;
                self.pardon_all(parts.iter())?;
                return Ok(Found::Complete(kept));
            }
        }
        Err(StoreError::Busy("collectors delete parts of the image each time they are found"))
    }

    /// Returns the packs that hold the image's chunks, or the objects that are missing. Writes the
    /// missing locators of complete segments.
    fn packs_of(
        &self,
        root: &Root,
        segments: &HashSet<Digest>,
        caller: &Caller,
    ) -> Result<Result<Vec<PackLength>, Missing>, StoreError> {
        let mut missing = self.manifests.lacking(segments.iter().copied())?;
        missing.truncate(MAX_FIND_MISSING);
        if !missing.is_empty() {
            return Ok(Err(Missing { segments: missing, chunks: Vec::new() }));
        }
        let mut presence = self.packs.presence();
        let (mut lacking, mut missing) = (HashSet::new(), Missing::default());
        let mut read = HashSet::new();
        let last = root.segment_digests().len().saturating_sub(1);
        for (index, digest) in root.segment_digests().iter().enumerate() {
            // A root may name a segment many times. Only the last one may have fewer chunks.
            if !read.insert(digest) && index != last {
                continue;
            }
            caller.check()?;
            let segment = match self.stored_segment(root, index) {
                // A collector has deleted it meanwhile.
                Err(StoreError::NotFound(_)) => {
                    let segments = vec![*digest];
                    return Ok(Err(Missing { segments, chunks: Vec::new() }));
                }
                other => other?,
            };
            let chunks: Vec<_> = segment.digests().collect();
            let places = presence.places(&chunks)?;
            if !places.contains(&None) && !self.locators.exists(digest)? {
                self.locators.write(digest, &Locator::new(&segment, &places))?;
            }
            for (chunk, _) in chunks.iter().zip(places).filter(|(_, place)| place.is_none()) {
                if lacking.insert(*chunk) {
                    missing.chunks.push(*chunk);
                }
                if missing.chunks.len() == MAX_FIND_MISSING {
                    return Ok(Err(missing));
                }
            }
        }
        Ok(if missing.is_empty() { Ok(presence.relied_on()) } else { Err(missing) })
    }

    /// Returns a stored segment, which any client may have uploaded.
    fn stored_segment(&self, root: &Root, index: usize) -> Result<Segment, StoreError> {
        let index = u32::try_from(index).expect("a root of 64 MiB has fewer");
        let digest = &root.segment_digests()[index as usize];
        let bytes = self.manifests.segment_bytes(digest)?;
        root.check_segment(index, &bytes).map_err(|error| {
            let object = format!("segment {index} ({digest}) of image {}", root.image());
            match error {
                ManifestError::Digest { .. } => damaged(object, error),
                _ => StoreError::Invalid { object, reason: error.to_string() },
            }
        })
    }

    /// Syncs the directories of objects that another process may have renamed without syncing yet.
    fn make_entries_last(&self, packs: &[PackLength]) -> Result<(), StoreError> {
        let layout = &self.objects.layout;
        let paths = packs.iter().map(|known| layout.pack(&known.pack));
        let mut dirs: BTreeSet<_> = paths.filter_map(|p| p.parent().map(ToOwned::to_owned)).collect();
        dirs.insert(layout.packs());
        dirs.insert(layout.manifests());
        self.objects.sync(&dirs)
    }

    fn pardon_all<'a>(&self, objects: impl Iterator<Item = &'a Digest>) -> Result<(), StoreError> {
        // Without a collector there are no entries, and one look is cheaper than an unlink for each
        // object.
        let condemned: HashSet<_> = condemned::list(&self.objects)?.into_iter().map(|(d, _)| d).collect();
        if condemned.is_empty() {
            return Ok(());
        }
        let mut objects = objects.filter(|object| condemned.contains(object));
        objects.try_for_each(|object| condemned::pardon(&self.objects, object))
    }
}
