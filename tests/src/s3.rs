//! An S3 server on a directory, in this process.

use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// The credentials that the server accepts.
pub const ACCESS_KEY: &str = "tests";
/// See [`ACCESS_KEY`].
pub const SECRET_KEY: &str = "a secret of tests";
/// The name of the bucket. Short, because the server makes file names of bucket and key.
pub const BUCKET: &str = "bkt";
/// The region that clients sign their requests with.
pub const REGION: &str = "us-east-1";

/// A running S3 server with one bucket, on loopback.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    dir: TempDir,
    reads: Reads,
    _runtime: Runtime,
}

/// For each part of an object that was read, the number of its readings.
type Reads = Arc<Mutex<HashMap<String, u64>>>;

/// Counts a request, if it reads an object.
fn count(reads: &Reads, request: &hyper::Request<Incoming>) {
    if request.method() == hyper::Method::GET && request.uri().query().is_none() {
        let range = request.headers().get("range").and_then(|range| range.to_str().ok()).unwrap_or("");
        let part = format!("{} {range}", request.uri().path());
        *reads.lock().expect("nobody panics with it").entry(part).or_default() += 1;
    }
}

impl S3Server {
    /// Starts one.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join(BUCKET)).expect("a bucket");
        let files = s3s_fs::FileSystem::new(dir.path()).expect("a directory");
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("threads");
        let listener =
            runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        let reads = Reads::default();
        let counted = Arc::clone(&reads);
        runtime.spawn(async move {
            let connections = Builder::new(TokioExecutor::new());
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("a socket");
                let (service, reads) = (service.clone(), Arc::clone(&counted));
                let answer = move |request: hyper::Request<Incoming>| {
                    count(&reads, &request);
                    hyper::service::Service::call(&service, request)
                };
                let answer = hyper::service::service_fn(answer);
                tokio::spawn(connections.serve_connection(TokioIo::new(socket), answer).into_owned());
            }
        });
        Self { address, dir, reads, _runtime: runtime }
    }

    /// Returns the URL of a store in the bucket.
    #[must_use]
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// Returns where it listens, as a URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the file that holds an object.
    #[must_use]
    pub fn path(&self, key: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(key)
    }

    /// Returns the number of readings of parts of packs, and the number of different such parts.
    ///
    /// # Panics
    /// If a thread has panicked with the counters.
    #[must_use]
    pub fn pack_reads(&self) -> (u64, u64) {
        let reads = self.reads.lock().expect("nobody panics with it");
        let of_packs = reads.iter().filter(|(part, _)| part.contains("/packs/"));
        of_packs.fold((0, 0), |(all, distinct), (_, count)| (all + count, distinct + 1))
    }

    /// Sets the address and the credentials in a command's environment.
    pub fn set(&self, command: &mut Command) {
        command.env("AWS_ENDPOINT", self.endpoint()).env("AWS_ALLOW_HTTP", "true");
        command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        command.env("AWS_REGION", REGION);
    }
}
