//! Many regions, many sessions, much address space; and how little sessions have to do with each other.

use crate::map::push;
use crate::session::Source;
use postcopy::proto::v1::ChunkAnswer;
use postcopy::{ForeignMemory, ForeignRegion, Options, Session, SharedPager};
use postcopy_tests::cgroup::MemoryCgroup;
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter, read_from_outside};
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::many_regions::ManyRegions;
use postcopy_tests::mounts::Swap;
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, is_root, skip};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;
const WATCHDOG: Duration = Duration::from_secs(110);
const MINUTE: Duration = Duration::from_secs(60);

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn a_long_range_is_brought_in_windows_beside_a_short_one() {
    within(WATCHDOG, || {
        const CHUNKS: usize = 700;
        let source = Source::start(memory_like(CHUNKS * CHUNK, 81), CHUNK);
        let answered = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&answered);
        let lies =
            Lies::default().late(Duration::from_millis(150), Duration::ZERO).chunk(move |_, answer| {
                count.fetch_add(1, Ordering::AcqRel);
                vec![answer]
            });
        let chaos = Chaos::start(source.server.address(), lies);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
        let region = session.map("mem").unwrap();
        let start = region.as_ptr().addr();
        session.hosted().bring(&(start..start + region.len() - CHUNK));
        // The last chunk is requested at once, and not behind all others.
        let mut last = vec![0; CHUNK];
        region.read_at(region.len() - CHUNK, &mut last).unwrap();
        assert_eq!(last, source.bytes[source.bytes.len() - CHUNK..]);
        assert!(chaos.asked().demand().len() < CHUNKS, "the short range was behind the long one");
        let mut most = 0;
        while !session.is_resident() {
            let asked = chaos.asked().demand().len();
            most = most.max(asked.saturating_sub(answered.load(Ordering::Acquire)));
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let window = (16 << 20) / CHUNK;
        assert!(most > window / 4 && most <= window + 1, "{most} chunks were outstanding");
        assert_eq!(*region, *source.bytes);
    });
}

#[test]
fn a_fill_requests_a_chunk_once_for_all_of_its_regions() {
    if !is_root() {
        return skip(
            "scale::a_fill_requests_a_chunk_once_for_all_of_its_regions",
            "a userfaultfd for all faults needs root",
        );
    }
    within(WATCHDOG, || {
        const PAGES: usize = 4000;
        let source = Source::start(memory_like(PAGES * PAGE, 82), CHUNK);
        let chaos = Chaos::start(source.server.address(), Lies::default());
        let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{PAGES}")]);
        let region = |page: usize| {
            let whole = faulter.region(0, "mem", (page * PAGE) as u64);
            ForeignRegion { address: whole.address + page * PAGE, len: PAGE, ..whole }
        };
        let regions: Vec<_> = (0..PAGES).map(region).collect();
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        let options = Options::DEFAULT.fill(true);
        let session = Session::attach(chaos.address(), &"app".parse().unwrap(), options, &memory).unwrap();
        faulter.let_go();
        session.wait_resident(MINUTE).unwrap();
        let asked: u32 = chaos.asked().bulk().values().sum();
        let chunks = u32::try_from((PAGES * PAGE).div_ceil(CHUNK)).unwrap();
        assert!(asked <= chunks + chunks / 10, "{asked} requests for {chunks} chunks");
        faulter.assert_reads(0, 0, &source.bytes);
    });
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
            let session = pager.open(source.server.address(), &reference, Options::DEFAULT).unwrap();
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
        let open = |address| pager.open(address, &reference, Options::DEFAULT).unwrap();
        let (good, bad) = (open(source.server.address()), open(liar.address()));
        let mut faulter = Faulter::start(ALL_EVENTS, &["private:64"]);
        let regions = [faulter.region(0, "mem", 0)];
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        let attached = pager.attach(source.server.address(), &reference, Options::DEFAULT, &memory).unwrap();
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

/// Two processes, each with a session: one whose pager the kernel will keep waiting, and another one.
struct Neighbours {
    source: Source,
    big: (Faulter, Session),
    small: (Faulter, Session),
    /// Of the small one's memory.
    next_page: usize,
}

impl Neighbours {
    const PAGES: usize = 40_000;

    fn start() -> Self {
        let source = Source::start(noise(Self::PAGES * PAGE, 82), PAGE);
        let attach = || {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("private:{}", Self::PAGES)]);
            let regions = [faulter.region(0, "mem", 0)];
            let memory = ForeignMemory {
                uffd: faulter.uffd(),
                regions: &regions,
                state: None,
                pid: None,
                is_registered: true,
            };
            let reference = "app".parse().unwrap();
            let address = source.server.address();
            let session = Session::attach(address, &reference, Options::DEFAULT, &memory).unwrap();
            faulter.let_go();
            (faulter, session)
        };
        let (big, small) = (attach(), attach());
        Self { source, big, small, next_page: 0 }
    }

    /// Touches the next page of the small one's memory.
    fn touch(&mut self) {
        let page = self.next_page;
        self.small.0.assert_reads(0, page, &self.source.bytes[page * PAGE..(page + 1) * PAGE]);
        self.next_page += 1;
    }

    /// Asks for pages of the big one all the time, from outside: how many of the small one were served while it waited
    /// for the one that took longest, and how long that was.
    fn ask_for(&mut self, pages: Range<usize>) -> (usize, Duration) {
        let (pid, at) = (self.big.0.main.pid, self.big.0.at(0, 0));
        let asking = std::thread::spawn(move || {
            let waits = pages.map(|page| {
                let touched = Instant::now();
                read_from_outside(pid, at + page * PAGE, PAGE).unwrap();
                touched..Instant::now()
            });
            waits.max_by_key(|wait| wait.end - wait.start).unwrap()
        });
        let mut served = Vec::new();
        // Not so often that there is no page left before it has what it asks for: it may wait for seconds.
        while !asking.is_finished() && self.next_page < Self::PAGES {
            self.touch();
            served.push(Instant::now());
            std::thread::park_timeout(Duration::from_micros(200));
        }
        let longest = asking.join().unwrap();
        let meanwhile = served.iter().filter(|served| longest.contains::<Instant>(served)).count();
        (meanwhile, longest.end - longest.start)
    }
}

