//! Handshakes that are refused, incomplete, or tried again.

use super::{Snapshot, is_stopped, with_root};
use postcopy_tests::daemon::Daemon;
use postcopy_tests::faulter::{EVENT_REMOVE, Faulter};
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::vmm::Vmm;
use postcopy_tests::{descriptors, wait_until};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

#[test]
fn memory_is_taken_on_when_there_are_descriptors_again() {
    with_root("memory_is_taken_on_when_there_are_descriptors_again", || {
        let snapshot = Snapshot::push(16);
        let mut daemon = snapshot.daemon(&[]);
        let worker = daemon.worker();
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let limit = |limit: Option<u64>| {
            let limit = Rlimit { current: limit, maximum };
            prlimit(Some(worker), Resource::Nofile, limit).unwrap();
        };
        let open = std::fs::read_dir(format!("/proc/{}/fd", worker.as_raw_pid())).unwrap().count() as u64;
        // For one connection, and then for all that attaching needs but the last.
        for more in 1..8 {
            limit(Some(open + more));
            let said = daemon.said().len();
            let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:16"]);
            wait_until("an attempt", || daemon.said().len() > said);
            limit(maximum);
            vmm.loaded();
            vmm.assert_right();
            let pid = vmm.pid();
            vmm.kill();
            daemon.assert_says(&format!("vm {pid}: is gone"));
        }
    });
}

#[test]
fn memory_is_taken_on_when_there_is_room_for_its_state_again() {
    with_root("memory_is_taken_on_when_there_is_room_for_its_state_again", || {
        let snapshot = Snapshot::push(4);
        let tmpfs = Tmpfs::of_bytes(4 << 20);
        let args = snapshot.args(&snapshot.socket(), &[]);
        let mut daemon = Daemon::start_in(tmpfs.path(), snapshot.server.address(), args);
        let worker = daemon.worker();
        let path = tmpfs.path().join("rest");
        let mut rest = File::create(&path).unwrap();
        while rest.write(&[1; 4096]).is_ok() {}
        let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:4"]);
        daemon.assert_says("No space left on device");
        std::fs::remove_file(path).unwrap();
        drop(rest);
        vmm.loaded();
        vmm.assert_right();
        assert_eq!(daemon.worker(), worker, "no worker was killed by a store");
    });
}

