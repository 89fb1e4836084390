//! The sorted keys of one directory, in a compact form.
//!
//! A component `a` of a name has two keys: `a/` for the names below it, `a:` for its tags. A tag has
//! one key, the tag. Components contain neither `/` nor `:`, so no key of a directory is a prefix of
//! another one, and the order of the keys is the order of the texts `name:tag` that begin with them.

use std::cmp::Ordering;
use std::fmt::Write as _;

/// The references that a key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Those of the names below a component.
    Below,
    /// Those whose name ends with a component.
    Tags,
    /// The one with a tag.
    Tag,
}

impl Group {
    const ALL: [Self; 4] = [Self::Below, Self::Tags, Self::Tag, Self::Tag];

    fn suffix(self) -> &'static str {
        match self {
            Self::Below => "/",
            Self::Tags => ":",
            Self::Tag => "",
        }
    }
}

/// A component of a name, escaped, or an escaped tag; and the references that it stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key<'a> {
    pub(super) component: &'a str,
    pub(super) group: Group,
}

impl Key<'_> {
    /// Returns the text with which the group's references begin.
    pub(super) fn text(&self) -> String {
        [self.component, self.group.suffix()].concat()
    }

    /// Compares the texts of two keys.
    pub(super) fn cmp(&self, other: &Self) -> Ordering {
        let (a, b) = (self.component.as_bytes(), other.component.as_bytes());
        let common = a.len().min(b.len());
        // Where two texts differ after that, they do in the next byte, or one of them ends.
        let rest_of = |key: &Self| {
            let (rest, suffix) = (&key.component.as_bytes()[common..], key.group.suffix().as_bytes());
            (rest.first().or(suffix.first()).copied(), rest.len() + suffix.len())
        };
        a[..common].cmp(&b[..common]).then_with(|| rest_of(self).cmp(&rest_of(other)))
    }

    /// Compares the key's text with another text.
    pub(super) fn cmp_text(&self, text: &str) -> Ordering {
        self.cmp(&Key { component: text, group: Group::Tag })
    }
}

/// Keys in ascending order.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// The components, each after its length in two bytes.
    bytes: Vec<u8>,
    /// For each key the offset of its component times 4, plus the number of its group.
    keys: Vec<u32>,
}

impl Names {
    /// Adds keys of a component, which is escaped.
    pub(super) fn push(&mut self, component: &str, groups: &[Group]) {
        let offset = u32::try_from(self.bytes.len()).expect("a listing is bounded by its reader");
        let length = u16::try_from(component.len()).expect("a file's name has at most 255 bytes");
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(component.as_bytes());
        self.keys.extend(groups.iter().map(|group| {
            let number = Group::ALL.iter().position(|g| g == group).expect("all are named");
            offset * 4 + u32::try_from(number).expect("there are four")
        }));
    }

    /// Sorts the keys, and gives back memory that they do not need.
    pub(super) fn sort(&mut self) {
        let Self { bytes, keys } = self;
        keys.sort_unstable_by(|a, b| key_at(bytes, *a).cmp(&key_at(bytes, *b)));
        bytes.shrink_to_fit();
        keys.shrink_to_fit();
    }

    /// Returns the bytes that the keys take in memory.
    pub(super) fn size_bytes(&self) -> usize {
        self.bytes.len() + size_of::<u32>() * self.keys.len()
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn key(&self, place: usize) -> Key<'_> {
        key_at(&self.bytes, self.keys[place])
    }

    /// Returns the place of the first key that is not before `text`.
    pub(super) fn place_of(&self, text: &str) -> usize {
        self.keys.partition_point(|key| key_at(&self.bytes, *key).cmp_text(text).is_lt())
    }
}

fn key_at(bytes: &[u8], key: u32) -> Key<'_> {
    let offset = (key / 4) as usize;
    let length = usize::from(u16::from_le_bytes([bytes[offset], bytes[offset + 1]]));
    let component =
        std::str::from_utf8(&bytes[offset + 2..][..length]).expect("escaped components are ASCII");
    Key { component, group: Group::ALL[(key % 4) as usize] }
}

/// Sets `text` to the name of a file, with `%XX` for each byte that no part of a reference contains.
/// So a file that is no reference has a place in the order, and its own text.
pub(super) fn escape(name: &[u8], text: &mut String) {
    text.clear();
    for &byte in name {
        if byte.is_ascii_alphanumeric() || b"._-".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("a string grows");
        }
    }
}

/// Returns the name of the file that [`escape`] has made this of.
pub(super) fn unescape(text: &str) -> Vec<u8> {
    let mut parts = text.split('%');
    let mut name = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (hex, rest) = part.split_at(2);
        name.push(u8::from_str_radix(hex, 16).expect("two hex digits follow"));
        name.extend(rest.as_bytes());
    }
    name
}
