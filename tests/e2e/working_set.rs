//! Working sets: what a restore has touched comes ahead in the next one, proved page by page, and in nobody's way.

use crate::map::random_pages;
use crate::session::{CHILD, Source, as_child, count_of, give_back};
use bytes::Bytes;
use postcopy::{LossPolicy, Options, RecordingError, Region, Session, Sharing};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::pool::HugePool;
use postcopy_tests::proxy::{Break, Direction, How, Proxy};
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

const CHUNK: usize = 64 << 10;
/// The last one has 100 bytes.
const PAGES: usize = 2001;
const WATCHDOG: Duration = Duration::from_secs(100);
const MINUTE: Duration = Duration::from_secs(60);
const RECORDING: Options = QUIET.record(true);
const REPLAYING: Options = QUIET.working_set(true);
const QUIET: Options = Options::DEFAULT.fault_deadline(MINUTE);

fn start() -> Source {
    let mut bytes = memory_like((PAGES - 1) * PAGE + 100, 31);
    // Zero pages in chunks, and whole chunks of zeros.
    bytes[700 * PAGE..760 * PAGE].fill(0);
    Source::start(bytes, CHUNK)
}

/// Some pages in random order, the last one and zeros among them.
fn some_pages(source: &Source) -> Vec<usize> {
    let mut pages = random_pages(source.bytes.len());
    pages.retain(|page| page % 4 == 0 || (720..730).contains(page) || *page == PAGES - 1);
    pages
}

fn touch(region: &Region, source: &Source, page: usize) {
    let bytes = page * PAGE..((page + 1) * PAGE).min(source.bytes.len());
    assert!(region[bytes.clone()] == source.bytes[bytes], "page {page}");
}

/// Ends the session, and sees that what it touched was told to the server.
fn end(session: &Session, region: Region) {
    drop(region);
    assert!(session.close(MINUTE));
    session.wait_recorded(MINUTE).unwrap();
}

fn record(source: &Source, options: Options, pages: &[usize]) {
    let session = source.open(options);
    let region = session.map("mem").unwrap();
    pages.iter().for_each(|page| touch(&region, source, *page));
    end(&session, region);
}

/// What the command line says of the one working set that there is.
fn listed(source: &Source) -> Value {
    let Value::Array(sets) = run(source.server.address(), ["working-set", "ls"]) else { panic!("no list") };
    assert_eq!(sets.len(), 1);
    sets[0].clone()
}

fn is_zero(source: &Source, page: usize) -> bool {
    source.bytes[page * PAGE..].iter().take(PAGE).all(|byte| *byte == 0)
}

/// The frames of the working set, which has so many pages.
fn set_frames(source: &Source, pages: usize) -> Vec<Bytes> {
    let found = Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = Arc::clone(&found);
    let lies = Lies::default().set_frame(move |frame| {
        kept.lock().unwrap().push(frame.clone());
        frame
    });
    let chaos = Chaos::start(source.server.address(), lies);
    let session = Session::open(chaos.address(), &"app".parse().unwrap(), REPLAYING).unwrap();
    let _region = session.map("mem").unwrap();
    wait_until("the set is there", || session.progress().resident_pages == pages as u64);
    found.lock().unwrap().clone()
}

