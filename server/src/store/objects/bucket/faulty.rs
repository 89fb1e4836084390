//! A bucket whose requests are counted, take time and fail, for tests.

use futures_util::stream::{BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a bucket misbehaves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Time that each request takes.
    pub(crate) delay: Duration,
    /// Every so many requests but those for lists, on average, one fails before it has an effect.
    pub(crate) fails_before: Option<u64>,
    /// Every so many writes, on average, one is done, and reported as failed.
    pub(crate) fails_after: Option<u64>,
    /// Nothing is deleted: the requests fail.
    pub(crate) deletes_fail: bool,
    /// The bucket has no conditional writes.
    pub(crate) is_unconditional: bool,
}

/// A request: what was asked for, and when it began and ended.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) text: String,
    began: Instant,
    ended: Instant,
}

/// A bucket in memory that misbehaves.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: InMemory,
    faults: Mutex<Faults>,
    requests: Mutex<Vec<Request>>,
    state: AtomicU64,
}

impl Faulty {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        let (faults, requests) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner: InMemory::new(), faults, requests, state: AtomicU64::new(seed) })
    }

    pub(crate) fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    /// Returns the requests since the last call.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn draws(&self, one_in: Option<u64>) -> bool {
        let Some(one_in) = one_in else { return false };
        let drawn = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        fastrand::Rng::with_seed(drawn).u64(0..one_in) == 0
    }

    async fn request<T>(
        &self,
        text: String,
        is_write: bool,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let (faults, began) = (*self.faults.lock().unwrap(), Instant::now());
        if !faults.delay.is_zero() {
            tokio::time::sleep(faults.delay).await;
        }
        let outcome = match self.draws(faults.fails_before) {
            true => failed(),
            false => request.await,
        };
        let outcome = if is_write && self.draws(faults.fails_after) { failed() } else { outcome };
        self.requests.lock().unwrap().push(Request { text, began, ended: Instant::now() });
        outcome
    }
}

fn failed<T>() -> Result<T> {
    Err(Error::Generic { store: "faulty", source: "it fails for a test".into() })
}

/// Returns the length of the longest chain of requests that began after one another's end.
pub(crate) fn depth(requests: &[Request]) -> usize {
    let mut sorted: Vec<_> = requests.iter().collect();
    sorted.sort_by_key(|request| request.ended);
    let mut depths: Vec<(Instant, usize)> = Vec::new();
    for request in sorted {
        let before = depths.iter().filter(|(ended, _)| *ended <= request.began).map(|(_, depth)| *depth);
        depths.push((request.ended, before.max().unwrap_or(0) + 1));
    }
    depths.iter().map(|(_, depth)| *depth).max().unwrap_or(0)
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a faulty bucket")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, key: &Key, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let is_unconditional = self.faults.lock().unwrap().is_unconditional;
        if is_unconditional && options.mode != object_store::PutMode::Overwrite {
            let (operation, implementer) = ("a conditional write".to_owned(), self.to_string());
            return Err(Error::NotImplemented { operation, implementer });
        }
        self.request(format!("put {key}"), true, self.inner.put_opts(key, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        key: &Key,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(key, options).await
    }

    async fn get_opts(&self, key: &Key, options: GetOptions) -> Result<GetResult> {
        let verb = if options.head { "head" } else { "get" };
        self.request(format!("{verb} {key}"), false, self.inner.get_opts(key, options)).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        match self.faults.lock().unwrap().deletes_fail {
            true => futures_util::stream::iter([failed()]).boxed(),
            false => self.inner.delete_stream(keys),
        }
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        let text = format!("list {}", prefix.map(ToString::to_string).unwrap_or_default());
        let began = Instant::now();
        let listed = self.inner.list_with_delimiter(prefix).await;
        self.requests.lock().unwrap().push(Request { text, began, ended: Instant::now() });
        listed
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
