//! The log of a state file: records of spaces, objects, regions and changes, one after another.
//!
//! A log begins with the records that were current when it was written, and continues with the
//! changes since. So an event costs a few words, for any number of regions. A successor reads the
//! log from its beginning, and applies the changes as the pager did.

use super::{StateError, wrong};
use crate::memory::{Change, Place};
use crate::processes::Process;
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use std::ops::Range;
use std::os::fd::RawFd;

const NEXT_SPACE: u64 = 1;
const SPACE: u64 = 2;
const OBJECT: u64 = 3;
const REGION: u64 = 4;
const UNMAP: u64 = 5;
const MOVE: u64 = 6;
const MAP_AGAIN: u64 = 7;
const TAKE_BACK: u64 = 8;
const FORGET: u64 = 9;
const FORK: u64 = 10;
const CLEAR: u64 = 11;
const PROCESS: u64 = 12;
const COPY: u64 = 13;

const KIND_BITS: u32 = 8;
const SHARED: u64 = 1;
const HUGE: u64 = 2;

/// The record of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectRecord {
    pub(crate) space: u32,
    /// The object's id, unique in its space. Regions name their object by it.
    pub(crate) id: u32,
    /// The first word of the table of page states. Mappings of the same shared memory name the same
    /// table.
    pub(crate) table_at: usize,
    pub(crate) pages: usize,
    /// The file's page that the first state describes.
    pub(crate) first_page: usize,
    /// The number of pages that no region has had.
    pub(crate) unused_pages: usize,
    pub(crate) file_first_chunk: u64,
    pub(crate) file_bytes: u64,
    pub(crate) is_shared: bool,
    pub(crate) is_huge: bool,
}

/// The record of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionRecord {
    pub(crate) space: u32,
    pub(crate) object: u32,
    pub(crate) place: Place,
    pub(crate) address: usize,
    /// The region's pages of the object's file.
    pub(crate) file_pages: Range<usize>,
}

/// A record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// The id of the next space.
    NextSpace {
        id: u32,
    },
    /// A space, and the number of its userfaultfd's descriptor.
    Space {
        id: u32,
        fd: RawFd,
    },
    /// The process of a space, once it is known.
    Process {
        space: u32,
        process: Process,
    },
    Object(ObjectRecord),
    Region(RegionRecord),
    Change(Change),
    /// A fork. `tables` has the child's private objects by id, with their new tables of page
    /// states.
    Fork {
        parent: u32,
        child: u32,
        fd: RawFd,
        tables: Vec<(u32, usize)>,
    },
    /// A space that begins as a copy of an earlier one, the base. `tables` has the private objects
    /// of the base by id, with the copy's tables, or 0 for objects that the space does not keep.
    /// The differences follow as further records.
    Copy {
        base: u32,
        space: u32,
        fd: RawFd,
        tables: Vec<(u32, usize)>,
    },
}

fn place_number(place: Place) -> u64 {
    match place {
        Place::Here => 0,
        Place::Moved => 1,
        Place::Displaced => 2,
    }
}

fn pair(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn unpair(word: u64) -> (u32, u32) {
    let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).expect("the mask leaves 32 bits");
    (half(word >> 32), half(word))
}

impl Record {
    /// Appends the record's words to `words`.
    pub(super) fn write(&self, words: &mut Vec<u64>) {
        let at = words.len();
        words.push(0);
        let kind = match self {
            Self::NextSpace { id } => {
                words.push(u64::from(*id));
                NEXT_SPACE
            }
            Self::Space { id, fd } => {
                words.push(pair(*id, fd.cast_unsigned()));
                SPACE
            }
            Self::Object(object) => {
                let flags = if object.is_shared { SHARED } else { 0 } | if object.is_huge { HUGE } else { 0 };
                words.push(pair(object.space, object.id));
                let numbers = [object.table_at, object.pages, object.first_page, object.unused_pages];
                words.extend(numbers.map(|n| n as u64));
                words.extend([object.file_first_chunk, object.file_bytes, flags]);
                OBJECT
            }
            Self::Region(region) => {
                let pages = [region.file_pages.start as u64, region.file_pages.len() as u64];
                words.extend([
                    pair(region.space, region.object),
                    region.address as u64 | place_number(region.place),
                ]);
                words.extend(pages);
                REGION
            }
            Self::Process { space, process } => {
                words.extend([pair(*space, process.pid), process.start]);
                PROCESS
            }
            Self::Change(change) => write_change(change, words),
            Self::Fork { parent, child, fd, tables } => {
                write_copy(*parent, *child, *fd, tables, words);
                FORK
            }
            Self::Copy { base, space, fd, tables } => {
                write_copy(*base, *space, *fd, tables, words);
                COPY
            }
        };
        words[at] = kind | ((words.len() - at) as u64) << KIND_BITS;
    }

