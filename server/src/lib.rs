//! postcopyd as a library: keeps page images and serves their pages over gRPC.
//!
//! [`serve::serve`] answers requests ([`service`]) from a [`store`], within [`limits`], until a
//! signal ends it ([`shutdown`]). The servers of a bucket share its packs ([`peers`]).

#[cfg(test)]
mod fixtures;
pub mod limits;
pub mod listen;
pub mod peers;
pub mod serve;
pub mod service;
pub mod shutdown;
pub mod store;
mod transport;
