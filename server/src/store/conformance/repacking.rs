//! Tests of repacking, and of packs whose chunks lie in others too.

use super::*;
use crate::store::packs::read_index;
use crate::store::{Progress, Repacked, condemned, walk};
use postcopy_proto::pack::{PackBuilder, PackIndex};

const HOUR: Duration = Duration::from_secs(3600);

fn collector(place: &Place) -> Collector {
    Collector::open(place.location.clone(), Domain::DEFAULT).unwrap()
}

/// Repacks, and condemns what is not needed then.
fn repack(place: &Place, min_age: Duration) -> Repacked {
    collector(place).repack_and_condemn(min_age).unwrap().0
}

fn sweep(place: &Place) -> u64 {
    collector(place).sweep(Duration::ZERO).unwrap().packs
}

fn packs(place: &Place) -> BTreeSet<Digest> {
    walk::packs(&place.objects()).unwrap().into_iter().collect()
}

/// Returns a pack of the chunks of all these images.
fn pack_of(images: &[Image]) -> Bytes {
    let mut pack = PackBuilder::default();
    for image in images {
        for entry in PackIndex::parse(&image.pack).unwrap().entries() {
            pack.push(entry.chunk, &image.pack[entry.range()]);
        }
    }
    pack.finish().into()
}

fn put_pack(store: &Store, pack: &Bytes) -> Digest {
    let digest = Digest::of(pack);
    store.put_pack(digest, pack.clone(), &Caller::default()).unwrap();
    digest
}

/// Damages the frame of an image's chunk, in the image's own pack.
fn damage(place: &Place, image: &Image, chunk: usize) {
    let (mut bytes, chunk) = (image.pack.to_vec(), image.data_chunks()[chunk]);
    let index = PackIndex::parse(&bytes).unwrap();
    let entry = index.entries().iter().find(|entry| entry.chunk == chunk).unwrap();
    bytes[entry.range().end - 1] ^= 0xff;
    let objects = place.objects();
    objects.put_unlocked(&objects.layout.pack(&image.pack_digest()), bytes.into()).unwrap();
}

#[test]
fn small_packs_are_merged_and_servers_go_on_reading() {
    on_each_fast_kind(|place| {
        let store = place.open();
        let images: Vec<_> = (0..20).map(Image::of_seed).chain([Image::large(1000)]).collect();
        let names: Vec<_> = (0..images.len()).map(|number| format!("a:{number}")).collect();
        images.iter().zip(&names).for_each(|(image, name)| image.push(&store, name));
        let before = packs(place);
        // Servers that know the old places: all of them, the segments alone, and the first chunks.
        let readers = [place.open(), place.open(), place.open()];
        images.iter().for_each(|image| assert_served(&readers[0], image));
        images.iter().for_each(|image| drop(readers[1].segment(&image.manifest.root, 0).unwrap()));
        images.iter().for_each(|image| drop(image.load(&readers[2], 0, true).unwrap()));
        let plan = collector(place).plan(Duration::ZERO).unwrap();
        let repacked = repack(place, Duration::ZERO);
        assert_eq!((repacked.packs, repacked.new_packs), (21, 1));
        assert_eq!((plan.repacked.packs, plan.repacked.new_packs), (21, 1));
        let after: BTreeSet<_> = packs(place).difference(&before).copied().collect();
        assert_eq!(after.len(), 1);
        for reader in &readers {
            images.iter().for_each(|image| assert_served(reader, image));
        }
        assert_eq!(sweep(place), 21);
        assert_eq!((packs(place), place.damage()), (after.clone(), vec![]));
        for reader in &readers {
            images.iter().for_each(|image| assert_served(reader, image));
            // Releases the maps of deleted packs.
            reader.maintain().unwrap();
            images.iter().for_each(|image| assert_served(reader, image));
        }
        assert_eq!(repack(place, Duration::ZERO), Repacked::default());
        assert_eq!((sweep(place), packs(place)), (0, after));
        // The locators name the new pack.
        let reader = place.open();
        assert_served(&reader, &images[3]);
        assert_eq!(reader.packs.known().1, 0, "without a look at the chunk index");
        // A push finds the chunks there.
        images[3].push(&store, "b");
        assert_eq!(store.find_missing(images[7].data_chunks().into_iter()).unwrap(), []);
    });
}

#[test]
fn the_live_chunks_of_a_pack_that_is_mostly_dead_are_copied() {
    on_each_kind(|place| {
        let (store, images) = (place.open(), [1, 2, 3, 4, 5, 6].map(Image::large));
        let pack = put_pack(&store, &pack_of(&images));
        images[2].push(&store, "a");
        let reader = place.open();
        images[2].load(&reader, 7, true).unwrap();
        let repacked = repack(place, Duration::ZERO);
        assert_eq!((repacked.packs, repacked.new_packs), (1, 1));
        assert!((1 << 20..5 << 18).contains(&repacked.bytes), "{repacked:?}");
        assert_eq!(repack(place, Duration::ZERO), Repacked::default());
        assert_eq!(sweep(place), 1);
        assert!(packs(place).len() == 1 && !packs(place).contains(&pack));
        assert_served(&reader, &images[2]);
        assert_eq!((repack(place, Duration::ZERO), place.damage()), (Repacked::default(), vec![]));
    });
}

