//! Answers the kernel's requests.
//!
//! Some threads read requests; each request becomes a task, so that one that waits for the server
//! delays no other. No thread that reads requests waits for anything else.

use crate::ahead::{Ahead, Opened};
use crate::complaints;
use crate::control::Control;
use crate::images::{Images, Read};
use crate::names::{Named, Names};
use crate::nodes::{Place, Table};
use crate::protocol::{self, Answer, Attributes, Kind, Operation, Owner, Request};
use crate::sets::{Failed, Sets};
use crate::store::Store;
use crate::tree::{Node, ROOT, Tree};
use crate::unanswered::{Noted, Unanswered};
use crate::{BY_DIGEST, directory_of};
use bytes::Bytes;
use futures_util::FutureExt;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::EntryKind;
use postcopy::proto::reference::Reference;
use postcopy::{ReadError, Reader, RemoteError, ServerAddress};
use rustix::io::Errno;
use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice, PipeWriter};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Threads that read requests.
const READERS: usize = 2;
/// Threads that answer them.
const WORKERS: usize = 2;
/// Time that a request may take beyond the deadline of its reads.
const MORE: Duration = Duration::from_secs(1);
/// Most pages of a request.
const MAX_PAGES: u16 = 256;
/// The ways to seek, of lseek(2).
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
/// Most directories of names that are open and keep their list.
const MAX_LISTS: usize = 1024;
/// The flags of the protocol that are of use here.
const WANTED: u64 = protocol::ASYNC_READ
    | protocol::DO_READDIRPLUS
    | protocol::READDIRPLUS_AUTO
    | protocol::PARALLEL_DIROPS
    | protocol::MAX_PAGES
    | protocol::INIT_EXT
    | protocol::HAS_RESEND;

/// The settings of a mount.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The server of the images.
    pub server: ServerAddress,
    /// The references to show, `name:tag`; None: all.
    pub only: Option<BTreeSet<String>>,
    /// Time that a request may take before its program gets EIO.
    pub deadline: Duration,
    /// Most bytes that the kernel reads ahead.
    pub read_ahead_bytes: u32,
    /// The owner of the files.
    pub owner: Owner,
}

/// The descriptors of a mount's process.
#[derive(Debug)]
pub struct Descriptors {
    /// That of /dev/fuse.
    pub device: OwnedFd,
    /// The file of node numbers, empty for a new mount.
    pub table: File,
    /// A file that outlives this process, empty for a new mount: the requests without an answer.
    pub unanswered: File,
    /// The pipe to the process that stores pages ahead: [`crate::store()`].
    pub store: PipeWriter,
    /// The socket for other programs, if there is one.
    pub control: Option<UnixListener>,
    /// The path of the mount.
    pub directory: PathBuf,
}

/// Serves a mount until it is unmounted. A successor of a killed process has its descriptor of
/// /dev/fuse and its table.
///
/// # Errors
/// The table cannot be read, a thread cannot be started, or the kernel refuses a read of requests.
///
/// # Blocking
/// Until the file system is unmounted.
pub fn serve(descriptors: Descriptors, is_successor: bool, settings: Settings) -> io::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(WORKERS).thread_name("mount").enable_all().build()?;
    let Settings { server, only, deadline, read_ahead_bytes, owner } = settings;
    let (unanswered, left) = Unanswered::read(descriptors.unanswered)?;
    let images = Arc::new(Images::new(server.clone(), deadline));
    let store = Store::start(descriptors.store)?;
    let sets = Sets::new(server.clone(), Arc::clone(&images), store.clone());
    let (address, directory) = (server.clone(), descriptors.directory);
    let server = Arc::new(Server {
        device: descriptors.device,
        unanswered,
        table: Mutex::new(Table::read(descriptors.table)?),
        names: Names::new(server, only),
        lists: Mutex::default(),
        ahead: Arc::new(Ahead::new(Arc::clone(&images), store)),
        sets: Arc::new(sets),
        images,
        read_ahead_bytes,
        owner,
        patience: deadline + MORE,
    });
    if !is_successor {
        runtime.spawn(greet(Arc::clone(&server), address.clone(), directory.clone()));
    }
    match left {
        // An older kernel does not send them again.
        Some(left) => left.into_iter().for_each(|unique| server.reply(unique, &Err(Errno::IO))),
        None if is_successor => drop(rustix::io::write(&server.device, &protocol::resend())),
        None => {}
    }
    let handle = runtime.handle();
    if let Some(socket) = descriptors.control {
        let control = Control::new(Arc::clone(&server), directory, address);
        runtime.spawn(control.serve(socket));
    }
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                let server = &server;
                scope.spawn(move || server.read_requests(handle))
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })
}

