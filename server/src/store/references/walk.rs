//! Walks over the references in bytewise order of `name:tag`, page by page.
//!
//! A walk reads only the directories that the page needs: it finds the next keys of a directory
//! (`names.rs`), and walks the directories that they stand for. The place between two pages is the
//! last text of the first one, so it stays right whatever changes: pages ascend, so no reference is
//! shown twice, and each directory is listed as it was after the walk began, so no reference is left
//! out that existed all the time.

use crate::store::error::{StoreError, damaged, io_error};
use crate::store::objects::Objects;
use crate::store::references::directory::{Content, TAGS};
use crate::store::references::listings::{Keys, Listings, Walk};
use crate::store::references::names::{Group, Key, unescape};
use postcopy_proto::reference::TagReference;
use rayon::prelude::*;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most groups that a walk reads at the same time. Each gives at most a page.
const MAX_BATCH: usize = 64;

/// An entry of the directories of references.
pub(crate) type Listed = Result<TagReference, NoReference>;

/// A file that is no reference, or a directory that cannot be read.
#[derive(Debug)]
pub(crate) struct NoReference {
    /// The place in the order of the references: the path in the form of a reference, with `%XX`
    /// for each byte that no reference contains.
    pub(crate) text: String,
    /// The reason why the entry is no reference.
    pub(crate) error: StoreError,
}

/// A place in a walk, from which the next page goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageToken {
    /// The text of the last entry of the page before.
    text: String,
    walk: Walk,
}

/// Text that is no page token.
#[derive(Debug, thiserror::Error)]
#[error("it is not a token of this server")]
pub(crate) struct PageTokenError;

impl fmt::Display for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:016x}{:016x}", self.text, self.walk.listings, self.walk.number)
    }
}

impl PageToken {
    /// Returns the same place in a walk that has yet to begin.
    pub(crate) fn of_another_walk(self) -> Self {
        Self { walk: Walk::UNKNOWN, ..self }
    }
}

impl FromStr for PageToken {
    type Err = PageTokenError;

    fn from_str(token: &str) -> Result<Self, PageTokenError> {
        let (text, walk) = token.rsplit_once('@').ok_or(PageTokenError)?;
        if walk.len() != 32 || !walk.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(PageTokenError);
        }
        let number = |hex| u64::from_str_radix(hex, 16).map_err(|_| PageTokenError);
        let walk = Walk { listings: number(&walk[..16])?, number: number(&walk[16..])? };
        Ok(Self { text: text.to_owned(), walk })
    }
}

/// Some references, in bytewise order of `name:tag`, and entries that are no references.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) entries: Vec<Listed>,
    /// The place after these; `None` after the last page.
    pub(crate) next: Option<PageToken>,
}

/// Returns the next `max` entries, at least one, after those of a page before, or the first ones.
///
/// # Errors
/// [`StoreError::Io`], if the directory of references or one in which the walk goes on cannot be
/// read.
pub(crate) fn page(
    objects: &Objects,
    listings: &Listings,
    after: Option<&PageToken>,
    max: usize,
) -> Result<Page, StoreError> {
    let walk = after.map_or_else(|| listings.begin(), |after| listings.resume(after.walk));
    let walker = Walker { objects, listings, walk };
    let top = objects.layout.references();
    let after = after.map(|after| after.text.as_str());
    let max = max.max(1);
    // One more tells whether this is the last page.
    let mut entries = walker.parts(&top, "", true, after, max + 1)?;
    let is_last = entries.len() <= max;
    entries.truncate(max);
    let next = match entries.last() {
        Some(last) if !is_last => Some(PageToken { text: text_of(last), walk }),
        _ => None,
    };
    Ok(Page { entries, next })
}

fn text_of(entry: &Listed) -> String {
    match entry {
        Ok(reference) => reference.to_string(),
        Err(no_reference) => no_reference.text.clone(),
    }
}

#[derive(Clone, Copy, Debug)]
struct Walker<'a> {
    objects: &'a Objects,
    listings: &'a Listings,
    walk: Walk,
}

