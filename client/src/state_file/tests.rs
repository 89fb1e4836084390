//! Tests of state files: a successor finds the state that was written last.

use super::*;
use crate::memory::tests::{any_space, spaces_with};
use crate::memory::{Change, ObjectKind, PageState, Region, Space};
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
    let mut manifest = ManifestBuilder::new(ChunkSize::DEFAULT);
    manifest.file(&ImagePath::try_from(&b"a"[..]).unwrap(), 900 * 4096, false);
    (0..57).for_each(|_| manifest.chunk(ChunkContent::Zero));
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
    for region in spaces.apply(&change) {
        region.set_removed(0..region.pages()).unwrap();
    }
    state.append(&Record::Change(change), spaces, 2, done).unwrap();
}

/// Forks the parent, and then moves some of its memory.
fn fork_and_move(state: &State, spaces: &mut Spaces) {
    let child = any_space(1);
    spaces.fork(0, Arc::clone(&child)).unwrap();
    let tables = spaces.objects_of(1).map(|(id, object)| (id, object.states().table_at())).collect();
    let record = Record::Fork { parent: 0, child: 1, fd: child.uffd.number(), tables };
    state.append(&record, spaces, 2, None).unwrap();
    let from = 95 * 4096..100 * 4096;
    change(state, spaces, Change::Move { space: 0, from, to: 2000 * 4096 }, Some(3));
}

fn take_over(file: &File) -> Result<(State, Contents, Spaces), StateError> {
    let (state, contents) = State::open(file)?;
    let spaces: BTreeMap<u32, Arc<Space>> = contents.spaces.keys().map(|id| (*id, any_space(*id))).collect();
    let spaces = replay(&state, &contents, &image(), spaces)?;
    Ok((state, contents, spaces))
}

/// A region: space, address, pages of the file, their states, and whether the region is in the
/// address order.
type Row = (u32, usize, Range<usize>, Vec<PageState>, bool);

/// Returns all regions, moved and displaced ones included.
fn all(spaces: &Spaces) -> Vec<Row> {
    let ids: Vec<_> = spaces.spaces().map(|space| space.id).collect();
    let row = |(place, _, region): (crate::memory::Place, u32, Region)| {
        let states = (0..region.pages()).map(|page| region.state(page)).collect();
        let is_here = place == crate::memory::Place::Here;
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

/// Returns positions of words in use: of the header, of the log, and of page states.
fn any_place() -> impl Strategy<Value = usize> {
    let log = log_range(1).start;
    prop_oneof![0..HEADER_WORDS, log..log + 70, AT_STATES..AT_STATES + 64]
}

proptest! {
    /// A file with arbitrary changes is read as a possible state, or rejected.
    #[test]
    fn any_words_are_a_state_or_an_error(
        changes in prop::collection::vec((any_place(), any::<u64>(), 0u32..64), 1..6), len in 0u64..1 << 30,
    ) {
        let file = state_file();
        let state = create(&file);
        let mut spaces = two_regions(&state);
        state.rewrite(&spaces, 1, Some(0)).unwrap();
        fork_and_move(&state, &mut spaces);
        for (at, value, shift) in changes {
            let words = MappedFile::map(&file).unwrap();
            let before = words.words()[at].load(Ordering::Acquire);
            words.words()[at].store(if shift % 2 == 0 { value >> shift } else { before ^ 1 << shift }, Ordering::Release);
        }
        if let Ok((_, _, spaces)) = take_over(&file) {
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
