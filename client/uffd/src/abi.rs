//! Numbers and layouts of linux/userfaultfd.h up to Linux 6.8; Debian 12's header ends at 6.1.

use rustix::ioctl::{Opcode, opcode};

const UFFDIO: u8 = 0xAA;

/// The only existing version of the API.
pub(super) const UFFD_API: u64 = 0xAA;

/// `UFFD_USER_MODE_ONLY`, a flag of userfaultfd(2) since Linux 5.11.
pub(super) const USER_MODE_ONLY: u32 = 1;

/// The limits of a process's addresses, as the kernel checks them. The first one is
/// vm.mmap_min_addr's default. The last one is TASK_SIZE of x86-64 with four levels of page tables;
/// TASK_SIZE of aarch64 with 48 bits is larger.
pub(super) const FIRST_ADDRESS: usize = 1 << 16;
pub(super) const LAST_ADDRESS: usize = (1 << 47) - (1 << 12);

/// `UFFDIO_CONTINUE_MODE_DONTWAKE`, and the same flag of UFFDIO_ZEROPAGE.
pub(super) const MODE_DONTWAKE: u64 = 1;

/// `UFFDIO_WRITEPROTECT_MODE_WP`: sets the write protection.
pub(super) const WRITEPROTECT_ON: u64 = 1;

/// `UFFD_PAGEFAULT_FLAG_WP` of a message.
pub(super) const PAGEFAULT_IS_WP: u64 = 2;

/// `UFFDIO_COPY_MODE_WP`: installs the pages write-protected.
pub(super) const COPY_MODE_WP: u64 = 2;

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_FORK: u8 = 0x13;
pub(super) const EVENT_REMAP: u8 = 0x14;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    /// The number of bytes done, or a negative errno.
    pub(super) copy: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ZeroPage {
    pub(super) range: Range,
    pub(super) mode: u64,
    /// The number of bytes done, or a negative errno.
    pub(super) zeropage: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Poison {
    pub(super) range: Range,
    pub(super) mode: u64,
    /// The number of bytes done, or a negative errno.
    pub(super) updated: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Continue {
    pub(super) range: Range,
    pub(super) mode: u64,
    /// The number of bytes done, or a negative errno.
    pub(super) mapped: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WriteProtect {
    pub(super) range: Range,
    pub(super) mode: u64,
}

/// `struct uffd_msg`: the meaning of `arg` depends on `event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Msg {
    pub(super) event: u8,
    pub(super) reserved1: u8,
    pub(super) reserved2: u16,
    pub(super) reserved3: u32,
    pub(super) arg: [u64; 3],
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<ZeroPage>() == 32);
const _: () = assert!(size_of::<Poison>() == 32);
const _: () = assert!(size_of::<Continue>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);
const _: () = assert!(size_of::<Msg>() == 32);

pub(super) const IOC_API: Opcode = opcode::read_write::<Api>(UFFDIO, 0x3F);
pub(super) const IOC_COPY: Opcode = opcode::read_write::<Copy>(UFFDIO, 0x03);
pub(super) const IOC_ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(UFFDIO, 0x04);
pub(super) const IOC_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(UFFDIO, 0x06);
pub(super) const IOC_CONTINUE: Opcode = opcode::read_write::<Continue>(UFFDIO, 0x07);
pub(super) const IOC_POISON: Opcode = opcode::read_write::<Poison>(UFFDIO, 0x08);
/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd, since Linux 6.1.
pub(super) const IOC_NEW: Opcode = opcode::none(UFFDIO, 0x00);

const _: () = assert!(IOC_API == 0xC018_AA3F);
const _: () = assert!(IOC_COPY == 0xC028_AA03);
const _: () = assert!(IOC_WRITEPROTECT == 0xC018_AA06);
const _: () = assert!(IOC_CONTINUE == 0xC020_AA07);
const _: () = assert!(IOC_POISON == 0xC020_AA08);
const _: () = assert!(IOC_NEW == 0xAA00);

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PagemapScan {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) walk_end: u64,
    pub(super) vec: u64,
    pub(super) vec_len: u64,
    pub(super) max_pages: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) category_anyof_mask: u64,
    pub(super) return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

pub(super) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
pub(super) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
pub(super) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(super) const PAGE_IS_PFNZERO: u64 = 1 << 5;

const _: () = assert!(size_of::<PagemapScan>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

pub(super) const IOC_PAGEMAP_SCAN: Opcode = opcode::read_write::<PagemapScan>(b'f', 16);
