//! Memory of another process, filled through a userfaultfd that it has opened.

mod children;
mod ends;
mod filling;
mod losses;
mod moves;
mod shared;

use crate::session::Source;
use postcopy::{ForeignMemory, Options, Session, SessionError};
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::{PAGE, is_root, skip};
use std::time::Duration;

const CHUNK: usize = 64 << 10;
const PAGES: usize = 300;
const WATCHDOG: Duration = Duration::from_secs(100);
const SIGBUS: i32 = 7;
const DONTNEED: i32 = 4;

fn start() -> Source {
    let mut bytes = memory_like(PAGES * PAGE, 70);
    bytes[100 * PAGE..140 * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

impl Source {
    fn attach(&self, faulter: &Faulter, options: Options) -> Result<Session, SessionError> {
        // Two regions, as a guest above 3 GiB has them. Their order is not that of the file, and
        // they begin within chunks.
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let reference = "app".parse().unwrap();
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        Session::attach(self.server.address(), &reference, options, &memory)
    }

    fn pages(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes[first * PAGE..(first + count) * PAGE]
    }

    /// Attaches as [`Self::attach`] does, and names the process of the memory.
    fn attach_known(&self, faulter: &Faulter, options: Options) -> Session {
        let regions =
            [faulter.region(0, "mem", 103 * PAGE as u64), faulter.region(1, "mem", 3 * PAGE as u64)];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: Some(faulter.main.pid),
            is_registered: true,
        };
        Session::attach(self.server.address(), &"app".parse().unwrap(), options, &memory).unwrap()
    }
}

fn faulter() -> Faulter {
    Faulter::start(ALL_EVENTS, &["private:197", "private:100"])
}

/// Runs a test with a server and a process. Serving another process takes the right to serve the
/// kernel's faults.
fn with_faulter(test: &str, work: impl FnOnce(Source, Faulter) + Send + 'static) {
    if !is_root() {
        return skip(test, "a userfaultfd for all faults needs root");
    }
    within(WATCHDOG, || work(start(), faulter()));
}

/// The regions lie at other places than in the file: which of its pages is at an address.
const FIRST_PAGES: [usize; 2] = [103, 3];
