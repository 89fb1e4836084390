//! The images of a server as files, by FUSE: pages that every program of a host shares.
//!
//! The kernel's page cache is the cache of the host. It keeps a page of an image's file once for
//! all who read or map it, and asks this file system for absent pages only. Each byte is verified
//! to the image's digest before the kernel gets it. An error is EIO, and never zeros.
//!
//! ```text
//! DIR/by-digest/blake3-…/   the files of an image, which never change
//! DIR/by-digest/blake3:…    a link to these; colons separate paths in PATH and its like
//! DIR/<name>/<tag>          a link to an image, looked up when it is used
//! ```
//!
//! A request's way: [`mount`] has the descriptor of /dev/fuse, [`serve`] reads a request from it
//! and finds the meaning of its node ([`nodes`]); [`names`] answers for references, [`tree`] for
//! the directories of an image, [`images`] for bytes. A mount outlives the process that serves it:
//! another one with the descriptor and the table of nodes goes on, and has the kernel send the
//! requests again that were not answered.
//!
//! Pages that no program has asked for yet come by [`ahead`] and [`sets`], through [`store`], from
//! a process of their own ([`storer`]). [`control`] answers other programs of the user.

mod ahead;
mod complaints;
mod control;
mod images;
pub mod mount;
mod names;
mod nodes;
mod protocol;
mod serve;
mod sets;
mod store;
mod storer;
mod tree;
mod unanswered;

pub use serve::{Descriptors, Settings, serve};
pub use storer::store;

/// The name of the directory of images by digest.
const BY_DIGEST: &str = "by-digest";

/// Returns the name of an image's directory.
fn directory_of(image: &postcopy::proto::digest::Digest) -> String {
    image.to_string().replace(':', "-")
}
