//! The listings of directories: read, sorted, and kept while they are right.
//!
//! A page of references needs the next keys of a directory. To read and sort a directory of a
//! million entries for each page of a thousand would take a thousand times as long as to list it
//! once. So large listings stay in memory. A listing is used again in two cases:
//!
//! - the directory has not changed since, by its stamp. A directory that has changed within the
//!   last two seconds has no stamp, see [`Directory::stamp`];
//! - it was read after the walk began that needs it. A walk shows each reference that exists from
//!   its beginning to its end, and any such listing holds them. So a walk stays fast while others
//!   push.

use crate::store::cache::Cache;
use crate::store::error::StoreError;
use crate::store::objects::Objects;
use crate::store::references::directory::{Content, Directory, Stamp};
use crate::store::references::names::{Group, Key, Names};
use postcopy_proto::digest::Digest;
use std::collections::BinaryHeap;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The bounds of the memory for listings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes of all kept listings, and most bytes of one.
    pub(super) kept_bytes: usize,
    /// Keys from which on a listing is kept. A smaller directory is soon read again.
    pub(super) kept_keys: usize,
    /// Keys that one pass over a directory selects whose listing has more than `kept_bytes`.
    pub(super) selected_keys: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { kept_bytes: 64 << 20, kept_keys: 256, selected_keys: 4096 }
    }
}

/// Bytes of keys from which on a directory is large: one thread at a time reads such a directory.
const LARGE_BYTES: usize = 1 << 20;

/// A walk over all references, page by page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walk {
    /// Identifies the [`Listings`] that began the walk.
    pub(super) listings: u64,
    /// The number of the walk among those of the same listings, from 1.
    pub(super) number: u64,
}

impl Walk {
    /// A walk that no [`Listings`] has begun, so that resuming begins another one.
    pub(super) const UNKNOWN: Self = Self { listings: 0, number: 0 };
}

/// The keys of a directory from some place on, and whether these are all.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) names: Arc<Names>,
    pub(super) are_all: bool,
}

#[derive(Debug)]
struct Listing {
    stamp: Option<Stamp>,
    /// The number of the newest walk that had begun when the directory was read.
    walk: u64,
    /// `None`: the keys take too many bytes.
    names: Option<Arc<Names>>,
}

/// The listings of the directories of one store.
#[derive(Debug)]
pub(crate) struct Listings {
    bounds: Bounds,
    /// Listings by the digest of the directory's path.
    kept: Cache<Digest, Listing>,
    id: u64,
    /// The number of walks that have begun.
    walks: AtomicU64,
    /// Locked while a large directory is read and sorted: bounds the memory of listings that are not
    /// kept yet, and lets one thread read what several need. The holder waits for no other thread.
    reads_large: Mutex<()>,
}

impl Default for Listings {
    fn default() -> Self {
        Self::new(Bounds::default())
    }
}

impl Listings {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            kept: Cache::new(bounds.kept_bytes),
            id: fastrand::u64(1..),
            walks: AtomicU64::new(0),
            reads_large: Mutex::new(()),
        }
    }

    /// Begins a walk.
    pub(super) fn begin(&self) -> Walk {
        Walk { listings: self.id, number: self.walks.fetch_add(1, Ordering::AcqRel) + 1 }
    }

    /// Returns the walk, or begins another one if the walk was begun by another process.
    pub(super) fn resume(&self, walk: Walk) -> Walk {
        if walk.listings == self.id { walk } else { self.begin() }
    }

    /// Returns the keys of a directory, at least the next ones that are not before `from`. Returns
    /// `None` if the directory does not exist.
    pub(super) fn keys(
        &self,
        objects: &Objects,
        path: &Path,
        content: Content,
        from: &str,
        walk: Walk,
    ) -> Result<Option<Keys>, StoreError> {
        let names = match self.listing(objects, path, content, walk)? {
            None => return Ok(None),
            Some(listing) => listing.names.clone(),
        };
        match names {
            Some(names) => Ok(Some(Keys { names, are_all: true })),
            None => self.select(objects, path, content, from),
        }
    }

    fn listing(
        &self,
        objects: &Objects,
        path: &Path,
        content: Content,
        walk: Walk,
    ) -> Result<Option<Arc<Listing>>, StoreError> {
        let place = Digest::of(path.as_os_str().as_bytes());
        let kept = self.kept.get(&place);
        if let Some(listing) = kept.as_ref().filter(|listing| listing.walk >= walk.number) {
            return Ok(Some(listing.clone()));
        }
        // Before the directory is read.
        let newest_walk = self.walks.load(Ordering::Acquire);
        let Some(directory) = Directory::open(objects, path, content)? else { return Ok(None) };
        let stamp = directory.stamp()?;
        if let Some(listing) = kept.filter(|listing| stamp.is_some() && listing.stamp == stamp) {
            return Ok(Some(listing));
        }
        let mut names = Names::default();
        let mut reads_large = None;
        let mut by_another = None;
        directory.for_each(content, |component, groups| {
            names.push(component, groups);
            if reads_large.is_none() && names.size_bytes() > LARGE_BYTES {
                reads_large = Some(self.lock());
                // Another thread may have read the directory while this one waited.
                by_another = self.kept.get(&place).filter(|listing| listing.walk >= walk.number);
            }
            match by_another.is_some() || names.size_bytes() > self.bounds.kept_bytes {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if by_another.is_some() {
            return Ok(by_another);
        }
        let fits = names.size_bytes() <= self.bounds.kept_bytes;
        if fits {
            names.sort();
        }
        let (bytes, is_kept) = (names.size_bytes(), names.len() >= self.bounds.kept_keys);
        let listing = Listing { stamp, walk: newest_walk, names: fits.then(|| Arc::new(names)) };
        let listing = Arc::new(listing);
        if is_kept {
            let bytes = if fits { bytes } else { 0 };
            self.kept.insert(place, listing.clone(), bytes + size_of::<Listing>());
        }
        Ok(Some(listing))
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.reads_large.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the next keys of a directory, in memory for as many keys.
    fn select(
        &self,
        objects: &Objects,
        path: &Path,
        content: Content,
        from: &str,
    ) -> Result<Option<Keys>, StoreError> {
        let Some(directory) = Directory::open(objects, path, content)? else { return Ok(None) };
        let mut selected: BinaryHeap<Selected> = BinaryHeap::new();
        let mut are_all = true;
        directory.for_each(content, |component, groups| {
            for &group in groups {
                let key = Key { component, group };
                if key.cmp_text(from).is_lt() {
                    continue;
                }
                if selected.len() == self.bounds.selected_keys {
                    are_all = false;
                    if selected.peek().is_some_and(|last| key.cmp(&last.key()).is_gt()) {
                        continue;
                    }
                    selected.pop();
                }
                selected.push(Selected(component.to_owned(), group));
            }
            ControlFlow::Continue(())
        })?;
        let mut names = Names::default();
        for key in selected.into_sorted_vec() {
            names.push(&key.0, &[key.1]);
        }
        Ok(Some(Keys { names: Arc::new(names), are_all }))
    }
}

/// A key that [`Listings::select`] holds.
#[derive(Debug, PartialEq, Eq)]
struct Selected(String, Group);

impl Selected {
    fn key(&self) -> Key<'_> {
        Key { component: &self.0, group: self.1 }
    }
}

impl Ord for Selected {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Selected {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
