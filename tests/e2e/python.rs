//! A client in another language: what the .proto files and the documented frame layout say is all that it takes.

use crate::map::{push, random_pages};
use postcopy::{Options, ServerAddress, Session};
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::proxy::{Break, How, Proxy};
use postcopy_tests::server::Server;
use postcopy_tests::store::shown;
use postcopy_tests::{PAGE, skip};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

/// The virtual environment's Python with all that the script imports.
fn python(test: &str) -> Option<PathBuf> {
    let python = workspace().join(".venv/bin/python");
    let imports =
        ["-c", "import blake3, grpc, grpc_health.v1, grpc_reflection.v1alpha, grpc_tools, zstandard"];
    if Command::new(&python).args(imports).output().is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let how = "python3 -m venv .venv && .venv/bin/pip install -r tests/python/requirements.txt";
    skip(test, &format!("{} lacks what tests/python/requirements.txt lists: {how}", python.display()));
    None
}

#[test]
fn a_python_client_reads_what_was_pushed() {
    let Some(python) = python("python::a_python_client_reads_what_was_pushed") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (stubs, out, tree) =
        (folder.path().join("stubs"), folder.path().join("out"), folder.path().join("tree"));
    [&stubs, &out, &tree].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let protos = workspace().join("proto/proto");
    let mut generate = Command::new(&python);
    generate.args(["-m", "grpc_tools.protoc"]).arg("-I").arg(&protos);
    for kind in ["--python_out", "--grpc_python_out"] {
        generate.arg(format!("{kind}={}", stubs.display()));
    }
    for proto in ["image_service", "page_service", "manifest", "reference"] {
        generate.arg(format!("postcopy/v1/{proto}.proto"));
    }
    let generated = generate.output().unwrap();
    assert!(generated.status.success(), "{}", shown(&generated));

    // Raw and compressed frames, frames of some pages, zero chunks, a short last chunk, and more than one segment.
    let chunk = 4096;
    let mut bytes = [
        noise(50 * chunk, 80),
        vec![b'x'; 300 * chunk],
        vec![0; 17_000 * chunk],
        memory_like(900 * chunk, 81),
    ]
    .concat();
    bytes.extend_from_slice(b"end");
    fs::write(tree.join("mem"), &bytes).unwrap();
    fs::write(tree.join("before"), noise(2 * chunk, 82)).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    let server = Server::start();
    let push = |reference: &str, size: &str| {
        let args = [
            OsStr::new("push"),
            tree.as_os_str(),
            OsStr::new(reference),
            OsStr::new("--chunk-size"),
            OsStr::new(size),
        ];
        run(server.address(), args)
    };
    let (small, large) = (push("app/mem:small", "4096"), push("app/mem:large", "2097152"));
    for (reference, pushed, segments) in [("app/mem:small", &small, 2), ("app/mem:large", &large, 1)] {
        let mut script = Command::new(&python);
        script.arg(workspace().join("tests/python/client.py")).arg(server.address().to_string());
        let output = script.arg(&stubs).args([reference, "mem"]).arg(&out).output().unwrap();
        assert!(output.status.success(), "{}", shown(&output));
        let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
        for how in ["read_file", "fetch", "stream"] {
            assert!(fs::read(out.join(how)).unwrap() == bytes, "{how} of {reference} differs");
            fs::remove_file(out.join(how)).unwrap();
        }
        let hex = |report: &Value| report["image"].as_str().unwrap().trim_start_matches("blake3:").to_owned();
        assert_eq!(seen["image"], hex(pushed));
        assert_eq!(seen["file"], blake3::hash(&bytes).to_hex().to_string());
        let listed = |name: &str, report: &Value| json!({"reference": name, "image": hex(report), "size_bytes": report["size_bytes"]});
        assert_eq!(seen["images"], json!([listed("app/mem:large", &large), listed("app/mem:small", &small)]));
        assert_eq!(seen["segments"], segments);
        assert!(seen["zeros"].as_u64().unwrap() > 0 && seen["first"].as_u64().unwrap() > 0, "{seen}");
        assert_eq!(
            seen["codecs"],
            if segments == 2 { json!([0, 1]) } else { json!([1]) },
            "both codecs were met"
        );
        assert_eq!(seen["not_found"][0], "NOT_FOUND");
        assert!(seen["not_found"][1].as_str().unwrap().contains("none:latest"), "{seen}");
        for version in ["v1", "v1alpha"] {
            let services = seen["reflection"][version].as_array().unwrap();
            for name in ["postcopy.v1.ImageService", "postcopy.v1.PageService", "grpc.health.v1.Health"] {
                assert!(
                    services.contains(&name.into()),
                    "reflection {version} does not list {name}: {services:?}"
                );
            }
            assert!(!services.contains(&"postcopy.v1.MountService".into()), "it is a host's: {services:?}");
        }
        let serving = json!({"": "SERVING", "postcopy.v1.PageService": "SERVING", "postcopy.v1.ImageService": "SERVING"});
        assert_eq!(seen["health"], serving);
    }
}

