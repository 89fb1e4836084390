//! Tests of the services through a client, over a Unix socket.

use crate::fixtures::Image;
use crate::limits::Limits;
use crate::listen::{Address, Listener};
use crate::serve::{ServeError, serve};
use crate::store::{Domain, Store};
use bytes::Bytes;
use postcopy_proto::digest::Digest;
use postcopy_proto::frame::{ChunkFrame, FrameDecoder};
use postcopy_proto::manifest::Root;
use postcopy_proto::page::PAGE_BYTES;
use postcopy_proto::set_frame::SetFrame;
use postcopy_proto::v1::image_service_client::ImageServiceClient;
use postcopy_proto::v1::page_service_client::PageServiceClient;
use postcopy_proto::v1::working_set_service_client::WorkingSetServiceClient;
use postcopy_proto::v1::{
    self, chunk_answer, fetch_chunks_response, open_image_response, upload_pack_request,
};
use prost::Message;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

struct Server {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    channel: Channel,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), ServeError>>,
}

impl Server {
    async fn start() -> Self {
        let (dir, store) = crate::fixtures::store();
        let store = Arc::new(store);
        let socket = dir.path().join("default/socket");
        let listener = Listener::bind(&Address::Unix(socket.clone()), false).unwrap();
        let (stop, stopped) = oneshot::channel();
        let signal = async { stopped.await.unwrap_or(()) };
        let served = tokio::spawn(serve(store.clone(), listener, Limits::default(), 0.5, None, signal));
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { dir, store, channel, stop, served }
    }

    fn pages(&self) -> PageServiceClient<Channel> {
        PageServiceClient::new(self.channel.clone())
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    fn path(&self, relative: impl AsRef<Path>) -> std::path::PathBuf {
        self.dir.path().join("default").join(relative)
    }

    fn pack_path(&self, image: &Image) -> std::path::PathBuf {
        let hex = image.pack_digest().hex();
        self.path("packs").join(&hex[..2]).join(hex)
    }
}

fn fetch(image: Option<&Image>, runs: &[(u64, u32)]) -> v1::FetchChunksRequest {
    v1::FetchChunksRequest {
        id: 7,
        image: image.map(|image| image.digest().into()).unwrap_or_default(),
        runs: runs.iter().map(|&(first, count)| v1::ChunkRun { first, count }).collect(),
        ..Default::default()
    }
}

async fn answers_of(
    server: &Server,
    requests: Vec<v1::FetchChunksRequest>,
) -> Result<Vec<fetch_chunks_response::Answer>, Status> {
    let mut answers = server.pages().fetch_chunks(tokio_stream::iter(requests)).await?.into_inner();
    let mut all = Vec::new();
    while let Some(answer) = answers.message().await? {
        assert_eq!(answer.id, 7);
        all.push(answer.answer.unwrap());
    }
    Ok(all)
}

async fn chunk_of(server: &Server, request: v1::FetchChunksRequest) -> v1::ChunkAnswer {
    match answers_of(server, vec![request]).await.unwrap().pop().unwrap() {
        fetch_chunks_response::Answer::Chunk(chunk) => chunk,
        fetch_chunks_response::Answer::Segment(_) => panic!("no segment was asked for"),
    }
}

fn error_of(answer: v1::ChunkAnswer) -> v1::Error {
    match answer.result.unwrap() {
        chunk_answer::Result::Error(error) => error,
        other => panic!("{other:?}"),
    }
}

/// Writes an answer's plain bytes to their place.
fn install(image: &Image, answer: &v1::ChunkAnswer, plain: &mut [u8]) {
    let chunk = plain.chunks_mut(PAGE_BYTES).nth(usize::try_from(answer.chunk).unwrap()).unwrap();
    match answer.result.as_ref().unwrap() {
        chunk_answer::Result::Frame(frame) => {
            let expected =
                image.plain.chunks(PAGE_BYTES).nth(usize::try_from(answer.chunk).unwrap()).unwrap();
            let frame = ChunkFrame::parse(frame).unwrap();
            FrameDecoder::default().decode_verified(&frame, &Digest::of(expected), chunk).unwrap();
        }
        chunk_answer::Result::Zero(_) => chunk.fill(0),
        chunk_answer::Result::Error(error) => panic!("{error:?}"),
    }
}

async fn pushed(server: &Server, image: &Image, reference: &str) {
    let (store, pushed, reference) = (server.store.clone(), image.clone(), reference.to_owned());
    tokio::task::spawn_blocking(move || pushed.push(&store, &reference)).await.unwrap();
}

#[tokio::test]
async fn both_lanes_and_read_file_give_every_byte() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let requests = vec![fetch(Some(&image), &[(16, 1), (0, 4)]), fetch(None, &[(4, 12)])];
    let answers = answers_of(&server, requests).await.unwrap();
    let mut plain = vec![1; image.plain.len()];
    let mut order = Vec::new();
    for answer in &answers {
        let fetch_chunks_response::Answer::Chunk(chunk) = answer else { panic!("{answer:?}") };
        order.push(chunk.chunk);
        install(&image, chunk, &mut plain);
    }
    assert_eq!(plain, image.plain);
    assert_eq!(order[0], 16, "the first chunk of a request first");

