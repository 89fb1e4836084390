//! `postcopy criu`, with the real CRIU: programs that are dumped, stored, and restored while their memory arrives.

use nix::sys::signal::Signal;
use postcopy::Remote;
use postcopy::push::{self, PushOptions};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::criu::{
    Criu, Program, Restored, assert_success, compile, compile_statically, numbers, status, wait_for_status,
};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use postcopy_tests::{is_root, resident_kib, skip, wait_until};
use prost::Message;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Runs a test where CRIU runs.
fn with_criu(test: &str, work: impl FnOnce(&Bench)) {
    if !is_root() {
        return skip(&format!("criu::{test}"), "restoring processes needs root");
    }
    match Criu::find() {
        Ok(criu) => work(&Bench { criu, server: Server::start(), folder: tempfile::tempdir().unwrap() }),
        Err(why) => skip(&format!("criu::{test}"), &why),
    }
}

/// What a test works with.
struct Bench {
    criu: Criu,
    server: Server,
    folder: TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Dumps a program and stores the images as `app`.
    fn dump(&self, program: Program) {
        self.dump_as(program, "images");
        self.push(&self.path("images"), "app");
    }

    fn dump_as(&self, mut program: Program, name: &str) {
        self.criu.dump(program.pid(), &self.path(name));
        program.wait();
    }

    fn push(&self, images: &Path, reference: &str) {
        let _ = run(self.server.address(), [OsStr::new("push"), images.as_os_str(), OsStr::new(reference)]);
    }

    fn pull(&self, reference: &str, name: &str) -> (PathBuf, serde_json::Value) {
        let path = self.path(name);
        let args = [OsStr::new("pull"), OsStr::new(reference), path.as_os_str(), OsStr::new("--criu")];
        let pulled = run(self.server.address(), args);
        (path, pulled)
    }

    /// A daemon for a restore from `images`.
    fn daemon(&self, images: &Path, reference: &str, more: &[&str]) -> Daemon {
        let images = images.to_str().unwrap();
        let args = ["criu", "-D", images, "--image", reference];
        Daemon::start(self.server.address(), args.iter().chain(more).copied())
    }

    /// Restores `app` in the ordinary way.
    fn restore_plainly(&self) -> Restored {
        let mut restored = self.criu.restore(&self.path("images"), [""; 0]);
        restored.assert_runs();
        restored
    }

    /// Restores `app` lazily, from images in a directory of this name that hold no lazy memory.
    fn restore_lazily(&self, name: &str, more: &[&str]) -> (Daemon, Restored) {
        let (images, _) = self.pull("app", name);
        let daemon = self.daemon(&images, "app", more);
        let mut restored = self.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        (daemon, restored)
    }

    /// The same where it can be dumped again, with nothing but what is touched.
    fn restore_lazily_here(&self, name: &str) -> (Daemon, Restored) {
        let (images, _) = self.pull("app", name);
        let daemon = self.daemon(&images, "app", &["--fill", "nothing"]);
        (daemon, self.criu.restore_here(&images, ["--lazy-pages"]))
    }

    /// Dumps with the script that docs/CRIU.md tells of; the daemon has its runtime directory in `root`.
    fn dump_with_script(&self, pid: u32, name: &str, root: &Path) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/cli/scripts/postcopy-criu-drain");
        let programs = postcopy_tests::binary("postcopy").parent().unwrap().to_owned();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let variables = [("PATH", path.as_str()), ("POSTCOPY_RUNTIME_DIR", root.to_str().unwrap())];
        let more = ["--action-script", script.to_str().unwrap()];
        self.criu.try_dump(pid, &self.path(name), &more, &variables)
    }

    fn heap(&self, mib: u32) -> Heap {
        self.heap_that_touches(mib, 200)
    }

    /// One that touches so many pages in each turn.
    fn heap_that_touches(&self, mib: u32, pages: u32) -> Heap {
        let program = compile("heap", self.folder.path());
        let status = self.path("status");
        let mut command = Command::new(program);
        command.arg(mib.to_string()).arg(&status).arg(pages.to_string());
        let program = Program::start(&command);
        wait_for_status(&status);
        Heap { program, status }
    }
}

/// A program that knows what each word of its memory must be.
struct Heap {
    program: Program,
    status: PathBuf,
}

/// Has it check all of its memory.
fn assert_all_right(path: &Path, restored: &Restored) {
    // What is there may be of another one that was restored before it.
    wait_for_status(path);
    let [_, _, checks_before] = status(path);
    restored.signal(Signal::SIGUSR1);
    wait_until("a check of all memory", || status::<3>(path)[2] > checks_before);
    let [checked, wrong, _] = status(path);
    assert_eq!(wrong, 0, "{wrong} pages were wrong; it had checked {checked}, and all of them");
}

#[test]
fn a_checked_heap_of_256_mib_is_restored_from_images_that_lack_it() {
    with_criu("a_checked_heap_of_256_mib_is_restored_from_images_that_lack_it", |bench| {
        let Heap { program, status } = bench.heap(256);
        bench.dump(program);
        let plain = bench.restore_plainly();
        assert_all_right(&status, &plain);
        drop(plain);
        let (images, pulled) = bench.pull("app", "lazy");
        let wire = pulled["frame_bytes"].as_u64().unwrap();
        assert!(wire < 1 << 20, "{wire} bytes came over the wire for what restore itself reads");
        let held: u64 =
            fs::read_dir(&images).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum();
        assert!(held < 2 << 20, "{held} bytes of images");
        let mut daemon = bench.daemon(&images, "app", &[]);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0), "all has come");
        daemon.assert_says("all of its memory is resident");
        // It needs nobody any more, and nothing is left of who served it.
        assert_all_right(&status, &restored);
        assert!(fs::read_dir(daemon.root()).unwrap().next().is_none());
        assert!(!images.join("lazy-pages.socket").exists());
    });
}

