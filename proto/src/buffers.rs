//! Reusable buffers for packs. Filling fresh memory costs a page fault each 4 KiB, as much as the
//! copy itself.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// A pool of idle buffers; clones share it.
#[derive(Clone, Debug)]
pub struct Buffers {
    max_idle: usize,
    max_bytes: usize,
    /// Locked only to take or to return a buffer.
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    /// Makes a pool of at most `max_idle` buffers, none longer than `max_bytes`.
    #[must_use]
    pub fn new(max_idle: usize, max_bytes: usize) -> Self {
        Self { max_idle, max_bytes, idle: Arc::default() }
    }

    /// Returns an empty buffer with room for `bytes`.
    #[must_use]
    pub fn take(&self, bytes: usize) -> Vec<u8> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // A large buffer is not used for few bytes, so that a bound on the requested bytes also
        // bounds memory.
        let fitting = idle.iter().position(|buffer| buffer.capacity() / 2 <= bytes);
        let mut buffer = fitting.map(|i| idle.swap_remove(i)).unwrap_or_default();
        drop(idle);
        buffer.reserve_exact(bytes);
        buffer
    }

    /// Returns the buffer's bytes. The buffer returns to the pool when their last slice is dropped.
    #[must_use]
    pub fn lend(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }
}

struct Lent {
    buffer: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.buffer.capacity() > self.home.max_bytes {
            return;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let mut idle = self.home.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.home.max_idle {
            idle.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_slice_of_it() {
        let buffers = Buffers::new(1, 100);
        let mut buffer = buffers.take(100);
        let address = buffer.as_ptr();
        buffer.extend_from_slice(b"content");
        let bytes = buffers.lend(buffer);
        let slice = bytes.slice(3..5);
        drop(bytes);
        let other = buffers.take(100);
        assert_ne!(other.as_ptr(), address, "a slice is still there");
        assert_eq!(&slice[..], b"te");
        drop(slice);
        let small = buffers.take(10);
        assert_ne!(small.as_ptr(), address, "ten times what is needed");
        let buffer = buffers.take(60);
        assert_eq!((buffer.as_ptr(), buffer.len()), (address, 0));
    }

    #[test]
    fn long_ones_and_too_many_are_not_kept() {
        let buffers = Buffers::new(2, 100);
        let lent: Vec<_> = (0..5).map(|_| buffers.lend(buffers.take(80))).collect();
        drop((lent, buffers.lend(buffers.take(200))));
        let idle = buffers.idle.lock().unwrap();
        assert_eq!(idle.iter().map(Vec::capacity).collect::<Vec<_>>(), [80, 80]);
    }
}