    let runs = vec![v1::ChunkRun { first: 0, count: 17 }];
    let request =
        v1::StreamChunksRequest { id: 3, image: image.digest().into(), runs, attempt: 1, working_set: false };
    let mut messages =
        server.pages().stream_chunks(tokio_stream::iter([request])).await.unwrap().into_inner();
    let mut plain = vec![1; image.plain.len()];
    let mut next = 0;
    while let Some(message) = messages.message().await.unwrap() {
        assert_eq!((message.id, message.attempt), (3, 1));
        for chunk in &message.chunks {
            assert_eq!(chunk.chunk, next, "in the order of the request");
            next += 1;
            install(&image, chunk, &mut plain);
        }
    }
    assert_eq!(plain, image.plain);

    for (offset, length) in
        [(0, None), (4095, Some(2)), (image.plain.len() as u64, None), (70_000 - 100, Some(0))]
    {
        let read = read_file(&server, "a:1", b"mem", offset, length).await;
        let end = length.map_or(image.plain.len(), |length| usize::try_from(offset + length).unwrap());
        let start = usize::try_from(offset).unwrap();
        match read {
            Ok(read) => assert_eq!(read, image.plain[start..end]),
            Err(status) => assert!(end > image.plain.len() && status.code() == Code::OutOfRange, "{status}"),
        }
    }
}