/// Logs that the images are mounted, and whether their server answers.
async fn greet(server: Arc<Server>, address: ServerAddress, directory: PathBuf) {
    let directory = directory.display();
    match server.names.children("").await {
        Ok(_) => tracing::info!("the images of {address} are mounted at {directory}"),
        Err(error) => tracing::warn!("mounted at {directory}, but {error}"),
    }
}

/// The server of a mount.
#[derive(Debug)]
pub(crate) struct Server {
    device: OwnedFd,
    unanswered: Unanswered,
    /// Locked for a look-up, or to append to its file.
    table: Mutex<Table>,
    names: Names,
    /// The lists of open directories of names, by handle. Locked to find, add or remove one.
    lists: Mutex<Lists>,
    images: Arc<Images>,
    ahead: Arc<Ahead>,
    sets: Arc<Sets>,
    read_ahead_bytes: u32,
    owner: Owner,
    /// Time for an answer: a little longer than a read takes that has its own error.
    patience: Duration,
}

/// The children of a directory of names.
type List = Arc<Vec<(String, Place)>>;

/// The lists of open directories, with the directories, and the last handle. A killed process may
/// have given out the same handles.
#[derive(Debug, Default)]
struct Lists {
    open: HashMap<u64, (Place, List)>,
    last: u64,
}

/// The answer to a request.
enum Reply {
    Answer(Answer),
    Bytes(Bytes),
    Read(ReadReply),
    /// A file of this image was opened.
    Opened(Digest),
}

/// The answer to a read of a part of a file, and the chunks to fetch after it.
struct ReadReply {
    read: Read,
    of: Opened,
    range: Range<u64>,
    ahead: Range<u64>,
}

/// A request whose answer may have to wait, with what it borrows.
#[derive(Debug)]
enum Waiting {
    Lookup(OsString),
    GetAttr,
    ReadLink,
    Open,
    OpenDir,
    Read(Range<u64>),
    ReadDir { handle: u64, offset: u64, bytes: u32, with_attributes: bool },
    Seek { offset: u64, whence: u32 },
}

