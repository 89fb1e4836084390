//! Leases of the daemon's images. They protect the memory of programs that are restored later from
//! a tag that moves and from the garbage collector.
//!
//! A server keeps an image while a stream of pages is bound to it. So one thread of the worker
//! holds such a stream for each image, and opens another one after a loss. Between two streams, and
//! between two workers, the collector's grace time protects the image.

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

/// The shortest and the longest pause after a stream was lost.
const PAUSES: Range<Duration> = Duration::from_millis(200)..Duration::from_secs(5);
/// The time that a server has to bind a stream.
const PATIENCE: Duration = Duration::from_secs(30);

/// The leases of a worker, which its thread takes and holds.
#[derive(Debug)]
pub(crate) struct Leases {
    /// Receives a message for each lease that is held for the first time.
    held: Receiver<()>,
    images: usize,
}

impl Leases {
    /// Starts the thread that holds a lease of each image until the worker ends.
    ///
    /// # Errors
    /// The thread, or a descriptor for its runtime, is not available.
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

    /// Waits for at most `timeout` until all leases are held.
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
    /// The user's name of the image.
    name: String,
    image: Arc<Image>,
    /// The server has answered that it does not have the image.
    is_gone: bool,
}

impl Lease {
    /// Takes the lease, and takes it again after each loss. Sends to `held` after the first
    /// success.
    async fn hold(mut self, held: SyncSender<()>) {
        let (mut held, mut pause) = (Some(held), PAUSES.start);
        loop {
            if let Some(mut lease) = self.take().await {
                pause = PAUSES.start;
                // The channel has room for a message of each lease. The send fails if the receiver
                // is dropped.
                held.take().map(|held| held.try_send(()).ok());
                lease.lost().await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.end);
        }
    }

    /// Binds a stream to the image. None: the server is unreachable or does not have the image.
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
            // The sessions report a server that is unreachable.
            Err(_) => None,
        }
    }

    /// Opens a stream of pages and waits until the server has bound it to the image.
    ///
    /// # Errors
    /// The code of the server's answer, or None if no answer was received.
    async fn bind(&self) -> Result<Held, Option<tonic::Code>> {
        let remote = Remote::connect(self.address.clone()).await.map_err(|_| None)?;
        let (requests, queue) = mpsc::channel(1);
        // The server binds the stream before it answers. Here it answers that the chunk does not
        // exist.
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
    /// Kept open, because the server ends a stream that can send no more requests.
    _requests: mpsc::Sender<FetchChunksRequest>,
    answers: tonic::Streaming<postcopy::proto::v1::FetchChunksResponse>,
}

impl Held {
    /// Waits until the stream ends.
    async fn lost(&mut self) {
        while let Ok(Some(_)) = self.answers.message().await {}
    }
}
