//! Images, links and files that `push`, `pull` and the daemon refuse.

use super::made::{image_file, made_dump, made_incremental_dump};
use super::{Heap, with_criu};
use postcopy::Remote;
use postcopy::push::{self, PushOptions};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::{fail, run};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::{is_root, skip};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

#[test]
fn images_that_are_not_the_stored_ones_are_refused() {
    with_criu("images_that_are_not_the_stored_ones_are_refused", |bench| {
        let Heap { program, .. } = bench.heap(8);
        bench.dump(program);
        let (images, _) = bench.pull("app", "lazy");
        let is_pagemap = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("pagemap-");
        let pagemap =
            fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path()).find(is_pagemap).unwrap();
        let mut bytes = fs::read(&pagemap).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&pagemap, bytes).unwrap();
        let images = images.to_str().unwrap();
        let root = postcopy_tests::daemon::runtime_root();
        let root = root.path().to_str().unwrap();
        let said =
            fail(bench.server.address(), ["criu", "-D", images, "--image", "app", "--runtime-dir", root]);
        assert!(said.contains("pagemap-"), "{said}");
        let said =
            fail(bench.server.address(), ["criu", "-D", "/nowhere", "--image", "app", "--runtime-dir", root]);
        assert!(said.contains("/nowhere"), "{said}");
    });
}

#[test]
fn a_push_stores_the_images_of_parents_only_and_no_parents_of_others() {
    if !is_root() {
        return skip(
            "criu::refusals::a_push_stores_the_images_of_parents_only_and_no_parents_of_others",
            "it needs root",
        );
    }
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (made, base) = made_incremental_dump(&server, folder.path());
    let push = [OsStr::new("push"), made.as_os_str(), OsStr::new("chain")];
    let _ = run(server.address(), push);
    let inspected = run(server.address(), ["inspect", "chain"]);
    let paths: Vec<_> = inspected["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["path"].as_str().unwrap())
        .collect();
    assert!(
        paths.contains(&"parent/pages-1.img") && !paths.iter().any(|path| path.contains("id_")),
        "{paths:?}"
    );
    // Another user owns the dump, and may have made the link.
    std::os::unix::fs::chown(&made, Some(4711), None).unwrap();
    let said = fail(server.address(), push);
    assert!(said.contains("user 4711 controls this link") && said.contains("user 0"), "{said}");
    std::os::unix::fs::chown(&base, Some(4711), None).unwrap();
    let _ = run(server.address(), push);
    std::os::unix::fs::lchown(made.join("parent"), Some(4712), None).unwrap();
    assert!(fail(server.address(), push).contains("user 4712 controls this link"));
    // The link leads to files that are not CRIU's.
    fs::remove_file(made.join("parent")).unwrap();
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("disk.img"), "secret").unwrap();
    std::os::unix::fs::chown(&other, Some(4711), None).unwrap();
    symlink(&other, made.join("parent")).unwrap();
    let said = fail(server.address(), push);
    assert!(said.contains("without CRIU's images"), "{said}");
}

#[test]
fn a_fifo_among_images_is_refused_and_not_waited_for() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let made = made_dump(&server, folder.path());
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = made.join("core-7.img");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let said = within(Duration::from_secs(60), move || {
        fail(server.address(), [OsStr::new("push"), made.as_os_str(), OsStr::new("fifo")])
    });
    assert!(said.contains("core-7.img") && said.contains("no file, directory or symbolic link"), "{said}");
}

#[test]
fn an_archive_whose_parent_link_leads_out_is_refused() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (made, base) = made_incremental_dump(&server, folder.path());
    fs::remove_file(made.join("parent")).unwrap();
    let archive = folder.path().join("app.tar");
    for (target, is_within) in [(base.to_str().unwrap(), false), ("../base", true)] {
        symlink(target, made.join("parent")).unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&archive).arg("-C").arg(folder.path()).args(["made", "base"]);
        assert!(tar.status().unwrap().success());
        let push = [OsStr::new("push"), archive.as_os_str(), OsStr::new("app")];
        if is_within {
            let _ = run(server.address(), push);
        } else {
            let said = fail(server.address(), push);
            assert!(said.contains("made/parent leads out of the archive"), "{said}");
        }
        fs::remove_file(made.join("parent")).unwrap();
    }
}