impl Server {
    /// Reads requests until the file system is unmounted.
    fn read_requests(self: &Arc<Self>, runtime: &tokio::runtime::Handle) -> io::Result<()> {
        let mut buffer = vec![0; protocol::MAX_REQUEST_BYTES];
        loop {
            let length = match rustix::io::read(&self.device, &mut buffer[..]) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(Errno::NODEV) => return Ok(()),
                // A request was interrupted before it was read.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                Err(error) => return Err(error.into()),
            };
            let Some(request) = Request::parse(&buffer[..length]) else { continue };
            let (unique, node) = (request.unique, request.node);
            let waiting = match request.operation {
                Operation::Forget | Operation::Destroy => continue,
                Operation::Init { minor, max_readahead, flags } => {
                    let read_ahead = max_readahead.min(self.read_ahead_bytes);
                    if flags & protocol::HAS_RESEND == 0 {
                        self.unanswered.begin()?;
                    }
                    let answer = Answer::init(minor, read_ahead, flags & WANTED, MAX_PAGES);
                    self.reply(unique, &Ok(Reply::Answer(answer)));
                    continue;
                }
                Operation::Close | Operation::Access => {
                    self.reply(unique, &Ok(Reply::Answer(Answer::default())));
                    continue;
                }
                Operation::CloseDir { handle } => {
                    self.lists().open.remove(&handle);
                    self.reply(unique, &Ok(Reply::Answer(Answer::default())));
                    continue;
                }
                Operation::StatFs => {
                    self.reply(unique, &Ok(Reply::Answer(Answer::statfs())));
                    continue;
                }
                Operation::Unsupported => {
                    self.reply(unique, &Err(Errno::NOSYS));
                    continue;
                }
                Operation::Lookup { name } => Waiting::Lookup(name.to_owned()),
                Operation::GetAttr => Waiting::GetAttr,
                Operation::ReadLink => Waiting::ReadLink,
                Operation::Open => Waiting::Open,
                Operation::OpenDir => Waiting::OpenDir,
                Operation::Read { offset, bytes } => {
                    Waiting::Read(offset..offset.saturating_add(u64::from(bytes)))
                }
                Operation::Seek { offset, whence } => Waiting::Seek { offset, whence },
                Operation::ReadDir { handle, offset, bytes, with_attributes } => {
                    Waiting::ReadDir { handle, offset, bytes, with_attributes }
                }
            };
            let noted = self.unanswered.note(unique);
            runtime.spawn(Arc::clone(self).answer_in_time((unique, noted), node, waiting));
        }
    }

    /// Answers a request, with EIO if there is no other answer in time.
    async fn answer_in_time(self: Arc<Self>, (unique, noted): (u64, Noted), node: u64, request: Waiting) {
        let place = self.table().place(node);
        let answer = AssertUnwindSafe(self.answer(node, request)).catch_unwind();
        let answer = match tokio::time::timeout(self.patience, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => {
                tracing::error!("a fault of this program; a program gets EIO");
                Err(Errno::IO)
            }
            Err(_) => {
                let patience = self.patience;
                complaints::warn(format_args!(
                    "{place:?}: no answer of the server within {patience:?}; a program gets EIO"
                ));
                Err(Errno::IO)
            }
        };
        self.reply(unique, &answer);
        self.unanswered.forget(&noted);
        match answer {
            Ok(Reply::Read(ReadReply { read, of, range, ahead })) => {
                self.ahead.after_read(node, of, (&range, &read.fetched), ahead);
            }
            Ok(Reply::Opened(image)) => self.sets.opened(image, node),
            _ => {}
        }
    }

    fn reply(&self, unique: u64, reply: &Result<Reply, Errno>) {
        let opened = Answer::open(0, protocol::FOPEN_KEEP_CACHE);
        let (error, pieces) = match reply {
            Ok(Reply::Answer(answer)) => (0, vec![IoSlice::new(answer.bytes())]),
            Ok(Reply::Opened(_)) => (0, vec![IoSlice::new(opened.bytes())]),
            Ok(Reply::Bytes(bytes)) => (0, vec![IoSlice::new(bytes)]),
            Ok(Reply::Read(reply)) => {
                (0, reply.read.pieces.iter().map(|piece| IoSlice::new(piece)).collect())
            }
            Err(error) => (error.raw_os_error(), Vec::new()),
        };
        let header = protocol::answer_header(unique, error, pieces.iter().map(|piece| piece.len()).sum());
        let pieces: Vec<_> = std::iter::once(IoSlice::new(&header)).chain(pieces).collect();
        match rustix::io::writev(&self.device, &pieces) {
            // The request was interrupted, or the file system was unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::error!("an answer to the kernel: {error}"),
        }
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        // Each change is a single one.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the working set of the image of a reference, or all of the image.
    pub(crate) async fn warm(
        &self,
        reference: &Reference,
        fill: bool,
        stored: &AtomicU64,
    ) -> Result<(), Failed> {
        let image = match reference {
            Reference::Digest { image, .. } => *image,
            tag @ Reference::Tag(_) => self.names.resolve(tag).await?,
        };
        let node = self.number(&Place::Image(image, ROOT))?;
        self.sets.warm(&image, node, fill, stored).await
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panicked writer has at worst written a line that no number stands for.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self, place: &Place) -> Result<u64, Errno> {
        self.table().number(place).map_err(|error| {
            tracing::error!("the table of nodes: {error}");
            Errno::from_io_error(&error).unwrap_or(Errno::NOSPC)
        })
    }

    async fn answer(&self, node: u64, request: Waiting) -> Result<Reply, Errno> {
        let place = self.table().place(node).ok_or(Errno::STALE)?;
        match request {
            Waiting::Lookup(name) => {
                let child = self.child(&place, &name).await?.ok_or(Errno::NOENT)?;
                let attributes = self.attributes(&child).await?;
                Ok(Reply::Answer(Answer::entry(&attributes, &self.owner)))
            }
            Waiting::GetAttr => {
                let attributes = self.attributes(&place).await?;
                Ok(Reply::Answer(Answer::attributes(&attributes, &self.owner)))
            }
            Waiting::ReadLink => Ok(Reply::Bytes(self.link(&place).await?)),
            Waiting::Open => match place {
                Place::Image(image, _) => Ok(Reply::Opened(image)),
                _ => Err(Errno::ISDIR),
            },
            Waiting::OpenDir => self.open_directory(&place).await.map(Reply::Answer),
            Waiting::Read(range) => {
                let of = self.file(&place).await?;
                let ahead = self.ahead.note(node, &of, &range);
                let read = self.images.read(&of.reader, &of.file, range.clone()).await;
                let read = read.map_err(|error| failed(&place, &error))?;
                Ok(Reply::Read(ReadReply { read, of, range, ahead }))
            }
            Waiting::Seek { offset, whence } => {
                let to_hole = match whence {
                    SEEK_DATA => false,
                    SEEK_HOLE => true,
                    _ => return Err(Errno::INVAL),
                };
                let Opened { reader, file } = self.file(&place).await?;
                let Place::Image(image, node) = &place else { return Err(Errno::INVAL) };
                let entry = Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::STALE)?;
                let found = self.images.seek(&reader, (entry.path.as_bytes(), &file), offset, to_hole).await;
                let found = found.map_err(|error| no_answer(&format!("image {image}"), &error))?;
                Ok(Reply::Answer(Answer::seek(found.ok_or(Errno::NXIO)?)))
            }
            Waiting::ReadDir { handle, offset, bytes, with_attributes } => {
                let max = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
                self.list(&place, handle, offset, max, with_attributes).await.map(Reply::Answer)
            }
        }
    }

    /// Opens a directory. That of an image never changes. Any other keeps its list, so that one
    /// reading of it is of one moment.
    async fn open_directory(&self, place: &Place) -> Result<Answer, Errno> {
        if matches!(place, Place::Image(..)) {
            return Ok(Answer::open(0, protocol::FOPEN_KEEP_CACHE | protocol::FOPEN_CACHE_DIR));
        }
        let list = self.children(place).await?;
        let mut lists = self.lists();
        if lists.open.len() >= MAX_LISTS {
            return Ok(Answer::open(0, 0));
        }
        lists.last += 1;
        let handle = lists.last;
        lists.open.insert(handle, (place.clone(), list));
        Ok(Answer::open(handle, 0))
    }

    /// Returns the children of a directory that is none of an image.
    async fn children(&self, place: &Place) -> Result<List, Errno> {
        let children = match place {
            Place::Root => {
                let mut children = vec![(BY_DIGEST.to_owned(), Place::ByDigest)];
                children.extend(self.names_below("").await?);
                children
            }
            Place::Names(path) => self.names_below(path).await?,
            // Images need not have a name, and the server may have very many.
            Place::ByDigest => Vec::new(),
            Place::Tag(_) | Place::Alias(_) | Place::Image(..) => return Err(Errno::NOTDIR),
        };
        Ok(Arc::new(children))
    }

    async fn reader(&self, image: &Digest) -> Result<Arc<Reader>, Errno> {
        self.images.reader(image).await.map_err(|error| no_answer(&format!("image {image}"), &error))
    }

    /// Returns the file that a place is.
    async fn file(&self, place: &Place) -> Result<Opened, Errno> {
        let Place::Image(image, node) = place else { return Err(Errno::ISDIR) };
        let reader = self.reader(image).await?;
        let entry = Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::ISDIR)?;
        match entry.kind {
            EntryKind::File(file) => Ok(Opened { reader, file }),
            _ => Err(Errno::INVAL),
        }
    }

    async fn child(&self, place: &Place, name: &OsStr) -> Result<Option<Place>, Errno> {
        match place {
            Place::Root if name == OsStr::new(BY_DIGEST) => Ok(Some(Place::ByDigest)),
            Place::Root => self.named("", name).await,
            Place::Names(path) => self.named(path, name).await,
            Place::ByDigest => {
                let Some(name) = name.to_str() else { return Ok(None) };
                let digest: Option<Digest> = name.replacen("blake3-", "blake3:", 1).parse().ok();
                let Some(digest) = digest else { return Ok(None) };
                match self.images.reader(&digest).await {
                    Ok(_) if name.contains(':') => Ok(Some(Place::Alias(digest))),
                    Ok(_) => Ok(Some(Place::Image(digest, ROOT))),
                    Err(error) if error.is_not_found() => Ok(None),
                    Err(error) => Err(no_answer(&format!("image {digest}"), &error)),
                }
            }
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                let child = Tree(reader.image().root().entries()).child(*node, name);
                Ok(child.map(|node| Place::Image(*image, node)))
            }
            Place::Tag(_) | Place::Alias(_) => Err(Errno::NOTDIR),
        }
    }

    async fn named(&self, path: &str, name: &OsStr) -> Result<Option<Place>, Errno> {
        let Some(name) = name.to_str() else { return Ok(None) };
        let found = self.names.child(path, name).await;
        let found = found.map_err(|error| no_answer(&format!("{path}/{name}"), &error))?;
        Ok(found.map(place_of))
    }

    async fn attributes(&self, place: &Place) -> Result<Attributes, Errno> {
        let node = self.number(place)?;
        let (kind, size_bytes, is_fixed) = match place {
            Place::Root | Place::ByDigest => (Kind::Directory, 0, true),
            Place::Names(_) => (Kind::Directory, 0, false),
            Place::Tag(reference) => (Kind::SymbolicLink, link_to(reference, "").len() as u64 + 71, false),
            Place::Alias(image) => (Kind::SymbolicLink, directory_of(image).len() as u64, true),
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                let (kind, size) = of_image(&reader, *node).ok_or(Errno::STALE)?;
                (kind, size, true)
            }
        };
        Ok(Attributes { node, kind, size_bytes, is_fixed })
    }

    async fn link(&self, place: &Place) -> Result<Bytes, Errno> {
        match place {
            Place::Tag(reference) => {
                let tag = reference.parse().expect("it was checked");
                let image = self.names.resolve(&tag).await;
                let image = image.map_err(|error| match error.is_not_found() {
                    true => Errno::NOENT,
                    false => no_answer(reference, &error),
                })?;
                Ok(link_to(reference, &directory_of(&image)).into())
            }
            Place::Alias(image) => Ok(directory_of(image).into()),
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                match &Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::INVAL)?.kind {
                    EntryKind::SymbolicLink(target) => Ok(Bytes::copy_from_slice(target)),
                    _ => Err(Errno::INVAL),
                }
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// Lists a directory from an offset on: 0, or that of an earlier entry.
    async fn list(
        &self,
        place: &Place,
        handle: u64,
        offset: u64,
        max: usize,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let mut answer = Answer::default();
        let plus = plus.then_some(&self.owner);
        let itself = self.attributes(place).await?;
        // The kernel does not use what "." and ".." tell.
        for (at, name) in [(0, "."), (1, "..")] {
            if offset <= at {
                let entry = (OsStr::new(name), &itself, at + 1);
                if !answer.push_entry(entry, plus, max) {
                    return Ok(answer);
                }
            }
        }
        let from = usize::try_from(offset.saturating_sub(2)).map_err(|_| Errno::INVAL)?;
        if let Place::Image(image, node) = place {
            let reader = self.reader(image).await?;
            for (name, node, next) in Tree(reader.image().root().entries()).children(*node, from) {
                let (kind, size_bytes) = of_image(&reader, node).ok_or(Errno::STALE)?;
                let number = self.number(&Place::Image(*image, node))?;
                let attributes = Attributes { node: number, kind, size_bytes, is_fixed: true };
                if !answer.push_entry((name, &attributes, next as u64 + 2), plus, max) {
                    break;
                }
            }
            return Ok(answer);
        }
        let list = self.lists().open.get(&handle).cloned();
        let children = match list {
            Some((of, list)) if of == *place => list,
            // A killed process has opened the directory, or very many are open.
            _ => self.children(place).await?,
        };
        for (at, (name, child)) in children.iter().enumerate().skip(from) {
            let attributes = self.attributes(child).await?;
            if !answer.push_entry((OsStr::new(name), &attributes, at as u64 + 3), plus, max) {
                break;
            }
        }
        Ok(answer)
    }

    async fn names_below(&self, path: &str) -> Result<Vec<(String, Place)>, Errno> {
        let children = self.names.children(path).await.map_err(|error| no_answer(path, &error))?;
        Ok(children.into_iter().map(|(name, named)| (name, place_of(named))).collect())
    }
}

