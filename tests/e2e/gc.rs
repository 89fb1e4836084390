//! `postcopyd gc`, beside servers and pushes that go on.

use postcopy::proto::digest::Digest;
use postcopy::proto::v1;
use postcopy::{Options, Session};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, shown};
use postcopy_tests::uploads::{frame_of, pack_of, upload_whole};
use postcopy_tests::wait_until;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

const CHUNK: usize = 64 << 10;

fn push(server: &Server, path: &Path, bytes: &[u8], reference: &str) {
    fs::write(path, bytes).expect("a file can be written");
    let _ = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)]);
}

fn count(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} is no number in {report}"))
}

/// What a pusher's image holds: a part that others have, too, and one of its own.
fn content(pusher: u64, round: u64) -> Vec<u8> {
    [memory_like(6 * CHUNK, 60 + (pusher + round) % 5), noise(CHUNK, 1000 * pusher + round)].concat()
}

/// What one pusher has committed and not removed, and how often a push had to be started again.
#[derive(Default)]
struct Pushed {
    committed: Vec<(String, u64, u64)>,
    removed: Vec<String>,
    sent_again: u64,
}

fn push_on(server: &Server, folder: &Path, pusher: u64, enough: impl Fn(u64) -> bool) -> Pushed {
    let mut pushed = Pushed::default();
    let dir = folder.join(format!("{pusher}"));
    fs::create_dir_all(&dir).expect("a directory");
    for round in (0..).take_while(|round| !enough(*round)) {
        fs::write(dir.join("mem"), content(pusher, round)).expect("a file");
        let reference = format!("p{pusher}:r{round}");
        let push = [OsStr::new("push"), dir.as_os_str(), OsStr::new(&reference)];
        // Without any grace time a push may lose again and again: it says so, and nothing is lost.
        loop {
            let output = postcopy(server.address(), push).output().expect("it starts");
            if output.status.success() {
                break;
            }
            let is_lost = |what: &str| shown(&output).contains(what);
            let lost = is_lost("the server lost chunks") || is_lost("asks for segments again");
            assert!(lost, "{}", shown(&output));
            pushed.sent_again += 1;
            assert!(pushed.sent_again < 50, "a push never succeeds");
        }
        if pusher.is_multiple_of(2) && round % 2 == 1 {
            let _ = run(server.address(), ["rm", &reference]);
            pushed.removed.push(reference);
        } else {
            pushed.committed.push((reference, pusher, round));
        }
    }
    pushed
}

#[test]
fn collections_beside_twenty_pushes_lose_nothing_that_was_committed() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let (collections, deleted) = (AtomicU64::new(0), AtomicU64::new(0));
    let done = AtomicBool::new(false);
    // At least three rounds, and until the collector has been at work; no end would be a starved collector.
    let enough = |round: u64| {
        let at_work = collections.load(Ordering::Relaxed) >= 3 && deleted.load(Ordering::Relaxed) > 0;
        assert!(round < 200, "the collector does not get on beside the pushes");
        round >= 3 && at_work
    };
    let pushed = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                deleted.fetch_add(count(&store.gc(&["--grace", "0s"]), "packs"), Ordering::Relaxed);
                collections.fetch_add(1, Ordering::Relaxed);
            }
        });
        let pushing: Vec<_> = (0..20)
            .map(|pusher| {
                let (server, folder, enough) = (&server, folder.path(), &enough);
                scope.spawn(move || push_on(server, folder, pusher, enough))
            })
            .collect();
        let outcomes: Vec<_> = pushing.into_iter().map(|pushing| pushing.join()).collect();
        done.store(true, Ordering::Relaxed);
        outcomes.into_iter().map(|outcome| outcome.expect("a pusher")).collect::<Vec<_>>()
    });
    let sent_again: u64 = pushed.iter().map(|pushed| pushed.sent_again).sum();
    let committed: Vec<_> = pushed.iter().flat_map(|pushed| &pushed.committed).collect();
    eprintln!(
        "{collections:?} collections deleted {deleted:?} packs beside {} commits; started again: {sent_again}",
        committed.len()
    );
    let report = store.assert_sound();
    assert_eq!(count(&report, "references"), committed.len() as u64);
    let rpc = Rpc::connect(server.address());
    let mut needed = BTreeSet::new();
    for (reference, pusher, round) in &committed {
        let content = content(*pusher, *round);
        assert!(rpc.read_file(reference, "mem").unwrap() == content, "{reference} differs");
        needed.extend(content.chunks(CHUNK).map(Digest::of));
    }
    for reference in pushed.iter().flat_map(|pushed| &pushed.removed) {
        assert_eq!(rpc.read_file(reference, "mem").unwrap_err().code(), tonic::Code::NotFound);
    }
    // What is left is needed: no pack without a chunk of an image.
    let _ = store.gc(&["--grace", "0s"]);
    let useful = store.frames().into_iter().filter(|(_, entry)| needed.contains(&entry.chunk));
    assert_eq!(store.packs(), useful.map(|(pack, _)| pack).collect::<BTreeSet<PathBuf>>());
    for (reference, ..) in &committed {
        let request = v1::DeleteImageRequest { reference: reference.clone() };
        rpc.wait(rpc.images().delete_image(request)).unwrap();
    }
    let _ = store.gc(&["--grace", "0s"]);
    assert_eq!((store.packs().len(), store.manifests().len(), store.staged().len()), (0, 0, 0));
}