#[test]
fn long_new_packs_are_of_similar_length_and_stay() {
    let place = Place::directory();
    let (store, images) = (place.open(), (0..20).map(Image::large).collect::<Vec<_>>());
    images.iter().enumerate().for_each(|(number, image)| image.push(&store, &format!("a:{number:02}")));
    let repacked = repack(&place, Duration::ZERO);
    assert_eq!((repacked.packs, repacked.new_packs), (20, 2));
    assert_eq!((sweep(&place), packs(&place).len()), (20, 2));
    let objects = place.objects();
    for pack in packs(&place) {
        assert!(objects.length(&objects.layout.pack(&pack)).unwrap().unwrap() > 9 << 20);
    }
    assert_eq!(repack(&place, Duration::ZERO), Repacked::default());
    images.iter().for_each(|image| assert_served(&place.open(), image));
}

#[test]
fn chunks_lie_as_restores_touch_them_and_then_as_in_their_file() {
    on_each_kind(|place| {
        let (store, image, other) = (place.open(), Image::large(1), Image::of_seed(2));
        image.push(&store, "a");
        other.push(&store, "b");
        let touched = [(200, 3), (10, 2), (201, 1)].map(|(first, count)| PageSpan { file: 0, first, count });
        store.keep_recording(&image.digest(), of_restore(1), touched.to_vec(), Vec::new()).unwrap();
        assert_eq!(store.build_working_set(&image.digest(), 0.5).unwrap().pages, 5);
        // A set that is damaged is ignored.
        store.keep_recording(&other.digest(), of_restore(1), touched[1..2].to_vec(), Vec::new()).unwrap();
        put(&store.objects, &store.objects.layout.current_set(&other.digest()), b"damaged");
        let before = packs(place);
        assert_eq!(repack(place, Duration::ZERO).new_packs, 1);
        let new = *packs(place).difference(&before).next().unwrap();
        let (_, index) = read_index(&store.objects, new).unwrap().unwrap();
        let mut entries = index.entries().to_vec();
        entries.sort_unstable_by_key(|entry| entry.offset);
        let chunks = image.data_chunks();
        // Of the pages of one frame of a set, the first ones of the file are first.
        let first: BTreeSet<_> = [10, 11, 200, 201, 202].iter().map(|chunk| chunks[*chunk]).collect();
        let order: Vec<_> = entries.iter().map(|entry| entry.chunk).collect();
        assert_eq!(order[..5].iter().copied().collect::<BTreeSet<_>>(), first);
        let rest: Vec<_> = chunks.iter().filter(|chunk| !first.contains(chunk)).copied().collect();
        assert_eq!(order[5..], [rest, other.data_chunks()].concat());
    });
}

#[test]
fn a_damaged_frame_stays_where_it_is_with_its_pack() {
    on_each_kind(|place| {
        let (store, images) = (place.open(), [1, 2, 3].map(Image::of_seed));
        images.iter().zip(["a", "b", "c"]).for_each(|(image, name)| image.push(&store, name));
        let damaged = 5;
        damage(place, &images[0], damaged);
        let repacked = repack(place, Duration::ZERO);
        assert_eq!((repacked.packs, repacked.new_packs), (2, 1));
        assert_eq!(sweep(place), 2);
        assert!(packs(place).contains(&images[0].pack_digest()));
        for _ in 0..2 {
            assert_eq!((repack(place, Duration::ZERO), sweep(place)), (Repacked::default(), 0));
        }
        let reader = place.open();
        images[1..].iter().for_each(|image| assert_served(&reader, image));
        for chunk in 0..12 {
            let outcome = images[0].load(&reader, chunk, true);
            assert_eq!(outcome.is_ok(), chunk != damaged as u64, "{outcome:?}");
        }
    });
}

#[test]
fn young_packs_stay_and_a_few_are_not_worth_it() {
    on_each_kind(|place| {
        let (store, images) = (place.open(), [1, 2, 3].map(Image::of_seed));
        images[0].push(&store, "a");
        assert_eq!(repack(place, Duration::ZERO), Repacked::default());
        images[1].push(&store, "b");
        images[2].push(&store, "c");
        assert_eq!(collector(place).plan(HOUR).unwrap().repacked, Repacked::default());
        assert_eq!((repack(place, HOUR), packs(place).len()), (Repacked::default(), 3));
        assert_eq!(collect(place, HOUR), Collected::default());
    });
}

