//! The command line as scripts use it: exit statuses, JSON, help, completions, and errors that say what to do.

use postcopy::ServerAddress;
use postcopy_tests::binary;
use postcopy_tests::cgroup::MemoryCgroup;
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::daemon::runtime_root;
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use postcopy_tests::store::{StoreDir, flip, shown};
use postcopy_tests::{is_root, skip};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const COMMANDS: [&str; 12] = [
    "push",
    "pull",
    "ls",
    "inspect",
    "verify",
    "rm",
    "tag",
    "bench",
    "firecracker",
    "criu",
    "doctor",
    "completions",
];

fn output(program: &str, args: &[&str]) -> Output {
    Command::new(binary(program))
        .args(args)
        .env_remove("POSTCOPY_SERVER")
        .output()
        .expect("it can be started")
}

fn assert_has_fields(report: &Value, fields: &[&str]) {
    for field in fields {
        assert!(!report[field].is_null(), "no {field} in {report}");
    }
}

/// Nobody listens at port 1 of loopback.
fn nowhere() -> ServerAddress {
    "http://127.0.0.1:1".parse().expect("an address")
}

#[test]
fn every_report_in_json_parses_and_has_its_fields() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (path, target) = (folder.path().join("mem"), folder.path().join("back"));
    fs::write(&path, memory_like(1 << 20, 100)).unwrap();
    let report = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app:v1")]);
    assert_has_fields(
        &report,
        &[
            "reference",
            "image",
            "size_bytes",
            "zero_bytes",
            "deduplicated_bytes",
            "sent_bytes",
            "pack_bytes",
            "ratio",
            "seconds",
        ],
    );
    let image = report["image"].as_str().unwrap().to_owned();
    let report = run(server.address(), [OsStr::new("pull"), OsStr::new("app:v1"), target.as_os_str()]);
    assert_has_fields(&report, &["image", "entries", "size_bytes", "chunks"]);
    let summary = ["reference", "image", "size_bytes", "files", "chunk_size_bytes"];
    assert_has_fields(&run(server.address(), ["ls"])[0], &summary);
    let report = run(server.address(), ["inspect", "app:v1"]);
    assert_has_fields(&report, &summary);
    assert_has_fields(&report, &["chunks", "zero_chunks", "distinct_chunks", "stored_bytes"]);
    assert_has_fields(&report["entries"][0], &["path", "kind", "size_bytes"]);
    let report = run(server.address(), ["verify", "app:v1"]);
    assert_has_fields(&report, &["image", "entries", "size_bytes", "chunks"]);
    let report = run(server.address(), ["tag", "app:v1", "app:stable"]);
    assert_eq!((report["reference"].as_str(), report["image"].as_str()), (Some("app:stable"), Some(&*image)));
    assert_has_fields(&run(server.address(), ["rm", "app:v1"]), &["reference"]);
    let fixed = format!("any@{image}");
    assert_eq!(run(server.address(), ["inspect", &fixed])["image"].as_str(), Some(&*image), "by digest");
    let report = postcopy(server.address(), ["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_has_fields(&report, &["kernel", "can_map", "findings", "features"]);
    assert_has_fields(&report["features"][0], &["name", "available", "since", "used_for"]);
    // Where something is wrong, too.
    for args in [["inspect", "none"], ["rm", "none"], ["verify", "none"]] {
        let output = postcopy(server.address(), args).arg("--json").output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(report["error"].as_str().unwrap().contains("none"), "{report}");
        assert_eq!(output.status.code(), Some(1));
    }
    let store = StoreDir::of(&server);
    assert_has_fields(
        &store.gc(&["--no-wait"]),
        &[
            "packs",
            "manifests",
            "left_overs",
            "bytes",
            "waiting",
            "repacked",
            "repacked_into",
            "repacked_bytes",
        ],
    );
    assert_has_fields(
        &store.assert_sound(),
        &["packs", "pack_bytes", "chunks", "manifests", "references", "damage"],
    );
}

#[test]
fn the_exit_status_is_0_only_when_all_was_done_and_right() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (path, target) = (folder.path().join("mem"), folder.path().join("back"));
    fs::write(&path, memory_like(1 << 20, 101)).unwrap();
    let (mem, back) = (path.to_str().unwrap(), target.to_str().unwrap());
    let status = |args: &[&str]| postcopy(server.address(), args).output().unwrap().status.code().unwrap();
    assert_eq!(status(&["push", mem, "app"]), 0);
    let wrong: [&[&str]; 13] = [
        &["push", mem, "Bad Name"],
        &["push", mem, "app@blake3:00"],
        &["push", "/does/not/exist", "app"],
        &["push", mem, "app", "--chunk-size", "5000"],
        &["push", mem, "app", "--level", "99"],
        &["pull", "none", back],
        &["inspect", "none"],
        &["verify", "none"],
        &["rm", "none"],
        &["tag", "none", "other"],
        &["bench", "app", "none"],
        &["bench", "none", "mem"],
        &["nonsense"],
    ];
    for args in wrong {
        assert_ne!(status(args), 0, "{args:?}");
    }
    let right: [&[&str]; 7] = [
        &["pull", "app", back],
        &["ls"],
        &["inspect", "app"],
        &["verify", "app"],
        &["tag", "app", "b/c:d"],
        &["completions", "bash"],
        &["--version"],
    ];
    for args in right {
        assert_eq!(status(args), 0, "{args:?}");
    }
    // One wrong byte in the store.
    let (pack, entry) = StoreDir::of(&server).frames().swap_remove(3);
    flip(&pack, u64::from(entry.offset + entry.length / 2));
    fs::remove_dir_all(&target).unwrap();
    for args in [&["verify", "app"][..], &["pull", "app", back], &["bench", "app", "mem", "--no-eager"]] {
        let output = postcopy(server.address(), args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", shown(&output));
        assert!(shown(&output).contains(&entry.chunk.hex()), "{args:?}: {}", shown(&output));
    }
}

#[test]
fn every_help_has_an_example() {
    let programs = [("postcopy", &COMMANDS[..]), ("postcopyd", &["serve", "gc", "verify", "completions"])];
    for (program, commands) in programs {
        for command in commands.iter().map(|c| vec![*c]).chain([vec![]]) {
            let output = output(program, &[&command[..], &["--help"]].concat());
            let text = shown(&output);
            assert!(output.status.success(), "{text}");
            let (_, example) = text.split_once("\nExample").unwrap_or_else(|| panic!("no example: {text}"));
            assert!(example.contains(&[&[program], &command[..]].concat().join(" ")), "{text}");
        }
    }
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let text = shown(&output("postcopy", &["completions", shell]));
        COMMANDS.iter().for_each(|command| assert!(text.contains(command), "{shell} lacks {command}"));
        assert!(text.contains("server") && text.contains("chunk-size"), "{shell} lacks options");
        let text = shown(&output("postcopyd", &["completions", shell]));
        ["serve", "gc", "verify"]
            .iter()
            .for_each(|command| assert!(text.contains(command), "{shell} lacks {command}"));
    }
}