async fn read_file(
    server: &Server,
    reference: &str,
    path: &'static [u8],
    offset_bytes: u64,
    length_bytes: Option<u64>,
) -> Result<Vec<u8>, Status> {
    let request = v1::ReadFileRequest {
        reference: reference.into(),
        path: Bytes::from_static(path),
        offset_bytes,
        length_bytes,
    };
    let mut parts = server.pages().read_file(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = parts.message().await? {
        bytes.extend_from_slice(&part.data);
    }
    Ok(bytes)
}

/// Returns the answers before the last one to the request `overtaking`. It is sent once the server
/// has answered as much of `first` as the client's window of 64 KiB admits.
async fn answers_before(
    overtaking: v1::FetchChunksRequest,
    first: v1::FetchChunksRequest,
    server: &Server,
) -> usize {
    let endpoint = Endpoint::from_shared(format!("unix:{}", server.path("socket").display())).unwrap();
    let channel = endpoint.initial_stream_window_size(65_535).connect().await.unwrap();
    let (requests, received) = mpsc::channel(4);
    let (id, runs) = (overtaking.id, first.runs.clone());
    requests.send(first).await.unwrap();
    let mut pages = PageServiceClient::new(channel);
    let mut answers = pages.fetch_chunks(ReceiverStream::new(received)).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    requests.send(overtaking).await.unwrap();
    // The channel has capacity again once the connection has taken the message.
    while requests.capacity() < 4 {
        tokio::task::yield_now().await;
    }
    drop(requests);
    let (mut all, mut last) = (1, 0);
    while let Some(answer) = answers.message().await.unwrap() {
        all += 1;
        if answer.id == id {
            last = all;
        }
    }
    let asked: u32 = runs.iter().map(|run| run.count).sum();
    assert!(all > usize::try_from(asked).unwrap() && last > 0, "all are answered: {all}");
    last
}

#[tokio::test]
async fn demand_overtakes_prefetch_that_is_not_sent() {
    let (server, image) = (Server::start().await, Image::with_more_chunks(5));
    pushed(&server, &image, "a").await;
    let request = |image, id, class: v1::RequestClass, runs: &[(u64, u32)]| v1::FetchChunksRequest {
        id,
        class: class.into(),
        ..fetch(image, runs)
    };
    let demand = |runs| request(None, 2, v1::RequestClass::Demand, runs);
    // 4 MiB of incompressible bytes.
    let many = [(0, 20); 51];
    for attempt in 0..2 {
        for class in [v1::RequestClass::Prefetch, v1::RequestClass::Background] {
            let first = v1::FetchChunksRequest { attempt, ..request(Some(&image), 1, class, &many) };
            let before = answers_before(demand(&[(3, 2)]), first, &server).await;
            // The client's window, the bytes that the connection may hold, those being loaded, and
            // a message.
            assert!(before < 100, "{before} of 1020 came before the urgent one, attempt {attempt}");
        }
    }
    let first = request(Some(&image), 1, v1::RequestClass::Background, &many);
    let prefetch = request(None, 2, v1::RequestClass::Prefetch, &[(3, 2)]);
    assert!(answers_before(prefetch, first, &server).await < 100, "prefetch overtakes the background");
    let first = request(Some(&image), 1, v1::RequestClass::Demand, &many);
    assert_eq!(answers_before(demand(&[(3, 2)]), first, &server).await, 1022, "equals keep their order");
}

/// A stream compares its answers with the bytes that its connection has written. An answer that
/// counts for more than these would block the stream for ever, after some thousands of answers.
#[tokio::test]
async fn tens_of_thousands_of_small_prefetched_answers_all_come() {
    let (server, image) = (Server::start().await, Image::with_more_chunks(5));
    pushed(&server, &image, "a").await;
    let class = v1::RequestClass::Prefetch.into();
    let request = v1::FetchChunksRequest { id: 1, class, ..fetch(Some(&image), &[(1, 1); 1000]) };
    let (requests, received) = mpsc::channel(4);
    requests.send(request.clone()).await.unwrap();
    let mut answers = server.pages().fetch_chunks(ReceiverStream::new(received)).await.unwrap().into_inner();
    let all = async {
        for _ in 0..20 {
            requests.send(request.clone()).await.unwrap();
            for number in 0..1000 {
                assert!(answers.message().await.unwrap().is_some(), "answer {number}");
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), all).await.expect("all answers come");
}

#[tokio::test]
async fn a_bulk_message_holds_about_256_kib() {
    let (server, image) = (Server::start().await, Image::with_more_chunks(5));
    pushed(&server, &image, "a").await;
    let runs = vec![v1::ChunkRun { first: 0, count: 20 }; 20];
    let request =
        v1::StreamChunksRequest { id: 1, image: image.digest().into(), runs, attempt: 0, working_set: false };
    let mut messages =
        server.pages().stream_chunks(tokio_stream::iter([request])).await.unwrap().into_inner();
    let (mut sizes, mut chunks) = (Vec::new(), 0);
    while let Some(message) = messages.message().await.unwrap() {
        chunks += message.chunks.len();
        let frames = message.chunks.iter().map(|chunk| match chunk.result.as_ref().unwrap() {
            chunk_answer::Result::Frame(frame) => frame.len(),
            _ => 0,
        });
        sizes.push(frames.sum::<usize>());
    }
    assert_eq!(chunks, 400);
    assert!(sizes.iter().all(|size| *size <= 256 << 10), "{sizes:?}");
    assert!(sizes[..sizes.len() - 1].iter().all(|size| *size > 240 << 10), "{sizes:?}");
}

#[tokio::test]
async fn a_requested_segment_is_sent_before_the_chunks_of_its_request() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    for _ in 0..20 {
        let mut request = fetch(Some(&image), &[(0, 17)]);
        request.segment = Some(0);
        let answers = answers_of(&server, vec![request]).await.unwrap();
        let is_segment = |answer: &fetch_chunks_response::Answer| {
            matches!(answer, fetch_chunks_response::Answer::Segment(_))
        };
        assert_eq!(answers.iter().position(is_segment), Some(0));
        assert_eq!(answers.len(), 18);
    }
}

#[tokio::test]
async fn mistakes_of_one_request_stand_in_its_answer() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let mut segment = fetch(None, &[]);
    segment.segment = Some(5);
    let requests = vec![
        fetch(Some(&image), &[(17, 1), (u64::MAX - 1022, 1023)]),
        segment,
        fetch(Some(&image), &[(0, 1)]),
    ];
    let answers = answers_of(&server, requests).await.unwrap();
    assert_eq!(answers.len(), 1024 + 2);
    let (mut out_of_range, mut frames) = (0, 0);
    for answer in answers {
        let code = match answer {
            fetch_chunks_response::Answer::Segment(segment) => match segment.result.unwrap() {
                v1::segment_answer::Result::Error(error) => error.code,
                v1::segment_answer::Result::Segment(_) => panic!("there is none"),
            },
            fetch_chunks_response::Answer::Chunk(chunk) if chunk.chunk == 0 => {
                frames += 1;
                continue;
            }
            fetch_chunks_response::Answer::Chunk(chunk) => error_of(chunk).code,
        };
        assert_eq!(code, i32::from(v1::ErrorCode::OutOfRange));
        out_of_range += 1;
    }
    assert_eq!((out_of_range, frames), (1025, 1), "the stream went on");
}

