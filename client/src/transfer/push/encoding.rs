//! Compresses the chunks that the server lacks, on all cores.

use super::reading::{Batch, NewChunk};
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::FrameEncoder;
use postcopy_proto::page::PageRun;
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Idle compressors. Making one costs as much as compressing several chunks.
pub(super) struct Encoders {
    level: i32,
    /// Locked only to take or to return an encoder.
    idle: Mutex<Vec<FrameEncoder>>,
}

/// An encoder that returns to the idle ones when it is dropped.
pub(super) struct Borrowed<'a>(&'a Encoders, Option<FrameEncoder>);

impl Encoders {
    pub(super) fn new(level: i32) -> Self {
        Self { level, idle: Mutex::default() }
    }

    pub(super) fn borrow(&self) -> Borrowed<'_> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Borrowed(self, Some(idle.unwrap_or_else(|| FrameEncoder::new(self.level))))
    }
}

impl Borrowed<'_> {
    pub(super) fn encode(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        if let Some(encoder) = &mut self.1 {
            encoder.encode(plain, &mut frame);
        }
        frame
    }

    pub(super) fn encode_patch(&mut self, chunk_bytes: usize, runs: &[PageRun], pages: &[u8]) -> Vec<u8> {
        let mut patch = Vec::new();
        if let Some(encoder) = &mut self.1 {
            encoder.encode_patch(chunk_bytes, runs, pages, &mut patch);
        }
        patch
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).extend(self.1.take());
    }
}

/// A batch, and the frames of its missing chunks: digest, plain length, frame.
pub(super) struct Encoded {
    pub(super) frames: Vec<(Digest, u64, Vec<u8>)>,
    pub(super) batch: Batch,
}

pub(super) fn encode(batch: Batch, chunks: Vec<NewChunk>, encoders: &Encoders) -> Encoded {
    let frame = |encoder: &mut Borrowed<'_>, (digest, range): NewChunk| {
        let plain_bytes = range.len() as u64;
        (digest, plain_bytes, encoder.encode(&batch.bytes[range]))
    };
    let frames = chunks.into_par_iter().map_init(|| encoders.borrow(), frame).collect();
    Encoded { frames, batch }
}
