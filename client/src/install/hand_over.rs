//! Installs that are done from a thread of an installer, or handed over to the pager where an event is in the way.

use crate::install::{self, Installed};
use crate::memory::ChunkPages;
use crate::memory::{MemoryMap, Region};
use postcopy_proto::page::ChunkIndex;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;

/// Installs that may wait for the pager; an installer waits a while for its own.
const HANDED_OVER: usize = 64;

/// The content of pages that are to be installed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work<'a> {
    /// A whole chunk.
    Chunk(ChunkIndex, &'a ChunkPages),
    /// The padded bytes of the pages, or None for zeros.
    Pages(Option<&'a [u8]>),
}

impl Work<'_> {
    /// Installs it into these pages of a region. With a `map` it passes the gate as an installer.
    pub(crate) fn install(self, map: Option<&MemoryMap>, region: &Region, pages: &Range<usize>) -> Installed {
        match self {
            Self::Chunk(chunk, content) => install::install(map, region, chunk, content, None),
            Self::Pages(bytes) => install::install_pages(map, region, pages.clone(), bytes),
        }
    }
}

/// The same with bytes of its own.
#[derive(Debug)]
enum Owned {
    Chunk(ChunkIndex, Box<ChunkPages>),
    Pages(Option<Box<[u8]>>),
}

/// An install that the pager is to do, as soon as events let it.
#[derive(Debug)]
pub(crate) struct HandedOver {
    pub(crate) region: Region,
    pub(crate) pages: Range<usize>,
    pub(crate) deadline: Instant,
    work: Owned,
    reply: SyncSender<Installed>,
}

impl HandedOver {
    /// An install that is handed over, and what tells how it went.
    pub(crate) fn new(
        region: &Region,
        pages: &Range<usize>,
        work: Work<'_>,
        deadline: Instant,
    ) -> (Self, Receiver<Installed>) {
        let work = match work {
            Work::Chunk(chunk, content) => Owned::Chunk(chunk, Box::new(content.clone())),
            Work::Pages(bytes) => Owned::Pages(bytes.map(Into::into)),
        };
        let (reply, outcome) = sync_channel(1);
        (Self { region: region.clone(), pages: pages.clone(), deadline, work, reply }, outcome)
    }

    /// Installs it. For the pager alone.
    pub(crate) fn install(&self) -> Installed {
        let work = match &self.work {
            Owned::Chunk(chunk, content) => Work::Chunk(*chunk, content),
            Owned::Pages(bytes) => Work::Pages(bytes.as_deref()),
        };
        work.install(None, &self.region, &self.pages)
    }

    /// Tells the installer how it went.
    pub(crate) fn done(self, installed: Installed) {
        // There is room for it; the installer may have ended with the session.
        let _ = self.reply.try_send(installed);
    }
}

/// The way of installs to the pager.
#[derive(Debug)]
pub(crate) struct ToPager {
    sender: mpsc::Sender<HandedOver>,
    /// Until the pager takes it. Held for that alone.
    queue: Mutex<Option<mpsc::Receiver<HandedOver>>>,
}

impl Default for ToPager {
    fn default() -> Self {
        let (sender, queue) = mpsc::channel(HANDED_OVER);
        Self { sender, queue: Mutex::new(Some(queue)) }
    }
}

impl ToPager {
    /// Takes the pager's end.
    ///
    /// # Panics
    /// If it was taken before.
    pub(crate) fn take_queue(&self) -> mpsc::Receiver<HandedOver> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take().expect("a session has one pager")
    }

    /// Sends an install, unless as many as the queue holds wait: whether it was sent, or the pager has ended.
    pub(crate) fn send(&self, work: HandedOver) -> bool {
        !matches!(self.sender.try_send(work), Err(mpsc::error::TrySendError::Full(_)))
    }
}
