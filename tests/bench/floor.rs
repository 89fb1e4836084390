//! The least that a fault over a network takes: a raw TCP request and response, zstd where it is compressed, BLAKE3, UFFDIO_COPY.

use anyhow::{Context, Result, bail, ensure};
use postcopy::proto::digest::Digest;
use postcopy::proto::page::PAGE_BYTES;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use userfaultfd::{Event, UffdBuilder};

/// What images are pushed with.
const LEVEL: i32 = 3;

/// Serves units of the file that is named by the environment, on loopback: a unit's number as eight bytes, then its length
/// as four, and the unit. Those that are longer than a page are compressed. Runs in a process of its own.
pub(crate) fn serve() -> Result<()> {
    let file = std::fs::read(std::env::var("FLOOR_FILE").context("FLOOR_FILE")?)?;
    let unit_bytes: usize = std::env::var("FLOOR_UNIT_BYTES").context("FLOOR_UNIT_BYTES")?.parse()?;
    let answer = |unit: &[u8]| -> Result<Vec<u8>> {
        let compressed =
            if unit_bytes > PAGE_BYTES { zstd::bulk::compress(unit, LEVEL)? } else { unit.to_vec() };
        Ok([&u32::try_from(compressed.len())?.to_le_bytes()[..], &compressed].concat())
    };
    let answers = file.chunks_exact(unit_bytes).map(answer).collect::<Result<Vec<_>>>()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    // One connection at a time, until it is killed.
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut requests = BufReader::new(stream.try_clone()?);
        let mut request = [0; 8];
        while requests.read_exact(&mut request).is_ok() {
            stream.write_all(&answers[usize::try_from(u64::from_le_bytes(request))?])?;
        }
    }
}

/// Receives what the server sends, into `answer`, which is kept from one to the next.
fn receive(stream: &mut impl Read, answer: &mut Vec<u8>) -> Result<()> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    answer.resize(usize::try_from(u32::from_le_bytes(len))?, 0);
    Ok(stream.read_exact(answer)?)
}

/// A floor server, ended when dropped.
pub(crate) struct FloorServer {
    child: Child,
    address: String,
}

