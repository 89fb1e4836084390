//! A process with one mapping that is served as many regions, from all over a file.

use crate::PAGE;
use crate::faulter::{ALL_EVENTS, Faulter};
use crate::fixtures::memory_like;
use crate::stored::StoredFile;
use postcopy::{ForeignMemory, ForeignRegion, Options, Session, SharedPager};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The process and its session, which has a state file.
#[derive(Debug)]
pub struct ManyRegions {
    /// The served process. Beyond the regions its mapping has the requested number of further pages,
    /// which are registered.
    pub faulter: Faulter,
    /// The session that fills it.
    pub session: Session,
    /// The number of regions.
    pub regions: usize,
    /// How long attaching took.
    pub attached: Duration,
    region_pages: usize,
    state: File,
    /// The file, whose parts regions have in an order of their own.
    source: Arc<StoredFile>,
}

/// The layout of a mapping.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The number of regions.
    pub regions: usize,
    /// The length of each.
    pub region_pages: usize,
    /// The pages beyond all regions, which are registered.
    pub beyond: usize,
}

impl ManyRegions {
    /// Starts a process with regions of one page, of a file of `file_pages` pages, which must be at
    /// least as many. The chunks have `chunk_bytes` bytes.
    ///
    /// # Panics
    /// If it cannot be attached.
    #[must_use]
    pub fn start(regions: usize, file_pages: usize, beyond: usize, chunk_bytes: usize, seed: u64) -> Self {
        let source = StoredFile::start(memory_like(file_pages * PAGE, seed), chunk_bytes);
        Self::attach(&Arc::new(source), Layout { regions, region_pages: 1, beyond }, None)
    }

    /// Starts a process whose regions are parts of this file. Serves it with a thread of its own, or
    /// with that pager.
    ///
    /// # Panics
    /// If it cannot be attached.
    #[must_use]
    pub fn attach(source: &Arc<StoredFile>, layout: Layout, pager: Option<&SharedPager>) -> Self {
        let Layout { regions, region_pages, beyond } = layout;
        let pages = regions * region_pages + beyond;
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{pages}")]);
        let region = |index: usize| {
            let whole = faulter.region(0, "mem", place(source, region_pages, index) as u64);
            let len = region_pages * PAGE;
            ForeignRegion { address: whole.address + index * len, len, ..whole }
        };
        let listed: Vec<_> = (0..regions).map(region).collect();
        let state: File = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)
            .expect("a memfd can be had")
            .into();
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &listed,
            state: Some(&state),
            pid: None,
            is_registered: true,
        };
        let (reference, started) = ("app".parse().expect("a reference"), Instant::now());
        let (address, options) = (source.server.address(), Options::DEFAULT);
        let session = match pager {
            Some(pager) => pager.attach(address, &reference, options, &memory),
            None => Session::attach(address, &reference, options, &memory),
        };
        let session = session.expect("it can be attached");
        let attached = started.elapsed();
        faulter.let_go();
        let source = Arc::clone(source);
        Self { faulter, session, regions, attached, region_pages, state, source }
    }

    /// The bytes of a region.
    #[must_use]
    pub fn bytes_of(&self, index: usize) -> &[u8] {
        let start = place(&self.source, self.region_pages, index);
        &self.source.bytes[start..][..self.region_pages * PAGE]
    }

    /// Reads the first page of a region, and sees that it has its bytes.
    ///
    /// # Panics
    /// If it has not.
    pub fn assert_reads(&mut self, index: usize) {
        let page = self.bytes_of(index)[..PAGE].to_vec();
        self.faulter.assert_reads(0, index * self.region_pages, &page);
    }

    /// The memory that the state file takes, in bytes.
    ///
    /// # Panics
    /// If the kernel does not say.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        self.state.metadata().expect("an open file").blocks() * 512
    }
}

/// The part of the file that a region has, by its first byte.
fn place(source: &StoredFile, region_pages: usize, index: usize) -> usize {
    let region_bytes = region_pages * PAGE;
    index * 7919 % (source.bytes.len() / region_bytes) * region_bytes
}
