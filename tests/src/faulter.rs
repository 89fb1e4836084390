//! Processes whose memory is filled from here: `postcopy-faulter`, its userfaultfd, and what it says.

use crate::{PAGE, binary, descriptors, is_readable, is_readable_within};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use postcopy::{ForeignRegion, Sharing};
use postcopy_proto::digest::Digest;
use rustix::process::PidfdFlags;
use std::io::{BufRead, BufReader, ErrorKind, IoSliceMut, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::Duration;
use tempfile::TempDir;

/// The features that Firecracker asks for.
pub const EVENT_REMOVE: u64 = 1 << 3;
/// The features that CRIU asks for: forks, remaps, removes, unmaps.
pub const ALL_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// Nothing that a process is told takes so long.
#[must_use]
pub fn patience() -> Duration {
    let seconds = std::env::var("POSTCOPY_PATIENCE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(40))
}

/// A thread of a process that does what it is told. The process ends, if this is its last, when it is dropped.
#[derive(Debug)]
pub struct Toucher {
    stream: BufReader<UnixStream>,
    /// Of its process.
    pub pid: u32,
}

impl Toucher {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("it connects");
        stream.set_read_timeout(Some(patience())).expect("a socket");
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).expect("it says who it is");
        Self { stream, pid: line.trim().parse().expect("a pid") }
    }

    /// Tells it what to do, without waiting for it.
    ///
    /// # Panics
    /// If it has ended.
    pub fn tell(&mut self, what: &str) {
        writeln!(self.stream.get_mut(), "{what}").expect("it listens");
    }

    /// What it answers to something it was told; None if it has ended instead.
    ///
    /// # Panics
    /// If nothing comes for a long time.
    pub fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                panic!("it hangs: no answer in {:?}", patience())
            }
            Ok(0) | Err(_) => None,
            Ok(_) => Some(line.trim().to_owned()),
        }
    }

    /// Whether it has answered, or has ended.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        is_readable(&self.stream)
    }

    /// Whether its process's first thread sleeps in this function of the kernel.
    #[must_use]
    pub fn sleeps_in(&self, function: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{}/wchan", self.pid)).is_ok_and(|name| name == function)
    }

    /// Tells it something, and gives its answer.
    ///
    /// # Panics
    /// If it has ended.
    pub fn ask(&mut self, what: &str) -> String {
        self.tell(what);
        self.answer().unwrap_or_else(|| panic!("{what}: it has ended"))
    }

    /// Has it do something that has no other answer.
    ///
    /// # Panics
    /// If it does not.
    pub fn does(&mut self, what: &str) {
        assert_eq!(self.ask(what), "done", "{what}");
    }

    /// Has it touch pages, and sees that they have these bytes.
    ///
    /// # Panics
    /// If they have not, or it dies of them.
    pub fn assert_reads(&mut self, address: usize, bytes: &[u8]) {
        assert!(bytes.len().is_multiple_of(PAGE), "whole pages");
        self.tell(&format!("read {address} {}", bytes.len() / PAGE));
        self.assert_answers(address, bytes);
    }

    /// Has it touch a page, sees that the page has these bytes, and returns the time that the touch took, by the process's
    /// own clock; None if it takes longer than `patience`.
    ///
    /// # Panics
    /// If the page has other bytes, or the process dies of it.
    pub fn timed_read(&mut self, address: usize, page: &[u8], patience: Duration) -> Option<Duration> {
        self.tell(&format!("timed-read {address}"));
        if !is_readable_within(&self.stream, patience) {
            return None;
        }
        let answer = self.answer().unwrap_or_else(|| panic!("it has died of the page at {address:#x}"));
        let (nanoseconds, digest) = answer.split_once(' ').expect("a time and a digest");
        assert_eq!(digest, page_digest(page), "the page at {address:#x}: other bytes");
        Some(Duration::from_nanos(nanoseconds.parse().expect("a time")))
    }

    /// Sees that the pages that it was told to touch have these bytes.
    ///
    /// # Panics
    /// As [`Toucher::assert_reads`].
    pub fn assert_answers(&mut self, address: usize, bytes: &[u8]) {
        let answer = self.answer().unwrap_or_else(|| panic!("it has died of the pages at {address:#x}"));
        let found: Vec<_> = answer.split_whitespace().collect();
        let expected: Vec<_> = bytes.chunks(PAGE).map(page_digest).collect();
        assert_eq!(found.len(), expected.len(), "{answer}");
        for (page, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let zero = if *found == page_digest(&[0; PAGE]) { ", and are zero" } else { "" };
            assert_eq!(found, expected, "page {page} of those at {address:#x}: other bytes{zero}");
        }
    }
}

