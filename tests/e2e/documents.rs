//! README.md, the guides and the demo do what they say.

use postcopy_tests::criu::Criu;
use postcopy_tests::daemon::runtime_root;
use postcopy_tests::{binary, is_root, skip, wait_until};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The fenced blocks of README.md in that language.
fn blocks(language: &str) -> Vec<String> {
    blocks_of("README.md", language)
}

fn blocks_of(document: &str, language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(workspace().join(document)).unwrap();
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

fn show(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// A program that anybody may run: the checkout may lie where only its owner may go.
fn copy_for_all(program: &Path, folder: &Path) -> PathBuf {
    let target = folder.join(program.file_name().unwrap());
    std::fs::copy(program, &target).unwrap();
    std::fs::set_permissions(&target, PermissionsExt::from_mode(0o755)).unwrap();
    target
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ]);
    command.arg(program);
    command
}

#[test]
fn the_readme_tour_and_its_rust_example_run() {
    let bin = binary("postcopy").parent().unwrap().to_owned();
    let example = std::fs::read_to_string(workspace().join("client/examples/readme.rs")).unwrap();
    assert_eq!(blocks("rust"), [example], "README.md shows client/examples/readme.rs as it is");

    let folder = tempfile::tempdir().unwrap();
    let tour = blocks("sh");
    assert!(tour.len() >= 5, "the tour has its steps");
    // The example runs where the image is there, before `rm`; the server is told to end in any case.
    let mut script = String::from("set -eu\ntrap 'kill $!; wait' EXIT\n");
    for (i, step) in tour.iter().enumerate() {
        script += step;
        if i == 3 {
            script += "readme\n";
        }
    }
    let path =
        format!("{}:{}:{}", bin.display(), bin.join("examples").display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(folder.path())
        .env("PATH", path)
        .env_remove("POSTCOPY_SERVER")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = show(&output);
    assert!(output.status.success(), "{shown}");
    for expected in
        ["every byte right", "is sound", "demo:stable is blake3:", "the last line begins with '1'", "faults"]
    {
        assert!(shown.contains(expected), "{expected:?} is not in: {shown}");
    }
}

#[test]
fn the_demo_runs_for_an_ordinary_user() {
    let name = "documents::the_demo_runs_for_an_ordinary_user";
    if !is_root() {
        return skip(name, "setpriv needs root");
    }
    let folder = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    for file in [binary("postcopy"), binary("postcopyd"), workspace().join("tests/demo")] {
        copy_for_all(&file, folder.path());
    }
    let memory = folder.path().join("mem");
    std::fs::write(&memory, postcopy_tests::fixtures::memory_like(20 << 20, 9)).unwrap();
    std::fs::set_permissions(&memory, PermissionsExt::from_mode(0o644)).unwrap();

    let output = as_nobody(&folder.path().join("demo"))
        .arg(&memory)
        .env("POSTCOPY_BIN", folder.path())
        .env("TMPDIR", "/tmp")
        .env("HOME", folder.path())
        .current_dir(folder.path())
        .output()
        .unwrap();
    let shown = show(&output);
    assert!(output.status.success(), "{shown}");
    assert!(shown.contains("every byte right") && shown.contains("Summary"), "{shown}");
}

#[test]
fn user_mode_faults_only_is_said_and_enough() {
    let name = "documents::user_mode_faults_only_is_said_and_enough";
    if !is_root() {
        return skip(name, "setpriv needs root");
    }
    let folder = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let program = copy_for_all(&binary("postcopy"), folder.path());
    let output = as_nobody(&program).args(["doctor", "--json"]).current_dir("/").output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = |what: &str| {
        let findings = report["findings"].as_array().unwrap();
        findings.iter().find(|f| f["what"].as_str().unwrap().contains(what)).unwrap().clone()
    };
    assert_eq!(report["can_map"], true, "{report}");
    let kernel_faults = finding("faults of the kernel");
    let open =
        std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|s| s.trim() == "1");
    assert_eq!(kernel_faults["ok"], open, "{report}");
    assert!(open || kernel_faults["advice"].as_str().unwrap().contains("EFAULT"), "{report}");
}

