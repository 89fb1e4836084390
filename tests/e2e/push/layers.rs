//! Images that are pushed over a base: only what differs is read and sent.

use super::{CHUNK, number, pull_cli, push_cli};
use postcopy::proto::digest::Digest;
use postcopy::proto::frame::FrameEncoder;
use postcopy::proto::page::PageRun;
use postcopy::proto::v1;
use postcopy_tests::cli::{fail, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::mounts::Tmpfs;
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir};
use postcopy_tests::{PAGE, is_root, resident_kib, skip};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Makes a directory on the file system of the build: /tmp may be a tmpfs, which is refused.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Writes a sparse file with these pages, and nothing else.
fn write_pages(path: &Path, len: usize, pages: &[(usize, Vec<u8>)]) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(len as u64).unwrap();
    for (page, bytes) in pages {
        file.write_all_at(bytes, (page * PAGE) as u64).unwrap();
    }
    file
}

fn push_over(server: &Server, path: &Path, reference: &str, base: &str) -> Value {
    let words = [OsStr::new("push"), path.as_os_str(), OsStr::new(reference), OsStr::new("--base")];
    run(server.address(), words.into_iter().chain([OsStr::new(base)]))
}

fn fail_over(server: &Server, path: &Path, base: &str) -> String {
    let words = [OsStr::new("push"), path.as_os_str(), OsStr::new("new"), OsStr::new("--base")];
    fail(server.address(), words.into_iter().chain([OsStr::new(base)]))
}

/// Changes some pages of `bytes` at random, and returns them: noise, text and zeros, alone and in
/// runs.
fn change(bytes: &mut [u8], rng: &mut fastrand::Rng) -> Vec<(usize, Vec<u8>)> {
    let mut pages = std::collections::BTreeMap::new();
    for _ in 0..rng.usize(1..40) {
        let first = rng.usize(0..bytes.len().div_ceil(PAGE));
        for page in first..first + rng.usize(1..30) {
            let start = page * PAGE;
            let Some(len) = bytes.len().checked_sub(start).filter(|len| *len > 0) else { break };
            let len = len.min(PAGE);
            let content = match rng.u8(0..3) {
                0 => vec![0; len],
                1 => vec![rng.u8(..); len],
                _ => noise(len, rng.u64(..)),
            };
            bytes[start..start + len].copy_from_slice(&content);
            pages.insert(page, content);
        }
    }
    pages.into_iter().collect()
}

#[test]
fn generations_of_diffs_are_the_images_of_the_whole_files() {
    for (seed, chunk) in [(1, 4096), (2, 65_536), (3, 2 << 20)] {
        let server = Server::start();
        let store = StoreDir::of(&server);
        let folder = scratch();
        let (whole, diff) = (folder.path().join("whole"), folder.path().join("diff"));
        fs::create_dir_all(&whole).unwrap();
        fs::create_dir_all(&diff).unwrap();
        let mut rng = fastrand::Rng::with_seed(seed);
        // Its last page and its last chunk are cut.
        let mut bytes = memory_like(5 << 20, seed);
        bytes.extend(noise(3000, seed));
        fs::write(whole.join("mem"), &bytes).unwrap();
        let words = ["push".as_ref(), whole.as_os_str(), "vm:0".as_ref(), "--chunk-size".as_ref()];
        let _ = run(server.address(), words.into_iter().chain([OsStr::new(&chunk.to_string())]));
        for generation in 1..8 {
            let pages = change(&mut bytes, &mut rng);
            let state = noise(5000, generation);
            for folder in [&whole, &diff] {
                fs::write(folder.join("state"), &state).unwrap();
            }
            write_pages(&diff.join("mem"), bytes.len(), &pages);
            let (reference, base) = (format!("vm:{generation}"), format!("vm:{}", generation - 1));
            let pushed = push_over(&server, &diff, &reference, &base);
            let parts = ["zero_bytes", "base_bytes", "deduplicated_bytes", "sent_bytes"];
            let sum: u64 = parts.iter().map(|part| number(&pushed, part)).sum();
            assert_eq!(sum, (bytes.len() + state.len()) as u64, "{pushed}");
            fs::write(whole.join("mem"), &bytes).unwrap();
            let words = ["push".as_ref(), whole.as_os_str(), "vm:whole".as_ref(), "--chunk-size".as_ref()];
            let again = run(server.address(), words.into_iter().chain([OsStr::new(&chunk.to_string())]));
            assert_eq!(again["image"], pushed["image"], "seed {seed}, generation {generation}");
            assert_eq!(number(&again, "sent_bytes"), 0, "{again}");
        }
        let target = folder.path().join("back");
        pull_cli(&server, "vm:7", &target);
        assert!(fs::read(target.join("mem")).unwrap() == bytes);
        store.assert_sound();
    }
}