#[test]
fn removing_and_collecting_gives_the_space_back() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    push(&server, &path, &noise(10 * CHUNK, 70), "kept:1");
    let before = store.bytes();
    push(&server, &path, &noise(20 * CHUNK, 71), "gone:1");
    let full = store.bytes();
    let nothing = store.gc(&["--grace", "0s", "--no-repack"]);
    assert_eq!((count(&nothing, "packs"), count(&nothing, "bytes")), (0, 0), "{nothing}");
    let _ = run(server.address(), ["rm", "gone:1"]);
    assert!(full - store.bytes() < 100, "rm alone gives nothing back");
    let removed = store.bytes();
    let report = store.gc(&["--grace", "0s", "--no-repack"]);
    assert_eq!(
        (count(&report, "packs"), count(&report, "manifests"), count(&report, "waiting")),
        (1, 2, 0),
        "{report}"
    );
    assert_eq!(count(&report, "bytes"), removed - store.bytes());
    assert_eq!(store.bytes(), before);
    assert!(count(&report, "bytes") > 20 * CHUNK as u64);
    assert!(Rpc::connect(server.address()).read_file("kept:1", "mem").unwrap() == noise(10 * CHUNK, 70));
    store.assert_sound();
    // A file that is mapped keeps its blocks: the server must let go of it by itself.
    let maps = || fs::read_to_string(format!("/proc/{}/maps", server.pid())).unwrap();
    wait_until("the server has let go of what was deleted", || !maps().contains("(deleted)"));
    assert_eq!(maps().lines().filter(|line| line.contains("/packs/")).count(), 1, "and of nothing else");
    assert!(Rpc::connect(server.address()).read_file("kept:1", "mem").unwrap() == noise(10 * CHUNK, 70));
    push(&server, &path, &noise(20 * CHUNK, 71), "again:1");
    assert!(Rpc::connect(server.address()).read_file("again:1", "mem").unwrap() == noise(20 * CHUNK, 71));
}

/// A tag moves on, a collector comes by; the program that was restored from the old image must not notice.
#[test]
fn an_image_that_a_session_is_filled_from_is_kept_without_a_reference() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let old = noise(20 * CHUNK, 73);
    push(&server, &path, &old, "app:1");
    let session = Session::open(server.address(), &"app:1".parse().unwrap(), Options::DEFAULT).unwrap();
    let region = session.map("mem").unwrap();
    assert_eq!(region[CHUNK], old[CHUNK]);
    // The same again, so that its files may be others, and then something else.
    push(&server, &path, &old, "app:1");
    push(&server, &path, &noise(3 * CHUNK, 74), "app:1");
    let report = store.gc(&["--grace", "0s", "--no-repack"]);
    assert_eq!((count(&report, "packs"), count(&report, "manifests")), (0, 0), "{report}");
    assert!(region[..] == old[..], "every byte, from the server");
    drop((region, session));
    wait_until("the garbage is collected", || {
        count(&store.gc(&["--grace", "0s", "--no-repack"]), "packs") == 1
    });
    assert_eq!((store.packs().len(), store.files("leases").len()), (1, 0));
    store.assert_sound();
}

