//! The formats and messages that postcopy's client and server must agree on.
//!
//! A file becomes an image, and is restored from it, in this order; each step has one module:
//!
//! - [`path`] and [`reference`]: the names of files and images;
//! - [`provenance`]: where a reference comes from, and the labels of its push;
//! - [`page`]: pages, chunks and their sizes;
//! - [`frame`]: the non-zero pages of one chunk, compressed;
//! - [`pack`]: many frames in one immutable object, with an index;
//! - [`manifest`]: the chunks of an image's files, and so the image's identity;
//! - [`proof`]: the evidence that a single page belongs to a chunk;
//! - [`set_frame`]: pages of a working set, compressed together, with their proofs;
//! - [`v1`]: the messages that carry all of this, generated from `proto/postcopy/v1/*.proto`.
//!
//! Parsers turn outside bytes into one of these types once, on receipt, or return an error that
//! names the defect. Code that holds such a value need not check it again.

pub mod buffers;
pub mod digest;
pub mod frame;
pub mod manifest;
pub mod pack;
pub mod page;
pub mod path;
pub mod proof;
pub mod provenance;
pub mod reference;
pub mod set_frame;

/// The messages and services of `postcopy.v1`. `tests/bootstrap.rs` generates this code again and
/// compares.
#[path = "generated/postcopy.v1.rs"]
#[rustfmt::skip]
#[allow(
    clippy::all,
    clippy::pedantic,
    missing_docs,
    missing_debug_implementations,
    reason = "generated code; what it says is documented in the .proto files"
)]
pub mod v1;

/// The encoded `FileDescriptorSet` of `postcopy.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/postcopy.v1.bin");

/// The largest gRPC message that either side sends: 4 MiB, gRPC's customary limit.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The largest part that a stream of bytes is cut into: 1 MiB.
pub const MAX_PART_BYTES: usize = 1 << 20;

/// Most chunks of one request on the demand lane.
pub const MAX_DEMAND_CHUNKS: u64 = 1024;

/// Most chunks of one request on the bulk lane.
pub const MAX_BULK_CHUNKS: u64 = 16_384;

/// Most digests of one `FindMissing` request, and of one `Missing` answer.
pub const MAX_FIND_MISSING: usize = 65_536;

/// Most patches of one `PatchChunks` request.
pub const MAX_PATCHES: usize = 4096;

/// Most bytes of the chunks of one `PatchChunks` request: 16 MiB.
pub const MAX_PATCHED_BYTES: usize = 16 << 20;
