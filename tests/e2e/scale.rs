//! Many regions, many sessions, much address space; and how little sessions have to do with each other.

use crate::map::push;
use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{ForeignMemory, ForeignRegion, Options, Session, SharedPager};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::{is_root, skip};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn five_hundred_sessions_share_a_few_threads() {
    within(WATCHDOG, || {
        const SESSIONS: usize = 500;
        let source = Source::start(memory_like(64 * PAGE, 80), CHUNK);
        let before = threads();
        let pagers = [(); 4].map(|()| SharedPager::new().unwrap());
        let reference = "app".parse().unwrap();
        let open = |index: usize| {
            let pager = &pagers[index % pagers.len()];
            let session = pager.open(source.server.address(), &reference, Options::default()).unwrap();
            let region = session.map("mem").unwrap();
            (session, region)
        };
        let mut sessions: Vec<_> = (0..SESSIONS).map(open).collect();
        // Other tests of this process have threads, too, but not hundreds.
        assert!(threads() < before + 200, "{} threads, {before} before", threads());
        for (index, (_, region)) in sessions.iter().enumerate() {
            let page = index * 7 % 64;
            assert_eq!(region[page * PAGE..][..PAGE], source.bytes[page * PAGE..][..PAGE], "session {index}");
        }
        // Half of them end, which the others do not notice.
        let mut index = 0;
        sessions.retain(|_| {
            index += 1;
            index % 2 == 0
        });
        // Those that are left go on when nobody asks for new ones any more.
        drop(pagers);
        for (session, region) in &sessions {
            assert_eq!(**region, *source.bytes);
            assert_eq!(session.error(), None);
        }
    });
}

#[test]
fn sessions_that_share_a_pager_are_lost_each_for_itself() {
    if !is_root() {
        return skip("scale::sessions_that_share_a_pager_are_lost_each_for_itself", "attaching needs root");
    }
    within(WATCHDOG, || {
        let source = Source::start(memory_like(64 * PAGE, 81), CHUNK);
        let lies = Lies::default().chunk(|_, answer| vec![ChunkAnswer { result: None, ..answer }]);
        let liar = Chaos::start(source.server.address(), lies);
        let pager = SharedPager::new().unwrap();
        let reference = "app".parse().unwrap();
        let open = |address| pager.open(address, &reference, Options::default()).unwrap();
        let (good, bad) = (open(source.server.address()), open(liar.address()));
        let mut faulter = Faulter::start(ALL_EVENTS, &["private:64"]);
        let regions = [faulter.region(0, "mem", 0)];
        let memory = ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid: None };
        let attached =
            pager.attach(source.server.address(), &reference, Options::default(), &memory).unwrap();
        faulter.let_go();
        let (region, lost) = (good.map("mem").unwrap(), bad.map("mem").unwrap());
        let _ = lost.read_at(0, &mut [0]).unwrap_err();
        assert!(bad.error().is_some());
        assert_eq!(region[0], source.bytes[0]);
        faulter.assert_reads(0, 5, &source.bytes[5 * PAGE..6 * PAGE]);
        faulter.kill();
        assert!(attached.wait_end(MINUTE));
        assert_eq!((attached.error(), good.error()), (None, None));
        assert_eq!(*region, *source.bytes);
    });
}

/// A userfaultfd's ioctls wait while its owner forks, which takes long for one with much memory.
#[test]
fn a_pager_that_the_kernel_keeps_waiting_holds_up_nobody_else() {
    if !is_root() {
        let test = "scale::a_pager_that_the_kernel_keeps_waiting_holds_up_nobody_else";
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        const PAGES: usize = 40_000;
        let source = Source::start(noise(PAGES * PAGE, 82), 4096);
        let attach = || {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
            let regions = [faulter.region(0, "mem", 0)];
            let memory = ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid: None };
            let reference = "app".parse().unwrap();
            let address = source.server.address();
            let session = Session::attach(address, &reference, Options::default(), &memory).unwrap();
            faulter.let_go();
            (session, faulter)
        };
        let ((_slow, mut big), (_session, mut small)) = (attach(), attach());
        // 3 GiB in pages of 4 KiB.
        big.main.does("populate 786432");
        let mut stays = big.thread();
        let mut next = 0;
        let mut touch = |small: &mut Faulter| {
            small.assert_reads(0, next, &source.bytes[next * PAGE..(next + 1) * PAGE]);
            next += 1;
        };
        for _ in 0..20 {
            touch(&mut small);
        }
        // The longest of a few tries: the fork, with a pager that is asked for pages all the time.
        let mut best = (Duration::ZERO, 0u32);
        for round in 0..4 {
            let (pid, from) = (big.main.pid, big.at(0, round * 10_000));
            let started = Instant::now();
            big.main.tell("fork");
            let asking = std::thread::spawn(move || {
                let mut longest = Duration::ZERO;
                for page in 0..200 {
                    let touched = Instant::now();
                    let _ = read_from_outside(pid, from + page * PAGE, PAGE);
                    longest = longest.max(touched.elapsed());
                }
                longest
            });
            let mut served = 0u32;
            while !big.main.has_answered() && started.elapsed() < MINUTE {
                touch(&mut small);
                served += 1;
            }
            let mut child = big.forked();
            child.tell("exit");
            let longest = asking.join().unwrap();
            best = best.max((longest, served));
        }
        // Until the pager of the one that forked could go on, the other one has done its work.
        let (longest, served) = best;
        assert!(longest > Duration::from_millis(20), "no fork has kept a pager waiting: {longest:?}");
        let most = longest.as_millis() / 20;
        assert!(
            u128::from(served) > most,
            "{served} faults were served while another pager waited {longest:?}"
        );
        stays.tell("exit");
    });
}

