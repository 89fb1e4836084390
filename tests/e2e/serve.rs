//! `postcopyd serve`, from its first line to its last.

use postcopy::proto::v1;
use postcopy::{Remote, ServerAddress};
use postcopy_tests::cli::{fail, run};
use postcopy_tests::fixtures::{memory_like, noise, sparse};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, shown};
use postcopy_tests::{binary, is_root, skip};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tonic::Code;

fn push(server: &Server, path: &Path, reference: &str) {
    let _ = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)]);
}

#[test]
fn beyond_loopback_it_listens_only_when_told_that_the_network_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    for address in ["0.0.0.0:0", "[::]:0"] {
        let text = Server::try_on(&store, address).expect_err("it must be refused");
        assert!(text.contains("--insecure") && text.contains("can be reached from other machines"), "{text}");
    }
    assert!(!store.exists(), "nothing was made");
    let mut command = Command::new(binary("postcopyd"));
    command.args(["serve", "--insecure", "--listen", "0.0.0.0:0", "--store"]).arg(&store);
    let mut server = Server::spawn(command, &store).unwrap();
    assert!(server.address().to_string().starts_with("http://0.0.0.0:"));
    assert_eq!(server.stop().code(), Some(0));
    for bad in ["127.0.0.1", "nonsense", "unix:relative", "http://127.0.0.1:1"] {
        let text = Server::try_on(&store, bad).expect_err("it must be refused");
        assert!(text.contains(bad) && text.contains("host:port or unix:/path"), "{text}");
    }
}

#[test]
fn it_prints_where_it_listens_and_makes_its_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("not/there/yet");
    let mut server = Server::on(&store, "127.0.0.1:0");
    let port: u16 = server.address().to_string().rsplit_once(':').unwrap().1.parse().unwrap();
    assert_ne!(port, 0, "the real port");
    assert_eq!(fs::read_to_string(store.join("format")).unwrap(), "postcopy store 2\n");
    assert_eq!(run(server.address(), ["ls"]), serde_json::json!([]));
    let text = Server::try_on(&store, &format!("127.0.0.1:{port}")).expect_err("the port is taken");
    assert!(text.contains(&port.to_string()), "{text}");
    // Two servers may serve one store.
    let second = Server::on(&store, "127.0.0.1:0");
    let path = folder.path().join("mem");
    fs::write(&path, noise(100_000, 90)).unwrap();
    push(&server, &path, "app");
    assert!(Rpc::connect(second.address()).read_file("app", "mem").unwrap() == noise(100_000, 90));
    assert_eq!(server.stop().code(), Some(0));
    assert!(Rpc::connect(second.address()).read_file("app", "mem").unwrap() == noise(100_000, 90));
}

#[test]
fn a_unix_socket_is_replaced_when_stale_kept_when_live_and_removed_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (store, socket) = (folder.path().join("store"), folder.path().join("socket"));
    let listen = format!("unix:{}", socket.display());
    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists() && UnixStream::connect(&socket).is_err(), "stale");
    let mut server = Server::on(&store, &listen);
    assert_eq!(server.address().to_string(), listen);
    let path = folder.path().join("mem");
    fs::write(&path, noise(100_000, 91)).unwrap();
    push(&server, &path, "app");
    let text = Server::try_on(&store, &listen).expect_err("another one listens");
    assert!(text.contains("another server is listening") && text.contains(&listen), "{text}");
    assert!(
        Rpc::connect(server.address()).read_file("app", "mem").unwrap() == noise(100_000, 91),
        "unharmed"
    );
    assert_eq!(server.stop().code(), Some(0));
    assert!(!socket.exists(), "removed at the end");
    let mut killed = Server::on(&store, &listen);
    killed.kill();
    assert!(socket.exists());
    let again = Server::on(&store, &listen);
    assert!(Rpc::connect(again.address()).read_file("app", "mem").unwrap() == noise(100_000, 91));
    fs::write(folder.path().join("precious"), "data").unwrap();
    let file = format!("unix:{}", folder.path().join("precious").display());
    assert!(Server::try_on(&store, &file).expect_err("a file").contains("precious"));
    assert_eq!(fs::read(folder.path().join("precious")).unwrap(), b"data");
}

/// grpc.health.v1, as far as is needed here: the generated code of another crate would be a dependency for one call.
mod health {
    /// The service, or "" for all of it.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Request {
        #[prost(string, tag = "1")]
        pub(crate) service: String,
    }

    /// 1 is SERVING, 2 NOT_SERVING.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Response {
        #[prost(int32, tag = "1")]
        pub(crate) status: i32,
    }
}

type HealthClient = tonic::client::Grpc<tonic::transport::Channel>;

async fn watch(address: &ServerAddress) -> tonic::Streaming<health::Response> {
    let channel = tonic::transport::Endpoint::from_shared(address.to_string()).expect("an address");
    let mut client = HealthClient::new(channel.connect().await.expect("it answers"));
    client.ready().await.expect("it answers");
    let codec = tonic_prost::ProstCodec::<health::Request, health::Response>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Watch");
    let request = tonic::Request::new(health::Request { service: String::new() });
    client.server_streaming(request, path, codec).await.expect("it can be watched").into_inner()
}

