//! The tests that every kind of store passes: a directory, a bucket in memory, one without
//! conditional writes, a bucket of an S3 server, and a WebDAV server. Each test opens the store
//! several times, as several servers do.
//!
//! The S3 server is one in this process, or another one, if POSTCOPY_TEST_BUCKET has the URL of its
//! bucket: `make fleet` runs these tests on Garage.

mod repacking;

use crate::fixtures::{Image, of_restore};
use crate::store::objects::Objects;
use crate::store::objects::bucket::faulty::{Faults, Faulty, depth};
use crate::store::{
    Bucket, Caller, Collected, Collector, CommitOutcome, Damage, DiskCache, Domain, Location, Missing,
    OpenError, Store, StoreError, format, references, verify,
};
use bytes::Bytes;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use postcopy_proto::digest::Digest;
use postcopy_proto::provenance::Labels;
use postcopy_proto::reference::{Reference, TagReference};
use postcopy_proto::v1::{self, PageSpan};
use postcopy_tests::dav::DavServer;
use postcopy_tests::s3::{self, S3Server};
use prost::Message;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A place for a store.
struct Place {
    location: Location,
    faulty: Option<Arc<Faulty>>,
    _dir: Option<tempfile::TempDir>,
    _server: Option<S3Server>,
    _dav: Option<DavServer>,
}

impl Place {
    fn directory() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let location = Location::Directory(dir.path().join("store"));
        Self { location, faulty: None, _dir: Some(dir), _server: None, _dav: None }
    }

    fn bucket(seed: u64, faults: Faults) -> Self {
        let faulty = Faulty::new(seed);
        faulty.set(faults);
        let store: Arc<dyn ObjectStore> = faulty.clone();
        let bucket = Arc::new(Bucket::new(store, "a/prefix", "memory:").unwrap());
        let location = Location::Bucket(bucket);
        Self { location, faulty: Some(faulty), _dir: None, _server: None, _dav: None }
    }

    fn s3() -> Self {
        if let Ok(url) = std::env::var(TESTED) {
            let bucket = Bucket::of_url(&format!("{url}/{:016x}", fastrand::u64(..))).unwrap();
            return Self::of(bucket, None);
        }
        let server = S3Server::start();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = AmazonS3Builder::new()
            .with_endpoint(server.endpoint())
            .with_allow_http(true)
            .with_bucket_name(s3::BUCKET)
            .with_region(s3::REGION)
            .with_access_key_id(s3::ACCESS_KEY)
            .with_secret_access_key(s3::SECRET_KEY)
            .build();
        Self::of(Bucket::new(Arc::new(store.unwrap()), "p", "s3://bkt").unwrap(), Some(server))
    }

    fn dav() -> Self {
        let server = DavServer::start();
        let bucket = Bucket::of_url(&server.url("a/prefix")).unwrap();
        Self { _dav: Some(server), ..Self::of(bucket, None) }
    }

    fn of(bucket: Bucket, server: Option<S3Server>) -> Self {
        let location = Location::Bucket(Arc::new(bucket));
        Self { location, faulty: None, _dir: None, _server: server, _dav: None }
    }

    /// Opens the store, as another server does.
    fn open(&self) -> Store {
        Store::open_or_create(self.location.clone(), Domain::DEFAULT).unwrap()
    }

    fn objects(&self) -> Objects {
        format::open(&self.location, Domain::DEFAULT).unwrap()
    }

    fn damage(&self) -> Vec<Damage> {
        verify(self.location.clone(), Domain::DEFAULT).unwrap().damage
    }
}

/// The variable with the URL of a bucket to test.
const TESTED: &str = "POSTCOPY_TEST_BUCKET";

/// Calls `test` with each kind of store.
fn on_each_kind(test: impl Fn(&Place)) {
    on_each_fast_kind(&test);
    if std::env::var_os(TESTED).is_none() {
        test(&Place::s3());
        test(&Place::dav());
    }
}