    /// Reads the record that begins at word `at`, and returns it with the position of the next one.
    ///
    /// # Errors
    /// [`StateError::Wrong`].
    pub(super) fn read(
        word: impl Fn(usize) -> u64,
        at: usize,
        end: usize,
    ) -> Result<(Self, usize), StateError> {
        let head = word(at);
        let (kind, len) = (head & ((1 << KIND_BITS) - 1), to_usize(head >> KIND_BITS));
        let next = at.checked_add(len).filter(|next| len > 0 && *next <= end);
        let Some(next) = next else {
            return wrong(format!("the record at word {at} of its log has {len} words, which is impossible"));
        };
        let of = |index: usize| if 1 + index < len { word(at + 1 + index) } else { 0 };
        let expected = match kind {
            NEXT_SPACE | SPACE | CLEAR | FORGET => 2,
            PROCESS => 3,
            UNMAP | MAP_AGAIN | TAKE_BACK => 4,
            MOVE | REGION => 5,
            OBJECT => 9,
            FORK | COPY => 3 + (len.max(3) - 3) / 2 * 2,
            _ => return wrong(format!("the record at word {at} of its log has the unknown kind {kind}")),
        };
        if len != expected {
            return wrong(format!(
                "the record at word {at} of its log, of kind {kind}, has {len} words instead of {expected}"
            ));
        }
        let fd = |word: u64| {
            RawFd::try_from(word & u64::from(u32::MAX))
                .or_else(|_| wrong("its log names a descriptor with a negative number"))
        };
        let tables = || (2..len - 1).step_by(2).map(|i| (unpair(of(i)).1, to_usize(of(i + 1)))).collect();
        let record = match kind {
            NEXT_SPACE => Self::NextSpace { id: unpair(of(0)).1 },
            PROCESS => Self::Process {
                space: unpair(of(0)).0,
                process: Process { pid: unpair(of(0)).1, start: of(1) },
            },
            SPACE => Self::Space { id: unpair(of(0)).0, fd: fd(of(0))? },
            OBJECT => Self::Object(ObjectRecord {
                space: unpair(of(0)).0,
                id: unpair(of(0)).1,
                table_at: to_usize(of(1)),
                pages: to_usize(of(2)),
                first_page: to_usize(of(3)),
                unused_pages: to_usize(of(4)),
                file_first_chunk: of(5),
                file_bytes: of(6),
                is_shared: of(7) & SHARED != 0,
                is_huge: of(7) & HUGE != 0,
            }),
            REGION => Self::Region(read_region([of(0), of(1), of(2), of(3)])?),
            FORK => Self::Fork {
                parent: unpair(of(0)).0,
                child: unpair(of(0)).1,
                fd: fd(of(1))?,
                tables: tables(),
            },
            COPY => {
                Self::Copy { base: unpair(of(0)).0, space: unpair(of(0)).1, fd: fd(of(1))?, tables: tables() }
            }
            _ => Self::Change(read_change(kind, [of(0), of(1), of(2), of(3)])?),
        };
        Ok((record, next))
    }
}

fn write_copy(base: u32, space: u32, fd: RawFd, tables: &[(u32, usize)], words: &mut Vec<u64>) {
    words.extend([pair(base, space), u64::from(fd.cast_unsigned())]);
    words.extend(tables.iter().flat_map(|(id, at)| [u64::from(*id), *at as u64]));
}

fn write_change(change: &Change, words: &mut Vec<u64>) -> u64 {
    let (space, numbers, kind) = match change {
        Change::Unmap { space, addresses } => (space, vec![addresses.start, addresses.end], UNMAP),
        Change::Move { space, from, to } => (space, vec![from.start, from.end, *to], MOVE),
        Change::MapAgain { space, from, to } => (space, vec![*from, *to], MAP_AGAIN),
        Change::TakeBack { space, addresses } => (space, vec![addresses.start, addresses.end], TAKE_BACK),
        Change::Clear { space } => (space, Vec::new(), CLEAR),
        Change::Forget { space } => (space, Vec::new(), FORGET),
    };
    words.push(u64::from(*space));
    words.extend(numbers.into_iter().map(|n| n as u64));
    kind
}

fn read_change(kind: u64, words: [u64; 4]) -> Result<Change, StateError> {
    let space = unpair(words[0]).1;
    let [a, b, c] = [words[1], words[2], words[3]].map(to_usize);
    let is_ordered = matches!(kind, MAP_AGAIN | CLEAR | FORGET) || a <= b;
    // Below this limit no address overflows, and no sum of two.
    const LIMIT: usize = 1 << 57;
    if !is_ordered || [a, c].iter().any(|n| *n > LIMIT) || (b > LIMIT && kind != TAKE_BACK) {
        return wrong(format!("its log has a change with impossible addresses: {a:#x}, {b:#x}, {c:#x}"));
    }
    if ![a, b, c].iter().all(|n| n.is_multiple_of(PAGE_BYTES)) {
        return wrong(format!(
            "its log has a change with addresses that are no pages': {a:#x}, {b:#x}, {c:#x}"
        ));
    }
    Ok(match kind {
        UNMAP => Change::Unmap { space, addresses: a..b },
        MOVE => Change::Move { space, from: a..b, to: c },
        MAP_AGAIN => Change::MapAgain { space, from: a, to: b },
        TAKE_BACK => Change::TakeBack { space, addresses: a..b },
        CLEAR => Change::Clear { space },
        _ => Change::Forget { space },
    })
}

fn read_region(words: [u64; 4]) -> Result<RegionRecord, StateError> {
    let (space, object) = unpair(words[0]);
    let (address, place) = (to_usize(words[1]), words[1] % PAGE_BYTES as u64);
    let place = match place {
        0 => Place::Here,
        1 => Place::Moved,
        2 => Place::Displaced,
        other => return wrong(format!("its log has a region with the unknown place {other}")),
    };
    let address = address - address % PAGE_BYTES;
    let (first, pages) = (to_usize(words[2]), to_usize(words[3]));
    let end =
        pages.checked_mul(PAGE_BYTES).and_then(|len| address.checked_add(len)).filter(|end| *end < 1 << 57);
    let file_end = first.checked_add(pages).filter(|_| pages > 0 && u32::try_from(pages).is_ok());
    let (Some(_), Some(file_end)) = (end, file_end) else {
        return wrong(format!("its log has an impossible region: {pages} pages at {address:#x}"));
    };
    Ok(RegionRecord { space, object, place, address, file_pages: first..file_end })
}
