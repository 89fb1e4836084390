//! Compares the encodings of example messages with `baseline/vectors.txt`, and decodes those bytes
//! again.
//!
//! A line of that file is a message's name and the hex digits of an example's encoding; `protoc
//! --decode` shows its values. A new field gets a new example: the lines that exist stay.

use bytes::Bytes;
use postcopy_proto::v1::*;
use prost::Message;
use protox::prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, Value};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The encoding of a message of a generated type.
struct Example {
    message: &'static str,
    encoded: Vec<u8>,
    /// Decodes bytes and compares the values.
    is_in: Comparison,
}

type Comparison = Box<dyn Fn(&[u8]) -> bool>;

fn example<M: Message + Default + PartialEq + 'static>(value: M) -> Example {
    Example {
        message: std::any::type_name::<M>().rsplit("::").next().expect("the last part of a path"),
        encoded: value.encode_to_vec(),
        is_in: Box::new(move |bytes| M::decode(bytes).is_ok_and(|decoded| decoded == value)),
    }
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

/// A digest, or several.
fn digests<const N: usize>(firsts: [u8; N]) -> Bytes {
    firsts.into_iter().flat_map(|first| (first..).take(32)).collect()
}

/// A number whose varint is as long as one can be: 10 bytes.
const LARGE: u64 = u64::MAX;
/// A number whose varint has two bytes.
const SOME: u32 = 300;

fn provenance() -> Provenance {
    let label = |key: &str, value: &str| Label { key: key.into(), value: value.into() };
    let labels = vec![label("arch", "x86_64"), label("team/owner", "")];
    Provenance { written_unix_ms: LARGE, previous: digests([4]), labels }
}

fn stored() -> Vec<Example> {
    let entry = |path, kind| Entry { path: bytes(path), kind: Some(kind) };
    let entries = vec![
        entry("bin/run", entry::Kind::File(File { size_bytes: LARGE, executable: true })),
        entry("empty", entry::Kind::EmptyDirectory(EmptyDirectory {})),
        entry("link", entry::Kind::SymbolicLink(SymbolicLink { target: bytes("bin/run") })),
        entry("none", entry::Kind::File(File { size_bytes: 0, executable: false })),
    ];
    let run = |kind| SegmentRun { kind: Some(kind) };
    let runs = vec![
        run(segment_run::Kind::ZeroChunks(16_384)),
        run(segment_run::Kind::ChunkDigests(digests([1, 2]))),
    ];
    vec![
        example(Root { format: 1, chunk_size_bytes: 4096, entries, segment_digests: digests([3]) }),
        example(Segment { runs }),
        example(StoredLease { images: digests([1]), objects: digests([2, 3]), seconds: 600 }),
        example(StoredDeletion { objects: digests([1]), seconds: 600 }),
        example(StoredReference { image: digests([1]), provenance: Some(provenance()) }),
    ]
}

fn page_service() -> Vec<Example> {
    let error = |code: ErrorCode| Error { code: code.into(), message: "chunk 7: é".into() };
    let part = |part| example(OpenImageResponse { part: Some(part) });
    let opened = |provenance| ImageOpened { image: digests([1]), root_bytes: LARGE, provenance };
    let segment = |result| SegmentAnswer { index: 2, result: Some(result) };
    let sent = || segment(segment_answer::Result::Segment(bytes("segment")));
    let lost = segment(segment_answer::Result::Error(error(ErrorCode::NotFound)));
    let chunk = |result| ChunkAnswer { chunk: LARGE, result: Some(result) };
    let chunks = || {
        vec![
            chunk(chunk_answer::Result::Frame(bytes("frame"))),
            chunk(chunk_answer::Result::Zero(ZeroChunk {})),
            chunk(chunk_answer::Result::Error(error(ErrorCode::DataLoss))),
            chunk(chunk_answer::Result::Error(error(ErrorCode::OutOfRange))),
            chunk(chunk_answer::Result::Error(error(ErrorCode::Internal))),
            ChunkAnswer { chunk: 0, result: None },
        ]
    };
    let runs = || vec![ChunkRun { first: LARGE, count: u32::MAX }, ChunkRun { first: 0, count: 1 }];
    let fetch = |class: RequestClass, segment| FetchChunksRequest {
        id: LARGE,
        attempt: SOME,
        class: class.into(),
        image: digests([1]),
        runs: runs(),
        segment,
    };
    let answer = |answer| example(FetchChunksResponse { id: LARGE, attempt: SOME, answer: Some(answer) });
    let read = |length_bytes| ReadFileRequest {
        reference: "app:v1".into(),
        path: bytes("bin/run"),
        offset_bytes: LARGE,
        length_bytes,
    };
    let mut examples = vec![
        example(OpenImageRequest {
            reference: "app:v1".into(),
            first_paths: vec![bytes("bin/run"), bytes("")],
            all_segments: true,
            more_segments_bytes: SOME,
        }),
        part(open_image_response::Part::Opened(opened(None))),
        part(open_image_response::Part::Opened(opened(Some(provenance())))),
        part(open_image_response::Part::RootPart(bytes("root"))),
        part(open_image_response::Part::Segment(sent())),
        part(open_image_response::Part::Segment(lost)),
        example(fetch(RequestClass::Unspecified, None)),
        example(fetch(RequestClass::Demand, None)),
        // Not the same as no segment.
        example(fetch(RequestClass::Prefetch, Some(0))),
        example(fetch(RequestClass::Background, Some(SOME))),
        answer(fetch_chunks_response::Answer::Segment(sent())),
        example(StreamChunksRequest {
            id: LARGE,
            attempt: SOME,
            image: digests([1]),
            runs: runs(),
            working_set: true,
        }),
        example(StreamChunksResponse {
            id: LARGE,
            attempt: SOME,
            chunks: chunks(),
            working_set_frames: vec![bytes("frame"), bytes("")],
            working_set_ended: true,
        }),
        example(read(None)),
        example(read(Some(0))),
        example(ReadFileResponse { data: bytes("data") }),
    ];
    examples.extend(chunks().into_iter().map(|chunk| answer(fetch_chunks_response::Answer::Chunk(chunk))));
    examples
}

