//! Redis, which is restored while its clients read and write.

use super::with_criu;
use postcopy_tests::criu::Program;
use postcopy_tests::wait_until;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Gives commands to Redis over its socket, all at once. Each answer is a line, or the text that
/// the line announces.
fn redis(socket: &Path, commands: &[Vec<String>]) -> Vec<String> {
    let stream = UnixStream::connect(socket).unwrap();
    let mut writer = BufWriter::new(stream.try_clone().unwrap());
    let mut answers = Vec::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut lines = BufReader::new(&stream);
            let mut next = |len: Option<usize>| {
                let mut bytes = vec![0; len.map_or(0, |len| len + 2)];
                match len {
                    None => lines.read_until(b'\n', &mut bytes).map(drop).unwrap(),
                    Some(_) => lines.read_exact(&mut bytes).unwrap(),
                }
                bytes.truncate(bytes.len() - 2);
                String::from_utf8(bytes).unwrap()
            };
            let answer = |_| {
                let line = next(None);
                match line.strip_prefix('$').map(|len| usize::try_from(len.parse::<i64>().unwrap()).ok()) {
                    Some(Some(len)) => next(Some(len)),
                    _ => line,
                }
            };
            commands.iter().map(answer).collect::<Vec<_>>()
        });
        for command in commands {
            write!(writer, "*{}\r\n", command.len()).unwrap();
            command.iter().for_each(|word| write!(writer, "${}\r\n{word}\r\n", word.len()).unwrap());
        }
        writer.flush().unwrap();
        answers = reader.join().unwrap();
    });
    answers
}

#[test]
fn redis_keeps_all_of_its_keys_and_takes_new_ones() {
    with_criu("redis_keeps_all_of_its_keys_and_takes_new_ones", |bench| {
        const KEYS: usize = 20_000;
        let socket = bench.path("redis.sock");
        let mut command = bench.criu.command_to_dump("usr/bin/redis-server", bench.folder.path());
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
        let program = Program::start(&command);
        wait_until("redis", || UnixStream::connect(&socket).is_ok());
        let value = |key: usize| format!("{key} ").repeat(100 + key % 300);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let set = |key: usize| words(&["SET", &format!("key:{key}"), &value(key)]);
        let answers = redis(&socket, &(0..KEYS).map(set).collect::<Vec<_>>());
        assert!(answers.iter().all(|answer| answer == "+OK"));
        bench.dump(program);
        let assert_whole = |from: usize| {
            let gets: Vec<_> = (0..KEYS).map(|key| words(&["GET", &format!("key:{key}")])).collect();
            let found = redis(&socket, &gets);
            let wrong = (from..KEYS).filter(|key| found[*key] != value(*key)).count();
            assert_eq!(wrong, 0, "keys with other values");
            assert_eq!(redis(&socket, &[words(&["DBSIZE"])]), [format!(":{KEYS}")]);
        };
        let plain = bench.restore_plainly();
        assert_whole(0);
        drop(plain);
        for fill in ["all", "nothing"] {
            let (mut daemon, _restored) = bench.restore_lazily(&format!("lazy-{fill}"), &["--fill", fill]);
            if !daemon.has_said("all of its memory is resident") {
                daemon.kill_worker();
            }
            assert_whole(0);
            let changed: Vec<_> =
                (0..5000).map(|key| words(&["SET", &format!("key:{key}"), "changed"])).collect();
            assert!(redis(&socket, &changed).iter().all(|answer| answer == "+OK"));
            assert_whole(5000);
            assert_eq!(redis(&socket, &[words(&["GET", "key:17"])]), ["changed"]);
            daemon.terminate();
            assert_eq!(daemon.wait().code(), Some(0));
            assert_whole(5000);
        }
    });
}
