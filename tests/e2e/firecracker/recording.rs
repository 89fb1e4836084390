//! Working sets of machines.

use super::{Snapshot, with_root};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::{resident_kib, wait_until};

#[test]
fn a_machine_that_is_left_asleep_has_told_what_it_touched() {
    with_root("a_machine_that_is_left_asleep_has_told_what_it_touched", || {
        let snapshot = Snapshot::push(32);
        let mut daemon = snapshot.daemon(&["--record", "--grace", "0s"]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        vmm.tell("touch 8 5");
        assert_eq!(vmm.touches().wrong, 0);
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(3));
        daemon.assert_says(&format!("postcopy firecracker --adopt {} --image vm", vmm.pid()));
        let sets = run(snapshot.server.address(), ["working-set", "ls"]);
        assert!(sets[0]["pages"].as_u64().is_some_and(|pages| pages >= 512), "{sets}");
    });
}

#[test]
fn what_a_machine_has_touched_is_told_when_it_is_asked_for() {
    with_root("what_a_machine_has_touched_is_told_when_it_is_asked_for", || {
        let snapshot = Snapshot::push(32);
        let server = snapshot.server.address();
        let send = |pid: u32, daemon: &Daemon| {
            let (pid, root) = (pid.to_string(), daemon.root().display().to_string());
            ["working-set".into(), "send".into(), pid, "--runtime-dir".into(), root]
        };
        let is_sent = |args: [String; 5]| postcopy(server, args).status().unwrap().success();
        let mut daemon = snapshot.daemon(&["--record"]);
        let mut vmm = snapshot.vmm(&["small:32"]);
        vmm.tell("touch 8 5");
        assert_eq!(vmm.touches().wrong, 0);
        assert!(is_sent(send(vmm.pid(), &daemon)));
        let sets = run(server, ["working-set", "ls"]);
        assert_eq!(sets[0]["recordings"], 1, "of one machine: {sets}");
        assert!(sets[0]["pages"].as_u64().is_some_and(|pages| pages >= 512), "{sets}");
        // A successor sends a recording, too. The first worker may have sent it before.
        let mut other = snapshot.vmm(&["small:32"]);
        daemon.kill_worker();
        other.tell("touch 8 5");
        assert_eq!(other.touches().wrong, 0);
        assert!(is_sent(send(other.pid(), &daemon)));
        assert!(run(server, ["working-set", "ls"])[0]["recordings"].as_u64() >= Some(2));
        // A request for a process that is not served is refused.
        let stranger = daemon.guardian();
        assert!(fail(server, send(stranger, &daemon)).contains(&format!("serves process {stranger}")));
        drop((vmm, other, daemon));
        let quiet = snapshot.daemon(&[]);
        let vmm = snapshot.vmm(&["small:32"]);
        let refused = format!(
            "process {}: page faults of this session are not recorded. Start the daemon with --record",
            vmm.pid()
        );
        assert!(fail(server, send(vmm.pid(), &quiet)).contains(&refused));
    });
}

#[test]
fn what_a_machine_has_touched_comes_ahead_the_next_time() {
    with_root("what_a_machine_has_touched_comes_ahead_the_next_time", || {
        let snapshot = Snapshot::push(64);
        let traces = tempfile::tempdir().unwrap();
        let mut daemon = snapshot.daemon(&["--record", "--trace", traces.path().to_str().unwrap()]);
        let mut vmm = snapshot.vmm(&["small:64"]);
        let touch = |vmm: &mut Vmm| {
            vmm.tell("touch 16 3");
            assert_eq!(vmm.touches().wrong, 0);
        };
        touch(&mut vmm);
        // The successor continues the recording: pages installed before it count as brought.
        daemon.kill_worker();
        vmm.tell("touch 8 4");
        assert_eq!(vmm.touches().wrong, 0);
        let pid = vmm.pid();
        vmm.kill();
        wait_until("the machine's end", || daemon.has_said(&format!("vm {pid}: is gone")));
        let sets = run(snapshot.server.address(), ["working-set", "ls"]);
        let pages = sets[0]["pages"].as_u64().unwrap();
        assert!((512..6144 + 16).contains(&pages), "{sets}");
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        // Each worker writes one: the first of them was killed.
        let traces = std::fs::read_dir(traces.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut traces: Vec<_> = traces.collect();
        traces.sort_unstable();
        let reports =
            traces.iter().map(|trace| run(snapshot.server.address(), ["report", trace.to_str().unwrap()]));
        let told = reports.map(|report| {
            assert!(report["pages"]["touched"].as_u64().unwrap() >= 100, "{report}");
            report["is_complete"].as_bool().unwrap()
        });
        assert_eq!(told.collect::<Vec<_>>(), [false, true]);

        let daemon = snapshot.daemon(&[]);
        let mut vmm = snapshot.vmm(&["small:64"]);
        wait_until("the set is there", || resident_kib(vmm.pid()) >= pages * 4);
        touch(&mut vmm);
        vmm.assert_right();
        drop(daemon);

        let traces = tempfile::tempdir().unwrap();
        let options = ["--no-working-set", "--trace", traces.path().to_str().unwrap()];
        let mut daemon = snapshot.daemon(&options);
        let mut vmm = snapshot.vmm(&["small:64"]);
        touch(&mut vmm);
        vmm.kill();
        daemon.terminate();
        assert_eq!(daemon.wait().code(), Some(0));
        let trace = std::fs::read_dir(traces.path()).unwrap().next().unwrap().unwrap().path();
        let report = run(snapshot.server.address(), ["report", trace.to_str().unwrap()]);
        assert_eq!(report["pages"]["working_set"], 0, "{report}");
    });
}
