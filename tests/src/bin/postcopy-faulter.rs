//! A process whose memory others fill: what Firecracker and CRIU are to a handler, and told line by line what to touch.
//!
//! `postcopy-faulter SOCKET FEATURES PAGES…` maps a region of as many pages for each number, registers all with one
//! userfaultfd that asks for these features, and sends that over the socket, with a JSON array of `[address, length]`.
//! Then it does what it reads from stdin, answering each line: `read REGION PAGE COUNT` with the bytes' BLAKE3 digest,
//! `write REGION PAGE BYTE` and `remove REGION PAGE COUNT` (MADV_DONTNEED) with `done`.

use anyhow::{Context, Result, bail};
use postcopy::proto::digest::Digest;
use rustix::fd::BorrowedFd;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{BufRead, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

const PAGE: usize = 4096;

struct Region {
    start: *mut u8,
    len: usize,
}

impl Region {
    #[expect(unsafe_code, reason = "a mapping that lives as long as the process")]
    fn map(pages: usize) -> Result<Self> {
        let len = pages * PAGE;
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, placed by the kernel where nothing is.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        Ok(Self { start: start.cast(), len })
    }

    fn pages(&self, first: usize, count: usize) -> Result<(*mut u8, usize)> {
        if first.checked_add(count).is_none_or(|end| end * PAGE > self.len) {
            bail!("{count} pages from {first} on are not in the region");
        }
        Ok((self.start.wrapping_add(first * PAGE), count * PAGE))
    }

    #[expect(unsafe_code, reason = "memory that somebody else fills")]
    fn read(&self, first: usize, count: usize) -> Result<Digest> {
        let (start, len) = self.pages(first, count)?;
        // SAFETY: mapped; only this thread writes, and a page does not change once it can be read.
        Ok(Digest::of(unsafe { std::slice::from_raw_parts(start, len) }))
    }

    #[expect(unsafe_code, reason = "memory that somebody else fills")]
    fn write(&self, page: usize, byte: u8) -> Result<()> {
        let (start, len) = self.pages(page, 1)?;
        // SAFETY: mapped, and nobody borrows from it.
        unsafe { std::ptr::write_bytes(start, byte, len) };
        Ok(())
    }

    #[expect(unsafe_code, reason = "madvise on memory of our own")]
    fn remove(&self, first: usize, count: usize) -> Result<()> {
        let (start, len) = self.pages(first, count)?;
        // SAFETY: mapped, and nobody borrows from it.
        Ok(unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxDontNeed) }?)
    }
}

#[expect(unsafe_code, reason = "the userfaultfd crate does not give a borrowed descriptor")]
fn send(socket: &UnixStream, uffd: &Uffd, text: &str) -> Result<()> {
    // SAFETY: `uffd` owns it, and outlives the borrow.
    let fds = [unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        bail!("no room for a descriptor");
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty())?;
    Ok(())
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().context("SOCKET")?;
    let features = FeatureFlags::from_bits_retain(args.next().context("FEATURES")?.parse()?);
    let regions = args.map(|pages| Region::map(pages.parse()?)).collect::<Result<Vec<_>>>()?;
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(false).user_mode_only(false).require_features(features);
    let uffd = builder.create()?;
    for region in &regions {
        uffd.register(region.start.cast(), region.len)?;
    }
    let addresses: Vec<_> = regions.iter().map(|region| [region.start.addr(), region.len]).collect();
    send(&UnixStream::connect(socket)?, &uffd, &serde_json::to_string(&addresses)?)?;
    // Whoever has it now is to be the only one.
    drop(uffd);

    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        let number =
            |i: usize| -> Result<usize> { Ok(words.get(i).context("a number is missing")?.parse()?) };
        let region = regions.get(number(1)?).context("no such region")?;
        let answer = match words[0] {
            "read" => region.read(number(2)?, number(3)?)?.hex(),
            "write" => {
                region.write(number(2)?, u8::try_from(number(3)?)?)?;
                "done".to_owned()
            }
            "remove" => {
                region.remove(number(2)?, number(3)?)?;
                "done".to_owned()
            }
            other => bail!("{other} is not known"),
        };
        writeln!(std::io::stdout(), "{answer}")?;
    }
    Ok(())
}
