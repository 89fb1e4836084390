//! A balancer before the nodes of a bucket. It forwards each connection to a node that answers, and
//! counts the bytes that come from it.

use anyhow::Result;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// A running balancer.
pub(crate) struct Balancer {
    port: u16,
    shared: Arc<Shared>,
    _runtime: Runtime,
}

struct Shared {
    nodes: Vec<u16>,
    next: AtomicUsize,
    received: AtomicU64,
}

impl Balancer {
    pub(crate) fn start(nodes: Vec<u16>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let shared = Shared { nodes, next: AtomicUsize::new(0), received: AtomicU64::new(0) };
        let shared = Arc::new(shared);
        let of_connections = Arc::clone(&shared);
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("it is bound");
            loop {
                match listener.accept().await {
                    Ok((client, _)) => drop(tokio::spawn(Arc::clone(&of_connections).serve(client))),
                    // No descriptor is free, or the client has gone already.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(Self { port, shared, _runtime: runtime })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Returns the count of bytes that have come from the nodes.
    pub(crate) fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }
}

impl Shared {
    async fn serve(self: Arc<Self>, client: TcpStream) {
        let Some(node) = self.connect().await else { return };
        let _ = (client.set_nodelay(true), node.set_nodelay(true));
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_node, mut to_node) = node.into_split();
        let there = tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_client, &mut to_node).await;
            let _ = to_node.shutdown().await;
        });
        let mut buffer = vec![0; 64 << 10];
        while let Ok(bytes @ 1..) = from_node.read(&mut buffer).await {
            self.received.fetch_add(bytes as u64, Ordering::Relaxed);
            if to_client.write_all(&buffer[..bytes]).await.is_err() {
                break;
            }
        }
        there.abort();
    }

    /// Connects to the next node that listens.
    async fn connect(&self) -> Option<TcpStream> {
        for _ in 0..self.nodes.len() {
            let number = self.next.fetch_add(1, Ordering::Relaxed) % self.nodes.len();
            if let Ok(node) = TcpStream::connect(("127.0.0.1", self.nodes[number])).await {
                return Some(node);
            }
        }
        None
    }
}