#[tokio::test]
async fn malformed_requests_end_the_stream() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let other = fetch(Some(&Image::of_seed(2)), &[(0, 1)]);
    let mut short = fetch(None, &[(0, 1)]);
    short.image = Bytes::from_static(&[1; 31]);
    let good = fetch(Some(&image), &[(0, 1)]);
    let cases = [
        (vec![fetch(None, &[(0, 1)])], Code::InvalidArgument),
        (vec![short], Code::InvalidArgument),
        (vec![fetch(None, &[])], Code::InvalidArgument),
        (vec![fetch(Some(&image), &[(0, 0)])], Code::InvalidArgument),
        (vec![fetch(Some(&image), &[(0, 1025)])], Code::InvalidArgument),
        (vec![fetch(Some(&image), &[(u64::MAX, 2)])], Code::InvalidArgument),
        (vec![fetch(Some(&image), &[(0, u32::MAX), (0, u32::MAX)])], Code::InvalidArgument),
        (vec![other.clone()], Code::NotFound),
        (vec![good, other], Code::InvalidArgument),
    ];
    for (requests, code) in cases {
        let asked = format!("{requests:?}");
        let outcome = answers_of(&server, requests).await.map_err(|status| status.code());
        assert_eq!(outcome, Err(code), "{asked}");
    }
    let bound_first = vec![fetch(Some(&image), &[]), fetch(None, &[(0, 1)])];
    assert_eq!(answers_of(&server, bound_first).await.unwrap().len(), 1, "bound before anything is needed");
    for reference in ["", "../x", "a\0", "A:b", &"a".repeat(10_000)] {
        let status = read_file(&server, reference, b"mem", 0, None).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    let read = |path, offset, length| read_file(&server, "a:1", path, offset, length);
    assert_eq!(read(b"nope", 0, None).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(read(b"mem", u64::MAX, Some(2)).await.unwrap_err().code(), Code::OutOfRange);
    assert_eq!(read(b"mem", 0, Some(1 << 40)).await.unwrap_err().code(), Code::OutOfRange);
}

#[tokio::test]
async fn a_damaged_frame_is_found_at_the_second_attempt() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let path = server.pack_path(&image);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[16 + 24] ^= 0xff;
    std::fs::write(&path, bytes).unwrap();
    let mut request = fetch(Some(&image), &[(0, 1)]);
    let first = chunk_of(&server, request.clone()).await;
    assert!(matches!(first.result, Some(chunk_answer::Result::Frame(_))), "as it lies in the pack");
    request.attempt = 1;
    let error = error_of(chunk_of(&server, request.clone()).await);
    assert_eq!(error.code, i32::from(v1::ErrorCode::DataLoss));
    assert!(error.message.contains(&image.pack_digest().to_string()), "{}", error.message);
    assert!(error.message.contains(&image.data_chunks()[0].to_string()), "{}", error.message);
    let read = read_file(&server, "a:1", b"mem", 0, None).await.unwrap_err();
    assert_eq!(read.code(), Code::DataLoss);
    pushed(&server, &Image::with_more_chunks(1), "b").await;
    let mut plain = image.plain.clone();
    install(&image, &chunk_of(&server, request).await, &mut plain);
    assert_eq!(read_file(&server, "a:1", b"mem", 0, None).await.unwrap(), image.plain);
}

#[tokio::test]
async fn a_truncated_pack_is_a_data_loss_and_the_server_goes_on() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    std::fs::File::options().write(true).open(server.pack_path(&image)).unwrap().set_len(4096).unwrap();
    let error = error_of(chunk_of(&server, fetch(Some(&image), &[(11, 1)])).await);
    assert_eq!(error.code, i32::from(v1::ErrorCode::DataLoss), "{}", error.message);
    let zero = chunk_of(&server, fetch(Some(&image), &[(13, 1)])).await;
    assert!(matches!(zero.result, Some(chunk_answer::Result::Zero(_))));
}

async fn opened(server: &Server, reference: &str) -> Result<(Root, usize), Status> {
    let request = v1::OpenImageRequest {
        reference: reference.into(),
        first_paths: vec![Bytes::from_static(b"mem")],
        all_segments: true,
        ..Default::default()
    };
    opened_by(server, request).await
}

async fn opened_by(server: &Server, request: v1::OpenImageRequest) -> Result<(Root, usize), Status> {
    let mut parts = server.pages().open_image(request).await?.into_inner();
    let (mut image, mut root, mut segments) = (None, Vec::new(), Vec::new());
    while let Some(part) = parts.message().await? {
        match part.part.unwrap() {
            open_image_response::Part::Opened(opened) => image = Some(opened),
            open_image_response::Part::RootPart(part) => root.extend_from_slice(&part),
            open_image_response::Part::Segment(segment) => segments.push(segment),
        }
    }
    let image = image.unwrap();
    assert_eq!(image.root_bytes, root.len() as u64);
    let root = Root::parse(&root, &Digest::try_from(&image.image[..]).unwrap()).unwrap();
    for segment in &segments {
        let Some(v1::segment_answer::Result::Segment(bytes)) = &segment.result else { panic!("{segment:?}") };
        root.check_segment(segment.index, bytes).unwrap();
    }
    Ok((root, segments.len()))
}

#[tokio::test]
async fn segments_that_are_short_come_unasked_as_far_as_they_are_wanted() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let segment_bytes = u32::try_from(image.manifest.segments[0].len()).unwrap();
    for (more_segments_bytes, count) in [(0, 0), (segment_bytes - 1, 0), (segment_bytes, 1), (u32::MAX, 1)] {
        for (all_segments, expected) in [(false, count), (true, 1)] {
            let request = v1::OpenImageRequest {
                reference: "a:1".into(),
                all_segments,
                more_segments_bytes,
                ..Default::default()
            };
            assert_eq!(opened_by(&server, request).await.unwrap().1, expected);
        }
    }
    // The request that needs a damaged segment gets the error.
    let other = Image::of_seed(2);
    pushed(&server, &other, "b:1").await;
    let segment = server.path("manifests").join(other.manifest.root.segment_digests()[0].hex());
    std::fs::write(segment, b"").unwrap();
    let request =
        v1::OpenImageRequest { reference: "b:1".into(), more_segments_bytes: u32::MAX, ..Default::default() };
    assert_eq!(opened_by(&server, request).await.unwrap().1, 0);
}

