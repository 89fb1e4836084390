//! The promises of the library about sessions and regions.

mod contents;
mod costs;
mod forks;
mod losses;
mod regions;

use crate::map::push;
use postcopy::{ForeignMemory, ForeignRegion, Options, Region, Session};
use postcopy_tests::PAGE;
use postcopy_tests::faulter::Faulter;
use postcopy_tests::server::Server;
use rustix::mm::Advice;
use std::ops::Range;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const CHUNK: usize = 64 << 10;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);
/// The variable that gives a child, which a test starts from this program, the address of its
/// server.
pub(crate) const CHILD: &str = "POSTCOPY_TESTS_CHILD";
pub(crate) const FILLING: Options = Options::DEFAULT.fill(true);

/// A server that has the image `app` of one file, `mem`.
pub(crate) struct Source {
    pub(crate) server: Server,
    pub(crate) bytes: Vec<u8>,
    folder: TempDir,
}

impl Source {
    pub(crate) fn start(bytes: Vec<u8>, chunk: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start();
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes).unwrap();
        push(&server, &path, "app", chunk);
        Self { server, bytes, folder }
    }

    /// Pushes the same file as another image.
    pub(crate) fn push_again(&self, reference: &str, chunk: usize) {
        push(&self.server, &self.folder.path().join("mem"), reference, chunk);
    }

    pub(crate) fn open(&self, options: Options) -> Session {
        Session::open(self.server.address(), &"app".parse().unwrap(), options).unwrap()
    }

    /// Attaches to memory of another process, which no other holder of its userfaultfd serves then.
    pub(crate) fn attach_regions(
        &self,
        faulter: &mut Faulter,
        regions: &[ForeignRegion],
        options: Options,
    ) -> Session {
        let (uffd, pid) = (faulter.uffd(), Some(faulter.main.pid));
        let memory = ForeignMemory { uffd, regions, state: None, pid, is_registered: true };
        let reference = "app".parse().unwrap();
        let session = Session::attach(self.server.address(), &reference, options, &memory).unwrap();
        faulter.let_go();
        session
    }
}

/// Gives the content of these bytes of a region back to the kernel, as programs do (MADV_DONTNEED).
#[expect(unsafe_code, reason = "madvise on memory of our own")]
pub(crate) fn give_back(region: &mut Region, range: Range<usize>) {
    assert!(range.start.is_multiple_of(PAGE) && range.end <= region.len(), "whole pages of the region");
    let start = region[range.clone()].as_mut_ptr();
    // SAFETY: the region is borrowed exclusively, so no slice exists whose bytes change.
    unsafe { rustix::mm::madvise(start.cast(), range.len(), Advice::LinuxDontNeed) }.unwrap();
}

fn assert_pages(region: &[u8], expected: &[u8], what: &str) {
    assert_eq!(region.len(), expected.len(), "{what}");
    let pages = region.chunks(PAGE).zip(expected.chunks(PAGE));
    let wrong: Vec<usize> = pages.enumerate().filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert_eq!(wrong, Vec::<usize>::new(), "{what}: pages with wrong bytes");
}

/// Runs the test of that name in a child of this program, with `told` in the variable [`CHILD`].
pub(crate) fn as_child(test: &str, told: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status =
        command.args([test, "--exact", "--nocapture"]).env(CHILD, told).stdout(Stdio::null()).status();
    status.unwrap()
}

/// Returns the number of entries that a directory of /proc/self has.
pub(crate) fn count_of(directory: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{directory}")).unwrap().count()
}
