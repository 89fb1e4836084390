//! A server that lies is refused by name, and nothing of what it says is installed.

use crate::map::push;
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::FrameEncoder;
use postcopy::proto::manifest::{ChunkContent, Manifest, ManifestBuilder, SEGMENT_CHUNKS};
use postcopy::proto::page::ChunkSize;
use postcopy::proto::path::ImagePath;
use postcopy::proto::v1::chunk_answer::Result as Answer;
use postcopy::proto::v1::open_image_response::Part;
use postcopy::proto::v1::{self, ChunkAnswer, SegmentAnswer, segment_answer};
use postcopy::{LossPolicy, Options, Session};
use postcopy_tests::chaos::{Chaos, Lane, Lies, within};
use postcopy_tests::cli::fail;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 24;
/// Longer than anything here takes, so that what ends a test is not the deadline.
const PATIENT: Options = Options::DEFAULT.fault_deadline(Duration::from_secs(60));
/// For answers that are none, so that the deadline has to decide.
const IMPATIENT: Options = PATIENT.fault_deadline(Duration::from_secs(1));
const WATCHDOG: Duration = Duration::from_secs(100);

/// An honest server that has the image `app` of one file, `mem`, without a zero chunk.
struct Truth {
    server: Server,
    bytes: Arc<Vec<u8>>,
    _folder: TempDir,
}

impl Truth {
    fn start() -> Self {
        let server = Server::start();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mem");
        let bytes = memory_like(CHUNKS * CHUNK, 9);
        std::fs::write(&path, &bytes).unwrap();
        push(&server, &path, "app", CHUNK);
        Self { server, bytes: Arc::new(bytes), _folder: folder }
    }

    fn told_with(&self, lies: Lies) -> Chaos {
        Chaos::start(self.server.address(), lies)
    }
}

fn open(chaos: &Chaos, options: Options) -> Session {
    Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap()
}

fn frame_of(bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    assert!(FrameEncoder::new(3).encode(bytes, &mut frame));
    frame
}

fn error(code: i32) -> Answer {
    Answer::Error(v1::Error { code, message: format!("made up, code {code}") })
}

type ChunkLie = Arc<dyn Fn(ChunkAnswer) -> ChunkAnswer + Send + Sync>;

/// What can be said instead of a chunk, by name.
fn chunk_lies(bytes: &Arc<Vec<u8>>) -> Vec<(&'static str, ChunkLie)> {
    let result = |result: Option<Answer>| -> ChunkLie {
        Arc::new(move |answer| ChunkAnswer { result: result.clone(), ..answer })
    };
    let frame = |bytes: &[u8]| result(Some(Answer::Frame(frame_of(bytes).into())));
    let cut = |len: fn(usize) -> usize| -> ChunkLie {
        Arc::new(move |mut answer| {
            if let Some(Answer::Frame(frame)) = &mut answer.result {
                frame.truncate(len(frame.len()));
            }
            answer
        })
    };
    let source = Arc::clone(bytes);
    let neighbour: ChunkLie = Arc::new(move |answer| {
        let at = usize::try_from(answer.chunk + 1).unwrap() % CHUNKS * CHUNK;
        ChunkAnswer { result: Some(Answer::Frame(frame_of(&source[at..at + CHUNK]).into())), ..answer }
    });
    let source = Arc::clone(bytes);
    let one_bit: ChunkLie = Arc::new(move |answer| {
        let at = usize::try_from(answer.chunk).unwrap() * CHUNK;
        let mut chunk = source[at..at + CHUNK].to_vec();
        chunk[CHUNK - 1] ^= 1;
        ChunkAnswer { result: Some(Answer::Frame(frame_of(&chunk).into())), ..answer }
    });
    let mut lies = vec![
        ("the frame of another content", frame(&noise(CHUNK, 1))),
        ("the frame of the chunk with one bit changed", one_bit),
        ("the frame of the next chunk", neighbour),
        ("the frame of half of a chunk", frame(&bytes[..CHUNK / 2])),
        ("the frame of two chunks", frame(&bytes[..2 * CHUNK])),
        ("zero", result(Some(Answer::Zero(v1::ZeroChunk {})))),
        ("a frame without its last byte", cut(|len| len - 1)),
        ("half of a frame", cut(|len| len / 2)),
        ("a piece of a frame's header", cut(|_| 10)),
        ("a frame of no bytes", cut(|_| 0)),
        ("garbage", result(Some(Answer::Frame(noise(CHUNK, 2).into())))),
        ("nothing", result(None)),
    ];
    lies.extend([1, 2, 3].map(|code| ("an error", result(Some(error(code))))));
    lies
}

