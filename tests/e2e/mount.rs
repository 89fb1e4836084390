//! Images as files of a file system: `postcopy mount`.

mod ahead;
mod places;

use memmap2::{Mmap, MmapOptions};
use postcopy_tests::chaos::within;
use postcopy_tests::cli::run;
use postcopy_tests::fixtures::{noise, sparse};
use postcopy_tests::mounted::Mounted;
use postcopy_tests::server::Server;
use postcopy_tests::{PAGE, binary, is_root, skip, wait_until};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const WATCHDOG: Duration = Duration::from_secs(120);

/// Runs a test of root.
pub(crate) fn as_root(name: &str, test: impl FnOnce() + Send + 'static) {
    if !is_root() || !Path::new("/dev/fuse").exists() {
        return skip(name, "mounting needs root and /dev/fuse");
    }
    within(WATCHDOG, test);
}

pub(crate) fn push(server: &Server, path: &Path, reference: &str, chunk_size: usize) {
    let chunk_size = chunk_size.to_string();
    let _ = run(server.address(), ["push", path.to_str().unwrap(), reference, "--chunk-size", &chunk_size]);
}

/// A directory with files of all kinds.
fn source() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("a/b/c")).unwrap();
    fs::create_dir(path("hollow")).unwrap();
    for (name, bytes) in
        [("empty", 0), ("a/one", 1), ("a.b", 4095), ("a/b/c/odd", 5 * PAGE + 3), ("mem", 3 << 20)]
    {
        fs::write(path(name), noise(bytes, bytes as u64)).unwrap();
    }
    sparse(&path("a/holes"), 2 << 20, &[(0, &noise(100, 1)), (1_000_000, &noise(200_000, 2))]);
    fs::set_permissions(path("a/one"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("b/c/odd", path("a/link")).unwrap();
    fs::write(path("an odd\nname \u{1f600}"), b"odd").unwrap();
    folder
}

/// The entries below a directory, by path: the kind, the size of a file, and whether it is executable.
fn listing(root: &Path) -> BTreeMap<String, (String, u64, bool)> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            assert_eq!(entry.file_type().unwrap(), metadata.file_type());
            let is_file = metadata.is_file();
            let name = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let kind = format!("{:?}", metadata.file_type());
            let executable = is_file && metadata.mode() & 0o100 != 0;
            found.insert(name, (kind, if is_file { metadata.size() } else { 0 }, executable));
            if metadata.is_dir() {
                left.push(entry.path());
            }
        }
    }
    found
}

/// Reads a file in each way, and compares it with the expected bytes.
fn assert_reads(path: &Path, expected: &[u8]) {
    assert!(fs::read(path).unwrap() == expected, "{}", path.display());
    let file = File::open(path).unwrap();
    for at in [0, 1, 4095, 4096, 65_537, 1_000_001] {
        let mut bytes = vec![0; 70_001];
        let read = file.read_at(&mut bytes, at as u64).unwrap();
        let from = at.min(expected.len());
        assert!(bytes[..read] == expected[from..(from + read).min(expected.len())], "{}", path.display());
        assert!(read > 0 || from == expected.len());
    }
    if expected.is_empty() {
        return;
    }
    #[expect(unsafe_code, reason = "a map of a file that never changes")]
    // SAFETY: the file system is read-only, and an image never changes.
    let shared = unsafe { Mmap::map(&file).unwrap() };
    #[expect(unsafe_code, reason = "a map of a file that never changes")]
    // SAFETY: as above.
    let private = unsafe { MmapOptions::new().map_copy(&file).unwrap() };
    assert!(shared[..] == *expected && private[..] == *expected, "{}", path.display());
}

#[test]
fn every_byte_and_name_of_an_image_is_there_and_nothing_can_be_written() {
    as_root("mount::every_byte_and_name_of_an_image_is_there_and_nothing_can_be_written", || {
        let (server, source) = (Server::start(), source());
        for chunk_size in [4096, 65_536, 2 << 20] {
            push(&server, source.path(), &format!("deep/name:{chunk_size}"), chunk_size);
        }
        let mut mounted = Mounted::start(server.address(), &[]);
        for chunk_size in [4096, 65_536, 2 << 20] {
            let image = mounted.image("deep/name", &chunk_size.to_string());
            let files = listing(source.path());
            assert_eq!(listing(&image), files);
            for (name, (kind, ..)) in &files {
                if kind.contains("is_file: true") {
                    assert_reads(&image.join(name), &fs::read(source.path().join(name)).unwrap());
                }
            }
            assert_eq!(fs::read_link(image.join("a/link")).unwrap().to_str(), Some("b/c/odd"));
            assert_eq!(fs::read(image.join("a/link")).unwrap(), noise(5 * PAGE + 3, 5 * PAGE as u64 + 3));
            let refused = fs::write(image.join("new"), b"x").unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert!(File::options().write(true).open(image.join("mem")).is_err());
            for none in ["none", "a/none", "mem/none", "a/b/c/odd2"] {
                assert!(image.join(none).symlink_metadata().is_err(), "{none}");
            }
        }
        assert_eq!(listing(&mounted.path().join("deep")).len(), 4, "the name, and its three tags");
        assert!(mounted.unmount().success());
    });
}

