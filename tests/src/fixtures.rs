//! Files whose bytes follow from a seed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that do not compress.
#[must_use]
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Bytes that compress about as memory does: words from a small vocabulary, with some noise and some zeros between.
#[must_use]
pub fn memory_like(len: usize, seed: u64) -> Vec<u8> {
    let vocabulary = noise(4096, seed);
    let choices = noise(len / 8 + 1, seed ^ 1);
    let mut bytes = Vec::with_capacity(len + 8);
    for (i, choice) in choices.iter().enumerate() {
        let page = i / 512;
        if page % 11 == 3 {
            bytes.extend_from_slice(&[0; 8]);
        } else {
            let at = usize::from(*choice) * 8;
            bytes.extend_from_slice(&vocabulary[at % 4088..at % 4088 + 8]);
        }
    }
    bytes.truncate(len);
    bytes
}

/// Makes a file of `len` bytes that are holes but for these islands.
///
/// # Panics
/// If it cannot be written.
pub fn sparse(path: &Path, len: u64, islands: &[(u64, &[u8])]) {
    let file = File::create(path).expect("a file can be made");
    file.set_len(len).expect("a file can be sparse");
    for (offset, bytes) in islands {
        file.write_all_at(bytes, *offset).expect("a file can be written");
    }
}
