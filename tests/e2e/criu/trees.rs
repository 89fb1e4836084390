//! Several processes that are dumped and restored together.

use super::with_criu;
use postcopy_tests::criu::{Program, compile, numbers, status, wait_for_status};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::server::Server;
use postcopy_tests::wait_until;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

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
        daemon.assert_says("all tasks have been restored: 3");
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
