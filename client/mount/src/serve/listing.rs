//! Lists of directories.

use super::Server;
use super::answers::{no_answer, of_image};
use crate::BY_DIGEST;
use crate::names::Named;
use crate::nodes::Place;
use crate::protocol::{self, Answer, Attributes};
use crate::tree::Tree;
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;

/// Most directories of names that are open and keep their list.
const MAX_LISTS: usize = 1024;

/// The children of a directory of names.
type List = Arc<Vec<(String, Place)>>;

/// The lists of open directories, with the directories, and the last handle. A killed process may
/// have given out the same handles.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) open: HashMap<u64, (Place, List)>,
    last: u64,
}

impl Server {
    /// Opens a directory. That of an image never changes. Any other keeps its list, so that one
    /// reading of it is of one moment.
    pub(super) async fn open_directory(&self, place: &Place) -> Result<Answer, Errno> {
        if matches!(place, Place::Image(..)) {
            return Ok(Answer::open(0, protocol::FOPEN_KEEP_CACHE | protocol::FOPEN_CACHE_DIR));
        }
        let list = self.children(place).await?;
        let mut lists = self.lists();
        if lists.open.len() >= MAX_LISTS {
            return Ok(Answer::open(0, 0));
        }
        lists.last += 1;
        let handle = lists.last;
        lists.open.insert(handle, (place.clone(), list));
        Ok(Answer::open(handle, 0))
    }

    /// Returns the children of a directory that is none of an image.
    pub(super) async fn children(&self, place: &Place) -> Result<List, Errno> {
        let children = match place {
            Place::Root => {
                let mut children = vec![(BY_DIGEST.to_owned(), Place::ByDigest)];
                children.extend(self.names_below("").await?);
                children
            }
            Place::Names(path) => self.names_below(path).await?,
            // Images need not have a name, and the server may have very many.
            Place::ByDigest => Vec::new(),
            Place::Tag(_) | Place::Alias(_) | Place::Image(..) => return Err(Errno::NOTDIR),
        };
        Ok(Arc::new(children))
    }

    /// Lists a directory from an offset on: 0, or that of an earlier entry.
    pub(super) async fn list(
        &self,
        place: &Place,
        handle: u64,
        offset: u64,
        max: usize,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let mut answer = Answer::default();
        let plus = plus.then_some(&self.owner);
        let itself = self.attributes(place).await?;
        // The kernel does not use what "." and ".." tell.
        for (at, name) in [(0, "."), (1, "..")] {
            if offset <= at {
                let entry = (OsStr::new(name), &itself, at + 1);
                if !answer.push_entry(entry, plus, max) {
                    return Ok(answer);
                }
            }
        }
        let from = usize::try_from(offset.saturating_sub(2)).map_err(|_| Errno::INVAL)?;
        if let Place::Image(image, node) = place {
            let reader = self.reader(image).await?;
            for (name, node, next) in Tree(reader.image().root().entries()).children(*node, from) {
                let (kind, size_bytes) = of_image(&reader, node).ok_or(Errno::STALE)?;
                let number = self.number(&Place::Image(*image, node))?;
                let attributes = Attributes { node: number, kind, size_bytes, is_fixed: true };
                if !answer.push_entry((name, &attributes, next as u64 + 2), plus, max) {
                    break;
                }
            }
            return Ok(answer);
        }
        let list = self.lists().open.get(&handle).cloned();
        let children = match list {
            Some((of, list)) if of == *place => list,
            // A killed process has opened the directory, or very many are open.
            _ => self.children(place).await?,
        };
        for (at, (name, child)) in children.iter().enumerate().skip(from) {
            let attributes = self.attributes(child).await?;
            if !answer.push_entry((OsStr::new(name), &attributes, at as u64 + 3), plus, max) {
                break;
            }
        }
        Ok(answer)
    }

    pub(super) async fn names_below(&self, path: &str) -> Result<Vec<(String, Place)>, Errno> {
        let children = self.names.children(path).await.map_err(|error| no_answer(path, &error))?;
        Ok(children.into_iter().map(|(name, named)| (name, place_of(named))).collect())
    }
}

pub(super) fn place_of(named: Named) -> Place {
    match named {
        Named::Directory(path) => Place::Names(path),
        Named::Tag(reference) => Place::Tag(reference),
    }
}
