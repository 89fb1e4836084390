//! Where a reference comes from: the time of its push, the image before, and labels, which are keys
//! and values that the push gives.
//!
//! All of this belongs to the reference, and the image's digest does not cover it. So it helps
//! people and finds mistakes, and proves nothing.

use crate::digest::{Digest, DigestError};
use crate::v1;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// Most labels of a reference.
pub const MAX_LABELS: usize = 64;
/// Most bytes of a label's key.
pub const MAX_KEY_BYTES: usize = 128;
/// Most bytes of a label's value.
pub const MAX_VALUE_BYTES: usize = 1024;

/// A defect of labels.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LabelError {
    /// The text is not `KEY=VALUE`.
    #[error("label {0:?}: it is not KEY=VALUE")]
    NoValue(String),
    /// The key has a wrong length or other characters.
    #[error("label {0:?}: a key has 1 to 128 characters of a-z, 0-9, '.', '_', '-' and '/'")]
    Key(String),
    /// The value is too long or has control characters.
    #[error("label {0:?}: a value has at most 1,024 bytes and no control characters")]
    Value(String),
    /// A key occurs twice, or the keys are not in ascending order.
    #[error("label {0:?}: the keys are not in strictly ascending order")]
    Order(String),
    /// There are more than 64 labels.
    #[error("{0} labels are more than 64")]
    Count(usize),
}

/// Valid labels: values by their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Adds a label, or replaces the value of its key.
    ///
    /// # Errors
    /// Returns the defect of the label.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), LabelError> {
        let is_of_key = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/');
        let shown = || key.chars().take(MAX_KEY_BYTES).collect();
        if !(1..=MAX_KEY_BYTES).contains(&key.len()) || !key.bytes().all(is_of_key) {
            return Err(LabelError::Key(shown()));
        }
        if value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control) {
            return Err(LabelError::Value(shown()));
        }
        if self.0.len() == MAX_LABELS && !self.0.contains_key(key) {
            return Err(LabelError::Count(MAX_LABELS + 1));
        }
        self.0.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    /// Returns the value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Returns all labels, in bytewise order of their keys.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Splits `KEY=VALUE` at the first `=`.
    ///
    /// # Errors
    /// Returns the defect of the label.
    pub fn parse_one(text: &str) -> Result<(String, String), LabelError> {
        let no_value = || LabelError::NoValue(text.chars().take(MAX_KEY_BYTES).collect());
        let (key, value) = text.split_once('=').ok_or_else(no_value)?;
        Self::default().set(key, value)?;
        Ok((key.to_owned(), value.to_owned()))
    }
}

impl TryFrom<Vec<v1::Label>> for Labels {
    type Error = LabelError;

    fn try_from(labels: Vec<v1::Label>) -> Result<Self, LabelError> {
        if labels.len() > MAX_LABELS {
            return Err(LabelError::Count(labels.len()));
        }
        let mut valid = Self::default();
        for v1::Label { key, value } in labels {
            if valid.0.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(LabelError::Order(key.chars().take(MAX_KEY_BYTES).collect()));
            }
            valid.set(&key, &value)?;
        }
        Ok(valid)
    }
}

impl From<&Labels> for Vec<v1::Label> {
    fn from(labels: &Labels) -> Self {
        labels.iter().map(|(key, value)| v1::Label { key: key.to_owned(), value: value.to_owned() }).collect()
    }
}

/// A defect of a message about a reference's origin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProvenanceError {
    /// The digest of the previous image is none.
    #[error("previous: {0}")]
    Previous(#[from] DigestError),
    /// A label is not valid.
    #[error("labels: {0}")]
    Labels(#[from] LabelError),
}

/// Where a reference comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// The time at which the reference was pointed to its image, by the server's clock; `None` if
    /// it is unknown.
    pub written: Option<SystemTime>,
    /// The image that the reference pointed to before.
    pub previous: Option<Digest>,
    /// The labels of the push.
    pub labels: Labels,
}

impl TryFrom<v1::Provenance> for Provenance {
    type Error = ProvenanceError;

    fn try_from(message: v1::Provenance) -> Result<Self, ProvenanceError> {
        let written = Some(message.written_unix_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
        let previous = Some(&message.previous[..]).filter(|digest| !digest.is_empty());
        Ok(Self {
            // A time beyond the clock's range is unknown.
            written: written.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since)),
            previous: previous.map(Digest::try_from).transpose()?,
            labels: message.labels.try_into()?,
        })
    }
}

impl From<&Provenance> for v1::Provenance {
    fn from(provenance: &Provenance) -> Self {
        let since = provenance.written.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self {
            written_unix_ms: since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            previous: provenance.previous.map(Into::into).unwrap_or_default(),
            labels: (&provenance.labels).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_defect_is_named() {
        let one = |text: &str| Labels::parse_one(text).unwrap_err().to_string();
        assert!(one("key").contains("\"key\": it is not KEY=VALUE"));
        for key in ["", "K", "a b", "ä", &"k".repeat(129)] {
            assert!(one(&format!("{key}=v")).contains("a key has"), "{key}");
        }
        for value in ["\n", "\u{1b}[31m", &"v".repeat(1025)] {
            assert!(one(&format!("k={value}")).contains("a value has"), "{value}");
        }
        assert_eq!(Labels::parse_one("a/b=c=d"), Ok(("a/b".to_owned(), "c=d".to_owned())));
        let label = |key: &str| v1::Label { key: key.to_owned(), value: String::new() };
        for keys in [["b", "a"], ["a", "a"]] {
            let labels: Vec<_> = keys.into_iter().map(label).collect();
            assert!(matches!(Labels::try_from(labels), Err(LabelError::Order(_))));
        }
        let many: Vec<_> = (10..75).map(|n| label(&n.to_string())).collect();
        assert_eq!(Labels::try_from(many), Err(LabelError::Count(65)));
    }

    #[test]
    fn provenance_is_the_same_after_a_message_and_may_be_empty() {
        let mut labels = Labels::default();
        labels.set("a", "b").unwrap();
        let written = SystemTime::UNIX_EPOCH + Duration::from_millis(1_234_567_890_123);
        let full = Provenance { written: Some(written), previous: Some(Digest::of(b"x")), labels };
        for provenance in [full, Provenance::default()] {
            assert_eq!(Provenance::try_from(v1::Provenance::from(&provenance)), Ok(provenance));
        }
        let short = v1::Provenance { previous: vec![1; 31].into(), ..v1::Provenance::default() };
        assert!(Provenance::try_from(short).unwrap_err().to_string().starts_with("previous: "));
        let late = v1::Provenance { written_unix_ms: u64::MAX, ..v1::Provenance::default() };
        assert!(Provenance::try_from(late).is_ok());
    }

    proptest! {
        #[test]
        fn valid_labels_are_the_same_after_a_message(
            labels in prop::collection::btree_map("[a-z0-9._/-]{1,20}", "[^\\p{Cc}]{0,40}", 0..64),
        ) {
            let mut valid = Labels::default();
            labels.iter().for_each(|(key, value)| valid.set(key, value).unwrap());
            prop_assert_eq!(Labels::try_from(Vec::from(&valid)), Ok(valid));
        }

        #[test]
        fn no_labels_make_it_panic(labels in prop::collection::vec((any::<String>(), any::<String>()), 0..70)) {
            let labels = labels.into_iter().map(|(key, value)| v1::Label { key, value }).collect::<Vec<_>>();
            if let Ok(valid) = Labels::try_from(labels.clone()) {
                prop_assert_eq!(Vec::<v1::Label>::from(&valid), labels);
            }
        }
    }
}
