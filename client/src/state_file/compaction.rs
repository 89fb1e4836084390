//! The records that a log begins with: the current spaces.
//!
//! Parent and children have most regions in common. So a space is written as a copy of an earlier
//! space, with the differences ([`Spaces::with_bases`]): the length of the log grows with what
//! differs, and a replay builds trees that the two spaces share, as a fork does.

use super::log::{ObjectRecord, Record, RegionRecord};
use crate::memory::{Change, Object, Space, Spaces};
use std::sync::Arc;

/// Returns a log of the current records.
pub(super) fn words_of(spaces: &Spaces, next_space: u32) -> Vec<u64> {
    let mut words = Vec::new();
    Record::NextSpace { id: next_space }.write(&mut words);
    for (space, base) in spaces.with_bases() {
        write_space(spaces, space, base, &mut words);
    }
    words
}

fn write_space(spaces: &Spaces, space: &Space, base: Option<u32>, words: &mut Vec<u64>) {
    let (id, fd) = (space.id, space.uffd.number());
    let differences = spaces.differences(id, base);
    match base {
        None => Record::Space { id, fd }.write(words),
        Some(base) => {
            let table = |object: Option<Arc<Object>>| object.map_or(0, |object| object.states().table_at());
            let tables = differences.private.into_iter().map(|(id, object)| (id, table(object))).collect();
            Record::Copy { base, space: id, fd, tables }.write(words);
        }
    }
    if let Some(process) = space.process().filter(|_| id != 0) {
        Record::Process { space: id, process }.write(words);
    }
    for addresses in differences.removed {
        Record::Change(Change::Unmap { space: id, addresses }).write(words);
    }
    for (number, object) in differences.objects {
        Record::Object(record_of(id, number, &object)).write(words);
    }
    for (place, object, region) in differences.regions {
        let (address, file_pages) = (region.address(0), region.file_pages(0..region.pages()));
        Record::Region(RegionRecord { space: id, object, place, address, file_pages }).write(words);
    }
}

fn record_of(space: u32, id: u32, object: &Object) -> ObjectRecord {
    ObjectRecord {
        space,
        id,
        table_at: object.states().table_at(),
        pages: object.states().pages(),
        first_page: object.first_page(),
        unused_pages: object.states().unused(),
        file_first_chunk: object.file.first_chunk.0,
        file_bytes: object.file.size_bytes,
        is_shared: object.kind().is_shared,
        is_huge: object.kind().is_huge,
    }
}
