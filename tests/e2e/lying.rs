//! A server that lies is refused by name, and nothing of what it says is installed.

mod answers;
mod chunks;
mod images;
mod manifests;

use crate::map::push;
use postcopy::{Options, Session};
use postcopy_tests::chaos::{Chaos, Lies};
use postcopy_tests::fixtures::memory_like;
use postcopy_tests::server::Server;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 24;
/// Longer than any test here takes, so that no test ends by the deadline.
const PATIENT: Options = Options::DEFAULT.fault_deadline(Duration::from_secs(60));
/// For answers that are none, so that the deadline has to decide.
const IMPATIENT: Options = PATIENT.fault_deadline(Duration::from_secs(1));
const WATCHDOG: Duration = Duration::from_secs(100);

/// An honest server that has the image `app` of one file, `mem`, without a zero chunk.
struct Truth {
    server: Server,
    bytes: Arc<Vec<u8>>,
    _folder: TempDir,
}

impl Truth {
    fn start() -> Self {
        let server = Server::start();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mem");
        let bytes = memory_like(CHUNKS * CHUNK, 9);
        std::fs::write(&path, &bytes).unwrap();
        push(&server, &path, "app", CHUNK);
        Self { server, bytes: Arc::new(bytes), _folder: folder }
    }

    fn told_with(&self, lies: Lies) -> Chaos {
        Chaos::start(self.server.address(), lies)
    }
}

fn open(chaos: &Chaos, options: Options) -> Session {
    Session::open(chaos.address(), &"app".parse().unwrap(), options).unwrap()
}
