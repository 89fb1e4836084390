//! The answers to requests that may have to wait: what a node is, and what it has.

use super::listing::place_of;
use super::{ReadReply, Reply, Server, Waiting};
use crate::ahead::Opened;
use crate::nodes::Place;
use crate::protocol::{Answer, Attributes, Kind};
use crate::tree::{Node, ROOT, Tree};
use crate::{BY_DIGEST, complaints, directory_of};
use bytes::Bytes;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::EntryKind;
use postcopy::{ReadError, Reader, RemoteError};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::sync::Arc;

/// The ways to seek, of lseek(2).
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

impl Server {
    pub(super) async fn answer(&self, node: u64, request: Waiting) -> Result<Reply, Errno> {
        let place = self.table().place(node).ok_or(Errno::STALE)?;
        match request {
            Waiting::Lookup(name) => {
                let child = self.child(&place, &name).await?.ok_or(Errno::NOENT)?;
                let attributes = self.attributes(&child).await?;
                Ok(Reply::Answer(Answer::entry(&attributes, &self.owner)))
            }
            Waiting::GetAttr => {
                let attributes = self.attributes(&place).await?;
                Ok(Reply::Answer(Answer::attributes(&attributes, &self.owner)))
            }
            Waiting::ReadLink => Ok(Reply::Bytes(self.link(&place).await?)),
            Waiting::Open => match place {
                Place::Image(image, _) => {
                    self.images.opened(&image);
                    Ok(Reply::Opened(image))
                }
                _ => Err(Errno::ISDIR),
            },
            Waiting::OpenDir => self.open_directory(&place).await.map(Reply::Answer),
            Waiting::Read(range) => {
                let of = self.file(&place).await?;
                let ahead = self.ahead.note(node, &of, &range);
                let read = self.images.read(&of.reader, &of.file, range.clone()).await;
                let read = read.map_err(|error| failed(&place, &error))?;
                Ok(Reply::Read(ReadReply { read, of, range, ahead }))
            }
            Waiting::Seek { offset, whence } => {
                let to_hole = match whence {
                    SEEK_DATA => false,
                    SEEK_HOLE => true,
                    _ => return Err(Errno::INVAL),
                };
                let Opened { reader, file } = self.file(&place).await?;
                let Place::Image(image, node) = &place else { return Err(Errno::INVAL) };
                let entry = Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::STALE)?;
                let found = self.images.seek(&reader, (entry.path.as_bytes(), &file), offset, to_hole).await;
                let found = found.map_err(|error| no_answer(&format!("image {image}"), &error))?;
                Ok(Reply::Answer(Answer::seek(found.ok_or(Errno::NXIO)?)))
            }
            Waiting::ReadDir { handle, offset, bytes, with_attributes } => {
                let max = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
                self.list(&place, handle, offset, max, with_attributes).await.map(Reply::Answer)
            }
        }
    }

    pub(super) async fn reader(&self, image: &Digest) -> Result<Arc<Reader>, Errno> {
        self.images.reader(image).await.map_err(|error| no_answer(&format!("image {image}"), &error))
    }

    /// Returns the file that a place is.
    pub(super) async fn file(&self, place: &Place) -> Result<Opened, Errno> {
        let Place::Image(image, node) = place else { return Err(Errno::ISDIR) };
        let reader = self.reader(image).await?;
        let entry = Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::ISDIR)?;
        match entry.kind {
            EntryKind::File(file) => Ok(Opened { reader, file }),
            _ => Err(Errno::INVAL),
        }
    }

    pub(super) async fn child(&self, place: &Place, name: &OsStr) -> Result<Option<Place>, Errno> {
        match place {
            Place::Root if name == OsStr::new(BY_DIGEST) => Ok(Some(Place::ByDigest)),
            Place::Root => self.named("", name).await,
            Place::Names(path) => self.named(path, name).await,
            Place::ByDigest => {
                let Some(name) = name.to_str() else { return Ok(None) };
                let digest: Option<Digest> = name.replacen("blake3-", "blake3:", 1).parse().ok();
                let Some(digest) = digest else { return Ok(None) };
                match self.images.reader(&digest).await {
                    Ok(_) if name.contains(':') => Ok(Some(Place::Alias(digest))),
                    Ok(_) => Ok(Some(Place::Image(digest, ROOT))),
                    Err(error) if error.is_not_found() => Ok(None),
                    Err(error) => Err(no_answer(&format!("image {digest}"), &error)),
                }
            }
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                let child = Tree(reader.image().root().entries()).child(*node, name);
                Ok(child.map(|node| Place::Image(*image, node)))
            }
            Place::Tag(_) | Place::Alias(_) => Err(Errno::NOTDIR),
        }
    }

    pub(super) async fn named(&self, path: &str, name: &OsStr) -> Result<Option<Place>, Errno> {
        let Some(name) = name.to_str() else { return Ok(None) };
        let found = self.names.child(path, name).await;
        let found = found.map_err(|error| no_answer(&format!("{path}/{name}"), &error))?;
        Ok(found.map(place_of))
    }

    pub(super) async fn attributes(&self, place: &Place) -> Result<Attributes, Errno> {
        let node = self.number(place)?;
        let (kind, size_bytes, is_fixed) = match place {
            Place::Root | Place::ByDigest => (Kind::Directory, 0, true),
            Place::Names(_) => (Kind::Directory, 0, false),
            Place::Tag(reference) => (Kind::SymbolicLink, link_to(reference, "").len() as u64 + 71, false),
            Place::Alias(image) => (Kind::SymbolicLink, directory_of(image).len() as u64, true),
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                let (kind, size) = of_image(&reader, *node).ok_or(Errno::STALE)?;
                (kind, size, true)
            }
        };
        Ok(Attributes { node, kind, size_bytes, is_fixed })
    }

    pub(super) async fn link(&self, place: &Place) -> Result<Bytes, Errno> {
        match place {
            Place::Tag(reference) => {
                let tag = reference.parse().expect("it was checked");
                let image = self.names.resolve(&tag).await;
                let image = image.map_err(|error| match error.is_not_found() {
                    true => Errno::NOENT,
                    false => no_answer(reference, &error),
                })?;
                Ok(link_to(reference, &directory_of(&image)).into())
            }
            Place::Alias(image) => Ok(directory_of(image).into()),
            Place::Image(image, node) => {
                let reader = self.reader(image).await?;
                match &Tree(reader.image().root().entries()).entry(*node).ok_or(Errno::INVAL)?.kind {
                    EntryKind::SymbolicLink(target) => Ok(Bytes::copy_from_slice(target)),
                    _ => Err(Errno::INVAL),
                }
            }
            _ => Err(Errno::INVAL),
        }
    }
}