#[test]
fn a_server_that_is_not_there_or_no_address_is_an_error_that_says_what_to_do() {
    for args in
        [&["ls"][..], &["inspect", "app"], &["push", "/etc/hostname", "app"], &["bench", "app", "mem"]]
    {
        let text = fail(&nowhere(), args);
        assert!(text.contains("http://127.0.0.1:1") && text.contains("refused"), "{text}");
        assert!(text.contains("postcopyd serve") && text.contains("POSTCOPY_SERVER"), "{text}");
    }
    let text = fail(&"unix:/does/not/exist".parse().unwrap(), ["ls"]);
    assert!(text.contains("unix:/does/not/exist") && text.contains("postcopyd serve"), "{text}");
    for bad in ["127.0.0.1:7070", "https://h:1", "http://h", "unix:relative", "", "http://h:99999"] {
        let output = output("postcopy", &["--server", bad, "ls"]);
        let text = shown(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("http://host:port") && text.contains("unix:/path"), "{text}");
        assert!(text.contains("--server or POSTCOPY_SERVER"), "{text}");
        // What needs no server does not mind.
        assert!(run_without_server(bad).status.success());
    }
}

#[test]
fn a_server_that_is_no_postcopyd_is_named_with_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: ServerAddress = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    std::thread::spawn(move || {
        // Every other connection is closed without an answer.
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]);
            if number % 2 == 0 {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            }
        }
    });
    for args in [&["ls"][..], &["push", "/etc/hostname", "app"], &["inspect", "app"], &["rm", "app"]] {
        for _ in 0..2 {
            let text = fail(&address, args);
            assert!(text.contains(&format!("server {address}: ")), "{text}");
            assert!(
                text.contains("Does a postcopyd answer there? Check --server or POSTCOPY_SERVER"),
                "{text}"
            );
        }
    }
}