#[tokio::test]
async fn damaged_manifests_are_named_and_others_served() {
    let image = Image::of_seed(1);
    let (root, segment) = (image.digest(), image.manifest.root.segment_digests()[0]);
    let others = &Image::of_seed(2).manifest;
    let harms: [(_, &[u8]); 4] = [
        (root, &image.manifest.root_bytes[1..]),
        (root, &others.root_bytes),
        (segment, &image.manifest.segments[0][1..]),
        (segment, &others.segments[0]),
    ];
    for (manifest, bad) in harms {
        let server = Server::start().await;
        pushed(&server, &image, "a:1").await;
        pushed(&server, &Image::of_seed(2), "b:1").await;
        let path = server.path("manifests").join(manifest.hex());
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, bad).unwrap();
        let status = opened(&server, "a:1").await.unwrap_err();
        assert_eq!(status.code(), Code::DataLoss);
        assert!(status.message().contains(&manifest.to_string()), "{status}");
        assert!(opened(&server, "b:1").await.is_ok());
        std::fs::write(&path, good).unwrap();
        let (root, segments) = opened(&server, "a:1").await.unwrap();
        assert_eq!((root.image(), segments), (image.digest(), 1));
        // A root that was verified once is served from memory.
        std::fs::write(server.path("manifests").join(image.digest().hex()), b"").unwrap();
        assert!(opened(&server, "a:1").await.is_ok());
    }
    let server = Server::start().await;
    pushed(&server, &image, "a:1").await;
    pushed(&server, &Image::of_seed(2), "b:1").await;
    // A store that has not parsed the segment yet.
    let fresh = Store::open(server.dir.path(), Domain::DEFAULT).unwrap();
    std::fs::write(server.path("manifests").join(image.digest().hex()), b"").unwrap();
    let list = super::images::list(&fresh, None, 10).unwrap().images;
    assert!(list[0].reference == "a:1" && list[0].damage.contains("damaged") && list[0].size_bytes == 0);
    assert!(list[1].reference == "b:1" && list[1].damage.is_empty() && list[1].size_bytes > 0);
}

fn upload(digest: Digest, size_bytes: u64, parts: &[&[u8]]) -> Vec<v1::UploadPackRequest> {
    let begin = v1::UploadPackBegin { digest: digest.into(), size_bytes };
    let data = parts.iter().map(|part| upload_pack_request::Part::Data(Bytes::copy_from_slice(part)));
    let parts = [upload_pack_request::Part::Begin(begin)].into_iter().chain(data);
    parts.map(|part| v1::UploadPackRequest { part: Some(part) }).collect()
}

#[tokio::test]
async fn uploads_are_checked_before_they_are_stored() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    let (pack, digest) = (&image.pack[..], image.pack_digest());
    let size = pack.len() as u64;
    let send = async |requests: Vec<v1::UploadPackRequest>| {
        server.images().upload_pack(tokio_stream::iter(requests)).await.map_err(|status| status.code())
    };
    let refused = Err(Code::InvalidArgument);
    let outcome = async |requests| send(requests).await.map(|_| ());
    assert_eq!(outcome(Vec::new()).await, refused);
    assert_eq!(outcome(upload(digest, size, &[pack]).split_off(1)).await, refused);
    assert_eq!(outcome(upload(Digest::of(b"x"), size, &[pack])).await, refused);
    assert_eq!(outcome(upload(digest, size - 1, &[pack])).await, refused);
    assert_eq!(outcome(upload(digest, size + 1, &[pack])).await, refused);
    assert_eq!(outcome(upload(digest, u64::MAX, &[pack])).await, refused);
    assert_eq!(outcome(upload(Digest::of(b""), 0, &[])).await, refused);
    assert!(!server.pack_path(&image).exists());
    let (first, second) = pack.split_at(pack.len() / 2);
    let (one, two) =
        tokio::join!(outcome(upload(digest, size, &[first, second])), outcome(upload(digest, size, &[pack])));
    assert_eq!((one, two), (Ok(()), Ok(())));
    assert_eq!(outcome(upload(digest, size, &[pack])).await, Ok(()), "it is there already");
    assert_eq!(std::fs::read(server.pack_path(&image)).unwrap(), pack);
}

#[tokio::test]
async fn an_upload_ends_as_soon_as_it_is_longer_than_announced() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    let (parts, received) = mpsc::channel(1);
    let [begin, data] = upload(image.pack_digest(), 1000, &[&[0; 600]]).try_into().unwrap();
    let endless = async move {
        let mut part = begin;
        // The loop ends when the server stops reading.
        while parts.send(part).await.is_ok() {
            part = data.clone();
        }
    };
    let mut images = server.images();
    let (outcome, ()) = tokio::join!(images.upload_pack(ReceiverStream::new(received)), endless);
    assert_eq!(outcome.unwrap_err().code(), Code::InvalidArgument);
}

