//! Touches that are no loads and stores of the program's own: the kernel's on its behalf, and those of others.

use crate::session::Source;
use io_uring::{IoUring, opcode, types};
use nix::libc;
use postcopy::{ForeignMemory, Options, Region, Session};
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::{PAGE, is_root, skip};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 32;
const WATCHDOG: Duration = Duration::from_secs(100);

fn start() -> Source {
    Source::start(memory_like(CHUNKS * CHUNK, 95), CHUNK)
}

/// Runs a test with a region that nobody has touched, and the bytes that it has, where the kernel's touches are served.
fn with_region(test: &str, work: impl FnOnce(Region, Vec<u8>) + Send + 'static) {
    let test = format!("origins::{test}");
    within(WATCHDOG, move || {
        let source = start();
        let session =
            Session::open(source.server.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
        if !session.serves_kernel_faults() {
            return skip(&test, "the kernel's own touches are not served without root");
        }
        work(session.map("mem").unwrap(), source.bytes.clone());
    });
}

/// Some pages across the border of two chunks, of a place of their own.
fn pages_of(place: usize) -> Range<usize> {
    (place + 1) * CHUNK - 3 * PAGE..(place + 1) * CHUNK + 2 * PAGE
}

#[test]
fn vectored_reads_and_writes_are_served() {
    with_region("vectored_reads_and_writes_are_served", |mut region, mut bytes| {
        let (first, second) = (pages_of(0), pages_of(2));
        let mut file = tempfile::tempfile().unwrap();
        let slices = [IoSlice::new(&region[first.clone()]), IoSlice::new(&region[second.clone()])];
        assert_eq!(file.write_vectored(&slices).unwrap(), first.len() + second.len());
        let mut copy = vec![0; first.len() + second.len()];
        file.read_exact_at(&mut copy, 0).unwrap();
        assert!(copy == [&bytes[first], &bytes[second]].concat());
        // Into pages, of which two stay as they are in part.
        let (odd, page) = (5 * CHUNK + 100..5 * CHUNK + PAGE + 50, 6 * CHUNK..6 * CHUNK + PAGE);
        let noise = noise(odd.len() + page.len(), 3);
        std::io::Seek::rewind(&mut file).unwrap();
        file.write_all(&noise).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let (head, tail) = region.split_at_mut(page.start);
        let slices = [IoSliceMut::new(&mut head[odd.clone()]), IoSliceMut::new(&mut tail[..PAGE])];
        assert_eq!(file.read_vectored(&mut { slices }).unwrap(), noise.len());
        bytes[odd.clone()].copy_from_slice(&noise[..odd.len()]);
        bytes[page].copy_from_slice(&noise[odd.len()..]);
        assert!(*region == *bytes);
    });
}

#[test]
fn direct_io_reads_into_and_writes_from_absent_pages() {
    with_region("direct_io_reads_into_and_writes_from_absent_pages", |mut region, mut bytes| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content = noise(5 * PAGE, 4);
        std::fs::write(&path, &content).unwrap();
        let direct = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        let target = pages_of(1);
        direct.read_exact_at(&mut region[target.clone()], 0).unwrap();
        bytes[target].copy_from_slice(&content);
        let from = pages_of(4);
        direct.write_all_at(&region[from.clone()], 0).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes[from]);
        assert!(*region == *bytes);
    });
}

#[test]
fn pages_that_are_spliced_into_a_pipe_come() {
    with_region("pages_that_are_spliced_into_a_pipe_come", |region, bytes| {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let pages = pages_of(3);
        let slices = [IoSlice::new(&region[pages.clone()])];
        let spliced = nix::fcntl::vmsplice(writer.as_fd(), &slices, nix::fcntl::SpliceFFlags::empty());
        assert_eq!(spliced, Ok(pages.len()));
        drop(writer);
        let mut copy = Vec::new();
        reader.read_to_end(&mut copy).unwrap();
        assert!(copy == bytes[pages]);
    });
}

#[test]
fn a_futex_in_an_absent_page_is_looked_at() {
    with_region("a_futex_in_an_absent_page_is_looked_at", |region, bytes| {
        let value = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let (same, other) = (CHUNK + 8, 2 * CHUNK + 8);
        for (at, expected, answer) in
            [(same, value(same), libc::ETIMEDOUT), (other, !value(other), libc::EAGAIN)]
        {
            let word = region[at..].as_ptr();
            let nothing = libc::timespec { tv_sec: 0, tv_nsec: 1 };
            #[expect(unsafe_code, reason = "futex(2)")]
            // SAFETY: an aligned word that is mapped, and a timeout that lives as long as the call.
            let done = unsafe {
                libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, expected, &raw const nothing)
            };
            let errno = std::io::Error::last_os_error().raw_os_error();
            assert_eq!((done, errno), (-1, Some(answer)));
        }
    });
}