impl Walker<'_> {
    /// Returns at most `max` entries at and below a directory of parts of names. Their texts begin
    /// with `prefix`; only those are returned that go on with more than `after`.
    fn parts(
        self,
        dir: &Path,
        prefix: &str,
        is_top: bool,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        // The group in which the walk stopped, and the place in it.
        let (mut from, stopped) = match after {
            Some(after) => {
                let (from, rest) = after.split_at(after.find(['/', ':']).map_or(after.len(), |at| at + 1));
                (from.to_owned(), Some((from, rest)))
            }
            None => (String::new(), None),
        };
        let mut found = Vec::new();
        let mut batch = 1;
        loop {
            let Some(Keys { names, are_all }) =
                self.listings.keys(self.objects, dir, Content::Parts { is_top }, &from, self.walk)?
            else {
                // All references would seem to be removed, and gc would delete their images.
                return match is_top {
                    true => Err(io_error(dir)(io::ErrorKind::NotFound.into())),
                    false => Ok(found),
                };
            };
            let mut place = names.place_of(&from);
            while place < names.len() && found.len() < max {
                let wanted = max - found.len();
                let end = names.len().min(place + batch.min(wanted));
                let group = |place| {
                    let key: Key<'_> = names.key(place);
                    let after = stopped.filter(|(from, _)| key.cmp_text(from).is_eq());
                    self.group(dir, prefix, key, after.map(|(_, rest)| rest), wanted)
                };
                let groups: Vec<_> = match end - place {
                    1 => vec![group(place)?],
                    _ => (place..end).into_par_iter().map(group).collect::<Result<_, _>>()?,
                };
                // Groups that the page cannot take are read in vain.
                let are_small = groups.iter().map(Vec::len).sum::<usize>() <= groups.len();
                batch = if are_small { MAX_BATCH.min(batch * 2) } else { 1 };
                found.extend(groups.into_iter().flatten().take(wanted));
                place = end;
            }
            match names.len().checked_sub(1) {
                Some(last) if !are_all && found.len() < max => from = names.key(last).text() + "\0",
                _ => return Ok(found),
            }
        }
    }

    /// Returns at most `max` entries of a group. One that cannot be read is an entry itself.
    fn group(
        self,
        dir: &Path,
        prefix: &str,
        key: Key<'_>,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let path = dir.join(OsStr::from_bytes(&unescape(key.component)));
        let prefix = [prefix, &key.text()].concat();
        let entries = match key.group {
            Group::Below => self.parts(&path, &prefix, false, after, max),
            Group::Tags | Group::Tag => self.tags(&path.join(TAGS), &prefix, after, max),
        };
        match (entries, after) {
            (Err(error), None) => Ok(vec![Err(NoReference { text: prefix, error })]),
            // The page before ends with this.
            (Err(_), Some("")) => Ok(Vec::new()),
            (entries, _) => entries,
        }
    }

    fn tags(
        self,
        dir: &Path,
        prefix: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let mut found = Vec::new();
        // No text lies between a text and the same with a zero byte.
        let mut from = after.map_or_else(String::new, |after| [after, "\0"].concat());
        loop {
            let keys = self.listings.keys(self.objects, dir, Content::Tags, &from, self.walk)?;
            let Some(Keys { names, are_all }) = keys else {
                return Ok(found);
            };
            let places = names.place_of(&from)..names.len();
            let wanted = max - found.len();
            found.extend(places.take(wanted).map(|place| listed(dir, prefix, names.key(place).component)));
            match names.len().checked_sub(1) {
                Some(last) if !are_all && found.len() < max => from = names.key(last).text() + "\0",
                _ => return Ok(found),
            }
        }
    }
}

/// Returns the reference of a file, if it is one.
fn listed(tags: &Path, prefix: &str, tag: &str) -> Listed {
    let text = [prefix, tag].concat();
    text.parse().map_err(|_| {
        let path: PathBuf = tags.join(OsStr::from_bytes(&unescape(tag)));
        let error = damaged(path.display().to_string(), "its path is no reference");
        NoReference { text, error }
    })
}