#[test]
fn workers_are_killed_at_any_moment_of_a_restore() {
    with_criu("workers_are_killed_at_any_moment_of_a_restore", |bench| {
        let Heap { program, status } = bench.heap(64);
        bench.dump(program);
        for round in 0..8 {
            let (images, _) = bench.pull("app", &format!("lazy-{round}"));
            // Every second time all of it has to be touched.
            let fill = if round % 2 == 0 { "all" } else { "nothing" };
            let mut daemon = bench.daemon(&images, "app", &["--fill", fill]);
            let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
            // From before the first handshake on to long after the last one.
            for kill in 0..4 {
                std::thread::park_timeout(Duration::from_millis(fastrand::u64(..40) * (kill + 1)));
                if daemon.has_said("all of its memory is resident") {
                    break;
                }
                daemon.kill_worker();
            }
            restored.assert_runs();
            assert_all_right(&status, &restored);
            if fill == "nothing" {
                // What it never touches would be waited for.
                daemon.terminate();
            }
            assert_eq!(daemon.wait().code(), Some(0), "round {round}");
            assert_all_right(&status, &restored);
        }
    });
}

#[test]
fn a_task_whose_session_cannot_be_resumed_is_tried_again_and_then_lost() {
    with_criu("a_task_whose_session_cannot_be_resumed_is_tried_again_and_then_lost", |bench| {
        let Heap { program, status } = bench.heap_that_touches(32, 0);
        bench.dump(program);
        let args = ["--fill", "nothing", "--on-loss", "kill", "--fault-deadline"];
        let with = |deadline: &'static str| args.into_iter().chain([deadline]).collect::<Vec<_>>();
        let (mut daemon, restored) = bench.restore_lazily("mended", &with("30s"));
        daemon.assert_says("tasks have been restored");
        let broken = daemon.break_state(restored.pid());
        daemon.kill_worker();
        daemon.assert_says("it does not begin as a state file does; trying again");
        daemon.kill_worker();
        std::thread::park_timeout(Duration::from_secs(1));
        broken.mend();
        assert_all_right(&status, &restored);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
        drop(restored);

        let (mut daemon, mut restored) = bench.restore_lazily("lost", &with("1s"));
        daemon.assert_says("tasks have been restored");
        let pid = restored.pid();
        let _broken = daemon.break_state(pid);
        daemon.kill_worker();
        wait_until("its end", || restored.has_ended());
        daemon.assert_says(&format!("process {pid}: its memory is lost"));
        assert_eq!(daemon.wait().code(), Some(3));

        // At the daemon's end its memory would read zeros.
        let (mut daemon, mut restored) =
            bench.restore_lazily("ended", &["--fill", "nothing", "--grace", "1s"]);
        daemon.assert_says("tasks have been restored");
        let _broken = daemon.break_state(restored.pid());
        daemon.kill_worker();
        daemon.assert_says("it does not begin as a state file does; trying again");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.assert_says("was killed, because its memory could not be made safe");
        wait_until("its end", || restored.has_ended());
    });
}

#[test]
fn one_image_is_restored_many_times_at_once() {
    with_criu("one_image_is_restored_many_times_at_once", |bench| {
        let Heap { program, status: path } = bench.heap(32);
        bench.dump(program);
        let mut all: Vec<_> = (0..4).map(|n| bench.restore_lazily(&format!("lazy-{n}"), &[])).collect();
        for (daemon, restored) in &mut all {
            // They all write to the same file: what counts is that each of them goes on, and finds nothing wrong.
            assert_eq!(daemon.wait().code(), Some(0));
            restored.signal(Signal::SIGUSR1);
            assert!(!restored.has_ended());
        }
        wait_for_status(&path);
        let [seen, ..] = status::<2>(&path);
        wait_until("progress", || status::<2>(&path)[0] > seen + 2000);
        assert_eq!(status::<2>(&path)[1], 0);
    });
}

#[test]
fn a_tree_of_processes_that_fork_move_and_unmap_is_restored() {
    with_criu("a_tree_of_processes_that_fork_move_and_unmap_is_restored", |bench| {
        let program = compile("tree", bench.folder.path());
        let mut command = Command::new(program);
        command.arg("32").arg(bench.path("status"));
        let program = Program::start(&command);
        let files: Vec<_> = (0..4).map(|process| bench.path(&format!("status.{process}"))).collect();
        let go_on = |more: u64| {
            for file in &files {
                wait_for_status(file);
                let [turns, _] = status(file);
                wait_until("turns", || status::<1>(file)[0] >= turns + more);
                let [_, wrong] = status(file);
                assert_eq!(wrong, 0, "pages of {} were wrong", file.display());
            }
        };
        go_on(7);
        bench.dump(program);
        let plain = bench.restore_plainly();
        go_on(40);
        drop(plain);
        for fill in ["all", "nothing"] {
            let (mut daemon, mut restored) = bench.restore_lazily(&format!("lazy-{fill}"), &["--fill", fill]);
            go_on(20);
            if !daemon.has_said("all of its memory is resident") {
                daemon.kill_worker();
            }
            go_on(60);
            assert!(!restored.has_ended());
            restored.kill();
            assert_eq!(daemon.wait().code(), Some(0), "its programs are gone");
        }
    });
}

