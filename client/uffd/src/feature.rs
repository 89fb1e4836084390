//! The names and bits of userfaultfd's optional features.

/// An optional part of userfaultfd that a kernel offers, or lacks.
///
/// See ioctl_userfaultfd(2), UFFDIO_API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The feature's name in the man page, without `UFFD_FEATURE_`.
    pub name: &'static str,
    /// The feature's bit in `uffdio_api.features`.
    pub bit: u64,
    /// The first Linux version with the feature.
    pub since: &'static str,
}

macro_rules! features {
    ($($constant:ident = $bit:literal, $since:literal, $gives:literal;)*) => {
        $(
            #[doc = concat!("`UFFD_FEATURE_", stringify!($constant), "`, since Linux ", $since, ": ", $gives, ".")]
            pub const $constant: u64 = 1 << $bit;
        )*
        /// All features that Linux 6.8 knows, in the order of their bits.
        pub const FEATURES: &[Feature] =
            &[$(Feature { name: stringify!($constant), bit: $constant, since: $since },)*];
    };
}

features! {
    PAGEFAULT_FLAG_WP = 0, "5.7", "writes to protected pages of private anonymous memory are faults";
    EVENT_FORK = 1, "4.11",
        "a fork is an event, which carries the child's userfaultfd; the handshake needs CAP_SYS_PTRACE for it";
    EVENT_REMAP = 2, "4.11", "mremap(2) is an event";
    EVENT_REMOVE = 3, "4.11", "madvise(2) with MADV_DONTNEED or MADV_REMOVE is an event";
    MISSING_HUGETLBFS = 4, "4.11", "absent pages of hugetlb memory are faults";
    MISSING_SHMEM = 5, "4.11", "absent pages of shared memory (tmpfs, memfd) are faults";
    EVENT_UNMAP = 6, "4.11", "munmap(2) is an event";
    SIGBUS = 7, "4.14", "a fault is a SIGBUS of the thread, in place of a message";
    THREAD_ID = 8, "4.14", "a fault's message names the thread";
    MINOR_HUGETLBFS = 9, "5.13", "pages of hugetlb memory that exist, but are not mapped, are faults";
    MINOR_SHMEM = 10, "5.14", "pages of shared memory that exist, but are not mapped, are faults";
    EXACT_ADDRESS = 11, "5.18", "a fault's address is not rounded down to its page";
    WP_HUGETLBFS_SHMEM = 12, "5.19", "writes to protected pages of hugetlb and shared memory are faults";
    WP_UNPOPULATED = 13, "6.4", "absent pages of anonymous memory can be write-protected";
    POISON = 14, "6.6", "pages can be poisoned, see [`Uffd::poison`](crate::Uffd::poison)";
    WP_ASYNC = 15, "6.7",
        "the kernel lets the first write to a protected page pass by itself; \
         [`Pagemap`](crate::pagemap::Pagemap) lists the pages written";
    MOVE = 16, "6.8", "pages can be moved within a process (UFFDIO_MOVE)";
}
