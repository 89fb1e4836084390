//! Requests that mean harm: the server refuses them by name, stores nothing of them, and goes on.

use postcopy::proto::digest::Digest;
use postcopy::proto::v1::fetch_chunks_response::Answer;
use postcopy::proto::v1::{self, chunk_answer, commit_request};
use postcopy_tests::cli::{fail, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, digest};
use postcopy_tests::uploads::{begin, data, frame_of, pack_of, upload, upload_whole};
use prost::Message;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use tonic::{Code, Status};

const CHUNK: usize = 64 << 10;

/// A server, a connection, an image of two chunks, and what the store holds.
struct Target {
    server: Server,
    rpc: Rpc,
    store: StoreDir,
    image: Digest,
    bytes: Vec<u8>,
}

impl Target {
    fn new() -> Self {
        let server = Server::start();
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("mem");
        let bytes = noise(2 * CHUNK, 36);
        fs::write(&path, &bytes).expect("a file can be written");
        let pushed = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app")]);
        let (rpc, store) = (Rpc::connect(server.address()), StoreDir::of(&server));
        Self { server, rpc, store, image: digest(&pushed["image"]), bytes }
    }

    /// Runs `attack`, which the server must refuse with this code and a text that names the thing.
    /// Nothing of it may be stored.
    fn refused<T: std::fmt::Debug>(
        &self,
        code: Code,
        named: &str,
        attack: impl FnOnce(&Rpc) -> Result<T, Status>,
    ) {
        let before = self.stored();
        let status = attack(&self.rpc).expect_err("it must be refused");
        assert_eq!(status.code(), code, "{named}: {status:?}");
        assert!(status.message().contains(named), "{named:?} is not in {:?}", status.message());
        assert!(status.message().len() < 500, "a short message: {}", status.message());
        assert_eq!(self.stored(), before, "{named}: something was stored");
    }

    /// All files but the lease of the one image that is there.
    fn stored(&self) -> std::collections::BTreeSet<PathBuf> {
        let lease = self.store.domain().join("leases").join(self.image.hex());
        self.store.files("").into_iter().filter(|path| *path != lease).collect()
    }

    fn assert_goes_on(mut self) {
        assert!(self.rpc.read_file("app", "mem").expect("it is served") == self.bytes);
        self.store.assert_sound();
        assert_eq!(self.server.stop().code(), Some(0));
    }
}

fn long() -> String {
    "a".repeat(10_000)
}

