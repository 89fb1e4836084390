//! Messages that a peer has sent over a unix socket and that no worker has taken yet.
//!
//! A worker first only looks at a handshake (MSG_PEEK). It takes the handshake out of the socket
//! once a session has its content in a state file. If the worker dies before that, its successor
//! finds the handshake in the socket, with its descriptors. So the kernel's own queue is the buffer
//! that outlives a worker.

use super::kernel;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg};
use rustix::process::Pid;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The most descriptors that a peer may have sent unread. A handshake has one, and a second one may
/// follow it: a look must not fill this process's table of descriptors. The kernel does not
/// duplicate those beyond the room for them.
const MAX_FDS: usize = 8;
/// The most bytes that a peer may have sent unread.
pub(crate) const MAX_LOOK: usize = 64 << 10;
/// The number of bytes that one call receives.
const PIECE_BYTES: usize = 4096;

/// Received bytes and descriptors, which are still in the socket.
#[derive(Debug, Default)]
pub(crate) struct Peeked {
    pub(crate) bytes: Vec<u8>,
    /// Duplicates of the descriptors that were sent with the bytes.
    pub(crate) fds: Vec<OwnedFd>,
    /// The pid of the sender of the last part, if the socket reports it (SO_PASSCRED).
    pub(crate) sender: Option<Pid>,
    /// The peer sends nothing more.
    pub(crate) ended: bool,
}

/// Looks at the received messages, from the first byte up to `most` bytes or a little more.
///
/// # Errors
/// Any error of recvmsg(2); EMFILE if a descriptor could not be received.
pub(crate) fn peek(socket: &UnixStream, most: usize) -> io::Result<Peeked> {
    kernel::peek_from_the_beginning(socket)?;
    let mut peeked = Peeked::default();
    let mut piece = [0; PIECE_BYTES];
    while peeked.bytes.len() < most {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let (mut is_cut, mut count) = (false, 0);
        let received = match recvmsg(socket, &mut [IoSliceMut::new(&mut piece)], &mut control, flags) {
            Ok(received) => {
                is_cut = received.flags.contains(ReturnFlags::CTRUNC);
                received.bytes
            }
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => continue,
            // The peer was killed with something unread, and the kernel has dropped its messages.
            Err(Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(fds) => {
                    count = fds.len();
                    peeked.fds.extend(fds);
                }
                RecvAncillaryMessage::ScmCredentials(sender) => peeked.sender = Some(sender.pid),
                _ => {}
            }
        }
        if peeked.fds.len() > MAX_FDS || is_cut && count >= MAX_FDS {
            let text = format!("it has sent more than {MAX_FDS} descriptors");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if is_cut {
            // There was room for more descriptors, so the table of descriptors is full.
            return Err(Errno::MFILE.into());
        }
        if received == 0 {
            peeked.ended = true;
            break;
        }
        peeked.bytes.extend(&piece[..received]);
    }
    Ok(peeked)
}

/// Takes up to `count` bytes out of the socket, and closes the descriptors that were sent with
/// them. Duplicates from an earlier look stay open. Returns the number of bytes.
///
/// # Errors
/// Any error of recv(2).
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
