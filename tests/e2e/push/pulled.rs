//! The directories that a pull writes to.

use super::{CHUNK, pull_cli, push_cli, tree};
use postcopy::Remote;
use postcopy::pull::Pulling;
use postcopy_tests::cli::{fail, postcopy};
use postcopy_tests::fixtures::noise;
use postcopy_tests::server::Server;
use postcopy_tests::store::{StoreDir, flip, shown};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

#[test]
fn pull_fills_an_empty_directory_in_place_and_keeps_clear_of_left_overs() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("sub/file"), "content").unwrap();
    push_cli(&server, &source, "app");
    // A process works in the directory, so it must stay the same one.
    fs::create_dir(&target).unwrap();
    let mut here = postcopy(server.address(), ["pull", "app", "."]);
    let output = here.current_dir(&target).output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert!(tree(&target) == tree(&source));
    assert!(!here.output().unwrap().status.success(), "it is not empty any more");
    // The name that a pull takes for a new directory, with a foreign file in it.
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
