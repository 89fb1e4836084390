//! Clients that take what a server gives them, and more: what the server holds for them is bounded,
//! and the others are served.

use postcopy::proto::digest::Digest;
use postcopy::proto::manifest::{ChunkContent, ManifestBuilder, SEGMENT_CHUNKS};
use postcopy::proto::page::ChunkSize;
use postcopy::proto::path::ImagePath;
use postcopy::proto::v1::{self, commit_request, upload_pack_request};
use postcopy_tests::cgroup::MemoryCgroup;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::noise;
use postcopy_tests::h2_client::{H2Client, H2Stream, connect, framed};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, digest};
use postcopy_tests::uploads::{frame_of, pack_of, upload_parts, upload_whole};
use postcopy_tests::{PAGE, anonymous_kib, binary, is_root, resident_kib, skip, wait_until};
use prost::Message;
use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;

const MIB: usize = 1 << 20;
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The status codes of gRPC that appear here.
const RESOURCE_EXHAUSTED: i32 = 8;

/// Most memory of the server, with the page cache of its packs.
const MEMORY: usize = 1 << 30;

/// A server with an image `app` of one file `mem`.
struct Target {
    server: Server,
    bytes: Vec<u8>,
    image: bytes::Bytes,
    /// Dropped after the server.
    _memory: Option<MemoryCgroup>,
}

impl Target {
    fn new(image_bytes: usize, arguments: &[&str]) -> Self {
        let store = tempfile::tempdir().expect("a scratch folder").keep();
        let mut command = Command::new(binary("postcopyd"));
        command.arg("serve").arg("--store").arg(&store).args(["--listen", "127.0.0.1:0"]).args(arguments);
        let server = Server::spawn(command, &store).expect("it starts");
        let bytes = noise(image_bytes, 7);
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("mem");
        fs::write(&path, &bytes).expect("a file can be written");
        let pushed = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app")]);
        Self { server, bytes, image: digest(&pushed["image"]).into(), _memory: None }
    }

    /// Has the kernel kill the server if it takes more than [`MEMORY`].
    fn bound_memory(&mut self, test: &str) -> bool {
        let cgroup = MemoryCgroup::new().filter(|_| is_root());
        let Some(cgroup) = cgroup else {
            skip(test, "needs root and memory cgroups of version 1");
            return false;
        };
        cgroup.limit(MEMORY);
        cgroup.add(self.server.pid());
        self._memory = Some(cgroup);
        true
    }

    /// Sees that another client reads the file, from first to last byte.
    fn assert_serves_others(&self) {
        let rpc = Rpc::connect(self.server.address());
        assert!(rpc.read_file("app", "mem").expect("it is served") == self.bytes);
    }

    fn bulk(&self) -> bytes::Bytes {
        let chunks = u32::try_from(self.bytes.len() >> 16).expect("few");
        let runs = vec![v1::ChunkRun { first: 0, count: chunks }];
        framed(&v1::StreamChunksRequest { image: self.image.clone(), runs, ..Default::default() })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.server.kill();
        let _ = fs::remove_dir_all(self.server.store());
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Begins a request and sends these bytes of it.
async fn request(client: &H2Client, path: &str, bytes: bytes::Bytes, is_last: bool) -> Option<H2Stream> {
    let mut stream = client.begin(path).await.ok()?;
    stream.send(bytes, is_last).ok()?;
    Some(stream)
}

#[test]
fn answers_that_nobody_reads_take_a_bounded_amount_of_memory() {
    let mut target = Target::new(64 * MIB, &[]);
    if !target.bound_memory("answers_that_nobody_reads_take_a_bounded_amount_of_memory") {
        return;
    }
    let file = framed(&v1::ReadFileRequest {
        reference: "app".into(),
        path: b"mem"[..].into(),
        ..Default::default()
    });
    let manifest =
        framed(&v1::OpenImageRequest { reference: "app".into(), all_segments: true, ..Default::default() });
    let runtime = runtime();
    let (_clients, _streams) = runtime.block_on(async {
        let (mut clients, mut streams) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let client = H2Client::connect(STRANGER, target.server.address()).await;
            client.stop_reading();
            for _ in 0..20 {
                streams.push(request(&client, "PageService/ReadFile", file.clone(), true).await);
                streams.push(request(&client, "PageService/OpenImage", manifest.clone(), true).await);
            }
            for _ in 0..60 {
                streams.push(request(&client, "PageService/StreamChunks", target.bulk(), false).await);
            }
            clients.push(client);
        }
        (clients, streams)
    });
    // Until the server has filled what it may fill, or was killed.
    let (mut resident, mut looks) = (0, 0);
    wait_until("the server's memory stays as it is", || {
        let now = resident_kib(target.server.pid());
        looks = if now == resident { looks + 1 } else { 0 };
        resident = now;
        looks > 100
    });
    target.assert_serves_others();
}

#[test]
fn unfinished_messages_take_a_bounded_amount_of_memory() {
    let mut target = Target::new(MIB, &[]);
    if !target.bound_memory("unfinished_messages_take_a_bounded_amount_of_memory") {
        return;
    }
    let message = bytes::Bytes::from([&[0, 0, 0x3f, 0xff, 0xff][..], &vec![8; 4 * MIB - 2]].concat());
    let runtime = runtime();
    let (_clients, codes) = runtime.block_on(async {
        let (mut clients, mut streams) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let client = H2Client::connect(STRANGER, target.server.address()).await;
            for _ in 0..50 {
                streams.extend(request(&client, "PageService/StreamChunks", message.clone(), false).await);
            }
            streams.extend(request(&client, "ImageService/FindMissing", message.clone(), false).await);
            clients.push(client);
        }
        let status = |stream: H2Stream| async {
            match tokio::time::timeout(Duration::from_secs(10), stream.status()).await {
                Ok(Ok((code, _))) => Some(code),
                _ => None,
            }
        };
        (clients, futures_util::future::join_all(streams.into_iter().map(status)).await)
    });
    let exhausted = codes.iter().filter(|code| **code == Some(RESOURCE_EXHAUSTED)).count();
    assert!(exhausted > 500, "{exhausted} of {} are refused", codes.len());
    target.assert_serves_others();
}

