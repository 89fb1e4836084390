//! A pager that is killed, and its successor: whatever it was about to do, nothing is lost.

use crate::session::Source;
use postcopy_tests::chaos::within;
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::keeper::{Keeper, Serving};
use postcopy_tests::stopped_pager::StoppedPager;
use postcopy_tests::{PAGE, is_root};
use postcopy_tests::{skip, wait_until};
use std::time::Duration;

const CHUNK: usize = 16 << 10;
const PAGES: usize = 4096;
const WATCHDOG: Duration = Duration::from_secs(110);
const DONTNEED: i32 = 4;
const MAYMOVE: i32 = 1;
/// Each try has so many pages of its own, which are chunks of their own.
const PAGES_OF_A_TRY: usize = 12;

struct Victim {
    source: Source,
    faulter: Faulter,
    keeper: Keeper,
}

impl Victim {
    fn start(shared: bool) -> Self {
        let source = Source::start(memory_like(PAGES * PAGE, 81), CHUNK);
        let kind = if shared { "memfd" } else { "private" };
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("{kind}:{PAGES}")]);
        let region = faulter.region(0, "mem", 0);
        let regions = [if shared { faulter.shared_region(0, "mem", 0, 1) } else { region }];
        let server = source.server.address().to_string();
        let keeper = Keeper::start(&server, "app", Serving::default(), &faulter, &regions);
        faulter.let_go();
        Self { source, faulter, keeper }
    }

    /// The bytes of pages of the image.
    fn image(&self, first: usize, count: usize) -> &[u8] {
        &self.source.bytes[first * PAGE..(first + count) * PAGE]
    }

    fn assert_reads(&mut self, page: usize, bytes: &[u8]) {
        self.faulter.assert_reads(0, page, bytes);
    }

    fn assert_is_image(&mut self, page: usize, count: usize) {
        let bytes = self.image(page, count).to_vec();
        self.assert_reads(page, &bytes);
    }

    fn advise(&mut self, page: usize, count: usize) -> String {
        format!("advise {DONTNEED} {} {count}", self.faulter.at(0, page))
    }
}

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Right before or after a call into the kernel, the one of this number.
    Call(usize),
    /// A random number of instructions after that.
    AfterCall(usize),
    /// So many instructions after messages have been read; at the next call at the latest.
    AfterRead(u32),
}

/// What is done with the pages from a given one on.
type Action = fn(&mut Victim, usize);

/// Has the process do something again and again, and kills its pager at the first step of that, at the second, and so
/// on, until it is done before the pager is killed; then at instructions all over what is done between reading the
/// event and the next call into the kernel. `prepare` makes pages ready, `begin` tells the process what to do with
/// them, and `check` sees that it was done.
fn kill_at_each_step(test: &str, prepare: Action, begin: Action, check: Action) {
    kill_at_each_step_over(false, test, prepare, begin, check);
}

/// The same on shared memory.
fn kill_at_each_step_over(shared: bool, test: &str, prepare: Action, begin: Action, check: Action) {
    const AFTER_READ: u32 = 50;
    if !is_root() {
        return skip(&format!("successor::{test}"), "tracing needs root");
    }
    within(WATCHDOG, move || {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        fastrand::seed(seed);
        let mut victim = Victim::start(shared);
        // Backwards: forward, what is to be touched would be read ahead.
        let mut pages = (0..PAGES - PAGES_OF_A_TRY).step_by(PAGES_OF_A_TRY).rev();
        let mut kills = 0;
        let mut kill_at = |moment| {
            let page = pages.next().expect("it is done in fewer steps");
            prepare(&mut victim, page);
            let mut pager = victim.keeper.stop_pager();
            begin(&mut victim, page);
            let reached = reach(&victim, &mut pager, moment);
            if reached.is_some() {
                victim.keeper.kill_worker_at(pager);
                kills += 1;
            } else {
                drop(pager);
            }
            check(&mut victim, page);
            reached
        };
        let steps = (0..).find(|step| kill_at(Moment::Call(*step)).is_none());
        for step in 0..steps.expect("it ends") {
            kill_at(Moment::AfterCall(step));
        }
        let instructions = kill_at(Moment::AfterRead(u32::MAX)).expect("messages are read");
        for part in 0..AFTER_READ {
            kill_at(Moment::AfterRead((instructions + 1) * part / AFTER_READ));
        }
        println!("{kills} kills; {instructions} instructions from the message to the next call");
        assert!(kills > AFTER_READ + 10, "an event takes some steps: reading it, doing it, waking who waits");
        victim.faulter.kill();
        victim.keeper.assert_ends();
    });
}