/// Does the same, for a test of thousands of requests, without the slow S3 server of this process.
fn on_each_fast_kind(test: impl Fn(&Place)) {
    test(&Place::directory());
    test(&Place::bucket(1, Faults::default()));
    test(&Place::bucket(1, Faults { is_unconditional: true, ..Faults::default() }));
    if std::env::var_os(TESTED).is_some() {
        test(&Place::s3());
    }
}

fn reference(text: &str) -> TagReference {
    text.parse().unwrap()
}

fn put(objects: &Objects, path: &Path, bytes: &'static [u8]) {
    objects.put_unlocked(path, Bytes::from_static(bytes)).unwrap();
}

/// Reads all chunks of an image, verified.
fn assert_served(store: &Store, image: &Image) {
    for chunk in 0..image.manifest.root.chunks() {
        store.load_chunk(&image.manifest.root, postcopy_proto::page::ChunkIndex(chunk), true).unwrap();
    }
}

#[test]
fn a_store_is_created_once_and_other_content_is_refused() {
    on_each_kind(|place| {
        let open = || Store::open(place.location.clone(), Domain::DEFAULT);
        assert!(matches!(open(), Err(OpenError::Missing(_))));
        Image::of_seed(1).push(&place.open(), "a");
        assert!(open().unwrap().resolve(&"a".parse().unwrap()).is_ok());
        let objects = place.objects();
        put(&objects, &objects.layout.format(), b"postcopy store 3\n");
        let error = open().unwrap_err().to_string();
        assert!(error.contains("postcopy store 3"), "{error}");
        objects.remove(&objects.layout.format()).unwrap();
        let error = Store::open_or_create(place.location.clone(), Domain::DEFAULT).unwrap_err();
        assert!(matches!(error, OpenError::NotAStore(_)), "{error}");
    });
}

#[test]
fn what_one_server_has_stored_another_serves() {
    on_each_kind(|place| {
        let (writer, reader) = (place.open(), place.open());
        let (first, second) = (Image::of_seed(1), Image::large(2));
        first.push(&writer, "a:1");
        second.push(&writer, "a:2");
        assert_served(&reader, &second);
        assert_served(&place.open(), &first);
        assert!(first.load(&reader, 3, true).is_ok() && first.resident(&reader, 3).is_some());
        let by_digest: Reference = format!("b@{}", first.digest()).parse().unwrap();
        let (root, provenance) = reader.open_reference(&by_digest).unwrap();
        assert!(root.image() == first.digest() && provenance.is_none());
        assert_eq!(reader.find_missing(second.data_chunks().into_iter()).unwrap(), []);
        assert_eq!(place.damage(), []);
    });
}

#[test]
fn a_commit_says_what_is_missing_and_changes_nothing() {
    on_each_kind(|place| {
        // As behind a balancer, each request reaches another server.
        let image = Image::of_seed(1);
        let commit = || {
            let root = image.manifest.root_bytes.clone();
            place.open().commit(&reference("a"), Labels::default(), root, &Caller::default()).unwrap()
        };
        let segments = image.manifest.root.segment_digests().to_vec();
        assert_eq!(commit(), CommitOutcome::Missing(Missing { segments, chunks: Vec::new() }));
        place.open().put_segment(image.manifest.segments[0].clone()).unwrap();
        let chunks = image.data_chunks();
        assert_eq!(commit(), CommitOutcome::Missing(Missing { segments: Vec::new(), chunks }));
        assert!(matches!(place.open().resolve(&"a".parse().unwrap()), Err(StoreError::NotFound(_))));
        place.open().put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()).unwrap();
        assert_eq!(commit(), CommitOutcome::Committed(image.digest()));
        assert_eq!(place.open().resolve(&"a".parse().unwrap()).unwrap(), image.digest());
    });
}