fn image_service() -> Vec<Example> {
    let summary = |damage: &str| ImageSummary {
        reference: "app:v1".into(),
        image: digests([1]),
        size_bytes: LARGE,
        files: SOME,
        chunk_size_bytes: 4096,
        damage: damage.into(),
        provenance: None,
    };
    let pack = |part| example(UploadPackRequest { part: Some(part) });
    let commit = |part| example(CommitRequest { part: Some(part) });
    let begin = |labels| CommitBegin { reference: "app:v1".into(), root_bytes: LARGE, labels };
    let outcome = |outcome| example(CommitResponse { outcome: Some(outcome) });
    vec![
        example(ListImagesRequest { page_size: SOME, page_token: "token".into() }),
        example(ListImagesResponse {
            images: vec![summary(""), summary("its root is lost")],
            next_page_token: "token".into(),
        }),
        example(ListImagesResponse {
            images: vec![ImageSummary { provenance: Some(provenance()), ..summary("") }],
            next_page_token: String::new(),
        }),
        example(GetImageRequest { reference: "app:v1".into() }),
        example(GetImageResponse {
            image: Some(summary("")),
            chunks: LARGE,
            zero_chunks: 1,
            distinct_chunks: 2,
            stored_bytes: SOME.into(),
        }),
        example(FindMissingRequest { chunk_digests: digests([1, 2]) }),
        example(FindMissingResponse { missing_chunk_digests: digests([2]) }),
        pack(upload_pack_request::Part::Begin(UploadPackBegin { digest: digests([1]), size_bytes: LARGE })),
        pack(upload_pack_request::Part::Data(bytes("data"))),
        example(UploadPackResponse {}),
        example(PatchChunksRequest {
            patches: vec![
                ChunkPatch { base: digests([1]), patch: bytes("patch") },
                ChunkPatch { base: digests([2]), patch: bytes("") },
            ],
        }),
        example(PatchChunksResponse {
            chunks: vec![
                PatchedChunk { chunk: digests([3]), leaves: digests([4, 5]) },
                PatchedChunk { chunk: bytes(""), leaves: bytes("") },
            ],
        }),
        example(UploadSegmentRequest { segment: bytes("segment") }),
        example(UploadSegmentResponse { digest: digests([1]) }),
        commit(commit_request::Part::Begin(begin(vec![]))),
        commit(commit_request::Part::Begin(begin(provenance().labels))),
        commit(commit_request::Part::RootPart(bytes("root"))),
        outcome(commit_response::Outcome::Committed(Committed { image: digests([1]) })),
        outcome(commit_response::Outcome::Missing(Missing {
            segment_digests: digests([1]),
            chunk_digests: digests([2, 3]),
        })),
        example(TagImageRequest { source: "app:v1".into(), target: "app:stable".into() }),
        example(TagImageResponse { image: digests([1]) }),
        example(DeleteImageRequest { reference: "app:v1".into() }),
        example(DeleteImageResponse {}),
    ]
}