#[test]
fn hostile_references_and_paths_are_refused_by_name() {
    let target = Target::new();
    let invalid = Code::InvalidArgument;
    for bad in ["../x", "a\0b", "", "/etc/passwd", "a/../b", "_tags", "a:..", "a:", &long()] {
        let reference = || bad.to_owned();
        let shown = if bad.len() > 100 { "aaaa" } else { &format!("{bad:?}") };
        target.refused(invalid, shown, |rpc| {
            rpc.wait(rpc.images().get_image(v1::GetImageRequest { reference: reference() }))
        });
        target.refused(invalid, shown, |rpc| {
            rpc.wait(rpc.images().delete_image(v1::DeleteImageRequest { reference: reference() }))
        });
        for (source, target_name) in [(reference(), "b".to_owned()), ("app".to_owned(), reference())] {
            target.refused(invalid, shown, |rpc| {
                let request = v1::TagImageRequest { source, target: target_name };
                rpc.wait(rpc.images().tag_image(request))
            });
        }
        target.refused(invalid, shown, |rpc| {
            let request = v1::OpenImageRequest { reference: reference(), ..Default::default() };
            rpc.wait(rpc.pages().open_image(request))
        });
        target.refused(invalid, shown, |rpc| rpc.read_file(bad, "mem"));
        target.refused(invalid, shown, |rpc| commit(rpc, bad, &root(|_| {}).encode_to_vec()));
        if !bad.is_empty() {
            target.refused(invalid, "page_token", |rpc| {
                let request = v1::ListImagesRequest { page_token: reference(), ..Default::default() };
                rpc.wait(rpc.images().list_images(request))
            });
        }
    }
    let fixed = format!("app@{}", target.image);
    target.refused(invalid, "tag", |rpc| {
        rpc.wait(rpc.images().delete_image(v1::DeleteImageRequest { reference: fixed.clone() }))
    });
    target.refused(invalid, "app@blake3:00", |rpc| rpc.read_file("app@blake3:00", "mem"));
    target.refused(Code::NotFound, "other:latest", |rpc| rpc.read_file("other", "mem"));

    for bad in ["../x", "../../../../etc/passwd", "/etc/passwd", "me\0m", "", "mem/", "./mem", &long()] {
        let shown = if bad.len() > 100 { "aaaa" } else { &format!("{bad:?}") };
        target.refused(Code::NotFound, shown, |rpc| rpc.read_file("app", bad));
        target.refused(Code::NotFound, shown, |rpc| {
            let first_paths = vec![bad.as_bytes().to_vec().into()];
            let request = v1::OpenImageRequest {
                reference: "app".into(),
                first_paths,
                all_segments: true,
                ..Default::default()
            };
            rpc.wait(rpc.pages().open_image(request))
        });
    }
    let size = target.bytes.len() as u64;
    for (offset, length) in
        [(size + 1, None), (0, Some(size + 1)), (size, Some(1)), (u64::MAX, Some(2)), (2, Some(u64::MAX))]
    {
        target.refused(Code::OutOfRange, &format!("{size} bytes"), |rpc| {
            rpc.read_range("app", "mem", offset, length)
        });
    }
    target.assert_goes_on();
}

