//! The kernel's pool of pages of 2 MiB, of which there is one for the whole machine.

use std::fs::{File, read_to_string, write};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The pool, for one test at a time. It is as before when this is dropped.
#[derive(Debug)]
pub struct HugePool {
    before: usize,
    _lock: File,
}

fn count(what: &str) -> usize {
    let text = read_to_string(format!("{POOL}/{what}")).expect("the kernel has huge pages");
    text.trim().parse().expect("a number")
}

fn set(pages: usize) {
    write(format!("{POOL}/nr_hugepages"), pages.to_string()).expect("root may");
}

impl HugePool {
    /// Waits until no other test has it, and makes so many free pages.
    ///
    /// # Panics
    /// If there is not so much memory in one piece.
    #[must_use]
    pub fn with_free(pages: usize) -> Self {
        let path = std::env::temp_dir().join("postcopy-tests-huge-pages.lock");
        let lock = File::create(path).expect("a file can be made");
        lock.lock().expect("files can be locked");
        let pool = Self { before: count("nr_hugepages"), _lock: lock };
        pool.set_free(pages);
        assert_eq!(count("free_hugepages"), pages, "memory of 2 MiB in one piece");
        pool
    }

    /// Makes so many free pages.
    pub fn set_free(&self, pages: usize) {
        set(count("nr_hugepages") - count("free_hugepages") + pages);
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Whatever is in use goes when it is given back.
        set(self.before);
    }
}
