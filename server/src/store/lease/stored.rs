//! Leases and deletions in a bucket: objects that end when they are too old.
//!
//! A bucket has no locks, so a commit and a collector exclude each other by two writes and two
//! reads:
//!
//! - a commit writes a lease that names the objects on which it relies, and then reads the
//!   deletions. If one names such an object, the commit fails, and its client repeats it;
//! - a collector writes a deletion that names the objects which it may delete, and then reads the
//!   leases, and after them the references. It deletes what none of them needs.
//!
//! At least one of them reads what the other has written. Ages are judged by the bucket's clock. The
//! writer of an object measures its time with a monotonic clock, from before the write, and stops
//! [`MARGIN`] before the end, since a request may still take effect after its sender has given it
//! up.

use crate::store::error::{StoreError, damaged};
use crate::store::layout::Layout;
use crate::store::lease::Leased;
use crate::store::objects::Objects;
use crate::store::objects::bucket::Bucket;
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use prost::Message;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;

/// Time after which a lease or a deletion ends.
const TIME: Duration = Duration::from_secs(600);
/// Time before the end from which on its owner does not rely on it: longer than a request may be on
/// its way.
const MARGIN: Duration = Duration::from_secs(180);
/// Time between two renewals of the lease of served images. A deletion is renewed when its owner may
/// rely on it for less than this.
const RENEWAL: Duration = Duration::from_secs(120);
/// Most bytes of a lease or a deletion.
const MAX_BYTES: usize = 256 << 20;
/// Most objects that a deletion names.
pub(crate) const MAX_DELETIONS: usize = 100_000;
/// Time after which the lease of served images is written again if that has failed.
const RETRY: Duration = Duration::from_secs(5);

/// An object that its owner relies on for some time. The owner removes it when all is done. After a
/// failure it stays until it ends by itself, because a request that was given up may still take
/// effect.
#[derive(Debug)]
struct Timed {
    objects: Objects,
    path: PathBuf,
    bytes: Bytes,
    /// End of the time for which its owner may rely on it, by [`Objects::monotonic`]. Locked for a
    /// look-up, and while the object is written.
    until: Mutex<Duration>,
}

impl Timed {
    fn write(objects: &Objects, path: PathBuf, message: &impl Message) -> Result<Self, StoreError> {
        let bytes = message.encode_to_vec().into();
        let timed = Self { objects: objects.clone(), path, bytes, until: Mutex::default() };
        timed.put(&mut timed.until.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(timed)
    }

    fn put(&self, until: &mut Duration) -> Result<(), StoreError> {
        let began = self.objects.monotonic();
        self.objects.put(&self.path, self.bytes.clone())?;
        *until = began + TIME.saturating_sub(MARGIN);
        Ok(())
    }

    /// Checks that it can still be relied on, without a request.
    fn check(&self) -> Result<(), StoreError> {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        match self.objects.monotonic() < until {
            true => Ok(()),
            false => Err(StoreError::Busy("it has taken too long, and its lease has ended")),
        }
    }

    fn finish(self) {
        // Otherwise it ends by itself.
        let _ = self.objects.delete_all(&[self.path]);
    }

    /// Does the same, and writes it again if much of its time is over.
    fn renew(&self) -> Result<(), StoreError> {
        self.check()?;
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        match self.objects.monotonic() + RENEWAL < *until {
            true => Ok(()),
            false => self.put(&mut until),
        }
    }
}

fn seconds() -> u32 {
    u32::try_from(TIME.as_secs()).expect("ten minutes")
}

const NAME_DIGITS: usize = 32;

fn random_name() -> String {
    format!("{:0NAME_DIGITS$x}", fastrand::u128(..))
}

/// The lease of a commit.
#[derive(Debug)]
pub(crate) struct Reliance(Timed);

impl Reliance {
    /// Protects objects for some minutes, or until [`Reliance::finish`].
    ///
    /// # Errors
    /// Returns [`StoreError::Busy`] if a collector is about to delete one of them.
    pub(crate) fn take(objects: &Objects, parts: &[Digest]) -> Result<Self, StoreError> {
        let message =
            v1::StoredLease { objects: Digest::concat(parts), seconds: seconds(), ..Default::default() };
        let path = objects.layout.leases().join(random_name());
        let lease = Self(Timed::write(objects, path, &message)?);
        let deleted = deletions(objects, None)?;
        if parts.iter().any(|part| deleted.contains(part)) {
            lease.finish();
            return Err(StoreError::Busy("a collector is about to delete parts of the image"));
        }
        Ok(lease)
    }

    /// Ends the protection, once nothing relies on it any more.
    pub(crate) fn finish(self) {
        self.0.finish();
    }

    /// Checks that the objects are still protected.
    ///
    /// # Errors
    /// [`StoreError::Busy`].
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.0.check()
    }
}

/// The objects that a collector may delete.
#[derive(Debug)]
pub(crate) struct Deletion(Timed);

impl Deletion {
    /// Announces the deletion of these objects.
    pub(crate) fn begin(objects: &Objects, parts: &[Digest]) -> Result<Self, StoreError> {
        let message = v1::StoredDeletion { objects: Digest::concat(parts), seconds: seconds() };
        let path = objects.layout.deletions().join(random_name());
        Timed::write(objects, path, &message).map(Self)
    }

    /// Returns the objects that other collectors may be deleting. Of two collectors, at least one
    /// reads what the other has announced, since each announces its deletion before it reads others.
    ///
    /// # Errors
    /// Returns the errors of reading the deletions, or [`StoreError::Damaged`].
    pub(crate) fn others(&self) -> Result<HashSet<Digest>, StoreError> {
        deletions(&self.0.objects, Some(&self.0.path))
    }

    /// Ends the right to delete, after the last deletion.
    pub(crate) fn finish(self) {
        self.0.finish();
    }

