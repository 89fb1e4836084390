//! Images that are pushed and pulled: what is sent, what is kept, and that it comes back as it was.

use postcopy::Remote;
use postcopy::proto::digest::Digest;
use postcopy::proto::page::ChunkSize;
use postcopy::proto::v1::{self, upload_pack_request};
use postcopy::pull::Pulling;
use postcopy::push::{PushOptions, push};
use postcopy_tests::binary;
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, digest, flip, shown};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const CHUNK: usize = 64 << 10;

fn push_cli(server: &Server, path: &Path, reference: &str) -> Value {
    run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)])
}

fn pull_cli(server: &Server, reference: &str, target: &Path) -> Value {
    run(server.address(), [OsStr::new("pull"), OsStr::new(reference), target.as_os_str()])
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} is no number in {report}"))
}

/// What stands at a path, as far as images keep it.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File { bytes: Vec<u8>, executable: bool },
    Link(Vec<u8>),
    EmptyDirectory,
}

fn tree(root: &Path) -> BTreeMap<Vec<u8>, Found> {
    let mut found = BTreeMap::new();
    tree_below(root, root, &mut found);
    found
}

fn tree_below(root: &Path, dir: &Path, found: &mut BTreeMap<Vec<u8>, Found>) {
    let mut is_empty = true;
    for entry in fs::read_dir(dir).expect("a directory") {
        is_empty = false;
        let path = entry.expect("an entry").path();
        let metadata = path.symlink_metadata().expect("it is there");
        let kind = if metadata.is_dir() {
            tree_below(root, &path, found);
            continue;
        } else if metadata.is_symlink() {
            Found::Link(fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec())
        } else {
            let bytes = fs::read(&path).expect("a file");
            Found::File { bytes, executable: metadata.mode() & 0o100 != 0 }
        };
        let relative = path.strip_prefix(root).expect("below the root");
        found.insert(relative.as_os_str().as_bytes().to_vec(), kind);
    }
    if is_empty && dir != root {
        let relative = dir.strip_prefix(root).expect("below the root");
        found.insert(relative.as_os_str().as_bytes().to_vec(), Found::EmptyDirectory);
    }
}

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

#[test]
fn a_tree_comes_back_byte_for_byte_and_kind_for_kind() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("tree");
    for i in 0..3000u64 {
        let dir = root.join(format!("small/{}", i % 37));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("{i}")), noise(usize::try_from(i % 301).unwrap(), i)).unwrap();
    }
    let deep = root.join(vec!["deep"; 60].join("/"));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("x".repeat(255)), "at the bottom").unwrap();
    fs::create_dir_all(root.join("empty/inner")).unwrap();
    fs::create_dir_all(root.join("small.d")).unwrap();
    fs::write(root.join("small!"), "sorts between a directory and its files").unwrap();
    let raw = root.join(OsStr::from_bytes(b"not utf-8 \xff\xfe\n"));
    fs::create_dir(&raw).unwrap();
    fs::write(raw.join(OsStr::from_bytes(b"\x80\x01'\"\\")), memory_like(3 * CHUNK + 1, 16)).unwrap();
    fs::write(root.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("run"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(root.join("zeros"), vec![0; 2 * CHUNK]).unwrap();
    for (target, link) in
        [("run", "to-file"), ("small", "to-dir"), ("/nowhere/at/all", "dangling"), ("../../up", "up")]
    {
        symlink(target, root.join(link)).unwrap();
    }
    symlink(OsStr::from_bytes(b"\xff"), root.join("to-bytes")).unwrap();

    let before = tree(&root);
    let pushed = push_cli(&server, &root, "tree");
    let target = folder.path().join("back");
    let pulled = pull_cli(&server, "tree", &target);
    assert_eq!(pulled["image"], pushed["image"]);
    let after = tree(&target);
    assert!(before.keys().eq(after.keys()), "the same paths");
    for (path, found) in &before {
        assert!(after[path] == *found, "{} differs", String::from_utf8_lossy(path));
    }
    assert_eq!(number(&pulled, "entries"), before.len() as u64);
    assert_eq!(
        push_cli(&server, &target, "again")["image"],
        pushed["image"],
        "a pulled image is the same image"
    );
}

#[test]
fn sparse_files_stay_sparse() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let (len, island) = (1u64 << 30, noise(3 * 4096, 17));
    let islands = [(0, &island[..]), ((512 << 20) + 4096, &island[..]), (len - 4097, &island[..4097])];
    sparse(&path, len, &islands);
    let report = push_cli(&server, &path, "sparse");
    assert_eq!(number(&report, "size_bytes"), len);
    // Of the last chunk all lies in one chunk; the three islands touch one chunk each.
    assert_eq!(number(&report, "zero_bytes"), len - 3 * CHUNK as u64, "{report}");
    let target = folder.path().join("back");
    pull_cli(&server, "sparse", &target);
    let back = target.join("mem");
    let metadata = fs::metadata(&back).unwrap();
    assert_eq!(metadata.len(), len);
    let held = metadata.blocks() * 512;
    assert!(held <= 64 << 10, "{held} bytes are allocated for 28 KiB of data");
    for (offset, bytes) in islands {
        let mut read = vec![0; bytes.len()];
        std::os::unix::fs::FileExt::read_exact_at(&File::open(&back).unwrap(), &mut read, offset).unwrap();
        assert!(read == bytes, "the island at {offset}");
    }
    assert_eq!(push_cli(&server, &back, "again")["image"], report["image"]);
}