#[test]
fn what_does_not_verify_is_not_stored() {
    on_each_kind(|place| {
        let (store, image) = (place.open(), Image::of_seed(1));
        let mut damaged = image.pack.to_vec();
        damaged[200] ^= 1;
        let outcome = store.put_pack(Digest::of(&damaged), damaged.into(), &Caller::default());
        assert!(matches!(outcome, Err(StoreError::Invalid { .. })), "{outcome:?}");
        let outcome = store.put_pack(image.pack_digest(), Bytes::new(), &Caller::default());
        assert!(matches!(outcome, Err(StoreError::Invalid { .. })), "{outcome:?}");
        assert!(!store.objects.exists(&store.objects.layout.pack(&image.pack_digest())).unwrap());
    });
}

#[test]
fn references_are_listed_in_pages_moved_and_removed() {
    on_each_kind(|place| {
        let (store, images) = (place.open(), [Image::of_seed(1), Image::of_seed(2)]);
        let names = ["a-b:x", "a/b/c:x", "a/b:latest", "a:latest", "a:v1"];
        names.iter().rev().for_each(|name| images[0].push(&store, name));
        for size in [1, 2, 100] {
            let (mut listed, mut after) = (Vec::new(), None);
            loop {
                let page = place.open().references(after.as_ref(), size).unwrap();
                listed.extend(page.entries.into_iter().map(|entry| entry.unwrap().to_string()));
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            assert_eq!(listed, names, "in bytewise order");
        }
        let all = references::list(&store.objects).unwrap();
        assert_eq!(all.iter().map(ToString::to_string).collect::<Vec<_>>(), names);
        images[1].push(&store, "a:v1");
        let referred = place.open().refer(&"a:v1".parse().unwrap()).unwrap();
        assert_eq!(referred.image, images[1].digest());
        assert_eq!(referred.provenance.unwrap().previous, Some(images[0].digest()));
        store.remove_reference(&reference("a:v1")).unwrap();
        assert!(matches!(store.remove_reference(&reference("a:v1")), Err(StoreError::NotFound(_))));
        assert!(store.resolve(&"a:v1".parse().unwrap()).is_err());
        assert!(store.resolve(&"a/b".parse().unwrap()).is_ok());
    });
}

/// Each writer adds a byte of its own. A lost update would lose one.
#[test]
fn updates_at_once_lose_none() {
    for place in [Place::directory(), Place::bucket(1, Faults::default())] {
        let store = place.open();
        let path = store.objects.layout.reference(&reference("a"));
        std::thread::scope(|scope| {
            for writer in 0..6u8 {
                let (place, path) = (&place, &path);
                scope.spawn(move || {
                    let objects = place.objects();
                    for _ in 0..5 {
                        let added = |before: Option<Bytes>| {
                            Ok([before.unwrap_or_default().as_ref(), &[writer]].concat().into())
                        };
                        while let Err(error) = objects.update(path, 1000, added) {
                            assert!(matches!(error, StoreError::Busy(_)), "{error}");
                        }
                    }
                });
            }
        });
        let mut bytes = store.objects.read(&path, 1000).unwrap().unwrap().to_vec();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..6u8).flat_map(|writer| [writer; 5]).collect::<Vec<_>>());
    }
}

#[test]
fn a_missing_damaged_or_wrong_locator_is_made_again() {
    on_each_kind(|place| {
        let (store, image, larger) = (place.open(), Image::of_seed(1), Image::with_more_chunks(1));
        image.push(&store, "a");
        let objects = &store.objects;
        let locator = objects.layout.locator(&image.manifest.root.segment_digests()[0]);
        let read = || objects.read(&locator, 1 << 20).unwrap();
        let good = read();
        objects.remove(&locator).unwrap();
        assert!(image.load(&place.open(), 3, true).is_ok());
        assert_eq!(read(), good);
        put(objects, &locator, b"damaged");
        assert!(image.load(&place.open(), 3, true).is_ok());
        assert_eq!(read(), good);
        // Every chunk of the image is also in the other pack.
        store.put_pack(larger.pack_digest(), larger.pack.clone(), &Caller::default()).unwrap();
        objects.remove(&objects.layout.pack(&image.pack_digest())).unwrap();
        let reader = place.open();
        assert_served(&reader, &image);
        assert_ne!(read(), good, "it names the other pack");
        assert!(image.resident(&reader, 3).is_some(), "without another look at the index");
    });
}