fn working_set_service() -> Vec<Example> {
    let spans = || {
        vec![
            PageSpan { file: u32::MAX, first: u32::MAX, count: u32::MAX },
            PageSpan { file: 0, first: 0, count: 1 },
        ]
    };
    let set = || WorkingSet {
        image: digests([1]),
        recordings: SOME,
        pages: LARGE,
        zero_pages: 1,
        frame_bytes: SOME.into(),
    };
    vec![
        example(RecordRequest {
            image: digests([1]),
            id: bytes("sixteen random b"),
            touched: spans(),
            unseen: spans(),
        }),
        example(set()),
        example(GetWorkingSetRequest { reference: "app:v1".into() }),
        example(GetWorkingSetResponse { working_set: Some(set()), pages: spans() }),
        example(ListWorkingSetsRequest {}),
        example(ListWorkingSetsResponse { working_sets: vec![set(), set()] }),
        example(DeleteWorkingSetRequest { reference: "app:v1".into() }),
        example(DeleteWorkingSetResponse {}),
    ]
}

fn peer_service() -> Vec<Example> {
    vec![
        example(ReadBlockRequest { pack: digests([1]), block: 255, server: bytes("sixteen random b") }),
        example(ReadBlockResponse { pack_bytes: LARGE, data: bytes("data") }),
    ]
}

fn mount_service() -> Vec<Example> {
    vec![
        example(GetMountRequest {}),
        example(GetMountResponse { directory: bytes("/mnt/images"), server: "unix:/run/p.sock".into() }),
        example(WarmRequest { reference: "app:v1".into(), fill: true }),
        example(WarmResponse { pages: LARGE }),
    ]
}

fn examples() -> Vec<Example> {
    [stored(), page_service(), image_service(), working_set_service(), peer_service(), mount_service()]
        .into_iter()
        .flatten()
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hex digits");
    (0..hex.len()).step_by(2).map(byte).collect()
}

#[test]
fn messages_encode_to_their_vectors_and_vectors_decode_to_their_messages() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("baseline/vectors.txt");
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let examples = examples();
    let line = |example: &Example| format!("{} {}\n", example.message, hex(&example.encoded));
    let text: String = examples.iter().map(line).collect();
    let kept: BTreeSet<_> = text.lines().collect();
    let changed: Vec<_> = committed.lines().filter(|line| !kept.contains(line)).collect();
    assert!(changed.is_empty(), "peers send and expect these bytes: {changed:#?}");
    if committed != text {
        fs::write(&path, text).expect("the source tree is writable");
        panic!("{} had not all examples and has been written anew: commit it", path.display());
    }
    for (example, line) in examples.iter().zip(committed.lines()) {
        let (_, hex) = line.split_once(' ').expect("a name and bytes");
        assert!((example.is_in)(&bytes_of(hex)), "{line} decodes to other values");
    }
}

/// Notes the fields that are set in a message.
fn note(message: &DynamicMessage, used: &mut BTreeSet<String>) {
    for (field, value) in message.fields() {
        used.insert(field.full_name().to_owned());
        for value in value.as_list().unwrap_or(std::slice::from_ref(value)) {
            if let Value::Message(inner) = value {
                note(inner, used);
            }
        }
    }
}

/// Each request, each answer, and each field of the wire is in a vector.
#[test]
fn the_vectors_cover_the_wire() {
    let pool = DescriptorPool::decode(postcopy_proto::FILE_DESCRIPTOR_SET).expect("descriptors");
    let descriptor = |name: &str| pool.get_message_by_name(&format!("postcopy.v1.{name}"));
    let (mut messages, mut used) = (BTreeSet::new(), BTreeSet::new());
    for Example { message, encoded, .. } in examples() {
        let descriptor: MessageDescriptor = descriptor(message).expect("a message of the wire");
        messages.insert(descriptor.full_name().to_owned());
        let decoded = DynamicMessage::decode(descriptor, &encoded[..]).expect("it decodes");
        assert_eq!(decoded.unknown_fields().count(), 0, "{message} has fields that no .proto file has");
        note(&decoded, &mut used);
    }
    for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
        for message in [method.input(), method.output()] {
            assert!(messages.contains(message.full_name()), "no vector of {}", message.full_name());
        }
    }
    let fields = pool.all_messages().flat_map(|message| message.fields().collect::<Vec<_>>());
    let unused: Vec<_> =
        fields.map(|field| field.full_name().to_owned()).filter(|name| !used.contains(name)).collect();
    assert!(unused.is_empty(), "in no vector: {unused:?}");
}