/// Uploads that were announced as long as possible, and go no further, take no place of others.
#[test]
fn uploads_that_do_not_go_on_hold_up_no_others() {
    let target = Target::new(MIB, &[]);
    let runtime = runtime();
    let begin = upload_pack_request::Part::Begin(v1::UploadPackBegin {
        digest: Digest::of(b"never").into(),
        size_bytes: 64 << 20,
    });
    let begin = framed(&v1::UploadPackRequest { part: Some(begin) });
    let (client, stuck) = runtime.block_on(async {
        let client = H2Client::connect(STRANGER, target.server.address()).await;
        let mut stuck = Vec::new();
        for _ in 0..60 {
            let stream = request(&client, "ImageService/UploadPack", begin.clone(), false).await;
            stuck.push(tokio::spawn(stream.expect("the server accepts").status()));
        }
        (client, stuck)
    });
    let rpc = Rpc::connect(target.server.address());
    let packs = (0..40).map(|seed| noise(4 * MIB, 100 + seed)).map(|chunks| {
        let chunks = chunks.chunks(1 << 16);
        pack_of(&chunks.map(|chunk| (Digest::of(chunk), frame_of(chunk))).collect::<Vec<_>>())
    });
    let packs: Vec<_> = packs.collect();
    // All at once, over one connection.
    let uploads = packs.iter().map(|pack| {
        let mut images = rpc.images();
        let parts: Vec<_> = upload_parts(pack).collect();
        async move { images.upload_pack(tokio_stream::iter(parts)).await }
    });
    let outcomes = rpc.wait(futures_util::future::join_all(uploads));
    outcomes.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    assert!(stuck.iter().all(|stuck| !stuck.is_finished()), "the stuck uploads are still open");
    target.assert_serves_others();
    drop(client);
}

/// A root of 640 kB can name one segment 20,000 times: 10 GiB of digests, if each time counted.
#[test]
fn a_root_that_names_one_segment_many_times_costs_no_more_than_its_segments() {
    let mut target = Target::new(MIB, &[]);
    if !target.bound_memory("a_root_that_names_one_segment_many_times_costs_no_more_than_its_segments") {
        return;
    }
    const TIMES: usize = 20_000;
    let rpc = Rpc::connect(target.server.address());
    let chunk = noise(4096, 8);
    let digest = Digest::of(&chunk);
    upload_whole(&rpc, &pack_of(&[(digest, frame_of(&chunk))])).expect("a pack");
    let mut once = ManifestBuilder::new(ChunkSize::MIN);
    let path = ImagePath::try_from(&b"mem"[..]).expect("a path");
    once.file(&path, u64::from(SEGMENT_CHUNKS) * 4096, false);
    (0..SEGMENT_CHUNKS).for_each(|_| once.chunk(ChunkContent::Data(digest)));
    let once = once.finish().expect("a manifest");
    let mut root = v1::Root::decode(&once.root_bytes[..]).expect("a root");
    root.segment_digests = root.segment_digests.repeat(TIMES).into();
    let Some(v1::entry::Kind::File(file)) = &mut root.entries[0].kind else { panic!("a file") };
    file.size_bytes *= TIMES as u64;
    let segment = once.segments[0].clone();
    rpc.wait(rpc.images().upload_segment(v1::UploadSegmentRequest { segment })).expect("a segment");
    let root = root.encode_to_vec();
    let begin =
        v1::CommitBegin { reference: "many:1".into(), root_bytes: root.len() as u64, labels: Vec::new() };
    let parts = [commit_request::Part::Begin(begin), commit_request::Part::RootPart(root.into())];
    let parts = parts.map(|part| v1::CommitRequest { part: Some(part) });
    rpc.wait(rpc.images().commit(tokio_stream::iter(parts))).expect("it commits");
    let request = v1::GetImageRequest { reference: "many:1".into() };
    let image = rpc.wait(rpc.images().get_image(request)).expect("it is described").into_inner();
    assert_eq!((image.chunks, image.distinct_chunks), (TIMES as u64 * u64::from(SEGMENT_CHUNKS), 1));
    target.assert_serves_others();
}

