//! A process that a session fills, while some of its threads call madvise(MADV_DONTNEED) without a
//! pause.

use crate::PAGE;
use crate::faulter::Faulter;
use crate::stored::StoredFile;
use postcopy::{ForeignMemory, Options, ServerAddress, Session};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pages that each thread gives back again and again.
const GIVEN_BACK: usize = 16;

/// The process and its session. Its memory is as Firecracker's: one private region.
#[derive(Debug)]
pub struct Storm {
    /// The served process.
    pub faulter: Faulter,
    /// The session that fills it.
    pub session: Session,
    source: Arc<StoredFile>,
    /// The number of pages that were accessed.
    touched: usize,
}

impl Storm {
    /// Longer than any page may take, and than all of them together take.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// Starts a process with the file as its memory. The threads give back its end. The session
    /// requests pages from `server`, or from the file's own server.
    ///
    /// # Panics
    /// If it cannot be attached.
    #[must_use]
    pub fn start(
        source: &Arc<StoredFile>,
        threads: usize,
        options: Options,
        features: u64,
        server: Option<&ServerAddress>,
    ) -> Self {
        let pages = source.bytes.len() / PAGE;
        let mut faulter = Faulter::start(features, &[&format!("private:{pages}")]);
        let regions = [faulter.region(0, "mem", 0)];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        let (address, reference) =
            (server.unwrap_or(source.server.address()), "app".parse().expect("a reference"));
        let session = Session::attach(address, &reference, options, &memory).expect("it can be attached");
        faulter.let_go();
        for thread in 0..threads {
            let first = faulter.at(0, pages - GIVEN_BACK * (thread + 1));
            faulter.main.does(&format!("storm {first} {GIVEN_BACK}"));
        }
        Self { faulter, session, source: Arc::clone(source), touched: 0 }
    }

    /// Touches so many pages of the first half, and returns the time that each took there. A page that is absent after
    /// [`Storm::PATIENCE`] is the last one, with that time; no touch begins later than that.
    ///
    /// # Panics
    /// If a page has other bytes, or all pages have been touched.
    pub fn touch(&mut self, count: usize) -> Vec<Duration> {
        let (mut count, started) = (0..count, Instant::now());
        self.touch_while(|| count.next().is_some() && started.elapsed() < Self::PATIENCE)
    }

    /// Gives this many pages of the second half back, one after another, in another thread. Touches pages meanwhile, and
    /// returns the times as [`Storm::touch`] does.
    ///
    /// # Panics
    /// As [`Storm::touch`].
    pub fn touch_beside_a_balloon(&mut self, pages: usize) -> Vec<Duration> {
        const DONTNEED: i32 = 4;
        let first = self.faulter.at(0, self.source.bytes.len() / PAGE - pages);
        let mut balloon = self.faulter.thread();
        balloon.tell(&format!("advise-each {DONTNEED} {first} {pages}"));
        self.touch_while(|| !balloon.has_answered())
    }

    fn touch_while(&mut self, mut goes_on: impl FnMut() -> bool) -> Vec<Duration> {
        let half = self.source.bytes.len() / PAGE / 2;
        let mut took = Vec::new();
        while goes_on() {
            assert!(self.touched < half, "all pages have been touched");
            // Far from the last one: each touch is a page fault, and none looks sequential.
            let page = self.touched * 997 % half;
            self.touched += 1;
            let (address, bytes) = (self.faulter.at(0, page), &self.source.bytes[page * PAGE..][..PAGE]);
            let touch = self.faulter.main.timed_read(address, bytes, Self::PATIENCE);
            took.push(touch.unwrap_or(Self::PATIENCE));
            if touch.is_none() {
                break;
            }
        }
        took
    }
}
