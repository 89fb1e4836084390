//! A process whose memory others fill: what Firecracker and CRIU are to a handler, and told line by line what to do.
//!
//! `postcopy-faulter SOCKET FEATURES KIND:PAGES…` maps a region for each of these, registers all with one userfaultfd
//! that asks for these features, and sends that over the socket, with a JSON array of `[address, length]`. Then it
//! does what it reads from the socket, answering each line; `error` and an errno where the kernel refuses. Addresses
//! and numbers are decimal, COUNT is in pages of 4 KiB:
//!
//! | | |
//! |---|---|
//! | `read ADDRESS COUNT` | the beginning of each page's BLAKE3 digest |
//! | `timed-read ADDRESS` | the nanoseconds that reading that page took, and its digest's beginning |
//! | `kernel-read ADDRESS COUNT` | the same, of what write(2) takes from there |
//! | `write ADDRESS COUNT BYTE`, `kernel-write …` | `done`: by stores, or by read(2) |
//! | `add ADDRESS` | the former value of the u64 there, one is added atomically |
//! | `advise ADVICE ADDRESS COUNT` | `done`: madvise, by number |
//! | `advise-often ADVICE ADDRESS COUNT TIMES` | `done`: the same, so many times |
//! | `advise-each ADVICE ADDRESS COUNT` | `done`: the same for each page, one after another |
//! | `unmap ADDRESS COUNT`, `cover ADDRESS COUNT` | `done`: munmap, or new memory mapped over it |
//! | `remap ADDRESS COUNT NEW_COUNT FLAGS TO` | the new address: mremap, to a fixed address if that is not 0 |
//! | `populate COUNT` | `done`: so much private memory is there, which no userfaultfd has |
//! | `mappings COUNT` | `done`: there are so many mappings more, which no userfaultfd has |
//! | `reserve COUNT` | the address of so much that is mapped nowhere |
//! | `reap` | `done`: children that exit leave their pids at once |
//! | `fork`, `thread` | `done`: the child, or the thread, connects to the socket and says its pid |
//! | `dump-to FOLDER` | `done`: a core dump goes there |
//! | `open SERVER IMAGE FILL SET RECORD` | the address of its file `mem`: this process's own session fills it, and tracks writes |
//! | `changes` | what has been written to and removed there since this was last asked for |
//! | `exit`, `abort` | nothing |

use anyhow::{Context, Result, bail};
use nix::libc;
use postcopy::proto::digest::Digest;
use postcopy::{Options, Region, Session};
use postcopy_tests::{PAGE, descriptors};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;
use userfaultfd::{FeatureFlags, UffdBuilder};

const HUGE: usize = 2 << 20;

fn pointer(address: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

/// Memory of a kind, so many bytes at an address. `again` maps the last memfd another time, `file=PATH` a new file, shared.
#[expect(unsafe_code, reason = "mappings that live as long as the process")]
fn map(kind: &str, len: usize, last: &mut Option<OwnedFd>) -> Result<usize> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let (sharing, huge) = match kind {
        "private" | "memfd-private" => (MapFlags::PRIVATE, false),
        "shared" | "memfd" | "again" => (MapFlags::SHARED, false),
        file if file.starts_with("file=") => (MapFlags::SHARED, false),
        "huge" => (MapFlags::PRIVATE, true),
        "huge-shared" => (MapFlags::SHARED, true),
        _ => bail!("{kind} is no kind of memory"),
    };
    let huge = if huge { MapFlags::HUGETLB } else { MapFlags::empty() };
    let flags = sharing | huge | MapFlags::NORESERVE;
    if kind.starts_with("memfd") {
        *last = Some(memfd(len)?);
    }
    if let Some(path) = kind.strip_prefix("file=") {
        let file = std::fs::File::create_new(path)?;
        file.set_len(len as u64)?;
        *last = Some(std::fs::File::options().read(true).write(true).open(path)?.into());
    }
    let start = if kind.starts_with("memfd") || kind == "again" || kind.starts_with("file=") {
        let file = last.as_ref().context("a memfd to be mapped again")?;
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }?
    } else {
        // SAFETY: as above.
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?
    };
    Ok(start.expose_provenance())
}