#[test]
fn what_was_touched_comes_ahead_the_next_time() {
    within(WATCHDOG, || {
        let source = start();
        let pages = some_pages(&source);
        record(&source, RECORDING, &pages);
        let set = listed(&source);
        assert_eq!((&set["recordings"], &set["pages"]), (&1.into(), &pages.len().into()));
        assert_eq!(set["zero_pages"], pages.iter().filter(|page| is_zero(&source, **page)).count());
        let svg = tempfile::NamedTempFile::new().unwrap();
        let path = svg.path().to_str().unwrap();
        let shown = run(source.server.address(), ["working-set", "show", "app", "--svg", path]);
        assert_eq!(shown, set);
        assert!(std::fs::read_to_string(path).unwrap().contains("mem (7.81 MiB"));

        let session = source.open(REPLAYING);
        let region = session.map("mem").unwrap();
        wait_until("the set is there", || session.progress().resident_pages == pages.len() as u64);
        pages.iter().for_each(|page| touch(&region, &source, *page));
        let progress = session.progress();
        assert_eq!((progress.faults, progress.demand_chunks, progress.bulk_chunks), (0, 0, 0));
        assert_eq!(progress.working_set_pages, pages.len() as u64);
        assert!(progress.frame_bytes * 2 < (pages.len() * PAGE) as u64, "{} bytes", progress.frame_bytes);
        // And the rest by touch.
        (0..PAGES).for_each(|page| touch(&region, &source, page));
        drop((region, session));

        let removed = postcopy(source.server.address(), ["working-set", "rm", "app"]).status().unwrap();
        assert!(removed.success());
        assert_eq!(run(source.server.address(), ["working-set", "ls"]), Value::Array(Vec::new()));
    });
}

#[test]
fn sessions_that_end_while_their_set_is_under_way_leave_nothing_open() {
    const SESSIONS: usize = 300;
    let test = "working_set::sessions_that_end_while_their_set_is_under_way_leave_nothing_open";
    if let Ok(server) = std::env::var(CHILD) {
        let (server, reference) = (server.parse().unwrap(), "app".parse().unwrap());
        let open = || {
            let session = Session::open(&server, &reference, REPLAYING).unwrap();
            (session.map("mem").unwrap(), session)
        };
        drop(open());
        let before = count_of("fd");
        (0..SESSIONS).for_each(|_| drop(open()));
        return wait_until("all descriptors are closed", || count_of("fd") <= before + 10);
    }
    within(WATCHDOG, move || {
        let source = start();
        record(&source, RECORDING, &some_pages(&source));
        let status = as_child(test, &source.server.address().to_string());
        assert!(status.success(), "{status}");
    });
}

/// A set that is given up after some attempts would leave each of its pages to a fault.
#[test]
fn a_working_set_comes_however_long_its_server_was_away() {
    within(WATCHDOG, || {
        let source = start();
        let pages = some_pages(&source);
        record(&source, RECORDING, &pages);
        // Enough for the manifest, and less than the set.
        let short = Break::Each { direction: Direction::ToClient, bytes: 100 << 10, how: How::Close };
        let proxy = Proxy::start(source.server.address(), short);
        let session = Session::open(proxy.address(), &"app".parse().unwrap(), REPLAYING).unwrap();
        let region = session.map("mem").unwrap();
        std::thread::park_timeout(Duration::from_secs(4));
        assert!(session.progress().resident_pages < pages.len() as u64, "{:?}", session.progress());
        proxy.set(Break::Never);
        wait_until("the set has come", || session.progress().resident_pages >= pages.len() as u64);
        pages.iter().for_each(|page| touch(&region, &source, *page));
        assert_eq!(session.progress().faults, 0);
    });
}

#[test]
fn a_working_set_and_then_everything() {
    within(WATCHDOG, || {
        let source = start();
        record(&source, RECORDING, &some_pages(&source));
        let session = source.open(REPLAYING.fill(true));
        let region = session.map("mem").unwrap();
        session.wait_resident(MINUTE).unwrap();
        (0..PAGES).for_each(|page| touch(&region, &source, page));
        let progress = session.progress();
        assert!(progress.faults == 0 && progress.working_set_pages > 0, "{progress:?}");
    });
}

#[test]
fn sessions_that_have_other_files_say_nothing_of_these() {
    within(WATCHDOG, || {
        // As the tasks of one restore.
        let folder = tempfile::tempdir().unwrap();
        for task in 0..20 {
            std::fs::write(folder.path().join(format!("pages-{task}")), memory_like(64 * PAGE, task))
                .unwrap();
        }
        let server = Server::start();
        let _ = run(server.address(), ["push".as_ref(), folder.path().as_os_str(), "tree".as_ref()]);
        for task in 0..20 {
            let session = Session::open(server.address(), &"tree".parse().unwrap(), RECORDING).unwrap();
            let region = session.map(format!("pages-{task}")).unwrap();
            (0..64).step_by(2).for_each(|page| _ = std::hint::black_box(region[page * PAGE]));
            end(&session, region);
        }
        let sets = run(server.address(), ["working-set", "ls"]);
        assert_eq!((&sets[0]["recordings"], &sets[0]["pages"]), (&20.into(), &640.into()));
    });
}

