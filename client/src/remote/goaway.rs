//! Servers that end their connections with GOAWAY.

use super::lane::DemandLane;
use super::{Patience, Remote, RemoteError, ServerAddress, pings};
use postcopy_proto::digest::Digest;
use postcopy_proto::v1;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
const NO_ERROR: u32 = 0;
const ENHANCE_YOUR_CALM: u32 = 11;

/// The GOAWAY frame of a server that processes requests up to the stream `last`. See RFC 9113,
/// section 6.8.
fn goaway(last: u32, code: u32, debug: &str) -> Vec<u8> {
    let length = u8::try_from(8 + debug.len()).expect("a short text");
    let head = [0, 0, length, 7, 0, 0, 0, 0, 0];
    [&head[..], &last.to_be_bytes(), &code.to_be_bytes(), debug.as_bytes()].concat()
}

async fn listen() -> (TcpListener, ServerAddress) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("it is bound"));
    (listener, address.parse().expect("an address"))
}

/// Accepts a connection, waits until the client has sent its first request, and sends `frame`.
async fn accept(listener: &TcpListener, frame: &[u8]) -> TcpStream {
    let (mut stream, _) = listener.accept().await.expect("a client");
    stream.write_all(&SETTINGS).await.expect("sent");
    let mut received = Vec::new();
    let is_headers = |bytes: &[u8]| bytes.windows(7).any(|head| head[3..] == [1, 4, 0, 0]);
    while !is_headers(&received) {
        assert_ne!(stream.read_buf(&mut received).await.expect("frames"), 0, "the client is gone");
    }
    stream.write_all(frame).await.expect("sent");
    stream
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let test = async { tokio::time::timeout(Duration::from_secs(30), test).await };
    runtime.expect("a runtime").block_on(test).expect("it ends within 30 s");
}

/// A request that may have been processed is not sent again: the server answers, or it fails.
#[test]
fn requests_that_a_goaway_excludes_are_sent_again_and_no_others() {
    run(async {
        let (listener, address) = listen().await;
        let server = async {
            let excluded = goaway(0, NO_ERROR, "");
            let first = accept(&listener, &excluded).await;
            let second = accept(&listener, &excluded).await;
            let third = accept(&listener, &goaway(1, NO_ERROR, "")).await;
            drop((first, second, third));
            // A fourth connection would not be refused, and its request would never end.
            listener
        };
        let client = async {
            let remote = Remote::connect(address.clone()).await.expect("it listens");
            let ask = || {
                let mut images = remote.images();
                async move { images.list_images(v1::ListImagesRequest::default()).await }
            };
            remote.ask("listing the images", Patience::Change, ask).await.map(drop)
        };
        let (_listener, answer) = tokio::join!(server, client);
        let error = answer.expect_err("no server answered");
        assert!(matches!(error, RemoteError::Status { .. }), "{error}");
    });
}

/// h2 reports the code of a GOAWAY on the streams that the GOAWAY excludes, and on no others.
#[test]
fn pings_are_half_as_frequent_after_too_many_of_them() {
    run(async {
        let (listener, address) = listen().await;
        let before = pings::interval();
        let calm = goaway(0, ENHANCE_YOUR_CALM, "too_many_pings");
        let server = async { drop(accept(&listener, &calm).await) };
        let client = async {
            let mut lane = DemandLane::open(&address, &Digest::of(b"")).await.expect("it listens");
            lane.answer().await
        };
        let ((), answer) = tokio::join!(server, client);
        answer.expect_err("the connection has ended");
        assert_eq!(pings::interval(), before * 2);
    });
}
