//! Chunks with other contents than the image's.

use super::{CHUNK, CHUNKS, IMPATIENT, PATIENT, Truth, WATCHDOG, open};
use postcopy::proto::v1::chunk_answer::Result as Answer;
use postcopy::proto::v1::{self, ChunkAnswer};
use postcopy_tests::chaos::{Lane, Lies, within};
use postcopy_tests::cli::fail;
use postcopy_tests::fixtures::noise;
use postcopy_tests::uploads::frame_of;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn error(code: i32) -> Answer {
    Answer::Error(v1::Error { code, message: format!("made up, code {code}") })
}

pub(super) type ChunkLie = Arc<dyn Fn(ChunkAnswer) -> ChunkAnswer + Send + Sync>;

/// Returns the answers that a server can give instead of a chunk, by name.
pub(super) fn chunk_lies(bytes: &Arc<Vec<u8>>) -> Vec<(&'static str, ChunkLie)> {
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

/// `pull` and `verify` have no waiter for a page. A wrong answer must still not put zeros or
/// another chunk into a file.
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
