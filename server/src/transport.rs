//! Connections: from accept to their end.
//!
//! A new connection is admitted ([`clients`]), must send its HTTP/2 preface within 10 s, and is
//! then served by a task of its own. Each of its requests takes permits ([`admission`]). Messages
//! count until they are complete ([`received`]), answers until the connection has written them
//! ([`unsent`]), both against a budget ([`budget`]). hyper speaks HTTP/2; tonic's
//! own server has no bounds on connections and on what an unread connection holds.

mod admission;
mod budget;
mod clients;
mod received;
pub(crate) mod unsent;

pub(crate) use admission::{exhausted, with_retry_time};

use crate::limits::Limits;
use crate::listen::Listener;
use crate::shutdown::Drain;
use admission::{Permits, Quota};
pub(crate) use clients::Client;
use clients::{ActiveRequest, Admitted, Connection, Connections, Refused};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use received::Received;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::service::Routes;
use unsent::{Metered, StreamUnsent};

/// HTTP/2 windows for bytes from clients, of a stream and of a connection: two streams keep a link
/// of 10 Gbit/s and 10 ms busy. An upload that waits for memory fills its stream's window. Uploads
/// beside it on the connection, some of which hold that memory, must still make progress.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Both windows of a connection that is opened while [`FEW_CONNECTIONS`] are open: a server may
/// hold a window of unread bytes for each.
const SMALL_WINDOW_BYTES: u32 = 256 << 10;

/// Number of open connections up to which a new one has large windows.
const FEW_CONNECTIONS: usize = 16;

/// Most bytes of an HTTP/2 frame from a client, with large windows and with small ones: HTTP/2
/// collects a frame before anything else sees it.
const MAX_FRAME_BYTES: u32 = 1 << 20;
const MAX_SMALL_FRAME_BYTES: u32 = 16 << 10;

/// Most bytes of a request's headers.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// The server notices the silent loss of a client after these two times together.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Time in which a new connection must send its HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

/// Length in bytes of the HTTP/2 preface. See RFC 9113, section 3.4.
const PREFACE_BYTES: usize = 24;

/// Time for a connection that must make room to take leave in order.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time after which a connection ends that reads none of its answers, which would hold the server's
/// memory for ever. An answer counts as read once all of it is: 1 MiB at 4 KiB/s.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Pause after an error of accept, usually a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Least time between two lines of the log about refused connections.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Serves the clients of `listener` until `stop`, then ends their connections in order. Accepts no
/// more of them once `drain` has begun.
pub(crate) async fn serve(
    listener: Listener,
    limits: Limits,
    routes: Routes,
    drain: &Drain,
    stop: impl Future<Output = ()>,
) {
    let (leave, leaving) = watch::channel(false);
    let server = Server {
        connections: Connections::new(limits),
        quota: Quota::of_server(),
        requests_per_connection: limits.requests_per_connection,
        routes: routes.prepare(),
        leaving,
    };
    let mut tasks = JoinSet::new();
    let mut stop = pin!(stop);
    tokio::select! {
        () = accept(listener, &server, &mut tasks, drain) => stop.await,
        // A signal begins the drain before it stops the server.
        () = stop.as_mut() => {}
    }
    leave.send_replace(true);
    drop(server);
    while tasks.join_next().await.is_some() {}
}

