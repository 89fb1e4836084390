//! What memory must be: a process's pages as they would be without userfaultfd, all of them there from the beginning.
//!
//! Where several answers are right (MADV_FREE; what a child sees of what its parent did while it forked) a page can be
//! several things, and becomes the one that was seen.

use crate::faulter::page_digest;
use std::collections::BTreeMap;
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
    can_be: Vec<Content>,
    /// The kernel may drop it at any time (MADV_FREE).
    lazy: bool,
}

/// The pages of one process, by address divided by the page size.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pages: BTreeMap<usize, Page>,
}

impl Memory {
    /// Maps pages, each with its content.
    pub fn map(&mut self, mapping: u32, first: usize, contents: impl IntoIterator<Item = Content>) {
        for (index, content) in contents.into_iter().enumerate() {
            self.pages.insert(first + index, Page { mapping, can_be: vec![content], lazy: false });
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

    /// Pages lose their content.
    pub fn remove(&mut self, pages: Range<usize>) {
        self.write(pages, Content::Zero);
    }

    /// Pages are written to.
    pub fn write(&mut self, pages: Range<usize>, content: Content) {
        for (_, page) in self.pages.range_mut(pages) {
            (page.can_be, page.lazy) = (vec![content], false);
        }
    }

    /// Pages may lose their content from here on (MADV_FREE).
    pub fn free(&mut self, pages: Range<usize>) {
        for (_, page) in self.pages.range_mut(pages) {
            page.can_be.push(Content::Zero);
            page.lazy = true;
        }
    }

    /// Takes pages out, to be put elsewhere.
    pub fn take(&mut self, pages: &Range<usize>) -> Vec<Page> {
        let taken = self.pages.range(pages.clone()).map(|(_, page)| page.clone()).collect();
        self.unmap(pages.clone());
        taken
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
        child
    }

    /// A page was seen with this digest.
    ///
    /// # Errors
    /// What it must be, if that is not what it is.
    pub fn seen(&mut self, page: usize, digest: &str, image: &[String]) -> Result<(), String> {
        let at = page;
        let page = self.pages.get_mut(&page).ok_or_else(|| format!("page {at:#x} is not mapped"))?;
        let is = |content: &Content| match content {
            Content::Image(page) => image[*page] == digest,
            Content::Zero => digest == page_digest(&[0; 4096]),
            Content::Byte(byte) => digest == page_digest(&[*byte; 4096]),
        };
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
