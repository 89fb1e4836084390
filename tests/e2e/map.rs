//! A file of an image as memory: every byte is the source's.

use postcopy::{Options, Region, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, wait_until};
use std::path::Path;
use std::time::Duration;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// Pushes `path` to `server` under `reference`, in chunks of that many bytes.
pub(crate) fn push(server: &Server, path: &Path, reference: &str, chunk_bytes: usize) {
    let chunk_bytes = chunk_bytes.to_string();
    let args = ["push".as_ref(), path.as_os_str(), reference.as_ref(), "--chunk-size".as_ref()];
    let _ = run(server.address(), args.into_iter().chain([chunk_bytes.as_ref()]));
}

/// The pages of `len` bytes in random order; the seed is printed.
pub(crate) fn random_pages(len: usize) -> Vec<usize> {
    let seed = fastrand::u64(..);
    eprintln!("pages in the order of seed {seed}");
    let mut pages: Vec<_> = (0..len.div_ceil(PAGE)).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut pages);
    pages
}

/// The files of the issue for one chunk size, by name.
fn files(chunk: usize) -> Vec<(String, Vec<u8>)> {
    // With pages for chunks, some of them are the same.
    let sizes = std::collections::BTreeSet::from([0, 1, 4095, 4096, 4097, chunk - 1, chunk, chunk + 1]);
    let sized = (1..).zip(sizes).flat_map(|(seed, len)| {
        [(format!("memory-{len}"), memory_like(len, seed)), (format!("noise-{len}"), noise(len, seed))]
    });
    let mut holes = vec![0; 5 * chunk + 123];
    for (seed, at) in [(20, chunk - 5), (21, 3 * chunk + 4090), (22, 5 * chunk + 100)] {
        holes[at..at + 10].copy_from_slice(&noise(10, seed));
    }
    let others = [
        ("sparse".to_owned(), holes),
        ("zero".to_owned(), vec![0; 3 * chunk + 17]),
        ("incompressible".to_owned(), noise(4 * chunk + 5, 30)),
        ("memory".to_owned(), memory_like(4 * chunk + 4096, 31)),
    ];
    sized.chain(others).collect()
}

fn assert_same(region: &[u8], expected: &[u8], what: &str) {
    assert_eq!(region.len(), expected.len(), "{what}: length");
    let different = region.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(different, None, "{what}: the first byte that differs");
}

fn every_file_reads_as_its_source(chunk: usize) {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let files = files(chunk);
    for (name, bytes) in &files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    push(&server, folder.path(), "files", chunk);
    let reference = "files".parse().unwrap();

    let touched = Session::open(server.address(), &reference, Options::DEFAULT).unwrap();
    for (name, bytes) in &files {
        let region = touched.map(name).unwrap();
        assert_eq!(region.resident_pages(), 0, "{name} is there before it was touched");
        for page in random_pages(bytes.len()) {
            let end = bytes.len().min((page + 1) * PAGE);
            let at = page * PAGE..end;
            assert!(region[at.clone()] == bytes[at], "{name}, page {page}, chunks of {chunk}");
        }
        // A touch goes on a moment before it is counted.
        let pages = bytes.len().div_ceil(PAGE);
        wait_until("all pages are resident", || region.resident_pages() == pages);
        // What lies behind the file's end in its last page is zero.
        assert_same(&region, bytes, name);
    }
    assert_eq!(touched.progress().bulk_chunks, 0, "nothing came but by touch");

    let filled = Session::open(server.address(), &reference, Options::DEFAULT.fill(true));
    let filled = filled.unwrap();
    let regions: Vec<_> = files.iter().map(|(name, _)| filled.map(name).unwrap()).collect();
    filled.wait_resident(Duration::from_secs(60)).unwrap();
    let progress = filled.progress();
    assert_eq!(progress.resident_pages, progress.total_pages);
    for (region, (name, bytes)) in regions.iter().zip(&files) {
        assert_same(region, bytes, name);
    }
    assert_eq!(filled.progress().faults, 0, "a filled page faults");
}

#[test]
fn files_in_chunks_of_4_kib_read_as_their_sources() {
    every_file_reads_as_its_source(4 * KIB);
}

#[test]
fn files_in_chunks_of_64_kib_read_as_their_sources() {
    every_file_reads_as_its_source(64 * KIB);
}

#[test]
fn files_in_chunks_of_2_mib_read_as_their_sources() {
    every_file_reads_as_its_source(2 * MIB);
}

/// Where the islands of the 1 GiB file lie: inside of pages, across the borders of pages, chunks and segments, and
/// at both ends.
fn islands() -> Vec<(usize, Vec<u8>)> {
    let mut places = vec![(0, 3), (PAGE - 1, 2), (10 * PAGE, PAGE), (GIB - 1, 1)];
    for border in [64 * KIB, 2 * MIB, 64 * MIB, 512 * MIB, 960 * MIB] {
        places.push((border - 3, 7));
        places.push((border + 5 * PAGE - 100, 3 * PAGE));
    }
    let mut rng = fastrand::Rng::with_seed(77);
    places.extend((0..40).map(|i| (i * 20 * MIB + 3 * MIB + rng.usize(..MIB), rng.usize(1..300 * KIB))));
    places.sort_unstable();
    (100..).zip(places).map(|(seed, (at, len))| (at, noise(len, seed))).collect()
}