/// Errors that may pass: asked again for as long as the deadline allows.
fn passing_errors() -> [(&'static str, ChunkLie); 4] {
    [0, 4, 99, -1].map(|code| {
        let lie: ChunkLie = Arc::new(move |answer| ChunkAnswer { result: Some(error(code)), ..answer });
        ("an error that may pass", lie)
    })
}

#[test]
fn an_error_that_may_pass_is_final_only_after_the_deadline() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in passing_errors() {
            let chaos = truth.told_with(Lies::default().chunk(move |_, answer| vec![lie(answer)]));
            let session = open(&chaos, IMPATIENT);
            let region = session.map("mem").unwrap();
            let lost = region.read_at(5 * CHUNK, &mut [0; 10]).expect_err(name).to_string();
            assert!(lost.contains("chunk 5 of image") && lost.contains("made up, code"), "{name}: {lost}");
            assert!(chaos.asked().demand()[&5] > 4, "{name}: {:?}", chaos.asked().demand());
        }
        let told = AtomicU64::new(0);
        let lies = Lies::default().chunk(move |_, answer| {
            let passed = told.fetch_add(1, Ordering::SeqCst) >= 6;
            vec![if passed { answer } else { ChunkAnswer { result: Some(error(4)), ..answer } }]
        });
        let chaos = truth.told_with(lies);
        let region = open(&chaos, PATIENT).map("mem").unwrap();
        assert!(region[..CHUNK] == truth.bytes[..CHUNK], "it has passed");
    });
}

/// What a server says of pages that nobody waits for: a file must not be written with zeros, or an old neighbour, in it.
#[test]
fn pull_and_verify_take_no_less_and_nothing_else_than_they_asked_for() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let first = Arc::new(Mutex::new(None));
        let again = Lies::default().chunk(move |_, answer| {
            let first = Arc::clone(&first);
            let mut first = first.lock().unwrap();
            vec![first.get_or_insert(answer).clone()]
        });
        let lies = [
            ("segments left out", "segment 0 is left out", Lies::default().segment(|_| Vec::new())),
            ("one chunk again and again", "has come before", again),
            ("chunks left out", "the stream has ended", Lies::default().chunk(|_, _| Vec::new())),
        ];
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("pulled");
        for (name, said, lies) in lies {
            let chaos = truth.told_with(lies);
            let stderr = fail(chaos.address(), ["pull".as_ref(), "app".as_ref(), target.as_os_str()]);
            assert!(stderr.contains(said) || stderr.contains("holds nothing"), "{name}: {stderr}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{name}: something is left");
            let stderr = fail(chaos.address(), ["verify", "app"]);
            assert!(stderr.contains(&chaos.address().to_string()), "{name}: {stderr}");
        }
    });
}

#[test]
fn a_wrong_chunk_on_the_demand_lane_is_refused_by_name() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in chunk_lies(&truth.bytes) {
            let chaos = truth.told_with(Lies::default().chunk(move |_, answer| vec![lie(answer)]));
            let server = chaos.address().to_string();
            let session = open(&chaos, PATIENT);
            let region = session.map("mem").unwrap();
            let lost = region.read_at(5 * CHUNK + 1, &mut [0; 10]).expect_err(name).to_string();
            assert!(lost.contains("chunk 5 of image") && lost.contains(&server), "{name}: {lost}");
            assert_eq!(region.resident_pages(), 0, "{name}: installed");
            assert_eq!(session.progress().poisoned_pages, (CHUNK / 4096) as u64, "{name}");
            assert_eq!(session.error().unwrap().to_string(), lost, "{name}");
            assert!(chaos.asked().demand()[&5] > 1, "{name}: asked for once only");
        }
    });
}

