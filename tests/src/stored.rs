//! A server that stores one file.

use crate::cli::run;
use crate::server::Server;

/// A server with an image `app`, of one file `mem`.
#[derive(Debug)]
pub struct StoredFile {
    /// The server that stores the file.
    pub server: Server,
    /// The file's bytes.
    pub bytes: Vec<u8>,
}

impl StoredFile {
    /// Starts a server, and pushes these bytes to it in chunks of so many bytes.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(bytes: Vec<u8>, chunk_bytes: usize) -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("mem");
        std::fs::write(&path, &bytes).expect("there is room");
        let (server, chunk_bytes) = (Server::start(), chunk_bytes.to_string());
        let push = ["push".as_ref(), path.as_os_str(), "app".as_ref()];
        let _ =
            run(server.address(), push.into_iter().chain(["--chunk-size".as_ref(), chunk_bytes.as_ref()]));
        Self { server, bytes }
    }
}