impl FloorServer {
    /// Serves a file in units of `unit_bytes`, by that core.
    pub(crate) fn start(core: Option<usize>, file: &std::path::Path, unit_bytes: usize) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command =
            core.map_or_else(|| Command::new(&program), |core| crate::cpu::pinned(core, &program));
        command.arg("floor-server").env("FLOOR_FILE", file).env("FLOOR_UNIT_BYTES", unit_bytes.to_string());
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut address)?;
        Ok(Self { child, address: address.trim().to_owned() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Memory of `digests.len()` units that this server fills, and the thread that does it.
    pub(crate) fn map(&self, digests: Vec<Digest>, unit_bytes: usize) -> Result<FloorRegion> {
        let mut stream = self.connect()?;
        let (mut answer, mut zstd) = (Vec::new(), zstd::bulk::Decompressor::new()?);
        fill_on_touch(digests.len(), unit_bytes, move |index, unit| {
            stream.write_all(&(index as u64).to_le_bytes())?;
            if unit_bytes > PAGE_BYTES {
                receive(&mut stream, &mut answer)?;
                zstd.decompress_to_buffer(&answer, unit)?;
            } else {
                let mut len = [0; 4];
                stream.read_exact(&mut len)?;
                stream.read_exact(unit)?;
            }
            ensure!(Digest::of(unit) == digests[index], "a wrong page");
            Ok(())
        })
    }

    /// Fetches these units, so many being under way at a time: how many a second.
    pub(crate) fn fetch(&self, units: &[usize], at_a_time: usize) -> Result<f64> {
        let mut stream = self.connect()?;
        let mut answers = BufReader::with_capacity(64 << 10, stream.try_clone()?);
        let mut answer = Vec::new();
        let started = std::time::Instant::now();
        let mut requests = units.iter().map(|unit| (*unit as u64).to_le_bytes());
        let first: Vec<u8> = requests.by_ref().take(at_a_time).flatten().collect();
        stream.write_all(&first)?;
        for _ in units {
            receive(&mut answers, &mut answer)?;
            if let Some(request) = requests.next() {
                stream.write_all(&request)?;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let count = units.len() as f64;
        Ok(count / started.elapsed().as_secs_f64())
    }
}

/// Memory of so many units, each of which is made when it is touched, by a thread.
pub(crate) fn fill_on_touch(
    units: usize,
    unit_bytes: usize,
    mut fill: impl FnMut(usize, &mut [u8]) -> Result<()> + Send + 'static,
) -> Result<FloorRegion> {
    let len = units * unit_bytes;
    let memory = Memory::reserve(len)?;
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create()?;
    uffd.register(memory.start, len)?;
    let start = memory.start.addr();
    let (stop, stopped) = std::os::unix::net::UnixStream::pair()?;
    let pager = std::thread::spawn(move || -> Result<()> {
        let (mut unit, uffd_fd) = (vec![0; unit_bytes], Fd(&uffd));
        loop {
            let mut ready = [PollFd::new(&uffd_fd, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
            poll(&mut ready, None)?;
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            while let Some(event) = uffd.read_event()? {
                let Event::Pagefault { addr, .. } = event else { bail!("an event that was not asked for") };
                let index = (addr.addr() - start) / unit_bytes;
                fill(index, &mut unit)?;
                copy(&uffd, &unit, std::ptr::with_exposed_provenance_mut(start + index * unit_bytes))?;
            }
        }
    });
    Ok(FloorRegion { memory, stop: Some(stop), pager: Some(pager) })
}

struct Fd<'a>(&'a userfaultfd::Uffd);

impl std::os::fd::AsFd for Fd<'_> {
    #[expect(unsafe_code, reason = "the userfaultfd crate does not give a borrowed descriptor")]
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the Uffd owns the descriptor and outlives the borrow.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl Drop for FloorServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Anonymous memory, unmapped when dropped.
struct Memory {
    start: *mut std::ffi::c_void,
    len: usize,
}

impl Memory {
    #[expect(unsafe_code, reason = "a mapping")]
    fn reserve(len: usize) -> Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        start.expose_provenance();
        Ok(Self { start, len })
    }
}

impl Drop for Memory {
    #[expect(unsafe_code, reason = "a mapping")]
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

/// Memory that a floor server fills.
pub(crate) struct FloorRegion {
    memory: Memory,
    stop: Option<std::os::unix::net::UnixStream>,
    pager: Option<std::thread::JoinHandle<Result<()>>>,
}

impl FloorRegion {
    #[expect(unsafe_code, reason = "reading the mapping")]
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives; pages do not change once they are there.
        unsafe { std::slice::from_raw_parts(self.memory.start.cast::<u8>(), self.memory.len) }
    }
}

impl Drop for FloorRegion {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(pager) = self.pager.take() {
            let _ = pager.join();
        }
    }
}

/// How long UFFDIO_COPY alone takes to fill a region of that length, so many bytes at a time.
pub(crate) fn copy_alone(bytes: &[u8], piece_bytes: usize) -> Result<std::time::Duration> {
    let memory = Memory::reserve(bytes.len())?;
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create()?;
    uffd.register(memory.start, bytes.len())?;
    let started = std::time::Instant::now();
    for (i, piece) in bytes.chunks_exact(piece_bytes).enumerate() {
        copy(&uffd, piece, memory.start.wrapping_byte_add(i * piece_bytes))?;
    }
    Ok(started.elapsed())
}

#[expect(unsafe_code, reason = "UFFDIO_COPY")]
fn copy(uffd: &userfaultfd::Uffd, piece: &[u8], target: *mut std::ffi::c_void) -> Result<()> {
    // SAFETY: `target` is registered, and nobody borrows from it.
    unsafe { uffd.copy(piece.as_ptr().cast(), target, piece.len(), true) }?;
    Ok(())
}