#[test]
fn a_session_goes_on_while_the_packs_of_its_image_are_repacked() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let mut content = noise(40 * CHUNK, 80);
    let mut contents = Vec::new();
    for round in 0..12 {
        content[round * CHUNK..][..CHUNK].copy_from_slice(&noise(CHUNK, 81 + round as u64));
        push(&server, &path, &content, &format!("app:{round}"));
        contents.push(content.clone());
    }
    let session = Session::open(server.address(), &"app:11".parse().unwrap(), Options::DEFAULT).unwrap();
    let region = session.map("mem").unwrap();
    assert_eq!(region[CHUNK], content[CHUNK]);
    let before = store.packs();
    let plan = store.gc(&["--grace", "0s", "--dry-run"]);
    assert_eq!((count(&plan, "repacked"), count(&plan, "repacked_into")), (12, 1), "{plan}");
    assert_eq!(store.packs(), before);
    let output = store.postcopyd("gc", &["--grace", "0s"]);
    let text = shown(&output);
    assert!(output.status.success() && text.contains("repacked 12 packs into 1"), "{text}");
    assert!(!text.contains("segments read"), "progress is for terminals: {text}");
    assert!(store.packs().len() == 1 && store.packs().is_disjoint(&before));
    assert!(region[..] == content[..], "every byte, from the server");
    let rpc = Rpc::connect(server.address());
    for (round, content) in contents.iter().enumerate() {
        assert!(rpc.read_file(&format!("app:{round}"), "mem").unwrap() == *content);
    }
    store.assert_sound();
    let again = store.gc(&["--grace", "0s"]);
    assert_eq!((count(&again, "repacked_into"), count(&again, "packs")), (0, 0), "{again}");
}

/// `object_store` hides staged files in its lists, so a collector that trusted these would leave them for ever.
#[test]
fn left_overs_of_interrupted_writes_are_removed() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    push(&server, &folder.path().join("mem"), &noise(3 * CHUNK, 72), "app");
    let whole = store.files("");
    let append = |path: &Path, text: &str| {
        path.with_file_name(format!("{}{text}", path.file_name().unwrap().to_str().unwrap()))
    };
    let pack = store.packs().pop_first().unwrap();
    let new_pack = store.domain().join("packs/zz").with_file_name("00").join("0".repeat(64) + "#3");
    fs::create_dir_all(new_pack.parent().unwrap()).unwrap();
    let left_overs = [
        append(&pack, "#1"),
        append(&store.manifests().pop_first().unwrap(), "#12"),
        append(&store.reference("app", "latest"), "#2"),
        new_pack,
    ];
    for path in &left_overs {
        fs::write(path, vec![1; 1000]).unwrap();
    }
    assert_eq!(store.staged().len(), 4);
    store.assert_sound();
    assert_eq!(run(server.address(), ["ls"]).as_array().unwrap().len(), 1, "a staged reference is none");
    let report = store.gc(&["--grace", "0s"]);
    assert_eq!((count(&report, "left_overs"), count(&report, "bytes")), (4, 4000), "{report}");
    assert_eq!(store.files(""), whole);
}

#[test]
fn a_collector_that_cannot_read_a_manifest_deletes_nothing_and_says_why() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    push(&server, &path, &noise(3 * CHUNK, 73), "app");
    let manifests = store.manifests();
    push(&server, &path, &noise(3 * CHUNK, 74), "garbage");
    let _ = run(server.address(), ["rm", "garbage"]);
    let before = store.files("");
    let reference = store.reference("app", "latest");
    for harmed in manifests.iter().chain([&reference]) {
        let good = fs::read(harmed).unwrap();
        fs::write(harmed, &good[..good.len() / 2]).unwrap();
        for grace in ["0s", "1h"] {
            let output = store.postcopyd("gc", &["--no-wait", "--grace", grace]);
            let text = shown(&output);
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains("nothing was deleted") && text.contains("app:latest"), "{text}");
        }
        assert!(before.is_subset(&store.files("")), "something was deleted");
        fs::write(harmed, good).unwrap();
    }
    assert_eq!(count(&store.gc(&["--grace", "0s"]), "packs"), 1);
    store.assert_sound();
}

/// Makes everything that is condemned two hours older.
fn age_condemned(store: &StoreDir) {
    for path in store.files("condemned") {
        let then = SystemTime::now() - Duration::from_secs(7200);
        File::options()
            .write(true)
            .open(path)
            .expect("condemned")
            .set_modified(then)
            .expect("its time can be set");
    }
}

