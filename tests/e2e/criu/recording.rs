//! Working sets and traces of restores.

use super::{Heap, assert_all_right, with_criu};
use nix::sys::signal::Signal;
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::criu::{Program, Restored, compile, status, wait_for_status};
use postcopy_tests::{resident_kib, wait_until};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

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
        // The daemon sends the recording on request, and also when the processes are gone or when
        // it is asked to end.
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
            if fill == "working-set" {
                // Pages that the program never touches do not come by themselves.
                daemon.terminate();
            }
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
        // Each task waits for the server's answer for 30 s, in vain.
        let server = nix::unistd::Pid::from_raw(bench.server.pid().cast_signed());
        nix::sys::signal::kill(server, Signal::SIGSTOP).unwrap();
        daemon.terminate();
        let started = Instant::now();
        assert_eq!(daemon.wait().code(), Some(3));
        assert!(started.elapsed() < Duration::from_secs(60), "one after the other");
        let said = daemon.said();
        assert!(said.iter().filter(|line| line.contains("could not be recorded")).count() >= 4, "{said:#?}");
    });
}
