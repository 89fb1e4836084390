//! Tests of the collector in a directory.

use super::*;
use crate::fixtures::{Image, store};
use crate::store::{Caller, CommitOutcome, Store, verify};
use postcopy_proto::provenance::Labels;
use std::fs;
use std::path::Path;

fn collector(dir: &Path) -> Collector {
    Collector::open(dir, Domain::DEFAULT).unwrap()
}

fn collect(dir: &Path) -> Collected {
    collector(dir).condemn().unwrap();
    collector(dir).sweep(Duration::ZERO).unwrap()
}

#[test]
fn what_no_reference_needs_is_deleted_and_the_rest_is_not() {
    let (dir, store) = store();
    let (kept, removed) = (Image::of_seed(1), Image::of_seed(2));
    kept.push(&store, "a/b:kept");
    removed.push(&store, "a:removed");
    assert_eq!(collect(dir.path()), Collected::default());
    store.remove_reference(&"a:removed".parse().unwrap()).unwrap();
    let collected = collect(dir.path());
    assert_eq!((collected.packs, collected.manifests, collected.waiting), (1, 2, 0));
    let segment = &removed.manifest.root.segment_digests()[0];
    assert!(!store.objects.layout.locator(segment).exists());
    assert!(collected.bytes > removed.pack.len() as u64);
    assert_eq!(collect(dir.path()), Collected::default());
    let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
    assert_eq!((verified.packs, verified.manifests, verified.references), (1, 2, 1));
    assert_eq!(verified.damage, []);
}

#[test]
fn a_server_that_runs_on_notices() {
    let (dir, store) = store();
    let image = Image::of_seed(1);
    image.push(&store, "a:1");
    assert!(image.load(&store, 0, false).is_ok());
    let chunk = image.data_chunks()[0];
    store.remove_reference(&"a:1".parse().unwrap()).unwrap();
    collect(dir.path());
    assert_eq!(store.find_missing([chunk].into_iter()).unwrap(), [chunk]);
    let outcome = store
        .commit(
            &"a:1".parse().unwrap(),
            Labels::default(),
            image.manifest.root_bytes.clone(),
            &Caller::default(),
        )
        .unwrap();
    assert!(matches!(outcome, CommitOutcome::Missing(missing) if !missing.segments.is_empty()));
    assert!(image.resident(&store, 0).is_some(), "a server that has it mapped still serves it");
    image.push(&store, "a:1");
    assert_eq!(verify(dir.path(), Domain::DEFAULT).unwrap().damage, []);
}

#[test]
fn grace_time_is_waited_for() {
    let (dir, store) = store();
    store.put_pack(Image::of_seed(1).pack_digest(), Image::of_seed(1).pack, &Caller::default()).unwrap();
    collector(dir.path()).condemn().unwrap();
    let collected = collector(dir.path()).sweep(Duration::from_secs(3600)).unwrap();
    assert_eq!(collected, Collected { waiting: 1, ..Collected::default() });
    assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 1);
}

#[test]
fn what_a_push_finds_is_pardoned() {
    let (dir, store) = store();
    let image = Image::of_seed(1);
    let pack = image.pack_digest();
    store.put_pack(pack, image.pack.clone(), &Caller::default()).unwrap();
    let pardons: [&dyn Fn(); 3] = [
        &|| assert_eq!(store.find_missing(image.data_chunks().into_iter()).unwrap(), []),
        &|| assert!(store.keep_pack(&pack).unwrap()),
        &|| image.push(&store, "a:1"),
    ];
    for pardon in pardons {
        collector(dir.path()).condemn().unwrap();
        pardon();
        assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 0);
        assert!(store.objects.layout.pack(&pack).exists());
    }
}

/// Images are committed between the rounds of a collection that deletes their objects.
#[test]
fn between_two_rounds_images_are_committed_completely_or_not_at_all() {
    let (dir, store) = store();
    let images: Vec<_> = (1..9).map(Image::of_seed).collect();
    for image in &images {
        image.push(&store, "a:removed");
    }
    store.remove_reference(&"a:removed".parse().unwrap()).unwrap();
    collector(dir.path()).condemn().unwrap();
    let (store, committed) =
        (std::sync::Arc::new(store), std::sync::Arc::new(std::sync::Mutex::new(Vec::new())));
    let (rounds, of_rounds) = (std::sync::Arc::clone(&store), std::sync::Arc::clone(&committed));
    let between = move |progress: Progress| {
        if progress.work != "condemned objects judged" {
            return;
        }
        for (number, image) in images.iter().enumerate() {
            let reference = format!("a:{number}").parse().unwrap();
            let root = image.manifest.root_bytes.clone();
            let outcome = rounds.commit(&reference, Labels::default(), root, &Caller::default()).unwrap();
            if matches!(outcome, CommitOutcome::Committed(_)) {
                of_rounds.lock().unwrap().push(number);
            }
        }
    };
    collector(dir.path()).with_progress(between).sweep(Duration::ZERO).unwrap();
    let committed = committed.lock().unwrap();
    assert!(!committed.is_empty(), "no image was complete after the first round");
    let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
    assert_eq!(verified.damage, []);
    let references: std::collections::BTreeSet<_> = committed.iter().collect();
    assert_eq!(verified.references, references.len() as u64);
}