#[test]
fn the_next_step_follows_from_the_kind_of_an_error_and_not_from_its_words() {
    let server = Server::start();
    let text = fail(server.address(), ["inspect", "userfaultfd"]);
    assert!(text.contains("userfaultfd:latest is not in the store\n  `postcopy ls`"), "{text}");
    let text = fail(server.address(), ["working-set", "rm", "userfaultfd"]);
    assert!(text.contains("`postcopy working-set ls`") && !text.contains("doctor"), "{text}");
    assert!(!text.contains("--record"), "there is nothing to record for its removal: {text}");
    push_small(&server);
    let text = fail(server.address(), ["bench", "app", "none"]);
    assert!(
        text.contains("path \"none\" is no regular file of the image app:latest\n  `postcopy inspect`"),
        "{text}"
    );
    let text = fail(server.address(), ["working-set", "show", "app"]);
    assert!(text.matches("working set of app:latest").count() == 1 && text.contains("--record"), "{text}");
    let text = fail(server.address(), ["pull", "app", "/etc"]);
    assert!(text.contains("/etc exists already") && text.contains("\n  Name a new directory"), "{text}");
    let text = fail(&nowhere(), ["--server", "127.0.0.1:7070", "ls"]);
    assert!(text.contains("\n  Write http://127.0.0.1:7070."), "{text}");
    let text = fail(server.address(), ["pull", "app", "/does/not/exist", "--only", "userfaultfd*"]);
    assert!(
        text.contains("no file of app:latest matches 'userfaultfd*' (--only)\n  `postcopy inspect`"),
        "{text}"
    );
}

#[test]
fn an_error_without_a_reader_ends_the_command_as_any_error_does() {
    for is_stdout in [true, false] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = postcopy(&nowhere(), ["--json", "ls"]);
        if is_stdout {
            command.stdout(writer)
        } else {
            command.stderr(writer)
        };
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    }
}