#[test]
fn what_was_brought_is_not_taken_for_touched_nor_for_untouched() {
    within(WATCHDOG, || {
        let source = start();
        let (first, second): (Vec<usize>, Vec<usize>) =
            some_pages(&source).into_iter().partition(|page| *page < 1000);
        record(&source, RECORDING, &first);
        // Three times the set is there before anything is touched, and half of it never is.
        for _ in 0..3 {
            let pages = listed(&source)["pages"].as_u64().unwrap();
            let session = source.open(REPLAYING.record(true));
            let region = session.map("mem").unwrap();
            wait_until("the set is there", || session.progress().resident_pages == pages);
            second.iter().chain(&first[..first.len() / 2]).for_each(|page| touch(&region, &source, *page));
            end(&session, region);
        }
        // The last two have touched nothing that had not been brought, and have nothing to say.
        let set = listed(&source);
        assert_eq!((&set["recordings"], &set["pages"]), (&2.into(), &(first.len() + second.len()).into()));
    });
}

#[test]
fn what_was_brought_after_the_last_touch_is_not_taken_for_untouched() {
    within(WATCHDOG, || {
        let source = start();
        record(&source, RECORDING, &[1, 2, 3]);
        // Each touches one page, tells of it once it has been quiet for a while, and has everything brought after that.
        for (told, page) in [(2, 100), (3, 200)] {
            let session = source.open(RECORDING);
            let region = session.map("mem").unwrap();
            touch(&region, &source, page);
            wait_until("it is told of", || listed(&source)["recordings"] == told);
            session.fill().unwrap();
            session.wait_resident(MINUTE).unwrap();
            end(&session, region);
        }
        assert_eq!(listed(&source)["pages"], 5, "1, 2 and 3 were seen in one of one");
    });
}

#[test]
fn what_a_session_could_have_touched_and_did_not_leaves_the_set() {
    within(WATCHDOG, || {
        let folder = tempfile::tempdir().unwrap();
        for file in ["always", "once"] {
            std::fs::write(folder.path().join(file), memory_like(64 * PAGE, 7)).unwrap();
        }
        let server = Server::start();
        let _ = run(server.address(), ["push".as_ref(), folder.path().as_os_str(), "app".as_ref()]);
        for (session, pages) in [(0, 20), (1, 20), (2, 10)] {
            let opened = Session::open(server.address(), &"app".parse().unwrap(), RECORDING).unwrap();
            let regions = ["always", "once"].map(|file| opened.map(file).unwrap());
            let touched = if session == 0 { 2 } else { 1 };
            for region in &regions[..touched] {
                (0..10).for_each(|page| _ = std::hint::black_box(region[page * PAGE]));
            }
            drop(regions);
            assert!(opened.close(MINUTE));
            opened.wait_recorded(MINUTE).unwrap();
            let sets = run(server.address(), ["working-set", "ls"]);
            assert_eq!(sets[0]["pages"], pages, "after {session}");
        }
    });
}

#[test]
fn a_page_is_in_the_set_that_as_large_a_share_has_touched_as_the_server_is_told() {
    within(WATCHDOG, || {
        let mut source = start();
        source.server.stop();
        let store = source.server.store().to_owned();
        let mut command = std::process::Command::new(postcopy_tests::binary("postcopyd"));
        command.arg("serve").arg("--store").arg(&store).args(["--listen", "127.0.0.1:0"]);
        command.args(["--working-set-share", "0.6"]);
        let server = Server::spawn(command, &store).unwrap();
        for pages in [[1, 2], [1, 3]] {
            let session = Session::open(server.address(), &"app".parse().unwrap(), RECORDING).unwrap();
            let region = session.map("mem").unwrap();
            pages.iter().for_each(|page| touch(&region, &source, *page));
            end(&session, region);
        }
        assert_eq!(run(server.address(), ["working-set", "ls"])[0]["pages"], 1);
    });
}

