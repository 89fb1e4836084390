//! Servers over a bucket: real `postcopyd` processes, and an S3 server on loopback.

use crate::map::random_pages;
use postcopy::{Options, Session};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::s3::S3Server;
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use postcopy_tests::{PAGE, binary, wait_until};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
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
fn a_damaged_pack_in_a_bucket_is_named_and_mended_by_a_push() {
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
    let output = postcopyd(&s3, &["gc"]).output().unwrap();
    assert!(!output.status.success(), "{}", shown(&output));
}
