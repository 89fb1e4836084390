//! Where a reference comes from: labels, the time of the push and the image before, as commands show and compare them.

use super::{pull_cli, push_cli};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::daemon::runtime_root;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use serde_json::{Value, json};
use std::fs;

fn inspect(server: &Server, reference: &str) -> Value {
    run(server.address(), ["inspect", reference])
}

/// The beginning of a state file of Firecracker.
fn state_file(magic: u64) -> Vec<u8> {
    let mut bytes = magic.to_le_bytes().to_vec();
    bytes.extend(5u64.to_le_bytes());
    bytes.extend(b"6.0.0");
    bytes.extend([0xff; 100]);
    bytes
}

#[test]
fn labels_stay_with_a_reference_and_the_image_before_is_named() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let file = folder.path().join("mem");
    fs::write(&file, memory_like(100 << 10, 1)).unwrap();
    let path = file.to_str().unwrap();
    let first = run(server.address(), ["push", path, "app", "--label", "team=a/b", "--label", "note=ä = ö"]);
    let inspected = inspect(&server, "app");
    assert_eq!(inspected["labels"], json!({ "note": "ä = ö", "team": "a/b" }));
    assert!(inspected["pushed"].as_str().unwrap().ends_with('Z') && inspected["previous"].is_null());
    fs::write(&file, memory_like(100 << 10, 2)).unwrap();
    let second = run(server.address(), ["push", path, "app", "--label", "team=c"]);
    let inspected = inspect(&server, "app");
    assert_eq!((&inspected["labels"], &inspected["previous"]), (&json!({ "team": "c" }), &first["image"]));
    let _ = run(server.address(), ["tag", "app", "copy:v1"]);
    assert_eq!(inspect(&server, "copy:v1")["labels"], json!({ "team": "c" }), "of the source");
    let by_digest = format!("app@{}", second["image"].as_str().unwrap());
    assert!(inspect(&server, &by_digest)["labels"].is_null(), "labels belong to a reference");
    // The same image again is not its own predecessor.
    let _ = run(server.address(), ["push", path, "app"]);
    assert_eq!(inspect(&server, "app")["previous"], first["image"]);
    let said = shown(&postcopy(server.address(), ["inspect", "copy:v1"]).output().unwrap());
    assert!(said.contains("label   team=c") && said.contains("pushed  20"), "{said}");
}

#[test]
fn wrong_labels_are_refused_by_name_and_the_reference_stays() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let file = folder.path().join("mem");
    fs::write(&file, "memory").unwrap();
    let pushed = push_cli(&server, &file, "app");
    let path = file.to_str().unwrap();
    fs::write(&file, "other").unwrap();
    for (labels, reason) in [
        (&["novalue"][..], "it is not KEY=VALUE"),
        (&["UPPER=1"], "a key has 1 to 128 characters"),
        (&["k=\u{1b}[31m"], "no control characters"),
        (&["k=1", "k=2"], "--label k: it is given twice"),
    ] {
        let labels = labels.iter().flat_map(|label| ["--label", label]);
        let said = fail(server.address(), ["push", path, "app"].into_iter().chain(labels));
        assert!(said.contains(reason), "{said}");
    }
    assert_eq!(inspect(&server, "app")["image"], pushed["image"]);
}

#[test]
fn a_pull_says_how_old_the_image_is_and_fails_where_another_one_is_expected() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let file = folder.path().join("mem");
    fs::write(&file, "memory").unwrap();
    let pushed = push_cli(&server, &file, "app");
    let image = pushed["image"].as_str().unwrap();
    let target = folder.path().join("target");
    let target_text = target.to_str().unwrap();
    let other = format!("blake3:{}", "0".repeat(64));
    let said = fail(server.address(), ["pull", "app", target_text, "--expect", &other]);
    assert!(said.contains(&format!("app:latest is {image}, pushed")), "{said}");
    assert!(said.contains(&format!("--expect names {other}")), "{said}");
    assert!(!target.exists(), "nothing was written");
    let output =
        postcopy(server.address(), ["pull", "app", target_text, "--expect", image]).output().unwrap();
    let said = shown(&output);
    assert!(output.status.success() && said.contains(", pushed ") && said.contains(" ago: "), "{said}");
    let _ = pull_cli(&server, "app", &folder.path().join("without"));
}

#[test]
fn a_daemon_refuses_an_image_of_another_host_or_digest_before_it_listens() {
    let (server, folder, root) = (Server::start(), tempfile::tempdir().unwrap(), runtime_root());
    let snapshot = folder.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    fs::write(snapshot.join("mem"), memory_like(1 << 20, 3)).unwrap();
    let (mine, other) = match std::env::consts::ARCH {
        "x86_64" => (0x0710_1984_8664_0000, 0x0710_1984_AAAA_0000),
        _ => (0x0710_1984_AAAA_0000, 0x0710_1984_8664_0000),
    };
    let socket = folder.path().join("socket");
    let args = |more: &[&str]| {
        let args =
            ["firecracker", "--image", "vm", "--runtime-dir", root.path().to_str().unwrap(), "--socket"];
        let args = args.into_iter().chain([socket.to_str().unwrap()]).chain(more.iter().copied());
        args.map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    fs::write(snapshot.join("state"), state_file(other)).unwrap();
    push_cli(&server, &snapshot, "vm");
    assert_eq!(inspect(&server, "vm")["labels"]["firecracker.snapshot-version"], "6.0.0");
    let said = fail(server.address(), args(&[]));
    assert!(said.contains("vm:latest does not fit this host: it is of a host of "), "{said}");
    assert!(!socket.exists());
    fs::write(snapshot.join("state"), state_file(mine)).unwrap();
    let pushed = push_cli(&server, &snapshot, "vm");
    let said = fail(server.address(), args(&["--expect", &format!("blake3:{}", "1".repeat(64))]));
    assert!(said.contains(pushed["image"].as_str().unwrap()), "{said}");
    let said = fail(server.address(), args(&["--expect", "blake3:0"]));
    assert!(said.contains("--expect"), "{said}");
    assert!(!socket.exists() && fs::read_dir(root.path()).unwrap().next().is_none());
}
