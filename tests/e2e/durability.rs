//! What is committed stays, and what is not leaves nothing but garbage: the server is killed at every step of an
//! upload; and the order of write, fsync and rename, which a kill does not show, is read from strace.

use postcopy::ServerAddress;
use postcopy::proto::digest::Digest;
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::fixtures::noise;
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, digest, is_staged};
use postcopy_tests::{binary, is_root, skip, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const SYSCALLS: &str = "fsync,fdatasync,rename,renameat,renameat2,link,linkat";

fn has_strace(test: &str) -> bool {
    let works =
        Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let works = works.is_ok_and(|status| status.success());
    if !works {
        skip(test, "strace is not installed, or may not trace here");
    }
    works
}

/// A server under strace. The server itself ends with this value: strace's end alone would let it run on.
struct Traced {
    server: Server,
    pid: Pid,
}

impl Traced {
    fn start(store: &Path, options: &[&str]) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq"]).args(options);
        command
            .arg(binary("postcopyd"))
            .arg("serve")
            .arg("--store")
            .arg(store)
            .args(["--listen", "127.0.0.1:0"]);
        let server = Server::spawn(command, store).expect("it starts under strace");
        let strace = server.pid();
        let children = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children"));
        let children = children.expect("strace runs");
        let pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        Self { server, pid: pid.expect("the server is strace's child") }
    }

    fn address(&self) -> &ServerAddress {
        self.server.address()
    }

    fn signal(&mut self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        // strace ends when its tracee has; only then is the store nobody's.
        let strace = self.server.pid();
        wait_until("strace's end", || {
            fs::read_to_string(format!("/proc/{strace}/stat")).map_or(true, |stat| stat.contains(") Z"))
        });
    }
}

/// How far an upload is, as the store's directory tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Before,
    InPack,
    PackToManifest,
    ManifestToReference,
    Committed,
}

/// What one upload brings into a store.
struct Upload {
    packs_before: BTreeSet<PathBuf>,
    image: Digest,
    reference: PathBuf,
}

impl Upload {
    fn phase(&self, store: &StoreDir) -> Phase {
        let reference = fs::read_to_string(&self.reference).unwrap_or_default();
        if reference.trim_end() == self.image.to_string() {
            Phase::Committed
        } else if store.manifest(&self.image).exists() {
            Phase::ManifestToReference
        } else if store.packs().difference(&self.packs_before).next().is_some() {
            Phase::PackToManifest
        } else if store.files("packs").iter().any(|path| is_staged(path)) {
            Phase::InPack
        } else {
            Phase::Before
        }
    }
}

/// One store, killed again and again.
struct Victim {
    folder: TempDir,
    store: StoreDir,
    committed: BTreeMap<String, Vec<u8>>,
}

impl Victim {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let store = StoreDir::new(&folder.path().join("store"));
        let mut victim = Self { folder, store, committed: BTreeMap::new() };
        let server = Server::on(victim.store.root(), "127.0.0.1:0");
        victim.push(server.address(), "app", noise(150_000, 50));
        victim.push(server.address(), "kept", noise(100_000, 51));
        victim
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("mem")
    }

    fn push(&mut self, server: &ServerAddress, reference: &str, bytes: Vec<u8>) -> Digest {
        fs::write(self.file(), &bytes).expect("a file can be written");
        let pushed = run(server, [OsStr::new("push"), self.file().as_os_str(), OsStr::new(reference)]);
        self.committed.insert(reference.to_owned(), bytes);
        digest(&pushed["image"])
    }

    /// Kills the server in `aim` of an upload, `steps` looks later; the phase that it was in, and what holds after.
    fn round(&mut self, aim: Phase, steps: u64, seed: u64, image_of: &Server) -> Phase {
        let bytes = noise(200_000, seed);
        fs::write(self.file(), &bytes).expect("a file can be written");
        let pushed =
            run(image_of.address(), [OsStr::new("push"), self.file().as_os_str(), OsStr::new("app")]);
        let upload = Upload {
            packs_before: self.store.packs(),
            image: digest(&pushed["image"]),
            reference: self.store.reference("app", "latest"),
        };
        let inject = format!("inject={SYSCALLS}:delay_enter=15000");
        let trace = format!("trace={SYSCALLS}");
        let mut traced = Traced::start(
            self.store.root(),
            &["-o", "/dev/null", "-e", trace.as_str(), "-e", inject.as_str()],
        );
        let mut push =
            postcopy(traced.address(), [OsStr::new("push"), self.file().as_os_str(), OsStr::new("app")]);
        let mut push = push.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        let mut looks = 0;
        wait_until("the phase", || {
            looks += u64::from(upload.phase(&self.store) >= aim);
            looks > steps
        });
        traced.signal(Signal::KILL);
        drop(traced);
        let phase = upload.phase(&self.store);
        let told = push.wait().expect("it ends").success();
        assert!(!told || phase == Phase::Committed, "the push was told success in {phase:?}");

        self.store.assert_sound();
        let server = Server::on(self.store.root(), "127.0.0.1:0");
        let rpc = Rpc::connect(server.address());
        if phase == Phase::Committed {
            self.committed.insert("app".to_owned(), bytes.clone());
        }
        for (reference, bytes) in &self.committed {
            let read = rpc.read_file(reference, "mem").expect("what was committed is served");
            assert!(read == *bytes, "{reference} after a kill in {phase:?}");
        }
        assert_eq!(self.push(server.address(), "app", bytes), upload.image);
        assert!(rpc.read_file("app", "mem").expect("served") == self.committed["app"]);
        self.store.assert_sound();
        phase
    }
}