#[test]
fn nothing_is_deleted_when_something_cannot_be_read() {
    let (dir, store) = store();
    let (image, garbage) = (Image::of_seed(1), Image::of_seed(2));
    image.push(&store, "a:1");
    store.put_pack(garbage.pack_digest(), garbage.pack.clone(), &Caller::default()).unwrap();
    collector(dir.path()).condemn().unwrap();
    let layout = &store.objects.layout;
    let objects = [
        layout.manifest(&image.digest()),
        layout.manifest(&image.manifest.root.segment_digests()[0]),
        layout.reference(&"a:1".parse().unwrap()),
    ];
    for path in objects {
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[1..]).unwrap();
        for outcome in [
            collector(dir.path()).condemn().map(|_| ()),
            collector(dir.path()).sweep(Duration::ZERO).map(|_| ()),
        ] {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("reference a:1"), "{error}");
        }
        fs::write(&path, good).unwrap();
        assert!(layout.pack(&garbage.pack_digest()).exists());
    }
    assert_eq!(collector(dir.path()).sweep(Duration::ZERO).unwrap().packs, 1);
}

#[test]
fn a_pack_that_does_not_parse_is_kept() {
    let (dir, store) = store();
    let pack = Image::of_seed(1).pack_digest();
    store.put_pack(pack, Image::of_seed(1).pack, &Caller::default()).unwrap();
    fs::write(store.objects.layout.pack(&pack), b"damaged").unwrap();
    assert_eq!(collect(dir.path()), Collected::default());
}

#[test]
fn left_overs_are_deleted_unless_somebody_is_writing() {
    let (dir, store) = store();
    let layout = &store.objects.layout;
    let pack = layout.pack(&Digest::of(b"x"));
    fs::create_dir_all(pack.parent().unwrap()).unwrap();
    let staged =
        [pack.with_extension("#1"), layout.manifests().join("y#12"), layout.references().join("z#1")];
    staged.iter().for_each(|path| fs::write(path, "left over").unwrap());
    let writing = StoreLock::write_staged(&store.objects).unwrap();
    assert_eq!(collect(dir.path()).left_overs, 0);
    drop(writing);
    let collected = collect(dir.path());
    assert_eq!((collected.left_overs, collected.bytes), (3, 27));
    assert!(staged.iter().all(|path| !path.exists()));
}

#[test]
fn a_locator_without_its_segment_is_a_left_over() {
    let (dir, store) = store();
    let image = Image::of_seed(1);
    image.push(&store, "a:1");
    let orphan = store.objects.layout.locator(&Digest::of(b"x"));
    fs::write(&orphan, "left over").unwrap();
    let collected = collect(dir.path());
    assert_eq!((collected.left_overs, collected.bytes), (1, 9));
    assert!(!orphan.exists());
    assert!(store.objects.layout.locator(&image.manifest.root.segment_digests()[0]).exists());
}

/// A process that relies on an object keeps the collector from deleting it until the reference
/// exists.
#[test]
fn commits_beside_collections_lose_nothing() {
    let (dir, store) = store();
    let pushes = |seed: u64| {
        let store = Store::open(dir.path(), Domain::DEFAULT).unwrap();
        for round in 0..20 {
            let image = Image::of_seed(seed * 100 + round % 4);
            let reference = format!("push{seed}:{round}");
            image.push_until_committed(&store, &reference);
            if round % 2 == 0 {
                store.remove_reference(&reference.parse().unwrap()).unwrap();
            }
        }
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let deleted = std::thread::scope(|scope| {
        let collecting = scope.spawn(|| {
            let mut deleted = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                deleted += collect(dir.path()).packs;
            }
            deleted
        });
        let pushing = [1, 2, 3].map(|seed| scope.spawn(move || pushes(seed)));
        let outcomes = pushing.map(|pushing| pushing.join());
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
        collecting.join().unwrap()
    });
    let verified = verify(dir.path(), Domain::DEFAULT).unwrap();
    assert_eq!((verified.references, verified.damage), (30, vec![]));
    assert!(deleted > 0, "the collector had something to delete");
    drop(store);
}