#[test]
fn a_wrong_chunk_on_the_bulk_lane_is_refused_by_name() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let mut unnamed = Vec::new();
        for (name, lie) in chunk_lies(&truth.bytes).into_iter().chain(passing_errors()) {
            let lies = Lies::default().chunk(move |lane, answer| {
                vec![if lane == Lane::Bulk && answer.chunk == 5 { lie(answer) } else { answer }]
            });
            let chaos = truth.told_with(lies);
            let server = chaos.address().to_string();
            let session = open(&chaos, PATIENT.fill(true));
            let region = session.map("mem").unwrap();
            let lost = session.wait_resident(Duration::from_secs(20)).expect_err(name).to_string();
            assert!(!region.is_resident(5 * CHUNK), "{name}: installed");
            assert_eq!(region.resident_pages(), (CHUNKS - 1) * CHUNK / 4096, "{name}: the others are right");
            // The demand lane tells the truth.
            assert!(*region == truth.bytes[..], "{name}: a wrong byte");
            assert!(lost.contains(&server), "{name}: {lost}");
            if !lost.contains("chunk 5 of image") {
                unnamed.push((name, lost));
            }
        }
        assert!(unnamed.is_empty(), "refused, but not by name: {unnamed:#?}");
    });
}

#[test]
fn bench_names_a_wrong_chunk() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in chunk_lies(&truth.bytes) {
            let lies = Lies::default()
                .chunk(move |_, answer| vec![if answer.chunk == 5 { lie(answer) } else { answer }]);
            let chaos = truth.told_with(lies);
            let stderr = fail(chaos.address(), ["bench", "app", "mem", "--no-eager"]);
            let server = chaos.address().to_string();
            assert!(stderr.contains("chunk 5 of image") && stderr.contains(&server), "{name}: {stderr}");
        }
    });
}

/// Answers that do not even say which chunk they are for.
#[test]
fn an_answer_for_another_chunk_is_none() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let lies = Lies::default().chunk(|_, answer| vec![ChunkAnswer { chunk: answer.chunk + 1, ..answer }]);
        let chaos = truth.told_with(lies);
        let session = open(&chaos, IMPATIENT);
        let region = session.map("mem").unwrap();
        let lost = region.read_at(5 * CHUNK, &mut [0; 10]).unwrap_err().to_string();
        assert!(lost.contains("chunk 5 of image") && lost.contains("no answer within 1s"), "{lost}");
        assert_eq!(region.resident_pages(), 0);

        let session = open(&chaos, PATIENT.fill(true));
        let region = session.map("mem").unwrap();
        let lost = session.wait_resident(Duration::from_secs(20)).unwrap_err().to_string();
        assert!(lost.contains(&chaos.address().to_string()), "{lost}");
        // The frames fit their chunks' digests no more than their numbers.
        assert_eq!(region.resident_pages(), 0);
    });
}

#[test]
fn a_server_that_never_stops_talking_does_not_stop_the_clock() {
    within(Duration::from_secs(30), || {
        let truth = Truth::start();
        let answer = ChunkAnswer { chunk: u64::MAX, result: Some(Answer::Zero(v1::ZeroChunk {})) };
        let chaos = truth.told_with(Lies::default().chunk(|_, _| Vec::new()).flood(answer));
        let session = open(&chaos, IMPATIENT);
        let region = session.map("mem").unwrap();
        let lost = region.read_at(0, &mut [0; 10]).unwrap_err().to_string();
        assert!(lost.contains("chunk 0 of image") && lost.contains("no answer within 1s"), "{lost}");
    });
}

#[test]
fn a_server_that_never_stops_answering_what_was_not_asked_does_not_hold_up_a_fill() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        // For the request 0, which there is none of.
        let answer = ChunkAnswer { chunk: 5, result: Some(Answer::Zero(v1::ZeroChunk {})) };
        let flood = v1::StreamChunksResponse { chunks: vec![answer], ..Default::default() };
        let fill = |instead| {
            let chaos = truth.told_with(Lies::default().bulk_flood(flood.clone(), instead));
            let session = open(&chaos, IMPATIENT.fill(true));
            let region = session.map("mem").unwrap();
            let outcome = session.wait_resident(Duration::from_secs(20));
            assert!(*region == truth.bytes[..]);
            outcome.map_err(|lost| lost.to_string())
        };
        assert_eq!(fill(false), Ok(()));
        let lost = fill(true).unwrap_err();
        assert!(lost.contains("bulk answer: none came within 1s"), "{lost}");
    });
}