#[test]
fn python_goes_on_in_the_middle_of_a_computation_with_threads() {
    with_criu("python_goes_on_in_the_middle_of_a_computation_with_threads", |bench| {
        let result = bench.path("result");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/threads.py");
        let mut command = Command::new("python3");
        command.arg(script).arg(&result);
        let mut undisturbed = Program::start(&command);
        undisturbed.wait();
        let expected = fs::read_to_string(&result).unwrap();
        fs::remove_file(&result).unwrap();
        let program = Program::start(&command);
        wait_until("objects", || resident_kib(program.pid()) > 40_000);
        bench.dump(program);
        assert!(!result.exists(), "it was dumped in the middle");
        let mut plain = bench.restore_plainly();
        wait_until("the end", || plain.has_ended());
        assert_eq!(fs::read_to_string(&result).unwrap(), expected);
        fs::remove_file(&result).unwrap();
        let (mut daemon, mut restored) = bench.restore_lazily("lazy", &[]);
        if !daemon.has_said("all of its memory is resident") {
            daemon.kill_worker();
        }
        wait_until("the end", || restored.has_ended());
        assert_eq!(fs::read_to_string(&result).unwrap(), expected);
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

#[test]
fn a_shell_pipeline_is_restored() {
    with_criu("a_shell_pipeline_is_restored", |bench| {
        let result = bench.path("result");
        let count = 3_000_000_u64;
        let script = format!(
            "seq 1 {count} | awk '{{ s += $1; a[$1 % 50000] = a[$1 % 50000] $1 }} NR % 100000 == 0 {{ printf \"%d %.0f\\n\", NR, s > \"{0}.new\"; close(\"{0}.new\"); system(\"mv {0}.new {0}\") }}'; true",
            result.display()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        let program = Program::start(&command);
        wait_until("a beginning", || numbers(&result).first() >= Some(&500_000));
        bench.dump(program);
        assert!(numbers(&result)[0] < count, "it was dumped in the middle");
        let (mut daemon, mut restored) = bench.restore_lazily("lazy", &[]);
        wait_until("the end", || restored.has_ended());
        assert_eq!(numbers(&result), [count, count * (count + 1) / 2]);
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

#[test]
fn a_restore_that_fails_ends_the_daemon_with_an_error() {
    with_criu("a_restore_that_fails_ends_the_daemon_with_an_error", |bench| {
        let Heap { program, .. } = bench.heap(8);
        bench.dump(program);
        let (images, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&images, "app", &[]);
        let is_fdinfo = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("fdinfo");
        let core = fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path()).find(is_fdinfo);
        fs::write(core.unwrap(), b"nothing of the kind").unwrap();
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        wait_until("its end", || restored.has_ended());
        assert_eq!(daemon.wait().code(), Some(1));
        daemon.assert_says("it has failed");
    });
}

#[test]
fn a_daemon_whose_restore_does_not_come_ends_when_it_was_told_to() {
    with_criu("a_daemon_whose_restore_does_not_come_ends_when_it_was_told_to", |bench| {
        let Heap { program, status } = bench.heap_that_touches(16, 0);
        bench.dump(program);
        let (images, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&images, "app", &["--wait-for-restore", "2s"]);
        // A successor counts from the daemon's start.
        daemon.kill_worker();
        assert_eq!(daemon.wait().code(), Some(1));
        daemon.assert_says("no criu restore has connected within 2s");
        assert!(!images.join("lazy-pages.socket").exists());
        // A restore that has come is served for as long as it takes, by a successor, too.
        let args = ["--fill", "nothing", "--wait-for-restore", "2s"];
        let mut daemon = bench.daemon(&images, "app", &args);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        std::thread::park_timeout(Duration::from_secs(3));
        daemon.kill_worker();
        std::thread::park_timeout(Duration::from_secs(2));
        assert_all_right(&status, &restored);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
    });
}

#[test]
fn what_else_connects_to_a_daemon_s_socket_is_in_nobody_s_way() {
    with_criu("what_else_connects_to_a_daemon_s_socket_is_in_nobody_s_way", |bench| {
        let Heap { program, status } = bench.heap_that_touches(32, 0);
        bench.dump(program);
        let (images, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&images, "app", &["--fill", "nothing"]);
        let socket = images.join("lazy-pages.socket");
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        drop(UnixStream::connect(&socket).unwrap());
        let mut second = UnixStream::connect(&socket).unwrap();
        // It may have been refused by then.
        let _ = second.write_all(&7_i32.to_ne_bytes());
        daemon.assert_says("another restore is served here");
        let root = postcopy_tests::daemon::runtime_root();
        let args = ["criu", "-D", images.to_str().unwrap(), "--image", "app", "--runtime-dir"];
        let root = root.path().to_str().unwrap();
        let said = fail(bench.server.address(), args.into_iter().chain([root]));
        assert!(said.contains("another daemon listens at"), "{said}");
        daemon.kill_worker();
        assert_all_right(&status, &restored);
        daemon.hang_up();
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
    });
}

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

/// An image file of CRIU: its magic numbers, and messages.
fn image_file(magic: u32, messages: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [0x5456_4319_u32.to_ne_bytes(), magic.to_ne_bytes()].concat();
    for message in messages {
        bytes.extend(u32::try_from(message.len()).unwrap().to_ne_bytes());
        bytes.extend(*message);
    }
    bytes
}

/// Stores a dump of one task with lazy memory, which no criu has written, as `made`; its directory.
fn made_dump(server: &Server, folder: &Path) -> PathBuf {
    let dump = folder.join("made");
    fs::create_dir(&dump).unwrap();
    // pages_id 1; vaddr 0x10000, compat_nr_pages 2, flags PRESENT | LAZY, nr_pages 2.
    let pagemap: [&[u8]; 2] = [&[0x08, 1], &[0x08, 0x80, 0x80, 0x04, 0x10, 2, 0x20, 6, 0x28, 2]];
    fs::write(dump.join("inventory.img"), image_file(0x5831_3116, &[])).unwrap();
    fs::write(dump.join("pstree.img"), image_file(0x5027_3030, &[])).unwrap();
    fs::write(dump.join("pagemap-7.img"), image_file(0x5608_4025, &pagemap)).unwrap();
    fs::write(dump.join("pages-1.img"), [7; 2 * 4096]).unwrap();
    let _ = run(server.address(), [OsStr::new("push"), dump.as_os_str(), OsStr::new("made")]);
    dump
}

#[test]
fn a_daemon_in_the_background_is_ready_when_its_command_returns() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (images, root) = (made_dump(&server, folder.path()), postcopy_tests::daemon::runtime_root());
    let (dump, root) = (images.to_str().unwrap(), root.path().to_str().unwrap());
    for more in [&[][..], &["-o", "log"]] {
        let args = ["criu", "-D", dump, "--image", "made", "--runtime-dir", root, "-d", "--pidfile", "pid"];
        // The output ends although the daemon lives on.
        let output = postcopy(server.address(), args.iter().chain(more)).output().unwrap();
        assert!(output.status.success(), "{}", shown(&output));
        let pid = fs::read_to_string(images.join("pid")).unwrap();
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        assert!(images.join("lazy-pages.socket").exists());
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        wait_until("its end", || !images.join("pid").exists());
        assert!(fs::read_dir(root).unwrap().next().is_none());
    }
    let log = fs::read_to_string(images.join("log")).unwrap();
    assert!(log.contains("ended: nothing was lost"), "{log}");
}

#[test]
fn a_daemon_in_the_background_that_cannot_start_fails_with_its_error() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let (images, root) = (made_dump(&server, folder.path()), postcopy_tests::daemon::runtime_root());
    let (dump, root) = (images.to_str().unwrap(), root.path().to_str().unwrap());
    let cases = [
        (["-o", "/does/not/exist/log"], "/does/not/exist/log: No such file"),
        (["--pidfile", "/does/not/exist/pid"], "/does/not/exist/pid: No such file"),
        (["--image", "none"], "none:latest is not in the store"),
    ];
    for (more, reason) in cases {
        let image = if more[0] == "--image" { [].as_slice() } else { &["--image", "made"] };
        let args = ["criu", "-D", dump, "--runtime-dir", root, "-d"];
        let said = fail(server.address(), args.iter().chain(image).chain(&more));
        assert!(said.contains(reason), "{said}");
        assert!(!images.join("lazy-pages.socket").exists() && fs::read_dir(root).unwrap().next().is_none());
    }
}

/// A made dump below `folder`, whose link `parent` leads to the directory `base` beside it, which holds
/// one page of the dump and a file that is not CRIU's.
fn made_incremental_dump(server: &Server, folder: &Path) -> (PathBuf, PathBuf) {
    let (made, base) = (made_dump(server, folder), folder.join("base"));
    fs::create_dir(&base).unwrap();
    for name in ["inventory.img", "pagemap-7.img", "pages-1.img"] {
        fs::copy(made.join(name), base.join(name)).unwrap();
    }
    fs::write(base.join("id_ed25519"), "secret").unwrap();
    symlink("../base", made.join("parent")).unwrap();
    (made, base)
}

#[test]
fn a_push_stores_the_images_of_parents_only_and_no_parents_of_others() {
    if !is_root() {
        return skip(
            "criu::a_push_stores_the_images_of_parents_only_and_no_parents_of_others",
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
        // Stored all the same: by somebody who looks at no images.
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
fn shared_memory_is_said_not_to_be_lazy() {
    with_criu("shared_memory_is_said_not_to_be_lazy", |bench| {
        let ready = bench.path("ready");
        let script = format!(
            "import mmap, pathlib, time\nshared = mmap.mmap(-1, 8 << 20)\nshared.write(b'x' * (8 << 20))\n\
             private = b'y' * (16 << 20)\npathlib.Path({ready:?}).write_text('')\nwhile True: time.sleep(0.01)"
        );
        let mut command = Command::new("python3");
        command.args(["-c", &script]);
        let program = Program::start(&command);
        wait_until("its memory", || ready.exists());
        bench.dump(program);
        let (_, pulled) = bench.pull("app", "lazy");
        let shared = pulled["not_lazy"]["shared_bytes"].as_u64().unwrap();
        assert!((8 << 20..9 << 20).contains(&shared), "{pulled}");
        let private = pulled["not_lazy"]["private_bytes"].as_u64().unwrap();
        assert!((1..8 << 20).contains(&private), "{pulled}");
        let target = bench.path("told");
        let args = [OsStr::new("pull"), OsStr::new("app"), target.as_os_str(), OsStr::new("--criu")];
        let told = postcopy(bench.server.address(), args).output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(
            told.contains("not lazy: 8.") && told.contains("of shared memory (pagemap-shmem-*.img"),
            "{told}"
        );
        assert!(told.contains(" of it now), "), "the lazy memory is not written: {told}");
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

#[test]
fn a_dump_before_all_has_arrived_loses_memory_unless_it_is_drained() {
    with_criu("a_dump_before_all_has_arrived_loses_memory_unless_it_is_drained", |bench| {
        let Heap { program, status } = bench.heap_that_touches(64, 0);
        bench.dump(program);
        let size = |images: &Path| {
            let pages = fs::read_dir(images).unwrap().map(|entry| entry.unwrap());
            let pages = pages.filter(|entry| entry.file_name().to_str().unwrap().starts_with("pages-"));
            pages.map(|entry| entry.metadata().unwrap().len()).sum::<u64>()
        };
        // Without: criu says nothing, and memory is lost.
        let (daemon, restored) = bench.restore_lazily_here("lazy-1");
        let dumped = bench.criu.try_dump(restored.pid(), &bench.path("lost"), &[], &[]);
        assert_success(&dumped, &bench.path("lost"));
        assert!(size(&bench.path("lost")) < 60 << 20, "{}", size(&bench.path("lost")));
        drop((daemon, restored));
        // With the script it fails where nobody can bring it,
        let (mut daemon, restored) = bench.restore_lazily_here("lazy-2");
        let elsewhere = postcopy_tests::daemon::runtime_root();
        let refused = bench.dump_with_script(restored.pid(), "no", elsewhere.path());
        assert!(!refused.status.success());
        // and is whole where somebody does.
        let dumped = bench.dump_with_script(restored.pid(), "whole", daemon.root());
        assert_success(&dumped, &bench.path("whole"));
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(size(&bench.path("whole")) >= 64 << 20);
        drop(restored);
        let mut whole = bench.criu.restore(&bench.path("whole"), [""; 0]);
        whole.assert_runs();
        assert_all_right(&status, &whole);
    });
}

#[test]
fn a_server_that_is_away_is_not_overrun_by_the_tasks_of_a_restore() {
    with_criu("a_server_that_is_away_is_not_overrun_by_the_tasks_of_a_restore", |bench| {
        let heap = compile("heap", bench.folder.path());
        let files: Vec<_> = (0..2).map(|task| bench.path(&format!("status.{task}"))).collect();
        let each = files.iter().map(|file| format!("{} 8 {} 0 & ", heap.display(), file.display()));
        let mut command = Command::new("sh");
        command.args(["-c", &(each.collect::<String>() + "wait")]);
        let program = Program::start(&command);
        files.iter().for_each(|file| wait_for_status(file));
        bench.dump(program);
        let socket = bench.path("server.sock");
        let (store, listen) = (bench.server.store().to_owned(), format!("unix:{}", socket.display()));
        let mut server = Server::on(&store, &listen);
        let (images, _) = bench.pull("app", "lazy");
        let args = ["criu", "-D", images.to_str().unwrap(), "--image", "app", "--fill", "nothing"];
        let mut daemon = Daemon::start(server.address(), args);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        daemon.assert_says("all 3 tasks have been restored");
        files.iter().for_each(|file| wait_for_status(file));
        server.kill();
        fs::remove_file(&socket).unwrap();
        let away = UnixListener::bind(&socket).unwrap();
        let (accepted, is_away) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let (count, goes_on) = (Arc::clone(&accepted), Arc::clone(&is_away));
        let accepting = std::thread::spawn(move || {
            while goes_on.load(Ordering::SeqCst) {
                drop(away.accept().unwrap());
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        // It fills what is left.
        daemon.terminate();
        let (before, seconds) = (accepted.load(Ordering::SeqCst), 4);
        // It is about attempts in a time.
        std::thread::park_timeout(Duration::from_secs(seconds as u64));
        let attempts = accepted.load(Ordering::SeqCst) - before;
        // The fill of each task tries five times a second, its pager less often.
        assert!(attempts <= 3 * 10 * seconds, "{attempts} connections in {seconds} s");
        is_away.store(false, Ordering::SeqCst);
        let _ = UnixStream::connect(&socket);
        accepting.join().unwrap();
        fs::remove_file(&socket).unwrap();
        let _server = Server::on(&store, &listen);
        assert_eq!(daemon.wait().code(), Some(0), "all has come");
        files.iter().for_each(|file| {
            wait_for_status(file);
            assert_eq!(status::<2>(file)[1], 0);
        });
    });
}

#[test]
fn a_daemon_that_is_asked_to_end_fills_first() {
    with_criu("a_daemon_that_is_asked_to_end_fills_first", |bench| {
        let Heap { program, status } = bench.heap_that_touches(64, 0);
        bench.dump(program);
        let (mut daemon, restored) = bench.restore_lazily("lazy", &["--fill", "nothing"]);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
    });
}

#[test]
fn a_daemon_that_cannot_fill_in_time_leaves_sigbus_and_no_zeros() {
    with_criu("a_daemon_that_cannot_fill_in_time_leaves_sigbus_and_no_zeros", |bench| {
        let Heap { program, status: path } = bench.heap_that_touches(32, 0);
        bench.dump(program);
        let store = bench.server.store().to_owned();
        let socket = format!("unix:{}", bench.path("server.sock").display());
        let mut server = Server::on(&store, &socket);
        let (images, _) = bench.pull("app", "lazy");
        let args =
            ["criu", "-D", images.to_str().unwrap(), "--image", "app", "--fill", "nothing", "--grace", "1s"];
        let mut daemon = Daemon::start(server.address(), args);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        server.kill();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.assert_says("left: process");
        // It writes its status all the time, and checks nothing; what it touches for that may be what it dies of.
        wait_until("its end", || {
            let runs = !restored.has_ended();
            if runs {
                restored.try_signal(Signal::SIGUSR1);
            }
            !runs
        });
        let [_, wrong] = status(&path);
        assert_eq!(wrong, 0, "it has seen nothing wrong");
    });
}

/// Gives commands to Redis over its socket, all at once; each answer is a line, or the text that it announces.
fn redis(socket: &Path, commands: &[Vec<String>]) -> Vec<String> {
    let stream = UnixStream::connect(socket).unwrap();
    let mut writer = BufWriter::new(stream.try_clone().unwrap());
    let mut answers = Vec::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut lines = BufReader::new(&stream);
            let mut next = |len: Option<usize>| {
                let mut bytes = vec![0; len.map_or(0, |len| len + 2)];
                match len {
                    None => lines.read_until(b'\n', &mut bytes).map(drop).unwrap(),
                    Some(_) => lines.read_exact(&mut bytes).unwrap(),
                }
                bytes.truncate(bytes.len() - 2);
                String::from_utf8(bytes).unwrap()
            };
            let answer = |_| {
                let line = next(None);
                match line.strip_prefix('$').map(|len| usize::try_from(len.parse::<i64>().unwrap()).ok()) {
                    Some(Some(len)) => next(Some(len)),
                    _ => line,
                }
            };
            commands.iter().map(answer).collect::<Vec<_>>()
        });
        for command in commands {
            write!(writer, "*{}\r\n", command.len()).unwrap();
            command.iter().for_each(|word| write!(writer, "${}\r\n{word}\r\n", word.len()).unwrap());
        }
        writer.flush().unwrap();
        answers = reader.join().unwrap();
    });
    answers
}

#[test]
fn redis_keeps_all_of_its_keys_and_takes_new_ones() {
    with_criu("redis_keeps_all_of_its_keys_and_takes_new_ones", |bench| {
        const KEYS: usize = 20_000;
        let socket = bench.path("redis.sock");
        let mut command = bench.criu.command_to_dump("usr/bin/redis-server", bench.folder.path());
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
        let program = Program::start(&command);
        wait_until("redis", || UnixStream::connect(&socket).is_ok());
        let value = |key: usize| format!("{key} ").repeat(100 + key % 300);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let set = |key: usize| words(&["SET", &format!("key:{key}"), &value(key)]);
        let answers = redis(&socket, &(0..KEYS).map(set).collect::<Vec<_>>());
        assert!(answers.iter().all(|answer| answer == "+OK"));
        bench.dump(program);
        let assert_whole = |from: usize| {
            let gets: Vec<_> = (0..KEYS).map(|key| words(&["GET", &format!("key:{key}")])).collect();
            let found = redis(&socket, &gets);
            let wrong = (from..KEYS).filter(|key| found[*key] != value(*key)).count();
            assert_eq!(wrong, 0, "keys with other values");
            assert_eq!(redis(&socket, &[words(&["DBSIZE"])]), [format!(":{KEYS}")]);
        };
        let plain = bench.restore_plainly();
        assert_whole(0);
        drop(plain);
        for fill in ["all", "nothing"] {
            let (mut daemon, _restored) = bench.restore_lazily(&format!("lazy-{fill}"), &["--fill", fill]);
            if !daemon.has_said("all of its memory is resident") {
                daemon.kill_worker();
            }
            assert_whole(0);
            let changed: Vec<_> =
                (0..5000).map(|key| words(&["SET", &format!("key:{key}"), "changed"])).collect();
            assert!(redis(&socket, &changed).iter().all(|answer| answer == "+OK"));
            assert_whole(5000);
            assert_eq!(redis(&socket, &[words(&["GET", "key:17"])]), ["changed"]);
            daemon.terminate();
            assert_eq!(daemon.wait().code(), Some(0));
            assert_whole(5000);
        }
    });
}

/// An entry of a pagemap, as far as it is needed to make a chain of one.
#[derive(Clone, PartialEq, prost::Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// Moves every other entry of a dump's pagemap, and its pages, to a parent: what an incremental dump looks like, of which
/// this kernel cannot make one.
fn split(images: &Path, parent: &Path) {
    const PARENT: u32 = 1;
    fs::create_dir(parent).unwrap();
    let names =
        || fs::read_dir(images).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pagemap = names().find(|name| name.starts_with("pagemap-")).unwrap();
    let pages = names().find(|name| name.starts_with("pages-")).unwrap();
    fs::copy(images.join("inventory.img"), parent.join("inventory.img")).unwrap();
    let (bytes, all) = (fs::read(images.join(&pagemap)).unwrap(), fs::read(images.join(&pages)).unwrap());
    let mut messages = Vec::new();
    let mut at = 8;
    while at < bytes.len() {
        let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        messages.push(&bytes[at + 4..at + 4 + len]);
        at += 4 + len;
    }
    let message = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_ne_bytes(), bytes].concat();
    let head = [&bytes[..8], &message(messages[0])].concat();
    let (mut own, mut own_pages, mut other, mut other_pages) = (head.clone(), Vec::new(), head, Vec::new());
    let mut offset = 0;
    for (index, bytes) in messages[1..].iter().enumerate() {
        let entry = PagemapEntry::decode(*bytes).unwrap();
        let count = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let is_here = entry.in_parent != Some(true) && entry.flags.is_none_or(|flags| flags & PARENT == 0);
        let len = if is_here { usize::try_from(count).unwrap() * 4096 } else { 0 };
        let held = &all[offset..offset + len];
        offset += len;
        if index % 2 == 0 || !is_here {
            own.extend(message(bytes));
            own_pages.extend_from_slice(held);
        } else {
            other.extend(message(bytes));
            other_pages.extend_from_slice(held);
            let moved = PagemapEntry { in_parent: Some(true), flags: Some(PARENT), ..entry };
            own.extend(message(&moved.encode_to_vec()));
        }
    }
    for (directory, pagemap_bytes, pages_bytes) in [(images, own, own_pages), (parent, other, other_pages)] {
        fs::write(directory.join(&pagemap), pagemap_bytes).unwrap();
        fs::write(directory.join(&pages), pages_bytes).unwrap();
    }
}

#[test]
fn a_chain_of_three_incremental_images_is_restored() {
    with_criu("a_chain_of_three_incremental_images_is_restored", |bench| {
        let Heap { program, status } = bench.heap(32);
        bench.dump_as(program, "3");
        split(&bench.path("3"), &bench.path("2"));
        symlink("../2", bench.path("3/parent")).unwrap();
        split(&bench.path("2"), &bench.path("1"));
        symlink("../1", bench.path("2/parent")).unwrap();
        let mut plain = bench.criu.restore(&bench.path("3"), [""; 0]);
        plain.assert_runs();
        assert_all_right(&status, &plain);
        drop(plain);
        bench.push(&bench.path("3"), "app");
        for directory in ["1", "2", "3"] {
            fs::remove_dir_all(bench.path(directory)).unwrap();
        }
        let (mut daemon, restored) = bench.restore_lazily("lazy", &[]);
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
    });
}

#[test]
fn a_checkpoint_s_archive_is_stored_as_what_is_in_it() {
    with_criu("a_checkpoint_s_archive_is_stored_as_what_is_in_it", |bench| {
        let Heap { program, status } = bench.heap(16);
        // As podman and CRI-O have it.
        bench.dump_as(program, "tree/checkpoint");
        fs::write(bench.path("tree/config.dump"), "{}").unwrap();
        for (name, how) in [("app.tar", "-cf"), ("app.tar.gz", "-czf")] {
            let archive = bench.path(name);
            let packed = Command::new("tar")
                .arg(how)
                .arg(&archive)
                .arg("-C")
                .arg(bench.path("tree"))
                .arg(".")
                .status();
            assert!(packed.unwrap().success());
            bench.push(&archive, "app");
        }
        fs::remove_dir_all(bench.path("tree")).unwrap();
        let (directory, _) = bench.pull("app", "lazy");
        assert_eq!(fs::read_to_string(directory.join("config.dump")).unwrap(), "{}");
        let images = directory.join("checkpoint");
        let mut daemon = bench.daemon(&images, "app", &[]);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0));
        // Another archive is a file like any other one.
        fs::write(bench.path("plain"), "something").unwrap();
        let other = bench.path("other.tar");
        let packed = Command::new("tar")
            .arg("-cf")
            .arg(&other)
            .arg("-C")
            .arg(bench.folder.path())
            .arg("plain")
            .status();
        assert!(packed.unwrap().success());
        bench.push(&other, "other");
        let inspected = run(bench.server.address(), ["inspect", "other"]);
        assert_eq!(inspected["entries"][0]["path"], "other.tar");
    });
}

/// A container of runc; deleted when this is dropped.
struct Container {
    root: PathBuf,
    criu: PathBuf,
}

impl Container {
    fn runc(&self, args: &[&str]) -> std::process::ExitStatus {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.root).arg("--criu").arg(&self.criu).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", "postcopy-test"]);
    }
}

#[test]
fn a_container_of_runc_is_restored() {
    let name = "a_container_of_runc_is_restored";
    with_criu(name, |bench| {
        if Command::new("runc").arg("--version").output().is_err() {
            return skip(&format!("criu::{name}"), "there is no runc");
        }
        let path = |name: &str| bench.path(name).to_str().unwrap().to_owned();
        for directory in ["proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(bench.path("bundle/rootfs").join(directory)).unwrap();
        }
        // Nothing else is in the container.
        let program = compile_statically("heap", &bench.path("bundle/rootfs"));
        assert!(program.exists());
        let made = Command::new("runc").arg("spec").current_dir(bench.path("bundle")).status();
        assert!(made.unwrap().success());
        let config = bench.path("bundle/config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["/heap", "32", "/tmp/status", "0"]);
        spec["root"]["readonly"] = false.into();
        let keep = |list: &mut serde_json::Value, without: &[&str]| {
            let is_kept = |item: &serde_json::Value| !without.iter().any(|kind| item["type"] == *kind);
            list.as_array_mut().unwrap().retain(is_kept);
        };
        keep(&mut spec["linux"]["namespaces"], &["network", "cgroup"]);
        keep(&mut spec["mounts"], &["cgroup"]);
        fs::write(&config, spec.to_string()).unwrap();
        let criu = bench.criu.command("usr/sbin/criu");
        let words: Vec<_> =
            [criu.get_program()].into_iter().chain(criu.get_args()).map(|w| w.to_str().unwrap()).collect();
        fs::write(bench.path("criu"), format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "))).unwrap();
        fs::set_permissions(bench.path("criu"), PermissionsExt::from_mode(0o755)).unwrap();
        let container = Container { root: bench.path("runc"), criu: bench.path("criu") };
        let status_file = bench.path("bundle/rootfs/tmp/status");
        assert!(container.runc(&["run", "--detach", "--bundle", &path("bundle"), "postcopy-test"]).success());
        wait_for_status(&status_file);
        fs::create_dir(bench.path("work")).unwrap();
        let (images, work) = (path("images"), path("work"));
        let checkpoint = ["checkpoint", "--image-path", &images, "--work-path", &work, "postcopy-test"];
        assert!(
            container.runc(&checkpoint).success(),
            "{}",
            fs::read_to_string(bench.path("work/dump.log")).unwrap()
        );
        bench.push(Path::new(&images), "app");
        let (lazy, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&lazy, "app", &["-W", &work, "--fill", "nothing"]);
        let lazy = lazy.to_str().unwrap();
        let bundle = path("bundle");
        let restore =
            ["restore", "--lazy-pages", "--image-path", lazy, "--work-path", &work, "--bundle", &bundle];
        let restored = container.runc(&[&restore[..], &["--detach", "postcopy-test"]].concat());
        assert!(restored.success(), "{}", fs::read_to_string(bench.path("work/restore.log")).unwrap());
        daemon.kill_worker();
        wait_for_status(&status_file);
        assert!(container.runc(&["kill", "postcopy-test", "USR1"]).success());
        wait_until("a check of all memory", || status::<3>(&status_file)[2] == 1);
        assert_eq!(status::<2>(&status_file)[1], 0, "pages were wrong");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
    });
}

#[test]
fn what_a_restore_has_touched_comes_ahead_the_next_time() {
    let name = "what_a_restore_has_touched_comes_ahead_the_next_time";
    with_criu(name, |bench| {
        let Heap { program, status: path } = bench.heap_that_touches(64, 0);
        bench.dump(program);
        let touch_a_quarter = |restored: &Restored| {
            let [.., quarters] = status::<4>(&path);
            restored.signal(Signal::SIGUSR2);
            wait_until("touches", || status::<4>(&path)[3] > quarters);
        };
        let (mut daemon, restored) = bench.restore_lazily("recorded", &["--record"]);
        touch_a_quarter(&restored);
        // When it is asked for; and in any case when the processes are gone, or when it is told to end.
        let (pid, root) = (restored.pid().to_string(), daemon.root().to_str().unwrap());
        let send = ["working-set", "send", &pid, "--runtime-dir", root];
        assert!(postcopy(bench.server.address(), send).status().unwrap().success());
        let sets = run(bench.server.address(), ["working-set", "ls"]);
        assert!(sets[0]["pages"].as_u64().is_some_and(|pages| pages >= 4096), "{sets}");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        drop(restored);
        let sets = run(bench.server.address(), ["working-set", "ls"]);
        let pages = sets[0]["pages"].as_u64().unwrap();
        assert!(
            (4096..6000).contains(&pages),
            "a quarter of 16384, and what the program needs itself: {sets}"
        );

        for fill in ["working-set", "all"] {
            // As criu's own paths it is taken from the work directory.
            let trace =
                if fill == "all" { &["--fill", fill, "--trace", "traces"][..] } else { &["--fill", fill] };
            let (mut daemon, restored) = bench.restore_lazily(fill, trace);
            let pid = restored.pid();
            wait_until("the set is there", || resident_kib(pid) >= pages * 4);
            assert!(fill == "all" || resident_kib(pid) < pages * 4 + (16 << 10), "more than the set");
            touch_a_quarter(&restored);
            assert_all_right(&path, &restored);
            assert_eq!(daemon.wait().code(), Some(0), "all has come");
        }
        let mut traces =
            fs::read_dir(bench.path("all").join("traces")).unwrap().map(|entry| entry.unwrap().path());
        let (trace, None) = (traces.next().unwrap(), traces.next()) else { panic!("one process, one trace") };
        let report = run(bench.server.address(), ["report", trace.to_str().unwrap()]);
        let came = |why: &str| report["pages"][why].as_u64().unwrap();
        assert!(came("working_set") >= pages * 9 / 10 && came("background") > 0, "{report}");
        assert!(
            report["is_complete"] == true && report["estimate"]["withheld"].as_u64().unwrap() > 0,
            "{report}"
        );
    });
}

#[test]
fn a_daemon_waits_for_the_recordings_of_all_its_tasks_at_once() {
    let name = "a_daemon_waits_for_the_recordings_of_all_its_tasks_at_once";
    with_criu(name, |bench| {
        let heap = compile("heap", bench.folder.path());
        let files: Vec<_> = (0..4).map(|task| bench.path(&format!("status.{task}"))).collect();
        let each = files.iter().map(|file| format!("{} 8 {} 0 & ", heap.display(), file.display()));
        let mut command = Command::new("sh");
        command.args(["-c", &(each.collect::<String>() + "wait")]);
        let program = Program::start(&command);
        files.iter().for_each(|file| wait_for_status(file));
        bench.dump(program);
        let options = ["--record", "--fill", "nothing", "--grace", "0s"];
        let (mut daemon, _restored) = bench.restore_lazily("lazy", &options);
        files.iter().for_each(|file| wait_for_status(file));
        // A connection to it is waited for in vain for 10 s.
        let server = nix::unistd::Pid::from_raw(bench.server.pid().cast_signed());
        nix::sys::signal::kill(server, Signal::SIGSTOP).unwrap();
        daemon.terminate();
        let started = Instant::now();
        assert_eq!(daemon.wait().code(), Some(3));
        assert!(started.elapsed() < Duration::from_secs(30), "one after the other");
        let said = daemon.said();
        assert!(said.iter().filter(|line| line.contains("could not be recorded")).count() >= 4, "{said:#?}");
    });
}

#[test]
fn the_arguments_of_a_restored_process_can_be_read_before_it_touches_them() {
    let name = "the_arguments_of_a_restored_process_can_be_read_before_it_touches_them";
    with_criu(name, |bench| {
        let Heap { program, .. } = bench.heap(8);
        let read = |pid: u32, what: &str| fs::read(format!("/proc/{pid}/{what}")).unwrap();
        let before = ["cmdline", "environ"].map(|what| read(program.pid(), what));
        bench.dump(program);
        let (_daemon, restored) = bench.restore_lazily("lazy", &["--fill", "nothing"]);
        for (what, before) in ["cmdline", "environ"].iter().zip(before) {
            assert!(!before.is_empty());
            wait_until("they are there", || read(restored.pid(), what) == before);
        }
    });
}