#[test]
fn files_of_a_daemon_are_not_written_through_links() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (made, root) = (made_dump(&server, folder.path()), postcopy_tests::daemon::runtime_root());
    let precious = folder.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, made.join("restore.log")).unwrap();
    let (dump, root) = (made.to_str().unwrap(), root.path().to_str().unwrap());
    for option in ["-o", "--pidfile"] {
        let args =
            ["criu", "-D", dump, "--image", "made", "--runtime-dir", root, "-d", option, "restore.log"];
        let said = fail(server.address(), args);
        assert!(said.contains("restore.log: it is a symbolic link"), "{said}");
    }
    // The image would bring the link to the machine that restores.
    let _ = run(server.address(), [OsStr::new("push"), made.as_os_str(), OsStr::new("made")]);
    let target = folder.path().join("lazy");
    let pull = [OsStr::new("pull"), OsStr::new("made"), target.as_os_str(), OsStr::new("--criu")];
    let said = fail(server.address(), pull);
    assert!(said.contains("restore.log is a symbolic link that leads out"), "{said}");
    assert!(!target.exists());
    fs::remove_file(made.join("restore.log")).unwrap();
    symlink("pages-1.img", made.join("within")).unwrap();
    let _ = run(server.address(), [OsStr::new("push"), made.as_os_str(), OsStr::new("made")]);
    let _ = run(server.address(), pull);
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}

/// The work directory belongs to another user.
#[test]
fn files_of_a_daemon_are_not_written_where_another_user_leads() {
    if !is_root() {
        return skip(
            "criu::refusals::files_of_a_daemon_are_not_written_where_another_user_leads",
            "it needs root",
        );
    }
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (made, root) = (made_dump(&server, folder.path()), postcopy_tests::daemon::runtime_root());
    let [work, victim] = ["work", "victim"].map(|name| folder.path().join(name));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&victim).unwrap();
    symlink(&victim, work.join("sub")).unwrap();
    std::os::unix::fs::lchown(work.join("sub"), Some(4711), None).unwrap();
    fs::write(work.join("theirs"), "old").unwrap();
    std::os::unix::fs::chown(work.join("theirs"), Some(4711), None).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    let fifo = work.join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::chown(&work, Some(4711), None).unwrap();
    let (dump, work) = (made.to_str().unwrap(), work.to_str().unwrap());
    let root = root.path().to_str().unwrap();
    for (options, reason) in [
        (["-o", "sub/shadow"], "sub in its path is a symbolic link of user 4711"),
        (["--pidfile", "sub/shadow"], "sub in its path is a symbolic link of user 4711"),
        (["--trace", "sub"], "sub in its path is a symbolic link of user 4711"),
        (["-o", "theirs"], "it belongs to user 4711"),
        (["--pidfile", "theirs"], "it belongs to user 4711"),
        (["-o", "fifo"], "it is a pipe without a reader"),
    ] {
        let args = ["criu", "-D", dump, "-W", work, "--image", "made", "--runtime-dir", root];
        let args = args.into_iter().chain(options).chain(["--wait-for-restore", "1s"]).map(str::to_owned);
        let (args, address) = (args.collect::<Vec<_>>(), server.address().clone());
        let said = within(Duration::from_secs(20), move || fail(&address, args));
        assert!(said.contains(reason), "{options:?}: {said}");
    }
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
    assert_eq!(fs::read(folder.path().join("work/theirs")).unwrap(), b"old");
}

#[test]
fn a_connection_that_says_nothing_decides_nothing() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let made = made_dump(&server, folder.path());
    let dump = made.to_str().unwrap();
    let mut daemon = Daemon::start(server.address(), ["criu", "-D", dump, "--image", "made"]);
    let connect = || UnixStream::connect(made.join("lazy-pages.socket")).unwrap();
    // One that goes on, one that hangs up, one that hangs up within its first message.
    let silent = connect();
    drop(connect());
    daemon.assert_says("it has hung up and has sent nothing");
    connect().write_all(&[1, 0]).unwrap();
    daemon.assert_says("2 bytes");
    // RESTORE_FINISHED, of a restore without tasks.
    let mut restore = connect();
    restore.write_all(&0x5253_5446_i32.to_ne_bytes()).unwrap();
    assert_eq!(daemon.wait().code(), Some(0), "{:?}", daemon.said());
    drop(silent);
}

