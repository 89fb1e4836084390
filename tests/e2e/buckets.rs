//! Servers over a bucket: real `postcopyd` processes, and an S3 server on loopback. And backups.

use crate::map::random_pages;
use postcopy::proto::digest::Digest;
use postcopy::proto::v1;
use postcopy::proto::v1::peer_service_client::PeerServiceClient;
use postcopy::{Options, Session};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::s3::S3Server;
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, flip, shown};
use postcopy_tests::{PAGE, binary, is_root, skip, wait_until};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

fn postcopyd(s3: &S3Server, args: &[&str]) -> Command {
    let mut command = Command::new(binary("postcopyd"));
    command.args(args).args(["--store", &s3.url("s")]);
    s3.set(&mut command);
    command
}

fn serve(s3: &S3Server) -> Server {
    Server::spawn(postcopyd(s3, &["serve", "--listen", "127.0.0.1:0"]), Path::new("")).unwrap()
}

fn verify(s3: &S3Server) -> Output {
    postcopyd(s3, &["verify"]).output().unwrap()
}

fn push(server: &Server, path: &Path, reference: &str) {
    let _ = run(server.address(), ["push".as_ref(), path.as_os_str(), reference.as_ref()]);
}

#[test]
fn what_one_of_three_servers_has_stored_the_others_serve() {
    let s3 = S3Server::start();
    let servers = [serve(&s3), serve(&s3), serve(&s3)];
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("mem"), folder.path().join("out"));
    let bytes = [memory_like(6 * MIB, 1), noise(6 * MIB, 2)].concat();
    fs::write(&path, &bytes).unwrap();
    push(&servers[0], &path, "app:1");
    let _ = run(servers[1].address(), ["verify", "app:1"]);
    let _ = run(servers[2].address(), ["pull".as_ref(), "app:1".as_ref(), out.as_os_str()]);
    assert!(fs::read(out.join("mem")).unwrap() == bytes);

    let recording =
        Session::open(servers[1].address(), &"app:1".parse().unwrap(), Options::DEFAULT.record(true))
            .unwrap();
    let region = recording.map("mem").unwrap();
    for page in &random_pages(bytes.len())[..200] {
        let at = page * PAGE..(page + 1) * PAGE;
        assert!(region[at.clone()] == bytes[at]);
    }
    drop(region);
    assert!(recording.close(MINUTE));
    recording.wait_recorded(MINUTE).unwrap();
    let restore =
        Session::open(servers[2].address(), &"app:1".parse().unwrap(), Options::DEFAULT.working_set(true))
            .unwrap();
    let region = restore.map("mem").unwrap();
    wait_until("the working set is there", || restore.progress().resident_pages >= 200);
    restore.fill().unwrap();
    restore.wait_resident(MINUTE).unwrap();
    assert!(*region == *bytes, "a wrong byte");

    let _ = run(servers[0].address(), ["tag", "app:1", "app:2"]);
    let _ = run(servers[1].address(), ["rm", "app:1"]);
    let listed = run(servers[2].address(), ["ls"]);
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed[0]["reference"], "app:2");
    let output = verify(&s3);
    assert!(output.status.success(), "{}", shown(&output));
}

/// Only what changed goes over the wire, also through another server that has just started.
#[test]
fn a_changed_image_shares_its_chunks_with_the_one_before() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let mut bytes = noise(8 * MIB, 3);
    fs::write(&path, &bytes).unwrap();
    push(&serve(&s3), &path, "app:1");
    bytes[5 * MIB] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let server = serve(&s3);
    let pushed = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app:2")]);
    assert_eq!(pushed["sent_bytes"], 64 << 10, "{pushed}");
    let pulled = folder.path().join("out");
    let _ = run(serve(&s3).address(), ["pull".as_ref(), "app:2".as_ref(), pulled.as_os_str()]);
    assert!(fs::read(pulled.join("mem")).unwrap() == bytes);
}