#[test]
fn runs_of_the_index_are_shared_by_servers_and_made_again_if_damaged() {
    on_each_kind(|place| {
        let store = place.open();
        let images: Vec<_> = (0..6).map(Image::of_seed).collect();
        for image in &images {
            store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()).unwrap();
            store.packs.write_index().unwrap();
        }
        let objects = &store.objects;
        let runs = || objects.names(&objects.layout.index()).unwrap();
        assert!((1..4).contains(&runs().len()), "{:?}", runs());
        let missing = |store: &Store| {
            let chunks: BTreeSet<_> = images.iter().flat_map(Image::data_chunks).collect();
            store.find_missing(chunks.into_iter()).unwrap()
        };
        assert_eq!(missing(&place.open()), []);
        for run in runs() {
            put(objects, &objects.layout.index().join(run), b"damaged");
        }
        assert_eq!(missing(&place.open()), []);
        objects.remove(&objects.layout.pack(&images[0].pack_digest())).unwrap();
        assert_eq!(missing(&place.open()).len(), images[0].data_chunks().len());
    });
}

#[test]
fn a_working_set_is_built_read_replaced_and_removed() {
    on_each_kind(|place| {
        let (store, image) = (place.open(), Image::of_seed(1));
        image.push(&store, "a");
        let digest = image.digest();
        assert!(store.working_set(&digest).unwrap().is_none());
        for id in 0..3 {
            let touched = vec![PageSpan { file: 0, first: id.into(), count: 4 }];
            place.open().keep_recording(&digest, of_restore(id), touched, Vec::new()).unwrap();
            assert!(place.open().build_working_set(&digest, 0.5).unwrap().pages >= 4);
        }
        let set = place.open().working_set(&digest).unwrap().unwrap();
        assert_eq!((set.recordings, set.pages), (3, 4));
        assert_eq!(store.images_with_working_sets().unwrap(), [digest]);
        assert!(store.remove_working_set(&digest).unwrap() && !store.remove_working_set(&digest).unwrap());
        assert!(store.working_set(&digest).unwrap().is_none());
        assert!(store.images_with_working_sets().unwrap().is_empty());
    });
}

#[test]
fn damage_is_named() {
    on_each_kind(|place| {
        let (store, image) = (place.open(), Image::of_seed(1));
        image.push(&store, "a:1");
        assert_eq!(place.damage(), []);
        let layout = &store.objects.layout;
        let segment = image.manifest.root.segment_digests()[0];
        put(&store.objects, &layout.manifest(&segment), b"damaged");
        put(&store.objects, &layout.pack(&image.pack_digest()), b"damaged");
        let damage = place.damage();
        for name in [format!("manifest {segment}"), format!("pack {}", image.pack_digest())] {
            assert!(damage.iter().any(|damage| damage.object.contains(&name)), "{name}: {damage:?}");
        }
    });
}

fn collect(place: &Place, grace: Duration) -> Collected {
    Collector::open(place.location.clone(), Domain::DEFAULT).unwrap().condemn().unwrap();
    Collector::open(place.location.clone(), Domain::DEFAULT).unwrap().sweep(grace).unwrap()
}