#[test]
fn images_whose_pages_are_stored_in_another_form_are_refused_by_name() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let root = postcopy_tests::daemon::runtime_root();
    let head: &[u8] = &[0x08, 1];
    // vaddr 0x10000, compat_nr_pages 2, flags PRESENT | LAZY, nr_pages 2.
    let known: &[u8] = &[0x08, 0x80, 0x80, 0x04, 0x10, 2, 0x20, 6, 0x28, 2];
    let compressed = [known, &[0x32, 1, 77]].concat();
    let flagged: &[u8] = &[0x08, 0x80, 0x80, 0x08, 0x10, 1, 0x20, 0x0e, 0x28, 1];
    let cases = [
        ("field", vec![head, &compressed], 2, "pagemap-7.img: entry 0: field 6,"),
        ("flag", vec![head, known, flagged], 3, "pagemap-7.img: entry 1: flag 0x8,"),
        ("head", vec![&[0x08, 1, 0x10, 1], known], 2, "pagemap-7.img: its head: field 2,"),
        ("length", vec![head, known], 1, "pages-1.img: it has 4096 bytes, and pagemap-7.img tells of 8192"),
    ];
    for (name, messages, pages, reason) in cases {
        let dump = folder.path().join(name);
        fs::create_dir(&dump).unwrap();
        fs::write(dump.join("inventory.img"), image_file(0x5831_3116, &[])).unwrap();
        fs::write(dump.join("pstree.img"), image_file(0x5027_3030, &[])).unwrap();
        fs::write(dump.join("pagemap-7.img"), image_file(0x5608_4025, &messages)).unwrap();
        fs::write(dump.join("pages-1.img"), vec![7; pages * 4096]).unwrap();
        let said = fail(server.address(), [OsStr::new("push"), dump.as_os_str(), OsStr::new(name)]);
        assert!(said.contains(reason), "push: {said}");
        // The library stores the dump all the same, because it does not look at images.
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let remote = Remote::connect(server.address().clone()).await.unwrap();
            let (options, reference) = (PushOptions::default(), name.parse().unwrap());
            push::push(&remote, &dump, &reference, options, Arc::new(|_, _| ())).await.unwrap();
        });
        let target = folder.path().join(format!("{name}.pulled"));
        let args = [OsStr::new("pull"), OsStr::new(name), target.as_os_str(), OsStr::new("--criu")];
        let said = fail(server.address(), args);
        assert!(said.contains(reason), "pull: {said}");
        assert!(!target.exists());
        let (dump, root) = (dump.to_str().unwrap(), root.path().to_str().unwrap());
        let said = fail(server.address(), ["criu", "-D", dump, "--image", name, "--runtime-dir", root]);
        assert!(said.contains(reason), "daemon: {said}");
    }
}

#[test]
fn a_dump_has_labels_of_criu_s_log_and_does_not_fit_another_host() {
    with_criu("a_dump_has_labels_of_criu_s_log_and_does_not_fit_another_host", |bench| {
        let Heap { mut program, .. } = bench.heap(8);
        let images = bench.path("images");
        postcopy_tests::criu::assert_success(
            &bench.criu.try_dump(program.pid(), &images, &["-v4"], &[]),
            &images,
        );
        program.wait();
        bench.push(&images, "dump");
        let labels = run(bench.server.address(), ["inspect", "dump"])["labels"].take();
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(labels["criu.kernel"], release.trim_end(), "{labels}");
        assert_eq!(labels["criu.arch"], std::env::consts::ARCH, "{labels}");
        assert!(labels["criu.version"].as_str().is_some_and(|version| version.starts_with('4')), "{labels}");
        let push = ["push", images.to_str().unwrap(), "other", "--label", "criu.arch=riscv64"];
        let _ = run(bench.server.address(), push);
        let target = bench.path("target");
        let said = fail(bench.server.address(), ["pull", "other", target.to_str().unwrap(), "--criu"]);
        assert!(said.contains("other:latest does not fit this host: it is of a host of riscv64"), "{said}");
        assert!(!target.exists());
        let said = fail(bench.server.address(), ["criu", "-D", images.to_str().unwrap(), "--image", "other"]);
        assert!(said.contains("it is of a host of riscv64"), "{said}");
    });
}

#[test]
fn a_dump_that_failed_is_not_stored() {
    with_criu("a_dump_that_failed_is_not_stored", |bench| {
        let Heap { program, .. } = bench.heap(8);
        bench.dump_as(program, "images");
        fs::remove_file(bench.path("images/inventory.img")).unwrap();
        let images = bench.path("images");
        let said = fail(bench.server.address(), [OsStr::new("push"), images.as_os_str(), OsStr::new("app")]);
        assert!(said.contains("and no inventory.img: the dump has failed"), "{said}");
    });
}
