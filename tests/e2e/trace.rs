//! Traces, and what `postcopy report` makes of them.

use crate::map::random_pages;
use crate::session::Source;
use postcopy::trace::{Cause, Trace, TraceWriter};
use postcopy::{ForeignRegion, Options, Region, Session, Sharing};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::{fail, run};
use postcopy_tests::faulter::{ALL_EVENTS, Faulter};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::pool::HugePool;
use postcopy_tests::{PAGE, is_root, skip, wait_until};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tempfile::{NamedTempFile, TempDir};

const CHUNK: usize = 64 << 10;
const PAGES: usize = 4000;
const WATCHDOG: Duration = Duration::from_secs(100);
const MINUTE: Duration = Duration::from_secs(60);

fn traced(options: Options) -> Options {
    options.trace(true).fault_deadline(MINUTE)
}

fn start() -> Source {
    Source::start(memory_like(PAGES * PAGE, 43), CHUNK)
}

fn touch(region: &Region, source: &Source, page: usize) {
    assert!(region[page * PAGE..][..PAGE] == source.bytes[page * PAGE..][..PAGE], "page {page}");
}

/// A traced session, until its end: what `work` gives, and where the trace is.
fn trace<T>(
    source: &Source,
    options: Options,
    work: impl FnOnce(&Session, &Region, &Path) -> T,
) -> (T, PathBuf, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    let session = source.open(traced(options));
    let writer = session.write_trace(File::create(&path).unwrap()).unwrap();
    let region = session.map("mem").unwrap();
    let given = work(&session, &region, &path);
    drop(region);
    assert!(session.close(MINUTE));
    session.wait_recorded(MINUTE).unwrap();
    writer.finish().unwrap();
    (given, path, folder)
}

fn read(path: &Path) -> Trace {
    Trace::read(BufReader::new(File::open(path).unwrap())).unwrap()
}

/// What came why, page by page; each once.
fn came(trace: &Trace) -> BTreeMap<u32, Cause> {
    let mut pages = BTreeMap::new();
    for came in &trace.came {
        for page in came.page..came.page + came.pages {
            assert_eq!(pages.insert(page, came.cause), None, "page {page}");
        }
    }
    pages
}

fn report(source: &Source, path: &Path) -> Value {
    run(source.server.address(), ["report", path.to_str().unwrap()])
}

#[test]
fn each_touch_and_each_page_is_told_of_once() {
    within(WATCHDOG, || {
        let source = start();
        let mut touched = random_pages(source.bytes.len());
        // Not of chunks that follow one another: nothing is read ahead.
        touched.retain(|page| page / 16 % 2 == 0);
        touched.truncate(PAGES / 8);
        let ((progress, image), path, _folder) = trace(&source, Options::DEFAULT, |session, region, _| {
            std::thread::scope(|scope| {
                for pages in touched.chunks(touched.len() / 3 + 1) {
                    let source = &source;
                    scope.spawn(move || pages.iter().for_each(|page| touch(region, source, *page)));
                }
            });
            // The last chunk's other pages.
            let chunks: BTreeSet<_> = touched.iter().map(|page| page / 16).collect();
            wait_until("all is there", || session.progress().resident_pages == 16 * chunks.len() as u64);
            (session.progress(), session.image().digest().to_string())
        });
        let trace = read(&path);
        let end = trace.end.as_ref().unwrap();
        assert_eq!((end.lost, &end.error), (0, &None));
        assert_eq!(trace.header.image, image);
        assert_eq!(came(&trace).len() as u64, progress.resident_pages);
        // Of a touch of a page that has just come there is a message, but nobody waits.
        assert!((1..=progress.faults).contains(&(trace.touches.len() as u64)));
        let touched: BTreeSet<_> = touched.iter().map(|page| u32::try_from(*page).unwrap()).collect();
        assert!(trace.touches.iter().all(|touch| touched.contains(&touch.page)));
        let asked: BTreeSet<_> = trace.came.iter().map(|came| came.page / 16).collect();
        assert_eq!(asked.len() as u64, progress.demand_chunks);
        let slow = |came: &&postcopy::trace::Came| came.wire > 0 && came.decompress > 0 && came.install > 0;
        assert_eq!(trace.came.iter().filter(slow).count(), trace.came.len(), "all have been under way");

        let report = report(&source, &path);
        assert_eq!(report["touches"]["count"], trace.touches.len());
        assert_eq!(report["touches"]["unanswered"], 0);
        let waited = report["waited_ms"].as_f64().unwrap();
        let parts: f64 = report["waiting"].as_object().unwrap().values().map(|ms| ms.as_f64().unwrap()).sum();
        assert!((waited - parts).abs() < 0.01 && waited > 0.0, "{report}");
        let pages: u64 =
            report["pages"].as_object().unwrap().values().map(|pages| pages.as_u64().unwrap()).sum();
        assert_eq!(pages, progress.resident_pages);
    });
}

