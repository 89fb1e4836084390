//! What memory must be: a process's pages as they would be without userfaultfd, all of them there from the beginning.
//!
//! Where several answers are right (MADV_FREE; what a child sees of what its parent did while it forked) a page can be
//! several things, and becomes the one that was seen.

use crate::faulter::page_digest;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A page of the image.
    Image(usize),
    /// Nothing.
    Zero,
    /// This byte, everywhere.
    Byte(u8),
}

/// A page that is mapped.
#[derive(Clone, Debug)]
pub struct Page {
    /// Pages of one mapping have the same number: what mremap can move at once.
    pub mapping: u32,
    /// Which page of the shared memory it is, if it is of that.
    pub shared: Option<usize>,
    /// What it can be, if it is not shared.
    can_be: Vec<Content>,
    /// The kernel may drop it at any time (MADV_FREE).
    lazy: bool,
    /// If that is to be told of.
    changes: Option<Changed>,
}

/// What must and what may be told of a page.
#[derive(Clone, Copy, Debug, Default)]
struct Changed {
    written: Bounds,
    removed: Bounds,
    ever_removed: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    must: bool,
    may: bool,
}

impl Bounds {
    fn exactly(is: bool) -> Self {
        Self { must: is, may: is }
    }

    fn has(self, told: bool) -> bool {
        if told { self.may } else { !self.must }
    }
}

/// What pages of shared memory hold, wherever they are mapped.
pub type SharedPages = [Content];

/// The pages of one process, by address divided by the page size.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pages: BTreeMap<usize, Page>,
    /// A pager was killed since it was last told what has changed: what is removed while another one takes over counts as
    /// written, too.
    was_killed: bool,
}

impl Memory {
    /// Maps pages, each with its content.
    pub fn map(&mut self, mapping: u32, first: usize, contents: impl IntoIterator<Item = Content>) {
        for (index, content) in contents.into_iter().enumerate() {
            let page = Page { mapping, shared: None, can_be: vec![content], lazy: false, changes: None };
            self.pages.insert(first + index, page);
        }
    }

    /// Maps all of the shared memory.
    pub fn map_shared(&mut self, mapping: u32, first: usize, pages: usize) {
        self.map(mapping, first, vec![Content::Zero; pages]);
        for (index, (_, page)) in self.pages.range_mut(first..first + pages).enumerate() {
            page.shared = Some(index);
        }
    }

    /// From here on what is changed of these is to be told of.
    pub fn track(&mut self) {
        for page in self.pages.values_mut() {
            page.changes = Some(Changed::default());
        }
    }

    /// Which pages of the shared memory these are, as far as they are.
    #[must_use]
    pub fn shared(&self, pages: &Range<usize>) -> Vec<usize> {
        self.pages.range(pages.clone()).filter_map(|(_, page)| page.shared).collect()
    }

    /// Sees that what was told is what must be told, and begins anew.
    ///
    /// # Errors
    /// The first page of which it is not.
    pub fn told(&mut self, written: &BTreeSet<usize>, removed: &BTreeSet<usize>) -> Result<(), String> {
        if let Some(other) = written.union(removed).find(|page| !self.pages.contains_key(page)) {
            return Err(format!("page {other:#x} is not mapped, and told of"));
        }
        for (at, page) in &mut self.pages {
            let told = (written.contains(at), removed.contains(at));
            let Some(changes) = &mut page.changes else {
                if told != (false, false) {
                    return Err(format!("page {at:#x} is of no region, and told of as {told:?}"));
                }
                continue;
            };
            if !changes.written.has(told.0) || !changes.removed.has(told.1) {
                return Err(format!("page {at:#x} is told of as {told:?} (written, removed): {changes:?}"));
            }
            (changes.written, changes.removed) = Default::default();
        }
        self.was_killed = false;
        Ok(())
    }

    /// Who knew what was told of is gone: what was ever removed is told of again, and may have been written.
    pub fn forget_told(&mut self) {
        self.was_killed = true;
        for changes in self.pages.values_mut().filter_map(|page| page.changes.as_mut()) {
            if changes.ever_removed {
                (changes.written.may, changes.removed.may) = (true, true);
            }
        }
    }

    /// How many pages are mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether none is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Up to `most` mapped pages from the one of number `index` on, without a gap, and if asked for of one mapping.
    #[must_use]
    pub fn run(&self, index: usize, most: usize, one_mapping: bool) -> Range<usize> {
        let Some((&first, page)) = self.pages.iter().nth(index % self.len().max(1)) else { return 0..0 };
        let continues =
            |at: &usize| self.pages.get(at).is_some_and(|next| !one_mapping || next.mapping == page.mapping);
        first..(first..first + most).take_while(continues).last().map_or(first, |last| last + 1)
    }

