//! The recording of a session's restore: its first-touch order, from which the server makes a
//! working set.
//!
//! The pager notes each page at its first fault, and then installs that page alone, so that
//! accesses to its neighbours cause faults, too. Pages that a working set or a background fill
//! installs are noted as prefetched, because it stays unknown if the program would have accessed
//! them. A background task sends the notes: when the session asks for it, when there was no new
//! fault for a while (ever more rarely), and at the session's end.

use super::bit_set::AtomicBitSet;
use crate::background;
use crate::error::RecordingError;
use crate::memory::{PageState, Region};
use crate::outcome::Outcome;
use crate::remote::Image;
use crate::remote::ServerAddress;
use crate::remote::backoff::Backoff;
use crate::remote::{Remote, RemoteError, within};
use postcopy_proto::page::{PAGE_BYTES, to_usize};
use postcopy_proto::v1::{PageSpan, RecordRequest};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Time without a new fault after which the recording is sent.
const QUIET: Duration = Duration::from_secs(3);
/// The longest pause between two sendings.
const MOST_PAUSE: Duration = Duration::from_secs(300);
/// Interval at which the task checks if a sending is due.
const LOOK: Duration = Duration::from_millis(250);
/// The most spans of one message: each has at most 18 bytes.
const SPANS: usize = 65_536;

/// The most runs of pages that are sent as not seen. If there are more, each file has one run, from
/// the first to the last of its own.
const MOST_UNSEEN: usize = 1 << 20;
/// Time for which the last sending is retried.
const LAST_ATTEMPTS: Duration = Duration::from_secs(8);

/// The known accesses to a file's pages.
#[derive(Debug)]
struct Seen {
    touched: AtomicBitSet,
    brought: AtomicBitSet,
}

/// The recorder of a session, as the module describes it.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// The id of this restore, by which the server replaces its earlier recording.
    id: [u8; 16],
    /// The files by their index in the image; `None` for those that the session has not mapped.
    files: Box<[OnceLock<Seen>]>,
    /// Pages by file and number that were accessed since the recorder's task last took them. The
    /// lock is held to add one page or take all, never during an access to a region, because the
    /// pager waits for it.
    noted: Mutex<Vec<(u32, u32)>>,
    /// Number of pages that may still be noted. Later ones count as not seen, because no set is
    /// made of more.
    room: AtomicU32,
    /// Number of pages that were prefetched.
    brought: AtomicUsize,
    /// The progress of the sending. The lock is held for one look or change.
    sent: Mutex<Sent>,
}

/// The progress of the sending.
#[derive(Debug, Default)]
struct Sent {
    /// True once nothing more will be sent.
    has_ended: bool,
    /// The error of the last sending.
    error: Option<String>,
    /// Number of requests to send, and number of those that are done.
    asked: u64,
    answered: u64,
}

impl Recorder {
    /// Makes a recorder for a session of `image`. It notes at most `most` accessed pages.
    pub(crate) fn new(image: &Image, most: u32) -> Self {
        let files = image.files().iter().map(|_| OnceLock::new()).collect();
        Self {
            id: fastrand::u128(..).to_le_bytes(),
            files,
            noted: Mutex::default(),
            room: AtomicU32::new(most),
            brought: AtomicUsize::new(0),
            sent: Mutex::default(),
        }
    }

    /// Returns the known accesses to the pages of a region's file.
    fn seen(&self, image: &Image, region: &Region) -> &Seen {
        self.files[image.place_of(region.file())].get_or_init(|| {
            let pages = to_usize(region.file().size_bytes).div_ceil(PAGE_BYTES);
            Seen { touched: AtomicBitSet::new(pages), brought: AtomicBitSet::new(pages) }
        })
    }