/// This test takes 30 s, because the sockets are real.
#[tokio::test]
async fn silent_uploads_end_and_leave_nothing() {
    let server = Server::start().await;
    let begin = v1::UploadPackBegin { digest: Digest::of(b"x").into(), size_bytes: 64 << 20 };
    let begin = v1::UploadPackRequest { part: Some(upload_pack_request::Part::Begin(begin)) };
    let mut silent = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (mut images, begin) = (server.images(), begin.clone());
        let silence = tokio_stream::iter([begin]).chain(tokio_stream::pending());
        silent.spawn(async move { images.upload_pack(silence).await.unwrap_err().code() });
    }
    let started = std::time::Instant::now();
    assert_eq!(silent.join_all().await, [Code::DeadlineExceeded; 4]);
    assert!(started.elapsed().as_secs() < 45, "{:?}", started.elapsed());
    let empty = server.images().upload_pack(tokio_stream::iter([begin])).await.unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument, "{empty:?}");
    let packs = std::fs::read_dir(server.path("packs")).unwrap();
    let files = packs.flat_map(|dir| std::fs::read_dir(dir.unwrap().path()).unwrap());
    assert_eq!(files.count(), 0, "no staged file is left");
}

/// A newer client may send fields and values that this server does not know.
#[tokio::test]
async fn unknown_fields_are_ignored() {
    use bytes::BufMut;
    use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

    /// Sends raw bytes as messages of FetchChunks.
    #[derive(Clone, Default)]
    struct Raw;
    impl Encoder for Raw {
        type Item = Vec<u8>;
        type Error = Status;
        fn encode(&mut self, bytes: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
            out.put_slice(&bytes);
            Ok(())
        }
    }
    impl Decoder for Raw {
        type Item = v1::FetchChunksResponse;
        type Error = Status;
        fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
            prost::Message::decode(bytes).map(Some).map_err(|e| Status::internal(e.to_string()))
        }
    }
    impl Codec for Raw {
        type Encode = Vec<u8>;
        type Decode = v1::FetchChunksResponse;
        type Encoder = Self;
        type Decoder = Self;
        fn encoder(&mut self) -> Self {
            Self
        }
        fn decoder(&mut self) -> Self {
            Self
        }
    }

    let server = Server::start().await;
    let image = Image::of_seed(4);
    pushed(&server, &image, "a").await;
    let mut request = prost::Message::encode_to_vec(&fetch(Some(&image), &[(0, 1)]));
    // Field 1000, varint 7; field 1001, three bytes; class 99, a value that no version has.
    request.extend([0xc0, 0x3e, 7, 0xca, 0x3e, 3, 1, 2, 3, 0x18, 99]);
    let mut client = tonic::client::Grpc::new(server.channel.clone());
    client.ready().await.unwrap();
    let path = "/postcopy.v1.PageService/FetchChunks".parse().unwrap();
    let requests = tonic::Request::new(tokio_stream::iter([request]));
    let mut answers = client.streaming(requests, path, Raw).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.id, 7);
    assert!(matches!(answer.answer, Some(fetch_chunks_response::Answer::Chunk(chunk)) if chunk.chunk == 0));
}

/// Returns all pages of the list of images. Calls `between` with each page that is not the last one.
async fn listed(
    server: &Server,
    page_size: u32,
    mut between: impl FnMut(&[v1::ImageSummary]),
) -> Vec<v1::ImageSummary> {
    let mut listed = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListImagesRequest { page_size, page_token };
        let page = server.images().list_images(request).await.unwrap().into_inner();
        assert!(page.images.len() <= page_size as usize);
        page_token = page.next_page_token;
        if !page_token.is_empty() {
            assert!(!page.images.is_empty(), "a client would take it for the last one");
            between(&page.images);
        }
        listed.extend(page.images);
        if page_token.is_empty() {
            return listed;
        }
    }
}

/// Points references to an image, at once.
fn stored_reference(image: Digest) -> Vec<u8> {
    v1::StoredReference { image: image.into(), provenance: None }.encode_to_vec()
}

fn tagged(server: &Server, image: &Image, references: &[String]) {
    for reference in references {
        let (name, tag) = reference.split_once(':').unwrap();
        let tags = server.path("refs").join(name).join("_tags");
        std::fs::create_dir_all(&tags).unwrap();
        std::fs::write(tags.join(tag), stored_reference(image.digest())).unwrap();
    }
}

#[tokio::test]
async fn deep_and_flat_layouts_are_listed_in_pages() {
    let layouts: [fn(usize) -> String; 3] = [
        |n| format!("app-{n:04}:latest"),
        |n| format!("app:v{n}"),
        |n| format!("team-{}/app{}/part-{}:v{n}", n % 5, n / 5 % 5, n / 25 % 5),
    ];
    for layout in layouts {
        let (server, image) = (Server::start().await, Image::of_seed(1));
        pushed(&server, &image, "a:1").await;
        server.store.remove_reference(&"a:1".parse().unwrap()).unwrap();
        let mut references: Vec<_> = (0..600).map(layout).collect();
        tagged(&server, &image, &references);
        references.sort_unstable();
        for page_size in [7, 599, 600, 1000] {
            let listed = listed(&server, page_size, |_| {}).await;
            assert!(listed.iter().map(|image| &image.reference).eq(&references));
            let is_whole = |summary: &v1::ImageSummary| summary.size_bytes == image.plain.len() as u64;
            assert!(listed.iter().all(is_whole));
        }
    }
}

