//! Many threads at the same pages: right bytes, no hang, and each chunk is fetched once.

use crate::map::{push, random_pages};
use postcopy::{Options, Region, Session};
use postcopy_tests::PAGE;
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use std::sync::Barrier;
use std::time::Duration;

const THREADS: usize = 16;

/// How the threads go through the pages.
#[derive(Clone, Copy, Debug)]
enum Order {
    Same,
    Different,
}

/// 16 threads go over a whole file with `visit`, all beginning at once; then what was asked for is counted.
fn each_chunk_is_fetched_once(len: usize, chunk: usize, order: Order, visit: fn(&Region, &[u8], usize)) {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = memory_like(len, 5);
    std::fs::write(&path, &bytes).unwrap();
    push(&server, &path, "app", chunk);
    let chaos = Chaos::start(server.address(), Lies::default());
    let session = Session::open(chaos.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
    let region = session.map("mem").unwrap();

    let begin = Barrier::new(THREADS);
    let same = random_pages(len);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let pages = match order {
                Order::Same => same.clone(),
                Order::Different => random_pages(len),
            };
            let (region, bytes, begin) = (&region, &bytes, &begin);
            scope.spawn(move || {
                begin.wait();
                pages.into_iter().for_each(|page| visit(region, bytes, page));
            });
        }
    });

    let image = session.image();
    let data_chunks = (0..image.root().chunks()).filter(|chunk| {
        let chunk = postcopy::proto::page::ChunkIndex(*chunk);
        matches!(image.content(chunk), postcopy::Content::Data(_))
    });
    let mut data_chunks: Vec<u64> = data_chunks.collect();
    let mut asked: Vec<(u64, u32)> = chaos.asked().demand().into_iter().collect();
    asked.sort_unstable();
    data_chunks.sort_unstable();
    let once: Vec<_> = data_chunks.iter().map(|chunk| (*chunk, 1)).collect();
    assert!(!once.is_empty());
    assert!(asked == once, "{order:?}: not each chunk was asked for exactly once");
    assert!(chaos.asked().bulk().is_empty());
    assert!(chaos.asked().segments().values().all(|count| *count == 1), "a segment was asked for twice");
}

fn touch(region: &Region, bytes: &[u8], page: usize) {
    let at = page * PAGE..(page + 1) * PAGE;
    assert!(region[at.clone()] == bytes[at], "page {page}");
}

/// Reads from the page's middle into the next one.
fn read(region: &Region, bytes: &[u8], page: usize) {
    let at = page * PAGE + PAGE / 2;
    let mut buffer = [1; PAGE];
    let buffer = &mut buffer[..PAGE.min(bytes.len() - at)];
    region.read_at(at, buffer).unwrap();
    assert!(*buffer == bytes[at..at + buffer.len()], "from the middle of page {page} on");
}

#[test]
fn threads_that_touch_the_same_pages_in_the_same_order_fetch_each_chunk_once() {
    within(Duration::from_secs(120), || {
        for (len, chunk) in [(24 << 20, 4 << 10), (64 << 20, 64 << 10)] {
            each_chunk_is_fetched_once(len, chunk, Order::Same, touch);
        }
    });
}

#[test]
fn threads_that_touch_the_same_pages_in_different_orders_fetch_each_chunk_once() {
    within(Duration::from_secs(120), || {
        for (len, chunk) in [(24 << 20, 4 << 10), (64 << 20, 64 << 10)] {
            each_chunk_is_fetched_once(len, chunk, Order::Different, touch);
        }
    });
}

#[test]
fn threads_that_read_at_the_same_pages_fetch_each_chunk_once() {
    within(Duration::from_secs(120), || {
        for order in [Order::Same, Order::Different] {
            each_chunk_is_fetched_once(8 << 20, 16 << 10, order, read);
        }
    });
}
