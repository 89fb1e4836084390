//! The chunks that a push sends and a store keeps: those that the store does not have.

use super::{CHUNK, number, pull_cli, push_cli};
use postcopy::proto::digest::Digest;
use postcopy::proto::v1::{self, upload_pack_request};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, digest, shown};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

#[test]
fn pushing_twice_sends_nothing_the_second_time() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    fs::write(&path, memory_like(5 << 20, 11)).unwrap();
    let first = push_cli(&server, &path, "app:v1");
    assert!(number(&first, "sent_bytes") > 0, "{first}");
    let packs = store.packs();
    for reference in ["app:v1", "app:v2", "other"] {
        let again = push_cli(&server, &path, reference);
        assert_eq!((number(&again, "sent_bytes"), number(&again, "pack_bytes")), (0, 0), "{again}");
        let rest = number(&first, "size_bytes") - number(&first, "zero_bytes");
        assert_eq!(number(&again, "deduplicated_bytes"), rest, "{again}");
        assert_eq!(again["image"], first["image"]);
    }
    assert_eq!(store.packs(), packs, "no new pack");
    store.assert_sound();
}

#[test]
fn a_changed_copy_sends_only_its_changed_chunks() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let mut bytes = noise(80 * CHUNK, 12);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "app:v1");
    let before = store.packs();
    let changed = [0, 41 * CHUNK + 5, 80 * CHUNK - 1];
    for at in changed {
        bytes[at] ^= 1;
    }
    fs::write(&path, &bytes).unwrap();
    let report = push_cli(&server, &path, "app:v2");
    assert_eq!(number(&report, "sent_bytes"), 3 * CHUNK as u64, "{report}");
    assert_eq!(number(&report, "deduplicated_bytes"), 77 * CHUNK as u64, "{report}");
    let new: BTreeSet<_> = store
        .frames()
        .into_iter()
        .filter(|(pack, _)| !before.contains(pack))
        .map(|(_, entry)| entry.chunk)
        .collect();
    let expected = changed.map(|at| Digest::of(&bytes[at / CHUNK * CHUNK..][..CHUNK]));
    assert_eq!(new, expected.into_iter().collect(), "the new packs hold the changed chunks and no others");
    let target = folder.path().join("back");
    pull_cli(&server, "app:v2", &target);
    assert!(fs::read(target.join("mem")).unwrap() == bytes);
}

#[test]
fn images_share_the_frames_of_what_they_have_in_common() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let (common, own) = (noise(10 * CHUNK, 13), noise(4 * CHUNK, 14));
    for (image, name, own) in [("one", "a", &own[..CHUNK]), ("two", "b", &own[CHUNK..])] {
        let dir = folder.path().join(image);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(name), [&common[..], own].concat()).unwrap();
        // Twice in one image, too.
        fs::write(dir.join("copy"), &common).unwrap();
        let report = push_cli(&server, &dir, image);
        let sent = if image == "one" { 11 } else { 3 };
        assert_eq!(number(&report, "sent_bytes"), sent * CHUNK as u64, "{report}");
    }
    let frames = store.frames();
    let distinct: BTreeSet<_> = frames.iter().map(|(_, entry)| entry.chunk).collect();
    assert_eq!((frames.len(), distinct.len()), (14, 14), "each chunk lies in the store once");
    let one = run(server.address(), ["inspect", "one"]);
    assert_eq!((number(&one, "chunks"), number(&one, "distinct_chunks")), (21, 11), "{one}");
}

