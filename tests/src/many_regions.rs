//! A process with one mapping that is served as many regions of one page each, from all over a file.

use crate::cli::run;
use crate::faulter::{ALL_EVENTS, Faulter};
use crate::fixtures::memory_like;
use crate::server::Server;
use postcopy::{ForeignMemory, ForeignRegion, Options, Session};
use std::fs::File;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// See the module. With a state file.
#[derive(Debug)]
pub struct ManyRegions {
    /// The process. Its mapping goes on beyond the regions by as many pages as were asked for, which are registered.
    pub faulter: Faulter,
    /// The session that fills it.
    pub session: Session,
    /// How many regions.
    pub regions: usize,
    /// How long attaching took.
    pub attached: Duration,
    /// Of the file, whose pages regions have in an order of their own.
    bytes: Vec<u8>,
    _server: Server,
}

impl ManyRegions {
    /// Starts it: regions of a file of `file_pages` pages, at least as many, in chunks of so many bytes.
    ///
    /// # Panics
    /// If it cannot be attached.
    #[must_use]
    pub fn start(regions: usize, file_pages: usize, beyond: usize, chunk_bytes: usize, seed: u64) -> Self {
        let bytes = memory_like(file_pages * PAGE, seed);
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes).expect("there is room");
        let (server, chunk_bytes) = (Server::start(), chunk_bytes.to_string());
        let push = ["push".as_ref(), path.as_os_str(), "app".as_ref()];
        let _ =
            run(server.address(), push.into_iter().chain(["--chunk-size".as_ref(), chunk_bytes.as_ref()]));
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{}", regions + beyond)]);
        let region = |index: usize| {
            let whole = faulter.region(0, "mem", (Self::place(index, file_pages) * PAGE) as u64);
            ForeignRegion { address: whole.address + index * PAGE, len: PAGE, ..whole }
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
        let session = Session::attach(server.address(), &reference, Options::default(), &memory);
        let session = session.expect("it can be attached");
        let attached = started.elapsed();
        faulter.let_go();
        Self { faulter, session, regions, attached, bytes, _server: server }
    }

    /// The page of the file that a region has.
    fn place(index: usize, file_pages: usize) -> usize {
        index * 7919 % file_pages
    }

    /// The bytes of a region.
    #[must_use]
    pub fn bytes_of(&self, index: usize) -> &[u8] {
        &self.bytes[Self::place(index, self.bytes.len() / PAGE) * PAGE..][..PAGE]
    }
}
