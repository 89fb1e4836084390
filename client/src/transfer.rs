//! Transfer of whole images: [`push`] makes an image of files and sends it, [`pull`] writes an
//! image to files. [`fetch`] fetches the chunks for a pull. [`beneath`] opens the files of both,
//! and [`criu`] tells CRIU's images from other files.

pub mod beneath;
pub mod criu;
mod fetch;
pub mod pull;
pub mod push;
