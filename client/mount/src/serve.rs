//! Answers the kernel's requests.
//!
//! Some threads read requests; each request becomes a task, so that one that waits for the server
//! delays no other. No thread that reads requests waits for anything else.

mod answers;
mod listing;

use crate::ahead::{Ahead, Opened};
use crate::complaints;
use crate::control::Control;
use crate::images::{Images, Read};
use crate::names::Names;
use crate::nodes::{Place, Table};
use crate::protocol::{self, Answer, Operation, Owner, Request};
use crate::sets::{Failed, Sets};
use crate::store::Store;
use crate::tree::ROOT;
use crate::unanswered::{Noted, Unanswered};
use bytes::Bytes;
use futures_util::FutureExt;
use listing::Lists;
use postcopy::ServerAddress;
use postcopy::proto::digest::Digest;
use postcopy::proto::reference::Reference;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::OsString;
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
        handle: fastrand::u64(1..),
        patience: deadline + MORE,
    });
    if !is_successor {
        runtime.spawn(greet(Arc::clone(&server), address.clone(), directory.clone()));
    }
    match left {
        // An older kernel does not send them again.
        Some(left) => {
            left.into_iter().for_each(|unique| server.reply(unique, &Err(Errno::IO)));
            server.unanswered.forget_left()?;
        }
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
    /// The handle of all files that this process has opened.
    handle: u64,
    /// Time for an answer: a little longer than a read takes that has its own error.
    patience: Duration,
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
                Operation::Release { handle } => {
                    // A killed process has given out other handles.
                    let place = self.table().place(node).filter(|_| handle == self.handle);
                    if let Some(Place::Image(image, _)) = place {
                        self.images.closed(&image);
                    }
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
            Ok(Reply::Opened(image)) => {
                self.sets.opened(image, node);
                self.images.keep(&image).await;
            }
            _ => {}
        }
    }

    fn reply(&self, unique: u64, reply: &Result<Reply, Errno>) {
        let opened = Answer::open(self.handle, protocol::FOPEN_KEEP_CACHE);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

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