/// A proxy made of grpcio, with its end at the drop.
struct PassThrough {
    child: Child,
    address: ServerAddress,
}

impl PassThrough {
    fn start(python: &Path, server: &ServerAddress, options: &[&str]) -> Self {
        let mut proxy = Command::new(python);
        proxy.arg(workspace().join("tests/python/pass_through.py")).arg(server.to_string()).args(options);
        let mut child = proxy.stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
        Self { child, address: format!("http://127.0.0.1:{}", port.trim()).parse().unwrap() }
    }
}

impl Drop for PassThrough {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// gRPC's core sends the headers of an answer with its first message, and takes few pings.
#[test]
fn a_session_and_every_command_work_through_a_proxy_of_grpcio() {
    let Some(python) = python("python::a_session_and_every_command_work_through_a_proxy_of_grpcio") else {
        return;
    };
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("mem"), folder.path().join("out"));
    let bytes = memory_like(8 << 20, 83);
    fs::write(&path, &bytes).unwrap();
    let proxy = PassThrough::start(&python, server.address(), &[]);
    let _ = run(&proxy.address, [OsStr::new("push"), path.as_os_str(), OsStr::new("app:v1")]);
    let _ = run(&proxy.address, ["verify", "app:v1"]);
    let _ = run(&proxy.address, [OsStr::new("pull"), OsStr::new("app:v1"), out.as_os_str()]);
    assert!(fs::read(out.join("mem")).unwrap() == bytes);

    // A lane that is lost while the server is away is made again by the next fault.
    let chaos = Proxy::start(&proxy.address, Break::Never);
    for fill in [false, true] {
        let reference = "app:v1".parse().unwrap();
        let session = Session::open(chaos.address(), &reference, Options::DEFAULT.fill(fill)).unwrap();
        let region = session.map("mem").unwrap();
        assert_eq!(region[0], bytes[0]);
        chaos.end_all(How::Reset);
        assert!(region[4 << 20..][..PAGE] == bytes[4 << 20..][..PAGE]);
        if fill {
            session.wait_resident(Duration::from_secs(60)).unwrap();
        }
        assert!(*region == bytes[..], "a wrong byte");
    }
}

/// gRPC's servers can end connections by their age: GOAWAY, a grace time for streams, then the end. A lane is a stream
/// that never ends by itself.
#[test]
fn no_fault_is_lost_where_connections_end_by_their_age() {
    let Some(python) = python("python::no_fault_is_lost_where_connections_end_by_their_age") else { return };
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = noise(2048 * PAGE, 84);
    fs::write(&path, &bytes).unwrap();
    push(&server, &path, "app", PAGE);
    let age = ["grpc.max_connection_age_ms=300", "grpc.max_connection_age_grace_ms=50"];
    let proxy = PassThrough::start(&python, server.address(), &age);
    let counting = Proxy::start(&proxy.address, Break::Never);
    while counting.connections() < 24 {
        let session = Session::open(counting.address(), &"app".parse().unwrap(), Options::DEFAULT).unwrap();
        let region = session.map("mem").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for page in random_pages(bytes.len()) {
                        let at = page * PAGE..(page + 1) * PAGE;
                        assert!(region[at.clone()] == bytes[at], "page {page}");
                    }
                });
            }
        });
        assert_eq!(session.error(), None);
        assert_eq!((session.failures().count, session.progress().poisoned_pages), (0, 0));
    }
}