#[test]
fn a_server_killed_in_any_phase_of_an_upload_loses_nothing_that_was_committed() {
    if !has_strace("durability::a_server_killed_in_any_phase_of_an_upload_loses_nothing_that_was_committed") {
        return;
    }
    const AIMS: [Phase; 3] = [Phase::InPack, Phase::PackToManifest, Phase::ManifestToReference];
    let image_of = Server::start();
    let workers = 3u64;
    let phases: Vec<Phase> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|worker| {
                let image_of = &image_of;
                scope.spawn(move || {
                    let mut victim = Victim::new();
                    let rounds = (0..17u64).map(|round| {
                        let aim = AIMS[usize::try_from((round + worker) % 3).expect("small")];
                        victim.round(aim, round / 3 * 2, 1000 * (worker + 1) + round, image_of)
                    });
                    rounds.collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker")).collect()
    });
    let mut table = BTreeMap::new();
    phases.iter().for_each(|phase| *table.entry(*phase).or_insert(0) += 1);
    eprintln!("{} kills: {table:?}", phases.len());
    assert!(phases.len() >= 50);
    for phase in AIMS {
        assert!(table.get(&phase).copied().unwrap_or(0) >= 8, "{phase:?} was hit too seldom: {table:?}");
    }
}

/// A system call, and where in the trace it began and ended.
#[derive(Debug)]
struct Call {
    name: String,
    paths: Vec<PathBuf>,
    began: usize,
    ended: usize,
}

/// Reads what `strace -f -y` wrote. Calls of several threads are cut in two by `<unfinished ...>`.
fn calls(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut unfinished: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for (at, line) in trace.lines().enumerate() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        let (began, begin, end) = if let Some(begin) = rest.strip_suffix(" <unfinished ...>") {
            unfinished.insert(pid, (at, begin));
            continue;
        } else if rest.starts_with("<... ") {
            let Some((began, begin)) = unfinished.remove(pid) else { continue };
            (began, begin, rest)
        } else {
            (at, rest, rest)
        };
        let Some((name, arguments)) = begin.split_once('(') else { continue };
        let result = end.rsplit_once(" = ").map_or("", |(_, result)| result);
        if result.starts_with('-') || result.is_empty() {
            continue;
        }
        // Of a descriptor the path that -y adds, else the strings.
        let descriptor = arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        let strings = arguments.split('"').skip(1).step_by(2).filter(|text| text.starts_with('/'));
        let paths = match name {
            "rename" | "renameat" | "renameat2" | "link" | "linkat" | "mkdir" | "mkdirat" => {
                strings.map(PathBuf::from).collect()
            }
            _ => descriptor.map(|(path, _)| PathBuf::from(path)).into_iter().collect(),
        };
        calls.push(Call { name: name.to_owned(), paths, began, ended: at });
    }
    calls
}

