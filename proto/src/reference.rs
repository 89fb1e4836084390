//! References, the names of images.

use crate::digest::Digest;
use crate::path::excerpt;
use std::fmt;
use std::str::FromStr;

/// Most bytes of a name.
const MAX_NAME_BYTES: usize = 255;
/// Most bytes of a tag, from the OCI distribution specification.
const MAX_TAG_BYTES: usize = 128;

/// A name: `part(/part)*`, from the OCI distribution specification. A part is lower-case letters
/// and digits, with single `.`, `_`, `__` or any number of `-` between them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// A tag: 1 to 128 letters, digits, `_`, `.` and `-`, not beginning with `.` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(String);

/// A name and a tag: a reference that can be moved. Its text is `name:tag`; `name` means
/// `name:latest`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TagReference {
    /// The name of the image.
    pub name: Name,
    /// The tag, which selects one image of that name.
    pub tag: Tag,
}

/// The ways to name an image in a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `name:tag` or `name`: the image that the tag points to at the time.
    Tag(TagReference),
    /// `name@blake3:…`: always the same image.
    Digest {
        /// The name, which only people read.
        name: Name,
        /// The digest of the image.
        image: Digest,
    },
}

/// Text that is no reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("reference {reference:?}: {reason}")]
pub struct ReferenceError {
    /// The first 80 bytes of the text.
    pub reference: String,
    /// The defect of the text.
    pub reason: &'static str,
}

impl Name {
    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Tag {
    /// Returns the tag as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn error(text: &str, reason: &'static str) -> ReferenceError {
    ReferenceError { reference: excerpt(text.as_bytes()), reason }
}

fn is_name_part(part: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    if !ends.iter().all(|end| end.is_some_and(|&b| alnum(b))) {
        return false;
    }
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    separators.into_iter().all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

impl FromStr for Name {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(error(text, "the name is empty"));
        }
        if text.len() > MAX_NAME_BYTES {
            return Err(error(text, "the name is longer than 255 bytes"));
        }
        if !text.split('/').all(is_name_part) {
            let reason = "a name is parts of a-z, 0-9, single `.`, `_`, `-` inside, with `/` between them";
            return Err(error(text, reason));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let Some(&first) = text.as_bytes().first() else {
            return Err(error(text, "the tag is empty"));
        };
        if text.len() > MAX_TAG_BYTES {
            return Err(error(text, "the tag is longer than 128 bytes"));
        }
        if !word(first) || !text.bytes().all(|b| word(b) || b == b'.' || b == b'-') {
            return Err(error(text, "a tag is letters, digits, `_`, `.` and `-`, the last two not first"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        // The error shows the whole text, also if a part of it is empty.
        let whole = |part: ReferenceError| error(text, part.reason);
        if let Some((name, digest)) = text.split_once('@') {
            let reason = "after the `@` there must be `blake3:` and 64 lower-case hex digits";
            let image = digest.parse().map_err(|_| error(text, reason))?;
            return Ok(Self::Digest { name: name.parse().map_err(whole)?, image });
        }
        let (name, tag) = text.split_once(':').unwrap_or((text, "latest"));
        let (name, tag) = (name.parse().map_err(whole)?, tag.parse().map_err(whole)?);
        Ok(Self::Tag(TagReference { name, tag }))
    }
}

impl FromStr for TagReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        match text.parse()? {
            Reference::Tag(reference) => Ok(reference),
            Reference::Digest { .. } => Err(error(text, "a digest is fixed; name a tag")),
        }
    }
}

impl fmt::Display for TagReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name.0, self.tag.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(reference) => reference.fmt(f),
            Self::Digest { name, image } => write!(f, "{}@{image}", name.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn references_follow_the_oci_grammar() {
        for good in ["a", "a/b", "a/b:v1", "a-b.c_d__e---f:V_1.2-3", "0:_"] {
            let reference: TagReference = good.parse().unwrap();
            assert_eq!(reference.to_string().trim_end_matches(":latest"), good);
        }
        let long = "a".repeat(10_000);
        for bad in [
            "",
            ":",
            "a:",
            "A",
            "a//b",
            "/a",
            "a/",
            "../x",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "a:.x",
            "a b",
            "a\0",
            "a@b",
            "a@blake3:00",
            "_tags",
            "a/_tags",
            &long,
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
        assert!(format!("a:{}", "t".repeat(129)).parse::<Reference>().is_err());
    }

    #[test]
    fn an_error_shows_the_whole_reference() {
        for (text, reason) in [("demo:", "the tag is empty"), (":v1", "the name is empty")] {
            let shown = text.parse::<Reference>().unwrap_err().to_string();
            assert_eq!(shown, format!("reference {text:?}: {reason}"));
        }
    }

    #[test]
    fn digest_references_are_fixed() {
        let text = format!("a/b@{}", Digest::of(b"x"));
        assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        assert!(text.parse::<TagReference>().is_err());
        assert!(text.to_uppercase().parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn what_parses_is_shown_as_it_was_or_with_latest(text in "[a-z0-9A-Z/._:@-]{0,24}|\\PC{0,12}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let shown = reference.to_string();
                let with_latest = format!("{text}:latest");
                prop_assert!(shown == text || shown == with_latest);
                prop_assert_eq!(shown.parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