#[test]
fn a_damaged_pack_in_a_bucket_is_named_and_replaced_by_a_push_after_a_repair() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    fs::write(&path, noise(MIB, 4)).unwrap();
    push(&serve(&s3), &path, "app");
    let packs = s3.path("s/default/packs");
    let pack = fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let pack = fs::read_dir(pack).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[300_000] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let output = verify(&s3);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    let name = pack.file_name().unwrap().to_str().unwrap();
    assert!(shown(&output).contains(&format!("pack blake3:{name}")), "{}", shown(&output));
    let server = serve(&s3);
    let output = postcopy(server.address(), ["verify", "app"]).output().unwrap();
    assert!(!output.status.success(), "{}", shown(&output));
    let output = postcopyd(&s3, &["repair", "--json"]).output().unwrap();
    let repaired: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((repaired["set_aside"].as_array().unwrap().len(), &repaired["chunks"]), (1, &json!(15)));
    push(&server, &path, "app");
    assert!(verify(&s3).status.success(), "{}", shown(&verify(&s3)));
    let _ = run(server.address(), ["verify", "app"]);
}

#[test]
fn a_bucket_that_cannot_be_reached_is_an_error_that_names_it() {
    let s3 = S3Server::start();
    let mut wrong_key = postcopyd(&s3, &["serve", "--listen", "127.0.0.1:0"]);
    wrong_key.env("AWS_SECRET_ACCESS_KEY", "another");
    let stderr = Server::spawn(wrong_key, Path::new("")).unwrap_err();
    assert!(stderr.contains("s3://bkt/s"), "{stderr}");
    let mut command = Command::new(binary("postcopyd"));
    let output = command.args(["verify", "--store", "ftp://host/x"]).output().unwrap();
    assert!(shown(&output).contains("ftp"), "{}", shown(&output));
}

