//! Tests of the chunk index: several processes, deleted packs and damaged runs.

use super::*;
use crate::fixtures::{Image, store};
use crate::store::format::open_directory;
use crate::store::layout::Layout;
use crate::store::{Caller, Domain, Store};
use std::collections::BTreeSet;

fn put(store: &Store, image: &Image) {
    store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()).unwrap();
}

fn objects(store: &tempfile::TempDir) -> Objects {
    open_directory(store.path(), Domain::DEFAULT).unwrap()
}

fn layout(store: &tempfile::TempDir) -> Layout {
    objects(store).layout
}

/// Returns the packs in which the index finds chunks of the images, after it has read the
/// directory.
fn packs_found(index: &ChunkIndex, images: &[Image]) -> BTreeSet<Digest> {
    index.scan().unwrap();
    let mut packs = BTreeSet::new();
    for image in images {
        let (chunks, mut found) = (image.data_chunks(), BTreeSet::new());
        index
            .find(&chunks, |number, place| {
                found.insert(number);
                packs.insert(place.place.pack);
            })
            .unwrap();
        assert!(found.is_empty() || found.len() == chunks.len());
    }
    packs
}

fn all_packs(images: &[Image]) -> BTreeSet<Digest> {
    images.iter().map(Image::pack_digest).collect()
}

fn write_run(index: &ChunkIndex) {
    index.write().unwrap();
}

fn run_files(dir: &tempfile::TempDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(layout(dir).index()).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn runs_are_merged_and_found_by_other_processes_without_the_packs_trailers() {
    let (dir, store) = store();
    let images: Vec<_> = (0..9).map(|seed| Image::of_seed(seed * 3)).collect();
    let index = ChunkIndex::new(&objects(&dir));
    for image in &images {
        put(&store, image);
        assert!(packs_found(&index, &images).contains(&image.pack_digest()));
        write_run(&index);
        assert!(index.read(|state| state.recent.is_empty() && state.recent_packs.is_empty()));
    }
    assert!(run_files(&dir).len() < 4, "{:?}", run_files(&dir));
    // Whoever reads a trailer finds that it is none.
    for image in &images {
        fs::write(layout(&dir).pack(&image.pack_digest()), b"no pack").unwrap();
    }
    let other = ChunkIndex::new(&objects(&dir));
    assert_eq!(packs_found(&other, &images), all_packs(&images));
    assert!(other.read(|state| state.recent_packs.is_empty()));
}

#[test]
fn a_deleted_pack_leaves_the_index_with_the_next_merge_and_may_come_back() {
    let (dir, store) = store();
    let images: Vec<_> = (0..3).map(Image::of_seed).collect();
    images[..2].iter().for_each(|image| put(&store, image));
    let index = ChunkIndex::new(&objects(&dir));
    index.scan().unwrap();
    write_run(&index);
    fs::remove_file(layout(&dir).pack(&images[1].pack_digest())).unwrap();
    put(&store, &images[2]);
    index.scan().unwrap();
    write_run(&index);
    let rest = [images[0].clone(), images[2].clone()];
    assert_eq!(packs_found(&index, &images), all_packs(&rest));
    put(&store, &images[1]);
    assert_eq!(packs_found(&index, &images), all_packs(&images));
}

#[test]
fn a_damaged_run_is_made_again_from_the_packs() {
    let (dir, store) = store();
    let images: Vec<_> = (0..20).map(Image::of_seed).collect();
    images.iter().for_each(|image| put(&store, image));
    let length = || fs::metadata(&run_files(&dir)[0]).unwrap().len();
    let index = ChunkIndex::new(&objects(&dir));
    index.scan().unwrap();
    write_run(&index);
    for at in [0, 4096, length() - 1, length() - 70] {
        let path = run_files(&dir).pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= 1;
        fs::write(&path, bytes).unwrap();
        let other = ChunkIndex::new(&objects(&dir));
        other.scan().unwrap();
        // The process that finds the damage first finds fewer chunks, and reads the packs then.
        let _ = other.find(&images[0].data_chunks(), |_, _| {});
        let _ = other.find(&images[19].data_chunks(), |_, _| {});
        assert_eq!(packs_found(&other, &images), all_packs(&images), "{at}");
        write_run(&other);
        assert!(!path.exists() || Run::new(fs::File::open(&path).unwrap(), &path).is_ok(), "{at}");
    }
}

#[test]
fn a_damaged_run_is_not_merged_into_another() {
    let (dir, store) = store();
    let images: Vec<_> = (0..2).map(Image::of_seed).collect();
    put(&store, &images[0]);
    let index = ChunkIndex::new(&objects(&dir));
    index.scan().unwrap();
    write_run(&index);
    let path = run_files(&dir).pop().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[7] ^= 1;
    fs::write(&path, bytes).unwrap();
    put(&store, &images[1]);
    index.scan().unwrap();
    write_run(&index);
    assert!(!path.exists());
    assert_eq!(packs_found(&index, &images), all_packs(&images));
}

/// Each of two processes writes and merges runs that the other one has open.
#[test]
fn processes_that_merge_at_once_lose_no_chunk() {
    let (dir, store) = store();
    let images: Vec<_> = (0..40).map(Image::of_seed).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let index = ChunkIndex::new(&objects(&dir));
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    index.scan().unwrap();
                    write_run(&index);
                }
            });
        }
        let index = ChunkIndex::new(&objects(&dir));
        for (number, image) in images.iter().enumerate() {
            put(&store, image);
            assert_eq!(packs_found(&index, &images), all_packs(&images[..=number]));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