#[test]
fn at_sigterm_what_is_in_flight_finishes_and_what_is_new_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::on(&folder.path().join("store"), "127.0.0.1:0");
    let path = folder.path().join("mem");
    let bytes = memory_like(96 << 20, 92);
    fs::write(&path, &bytes).unwrap();
    push(&server, &path, "app");
    let address = server.address().clone();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let pid = server.pid();
    runtime.block_on(async {
        let mut health = watch(&address).await;
        assert_eq!(health.message().await.unwrap().unwrap().status, 1, "SERVING");
        // Two connections: one that reads slowly, and one for what is new.
        let (slow, new) = (
            Remote::connect(address.clone()).await.unwrap(),
            Remote::connect(address.clone()).await.unwrap(),
        );
        let request =
            || v1::ReadFileRequest { reference: "app".into(), path: "mem".into(), ..Default::default() };
        let mut reading = slow.pages().read_file(request()).await.unwrap().into_inner();
        let mut read = reading.message().await.unwrap().unwrap().data.to_vec();

        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(health.message().await.unwrap().unwrap().status, 2, "NOT_SERVING");
        for connection in [&new, &slow] {
            let refused = connection.pages().read_file(request()).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
            let refused =
                connection.images().list_images(v1::ListImagesRequest::default()).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        }
        let refused = Remote::connect(address.clone()).await;
        assert!(refused.is_err(), "no new connections");

        // The client's windows hold 16 MiB of 96: the rest was still to be sent when the signal came.
        while let Some(part) = reading.message().await.unwrap() {
            read.extend_from_slice(&part.data);
        }
        assert!(read == bytes, "what was in flight is complete and right");
    });
    let started = std::time::Instant::now();
    assert_eq!(server.stop().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(5), "it ends when nothing is in flight");
    assert!(fail(&address, ["ls"]).contains("cannot be reached"));
}

/// Anonymous memory of a process in KiB: what it holds beyond the files that it maps.
fn rss_anon_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("Linux says it");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

#[test]
fn a_10_gib_sparse_image_is_served_in_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let pusher = Server::on(&store, "127.0.0.1:0");
    let path = folder.path().join("mem");
    let (len, island) = (10u64 << 30, noise(300_000, 93));
    let offsets: Vec<u64> = (0..100).map(|i| i * (len / 100) + 12_345).collect();
    sparse(&path, len, &offsets.iter().map(|offset| (*offset, &island[..])).collect::<Vec<_>>());
    push(&pusher, &path, "vm");
    drop(pusher);
    // Another process: the limit is on serving. What an upload takes is bounded elsewhere.
    let server = Server::on(&store, "127.0.0.1:0");
    let mut most = 0;
    std::thread::scope(|scope| {
        let readers: Vec<_> = offsets
            .chunks(25)
            .map(|offsets| {
                let (server, island) = (&server, &island);
                scope.spawn(move || {
                    let rpc = Rpc::connect(server.address());
                    for offset in offsets {
                        let read =
                            rpc.read_range("vm", "mem", offset - 5000, Some(310_000)).expect("it is served");
                        let right = [&[0; 5000][..], island, &[0; 5000]].concat();
                        assert!(read == right, "at {offset}");
                    }
                })
            })
            .collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            most = most.max(rss_anon_kib(server.pid()));
            std::thread::park_timeout(Duration::from_millis(2));
        }
    });
    let _ = run(server.address(), ["verify", "vm"]);
    let rpc = Rpc::connect(server.address());
    assert!(rpc.read_range("vm", "mem", len - 500_000_000, Some(100_000_000)).unwrap().len() == 100_000_000);
    most = most.max(rss_anon_kib(server.pid()));
    eprintln!("the server held at most {} MiB", most >> 10);
    assert!(most < 150 << 10, "{most} KiB beyond the mapped packs");
    let packs = StoreDir::of(&server).packs();
    let bytes: u64 = packs.iter().map(|pack| fs::metadata(pack).unwrap().len()).sum();
    assert!(bytes < 40 << 20, "{bytes} bytes in packs: the islands alone, which hold the same bytes in part");
}

#[test]
fn a_store_and_its_socket_are_its_users_alone_unless_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    for (mask, files, dirs) in [(None, 0o600, 0o700), (Some("027"), 0o640, 0o750)] {
        let store = folder.path().join(mask.unwrap_or("default"));
        let socket = folder.path().join("socket");
        let mut command = Command::new("sh");
        command.args(["-c", "umask 0; exec \"$@\"", "sh"]).arg(binary("postcopyd"));
        command.arg("serve").arg("--store").arg(&store);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        command.args(mask.into_iter().flat_map(|mask| ["--umask", mask]));
        let server = Server::spawn(command, &store).unwrap();
        let image = folder.path().join("image");
        fs::write(&image, noise(1 << 20, 5)).unwrap();
        push(&server, &image, "app:v1");
        let modes = |path: &Path| path.symlink_metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(modes(&socket), files);
        let mut all = vec![store];
        while let Some(path) = all.pop() {
            let expected = if path.is_dir() { dirs } else { files };
            assert_eq!(modes(&path), expected, "{}", path.display());
            if path.is_dir() {
                all.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
    }
}

#[test]
fn a_store_on_a_read_only_file_system_is_served_and_verified() {
    let test = "a_store_on_a_read_only_file_system_is_served_and_verified";
    if !is_root() {
        return skip(test, "needs root, to mount");
    }
    let mut writing = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let bytes = noise(1 << 20, 5);
    fs::write(&image, &bytes).unwrap();
    push(&writing, &image, "app:v1");
    writing.stop();
    let read_only = |command: &str| {
        let mount = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && shift && exec \"$@\"";
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh", "-c", mount, "sh"]).arg(writing.store());
        unshare.arg(binary("postcopyd")).arg(command).arg("--store").arg(writing.store());
        unshare
    };
    let mut serve = read_only("serve");
    serve.args(["--listen", "127.0.0.1:0"]);
    let server = Server::spawn(serve, writing.store()).unwrap();
    assert!(Rpc::connect(server.address()).read_file("app:v1", "image").unwrap() == bytes);
    let verified = read_only("verify").output().unwrap();
    assert!(verified.status.success(), "{}", shown(&verified));
}
