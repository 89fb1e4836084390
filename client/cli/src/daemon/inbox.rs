//! What a peer has sent over a unix socket and nobody has taken yet.
//!
//! A handshake is only looked at (MSG_PEEK), and taken out of the socket when a session has what it said in its state
//! file. Whoever dies before has lost nothing: the successor finds it where it was, its descriptors with it. So the
//! kernel's own queue is the buffer that outlives a worker.

use super::kernel;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg};
use rustix::process::Pid;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The most descriptors that the kernel lets one message have (SCM_MAX_FD).
const MAX_FDS: usize = 253;
/// The most bytes that a peer may have sent unread.
pub(crate) const MAX_LOOK: usize = 64 << 10;
/// Bytes that are looked at in one go.
const PIECE_BYTES: usize = 4096;

/// What has come.
#[derive(Debug, Default)]
pub(crate) struct Peeked {
    pub(crate) bytes: Vec<u8>,
    /// Duplicates of those that came with the bytes.
    pub(crate) fds: Vec<OwnedFd>,
    /// Who has sent the last of it, where the socket was told to say so (SO_PASSCRED).
    pub(crate) sender: Option<Pid>,
    /// Nothing more will come.
    pub(crate) ended: bool,
}

/// Looks at what has come, from the beginning and up to `most` bytes or a little more.
///
/// # Errors
/// Whatever recvmsg(2) answers; EMFILE where a descriptor could not be received.
pub(crate) fn peek(socket: &UnixStream, most: usize) -> io::Result<Peeked> {
    kernel::peek_from_the_beginning(socket)?;
    let mut peeked = Peeked::default();
    let mut piece = [0; PIECE_BYTES];
    while peeked.bytes.len() < most {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(socket, &mut [IoSliceMut::new(&mut piece)], &mut control, flags) {
            // There is room for all that a message may have: so it is the table of descriptors that is full.
            Ok(received) if received.flags.contains(ReturnFlags::CTRUNC) => return Err(Errno::MFILE.into()),
            Ok(received) => received.bytes,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => continue,
            // What it has sent before it was killed with something unread is gone.
            Err(Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(fds) => peeked.fds.extend(fds),
                RecvAncillaryMessage::ScmCredentials(sender) => peeked.sender = Some(sender.pid),
                _ => {}
            }
        }
        if received == 0 {
            peeked.ended = true;
            break;
        }
        peeked.bytes.extend(&piece[..received]);
    }
    Ok(peeked)
}

/// Takes up to `count` bytes out, and closes what came with them, as far as it was not looked at. How many.
///
/// # Errors
/// Whatever recv(2) answers.
pub(crate) fn take(socket: &UnixStream, count: usize) -> io::Result<usize> {
    let mut taken = 0;
    let mut piece = [0; PIECE_BYTES];
    while taken < count {
        let most = (count - taken).min(PIECE_BYTES);
        match recv(socket, &mut piece[..most], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::AGAIN | Errno::CONNRESET) => break,
            Ok((bytes, _)) => taken += bytes,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(taken)
}