#[test]
fn handshakes_that_cannot_be_are_refused_by_the_name_of_their_process() {
    with_root("handshakes_that_cannot_be_are_refused_by_the_name_of_their_process", || {
        let snapshot = Snapshot::push(4);
        let daemon = snapshot.daemon(&[]);
        let socket = snapshot.socket();
        let mut good = snapshot.vmm(&["small:4"]);
        // A connection that sends nothing delays no other one.
        let silent = UnixStream::connect(&socket).unwrap();
        let faulter = Faulter::start(EVENT_REMOVE, &["private:1024"]);
        let address = faulter.at(0, 0);
        let mapping = |address: usize, size: usize, offset: usize| {
            format!(
                r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size_kib":4096}}"#
            )
        };
        let (half, whole) = (2 << 20, 4 << 20);
        let all = mapping(address, whole, 0);
        let overlapping = format!("[{all},{}]", mapping(address + half, half, half));
        let beyond = format!("[{},{}]", mapping(address, half, 0), mapping(address + half, half, whole));
        let odd = format!("[{}]", mapping(address + 1, whole, 0));
        let elsewhere = format!("[{}]", mapping(0x1000_0000, whole, 0));
        let no_uffd = File::open("/dev/null").unwrap();
        let cases: [(&str, BorrowedFd<'_>, &str); 7] = [
            ("hello, here is a machine", faulter.uffd(), "not what Firecracker sends"),
            ("[]", faulter.uffd(), "no memory"),
            (&overlapping, faulter.uffd(), "overlaps"),
            (&beyond, faulter.uffd(), "no file of vm:latest has as many"),
            (&odd, faulter.uffd(), "multiples of 4096"),
            (&elsewhere, faulter.uffd(), "no memory registered"),
            (&format!("[{all}]"), no_uffd.as_fd(), "userfaultfd"),
        ];
        for (text, fd, reason) in cases {
            let stream = UnixStream::connect(&socket).unwrap();
            descriptors::send(&stream, fd, text);
            daemon.assert_says(reason);
        }
        let mut without = UnixStream::connect(&socket).unwrap();
        without.write_all(format!("[{all}]").as_bytes()).unwrap();
        daemon.assert_says("0 descriptors came");
        assert!(daemon.has_said(&format!("process {}: ", std::process::id())), "{:#?}", daemon.said());
        drop(silent);
        daemon.assert_says("hung up after 0 bytes");
        good.assert_right();
    });
}

#[test]
fn a_machine_whose_handshake_is_refused_is_lost_and_a_stranger_is_not() {
    with_root("a_machine_whose_handshake_is_refused_is_lost_and_a_stranger_is_not", || {
        let snapshot = Snapshot::push(4);
        for policy in ["wait", "pause", "kill", "poison"] {
            let daemon = snapshot.daemon(&["--on-loss", policy]);
            let mut good = snapshot.vmm(&["small:4"]);
            // This process sends what is no handshake of a machine, and goes on.
            let mut stranger = UnixStream::connect(snapshot.socket()).unwrap();
            stranger.write_all(b"hello, here is a machine").unwrap();
            daemon.assert_says(&format!("process {}: its handshake is not", std::process::id()));
            let with_file = UnixStream::connect(snapshot.socket()).unwrap();
            descriptors::send(&with_file, File::open("/dev/null").unwrap().as_fd(), "[]");
            daemon.assert_says("no memory");

            let mut vmm = Vmm::start(&snapshot.socket(), &snapshot.memory(), "new", &["small:8"]);
            daemon.assert_says(&format!("process {}: the guest has 8388608 bytes", vmm.pid()));
            match policy {
                "wait" => {
                    std::thread::park_timeout(Duration::from_millis(300));
                    assert!(!vmm.has_ended() && !is_stopped(vmm.pid()));
                }
                "pause" => wait_until("it is stopped", || is_stopped(vmm.pid())),
                _ => wait_until("it has died", || vmm.has_ended()),
            }
            let lost = format!("process {}: its memory is lost", vmm.pid());
            if policy == "wait" {
                assert!(!daemon.has_said(&lost), "{:#?}", daemon.said());
            } else {
                daemon.assert_says(&lost);
            }
            good.assert_right();
        }
    });
}

#[test]
fn a_process_that_exits_before_its_handshake_is_said_to_have_exited() {
    with_root("a_process_that_exits_before_its_handshake_is_said_to_have_exited", || {
        let snapshot = Snapshot::push(4);
        let daemon = snapshot.daemon(&["--on-loss", "kill"]);
        let script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        let mut child = Command::new("python3").arg("-c").arg(script).arg(snapshot.socket()).spawn().unwrap();
        daemon.assert_says(&format!("process {}: it has exited", child.id()));
        child.wait().unwrap();
        assert!(!daemon.has_said("hung up"), "{:#?}", daemon.said());
    });
}

#[test]
fn a_handshake_that_comes_in_pieces_is_put_together() {
    with_root("a_handshake_that_comes_in_pieces_is_put_together", || {
        let snapshot = Snapshot::push(4);
        let mut daemon = snapshot.daemon(&[]);
        let mut faulter = Faulter::start(EVENT_REMOVE, &["private:1024"]);
        let text = format!(
            r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":4096}}]"#,
            faulter.at(0, 0),
            4 << 20
        );
        let mut stream = UnixStream::connect(snapshot.socket()).unwrap();
        descriptors::send(&stream, faulter.uffd(), &text[..1]);
        // A worker that dies after the first piece has lost nothing of it.
        daemon.kill_worker();
        stream.write_all(&text.as_bytes()[1..40]).unwrap();
        daemon.kill_worker();
        stream.write_all(&text.as_bytes()[40..]).unwrap();
        faulter.let_go();
        let bytes = std::fs::read(snapshot.memory()).unwrap();
        faulter.assert_reads(0, 0, &bytes);
    });
}