fn gc(s3: &S3Server, args: &[&str]) -> Value {
    let output = postcopyd(s3, &["gc", "--json"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Pushes through servers that are killed, beside collectors without any grace time.
#[test]
fn collections_beside_pushes_and_servers_that_are_killed_lose_nothing() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let content = |pusher: u64, round: u64| {
        [memory_like(MIB, 60 + (pusher + round) % 3), noise(MIB / 4, 100 * pusher + round)].concat()
    };
    let is_over = AtomicBool::new(false);
    // Creates the store.
    drop(serve(&s3));
    std::thread::scope(|scope| {
        let pushers: Vec<_> = (0..2)
            .map(|pusher| {
                let (s3, folder) = (&s3, folder.path());
                scope.spawn(move || {
                    let dir = folder.join(format!("{pusher}"));
                    fs::create_dir(&dir).unwrap();
                    for round in 0..6 {
                        fs::write(dir.join("mem"), content(pusher, round)).unwrap();
                        let reference = format!("p{pusher}:r{round}");
                        let mut server = serve(s3);
                        for attempt in 0.. {
                            let push = [OsStr::new("push"), dir.as_os_str(), OsStr::new(&reference)];
                            let mut push = postcopy(server.address(), push);
                            // Every third push loses its server.
                            let output = match (round % 3, attempt) {
                                (2, 0) => {
                                    let push =
                                        push.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
                                    std::thread::park_timeout(Duration::from_millis(100));
                                    server.kill();
                                    server = serve(s3);
                                    push.wait_with_output().unwrap()
                                }
                                _ => push.output().unwrap(),
                            };
                            if output.status.success() {
                                break;
                            }
                            assert!(attempt < 20, "{}", shown(&output));
                        }
                        if round % 2 == 1 {
                            let _ = run(server.address(), ["rm", &format!("p{pusher}:r{}", round - 1)]);
                        }
                    }
                })
            })
            .collect();
        let collector = scope.spawn(|| {
            let mut deleted = 0;
            while !is_over.load(Ordering::Relaxed) {
                deleted += gc(&s3, &["--grace", "0s"])["packs"].as_u64().unwrap();
            }
            deleted
        });
        let ended: Vec<_> = pushers.into_iter().map(|pusher| pusher.join()).collect();
        is_over.store(true, Ordering::Relaxed);
        assert!(collector.join().unwrap() > 0);
        ended.into_iter().for_each(|ended| ended.unwrap());
    });
    let output = verify(&s3);
    assert!(output.status.success(), "{}", shown(&output));
    let server = serve(&s3);
    for (pusher, round) in [(0, 1), (0, 5), (1, 3), (1, 5)] {
        let out = folder.path().join(format!("out-{pusher}-{round}"));
        let reference = format!("p{pusher}:r{round}");
        let _ = run(server.address(), ["pull".as_ref(), reference.as_ref(), out.as_os_str()]);
        assert!(fs::read(out.join("mem")).unwrap() == content(pusher, round));
    }
}

#[test]
fn an_image_that_is_served_stays_without_a_reference() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = noise(2 * MIB, 9);
    fs::write(&path, &bytes).unwrap();
    let server = serve(&s3);
    push(&server, &path, "app");
    let session = Session::open(server.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
    let region = session.map("mem").unwrap();
    assert!(region[0] == bytes[0]);
    let leases = s3.path("s/default/leases");
    wait_until("the lease is written", || {
        fs::read_dir(&leases).is_ok_and(|mut leases| leases.next().is_some())
    });
    let _ = run(server.address(), ["rm", "app"]);
    assert_eq!(gc(&s3, &["--grace", "0s"])["packs"], 0);
    // Another server has none of it in memory.
    let other = serve(&s3);
    let image = session.image().digest();
    let by_digest = format!("x@{image}").parse().unwrap();
    let restore = Session::open(other.address(), &by_digest, Options::DEFAULT).unwrap();
    let copy = restore.map("mem").unwrap();
    assert!(*copy == *bytes && *region == *bytes, "a wrong byte");
    drop((region, copy, session, restore, server, other));
    // As after the time of a lease.
    fs::remove_dir_all(&leases).unwrap();
    assert_eq!(gc(&s3, &["--grace", "0s"])["packs"], 1);
}

/// The disk of the cache is full from the first blocks on.
#[test]
fn a_cache_on_a_full_disk_harms_nobody() {
    if !is_root() {
        return skip("a_cache_on_a_full_disk_harms_nobody", "a file system of its own needs root");
    }
    let s3 = S3Server::start();
    let (disk, folder) = (Tmpfs::of_bytes(4 << 20), tempfile::tempdir().unwrap());
    let (path, cache) = (folder.path().join("mem"), disk.path().join("cache"));
    let bytes = noise(8 * MIB, 5);
    fs::write(&path, &bytes).unwrap();
    push(&serve(&s3), &path, "app");
    let cached = || {
        let mut command = postcopyd(&s3, &["serve", "--listen", "127.0.0.1:0", "--cache-size", "1GiB"]);
        command.arg("--cache").arg(&cache);
        Server::spawn(command, Path::new(""))
    };
    for round in 0..2 {
        let mut server = cached().unwrap();
        let out = folder.path().join(format!("out-{round}"));
        let _ = run(server.address(), ["pull".as_ref(), "app".as_ref(), out.as_os_str()]);
        assert!(fs::read(out.join("mem")).unwrap() == bytes);
        let stderr = cached().unwrap_err();
        assert!(stderr.contains("another server uses it"), "{stderr}");
        server.kill();
    }
    assert!(fs::read_dir(cache.join("blocks")).unwrap().count() == 256);
}

fn operations() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OPERATIONS.md")).unwrap()
}

/// The commands of docs/OPERATIONS.md, in other directories, beside a server that gets pushes.
#[test]
fn a_backup_of_a_store_in_use_is_a_store() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("mem");
    let bytes = noise(3 * MIB, 8);
    fs::write(&path, &bytes).unwrap();
    push(&server, &path, "app:first");
    let document = operations();
    let section = document.split("## Backup").nth(1).unwrap();
    let script = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let backup = folder.path().join("backup");
    let script = script.replace("/srv/postcopy", server.store().to_str().unwrap());
    let script = script.replace("/backup", backup.to_str().unwrap());
    let is_over = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in (0..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                let other = folder.path().join("other");
                fs::write(&other, noise(MIB, number)).unwrap();
                push(&server, &other, &format!("app:{number}"));
            }
        });
        let bin = binary("postcopyd").parent().unwrap().display().to_string();
        let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
        let output = Command::new("bash").args(["-euc", &script]).env("PATH", path).output();
        is_over.store(true, Ordering::Relaxed);
        output.unwrap()
    });
    assert!(output.status.success() && shown(&output).contains("sound: "), "{}", shown(&output));
    let copy = Server::on(&backup.join("postcopy"), "127.0.0.1:0");
    let out = folder.path().join("out");
    let _ = run(copy.address(), ["pull".as_ref(), "app:first".as_ref(), out.as_os_str()]);
    assert!(fs::read(out.join("mem")).unwrap() == bytes);
}

