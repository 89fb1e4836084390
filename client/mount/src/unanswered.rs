//! The requests without an answer, for kernels that do not send them again (before Linux 6.9).
//!
//! Such a kernel has handed a killed process's requests out for good: their programs would wait
//! until the file system ends. A file outlives the process, and has the number of each request
//! from before its answer is made until after it is given. A successor answers those with EIO.
//!
//! The file is a list of words in this machine's byte order. The first one is 1 if requests are
//! noted. Each other word is the number of a request, or 0.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most requests that are noted at once.
const SLOTS: u64 = 65_536;
const WORD_BYTES: u64 = 8;

/// The file of requests.
#[derive(Debug)]
pub(crate) struct Unanswered {
    file: File,
    is_used: AtomicBool,
    /// The places of the file that are free. Locked to take one or to give it back.
    free: Mutex<Vec<u64>>,
}

/// The place of a noted request.
#[derive(Debug)]
pub(crate) struct Noted(Option<u64>);

impl Unanswered {
    /// Reads the file. Returns the requests that a killed process has left in it, or `None` if no
    /// requests are noted because the kernel sends them again.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(crate) fn read(mut file: File) -> io::Result<(Self, Option<Vec<u64>>)> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
        let mut words = bytes.chunks_exact(8).map(word);
        let is_used = words.next() == Some(1);
        let left: Vec<u64> = words.filter(|unique| *unique != 0).collect();
        let free = Mutex::new((1..=SLOTS).rev().collect());
        Ok((Self { file, is_used: AtomicBool::new(is_used), free }, is_used.then_some(left)))
    }

    /// Forgets the requests that a killed process has left, after their answers.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn forget_left(&self) -> io::Result<()> {
        self.file.set_len(WORD_BYTES)
    }

    /// Begins to note requests.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn begin(&self) -> io::Result<()> {
        self.file.write_all_at(&1_u64.to_ne_bytes(), 0)?;
        self.is_used.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Notes a request, if requests are noted.
    pub(crate) fn note(&self, unique: u64) -> Noted {
        if !self.is_used.load(Ordering::Relaxed) {
            return Noted(None);
        }
        let place = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Noted(place.filter(|place| self.write(*place, unique)))
    }

    /// Forgets a request that was answered.
    pub(crate) fn forget(&self, noted: &Noted) {
        if let Noted(Some(place)) = noted {
            self.write(*place, 0);
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(*place);
        }
    }

    fn write(&self, place: u64, value: u64) -> bool {
        self.file.write_all_at(&value.to_ne_bytes(), place * WORD_BYTES).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    #[test]
    fn a_successor_finds_the_requests_without_an_answer() {
        let mut file = tempfile::tempfile().unwrap();
        let open = |file: &mut File| {
            file.rewind().unwrap();
            Unanswered::read(file.try_clone().unwrap()).unwrap()
        };
        let (unanswered, left) = open(&mut file);
        assert_eq!(left, None);
        unanswered.forget(&unanswered.note(1));
        assert_eq!(open(&mut file).1, None, "nothing was noted");
        unanswered.begin().unwrap();
        let noted: Vec<_> = [5, 6, 7].map(|unique| unanswered.note(unique)).into();
        unanswered.forget(&noted[1]);
        let (successor, left) = open(&mut file);
        assert_eq!(left, Some(vec![5, 7]));
        successor.forget_left().unwrap();
        let _ = successor.note(8);
        let (last, left) = open(&mut file);
        assert_eq!(left, Some(vec![8]));
        last.forget_left().unwrap();
        assert_eq!(open(&mut file).1, Some(Vec::new()));
    }
}
