//! A process whose memory is filled from here: `postcopy-faulter`, its userfaultfd, and what it says.

use crate::binary;
use postcopy::ForeignRegion;
use postcopy_proto::digest::Digest;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::{BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The features that Firecracker asks for.
pub const EVENT_REMOVE: u64 = 1 << 3;

/// See the module. Killed when dropped.
#[derive(Debug)]
pub struct Faulter {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    uffd: Option<OwnedFd>,
    regions: Vec<(usize, usize)>,
}

impl Faulter {
    /// Starts a process with regions of so many pages, and takes its userfaultfd over.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(features: u64, pages: &[usize]) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).expect("a socket can be made");
        let mut command = Command::new(binary("postcopy-faulter"));
        command.arg(&socket).arg(features.to_string()).args(pages.iter().map(ToString::to_string));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let (peer, _) = listener.accept().expect("it connects");
        let (mut bytes, mut space) = ([0; 4096], [std::mem::MaybeUninit::uninit(); 64]);
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &peer,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let received = received.expect("it sends").bytes;
        let mut fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let uffd = fds.next().and_then(|mut fds| fds.next()).expect("a descriptor");
        let regions = serde_json::from_slice(&bytes[..received]).expect("addresses");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, stdin, stdout, uffd: Some(uffd), regions }
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

    /// Its region `index`, to be filled from `path` from a byte on.
    #[must_use]
    pub fn region(&self, index: usize, path: &str, offset_bytes: u64) -> ForeignRegion {
        let (address, len) = self.regions[index];
        ForeignRegion { address, len, path: path.into(), offset_bytes }
    }

    /// Tells it what to do, without waiting for it.
    ///
    /// # Panics
    /// If it has ended.
    pub fn tell(&mut self, what: &str) {
        writeln!(self.stdin, "{what}").expect("it listens");
    }

    /// What it answers to something it was told; None if it has ended instead.
    pub fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line).unwrap_or(0);
        (read > 0).then(|| line.trim().to_owned())
    }

    /// Has it touch pages, and sees that they have these bytes.
    ///
    /// # Panics
    /// If they have not, or it dies of them.
    pub fn assert_reads(&mut self, region: usize, page: usize, bytes: &[u8]) {
        assert!(bytes.len().is_multiple_of(4096), "whole pages");
        self.tell(&format!("read {region} {page} {}", bytes.len() / 4096));
        let answer = self.answer();
        assert_eq!(answer, Some(Digest::of(bytes).hex()), "region {region}, page {page}");
    }

    /// Has it do something other than reading.
    ///
    /// # Panics
    /// If it does not.
    pub fn does(&mut self, what: &str) {
        self.tell(what);
        assert_eq!(self.answer().as_deref(), Some("done"), "{what}");
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
    }
}