#[test]
fn options_that_contradict_each_other_or_mean_nothing_are_refused() {
    let server = Server::start();
    push_small(&server);
    let refused: [(&[&str], &str); 3] = [
        (&["--fault-deadline", "0s"], "--on-loss would apply to every fault"),
        (&["--nothing-was-removed"], "--nothing-was-removed"),
        (&["--no-working-set", "--fill", "working-set"], "contradict each other"),
    ];
    for (options, reason) in refused {
        let args = [&["firecracker", "--image", "app", "--socket", "/does/not/exist"], options].concat();
        let text = fail(server.address(), args);
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn a_process_that_does_not_exist_is_named_by_every_command() {
    let server = Server::start();
    push_small(&server);
    // Above the largest pid that Linux can be configured to have (PID_MAX_LIMIT).
    let pid = "2147483647";
    let root = runtime_root();
    let root = root.path().to_str().unwrap();
    let commands: [&[&str]; 3] = [
        &["criu", "drain", pid, "--runtime-dir", root],
        &["working-set", "send", pid, "--runtime-dir", root],
        &["firecracker", "--image", "app", "--adopt", pid, "--runtime-dir", root],
    ];
    for args in commands {
        let text = fail(server.address(), args);
        assert!(text.contains(&format!("process {pid} does not exist")), "{text}");
    }
}

#[test]
fn a_path_of_the_wrong_kind_is_named_with_its_option() {
    let server = Server::start();
    push_small(&server);
    let (folder, root) = (tempfile::tempdir().unwrap(), runtime_root());
    let file = folder.path().join("file");
    fs::write(&file, "a file").unwrap();
    let (file, socket) = (file.to_str().unwrap(), folder.path().join("none/socket"));
    let socket = socket.to_str().unwrap();
    let daemon = ["--image", "app", "--runtime-dir", root.path().to_str().unwrap()];
    let reasons: [(&[&str], &str); 3] = [
        (&["firecracker", "--socket", socket, "--trace", file], "--trace needs a directory"),
        (&["firecracker", "--socket", socket], "none/socket: its directory does not exist"),
        (&["criu", "-D", "/does/not/exist"], "has no pstree.img"),
    ];
    for (args, reason) in reasons {
        let text = fail(server.address(), args.iter().chain(&daemon));
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn bench_keeps_a_file_in_the_place_of_its_trace() {
    let server = Server::start();
    push_small(&server);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "a file").unwrap();
    let text = fail(server.address(), ["bench", "app", "mem", "--trace", file.to_str().unwrap()]);
    assert!(text.contains(&format!("--trace {}: File exists", file.display())), "{text}");
    assert_eq!(fs::read(&file).unwrap(), b"a file");
}

#[test]
fn a_list_of_no_images_says_how_to_store_one() {
    let server = Server::start();
    let output = postcopy(server.address(), ["ls"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim_end(),
        "no images yet: `postcopy push PATH NAME` stores one"
    );
}

#[test]
fn a_daemon_that_does_not_start_leaves_nothing_behind() {
    let (server, root) = (Server::start(), runtime_root());
    push_small(&server);
    let folder = tempfile::tempdir().unwrap();
    let (socket, file) = (folder.path().join("socket"), folder.path().join("file"));
    fs::write(&file, "a file").unwrap();
    let root = root.path().to_str().unwrap();
    let daemon = |more: &[&str]| {
        let args = ["firecracker", "--image", "app", "--runtime-dir", root];
        let text = fail(server.address(), args.iter().chain(more));
        assert_eq!(fs::read_dir(root).unwrap().count(), 0, "{text}");
        text
    };
    let (first, second) = (socket.to_str().unwrap(), file.to_str().unwrap());
    let text = daemon(&["--socket", first, "--socket", second]);
    assert!(text.contains("file: exists and is not a socket. Move it away"), "{text}");
    assert!(!socket.exists());
    let mut program = Command::new("sleep").arg("60").spawn().unwrap();
    let text = daemon(&["--adopt", &program.id().to_string()]);
    let reason = format!("process {} has no userfaultfd: it is not a Firecracker", program.id());
    assert!(text.contains(&reason) && !text.contains("doctor"), "{text}");
    program.kill().unwrap();
    program.wait().unwrap();
}

#[test]
fn a_file_in_the_place_of_a_server_s_socket_is_kept_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = (folder.path().join("store"), folder.path().join("file"));
    fs::write(&file, "a file").unwrap();
    let listen = format!("unix:{}", file.display());
    let output = output("postcopyd", &["serve", "--store", store.to_str().unwrap(), "--listen", &listen]);
    let text = shown(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("{listen}: exists and is not a socket. Move it away")), "{text}");
    assert_eq!(fs::read(&file).unwrap(), b"a file");
}

#[test]
fn a_log_level_that_does_not_exist_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let store = store.to_str().unwrap();
    drop(Server::on(Path::new(store), "127.0.0.1:0"));
    for (program, args) in [("postcopy", &["doctor"][..]), ("postcopyd", &["verify", "--store", store])] {
        let logging = |level: &str| {
            let mut command = Command::new(binary(program));
            command.args(args).env("POSTCOPY_LOG", level).output().unwrap()
        };
        for wrong in ["loud", "postcopy=info", "-1"] {
            let output = logging(wrong);
            let text = shown(&output);
            assert_eq!(output.status.code(), Some(1), "{text}");
            let reason = format!("{program}: POSTCOPY_LOG is {wrong:?}: it must be error, warn or info\n");
            assert_eq!(String::from_utf8_lossy(&output.stderr), reason);
        }
        for right in ["error", "warn", "info", ""] {
            assert!(!shown(&logging(right)).contains("POSTCOPY_LOG"), "{right}");
        }
    }
}

/// Stores a small file as `app`.
fn push_small(server: &Server) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    fs::write(&path, memory_like(64 << 10, 104)).unwrap();
    let _ = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app")]);
}

fn run_without_server(address: &str) -> std::process::Output {
    output("postcopy", &["--server", address, "doctor"])
}

#[test]
fn the_server_is_named_by_option_or_environment_and_the_option_wins() {
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("socket").display());
    let server = Server::on(&folder.path().join("store"), &socket);
    let path = folder.path().join("mem");
    fs::write(&path, memory_like(1 << 20, 102)).unwrap();
    let target = folder.path().join("back");
    let _ = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app")]);
    let _ = run(server.address(), [OsStr::new("pull"), OsStr::new("app"), target.as_os_str()]);
    assert!(fs::read(target.join("mem")).unwrap() == memory_like(1 << 20, 102));
    for args in [["--server", &socket, "ls"], ["ls", "--server", &socket]] {
        assert_eq!(run(&nowhere(), args).as_array().unwrap().len(), 1, "the option wins");
    }
    let _ = run(server.address(), ["bench", "app", "mem", "--no-eager"]);
}

