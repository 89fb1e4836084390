//! What outlives a pager: a process that shares its table of descriptors with the one that serves, and starts another
//! one when that has died.
//!
//! `postcopy-keeper SOCKET` gets a userfaultfd over the socket, with a line of JSON: `[server, reference, [fill, working set, record, track, alone, kill],
//! [[address, length, page size, path, offset, shared object or null]…], pid]`. It gives back the state file, says `worker PID` for each process that it starts to serve this, and
//! `ended` when one has ended in order, or alone in any way but by a signal, which is `killed`. Asked for `changes` the one that serves answers with these, `[written, removed]`.

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use postcopy::state_file::StateError;
use postcopy::{ForeignMemory, ForeignRegion, LossPolicy, Options, Session, SessionError, Sharing};
use postcopy_tests::descriptors;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const STACK_BYTES: usize = 8 << 20;
/// How often it is looked whether something is asked for.
const LOOK: Duration = Duration::from_millis(5);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// What is to be served.
struct Work {
    uffd: OwnedFd,
    state: File,
    server: String,
    reference: String,
    fill: bool,
    working_set: bool,
    record: bool,
    track: bool,
    alone: bool,
    kill: bool,
    regions: Vec<ForeignRegion>,
    pid: u32,
}

impl Work {
    fn session(&self) -> Result<Session> {
        let address = self.server.parse()?;
        #[expect(unsafe_code, reason = "descriptors by number")]
        let by_number = |fd: RawFd| {
            // SAFETY: the keeper has left those open that the state file names, and nobody closes them.
            Some(unsafe { BorrowedFd::borrow_raw(fd) })
        };
        let state = Some(&self.state).filter(|_| !self.alone);
        match state.map(|state| Session::resume(&address, &[], state, by_number)) {
            None | Some(Err(SessionError::State(StateError::Empty))) => {}
            Some(resumed) => return Ok(resumed?),
        }
        let options = Options::DEFAULT
            .fill(self.fill)
            .working_set(self.working_set)
            .record(self.record)
            .fault_deadline(Duration::from_secs(if self.kill { 1 } else { 20 }))
            .on_loss(if self.kill { LossPolicy::Kill } else { LossPolicy::Poison })
            .track_writes(self.track);
        let memory = ForeignMemory {
            uffd: self.uffd.as_fd(),
            regions: &self.regions,
            state,
            pid: Some(self.pid),
            is_registered: true,
        };
        Ok(Session::attach(&address, &self.reference.parse()?, options, &memory)?)
    }

    fn serve(&self, socket: &UnixStream) -> i32 {
        let served = self.session().and_then(|session| {
            while !session.wait_end(if self.track { LOOK } else { YEAR }) {
                answer(socket, &session)?;
            }
            Ok(session.error())
        });
        match served {
            Ok(None) => 0,
            Ok(Some(error)) => {
                eprintln!("keeper: the session has ended: {error}");
                1
            }
            Err(error) => {
                eprintln!("keeper: {error:#}");
                1
            }
        }
    }

    /// Starts a process that serves, and waits for its end.
    fn run(&self, socket: &mut UnixStream) -> Result<WaitStatus> {
        let mut stack = vec![0; STACK_BYTES];
        let asked = socket.try_clone()?;
        let work = Box::new(|| {
            let code = self.serve(&asked);
            #[expect(unsafe_code, reason = "the end of all threads, with this status")]
            // SAFETY: nothing is to be run or flushed. Returning would end this thread alone, and the process with what
            // its last thread ends with.
            unsafe {
                libc::_exit(code)
            }
        });
        #[expect(unsafe_code, reason = "a process that shares the table of descriptors")]
        // SAFETY: this process has one thread, and its child memory of its own.
        let worker =
            unsafe { nix::sched::clone(work, &mut stack, CloneFlags::CLONE_FILES, Some(libc::SIGCHLD)) };
        let worker = worker?;
        writeln!(socket, "worker {worker}")?;
        loop {
            match waitpid(worker, None) {
                Err(nix::Error::EINTR) => {}
                Err(error) => bail!("waiting for the worker: {error}"),
                Ok(status) => return Ok(status),
            }
        }
    }

    /// Closes what a worker has left behind, but for what its successor needs.
    fn close_leftovers(&self, socket: &UnixStream) -> Result<()> {
        let mut keep: BTreeSet<RawFd> = [0, 1, 2].into();
        keep.extend([self.uffd.as_raw_fd(), self.state.as_raw_fd(), socket.as_raw_fd()]);
        match postcopy::state_file::descriptors(&self.state) {
            Ok(listed) => keep.extend(listed),
            Err(StateError::Empty) => {}
            Err(error) => return Err(error.into()),
        }
        let open = std::fs::read_dir("/proc/self/fd")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let open: Vec<RawFd> = open.collect();
        for fd in open.into_iter().filter(|fd| !keep.contains(fd)) {
            #[expect(
                unsafe_code,
                reason = "descriptors that a process which died has left in the common table"
            )]
            // SAFETY: nobody here owns it; closing the one that listed the directory again does nothing.
            let _ = unsafe { libc::close(fd) };
        }
        Ok(())
    }
}

/// Tells what has changed, if it is asked for.
fn answer(mut socket: &UnixStream, session: &Session) -> Result<()> {
    socket.set_nonblocking(true)?;
    let asked = std::io::Read::read(&mut socket, &mut [0; 16]);
    socket.set_nonblocking(false)?;
    if asked.is_ok_and(|bytes| bytes > 0) {
        let changes = session.take_changes()?;
        writeln!(socket, "changes {}", serde_json::to_string(&(changes.written, changes.removed))?)?;
    }
    Ok(())
}

/// See [`postcopy_tests::stopped_pager::StoppedPager::call_instead`].
fn in_place_of_another() {
    panic!("in place of another function");
}

fn main() -> Result<()> {
    let mut socket = UnixStream::connect(std::env::args().nth(1).context("SOCKET")?)?;
    let (uffd, _) = descriptors::receive(&socket);
    // A list of 10,000 regions does not fit beside a descriptor. Nothing follows it before the answer.
    let mut text = String::new();
    BufReader::new(&socket).read_line(&mut text)?;
    let (server, reference, (fill, working_set, record, track, alone, kill), regions, pid) =
        serde_json::from_str(&text)?;
    /// Address, length, page size, path, offset, shared object.
    type Region = (usize, usize, usize, String, u64, Option<u32>);
    let regions: Vec<Region> = regions;
    let region = |(address, len, page_bytes, path, offset_bytes, object): Region| {
        let (path, sharing) = (String::into_bytes(path), object.map_or(Sharing::Private, Sharing::Shared));
        ForeignRegion { address, len, page_bytes, path, offset_bytes, sharing }
    };
    let state: File = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    let regions = regions.into_iter().map(region).collect();
    descriptors::send(&socket, state.as_fd(), "state");
    let work =
        Work { uffd, state, server, reference, fill, working_set, record, track, alone, kill, regions, pid };
    // Tests have a pager call it: kept, though nobody here does.
    std::hint::black_box(in_place_of_another as fn());
    loop {
        let end = match work.run(&mut socket)? {
            WaitStatus::Exited(_, 0) => "ended",
            WaitStatus::Exited(..) if work.alone => "ended",
            _ if work.alone => "killed",
            _ => {
                work.close_leftovers(&socket)?;
                continue;
            }
        };
        return Ok(writeln!(socket, "{end}")?);
    }
}