    /// Sees to it that the deletion is known to others for some minutes more.
    ///
    /// # Errors
    /// Returns [`StoreError::Busy`] if it has not been for a time.
    pub(crate) fn renew(&self) -> Result<(), StoreError> {
        self.0.renew()
    }
}

/// Returns the objects that collectors may be deleting, without those of the deletion at `own`.
fn deletions(objects: &Objects, own: Option<&Path>) -> Result<HashSet<Digest>, StoreError> {
    let mut deleted = HashSet::new();
    let dir = objects.layout.deletions();
    for (path, message) in live::<v1::StoredDeletion>(objects, &dir, own, |m| m.seconds)? {
        deleted.extend(digests(&path, &message.objects)?);
    }
    Ok(deleted)
}

/// Returns the leased images and objects. Removes leases that have ended.
pub(super) fn leased(objects: &Objects) -> Result<Leased, StoreError> {
    let mut leased = Leased::default();
    for (path, message) in live::<v1::StoredLease>(objects, &objects.layout.leases(), None, |m| m.seconds)? {
        leased.images.extend(digests(&path, &message.images)?);
        leased.objects.extend(digests(&path, &message.objects)?);
    }
    Ok(leased)
}

fn digests(path: &Path, bytes: &[u8]) -> Result<Vec<Digest>, StoreError> {
    let digests = Digest::list(bytes).map_err(|e| damaged(path.display().to_string(), e))?;
    Ok(digests.collect())
}

/// Returns the messages of a directory that have not ended, with their paths. Removes those that
/// have. Leaves out the one at `own`.
fn live<M: Message + Default>(
    objects: &Objects,
    dir: &Path,
    own: Option<&Path>,
    seconds: impl Fn(&M) -> u32,
) -> Result<Vec<(PathBuf, M)>, StoreError> {
    let mut names = objects.names(dir)?;
    names.retain(|name| own != Some(&dir.join(name)));
    if names.is_empty() {
        return Ok(Vec::new());
    }
    // Before the objects are read, so that one that is renewed meanwhile is young.
    let now = objects.now()?;
    let mut live = Vec::new();
    for name in names {
        // An object with another name is no lease or deletion.
        if name.len() != NAME_DIGITS || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            continue;
        }
        let path = dir.join(name);
        // `None`: its owner has removed it.
        let Some((bytes, written)) = objects.read_written(&path, MAX_BYTES)? else { continue };
        let message = M::decode(bytes);
        // A message that cannot be decoded may protect any object, until it is too old.
        let time = message.as_ref().map_or(TIME, |message| Duration::from_secs(seconds(message).into()));
        if age(now, written) > time {
            objects.delete_all(&[path])?;
            continue;
        }
        let message = message.map_err(|e| damaged(path.display().to_string(), e))?;
        live.push((path, message));
    }
    Ok(live)
}

/// The lease of the images that this process serves: one object, which is written when an image is
/// added, and renewed.
#[derive(Clone, Debug)]
pub(super) struct ImageLease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bucket: Arc<Bucket>,
    path: PathBuf,
    /// Locked for a look-up or a change.
    state: Mutex<State>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    /// The images, with the number of their holders.
    images: HashMap<Digest, usize>,
    /// The task that renews the lease has been started.
    is_renewed: bool,
}

/// An image in the lease, until this is dropped.
#[derive(Debug)]
pub(super) struct HeldImage {
    lease: ImageLease,
    image: Digest,
}

impl ImageLease {
    pub(super) fn new(layout: &Layout, bucket: &Arc<Bucket>) -> Self {
        let path = layout.leases().join(random_name());
        let (bucket, changed) = (bucket.clone(), Arc::default());
        Self { inner: Arc::new(Inner { bucket, path, state: Mutex::default(), changed }) }
    }

    pub(super) fn hold(&self, image: Digest) -> HeldImage {
        let mut state = self.inner.lock();
        *state.images.entry(image).or_default() += 1;
        if !std::mem::replace(&mut state.is_renewed, true) {
            let (inner, changed) = (Arc::downgrade(&self.inner), self.inner.changed.clone());
            drop(self.inner.bucket.start(renew(inner, changed)));
        }
        drop(state);
        self.inner.changed.notify_one();
        HeldImage { lease: self.clone(), image }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the lease. Returns false if that has failed.
    async fn write(&self) -> bool {
        let images: Vec<_> = self.lock().images.keys().copied().collect();
        let written = match images.is_empty() {
            true => self.bucket.remove(&self.path).await.map(|_| ()),
            false => {
                let images = Digest::concat(&images);
                let message = v1::StoredLease { images, seconds: seconds(), ..Default::default() };
                self.bucket.put(&self.path, message.encode_to_vec().into()).await
            }
        };
        if let Err(error) = &written {
            tracing::warn!(
                "the lease of the served images is not renewed, gc may delete those without a reference: {error}"
            );
        }
        written.is_ok()
    }
}

impl Drop for HeldImage {
    fn drop(&mut self) {
        let mut state = self.lease.inner.lock();
        if let Some(holders) = state.images.get_mut(&self.image) {
            *holders -= 1;
            if *holders == 0 {
                // The next renewal leaves it out.
                state.images.remove(&self.image);
            }
        }
    }
}

/// Writes the lease at once when an image is added, and from time to time. Returns after the end of
/// the process's store.
async fn renew(inner: Weak<Inner>, changed: Arc<Notify>) {
    let mut pause = RENEWAL;
    loop {
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        pause = if inner.write().await { RENEWAL } else { RETRY };
    }
}

/// Returns the age of an object that was written at `written`.
pub(crate) fn age(now: SystemTime, written: SystemTime) -> Duration {
    now.duration_since(written).unwrap_or_default()
}
