//! The least that a fault over a network takes: a raw TCP request and response, BLAKE3, UFFDIO_COPY.

use anyhow::{Context, Result, bail, ensure};
use postcopy::proto::digest::Digest;
use postcopy::proto::page::PAGE_BYTES;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Stdio};
use userfaultfd::{Event, UffdBuilder};

/// Serves pages of the file that is named by the environment, on loopback: a page's number as eight bytes, then the
/// page. Runs in a process of its own.
pub(crate) fn serve() -> Result<()> {
    let file = std::fs::read(std::env::var("FLOOR_FILE").context("FLOOR_FILE")?)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut request = [0; 8];
    while stream.read_exact(&mut request).is_ok() {
        let at = usize::try_from(u64::from_le_bytes(request))? * PAGE_BYTES;
        stream.write_all(&file[at..at + PAGE_BYTES])?;
    }
    Ok(())
}

/// A floor server, ended when dropped.
pub(crate) struct FloorServer {
    child: Child,
    address: String,
}

impl FloorServer {
    pub(crate) fn start(core: usize, file: &std::path::Path) -> Result<Self> {
        let mut command = crate::cpu::pinned(core, &std::env::current_exe()?);
        let mut child = command.arg("floor-server").env("FLOOR_FILE", file).stdout(Stdio::piped()).spawn()?;
        let mut address = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut address)?;
        Ok(Self { child, address: address.trim().to_owned() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory of `digests.len()` pages that this server fills, and the thread that does it.
    pub(crate) fn map(&self, digests: Vec<Digest>) -> Result<FloorRegion> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        fill_on_touch(digests.len(), move |index, page| {
            stream.write_all(&(index as u64).to_le_bytes())?;
            stream.read_exact(page)?;
            ensure!(Digest::of(page) == digests[index], "a wrong page");
            Ok(())
        })
    }
}

/// Memory of so many pages, each of which is made when it is touched, by a thread.
pub(crate) fn fill_on_touch(
    pages: usize,
    mut fill: impl FnMut(usize, &mut [u8; PAGE_BYTES]) -> Result<()> + Send + 'static,
) -> Result<FloorRegion> {
    let len = pages * PAGE_BYTES;
    let memory = Memory::reserve(len)?;
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create()?;
    uffd.register(memory.start, len)?;
    let start = memory.start.addr();
    let (stop, stopped) = std::os::unix::net::UnixStream::pair()?;
    let pager = std::thread::spawn(move || -> Result<()> {
        let (mut page, uffd_fd) = ([0u8; PAGE_BYTES], Fd(&uffd));
        loop {
            let mut ready = [PollFd::new(&uffd_fd, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
            poll(&mut ready, None)?;
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            while let Some(event) = uffd.read_event()? {
                let Event::Pagefault { addr, .. } = event else { bail!("an event that was not asked for") };
                let index = (addr.addr() - start) / PAGE_BYTES;
                fill(index, &mut page)?;
                let source = page.as_ptr().cast();
                copy(&uffd, source, std::ptr::with_exposed_provenance_mut(start + index * PAGE_BYTES))?;
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

#[expect(unsafe_code, reason = "UFFDIO_COPY")]
fn copy(
    uffd: &userfaultfd::Uffd,
    source: *const std::ffi::c_void,
    target: *mut std::ffi::c_void,
) -> Result<()> {
    // SAFETY: `source` is a page that is borrowed by the caller, `target` a registered page.
    unsafe { uffd.copy(source, target, PAGE_BYTES, true) }?;
    Ok(())
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
        copy_piece(&uffd, piece, memory.start.wrapping_byte_add(i * piece_bytes))?;
    }
    Ok(started.elapsed())
}

#[expect(unsafe_code, reason = "UFFDIO_COPY")]
fn copy_piece(uffd: &userfaultfd::Uffd, piece: &[u8], target: *mut std::ffi::c_void) -> Result<()> {
    // SAFETY: `target` is registered, and nobody borrows from it.
    unsafe { uffd.copy(piece.as_ptr().cast(), target, piece.len(), true) }?;
    Ok(())
}
