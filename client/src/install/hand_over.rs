//! Installs of installer threads, which an installer hands over to the pager if an unread event
//! blocks them.

use crate::install::{self, Installed};
use crate::memory::ChunkPages;
use crate::memory::{MemoryMap, Region};
use postcopy_proto::page::ChunkIndex;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;

/// The largest number of installs that may await the pager; an installer waits a while for its own.
const HANDED_OVER: usize = 64;

/// The content of pages to install.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work<'a> {
    /// The content of a whole chunk.
    Chunk(ChunkIndex, &'a ChunkPages),
    /// The padded bytes of the pages, or None for zeros.
    Pages(Option<&'a [u8]>),
}

impl Work<'_> {
    /// Installs the content into these pages of a region. With a `map`, passes the gate as an
    /// installer.
    pub(crate) fn install(self, map: Option<&MemoryMap>, region: &Region, pages: &Range<usize>) -> Installed {
        match self {
            Self::Chunk(chunk, content) => install::install(map, region, chunk, content, None),
            Self::Pages(bytes) => install::install_pages(map, region, pages.clone(), bytes),
        }
    }
}

/// The content of pages to install, owned.
#[derive(Debug)]
enum Owned {
    Chunk(ChunkIndex, Box<ChunkPages>),
    Pages(Option<Box<[u8]>>),
}

/// An install that the pager performs once events permit.
#[derive(Debug)]
pub(crate) struct HandedOver {
    pub(crate) region: Region,
    pub(crate) pages: Range<usize>,
    pub(crate) deadline: Instant,
    work: Owned,
    reply: SyncSender<Installed>,
}

impl HandedOver {
    /// Returns an install to hand over, and the receiver of its outcome.
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

    /// Performs the install. Only the pager may call this.
    pub(crate) fn install(&self) -> Installed {
        let work = match &self.work {
            Owned::Chunk(chunk, content) => Work::Chunk(*chunk, content),
            Owned::Pages(bytes) => Work::Pages(bytes.as_deref()),
        };
        work.install(None, &self.region, &self.pages)
    }

    /// Sends the outcome to the installer.
    pub(crate) fn done(self, installed: Installed) {
        // The channel has room; the installer may have ended with the session.
        let _ = self.reply.try_send(installed);
    }
}

/// The queue of installs to the pager.
#[derive(Debug)]
pub(crate) struct ToPager {
    sender: mpsc::Sender<HandedOver>,
    /// The receiving end, until the pager takes it. Locked only for that.
    queue: Mutex<Option<mpsc::Receiver<HandedOver>>>,
}

impl Default for ToPager {
    fn default() -> Self {
        let (sender, queue) = mpsc::channel(HANDED_OVER);
        Self { sender, queue: Mutex::new(Some(queue)) }
    }
}

impl ToPager {
    /// Takes the receiving end for the pager.
    ///
    /// # Panics
    /// Panics if it was taken before.
    pub(crate) fn take_queue(&self) -> mpsc::Receiver<HandedOver> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take().expect("a session has one pager")
    }

    /// Sends an install unless the queue is full. Returns whether it was sent, or the pager has
    /// ended.
    pub(crate) fn send(&self, work: HandedOver) -> bool {
        !matches!(self.sender.try_send(work), Err(mpsc::error::TrySendError::Full(_)))
    }
}