fn memfd(len: usize) -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, len as u64)?;
    Ok(file)
}

/// The bytes at an address, which the caller knows to be mapped.
#[expect(unsafe_code, reason = "memory that another process fills")]
fn bytes(address: usize, len: usize) -> &'static [u8] {
    // SAFETY: whoever tells this process what to do knows what is mapped, and that nobody else writes there now.
    unsafe { std::slice::from_raw_parts(pointer(address).cast::<u8>(), len) }
}

#[expect(unsafe_code, reason = "memory that another process fills")]
fn bytes_mut(address: usize, len: usize) -> &'static mut [u8] {
    // SAFETY: as in `bytes`.
    unsafe { std::slice::from_raw_parts_mut(pointer(address).cast::<u8>(), len) }
}

fn digests(bytes: &[u8]) -> String {
    let digest = |page: &[u8]| Digest::of(page).hex()[..16].to_owned();
    bytes.chunks(PAGE).map(digest).collect::<Vec<_>>().join(" ")
}

#[expect(unsafe_code, reason = "memory that another process fills")]
fn timed_read(address: usize) -> String {
    let started = Instant::now();
    // SAFETY: as in `bytes`. Volatile, so that it is between the two readings of the clock.
    unsafe { pointer(address).cast::<u8>().read_volatile() };
    let took = started.elapsed();
    format!("{} {}", took.as_nanos(), digests(bytes(address, PAGE)))
}

fn kernel_read(address: usize, len: usize) -> Result<String> {
    let file = memfd(0)?;
    let mut done = 0;
    while done < len {
        done += rustix::io::pwrite(&file, bytes(address + done, len - done), done as u64)?;
    }
    let mut copy = vec![0; len];
    rustix::io::pread(&file, &mut copy, 0)?;
    Ok(digests(&copy))
}

fn kernel_write(address: usize, len: usize, byte: u8) -> Result<()> {
    let file = memfd(0)?;
    rustix::io::pwrite(&file, &vec![byte; len], 0)?;
    let mut done = 0;
    while done < len {
        done += rustix::io::pread(&file, bytes_mut(address + done, len - done), done as u64)?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "memory that another process fills")]
fn add(address: usize) -> u64 {
    // SAFETY: as in `bytes`, and aligned.
    let value = unsafe { AtomicU64::from_ptr(pointer(address).cast()) };
    value.fetch_add(1, Ordering::AcqRel)
}

#[expect(unsafe_code, reason = "mappings of our own")]
fn advise(address: usize, len: usize, advice: i32) -> Result<()> {
    // SAFETY: nobody borrows from the range; the caller knows what becomes of it.
    let answer = unsafe { libc::madvise(pointer(address), len, advice) };
    if answer == -1 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "mappings of our own")]
fn unmap(address: usize, len: usize) -> Result<()> {
    // SAFETY: nobody borrows from the range.
    Ok(unsafe { rustix::mm::munmap(pointer(address), len) }?)
}

#[expect(unsafe_code, reason = "mappings of our own")]
fn cover(address: usize, len: usize) -> Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED;
    // SAFETY: nobody borrows from the range.
    unsafe { rustix::mm::mmap_anonymous(pointer(address), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    Ok(())
}

#[expect(unsafe_code, reason = "mappings of our own")]
fn remap(address: usize, len: usize, new_len: usize, flags: i32, to: usize) -> Result<usize> {
    let flags = flags | if to == 0 { 0 } else { libc::MREMAP_FIXED };
    // SAFETY: nobody borrows from either range.
    let answer = unsafe { libc::mremap(pointer(address), len, new_len, flags, pointer(to)) };
    if answer == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(answer.expose_provenance())
}

/// Addresses where nothing is, and where the kernel will put nothing by itself.
#[expect(unsafe_code, reason = "a mapping of our own")]
fn reserve(len: usize) -> Result<usize> {
    // SAFETY: a new mapping, placed by the kernel where nothing is.
    let start = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)
    }?;
    Ok(start.expose_provenance())
}