#[test]
fn building_a_large_working_set_takes_little_memory_and_gives_it_back() {
    const PAGES: u32 = 65_536;
    // A window of pages, what becomes of it, and a pack: not the set.
    const BUILD: u64 = 200 << 10;
    let target = Target::new(PAGES as usize * PAGE, &[]);
    let (rpc, pid) = (Rpc::connect(target.server.address()), target.server.pid());
    let before = anonymous_kib(pid);
    let touched = vec![v1::PageSpan { file: 0, first: 0, count: PAGES }];
    let (image, id) = (target.image.clone(), vec![1; 16].into());
    let recording = v1::RecordRequest { image, id, touched, ..Default::default() };
    rpc.wait(rpc.remote().working_sets().record(tokio_stream::iter([recording]))).unwrap();
    let mut most = 0;
    wait_until("the set is built", || {
        most = anonymous_kib(pid).max(most);
        let sets = run(target.server.address(), ["working-set", "ls"]);
        sets[0]["pages"] == PAGES
    });
    assert!(most < before + BUILD, "{most} KiB while the set was built, {before} KiB before");
    let after = anonymous_kib(pid);
    assert!(after < before + BUILD / 2, "{after} KiB after the set was built, {before} KiB before");
}

#[test]
fn connections_that_say_nothing_end_and_shut_nobody_out() {
    let target = Target::new(MIB, &["--max-connections", "8"]);
    let runtime = runtime();
    let silent = runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..30 {
            silent.push(connect(STRANGER, target.server.address()).await.expect("it accepts"));
        }
        silent
    });
    target.assert_serves_others();
    let started = Instant::now();
    runtime.block_on(async {
        for mut socket in silent {
            let mut bytes = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut bytes)).await;
            assert!(ended.is_ok(), "a silent connection is open after {:?}", started.elapsed());
        }
    });
    target.assert_serves_others();
}

#[test]
fn a_client_that_uses_its_connections_shuts_nobody_out() {
    let target = Target::new(MIB, &["--max-connections", "8"]);
    let runtime = runtime();
    let bind = framed(&v1::StreamChunksRequest { image: target.image.clone(), ..Default::default() });
    let used = runtime.block_on(async {
        let mut used = Vec::new();
        for _ in 0..4 {
            let client = H2Client::connect(STRANGER, target.server.address()).await;
            let stream = request(&client, "PageService/StreamChunks", bind.clone(), false).await;
            let accepted = stream.expect("the server answers").accepted().await;
            used.push((client, accepted.expect("the server accepts")));
        }
        // A fifth connection of this client is refused.
        let mut fifth = connect(STRANGER, target.server.address()).await.expect("the kernel accepts");
        let end = tokio::time::timeout(Duration::from_secs(30), fifth.read_u8()).await;
        assert!(end.is_ok_and(|end| end.is_err()), "the fifth connection stays open");
        used
    });
    target.assert_serves_others();
    drop(used);
}

#[test]
fn the_server_raises_its_limit_on_descriptors() {
    let store = tempfile::tempdir().expect("a scratch folder");
    let mut command = Command::new("prlimit");
    command.arg("--nofile=64:4096").arg(binary("postcopyd"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--store"]).arg(store.path());
    let server = Server::spawn(command, store.path()).expect("it starts");
    let runtime = runtime();
    let _open = runtime.block_on(async {
        let mut open = Vec::new();
        for _ in 0..100 {
            open.push(H2Client::connect(STRANGER, server.address()).await);
        }
        open
    });
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it runs").count();
    wait_until("100 connections", || descriptors() > 100);
}