#[test]
fn names_and_tags_stand_side_by_side() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    // In bytewise order, as they are listed.
    let references = ["a/b/c:latest", "a/b:latest", "a/b:x", "a:latest", "a:x"];
    let mut images = BTreeMap::new();
    for (seed, reference) in (0..).zip(references).collect::<Vec<(u64, _)>>().into_iter().rev() {
        let path = folder.path().join("file");
        fs::write(&path, noise(5000, seed)).unwrap();
        let pushed = push_cli(&server, &path, reference.trim_end_matches(":latest"));
        assert_eq!(pushed["reference"], reference);
        images.insert(reference, pushed["image"].clone());
    }
    let listed = || -> Vec<(String, Value)> {
        let list = run(server.address(), ["ls"]);
        let entry = |image: &Value| (image["reference"].as_str().unwrap().to_owned(), image["image"].clone());
        list.as_array().unwrap().iter().map(entry).collect()
    };
    let mut left: Vec<_> = references.map(|r| (r.to_owned(), images[r].clone())).into();
    assert_eq!(listed(), left);
    for removed in ["a", "a/b:x", "a/b"] {
        let full = if removed.contains(':') { removed.to_owned() } else { format!("{removed}:latest") };
        let _ = run(server.address(), ["rm", removed]);
        left.retain(|(reference, _)| *reference != full);
        assert_eq!(listed(), left);
        assert!(fail(server.address(), ["inspect", removed]).contains(&full), "the error names it");
        for (reference, image) in &left {
            assert_eq!(run(server.address(), ["inspect", reference])["image"], *image);
        }
    }
    let text = fail(server.address(), ["rm", "a"]);
    assert!(text.contains("a:latest"), "removing what is gone is an error: {text}");
}

#[test]
fn the_same_files_have_the_same_digest_on_every_server() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["b/2", "a", "b/10", "b.txt", "z/y/x/w"];
    let make = |name: &str, order: &[&str], seconds: u64| {
        let root = folder.path().join(name);
        for path in order {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, memory_like(CHUNK + path.as_os_str().len() % 7, 15)).unwrap();
            fs::write(&path, memory_like(CHUNK + 9, 15)).unwrap();
            let file = File::options().append(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
            if postcopy_tests::is_root() {
                let owner = u32::try_from(seconds).unwrap();
                std::os::unix::fs::chown(&path, Some(owner), Some(owner)).unwrap();
            }
        }
        fs::create_dir_all(root.join("empty")).unwrap();
        symlink("../nowhere", root.join("link")).unwrap();
        root
    };
    let mut reversed = files;
    reversed.reverse();
    let (one, two) = (make("one", &files, 1_000_000), make("two", &reversed, 2_000));
    let (here, there) = (Server::start(), Server::start());
    let first = push_cli(&here, &one, "first:1");
    let second = push_cli(&there, &two, "second/name:2");
    assert_eq!(first["image"], second["image"]);
    fs::set_permissions(two.join("b/10"), fs::Permissions::from_mode(0o755)).unwrap();
    let executable = push_cli(&there, &two, "second/name:3");
    assert_ne!(executable["image"], first["image"], "an executable bit is part of the image");
    assert_eq!(number(&executable, "sent_bytes"), 0);
    fs::set_permissions(two.join("b/10"), fs::Permissions::from_mode(0o611)).unwrap();
    assert_eq!(
        push_cli(&there, &two, "second/name:4")["image"],
        first["image"],
        "the owner's bit alone counts"
    );
}

fn push_at_once(clients: usize) {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("mem");
    let bytes = memory_like(24 << 20, 18);
    fs::write(&path, &bytes).expect("a file can be written");
    let references: Vec<_> = (0..clients).map(|i| format!("app:{}", i / 2)).collect();
    let children: Vec<_> = references
        .iter()
        .map(|reference| {
            let mut command =
                postcopy(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)]);
            command.arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        })
        .collect();
    let mut images = BTreeSet::new();
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", shown(&output));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        images.insert(report["image"].as_str().expect("a digest").to_owned());
    }
    assert_eq!(images.len(), 1, "the same files, the same image");
    let report = StoreDir::of(&server).assert_sound();
    assert_eq!(number(&report, "references"), clients.div_ceil(2) as u64);
    for reference in &references {
        let _ = run(server.address(), ["verify", reference]);
    }
    let target = folder.path().join("back");
    pull_cli(&server, &references[0], &target);
    assert!(fs::read(target.join("mem")).expect("it was pulled") == bytes);
}

