//! Dumps of processes whose memory has not arrived.

use super::{Heap, assert_all_right, with_criu};
use postcopy_tests::criu::assert_success;
use std::fs;
use std::path::Path;

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
        // Without the script, criu reports nothing, and memory is lost.
        let (daemon, restored) = bench.restore_lazily_here("lazy-1");
        let dumped = bench.criu.try_dump(restored.pid(), &bench.path("lost"), &[], &[]);
        assert_success(&dumped, &bench.path("lost"));
        assert!(size(&bench.path("lost")) < 60 << 20, "{}", size(&bench.path("lost")));
        drop((daemon, restored));
        // With the script, the dump fails if no daemon can fetch the memory,
        let (mut daemon, restored) = bench.restore_lazily_here("lazy-2");
        let elsewhere = postcopy_tests::daemon::runtime_root();
        let refused = bench.dump_with_script(restored.pid(), "no", elsewhere.path());
        assert!(!refused.status.success());
        // and is complete if a daemon does.
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
