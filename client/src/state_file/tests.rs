//! Tests of state files: a successor finds the state that was written last.

use super::log::{ObjectRecord, RegionRecord};
use super::*;
use crate::memory::tests::{any_space, spaces_with};
use crate::memory::{Change, Object, ObjectKind, PageState, Place, Region, Space, states_for};
use crate::options::LossPolicy;
use crate::remote::Image;
use postcopy_proto::manifest::{ChunkContent, FileEntry, ManifestBuilder};
use postcopy_proto::page::ChunkSize;
use postcopy_proto::path::ImagePath;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::time::Duration;

const CHUNK: usize = 65536;

/// Returns an image of one file of 900 pages.
fn image() -> Image {
    image_of(900)
}

fn image_of(pages: usize) -> Image {
    let mut manifest = ManifestBuilder::new(ChunkSize::DEFAULT);
    manifest.file(&ImagePath::try_from(&b"a"[..]).unwrap(), (pages * 4096) as u64, false);
    (0..pages.div_ceil(16)).for_each(|_| manifest.chunk(ChunkContent::Zero));
    Image::new(manifest.finish().unwrap().root)
}

fn file_of(image: &Image) -> FileEntry {
    image.files()[0]
}

fn state_file() -> File {
    rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

fn create(file: &File) -> State {
    let options = Options {
        fault_deadline: Duration::from_millis(1234),
        on_loss: LossPolicy::Wait,
        working_set: true,
        fill: true,
        trace: true,
        record_pages: 77,
        record_cache_mib: 3,
        ..Options::default()
    };
    State::create(file, &Digest::of(b"image"), &options, None).unwrap()
}

/// Returns one space with two regions, in which page 1 is resident.
fn two_regions(state: &State) -> Spaces {
    let regions = [(90 * 4096, 0..40), (400 * 4096, 300..900)];
    let spaces = spaces_with(&any_space(0), state, file_of(&image()), ObjectKind::default(), CHUNK, &regions);
    spaces.regions().for_each(|region| region.set_resident(1..2));
    spaces
}

fn change(state: &State, spaces: &mut Spaces, change: Change, done: Option<usize>) {
    for region in spaces.apply(&change).iter().filter(|region| !region.is_shared()) {
        region.set_removed(0..region.pages()).unwrap();
    }
    state.append(&Record::Change(change), spaces, 2, done).unwrap();
}

fn fork(state: &State, spaces: &mut Spaces, parent: u32, id: u32) {
    let child = any_space(id);
    spaces.fork(parent, Arc::clone(&child)).unwrap();
    let private = spaces.objects_of(id).filter(|(_, object)| !object.kind().is_shared);
    let tables = private.map(|(id, object)| (id, object.states().table_at())).collect();
    let record = Record::Fork { parent, child: id, fd: child.uffd.number(), tables };
    state.append(&record, spaces, id + 1, None).unwrap();
}

/// Forks the parent, and then moves some of its memory.
fn fork_and_move(state: &State, spaces: &mut Spaces) {
    fork(state, spaces, 0, 1);
    let from = 95 * 4096..100 * 4096;
    change(state, spaces, Change::Move { space: 0, from, to: 2000 * 4096 }, Some(3));
}

fn take_over(file: &File) -> Result<(State, Contents, Spaces), StateError> {
    take_over_with(file, &image())
}

fn take_over_with(file: &File, image: &Image) -> Result<(State, Contents, Spaces), StateError> {
    let (state, contents) = State::open(file)?;
    let spaces: BTreeMap<u32, Arc<Space>> = contents.spaces.keys().map(|id| (*id, any_space(*id))).collect();
    let spaces = replay(&state, &contents, image, spaces)?;
    Ok((state, contents, spaces))
}

/// A region: space, address, pages of the file, their states, and whether the region is in the
/// address order.
type Row = (u32, usize, Range<usize>, Vec<PageState>, bool);

/// Returns all regions, moved and displaced ones included.
fn all(spaces: &Spaces) -> Vec<Row> {
    let ids: Vec<_> = spaces.spaces().map(|space| space.id).collect();
    let row = |(place, _, region): (Place, u32, Region)| {
        let states = (0..region.pages()).map(|page| region.state(page)).collect();
        let is_here = place == Place::Here;
        (region.space.id, region.address(0), region.file_pages(0..region.pages()), states, is_here)
    };
    ids.iter().flat_map(|id| spaces.places_of(*id)).map(row).collect()
}

#[test]
fn a_successor_finds_what_was_written_last() {
    let file = state_file();
    assert!(matches!(State::open(&file), Err(StateError::Empty)));
    let state = create(&file);
    assert!(matches!(State::open(&file), Err(StateError::Empty)), "no log has been written");
    let mut spaces = two_regions(&state);
    state.rewrite(&spaces, 1, None).unwrap();
    fork_and_move(&state, &mut spaces);
    state.done(5);
    // Parent and child change independently.
    spaces.regions_of(0).for_each(|region| region.set_resident(0..1));
    spaces.regions_of(1).for_each(|region| region.set_removed(2..3).unwrap());

    let (successor, contents, found) = take_over(&file).unwrap();
    assert_eq!((contents.image, contents.next_space), (Digest::of(b"image"), 2));
    assert_eq!((contents.messages_of, contents.messages_done, contents.messages.len()), (0, 5, 0));
    let Options { fault_deadline, on_loss, fill, record_pages, record_cache_mib, .. } = contents.options;
    assert_eq!((record_pages, record_cache_mib), (77, 3));
    assert_eq!((fault_deadline.as_millis(), on_loss, fill), (1234, LossPolicy::Wait, true));
    let fds: Vec<_> = spaces.spaces().map(|space| space.uffd.number()).collect();
    assert_eq!(contents.descriptors(), fds);
    assert_eq!(all(&found), all(&spaces));
    assert_eq!(found.unresolved(true), spaces.unresolved(true));
    // The successor's changes reach the file, and leave the other process's states alone.
    found.regions_of(0).for_each(|region| region.set_poisoned(3..4).unwrap());
    let of_child = |spaces: &Spaces| spaces.regions_of(1).map(|region| region.state(3)).collect::<Vec<_>>();
    assert!(of_child(&found).iter().all(|state| *state == PageState::Absent));
    found.regions_of(1).for_each(|region| region.set_resident(3..4));
    let seen = all(&found);
    successor.rewrite(&found, 2, Some(0)).unwrap();
    drop((state, spaces));
    assert_eq!(all(&take_over(&file).unwrap().2), seen);
    successor.end();
    assert!(matches!(State::open(&file), Err(StateError::Ended)));
}

#[test]
fn a_child_outlives_its_parent_in_the_log() {
    let file = state_file();
    let state = create(&file);
    let mut spaces = two_regions(&state);
    state.rewrite(&spaces, 1, None).unwrap();
    fork_and_move(&state, &mut spaces);
    change(&state, &mut spaces, Change::Forget { space: 0 }, None);
    let contents = State::open(&file).unwrap().1;
    assert_eq!(contents.descriptors(), [spaces.space(1).unwrap().uffd.number()]);
    assert_eq!(all(&take_over(&file).unwrap().2), all(&spaces));
}

#[test]
fn a_log_that_becomes_long_is_written_anew() {
    let file = state_file();
    let state = create(&file);
    let mut spaces = two_regions(&state);
    state.rewrite(&spaces, 1, None).unwrap();
    let mut longest = 0;
    for round in 0..20_000 {
        let (from, to) = if round % 2 == 0 { (400, 5000) } else { (5000, 400) };
        let addresses = from * 4096..(from + 600) * 4096;
        let moved = Change::Move { space: 0, from: addresses.clone(), to: to * 4096 };
        change(&state, &mut spaces, moved, None);
        change(&state, &mut spaces, Change::Unmap { space: 0, addresses }, Some(round % 3));
        longest = longest.max(state.committed().log_words);
    }
    assert!(longest < 2 * LEAST_CHANGES, "{longest} words");
    let (_, contents, found) = take_over(&file).unwrap();
    assert_eq!(contents.messages_done, 19_999 % 3);
    assert_eq!(all(&found), all(&spaces));
    let status = rustix::fs::fstat(&file).unwrap();
    assert!(status.st_blocks < 2 << 11, "{} blocks of 512 bytes", status.st_blocks);
}

/// Returns one space with an object of so many pages, each of which is a region.
fn many_regions(state: &State, image: &Image, count: usize) -> Spaces {
    let mut spaces = Spaces::default();
    spaces.add_space(any_space(0));
    let pages = 0..count;
    let states = states_for(state.arena(), &pages, [pages.clone()]).unwrap();
    let object = Object::new(file_of(image), 0, states, ObjectKind::default(), CHUNK);
    let object = spaces.add_object(0, Arc::new(object));
    for index in 0..count {
        let page = index * 7919 % count;
        spaces.add(0, object, Place::Here, (16 + index) * 4096, page..page + 1);
    }
    spaces
}

fn unmap(state: &State, spaces: &mut Spaces, space: u32, pages: Range<usize>) {
    let addresses = pages.start * 4096..pages.end * 4096;
    change(state, spaces, Change::Unmap { space, addresses }, None);
}

/// Compacts the log, and checks that it has at most `most_words`, that a successor finds the same
/// spaces, and that the successor's log is as long.
fn compact(state: &State, file: &File, image: &Image, spaces: &Spaces, most_words: usize) -> Spaces {
    state.rewrite(spaces, 1000, None).unwrap();
    let words = state.committed().log_words;
    assert!(words <= most_words, "{words} words");
    let (successor, _, found) = take_over_with(file, image).unwrap();
    assert!(all(&found) == all(spaces), "the successor has other regions");
    assert_eq!(found.unresolved(true), spaces.unresolved(true));
    successor.rewrite(&found, 1000, None).unwrap();
    assert_eq!(successor.committed().log_words, words);
    found
}

const REGIONS: usize = 4000;
const REGION_WORDS: usize = 5;
/// The words of a child with some differences.
const CHILD_WORDS: usize = 60;
/// The regions that a child does not share with its relative, because of one difference: those of
/// the tree's nodes on the path to it.
const NOT_SHARED: usize = 64;

#[test]
fn many_children_of_many_regions_are_written_once_with_their_differences() {
    let (file, image) = (state_file(), image_of(REGIONS));
    let state = create(&file);
    let mut spaces = many_regions(&state, &image, REGIONS);
    for child in 1..=50 {
        fork(&state, &mut spaces, 0, child);
        let page = 16 + child as usize * 13;
        unmap(&state, &mut spaces, child, page..page + 9);
        let (from, to) = ((page + 20) * 4096..(page + 22) * 4096, 9000 * 4096);
        change(&state, &mut spaces, Change::Move { space: child, from, to }, None);
        unmap(&state, &mut spaces, child, page + 20..page + 22);
        spaces.regions_of(child).nth(5).unwrap().set_resident(0..1);
        // Half of the memory is unmapped with one call.
        unmap(&state, &mut spaces, child, 2016..if child % 2 == 0 { 4016 } else { 2016 });
    }
    let most = REGIONS * REGION_WORDS + 50 * CHILD_WORDS;
    let found = compact(&state, &file, &image, &spaces, most);
    for child in 1..=50 {
        let regions = found.regions_of(child).count();
        let shared = found.shared_regions(0, child);
        assert!(shared + 6 * NOT_SHARED > regions, "child {child} shares {shared} of {regions} regions");
        assert!(shared + NOT_SHARED > spaces.shared_regions(0, child), "less than the fork itself");
    }
}

#[test]
fn children_share_with_one_another_once_their_relative_has_ended() {
    let (file, image) = (state_file(), image_of(REGIONS));
    let state = create(&file);
    let mut spaces = many_regions(&state, &image, REGIONS);
    // Each child forks a child of its own, and exits.
    for pair in 0..30 {
        fork(&state, &mut spaces, 0, 2 * pair + 1);
        fork(&state, &mut spaces, 2 * pair + 1, 2 * pair + 2);
        change(&state, &mut spaces, Change::Forget { space: 2 * pair + 1 }, None);
        let page = 16 + pair as usize * 13;
        unmap(&state, &mut spaces, 2 * pair + 2, page..page + 1);
    }
    let most = REGIONS * REGION_WORDS + 30 * CHILD_WORDS;
    let found = compact(&state, &file, &image, &spaces, most);
    assert!(found.shared_regions(0, 8) + 2 * NOT_SHARED > REGIONS);
    // The relative unmaps all, then most children do, and then the relative exits.
    unmap(&state, &mut spaces, 0, 0..5000);
    let found = compact(&state, &file, &image, &spaces, most);
    assert!(found.shared_regions(2, 8) + 3 * NOT_SHARED > REGIONS);
    for pair in (0..30).step_by(2) {
        unmap(&state, &mut spaces, 2 * pair + 2, 0..5000);
    }
    compact(&state, &file, &image, &spaces, most);
    change(&state, &mut spaces, Change::Forget { space: 0 }, None);
    let found = compact(&state, &file, &image, &spaces, most);
    assert!(found.shared_regions(4, 8) + 3 * NOT_SHARED > REGIONS);
}

/// A step of a session in one of its spaces, in pages.
#[derive(Clone, Debug)]
enum Step {
    Fork,
    Unmap(Range<usize>),
    Move(Range<usize>, usize),
    MapAgain(usize, usize),
    TakeBack(Range<usize>),
    SetRemoved(Range<usize>),
    Clear,
    Forget,
    Compact,
    TakeOver,
}

fn any_step() -> impl Strategy<Value = (prop::sample::Index, Step)> {
    let range = || (0usize..120, 1usize..40).prop_map(|(start, len)| start..start + len);
    let step = prop_oneof![
        4 => Just(Step::Fork),
        4 => range().prop_map(Step::Unmap),
        4 => (range(), 0usize..300).prop_map(|(from, to)| Step::Move(from, to)),
        1 => (0usize..120, 130usize..300).prop_map(|(from, to)| Step::MapAgain(from, to)),
        1 => range().prop_map(Step::TakeBack),
        2 => range().prop_map(Step::SetRemoved),
        1 => Just(Step::Clear),
        2 => Just(Step::Forget),
        2 => Just(Step::Compact),
        2 => Just(Step::TakeOver),
    ];
    (any::<prop::sample::Index>(), step)
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * 4096..pages.end * 4096
}

/// Returns a space with private and shared memory, of some regions each.
fn private_and_shared(state: &State) -> Spaces {
    let mut spaces = Spaces::default();
    spaces.add_space(any_space(0));
    for (is_shared, first, address) in [(false, 0, 0), (true, 200, 60), (false, 500, 90)] {
        let (pages, used) = (first..first + 100, first..first + 50);
        let states = states_for(state.arena(), &pages, [used]).unwrap();
        let kind = ObjectKind { is_shared, ..ObjectKind::default() };
        let object = Arc::new(Object::new(file_of(&image()), first, states, kind, CHUNK));
        let object = spaces.add_object(0, object);
        for region in 0..5 {
            let (at, page) = (address + 5 * region, first + (region * 3 % 5) * 10);
            spaces.add(0, object, Place::Here, at * 4096, page..page + 4);
        }
    }
    spaces
}

/// Takes a step, but for compaction and take-over.
fn step(state: &State, spaces: &mut Spaces, space: u32, step: &Step, next: u32) {
    let change = |spaces: &mut Spaces, made| change(state, spaces, made, None);
    match step.clone() {
        Step::Fork => fork(state, spaces, space, next),
        Step::Unmap(pages) => change(spaces, Change::Unmap { space, addresses: bytes(&pages) }),
        Step::Move(from, to) => {
            let to = to.max(from.end) * 4096;
            change(spaces, Change::Move { space, from: bytes(&from), to });
        }
        Step::MapAgain(from, to) => {
            change(spaces, Change::MapAgain { space, from: from * 4096, to: to * 4096 });
        }
        Step::TakeBack(pages) => change(spaces, Change::TakeBack { space, addresses: bytes(&pages) }),
        Step::SetRemoved(pages) => {
            let space = spaces.space(space).cloned().unwrap();
            for region in spaces.overlapping(&space, &bytes(&pages)) {
                region.set_removed(region.pages_in(&bytes(&pages))).unwrap();
            }
        }
        Step::Clear => change(spaces, Change::Clear { space }),
        Step::Forget if spaces.spaces().count() > 1 => change(spaces, Change::Forget { space }),
        Step::Forget | Step::Compact | Step::TakeOver => {}
    }
}

proptest! {
    /// After any steps, a successor finds the spaces as they would be without any compaction.
    #[test]
    fn a_successor_finds_the_spaces_after_any_steps(steps in prop::collection::vec(any_step(), 0..40)) {
        let file = state_file();
        let (own, mut state) = (State::own(), create(&file));
        let (mut model, mut spaces) = (private_and_shared(&own), private_and_shared(&state));
        state.rewrite(&spaces, 1, None).unwrap();
        let mut next = 1;
        for (which, taken) in steps {
            let ids: Vec<_> = model.spaces().map(|space| space.id).collect();
            let space = ids[which.index(ids.len())];
            step(&own, &mut model, space, &taken, next);
            step(&state, &mut spaces, space, &taken, next);
            next += u32::from(matches!(taken, Step::Fork));
            if matches!(taken, Step::TakeOver) {
                let (successor, contents, found) = take_over(&file).unwrap();
                prop_assert_eq!(contents.next_space, next);
                (state, spaces) = (successor, found);
            }
            if matches!(taken, Step::TakeOver | Step::Compact) {
                state.rewrite(&spaces, next, None).unwrap();
            }
        }
        let (_, _, found) = take_over(&file).unwrap();
        prop_assert_eq!(all(&found), all(&model));
        prop_assert_eq!(found.unresolved(true), model.unresolved(true));
        state.rewrite(&spaces, next, None).unwrap();
        prop_assert_eq!(all(&take_over(&file).unwrap().2), all(&model));
    }
}

/// Returns positions of words in use: of the header, of the logs, and of page states.
fn any_place() -> impl Strategy<Value = usize> {
    let [first, second] = [0, 1].map(|log| log_range(log).start);
    prop_oneof![0..HEADER_WORDS, first..first + 60, second..second + 70, AT_STATES..AT_STATES + 64]
}

/// Returns well-formed records with small numbers, which may contradict one another.
fn any_record() -> impl Strategy<Value = Record> {
    let id = || 0u32..5;
    let table = || prop_oneof![Just(0), (0usize..6).prop_map(|index| AT_STATES + 8 * index)];
    let tables = || [table(), table(), table()].prop_map(|at| (0..).zip(at).collect::<Vec<_>>());
    let pages = || (0usize..40, 1usize..30).prop_map(|(start, len)| start..start + len);
    let place = prop_oneof![Just(Place::Here), Just(Place::Moved), Just(Place::Displaced)];
    let object = (id(), 0u32..3, table(), pages(), 0usize..31, any::<bool>());
    let object = object.prop_map(|(space, id, table_at, pages, unused_pages, is_shared)| ObjectRecord {
        space,
        id,
        table_at,
        pages: pages.len(),
        first_page: pages.start,
        unused_pages,
        file_first_chunk: 0,
        file_bytes: 900 * 4096,
        is_shared,
        is_huge: false,
    });
    let region = (id(), 0u32..3, place, 0usize..100, pages());
    let region = region.prop_map(|(space, object, place, at, file_pages)| RegionRecord {
        space,
        object,
        place,
        address: at * 4096,
        file_pages,
    });
    let change = prop_oneof![
        (id(), pages()).prop_map(|(space, pages)| Change::Unmap { space, addresses: bytes(&pages) }),
        (id(), pages(), 0usize..100).prop_map(|(space, from, to)| Change::Move {
            space,
            from: bytes(&from),
            to: to * 4096
        }),
        (id(), pages()).prop_map(|(space, pages)| Change::TakeBack { space, addresses: bytes(&pages) }),
        id().prop_map(|space| Change::Clear { space }),
        id().prop_map(|space| Change::Forget { space }),
    ];
    prop_oneof![
        2 => id().prop_map(|id| Record::Space { id, fd: 3 }),
        4 => object.prop_map(Record::Object),
        6 => region.prop_map(Record::Region),
        3 => change.prop_map(Record::Change),
        2 => (id(), id(), tables())
            .prop_map(|(parent, child, tables)| Record::Fork { parent, child, fd: 3, tables }),
        4 => (id(), id(), tables())
            .prop_map(|(base, space, tables)| Record::Copy { base, space, fd: 3, tables }),
    ]
}

proptest! {
    /// Each record of an arbitrary log is rejected, or results in a state that a successor can use
    /// and write again.
    #[test]
    fn any_records_are_a_state_or_an_error(records in prop::collection::vec(any_record(), 0..40)) {
        let file = state_file();
        let state = create(&file);
        let spaces = two_regions(&state);
        state.rewrite(&spaces, 1, None).unwrap();
        for record in records {
            let before = state.committed();
            state.append(&record, &spaces, 9, None).unwrap();
            if take_over(&file).is_err() {
                state.commit(before);
            }
        }
        let (successor, _, found) = take_over(&file).unwrap();
        successor.rewrite(&found, 9, None).unwrap();
        prop_assert_eq!(all(&take_over(&file).unwrap().2), all(&found));
        for region in found.regions() {
            region.set_removed(0..region.pages()).unwrap();
        }
    }
}

proptest! {
    /// A file with arbitrary changes is read as a possible state, or rejected.
    #[test]
    fn any_words_are_a_state_or_an_error(
        changes in prop::collection::vec((any_place(), any::<u64>(), 0u32..64), 1..6),
        is_compacted in any::<bool>(),
        len in 0u64..1 << 30,
    ) {
        let file = state_file();
        let state = create(&file);
        let mut spaces = two_regions(&state);
        state.rewrite(&spaces, 1, Some(0)).unwrap();
        fork_and_move(&state, &mut spaces);
        if is_compacted {
            state.rewrite(&spaces, 2, None).unwrap();
        }
        for (at, value, shift) in changes {
            let words = MappedFile::map(&file).unwrap();
            let before = words.words()[at].load(Ordering::Acquire);
            words.words()[at].store(if shift % 2 == 0 { value >> shift } else { before ^ 1 << shift }, Ordering::Release);
        }
        if let Ok((state, _, spaces)) = take_over(&file) {
            state.rewrite(&spaces, 9, None).unwrap();
            for region in spaces.regions() {
                prop_assert!(region.pages() <= 900);
                region.set_resident(0..region.pages());
                prop_assert_ne!(region.state(0), PageState::Absent);
            }
        }
        // A file that never was a state file is rejected.
        let other = state_file();
        other.set_len(len).unwrap();
        prop_assert!(State::open(&other).is_err());
    }
}