#[test]
fn what_was_touched_is_told_when_it_is_asked_for() {
    within(WATCHDOG, || {
        let source = start();
        let unrecorded = source.open(REPLAYING);
        assert_eq!(unrecorded.send_recording(MINUTE), Err(RecordingError::NotRecorded));
        let session = source.open(RECORDING);
        let region = session.map("mem").unwrap();
        session.send_recording(MINUTE).unwrap();
        assert_eq!(run(source.server.address(), ["working-set", "ls"]), Value::Array(Vec::new()));
        for pages in [3, 7] {
            (0..pages).for_each(|page| touch(&region, &source, page));
            session.send_recording(MINUTE).unwrap();
            assert_eq!(
                (&listed(&source)["pages"], &listed(&source)["recordings"]),
                (&pages.into(), &1.into())
            );
        }
        end(&session, region);
        // Nothing to tell any more.
        session.send_recording(MINUTE).unwrap();
    });
}

#[test]
fn a_recording_that_is_sent_is_no_loss_to_who_waits_for_pages() {
    within(WATCHDOG, || {
        let source = start();
        let is_open = Arc::new(AtomicBool::new(false));
        let opened = Arc::clone(&is_open);
        let lies = Lies::default().chunk(move |_, answer| {
            while !opened.load(Ordering::SeqCst) {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            vec![answer]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let options = RECORDING.on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut page = vec![0; PAGE];
                region.read_at(5 * PAGE, &mut page).map(|()| page)
            });
            wait_until("it is asked for", || !chaos.asked().demand().is_empty());
            // It is answered, although this server takes none.
            session.send_recording(MINUTE).unwrap_err();
            is_open.store(true, Ordering::SeqCst);
            assert!(reader.join().unwrap().unwrap() == source.bytes[5 * PAGE..6 * PAGE], "a wrong byte");
        });
    });
}

#[test]
fn a_recording_that_cannot_be_sent_at_its_end_is_sent_when_it_can() {
    within(WATCHDOG, || {
        let source = start();
        let proxy = Proxy::start(source.server.address(), Break::Never);
        let session = Session::open(proxy.address(), &"app".parse().unwrap(), RECORDING).unwrap();
        let region = session.map("mem").unwrap();
        [1, 2, 3].into_iter().for_each(|page| touch(&region, &source, page));
        proxy.set(Break::Each { direction: Direction::ToServer, bytes: 0, how: How::Reset });
        drop(region);
        assert!(session.close(MINUTE));
        let before = proxy.connections();
        wait_until("it is tried", || proxy.connections() > before);
        proxy.set(Break::Never);
        session.wait_recorded(MINUTE).unwrap();
        assert_eq!(listed(&source)["pages"], 3);
    });
}

#[test]
fn a_recording_without_its_neighbours_reads_as_the_source_by_every_way() {
    within(WATCHDOG, || {
        let source = start();
        let session = source.open(RECORDING);
        let region = session.map("mem").unwrap();
        // Several threads at the same chunks.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (region, source) = (&region, &source);
                scope.spawn(move || (thread..1000).step_by(4).for_each(|page| touch(region, source, page)));
            }
        });
        // Who touched the last one may go on before it is counted.
        wait_until("they are counted", || session.progress().resident_pages >= 1000);
        assert_eq!(session.progress().resident_pages, 1000, "more than was touched");
        // As a whole, and of chunks of which some is there.
        let mut bytes = vec![0; 300 * PAGE];
        region.read_at(900 * PAGE + 5, &mut bytes).unwrap();
        assert!(bytes == source.bytes[900 * PAGE + 5..][..300 * PAGE]);
        end(&session, region);
        assert_eq!(listed(&source)["pages"], 1201);
    });
}

