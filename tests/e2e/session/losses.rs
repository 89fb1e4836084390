//! Pages that are lost, and reads of them.

use super::{CHILD, CHUNK, FILLING, Source, WATCHDOG, as_child, assert_pages};
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{LossPolicy, Options, Session};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::wait_until;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn deadlines_that_are_too_far_away_are_for_ever() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(4 * CHUNK, 7), CHUNK);
        let session = source.open(FILLING.fault_deadline(Duration::MAX));
        let region = session.map("mem").unwrap();
        assert_eq!(region[CHUNK], source.bytes[CHUNK]);
        session.wait_resident(Duration::MAX).unwrap();
        assert_pages(&region, &source.bytes, "all of it");
    });
}

/// Under `Wait` a loss that has healed is no reason for later errors.
#[test]
fn reads_after_a_loss_that_has_healed_are_right() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(8 * CHUNK, 8), CHUNK);
        let honest = Arc::new(AtomicBool::new(false));
        let is_honest = Arc::clone(&honest);
        let lies = Lies::default().chunk(move |_, answer| {
            let result = answer.result.clone().filter(|_| is_honest.load(Ordering::SeqCst));
            vec![ChunkAnswer { result, ..answer }]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = Options::DEFAULT.on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        let mut read = vec![0; 100];
        let lost = region.read_at(CHUNK, &mut read).unwrap_err().to_string();
        assert!(lost.contains("chunk 1 of image"), "{lost}");
        honest.store(true, Ordering::SeqCst);
        wait_until("what was lost comes", || region.read_at(CHUNK, &mut read).is_ok());
        for chunk in 2..8 {
            region.read_at(chunk * CHUNK, &mut read).unwrap();
            assert_eq!(read, source.bytes[chunk * CHUNK..][..100]);
        }
    });
}

#[test]
fn a_touch_of_a_lost_page_is_sigbus() {
    if let Ok(server) = std::env::var(CHILD) {
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1));
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        region.read_at(5 * CHUNK, &mut [0; 1]).unwrap_err();
        let byte = std::hint::black_box(region[5 * CHUNK]);
        panic!("it was read as {byte}");
    }
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 11), CHUNK);
        let lies = || {
            Lies::default().chunk(|_, answer| {
                vec![if answer.chunk == 5 { ChunkAnswer { result: None, ..answer } } else { answer }]
            })
        };
        let chaos = Chaos::start(source.server.address(), lies());
        let status =
            as_child("session::losses::a_touch_of_a_lost_page_is_sigbus", &chaos.address().to_string());
        assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    });
}

/// A touch that waits when its page is lost is SIGBUS, too, and not a hang or a zero.
#[test]
fn a_touch_that_waits_for_a_lost_page_is_sigbus() {
    if let Ok(server) = std::env::var(CHILD) {
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1));
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        let byte = std::hint::black_box(region[5 * CHUNK + 77]);
        panic!("it was read as {byte}");
    }
    within(WATCHDOG, || {
        let source = Source::start(noise(16 * CHUNK, 12), CHUNK);
        let chaos = Chaos::start(source.server.address(), Lies::default().chunk(|_, _| Vec::new()));
        let test = "session::losses::a_touch_that_waits_for_a_lost_page_is_sigbus";
        let status = as_child(test, &chaos.address().to_string());
        assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    });
}

/// The loss policies that act on a process act on the program's own.
#[test]
fn a_program_whose_own_page_is_lost_is_killed_or_stopped_if_it_asked_for_that() {
    let test = "session::losses::a_program_whose_own_page_is_lost_is_killed_or_stopped_if_it_asked_for_that";
    if let Ok(told) = std::env::var(CHILD) {
        let (policy, server) = told.split_once(' ').unwrap();
        let on_loss = if policy == "kill" { LossPolicy::Kill } else { LossPolicy::Pause };
        let options = Options::DEFAULT.fault_deadline(Duration::from_secs(1)).on_loss(on_loss);
        let session = Session::open(&server.parse().unwrap(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        // Stopped, and going on, it learns of the loss.
        region.read_at(5 * CHUNK, &mut [0; 1]).unwrap_err();
        std::process::exit(7);
    }
    within(WATCHDOG, move || {
        let source = Source::start(noise(16 * CHUNK, 12), CHUNK);
        let chaos = Chaos::start(source.server.address(), Lies::default().chunk(|_, _| Vec::new()));
        let status = as_child(test, &format!("kill {}", chaos.address()));
        assert_eq!(status.signal(), Some(rustix::process::Signal::KILL.as_raw()), "{status}");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture"]).env(CHILD, format!("pause {}", chaos.address()));
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let is_stopped = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "));
        wait_until("it is stopped", is_stopped);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
    });
}