    fn noted(&self) -> MutexGuard<'_, Vec<(u32, u32)>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes accesses to pages of a region.
    pub(crate) fn touched(&self, image: &Image, region: &Region, pages: Range<usize>) {
        let (place, seen) = (image.place_of(region.file()), self.seen(image, region));
        for page in region.file_pages(pages) {
            if seen.touched.is_set(page) {
                continue;
            }
            let take = |room: u32| room.checked_sub(1);
            if self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
                let is_new = seen.brought.set(page);
                self.brought.fetch_add(usize::from(is_new), Ordering::Relaxed);
            } else if seen.touched.set(page) {
                let short = |n: usize| u32::try_from(n).expect("files have at most 16 TiB");
                self.noted().push((short(place), short(page)));
            }
        }
    }

    /// Notes that pages of a region were prefetched. Pages with a noted access stay accessed.
    pub(crate) fn brought(&self, image: &Image, region: &Region, pages: Range<usize>) {
        let seen = self.seen(image, region);
        let new = region.file_pages(pages).filter(|page| seen.brought.set(*page)).count();
        self.brought.fetch_add(new, Ordering::Relaxed);
    }

    /// Adds regions of the session. Their resident pages count as prefetched, because the memory's
    /// previous owner installed them.
    pub(crate) fn has(&self, image: &Image, regions: impl Iterator<Item = Region>) {
        for region in regions {
            let region = &region;
            let _ = self.seen(image, region);
            let mut next = 0;
            while let Some(run) = region.next_run(next..region.pages(), &[PageState::Resident]) {
                next = run.end;
                self.brought(image, region, run);
            }
        }
    }

    /// Moves the accesses since the last call to the end of `order`.
    fn take_noted(&self, order: &mut Vec<(u32, u32)>) {
        let noted = std::mem::take(&mut *self.noted());
        order.extend(noted);
    }

    /// Returns the recording as messages. `order` has the accessed pages in first-touch order.
    fn messages(&self, image: &Image, order: &[(u32, u32)]) -> Vec<RecordRequest> {
        let (touched, mut unseen) = (spans(order.iter().copied()), Vec::new());
        let short = |n: usize| u32::try_from(n).expect("files have at most 16 TiB");
        for (place, (file, seen)) in image.files().iter().zip(&self.files).enumerate() {
            let pages = to_usize(file.size_bytes).div_ceil(PAGE_BYTES);
            let Some(seen) = seen.get() else {
                // Another process may have mapped the file, and that process's session reports its
                // pages.
                if pages > 0 {
                    let count = u32::try_from(pages).unwrap_or(u32::MAX);
                    unseen.push(PageSpan { file: short(place), first: 0, count });
                }
                continue;
            };
            let brought = seen.brought.ones().filter(|page| !seen.touched.is_set(*page));
            unseen.extend(spans(brought.map(|page| (short(place), short(page)))));
        }
        if unseen.len() > MOST_UNSEEN {
            unseen = by_file(unseen);
        }
        let first =
            RecordRequest { image: image.digest().into(), id: self.id.to_vec().into(), ..Default::default() };
        let touched = touched
            .chunks(SPANS)
            .map(|spans| RecordRequest { touched: spans.to_vec(), ..Default::default() });
        let unseen =
            unseen.chunks(SPANS).map(|spans| RecordRequest { unseen: spans.to_vec(), ..Default::default() });
        std::iter::once(first).chain(touched).chain(unseen).collect()
    }

    /// Sends the recording up to now.
    async fn send(&self, sender: &Sender, order: &[(u32, u32)]) -> Result<(), RemoteError> {
        let messages = self.messages(&sender.image, order);
        let address = &sender.address;
        let remote = Remote::connect(address.clone()).await?;
        let mut service = remote.working_sets();
        let sent = within(address, "recording", service.record(tokio_stream::iter(messages))).await?;
        sent.map_err(address.status("a recording")).map(drop)
    }

    /// Requests a sending of the accesses up to now. Returns the number of the request.
    pub(crate) fn ask(&self) -> u64 {
        let mut sent = self.sent();
        sent.asked += 1;
        sent.asked
    }

    /// Returns the result of request `number` once it is done, or once nothing more will be sent.
    pub(crate) fn answer(&self, number: u64) -> Option<Result<(), RecordingError>> {
        let sent = self.sent();
        let is_done = sent.has_ended || sent.answered >= number;
        is_done.then(|| sent.error.clone().map_or(Ok(()), |reason| Err(RecordingError::NotSent(reason))))
    }

    /// Returns the result of the last sending once nothing more will be sent.
    pub(crate) fn outcome(&self) -> Option<Result<(), RecordingError>> {
        let sent = self.sent();
        sent.has_ended
            .then(|| sent.error.clone().map_or(Ok(()), |reason| Err(RecordingError::NotSent(reason))))
    }
}