#[test]
fn what_no_reference_needs_is_deleted_and_the_rest_is_not() {
    on_each_kind(|place| {
        let (store, kept, removed) = (place.open(), Image::of_seed(1), Image::of_seed(2));
        kept.push(&store, "a/b:kept");
        removed.push(&store, "a:removed");
        assert_eq!(collect(place, Duration::ZERO), Collected::default());
        store.remove_reference(&reference("a:removed")).unwrap();
        let hour = Duration::from_secs(3600);
        let plan =
            |grace| Collector::open(place.location.clone(), Domain::DEFAULT).unwrap().plan(grace).unwrap();
        let before = plan(Duration::ZERO);
        assert_eq!((before.packs, before.bytes, before.waiting), (0, 0, 3));
        assert_eq!(collect(place, hour), Collected { waiting: 3, ..Collected::default() });
        assert_eq!(plan(hour), before);
        let due = plan(Duration::ZERO);
        assert_eq!((due.packs, due.manifests, due.bytes, due.waiting), (1, 2, before.waiting_bytes, 0));
        let collected = collect(place, Duration::ZERO);
        assert_eq!((collected.packs, collected.manifests, collected.waiting), (1, 2, 0));
        assert!(collected.bytes > removed.pack.len() as u64);
        let segment = &removed.manifest.root.segment_digests()[0];
        assert!(!store.objects.exists(&store.objects.layout.locator(segment)).unwrap());
        assert_eq!(collect(place, Duration::ZERO), Collected::default());
        assert_eq!(place.damage(), []);
        assert_served(&place.open(), &kept);
        // A deleted image can be pushed again, also through a server that has had it in memory.
        removed.push(&store, "a:removed");
        assert_served(&place.open(), &removed);
    });
}

#[test]
fn many_objects_are_collected_by_several_threads() {
    on_each_fast_kind(|place| {
        let (store, kept) = (place.open(), Image::large(1000));
        kept.push(&store, "kept");
        let images: Vec<_> = (0..40).map(Image::of_seed).collect();
        for (number, image) in images.iter().enumerate() {
            image.push(&store, &format!("a:{number}"));
        }
        assert_eq!(collect(place, Duration::ZERO), Collected::default());
        for number in (0..40).filter(|number| number % 4 != 0) {
            store.remove_reference(&reference(&format!("a:{number}"))).unwrap();
        }
        let collected = collect(place, Duration::ZERO);
        assert_eq!((collected.packs, collected.manifests), (30, 60));
        assert_eq!(place.damage(), []);
        let objects = &store.objects;
        assert_eq!(objects.names(&objects.layout.condemned_dir()).unwrap(), Vec::<String>::new());
        assert_served(&place.open(), &kept);
    });
}

#[test]
fn what_a_push_finds_is_pardoned() {
    on_each_kind(|place| {
        let (store, image) = (place.open(), Image::of_seed(1));
        store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()).unwrap();
        let pardons: [&dyn Fn(); 3] = [
            &|| assert_eq!(store.find_missing(image.data_chunks().into_iter()).unwrap(), []),
            &|| assert!(store.keep_pack(&image.pack_digest()).unwrap()),
            &|| image.push(&store, "a:1"),
        ];
        for pardon in pardons {
            let collector = Collector::open(place.location.clone(), Domain::DEFAULT).unwrap();
            collector.condemn().unwrap();
            pardon();
            assert_eq!(collector.sweep(Duration::ZERO).unwrap().packs, 0);
        }
        assert_served(&place.open(), &image);
    });
}

#[test]
fn an_image_that_is_served_stays_until_its_lease_ends() {
    on_each_kind(|place| {
        let (store, image) = (place.open(), Image::of_seed(1));
        image.push(&store, "a");
        let lease = store.lease(&image.digest()).unwrap();
        let leases = store.objects.layout.leases();
        // The lease of a bucket is written beside the stream.
        while store.objects.names(&leases).unwrap().is_empty() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        store.remove_reference(&reference("a")).unwrap();
        assert_eq!(collect(place, Duration::ZERO), Collected::default());
        assert_served(&place.open(), &image);
        drop(lease);
        if !store.objects.has_locks() {
            // As after its time.
            store.objects.remove_below(&leases).unwrap();
        }
        assert_eq!(collect(place, Duration::ZERO).packs, 1);
    });
}