#[test]
fn what_root_repairs_and_collects_belongs_to_the_owner_of_the_store() {
    const TEST: &str = "what_root_repairs_and_collects_belongs_to_the_owner_of_the_store";
    if !is_root() {
        return skip(TEST, "it needs root");
    }
    let (mut server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("mem");
    for number in 0..3 {
        fs::write(&path, noise(MIB, number)).unwrap();
        push(&server, &path, &format!("app:{number}"));
    }
    assert!(server.stop().success());
    let store = StoreDir::of(&server);
    let owner = Some(65534);
    let mut all = vec![store.root().parent().unwrap().to_owned(), store.root().to_owned()];
    while let Some(path) = all.pop() {
        std::os::unix::fs::chown(&path, owner, owner).unwrap();
        if path.is_dir() {
            all.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    let before = store.files("");
    flip(store.packs().first().unwrap(), 1000);
    let repaired = store.postcopyd("repair", &[]);
    assert!(repaired.status.success(), "{}", shown(&repaired));
    let _ = store.gc(&["--grace", "0s"]);
    let new: Vec<_> = store.files("").difference(&before).cloned().collect();
    assert!(new.len() >= 2, "{new:?}");
    for path in new.iter().flat_map(|path| [path.as_path(), path.parent().unwrap()]) {
        assert_eq!(Some(fs::metadata(path).unwrap().uid()), owner, "{}", path.display());
    }
}

/// The commands of docs/OPERATIONS.md, beside a server.
#[test]
fn a_store_with_damaged_packs_and_manifests_is_repaired_by_pushes() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("mem");
    let bytes = noise(20 * MIB, 9);
    fs::write(&path, &bytes).unwrap();
    push(&server, &path, "vm/web:v1");
    let store = StoreDir::of(&server);
    let section = operations();
    let section = section.split("## Repair").nth(1).unwrap();
    let script = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let script = script.replace("/srv/postcopy", server.store().to_str().unwrap());
    let script = script.replace("/var/snapshots/web", path.to_str().unwrap());
    let (packs, manifests) = (store.packs(), store.manifests());
    for damaged in packs.iter().take(1).chain(&manifests) {
        flip(damaged, fs::metadata(damaged).unwrap().len() / 3);
        let bin = binary("postcopyd").parent().unwrap().display().to_string();
        let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-euc", &script]).env("PATH", path);
        let output = bash.env("POSTCOPY_SERVER", server.address().to_string()).output().unwrap();
        let shown = shown(&output);
        assert!(output.status.success() && shown.contains("set aside"), "{}: {shown}", damaged.display());
        let sent =
            if damaged == packs.first().unwrap() { "sent         64.00 KiB" } else { "sent         nothing" };
        assert!(shown.contains(sent), "{shown}");
        let name = damaged.file_name().unwrap();
        assert!(store.domain().join("damaged").join(name).exists());
        let out = tempfile::tempdir().unwrap();
        let _ =
            run(server.address(), ["pull".as_ref(), "vm/web:v1".as_ref(), out.path().join("o").as_os_str()]);
        assert!(fs::read(out.path().join("o/mem")).unwrap() == bytes);
    }
}

/// The commands of docs/OPERATIONS.md, with another bucket and other ports.
#[test]
fn the_documented_commands_work() {
    let s3 = S3Server::start();
    let document = operations();
    let section = document.split("## In a bucket").nth(1).unwrap().split("\n## ").next().unwrap();
    let blocks: Vec<_> =
        section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    let [serve, maintain] = blocks[..] else { panic!("{section}") };
    assert_eq!(serve.matches("postcopyd serve").count(), 3);
    let script = format!(
        "set -eu; trap 'kill $(jobs -p); wait' EXIT\n{{\n{serve}\n}} > ready\n\
         while [ $(wc -l < ready) -lt 3 ]; do kill -0 $(jobs -p); sleep 0.01; done\n{maintain}"
    );
    let script = script.replace("s3://bucket/store", &s3.url("s"));
    let script = [":7071", ":7072", ":7073"].iter().fold(script, |script, port| script.replace(port, ":0"));
    let folder = tempfile::tempdir().unwrap();
    let mut bash = Command::new("bash");
    s3.set(&mut bash);
    let bin = binary("postcopyd").parent().unwrap().display().to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let output = bash.args(["-c", &script]).env("PATH", path).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert!(shown(&output).contains("sound: 0 packs"), "{}", shown(&output));
}

/// Returns addresses of loopback with free ports.
fn free_addresses(count: usize) -> Vec<String> {
    let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect()
}

fn serve_as(s3: &S3Server, address: &str, peers: &str) -> Server {
    let command = postcopyd(s3, &["serve", "--listen", address, "--peers", peers]);
    Server::spawn(command, Path::new("")).unwrap()
}

#[test]
fn servers_that_are_peers_read_each_block_from_the_bucket_about_once() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    // Of several packs, since a pack belongs to one server.
    let bytes = [memory_like(20 * MIB, 1), noise(30 * MIB, 2)].concat();
    fs::write(&path, &bytes).unwrap();
    push(&serve(&s3), &path, "app:1");
    let addresses = free_addresses(3);
    let peers = addresses.iter().map(|address| format!("http://{address}")).collect::<Vec<_>>().join(",");
    let (before, _) = s3.pack_reads();
    let mut servers: Vec<_> = addresses.iter().map(|address| serve_as(&s3, address, &peers)).collect();
    std::thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| run(server.address(), ["verify", "app:1"]));
        }
    });
    let (reads, parts) = s3.pack_reads();
    // The first request of a server to itself tells it which of the addresses is its own, and a
    // loaded machine may let a few requests run into their time limit.
    assert!((reads - before) * 10 <= parts * 12, "{} readings of {parts} parts", reads - before);
    // Without one of them, and by a server whose only peer does not exist, all is served as before.
    servers[0].kill();
    let alone = serve_as(&s3, "127.0.0.1:0", "http://127.0.0.1:9");
    for server in servers[1..].iter().chain([&alone]) {
        let _ = run(server.address(), ["verify", "app:1"]);
    }
    drop(servers);
    // A server that starts again finds its peers gone, and then there again.
    let servers: Vec<_> = addresses.iter().map(|address| serve_as(&s3, address, &peers)).collect();
    let out = folder.path().join("out");
    let _ = run(servers[2].address(), ["pull".as_ref(), "app:1".as_ref(), out.as_os_str()]);
    assert!(fs::read(out.join("mem")).unwrap() == bytes);
}