/// The times of sendings before the session's end: after [`QUIET`] without a new fault, and with a
/// pause that doubles each time. Each sending repeats the whole recording, and the server makes the
/// set anew.
#[derive(Debug)]
struct Sendings {
    /// Time of the last new fault.
    touched: Instant,
    /// The time before which nothing is sent.
    not_before: Instant,
    /// The pause after the next sending.
    pause: Duration,
}

impl Sendings {
    fn new(now: Instant) -> Self {
        Self { touched: now, not_before: now, pause: QUIET }
    }

    fn touched(&mut self, now: Instant) {
        self.touched = now;
    }

    fn is_due(&self, now: Instant) -> bool {
        now >= self.not_before && now.saturating_duration_since(self.touched) > QUIET
    }

    /// Notes an attempt to send, whether it succeeded or not.
    fn sent(&mut self, now: Instant) {
        self.not_before = now + self.pause;
        self.pause = (2 * self.pause).min(MOST_PAUSE);
    }
}

/// Joins consecutive pages into spans.
fn spans(pages: impl Iterator<Item = (u32, u32)>) -> Vec<PageSpan> {
    let mut spans: Vec<PageSpan> = Vec::new();
    for (file, page) in pages {
        match spans.last_mut() {
            Some(last) if last.file == file && last.first + last.count == page => last.count += 1,
            _ => spans.push(PageSpan { file, first: page, count: 1 }),
        }
    }
    spans
}

/// Returns one span for each file, from the first to the last of its own.
fn by_file(mut spans: Vec<PageSpan>) -> Vec<PageSpan> {
    spans.sort_unstable_by_key(|span| (span.file, span.first));
    spans.dedup_by(|next, last| {
        let is_one = next.file == last.file;
        if is_one {
            last.count = (last.first + last.count).max(next.first + next.count) - last.first;
        }
        is_one
    });
    spans
}

/// The values that the task needs to send a recording.
#[derive(Debug)]
pub(crate) struct Sender {
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) image: Arc<Image>,
    pub(crate) address: ServerAddress,
    pub(crate) outcome: Arc<Outcome>,
}

/// Starts the task that sends a session's recording.
///
/// # Errors
/// If the process cannot start the thread of the background tasks.
pub(crate) fn start(sender: Sender) -> io::Result<()> {
    background::spawn(async move { run(&sender).await })
}

