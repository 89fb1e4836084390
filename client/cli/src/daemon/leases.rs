//! Leases of the daemon's images, so that a tag that moves and a garbage collector do not take the memory of machines that
//! are restored later.
//!
//! A server keeps an image while a stream of pages is bound to it. So one thread of the worker holds such a stream for each
//! image, and opens another one after it was lost. Between two streams, and between two workers, the collector's grace
//! time keeps the image.

use super::Setup;
use postcopy::proto::v1::{ChunkRun, FetchChunksRequest};
use postcopy::{Image, Remote, ServerAddress};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// The pause after a stream was lost, and the longest.
const PAUSES: Range<Duration> = Duration::from_millis(200)..Duration::from_secs(5);
/// How long a server may take to bind a stream.
const PATIENCE: Duration = Duration::from_secs(30);

/// Leases that are being taken.
#[derive(Debug)]
pub(crate) struct Leases {
    /// A message for each lease that is held.
    held: Receiver<()>,
    images: usize,
}

impl Leases {
    /// Starts the thread that holds a lease of each image until the worker ends.
    ///
    /// # Errors
    /// If there is no thread, or no descriptor for its runtime.
    pub(crate) fn hold(setup: &Arc<Setup>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (sender, held) = sync_channel(setup.images.len());
        let mut all = JoinSet::new();
        for (index, image) in setup.images.iter().enumerate() {
            // Several sockets may have the same image.
            if setup.images[..index].iter().all(|other| other.digest() != image.digest()) {
                let name = setup.references[index].clone();
                let lease =
                    Lease { address: setup.address.clone(), name, image: Arc::clone(image), is_gone: false };
                all.spawn_on(lease.hold(sender.clone()), runtime.handle());
            }
        }
        let images = all.len();
        let thread = std::thread::Builder::new().name("postcopy-leases".into());
        thread.spawn(move || runtime.block_on(all.join_all()))?;
        Ok(Self { held, images })
    }

    /// Waits until all leases are held, at most for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for _ in 0..self.images {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.held.recv_timeout(left).is_err() {
                return;
            }
        }
    }
}

/// The lease of an image.
#[derive(Debug)]
struct Lease {
    address: ServerAddress,
    /// What the user calls it.
    name: String,
    image: Arc<Image>,
    /// The server has said that it does not have the image.
    is_gone: bool,
}

impl Lease {
    /// Takes the lease again and again; tells `held` of the first time.
    async fn hold(mut self, held: SyncSender<()>) {
        let (mut held, mut pause) = (Some(held), PAUSES.start);
        loop {
            if let Some(mut lease) = self.take().await {
                pause = PAUSES.start;
                // There is room for one of each. Fails where nobody waits for it.
                held.take().map(|held| held.try_send(()).ok());
                lease.lost().await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.end);
        }
    }

    /// Binds a stream to the image. None: the server is away, or does not have it.
    async fn take(&mut self) -> Option<Held> {
        let attempt = tokio::time::timeout(PATIENCE, self.bind()).await;
        let (name, image) = (&self.name, self.image.digest());
        match attempt.ok()? {
            Ok(held) => {
                if std::mem::take(&mut self.is_gone) {
                    tracing::info!("image {name} ({image}) is on server {} again", self.address);
                }
                Some(held)
            }
            Err(Some(tonic::Code::NotFound)) if !std::mem::replace(&mut self.is_gone, true) => {
                tracing::error!(
                    "image {name} ({image}) is gone from server {}: memory that is restored from it does not arrive \
                     until it is pushed there again",
                    self.address
                );
                None
            }
            // Sessions tell of a server that is away.
            Err(_) => None,
        }
    }

    /// # Errors
    /// What the server has answered, if it was reached.
    async fn bind(&self) -> Result<Held, Option<tonic::Code>> {
        let remote = Remote::connect(self.address.clone()).await.map_err(|_| None)?;
        let (requests, queue) = mpsc::channel(1);
        // The server binds the stream before it answers, here that there is no such chunk.
        let beyond = ChunkRun { first: self.image.root().chunks(), count: 1 };
        let image = self.image.digest().into();
        let request = FetchChunksRequest { image, runs: vec![beyond], ..FetchChunksRequest::default() };
        requests.try_send(request).expect("the queue is new");
        let answers = remote.pages().fetch_chunks(ReceiverStream::new(queue)).await;
        let mut answers = answers.map_err(|status| Some(status.code()))?.into_inner();
        answers.message().await.map_err(|status| Some(status.code()))?.ok_or(None)?;
        Ok(Held { _requests: requests, answers })
    }
}

/// A stream that is bound to an image.
struct Held {
    /// The server ends a stream that has no more requests.
    _requests: mpsc::Sender<FetchChunksRequest>,
    answers: tonic::Streaming<postcopy::proto::v1::FetchChunksResponse>,
}

impl Held {
    /// Waits until the stream has ended.
    async fn lost(&mut self) {
        while let Ok(Some(_)) = self.answers.message().await {}
    }
}