/// A request to delete that was given up may still take effect.
#[test]
fn a_collection_that_fails_keeps_commits_away_until_its_deletion_ends() {
    let place = Place::bucket(1, Faults::default());
    let (store, image) = (place.open(), Image::of_seed(1));
    image.push(&store, "a");
    store.remove_reference(&reference("a")).unwrap();
    let collector = Collector::open(place.location.clone(), Domain::DEFAULT).unwrap();
    collector.condemn().unwrap();
    place.faulty.as_ref().unwrap().set(Faults { deletes_fail: true, ..Faults::default() });
    assert!(matches!(collector.sweep(Duration::ZERO), Err(StoreError::Bucket { .. })));
    place.faulty.as_ref().unwrap().set(Faults::default());
    let commit = || {
        let root = image.manifest.root_bytes.clone();
        store.commit(&reference("b"), Labels::default(), root, &Caller::default())
    };
    assert!(matches!(commit(), Err(StoreError::Busy(_))));
    // As after its time.
    store.objects.remove_below(&store.objects.layout.deletions()).unwrap();
    assert_eq!(commit().unwrap(), CommitOutcome::Committed(image.digest()));
    assert_eq!(place.damage(), []);
}

#[test]
fn times_are_those_of_the_store_s_clock() {
    on_each_kind(|place| {
        drop(place.open());
        let objects = place.objects();
        // The clocks of file systems and buckets tell a time in steps of up to a second.
        let step = Duration::from_secs(1);
        for _ in 0..3 {
            let (before, path) = (objects.now().unwrap(), objects.layout.manifests().join("times"));
            put(&objects, &path, b"");
            let written = objects.written(&path).unwrap().unwrap();
            let after = objects.now().unwrap();
            assert!(before <= written + step && written <= after + step, "{before:?} {written:?} {after:?}");
        }
        if let Location::Directory(_) = &place.location {
            let now = objects.now().unwrap();
            assert_eq!(now, fs::metadata(objects.layout.lock()).unwrap().modified().unwrap());
        }
    });
}

