//! The files, directories and links that are pushed, and that come back as they were.

use super::{CHUNK, number, pull_cli, push_cli, tree};
use postcopy::Remote;
use postcopy::proto::page::ChunkSize;
use postcopy::push::{PushOptions, push};
use postcopy_tests::binary;
use postcopy_tests::cli::{fail, run};
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::Arc;

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

/// The client looks at sizes first and reads later. A file that is cut in between has no consistent
/// image.
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
        let options = PushOptions { chunk_size: Some(ChunkSize::MIN), ..PushOptions::default() };
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