#[test]
fn hostile_chunk_requests_are_refused_by_name() {
    let target = Target::new();
    let image: bytes::Bytes = target.image.into();
    let run = |first, count| vec![v1::ChunkRun { first, count }];
    let request = |image: &bytes::Bytes, runs| v1::FetchChunksRequest {
        image: image.clone(),
        runs,
        ..Default::default()
    };
    let fetch = |requests: Vec<v1::FetchChunksRequest>| {
        move |rpc: &Rpc| {
            let (answers, end) = rpc.fetch(requests);
            end.map(|()| answers)
        }
    };
    let invalid = Code::InvalidArgument;
    let none = bytes::Bytes::new();
    target.refused(invalid, "image", fetch(vec![v1::FetchChunksRequest::default()]));
    target.refused(invalid, "image", fetch(vec![request(&none, run(0, 1))]));
    for len in [1, 31, 33, 64] {
        let wrong = bytes::Bytes::from(vec![1; len]);
        target.refused(invalid, "image", fetch(vec![request(&wrong, run(0, 1))]));
        target.refused(invalid, "image", fetch(vec![request(&image, vec![]), request(&wrong, run(0, 1))]));
    }
    let unknown: bytes::Bytes = Digest::of(b"no image").into();
    target.refused(Code::NotFound, &Digest::of(b"no image").hex(), fetch(vec![request(&unknown, run(0, 1))]));
    target.refused(invalid, "another", fetch(vec![request(&image, run(0, 1)), request(&unknown, run(0, 1))]));
    for runs in [
        run(0, 0),
        run(0, 1025),
        run(0, u32::MAX),
        [run(0, 1024), run(0, 1)].concat(),
        [run(0, u32::MAX), run(0, u32::MAX)].concat(),
        run(u64::MAX, 2),
        run(u64::MAX, u32::MAX),
    ] {
        target.refused(invalid, "run", fetch(vec![request(&image, runs.clone())]));
        target.refused(invalid, "run", fetch(vec![request(&image, run(0, 1)), request(&image, runs)]));
    }
    let many = (0..100_000).map(|_| v1::ChunkRun { first: 0, count: 1 }).collect::<Vec<_>>();
    target.refused(invalid, "run", fetch(vec![request(&image, many)]));

    // A run that is out of range is an error of its own answer, and the others are served.
    let runs = [run(2, 1), run(1, 1), run(u64::MAX, 1), run(1 << 40, 1)].concat();
    let (answers, end) = target.rpc.fetch(vec![request(&image, runs.clone())]);
    end.unwrap();
    let mut answers = answers
        .into_iter()
        .map(|answer| match answer.answer {
            Some(Answer::Chunk(chunk)) => chunk,
            other => panic!("no chunk: {other:?}"),
        })
        .collect::<Vec<_>>();
    answers.sort_by_key(|answer| answer.chunk);
    let numbers: Vec<_> = answers.iter().map(|answer| answer.chunk).collect();
    assert_eq!(numbers, [1, 2, 1 << 40, u64::MAX]);
    for answer in &answers[1..] {
        let Some(chunk_answer::Result::Error(error)) = &answer.result else { panic!("{answer:?}") };
        assert_eq!(error.code(), v1::ErrorCode::OutOfRange);
        assert!(error.message.contains(&answer.chunk.to_string()), "{error:?}");
    }
    assert!(matches!(answers[0].result, Some(chunk_answer::Result::Frame(_))));
    let segment = v1::FetchChunksRequest { segment: Some(u32::MAX), ..request(&image, vec![]) };
    let (answers, end) = target.rpc.fetch(vec![segment]);
    end.unwrap();
    let Some(Answer::Segment(v1::SegmentAnswer {
        index: u32::MAX,
        result: Some(v1::segment_answer::Result::Error(error)),
    })) = &answers[0].answer
    else {
        panic!("{answers:?}");
    };
    assert_eq!(error.code(), v1::ErrorCode::OutOfRange);

    let stream = |requests: Vec<v1::StreamChunksRequest>| {
        move |rpc: &Rpc| {
            rpc.wait(async {
                let mut stream = rpc.pages().stream_chunks(tokio_stream::iter(requests)).await?.into_inner();
                let mut chunks = 0;
                while let Some(message) = stream.message().await? {
                    chunks += message.chunks.len();
                }
                Ok::<_, Status>(chunks)
            })
        }
    };
    let bulk = |image: &bytes::Bytes, runs| v1::StreamChunksRequest {
        image: image.clone(),
        runs,
        ..Default::default()
    };
    target.refused(invalid, "image", stream(vec![v1::StreamChunksRequest::default()]));
    target.refused(invalid, "another", stream(vec![bulk(&image, run(0, 1)), bulk(&unknown, run(0, 1))]));
    for runs in [run(0, 0), run(0, 16_385), [run(0, 16_384), run(0, 1)].concat(), run(u64::MAX, 2)] {
        target.refused(invalid, "run", stream(vec![bulk(&image, runs)]));
    }
    assert_eq!(stream(vec![bulk(&image, [run(2, 1), run(0, 2)].concat())])(&target.rpc).unwrap(), 3);

    for len in [1, 31, 33] {
        target.refused(invalid, "chunk_digests", |rpc| {
            let request = v1::FindMissingRequest { chunk_digests: vec![0; len].into() };
            rpc.wait(rpc.images().find_missing(request))
        });
    }
    target.refused(invalid, "65537", |rpc| {
        let request = v1::FindMissingRequest { chunk_digests: vec![0; 32 * 65_537].into() };
        rpc.wait(rpc.images().find_missing(request))
    });
    target.assert_goes_on();
}

