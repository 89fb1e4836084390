//! A client in another language: what the .proto files and the documented frame layout say is all that it takes.

use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::skip;
use postcopy_tests::store::shown;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    for proto in ["image_service", "page_service", "manifest"] {
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
        }
        let serving = json!({"": "SERVING", "postcopy.v1.PageService": "SERVING", "postcopy.v1.ImageService": "SERVING"});
        assert_eq!(seen["health"], serving);
    }
}
