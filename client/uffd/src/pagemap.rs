//! /proc/PID/pagemap: whether a page is mapped; and PAGEMAP_SCAN, since Linux 6.7: which pages of this process were written
//! to since they were write-protected.

use super::{PAGE_BYTES, abi, to_usize, update};

use rustix::fd::AsFd;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError, TryLockError};

/// Ranges that are asked for at once.
const RANGES: usize = 256;
/// So many bytes are looked at at once, so that nobody waits long behind that.
const WINDOW: u64 = 64 << 20;

/// A process's /proc/PID/pagemap.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Held over each look at what was written, and over [`Pagemap::unseen`].
    looking: Mutex<()>,
}

impl Pagemap {
    /// This process's.
    ///
    /// # Errors
    /// Whatever open(2) answers.
    pub fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, looking: Mutex::default() })
    }

    /// Another process's, which is to be alive.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))?, looking: Mutex::default() })
    }

    /// Whether the page at an address is mapped; false, too, if the kernel does not say.
    pub fn is_present(&self, address: usize) -> bool {
        const PRESENT: u64 = 1 << 63;
        let mut entry = [0; size_of::<u64>()];
        let at = (address / PAGE_BYTES * size_of::<u64>()) as u64;
        let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut entry, at));
        read == Ok(entry.len()) && u64::from_ne_bytes(entry) & PRESENT != 0
    }

    /// Gives the ranges of addresses of pages that are there and were written to, and whether they are in memory. If asked to, it protects them anew, with
    /// the same look at each page, so that no write in between is lost. Pages that are not there are left alone.
    ///
    /// # Errors
    /// Whatever the ioctl answers.
    pub fn written(
        &self,
        addresses: Range<usize>,
        protect: bool,
        mut give: impl FnMut(Range<usize>, bool),
    ) -> io::Result<()> {
        let scan = abi::PagemapScan {
            flags: if protect { abi::PM_SCAN_WP_MATCHING | abi::PM_SCAN_CHECK_WPASYNC } else { 0 },
            category_mask: abi::PAGE_IS_WRITTEN,
            category_anyof_mask: abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED,
            return_mask: abi::PAGE_IS_WRITTEN | abi::PAGE_IS_PRESENT,
            ..Default::default()
        };
        self.scan(addresses, scan, Some(&self.looking), &mut give)
    }

    /// Does something that nobody who asks what was written is to see half of. None: somebody is looking. He is not waited
    /// for: a signal's handler of his may wait for this thread.
    pub fn unseen<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let _unseen = match self.looking.try_lock() {
            Ok(unseen) => unseen,
            Err(TryLockError::Poisoned(unseen)) => unseen.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(work())
    }

    /// Write-protects the pages of zeros among these that take no memory.
    ///
    /// # Errors
    /// As [`Pagemap::written`].
    pub fn protect_zeros(&self, addresses: Range<usize>) -> io::Result<()> {
        let scan = abi::PagemapScan {
            flags: abi::PM_SCAN_WP_MATCHING | abi::PM_SCAN_CHECK_WPASYNC,
            category_mask: abi::PAGE_IS_PFNZERO,
            return_mask: abi::PAGE_IS_PFNZERO,
            ..Default::default()
        };
        self.scan(addresses, scan, None, &mut |_, _| {})
    }

    fn scan(
        &self,
        addresses: Range<usize>,
        scan: abi::PagemapScan,
        lock: Option<&Mutex<()>>,
        give: &mut dyn FnMut(Range<usize>, bool),
    ) -> io::Result<()> {
        let mut ranges = [abi::PageRegion::default(); RANGES];
        let mut next = addresses.start as u64;
        while next < addresses.end as u64 {
            let mut scan = abi::PagemapScan {
                size: size_of::<abi::PagemapScan>() as u64,
                start: next,
                end: (addresses.end as u64).min(next + WINDOW),
                vec: ranges.as_mut_ptr().expose_provenance() as u64,
                vec_len: RANGES as u64,
                ..scan
            };
            let locked = lock.map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
            let result = update::<{ abi::IOC_PAGEMAP_SCAN }, _>(self.file.as_fd(), &mut scan);
            drop(locked);
            match result {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            // It does not say how many it has filled in; an empty one ends them.
            for range in ranges.iter().take_while(|range| range.end > range.start) {
                let present = range.categories & abi::PAGE_IS_PRESENT != 0;
                give(to_usize(range.start)..to_usize(range.end), present);
            }
            ranges.fill(abi::PageRegion::default());
            next = scan.walk_end;
        }
        Ok(())
    }
}

/// Whether PAGEMAP_SCAN works on this process's memory.
#[must_use]
pub fn works() -> bool {
    // An empty range: nothing is looked at, and old kernels answer ENOTTY.
    let mut scan = abi::PagemapScan { size: size_of::<abi::PagemapScan>() as u64, ..Default::default() };
    Pagemap::open()
        .is_ok_and(|pagemap| update::<{ abi::IOC_PAGEMAP_SCAN }, _>(pagemap.file.as_fd(), &mut scan).is_ok())
}
