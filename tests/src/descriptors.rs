//! Descriptors that go from process to process, each with a few words.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The most bytes that go with a descriptor.
const MAX_BYTES: usize = 4096;

/// Sends a descriptor with some text.
///
/// # Panics
/// If it cannot be sent.
pub fn send(socket: &UnixStream, descriptor: BorrowedFd<'_>, text: &str) {
    assert!(text.len() <= MAX_BYTES, "{} bytes of text", text.len());
    let fds = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "room for a descriptor");
    let sent =
        rustix::net::sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty());
    sent.expect("it is received");
}

/// Receives what [`send`] has sent.
///
/// # Panics
/// If nothing comes, or no descriptor with it.
#[must_use]
pub fn receive(socket: &UnixStream) -> (OwnedFd, String) {
    let (mut bytes, mut space) = ([0; MAX_BYTES], [MaybeUninit::uninit(); 64]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = received.expect("it is sent").bytes;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let descriptor = fds.next().and_then(|mut fds| fds.next()).expect("a descriptor");
    (descriptor, String::from_utf8(bytes[..received].to_vec()).expect("text"))
}
