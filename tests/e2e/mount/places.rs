//! Mounts beside, below and over others, and what their files look like to programs.

use super::{as_root, push};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::daemon::runtime_root;
use postcopy_tests::fixtures::{noise, sparse};
use postcopy_tests::mounted::Mounted;
use postcopy_tests::server::Server;
use postcopy_tests::store::StoreDir;
use postcopy_tests::wait_until;
use rustix::fs::{SeekFrom, seek};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

/// A tmpfs that is unmounted when this is dropped.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn at(path: &'a Path) -> Self {
        mount("none", path, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path.join("kept"), "kept").unwrap();
        Self(path)
    }

    fn is_there(&self) -> bool {
        fs::read(self.0.join("kept")).is_ok_and(|kept| kept == b"kept")
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_daemon_unmounts_its_own_file_system_and_no_other() {
    as_root("mount::places::a_daemon_unmounts_its_own_file_system_and_no_other", || {
        let server = Server::start();
        for by_signal in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().to_owned();
            let below = Tmpfs::at(&path);
            let mut mounted = Mounted::start_at(directory, server.address(), &[]);
            assert!(!below.is_there(), "it is covered");
            let ended = if by_signal { mounted.end() } else { mounted.unmount() };
            assert!(ended.success());
            assert!(below.is_there(), "by a signal: {by_signal}");
        }

        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        let mut command = postcopy(server.address(), ["mount".as_ref(), link.as_os_str()]);
        let runtime = runtime_root();
        let mut child = command.env("POSTCOPY_RUNTIME_DIR", runtime.path()).spawn().unwrap();
        wait_until("it is mounted", || real.join("by-digest").exists());
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success(), "by a symbolic link");
        assert_eq!(fs::read_dir(&real).unwrap().count(), 0);

        let mut mounted = Mounted::start(server.address(), &[]);
        let path = mounted.path().to_owned();
        let again = postcopy(server.address(), ["mount".as_ref(), path.as_os_str()]).output().unwrap();
        let said = String::from_utf8_lossy(&again.stderr);
        assert!(!again.status.success() && said.contains("are mounted there already"), "{said}");
        let above = Tmpfs::at(&path);
        assert_eq!(mounted.end().code(), Some(3), "it is covered");
        assert!(above.is_there());
        drop(above);
        let _ = unmount(&path, UnmountFlags::DETACH);
    });
}

#[test]
fn holes_are_found_and_paths_have_no_colons() {
    as_root("mount::places::holes_are_found_and_paths_have_no_colons", || {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let (mem, chunk) = (folder.path().join("mem"), 64 << 10);
        sparse(
            &mem,
            300 * chunk + 100,
            &[(chunk * 10 + 5, &noise(100, 1)), (chunk * 200, &noise(70_000, 2))],
        );
        push(&server, &mem, "app:v1", 64 << 10);
        push(&server, &mem, "by-digest:v1", 64 << 10);
        let mounted = Mounted::start(server.address(), &[]);
        let path = mounted.image("app", "v1").join("mem");
        let file = File::open(&path).unwrap();
        let found = |from| seek(&file, from).ok();
        assert_eq!(found(SeekFrom::Data(0)), Some(chunk * 10));
        assert_eq!(found(SeekFrom::Hole(0)), Some(0));
        assert_eq!(found(SeekFrom::Hole(chunk * 10 + 3)), Some(chunk * 11));
        assert_eq!(found(SeekFrom::Data(chunk * 11)), Some(chunk * 200));
        assert_eq!(found(SeekFrom::Data(chunk * 202)), None);
        assert_eq!(found(SeekFrom::Hole(chunk * 300 + 99)), Some(chunk * 300 + 99));
        assert_eq!(found(SeekFrom::Hole(chunk * 300 + 100)), None);
        let copy = folder.path().join("copy");
        assert!(std::process::Command::new("cp").args([&path, &copy]).status().unwrap().success());
        assert!(fs::read(&copy).unwrap() == fs::read(&mem).unwrap());
        assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 100 * chunk, "its holes are copied as holes");

        let resolved = path.canonicalize().unwrap();
        let (with_colon, image) =
            (resolved.to_str().unwrap().replace("blake3-", "blake3:"), resolved.parent());
        assert!(!resolved.to_str().unwrap().contains(':'), "{}", resolved.display());
        assert_eq!(Path::new(&with_colon).canonicalize().unwrap(), resolved);
        assert!(fs::read_dir(image.unwrap()).unwrap().count() == 1);
        let names: Vec<_> =
            fs::read_dir(mounted.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}: by-digest once, and app");
    });
}

#[test]
fn a_storer_that_dies_is_replaced_at_once_and_a_new_name_is_there_at_once() {
    let name = "mount::places::a_storer_that_dies_is_replaced_at_once_and_a_new_name_is_there_at_once";
    as_root(name, || {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let mem = folder.path().join("mem");
        fs::write(&mem, noise(1 << 20, 3)).unwrap();
        push(&server, &mem, "app:v1", 64 << 10);
        let mounted = Mounted::start(server.address(), &[]);
        for _ in 0..3 {
            let mut before = None;
            wait_until("a storer", || {
                before = mounted.storer();
                before.is_some()
            });
            kill_process(before.unwrap(), Signal::KILL).unwrap();
            assert_eq!(mounted.warm(server.address(), &["app:v1", "--fill"])["pages"], 256);
            wait_until("another storer", || mounted.storer().is_some_and(|storer| Some(storer) != before));
        }
        assert!(!mounted.path().join("new").exists());
        let _ = run(server.address(), ["tag", "app:v1", "new:v1"]);
        assert!(mounted.image("new", "v1").join("mem").exists(), "a new name");
    });
}

#[test]
fn an_image_with_open_files_is_kept_from_the_collector() {
    as_root("mount::places::an_image_with_open_files_is_kept_from_the_collector", || {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let (mem, bytes) = (folder.path().join("mem"), noise(8 << 20, 4));
        fs::write(&mem, &bytes).unwrap();
        push(&server, &mem, "app:v1", 64 << 10);
        let store = StoreDir::of(&server);
        let mounted = Mounted::start(server.address(), &["--read-ahead", "4096"]);
        let path = mounted.image("app", "v1").join("mem").canonicalize().unwrap();
        let file = File::open(&path).unwrap();
        let other = File::open(&path).unwrap();
        wait_until("the lease", || store.has_lease());
        let _ = run(server.address(), ["rm", "app:v1"]);
        drop(other);
        let collect = || store.gc(&["--grace", "0s"])["manifests"].clone();
        assert_eq!(collect(), 0, "a file is open");
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 5 << 20).unwrap();
        assert!(page[..] == bytes[5 << 20..(5 << 20) + 4096]);
        drop(file);
        wait_until("the lease's end", || !store.has_lease());
        assert_ne!(collect(), 0, "no file is open");
    });
}