#[test]
fn frames_that_are_not_the_image_s_are_refused_and_their_pages_come_by_touch() {
    within(WATCHDOG, || {
        let source = start();
        let pages = some_pages(&source);
        record(&source, RECORDING, &pages);
        let other = Source::start(memory_like(PAGES * PAGE, 32), CHUNK);
        record(&other, RECORDING, &pages);
        let others = set_frames(&other, pages.len());
        type Lie = Box<dyn Fn(Bytes) -> Bytes + Send + Sync>;
        let flip = |at: fn(usize) -> usize| -> Lie {
            Box::new(move |frame| {
                let mut bytes = frame.to_vec();
                let at = at(bytes.len());
                bytes[at] ^= 1;
                bytes.into()
            })
        };
        let lies: [(&str, Lie); 6] = [
            ("the last byte", flip(|len| len - 1)),
            ("a byte in the middle", flip(|len| len / 2)),
            ("a run", flip(|_| 20)),
            ("cut", Box::new(|frame| frame.slice(..frame.len() - 1))),
            ("nothing", Box::new(|_| Bytes::from_static(&[0; 16]))),
            ("another image's", Box::new(move |_| others[0].clone())),
        ];
        for (what, lie) in lies {
            let chaos = Chaos::start(source.server.address(), Lies::default().set_frame(lie));
            let session = Session::open(chaos.address(), &"app".parse().unwrap(), REPLAYING).unwrap();
            let region = session.map("mem").unwrap();
            (0..PAGES).for_each(|page| touch(&region, &source, page));
            assert_eq!(session.error(), None, "{what}");
            assert!(session.progress().demand_chunks > 100, "{what}");
        }
    });
}

#[test]
fn frames_without_an_end_are_given_up_and_their_pages_come_by_touch() {
    within(WATCHDOG, || {
        let source = start();
        let pages = some_pages(&source);
        record(&source, RECORDING, &pages);
        let first = set_frames(&source, pages.len()).swap_remove(0);
        for (what, frame) in [("no frame", Bytes::from_static(&[0; CHUNK])), ("one of the image's", first)] {
            let (open, streams) = (Arc::new(()), Arc::new(AtomicUsize::new(0)));
            let flood = {
                let (open, streams) = (Arc::clone(&open), Arc::clone(&streams));
                move || {
                    streams.fetch_add(1, Ordering::Relaxed);
                    let (frame, open) = (frame.clone(), Arc::clone(&open));
                    std::iter::repeat_with(move || {
                        let _open = &open;
                        frame.clone()
                    })
                }
            };
            let chaos = Chaos::start(source.server.address(), Lies::default().set_flood(flood));
            let session = Session::open(chaos.address(), &"app".parse().unwrap(), REPLAYING).unwrap();
            let region = session.map("mem").unwrap();
            (0..PAGES).for_each(|page| touch(&region, &source, page));
            // Each is read for a while only: this one and the lie are left that know of it.
            let given_up = || streams.load(Ordering::Relaxed) == 3 && Arc::strong_count(&open) == 2;
            wait_until("three are given up", given_up);
            assert_eq!(session.error(), None, "{what}");
            drop(region);
            assert!(session.close(MINUTE), "{what}");
            assert!(given_up(), "{what}");
        }
    });
}