#[test]
fn what_is_no_file_directory_or_link_is_refused_by_name() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str| {
        let text = fail(server.address(), [OsStr::new("push"), folder.path().as_os_str(), OsStr::new("odd")]);
        assert!(text.contains(name) && text.contains("no file, directory or symbolic link"), "{text}");
        let direct = folder.path().join(name);
        let text = fail(server.address(), [OsStr::new("push"), direct.as_os_str(), OsStr::new("odd")]);
        assert!(text.contains(name), "{text}");
        fs::remove_file(direct).unwrap();
    };
    fs::write(folder.path().join("a file"), "good").unwrap();
    let socket = UnixListener::bind(folder.path().join("a-socket")).unwrap();
    refused("a-socket");
    drop(socket);
    let fifo = folder.path().join("a-fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    refused("a-fifo");
    let text = fail(server.address(), ["push", "/does/not/exist", "odd"]);
    assert!(text.contains("/does/not/exist"), "{text}");
    assert_eq!(run(server.address(), ["ls"]), Value::Array(vec![]), "no reference was made");
}

/// The client looks at sizes first and reads later; a file that is cut between is no image of anything.
#[test]
fn a_directory_without_anything_is_refused() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let root = folder.path().join("nothing");
    fs::create_dir(&root).unwrap();
    let push = [OsStr::new("push"), root.as_os_str(), OsStr::new("app")];
    let said = fail(server.address(), push);
    assert!(said.contains("nothing is empty") && said.contains("criu dump"), "{said}");
    // A directory in it is something.
    fs::create_dir(root.join("empty")).unwrap();
    push_cli(&server, &root, "app");
}

#[test]
fn a_file_that_is_cut_while_it_is_pushed_is_an_error_that_names_it() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let len = 1u64 << 30;
    for (cut_to, with_island) in [(600u64 << 20, true), (600 << 20, false), (0, true)] {
        let path = folder.path().join("mem");
        let island = [(len - 5000, &[7; 5000][..])];
        sparse(&path, len, if with_island { &island } else { &[] });
        let cut = path.clone();
        // A batch of holes is 256 MiB at this chunk size, so the first report comes in the middle.
        let options = PushOptions { chunk_size: ChunkSize::MIN, ..PushOptions::default() };
        let on_progress = Arc::new(move |done, all| {
            assert!(done <= all);
            File::options().write(true).open(&cut).unwrap().set_len(cut_to).unwrap();
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let outcome = runtime.block_on(async {
            let remote = Remote::connect(server.address().clone()).await.unwrap();
            push(&remote, &path, &"cut".parse().unwrap(), options, on_progress).await
        });
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("mem changed while it was read"), "{text}");
    }
    assert_eq!(run(server.address(), ["ls"]), Value::Array(vec![]), "no reference was made");
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

/// A batch holds its files open until they are read.
#[test]
fn a_tree_of_more_files_than_a_process_may_open_is_pushed() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    for i in 0..2500 {
        // Empty ones, links and directories among them: none of these may be taken for the end.
        let path = folder.path().join(format!("{i:04}"));
        match i % 50 {
            0..30 if i < 1000 => fs::write(&path, "").unwrap(),
            30 => symlink("0001", &path).unwrap(),
            31 => fs::create_dir(&path).unwrap(),
            _ => fs::write(&path, format!("file {i}")).unwrap(),
        }
    }
    let mut limited = Command::new("bash");
    limited.args(["-c", "ulimit -n 1024 && exec \"$@\"", "-"]).arg(binary("postcopy"));
    limited.arg("push").arg(folder.path()).arg("many").env("POSTCOPY_SERVER", server.address().to_string());
    let output = limited.output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    let target = folder.path().join("pulled");
    let _ = pull_cli(&server, "many", &target);
    let pulled = tree(&target);
    fs::remove_dir_all(&target).unwrap();
    assert!(pulled == tree(folder.path()));
}

