//! Stores whole images, or their working sets, in the kernel's page cache.
//!
//! An image's working set is stored when a file of the image is opened for the first time, or on
//! request; the rest of the image on request only.

use crate::images::{Images, zeros};
use crate::nodes;
use crate::store::{Pages, Store};
use crate::{BY_DIGEST, directory_of};
use bytes::Bytes;
use futures_util::StreamExt;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::{Entry, EntryKind, FileEntry};
use postcopy::proto::page::{ChunkIndex, PAGE_BYTES};
use postcopy::proto::v1::RequestClass;
use postcopy::{ChunkBytes, ReadError, Reader, RemoteError, ServerAddress, WorkingSet};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Most images whose pages are stored at once.
const IMAGES: usize = 4;
/// Attempts at a working set, and the pause between them.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of the chunks that are requested at once for a whole image.
const AT_ONCE_BYTES: usize = 2 << 20;

/// The reason why pages were not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the table of nodes: {0}")]
    Nodes(#[from] rustix::io::Errno),
}

/// The images that are stored ahead.
#[derive(Debug)]
pub(crate) struct Sets {
    server: ServerAddress,
    images: Arc<Images>,
    store: Store,
    /// The images whose working sets were stored, or are being stored. Locked for a look.
    begun: Mutex<HashSet<Digest>>,
    turns: Semaphore,
}

/// The files of an image, with their nodes, and those that the kernel was told to look up.
struct Files<'a> {
    image: Digest,
    /// A node of the image.
    node: u64,
    files: Vec<(u32, &'a Entry, FileEntry)>,
    looked_up: HashSet<usize>,
}

impl<'a> Files<'a> {
    fn of(reader: &'a Reader, node: u64) -> Self {
        let root = reader.image().root();
        let file = |(index, entry): (u32, &'a Entry)| match entry.kind {
            EntryKind::File(file) => Some((index, entry, file)),
            _ => None,
        };
        let files = (0..).zip(root.entries()).filter_map(file).collect();
        Self { image: reader.image().digest(), node, files, looked_up: HashSet::new() }
    }

    /// Returns the node of a file, which the kernel knows from now on.
    async fn node(&mut self, store: &Store, file: usize) -> Option<u64> {
        let (index, entry, _) = *self.files.get(file)?;
        if self.looked_up.insert(file) {
            let image = format!("{BY_DIGEST}/{}/", directory_of(&self.image)).into_bytes();
            store.look_up([&image, entry.path.as_bytes()].concat()).await;
        }
        Some(nodes::of_entry(self.node, index))
    }
}

impl Sets {
    pub(crate) fn new(server: ServerAddress, images: Arc<Images>, store: Store) -> Self {
        let (begun, turns) = (Mutex::default(), Semaphore::new(IMAGES));
        Self { server, images, store, begun, turns }
    }

    /// Stores the working set of an image, a file of which has been opened, if it was not yet.
    pub(crate) fn opened(self: &Arc<Self>, image: Digest, node: u64) {
        if !self.begun.lock().unwrap_or_else(PoisonError::into_inner).insert(image) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            for _ in 0..ATTEMPTS {
                let stored = AtomicU64::new(0);
                match this.warm(&image, node, false, &stored).await {
                    Ok(()) if stored.load(Ordering::Relaxed) == 0 => return,
                    Ok(()) => {
                        return tracing::info!("image {image}: stored {stored:?} pages of its working set");
                    }
                    Err(error) => tracing::warn!("the working set of image {image}: {error}"),
                }
                tokio::time::sleep(PAUSE).await;
            }
            // The next open tries again.
            this.begun.lock().unwrap_or_else(PoisonError::into_inner).remove(&image);
        });
    }

    /// Stores the working set of an image, and with `fill` all other pages after it. `node` is any
    /// node of the image. Counts pages in `stored`.
    ///
    /// # Errors
    /// The error of the server.
    pub(crate) async fn warm(
        &self,
        image: &Digest,
        node: u64,
        fill: bool,
        stored: &AtomicU64,
    ) -> Result<(), Failed> {
        let _turn = self.turns.acquire().await.expect("it is never closed");
        let reader = self.images.reader(image).await?;
        let mut files = Files::of(&reader, node);
        let mut set = WorkingSet::open(&self.server, reader.image()).await?;
        while let Some(pages) = set.next().await? {
            for pages in pages {
                let Some(node) = files.node(&self.store, pages.file).await else { continue };
                self.store_at(node, pages.offset, pages.content, stored).await;
            }
        }
        if fill {
            self.fill(&reader, &mut files, stored).await?;
        }
        self.store.wait_until_written().await;
        Ok(())
    }

    async fn fill(&self, reader: &Reader, files: &mut Files<'_>, stored: &AtomicU64) -> Result<(), Failed> {
        let chunk_bytes = reader.image().root().chunk_size().bytes();
        let at_once = (AT_ONCE_BYTES / chunk_bytes).max(2);
        for file in 0..files.files.len() {
            let Some(node) = files.node(&self.store, file).await else { continue };
            let (_, _, entry) = files.files[file];
            let chunk = |number: u64| async move {
                self.images.no_read_waits().await;
                let chunk = ChunkIndex(entry.first_chunk.0 + number);
                (number, reader.chunk_ahead(&entry, chunk, RequestClass::Background).await)
            };
            let numbers = 0..entry.size_bytes.div_ceil(chunk_bytes as u64);
            let mut chunks = futures_util::stream::iter(numbers).map(chunk).buffered(at_once);
            while let Some((number, content)) = chunks.next().await {
                self.store_at(node, number * chunk_bytes as u64, content?, stored).await;
            }
        }
        Ok(())
    }

    async fn store_at(&self, node: u64, mut offset: u64, content: ChunkBytes, stored: &AtomicU64) {
        let contents: Vec<Bytes> = match content {
            ChunkBytes::Data(content) => vec![content],
            ChunkBytes::Zeros(len) => zeros(len),
        };
        for content in contents {
            let bytes = content.len();
            self.store.store(Pages { node, offset, content }).await;
            offset += bytes as u64;
            stored.fetch_add(bytes.div_ceil(PAGE_BYTES) as u64, Ordering::Relaxed);
        }
    }
}