#[tokio::test]
async fn a_page_is_not_empty_because_its_references_were_removed() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:000").await;
    let references: Vec<_> = (0..300).map(|n| format!("a:{n:03}")).collect();
    tagged(&server, &image, &references);
    let mut remaining = references[1..299].to_vec();
    let remove = |_: &[_]| {
        for reference in remaining.drain(..) {
            server.store.remove_reference(&reference.parse().unwrap()).unwrap();
        }
    };
    let shown = listed(&server, 1, remove).await;
    let shown: Vec<_> = shown.iter().map(|image| image.reference.as_str()).collect();
    assert_eq!(shown, ["a:000", "a:299"]);
}

#[tokio::test]
async fn a_file_that_is_no_reference_is_listed_as_damage_and_hides_nothing() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    for reference in ["a:1", "a:2", "b:1", "c:1"] {
        pushed(&server, &image, reference).await;
    }
    std::fs::write(server.path("refs/a/_tags/1 (copy)"), "").unwrap();
    std::fs::write(server.path("refs/b/_tags/1"), "no digest").unwrap();
    std::fs::remove_file(server.path("refs/c/_tags/1")).unwrap();
    std::fs::write(server.path("refs/c/_tags/1"), stored_reference(Digest::of(b"x"))).unwrap();
    for page_size in [1, 2, 1000] {
        let listed = listed(&server, page_size, |_| {}).await;
        let shown: Vec<_> =
            listed.iter().map(|image| (image.reference.as_str(), !image.damage.is_empty())).collect();
        let expected =
            [("a:1", false), ("a:1%20%28copy%29", true), ("a:2", false), ("b:1", true), ("c:1", true)];
        assert_eq!(shown, expected);
        assert!(listed[1].damage.contains("its path is no reference"), "{}", listed[1].damage);
        assert_eq!(listed[4].image, Digest::of(b"x").as_bytes()[..]);
    }
}

