//! Stores that are damaged: an error names the damaged object, no wrong byte is served, and the
//! server goes on.

use postcopy::proto::digest::Digest;
use postcopy::proto::frame::{ChunkFrame, FrameDecoder};
use postcopy::proto::v1::fetch_chunks_response::Answer;
use postcopy::proto::v1::{self, chunk_answer};
use postcopy::{Options, Region, Session};
use postcopy_tests::cli::{fail, postcopy, run};
use postcopy_tests::fixtures::{memory_like, noise};
use postcopy_tests::server::Server;
use postcopy_tests::store::{Rpc, StoreDir, digest, flip, shown};
use postcopy_tests::uploads::{frame_of, pack_of, upload_whole};
use postcopy_tests::wait_until;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tonic::Code;

const CHUNK: usize = 64 << 10;

/// A store of two images, `bad` (to be damaged) and `good` (never), that share nothing. No server
/// runs.
struct Sick {
    folder: TempDir,
    store: StoreDir,
    bytes: Vec<u8>,
    good: Vec<u8>,
    image: Digest,
    /// The packs of `bad`: one.
    pack: PathBuf,
}

impl Sick {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let store = StoreDir::new(&folder.path().join("store"));
        let mut server = Server::on(store.root(), "127.0.0.1:0");
        let (bytes, good) = (noise(12 * CHUNK + 77, 31), memory_like(5 * CHUNK, 32));
        let path = folder.path().join("mem");
        fs::write(&path, &bytes).expect("a file can be written");
        let push = |reference: &str| {
            run(server.address(), [OsStr::new("push"), path.as_os_str(), OsStr::new(reference)])
        };
        let image = digest(&push("bad")["image"]);
        let pack = store.packs().pop_first().expect("a pack");
        fs::write(&path, &good).expect("a file can be written");
        let _ = push("good");
        assert!(server.stop().success());
        Self { folder, store, bytes, good, image, pack }
    }

    fn serve(&self) -> Server {
        Server::on(self.store.root(), "127.0.0.1:0")
    }

    fn remove_locators(&self) {
        let is_locator = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "loc");
        let locators = self.store.files("manifests").into_iter().filter(is_locator);
        locators.for_each(|path| fs::remove_file(path).expect("it can be removed"));
    }

    fn segment(&self) -> Digest {
        self.store.root_of(&self.image).segment_digests()[0]
    }

    /// Reads `bad` in every way. Each gives the right bytes or an error with one of these texts.
    /// Returns the number of errors.
    fn read_bad(&self, server: &Server, named: &[String]) -> usize {
        let mut errors = 0;
        let mut error = |how: &str, text: String| {
            assert!(named.iter().any(|name| text.contains(name)), "{how} names none of {named:?}: {text}");
            errors += 1;
        };
        match Rpc::connect(server.address()).read_file("bad", "mem") {
            Ok(bytes) => assert!(bytes == self.bytes, "ReadFile gave wrong bytes"),
            Err(status) => {
                assert!(matches!(status.code(), Code::DataLoss | Code::NotFound), "{status:?}");
                error("ReadFile", status.message().to_owned());
            }
        }
        let target = self.folder.path().join("pulled");
        let pull = [OsStr::new("pull"), OsStr::new("bad"), target.as_os_str()];
        let output = postcopy(server.address(), pull).output().expect("it can be started");
        if output.status.success() {
            assert!(fs::read(target.join("mem")).expect("pulled") == self.bytes, "pull gave wrong bytes");
            fs::remove_dir_all(&target).expect("it can be removed");
        } else {
            assert!(!target.exists(), "a failed pull leaves nothing");
            error("pull", shown(&output));
        }
        let options = Options::DEFAULT.fault_deadline(Duration::from_millis(300));
        let opened = Session::open(server.address(), &"bad".parse().expect("a reference"), options)
            .and_then(|session| Ok((session.map("mem")?, session)));
        match opened {
            Err(e) => error("Session", chain(&e)),
            Ok((region, session)) => {
                if let Some(why) = self.read_region(region, session) {
                    error("Region", why);
                }
            }
        }
        errors
    }

    /// Reads all chunks of a region, and returns why some could not be read. No read may wait for
    /// ever.
    fn read_region(&self, region: Region, session: Session) -> Option<String> {
        let bytes = self.bytes.clone();
        let (done, finished) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let (mut lost, mut read) = (None, vec![0; CHUNK]);
            for (at, right) in (0..).step_by(CHUNK).zip(bytes.chunks(CHUNK)) {
                let read = &mut read[..right.len()];
                match region.read_at(at, read) {
                    Ok(()) if read == right => {}
                    Ok(()) => return done.send(Err(format!("a region gave wrong bytes at {at}"))),
                    Err(error) => lost = Some(chain(&error)),
                }
            }
            drop(session);
            done.send(Ok(lost))
        });
        let outcome = finished.recv_timeout(Duration::from_secs(20));
        outcome.expect("read_at returns soon after the fault deadline of 300 ms").expect("right bytes")
    }

    fn assert_good_is_served(&self, server: &Server) {
        let read = Rpc::connect(server.address()).read_file("good", "mem");
        assert!(read.expect("the sound image is served") == self.good);
        let _ = run(server.address(), ["verify", "good"]);
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

type Harm<'a> = &'a dyn Fn(&mut Vec<u8>);

/// Does each kind of damage, one after another, to a server that is started on it and to one that
/// runs already.
fn every_way(sick: &Sick, path: &Path, harms: &[(&str, Harm<'_>)], named: &[String], in_verify: &str) {
    for (what, harm) in harms {
        let good = fs::read(path).expect("the object");
        let mut bad = good.clone();
        harm(&mut bad);
        assert!(bad != good, "{what} changes nothing");
        let warm = sick.serve();
        assert_eq!(sick.read_bad(&warm, named), 0, "before: {what}");
        // In place, as a disk would.
        fs::write(path, &bad).expect("the object can be written");
        sick.read_bad(&warm, named);
        sick.assert_good_is_served(&warm);
        // With locators, a server would not look at the pack's index.
        sick.remove_locators();
        let cold = sick.serve();
        assert!(sick.read_bad(&cold, named) > 0, "{what} goes unseen");
        sick.assert_good_is_served(&cold);
        let text = fail(cold.address(), ["verify", "bad"]);
        assert!(
            named.iter().any(|name| text.contains(name)),
            "{what}: verify names none of {named:?}: {text}"
        );
        let damage = sick.store.damage();
        assert!(damage.iter().any(|(object, _)| object.contains(in_verify)), "{what}: {damage:?}");
        fs::write(path, &good).expect("the object can be written");
        sick.store.assert_sound();
    }
}

#[test]
fn a_damaged_pack_is_named_and_nothing_of_it_is_served() {
    let sick = Sick::new();
    let len = fs::metadata(&sick.pack).unwrap().len();
    let len = usize::try_from(len).unwrap();
    let digest = sick.pack.file_name().unwrap().to_str().unwrap().to_owned();
    let harms: [(&str, Harm<'_>); 8] = [
        ("a flipped byte in a frame", &|bytes| bytes[len / 2] ^= 0xff),
        ("a flipped byte in a frame's header", &|bytes| bytes[16 + 9] ^= 0x40),
        ("a flipped byte in the index", &|bytes| bytes[len - 64 - 100] ^= 1),
        ("a flipped byte in the trailer", &|bytes| bytes[len - 60] ^= 1),
        ("a flipped byte in the header", &|bytes| bytes[3] ^= 1),
        ("a pack cut in the middle", &|bytes| bytes.truncate(len / 2)),
        ("a pack without its last byte", &|bytes| bytes.truncate(len - 1)),
        ("an empty pack", &|bytes| bytes.clear()),
    ];
    let named: Vec<_> = sick.bytes.chunks(CHUNK).map(|chunk| Digest::of(chunk).hex()).collect();
    every_way(&sick, &sick.pack, &harms, &named, &digest);
}

#[test]
fn a_pack_whose_index_is_damaged_is_served_by_locators() {
    let sick = Sick::new();
    let good = fs::read(&sick.pack).unwrap();
    let harms: [(&str, Harm<'_>); 3] = [
        ("a flipped byte in the index", &|bytes| bytes[good.len() - 64 - 100] ^= 1),
        ("a flipped byte in the header", &|bytes| bytes[3] ^= 1),
        ("a pack without its last byte", &|bytes| bytes.truncate(good.len() - 1)),
    ];
    for (what, harm) in harms {
        let mut bad = good.clone();
        harm(&mut bad);
        fs::write(&sick.pack, bad).unwrap();
        assert_eq!(sick.read_bad(&sick.serve(), &[]), 0, "{what}");
        let name = sick.pack.file_name().unwrap().to_str().unwrap();
        assert!(sick.store.damage().iter().any(|(object, _)| object.contains(name)), "{what}");
    }
}

#[test]
fn a_damaged_root_or_segment_is_named() {
    let sick = Sick::new();
    let segment = sick.segment();
    for digest in [sick.image, segment] {
        let harms: [(&str, Harm<'_>); 4] = [
            ("a flipped byte", &|bytes| bytes[5] ^= 1),
            ("a missing end", &|bytes| bytes.truncate(bytes.len() - 1)),
            ("an empty manifest", &|bytes| bytes.clear()),
            ("more than there was", &|bytes| bytes.extend_from_slice(&[0; 4096])),
        ];
        every_way(&sick, &sick.store.manifest(&digest), &harms, &[digest.hex()], &digest.hex());
    }
}

#[test]
fn a_damaged_reference_is_named() {
    let sick = Sick::new();
    let harms: [(&str, Harm<'_>); 5] = [
        ("a flipped byte in the digest", &|bytes| bytes[9] ^= 0x80),
        ("a flipped byte in a field's number", &|bytes| bytes[0] ^= 0x10),
        ("half a reference", &|bytes| bytes.truncate(30)),
        ("an empty reference", &|bytes| bytes.clear()),
        ("garbage", &|bytes| *bytes = noise(3000, 33)),
    ];
    let path = sick.store.reference("bad", "latest");
    every_way(&sick, &path, &harms, &["bad:latest".to_owned()], "bad:latest");
    fs::write(&path, "").unwrap();
    let server = sick.serve();
    let output = postcopy(server.address(), ["ls", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let listed: Vec<_> = list.as_array().unwrap().iter().map(|i| i["reference"].as_str().unwrap()).collect();
    assert_eq!(listed, ["bad:latest", "good:latest"], "a damaged reference hides no other");
    assert!(list[0]["damage"].as_str().unwrap().contains("bad:latest"), "{list}");
}

#[test]
fn what_is_gone_is_named() {
    let sick = Sick::new();
    let chunks: Vec<_> = sick.bytes.chunks(CHUNK).map(|chunk| Digest::of(chunk).hex()).collect();
    let cases = [
        (sick.pack.clone(), chunks),
        (sick.store.manifest(&sick.image), vec![sick.image.hex()]),
        (sick.store.manifest(&sick.segment()), vec![sick.segment().hex()]),
    ];
    for (path, named) in cases {
        let good = fs::read(&path).unwrap();
        let warm = sick.serve();
        fs::remove_file(&path).unwrap();
        sick.read_bad(&warm, &named);
        let cold = sick.serve();
        assert!(sick.read_bad(&cold, &named) > 0);
        sick.assert_good_is_served(&cold);
        let damage = sick.store.damage();
        assert!(
            damage.iter().any(|(object, _)| named.iter().any(|name| object.contains(name))),
            "{damage:?}"
        );
        fs::write(&path, good).unwrap();
        assert_eq!(sick.read_bad(&cold, &[]), 0, "the running server takes it back");
    }
}

#[test]
fn a_store_of_another_format_and_other_directories_are_refused() {
    let sick = Sick::new();
    let format = sick.store.root().join("format");
    let refused = |named: &str| {
        let text = Server::try_on(sick.store.root(), "127.0.0.1:0").expect_err("it must not start");
        assert!(text.contains(named) && text.contains(sick.store.root().to_str().unwrap()), "{text}");
        for command in ["verify", "gc"] {
            let output = sick.store.postcopyd(command, &[]);
            assert!(!output.status.success() && shown(&output).contains(named), "{}", shown(&output));
        }
    };
    let before = sick.store.files("");
    for (text, named) in [
        ("postcopy store 3\n", "postcopy store 3"),
        ("postcopy store 1\n", "postcopyd upgrade"),
        ("", "store format \"\""),
        ("postcopy store 1", "format"),
    ] {
        fs::write(&format, text).unwrap();
        refused(named);
    }
    fs::write(&format, noise(1 << 20, 34)).unwrap();
    refused("format");
    fs::remove_file(&format).unwrap();
    let text = Server::try_on(sick.store.root(), "127.0.0.1:0").expect_err("it must not start");
    assert!(text.contains("not a store"), "{text}");
    fs::write(&format, "postcopy store 2\n").unwrap();
    assert_eq!(sick.store.files(""), before, "nothing was touched");
    sick.assert_good_is_served(&sick.serve());

    let other = sick.folder.path().join("letters");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter.txt"), "dear").unwrap();
    let text = Server::try_on(&other, "127.0.0.1:0").expect_err("it must not start");
    assert!(text.contains("letters") && text.contains("not a store"), "{text}");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
    let file = other.join("letter.txt");
    let text = Server::try_on(&file, "127.0.0.1:0").expect_err("it must not start");
    assert!(text.contains("letter.txt"), "{text}");
}

/// The server maps packs, and an access beyond the end of a cut file is SIGBUS. So the test cuts
/// packs while three readers keep the server decoding, also in the middle of frames.
#[test]
fn cutting_and_deleting_packs_under_a_server_that_reads_them_does_not_kill_it() {
    let sick = Sick::new();
    let mut server = sick.serve();
    let good = fs::read(&sick.pack).unwrap();
    let named: Vec<_> = sick.bytes.chunks(CHUNK).map(|chunk| Digest::of(chunk).hex()).collect();
    let done = AtomicBool::new(false);
    let (right, errors) = (AtomicU64::new(0), AtomicU64::new(0));
    let read = || {
        let rpc = Rpc::connect(server.address());
        while !done.load(Ordering::Relaxed) {
            match rpc.read_file("bad", "mem") {
                Ok(bytes) => {
                    assert!(bytes == sick.bytes);
                    right.fetch_add(1, Ordering::Relaxed);
                }
                Err(status) => {
                    assert!(matches!(status.code(), Code::DataLoss | Code::NotFound), "{status:?}");
                    assert!(named.iter().any(|name| status.message().contains(name)), "{status:?}");
                    errors.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    // Reads that were under way when this was called, and one after them.
    let more = |what: &str, counter: &AtomicU64, readers: &[std::thread::ScopedJoinHandle<'_, ()>]| {
        let before = counter.load(Ordering::Relaxed);
        wait_until(what, || {
            assert!(!readers.iter().any(|reader| reader.is_finished()), "a reader ended");
            counter.load(Ordering::Relaxed) > before + 3
        });
    };
    std::thread::scope(|scope| {
        let _end = SetOnDrop(&done);
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(read)).collect();
        for round in 0..60 {
            let file = fs::File::options().write(true).open(&sick.pack).unwrap();
            file.set_len([0, good.len() as u64 / 2, good.len() as u64 - 5000][round % 3]).unwrap();
            more("an error while the pack is cut", &errors, &readers);
            file.write_all_at(&good, 0).unwrap();
            more("a right read of the pack that is whole again", &right, &readers);
        }
        fs::remove_file(&sick.pack).unwrap();
        more("a right read of the pack that is deleted and still mapped", &right, &readers);
        fs::write(&sick.pack, &good).unwrap();
        more("a right read of the pack in another file", &right, &readers);
    });
    assert_eq!(sick.read_bad(&server, &[]), 0, "whole again, so served again");
    sick.assert_good_is_served(&server);
    assert_eq!(server.stop().code(), Some(0), "it lived to the end");
}

/// Ends loops also when an assertion fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_damaged_copy_is_gone_around_where_another_pack_has_a_good_one() {
    let sick = Sick::new();
    let server = sick.serve();
    let chunk = &sick.bytes[3 * CHUNK..4 * CHUNK];
    let wanted = Digest::of(chunk);
    // The second copy lies in a pack with another chunk, so that it is another pack.
    let more = noise(CHUNK, 35);
    let second = pack_of(&[(wanted, frame_of(chunk)), (Digest::of(&more), frame_of(&more))]);
    upload_whole(&Rpc::connect(server.address()), &second).unwrap();
    drop(server);

    let copies: Vec<_> = sick.store.frames().into_iter().filter(|(_, entry)| entry.chunk == wanted).collect();
    assert_eq!(copies.len(), 2);
    let mut damaged_answers = 0;
    for (pack, entry) in &copies {
        let at = u64::from(entry.offset + entry.length / 2);
        flip(pack, at);
        let server = sick.serve();
        let rpc = Rpc::connect(server.address());
        for attempt in 0..3 {
            let (answers, end) = rpc.fetch(vec![v1::FetchChunksRequest {
                id: 9,
                attempt,
                image: sick.image.into(),
                runs: vec![v1::ChunkRun { first: 3, count: 1 }],
                ..Default::default()
            }]);
            end.unwrap();
            assert_eq!((answers.len(), answers[0].id, answers[0].attempt), (1, 9, attempt));
            let Some(Answer::Chunk(v1::ChunkAnswer {
                chunk: 3,
                result: Some(chunk_answer::Result::Frame(frame)),
            })) = &answers[0].answer
            else {
                panic!("no frame: {answers:?}");
            };
            let mut plain = vec![0; CHUNK];
            let frame = ChunkFrame::parse(frame).unwrap();
            let outcome = FrameDecoder::default().decode_verified(&frame, &wanted, &mut plain);
            assert!(attempt == 0 || outcome.is_ok(), "attempt {attempt}: {outcome:?}");
            damaged_answers += usize::from(outcome.is_err());
        }
        assert_eq!(sick.read_bad(&server, &[]), 0, "every way of reading goes around it");
        let damage = sick.store.damage();
        let name = pack.file_name().unwrap().to_str().unwrap();
        assert!(damage[0].0.contains(name) && damage[0].1.contains(&wanted.hex()), "{damage:?}");
        let lost = |(object, _): &(String, String)| object.contains(&format!("chunk {wanted}"));
        assert!(!damage.iter().any(lost), "another pack has it: {damage:?}");
        flip(pack, at);
    }
    assert!(damaged_answers > 0, "the damaged copy was never the first one: this showed nothing");
    sick.store.assert_sound();
}

#[test]
fn every_damaged_object_is_named_at_once() {
    let sick = Sick::new();
    let entries: Vec<_> = sick.store.frames().into_iter().filter(|(pack, _)| *pack == sick.pack).collect();
    flip(&sick.pack, u64::from(entries[0].1.offset) + 50);
    let others: Vec<_> = sick.store.packs().into_iter().filter(|pack| *pack != sick.pack).collect();
    flip(&others[0], 0);
    flip(&sick.store.manifest(&sick.segment()), 3);
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let named =
        [name(&sick.pack), name(&others[0]), sick.segment().hex(), "good:latest".into(), "bad:latest".into()];
    let damage = sick.store.damage();
    for name in named {
        assert!(damage.iter().any(|(object, _)| object.contains(&name)), "{name} is not named: {damage:?}");
    }
    let text = shown(&sick.store.postcopyd("verify", &[]));
    assert!(text.contains(&sick.segment().hex()), "the text for people, too: {text}");
}
