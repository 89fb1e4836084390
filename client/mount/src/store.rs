//! Hands pages to the storer ([`crate::storer`]) before a program reads them.
//!
//! Stores are for speed alone: a page that is not stored is read. A queue of bounded length holds
//! them, and a thread writes them to the storer's pipe. Whoever answers a read does not wait for a
//! place in the queue; whoever fetches ahead does, and so fetches no faster than the kernel takes.

use crate::storer::{MAX_BYTES, Message};
use bytes::Bytes;
use std::io::{self, PipeWriter, Write};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Most bytes that wait for the storer.
const QUEUED_BYTES: usize = 16 << 20;
/// Most messages that wait for it.
const QUEUE: usize = 4096;

/// Pages of a file.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    pub(crate) node: u64,
    /// Offset of the first page in the file.
    pub(crate) offset: u64,
    /// Whole pages, but at the end of the file.
    pub(crate) content: Bytes,
}

/// The way to the storer.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    queue: mpsc::Sender<Queued>,
    /// A permit for each byte that may wait.
    room: Arc<Semaphore>,
}

#[derive(Debug)]
struct Queued {
    message: Message,
    content: Bytes,
    _room: OwnedSemaphorePermit,
}

impl Store {
    /// Starts the thread that writes to the storer's pipe.
    pub(crate) fn start(pipe: PipeWriter) -> io::Result<Self> {
        let (queue, queued) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("store".to_owned()).spawn(move || write_all(pipe, queued))?;
        Ok(Self { queue, room: Arc::new(Semaphore::new(QUEUED_BYTES)) })
    }

    /// Queues pages for which there is room, and leaves the others out.
    pub(crate) fn try_store(&self, pages: Pages) {
        if let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(permits(&pages.content)) {
            let _ = self.queue.try_send(Queued::new(pages, room));
        }
    }

    /// Queues pages when there is room for them.
    pub(crate) async fn store(&self, pages: Pages) {
        let room = self.room_for(&pages.content).await;
        // The queue is closed if the storer is gone.
        let _ = self.queue.send(Queued::new(pages, room)).await;
    }

    /// Has the kernel look a file up by its path below the file system's root, before the pages
    /// that are queued later.
    pub(crate) async fn look_up(&self, path: Vec<u8>) {
        let content = Bytes::from(path);
        let room = self.room_for(&content).await;
        let _ = self.queue.send(Queued { message: Message::Look, content, _room: room }).await;
    }

    /// Waits until the storer has all that was queued, but for what its pipe holds.
    pub(crate) async fn wait_until_written(&self) {
        let all = u32::try_from(QUEUED_BYTES).expect("a small constant");
        drop(self.room.acquire_many(all).await);
    }

    async fn room_for(&self, content: &Bytes) -> OwnedSemaphorePermit {
        let room = Arc::clone(&self.room).acquire_many_owned(permits(content)).await;
        room.expect("it is never closed")
    }
}

impl Queued {
    fn new(pages: Pages, room: OwnedSemaphorePermit) -> Self {
        let message = Message::Store { node: pages.node, offset: pages.offset };
        Self { message, content: pages.content, _room: room }
    }
}

fn permits(content: &Bytes) -> u32 {
    u32::try_from(content.len().clamp(1, QUEUED_BYTES)).expect("at most the room")
}

fn write_all(mut pipe: PipeWriter, mut queued: mpsc::Receiver<Queued>) {
    while let Some(Queued { message, content, _room }) = queued.blocking_recv() {
        for (part, at) in content.chunks(MAX_BYTES).zip((0..).step_by(MAX_BYTES)) {
            let message = match message {
                Message::Look => Message::Look,
                Message::Store { node, offset } => Message::Store { node, offset: offset + at },
            };
            let written = pipe.write_all(&message.header(part.len())).and_then(|()| pipe.write_all(part));
            if let Err(error) = written {
                return tracing::error!("no pages are stored ahead any more: {error}");
            }
        }
    }
}