#[tokio::test]
async fn references_are_listed_in_pages_tagged_and_removed() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    for reference in ["b:2", "a/b:1", "b:1"] {
        pushed(&server, &image, reference).await;
    }
    let mut images = server.images();
    let (source, target) = (format!("b@{}", image.digest()), "c:new".to_owned());
    images.tag_image(v1::TagImageRequest { source, target }).await.unwrap();
    let listed = listed(&server, 3, |_| {}).await;
    let listed: Vec<_> = listed.iter().map(|image| &image.reference).collect();
    assert_eq!(listed, ["a/b:1", "b:1", "b:2", "c:new"]);
    for wrong in ["//", "a:1", "a:1@", "a:1@0123456789abcdef0123456789abcdeg"] {
        let request = v1::ListImagesRequest { page_size: 0, page_token: wrong.into() };
        assert_eq!(images.list_images(request).await.unwrap_err().code(), Code::InvalidArgument);
    }

    let described =
        images.get_image(v1::GetImageRequest { reference: "b:1".into() }).await.unwrap().into_inner();
    assert_eq!((described.chunks, described.zero_chunks, described.distinct_chunks), (13, 4, 13));
    assert!(described.stored_bytes > 11 * 4096 && described.stored_bytes < image.pack.len() as u64);
    let summary = described.image.unwrap();
    assert_eq!((summary.size_bytes, summary.files), (image.plain.len() as u64, 1));
    assert_eq!((summary.chunk_size_bytes, &summary.image[..]), (4096, &image.digest().as_bytes()[..]));

    let delete = |reference: &str| v1::DeleteImageRequest { reference: reference.into() };
    images.delete_image(delete("b:1")).await.unwrap();
    assert_eq!(images.delete_image(delete("b:1")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(images.delete_image(delete("b@x")).await.unwrap_err().code(), Code::InvalidArgument);
}

async fn health(server: &Server) -> Streaming<tonic_health::pb::HealthCheckResponse> {
    let request = tonic_health::pb::HealthCheckRequest { service: "postcopy.v1.PageService".into() };
    HealthClient::new(server.channel.clone()).watch(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_in_flight_and_refuses_what_is_new() {
    let (server, image) = (Server::start().await, Image::of_seed(1));
    pushed(&server, &image, "a:1").await;
    let mut health = health(&server).await;
    let mut status = async || health.message().await.unwrap().map(|response| response.status);
    assert_eq!(status().await, Some(ServingStatus::Serving.into()));

    let (requests, received) = mpsc::channel(4);
    requests.send(fetch(Some(&image), &[(0, 1)])).await.unwrap();
    let answers = server.pages().fetch_chunks(ReceiverStream::new(received)).await.unwrap();
    let mut answers = answers.into_inner();
    assert!(answers.message().await.unwrap().is_some());
    // An upload that is half received keeps the server.
    let (upload_parts, received) = mpsc::channel(4);
    let (digest, size) = (Image::of_seed(2).pack_digest(), Image::of_seed(2).pack.len() as u64);
    let mut parts = upload(digest, size, &[&Image::of_seed(2).pack]);
    let last = parts.pop().unwrap();
    upload_parts.send(parts.pop().unwrap()).await.unwrap();
    let mut images = server.images();
    let uploading = tokio::spawn(async move { images.upload_pack(ReceiverStream::new(received)).await });
    // The channel has capacity again once the connection has taken the message.
    while upload_parts.capacity() < 4 {
        tokio::task::yield_now().await;
    }
    answers_of(&server, vec![fetch(Some(&image), &[(0, 1)])]).await.unwrap();

    server.stop.send(()).unwrap();
    assert_eq!(status().await, Some(ServingStatus::NotServing.into()));
    let ended = answers.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable, "{ended}");
    let refused = PageServiceClient::new(server.channel.clone())
        .read_file(v1::ReadFileRequest { reference: "a:1".into(), ..Default::default() })
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
    upload_parts.send(last).await.unwrap();
    drop(upload_parts);
    uploading.await.unwrap().unwrap();
    assert_eq!(status().await, None);
    server.served.await.unwrap().unwrap();
    assert!(!server.dir.path().join("default/socket").exists());
}

#[tokio::test]
async fn a_recording_becomes_a_working_set_that_is_streamed_before_chunks() {
    let server = Server::start().await;
    let image = Image::of_seed(1);
    image.push(&server.store, "a:v1");
    let mut sets = WorkingSetServiceClient::new(server.channel.clone());
    let named = || v1::GetWorkingSetRequest { reference: "a:v1".into() };
    let missing = sets.get_working_set(named()).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);

    let span = |first, count| v1::PageSpan { file: 0, first, count };
    let touched = [span(9, 1), span(2, 3), span(16, 1), span(13, 1)];
    let begin = v1::RecordRequest {
        image: image.digest().into(),
        id: vec![7; 16].into(),
        touched: touched[..2].to_vec(),
        unseen: Vec::new(),
    };
    let rest = v1::RecordRequest { touched: touched[2..].to_vec(), ..Default::default() };
    let set = sets.record(tokio_stream::iter([begin.clone(), rest])).await.unwrap().into_inner();
    assert_eq!((set.recordings, set.pages, set.zero_pages), (1, 6, 1));
    let listed = sets.list_working_sets(v1::ListWorkingSetsRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.working_sets, [set]);

    // A recording of another image's pages, or without an image, is not stored.
    for (wrong, field) in [
        (span(17, 1), "17 pages"),
        (span(0, 0), "no pages"),
        (v1::PageSpan { file: 1, first: 0, count: 1 }, "1 files"),
    ] {
        let request = v1::RecordRequest { touched: vec![wrong], ..begin.clone() };
        let status = sets.record(tokio_stream::iter([request])).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(field), "{status}");
    }

    let mut pages = server.pages();
    let runs = vec![v1::ChunkRun { first: 0, count: 1 }];
    let request =
        v1::StreamChunksRequest { id: 3, image: image.digest().into(), runs, attempt: 0, working_set: true };
    let mut answers = pages.stream_chunks(tokio_stream::iter([request])).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert_eq!((first.working_set_frames.len(), first.working_set_ended), (1, false));
    let frame = SetFrame::parse(&first.working_set_frames[0]).unwrap();
    let sent: Vec<_> = frame.runs().flat_map(|run| run.first..run.first + u32::from(run.count)).collect();
    assert_eq!(sent, [2, 3, 4, 9, 13, 16], "ascending in one frame");
    let ended = answers.message().await.unwrap().unwrap();
    assert!(ended.working_set_ended && ended.chunks.is_empty());
    assert_eq!(answers.message().await.unwrap().unwrap().chunks.len(), 1);

    let forget = v1::DeleteWorkingSetRequest { reference: "a:v1".into() };
    sets.delete_working_set(forget.clone()).await.unwrap();
    assert_eq!(sets.delete_working_set(forget).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recordings_that_come_at_once_are_all_kept_and_answered() {
    let server = Server::start().await;
    let image = Image::of_seed(1);
    image.push(&server.store, "a:v1");
    let record = |first: u8| {
        let request = v1::RecordRequest {
            image: image.digest().into(),
            id: vec![first; 16].into(),
            touched: vec![v1::PageSpan { file: 0, first: first.into(), count: 1 }],
            ..Default::default()
        };
        let mut sets = WorkingSetServiceClient::new(server.channel.clone());
        async move { sets.record(tokio_stream::iter([request])).await.map(|set| set.into_inner().recordings) }
    };
    let answered = futures_util::future::join_all((0..16).map(record)).await;
    assert!(answered.iter().all(|recordings| matches!(recordings, Ok(1..=16))), "{answered:?}");
    let set = server.store.working_set(&image.digest()).unwrap().unwrap();
    assert_eq!(set.recordings, 16);
}