#[test]
fn an_object_is_written_synced_renamed_and_its_directory_synced_before_the_reference_moves() {
    if !has_strace(
        "durability::an_object_is_written_synced_renamed_and_its_directory_synced_before_the_reference_moves",
    ) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let store = StoreDir::new(&folder.path().canonicalize().unwrap().join("store"));
    let trace = folder.path().join("trace");
    let file = folder.path().join("mem");
    fs::write(&file, noise(300_000, 52)).unwrap();
    let filter = format!("trace={SYSCALLS},mkdir,mkdirat,write,pwrite64,writev");
    let mut traced =
        Traced::start(store.root(), &["-y", "-s", "1", "-o", trace.to_str().unwrap(), "-e", filter.as_str()]);
    let pushed = run(traced.address(), [OsStr::new("push"), file.as_os_str(), OsStr::new("app/x:v1")]);
    traced.signal(Signal::TERM);
    drop(traced);
    let text = fs::read_to_string(&trace).unwrap();
    let calls = calls(&text);
    let is_sync = |call: &&Call| matches!(&*call.name, "fsync" | "fdatasync");
    let is_rename = |call: &&Call| call.name.starts_with("rename") || call.name.starts_with("link");

    let reference = store.reference("app/x", "v1");
    let naming = |path: &Path| {
        let mut named =
            calls.iter().filter(is_rename).filter(|call| call.paths.last().is_some_and(|p| p == path));
        let call = named.next().unwrap_or_else(|| panic!("{} was never renamed to its name", path.display()));
        assert!(named.next().is_none(), "{} was written twice", path.display());
        call
    };
    let reference_named = naming(&reference);
    let objects: Vec<_> = store.packs().into_iter().chain(store.manifests()).collect();
    assert_eq!(objects.len(), 3, "a pack, a segment and a root");
    assert!(objects.contains(&store.manifest(&digest(&pushed["image"]))));
    for object in objects.iter().chain([&reference]) {
        let named = naming(object);
        let staged = &named.paths[0];
        assert!(is_staged(staged) && staged.parent() == object.parent(), "{named:?}");
        let of_staged = |call: &&Call| call.paths.first() == Some(staged);
        let written = calls.iter().filter(|call| call.name.contains("write")).filter(of_staged);
        let written = written.map(|call| call.ended).max().expect("it was written");
        let synced = calls.iter().filter(is_sync).find(of_staged).expect("it was synced");
        assert!(written < synced.began && synced.ended < named.began, "{}: {named:?}", object.display());
        let directory = object.parent().unwrap();
        let directory_synced = calls.iter().filter(is_sync).any(|call| {
            let in_time = object == &reference || call.ended < reference_named.began;
            call.paths.first().is_some_and(|p| p == directory) && call.began > named.ended && in_time
        });
        assert!(directory_synced, "{} was not synced after {named:?}", directory.display());
        assert!(object == &reference || named.ended < reference_named.began);
    }
    // A new directory lasts when the one that it lies in was synced after it was made.
    for made in calls.iter().filter(|call| call.name.starts_with("mkdir")) {
        let Some(path) = made.paths.first().filter(|path| path.starts_with(store.root())) else { continue };
        let parent = path.parent().unwrap();
        let lasts = calls
            .iter()
            .filter(is_sync)
            .any(|call| call.paths.first().is_some_and(|p| p == parent) && call.began > made.ended);
        assert!(
            lasts || path == store.root(),
            "{} was not synced after {} was made",
            parent.display(),
            path.display()
        );
    }
}

/// A file system of its own, of a size that can be changed.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(mib: usize) -> Self {
        let disk = Self(tempfile::tempdir().expect("a scratch folder"));
        disk.mount(&format!("size={mib}m"));
        disk
    }

    fn mount(&self, options: &str) {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0.path());
        assert!(mount.status().expect("mount can be started").success());
    }

    fn resize(&self, mib: usize) {
        self.mount(&format!("remount,size={mib}m"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_an_error_by_name_and_loses_nothing() {
    if !is_root() {
        return skip(
            "a_full_disk_is_an_error_by_name_and_loses_nothing",
            "mounting a file system needs root",
        );
    }
    let disk = SmallDisk::new(20);
    let store = StoreDir::new(&disk.0.path().join("store"));
    let mut server = Server::on(store.root(), "127.0.0.1:0");
    let folder = tempfile::tempdir().unwrap();
    let push = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        ["push".into(), path.into_os_string(), name.into()]
    };
    let (small, large) = (noise(3 << 20, 51), noise(40 << 20, 52));
    let _ = run(server.address(), push("small", &small));
    let said = fail(server.address(), push("large", &large));
    assert!(said.contains("disk is full") && said.contains("pack"), "{said}");
    // Another upload may end a little after the one that failed first.
    wait_until("what was half written is removed", || store.staged().is_empty());
    let rpc = Rpc::connect(server.address());
    assert!(rpc.read_file("small", "small").unwrap() == small);
    assert!(rpc.read_file("large", "large").is_err());

    disk.resize(200);
    let _ = run(server.address(), push("large", &large));
    assert!(rpc.read_file("large", "large").unwrap() == large);
    assert!(server.stop().success());
    store.assert_sound();
}
