//! The process that puts pages into the kernel's page cache unasked (FUSE_NOTIFY_STORE).
//!
//! The kernel locks a page from the moment at which it asks for it until it has the answer, and a
//! store into that page waits for the lock, in a sleep that no signal ends. So a process that both
//! answered and stored could not be killed and replaced while it waits. This process answers
//! nothing, and a store that waits holds up other stores alone.
//!
//! It gets messages through a pipe from the process that answers. When that one is killed, its
//! successor starts another storer, and this one ends at the end of the pipe. If guardian and
//! worker are both gone, a waiting store would keep the file system from its end. Then the storer
//! unmounts it by force, which ends all waiting.

use crate::complaints;
use crate::mount::Target;
use crate::protocol;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io::{self, IoSlice, PipeReader, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Threads that store.
const THREADS: usize = 2;
/// Time that stores may take to end when guardian and worker are gone.
const GRACE: Duration = Duration::from_secs(1);
/// Most bytes of a message's content.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Bytes of a message's header.
pub(crate) const HEADER_BYTES: usize = 24;

/// A message to the storer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Look a file up, so that the kernel knows its node. The content is the file's path below the
    /// file system's root.
    Look,
    /// Store the content in a node at an offset, both whole pages but at the end of the file.
    Store { node: u64, offset: u64 },
}

impl Message {
    /// Returns the header of a message with `bytes` bytes of content.
    pub(crate) fn header(self, bytes: usize) -> [u8; HEADER_BYTES] {
        let (node, offset) = match self {
            Self::Look => (0, 0),
            Self::Store { node, offset } => (node, offset),
        };
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&node.to_ne_bytes());
        header[8..16].copy_from_slice(&offset.to_ne_bytes());
        header[16..].copy_from_slice(&(bytes as u64).to_ne_bytes());
        header
    }

    fn parse(header: &[u8; HEADER_BYTES]) -> (Self, usize) {
        let field = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        let bytes = usize::try_from(field(16)).expect("this program's own message");
        match field(0) {
            0 => (Self::Look, bytes),
            node => (Self::Store { node, offset: field(8) }, bytes),
        }
    }
}

/// Stores what the pipe brings into the file system at `target`, whose descriptor is `device`,
/// until the pipe ends. `life` ends when no process is left that could answer the kernel.
///
/// # Errors
/// A thread cannot be started, or the pipe cannot be read.
///
/// # Blocking
/// Until the pipe has ended, and each store too.
pub fn store(
    device: &OwnedFd,
    messages: PipeReader,
    life: BorrowedFd<'_>,
    target: &Target,
) -> io::Result<()> {
    let messages = Mutex::new(messages);
    let (ended, has_ended) = io::pipe()?;
    std::thread::scope(|scope| {
        // First, so that no thread stores without it.
        let watch = || unmount_at_the_end(life, &ended, target);
        std::thread::Builder::new().spawn_scoped(scope, watch)?;
        let storing: Vec<_> = (0..THREADS)
            .map(|_| std::thread::Builder::new().spawn_scoped(scope, || store_all(device, &messages, target)))
            .collect();
        // One thread is enough.
        if storing.iter().all(Result::is_err) {
            drop(has_ended);
            return Err(io::Error::other("no thread that stores"));
        }
        let stored = storing.into_iter().flatten().map(|thread| thread.join().expect("it does not panic"));
        let stored = stored.fold(Ok(()), io::Result::and);
        drop(has_ended);
        stored
    })
}

/// Unmounts the file system by force if guardian and worker are gone, and stores still wait a
/// moment later.
/// Returns when the stores have ended.
fn unmount_at_the_end(life: BorrowedFd<'_>, ended: &PipeReader, target: &Target) {
    let mut both = [PollFd::new(&life, PollFlags::empty()), PollFd::new(ended, PollFlags::empty())];
    while let Err(Errno::INTR) = poll(&mut both, None) {}
    let grace = rustix::event::Timespec::try_from(GRACE).expect("a short time");
    if matches!(poll(&mut both[1..], Some(&grace)), Ok(0))
        && let Err(error) = target.abort()
    {
        tracing::error!("{} cannot be ended: {error}", target.path().display());
    }
}

fn store_all(device: &OwnedFd, messages: &Mutex<PipeReader>, target: &Target) -> io::Result<()> {
    let mut content = Vec::new();
    while let Some((node, offset)) = next(messages, &mut content, target)? {
        let header = protocol::store_header(node, offset, content.len());
        let pieces = [IoSlice::new(&header), IoSlice::new(&content)];
        match rustix::io::writev(device, &pieces) {
            // The kernel has forgotten the node, or the file system is unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::INTR) => {}
            Err(error) => complaints::warn(format_args!("storing pages ahead: {error}")),
        }
    }
    Ok(())
}

/// Reads up to the next pages to store, into `content`, and returns their node and offset; `None`
/// at the end of the pipe. A killed writer may leave a part of a message. Looks files up before it
/// lets another thread read, so that the kernel knows their nodes before pages of them come.
fn next(
    messages: &Mutex<PipeReader>,
    content: &mut Vec<u8>,
    target: &Target,
) -> io::Result<Option<(u64, u64)>> {
    let mut messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
    let mut header = [0; HEADER_BYTES];
    loop {
        let read = messages.read_exact(&mut header).and_then(|()| {
            let (message, bytes) = Message::parse(&header);
            content.resize(bytes, 0);
            messages.read_exact(content).map(|()| message)
        });
        match read {
            // The walk is the purpose; the file may have been removed from the mount's images.
            Ok(Message::Look) => drop(target.path().join(OsStr::from_bytes(content)).symlink_metadata()),
            Ok(Message::Store { node, offset }) => return Ok(Some((node, offset))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}