#[test]
fn ten_thousand_regions_are_served_forked_and_filled() {
    if !is_root() {
        return skip("scale::ten_thousand_regions_are_served_forked_and_filled", "attaching needs root");
    }
    within(WATCHDOG, || {
        const REGIONS: usize = 10_000;
        let source = Source::start(memory_like((2 * REGIONS + 1) * PAGE, 83), CHUNK);
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{}", 2 * REGIONS)]);
        // Two pages each, from all over the file: no neighbours in memory are neighbours there.
        let place = |index: usize| 2 * (index * 7919 % REGIONS) + index % 2;
        let region = |index: usize| {
            let whole = faulter.region(0, "mem", (place(index) * PAGE) as u64);
            ForeignRegion { address: whole.address + 2 * index * PAGE, len: 2 * PAGE, ..whole }
        };
        let regions: Vec<_> = (0..REGIONS).map(region).collect();
        let memory = ForeignMemory { uffd: faulter.uffd(), regions: &regions, state: None, pid: None };
        let reference = "app".parse().unwrap();
        let address = source.server.address();
        let session = Session::attach(address, &reference, Options::default(), &memory).unwrap();
        faulter.let_go();
        let bytes_of = |index: usize| &source.bytes[place(index) * PAGE..(place(index) + 2) * PAGE];
        for index in (0..REGIONS).step_by(97) {
            faulter.assert_reads(0, 2 * index, bytes_of(index));
        }
        let mut child = faulter.fork();
        faulter.main.does(&format!("advise 4 {} 8", faulter.at(0, 400)));
        session.fill().unwrap();
        for index in (1..REGIONS).step_by(101) {
            child.assert_reads(faulter.at(0, 2 * index), bytes_of(index));
        }
        session.wait_resident(MINUTE).unwrap();
        for index in (0..REGIONS).step_by(7).filter(|index| !(200..204).contains(index)) {
            faulter.assert_reads(0, 2 * index, bytes_of(index));
        }
        faulter.assert_reads(0, 400, &[0; 8 * PAGE]);
        assert_eq!(session.error(), None);
    });
}

#[test]
fn a_sparse_region_of_64_gib_takes_memory_for_what_is_touched() {
    within(WATCHDOG, || {
        const BYTES: usize = 64 << 30;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mem");
        let island = noise(1 << 20, 84);
        let places: Vec<u64> = (0..32).map(|i| i * (2 << 30) + (i * 12_345) * PAGE as u64).collect();
        let islands: Vec<(u64, &[u8])> = places.iter().map(|place| (*place, &island[..])).collect();
        sparse(&path, BYTES as u64, &islands);
        let server = Server::start();
        push(&server, &path, "app", CHUNK);
        let memory = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap().to_owned();
            line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
        };
        let before = memory();
        let session = Session::open(server.address(), &"app".parse().unwrap(), Options::default()).unwrap();
        let region = session.map("mem").unwrap();
        for place in places {
            let place = usize::try_from(place).unwrap();
            assert_eq!(region[place..place + island.len()], island);
            let behind = place + island.len() + (1 << 29);
            assert_eq!(region[behind..behind + PAGE], [0; PAGE]);
        }
        // The image's manifest, 4 MiB of page states, and what was touched. Other tests run beside this one.
        let taken = memory().saturating_sub(before);
        assert!(taken < 400, "{taken} MiB");
        drop(region);
        assert!(session.end(MINUTE));
    });
}