#[test]
fn io_uring_s_fixed_buffers_may_be_absent() {
    with_region("io_uring_s_fixed_buffers_may_be_absent", |mut region, mut bytes| {
        let Ok(mut ring) = IoUring::new(8) else {
            return skip("origins::io_uring_s_fixed_buffers_may_be_absent", "there is no io_uring here");
        };
        let (into, from) = (pages_of(5), pages_of(8));
        let buffers = [into.clone(), from.clone()].map(|pages| libc::iovec {
            iov_base: region[pages.clone()].as_mut_ptr().cast(),
            iov_len: pages.len(),
        });
        #[expect(unsafe_code, reason = "buffers by address")]
        // SAFETY: parts of the region, which outlives the ring; nobody else uses them until it is done.
        // Registering pins all of their pages.
        unsafe { ring.submitter().register_buffers(&buffers) }.unwrap();
        let file = tempfile::tempfile().unwrap();
        let content = noise(5 * PAGE, 5);
        file.write_all_at(&content, 0).unwrap();
        let fd = types::Fd(file.as_raw_fd());
        let len = u32::try_from(content.len()).unwrap();
        let read = opcode::ReadFixed::new(fd, buffers[0].iov_base.cast(), len, 0).build();
        let write = opcode::WriteFixed::new(fd, buffers[1].iov_base.cast(), len, 1).offset(1 << 20).build();
        for entry in [read, write] {
            #[expect(unsafe_code, reason = "a request by address")]
            // SAFETY: the file and the buffers outlive the request, which is waited for.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            let done = ring.completion().next().unwrap().result();
            assert_eq!(usize::try_from(done), Ok(5 * PAGE));
        }
        let mut copy = vec![0; from.len()];
        file.read_exact_at(&mut copy, 1 << 20).unwrap();
        assert!(copy == bytes[from]);
        bytes[into].copy_from_slice(&content);
        ring.submitter().unregister_buffers().unwrap();
        assert!(*region == *bytes);
    });
}

#[test]
fn a_debugger_s_reads_are_served_or_fail() {
    with_region("a_debugger_s_reads_are_served_or_fail", |region, bytes| {
        let pages = pages_of(2);
        let address = region.as_ptr().expose_provenance();
        let memory = File::open("/proc/self/mem").unwrap();
        let error = memory.read_at(&mut [0; PAGE], (address + pages.start) as u64).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "an absent page, and no fault");
        let read = read_from_outside(std::process::id(), address + pages.start, pages.len());
        assert!(read.unwrap() == bytes[pages.clone()]);
        let mut page = [0; PAGE];
        memory.read_exact_at(&mut page, (address + pages.start) as u64).unwrap();
        assert!(page == bytes[pages.start..pages.start + PAGE]);
    });
}

/// A dump does not wait for pages: those that are absent are zero in it.
#[test]
fn a_core_dump_of_a_half_restored_process_has_what_was_there() {
    let test = "origins::a_core_dump_of_a_half_restored_process_has_what_was_there";
    if !is_root() {
        return skip(test, "attaching needs root");
    }
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.trim() != "core" {
        return skip(test, "core dumps go elsewhere (kernel.core_pattern)");
    }
    within(WATCHDOG, || {
        let source = start();
        let pages = CHUNKS * CHUNK / PAGE;
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{pages}")]);
        let region = faulter.region(0, "mem", 0);
        let pid = Some(faulter.main.pid);
        let memory =
            ForeignMemory { uffd: faulter.uffd(), regions: &[region], state: None, pid, is_registered: true };
        let reference = "app".parse().unwrap();
        let address = source.server.address();
        let session = Session::attach(address, &reference, Options::DEFAULT, &memory).unwrap();
        faulter.let_go();
        let folder = tempfile::tempdir().unwrap();
        faulter.main.does(&format!("dump-to {}", folder.path().display()));
        faulter.assert_reads(0, 0, &source.bytes[..CHUNK]);
        let start = faulter.at(0, 0);
        faulter.main.tell("abort");
        assert_eq!((faulter.main.answer(), faulter.dies_of()), (None, libc::SIGABRT));
        assert!(session.wait_end(Duration::from_secs(30)));
        assert_eq!(session.error(), None);
        let dump = std::fs::read_dir(folder.path()).unwrap().next().expect("a dump").unwrap();
        let dump = std::fs::read(dump.path()).unwrap();
        assert!(*dumped(&dump, start, CHUNK) == source.bytes[..CHUNK]);
        assert!(*dumped(&dump, start + CHUNK, 4 * CHUNK) == [0; 4 * CHUNK]);
    });
}

/// The bytes at an address, out of an ELF core file of 64 bits.
fn dumped(elf: &[u8], address: usize, len: usize) -> &[u8] {
    let number = |at: usize, len: usize| {
        elf[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let segments = (0..count).map(|index| table + index * size);
    let found = segments.filter(|at| number(*at, 4) == 1).find_map(|at| {
        let (offset, start, bytes) = (number(at + 8, 8), number(at + 16, 8), number(at + 32, 8));
        let inside = address.checked_sub(start).filter(|inside| inside + len <= bytes)?;
        elf.get(offset + inside..offset + inside + len)
    });
    found.expect("a segment that has it")
}
