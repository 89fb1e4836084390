//! Objects of a bucket: S3, Google Cloud Storage, Azure Blob Storage, or a WebDAV server.
//!
//! The requests run on threads of the bucket's own; [`Bucket::wait`] waits for one. A request that
//! fails is repeated with growing random pauses for at most [`RETRY_TIME`]. After that, its error is
//! the error of the caller's request.

#[cfg(feature = "clients")]
mod client;
#[cfg(test)]
pub(crate) mod faulty;

use crate::store::error::{OpenError, StoreError, io_error};
use crate::store::objects::{Entry, monotonic};
use crate::store::packs::{DiskCache, Peers};
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{
    Error, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, UpdateVersion, WriteMultipart,
};
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::runtime::{Builder, Runtime};

/// Time for which a failed request is repeated.
pub(super) const RETRY_TIME: Duration = Duration::from_secs(40);
/// Threads that wait for the network. Hashing and decoding happen elsewhere.
const THREADS: usize = 2;
/// Most requests at a time of one call that asks for many objects.
const PARALLEL: usize = 32;
/// Most objects that are listed one request after another.
const MAX_ONE_LIST: usize = 10_000;
/// Attempts to replace an object that others replace, too.
const UPDATES: usize = 20;
/// More attempts to write an object of a WebDAV server, one for each folder above it that others
/// may make.
const FOLDER_ATTEMPTS: usize = 4;
/// Bytes from which on an object is read and written in parts of this size, so that each request is
/// short.
const PART_BYTES: usize = 8 << 20;
/// Parts that are read or written at a time.
const PARTS: usize = 4;
/// Bytes of the blocks of packs in memory.
const CACHE_MEMORY_BYTES: usize = 256 << 20;

/// A clock that is never set: the system's, or that of a simulation.
struct Clock(Box<dyn Fn() -> Duration + Send + Sync>);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({:?})", self.0())
    }
}

/// A bucket, or a part of one.
#[derive(Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    /// What the paths of the store's objects begin with.
    prefix: PathBuf,
    /// The name in messages.
    name: String,
    clock: Clock,
    /// True if one request lists objects at any depth. Many WebDAV servers refuse that.
    lists_trees: bool,
    cache_memory: usize,
    cache: Option<Arc<DiskCache>>,
    peers: Option<Arc<dyn Peers>>,
    /// Always there; taken by the drop.
    runtime: Option<Runtime>,
}

impl Bucket {
    /// Makes the client of a bucket from a URL such as `s3://bucket/prefix`. Credentials, regions and
    /// endpoints come from the environment, as object_store documents it: `AWS_ACCESS_KEY_ID`,
    /// `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY`, and so on.
    ///
    /// # Errors
    /// Returns [`OpenError::Bucket`] for a URL of another kind, or wrong settings. Makes no request.
    pub fn of_url(url: &str) -> Result<Self, OpenError> {
        let refused = |reason: String| OpenError::Bucket { url: url.to_owned(), reason };
        #[cfg(feature = "clients")]
        {
            let client::Client { store, prefix, lists_trees } = client::connect(url).map_err(refused)?;
            let name = url.trim_end_matches(prefix.as_ref()).trim_end_matches('/');
            // Without a name and a password.
            let (scheme, rest) = name.split_once("://").unwrap_or(("", name));
            let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
            let mut bucket = Self::new(store, prefix.as_ref(), &format!("{scheme}://{rest}"))?;
            bucket.lists_trees = lists_trees;
            Ok(bucket)
        }
        #[cfg(not(feature = "clients"))]
        Err(refused("this build has no clients of buckets".to_owned()))
    }

    /// Makes a bucket of the objects of `store` whose paths begin with `prefix`, a path without a
    /// slash at its ends. `name` is for messages.
    ///
    /// # Errors
    /// Returns [`OpenError::Bucket`] if no thread can be started.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, name: &str) -> Result<Self, OpenError> {
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.worker_threads(THREADS).thread_name("bucket").enable_all().build();
        let runtime = runtime
            .map_err(|e| OpenError::Bucket { url: name.to_owned(), reason: format!("no threads: {e}") })?;
        Ok(Self {
            store,
            prefix: prefix.into(),
            name: name.to_owned(),
            clock: Clock(Box::new(monotonic)),
            lists_trees: true,
            cache_memory: CACHE_MEMORY_BYTES,
            cache: None,
            peers: None,
            runtime: Some(runtime),
        })
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// Keeps so many bytes of blocks of packs in memory, instead of 256 MiB.
    #[must_use]
    pub fn with_cache_memory(mut self, bytes: usize) -> Self {
        self.cache_memory = bytes;
        self
    }

    pub(crate) fn cache_memory(&self) -> usize {
        self.cache_memory
    }