/// Under [`LossPolicy::Wait`] a touch sleeps while the server lies, and sees the truth once it is told.
#[test]
fn a_touch_waits_until_the_truth_is_told() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let honest = Arc::new(AtomicBool::new(false));
        let turned = Arc::clone(&honest);
        let wrong = frame_of(&noise(CHUNK, 1));
        let lies = Lies::default().chunk(move |_, answer| {
            let result = Some(Answer::Frame(wrong.clone().into()));
            vec![if turned.load(Ordering::SeqCst) { answer } else { ChunkAnswer { result, ..answer } }]
        });
        let chaos = truth.told_with(lies);
        let session = open(&chaos, PATIENT.on_loss(LossPolicy::Wait));
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| region[3 * CHUNK..4 * CHUNK].to_vec());
            let reason = session.wait_error(Duration::from_secs(20)).unwrap();
            assert!(reason.contains("chunk 3 of image"), "{reason}");
            assert!(!toucher.is_finished(), "it saw something");
            assert_eq!(region.resident_pages(), 0);
            honest.store(true, Ordering::SeqCst);
            assert!(toucher.join().unwrap() == truth.bytes[3 * CHUNK..4 * CHUNK], "a wrong byte");
        });
    });
}

#[test]
fn a_lie_that_is_told_once_harms_nothing() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in chunk_lies(&truth.bytes) {
            let told = Mutex::new(HashSet::new());
            let lies = Lies::default().chunk(move |lane, answer| {
                let first = told.lock().unwrap().insert((lane == Lane::Bulk, answer.chunk));
                vec![if first { lie(answer) } else { answer }]
            });
            let chaos = truth.told_with(lies);
            let session = open(&chaos, PATIENT);
            let region = session.map("mem").unwrap();
            assert!(*region == truth.bytes[..], "{name}, by touch");
            assert_eq!(session.error(), None, "{name}");
            assert!(chaos.asked().demand().values().all(|count| *count == 2), "{name}: lies were told");
            drop((region, session));

            let session = open(&chaos, PATIENT.fill(true));
            let region = session.map("mem").unwrap();
            session.wait_resident(Duration::from_secs(20)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(*region == truth.bytes[..], "{name}, by the fill");
        }
    });
}

/// The answer for one chunk never comes on the bulk lane; the second time that it is asked for, it does.
#[test]
fn an_answer_that_is_left_out_does_not_stop_the_fill() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let left_out = AtomicBool::new(false);
        let lies = Lies::default().chunk(move |_, answer| {
            let leave_out = answer.chunk == 5 && !left_out.swap(true, Ordering::SeqCst);
            if leave_out { vec![] } else { vec![answer] }
        });
        let chaos = truth.told_with(lies);
        let session = open(&chaos, IMPATIENT.fill(true));
        let region = session.map("mem").unwrap();
        session.wait_resident(Duration::from_secs(20)).unwrap();
        assert!(*region == truth.bytes[..], "a wrong byte");
    });
}

#[test]
fn late_answers_in_another_order_and_twice_are_right() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let lies = Lies::default()
            .chunk(|_, answer| vec![answer.clone(), answer])
            .segment(|answer| vec![answer.clone(), answer])
            .late(Duration::from_millis(30), Duration::from_millis(30));
        let chaos = truth.told_with(lies);
        let session = open(&chaos, PATIENT);
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (region, bytes) = (&region, &truth.bytes);
                scope.spawn(move || {
                    for chunk in (0..CHUNKS).map(|chunk| (chunk * 5 + thread * 3) % CHUNKS) {
                        let at = chunk * CHUNK..(chunk + 1) * CHUNK;
                        assert!(region[at.clone()] == bytes[at], "chunk {chunk}");
                    }
                });
            }
        });
        assert!(chaos.asked().demand().values().all(|count| *count == 1), "asked for twice");
        drop((region, session));

        let session = open(&chaos, PATIENT.fill(true));
        let region = session.map("mem").unwrap();
        let filled = session.wait_resident(Duration::from_secs(40));
        assert!(*region == truth.bytes[..], "a wrong byte");
        filled.unwrap();
    });
}

/// A manifest of the same file with other contents.
fn other_manifest(seed: u32) -> Manifest {
    let mut builder = ManifestBuilder::new(ChunkSize::new(CHUNK as u64).unwrap());
    builder.file(&ImagePath::try_from(&b"mem"[..]).unwrap(), (CHUNKS * CHUNK) as u64, false);
    for chunk in 0..u32::try_from(CHUNKS).unwrap() {
        let bytes = (seed + chunk).to_le_bytes();
        builder.chunk(ChunkContent::Data(Digest::of(&bytes)));
    }
    builder.finish().unwrap()
}

