//! BLAKE3 digests: the identity of chunks, packs, segments and images.

use std::fmt;
use std::str::FromStr;

/// Length of a digest in bytes.
pub const DIGEST_BYTES: usize = blake3::OUT_LEN;

/// A BLAKE3 digest, displayed as `blake3:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; DIGEST_BYTES]);

/// Bytes or text that are no digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    /// The input has another length than 32 bytes.
    #[error("a digest has 32 bytes, this one has {0}")]
    Length(usize),
    /// A list of digests whose length is no multiple of 32.
    #[error("a list of digests has a multiple of 32 bytes, this one has {0}")]
    ListLength(usize),
    /// The text is not `blake3:` and 64 lower-case hex digits.
    #[error("digest {0:?}: not `blake3:` and 64 lower-case hex digits")]
    Text(String),
}

impl Digest {
    /// Computes the digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Returns the digest's 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
        &self.0
    }

    /// Returns the 64 lower-case hex digits, which name objects in a store.
    #[must_use]
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Parses 64 lower-case hex digits.
    ///
    /// # Errors
    /// Returns [`DigestError::Text`] for anything else.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        let wrong = || DigestError::Text(hex.chars().take(80).collect());
        if hex.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let hash = blake3::Hash::from_hex(hex).map_err(|_| wrong())?;
        Ok(Self(*hash.as_bytes()))
    }

    /// Splits concatenated digests.
    ///
    /// # Errors
    /// Returns [`DigestError::ListLength`] unless the length is a multiple of 32.
    pub fn list(bytes: &[u8]) -> Result<impl ExactSizeIterator<Item = Self>, DigestError> {
        let (digests, []) = bytes.as_chunks::<DIGEST_BYTES>() else {
            return Err(DigestError::ListLength(bytes.len()));
        };
        Ok(digests.iter().map(|bytes| Self(*bytes)))
    }

    /// Returns the concatenation of `digests`.
    #[must_use]
    pub fn concat(digests: &[Self]) -> bytes::Bytes {
        digests.iter().flat_map(|d| d.0).collect()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl From<[u8; DIGEST_BYTES]> for Digest {
    fn from(bytes: [u8; DIGEST_BYTES]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<&[u8]> for Digest {
    type Error = DigestError;

    fn try_from(bytes: &[u8]) -> Result<Self, DigestError> {
        match <[u8; DIGEST_BYTES]>::try_from(bytes) {
            Ok(bytes) => Ok(Self(bytes)),
            Err(_) => Err(DigestError::Length(bytes.len())),
        }
    }
}

impl From<Digest> for bytes::Bytes {
    fn from(digest: Digest) -> Self {
        bytes::Bytes::copy_from_slice(&digest.0)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text.strip_prefix("blake3:") {
            Some(hex) => Self::from_hex(hex),
            None => Err(DigestError::Text(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