#[test]
fn two_clients_that_push_the_same_at_once_are_both_right() {
    push_at_once(2);
}

#[test]
fn eight_clients_that_push_the_same_at_once_are_all_right() {
    push_at_once(8);
}

/// An upload that waits for the server's memory must not delay others on its connection that have
/// memory.
#[test]
fn uploads_on_one_connection_do_not_starve_each_other() {
    let server = Server::start();
    let rpc = Rpc::connect(server.address());
    let part = bytes::Bytes::from(noise(1 << 20, 41));
    let begin = v1::UploadPackBegin { digest: Digest::of(b"another").into(), size_bytes: 48 << 20 };
    let parts = [upload_pack_request::Part::Begin(begin)]
        .into_iter()
        .chain((0..48).map(|_| upload_pack_request::Part::Data(part.clone())));
    let parts: Vec<_> = parts.map(|part| v1::UploadPackRequest { part: Some(part) }).collect();
    let codes = rpc.wait(async {
        let mut uploads = tokio::task::JoinSet::new();
        // Half of them have to wait for memory: there are 256 MiB.
        for _ in 0..10 {
            let (mut images, parts) = (rpc.images(), parts.clone());
            uploads.spawn(async move { images.upload_pack(tokio_stream::iter(parts)).await });
        }
        uploads.join_all().await.into_iter().map(|end| end.unwrap_err().code()).collect::<Vec<_>>()
    });
    assert_eq!(codes, [tonic::Code::InvalidArgument; 10], "all came whole, and did not fit their digest");
}

#[test]
fn a_report_accounts_for_every_byte() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("tree");
    fs::create_dir(&root).unwrap();
    // Two data chunks of which one comes twice, two zero chunks, and a last chunk of 100 bytes.
    let bytes =
        [&noise(CHUNK, 20)[..], &[0; 2 * CHUNK], &noise(CHUNK, 20), &noise(CHUNK, 21), &[5; 100]].concat();
    fs::write(root.join("mem"), &bytes).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    let report = push_cli(&server, &root, "app");
    let of = |field: &str| number(&report, field);
    let chunk = CHUNK as u64;
    assert_eq!(of("size_bytes"), 5 * chunk + 100);
    assert_eq!(
        (of("zero_bytes"), of("deduplicated_bytes"), of("sent_bytes")),
        (2 * chunk, chunk, 2 * chunk + 100)
    );
    let packs: u64 = StoreDir::of(&server).packs().iter().map(|pack| fs::metadata(pack).unwrap().len()).sum();
    assert_eq!(of("pack_bytes"), packs);
    let ratio = report["ratio"].as_f64().unwrap();
    let expected =
        f64::from(u32::try_from(of("sent_bytes")).unwrap()) / f64::from(u32::try_from(packs).unwrap());
    assert!((ratio - expected).abs() < 0.01, "{ratio} is not {expected}");
    let image = digest(&report["image"]);
    assert_eq!(StoreDir::of(&server).root_of(&image).size_bytes(), of("size_bytes"));
    let text = postcopy(server.address(), [OsStr::new("push"), root.as_os_str(), OsStr::new("app")])
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    for word in ["size", "zero", "deduplicated", "sent         nothing", "time"] {
        assert!(text.contains(word), "the text for people has no {word:?}: {text}");
    }
}

/// The server bounds the bytes that a pack's chunks stand for, however short their frames are.
#[test]
fn chunks_of_few_bytes_are_sent_in_packs_that_take_no_long_time_to_verify() {
    const CHUNK: u64 = 2 << 20;
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(600 * CHUNK).unwrap();
    (0..600u64).for_each(|n| file.write_all_at(&(n + 1).to_le_bytes(), n * CHUNK).unwrap());
    let arguments = [path.as_os_str(), OsStr::new("sparse:v1"), OsStr::new("--chunk-size=2097152")];
    let _ = run(server.address(), [&[OsStr::new("push")][..], &arguments].concat());
    assert_eq!(StoreDir::of(&server).packs().len(), 2);
}
