//! What is asked for before it is touched, on both lanes.

use crate::session::Source;
use bytes::Bytes;
use postcopy::{LossPolicy, Options, Session};
use postcopy_proto::v1::chunk_answer;
use postcopy_tests::chaos::{Chaos, Lane, Lies, within};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::link::{Link, Quality};
use postcopy_tests::{PAGE, wait_until};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 512;
const WATCHDOG: Duration = Duration::from_secs(100);
const OPTIONS: Options = Options::DEFAULT.fault_deadline(Duration::from_secs(60));

fn start() -> Source {
    Source::start(memory_like(CHUNKS * CHUNK, 41), CHUNK)
}

fn touch(region: &[u8], source: &Source, page: usize) {
    assert!(region[page * PAGE..][..PAGE] == source.bytes[page * PAGE..][..PAGE], "page {page}");
}

#[test]
fn a_scan_is_read_ahead_and_hardly_a_chunk_comes_twice() {
    within(WATCHDOG, || {
        let source = start();
        let chaos = Chaos::start(source.server.address(), Lies::default());
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), OPTIONS).unwrap();
        let region = session.map("mem").unwrap();
        // Two at once, each from an end of its own.
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (region, source, pages) = (&region, &source, region.len() / PAGE / 2);
                scope.spawn(move || {
                    (half * pages..(half + 1) * pages).for_each(|page| touch(region, source, page))
                });
            }
        });
        let progress = session.progress();
        assert!(progress.read_ahead_chunks > CHUNKS as u64 * 3 / 4, "{progress:?}");
        // Of those that are late, where a thread waits for one.
        let twice = chaos.asked().demand().values().filter(|times| **times > 1).count();
        assert!(twice <= CHUNKS / 50, "{twice} chunks");
    });
}

#[test]
fn scattered_touches_bring_nothing_ahead() {
    within(WATCHDOG, || {
        let source = start();
        let session = source.open(OPTIONS);
        let region = session.map("mem").unwrap();
        let mut chunks: Vec<usize> = (0..CHUNKS).step_by(2).collect();
        fastrand::shuffle(&mut chunks);
        chunks.iter().for_each(|chunk| touch(&region, &source, chunk * CHUNK / PAGE + fastrand::usize(..16)));
        let progress = session.progress();
        assert_eq!((progress.read_ahead_chunks, progress.demand_chunks), (0, CHUNKS as u64 / 2));
    });
}

#[test]
fn what_was_read_ahead_and_is_wrong_comes_when_it_is_touched() {
    within(WATCHDOG, || {
        let source = start();
        let seen = Mutex::new(HashSet::new());
        let lies = Lies::default().chunk(move |_, mut answer| {
            // The first answer for every third chunk, and a second one for some of these: no more than a touch can bear.
            let is_new = seen.lock().unwrap().insert(answer.chunk);
            match answer.chunk % 9 {
                0 if is_new => answer.result = None,
                3 if is_new => {
                    answer.result = Some(chunk_answer::Result::Frame(Bytes::from_static(&[7; 40])))
                }
                6 if is_new => return Vec::new(),
                _ => {}
            }
            vec![answer]
        });
        let chaos = Chaos::start(source.server.address(), lies);
        // What never comes is asked for again when its time is over, if it was read ahead, and lost if it was touched.
        let options = OPTIONS.fault_deadline(Duration::from_secs(1)).on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        (0..40 * CHUNK / PAGE).for_each(|page| touch(&region, &source, page));
        assert!(session.progress().read_ahead_chunks > 10);
    });
}

/// An answer that never comes is the fault's, and not the memory's.
#[test]
fn the_fill_brings_a_chunk_that_is_stuck_on_the_demand_lane() {
    const STUCK: u64 = 7;
    within(WATCHDOG, || {
        let source = start();
        let lies = Lies::default().chunk(|lane, answer| match (lane, answer.chunk) {
            (Lane::Demand, STUCK) => Vec::new(),
            _ => vec![answer],
        });
        let chaos = Chaos::start(source.server.address(), lies);
        let deadline = Duration::from_secs(6);
        let options = OPTIONS.fault_deadline(deadline).on_loss(LossPolicy::Wait);
        let session = Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| touch(&region, &source, usize::try_from(STUCK).unwrap() * CHUNK / PAGE));
            wait_until("it is asked for", || chaos.asked().demand().contains_key(&STUCK));
            session.fill().unwrap();
        });
        session.wait_resident(WATCHDOG).unwrap();
        assert_eq!(chaos.asked().bulk().get(&STUCK), Some(&1));
        // The fault's deadline passes, and nothing is lost.
        assert_eq!(session.wait_error(deadline + Duration::from_secs(1)), None);
    });
}

