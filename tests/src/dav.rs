//! A WebDAV server that keeps its files in memory, in this process.

use dav_server::DavHandler;
use dav_server::memfs::MemFs;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use std::convert::Infallible;
use std::net::SocketAddr;
use tokio::runtime::Runtime;

/// A running WebDAV server, on loopback.
#[derive(Debug)]
pub struct DavServer {
    address: SocketAddr,
    _runtime: Runtime,
}

impl DavServer {
    /// Starts a server without files.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        let files = DavHandler::builder().filesystem(MemFs::new()).build_handler();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("threads");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        runtime.spawn(async move {
            let connections = Builder::new(TokioExecutor::new());
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("a socket");
                let files = files.clone();
                let answer = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
                    let files = files.clone();
                    async move { Ok::<_, Infallible>(files.handle(request).await) }
                });
                tokio::spawn(connections.serve_connection(TokioIo::new(socket), answer).into_owned());
            }
        });
        Self { address, _runtime: runtime }
    }

    /// Returns the URL of a store on the server.
    #[must_use]
    pub fn url(&self, prefix: &str) -> String {
        format!("http://{}/{prefix}", self.address)
    }
}