#[test]
fn odd_prefixes_and_odd_objects_are_no_obstacle() {
    let bucket = Bucket::new(Faulty::new(1), "a/~x=1", "memory:").unwrap();
    let place = Place::of(bucket, None);
    let (store, image) = (place.open(), Image::of_seed(1));
    let (layout, empty) = (&store.objects.layout, Digest::of(b"empty"));
    put(&store.objects, &layout.pack(&empty), b"");
    put(&store.objects, &layout.packs().join("00/letter"), b"dear");
    put(&store.objects, &layout.deletions().join("letter"), b"dear");
    image.push(&store, "a");
    assert_eq!(collect(&place, Duration::ZERO), Collected::default());
    assert_served(&place.open(), &image);
    let damage = place.damage();
    assert!(damage.len() == 1 && damage[0].object == format!("pack {empty}"), "{damage:?}");
    // A truncated pack is one that is damaged, and no failure of the bucket.
    put(&store.objects, &layout.pack(&image.pack_digest()), b"");
    let error = image.load(&store, 3, false).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

/// A lease and a deletion, as a server and a collector write them which then die.
#[test]
fn who_has_died_is_waited_for_and_no_longer() {
    let place = Place::bucket(1, Faults::default());
    let (store, image) = (place.open(), Image::of_seed(1));
    image.push(&store, "a");
    let layout = &store.objects.layout;
    let write = |path: &Path, seconds: u32| {
        let objects = Digest::concat(&[image.pack_digest()]);
        let lease = v1::StoredLease { objects: objects.clone(), seconds, ..Default::default() };
        let deletion = v1::StoredDeletion { objects, seconds };
        let bytes =
            if path.starts_with(layout.leases()) { lease.encode_to_vec() } else { deletion.encode_to_vec() };
        store.objects.put(path, bytes.into()).unwrap();
    };
    let (lease, deletion) = (layout.leases().join("1".repeat(32)), layout.deletions().join("1".repeat(32)));
    let commit = || {
        let root = image.manifest.root_bytes.clone();
        store.commit(&reference("b"), Labels::default(), root, &Caller::default())
    };
    write(&deletion, 3600);
    assert!(matches!(commit(), Err(StoreError::Busy(_))));
    write(&deletion, 0);
    std::thread::park_timeout(Duration::from_millis(5));
    assert_eq!(commit().unwrap(), CommitOutcome::Committed(image.digest()));
    assert!(!store.objects.exists(&deletion).unwrap());
    ["a", "b"].iter().for_each(|name| store.remove_reference(&reference(name)).unwrap());
    write(&lease, 3600);
    assert_eq!(collect(&place, Duration::ZERO).packs, 0);
    write(&lease, 0);
    std::thread::park_timeout(Duration::from_millis(5));
    assert_eq!(collect(&place, Duration::ZERO).packs, 1);
    // An object that cannot be decoded may be a lease of any object.
    put(&store.objects, &lease, b"\xff");
    let collector = Collector::open(place.location.clone(), Domain::DEFAULT).unwrap();
    assert!(matches!(collector.condemn(), Err(StoreError::Damaged { .. })));
}

/// From a reference: the reference, the root, the segment beside its locator, and the frame.
#[test]
fn a_first_chunk_takes_four_sequential_reads_of_a_bucket() {
    let place = Place::bucket(1, Faults::default());
    let faulty = place.faulty.as_ref().unwrap();
    let writer = place.open();
    (0..20).for_each(|seed| Image::of_seed(seed).push(&writer, &format!("a:{seed}")));
    let image = Image::large(100);
    image.push(&writer, "b");
    // Long, so that a thread which starts late asks while the others still wait.
    faulty.set(Faults { delay: Duration::from_millis(150), ..Faults::default() });
    let by_digest: Reference = format!("b@{}", image.digest()).parse().unwrap();
    for (reference, reads) in [("b".parse().unwrap(), 4), (by_digest, 3)] {
        let reader = place.open();
        faulty.take_requests();
        let (root, _) = reader.open_reference(&reference).unwrap();
        reader.read_segment(&root, 0).unwrap();
        image.load(&reader, 62, false).unwrap();
        let requests = faulty.take_requests();
        assert!(depth(&requests) <= reads, "{requests:#?}");
        assert!(requests.iter().all(|request| !request.text.starts_with("list")), "{requests:#?}");
        // A second restore reads the reference alone.
        let (root, _) = reader.open_reference(&reference).unwrap();
        assert_eq!(reader.read_segment(&root, 0).unwrap(), image.manifest.segments[0]);
        image.load(&reader, 62, false).unwrap();
        assert_eq!(faulty.take_requests().len(), reads - 3);
    }
}

#[test]
fn a_block_is_read_once_for_all_who_wait_and_ahead_of_who_reads_on() {
    let place = Place::bucket(1, Faults { delay: Duration::from_millis(20), ..Faults::default() });
    let (writer, image) = (place.open(), Image::large(1));
    image.push(&writer, "a");
    let (reader, faulty) = (place.open(), place.faulty.as_ref().unwrap());
    image.load(&reader, 1, false).unwrap();
    faulty.take_requests();
    std::thread::scope(|scope| {
        for chunk in 100..116 {
            let (reader, image) = (&reader, &image);
            scope.spawn(move || image.load(reader, chunk, true).unwrap());
        }
    });
    let gets = faulty.take_requests();
    let packs = gets.iter().filter(|request| request.text.contains("/packs/")).count();
    assert!(packs <= 4, "16 chunks of 4 KiB, in blocks of 256 KiB: {gets:#?}");
    assert_served(&reader, &image);
    let gets = faulty.take_requests();
    let blocks = image.pack.len().div_ceil(256 << 10);
    assert!(gets.len() + packs <= blocks, "{} blocks: {gets:#?}", blocks);
}

#[test]
fn a_server_that_starts_again_reads_its_disk_and_not_the_bucket() {
    let place = Place::bucket(1, Faults::default());
    let (image, faulty) = (Image::large(1), place.faulty.clone().unwrap());
    image.push(&place.open(), "a");
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        // The last write of a server that has ended may still be going on.
        let cache = loop {
            match DiskCache::open(dir.path(), 1 << 30) {
                Ok(cache) => break cache,
                Err(error) => assert!(error.to_string().contains("another server uses it"), "{error}"),
            }
            std::thread::park_timeout(Duration::from_millis(1));
        };
        let bucket = Bucket::new(faulty.clone(), "a/prefix", "memory:").unwrap().with_cache(cache);
        Store::open(Location::Bucket(Arc::new(bucket)), Domain::DEFAULT).unwrap()
    };
    let files = || walkdir(&dir.path().join("blocks"));
    let blocks = image.pack.len().div_ceil(256 << 10);
    let packs_read = || {
        let requests = faulty.take_requests();
        requests.iter().filter(|request| request.text.contains("/packs/")).count()
    };
    let store = open();
    packs_read();
    assert_served(&store, &image);
    assert_eq!(packs_read(), blocks);
    while files().len() < blocks {
        std::thread::park_timeout(Duration::from_millis(1));
    }
    drop(store);
    let store = open();
    assert_served(&store, &image);
    assert_eq!(packs_read(), 0);
    drop(store);
    // A damaged block is read again.
    fs::write(&files()[0], "damaged").unwrap();
    let store = open();
    assert_served(&store, &image);
    assert_eq!(packs_read(), 1);
}

