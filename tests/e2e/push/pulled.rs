//! The directories that a pull writes to.

use super::{CHUNK, pull_cli, push_cli, tree};
use postcopy::Remote;
use postcopy::pull::Pulling;
use postcopy_tests::cgroup::MemoryCgroup;
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::fixtures::{noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::store::{StoreDir, flip, shown};
use postcopy_tests::{binary, is_root, skip, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

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

/// An image of 32 GiB in 8,388,608 chunks, of which three are not zero.
#[test]
fn a_pull_takes_no_memory_for_the_chunks_of_zeros() {
    let name = "a_pull_takes_no_memory_for_the_chunks_of_zeros";
    if !is_root() {
        return skip(name, "it needs root, to limit memory");
    }
    let Some(cgroup) = MemoryCgroup::new() else {
        return skip(name, "there are no memory cgroups of version 1");
    };
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (path, target) = (folder.path().join("mem"), folder.path().join("target"));
    let (len, island) = (32 << 30, noise(4096, 20));
    sparse(&path, len, &[(0, &island), (7 << 30, &island), (len - 4096, &island)]);
    let push = [OsStr::new("push"), path.as_os_str(), OsStr::new("app"), OsStr::new("--chunk-size=4096")];
    let _ = run(server.address(), push);
    // The server keeps the segments of an image, so it is outside of the limit.
    cgroup.limit(64 << 20);
    let script = "read _; exec \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "-"]).arg(binary("postcopy")).args(["pull", "app"]).arg(&target);
    shell.env("POSTCOPY_SERVER", server.address().to_string()).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut shell = shell.spawn().unwrap();
    cgroup.add(shell.id());
    drop(shell.stdin.take().map(|mut stdin| std::io::Write::write_all(&mut stdin, b"\n")));
    let output = shell.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    let pulled = fs::File::open(target.join("mem")).unwrap();
    assert_eq!(pulled.metadata().unwrap().len(), len);
    for at in [0, 7 << 30, len - 4096] {
        let mut bytes = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&pulled, &mut bytes, at).unwrap();
        assert!(bytes == island, "at {at}");
    }
}

#[test]
fn a_pull_of_many_files_takes_time_in_proportion_to_them() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let source = folder.path().join("source");
    for i in 0..40_000_u32 {
        if i % 1000 == 0 {
            fs::create_dir_all(source.join(format!("{}", i / 1000))).unwrap();
        }
        fs::write(source.join(format!("{}/{i}", i / 1000)), i.to_string()).unwrap();
    }
    push_cli(&server, &source, "app");
    let timed = |work: &dyn Fn()| {
        let started = std::time::Instant::now();
        work();
        started.elapsed()
    };
    let copy = folder.path().join("copy");
    let copied = timed(&|| {
        let status = Command::new("cp").arg("-r").arg(&source).arg(&copy).status().unwrap();
        assert!(status.success());
    });
    let pulled = timed(&|| drop(pull_cli(&server, "app", &folder.path().join("target"))));
    assert!(pulled < 8 * copied, "the pull took {pulled:?}, a copy {copied:?}");
}

#[test]
fn the_parents_that_a_pull_makes_are_for_their_owner_alone() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let source = folder.path().join("file");
    fs::write(&source, "content").unwrap();
    push_cli(&server, &source, "app");
    pull_cli(&server, "app", &folder.path().join("a/b/c"));
    for path in ["a", "a/b", "a/b/c"] {
        assert_eq!(fs::metadata(folder.path().join(path)).unwrap().mode() & 0o777, 0o700, "{path}");
    }
}

/// As nohup starts it, and a shell in the background of a script.
#[test]
fn a_pull_goes_on_at_signals_that_its_starter_has_it_ignore() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (path, around) = (folder.path().join("mem"), folder.path().join("around"));
    fs::write(&path, noise(64 << 20, 22)).unwrap();
    fs::create_dir(&around).unwrap();
    push_cli(&server, &path, "app");
    let mut pull = Command::new("sh");
    pull.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]).arg(binary("postcopy"));
    pull.arg("--server").arg(server.address().to_string()).args(["pull", "app"]).arg(around.join("new"));
    let mut pull = pull.spawn().unwrap();
    wait_until("the pull has begun", || fs::read_dir(&around).unwrap().count() > 0);
    for signal in [Signal::HUP, Signal::INT] {
        let _ = kill_process(Pid::from_child(&pull), signal);
    }
    assert!(pull.wait().unwrap().success());
    assert!(around.join("new/mem").exists());
}

#[test]
fn a_pull_that_is_interrupted_removes_what_it_has_written() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (path, around) = (folder.path().join("mem"), folder.path().join("around"));
    fs::write(&path, noise(64 << 20, 21)).unwrap();
    push_cli(&server, &path, "app");
    for signal in [Signal::INT, Signal::TERM] {
        fs::create_dir(&around).unwrap();
        let mut pull =
            postcopy(server.address(), ["pull".as_ref(), "app".as_ref(), around.join("new").as_os_str()]);
        let mut pull = pull.stderr(Stdio::piped()).spawn().unwrap();
        wait_until("the pull has begun", || fs::read_dir(&around).unwrap().count() > 0);
        kill_process(Pid::from_child(&pull), signal).unwrap();
        let status = pull.wait().unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(pull.stderr.as_mut().unwrap(), &mut said).unwrap();
        // It may have been done before the signal.
        assert!(status.success() || said.contains("interrupted by SIG"), "{said}");
        let left: Vec<_> = fs::read_dir(&around).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, if status.success() { vec!["new"] } else { vec![] }, "{signal:?}");
        fs::remove_dir_all(&around).unwrap();
    }
}