type SegmentLie = Arc<dyn Fn(SegmentAnswer) -> SegmentAnswer + Send + Sync>;

fn segment_lies() -> Vec<(&'static str, SegmentLie)> {
    let result = |result: Option<segment_answer::Result>| -> SegmentLie {
        Arc::new(move |answer| SegmentAnswer { result: result.clone(), ..answer })
    };
    let bytes = |bytes: Vec<u8>| result(Some(segment_answer::Result::Segment(bytes.into())));
    let mut zeros = ManifestBuilder::new(ChunkSize::new(CHUNK as u64).unwrap());
    let path = ImagePath::try_from(&b"mem"[..]).unwrap();
    zeros.file(&path, u64::from(SEGMENT_CHUNKS) * CHUNK as u64, false);
    (0..SEGMENT_CHUNKS).for_each(|_| zeros.chunk(ChunkContent::Zero));
    let zeros = zeros.finish().unwrap();
    let short: SegmentLie = Arc::new(|mut answer| {
        if let Some(segment_answer::Result::Segment(bytes)) = &mut answer.result {
            bytes.truncate(bytes.len() - 1);
        }
        answer
    });
    let mut lies = vec![
        ("a segment of other chunks", bytes(other_manifest(1).segments[0].to_vec())),
        ("a segment of zeros", bytes(zeros.segments[0].to_vec())),
        ("a segment without its last byte", short),
        ("a segment of no bytes", bytes(Vec::new())),
        ("garbage", bytes(noise(700, 3))),
        ("nothing", result(None)),
    ];
    lies.extend([1, 2, 3].map(|code| {
        let error = v1::Error { code, message: format!("made up, code {code}") };
        ("an error", result(Some(segment_answer::Result::Error(error))))
    }));
    lies
}

#[test]
fn a_segment_that_cannot_be_had_at_the_moment_is_asked_for_until_the_deadline() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for code in [0, 4, 99, -1] {
            let told = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&told);
            let error = v1::Error { code, message: format!("made up, code {code}") };
            let lies = Lies::default().segment(move |answer| {
                counted.fetch_add(1, Ordering::SeqCst);
                vec![SegmentAnswer { result: Some(segment_answer::Result::Error(error.clone())), ..answer }]
            });
            let chaos = truth.told_with(lies);
            let region = open(&chaos, IMPATIENT).map("mem").unwrap();
            let lost = region.read_at(5 * CHUNK, &mut [0; 10]).unwrap_err().to_string();
            assert!(lost.contains("segment 0 of") && lost.contains("made up, code"), "{lost}");
            assert!(told.load(Ordering::SeqCst) > 4, "{}", told.load(Ordering::SeqCst));
        }
    });
}

#[test]
fn a_wrong_segment_is_refused_by_name() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in segment_lies() {
            let chaos = truth.told_with(Lies::default().segment(move |answer| vec![lie(answer)]));
            let server = chaos.address().to_string();
            for fill in [false, true] {
                let session = open(&chaos, PATIENT.fill(fill));
                let region = session.map("mem").unwrap();
                let lost = if fill {
                    session.wait_resident(Duration::from_secs(20)).expect_err(name).to_string()
                } else {
                    region.read_at(5 * CHUNK, &mut [0; 10]).expect_err(name).to_string()
                };
                assert!(lost.contains("segment 0 of") && lost.contains(&server), "{name}: {lost}");
                assert_eq!(region.resident_pages(), 0, "{name}: installed");
            }
            let stderr = fail(chaos.address(), ["bench", "app", "mem", "--no-eager"]);
            assert!(stderr.contains("segment 0 of") && stderr.contains(&server), "{name}: {stderr}");
        }
    });
}

#[test]
fn a_wrong_segment_that_is_sent_once_harms_nothing() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        for (name, lie) in segment_lies() {
            for fill in [false, true] {
                let lie = Arc::clone(&lie);
                let told = AtomicBool::new(false);
                let lies = Lies::default().segment(move |answer| {
                    vec![if told.swap(true, Ordering::SeqCst) { answer } else { lie(answer) }]
                });
                let chaos = truth.told_with(lies);
                let session = open(&chaos, PATIENT.fill(fill));
                let region = session.map("mem").unwrap();
                if fill {
                    let filled = session.wait_resident(Duration::from_secs(20));
                    filled.unwrap_or_else(|error| panic!("{name}: {error}"));
                }
                assert!(*region == truth.bytes[..], "{name}, fill {fill}");
                assert_eq!(session.error(), None, "{name}");
            }
        }
    });
}

