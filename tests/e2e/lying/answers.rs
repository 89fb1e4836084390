//! Answers that were not asked for, that are left out, late, or given twice.

use super::chunks::chunk_lies;
use super::{CHUNK, CHUNKS, IMPATIENT, PATIENT, Truth, WATCHDOG, open};
use postcopy::LossPolicy;
use postcopy::proto::v1::chunk_answer::Result as Answer;
use postcopy::proto::v1::{self, ChunkAnswer};
use postcopy_tests::chaos::{Lane, Lies, within};
use postcopy_tests::fixtures::noise;
use postcopy_tests::uploads::frame_of;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

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

/// Under [`LossPolicy::Wait`], a fault waits while the server lies, and gets the right bytes once
/// the server sends them.
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

/// The server leaves out the first answer for one chunk on the bulk lane, and answers the second
/// request.
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
        assert!(chaos.asked().urgent().values().all(|count| *count == 1), "asked for twice");
        drop((region, session));

        let session = open(&chaos, PATIENT.fill(true));
        let region = session.map("mem").unwrap();
        let filled = session.wait_resident(Duration::from_secs(40));
        assert!(*region == truth.bytes[..], "a wrong byte");
        filled.unwrap();
    });
}