#[test]
fn a_peer_answers_with_blocks_of_packs_and_refuses_the_rest() {
    let s3 = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    fs::write(&path, noise(MIB, 3)).unwrap();
    let address = free_addresses(1).remove(0);
    let server = serve_as(&s3, &address, &format!("http://{address}"));
    push(&server, &path, "app:1");
    let pack = fs::read_dir(s3.path("s/default/packs")).unwrap().next().unwrap().unwrap().path();
    let pack = fs::read_dir(pack).unwrap().next().unwrap().unwrap().path();
    let content = fs::read(&pack).unwrap();
    let digest = Digest::of(&content);
    let rpc = Rpc::connect(server.address());
    let channel =
        rpc.wait(tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect());
    let peers = PeerServiceClient::new(channel.unwrap()).max_decoding_message_size(4 << 20);
    let read = |pack: Vec<u8>, block: u32| {
        let request = v1::ReadBlockRequest { pack: pack.into(), block, server: vec![1; 16].into() };
        let mut peers = peers.clone();
        rpc.wait(peers.read_block(request)).map(tonic::Response::into_inner)
    };
    let digest = digest.as_bytes().to_vec();
    for block in 0..6 {
        let answer = read(digest.clone(), block).unwrap();
        let start = content.len().min(block as usize * 256 * 1024);
        let end = content.len().min(start + 256 * 1024);
        assert_eq!(answer.pack_bytes, content.len() as u64);
        assert!(answer.data[..] == content[start..end], "block {block}");
    }
    let request = v1::ReadBlockRequest { pack: digest.clone().into(), block: 0, server: vec![1; 17].into() };
    let refused = rpc.wait(peers.clone().read_block(request)).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    for (code, pack, block) in [
        (tonic::Code::InvalidArgument, digest.clone(), 256),
        (tonic::Code::InvalidArgument, digest.clone(), u32::MAX),
        (tonic::Code::InvalidArgument, vec![1; 31], 0),
        (tonic::Code::NotFound, vec![1; 32], 0),
    ] {
        assert_eq!(read(pack, block).unwrap_err().code(), code);
    }
}