#[test]
fn hostile_packs_are_refused_by_name() {
    let target = Target::new();
    let invalid = Code::InvalidArgument;
    let (one, two) = (noise(CHUNK, 37), memory_like(CHUNK, 38));
    let good = pack_of(&[(Digest::of(&one), frame_of(&one)), (Digest::of(&two), frame_of(&two))]);
    let wrong = Digest::of(b"another pack");
    let (digest, len) = (Digest::of(&good), good.len());
    target.refused(invalid, &digest.hex(), |rpc| upload(rpc, vec![begin(wrong, len), data(good.clone())]));
    for size in [0, 1, len - 1] {
        target.refused(invalid, "more than the announced", |rpc| {
            upload(rpc, vec![begin(digest, size), data(good.clone())])
        });
    }
    target.refused(invalid, "were announced", |rpc| {
        upload(rpc, vec![begin(digest, len + 1), data(good.clone())])
    });
    target.refused(invalid, "size_bytes", |rpc| {
        upload(rpc, vec![begin(digest, (64 << 20) + 1), data(good.clone())])
    });
    target.refused(invalid, "size_bytes", |rpc| {
        upload(rpc, vec![begin(digest, usize::MAX), data(good.clone())])
    });
    for len in [0, 31, 33] {
        target.refused(invalid, "digest", |rpc| {
            upload(rpc, vec![begin(vec![1; len], 100), data(vec![1; 100])])
        });
    }
    target.refused(invalid, "begin", |rpc| upload(rpc, vec![]));
    target.refused(invalid, "begin", |rpc| upload(rpc, vec![None]));
    target.refused(invalid, "begin", |rpc| upload(rpc, vec![data(good.clone())]));
    target.refused(invalid, "begin", |rpc| {
        upload(rpc, vec![begin(digest, len), begin(digest, len), data(good.clone())])
    });
    target.refused(invalid, "0 bytes came", |rpc| upload(rpc, vec![begin(digest, len)]));
    target.refused(invalid, "begin", |rpc| upload(rpc, vec![begin(digest, len), None, data(good.clone())]));

    for garbage in
        [vec![], vec![0; 79], noise(5000, 39), good[..len - 1].to_vec(), [&good[..], &[0]].concat()]
    {
        target.refused(invalid, &Digest::of(&garbage).hex(), |rpc| upload_whole(rpc, &garbage));
    }
    let mut newer = good.clone();
    newer[8] = 2;
    target.refused(invalid, "format 2", |rpc| upload_whole(rpc, &newer));
    let mut huge = frame_of(&one);
    huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut bomb = frame_of(&[1; 4096]);
    let coded = zstd::bulk::compress(&vec![7; 1 << 20], 19).unwrap();
    bomb.truncate(20);
    bomb[12..16].copy_from_slice(&u32::try_from(coded.len()).unwrap().to_le_bytes());
    bomb.extend_from_slice(&coded);
    let mut flipped = frame_of(&two);
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xff;
    for frame in [huge, bomb, flipped, frame_of(&two), noise(200, 40), vec![0; 16]] {
        let claimed = Digest::of(&one);
        // A good frame beside it does not carry it in.
        let pack = pack_of(&[(claimed, frame), (Digest::of(&two), frame_of(&two))]);
        target.refused(invalid, &claimed.hex(), |rpc| upload_whole(rpc, &pack));
    }
    let held_zeros = {
        let mut frame = frame_of(&[1; 4096]);
        frame.truncate(20);
        frame[0] = 0;
        frame[12..16].copy_from_slice(&4096u32.to_le_bytes());
        frame.extend_from_slice(&[0; 4096]);
        frame
    };
    let zeros = Digest::of(&[0; 4096]);
    target.refused(invalid, &zeros.hex(), |rpc| upload_whole(rpc, &pack_of(&[(zeros, held_zeros)])));
    target.refused(Code::OutOfRange, "", |rpc| upload(rpc, vec![begin(digest, len), data(vec![0; 5 << 20])]));

    upload_whole(&target.rpc, &good).unwrap();
    assert!(target.store.packs().iter().any(|pack| pack.ends_with(digest.hex())), "the good one is taken");
    upload_whole(&target.rpc, &good).unwrap();
    target.assert_goes_on();
}

