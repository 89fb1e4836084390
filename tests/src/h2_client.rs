//! A client that speaks HTTP/2 by hand: it may stop reading, and may leave messages unfinished.

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use postcopy::ServerAddress;
use prost::Message;
use std::io;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;

/// A socket that can be told to read nothing more.
#[derive(Debug)]
struct MayBeDeaf {
    socket: TcpStream,
    is_deaf: Arc<AtomicBool>,
}

impl AsyncRead for MayBeDeaf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.is_deaf.load(Ordering::Acquire) {
            true => Poll::Pending,
            false => Pin::new(&mut self.socket).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for MayBeDeaf {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// An HTTP/2 connection with the largest windows. Use it within a runtime.
#[derive(Debug)]
pub struct H2Client {
    send: SendRequest<Bytes>,
    is_deaf: Arc<AtomicBool>,
    driver: JoinHandle<()>,
}

/// Connects a socket from an address of loopback.
///
/// # Errors
/// The error of connect(2).
///
/// # Panics
/// If the address is none of TCP.
pub async fn connect(from: Ipv4Addr, address: &ServerAddress) -> io::Result<TcpStream> {
    let address = address.to_string();
    let address = address.trim_start_matches("http://").parse().expect("an address of TCP");
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect(address).await
}

/// A stream of it. The request goes on until it is finished or dropped.
#[derive(Debug)]
pub struct H2Stream {
    response: ResponseFuture,
    request: SendStream<Bytes>,
}

impl H2Client {
    /// Connects from an address of loopback: the server takes each for a client of its own.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn connect(from: Ipv4Addr, address: &ServerAddress) -> Self {
        let socket = connect(from, address).await.expect("it accepts");
        let is_deaf = Arc::new(AtomicBool::new(false));
        let socket = MayBeDeaf { socket, is_deaf: Arc::clone(&is_deaf) };
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size((1 << 31) - 1).initial_connection_window_size((1 << 31) - 1);
        let (send, connection) = builder.handshake(socket).await.expect("a handshake");
        let driver = tokio::spawn(async move {
            // The end of the connection is seen by its streams.
            let _ = connection.await;
        });
        Self { send, is_deaf, driver }
    }

    /// Reads nothing more of the connection; what it requests is still sent.
    pub fn stop_reading(&self) {
        self.is_deaf.store(true, Ordering::Release);
    }

    /// Begins a request to `service/method`.
    ///
    /// # Errors
    /// The connection has ended.
    ///
    /// # Panics
    /// If the path is not valid.
    pub async fn begin(&self, path: &str) -> Result<H2Stream, h2::Error> {
        let request = http::Request::post(format!("http://localhost/postcopy.v1.{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        let mut send = self.send.clone().ready().await?;
        let (response, request) = send.send_request(request, false)?;
        Ok(H2Stream { response, request })
    }
}

impl Drop for H2Client {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Returns a message with gRPC's prefix.
#[must_use]
pub fn framed(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.len()).expect("a short message"));
    bytes.put(&message[..]);
    bytes.freeze()
}

impl H2Stream {
    /// Sends bytes of the request.
    ///
    /// # Errors
    /// The stream has ended.
    pub fn send(&mut self, bytes: Bytes, is_last: bool) -> Result<(), h2::Error> {
        self.request.send_data(bytes, is_last)
    }

    /// Waits until the server has begun to answer. Returns both directions, which are open.
    ///
    /// # Errors
    /// The stream was reset, or the connection has ended.
    pub async fn accepted(self) -> Result<(SendStream<Bytes>, RecvStream), h2::Error> {
        Ok((self.request, self.response.await?.into_body()))
    }

    /// Waits for the answer's status: of its headers, or of its trailers after all messages.
    /// Returns the code, and the bytes of the messages.
    ///
    /// # Errors
    /// The stream was reset, or the connection has ended.
    pub async fn status(self) -> Result<(i32, usize), h2::Error> {
        let response = self.response.await?;
        if let Some(code) = code(response.headers()) {
            return Ok((code, 0));
        }
        let mut body: RecvStream = response.into_body();
        let mut received = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            received += data.len();
            body.flow_control().release_capacity(data.len())?;
        }
        let trailers = body.trailers().await?;
        Ok((trailers.as_ref().and_then(code).unwrap_or(-1), received))
    }
}

fn code(headers: &http::HeaderMap) -> Option<i32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
