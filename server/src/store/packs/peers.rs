//! The other servers of a bucket, which a server asks for blocks of packs before the bucket.

use super::disk::Block;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use postcopy_proto::digest::Digest;
use std::fmt;

/// A block of a pack, and the length of the pack in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackBlock {
    /// The bytes; empty beyond the pack's end.
    pub bytes: Bytes,
    /// Length of the pack in bytes.
    pub pack_bytes: u64,
}

/// The reading of a block by another server; `None` if it does not answer with the block.
pub type PeerReading = BoxFuture<'static, Option<PackBlock>>;

/// The other servers of a bucket.
pub trait Peers: fmt::Debug + Send + Sync {
    /// Returns the reading of a block by the server that reads this pack from the bucket; `None` if
    /// that is this server. Does not block. The reading must be awaited in a tokio runtime, and ends
    /// within a few seconds.
    fn read(&self, pack: &Digest, block: u64) -> Option<PeerReading>;

    /// Asks the server of this pack for nothing during some time, because it has sent a damaged
    /// frame. Does nothing if that is this server.
    fn distrust(&self, pack: &Digest);
}

impl From<Block> for PackBlock {
    fn from(Block { bytes, pack_bytes }: Block) -> Self {
        Self { bytes, pack_bytes }
    }
}

impl From<PackBlock> for Block {
    fn from(PackBlock { bytes, pack_bytes }: PackBlock) -> Self {
        Self { bytes, pack_bytes }
    }
}
