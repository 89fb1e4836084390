//! Whole images: [`push`] makes one of files and sends it, [`pull`] writes one to files. [`fetch`] brings the chunks
//! that a pull asks for.

mod fetch;
pub mod pull;
pub mod push;
