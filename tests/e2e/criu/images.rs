//! Forms of CRIU's images: chains of incremental dumps, archives of checkpoints, shared memory.

use super::{Heap, assert_all_right, with_criu};
use postcopy_tests::cli::{postcopy, run};
use postcopy_tests::criu::Program;
use postcopy_tests::wait_until;
use prost::Message;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

#[test]
fn shared_memory_is_said_not_to_be_lazy() {
    with_criu("shared_memory_is_said_not_to_be_lazy", |bench| {
        let ready = bench.path("ready");
        let script = format!(
            "import mmap, pathlib, time\nshared = mmap.mmap(-1, 8 << 20)\nshared.write(b'x' * (8 << 20))\n\
             private = b'y' * (16 << 20)\npathlib.Path({ready:?}).write_text('')\nwhile True: time.sleep(0.01)"
        );
        let mut command = Command::new("python3");
        command.args(["-c", &script]);
        let program = Program::start(&command);
        wait_until("its memory", || ready.exists());
        bench.dump(program);
        let (_, pulled) = bench.pull("app", "lazy");
        let shared = pulled["not_lazy"]["shared_bytes"].as_u64().unwrap();
        assert!((8 << 20..9 << 20).contains(&shared), "{pulled}");
        let private = pulled["not_lazy"]["private_bytes"].as_u64().unwrap();
        assert!((1..8 << 20).contains(&private), "{pulled}");
        let target = bench.path("told");
        let args = [OsStr::new("pull"), OsStr::new("app"), target.as_os_str(), OsStr::new("--criu")];
        let told = postcopy(bench.server.address(), args).output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(
            told.contains("not lazy: 8.") && told.contains("of shared memory (pagemap-shmem-*.img"),
            "{told}"
        );
        assert!(told.contains(" MiB of ") && told.contains("; the daemon fetches the rest"), "{told}");
    });
}

/// An entry of a pagemap, as far as it is needed to make a chain of one.
#[derive(Clone, PartialEq, prost::Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// Moves every other entry of a dump's pagemap, and its pages, to a parent. The result has the form
/// of an incremental dump, which this kernel cannot make.
fn split(images: &Path, parent: &Path) {
    const PARENT: u32 = 1;
    fs::create_dir(parent).unwrap();
    let names =
        || fs::read_dir(images).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pagemap = names().find(|name| name.starts_with("pagemap-")).unwrap();
    let pages = names().find(|name| name.starts_with("pages-")).unwrap();
    fs::copy(images.join("inventory.img"), parent.join("inventory.img")).unwrap();
    let (bytes, all) = (fs::read(images.join(&pagemap)).unwrap(), fs::read(images.join(&pages)).unwrap());
    let mut messages = Vec::new();
    let mut at = 8;
    while at < bytes.len() {
        let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        messages.push(&bytes[at + 4..at + 4 + len]);
        at += 4 + len;
    }
    let message = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_ne_bytes(), bytes].concat();
    let head = [&bytes[..8], &message(messages[0])].concat();
    let (mut own, mut own_pages, mut other, mut other_pages) = (head.clone(), Vec::new(), head, Vec::new());
    let mut offset = 0;
    for (index, bytes) in messages[1..].iter().enumerate() {
        let entry = PagemapEntry::decode(*bytes).unwrap();
        let count = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let is_here = entry.in_parent != Some(true) && entry.flags.is_none_or(|flags| flags & PARENT == 0);
        let len = if is_here { usize::try_from(count).unwrap() * 4096 } else { 0 };
        let held = &all[offset..offset + len];
        offset += len;
        if index % 2 == 0 || !is_here {
            own.extend(message(bytes));
            own_pages.extend_from_slice(held);
        } else {
            other.extend(message(bytes));
            other_pages.extend_from_slice(held);
            let moved = PagemapEntry { in_parent: Some(true), flags: Some(PARENT), ..entry };
            own.extend(message(&moved.encode_to_vec()));
        }
    }
    for (directory, pagemap_bytes, pages_bytes) in [(images, own, own_pages), (parent, other, other_pages)] {
        fs::write(directory.join(&pagemap), pagemap_bytes).unwrap();
        fs::write(directory.join(&pages), pages_bytes).unwrap();
    }
}

#[test]
fn a_chain_of_three_incremental_images_is_restored() {
    with_criu("a_chain_of_three_incremental_images_is_restored", |bench| {
        let Heap { program, status } = bench.heap(32);
        bench.dump_as(program, "3");
        split(&bench.path("3"), &bench.path("2"));
        symlink("../2", bench.path("3/parent")).unwrap();
        split(&bench.path("2"), &bench.path("1"));
        symlink("../1", bench.path("2/parent")).unwrap();
        let mut plain = bench.criu.restore(&bench.path("3"), [""; 0]);
        plain.assert_runs();
        assert_all_right(&status, &plain);
        drop(plain);
        bench.push(&bench.path("3"), "app");
        for directory in ["1", "2", "3"] {
            fs::remove_dir_all(bench.path(directory)).unwrap();
        }
        let (mut daemon, restored) = bench.restore_lazily("lazy", &[]);
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0));
        assert_all_right(&status, &restored);
    });
}

#[test]
fn a_checkpoint_s_archive_is_stored_as_what_is_in_it() {
    with_criu("a_checkpoint_s_archive_is_stored_as_what_is_in_it", |bench| {
        let Heap { program, status } = bench.heap(16);
        // As podman and CRI-O have it.
        bench.dump_as(program, "tree/checkpoint");
        fs::write(bench.path("tree/config.dump"), "{}").unwrap();
        for (name, how) in [("app.tar", "-cf"), ("app.tar.gz", "-czf")] {
            let archive = bench.path(name);
            let packed = Command::new("tar")
                .arg(how)
                .arg(&archive)
                .arg("-C")
                .arg(bench.path("tree"))
                .arg(".")
                .status();
            assert!(packed.unwrap().success());
            bench.push(&archive, "app");
        }
        fs::remove_dir_all(bench.path("tree")).unwrap();
        let (directory, _) = bench.pull("app", "lazy");
        assert_eq!(fs::read_to_string(directory.join("config.dump")).unwrap(), "{}");
        let images = directory.join("checkpoint");
        let mut daemon = bench.daemon(&images, "app", &[]);
        let mut restored = bench.criu.restore(&images, ["--lazy-pages"]);
        restored.assert_runs();
        assert_all_right(&status, &restored);
        assert_eq!(daemon.wait().code(), Some(0));
        // Another archive is a file like any other one.
        fs::write(bench.path("plain"), "something").unwrap();
        let other = bench.path("other.tar");
        let packed = Command::new("tar")
            .arg("-cf")
            .arg(&other)
            .arg("-C")
            .arg(bench.folder.path())
            .arg("plain")
            .status();
        assert!(packed.unwrap().success());
        bench.push(&other, "other");
        let inspected = run(bench.server.address(), ["inspect", "other"]);
        assert_eq!(inspected["entries"][0]["path"], "other.tar");
    });
}