/// Lets the pager go on until a moment: how many instructions it took after the last call. None: what the process was
/// told is done before.
fn reach(victim: &Victim, pager: &mut StoppedPager, moment: Moment) -> Option<u32> {
    const READ: u64 = 0;
    const EPOLL_WAIT: u64 = 232;
    const MESSAGE_BYTES: i64 = 32;
    for call in 0.. {
        let stop = pager.next_call();
        if victim.faulter.main.has_answered() && stop.call == EPOLL_WAIT && stop.answer.is_none() {
            return None;
        }
        let messages = stop.call == READ && stop.answer.is_some_and(|n| n > 0 && n % MESSAGE_BYTES == 0);
        match moment {
            Moment::Call(number) if number == call => return Some(0),
            Moment::AfterCall(number) if number == call => {
                return Some(pager.step(fastrand::u32(1..1 << fastrand::u32(1..12))));
            }
            Moment::AfterRead(instructions) if messages => return Some(pager.step(instructions)),
            _ => {}
        }
    }
    None
}

#[test]
fn a_pager_killed_at_any_step_of_a_fault_is_succeeded() {
    kill_at_each_step(
        "a_pager_killed_at_any_step_of_a_fault_is_succeeded",
        |_, _| {},
        |victim, page| victim.faulter.main.tell(&format!("read {} 1", victim.faulter.at(0, page + 1))),
        |victim, page| {
            let bytes = victim.image(page + 1, 1).to_vec();
            victim.faulter.main.assert_answers(victim.faulter.at(0, page + 1), &bytes);
            victim.assert_is_image(page, PAGES_OF_A_TRY);
        },
    );
}

#[test]
fn a_pager_killed_at_any_step_of_a_remove_is_succeeded() {
    kill_at_each_step(
        "a_pager_killed_at_any_step_of_a_remove_is_succeeded",
        // One of them is there.
        |victim, page| victim.assert_is_image(page + 3, 1),
        |victim, page| {
            let what = victim.advise(page + 2, 3);
            victim.faulter.main.tell(&what);
        },
        |victim, page| {
            assert_eq!(victim.faulter.main.answer().as_deref(), Some("done"));
            victim.assert_reads(page + 2, &[0; 3 * PAGE]);
            victim.assert_is_image(page, 2);
            victim.assert_is_image(page + 5, 3);
        },
    );
}

#[test]
fn a_pager_killed_at_any_step_of_an_unmap_is_succeeded() {
    kill_at_each_step(
        "a_pager_killed_at_any_step_of_an_unmap_is_succeeded",
        |victim, page| victim.assert_is_image(page + 3, 1),
        |victim, page| victim.faulter.main.tell(&format!("unmap {} 3", victim.faulter.at(0, page + 2))),
        |victim, page| {
            assert_eq!(victim.faulter.main.answer().as_deref(), Some("done"));
            victim.assert_is_image(page, 2);
            victim.assert_is_image(page + 5, PAGES_OF_A_TRY - 5);
        },
    );
}

#[test]
fn a_pager_killed_at_any_step_of_a_move_is_succeeded() {
    /// Where it moves to: far enough from the region.
    fn to(victim: &Victim, page: usize) -> usize {
        victim.faulter.at(0, page) + (1 << 33)
    }
    kill_at_each_step(
        "a_pager_killed_at_any_step_of_a_move_is_succeeded",
        |victim, page| {
            victim.assert_is_image(page + 2, 1);
            let what = victim.advise(page + 4, 1);
            victim.faulter.main.does(&what);
        },
        |victim, page| {
            let (from, to) = (victim.faulter.at(0, page + 1), to(victim, page + 1));
            victim.faulter.main.tell(&format!("remap {from} 4 4 {MAYMOVE} {to}"));
        },
        |victim, page| {
            let at = to(victim, page + 1);
            assert_eq!(victim.faulter.main.answer(), Some(at.to_string()));
            let mut bytes = victim.image(page + 1, 4).to_vec();
            bytes[3 * PAGE..].fill(0);
            victim.faulter.main.assert_reads(at, &bytes);
            victim.assert_is_image(page, 1);
            victim.assert_is_image(page + 5, PAGES_OF_A_TRY - 5);
        },
    );
}

