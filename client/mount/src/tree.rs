//! The directory tree of an image, as a view of its list of entries.
//!
//! An image is a list of paths in bytewise order, so a directory's entries lie together. A node of
//! the tree is an entry and a depth: the directory that the first `depth` components of the entry's
//! path name, where the entry is the first one below that directory. So a node's number needs no
//! table, and means the same to each process that serves the image.

use crate::protocol::Kind;
use postcopy::proto::manifest::{Entry, EntryKind};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A node of an image's tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// The entry with this index.
    Entry(u32),
    /// The directory of the first `depth` components of the path of the entry `first`, its first
    /// one. The root has depth 0.
    Directory { first: u32, depth: u16 },
}

/// The root of each tree.
pub(crate) const ROOT: Node = Node::Directory { first: 0, depth: 0 };

/// The tree of an image's entries, which are in bytewise order of their paths.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree<'a>(pub(crate) &'a [Entry]);

/// A child of a directory: its name, its node, and the number of the entry after it.
pub(crate) type Child<'a> = (&'a OsStr, Node, usize);

impl<'a> Tree<'a> {
    /// Returns the path of a directory with a slash behind each component; `None` if there is no
    /// such directory.
    fn prefix(&self, first: u32, depth: u16) -> Option<&'a [u8]> {
        if depth == 0 {
            return Some(b"");
        }
        let path = self.0.get(first as usize)?.path.as_bytes();
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let (end, _) = slashes.clone().nth(usize::from(depth) - 1)?;
        Some(&path[..=end])
    }

    /// Returns the entry of a node, if the node is one.
    pub(crate) fn entry(&self, node: Node) -> Option<&'a Entry> {
        match node {
            Node::Entry(index) => self.0.get(index as usize),
            Node::Directory { .. } => None,
        }
    }

    /// Returns the kind of a node; `None` if there is no such node.
    pub(crate) fn kind(&self, node: Node) -> Option<Kind> {
        match node {
            Node::Directory { first, depth } => self.prefix(first, depth).map(|_| Kind::Directory),
            Node::Entry(_) => Some(match &self.entry(node)?.kind {
                EntryKind::File(file) => Kind::File { is_executable: file.executable },
                EntryKind::SymbolicLink(_) => Kind::SymbolicLink,
                EntryKind::EmptyDirectory => Kind::Directory,
            }),
        }
    }

    /// Finds a name in a directory.
    pub(crate) fn child(&self, directory: Node, name: &OsStr) -> Option<Node> {
        let Node::Directory { first, depth } = directory else { return None };
        let prefix = self.prefix(first, depth)?;
        let path = [prefix, name.as_bytes()].concat();
        let at = self.0.partition_point(|entry| entry.path.as_bytes() < &path[..]);
        if self.0.get(at).is_some_and(|entry| entry.path.as_bytes() == path) {
            return Some(Node::Entry(index(at)));
        }
        let below = [&path[..], b"/"].concat();
        let at = self.0.partition_point(|entry| entry.path.as_bytes() < &below[..]);
        let is_directory = self.0.get(at).is_some_and(|entry| entry.path.as_bytes().starts_with(&below));
        is_directory.then_some(Node::Directory { first: index(at), depth: depth + 1 })
    }

    /// Returns the children of a directory from the entry `from` on, which is the number after an
    /// earlier child, or 0.
    pub(crate) fn children(&self, directory: Node, from: usize) -> impl Iterator<Item = Child<'a>> {
        let place = match directory {
            Node::Directory { first, depth } => {
                self.prefix(first, depth).map(|prefix| (first, depth, prefix))
            }
            Node::Entry(_) => None,
        };
        let entries = self.0;
        let mut at = place.map_or(entries.len(), |(first, ..)| from.max(first as usize));
        std::iter::from_fn(move || {
            let (_, depth, prefix) = place?;
            let path = entries.get(at)?.path.as_bytes();
            let rest = path.strip_prefix(prefix)?;
            let (name, node, next) = match rest.iter().position(|byte| *byte == b'/') {
                None => (rest, Node::Entry(index(at)), at + 1),
                Some(end) => {
                    let below = &path[..prefix.len() + end + 1];
                    let is_below = |entry: &Entry| entry.path.as_bytes().starts_with(below);
                    let count = entries[at..].partition_point(is_below);
                    (&rest[..end], Node::Directory { first: index(at), depth: depth + 1 }, at + count)
                }
            };
            at = next;
            Some((OsStr::from_bytes(name), node, next))
        })
    }
}

fn index(at: usize) -> u32 {
    u32::try_from(at).expect("an image has fewer entries")
}

#[cfg(test)]
mod tests {
    use super::*;
    use postcopy::proto::path::ImagePath;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn entries(paths: &BTreeSet<String>) -> Vec<Entry> {
        let entry = |path: &String| Entry {
            path: ImagePath::try_from(path.as_bytes()).expect("a path"),
            kind: EntryKind::EmptyDirectory,
        };
        paths.iter().map(entry).collect()
    }

    /// Walks the tree, and returns the paths of its entries, and the number of its directories.
    fn walk(tree: &Tree<'_>, directory: Node, path: &str, found: &mut BTreeMap<String, Node>) -> usize {
        let mut directories = 1;
        let children: Vec<_> = tree.children(directory, 0).collect();
        for (at, (name, node, next)) in children.iter().enumerate() {
            let again = tree.children(directory, *next).map(|(name, ..)| name).collect::<Vec<_>>();
            let rest: Vec<_> = children[at + 1..].iter().map(|(name, ..)| *name).collect();
            assert_eq!(again, rest, "a listing goes on where it ended");
            assert_eq!(tree.child(directory, name), Some(*node));
            let path = format!("{path}{}", name.to_str().expect("ASCII"));
            match node {
                Node::Entry(_) => assert!(found.insert(path, *node).is_none()),
                Node::Directory { .. } => directories += walk(tree, *node, &format!("{path}/"), found),
            }
        }
        directories
    }

    proptest! {
        #[test]
        fn a_walk_finds_each_entry_once(
            paths in prop::collection::btree_set("[ab.]{1,2}(/[ab.]{1,2}){0,3}", 1..40)
        ) {
            let is_name = |path: &str| path.split('/').all(|name| name != "." && name != "..");
            let mut paths: BTreeSet<String> = paths.into_iter().filter(|path| is_name(path)).collect();
            // A file is no directory.
            let all = paths.clone();
            paths.retain(|path| !all.iter().any(|other| other.starts_with(&format!("{path}/"))));
            let entries = entries(&paths);
            let tree = Tree(&entries);
            let mut found = BTreeMap::new();
            let directories = walk(&tree, ROOT, "", &mut found);
            prop_assert_eq!(found.keys().cloned().collect::<BTreeSet<_>>(), paths.clone());
            let expected: BTreeSet<_> = paths.iter()
                .flat_map(|path| path.match_indices('/').map(|(at, _)| path[..at].to_owned()))
                .collect();
            prop_assert_eq!(directories, expected.len() + 1);
            prop_assert_eq!(tree.child(ROOT, OsStr::new("c")), None);
        }
    }
}
