//! The page tables of a process, read from /proc/PID/pagemap. They show which pages are mapped.
//! Since Linux 6.7 (PAGEMAP_SCAN) they also show which pages of this process were written since
//! their write protection.
//!
//! See proc_pid_pagemap(5) and the kernel's Documentation/admin-guide/mm/pagemap.rst.

use super::ioctl::update;
use super::{PAGE_BYTES, abi, to_usize};
use rustix::fd::AsFd;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError, TryLockError};

/// The number of ranges in one answer.
const RANGES: usize = 256;
/// The bytes that one call scans. It is small, so that other callers do not wait long.
const WINDOW: u64 = 64 << 20;

/// An open /proc/PID/pagemap.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Held over each ioctl of [`Pagemap::written`], and over [`Pagemap::unseen`].
    looking: Mutex<()>,
}

impl Pagemap {
    /// Opens the page tables of this process.
    ///
    /// # Errors
    /// The error of open(2).
    pub fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")?, looking: Mutex::default() })
    }

    /// Opens the page tables of a live process.
    ///
    /// # Errors
    /// The error of open(2): ENOENT, or EACCES without the right to trace the process.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))?, looking: Mutex::default() })
    }

    /// Returns whether the page at an address is mapped. Returns false, too, if the kernel gives no
    /// answer.
    #[must_use]
    pub fn is_present(&self, address: usize) -> bool {
        const PRESENT: u64 = 1 << 63;
        let mut entry = [0; size_of::<u64>()];
        let at = (address / PAGE_BYTES * size_of::<u64>()) as u64;
        let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut entry, at));
        read == Ok(entry.len()) && u64::from_ne_bytes(entry) & PRESENT != 0
    }

    /// Calls `give` with each range of addresses whose pages have content and were written, and
    /// with a flag: true if the range is in memory, false if it is swapped out. Skips absent pages.
    ///
    /// A page counts as written unless it was installed write-protected and is still protected.
    /// With `protect`, the scan write-protects each listed page again in the same step, so that no
    /// write in between is lost.
    ///
    /// # Errors
    /// The error of PAGEMAP_SCAN: ENOTTY before Linux 6.7, or EPERM if `protect` meets memory that
    /// is not registered with [`WP_ASYNC`](crate::WP_ASYNC).
    ///
    /// # Blocking
    /// Takes some milliseconds a GiB.
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

    /// Calls `work` while no [`Pagemap::written`] scans, and returns its result. Returns None
    /// without a call if a scan is in progress.
    ///
    /// It does not wait for the scan, because the scanning thread may itself wait for this caller:
    /// in a signal handler that accesses an absent page.
    pub fn unseen<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let _unseen = match self.looking.try_lock() {
            Ok(unseen) => unseen,
            Err(TryLockError::Poisoned(unseen)) => unseen.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(work())
    }

    /// Write-protects those of these pages that map the kernel's zero page.
    ///
    /// # Errors
    /// As for [`Pagemap::written`].
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
            // The kernel does not report the number of ranges; an empty one follows the last.
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

/// Returns whether PAGEMAP_SCAN works on this process's memory, as it does since Linux 6.7.
#[must_use]
pub fn pagemap_scan_works() -> bool {
    // An empty range: the call scans nothing, and old kernels answer ENOTTY.
    let mut scan = abi::PagemapScan { size: size_of::<abi::PagemapScan>() as u64, ..Default::default() };
    Pagemap::open()
        .is_ok_and(|pagemap| update::<{ abi::IOC_PAGEMAP_SCAN }, _>(pagemap.file.as_fd(), &mut scan).is_ok())
}