#[test]
fn a_tag_is_looked_up_each_time_and_a_digest_stays() {
    as_root("mount::a_tag_is_looked_up_each_time_and_a_digest_stays", || {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let mem = folder.path().join("mem");
        let mounted = Mounted::start(server.address(), &[]);
        let mut images = Vec::new();
        for content in [b"first", b"other"] {
            fs::write(&mem, content).unwrap();
            push(&server, &mem, "app:v1", 4096);
            assert_eq!(fs::read(mounted.image("app", "v1").join("mem")).unwrap(), content);
            images.push(mounted.image("app", "v1").canonicalize().unwrap());
        }
        assert_eq!(fs::read(images[0].join("mem")).unwrap(), b"first");
        let _ = run(server.address(), ["rm", "app:v1"]);
        wait_until("the tag is gone", || !mounted.image("app", "v1").exists());
        let only = Mounted::start(server.address(), &["--image", "app:v2"]);
        push(&server, &mem, "app:v2", 4096);
        push(&server, &mem, "app:v3", 4096);
        assert_eq!(fs::read(only.image("app", "v2").join("mem")).unwrap(), b"other");
        assert!(!only.image("app", "v3").exists());
    });
}

/// By fusermount3. The namespace has a /dev/fuse that everybody may open, as udev makes it.
#[test]
fn an_ordinary_user_mounts_reads_and_unmounts() {
    as_root("mount::an_ordinary_user_mounts_reads_and_unmounts", || {
        let (server, source) = (Server::start(), source());
        push(&server, source.path(), "app:v1", 65_536);
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let program = folder.path().join("postcopy");
        fs::copy(binary("postcopy"), &program).unwrap();
        let as_user = "setpriv --reuid=65534 --regid=65534 --clear-groups";
        let script = format!(
            "set -eu
            mkdir devices && mount -t tmpfs none devices && mknod -m 666 devices/fuse c 10 229
            mount --bind devices/fuse /dev/fuse
            exec {as_user} bash -eu -c '
                export TMPDIR=$PWD HOME=$PWD
                unset POSTCOPY_RUNTIME_DIR XDG_RUNTIME_DIR
                mkdir mnt
                ./postcopy mount mnt &
                until [ -d mnt/by-digest ]; do kill -0 $!; sleep 0.1; done
                stat -c %a:%u mnt mnt/app/v1/a/one mnt/app/v1/mem
                cmp mnt/app/v1/a/b/c/odd mnt/app/v1/a/link
                md5sum < mnt/app/v1/mem
                ( ! touch mnt/new ) 2>/dev/null
                fusermount3 -u mnt
                wait $!
                ./postcopy mount mnt &
                until [ -d mnt/by-digest ]; do kill -0 $!; sleep 0.1; done
                pkill -KILL -P $!
                cmp mnt/app/v1/mem mnt/app/v1/mem
                kill $!
                wait $!
                [ -z \"$(ls mnt)\" ]
            '"
        );
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", &script])
            .current_dir(folder.path())
            .env("POSTCOPY_SERVER", server.address().to_string())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{said}\n{errors}");
        let sum = Command::new("md5sum").stdin(File::open(source.path().join("mem")).unwrap()).output();
        let expected = format!("500:65534\n500:65534\n400:65534\n{}", text(&sum.unwrap().stdout));
        assert_eq!(said, expected, "{errors}");
    });
}

/// Programs that read while the worker is killed notice a pause at most.
#[test]
fn no_read_fails_or_is_wrong_when_workers_are_killed() {
    as_root("mount::no_read_fails_or_is_wrong_when_workers_are_killed", || {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let (mem, bytes) = (folder.path().join("mem"), noise(32 << 20, 5));
        fs::write(&mem, &bytes).unwrap();
        push(&server, &mem, "app:v1", 65_536);
        let mounted = Mounted::start(server.address(), &["--read-ahead", "4096"]);
        let path = mounted.image("app", "v1").join("mem");
        let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let file = File::open(&path).unwrap();
                        // Without its pages in the page cache, each read comes to the daemon.
                        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                        let at = fastrand::usize(0..bytes.len() - PAGE) / PAGE * PAGE;
                        let mut page = [0; PAGE];
                        file.read_exact_at(&mut page, at as u64).unwrap();
                        assert!(page[..] == bytes[at..at + PAGE], "wrong bytes at {at}");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..20 {
                let before = reads.load(Ordering::Relaxed);
                wait_until("the readers go on", || reads.load(Ordering::Relaxed) > before + 50);
                mounted.kill_worker();
            }
            stop.store(true, Ordering::Relaxed);
        });
        let again = mounted.kill_and_mount_again(server.address());
        assert!(fs::read(again.image("app", "v1").join("mem")).unwrap() == bytes);
    });
}

#[test]
fn without_a_server_a_read_is_an_error_after_the_deadline_and_right_later() {
    as_root("mount::without_a_server_a_read_is_an_error_after_the_deadline_and_right_later", || {
        let folder = tempfile::tempdir().unwrap();
        let (store, mem) = (folder.path().join("store"), folder.path().join("mem"));
        let mut server = Server::on(&store, "127.0.0.1:0");
        let bytes = noise(1 << 20, 6);
        fs::write(&mem, &bytes).unwrap();
        push(&server, &mem, "app:v1", 65_536);
        let mut mounted = Mounted::start(server.address(), &["--deadline", "1s", "--read-ahead", "4096"]);
        let file = File::open(mounted.image("app", "v1").join("mem")).unwrap();
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, 0).unwrap();
        server.kill();
        let (far, asked) = (bytes.len() / 2, Instant::now());
        let error = file.read_exact_at(&mut page, far as u64).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "EIO");
        assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
        let address = server.address().to_string();
        let listen = address.trim_start_matches("http://").trim_end_matches('/');
        let _again = Server::on(&store, listen);
        wait_until("reads succeed again", || file.read_exact_at(&mut page, far as u64).is_ok());
        assert!(page[..] == bytes[far..far + PAGE]);
        drop(file);
        assert!(mounted.end().success());
    });
}