#[test]
fn the_demo_ends_its_server_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let memory = folder.path().join("mem");
    std::fs::write(&memory, postcopy_tests::fixtures::memory_like(1 << 20, 2)).unwrap();
    let scratch = folder.path().join("tmp");
    std::fs::create_dir(&scratch).unwrap();
    let bin = binary("postcopy").parent().unwrap().to_owned();
    let output = Command::new(workspace().join("tests/demo"))
        .arg(&memory)
        .env("POSTCOPY_BIN", bin)
        .env("TMPDIR", &scratch)
        .env("DEMO_MIB", "20")
        .output()
        .unwrap();
    let shown = show(&output);
    assert!(output.status.success(), "{shown}");
    let shows_redis = shown.contains("their digest is the same") && shown.contains("first GET");
    assert!(shows_redis || !is_root() || Criu::find().is_err(), "{shown}");
    wait_until("the demo's scratch folder is gone", || std::fs::read_dir(&scratch).unwrap().next().is_none());
}

/// Runs the commands of a guide in `folder`, with these programs in its `bin` before all others, in a shell with these
/// options.
fn run_guide(document: &str, folder: &Path, programs: &[(&str, &str)], options: &str) -> String {
    let bin = folder.join("bin");
    std::fs::create_dir(&bin).unwrap();
    for (name, script) in programs {
        std::fs::write(bin.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(bin.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let runtime = runtime_root();
    let script = format!("set {options}\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n")
        + &blocks_of(document, "sh").concat();
    let ours = binary("postcopy").parent().unwrap().to_owned();
    let path = format!("{}:{}:{}", bin.display(), ours.display(), std::env::var("PATH").unwrap());
    let output = Command::new("timeout")
        .args(["60", "bash", "-c", &script])
        .current_dir(folder)
        .env("PATH", path)
        .env("POSTCOPY_RUNTIME_DIR", runtime.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = show(&output);
    assert!(output.status.success(), "{shown}");
    shown
}

#[test]
fn the_guide_to_criu_leads_to_a_lazy_restore() {
    let name = "documents::the_guide_to_criu_leads_to_a_lazy_restore";
    if !is_root() {
        return skip(name, "restoring processes needs root");
    }
    let criu = match Criu::find() {
        Ok(criu) => criu.command("usr/sbin/criu"),
        Err(why) => return skip(name, &why),
    };
    let words = [criu.get_program()].into_iter().chain(criu.get_args()).map(|word| word.to_str().unwrap());
    let criu = format!("exec {} \"$@\"", words.collect::<Vec<_>>().join(" "));
    let expected: u64 = (0..20_000).map(|page| page % 251).sum();
    // As in a script, and with the job control that an interactive shell has.
    for options in ["-eu", "-eum"] {
        let folder = tempfile::tempdir().unwrap();
        run_guide("docs/CRIU.md", folder.path(), &[("criu", &criu)], options);
        assert_eq!(std::fs::read_to_string(folder.path().join("answer")).unwrap(), expected.to_string());
    }
}

#[test]
fn the_guide_to_the_mount_leads_to_files() {
    let name = "documents::the_guide_to_the_mount_leads_to_files";
    if !is_root() || !Path::new("/dev/fuse").exists() {
        return skip(name, "mounting needs root and /dev/fuse");
    }
    for options in ["-eu", "-eum"] {
        let folder = tempfile::tempdir().unwrap();
        let shown = run_guide("docs/MOUNT.md", folder.path(), &[], options);
        for expected in ["serving", "numbers.txt", "by-digest/blake3-", "demo:v1: stored"] {
            assert!(shown.contains(expected), "{expected:?} is not in: {shown}");
        }
        assert_eq!(std::fs::read_dir(folder.path().join("images")).unwrap().count(), 0, "it is unmounted");
    }
}

#[test]
fn the_guide_to_firecracker_leads_to_a_lazy_restore() {
    let name = "documents::the_guide_to_firecracker_leads_to_a_lazy_restore";
    if !is_root() {
        return skip(name, "a userfaultfd for all faults needs root");
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    std::fs::write(snapshot.join("guest.mem"), postcopy_tests::fixtures::memory_like(16 << 20, 9)).unwrap();
    std::fs::write(snapshot.join("guest.state"), "state").unwrap();
    // In their place: the stand-in loads what curl is told to have loaded.
    let control = std::os::unix::net::UnixListener::bind(folder.path().join("control")).unwrap();
    let backend = r#"$(sed -n 's/.*"backend_path": "\(.*\)".*/\1/p' load.json)"#;
    let vmm = binary("postcopy-vmm");
    let load = format!("exec {} control {backend} snapshot/guest.mem new small:16", vmm.display());
    let listen = "exec python3 -c 'import socket,time; s=socket.socket(socket.AF_UNIX); s.bind(\"firecracker.sock\"); time.sleep(60)'";
    let machine = std::thread::spawn(move || {
        use std::io::{BufRead, BufReader, Write};
        let (mut stream, _) = control.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let loaded = lines.next().unwrap().unwrap();
        stream.write_all(b"check\n").unwrap();
        let checked = lines.next().unwrap().unwrap();
        stream.write_all(b"exit\n").unwrap();
        (loaded, checked)
    });
    run_guide("docs/FIRECRACKER.md", folder.path(), &[("firecracker", listen), ("curl", &load)], "-eu");
    assert_eq!(machine.join().unwrap(), ("loaded [true, true]".to_owned(), "wrong 0".to_owned()));
    assert_eq!(std::fs::read_to_string(folder.path().join("local/guest.state")).unwrap(), "state");
}

/// The source without tests and comments: what its modules import.
fn imports(room: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    if room.is_dir() {
        for entry in std::fs::read_dir(room).unwrap() {
            found.extend(imports(&entry.unwrap().path()));
        }
        return found;
    }
    if room.file_name().unwrap() == "tests.rs" {
        return found;
    }
    let text = std::fs::read_to_string(room).unwrap();
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    for line in lines {
        for after in line.split("crate::").skip(1) {
            let name = after.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            found.insert(name.to_owned());
        }
    }
    found
}

#[test]
fn imports_of_the_library_follow_the_arrows() {
    let source = workspace().join("client/src");
    let diagram = blocks_of("ARCHITECTURE.md", "rooms").concat();
    let rooms: Vec<(&str, BTreeSet<String>)> = diagram
        .lines()
        .map(|line| {
            let (room, below) = line.split_once("->").expect("an arrow");
            (room.trim(), below.split_whitespace().map(str::to_owned).collect())
        })
        .collect();
    for (at, (room, below)) in rooms.iter().enumerate() {
        let mut imported = imports(&source.join(format!("{room}.rs")));
        if source.join(room).is_dir() {
            imported.extend(imports(&source.join(room)));
        }
        imported.remove(*room);
        assert_eq!(imported, *below, "what `{room}` imports, and what ARCHITECTURE.md says");
        let above: Vec<_> = rooms[..=at].iter().map(|(room, _)| *room).collect();
        let up = below.iter().find(|below| above.contains(&below.as_str()));
        assert_eq!(up, None, "`{room}` imports something above it");
    }
    let listed: BTreeSet<_> = rooms.iter().map(|(room, _)| (*room).to_owned()).collect();
    let files = std::fs::read_dir(&source).unwrap().map(|entry| entry.unwrap().path());
    let there =
        files.filter(|path| path.is_file()).map(|path| path.file_stem().unwrap().display().to_string());
    let there: BTreeSet<_> = there.filter(|room| room != "lib").collect();
    assert_eq!(listed, there, "the rooms in ARCHITECTURE.md, and in client/src");
}

#[test]
fn the_files_that_documents_name_exist() {
    for document in ["ARCHITECTURE.md", "docs/FAULTS.md", "docs/FORMATS.md", "docs/BENCHMARKS.md"] {
        let text = std::fs::read_to_string(workspace().join(document)).unwrap();
        for named in text.split('`').filter(|named| named.ends_with(".rs") && named.contains('/')) {
            let inner = ["client/cli", "client/mount"].into_iter().find(|package| named.starts_with(package));
            let (package, file) = match inner {
                Some(package) => (package, &named[package.len() + 1..]),
                None => named.split_once('/').unwrap(),
            };
            if inner.is_none() && !["client", "server", "proto", "tests"].contains(&package) {
                continue;
            }
            let path = workspace().join(package);
            let exists = path.join("src").join(file).exists() || path.join(file).exists();
            assert!(exists, "{document} names {named}");
        }
    }
}
