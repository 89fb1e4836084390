//! Leases: a served image stays in the store, even if its references move or are removed.
//!
//! So a restored program does not lose its memory when a tag moves and a collector runs. A client
//! that reconnects takes the lease again; in between, the collector's grace time protects the image.
//! In a directory a lease is a lock on a file ([`files`]), in a bucket an object that is renewed
//! until it expires ([`stored`]).

mod files;
pub(super) mod stored;

use crate::store::error::StoreError;
use crate::store::objects::{Kind, Objects};
use postcopy_proto::digest::Digest;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use stored::{HeldImage, ImageLease};

/// The protection of an image, until this is dropped.
#[derive(Debug)]
pub struct Lease {
    _held: Held,
}

#[derive(Debug)]
enum Held {
    File { _file: File },
    Stored { _image: HeldImage },
}

/// The images and objects that leases protect from the collector.
#[derive(Debug, Default)]
pub(crate) struct Leased {
    /// Images that stay with all of their parts.
    pub(crate) images: Vec<Digest>,
    /// Packs, segments and roots that stay.
    pub(crate) objects: HashSet<Digest>,
}

/// The leases of this process: one for each image, shared by all streams that serve it.
#[derive(Debug)]
pub(crate) struct Leases {
    objects: Objects,
    /// Locked for a look-up or an insertion.
    taken: Mutex<HashMap<Digest, Weak<Lease>>>,
    /// `None` in a directory.
    stored: Option<ImageLease>,
}

impl Leases {
    pub(crate) fn new(objects: &Objects) -> Self {
        let stored = match objects.kind() {
            Kind::Directory(_) => None,
            Kind::Bucket(bucket) => Some(ImageLease::new(&objects.layout, bucket)),
        };
        Self { objects: objects.clone(), taken: Mutex::default(), stored }
    }

    /// Returns the lease of an image that another stream holds. Does not block.
    pub(crate) fn shared(&self, image: &Digest) -> Option<Arc<Lease>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).get(image)?.upgrade()
    }

    /// Takes the lease of an image. In a bucket it takes effect some milliseconds later.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    ///
    /// # Blocking
    /// Creates a file in a directory.
    pub(crate) fn take(&self, image: &Digest) -> Result<Arc<Lease>, StoreError> {
        let held = match &self.stored {
            None => Held::File { _file: files::lock(&self.objects.layout, image)? },
            Some(stored) => Held::Stored { _image: stored.hold(*image) },
        };
        let lease = Arc::new(Lease { _held: held });
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, lease| lease.strong_count() > 0);
        taken.insert(*image, Arc::downgrade(&lease));
        Ok(lease)
    }
}

/// Returns the leased images and objects. Removes leases that have ended.
///
/// # Errors
/// Returns the errors of reading the leases, or [`StoreError::Damaged`].
pub(crate) fn leased(objects: &Objects) -> Result<Leased, StoreError> {
    match objects.kind() {
        Kind::Directory(_) => Ok(Leased { images: files::held(objects)?, objects: HashSet::new() }),
        Kind::Bucket(_) => stored::leased(objects),
    }
}