fn walkdir(dir: &Path) -> Vec<PathBuf> {
    let entries =
        |dir: &Path| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    entries(dir).iter().flat_map(|dir| entries(dir)).collect()
}

/// Requests fail, some after they have had their effect. What was reported as done is done.
#[test]
fn a_bucket_that_fails_at_random_loses_nothing_that_was_committed() {
    for seed in 0..20 {
        let place = Place::bucket(seed, Faults::default());
        let images: Vec<_> = (0..4).map(Image::of_seed).collect();
        let faults = Faults { fails_before: Some(12), fails_after: Some(12), ..Faults::default() };
        drop(place.open());
        place.faulty.as_ref().unwrap().set(faults);
        let again = |work: &dyn Fn(&Store) -> Result<(), StoreError>| loop {
            let Ok(store) = Store::open(place.location.clone(), Domain::DEFAULT) else { continue };
            match work(&store) {
                Ok(()) => break,
                Err(error) => assert!(matches!(error, StoreError::Bucket { .. }), "{error}"),
            }
        };
        let mut committed = Vec::new();
        for (number, image) in images.iter().enumerate() {
            let name = format!("a:{number}");
            again(&|store| store.put_pack(image.pack_digest(), image.pack.clone(), &Caller::default()));
            again(&|store| store.put_segment(image.manifest.segments[0].clone()).map(|_| ()));
            again(&|store| {
                let root = image.manifest.root_bytes.clone();
                let outcome = store.commit(&reference(&name), Labels::default(), root, &Caller::default())?;
                assert_eq!(outcome, CommitOutcome::Committed(image.digest()));
                Ok(())
            });
            committed.push((name, image));
            for (name, image) in &committed {
                again(&|store| {
                    assert_eq!(store.resolve(&name.parse().unwrap())?, image.digest());
                    (0..12).try_for_each(|chunk| image.load(store, chunk, true).map(|_| ()))
                });
            }
        }
        place.faulty.as_ref().unwrap().set(Faults::default());
        assert_eq!(place.damage(), [], "seed {seed}");
    }
}