/// Reads another process's memory as a debugger does, in the calling thread: a touch that needs nothing of that process.
///
/// # Errors
/// Whatever process_vm_readv(2) answers; EFAULT where nothing could be read.
pub fn read_from_outside(pid: u32, address: usize, len: usize) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let remote = [RemoteIoVec { base: address, len }];
    let read =
        process_vm_readv(Pid::from_raw(pid.cast_signed()), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// What a process says of a page of these bytes.
#[must_use]
pub fn page_digest(page: &[u8]) -> String {
    Digest::of(page).hex()[..16].to_owned()
}

/// A process, its first thread, and its userfaultfd. It and all that it has forked are killed when it is dropped.
#[derive(Debug)]
pub struct Faulter {
    child: Child,
    listener: UnixListener,
    _folder: TempDir,
    /// Its first thread.
    pub main: Toucher,
    uffd: Option<OwnedFd>,
    regions: Vec<(usize, usize)>,
    /// What it has forked, by pidfd.
    descendants: Vec<OwnedFd>,
}

impl Faulter {
    /// Starts a process with regions, each a kind of memory and how many pages, such as `private:100`, and takes its
    /// userfaultfd over.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(features: u64, regions: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).expect("a socket can be made");
        // Another one, of which something is known to be wrong, for `tests/planted`.
        let program =
            std::env::var_os("POSTCOPY_FAULTER").map_or_else(|| binary("postcopy-faulter"), Into::into);
        let mut command = Command::new(program);
        command.arg(&socket).arg(features.to_string()).args(regions);
        let child = command.spawn().expect("it starts");
        let (stream, _) = listener.accept().expect("it connects");
        let (uffd, text) = descriptors::receive(&stream);
        let regions = serde_json::from_str(&text).expect("addresses");
        stream.set_read_timeout(Some(patience())).expect("a socket");
        let main = Toucher { stream: BufReader::new(stream), pid: child.id() };
        Self { child, listener, _folder: folder, main, uffd: Some(uffd), regions, descendants: Vec::new() }
    }

    /// Its userfaultfd.
    ///
    /// # Panics
    /// After [`Faulter::let_go`].
    #[must_use]
    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_ref().expect("not let go of").as_fd()
    }

    /// Closes the userfaultfd here: a session is the only one that has it then.
    pub fn let_go(&mut self) {
        self.uffd = None;
    }

    /// The address of a page of its region `region`.
    #[must_use]
    pub fn at(&self, region: usize, page: usize) -> usize {
        self.regions[region].0 + page * PAGE
    }

    /// Its region `index`, to be filled from `path` from a byte on.
    #[must_use]
    pub fn region(&self, index: usize, path: &str, offset_bytes: u64) -> ForeignRegion {
        let (address, len) = self.regions[index];
        let (path, sharing) = (path.into(), Sharing::Private);
        ForeignRegion { address, len, page_bytes: PAGE, path, offset_bytes, sharing }
    }

    /// The same of memory of huge pages.
    #[must_use]
    pub fn huge_region(
        &self,
        index: usize,
        path: &str,
        offset_bytes: u64,
        sharing: Sharing,
    ) -> ForeignRegion {
        ForeignRegion { page_bytes: 2 << 20, sharing, ..self.region(index, path, offset_bytes) }
    }

    /// The same of shared memory, `object` by number.
    #[must_use]
    pub fn shared_region(&self, index: usize, path: &str, offset_bytes: u64, object: u32) -> ForeignRegion {
        ForeignRegion { sharing: Sharing::Shared(object), ..self.region(index, path, offset_bytes) }
    }

    /// As [`Toucher::assert_reads`], by region and page.
    ///
    /// # Panics
    /// As there.
    pub fn assert_reads(&mut self, region: usize, page: usize, bytes: &[u8]) {
        self.main.assert_reads(self.at(region, page), bytes);
    }

    /// Has a thread start another one, or fork: `thread` or `fork`.
    ///
    /// # Panics
    /// If it does not.
    pub fn start_another(&mut self, of: &mut Toucher, how: &str) -> Toucher {
        of.tell(how);
        self.started(of)
    }

    /// The other one that a thread was told to start.
    ///
    /// # Panics
    /// If it does not.
    pub fn started(&mut self, of: &mut Toucher) -> Toucher {
        started(&self.listener, &mut self.descendants, of)
    }

    /// Another thread of it.
    ///
    /// # Panics
    /// If it does not start.
    pub fn thread(&mut self) -> Toucher {
        self.main.tell("thread");
        started(&self.listener, &mut self.descendants, &mut self.main)
    }

    /// A child that the first thread forks.
    ///
    /// # Panics
    /// If it does not.
    pub fn fork(&mut self) -> Toucher {
        self.main.tell("fork");
        self.forked()
    }

    /// The child that the first thread was told to fork.
    ///
    /// # Panics
    /// If it does not.
    pub fn forked(&mut self) -> Toucher {
        started(&self.listener, &mut self.descendants, &mut self.main)
    }

    /// Ends it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The signal that it dies of.
    ///
    /// # Panics
    /// If it ends otherwise.
    #[must_use]
    pub fn dies_of(&mut self) -> i32 {
        let status = self.child.wait().expect("it is our child");
        status.signal().unwrap_or_else(|| panic!("it ended with {status}"))
    }
}

impl Drop for Faulter {
    fn drop(&mut self) {
        self.kill();
        for process in &self.descendants {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
    }
}

fn started(listener: &UnixListener, descendants: &mut Vec<OwnedFd>, of: &mut Toucher) -> Toucher {
    let other = Toucher::accept(listener);
    if other.pid != of.pid {
        let pid = rustix::process::Pid::from_raw(other.pid.cast_signed()).expect("a pid");
        // It may have ended already.
        descendants.extend(rustix::process::pidfd_open(pid, PidfdFlags::empty()));
    }
    assert_eq!(of.answer().as_deref(), Some("done"), "it has started another");
    other
}