fn place_of(named: Named) -> Place {
    match named {
        Named::Directory(path) => Place::Names(path),
        Named::Tag(reference) => Place::Tag(reference),
    }
}

fn of_image(reader: &Reader, node: Node) -> Option<(Kind, u64)> {
    let tree = Tree(reader.image().root().entries());
    let size = match tree.entry(node).map(|entry| &entry.kind) {
        Some(EntryKind::File(file)) => file.size_bytes,
        Some(EntryKind::SymbolicLink(target)) => target.len() as u64,
        Some(EntryKind::EmptyDirectory) | None => 0,
    };
    Some((tree.kind(node)?, size))
}

/// Returns the target of a reference's link, relative to the link's directory.
fn link_to(reference: &str, image: &str) -> String {
    let up = reference.split('/').count();
    format!("{}{BY_DIGEST}/{image}", "../".repeat(up))
}

/// Logs an error of the server, and returns that of the program.
fn no_answer(what: &str, error: &RemoteError) -> Errno {
    let what = if what.is_empty() { "the names of images" } else { what };
    complaints::warn(format_args!("{what}: {error}; a program gets EIO"));
    Errno::IO
}

fn failed(place: &Place, error: &ReadError) -> Errno {
    match place {
        Place::Image(image, _) => {
            complaints::warn(format_args!("image {image}: {error}; a program gets EIO"))
        }
        other => complaints::warn(format_args!("{other:?}: {error}; a program gets EIO")),
    }
    Errno::IO
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn links_of_tags_lead_to_images_by_digest() {
        let image = directory_of(&Digest::of(b"an image"));
        assert_eq!(image.len(), 71);
        assert_eq!(link_to("app:v1", &image), format!("../by-digest/{image}"));
        assert_eq!(link_to("a/b:v1", &image), format!("../../by-digest/{image}"));
    }

    /// A message of the kernel.
    fn message(opcode: u32, unique: u64, arguments: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + arguments.len()).unwrap();
        let mut message = [length.to_ne_bytes(), opcode.to_ne_bytes()].concat();
        message.extend([unique.to_ne_bytes(), protocol::ROOT_ID.to_ne_bytes()].concat());
        message.resize(40, 0);
        message.extend(arguments);
        message
    }

    /// Serves what comes through a socket in place of /dev/fuse, and returns the other end.
    fn serve_socket(unanswered: &File, server: &ServerAddress, is_successor: bool) -> UnixDatagram {
        let (kernel, device) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut unanswered = unanswered.try_clone().unwrap();
        std::io::Seek::rewind(&mut unanswered).unwrap();
        let (table, directory) = (tempfile::tempfile().unwrap(), PathBuf::from("/"));
        let (_, store) = io::pipe().unwrap();
        let descriptors = Descriptors { device, table, unanswered, store, control: None, directory };
        let settings = Settings {
            server: server.clone(),
            only: None,
            deadline: Duration::from_secs(60),
            read_ahead_bytes: 4096,
            owner: Owner { uid: 0, gid: 0, mode: 0o500 },
        };
        std::thread::spawn(move || serve(descriptors, is_successor, settings));
        let kernel = UnixDatagram::from(kernel);
        kernel.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        kernel
    }

    /// The number of the request, and the error, of the next answer.
    fn answer(kernel: &UnixDatagram) -> (u64, i32) {
        let mut message = [0; 4096];
        assert!(kernel.recv(&mut message).unwrap() >= 16);
        let error = i32::from_ne_bytes(message[4..8].try_into().unwrap());
        (u64::from_ne_bytes(message[8..16].try_into().unwrap()), error)
    }

    #[test]
    fn before_linux_6_9_the_requests_of_a_killed_process_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        // It never answers.
        let _silent = UnixListener::bind(&socket).unwrap();
        let server: ServerAddress = format!("unix:{}", socket.display()).parse().unwrap();
        let unanswered = tempfile::tempfile().unwrap();
        let kernel = serve_socket(&unanswered, &server, false);
        let init = [7_u32, 31, 4096, 0].map(u32::to_ne_bytes).concat();
        kernel.send(&message(26, 1, &init)).unwrap();
        assert_eq!(answer(&kernel), (1, 0));
        kernel.send(&message(1, 2, b"app\0")).unwrap();
        // Answered at once, by any of the threads, after the look-up was read.
        for unique in 3..20 {
            kernel.send(&message(17, unique, &[])).unwrap();
            assert_eq!(answer(&kernel), (unique, 0));
        }
        let successor = serve_socket(&unanswered, &server, true);
        assert_eq!(answer(&successor), (2, -5), "EIO");
        successor.send(&message(17, 30, &[])).unwrap();
        assert_eq!(answer(&successor), (30, 0));
    }
}