#[test]
fn a_fault_is_answered_while_the_set_is_late_and_nothing_is_installed_over_what_was_written() {
    within(WATCHDOG, || {
        let source = start();
        let pages = some_pages(&source);
        record(&source, RECORDING, &pages);
        let may_come = Arc::new(AtomicBool::new(false));
        let gate = Arc::clone(&may_come);
        let lies = Lies::default().set_frame(move |frame| {
            while !gate.load(Ordering::Acquire) {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            frame
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), REPLAYING).unwrap();
        let mut region = session.map("mem").unwrap();
        touch(&region, &source, pages[0]);
        region[pages[0] * PAGE] ^= 0xff;
        let removed = 720 * PAGE..728 * PAGE;
        let touched = 400;
        touch(&region, &source, touched);
        give_back(&mut region, touched * PAGE..(touched + 1) * PAGE);
        give_back(&mut region, removed.clone());
        may_come.store(true, Ordering::Release);
        wait_until("the set is there", || {
            let progress = session.progress();
            progress.resident_pages + progress.removed_pages >= pages.len() as u64
        });
        assert_eq!(region[pages[0] * PAGE], source.bytes[pages[0] * PAGE] ^ 0xff, "what was written stays");
        assert!(
            region[touched * PAGE..][..PAGE].iter().all(|byte| *byte == 0),
            "what was given back stays so"
        );
        assert!(region[removed].iter().all(|byte| *byte == 0));
        for page in
            (0..PAGES).filter(|page| *page != pages[0] && *page != touched && !(720..728).contains(page))
        {
            touch(&region, &source, page);
        }
    });
}

#[test]
fn huge_pages_are_recorded_and_come_whole() {
    if !is_root() {
        return skip(
            "working_set::huge_pages_are_recorded_and_come_whole",
            "the pool of huge pages is root's",
        );
    }
    let pool = HugePool::with_free(4);
    within(WATCHDOG, move || {
        let _pool = pool;
        let source = Source::start(memory_like(4 * 512 * PAGE, 33), CHUNK);
        // Their pages are as early, on average: they are not mixed.
        let orders = [[512 * 3 + 7, 600, 5], [5, 600, 512 * 3 + 7]];
        for (options, order) in [(RECORDING, orders[0]), (RECORDING, orders[1]), (REPLAYING, orders[0])] {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("huge:{}", 4 * 512)]);
            let regions = [faulter.huge_region(0, "mem", 0, Sharing::Private)];
            let session = source.attach_regions(&mut faulter, &regions, options);
            if options.working_set {
                wait_until("the set is there", || session.progress().resident_pages == 3 * 512);
            }
            for page in order {
                faulter.assert_reads(0, page, &source.bytes[page * PAGE..(page + 1) * PAGE]);
            }
            if options.working_set {
                assert_eq!(session.progress().faults, 0);
            }
            faulter.kill();
            assert!(session.close(MINUTE));
            session.wait_recorded(MINUTE).unwrap();
        }
        assert_eq!(listed(&source)["pages"], 1536);
    });
}

/// A chunk's pages may lie in memory of both kinds.
#[test]
fn huge_pages_beside_others_of_the_same_chunk_are_recorded() {
    let name = "working_set::huge_pages_beside_others_of_the_same_chunk_are_recorded";
    if !is_root() {
        return skip(name, "the pool of huge pages is root's");
    }
    let pool = HugePool::with_free(2);
    within(WATCHDOG, move || {
        let _pool = pool;
        // The huge page begins and ends within chunks.
        const SMALL: usize = 7;
        let source = Source::start(memory_like((SMALL + 512 + 20) * PAGE, 34), CHUNK);
        let offset = |page: usize| (page * PAGE) as u64;
        for order in [[(0, 3), (1, 100), (2, 4)], [(2, 4), (1, 500), (0, 0)], [(1, 5), (0, 6), (2, 0)]] {
            let kinds = [&*format!("private:{SMALL}"), "huge:512", "private:20"];
            let mut faulter = Faulter::start(ALL_EVENTS, &kinds);
            let regions = [
                faulter.region(0, "mem", 0),
                faulter.huge_region(1, "mem", offset(SMALL), Sharing::Private),
                faulter.region(2, "mem", offset(SMALL + 512)),
            ];
            let session = source.attach_regions(&mut faulter, &regions, RECORDING);
            for (region, page) in order {
                let of_file = [0, SMALL, SMALL + 512][region] + page;
                faulter.assert_reads(region, page, &source.bytes[of_file * PAGE..][..PAGE]);
            }
            faulter.assert_reads(0, 0, &source.bytes[..SMALL * PAGE]);
            faulter.assert_reads(1, 0, &source.bytes[SMALL * PAGE..][..512 * PAGE]);
            faulter.assert_reads(2, 0, &source.bytes[(SMALL + 512) * PAGE..]);
            assert_eq!(session.error(), None);
        }
    });
}