fn root(change: impl FnOnce(&mut v1::Root)) -> v1::Root {
    let file = v1::File { size_bytes: 5000, executable: false };
    let mut root = v1::Root {
        format: 1,
        chunk_size_bytes: 4096,
        entries: vec![v1::Entry { path: "f".into(), kind: Some(v1::entry::Kind::File(file)) }],
        segment_digests: Digest::of(b"no segment").into(),
    };
    change(&mut root);
    root
}

fn commit(rpc: &Rpc, reference: &str, root: &[u8]) -> Result<v1::commit_response::Outcome, Status> {
    commit_parts(rpc, reference, root.len(), vec![Some(commit_request::Part::RootPart(root.to_vec().into()))])
}

fn commit_parts(
    rpc: &Rpc,
    reference: &str,
    root_bytes: usize,
    parts: Vec<Option<commit_request::Part>>,
) -> Result<v1::commit_response::Outcome, Status> {
    let begin = v1::CommitBegin {
        reference: reference.to_owned(),
        root_bytes: root_bytes as u64,
        labels: Vec::new(),
    };
    let parts = [Some(commit_request::Part::Begin(begin))].into_iter().chain(parts);
    let requests: Vec<_> = parts.map(|part| v1::CommitRequest { part }).collect();
    let response = rpc.wait(rpc.images().commit(tokio_stream::iter(requests)))?;
    Ok(response.into_inner().outcome.expect("an outcome"))
}

#[test]
fn hostile_commits_are_refused_by_name() {
    use v1::commit_response::Outcome;
    let target = Target::new();
    let invalid = Code::InvalidArgument;
    let long_path = "d/".repeat(3000) + "f";
    for (path, named) in [
        ("../x", "../x"),
        ("a/../../x", "`..`"),
        ("/etc/passwd", "/etc/passwd"),
        ("a\0b", "NUL"),
        ("", "empty"),
        ("a//b", "empty part"),
        (&long_path, "longer"),
    ] {
        let hostile = root(|root| root.entries[0].path = path.as_bytes().to_vec().into());
        target.refused(invalid, named, |rpc| commit(rpc, "evil", &hostile.encode_to_vec()));
    }
    type Change = fn(&mut v1::Root);
    let changes: [(Change, &str); 11] = [
        (|r| r.format = 2, "format 2"),
        (|r| r.chunk_size_bytes = 5000, "chunk size 5000"),
        (|r| r.chunk_size_bytes = 0, "chunk size 0"),
        (|r| r.segment_digests = bytes::Bytes::new(), "segments"),
        (|r| r.segment_digests = vec![1; 31].into(), "31"),
        (|r| r.segment_digests = vec![1; 64].into(), "segments"),
        (|r| r.entries.push(r.entries[0].clone()), "ascending"),
        (|r| r.entries[0].kind = None, "(f)"),
        (
            |r| {
                r.entries[0].kind =
                    Some(v1::entry::Kind::File(v1::File { size_bytes: u64::MAX, executable: false }))
            },
            "2^63",
        ),
        (
            |r| {
                r.entries[0].kind =
                    Some(v1::entry::Kind::File(v1::File { size_bytes: 1 << 40, executable: false }))
            },
            "segments",
        ),
        (
            |r| {
                r.entries[0].kind =
                    Some(v1::entry::Kind::SymbolicLink(v1::SymbolicLink { target: "a\0".into() }))
            },
            "(f)",
        ),
    ];
    for (change, named) in changes {
        target.refused(invalid, named, |rpc| commit(rpc, "evil", &root(change).encode_to_vec()));
    }
    let good = root(|_| {}).encode_to_vec();
    target.refused(invalid, "canonical", |rpc| commit(rpc, "evil", &[&good[..], &[0x50, 1]].concat()));
    target.refused(invalid, "root", |rpc| commit(rpc, "evil", &noise(300, 41)));
    target.refused(invalid, "were announced", |rpc| {
        commit_parts(
            rpc,
            "evil",
            good.len() + 1,
            vec![Some(commit_request::Part::RootPart(good.clone().into()))],
        )
    });
    target.refused(invalid, "more than the announced", |rpc| {
        commit_parts(rpc, "evil", 3, vec![Some(commit_request::Part::RootPart(good.clone().into()))])
    });
    target.refused(invalid, "root_bytes", |rpc| commit_parts(rpc, "evil", usize::MAX, vec![]));
    target.refused(invalid, "begin", |rpc| commit_parts(rpc, "evil", good.len(), vec![None]));
    target.refused(invalid, "begin", |rpc| rpc.wait(rpc.images().commit(tokio_stream::empty())));

    let before = target.store.files("");
    let Outcome::Missing(missing) = commit(&target.rpc, "evil", &good).unwrap() else { panic!("committed") };
    assert_eq!(missing.segment_digests[..], Digest::of(b"no segment").as_bytes()[..]);
    assert_eq!(target.store.files(""), before, "a commit that lacks something stores nothing");

    // Segments that are stored but do not fit the root: too few chunks, and chunks that the store
    // lacks.
    let store_segment = |digests: &[Digest]| -> Digest {
        let kind = Some(v1::segment_run::Kind::ChunkDigests(Digest::concat(digests)));
        let segment = v1::Segment { runs: vec![v1::SegmentRun { kind }] }.encode_to_vec();
        let request = v1::UploadSegmentRequest { segment: segment.into() };
        let answer = target.rpc.wait(target.rpc.images().upload_segment(request)).unwrap().into_inner();
        Digest::try_from(&answer.digest[..]).unwrap()
    };
    let one = Digest::of(b"chunk one");
    let short = store_segment(&[one]);
    let unfit = root(|root| root.segment_digests = short.into()).encode_to_vec();
    target.refused(invalid, &short.hex(), |rpc| commit(rpc, "evil", &unfit));
    let two = store_segment(&[one, Digest::of(b"chunk two")]);
    let lacking = root(|root| root.segment_digests = two.into()).encode_to_vec();
    let Outcome::Missing(missing) = commit(&target.rpc, "evil", &lacking).unwrap() else {
        panic!("committed")
    };
    assert_eq!(missing.chunk_digests.len(), 64, "both chunks are missing");
    // Chunks of another length than the manifest says. The store has such a digest, and must not
    // serve it short.
    for segment in [vec![], vec![0; 5000], noise(700_000, 42)] {
        target.refused(invalid, "segment", |rpc| {
            let request = v1::UploadSegmentRequest { segment: segment.clone().into() };
            rpc.wait(rpc.images().upload_segment(request))
        });
    }
    assert!(!target.store.reference("evil", "latest").exists());
    target.assert_goes_on();
}

