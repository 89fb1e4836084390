//! What a session's restore touches, in order, for the server to make a working set of.
//!
//! The pager notes each page at its first touch, and then installs that page alone, so that a touch of its neighbours is
//! seen, too. What is brought without a touch (a working set, a background fill) is noted as such: nobody can say whether it would have
//! been touched. A background task sends what has been noted, when it is asked to, when nothing new was touched for a while, ever more
//! rarely, and at the session's end.

use crate::background;
use crate::bits::Bits;
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

/// How long nothing new must be touched before what there is is sent.
const QUIET: Duration = Duration::from_secs(3);
/// The longest time from one sending to the next one.
const MOST_PAUSE: Duration = Duration::from_secs(300);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Spans of one message: at most 18 bytes each.
const SPANS: usize = 65_536;

/// Runs of pages that are told as not seen. Where these are more, each file is told as not seen from the first to the last
/// of its own.
const MOST_UNSEEN: usize = 1 << 20;
/// How long the last sending is tried again.
const LAST_ATTEMPTS: Duration = Duration::from_secs(8);

/// What is known of a file's pages.
#[derive(Debug)]
struct Seen {
    touched: Bits,
    brought: Bits,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// This restore's, so that the server replaces what it was told before.
    id: [u8; 16],
    /// By the files' places in the image; None of those that the session has no memory of.
    files: Box<[OnceLock<Seen>]>,
    /// Pages by file and number, touched since the recorder's task has taken them last. Held for adding one and taking
    /// all of them, never over a touch of a region: the pager waits for it.
    noted: Mutex<Vec<(u32, u32)>>,
    /// How many pages may be noted still. Later ones count as not seen: a set of more is not made.
    room: AtomicU32,
    /// How many pages have been brought.
    brought: AtomicUsize,
    /// Held for a look or a change.
    sent: Mutex<Sent>,
}

/// How far sending is.
#[derive(Debug, Default)]
struct Sent {
    /// Nothing will be sent any more.
    has_ended: bool,
    /// Why it could not be done the last time.
    error: Option<String>,
    /// How often it was asked for, and which of that has been done.
    asked: u64,
    answered: u64,
}

impl Recorder {
    /// For a session that is filled from `image`.
    ///
    /// It notes at most so many touched pages.
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

    /// What is known of the pages of a region's file.
    fn seen(&self, image: &Image, region: &Region) -> &Seen {
        self.files[image.place_of(region.file())].get_or_init(|| {
            let pages = to_usize(region.file().size_bytes).div_ceil(PAGE_BYTES);
            Seen { touched: Bits::new(pages), brought: Bits::new(pages) }
        })
    }

    fn noted(&self) -> MutexGuard<'_, Vec<(u32, u32)>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of a region are touched.
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

    /// Pages of a region came without having been touched, if they have not been.
    pub(crate) fn brought(&self, image: &Image, region: &Region, pages: Range<usize>) {
        let seen = self.seen(image, region);
        let new = region.file_pages(pages).filter(|page| seen.brought.set(*page)).count();
        self.brought.fetch_add(new, Ordering::Relaxed);
    }

    /// The session has these regions now. What is there has been brought by who served the memory before.
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

    /// Adds what has been touched since the last time to `order`.
    fn take_noted(&self, order: &mut Vec<(u32, u32)>) {
        let noted = std::mem::take(&mut *self.noted());
        order.extend(noted);
    }

    /// What has been seen so far, as messages: these pages were touched, in this order.
    fn messages(&self, image: &Image, order: &[(u32, u32)]) -> Vec<RecordRequest> {
        let (touched, mut unseen) = (spans(order.iter().copied()), Vec::new());
        let short = |n: usize| u32::try_from(n).expect("files have at most 16 TiB");
        for (place, (file, seen)) in image.files().iter().zip(&self.files).enumerate() {
            let pages = to_usize(file.size_bytes).div_ceil(PAGE_BYTES);
            let Some(seen) = seen.get() else {
                // It may be another process's memory, whose session tells of it.
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

    /// Sends what has been touched so far.
    async fn send(&self, sender: &Sender, order: &[(u32, u32)]) -> Result<(), RemoteError> {
        let messages = self.messages(&sender.image, order);
        let address = &sender.address;
        let remote = Remote::connect(address.clone()).await?;
        let mut service = remote.working_sets();
        let sent = within(address, "recording", service.record(tokio_stream::iter(messages))).await?;
        sent.map_err(address.status("a recording")).map(drop)
    }

    /// What has been touched so far is to be sent now: the number of this request.
    pub(crate) fn ask(&self) -> u64 {
        let mut sent = self.sent();
        sent.asked += 1;
        sent.asked
    }

    /// Once that has been done, or nothing more is: whether all that was touched before has been sent.
    pub(crate) fn answer(&self, number: u64) -> Option<Result<(), String>> {
        let sent = self.sent();
        let is_done = sent.has_ended || sent.answered >= number;
        is_done.then(|| sent.error.clone().map_or(Ok(()), Err))
    }

    /// Once nothing more is to be sent: whether all that was touched has been.
    pub(crate) fn outcome(&self) -> Option<Result<(), String>> {
        let sent = self.sent();
        sent.has_ended.then(|| sent.error.clone().map_or(Ok(()), Err))
    }
}

/// When something is sent before the session's end: once nothing new was touched for [`QUIET`], and with a pause that doubles
/// each time, because all is sent again, and the server makes the set anew.
#[derive(Debug)]
struct Sendings {
    /// When something new was touched last.
    touched: Instant,
    /// Nothing is sent before.
    not_before: Instant,
    /// After the next one.
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

    /// It was tried, well or not.
    fn sent(&mut self, now: Instant) {
        self.not_before = now + self.pause;
        self.pause = (2 * self.pause).min(MOST_PAUSE);
    }
}

/// Puts neighbours that follow one another together.
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

/// One span for each file, from the first to the last of its own.
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

/// The values that the task needs that sends a recording.
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
/// If the process cannot start the thread of such tasks.
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
        // Looked at first: what was touched before is taken then.
        let asked = recorder.sent().asked;
        let before = order.len();
        recorder.take_noted(&mut order);
        if order.len() > before {
            sendings.touched(Instant::now());
        }
        // What has been brought since is not to count as absent and untouched.
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
        // Too early is a look more.
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

    /// An image of two files of 10 pages, and a region of the second one.
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
        // A page that is touched again takes no room.
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
        // Something new every 4 s, for an hour.
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
        // And never while it is touching.
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