#[test]
fn bench_reports_what_it_did() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let size = (4u64 << 20) + 1;
    fs::write(&path, memory_like(usize::try_from(size).unwrap(), 103)).unwrap();
    let _ = run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new("app")]);
    for more in [&["--no-eager"][..], &[], &["--threads", "4", "--fill"]] {
        let report = run(server.address(), [&["bench", "app", "mem", "--seed", "7"], more].concat());
        let number = |field: &str| report[field].as_f64().unwrap_or_else(|| panic!("no {field} in {report}"));
        assert_eq!(
            (report["size_bytes"].as_u64(), report["checked_bytes"].as_u64()),
            (Some(size), Some(size))
        );
        assert_eq!((report["seed"].as_u64(), report["pages"].as_u64()), (Some(7), Some(1025)));
        assert!(0.0 < number("touch_p50_us") && number("touch_p50_us") <= number("touch_p90_us"), "{report}");
        assert!(number("touch_p90_us") <= number("touch_p99_us"), "{report}");
        assert!(1.0 <= number("touches") && number("touches") <= 1025.0, "{report}");
        assert!(1.0 <= number("faults") && number("faults") <= 1025.0, "{report}");
        assert!(
            number("demand_chunks") + number("bulk_chunks") >= 60.0,
            "65 chunks, some of them zero: {report}"
        );
        assert!(
            0.0 < number("frame_bytes") && number("frame_bytes") < number("size_bytes") * 1.1,
            "{report}"
        );
        assert!(
            0.0 < number("first_byte_ms") && number("first_byte_ms") <= number("all_touched_ms"),
            "{report}"
        );
        if more.contains(&"--no-eager") {
            assert!(report["eager_ms"].is_null(), "{report}");
        } else {
            let ratio = number("eager_ms") / number("first_byte_ms");
            assert!((number("eager_to_first_byte") - ratio).abs() < ratio / 100.0, "{report}");
        }
        if !more.contains(&"--fill") {
            assert_eq!(report["bulk_chunks"].as_u64(), Some(0));
        }
    }
}

#[test]
fn doctor_says_whether_files_can_be_mapped_here() {
    let output = output("postcopy", &["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.success(), report["can_map"].as_bool().unwrap(), "{report}");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(report["kernel"].as_str().unwrap().contains(kernel.trim()), "{report}");
    let features: Vec<_> =
        report["features"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert!(features.iter().any(|name| name.to_lowercase().contains("poison")), "{features:?}");
    for finding in report["findings"].as_array().unwrap() {
        assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        assert!(finding["ok"].as_bool().unwrap() || !finding["advice"].is_null(), "no advice: {finding}");
    }
}

#[test]
fn doctor_refuses_a_process_that_does_not_exist() {
    // Above the largest pid that Linux can be configured to have (PID_MAX_LIMIT).
    let output = output("postcopy", &["doctor", "--pid", "2147483647"]);
    let text = shown(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("process 2147483647 does not exist"), "{text}");
}

#[test]
fn doctor_says_whether_it_is_outside_of_what_stops_a_process() {
    let name = "cli::doctor_says_whether_it_is_outside_of_what_stops_a_process";
    if !is_root() {
        return skip(name, "cgroups need root");
    }
    let Some(cgroup) = MemoryCgroup::new() else {
        return skip(name, "there are no memory cgroups of version 1");
    };
    let mut target = Command::new("sleep").arg("60").spawn().unwrap();
    cgroup.add(target.id());
    let pid = target.id().to_string();
    let is_outside = |output: Output| {
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["what"] == "memory cgroup").unwrap();
        finding["ok"].as_bool().unwrap()
    };
    assert!(is_outside(output("postcopy", &["doctor", "--json", "--pid", &pid])));
    // From within. Its shell waits until it is there.
    let script = format!("read _; exec {} doctor --json --pid {pid}", binary("postcopy").display());
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut shell = shell.spawn().unwrap();
    cgroup.add(shell.id());
    drop(shell.stdin.take().map(|mut stdin| std::io::Write::write_all(&mut stdin, b"\n")));
    assert!(!is_outside(shell.wait_with_output().unwrap()));
    target.kill().unwrap();
    target.wait().unwrap();
}
