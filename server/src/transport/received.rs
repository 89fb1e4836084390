//! Counts the bytes of unfinished messages from clients.
//!
//! gRPC collects a message of up to 4 MiB before a service sees it. A client could leave thousands
//! of messages unfinished, each on a stream of its own. [`Received`] wraps the body of a request: it
//! follows gRPC's length prefixes, counts the bytes of the message that is not complete yet, and
//! ends the request if there is no room for them or the message takes too long.

use crate::transport::admission::exhausted;
use crate::transport::budget::Held;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Sleep;
use tonic::Status;

/// Time in which a message must be complete, once its first byte has arrived: 1 MiB at 6 KiB/s. It
/// runs also while the server does not read.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(180);

/// Length in bytes of the prefix before each message: a flag and the message's length.
const PREFIX_BYTES: usize = 5;

/// The place within a stream of messages.
#[derive(Debug, Default)]
struct Framing {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of the prefix that have arrived.
    prefix_bytes: usize,
    /// Bytes of the message that have not arrived, once its prefix has.
    missing_bytes: usize,
    /// Bytes of the unfinished message that have arrived, with its prefix.
    unfinished_bytes: usize,
}

impl Framing {
    /// Follows these bytes. Returns true if a message was completed.
    fn advance(&mut self, mut bytes: &[u8]) -> bool {
        let mut is_completed = false;
        while !bytes.is_empty() {
            let wanted = match self.prefix_bytes {
                PREFIX_BYTES => self.missing_bytes,
                known => PREFIX_BYTES - known,
            };
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            self.unfinished_bytes += now.len();
            if self.prefix_bytes == PREFIX_BYTES {
                self.missing_bytes -= now.len();
            } else {
                self.prefix[self.prefix_bytes..][..now.len()].copy_from_slice(now);
                self.prefix_bytes += now.len();
                let [_, length @ ..] = self.prefix;
                self.missing_bytes = u32::from_be_bytes(length) as usize;
            }
            if self.prefix_bytes == PREFIX_BYTES && self.missing_bytes == 0 {
                *self = Self::default();
                is_completed = true;
            }
        }
        is_completed
    }
}

/// The body of a request.
#[derive(Debug)]
pub(crate) struct Received {
    body: Incoming,
    framing: Framing,
    held: Arc<Held>,
    /// Runs while a message is unfinished.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Received {
    pub(crate) fn new(body: Incoming, held: Arc<Held>) -> Self {
        Self { body, framing: Framing::default(), held, deadline: None }
    }

    /// Counts the bytes of a piece.
    fn arrived(&mut self, bytes: &[u8]) -> Result<(), Status> {
        let before = self.framing.unfinished_bytes;
        let is_completed = self.framing.advance(bytes);
        let after = self.framing.unfinished_bytes;
        if after == 0 {
            self.deadline = None;
        } else if is_completed || before == 0 {
            self.deadline = Some(Box::pin(tokio::time::sleep(MESSAGE_TIMEOUT)));
        }
        let has_room = self.held.has_room();
        if after >= before {
            self.held.take(after - before);
        } else {
            self.held.give_back(before - after);
        }
        match has_room || after <= before {
            true => Ok(()),
            false => Err(exhausted("the server holds as many bytes of unfinished messages as it may")),
        }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.held.give_back(self.framing.unfinished_bytes);
    }
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let is_late = |deadline: &mut Pin<Box<Sleep>>| deadline.as_mut().poll(cx).is_ready();
                return match self.deadline.as_mut().is_some_and(is_late) {
                    true => Poll::Ready(Some(Err(too_late()))),
                    false => Poll::Pending,
                };
            }
        };
        let Some(frame) = frame else { return Poll::Ready(None) };
        let frame = frame.map_err(|error| Status::from_error(error.into()));
        let checked = frame.and_then(|frame| match frame.data_ref() {
            Some(bytes) => self.arrived(&bytes.clone()).map(|()| frame),
            None => Ok(frame),
        });
        Poll::Ready(Some(checked))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn too_late() -> Status {
    Status::deadline_exceeded(format!("a message was not complete after {MESSAGE_TIMEOUT:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(length: usize) -> Vec<u8> {
        let prefix = u32::try_from(length).unwrap().to_be_bytes();
        [&[0][..], &prefix, &vec![7; length]].concat()
    }

    proptest! {
        #[test]
        fn unfinished_bytes_are_those_behind_the_last_complete_message(
            lengths in prop::collection::vec(0..40usize, 0..6),
            cuts in prop::collection::vec(1..30usize, 1..20),
        ) {
            let stream: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            let ends: Vec<_> = lengths.iter().scan(0, |end, length| { *end += 5 + length; Some(*end) }).collect();
            let (mut framing, mut at) = (Framing::default(), 0);
            for cut in cuts.into_iter().cycle() {
                let end = (at + cut).min(stream.len());
                framing.advance(&stream[at..end]);
                at = end;
                let complete = ends.iter().filter(|end| **end <= at).max().copied().unwrap_or(0);
                prop_assert_eq!(framing.unfinished_bytes, at - complete);
                if at == stream.len() {
                    break;
                }
            }
        }
    }
}