/// Memory in pages of 4 KiB, written to.
fn populate(len: usize) -> Result<()> {
    let start = map("private", len, &mut None)?;
    const NOHUGEPAGE: i32 = 15;
    advise(start, len, NOHUGEPAGE)?;
    (start..start + len).step_by(PAGE).for_each(|page| bytes_mut(page, 1)[0] = 1);
    Ok(())
}

/// So many mappings: the kernel merges none that have other rights than their neighbours.
#[expect(unsafe_code, reason = "mappings of our own")]
fn mappings(count: usize) -> Result<()> {
    let start = reserve(count * PAGE)?;
    for page in (start..start + count * PAGE).step_by(2 * PAGE) {
        // SAFETY: nobody uses the page.
        unsafe { rustix::mm::mprotect(pointer(page), PAGE, rustix::mm::MprotectFlags::READ) }?;
    }
    Ok(())
}

/// Forks. The child does only what it is told.
#[expect(unsafe_code, reason = "fork")]
fn fork(socket: &Path) -> Result<()> {
    // SAFETY: the child uses only the allocator and system calls, which may be used after a fork here.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { .. } => Ok(()),
        nix::unistd::ForkResult::Child => {
            // Or nobody would see that the parent has ended.
            // SAFETY: nobody uses them again: this process leaves by _exit.
            unsafe { libc::close_range(3, u32::MAX, 0) };
            let status = i32::from(connect(socket).and_then(|stream| serve(&stream, socket)).is_err());
            // SAFETY: ends the process; nothing of the parent's is to be run or flushed.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Has the kernel reap children itself, so that new processes may get their pids.
#[expect(unsafe_code, reason = "signal(2)")]
fn reap() -> Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler runs.
    Ok(unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.map(drop)?)
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{}", std::process::id())?;
    Ok(stream)
}

/// Does what it is told until there is nothing more.
fn serve(stream: &UnixStream, socket: &Path) -> Result<()> {
    let mut out = stream;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let answer = match obey(&line, socket) {
            Ok(answer) => answer,
            Err(error) => match error.downcast::<std::io::Error>() {
                Ok(error) => format!("error {}", error.raw_os_error().unwrap_or(0)),
                Err(error) => match error.downcast::<rustix::io::Errno>() {
                    Ok(errno) => format!("error {}", errno.raw_os_error()),
                    Err(error) => return Err(error.context(line)),
                },
            },
        };
        out.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn obey(line: &str, socket: &Path) -> Result<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let number = |i: usize| -> Result<usize> { Ok(words.get(i).context("a number is missing")?.parse()?) };
    let pages = |i: usize| -> Result<usize> { Ok(number(i)? * PAGE) };
    let done = || "done".to_owned();
    Ok(match words[0] {
        "read" => digests(bytes(number(1)?, pages(2)?)),
        "timed-read" => timed_read(number(1)?),
        "kernel-read" => kernel_read(number(1)?, pages(2)?)?,
        "write" => {
            bytes_mut(number(1)?, pages(2)?).fill(u8::try_from(number(3)?)?);
            done()
        }
        "kernel-write" => kernel_write(number(1)?, pages(2)?, u8::try_from(number(3)?)?).map(|()| done())?,
        "add" => add(number(1)?).to_string(),
        "advise" => advise(number(2)?, pages(3)?, i32::try_from(number(1)?)?).map(|()| done())?,
        "advise-often" => {
            let advice = i32::try_from(number(1)?)?;
            (0..number(4)?).try_for_each(|_| advise(number(2)?, pages(3)?, advice)).map(|()| done())?
        }
        "advise-each" => {
            let (start, advice) = (number(2)?, i32::try_from(number(1)?)?);
            (0..number(3)?).try_for_each(|page| advise(start + page * PAGE, PAGE, advice)).map(|()| done())?
        }
        // Gives pages back for ever, without a pause, in a thread of its own.
        "storm" => {
            let (start, len) = (number(1)?, pages(2)?);
            std::thread::Builder::new()
                .spawn(move || while advise(start, len, libc::MADV_DONTNEED).is_ok() {})?;
            done()
        }
        // The same, and accesses each page again.
        "churn" => {
            let (start, len) = (number(1)?, pages(2)?);
            let churn = move || {
                while advise(start, len, libc::MADV_DONTNEED).is_ok() {
                    std::hint::black_box(bytes(start, len).iter().step_by(PAGE).max());
                }
            };
            std::thread::Builder::new().spawn(churn)?;
            done()
        }
        // Moves pages between two places for ever, without a pause, in a thread of its own.
        "shuttle" => {
            let (mut from, len) = (number(1)?, pages(2)?);
            let mut to = reserve(len)?;
            std::thread::Builder::new().spawn(move || {
                while remap(from, len, len, libc::MREMAP_MAYMOVE, to).is_ok() {
                    std::mem::swap(&mut from, &mut to);
                    MOVES.fetch_add(1, Ordering::Relaxed);
                }
            })?;
            done()
        }
        "moves" => MOVES.load(Ordering::Relaxed).to_string(),
        "unmap" => unmap(number(1)?, pages(2)?).map(|()| done())?,
        "cover" => cover(number(1)?, pages(2)?).map(|()| done())?,
        "remap" => {
            remap(number(1)?, pages(2)?, pages(3)?, i32::try_from(number(4)?)?, number(5)?)?.to_string()
        }
        "populate" => populate(pages(1)?).map(|()| done())?,
        "mappings" => mappings(number(1)?).map(|()| done())?,
        "reserve" => reserve(pages(1)?)?.to_string(),
        "reap" => reap().map(|()| done())?,
        "fork" => fork(socket).map(|()| done())?,
        "thread" => {
            let socket = socket.to_owned();
            std::thread::Builder::new().spawn(move || serve(&connect(&socket)?, &socket))?;
            done()
        }
        "dump-to" => {
            std::env::set_current_dir(words.get(1).context("FOLDER")?)?;
            let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
            let limit = rustix::process::Rlimit { current: limit.maximum, ..limit };
            rustix::process::setrlimit(rustix::process::Resource::Core, limit)?;
            done()
        }
        "open" => open(words[1], words[2], [3, 4, 5].map(|word| words[word] == "true"))?.to_string(),
        "changes" => {
            let region = &OWN.get().context("nothing was opened")?.1;
            let changes = region.take_changes()?;
            serde_json::to_string(&(changes.written, changes.removed))?
        }
        "exit" => std::process::exit(0),
        "abort" => std::process::abort(),
        other => bail!("{other} is not known"),
    })
}

/// The number of moves by the threads of `shuttle`.
static MOVES: AtomicUsize = AtomicUsize::new(0);

/// What this process fills itself, as long as it lives.
static OWN: OnceLock<(Session, Region)> = OnceLock::new();

fn open(server: &str, image: &str, [fill, working_set, record]: [bool; 3]) -> Result<usize> {
    let options = Options::DEFAULT.fill(fill).working_set(working_set).record(record).track_writes(true);
    let session = Session::open(&server.parse()?, &image.parse()?, options)?;
    let region = session.map("mem")?;
    Ok(OWN.get_or_init(|| (session, region)).1.as_ptr().expose_provenance())
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let socket = PathBuf::from(args.next().context("SOCKET")?);
    let features = FeatureFlags::from_bits_retain(args.next().context("FEATURES")?.parse()?);
    let (mut regions, mut last) = (Vec::new(), None);
    for region in args {
        let (kind, pages) = region.split_once(':').context("KIND:PAGES")?;
        let len = pages.parse::<usize>()? * PAGE;
        if kind.starts_with("huge") && !len.is_multiple_of(HUGE) {
            bail!("{len} bytes are no whole pages of 2 MiB");
        }
        regions.push((map(kind, len, &mut last)?, len));
    }
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(false).user_mode_only(false).require_features(features);
    let uffd = builder.create()?;
    for (address, len) in &regions {
        uffd.register(pointer(*address), *len)?;
    }
    let stream = UnixStream::connect(&socket)?;
    #[expect(unsafe_code, reason = "the userfaultfd crate does not give a borrowed descriptor")]
    // SAFETY: `uffd` owns it, and outlives the borrow.
    let descriptor = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
    descriptors::send(&stream, descriptor, &serde_json::to_string(&regions)?);
    // Whoever has it now is to be the only one.
    drop(uffd);
    serve(&stream, &socket)
}