    /// The runs of mapped pages.
    #[must_use]
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &page in self.pages.keys() {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    /// Pages are unmapped.
    pub fn unmap(&mut self, pages: Range<usize>) {
        self.pages.retain(|page, _| !pages.contains(page));
    }

    /// Pages lose their content (MADV_DONTNEED), but for shared ones.
    pub fn remove(&mut self, pages: Range<usize>) {
        for (_, page) in self.pages.range_mut(pages).filter(|(_, page)| page.shared.is_none()) {
            (page.can_be, page.lazy) = (vec![Content::Zero], false);
            if let Some(changes) = &mut page.changes {
                let (written, removed) =
                    (Bounds { must: false, may: self.was_killed }, Bounds::exactly(true));
                *changes = Changed { written, removed, ever_removed: true };
            }
        }
    }

    /// Pages are written to.
    pub fn write(&mut self, pages: Range<usize>, content: Content, shared: &mut SharedPages) {
        for (_, page) in self.pages.range_mut(pages) {
            match page.shared {
                Some(index) => shared[index] = content,
                None => (page.can_be, page.lazy) = (vec![content], false),
            }
            if let Some(changes) = &mut page.changes {
                changes.written = Bounds::exactly(true);
            }
        }
    }

    /// Pages may lose their content from here on (MADV_FREE).
    pub fn free(&mut self, pages: Range<usize>) {
        for (_, page) in self.pages.range_mut(pages) {
            page.can_be.push(Content::Zero);
            page.lazy = true;
            if let Some(changes) = &mut page.changes {
                changes.written.must = false;
                changes.written.may |= self.was_killed;
                (changes.removed, changes.ever_removed) = (Bounds::exactly(true), true);
            }
        }
    }

    /// Whether the kernel may drop one of these at any time.
    #[must_use]
    pub fn is_lazy(&self, pages: &Range<usize>) -> bool {
        self.pages.range(pages.clone()).any(|(_, page)| page.lazy)
    }

    /// Takes pages out, to be put elsewhere.
    pub fn take(&mut self, pages: &Range<usize>) -> Vec<Page> {
        let taken = self.pages.range(pages.clone()).map(|(_, page)| page.clone()).collect();
        self.unmap(pages.clone());
        taken
    }

    /// Those of these pages that are shared are so from `first` on, too.
    pub fn share(&mut self, first: usize, pages: &[Page]) {
        for (at, page) in pages.iter().enumerate().filter(|(_, page)| page.shared.is_some()) {
            if let Some(here) = self.pages.get_mut(&(first + at)) {
                here.shared = page.shared;
            }
        }
    }

    /// Puts pages that were taken out somewhere, as `mapping`.
    pub fn put(&mut self, pages: Vec<Page>, first: usize, mapping: u32) {
        for (index, page) in pages.into_iter().enumerate() {
            self.pages.insert(first + index, Page { mapping, ..page });
        }
    }

    /// What a child sees that is forked while `meanwhile` are removed, or not yet.
    #[must_use]
    pub fn forked(&self, meanwhile: &[Range<usize>]) -> Self {
        let mut child = self.clone();
        for pages in meanwhile {
            for (_, page) in child.pages.range_mut(pages.clone()) {
                page.can_be.push(Content::Zero);
            }
        }
        child.pages.values_mut().for_each(|page| page.changes = None);
        child
    }

    /// A page was seen with this digest.
    ///
    /// # Errors
    /// What it must be, if that is not what it is.
    pub fn seen(
        &mut self,
        page: usize,
        digest: &str,
        image: &[String],
        shared: &SharedPages,
    ) -> Result<(), String> {
        let at = page;
        let page = self.pages.get_mut(&page).ok_or_else(|| format!("page {at:#x} is not mapped"))?;
        let is = |content: &Content| match content {
            Content::Image(page) => image[*page] == digest,
            Content::Zero => digest == page_digest(&[0; 4096]),
            Content::Byte(byte) => digest == page_digest(&[*byte; 4096]),
        };
        if let Some(index) = page.shared {
            page.can_be = vec![shared[index]];
        }
        let Some(content) = page.can_be.iter().find(|content| is(content)).copied() else {
            let found = image.iter().position(|page| page == digest).map(Content::Image);
            let found = found.or_else(|| (0..=255).map(Content::Byte).find(|byte| is(byte)));
            return Err(format!("page {at:#x} is {found:?} and must be one of {:?}", page.can_be));
        };
        if !page.lazy {
            page.can_be = vec![content];
        }
        Ok(())
    }
}