/// Of several tries the best one: if one pager waited for the other it would have served one fault meanwhile.
fn assert_served(tries: &[(usize, Duration)]) {
    let (served, waited) = tries.iter().max().unwrap();
    assert!(*served > 5, "{served} faults were served while another pager waited {waited:?}: {tries:?}");
}

/// A userfaultfd's ioctls wait while its owner forks, which takes long for one with much memory.
#[test]
fn a_pager_that_a_fork_keeps_waiting_holds_up_nobody_else() {
    if !is_root() {
        let test = "scale::a_pager_that_a_fork_keeps_waiting_holds_up_nobody_else";
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        let mut neighbours = Neighbours::start();
        // 4 GiB in pages of 4 KiB.
        neighbours.big.0.main.does("populate 1048576");
        let mut stays = neighbours.big.0.thread();
        for _ in 0..20 {
            neighbours.touch();
        }
        let tries = [0, 10_000, 20_000, 30_000].map(|page| {
            neighbours.big.0.main.tell("fork");
            let tried = neighbours.ask_for(page..page + 200);
            let mut child = neighbours.big.0.forked();
            child.tell("exit");
            tried
        });
        assert_served(&tries);
        let longest = tries.iter().map(|(_, waited)| waited).max().unwrap();
        assert!(*longest > Duration::from_millis(20), "no fork has kept a pager waiting: {longest:?}");
        stays.tell("exit");
    });
}

/// They wait, too, while its memory cgroup makes room for what is installed.
#[test]
fn a_pager_that_reclaim_keeps_waiting_holds_up_nobody_else() {
    let test = "scale::a_pager_that_reclaim_keeps_waiting_holds_up_nobody_else";
    if !is_root() {
        return skip(test, "attaching, cgroups and swap need root");
    }
    within(WATCHDOG, move || {
        let Some((cgroup, swap)) = MemoryCgroup::new().zip(Swap::slow(256, 4 << 20)) else {
            return skip(test, "no cgroups of version 1");
        };
        let mut neighbours = Neighbours::start();
        cgroup.kill_nobody();
        cgroup.add(neighbours.big.0.main.pid);
        cgroup.limit(8 << 20);
        let tries = [0, 3000, 6000].map(|page| neighbours.ask_for(page..page + 3000));
        println!("{tries:?}");
        assert!(cgroup.failures() > 0, "it was not in the way");
        assert_served(&tries);
        let longest = tries.iter().map(|(_, waited)| waited).max().unwrap();
        assert!(*longest > Duration::from_millis(20), "no reclaim has kept a pager waiting: {longest:?}");
        drop(neighbours);
        drop(swap);
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
        let memory = ForeignMemory {
            uffd: faulter.uffd(),
            regions: &regions,
            state: None,
            pid: None,
            is_registered: true,
        };
        let reference = "app".parse().unwrap();
        let address = source.server.address();
        let session = Session::attach(address, &reference, Options::DEFAULT, &memory).unwrap();
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
fn two_hundred_thousand_regions_are_served_with_a_state_file() {
    let test = "scale::two_hundred_thousand_regions_are_served_with_a_state_file";
    if !is_root() {
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        let mut many = ManyRegions::start(200_000, 200_000, 0, CHUNK, 85);
        for index in (0..many.regions).step_by(9_973) {
            let bytes = many.bytes_of(index).to_vec();
            many.faulter.assert_reads(0, index, &bytes);
        }
        assert_eq!(many.session.error(), None);
    });
}

#[test]
fn five_thousand_regions_are_forked_a_hundred_times_with_a_state_file() {
    let test = "scale::five_thousand_regions_are_forked_a_hundred_times_with_a_state_file";
    if !is_root() {
        return skip(test, "attaching needs root");
    }
    within(WATCHDOG, || {
        let mut many = ManyRegions::start(5_000, 5_000, 0, CHUNK, 86);
        let mut children: Vec<_> = (0..100).map(|_| many.faulter.fork()).collect();
        for (number, child) in children.iter_mut().enumerate() {
            let index = number * 47 % many.regions;
            let at = many.faulter.at(0, index);
            child.assert_reads(at, many.bytes_of(index));
        }
        // Each goes its own way.
        for (number, child) in children.iter_mut().enumerate() {
            child.does(&format!("advise 4 {} 1", many.faulter.at(0, number)));
            child.assert_reads(many.faulter.at(0, number), &[0; PAGE]);
        }
        let bytes = many.bytes_of(0).to_vec();
        many.faulter.assert_reads(0, 0, &bytes);
        assert_eq!(many.session.error(), None);
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
        let session = Session::open(server.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
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