#[test]
fn what_comes_without_a_touch_is_told_apart() {
    within(WATCHDOG, || {
        let source = start();
        let scan =
            |_: &Session, region: &Region, _: &Path| (0..PAGES).for_each(|page| touch(region, &source, page));
        let ((), path, _folder) = trace(&source, Options::DEFAULT, scan);
        let report_of_scan = report(&source, &path);
        assert!(
            report_of_scan["pages"]["read_ahead"].as_u64().unwrap() > PAGES as u64 / 2,
            "{report_of_scan}"
        );
        assert_eq!(came(&read(&path)).len(), PAGES);

        let fill = |session: &Session, _: &Region, _: &Path| session.wait_resident(MINUTE).unwrap();
        let ((), path, _folder) = trace(&source, Options::DEFAULT.fill(true), fill);
        assert_eq!(report(&source, &path)["pages"]["background"], PAGES);
        assert_eq!(came(&read(&path)).len(), PAGES);
    });
}

/// Half of the set is touched: of the pages that are withheld about half are, too, and the report says so.
#[test]
fn how_much_of_a_working_set_is_touched_is_estimated() {
    within(WATCHDOG, || {
        let source = start();
        let mut pages = random_pages(source.bytes.len());
        pages.truncate(PAGES * 3 / 4);
        let all = |_: &Session, region: &Region, _: &Path| {
            pages.iter().for_each(|page| touch(region, &source, *page))
        };
        let ((), path, _folder) = trace(&source, Options::DEFAULT.record(true), all);
        let recorded = report(&source, &path);
        assert_eq!(
            (&recorded["pages"]["touched"], &recorded["pages"]["neighbours"]),
            (&pages.len().into(), &0.into())
        );

        let half = |session: &Session, region: &Region, path: &Path| {
            // Some are withheld, which the trace tells of as it is written.
            wait_until("the set is there", || {
                let withheld = Trace::read(BufReader::new(File::open(path).unwrap()))
                    .map_or(0, |trace| trace.withheld.len());
                session.progress().resident_pages + withheld as u64 == pages.len() as u64
            });
            let resident = session.progress().resident_pages;
            pages[..pages.len() / 2].iter().for_each(|page| touch(region, &source, *page));
            resident
        };
        let replaying = Options::DEFAULT.working_set(true);
        let (resident, path, folder) = trace(&source, replaying, half);
        let trace = read(&path);
        let withheld = trace.withheld.len();
        assert_eq!(resident + withheld as u64, pages.len() as u64);
        // 60 are expected, and 24 to 96 come but once in a million runs.
        assert!((24..=96).contains(&withheld), "{withheld}");

        let html = folder.path().join("report.html");
        let args = ["report", path.to_str().unwrap(), "-o", html.to_str().unwrap()];
        let report = run(source.server.address(), args);
        let touched: BTreeSet<_> = pages[..pages.len() / 2].iter().collect();
        let expected = trace.withheld.iter().filter(|page| touched.contains(&(page.page as usize))).count();
        let estimate = &report["estimate"];
        // A neighbour of one that is touched comes with it.
        let brought = usize::try_from(estimate["brought"].as_u64().unwrap()).unwrap();
        let seen = usize::try_from(estimate["touched"].as_u64().unwrap()).unwrap();
        assert!(seen <= expected && expected <= seen + brought, "{report}: {expected}");
        let share = estimate["touched_share"].as_f64().unwrap();
        assert!((0.2..0.9).contains(&share), "{report}");
        assert_eq!(report["pages"]["working_set"], resident);

        let html = std::fs::read_to_string(html).unwrap();
        for part in [
            "Faults on absent pages",
            "Parts of the latency",
            "Installed memory, by cause",
            "Places in the files",
            "an estimate: ",
        ] {
            assert!(html.contains(part), "{part}");
        }
        // It needs nothing from elsewhere: the one address in it is SVG's name.
        let html = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        assert!(!["://", "<script", "@import", "url("].iter().any(|from| html.contains(from)));
    });
}

