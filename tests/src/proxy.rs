//! A TCP proxy that breaks connections: what a network does to a client.
//!
//! It listens on loopback and forwards bytes to a server. A [`Break`] says after how many bytes, how, and what
//! becomes of later connections; it can be changed while connections go on.

use postcopy::ServerAddress;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// In order: a FIN to both sides.
    Close,
    /// At once: an RST to both sides.
    Reset,
    /// Not at all: no byte goes either way any more.
    Stall,
}

/// When connections break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Never.
    Never,
    /// Each connection once it has carried `bytes` that way; at once if that is 0.
    Each {
        /// Which way they are counted.
        direction: Direction,
        /// How many go through before.
        bytes: u64,
        /// How it ends.
        how: How,
    },
    /// The connection that carries the byte `bytes` after the proxy's start, and no other.
    Once {
        /// Which way they are counted.
        direction: Direction,
        /// How many go through before.
        bytes: u64,
        /// How it ends.
        how: How,
    },
    /// All, from the byte `bytes` after the proxy's start on; those that come later end at once.
    All {
        /// Which way they are counted.
        direction: Direction,
        /// How many go through before.
        bytes: u64,
        /// How they end.
        how: How,
    },
}

#[derive(Debug)]
struct Shared {
    // Held for reading and setting it alone.
    when: Mutex<Break>,
    to_server: AtomicU64,
    to_client: AtomicU64,
    connections: AtomicU64,
    /// Set to end all connections that there are.
    epoch: watch::Sender<(u64, How)>,
}

impl Shared {
    fn when(&self) -> Break {
        *self.when.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn passed(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    /// Counts `len` bytes that want to go that way; how many may, and how the connection ends after them.
    fn allow(&self, way: Direction, carried: &AtomicU64, len: u64) -> (u64, Option<How>) {
        let in_all = self.passed(way).fetch_add(len, Ordering::SeqCst);
        let here = carried.fetch_add(len, Ordering::SeqCst);
        let (limit, before, how) = match self.when() {
            Break::Each { direction, bytes, how } if direction == way => (bytes, here, how),
            Break::Once { direction, bytes, how } if direction == way && in_all <= bytes => {
                (bytes, in_all, how)
            }
            Break::All { direction, bytes, how } if direction == way => (bytes, in_all, how),
            _ => return (len, None),
        };
        let room = limit.saturating_sub(before);
        if room >= len { (len, None) } else { (room, Some(how)) }
    }

    /// How a connection that has just come ends at once, if it does.
    fn at_once(&self) -> Option<How> {
        match self.when() {
            Break::Each { bytes: 0, how, .. } => Some(how),
            Break::All { direction, bytes, how } => {
                (self.passed(direction).load(Ordering::SeqCst) >= bytes).then_some(how)
            }
            _ => None,
        }
    }
}

/// A running proxy; it and its connections end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: ServerAddress,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl Proxy {
    /// Starts a proxy on a free port that forwards to `server`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(server: &ServerAddress, when: Break) -> Self {
        let server = server.to_string();
        let server = server.trim_start_matches("http://").trim_end_matches('/').parse();
        let server: SocketAddr = server.expect("a server on an address of loopback");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Arc::new(Shared {
            when: Mutex::new(when),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            epoch: watch::Sender::new((0, How::Close)),
        });
        let accepting = Arc::clone(&shared);
        // Ends with the runtime, as do the connections.
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                accepting.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(carry(client, server, Arc::clone(&accepting)));
            }
        });
        Self { address: address.parse().expect("an address"), shared, runtime: Some(runtime) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// Breaks connections in another way from now on.
    pub fn set(&self, when: Break) {
        *self.shared.when.lock().unwrap_or_else(PoisonError::into_inner) = when;
    }

    /// Ends all connections that there are.
    pub fn end_all(&self, how: How) {
        self.shared.epoch.send_modify(|(epoch, last)| {
            *epoch += 1;
            *last = how;
        });
    }

    /// Bytes that wanted to go that way since the start.
    #[must_use]
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.shared.passed(direction).load(Ordering::SeqCst)
    }

    /// Connections since the start.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn carry(client: TcpStream, server: SocketAddr, shared: Arc<Shared>) {
    let mut epoch = shared.epoch.subscribe();
    if let Some(how) = shared.at_once() {
        return end(how, &[&client]).await;
    }
    let Ok(server) = TcpStream::connect(server).await else { return };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (mut up, mut down) = ((from_client, to_server), (from_server, to_client));
    let how = tokio::select! {
        how = forward(&mut up, Direction::ToServer, &shared) => how,
        how = forward(&mut down, Direction::ToClient, &shared) => how,
        _ = epoch.changed() => epoch.borrow().1,
    };
    end(how, &[up.0.as_ref(), down.0.as_ref()]).await;
}

async fn forward(
    (from, to): &mut (OwnedReadHalf, OwnedWriteHalf),
    direction: Direction,
    shared: &Shared,
) -> How {
    let carried = AtomicU64::new(0);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(len @ 1..) = from.read(&mut buffer).await else { return How::Close };
        let (allowed, ending) = shared.allow(direction, &carried, len as u64);
        let allowed = usize::try_from(allowed).expect("at most what was read");
        if to.write_all(&buffer[..allowed]).await.is_err() {
            return How::Close;
        }
        if let Some(how) = ending {
            return how;
        }
    }
}

/// Ends the streams, which are dropped after this.
async fn end(how: How, streams: &[&TcpStream]) {
    match how {
        How::Close => {}
        // With no time to linger, closing it sends an RST.
        How::Reset => streams.iter().for_each(|stream| drop(stream.set_zero_linger())),
        How::Stall => std::future::pending().await,
    }
}
