//! The daemon of a restore: killed workers, sessions that cannot be resumed, strangers at its
//! socket, its start and its end.

use super::made::made_dump;
use super::{Heap, assert_all_right, with_criu};
use nix::sys::signal::Signal;
use postcopy_tests::cli::{fail, postcopy};
use postcopy_tests::criu::status;
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use postcopy_tests::wait_until;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

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
                // With this fill, the daemon waits for the pages that the program never accesses.
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
fn a_restore_that_fails_before_its_first_task_leaves_the_daemon_to_the_next_one() {
    let name = "a_restore_that_fails_before_its_first_task_leaves_the_daemon_to_the_next_one";
    with_criu(name, |bench| {
        let Heap { program, status } = bench.heap(8);
        bench.dump(program);
        let (images, _) = bench.pull("app", "lazy");
        let mut daemon = bench.daemon(&images, "app", &[]);
        let is_fdinfo = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("fdinfo");
        let core = fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path()).find(is_fdinfo);
        let core = core.unwrap();
        let right = fs::read(&core).unwrap();
        fs::write(&core, b"nothing of the kind").unwrap();
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        wait_until("its end", || restored.has_ended());
        daemon.assert_says("it has hung up and has sent nothing");
        fs::write(&core, right).unwrap();
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0));
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
        // The program writes its status all the time, and checks nothing. An access to the status
        // or to the code for it may raise the SIGBUS.
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