/// A manifest may name a chunk that is there, but of another length than the manifest gives it.
#[test]
fn a_manifest_that_lies_about_a_chunk_s_length_gets_an_error_and_no_bytes() {
    let target = Target::new();
    let chunks = [Digest::of(&target.bytes[..CHUNK]), Digest::of(&target.bytes[CHUNK..])];
    let kind = Some(v1::segment_run::Kind::ChunkDigests(Digest::concat(&chunks)));
    let segment = v1::Segment { runs: vec![v1::SegmentRun { kind }] }.encode_to_vec();
    let request = v1::UploadSegmentRequest { segment: segment.into() };
    let answer = target.rpc.wait(target.rpc.images().upload_segment(request)).unwrap().into_inner();
    let lying = root(|root| root.segment_digests = answer.digest.clone()).encode_to_vec();
    match commit(&target.rpc, "evil", &lying) {
        Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status:?}"),
        Ok(_) => {
            let status = target.rpc.read_file("evil", "f").expect_err("no bytes fit that manifest");
            assert!(status.message().contains(&chunks[0].hex()), "{status:?}");
            let text = fail(target.server.address(), ["verify", "evil"]);
            assert!(text.contains("65536") || text.contains(&chunks[0].hex()), "{text}");
        }
    }
    assert!(target.rpc.read_file("app", "mem").unwrap() == target.bytes);
}
