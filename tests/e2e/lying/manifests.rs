//! Segments and roots of manifests with other contents than the image's.

use super::{CHUNK, CHUNKS, IMPATIENT, PATIENT, Truth, WATCHDOG, open};
use postcopy::Session;
use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::{ChunkContent, Manifest, ManifestBuilder, SEGMENT_CHUNKS};
use postcopy::proto::page::ChunkSize;
use postcopy::proto::path::ImagePath;
use postcopy::proto::v1::open_image_response::Part;
use postcopy::proto::v1::{self, SegmentAnswer, segment_answer};
use postcopy_tests::chaos::{Chaos, Lies, within};
use postcopy_tests::cli::fail;
use postcopy_tests::fixtures::noise;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

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
            vec![Part::Opened(v1::ImageOpened {
                image,
                root_bytes: root.root_bytes.len() as u64,
                provenance: None,
            })]
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
            Part::Opened(v1::ImageOpened { image: image.into(), root_bytes, provenance: None })
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