pub(super) fn of_image(reader: &Reader, node: Node) -> Option<(Kind, u64)> {
    let tree = Tree(reader.image().root().entries());
    let size = match tree.entry(node).map(|entry| &entry.kind) {
        Some(EntryKind::File(file)) => file.size_bytes,
        Some(EntryKind::SymbolicLink(target)) => target.len() as u64,
        Some(EntryKind::EmptyDirectory) | None => 0,
    };
    Some((tree.kind(node)?, size))
}

/// Returns the target of a reference's link, relative to the link's directory.
fn link_to(reference: &str, image: &str) -> String {
    let up = reference.split('/').count();
    format!("{}{BY_DIGEST}/{image}", "../".repeat(up))
}

/// Logs an error of the server, and returns that of the program.
pub(super) fn no_answer(what: &str, error: &RemoteError) -> Errno {
    let what = if what.is_empty() { "the names of images" } else { what };
    complaints::warn(format_args!("{what}: {error}; a program gets EIO"));
    Errno::IO
}

fn failed(place: &Place, error: &ReadError) -> Errno {
    match place {
        Place::Image(image, _) => {
            complaints::warn(format_args!("image {image}: {error}; a program gets EIO"))
        }
        other => complaints::warn(format_args!("{other:?}: {error}; a program gets EIO")),
    }
    Errno::IO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_tags_lead_to_images_by_digest() {
        let image = directory_of(&Digest::of(b"an image"));
        assert_eq!(image.len(), 71);
        assert_eq!(link_to("app:v1", &image), format!("../by-digest/{image}"));
        assert_eq!(link_to("a/b:v1", &image), format!("../../by-digest/{image}"));
    }
}
