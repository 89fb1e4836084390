//! The numbers of nodes, and the table that gives them their meaning.
//!
//! A number holds the image's place in the table, and a node of the image's tree
//! ([`crate::tree`]). Directories of names and links of tags have places of their own. The table is
//! a file that only grows, so that a successor of a killed process knows every number that the
//! kernel has.

use crate::protocol::ROOT_ID;
use crate::tree::Node;
use postcopy::proto::digest::Digest;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// The directory of images by digest.
const BY_DIGEST: u64 = 2;
/// The first number of a name.
const FIRST_NAME: u64 = 16;
/// Most images and names of a table.
const MAX_IMAGES: usize = (1 << 16) - 2;
const MAX_NAMES: usize = 1 << 24;
/// The rest of the number of an image's other name: a depth that no path has.
const ALIAS: u64 = 0xffff << 32;

/// The meaning of a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Root,
    ByDigest,
    /// A directory of names: the components of references before their tags.
    Names(String),
    /// The link of a reference, `name:tag`.
    Tag(String),
    /// A node of an image.
    Image(Digest, Node),
    /// The link `blake3:…` to the image `blake3-…`.
    Alias(Digest),
}

/// The table of images and names.
#[derive(Debug)]
pub(crate) struct Table {
    log: File,
    images: Vec<Digest>,
    of_images: HashMap<Digest, usize>,
    names: Vec<String>,
    of_names: HashMap<String, usize>,
}

impl Table {
    /// Reads the table that another process has left in `log`. An incomplete last line was not used
    /// yet, because a number is given out after its line is written.
    ///
    /// # Errors
    /// The file cannot be read, or has another content.
    pub(crate) fn read(mut log: File) -> io::Result<Self> {
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        log.set_len(complete as u64)?;
        log.seek(SeekFrom::Start(complete as u64))?;
        let mut table = Self {
            log,
            images: Vec::new(),
            of_images: HashMap::new(),
            names: Vec::new(),
            of_names: HashMap::new(),
        };
        for line in text[..complete].lines() {
            let wrong =
                || io::Error::new(io::ErrorKind::InvalidData, format!("{line:?} in the table of nodes"));
            match line.split_once(' ').ok_or_else(wrong)? {
                ("image", hex) => table.add_image(Digest::from_hex(hex).map_err(|_| wrong())?),
                ("name", name) => table.add_name(name.to_owned()),
                _ => return Err(wrong()),
            }
        }
        Ok(table)
    }

    fn add_image(&mut self, image: Digest) {
        self.of_images.insert(image, self.images.len());
        self.images.push(image);
    }

    fn add_name(&mut self, name: String) {
        self.of_names.insert(name.clone(), self.names.len());
        self.names.push(name);
    }

    /// Returns the number of a place, and gives it one if it has none.
    ///
    /// # Errors
    /// The table is full, or cannot be written.
    pub(crate) fn number(&mut self, place: &Place) -> io::Result<u64> {
        match place {
            Place::Root => Ok(ROOT_ID),
            Place::ByDigest => Ok(BY_DIGEST),
            Place::Names(name) | Place::Tag(name) => {
                if !self.of_names.contains_key(name) {
                    self.append(self.names.len() < MAX_NAMES, format!("name {name}\n"))?;
                    self.add_name(name.clone());
                }
                Ok(FIRST_NAME + self.of_names[name] as u64)
            }
            Place::Alias(image) => Ok(self.image_number(image)? | ALIAS),
            Place::Image(image, node) => {
                let image = self.image_number(image)?;
                let (depth, index) = match node {
                    Node::Entry(index) => (0, *index),
                    Node::Directory { first, depth } => (u64::from(*depth) + 1, *first),
                };
                Ok(image | depth << 32 | u64::from(index))
            }
        }
    }

    /// Returns the part of a number that stands for the image.
    fn image_number(&mut self, image: &Digest) -> io::Result<u64> {
        if !self.of_images.contains_key(image) {
            self.append(self.images.len() < MAX_IMAGES, format!("image {}\n", image.hex()))?;
            self.add_image(*image);
        }
        Ok((self.of_images[image] as u64 + 1) << 48)
    }

    fn append(&mut self, has_room: bool, line: String) -> io::Result<()> {
        if !has_room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.log.write_all(line.as_bytes())
    }

    /// Returns the meaning of a number; `None` if it was not given out.
    pub(crate) fn place(&self, number: u64) -> Option<Place> {
        let Some(image) = usize::try_from(number >> 48).ok()?.checked_sub(1) else {
            return match number {
                ROOT_ID => Some(Place::Root),
                BY_DIGEST => Some(Place::ByDigest),
                other => {
                    let name = self.names.get(usize::try_from(other.checked_sub(FIRST_NAME)?).ok()?)?.clone();
                    Some(if name.contains(':') { Place::Tag(name) } else { Place::Names(name) })
                }
            };
        };
        let image = *self.images.get(image)?;
        if number & ALIAS == ALIAS {
            return Some(Place::Alias(image));
        }
        let index = u32::try_from(number & 0xffff_ffff).ok()?;
        let depth = u16::try_from(number >> 32 & 0xffff).ok()?;
        let node = match depth.checked_sub(1) {
            None => Node::Entry(index),
            Some(depth) => Node::Directory { first: index, depth },
        };
        Some(Place::Image(image, node))
    }
}

/// Returns the number of an entry of the image that a node belongs to.
pub(crate) fn of_entry(node: u64, index: u32) -> u64 {
    node >> 48 << 48 | u64::from(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_mean_the_same_to_a_successor() {
        let mut file = tempfile::tempfile().unwrap();
        let mut table = Table::read(file.try_clone().unwrap()).unwrap();
        let digest = Digest::of(b"image");
        let places = [
            Place::Root,
            Place::ByDigest,
            Place::Names("a/b".into()),
            Place::Tag("a/b:v1".into()),
            Place::Image(digest, Node::Entry(7)),
            Place::Alias(digest),
            Place::Image(digest, Node::Directory { first: 0, depth: 0 }),
            Place::Image(Digest::of(b"other"), Node::Directory { first: u32::MAX, depth: 2048 }),
        ];
        let numbers: Vec<u64> = places.iter().map(|place| table.number(place).unwrap()).collect();
        file.write_all(b"image 12").unwrap();
        file.rewind().unwrap();
        let mut successor = Table::read(file).unwrap();
        for (place, number) in places.iter().zip(&numbers) {
            assert_eq!(successor.place(*number).as_ref(), Some(place));
            assert_eq!(successor.number(place).unwrap(), *number);
        }
        assert_eq!(of_entry(numbers[6], 7), numbers[4]);
        for none in [0, 3, FIRST_NAME + 2, 3 << 48, u64::MAX] {
            assert_eq!(successor.place(none), None);
        }
    }
}