#[test]
fn of_changed_chunks_only_the_changed_pages_are_sent_and_the_rest_is_not_read() {
    let server = Server::start();
    let folder = scratch();
    let path = folder.path().join("mem");
    let bytes = noise(100 * CHUNK, 4);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "vm:1");
    let pages: Vec<_> =
        (0..100).map(|chunk| (chunk * 16 + chunk % 16, noise(PAGE, 900 + chunk as u64))).collect();
    write_pages(&path, bytes.len(), &pages);
    let pushed = push_over(&server, &path, "vm:2", "vm:1");
    assert_eq!(number(&pushed, "sent_bytes"), (100 * PAGE) as u64, "{pushed}");
    // Without the headers of 100 patches.
    assert_eq!(number(&pushed, "pack_bytes"), (100 * (PAGE + 20)) as u64, "{pushed}");
    assert_eq!(number(&pushed, "base_bytes"), (100 * (CHUNK - PAGE)) as u64, "{pushed}");
    // Nothing at all.
    write_pages(&path, bytes.len(), &[]);
    let pushed = push_over(&server, &path, "vm:3", "vm:2");
    assert_eq!((number(&pushed, "sent_bytes"), number(&pushed, "pack_bytes")), (0, 0), "{pushed}");
    let two = run(server.address(), ["inspect", "vm:2"]);
    assert_eq!(pushed["image"], two["image"]);
}

#[test]
fn pages_that_were_written_a_moment_ago_are_not_taken_for_holes() {
    let server = Server::start();
    let folder = scratch();
    let path = folder.path().join("mem");
    let mut bytes = noise(30 * CHUNK, 5);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "vm:1");
    for round in 0..10usize {
        // By the page cache, and not yet on the disk.
        let file = write_pages(&path, bytes.len(), &[]);
        // SAFETY: nobody else changes this file.
        #[expect(unsafe_code, reason = "a mapping of a file")]
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        for page in (round..30 * 16).step_by(37) {
            let content = noise(PAGE, (round * 1000 + page) as u64);
            map[page * PAGE..][..PAGE].copy_from_slice(&content);
            bytes[page * PAGE..][..PAGE].copy_from_slice(&content);
        }
        push_over(&server, &path, "vm:1", "vm:1");
        drop(map);
    }
    let target = folder.path().join("back");
    pull_cli(&server, "vm:1", &target);
    assert!(fs::read(target.join("mem")).unwrap() == bytes);
}

#[test]
fn files_that_the_base_does_not_have_are_pushed_as_they_are() {
    let server = Server::start();
    let folder = scratch();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    fs::create_dir_all(one.join("gone")).unwrap();
    fs::create_dir_all(&two).unwrap();
    fs::write(one.join("a"), noise(3 * CHUNK, 6)).unwrap();
    fs::write(one.join("gone/b"), "b").unwrap();
    push_cli(&server, &one, "app:1");
    write_pages(&two.join("new"), 3 * CHUNK, &[(17, noise(PAGE, 7))]);
    // A file may grow and shrink by whole chunks; what the base does not have is zeros.
    write_pages(&two.join("a"), 5 * CHUNK, &[(0, noise(PAGE, 8))]);
    std::os::unix::fs::symlink("a", two.join("link")).unwrap();
    push_over(&server, &two, "app:2", "app:1");
    let target = folder.path().join("back");
    pull_cli(&server, "app:2", &target);
    let mut a = fs::read(one.join("a")).unwrap();
    a[..PAGE].copy_from_slice(&noise(PAGE, 8));
    a.resize(5 * CHUNK, 0);
    assert!(fs::read(target.join("a")).unwrap() == a);
    assert!(fs::read(target.join("new")).unwrap() == fs::read(two.join("new")).unwrap());
    assert_eq!(fs::read_link(target.join("link")).unwrap(), Path::new("a"));
    assert!(!target.join("gone").exists());
}