/// Accepts connections and spawns their tasks, until `drain` begins. Then closes the listener.
async fn accept(listener: Listener, server: &Server, tasks: &mut JoinSet<()>, drain: &Drain) {
    let mut begun = pin!(drain.begun());
    let mut refusals = Refusals::default();
    let (sockets, _file) = match listener {
        Listener::Tcp(listener) => (Sockets::Tcp(listener), None),
        Listener::Unix(listener, file) => (Sockets::Unix(listener), Some(file)),
    };
    loop {
        let accepted = tokio::select! {
            accepted = sockets.accept() => accepted,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            () = begun.as_mut() => return,
        };
        let (socket, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                refusals.log(&format!("accept: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match server.connections.admit(client) {
            Ok(admitted) => match socket {
                Socket::Tcp(socket) => tasks.spawn(server.clone().connection(socket, admitted)),
                Socket::Unix(socket) => tasks.spawn(server.clone().connection(socket, admitted)),
            },
            Err(refused) => {
                refusals.log(&in_words(&refused));
                continue;
            }
        };
    }
}

fn in_words(refused: &Refused) -> String {
    match refused {
        Refused::Client(Client::Ip(address)) => format!("{address} has its share of connections in use"),
        Refused::Client(Client::User(user)) => format!("user {user} has its share of connections in use"),
        Refused::Server => "all connections are in use".to_owned(),
    }
}

/// The log of refused connections: a line for several of them.
#[derive(Default)]
struct Refusals {
    logged_at: Option<Instant>,
    unlogged: u64,
}

impl Refusals {
    fn log(&mut self, reason: &str) {
        self.unlogged += 1;
        if self.logged_at.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            return;
        }
        tracing::warn!("refused {} connections, the last one because: {reason}", self.unlogged);
        *self = Self { logged_at: Some(Instant::now()), unlogged: 0 };
    }
}

enum Sockets {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Sockets {
    async fn accept(&self) -> io::Result<(Socket, Client)> {
        match self {
            Self::Tcp(listener) => {
                let (socket, address) = listener.accept().await?;
                socket.set_nodelay(true)?;
                Ok((Socket::Tcp(socket), Client::of_ip(address.ip())))
            }
            Self::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                let user = socket.peer_cred()?.uid();
                Ok((Socket::Unix(socket), Client::User(user)))
            }
        }
    }
}

/// The state that all connections of a server share.
#[derive(Clone)]
struct Server {
    connections: Arc<Connections>,
    quota: Arc<Quota>,
    requests_per_connection: u32,
    routes: Routes,
    /// True once connections must end.
    leaving: watch::Receiver<bool>,
}

impl Server {
    /// Serves one connection.
    async fn connection(self, socket: impl AsyncRead + AsyncWrite + Unpin, admitted: Admitted) {
        let http = self.http();
        let Self { routes, quota, mut leaving, .. } = self;
        let (client, connection) = (admitted.client, Arc::clone(&admitted.connection));
        let answer = service_fn(move |request| {
            answer(routes.clone(), Arc::clone(&quota), (client, Arc::clone(&connection)), request)
        });
        let mut serving = pin!(http.serve_connection(TokioIo::new(Prefaced::new(socket)), answer));
        let connection = &admitted.connection;
        tokio::select! {
            // Connections end by errors of their peers, which concern no one else.
            _ = serving.as_mut() => return,
            () = reads_nothing(connection) => return,
            () = connection.must_close() => {}
            _ = leaving.wait_for(|leaving| *leaving) => {}
        }
        if !connection.has_requested() {
            return;
        }
        serving.as_mut().graceful_shutdown();
        tokio::select! {
            _ = serving => {}
            () = has_left(connection, leaving) => {}
        }
    }

    fn http(&self) -> http2::Builder<TokioExecutor> {
        let (stream_window, connection_window, frame) = match self.connections.count() <= FEW_CONNECTIONS {
            true => (STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES, MAX_FRAME_BYTES),
            false => (SMALL_WINDOW_BYTES, SMALL_WINDOW_BYTES, MAX_SMALL_FRAME_BYTES),
        };
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .initial_stream_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_frame_size(frame)
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_concurrent_streams(self.requests_per_connection)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        http
    }
}

/// Waits until a connection that must make room has been idle for [`LEAVE_TIMEOUT`]. While the
/// server itself ends, its own limit of time holds.
async fn has_left(connection: &Connection, leaving: watch::Receiver<bool>) {
    loop {
        tokio::time::sleep(LEAVE_TIMEOUT).await;
        if connection.is_idle() && !*leaving.borrow() {
            return;
        }
    }
}

/// Waits until a connection has had unread answers for [`UNREAD_TIMEOUT`] and has read none of them.
async fn reads_nothing(connection: &Connection) {
    loop {
        let before = connection.unsent.given_back();
        let was_empty = connection.unsent.is_empty();
        tokio::time::sleep(UNREAD_TIMEOUT).await;
        if !was_empty && !connection.unsent.is_empty() && connection.unsent.given_back() == before {
            return;
        }
    }
}

/// Answers one request, if it gets permits.
async fn answer(
    mut routes: Routes,
    server: Arc<Quota>,
    (client, connection): (Client, Arc<Connection>),
    request: Request<Incoming>,
) -> Result<Response<Metered<Option<InFlight>>>, Infallible> {
    let stream = StreamUnsent::new(Arc::clone(&connection.unsent));
    let permits = match admission::admit(&server, &connection.quota, request.uri().path()) {
        Ok(permits) => permits,
        Err(status) => return Ok(status.into_http::<Body>().map(|body| stream.meter(body, None))),
    };
    let in_flight = InFlight { _active: connection.begin_request(), _permits: permits };
    let mut request = request.map(|body| Body::new(Received::new(body, Arc::clone(&connection.unfinished))));
    request.extensions_mut().insert(stream.clone());
    request.extensions_mut().insert(client);
    let response = routes.call(request).await?;
    Ok(response.map(|body| stream.meter(body, Some(in_flight))))
}

/// A request that is being answered, until the end of its answer.
#[derive(Debug)]
struct InFlight {
    _active: ActiveRequest,
    _permits: Permits,
}

/// A socket whose reads fail unless a preface's bytes arrive in time.
struct Prefaced<S> {
    socket: S,
    missing_bytes: usize,
    deadline: Pin<Box<Sleep>>,
}

impl<S> Prefaced<S> {
    fn new(socket: S) -> Self {
        let deadline = Box::pin(tokio::time::sleep(PREFACE_TIMEOUT));
        Self { socket, missing_bytes: PREFACE_BYTES, deadline }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefaced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.missing_bytes > 0 && self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        self.missing_bytes = self.missing_bytes.saturating_sub(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefaced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
