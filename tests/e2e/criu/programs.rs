//! Single programs, restored while their memory arrives: a heap that checks itself, and Python with
//! threads.

use super::{Heap, assert_all_right, with_criu};
use nix::sys::signal::Signal;
use postcopy_tests::criu::{Program, status, wait_for_status};
use postcopy_tests::{resident_kib, wait_until};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

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
        // The program needs no daemon any more, and the daemon has left no file.
        assert_all_right(&status, &restored);
        assert!(fs::read_dir(daemon.root()).unwrap().next().is_none());
        assert!(!images.join("lazy-pages.socket").exists());
    });
}

#[test]
fn one_image_is_restored_many_times_at_once() {
    with_criu("one_image_is_restored_many_times_at_once", |bench| {
        let Heap { program, status: path } = bench.heap(32);
        bench.dump(program);
        let mut all: Vec<_> = (0..4).map(|n| bench.restore_lazily(&format!("lazy-{n}"), &[])).collect();
        for (daemon, restored) in &mut all {
            // All of them write to the same file. So the test asserts only that each one continues
            // and finds nothing wrong.
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