#[test]
fn a_pager_killed_at_any_step_of_a_fork_is_succeeded() {
    kill_at_each_step(
        "a_pager_killed_at_any_step_of_a_fork_is_succeeded",
        |victim, page| {
            victim.assert_is_image(page, 1);
            let what = victim.advise(page + 1, 1);
            victim.faulter.main.does(&what);
        },
        |victim, _| victim.faulter.main.tell("fork"),
        |victim, page| {
            let mut child = victim.faulter.forked();
            let mut bytes = victim.image(page, 4).to_vec();
            bytes[PAGE..2 * PAGE].fill(0);
            child.does(&victim.advise(page + 2, 1));
            victim.assert_reads(page, &bytes);
            bytes[2 * PAGE..3 * PAGE].fill(0);
            child.assert_reads(victim.faulter.at(0, page), &bytes);
            child.tell("exit");
        },
    );
}

#[test]
fn a_pager_killed_at_any_step_of_a_remove_of_shared_memory_is_succeeded() {
    const MADV_REMOVE: i32 = 9;
    kill_at_each_step_over(
        true,
        "a_pager_killed_at_any_step_of_a_remove_of_shared_memory_is_succeeded",
        |victim, page| {
            victim.assert_is_image(page + 3, 1);
            // Keeps what is there, and what is not.
            let what = victim.advise(page + 2, 6);
            victim.faulter.main.does(&what);
        },
        |victim, page| {
            let at = victim.faulter.at(0, page + 2);
            victim.faulter.main.tell(&format!("advise {MADV_REMOVE} {at} 3"));
        },
        |victim, page| {
            assert_eq!(victim.faulter.main.answer().as_deref(), Some("done"));
            victim.assert_reads(page + 2, &[0; 3 * PAGE]);
            victim.assert_is_image(page, 2);
            victim.assert_is_image(page + 5, 3);
        },
    );
}

#[test]
fn a_fork_for_which_there_is_no_descriptor_waits_for_one() {
    if !is_root() {
        return skip(
            "successor::a_fork_for_which_there_is_no_descriptor_waits_for_one",
            "limits of another process need root",
        );
    }
    within(WATCHDOG, || {
        let mut victim = Victim::start(false);
        victim.assert_is_image(0, 1);
        victim.keeper.limit_descriptors(3);
        victim.faulter.main.tell("fork");
        let (pid, address) = (victim.faulter.main.pid, victim.faulter.at(0, 100));
        let main = &victim.faulter.main;
        wait_until("it waits in the fork", || main.sleeps_in("userfaultfd_event_wait_completion"));
        // From outside: malloc's locks are the forking thread's.
        let other = std::thread::spawn(move || read_from_outside(pid, address, PAGE));
        // As long as the fork is not told of nothing can be installed.
        let put_off = |victim: &Victim| {
            let mut answers = postcopy::state_file::answers(victim.keeper.state()).unwrap();
            answers.find(|(name, _)| *name == "deferred").map(|(_, count)| count)
        };
        wait_until("installs are put off", || put_off(&victim) > Some(20));
        assert!(!victim.faulter.main.has_answered() && !other.is_finished());
        victim.keeper.limit_descriptors(1024);
        let read = other.join().unwrap().unwrap();
        assert!(read == victim.source.bytes[100 * PAGE..101 * PAGE], "other bytes");
        let mut child = victim.faulter.forked();
        child.assert_reads(victim.faulter.at(0, 200), &victim.source.bytes[200 * PAGE..204 * PAGE]);
        child.tell("exit");
        victim.faulter.kill();
        // The same one has served all the time.
        victim.keeper.assert_ends();
    });
}