#[test]
fn nothing_younger_than_the_grace_time_is_deleted() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    push(&server, &folder.path().join("mem"), &noise(3 * CHUNK, 75), "app");
    let _ = run(server.address(), ["rm", "app"]);
    let (packs, manifests) = (store.packs(), store.manifests());
    for _ in 0..2 {
        let report = store.gc(&["--grace", "1h", "--no-wait"]);
        assert_eq!((count(&report, "waiting"), count(&report, "bytes")), (3, 0), "{report}");
        assert_eq!((store.packs(), store.manifests()), (packs.clone(), manifests.clone()));
    }
    age_condemned(&store);
    let report = store.gc(&["--grace", "3h", "--no-wait"]);
    assert_eq!(count(&report, "waiting"), 3, "{report}");
    let report = store.gc(&["--grace", "1h", "--no-wait"]);
    assert_eq!(
        (count(&report, "packs"), count(&report, "manifests"), count(&report, "waiting")),
        (1, 2, 0),
        "{report}"
    );
    assert_eq!(store.packs().len() + store.manifests().len() + store.files("condemned").len(), 0);
}

fn find_missing(rpc: &Rpc, chunks: &[Digest]) -> usize {
    let request = v1::FindMissingRequest { chunk_digests: Digest::concat(chunks) };
    let answer = rpc.wait(rpc.images().find_missing(request)).expect("an answer").into_inner();
    answer.missing_chunk_digests.len() / 32
}

#[test]
fn a_push_whose_chunks_are_collected_between_asking_and_committing_sends_them_again() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = noise(3 * CHUNK, 76);
    let chunks: Vec<_> = bytes.chunks(CHUNK).map(Digest::of).collect();
    // The chunks of a push that never committed.
    let frames: Vec<_> = bytes.chunks(CHUNK).map(|chunk| (Digest::of(chunk), frame_of(chunk))).collect();
    let pack = pack_of(&frames);
    let rpc = Rpc::connect(server.address());
    let upload = || upload_whole(&rpc, &pack).unwrap();
    upload();

    // Asked for after the condemning: pardoned, and kept.
    assert_eq!(count(&store.gc(&["--grace", "1h", "--no-wait"]), "waiting"), 1);
    age_condemned(&store);
    assert_eq!(find_missing(&rpc, &chunks), 0);
    assert_eq!(store.files("condemned").len(), 0, "FindMissing takes the condemning back");
    assert_eq!(count(&store.gc(&["--grace", "1h", "--no-wait"]), "packs"), 0);
    assert_eq!(store.packs().len(), 1);

    // Asked for before it, and the push is slower than the grace time: the commit says what is missing.
    assert_eq!(find_missing(&rpc, &chunks), 0);
    assert_eq!(count(&store.gc(&["--grace", "1h", "--no-wait"]), "waiting"), 1);
    age_condemned(&store);
    assert_eq!(count(&store.gc(&["--grace", "1h", "--no-wait"]), "packs"), 1);
    assert_eq!(find_missing(&rpc, &chunks), 3, "the server sees that they are gone");
    upload();
    assert_eq!(find_missing(&rpc, &chunks), 0);
    let _ = store.gc(&["--grace", "0s"]);
    push(&server, &path, &bytes, "app");
    assert!(rpc.read_file("app", "mem").unwrap() == bytes);
    store.assert_sound();
}

#[test]
fn a_grace_time_has_units_and_a_bare_number_is_refused() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    for grace in ["90s", "1h 30m", "7d"] {
        let _ = store.gc(&["--grace", grace, "--no-wait"]);
    }
    let output = store.postcopyd("gc", &["--grace", "90", "--no-wait"]);
    let text = shown(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("--grace") && text.contains("time unit needed"), "{text}");
}

/// An object's age is told in steps of the file system's clock, and must not seem shorter than the
/// grace time after that has been waited for.
#[test]
fn what_is_condemned_is_deleted_after_the_grace_time_by_the_same_run() {
    let server = Server::start();
    let (store, folder) = (StoreDir::of(&server), tempfile::tempdir().unwrap());
    let path = folder.path().join("mem");
    for seed in 0..8 {
        fs::write(&path, noise(10_000, seed)).unwrap();
        let _ = run(server.address(), ["push", path.to_str().unwrap(), "app:v1"]);
        let _ = run(server.address(), ["rm", "app:v1"]);
        let report = store.gc(&["--grace", "50ms"]);
        assert_eq!((&report["packs"], &report["waiting"]), (&1.into(), &0.into()), "{report}");
    }
}