#[test]
fn a_copy_in_another_pack_is_enough_if_it_is_sound() {
    on_each_kind(|place| {
        let (store, first, second) = (place.open(), Image::of_seed(1), Image::with_more_chunks(1));
        put_pack(&store, &first.pack);
        put_pack(&store, &second.pack);
        first.push(&store, "a");
        second.push(&store, "b");
        // A chunk that both packs hold.
        damage(place, &second, 8 + 3);
        assert_eq!(collect(place, HOUR).waiting, 1);
        assert_eq!(collect(place, Duration::ZERO).packs, 0);
        assert_served(&place.open(), &first);
        put(&store.objects, &store.objects.layout.pack(&second.pack_digest()), second.pack.to_vec().leak());
        assert_eq!(collect(place, Duration::ZERO).packs, 1);
        assert_served(&place.open(), &first);
        assert_eq!(place.damage(), []);
    });
}

/// A collector that begins to delete the other copy at the same time.
#[test]
fn a_copy_that_another_collector_may_delete_is_no_copy() {
    let place = Place::bucket(1, Faults::default());
    let (store, first, second) = (place.open(), Image::of_seed(1), Image::with_more_chunks(1));
    first.push(&store, "a");
    second.push(&store, "b");
    collector(&place).condemn().unwrap();
    let deletion = v1::StoredDeletion { objects: Digest::concat(&[second.pack_digest()]), seconds: 3600 };
    let path = store.objects.layout.deletions().join("1".repeat(32));
    let (objects, bytes) = (place.objects(), Bytes::from(deletion.encode_to_vec()));
    let announce = {
        let path = path.clone();
        move || objects.put(&path, bytes.clone()).unwrap()
    };
    announce();
    assert_eq!(sweep(&place), 0);
    store.objects.remove(&path).unwrap();
    // The other collector begins during the mark, and may have marked less.
    collector(&place).condemn().unwrap();
    let during_mark = move |progress: Progress| {
        if progress.work == "references read" {
            announce();
        }
    };
    assert_eq!(collector(&place).with_progress(during_mark).sweep(Duration::ZERO).unwrap().packs, 0);
    store.objects.remove(&path).unwrap();
    collector(&place).condemn().unwrap();
    assert_eq!(sweep(&place), 1);
    assert_served(&place.open(), &first);
}

/// Two packs with the same chunks may both be condemned, by collectors that have seen other packs.
#[test]
fn of_two_condemned_packs_that_hold_a_chunk_one_stays() {
    on_each_kind(|place| {
        let (store, first, second) = (place.open(), Image::of_seed(1), Image::with_more_chunks(1));
        first.push(&store, "a");
        put_pack(&store, &second.pack);
        condemned::condemn(&store.objects, &[first.pack_digest(), second.pack_digest()]).unwrap();
        assert_eq!(sweep(place), 0);
        assert_served(&place.open(), &first);
        assert_eq!(collect(place, Duration::ZERO).packs, 1);
        assert_served(&place.open(), &first);
        assert_eq!(place.damage(), []);
    });
}

#[test]
fn a_push_relies_on_the_new_pack_and_lets_the_old_ones_go() {
    on_each_kind(|place| {
        let (store, images) = (place.open(), [1, 2, 3].map(Image::of_seed));
        images.iter().zip(["a", "b", "c"]).for_each(|(image, name)| image.push(&store, name));
        assert_eq!(repack(place, Duration::ZERO).packs, 3);
        for server in [&store, &place.open()] {
            assert_eq!(server.find_missing(images[0].data_chunks().into_iter()).unwrap(), []);
            images[1].push(server, "d");
        }
        assert_eq!(sweep(place), 3);
        images.iter().for_each(|image| assert_served(&place.open(), image));
    });
}

#[test]
fn a_server_with_a_disk_reads_on_while_packs_are_replaced() {
    let place = Place::bucket(1, Faults::default());
    let images: Vec<_> = (0..20).map(Image::of_seed).collect();
    let writer = place.open();
    images.iter().enumerate().for_each(|(number, image)| image.push(&writer, &format!("a:{number}")));
    let dir = tempfile::tempdir().unwrap();
    let bucket = Bucket::new(place.faulty.clone().unwrap(), "a/prefix", "memory:").unwrap();
    let bucket = bucket.with_cache(DiskCache::open(dir.path(), 1 << 30).unwrap());
    let store = Store::open(Location::Bucket(Arc::new(bucket)), Domain::DEFAULT).unwrap();
    images[..10].iter().for_each(|image| assert_served(&store, image));
    images[10..].iter().for_each(|image| drop(store.segment(&image.manifest.root, 0).unwrap()));
    repack(&place, Duration::ZERO);
    assert_eq!(sweep(&place), 20);
    images.iter().for_each(|image| assert_served(&store, image));
}
