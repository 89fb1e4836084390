//! Paths of an image's files.

use std::fmt;

/// The longest path, in bytes: Linux's `PATH_MAX`.
pub const MAX_PATH_BYTES: usize = 4096;

/// A file's path in an image: relative, with parts between `/` that are not empty, `.` or `..`.
///
/// A path joined to a directory cannot lead out of it. As on Linux, it may have any bytes but NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImagePath(Box<[u8]>);

/// Bytes that are no path of an image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("path {path:?}: {reason}")]
pub struct PathError {
    /// The first 80 bytes of the path, as text.
    pub path: String,
    /// The defect of the path.
    pub reason: &'static str,
}

impl ImagePath {
    /// Returns the path's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the paths of the directories that contain it, the innermost first.
    pub fn ancestors(&self) -> impl Iterator<Item = &[u8]> {
        let slashes = (0..self.0.len()).rev().filter(|&i| self.0[i] == b'/');
        slashes.map(|i| &self.0[..i])
    }
}

/// Shortens outside bytes for a message.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
    if bytes.len() > 80 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
}

impl TryFrom<&[u8]> for ImagePath {
    type Error = PathError;

    fn try_from(bytes: &[u8]) -> Result<Self, PathError> {
        let wrong = |reason| Err(PathError { path: excerpt(bytes), reason });
        if bytes.is_empty() {
            return wrong("is empty");
        }
        if bytes.len() > MAX_PATH_BYTES {
            return wrong("is longer than 4096 bytes");
        }
        if bytes.contains(&0) {
            return wrong("has a NUL byte in it");
        }
        for part in bytes.split(|&b| b == b'/') {
            match part {
                b"" => return wrong("has an empty part"),
                b"." | b".." => return wrong("has a part `.` or `..`"),
                part if part.len() > 255 => return wrong("has a part of more than 255 bytes"),
                _ => {}
            }
        }
        Ok(Self(bytes.into()))
    }
}

impl fmt::Display for ImagePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).fmt(f)
    }
}

impl fmt::Debug for ImagePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Component, Path};

    proptest! {
        /// Accepted paths stay below a directory that they are joined to.
        #[test]
        fn accepted_paths_lead_down(bytes in "[a./\u{0}\u{e4}]{0,12}".prop_map(String::into_bytes)) {
            if let Ok(path) = ImagePath::try_from(&bytes[..]) {
                prop_assert_eq!(path.as_bytes(), &bytes[..]);
                let parts = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes())).components();
                let parts: Vec<_> = parts.collect();
                prop_assert!(!parts.is_empty());
                prop_assert!(parts.iter().all(|part| matches!(part, Component::Normal(_))));
                prop_assert_eq!(path.ancestors().count(), parts.len() - 1);
            }
        }
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        let long = "a/".repeat(5000) + "b";
        let part = "x".repeat(256);
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "../x", "a/../b", "a/.", "a\0b", &long, &part] {
            assert!(ImagePath::try_from(bad.as_bytes()).is_err(), "{bad:?}");
        }
        for good in ["a", "a/b", "...", "a/..b", "\u{e4}", " "] {
            assert_eq!(ImagePath::try_from(good.as_bytes()).unwrap().as_bytes(), good.as_bytes());
        }
        assert!(ImagePath::try_from(&b"\xff\xfe"[..]).is_ok());
    }

    #[test]
    fn ancestors_are_the_directories() {
        let path = ImagePath::try_from(&b"a/b/c"[..]).unwrap();
        assert_eq!(path.ancestors().collect::<Vec<_>>(), [&b"a/b"[..], b"a"]);
    }
}