#[test]
fn from_afar_hardly_a_chunk_is_asked_for_on_both_lanes() {
    within(WATCHDOG, || {
        let source = start();
        let chaos = Chaos::start(source.server.address(), Lies::default());
        let quality = Quality { round_trip: Duration::from_millis(10), bytes_per_second: 25e6 };
        let link = Link::to(&chaos.address().to_string(), quality);
        let options = OPTIONS.fill(true);
        let session = Session::open(link.address(), &"app".parse().unwrap(), options).unwrap();
        let region = session.map("mem").unwrap();
        // Where the fill is at work.
        (0..CHUNKS * CHUNK / PAGE).for_each(|page| touch(&region, &source, page));
        let (demand, bulk) = (chaos.asked().demand(), chaos.asked().bulk());
        let both = demand.keys().filter(|chunk| bulk.contains_key(*chunk)).count();
        println!("{} on demand, {} in bulk, {both} on both", demand.len(), bulk.len());
        assert!(both < CHUNKS / 6, "{both} of {CHUNKS} chunks");
    });
}

/// How long touches of chunks at random take over a link, those that wait; now and then there are none for a while.
fn waits(source: &Source, quality: Quality, fill: bool) -> Vec<Duration> {
    let link = Link::to(&source.server.address().to_string(), quality);
    let options = OPTIONS.fill(fill);
    let session = Session::open(link.address(), &"app".parse().unwrap(), options).unwrap();
    let region = session.map("mem").unwrap();
    let mut chunks: Vec<usize> = (0..region.len() / CHUNK).collect();
    fastrand::Rng::with_seed(5).shuffle(&mut chunks);
    let took = |(number, chunk): (usize, &usize)| {
        if number % 20 == 0 {
            std::thread::park_timeout(Duration::from_millis(300));
        }
        let before = Instant::now();
        touch(&region, source, chunk * CHUNK / PAGE);
        before.elapsed()
    };
    let took = chunks[..80].iter().enumerate().map(took).filter(|took| *took > quality.round_trip / 2);
    let mut waits: Vec<_> = took.collect();
    waits.sort_unstable();
    waits
}

#[test]
fn the_fill_leaves_touches_their_way_over_a_narrow_link_and_a_long_one() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(384 << 20, 42), CHUNK);
        for round_trip in [1, 30] {
            let quality = Quality { round_trip: Duration::from_millis(round_trip), bytes_per_second: 12.5e6 };
            let (alone, beside) = (waits(&source, quality, false), waits(&source, quality, true));
            let median = |waits: &[Duration]| waits[waits.len() / 2];
            println!("{}: {:?} alone, {}: {:?}", alone.len(), median(&alone), beside.len(), median(&beside));
            // The first ones wait for all that had been asked for before there was a touch.
            assert!(beside.len() > 40 && median(&beside) < median(&alone) * 3, "{beside:?} beside {alone:?}");
        }
    });
}

/// Fault latencies in scattered chunks of the upper half, with or without a scan of the lower half.
fn scattered_waits(source: &Source, is_scanned: bool) -> Vec<Duration> {
    let quality = Quality { round_trip: Duration::from_millis(1), bytes_per_second: 12.5e6 };
    let link = Link::to(&source.server.address().to_string(), quality);
    let session = Session::open(link.address(), &"app".parse().unwrap(), OPTIONS).unwrap();
    let region = session.map("mem").unwrap();
    let (half, has_ended) = (region.len() / 2, AtomicBool::new(!is_scanned));
    let mut chunks: Vec<usize> = (half / CHUNK..region.len() / CHUNK).step_by(2).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut chunks);
    std::thread::scope(|scope| {
        if is_scanned {
            let (region, has_ended) = (&region, &has_ended);
            scope.spawn(move || {
                let pages = (0..half / PAGE).take_while(|_| !has_ended.load(Ordering::Relaxed));
                pages.for_each(|page| touch(region, source, page));
            });
            wait_until("the scan is read ahead", || session.progress().read_ahead_chunks > 40);
        }
        // The first ones wait for what was under way before, and are no run of touches yet.
        let mut waits: Vec<_> = chunks[..160]
            .iter()
            .map(|chunk| {
                let before = Instant::now();
                touch(&region, source, chunk * CHUNK / PAGE);
                before.elapsed()
            })
            .skip(40)
            .collect();
        has_ended.store(true, Ordering::Relaxed);
        waits.sort_unstable();
        waits
    })
}

#[test]
fn a_scan_leaves_scattered_touches_their_way_over_a_narrow_link() {
    within(WATCHDOG, || {
        let source = Source::start(memory_like(256 << 20, 43), CHUNK);
        let (alone, beside) = (scattered_waits(&source, false), scattered_waits(&source, true));
        let of = |waits: &[Duration], percent: usize| waits[waits.len() * percent / 100];
        let both = |percent| (of(&alone, percent), of(&beside, percent));
        println!("median {:?}, p90 {:?} alone and beside a scan", both(50), both(90));
        assert!(of(&beside, 90) < of(&alone, 90) * 5, "p90 {:?}", both(90));
    });
}