    /// Keeps blocks of packs on a disk.
    #[must_use]
    pub fn with_cache(mut self, cache: DiskCache) -> Self {
        self.cache = Some(Arc::new(cache));
        self
    }

    pub(crate) fn cache(&self) -> Option<&Arc<DiskCache>> {
        self.cache.as_ref()
    }

    /// Asks other servers for blocks of packs.
    #[must_use]
    pub fn with_peers(mut self, peers: Arc<dyn Peers>) -> Self {
        self.peers = Some(peers);
        self
    }

    pub(crate) fn peers(&self) -> Option<&Arc<dyn Peers>> {
        self.peers.as_ref()
    }

    /// Replaces the clock.
    #[cfg(test)]
    pub(crate) fn with_clock(mut self, clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        self.clock = Clock(Box::new(clock));
        self
    }

    /// Returns the name of an object, for messages.
    pub(crate) fn name(&self, path: &Path) -> String {
        format!("{}/{}", self.name, path.display())
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("only the drop takes it")
    }

    /// Waits for a request.
    ///
    /// # Panics
    /// On an async worker of a runtime, which must not block.
    pub(crate) fn wait<T>(&self, request: impl Future<Output = T>) -> T {
        self.runtime().block_on(request)
    }

    /// Starts a request, which goes on if nobody waits for it.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        request: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime().spawn(request)
    }

    /// Returns a file without a name, for bytes that go to the bucket or come from it.
    pub(crate) fn spool(&self) -> Result<File, StoreError> {
        let dir = std::env::temp_dir();
        tempfile::tempfile_in(&dir).map_err(io_error(&dir))
    }

    /// Makes the error of a request.
    fn error(&self, path: &Path, error: &Error) -> StoreError {
        let object = self.name(path);
        match error {
            Error::NotFound { .. } => StoreError::NotFound(object),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreError::Io {
                path: object.into(),
                source: io::Error::new(io::ErrorKind::PermissionDenied, error.to_string()),
            },
            error => StoreError::Bucket { object, reason: error.to_string() },
        }
    }

    fn failed(&self, path: &Path) -> impl Fn(Error) -> StoreError {
        move |error| self.error(path, &error)
    }

    /// Returns `None` for an object that does not exist.
    fn found<T>(&self, path: &Path, outcome: Result<T, Error>) -> Result<Option<T>, StoreError> {
        match outcome {
            Err(Error::NotFound { .. }) => Ok(None),
            other => other.map(Some).map_err(self.failed(path)),
        }
    }

    pub(super) async fn read(&self, path: &Path, max: usize) -> Result<Option<Bytes>, StoreError> {
        Ok(self.read_written(path, max).await?.map(|(bytes, _)| bytes))
    }

    pub(super) async fn read_written(
        &self,
        path: &Path,
        max: usize,
    ) -> Result<Option<(Bytes, SystemTime)>, StoreError> {
        let result = self.store.get(&key(path)).await;
        let Some(result) = self.found(path, result)? else { return Ok(None) };
        let written = result.meta.last_modified.into();
        let length = result.meta.size.min((max as u64).saturating_add(1));
        if length == result.meta.size && length <= PART_BYTES as u64 {
            return Ok(Some((result.bytes().await.map_err(self.failed(path))?, written)));
        }
        drop(result);
        let mut bytes = Vec::new();
        let mut parts = self.parts(path, length);
        while let Some(part) = parts.next().await {
            match part {
                Err(StoreError::NotFound(_)) => return Ok(None),
                part => bytes.extend_from_slice(&part?),
            }
        }
        Ok(Some((bytes.into(), written)))
    }

    /// Returns the first bytes of an object, part by part.
    fn parts(&self, path: &Path, length: u64) -> impl Stream<Item = Result<Bytes, StoreError>> + Unpin {
        let part = move |start: u64| async move {
            let range = start..length.min(start + PART_BYTES as u64);
            Ok(self.read_range(path, range).await?.0)
        };
        Box::pin(stream::iter((0..length).step_by(PART_BYTES)).map(part).buffered(PARTS))
    }

    /// Returns the time since some moment of the past.
    pub(super) fn monotonic(&self) -> Duration {
        self.clock.0()
    }

    /// Returns a range of an object's bytes, fewer if the object ends before; and the length of the
    /// whole object.
    pub(crate) async fn read_range(
        &self,
        path: &Path,
        range: Range<u64>,
    ) -> Result<(Bytes, u64), StoreError> {
        let options = GetOptions { range: Some(range.into()), ..GetOptions::default() };
        let result = self.store.get_opts(&key(path), options).await.map_err(self.failed(path))?;
        let length = result.meta.size;
        Ok((result.bytes().await.map_err(self.failed(path))?, length))
    }

    /// Copies an object to a file without a name; `None` if the object does not exist.
    pub(super) async fn copy(&self, path: &Path) -> Result<Option<File>, StoreError> {
        let Some(length) = self.length(path).await? else { return Ok(None) };
        let mut file = self.spool()?;
        let mut parts = self.parts(path, length);
        while let Some(part) = parts.next().await {
            match part {
                Err(StoreError::NotFound(_)) => return Ok(None),
                part => file.write_all(&part?).map_err(io_error(&std::env::temp_dir()))?,
            }
        }
        Ok(Some(file))
    }

    pub(crate) async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let mut put = self.store.put(&key(path), bytes.clone().into()).await;
        // Of two requests that make the same folder of a WebDAV server at once, one fails.
        for _ in 0..FOLDER_ATTEMPTS {
            if put.is_ok() || self.lists_trees {
                break;
            }
            put = self.store.put(&key(path), bytes.clone().into()).await;
        }
        put.map(|_| ()).map_err(self.failed(path))
    }

    /// Writes an object, in parts if it is large.
    pub(super) async fn put_large(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        if bytes.len() <= PART_BYTES {
            return self.put(path, bytes).await;
        }
        let upload = match self.store.put_multipart(&key(path)).await {
            // WebDAV has no parts.
            Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                return self.put(path, bytes).await;
            }
            upload => upload.map_err(self.failed(path))?,
        };
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut rest = bytes;
        while !rest.is_empty() {
            let part = rest.split_to(rest.len().min(PART_BYTES));
            if let Err(error) = upload.wait_for_capacity(PARTS).await {
                // The parts that were written take room until the bucket removes them.
                let _ = upload.abort().await;
                return Err(self.error(path, &error));
            }
            upload.put(part);
        }
        upload.finish().await.map(|_| ()).map_err(self.failed(path))
    }

    pub(super) async fn create_all(&self, paths: &[PathBuf]) -> Result<(), StoreError> {
        stream::iter(paths).map(Ok).try_for_each_concurrent(PARALLEL, |path| self.create(path)).await
    }

    pub(super) async fn create(&self, path: &Path) -> Result<(), StoreError> {
        match self.store.put_opts(&key(path), Bytes::new().into(), PutMode::Create.into()).await {
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
            Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                match self.length(path).await? {
                    Some(_) => Ok(()),
                    None => self.put(path, Bytes::new()).await,
                }
            }
            other => other.map(|_| ()).map_err(self.failed(path)),
        }
    }

    /// Replaces an object, if the bucket can by a conditional write, so that no other writer's object
    /// is lost.
    pub(super) async fn update(
        &self,
        path: &Path,
        max: usize,
        change: &impl Fn(Option<Bytes>) -> Result<Bytes, StoreError>,
    ) -> Result<(), StoreError> {
        for attempt in 0..UPDATES {
            let found = self.found(path, self.store.get(&key(path)).await)?;
            let (before, mode) = match found {
                None => (None, PutMode::Create),
                Some(object) if object.meta.size > max as u64 => {
                    let (object, reason) = (self.name(path), "it is too long".to_owned());
                    return Err(StoreError::Damaged { object, reason });
                }
                Some(object) => {
                    let meta = &object.meta;
                    let version = UpdateVersion { e_tag: meta.e_tag.clone(), version: meta.version.clone() };
                    (Some(object.bytes().await.map_err(self.failed(path))?), PutMode::Update(version))
                }
            };
            let bytes = change(before)?;
            match self.store.put_opts(&key(path), bytes.clone().into(), mode.into()).await {
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                    let pause = Duration::from_millis(fastrand::u64(0..20 * (attempt as u64 + 1)));
                    tokio::time::sleep(pause).await;
                }
                Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                    return self.put(path, bytes).await;
                }
                other => return other.map(|_| ()).map_err(self.failed(path)),
            }
        }
        Err(StoreError::Busy("others replace the same reference each time it is read"))
    }

    pub(crate) async fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        if self.length(path).await?.is_none() {
            return Ok(false);
        }
        Ok(self.found(path, self.store.delete(&key(path)).await)?.is_some())
    }

    pub(super) async fn move_to(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        self.found(from, self.store.rename(&key(from), &key(to)).await).map(drop)
    }

    /// Removes objects, many in one request where the bucket can.
    pub(super) async fn delete_all(&self, paths: &[PathBuf]) -> Result<(), StoreError> {
        let Some(first) = paths.first() else { return Ok(()) };
        let keys: Vec<_> = paths.iter().map(|path| Ok(key(path))).collect();
        let mut removed = self.store.delete_stream(stream::iter(keys).boxed());
        while let Some(outcome) = removed.next().await {
            self.found(first, outcome)?;
        }
        Ok(())
    }

    async fn meta(&self, path: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        self.found(path, self.store.head(&key(path)).await)
    }

    pub(crate) async fn length(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        Ok(self.meta(path).await?.map(|meta| meta.size))
    }

    pub(super) async fn written(&self, path: &Path) -> Result<Option<SystemTime>, StoreError> {
        Ok(self.meta(path).await?.map(|meta| meta.last_modified.into()))
    }

    pub(super) async fn lengths(&self, paths: &[PathBuf]) -> Result<Vec<Option<u64>>, StoreError> {
        stream::iter(paths).map(|path| self.length(path)).buffered(PARALLEL).try_collect().await
    }

    pub(super) async fn names(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        let listed = self.store.list_with_delimiter(Some(&key(dir))).await.map_err(self.failed(dir))?;
        // Some tools make an object of a directory's own name.
        let objects = listed.objects.iter().map(|meta| &meta.location).filter(|path| **path != key(dir));
        let names = objects.chain(&listed.common_prefixes).filter_map(Key::filename);
        Ok(names.map(ToOwned::to_owned).collect())
    }

    pub(super) async fn entries(&self, dir: &Path) -> Result<Vec<Entry>, StoreError> {
        let listed = self.store.list_with_delimiter(Some(&key(dir))).await.map_err(self.failed(dir))?;
        Ok(listed.objects.iter().filter_map(entry).collect())
    }

    /// Returns the names of the objects of directories and of their subdirectories, and which of them
    /// are subdirectories.
    pub(crate) async fn tree(&self, dir: &Path) -> Result<(Vec<String>, Vec<String>), StoreError> {
        let listed = self.store.list_with_delimiter(Some(&key(dir))).await.map_err(self.failed(dir))?;
        let name = |key: &Key| key.filename().map(ToOwned::to_owned);
        let objects = listed.objects.iter().filter_map(|meta| name(&meta.location)).collect();
        Ok((objects, listed.common_prefixes.iter().filter_map(name).collect()))
    }

    /// Returns the objects of the subdirectories `dirs` of `top`, which has no others.
    pub(crate) async fn entries_of(&self, top: &Path, dirs: &[PathBuf]) -> Result<Vec<Entry>, StoreError> {
        // One list, a request for each 1,000 objects, unless they are many.
        let first = if self.lists_trees { self.below(top, MAX_ONE_LIST + 1).await? } else { Vec::new() };
        if self.lists_trees && first.len() <= MAX_ONE_LIST {
            return Ok(first.iter().filter_map(entry).collect());
        }
        let all = stream::iter(dirs).map(|dir| self.entries(dir)).buffered(PARALLEL);
        all.try_fold(Vec::new(), |mut all, entries| async {
            all.extend(entries);
            Ok(all)
        })
        .await
    }

    /// Returns the first `most` objects below a directory, at any depth.
    async fn below(&self, dir: &Path, most: usize) -> Result<Vec<ObjectMeta>, StoreError> {
        if self.lists_trees {
            let listed = self.store.list(Some(&key(dir))).take(most);
            return listed.try_collect().await.map_err(self.failed(dir));
        }
        let (mut found, mut dirs) = (Vec::new(), vec![key(dir)]);
        while !dirs.is_empty() && found.len() < most {
            let listed = stream::iter(&dirs).map(|dir| self.store.list_with_delimiter(Some(dir)));
            let listed: Vec<_> = listed.buffered(PARALLEL).try_collect().await.map_err(self.failed(dir))?;
            dirs.clear();
            for listed in listed {
                found.extend(listed.objects);
                dirs.extend(listed.common_prefixes);
            }
        }
        found.truncate(most);
        Ok(found)
    }

    /// Returns the paths below a directory, at any depth.
    pub(crate) async fn paths_below(&self, dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
        let listed = self.below(dir, usize::MAX).await?;
        Ok(listed.iter().map(|meta| PathBuf::from(meta.location.as_ref())).collect())
    }

    pub(super) async fn remove_below(&self, dir: &Path) -> Result<Option<u64>, StoreError> {
        let listed = self.below(dir, usize::MAX).await?;
        let bytes = listed.iter().map(|meta| meta.size).sum();
        let paths: Vec<_> = listed.iter().map(|meta| PathBuf::from(meta.location.as_ref())).collect();
        self.delete_all(&paths).await?;
        Ok((!listed.is_empty()).then_some(bytes))
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // The drop may happen on an async worker, which must not wait for the bucket's threads.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn key(path: &Path) -> Key {
    let text = path.to_str().expect("the layout's names are ASCII");
    // A prefix may have characters that would be escaped.
    Key::parse(text).unwrap_or_else(|_| Key::from(text))
}

fn entry(meta: &ObjectMeta) -> Option<Entry> {
    let written = SystemTime::from(meta.last_modified);
    Some(Entry { name: meta.location.filename()?.to_owned(), bytes: meta.size, written })
}