#[test]
fn what_cannot_be_told_from_the_base_is_an_error_that_names_the_file() {
    let server = Server::start();
    let folder = scratch();
    let path = folder.path().join("mem");
    fs::write(&path, noise(3 * CHUNK + 5000, 9)).unwrap();
    push_cli(&server, &path, "vm:1");
    let text = fail_over(&server, &path, "vm:none");
    assert!(text.contains("vm:none is not in the store"), "{text}");
    write_pages(&path, 3 * CHUNK + 9000, &[]);
    let text = fail_over(&server, &path, "vm:1");
    assert!(text.contains("mem has 205608 bytes, and 201608 in the base"), "{text}");
    // With data up to its end, it has no need of the base there.
    write_pages(&path, 3 * CHUNK + 9000, &[(48, noise(9000, 1))]);
    push_over(&server, &path, "vm:2", "vm:1");
    let words = ["push", path.to_str().unwrap(), "new", "--base", "vm:1", "--chunk-size", "4096"];
    let text = fail(server.address(), words);
    assert!(text.contains("the base has chunks of 64 KiB, and chunks of 4 KiB are asked for"), "{text}");
    let (archive, checkpoint) = (folder.path().join("diff.tar"), folder.path().join("checkpoint"));
    fs::create_dir(&checkpoint).unwrap();
    fs::write(checkpoint.join("pstree.img"), "tree").unwrap();
    let mut tar = std::process::Command::new("tar");
    assert!(tar.arg("-cf").arg(&archive).arg("-C").arg(&checkpoint).arg(".").status().unwrap().success());
    let text = fail_over(&server, &archive, "vm:1");
    assert!(text.contains("does not tell holes from zeros"), "{text}");
    assert_eq!(run(server.address(), ["ls"]).as_array().unwrap().len(), 2, "nothing else was stored");
}

#[test]
fn files_of_which_the_written_parts_are_not_known_are_refused() {
    const TEST: &str = "push::layers::files_of_which_the_written_parts_are_not_known_are_refused";
    let server = Server::start();
    let folder = scratch();
    let path = folder.path().join("mem");
    let bytes = noise(4 << 20, 10);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "vm:1");
    // A page that is read there looks like one that was written, to SEEK_DATA.
    let file = write_pages(&path, bytes.len(), &[(3, noise(PAGE, 11))]);
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 1 << 20, 1 << 20).unwrap();
    file.read_exact_at(&mut [0; PAGE], 1 << 20).unwrap();
    let text = fail_over(&server, &path, "vm:1");
    assert!(text.contains("mem: some of its parts were allocated, and never written"), "{text}");
    if !is_root() {
        return skip(TEST, "only root may mount a tmpfs");
    }
    let tmpfs = Tmpfs::of_bytes(64 << 20);
    let path = tmpfs.path().join("mem");
    write_pages(&path, bytes.len(), &[(3, noise(PAGE, 11))]);
    let text = fail_over(&server, &path, "vm:1");
    assert!(text.contains("mem: its file system does not tell which parts were written"), "{text}");
}

#[test]
fn a_patch_of_another_length_than_its_chunk_is_refused_before_the_chunk_is_read() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = noise(64 << 20, 16);
    fs::write(&path, &bytes).unwrap();
    let words = ["push", path.to_str().unwrap(), "vm:1", "--chunk-size", "2097152"];
    let _ = run(server.address(), words);
    let rpc = Rpc::connect(server.address());
    let mut patch = Vec::new();
    FrameEncoder::new(3).encode_patch(PAGE + 1, &[PageRun { first: 1, count: 1 }], &[1], &mut patch);
    let patches: Vec<_> = bytes
        .chunks(2 << 20)
        .map(|chunk| v1::ChunkPatch { base: Digest::of(chunk).into(), patch: patch.clone().into() })
        .collect();
    let before = resident_kib(server.pid());
    let status = rpc.wait(rpc.images().patch_chunks(v1::PatchChunksRequest { patches })).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("has another length"), "{status:?}");
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 16 << 10, "the server has read the chunks: {grown} KiB");
}

#[test]
fn a_chunk_of_the_base_that_is_lost_is_named() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = scratch();
    let path = folder.path().join("mem");
    let bytes = noise(3 * CHUNK, 13);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "vm:1");
    store.packs().iter().for_each(|pack| fs::remove_file(store.root().join(pack)).unwrap());
    write_pages(&path, bytes.len(), &[(3, noise(PAGE, 14))]);
    let text = fail_over(&server, &path, "vm:1");
    let chunk = Digest::of(&bytes[..CHUNK]);
    assert!(text.contains(&format!("has lost chunk {chunk} of the base")), "{text}");
    // A chunk that is as in the base is missed by the commit.
    write_pages(&path, bytes.len(), &[]);
    let text = fail_over(&server, &path, "vm:1");
    assert!(text.contains("lost chunks"), "{text}");
}

