//! Transfer of whole images: [`push`] makes an image of files and sends it, [`pull`] writes an
//! image to files. [`fetch`] fetches the chunks for a pull.

mod fetch;
pub mod pull;
pub mod push;
