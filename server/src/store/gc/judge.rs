//! Judges condemned objects: which of them nothing needs.

use crate::store::error::StoreError;
use crate::store::gc::Collector;
use crate::store::gc::mark::{Marked, Renew};
use crate::store::packs::read_index;
use postcopy_proto::digest::Digest;

/// Condemned objects: those that nothing needs, with their kinds, and the others.
#[derive(Debug, Default)]
pub(super) struct Judged {
    pub(super) garbage: Vec<(Digest, Garbage)>,
    pub(super) needed: Vec<Digest>,
}

/// The kind of an object that nothing needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Garbage {
    Manifest,
    Pack,
}

impl Collector {
    /// Returns those of the condemned objects that are garbage, with their kinds, and the others.
    pub(super) fn garbage_of(
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