#[test]
fn pull_fills_an_empty_directory_in_place_and_keeps_clear_of_left_overs() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("sub/file"), "content").unwrap();
    push_cli(&server, &source, "app");
    // Where somebody is: it must stay the same directory.
    fs::create_dir(&target).unwrap();
    let mut here = postcopy(server.address(), ["pull", "app", "."]);
    let output = here.current_dir(&target).output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert!(tree(&target) == tree(&source));
    assert!(!here.output().unwrap().status.success(), "it is not empty any more");
    // The name that a pull takes for a new directory, with somebody else's file in it.
    let script = "mkdir new.partial-$$-0 && touch new.partial-$$-0/old && exec \"$@\"";
    let mut shell = Command::new("bash");
    shell.args(["-c", script, "-"]).arg(here.get_program()).args(["pull", "app", "new"]);
    shell.current_dir(folder.path()).env("POSTCOPY_SERVER", server.address().to_string());
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert!(tree(&folder.path().join("new")) == tree(&source), "and nothing of what was left over");
}

#[test]
fn what_a_pull_writes_is_for_its_owner_alone() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    fs::create_dir_all(source.join("sub/empty")).unwrap();
    fs::write(source.join("sub/file"), "content").unwrap();
    fs::write(source.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(source.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    push_cli(&server, &source, "app");
    pull_cli(&server, "app", &target);
    for (path, mode) in
        [("", 0o700), ("sub", 0o700), ("sub/empty", 0o700), ("sub/file", 0o600), ("run", 0o700)]
    {
        assert_eq!(fs::metadata(target.join(path)).unwrap().mode() & 0o777, mode, "{path:?}");
    }
}

/// The owner of the directory around the target replaces names in it during the pull.
#[test]
fn a_pull_writes_nowhere_else_when_its_directory_is_replaced() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let [source, precious, around] = ["source", "precious", "around"].map(|name| folder.path().join(name));
    for path in [&source, &precious, &around] {
        fs::create_dir(path).unwrap();
    }
    fs::write(source.join("mem"), noise(CHUNK, 51)).unwrap();
    fs::write(precious.join("mem"), [1; CHUNK]).unwrap();
    push_cli(&server, &source, "app");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error = runtime.block_on(async {
        let remote = Remote::connect(server.address().clone()).await.unwrap();
        let (reference, target) = ("app".parse().unwrap(), around.join("target"));
        let mut pulling = Pulling::begin(&remote, &reference, &target, |_| true).await.unwrap();
        let partial = fs::read_dir(&around).unwrap().next().unwrap().unwrap().path();
        fs::rename(&partial, around.join("away")).unwrap();
        symlink(&precious, &partial).unwrap();
        let all = pulling.extents_of(|_| true);
        pulling.fetch(all).await.unwrap();
        pulling.finish().unwrap_err()
    });
    assert!(error.to_string().contains("target.partial-"), "{error}");
    assert!(fs::read(precious.join("mem")).unwrap() == [1; CHUNK]);
    assert!(!around.join("target").exists());
}

/// An upload that waits for the server's memory must not take the way of those beside it that have some.
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
fn pull_takes_an_empty_directory_only_and_leaves_nothing_when_it_fails() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    fs::write(&path, noise(9 * CHUNK, 19)).unwrap();
    push_cli(&server, &path, "app");
    let targets = folder.path().join("targets");
    let pull_to =
        |target: &Path| fail(server.address(), [OsStr::new("pull"), OsStr::new("app"), target.as_os_str()]);

    let occupied = targets.join("occupied");
    fs::create_dir_all(&occupied).unwrap();
    fs::write(occupied.join("mine"), "precious").unwrap();
    let text = pull_to(&occupied);
    assert!(text.contains("occupied") && text.contains("not an empty directory"), "{text}");
    assert_eq!(tree(&targets).len(), 1);
    assert_eq!(fs::read(occupied.join("mine")).unwrap(), b"precious");
    let file = targets.join("file");
    fs::write(&file, "a file").unwrap();
    assert!(pull_to(&file).contains("file exists already"));
    assert_eq!(fs::read(&file).unwrap(), b"a file");
    fs::remove_file(&file).unwrap();

    let empty = targets.join("empty");
    fs::create_dir(&empty).unwrap();
    pull_cli(&server, "app", &empty);
    assert!(fs::read(empty.join("mem")).unwrap() == noise(9 * CHUNK, 19));
    fs::remove_dir_all(&empty).unwrap();

    let (pack, entry) = store.frames().swap_remove(4);
    flip(&pack, u64::from(entry.offset) + 1000);
    let before = tree(&targets);
    let text = pull_to(&targets.join("new"));
    assert!(text.contains("mem") && text.contains(&entry.chunk.hex()), "names file and chunk: {text}");
    assert_eq!(tree(&targets), before, "nothing is left behind");
    fs::create_dir(&empty).unwrap();
    pull_to(&empty);
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0, "the empty directory is as it was");
    let text =
        fail(server.address(), [OsStr::new("pull"), OsStr::new("none"), targets.join("x").as_os_str()]);
    assert!(text.contains("none:latest"), "{text}");
    assert!(!targets.join("x").exists());
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
