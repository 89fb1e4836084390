//! What postcopy's client and server must agree on.
//!
//! A file becomes an image and comes back in this order, one module a step:
//!
//! - [`path`] and [`reference`]: how files and images are called;
//! - [`page`]: pages, chunks and their sizes;
//! - [`frame`]: one chunk's non-zero pages, compressed;
//! - [`pack`]: many frames in one immutable object, with an index;
//! - [`manifest`]: which chunks an image's files are made of, and so the image's identity;
//! - [`proof`]: why a single page belongs to a chunk;
//! - [`set_frame`]: pages of a working set, compressed together, with their proofs;
//! - [`v1`]: the messages that all of this travels in, generated from `proto/postcopy/v1/*.proto`.
//!
//! Bytes from outside become one of these types once, on entry, or an error that names what is
//! wrong with them; a value of such a type cannot be wrong.

pub mod buffers;
pub mod digest;
pub mod frame;
pub mod manifest;
pub mod pack;
pub mod page;
pub mod path;
pub mod proof;
pub mod reference;
pub mod set_frame;

/// The messages and services of `postcopy.v1`; `tests/bootstrap.rs` makes this code again.
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

/// The most chunks that one request on the demand lane may ask for.
pub const MAX_DEMAND_CHUNKS: u64 = 1024;

/// The most chunks that one request on the bulk lane may ask for.
pub const MAX_BULK_CHUNKS: u64 = 16_384;

/// The most digests in one `FindMissing` request, and in one `Missing` answer.
pub const MAX_FIND_MISSING: usize = 65_536;