#[test]
fn strange_patches_are_refused_and_a_right_one_is_stored_once() {
    let server = Server::start();
    let store = StoreDir::of(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mem");
    let bytes = noise(3 * CHUNK, 15);
    fs::write(&path, &bytes).unwrap();
    push_cli(&server, &path, "vm:1");
    let before = store.packs();
    let rpc = Rpc::connect(server.address());
    let patch_of = |chunk: usize, runs: &[(u16, u16)], content: &[u8]| {
        let runs: Vec<_> =
            runs.iter().map(|(first, count)| PageRun { first: *first, count: *count }).collect();
        let mut patch = Vec::new();
        FrameEncoder::new(3).encode_patch(chunk, &runs, content, &mut patch);
        patch
    };
    let base = Digest::of(&bytes[..CHUNK]);
    let send = |patches: Vec<(Vec<u8>, Vec<u8>)>| {
        let patch =
            |(base, patch): (Vec<u8>, Vec<u8>)| v1::ChunkPatch { base: base.into(), patch: patch.into() };
        let patches = patches.into_iter().map(patch).collect();
        rpc.wait(rpc.images().patch_chunks(v1::PatchChunksRequest { patches }))
            .map(|answer| answer.into_inner())
    };
    let digest = base.as_bytes().to_vec();
    let good = patch_of(CHUNK, &[(2, 1)], &[9; PAGE]);
    let other_length = patch_of(CHUNK - PAGE, &[(2, 1)], &[9; PAGE]);
    let mut beyond = good.clone();
    beyond[16] = 16;
    let mut undecodable = good.clone();
    let last = undecodable.len() - 1;
    undecodable[last] ^= 0xff;
    undecodable[last - 3] ^= 0xff;
    let large = patch_of(2 << 20, &[(0, 1)], &[9; PAGE]);
    let refused = [
        ("patches: 0 are not 1 to 4096", vec![]),
        ("patches: 4097 are not 1 to 4096", vec![(digest.clone(), Vec::new()); 4097]),
        ("base: ", vec![(digest[1..].to_vec(), good.clone())]),
        ("patch 0: the frame has 0 bytes", vec![(digest.clone(), Vec::new())]),
        ("patch 1: page run 0", vec![(digest.clone(), good.clone()), (digest.clone(), beyond)]),
        ("the coded pages do not decode", vec![(digest.clone(), undecodable)]),
        (
            "patch 0: its chunk has at most one page",
            vec![(digest.clone(), patch_of(PAGE, &[(0, 1)], &[9; PAGE]))],
        ),
        ("has another length", vec![(digest.clone(), other_length)]),
        (
            "patch 8: the chunks up to this one have more than 16777216 bytes",
            vec![(digest.clone(), large); 9],
        ),
    ];
    for (named, patches) in refused {
        let status = send(patches).expect_err(named);
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{named}: {status:?}");
        assert!(status.message().contains(named), "{named:?} is not in {:?}", status.message());
        assert_eq!(store.packs(), before, "{named}: something was stored");
    }
    // An unknown base among known ones; the same patch three times; one that makes zeros.
    let zeros = patch_of(CHUNK, &[(0, 16)], &[0; CHUNK]);
    let (unknown, good) = ((vec![7; 32], good.clone()), (digest.clone(), good));
    for _ in 0..2 {
        let answer =
            send(vec![good.clone(), unknown.clone(), good.clone(), (digest.clone(), zeros.clone())]).unwrap();
        let mut new = bytes[..CHUNK].to_vec();
        new[2 * PAGE..3 * PAGE].fill(9);
        let chunks: Vec<_> = answer.chunks.iter().map(|chunk| chunk.chunk.to_vec()).collect();
        let of = |bytes: &[u8]| Digest::of(bytes).as_bytes().to_vec();
        assert_eq!(chunks, [of(&new), Vec::new(), of(&new), of(&[0; CHUNK])]);
        assert_eq!(store.packs().len(), before.len() + 1);
    }
    store.assert_sound();
}