/// The other image's root instead; `image` is what `opened` says of it.
fn root_lie(root: Manifest, image: Option<Digest>) -> Lies {
    Lies::default().part(move |part| match part {
        Part::Opened(opened) => {
            let image = image.map_or(opened.image, Into::into);
            vec![Part::Opened(v1::ImageOpened { image, root_bytes: root.root_bytes.len() as u64 })]
        }
        Part::RootPart(_) => vec![Part::RootPart(root.root_bytes.clone())],
        other @ Part::Segment(_) => vec![other],
    })
}

fn refused_root(chaos: &Chaos, reference: &str) -> String {
    let session = Session::open(chaos.address(), &reference.parse().unwrap(), PATIENT);
    let error = session.expect_err("a wrong root was taken").to_string();
    let server = chaos.address().to_string();
    assert!(error.contains(&server), "{error}");
    let stderr = fail(chaos.address(), ["bench", reference, "mem", "--no-eager"]);
    assert!(stderr.contains(&error), "{stderr}, not {error}");
    error
}

#[test]
fn a_wrong_root_is_refused_by_name() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let honest = truth.told_with(Lies::default());
        let image = open(&honest, PATIENT).image().digest();
        let fixed = format!("app@{image}");
        let other = other_manifest(7);

        // The digest that the reference stands for, and a root that does not fit it.
        let chaos = truth.told_with(root_lie(other.clone(), None));
        for reference in ["app", &fixed] {
            let error = refused_root(&chaos, reference);
            assert!(error.contains(&format!("root of {image}")), "{error}");
        }
        // A root that fits the digest it came with, but not the one that was asked for.
        let chaos = truth.told_with(root_lie(other.clone(), Some(other.root.image())));
        let error = refused_root(&chaos, &fixed);
        assert!(error.contains("wrong image") && error.contains(&image.to_string()), "{error}");
    });
}

#[test]
fn a_root_that_is_none_is_refused_by_name() {
    within(WATCHDOG, || {
        let truth = Truth::start();
        let opened = |image: Vec<u8>, root_bytes: u64| {
            Part::Opened(v1::ImageOpened { image: image.into(), root_bytes })
        };
        type PartLie = Box<dyn Fn(Part) -> Vec<Part> + Send + Sync>;
        let on_opened = |lie: Part| -> PartLie {
            Box::new(move |part| vec![if matches!(part, Part::Opened(_)) { lie.clone() } else { part }])
        };
        let on_root = |lie: fn(Vec<u8>) -> Vec<Part>| -> PartLie {
            Box::new(move |part| match part {
                Part::RootPart(root) => lie(root.to_vec()),
                other => vec![other],
            })
        };
        let lies: Vec<(&str, PartLie)> = vec![
            ("a digest of 31 bytes", on_opened(opened(vec![1; 31], 100))),
            ("a digest of no bytes", on_opened(opened(Vec::new(), 100))),
            ("a root longer than allowed", on_opened(opened(vec![1; 32], u64::MAX))),
            ("a root of 64 MiB that is not sent", on_opened(opened(vec![1; 32], 64 << 20))),
            ("a root of no bytes", on_opened(opened(vec![1; 32], 0))),
            (
                "no first part",
                Box::new(|part| if matches!(part, Part::Opened(_)) { vec![] } else { vec![part] }),
            ),
            ("no answer at all", Box::new(|_| vec![])),
            ("half of a root", on_root(|root| vec![Part::RootPart(root[..root.len() / 2].to_vec().into())])),
            ("a root without its parts", on_root(|_| vec![])),
            ("too much of a root", on_root(|root| vec![Part::RootPart([&root[..], &[0]].concat().into())])),
            ("garbage", on_root(|root| vec![Part::RootPart(noise(root.len(), 4).into())])),
        ];
        for (name, lie) in lies {
            let chaos = truth.told_with(Lies::default().part(lie));
            eprintln!("{name}: {}", refused_root(&chaos, "app"));
        }
    });
}