/// Compares a region with zeros that have islands in them.
fn assert_islands(region: &Region, islands: &[(usize, Vec<u8>)]) {
    let mut next = 0;
    let zeros = |range: std::ops::Range<usize>| {
        let bytes = &region[range.clone()];
        let wrong = bytes.iter().position(|byte| *byte != 0);
        assert_eq!(wrong.map(|at| at + range.start), None, "a byte of a hole that is not zero");
    };
    for (at, bytes) in islands {
        zeros(next..*at);
        next = at + bytes.len();
        assert!(region[*at..next] == bytes[..], "the island at {at}");
    }
    zeros(next..region.len());
}

fn a_sparse_gigabyte_reads_as_its_source(chunk: usize, every_page_by_touch: bool) {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let islands = islands();
    let borrowed: Vec<_> = islands.iter().map(|(at, bytes)| (*at as u64, &bytes[..])).collect();
    sparse(&path, GIB as u64, &borrowed);
    push(&server, &path, "sparse", chunk);
    let reference = "sparse".parse().unwrap();

    let session = Session::open(server.address(), &reference, Options::DEFAULT).unwrap();
    let segments = GIB.div_ceil(chunk).div_ceil(16_384);
    assert_eq!(session.image().root().segment_digests().len(), segments);
    let region = session.map("mem").unwrap();
    let mut expected = vec![0; PAGE];
    let mut next_island = vec![usize::MAX; GIB / PAGE];
    for (i, (at, bytes)) in islands.iter().enumerate() {
        for first in &mut next_island[at / PAGE..(at + bytes.len()).div_ceil(PAGE)] {
            *first = i.min(*first);
        }
    }
    let some = if every_page_by_touch { usize::MAX } else { 20_000 };
    let near = islands.iter().map(|(at, _)| at / PAGE);
    for page in random_pages(GIB).into_iter().take(some).chain(near) {
        expected.fill(0);
        for (at, bytes) in islands.iter().skip(next_island[page]) {
            let (start, end) = ((*at).max(page * PAGE), (at + bytes.len()).min((page + 1) * PAGE));
            if start >= end {
                break;
            }
            expected[start - page * PAGE..end - page * PAGE].copy_from_slice(&bytes[start - at..end - at]);
        }
        assert!(region[page * PAGE..][..PAGE] == expected[..], "page {page}, chunks of {chunk}");
    }
    drop((region, session));

    let session = Session::open(server.address(), &reference, Options::DEFAULT.fill(true));
    let session = session.unwrap();
    let region = session.map("mem").unwrap();
    session.wait_resident(Duration::from_secs(60)).unwrap();
    assert_islands(&region, &islands);
    assert_eq!(session.progress().faults, 0, "a filled page faults");
}

#[test]
fn a_sparse_gigabyte_in_16_segments_reads_as_its_source() {
    a_sparse_gigabyte_reads_as_its_source(4 * KIB, false);
}

#[test]
fn a_sparse_gigabyte_in_chunks_of_64_kib_reads_as_its_source() {
    a_sparse_gigabyte_reads_as_its_source(64 * KIB, true);
}

#[test]
fn a_sparse_gigabyte_in_chunks_of_2_mib_reads_as_its_source() {
    a_sparse_gigabyte_reads_as_its_source(2 * MIB, true);
}

/// Parts that begin and end anywhere in a chunk, overlap, and lie in others; and the whole file beside them.
fn parts_read_as_their_source(chunk: usize) {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let mut bytes = memory_like(3 * chunk.max(64 * KIB) + 12_345, 61);
    // Some chunks of nothing but zeros, and some that are zero in part.
    let middle = bytes.len() / 2;
    bytes[middle..middle + chunk + 3 * PAGE].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    push(&server, &path, "app", chunk);
    let seed = fastrand::u64(..);
    eprintln!("parts of seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let pages = bytes.len().div_ceil(PAGE);
    let mut spans: Vec<_> = (0..12)
        .map(|_| {
            let first = random.usize(..pages) * PAGE;
            first..random.usize(first..=bytes.len())
        })
        .collect();
    spans.extend([0..bytes.len(), 0..0, PAGE..PAGE + 1, bytes.len() / PAGE * PAGE..bytes.len()]);

    for fill in [false, true] {
        let options = Options::DEFAULT.fill(fill);
        let session = Session::open(server.address(), &"app".parse().unwrap(), options).unwrap();
        let map = |span: &std::ops::Range<usize>| {
            session.map_part("mem", span.start as u64..span.end as u64).expect("a part of the file")
        };
        let regions: Vec<_> = spans.iter().map(map).collect();
        if fill {
            session.wait_resident(Duration::from_secs(60)).unwrap();
        }
        for (region, span) in regions.iter().zip(&spans) {
            for page in random_pages(span.len()) {
                let end = span.len().min((page + 1) * PAGE);
                let (here, there) = (page * PAGE..end, span.start + page * PAGE..span.start + end);
                assert!(
                    region[here] == bytes[there],
                    "{span:?}, page {page}, chunks of {chunk}, fill {fill}"
                );
            }
            assert_same(region, &bytes[span.clone()], &format!("{span:?}"));
        }
        // What came for one region is there in all that have it.
        let progress = session.progress();
        assert!(fill || progress.demand_chunks <= bytes.len().div_ceil(chunk) as u64, "{progress:?}");
    }
}

#[test]
fn parts_of_a_file_in_chunks_of_4_kib_read_as_their_source() {
    parts_read_as_their_source(4 * KIB);
}

#[test]
fn parts_of_a_file_in_chunks_of_64_kib_read_as_their_source() {
    parts_read_as_their_source(64 * KIB);
}

#[test]
fn parts_of_a_file_in_chunks_of_2_mib_read_as_their_source() {
    parts_read_as_their_source(2 * MIB);
}