async fn run(sender: &Sender) {
    let Sender { recorder, outcome, .. } = sender;
    let (mut order, mut sent, mut sendings) = (Vec::new(), (0, 0), Sendings::new(Instant::now()));
    let (mut ended_at, mut backoff): (Option<Instant>, _) = (None, Backoff::new());
    loop {
        if outcome.has_ended() {
            ended_at.get_or_insert_with(Instant::now);
        }
        // The request is read first, so that its sending includes all accesses before it.
        let asked = recorder.sent().asked;
        let before = order.len();
        recorder.take_noted(&mut order);
        if order.len() > before {
            sendings.touched(Instant::now());
        }
        // A prefetch since the last sending makes another one due: the server must not count those
        // pages as absent and not accessed.
        let known = (order.len(), recorder.brought.load(Ordering::Relaxed));
        let is_asked = asked > recorder.sent().answered;
        let is_due = ended_at.is_some() || is_asked || sendings.is_due(Instant::now());
        if is_due && !order.is_empty() && known != sent {
            let result = recorder.send(sender, &order).await;
            if result.is_ok() {
                sent = known;
            }
            recorder.sent().error = result.err().map(|error| error.to_string());
            sendings.sent(Instant::now());
        }
        if is_asked {
            recorder.sent().answered = asked;
            outcome.recording_has_changed();
        }
        if let Some(ended_at) = ended_at {
            if recorder.sent().error.is_none() || ended_at.elapsed() > LAST_ATTEMPTS {
                break;
            }
            tokio::time::sleep(backoff.pause()).await;
            continue;
        }
        // A wake-up that is too early costs one check more.
        let _ = tokio::time::timeout(LOOK, outcome.ended.notified()).await;
    }
    recorder.sent().has_ended = true;
    outcome.recording_has_changed();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{any_region, any_space};
    use postcopy_proto::manifest::{ChunkContent, ManifestBuilder};
    use postcopy_proto::page::ChunkSize;
    use postcopy_proto::path::ImagePath;

    const SPAN: fn(u32, u32, u32) -> PageSpan = |file, first, count| PageSpan { file, first, count };

    /// Makes an image of two files of 10 pages, and a region of the second one.
    fn image_and_region() -> (Image, Region) {
        let mut manifest = ManifestBuilder::new(ChunkSize::MIN);
        for path in [&b"a"[..], b"b"] {
            manifest.file(&ImagePath::try_from(path).unwrap(), 10 * PAGE_BYTES as u64, false);
            (0..10).for_each(|_| manifest.chunk(ChunkContent::Zero));
        }
        let image = Image::new(manifest.finish().unwrap().root);
        let region = any_region(&any_space(0), 0, image.files()[1], 0..10, PAGE_BYTES);
        (image, region)
    }

    #[test]
    fn of_files_without_memory_nothing_is_kept_and_nothing_said() {
        let (image, region) = image_and_region();
        let recorder = Recorder::new(&image, 1000);
        assert!(recorder.files.iter().all(|seen| seen.get().is_none()));
        recorder.touched(&image, &region, 3..4);
        recorder.touched(&image, &region, 3..4);
        recorder.brought(&image, &region, 2..5);
        recorder.touched(&image, &region, 9..10);
        assert!(recorder.files[0].get().is_none());
        let mut order = Vec::new();
        recorder.take_noted(&mut order);
        let messages = recorder.messages(&image, &order);
        assert_eq!(messages[1].touched, [SPAN(1, 3, 1), SPAN(1, 9, 1)]);
        assert_eq!(messages[2].unseen, [SPAN(0, 0, 10), SPAN(1, 2, 1), SPAN(1, 4, 1)]);
    }

    #[test]
    fn what_is_too_much_to_keep_counts_as_not_seen() {
        let (image, region) = image_and_region();
        let (recorder, mut order) = (Recorder::new(&image, 3), Vec::new());
        // Another access to a noted page takes no room.
        for page in [1, 1, 7, 3, 5, 6, 1] {
            recorder.touched(&image, &region, page..page + 1);
        }
        recorder.take_noted(&mut order);
        assert_eq!(order, [(1, 1), (1, 7), (1, 3)]);
        recorder.touched(&image, &region, 9..10);
        recorder.take_noted(&mut order);
        assert_eq!(order.len(), 3, "as long as the recording lives");
        let messages = recorder.messages(&image, &order);
        assert_eq!(messages[1].touched, [SPAN(1, 1, 1), SPAN(1, 7, 1), SPAN(1, 3, 1)]);
        assert_eq!(messages[2].unseen, [SPAN(0, 0, 10), SPAN(1, 5, 2), SPAN(1, 9, 1)]);
    }

    #[test]
    fn many_runs_of_a_file_are_told_as_one() {
        let unseen = (0..5).map(|number| SPAN(1, 2 * number, 1)).chain([SPAN(0, 3, 2)]).collect();
        assert_eq!(by_file(unseen), [SPAN(0, 3, 2), SPAN(1, 0, 9)]);
    }

    #[test]
    fn a_process_that_goes_on_touching_is_told_of_ever_more_rarely() {
        let start = Instant::now();
        let mut sendings = Sendings::new(start);
        let mut sent = Vec::new();
        // There is a new fault every 4 s for an hour.
        for second in 0..3600 {
            let now = start + Duration::from_secs(second);
            if second % 4 == 0 {
                sendings.touched(now - Duration::from_millis(500));
            } else if sendings.is_due(now) {
                sendings.sent(now);
                sent.push(second);
            }
        }
        let pauses: Vec<_> = sent.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(pauses[..8], [4, 8, 12, 24, 48, 96, 192, 300]);
        assert!(pauses[8..].iter().all(|pause| *pause == 300), "{pauses:?}");
        // It is never due while new faults occur.
        let now = start + Duration::from_secs(7200);
        sendings.touched(now);
        assert!(!sendings.is_due(now + QUIET));
    }

    #[test]
    fn neighbours_in_order_become_spans() {
        let pages = [(0, 5), (0, 6), (1, 7), (0, 7), (0, 8), (0, 3)];
        assert_eq!(spans(pages.into_iter()), [SPAN(0, 5, 2), SPAN(1, 7, 1), SPAN(0, 7, 2), SPAN(0, 3, 1)]);
    }
}