/// Takes nothing until it is told to.
struct Blocked(Receiver<()>, File);

impl Write for Blocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Told once; then the sender is gone.
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

#[test]
fn what_cannot_be_written_harms_nobody() {
    within(WATCHDOG, || {
        // Two events a page, and all is zero: more than may wait.
        const MANY: usize = 40_000;
        let source = Source::start(vec![0; MANY * PAGE], CHUNK);
        let (go_on, blocked) = std::sync::mpsc::sync_channel(1);
        let session = source.open(traced(Options::DEFAULT.record(true)));
        let file = NamedTempFile::new().unwrap();
        let writer = session.write_trace(Blocked(blocked, file.reopen().unwrap())).unwrap();
        let again = session.write_trace(io::sink()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::Unsupported);
        let region = session.map("mem").unwrap();
        (0..MANY).for_each(|page| touch(&region, &source, page));
        drop(region);
        assert!(session.close(MINUTE));
        drop(go_on);
        writer.finish().unwrap();
        let trace = read(file.path());
        let lost = trace.end.as_ref().unwrap().lost;
        assert!(lost > 0);
        assert_eq!(trace.touches.len() as u64 + trace.came.len() as u64 + lost, 2 * MANY as u64);
        assert_eq!(report(&source, file.path())["lost_events"], lost);

        let full = File::options().write(true).open("/dev/full").unwrap();
        let session = source.open(traced(Options::DEFAULT));
        let writer = session.write_trace(full).unwrap();
        let region = session.map("mem").unwrap();
        (0..MANY).for_each(|page| touch(&region, &source, page));
        drop(region);
        assert!(session.close(MINUTE));
        assert_eq!(writer.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
        // Without one there is none to be had.
        assert!(source.open(Options::DEFAULT).write_trace(io::sink()).is_err());
    });
}

#[test]
fn what_is_no_trace_is_named() {
    within(WATCHDOG, || {
        let source = start();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("no-trace");
        let told = |path: &Path| fail(source.server.address(), ["report", path.to_str().unwrap()]);
        assert!(told(&path).contains("no-trace: No such file"));
        std::fs::write(&path, "{\"trace\":1}\n").unwrap();
        assert!(told(&path).contains("no-trace: not a trace\n  Write one with --trace"));
        let nowhere = folder.path().join("nowhere/trace");
        let args = ["bench", "app", "mem", "--no-eager", "--trace", nowhere.to_str().unwrap()];
        assert!(fail(source.server.address(), args).contains("nowhere/trace: No such file"));
        let args = ["bench", "app", "mem", "--no-eager", "--trace", path.to_str().unwrap()];
        std::fs::remove_file(&path).unwrap();
        let _ = run(source.server.address(), args);
        let whole = std::fs::read_to_string(&path).unwrap();
        let (first, rest) = whole.split_once('\n').unwrap();
        // A process may be killed within a line.
        std::fs::write(&path, format!("{first}\n{}", &rest[..rest.len() / 2])).unwrap();
        let cut = report(&source, &path);
        assert_eq!(cut["is_complete"], false);
        assert!(cut["touches"]["count"].as_u64().unwrap() > 0);
        std::fs::write(&path, format!("{first}\n{rest}{rest}")).unwrap();
        let lines = rest.lines().count() + 2;
        assert!(told(&path).contains(&format!("no-trace: line {lines}: it comes after the end")));
    });
}

/// Has a process's memory filled from the image, and traced.
fn attach(
    source: &Source,
    faulter: &mut Faulter,
    regions: &[ForeignRegion],
    options: Options,
) -> (Session, TraceWriter, NamedTempFile) {
    let file = NamedTempFile::new().unwrap();
    let session = source.attach_regions(faulter, regions, traced(options));
    let writer = session.write_trace(file.reopen().unwrap()).unwrap();
    (session, writer, file)
}

#[test]
fn memory_that_processes_share_is_told_of_as_one() {
    within(WATCHDOG, || {
        let source = start();
        for record in [false, true] {
            let mut faulter = Faulter::start(ALL_EVENTS, &[&format!("shared:{PAGES}")]);
            let regions = [faulter.shared_region(0, "mem", 0, 1)];
            let options = Options::DEFAULT.record(record);
            let (session, writer, file) = attach(&source, &mut faulter, &regions, options);
            let mut child = faulter.fork();
            let at = |page| faulter.at(0, page);
            child.assert_reads(at(3), &source.bytes[3 * PAGE..4 * PAGE]);
            child.assert_reads(at(100), &source.bytes[100 * PAGE..101 * PAGE]);
            let (main, page) = (at(3), at(200));
            faulter.main.assert_reads(main, &source.bytes[3 * PAGE..4 * PAGE]);
            faulter.main.assert_reads(page, &source.bytes[200 * PAGE..201 * PAGE]);
            faulter.kill();
            assert!(session.close(MINUTE));
            writer.finish().unwrap();
            let report = report(&source, file.path());
            assert_eq!(
                (&report["touches"]["count"], &report["touches"]["unanswered"]),
                (&3.into(), &0.into())
            );
            let neighbours = if record { 0 } else { 3 * 15 };
            assert_eq!(
                (&report["pages"]["touched"], &report["pages"]["neighbours"]),
                (&3.into(), &neighbours.into()),
                "{report}"
            );
        }
    });
}

#[test]
fn a_huge_page_for_which_there_was_none_free_is_told_of_when_it_comes() {
    if !is_root() {
        return skip(
            "trace::a_huge_page_for_which_there_was_none_free_is_told_of_when_it_comes",
            "the pool of huge pages is root's",
        );
    }
    let pool = HugePool::with_free(2);
    within(WATCHDOG, move || {
        let source = start();
        let mut faulter = Faulter::start(ALL_EVENTS, &["huge:1024"]);
        let regions = [faulter.huge_region(0, "mem", 0, Sharing::Private)];
        let (session, writer, file) = attach(&source, &mut faulter, &regions, Options::DEFAULT);
        faulter.assert_reads(0, 9, &source.bytes[9 * PAGE..10 * PAGE]);
        pool.set_free(0);
        let page = faulter.at(0, 600);
        faulter.main.tell(&format!("read {page} 1"));
        let before = session.progress().faults;
        wait_until("it has touched it again and again", || session.progress().faults > before + 5);
        pool.set_free(1);
        faulter.main.assert_answers(page, &source.bytes[600 * PAGE..601 * PAGE]);
        faulter.kill();
        assert!(session.close(MINUTE));
        writer.finish().unwrap();
        assert_eq!(came(&read(file.path())).len(), 1024);
        assert_eq!(report(&source, file.path())["touches"]["unanswered"], 0);
    });
}
